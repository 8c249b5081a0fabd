"""What is wrong with a task of one's own is told before it runs: options that it does not have, a name close to its."""

import sys

import pytest

from data_tools.tasks.mix import Entry, MixConfig, check_mix
from data_tools.tasks.task import Source, check_task

TASK = """
from dataclasses import dataclass

raise SystemExit("this must not run in plan")

@dataclass
class Options:
    loud: bool = False
    most: float = 1.0
    named: "list[str] | None" = None

REWARDS = {"correct": 1.0}
def items(record, options): ...
def rewards(item, completion, options): ...
"""


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    place = tmp_path / "own_things"
    place.mkdir()
    (place / "capitals.py").write_text(TASK)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
    monkeypatch.chdir(tmp_path)
    return place


def told(options):
    entry = Entry("own_things.capitals", options, source=Source(["x"]))
    return [str(problem) for problem in check_mix(MixConfig({"a": entry}))]


@pytest.mark.parametrize("options, expected", [
    ({"quiet": True}, "unknown task option 'quiet' (known: loud, most, named)"),
    ({"lout": True}, "unknown task option 'lout' (did you mean loud? known: loud, most, named)"),
    ({"loud": 3}, "task option loud=3 is a int, not bool"),
    ({"loud": True, "most": 2, "named": ["x"]}, ""),
])  # fmt: skip
def test_options_that_a_task_of_ones_own_does_not_have_are_refused_and_its_code_is_not_run(folder, options, expected):
    assert told(options) == ([f"mix.entries.a.options: {expected}"] if expected else [])


@pytest.mark.parametrize("options", ["Options = dict\n", "class Options(Base):\n    x: int = 1\n"])
def test_options_that_a_file_does_not_spell_out_are_left_to_the_run(folder, options):
    (folder / "capitals.py").write_text(f"{options}def items(): ...\ndef rewards(): ...\n")
    assert told({"anything": 1}) == []


@pytest.mark.parametrize("name, meant, looked", [
    ("own_things.capitls", " (did you mean own_things.capitals?)", "own_things"),
    ("own_thing.capitals", " (did you mean own_things.capitals?)", ""),
    ("own_things.zzz:score", "", "own_things"),
])  # fmt: skip
def test_a_module_that_is_not_there_is_told_with_the_nearest_and_the_folder_looked_in(folder, name, meant, looked):
    module = name.partition(":")[0]
    where = folder.parent / looked
    assert check_task(name).startswith(f"there is no module {module!r}{meant}; looked in {where}")
