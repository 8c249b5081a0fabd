"""What `plan` and `why` say of a phase that was tried before: how the attempt ended, what changed, where it goes on."""

import copy

import pytest

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import Outcome
from launchers.backends import choose
from launchers.causes.evidence import Evidence
from launchers.causes.slurm_ends import cancelled
from launchers.causes.states import CANCELLED
from launchers.observe.look import look_at
from launchers.planning.ledger import Ledger
from launchers.planning.reasons import attempted
from launchers.report.attempts import attempts_of
from launchers.report.contents import _settings as shown_settings
from slurm.detect import find_cluster
from tests.launchers.planted_run import MINUTE, START, PlantedRun


@pytest.fixture()
def planted(tmp_path):
    return PlantedRun(tmp_path, {"data": "materialize"})


@pytest.mark.parametrize("state, message, said", [
    ("failed", "KeyError: 'a'\nmore", "failed (KeyError: 'a' more)"),
    ("mistake", "no such file", "failed (no such file)"),
    ("stopped", "stopped at step 3", "was stopped (stopped at step 3)"),
    ("failed", "x" * 999, f"failed ({'x' * 160} …)"),
])  # fmt: skip
def test_an_attempt_before_is_told_with_how_it_ended(planted, state, message, said):
    planted.life("data", 1, 2, state=state, message=message)
    assert attempted(planted.run, planted.phases["data"], "not sealed: ") == [f"not sealed: attempt 1 {said}"]


def test_settings_that_changed_since_the_attempt_are_told(planted):
    planted.life("data", 1, 2, state="failed", message="no")
    now = copy.deepcopy(planted.phases["data"])
    now.key, now.material = "f" * 16, {"settings": dict.fromkeys("abcde", 1)}
    told = attempted(planted.run, now)
    assert told[0] == "attempt 1 failed (no)" and told[1].startswith("data.with.a ")
    assert told[4] == "and 2 more settings"


def test_an_attempt_that_was_cancelled_or_left_no_word_is_told_and_none_where_there_was_none(planted):
    assert attempted(planted.run, planted.phases["data"]) == ["attempt 1 has not said how it ended"]
    planted._tell(3, event="cancel", jobs=["1.0"])
    assert attempted(planted.run, planted.phases["data"]) == ["attempt 1 was cancelled"]
    other = copy.deepcopy(planted.phases["data"])
    other.name = "more"
    assert attempted(planted.run, other) == []


@pytest.mark.parametrize(
    "done, remedy", [(19.0, "submit again: it goes on from step 19"), (None, "submit again to run it")]
)
def test_a_cancel_says_from_which_step_it_goes_on_where_that_is_known(done, remedy):
    outcome = Outcome(0, 1, 0, "failed", 1, "", "n1", "1", 0.0, ended=1.0, done=done)
    assert cancelled(Evidence("sft", state=CANCELLED, outcome=outcome)).remedy == remedy


def test_outside_a_dev_cluster_its_run_is_told_the_command_that_goes_into_it(planted, monkeypatch):
    told = {
        "backend": "slurm",
        "cluster": "dev",
        "cluster_name": "dev",
        "profile": "dev",
        "profile_file": "",
        "run": "",
    }
    Ledger(planted.run.ledger).append("submission", submission=2, choice="auto", prefix="/a/b c", **told)
    monkeypatch.setattr(choose, "find_cluster", lambda choice: find_cluster("local"))
    with pytest.raises(UserMistake, match="put `afterok cluster exec --prefix '/a/b c'` before the command"):
        choose.backend_of(planted.run, "auto")


def test_a_wait_begins_when_the_last_input_was_sealed_before_it_though_that_was_sealed_again_since(tmp_path):
    run = PlantedRun(tmp_path, {"data": "materialize", "sft": "sft"})
    run.life("data", 0, 2)
    run.life("sft", 3, 5)
    run.submit(2, ["data"], minute=8)
    run.life("data", 9, 10, attempt=2)
    run.seal("data", 10)
    (first,) = attempts_of(look_at(run.run), START + 20 * MINUTE)["sft"]
    assert [wait.until - wait.since for wait in first.waits] == [MINUTE]


def test_the_report_shows_references_as_the_file_writes_them(planted):
    planted.phases["data"].settings = {"store": "@{phases.data.out}", "deep": [{"a": "@{phases.data.out}/hf"}]}
    shown = shown_settings(planted.phases)["data"]
    assert shown == {"store": "${phases.data.out}", "deep": [{"a": "${phases.data.out}/hf"}]}
