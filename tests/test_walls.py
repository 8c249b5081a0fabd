"""The import walls of the house, the empty package files, and the top level."""

import ast
from pathlib import Path

import pytest

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
LIGHT_TOP = ("torch", "megatron", "transformers")  # not at the top of what plan imports
PLANNED_WITH = (
    "parallel/plan.py",
    "parallel/rules.py",
    "parallel/shape.py",
    "parallel/calibration.py",
    "preflight/planner.py",
)
PLANNING = [ROOT / "megatron_ext" / name for name in PLANNED_WITH]


def imports(path, top_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


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
        for node in ast.walk(ast.parse(path.read_text())):
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
