"""The console script `afterok`, installed as the package `afterok`: no user's folder is likely to have that name."""

import runpy
from pathlib import Path


def main() -> int:
    """Run the command line of the packages that were installed with this one, whatever PYTHONPATH has before them."""
    own_packages = Path("data_tools", "own_packages.py")
    root = next(folder for folder in Path(__file__).resolve().parents if (folder / own_packages).is_file())
    runpy.run_path(str(root / own_packages))["hold"](children=False)
    from launchers.cli import main as run

    return run()
