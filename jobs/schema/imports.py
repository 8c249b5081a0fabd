"""What Python files import, read from their text: which of our own and of the user's files a phase depends on.

Nothing is executed. An import whose name is made at run time (`import_module(f"data_tools.tasks.{name}")`) stands for
every module below the part that is written out.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath

from data_tools.own_packages import PACKAGES

_DISPATCHERS = ("jobs.phases.",)  # imported by name for every phase alike: no phase depends on the others


def closure(names: Iterable[str], files: Mapping[str, Path]) -> set[str]:
    """Return those of `files` ({name below the code's root: file}) that the modules `names` import, and their own."""
    reached: set[str] = set()
    waiting = [file for name in names for file in _files_of(name, files)]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        if name.endswith(".py"):
            waiting += [file for module in imported(files[name], PurePath(name)) for file in _files_of(module, files)]
    return reached


def _files_of(module: str, files: Mapping[str, Path]) -> list[str]:
    """Return the files that importing `my.module` runs; of `my.` (a name made at run time) all below it."""
    if module.endswith("."):
        return [name for name in files if name.startswith(module.replace(".", "/"))]
    parts = module.split(".")
    above = ["/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts) + 1)]
    return [name for name in (*above, "/".join(parts) + ".py") if name in files]


def imported(file: Path, name: PurePath) -> set[str]:
    """Return the dotted names that a file imports anywhere in it; `name` is its place below the code's root."""
    package = list(name.parent.parts)
    return {
        module
        for level, module in _imports(file, file.stat().st_mtime_ns)
        for module in [".".join([*package[: len(package) - level + 1], module]) if level else module]
        if module not in _DISPATCHERS
    }


@functools.cache
def _imports(file: Path, changed: int) -> frozenset[tuple[int, str]]:
    """Return (level of a relative import, dotted name) of each import; a file that is no Python has none."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return frozenset()
    return frozenset(_walk(tree))


def _walk(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (level of a relative import, dotted name) of each import, and of import_module with a written name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:  # a name of a module, or a module itself
                yield node.level, f"{module}.{alias.name}" if module else alias.name
            if module:
                yield node.level, module
        elif isinstance(node, ast.Call) and _called(node).endswith("import_module") and node.args:
            if written := _written(node.args[0]):
                yield 0, written


def _called(call: ast.Call) -> str:
    """Return the last name of what is called: `import_module` of `importlib.import_module(...)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _written(argument: ast.expr) -> str:
    """Return the name that import_module is called with, up to the first part that is made at run time."""
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
        text = str(argument.values[0].value)
        return text[: text.rindex(".") + 1] if "." in text else ""
    return ""


def beside(root: Path) -> list[Path]:
    """Return the modules beside a user's module or package that it imports, and those that these import.

    Only what Python itself would import from there: installed packages are installed where the job runs, too. A file in
    which no name from beside stands behind an `import` is not parsed: parsing a large package takes seconds.
    """
    if root.parent.name in ("site-packages", "dist-packages"):
        return []
    places_beside = [place for place in root.parent.iterdir() if place.suffix == ".py" or place.is_dir()]
    names = {name for place in places_beside if "." not in (name := place.name.removesuffix(".py"))}
    names -= {root.stem, *PACKAGES}
    mentioned = _mentioned(names)
    places: dict[str, Path] = {}
    waiting = [root] if names else []
    while waiting:
        code = waiting.pop()
        for file in [code] if code.is_file() else sorted(code.rglob("*.py")):
            if not _mentions(file, _changed(file), mentioned):
                continue
            for first in {module.split(".")[0] for module in imported(file, PurePath(file.name))} & names:
                place = _place_beside(root, first)
                if place and first not in places:
                    places[first] = place
                    waiting.append(place)
    return sorted(places.values())


def _mentioned(names: Iterable[str]) -> re.Pattern[bytes]:
    """Return a pattern that is found in every file without continued lines that imports one of `names`."""
    name = rb"(?<![\w\x80-\xff])(?:" + "|".join(sorted(map(re.escape, names))).encode() + rb")(?![\w\x80-\xff])"
    return re.compile(rb"import_module.*?" + name + rb"|\b(?:import|from)\b[^\n]*?" + name, re.DOTALL)


@functools.cache
def _mentions(file: Path, changed: int, names: re.Pattern[bytes]) -> bool:
    """Return whether a pattern is found in a file, its continued lines joined; not in one that cannot be read."""
    try:
        return names.search(re.sub(rb"\\\r?\n", b" ", file.read_bytes())) is not None
    except OSError:
        return False


def _changed(file: Path) -> int:
    """Return when a file changed last, in nanoseconds; 0 of a link that leads nowhere."""
    return file.stat().st_mtime_ns if file.exists() else 0


def _place_beside(root: Path, name: str) -> Path | None:
    """Return the module or package `name` beside a user's, where Python itself would import it from there."""
    places = [place for place in (root.parent / name, root.parent / f"{name}.py") if place.exists()]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    where = list(spec.submodule_search_locations or []) or [spec.origin or "/"]
    return next((place for place in places if place.samefile(where[0])), None)
