"""Keys of `weights` and `overlong_of` name a store's sources by name, path or pattern, and never two in silence."""

import os

import pytest

from data_tools.records.inputs import missing, records_of
from data_tools.records.sources import by_source, check, forecast
from data_tools.tasks.task import Source

NAMES = ["/data/maths.jsonl", "/data/a/train.jsonl", "/data/b/train.jsonl", "/run/kept/K/work/x/chat.jsonl",
         "synthetic train rows, seed 1"]  # fmt: skip
MEANS = [  # key, the sources it means
    ("/data/maths.jsonl", [0]), ("maths.jsonl", [0]), ("data/maths.jsonl", [0]), ("./maths.jsonl", [0]),
    ("../data/maths.jsonl", [0]), ("a/train.jsonl", [1]), ("*/train.jsonl", [1, 2]), ("train.*", [1, 2]),
    ("/data/*.jsonl", [0]), ("*", [0, 1, 2, 3, 4]), ("*.jsonl", [0, 1, 2, 3]), ("/run/kept/K/work/x", [3]),
    ("/run/kept/K/work/x/chat.jsonl", [3]), ("/data", [0, 1, 2]), ("synthetic*", [4]),
    ("synthetic train rows, seed 1", [4]),
    ("chat.jsonl", [3]), ("[am]*.jsonl", [0]),
]  # fmt: skip


@pytest.mark.parametrize("key, means", MEANS)
def test_a_key_names_a_source_by_name_path_or_pattern(key, means):
    found, problems = by_source("weights", {key: 2.0}, NAMES)
    assert not problems
    assert [place for place, value in enumerate(found) if value is not None] == means


KEY = "5675e7b008a5f4a7"
PLACES = [f"{run}/kept/{KEY}{attempt}" for run in ("/run", "/moved/to/here") for attempt in (
    "", "/work/0000.a1.r0.g0", "/work/0000.a12.r3.g1", "/work/finish.a2.r0.g0")]  # fmt: skip


@pytest.mark.parametrize("then", PLACES)
@pytest.mark.parametrize("now", PLACES)
@pytest.mark.parametrize("below", ["/chat.jsonl", "", "/*.jsonl"])
def test_what_a_phase_made_is_meant_whichever_attempt_made_it_wherever_the_run_lies(then, now, below):
    names = [
        f"{then}/chat.jsonl",
        "/data/chat.jsonl",
        f"{then.replace(KEY, KEY[::-1])}/chat.jsonl",
        f"{then.replace('kept', 'other')}/chat.jsonl",
    ]
    found, problems = by_source("weights", {f"{now}{below}": 2.0}, names)
    assert (found, problems) == ([2.0, None, None, None], [])


@pytest.mark.parametrize("values, expected", [
    ({"*": 1, "*.jsonl": 1}, "both match source"), ({"train.jsonl": 1}, "stands for 2 sources"),
    ({"math.jsonl": 1}, "did you mean maths.jsonl"), ({"aths.jsonl": 1}, "no source matches"),
    ({"": 1}, "no source matches"), ({"/": 1, "/other": 1}, "no source matches"), ({"x[": 1}, "no source matches"),
])  # fmt: skip
def test_a_key_that_means_nothing_or_too_much_is_refused(values, expected):
    assert any(expected in str(problem) for problem in by_source("weights", values, NAMES)[1])


def test_the_most_exact_key_counts_and_every_source_needs_a_weight():
    keys = {"*": 0.0, "/data": 1.0, "maths.jsonl": 2.0, "a/train.jsonl": 3.0, "/data/b/train.jsonl": 4.0}
    assert by_source("weights", keys, NAMES) == ([2.0, 3.0, 4.0, 0.0, 0.0], [])
    assert [problem.where for problem in check({"*.jsonl": 1.0}, {}, NAMES)] == ["weights"]
    assert not check({}, {"maths.jsonl": "split"}, NAMES)


def test_a_store_that_is_to_come_has_the_sources_of_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert forecast(Source(["a.jsonl", "/b.csv"], synthetic_rows=3)) == [
        str(tmp_path / "a.jsonl"),
        "/b.csv",
        "synthetic train rows, seed 0",
    ]
    (tmp_path / "d.jsonl").mkdir()
    for unsure in ("d.jsonl", "*.jsonl", "/run/kept/K"):
        assert forecast(Source([unsure])) is None


def test_names_that_are_no_unicode_are_refused_and_unknown_homes_are_no_files(tmp_path):
    (tmp_path / os.fsdecode(b"l\xe4ufe.jsonl")).write_text("{}\n")
    (tmp_path / "läufe.jsonl").write_text("{}\n")
    told = missing([("source.inputs", file) for file in records_of(f"{tmp_path}/*.jsonl")])
    assert len(told) == 1 and "its name is no Unicode" in str(told[0]) and str(told[0]).isascii()
    (problem,) = missing([("source.inputs", file) for file in records_of("~nobody_of_this_name/x.jsonl")])
    assert "no file ~nobody_of_this_name/x.jsonl" in str(problem)
