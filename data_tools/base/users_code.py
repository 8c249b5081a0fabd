"""Modules of the user's own: whatever goes wrong where one is imported is one line that names its file and line."""

import importlib
import importlib.util
import traceback
from importlib.machinery import ModuleSpec
from types import ModuleType

from data_tools.mistake import UserMistake
from data_tools.own_packages import taken


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


def _why(name: str, error: BaseException) -> str:
    said = f"module {name!r} cannot be imported: "
    if isinstance(error, ImportError):
        return f"{said}{' '.join(str(error).split())}{taken(name)}"
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames and not isinstance(error, SyntaxError) else ""
    if isinstance(error, SystemExit):
        return f"{said}{at}it ends the program"
    return f"{said}{at}{type(error).__name__}: {' '.join(str(error).split())}"
