"""Hold the walls of the house: which package and folder may import which, no import circle, files and functions that a
reader can hold in their head, empty package files, and the names at the top level.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from radon.complexity import cc_visit_ast

ROOT = Path(__file__).parents[1]
OURS = ("data_tools", "megatron_ext", "slurm", "jobs", "launchers")
MAY_IMPORT = {  # our own packages that a package may use
    "data_tools": {"data_tools"},
    "megatron_ext": {"megatron_ext", "data_tools"},
    "slurm": {"slurm", "data_tools"},
    "jobs": {"jobs", "data_tools", "megatron_ext", "slurm"},
    "launchers": {"launchers", "jobs", "slurm", "data_tools"},
}
NEVER = {
    "data_tools": {"torch", "megatron", "submitit"}, "megatron_ext": {"submitit"},
    "slurm": {"torch", "megatron", "transformers"},
    "jobs": {"megatron", "submitit"}, "launchers": {"torch", "megatron", "transformers"},
}  # fmt: skip
LAYERS = {  # what a package is made of, from the ground up: a line may import itself and the lines above it
    "data_tools": (
        "mistake progress own_packages", "base", "records", "chats", "answers", "prepare", "tasks",
        "evaluations recipes", "packs",
    ),
    "slurm": ("checks printed", "client", "profile", "options exported", "dev", "detect", "verify"),
    "megatron_ext": (
        "absent_triton adam cpu_linear device versions", "files", "parallel", "layers", "models", "weights", "lora",
        "model_folders", "preflight", "serving", "rollout", "training", "rl", "foreign",
        "entrypoints",
    ),
    # A phase's file is found by its name (jobs/kind.py looks into jobs/phases), and each is written with jobs/kind.py.
    "jobs": (
        "schema kind phases task masking stopping", "retry", "artifacts",
        "ranks requeue secrets replay sealing upstream health rehearsal last_word", "bare worker",
    ),
    "launchers": (
        "planning", "causes", "backends", "submission", "observe", "report completion", "verbs", "cli", "door",
        "console",
    ),
}  # fmt: skip
MOST_LINES = 450  # of a file
MOST_LINES_OF_A_FUNCTION = 80
MOST_COMPLEX = 20  # cyclomatic complexity of a function, as radon counts
LIGHT_TOP = ("torch", "megatron", "transformers")  # not at the top of what plan imports
PLANNED_WITH = (
    "parallel/machine.py",
    "parallel/mamba_kernels.py",
    "parallel/parts.py",
    "parallel/plan.py",
    "parallel/rules.py",
    "parallel/settings.py",
    "parallel/shape.py",
    "parallel/calibration.py",
    "preflight/costs.py",
    "preflight/facts.py",
    "preflight/memory.py",
    "preflight/flops.py",
    "preflight/search.py",
)
PLANNING = [ROOT / "megatron_ext" / name for name in PLANNED_WITH]


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file, parsed once for all tests."""
    return ast.parse(path.read_text())


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports: anywhere in it, or (`top_only`) by its outermost statements."""
    tree = parsed(path)
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def written() -> list[Path]:
    """Return every Python file of the repository, tests included."""
    return [path for folder in (*OURS, "tests") for path in files(folder)] + [ROOT / "setup.py"]


@cache
def import_graph() -> dict[str, set[str]]:
    """Return, for each of our modules, our modules that it imports; an import inside a function counts too."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for name in OURS for path in files(name)}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [name for alias in node.names for name in (f"{node.module}.{alias.name}", node.module)]
            else:
                continue
            graph[module].update(name for name in names if name in modules)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach one another: what is left when modules without imports, and modules that
    nobody imports, are taken away again and again, grouped by who reaches whom.
    """
    left = dict(graph)
    while True:
        imported = set().union(*left.values()) if left else set()
        outer = [module for module, below in left.items() if module not in imported or not below & left.keys()]
        if not outer:
            break
        for module in outer:
            del left[module]

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = (graph[waiting.pop()] & left.keys()) - seen
            seen |= new
            waiting += new
        return seen

    below = {module: reached(module) for module in left}
    groups = {frozenset(m for m in reach if module in below[m]) for module, reach in below.items() if module in reach}
    return sorted(sorted(group) for group in groups)


def test_a_circle_is_seen():
    graph = {"a": {"b"}, "b": {"c", "leaf"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}, "leaf": set()}
    assert circles(graph) == [["b", "c"], ["d", "e"]]


def test_no_modules_import_one_another():
    assert circles(import_graph()) == []


@pytest.mark.parametrize("package", OURS)
def test_folders_import_downwards(package):
    floor = {name: height for height, names in enumerate(LAYERS[package]) for name in names.split()}
    upwards = []
    for module, below in import_graph().items():
        parts = module.split(".")
        if parts[0] != package or parts[1] == "__init__":
            continue
        assert parts[1] in floor, f"{package}/{parts[1]} has no place among the layers"
        for name in below:
            other = name.split(".")
            if other[0] == package and floor[other[1]] > floor[parts[1]]:
                upwards.append(f"{module} imports {name}")
    assert not upwards, sorted(upwards)


def test_files_and_functions_are_short():
    long_files = {
        str(path.relative_to(ROOT)): lines
        for path in written()
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    long_functions = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for path in written()
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert not long_files and not long_functions, (long_files, long_functions)


def test_functions_are_simple():
    tangled = [
        f"{path.relative_to(ROOT)}:{block.lineno} {block.name} {block.complexity}"
        for path in written()
        for block in cc_visit_ast(parsed(path))
        if block.complexity > MOST_COMPLEX
    ]
    assert not tangled, tangled


@pytest.mark.parametrize("package", OURS)
def test_imports_run_one_way(package):
    for path in files(package):
        for name in imports(path):
            first = name.split(".")[0]
            assert first not in NEVER[package], f"{path} imports {name}"
            assert first not in OURS or first in MAY_IMPORT[package], f"{path} imports {name}"


def test_what_plan_imports_has_no_torch_at_its_top():
    for path in [*files("jobs"), *files("megatron_ext/entrypoints"), *PLANNING, *files("data_tools")]:
        for name in imports(path, top_only=True):
            assert name.split(".")[0] not in LIGHT_TOP, f"{path} imports {name} at its top"


def test_only_device_patches_megatron_core():
    for path in files("megatron_ext"):
        if path.name == "device.py":
            continue
        for node in ast.walk(parsed(path)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                text = ast.unparse(target)
                assert not text.startswith(("torch.cuda.", "megatron.")), f"{path}:{node.lineno} assigns {text}"


def test_package_files_are_empty():
    for package in OURS:
        for path in (ROOT / package).rglob("__init__.py"):
            assert path.read_text() == "", path


def test_the_top_level_is_the_house():
    allowed = {
        "setup.py",
        "jobs",
        "launchers",
        "megatron_ext",
        "data_tools",
        "slurm",
        "tests",
        "README.md",
        "constraints.txt",
        "LICENSE",
        "runs",
        "venv",
        "build",
    }
    extra = {
        path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.suffix != ".egg-info"
    } - allowed
    assert not extra


def test_nobody_asks_pathlib_for_a_home():
    """It raises RuntimeError for a user that is not known, wherever a path is first looked at."""
    own = [ROOT / "slurm/profile/files.py"]  # which catches it
    asking = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py")) if path not in own]
    assert not [path.name for path in asking if ").expanduser()" in path.read_text()]
