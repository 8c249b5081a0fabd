"""Every promise is shown by inputs that ship with the tests; the public data are a second, larger input."""

import ast
import json
from pathlib import Path

import pytest

from tests.inputs import LINES, ORIGINS, SHIPPED, Inputs

HERE = Path(__file__).parent
NAMES = {"public", "SHARED", "PUBLIC_LINES"}  # of tests.inputs, that lead to the public data only
ALLOWED = {  # benchmarks, trials on real data under soak, and what serves the fixture
    "benchmarks/materialize.py", "benchmarks/verifiers.py", "data_tools/chats.py", "test_chain_seeds.py",
    "test_openresearcher.py", "test_inputs.py", "inputs.py",
}  # fmt: skip
OTHER = {  # a column of a table, weights, and storage of a profile, that are called shared
    "data_tools/tasks/test_mix.py",
    "launchers/test_profile_verbs.py",
    "megatron_ext/test_nemotron_h.py",
    "megatron_ext/test_strangers.py",
    "slurm/test_profile_places.py",
}


def leads_to_public_data(text: str) -> list[int]:
    """Return the lines of a source file from which public data are reached past the fixture `inputs`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "tests.inputs":
            found += [node.lineno for alias in node.names if alias.name in NAMES]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split("/")
            if node.value in ("shared", "AFTEROK_DATA") or ("shared" in parts and "data" in parts):
                found.append(node.lineno)
    return found


def test_public_data_are_reached_through_the_fixture_that_has_shipped_ones_first():
    files = {str(path.relative_to(HERE)): path.read_text() for path in HERE.rglob("*.py")}
    found = {name: leads_to_public_data(text) for name, text in files.items() if "shared" in text or "inputs" in text}
    assert {name for name, lines in found.items() if lines} - ALLOWED - OTHER == set()


@pytest.mark.parametrize("text", [
    "from tests.inputs import public", 'Path("../shared/data")', 'x / "shared"', 'os.environ.get("AFTEROK_DATA")',
])  # fmt: skip
def test_the_sweep_sees_each_way(text):
    assert leads_to_public_data(text)


def test_the_fixture_has_shipped_inputs_and_they_never_skip(inputs):
    assert ORIGINS[0] == "shipped" and not SHIPPED.is_symlink()
    if inputs.shipped:
        assert not Inputs("shipped").data("no/such.file").exists()  # which is an error of the test that opens it


@pytest.mark.parametrize("name", LINES)
def test_shipped_files_have_the_keys_of_the_public_ones_and_the_lines_that_are_said(inputs, name):
    def rows_of(path):
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))

    rows = rows_of(inputs.data(name))
    assert len(rows) == inputs.lines(name) and keys_of(rows) == keys_of(rows_of(SHIPPED / name))


def keys_of(rows):
    return {frozenset(row) for row in rows}
