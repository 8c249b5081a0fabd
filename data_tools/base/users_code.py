"""Modules of the user's own: whatever goes wrong where one is imported is one line that names its file and line."""

import difflib
import importlib
import importlib.util
import os
import sysconfig
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from data_tools.mistake import UserMistake
from data_tools.own_packages import PACKAGES, ROOT, taken

_OURS = [os.path.join(ROOT, package) for package in PACKAGES]
_LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def load(name: str) -> ModuleType:
    """Import the module `name`. Raise UserMistake where that cannot be done."""
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a user's module does
        raise UserMistake(_why(name, error)) from None


def find(name: str) -> ModuleSpec | None:
    """Return where the module `name` lies, None where there is none; it is not run, but its packages are.

    Raise UserMistake where these cannot be imported.
    """
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    except (Exception, SystemExit) as error:
        raise UserMistake(_why(name, error)) from None


def raised_at(error: BaseException) -> str:
    """Return ` (FILE:LINE)` of the user's code that an error came through last, "" where it came through none."""
    others = ("<", *(f"{place}{os.sep}" for place in (*_OURS, *_LIBRARIES)))
    told = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if not (file := frame.f_code.co_filename).startswith(others):
            told = f" ({os.path.basename(file)}:{line})"
    return told


def not_there(name: str) -> str:
    """Return where the module `name` was looked for, which is not there, and which name there comes closest to it."""
    package, _, last = name.rpartition(".")
    found = find(package) if package else None
    if found is not None:
        folders = list(found.submodule_search_locations or [])
    else:  # what is missing is the first part of the name, in one of the user's own folders
        package, last = "", name.partition(".")[0]
        named = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place not in ("", ROOT)]
        folders = list(dict.fromkeys([os.getcwd(), *named]))
    close = difflib.get_close_matches(last, sorted(set().union(*map(_modules_in, folders))), n=1, cutoff=0.7)
    rest = name.partition(".")[1:] if not package and "." in name else ("", "")
    meant = f" (did you mean {package + '.' if package else ''}{close[0]}{''.join(rest)}?)" if close else ""
    return f"{taken(name)}{meant}; looked in {', '.join(folders) or f'{package}, which is a module'}"


def _modules_in(folder: str) -> set[str]:
    """Return the names of the modules and packages of a folder."""
    try:
        paths = list(Path(folder).iterdir())
    except OSError:
        return set()
    names = {path.stem for path in paths if path.suffix == ".py"}
    names |= {path.name for path in paths if path.is_dir() and any(path.glob("*.py"))}
    return {name for name in names if name.isidentifier()}


def _why(name: str, error: BaseException) -> str:
    said = f"module {name!r} cannot be imported: "
    if isinstance(error, ImportError):
        return f"{said}{' '.join(str(error).split())}{taken(name)}"
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames and not isinstance(error, SyntaxError) else ""
    if isinstance(error, SystemExit):
        return f"{said}{at}it ends the program"
    return f"{said}{at}{type(error).__name__}: {' '.join(str(error).split())}"
