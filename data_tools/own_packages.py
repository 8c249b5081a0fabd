"""Our five packages come from one folder, whatever folders of the same names lie on Python's path.

A user's project may have folders called jobs, slurm or launchers, and PYTHONPATH may name it. What runs as a program
loads this file by its place, before any other of ours, since `data_tools` may be one of those folders:

    import runpy
    runpy.run_path(__file__.rsplit("jobs", 1)[0] + "data_tools/own_packages.py")["hold"]()
"""

import importlib.machinery
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = "0.1.0"  # of afterok; setup.py reads this line
PACKAGES = ("data_tools", "megatron_ext", "slurm", "jobs", "launchers")
ROOT = str(Path(__file__).resolve().parents[1])


class OwnPackages:
    """Finds our packages below ROOT, before Python looks through its path."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        return importlib.machinery.PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


def hold(children: bool = True) -> None:
    """Have our packages found below ROOT, by this process and (with `children`) by the Python processes it starts.

    Exits with code 2 and one line where one of them was imported from elsewhere already.
    """
    for name in PACKAGES:
        for place in getattr(sys.modules.get(name), "__path__", []):
            if os.path.realpath(place) != os.path.join(ROOT, name):
                print(
                    f"afterok: the package {name} was imported from {place}, not from {ROOT}: a folder of yours has "
                    "its name; start with PYTHONSAFEPATH=1 and without that folder's parent in PYTHONPATH",
                    file=sys.stderr,
                )
                sys.exit(2)
    sys.meta_path.insert(0, OwnPackages)
    if children:
        os.environ.update(environment(os.environ))
        sys.path.insert(0, ROOT)  # what multiprocessing and the verifiers' processes take over


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a child's environment has to say for it to find our packages first."""
    named = [place for place in environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    ours_found = not named and Path(ROOT).name in ("site-packages", "dist-packages")
    path = {} if ours_found else {"PYTHONPATH": os.pathsep.join([ROOT, *(p for p in named if p != ROOT)])}
    return {"PYTHONSAFEPATH": "1", **path}


def taken(module: str) -> str:
    """Return a remark for a user's module that has the name of one of our packages, else ""."""
    first = module.partition(".")[0]
    return f" ({first} is a package of afterok itself: give yours another name)" if first in PACKAGES else ""
