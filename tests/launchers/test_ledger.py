"""The ledger tells which cluster a run belongs to, and what became of its newest submission."""

import json
from dataclasses import replace

import pytest

from data_tools.base import durable
from data_tools.mistake import UserMistake
from launchers.planning import ledger as ledger_file
from launchers.planning.ledger import Ledger
from launchers.submission.steps import Submit, step_of


def ledger_of(tmp_path, *events):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event in events:
        ledger.append(event.pop("event"), **event)
    return ledger


def sent(choice, cluster, backend="slurm", **more):
    return {"event": "submission", "submission": 1, "backend": backend, "choice": choice, "cluster": cluster, **more}


@pytest.mark.parametrize("event, choice, answering, refused", [
    (sent("auto", "alpha", cluster_name="alpha"), "auto", "beta", True),
    (sent("auto", "alpha", cluster_name="alpha"), "auto", "alpha", False),
    (sent("auto", "alpha", cluster_name="alpha"), "slurm", "beta", True),
    (sent("site", "BigSite", cluster_name="alpha"), "auto", "beta", True),
    (sent("auto", "alpha", cluster_name="alpha"), "BigSite", "beta", True),
    (sent("auto", "alpha"), "auto", "beta", True),  # of before: `auto` wrote the cluster's own name
    (sent("BigSite", "BigSite"), "BigSite", "alpha", False),  # of before: a profile's name tells nothing
    (sent("auto", "dev"), "auto", "devel", False),  # of before, within `cluster exec`
    (sent("dev", "dev", cluster_name="dev"), "auto", "alpha", False),
    (sent("dev", "dev", cluster_name="a"), "dev", "b", True),
    (sent("auto", "alpha", cluster_name="alpha"), "dev", "dev", False),
    (sent("local", "local", backend="local", cluster_name=""), "auto", "alpha", False),
    (sent("auto", "alpha", cluster_name="alpha"), "local", "", False),
])  # fmt: skip
def test_a_run_belongs_to_the_cluster_whose_name_was_written_down(tmp_path, event, choice, answering, refused):
    said = ledger_of(tmp_path, event).other_cluster(choice, answering)
    assert bool(said) is refused
    assert not said or all(name in said for name in (answering, event.get("cluster_name", event["cluster"])))


@pytest.mark.parametrize("events, told", [
    ([], "submission 1 is not released"), ([{"event": "released", "submission": 1}], ""),
    ([{"event": "abandoned", "submission": 1, "why": "sbatch: no account; contact: us", "jobs": []}],
     "no account; contact"),
    ([{"event": "abandoned", "submission": 1, "why": "no", "jobs": []}, sent("auto", "a") | {"submission": 2},
      {"event": "released", "submission": 2}], ""),
])  # fmt: skip
def test_what_became_of_the_newest_submission_is_told_until_another_ran(tmp_path, events, told):
    said = ledger_of(tmp_path, sent("auto", "a"), *events).given_up()
    assert told in said and bool(said) is bool(told)


def test_what_a_bundles_shell_noted_reads_as_if_submit_had_written_it(tmp_path):
    ledger, sent = Ledger(tmp_path / "ledger.jsonl"), tmp_path / "submissions/1/sent"
    step = {"key": "k", "elements": [0], "is_array": False, "request": "", "batch": 1, "links": 0, "needs": {}}
    jobs = [
        {**step, "phase": "a", "name": "run.a", "links": 3},
        {**step, "phase": "b", "name": "run.b", "needs": {"a": "afterok"}},
    ]
    ledger.append(
        "bundle", submission=1, backend="slurm", choice="auto", run=str(tmp_path), folder="/bundle", jobs=jobs
    )
    assert ledger.jobs() == [] and ledger.unreleased() == [] and ledger.unsent(1) == "/bundle"
    sent.parent.mkdir(parents=True)
    sent.write_text("begin\nsending 0\njob 0 12\nsending 1\njob 1 1")  # killed while it wrote
    assert [(job.phase, job.job) for job in ledger.jobs()] == [("a", "12")]
    assert ledger.unreleased() == [1] and ledger.unsent(1) == ""
    assert [event["name"] for event in ledger.events() if event["event"] == "sending"] == ["run.a", "run.b"]
    sent.write_text("begin\nsending 0\ncancelled sbatch refused a\n")
    assert ledger.unreleased() == [] and "sbatch refused a" in ledger.given_up()
    sent.write_text(f"{sent.read_text()}begin\nsending 0\njob 0 12\nsending 1\njob 1 13\nreleased\n")
    assert ledger.unreleased() == [] and ledger.given_up() == "" and ledger.jobs()[1].waits == {"a": "12_2"}
    for wrong in ("job 2 14", "job x", "", "freed"):
        sent.write_text(f"begin\n{wrong}\n")
        with pytest.raises(UserMistake, match="sent:2: .* is no line of submit.sh's"):
            ledger.jobs()


MANY = [*range(99_000), 99_007]


@pytest.mark.parametrize("told", [MANY, "0-98999,99007"])
def test_a_job_of_many_elements_is_a_short_line_and_one_that_lists_them_is_read_alike(tmp_path, told):
    step = Submit(phase="a", key="k", name="run.a", elements=MANY, is_array=True)
    assert len(str(step.record())) < 400
    assert step_of(step.record()) == step == step_of({**step.record(), "elements": MANY})
    job = {name: value for name, value in step.record().items() if name != "do"} | {"job": "7", "waits": {}}
    ledger = ledger_of(tmp_path, {"event": "job", "submission": 1, **job, "elements": told})
    (entry,) = ledger.jobs()
    assert entry.elements == MANY and entry == replace(step.entry(1), job="7")
    if told is not MANY:
        assert len(ledger.path.read_bytes()) < 500


def test_the_lines_of_a_ledger_are_parsed_once_as_long_as_they_stay_the_same(tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path, sent("auto", "a"), {"event": "released", "submission": 1})
    parsed = []
    real = durable.parse_checked
    monkeypatch.setattr(durable, "parse_checked", lambda line, name: parsed.append(name) or real(line, name))
    for _ in range(3):
        assert Ledger(ledger.path).jobs() == [] and not ledger.given_up() and len(list(ledger.events())) == 2
    assert len(parsed) == 2
    ledger.append("abandoned", submission=1, why="no", jobs=[])
    assert len(list(ledger.events())) == 3
    text = ledger.path.read_bytes()
    ledger.path.write_bytes(text.replace(b"abandoned", b"abandonee"))
    with pytest.raises(UserMistake, match="altered"):
        list(ledger.events())


@pytest.mark.parametrize("kind", ledger_file._NEEDED)
def test_a_line_without_a_sum_that_lacks_what_its_event_is_asked_for_is_named(kind, tmp_path):
    path, needed = tmp_path / "ledger.jsonl", ledger_file._NEEDED[kind]
    for lacked in sorted(needed):
        path.write_text(json.dumps({"event": kind, **dict.fromkeys(needed - {lacked}, 1)}) + "\n")
        with pytest.raises(UserMistake, match=f"{path}:1 has no {lacked}; remove that line, or restore it"):
            list(ledger_file.Ledger(path).events())
