"""The console script `afterok`, installed as the package `afterok`: no user's folder is likely to have that name."""

import os
import runpy
import sys
from pathlib import Path


def main() -> int:
    """Run the command line of the packages that were installed with this one, whatever PYTHONPATH has before them.

    Where the locale's encoding is another than UTF-8, Python is started again in its UTF-8 mode: the paths and texts of
    a run are the same in every shell.
    """
    if "utf" not in sys.getfilesystemencoding() and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    own_packages = Path("data_tools", "own_packages.py")
    root = next(folder for folder in Path(__file__).resolve().parents if (folder / own_packages).is_file())
    runpy.run_path(str(root / own_packages))["hold"](children=False)
    from launchers.cli import main as run

    return run()
