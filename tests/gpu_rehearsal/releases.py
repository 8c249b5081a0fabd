"""Sources of pinned releases, unpacked below the temporary folder and kept there.

Of these only interpreted.py imports anything, in a process of its own.
"""

import ast
import copy
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

KEPT = Path(tempfile.gettempdir()) / "afterok-gpu-releases"
# A sdist's setup.py runs when pip asks it for its name; these keep it from looking for a CUDA compiler.
NO_COMPILER = {f"{name}_SKIP_CUDA_BUILD": "TRUE" for name in ("MAMBA", "CAUSAL_CONV1D", "FLASH_ATTENTION")}


def _pip(*arguments: str, path: str = "") -> None:
    environment = {**os.environ, **NO_COMPILER, "PYTHONPATH": path}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no package index: pip {' '.join(arguments[:1])} took more than 120 s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        pytest.skip(f"no package index, or none with {arguments[-1]}: {last}")


def unpacked(name: str, version: str, wheel: bool) -> Path:
    """Return the folder with the sources of a release, which has the packages as subfolders.

    Skips the test where no package index answers.
    """
    target = KEPT / f"{name}-{version}"
    if not target.is_dir():
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as work:
            folder = Path(work)
            if wheel:
                _pip("download", "-q", "--no-deps", "--only-binary=:all:", "-d", work, f"{name}=={version}")
            else:
                tools = folder / "tools"  # setup.py of both sdists imports `wheel`
                _pip("install", "-q", "--no-deps", "--target", str(tools), "wheel")
                _pip(
                    *("download", "-q", "--no-deps", "--no-build-isolation", "--no-binary=:all:", "-d", work),
                    f"{name}=={version}",
                    path=str(tools),
                )
            _unpack(folder, folder / "unpacked")
            try:
                (folder / "unpacked").rename(target)
            except OSError:  # another test process was first
                pass
    return target


def installed(name: str, version: str) -> Path:
    """Return a folder, for a process's path, with nothing but this package in it, which may be imported.

    Skips the test where no package index answers.
    """
    target = KEPT / f"{name}-{version}-installed"
    if not target.is_dir():
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as work:
            _pip("install", "-q", "--no-deps", "--only-binary=:all:", "--target", f"{work}/all", f"{name}=={version}")
            try:
                Path(work, "all").rename(target)
            except OSError:  # another test process was first
                pass
    return target


def _unpack(folder: Path, target: Path) -> None:
    (archive,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    target.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target, [name for name in wheel.namelist() if name.endswith(".py")])
        return
    with tarfile.open(archive) as sdist:
        for member in sdist.getmembers():
            member.name = "/".join(Path(member.name).parts[1:])
            if member.name.endswith((".py", ".cpp")):
                sdist.extract(member, target, filter="data")


# ---------------------------------------------------------------- what a source says


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_file(root: Path, module: str) -> Path | None:
    """Return the file of a dotted module below `root`."""
    path = root.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((found for found in candidates if found.is_file()), None)


def has_name(root: Path, module: str, name: str) -> bool:
    """Tell whether `from module import name` finds something; C++ extensions have nothing that can be read."""
    path = module_file(root, module)
    if path is None:
        return False
    return name in _names(root, path) or module_file(root, f"{module}.{name}") is not None


@cache
def _names(root: Path, path: Path) -> frozenset[str]:
    """Return the names that a module has at its top level, those of star imports included."""
    found: set[str] = set()
    for node in _top(parsed(path).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                source = module_file(root, _absolute(root, path, node)) if alias.name == "*" else None
                found |= _names(root, source) if source else {alias.asname or alias.name}
    return frozenset(found)


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements of a module, those below `if` and `try` included."""
    for node in body:
        yield node
        for branch in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                yield from _top(getattr(node, branch, []))


def _absolute(root: Path, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    folder = path.parents[node.level - 1]
    return ".".join([*folder.relative_to(root).parts, *([node.module] if node.module else [])])


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module by name, and methods as Class.name."""
    found = {}
    for node in _top(parsed(path).body):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _top(parsed(path).body) if isinstance(node, ast.ClassDef)}


def parameters(function: ast.FunctionDef) -> str:
    """Return a function's parameters with their defaults, without types."""
    return ast.unparse(_Untyped().visit(copy.deepcopy(function.args)))


class _Untyped(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)


def refusals(node: ast.AST) -> set[str]:
    """Return what a piece of a source asserts and raises, as text."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Assert):
            if isinstance(part.test, ast.Constant):  # assert False, message
                found.add(f"raise AssertionError({ast.unparse(part.msg) if part.msg else ''})")
            else:
                found.add(ast.unparse(part.test))
        elif isinstance(part, ast.Raise) and part.exc is not None:
            found.add(f"raise {ast.unparse(part.exc)}")
    return found
