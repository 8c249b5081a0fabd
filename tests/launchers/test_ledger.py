"""The ledger tells which cluster a run belongs to, and what became of its newest submission."""

import pytest

from launchers.planning.ledger import Ledger


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
