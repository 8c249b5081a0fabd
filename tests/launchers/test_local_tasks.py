"""The local driver counts its tasks; what it concludes is what a look at each of them would say."""

import json
import random

import pytest

from jobs.schema.pipeline import NEED_SEALS
from launchers.backends.local_tasks import LocalJob, Tasks
from launchers.causes.states import CANCELLED, COMPLETED, FAILED, NEVER, PENDING, RUNNING
from launchers.planning.ledger import read_elements

TYPES = ("afterok", "aftercorr", "afterany", "afternotok", "singleton")


def jobs_of(needs: list[dict[str, str]], elements: int) -> list[LocalJob]:
    return [
        LocalJob(phase=f"p{n}", job=f"1.{n}", name="", elements=f"0-{elements - 1}", needs=need, throttle=0, cores=1)
        for n, need in enumerate(needs)
    ]


def seen(tasks: Tasks, phase: str, index: int | None) -> str:
    """Return what `readiness` does, by a look at every task."""
    for upstream, type_ in tasks.needs[phase].items():
        of = [task for task in tasks.all if task["phase"] == upstream]
        others = [of[index]] if type_ == "aftercorr" and index is not None else of
        ended = [task for task in others if task["state"] not in (PENDING, RUNNING)]
        bad = [task for task in ended if task["state"] != COMPLETED]
        if type_ in NEED_SEALS and bad:
            return NEVER
        if len(ended) < len(others):
            return "Dependency"
        if type_ == "afternotok" and (not bad or any(task["reason"] == NEVER for task in bad)):
            return NEVER
    return ""


@pytest.mark.parametrize("seed", range(60))
def test_counts_say_what_a_look_at_each_task_says(seed: int) -> None:
    chance = random.Random(seed)
    tasks = Tasks(jobs_of([{}, *({f"p{n}": chance.choice(TYPES)} for n in range(3))], elements=3))
    for _ in range(40):
        position = chance.randrange(len(tasks.all))
        state, reason = chance.choice(
            [(PENDING, "Requeued"), (RUNNING, ""), (COMPLETED, ""), (COMPLETED, ""), (FAILED, "said"),
             (CANCELLED, NEVER), (CANCELLED, "")]
        )  # fmt: skip
        if tasks.all[position]["state"] != CANCELLED and not (state == PENDING == tasks.all[position]["state"]):
            tasks.enter(position, state, reason, exit_code=7 if state == FAILED else None)
        for n in range(4):
            for index in (None, 0, 1, 2):
                assert tasks.readiness(f"p{n}", index) == seen(tasks, f"p{n}", index)
            waits = [at for at, task in enumerate(tasks.all) if task["phase"] == f"p{n}" and task["state"] == PENDING]
            assert sorted(tasks.waiting[f"p{n}"]) == waits
        assert tasks.goes_on == any(task["state"] in (PENDING, RUNNING) for task in tasks.all)


def test_what_state_json_says_does_not_grow_with_the_tasks_that_are_alike() -> None:
    sizes = []
    for elements in (10, 10_000):
        tasks = Tasks(jobs_of([{}, {"p0": "afterok"}], elements))
        tasks.enter(3, COMPLETED, "", exit_code=0)
        told = tasks.as_json()
        sizes.append(len(json.dumps(told)))
        carried = sorted(i for each in told if each["phase"] == "p0" for i in read_elements(each["elements"]))
        assert carried == list(range(elements))
        assert [each["elements"] for each in told if each["state"] == COMPLETED] == ["3"]
    assert sizes[1] - sizes[0] <= 2 * len("9999")
