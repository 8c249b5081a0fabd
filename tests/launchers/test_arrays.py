"""Arrays beyond what the cluster allows, throttled ones, and several dependency types at once, on a real Slurm."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest

from jobs.artifacts.run_folder import FrozenPhase
from jobs.artifacts.seal import read_seal
from launchers.causes.states import ACTIVE_STATES
from launchers.planning import limits
from launchers.planning.ledger import Ledger
from launchers.planning.plan import PlannedPhase
from slurm.client import Slurm
from slurm.dev import cluster as devcluster
from slurm.printed import parse_indices
from tests.cluster import require_packages
from tests.command import afterok, afterok_json, states, wait_for

BIG = """
name: big
phases:
  first: {uses: tests.toy.numbers, array: 13}
  pair: {uses: tests.toy.numbers, array: 13, needs: [{first: aftercorr}], with: {start: 100}}
  total: {uses: tests.toy.total, with: {numbers: "${phases.pair.out}"}}
"""


@pytest.fixture
def small_arrays(short_folder):
    require_packages()
    return devcluster.up(short_folder, nodes=2, settings={"MaxArraySize": "5"})


def test_elements_beyond_the_array_limit_share_tasks_and_partners_share_the_factor(tmp_path, small_arrays):
    run, env = tmp_path / "run", small_arrays.env()
    (tmp_path / "big.yaml").write_text(BIG)
    done = afterok("run", tmp_path / "big.yaml", "first.with.fail_at=7", "--run", run, env=env, check=1)
    assert "element 7 was told to fail" in done.stderr
    jobs = {entry.phase: entry for entry in Ledger(run / "ledger.jsonl").jobs()}
    assert (jobs["first"].batch, jobs["pair"].batch, jobs["total"].batch) == (3, 3, 1)
    assert "#SBATCH --array=0-4\n" in (run / "submissions/1/scripts/first.sh").read_text()
    assert len(list(run.glob("first/*/seals/*.json"))) == 12  # the neighbours of the failed one in its task went on
    assert len(list(run.glob("pair/*/seals/*.json"))) == 10  # all but the partners 6, 7, 8 of the failed task
    status = {p["phase"]: p for p in afterok_json("status", run, env=env)["phases"]}
    assert (status["first"]["state"], status["first"]["sealed"], status["pair"]["sealed"]) == ("FAILED", 12, 10)
    again = afterok_json("resubmit", run, "first", "first.with.fail_at=null", env=env)
    assert list(again["jobs"]) == ["first"]
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"})
    assert [entry.elements for entry in Ledger(run / "ledger.jsonl").jobs() if entry.phase == "first"][-1] == [7]
    seal = json.loads(next(run.glob("total/*/seal.json")).read_text())
    assert seal["facts"]["total"] == sum(range(100, 113))
    assert "first[7]" in afterok("logs", run, "first:7", env=env).stdout


LATE = """
name: late
phases:
  first: {uses: tests.toy.numbers, array: 9}
  pair: {uses: tests.toy.numbers, array: 9, needs: [{first: aftercorr}], with: {start: 100, seconds: 0.2}}
"""


@pytest.mark.soak
def test_whatever_slurm_starts_again_changes_nothing_that_is_sealed(tmp_path, small_arrays):
    """Tasks of two elements; requeued when they had ended or while they run, sent a second time, or both at once."""
    run, env, slurm = tmp_path / "run", small_arrays.env(), Slurm(small_arrays.env())
    (tmp_path / "late.yaml").write_text(LATE)
    afterok("run", tmp_path / "late.yaml", "--run", run, env=env)
    script, folder = run / "submissions/1/scripts/pair.sh", next(run.glob("pair/*/seal.json")).parent
    assert "#SBATCH --array=0-4\n" in script.read_text()
    digest = read_seal(folder / "seal.json").digest
    jobs = [entry.job for entry in Ledger(run / "ledger.jsonl").jobs() if entry.phase == "pair"]

    def tasks(*states):
        return [
            f"{row.array_job_id}_{row.array_index}"
            for row in slurm.queue()
            if row.array_job_id == jobs[-1] and row.array_index is not None and row.state in states
        ]

    for trial in range(40):
        draw, fresh = random.Random(trial), trial % 2 == 1
        if fresh:  # the same then race for what is missing
            shutil.rmtree(folder)
        seals = {path: path.read_bytes() for path in [*folder.glob("seals/*.json"), *folder.glob("seal.json")]}
        if fresh or draw.random() < 0.3:
            jobs.append(slurm.sbatch([str(script)]))
        if not fresh:
            again = [task for task in tasks("COMPLETED") if draw.random() < 0.7]
        else:
            again = wait_for("a task to run", lambda: tasks("RUNNING"))
        for task in again:
            slurm.run(["scontrol", "requeue", task])
        wait_for("the end", lambda: not any(row.state in ACTIVE_STATES for row in slurm.queue()))
        assert fresh or {path: path.read_bytes() for path in seals} == seals
        assert read_seal(folder / "seal.json").digest == digest and not list(folder.rglob("*.retired.*"))
    planned = afterok_json("plan", tmp_path / "late.yaml", "--run", run, env=env)["phases"]
    assert {phase["action"] for phase in planned} == {"reuse"}


@pytest.mark.soak
def test_a_throttled_array_runs_so_many_elements_at_once(tmp_path, dev_cluster):
    run, env = tmp_path / "run", dev_cluster.env()
    (tmp_path / "t.yaml").write_text(
        "name: t\nphases:\n  a: {uses: tests.toy.numbers, array: 6, throttle: 2, with: {seconds: 1}}\n"
    )
    job = afterok_json("submit", tmp_path / "t.yaml", "--run", run, env=env)["jobs"]["a"]
    most = 0
    while set(states(run, env=env).values()) != {"COMPLETED"}:
        most = max(most, sum(row.state == "RUNNING" for row in Slurm(env).queue() if row.array_job_id == job))
    assert most == 2


def test_a_throttled_array_is_throttled_locally_too(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "t.yaml").write_text(
        "name: t\nphases:\n  a: {uses: tests.toy.numbers, array: 4, throttle: 1, with: {seconds: 0.5}}\n"
    )
    afterok("run", tmp_path / "t.yaml", "cluster=local", "--run", run)
    outcomes = [json.loads(path.read_text()) for path in run.glob("a/attempts/*.json")]
    spans = sorted((outcome["started"], outcome["ended"]) for outcome in outcomes)
    assert all(end <= begin + 0.05 for (_, end), (begin, _) in zip(spans, spans[1:]))


def scattered(elements, seed):
    """So many elements, of which about half failed, without any order."""
    return [element for element in range(elements) if random.Random(f"{seed} {element}").random() < 0.5]


def planned_of(name, elements, missing, **needs):
    frozen = FrozenPhase(
        name=name, uses="tests.toy.numbers", key="k", material={}, settings={}, array=elements, elements=elements,
        fans_in=True, needs=needs, inputs={}, ranks_per_node=1, nodes=1, gpus_per_node=0, throttle=8,
    )  # fmt: skip
    return PlannedPhase(frozen, None, "cpu", "run", missing=list(missing))


@pytest.mark.parametrize("elements", [100, 4000, 20_000])
def test_elements_that_lie_scattered_share_tasks_so_that_slurm_takes_their_list(elements):
    first, whole = scattered(elements, 1), range(elements)
    phases = {
        "first": planned_of("first", elements, first),
        "pair": planned_of("pair", elements, scattered(elements, 2), first="aftercorr"),
        "all": planned_of("all", elements, whole),
    }
    limits.fit_array_text(SimpleNamespace(kind="slurm"), phases)
    batches = {name: planned.frozen.batch for name, planned in phases.items()}
    assert batches["first"] == batches["pair"] and batches["all"] == 1 and (batches["first"] == 1) == (elements == 100)
    for planned in phases.values():
        text = limits.array_text(planned.frozen, planned.missing)
        assert len(text) <= limits.ARRAY_TEXT and text.endswith("%8")
        tasks = set(parse_indices(text))
        assert tasks == {element // planned.frozen.batch for element in planned.missing}


def test_slurm_takes_a_list_that_we_take_and_named_elements_beyond_it_are_refused(tmp_path, short_folder):
    require_packages()
    run, env = (
        tmp_path / "run",
        devcluster.up(short_folder, nodes=1, settings={"MaxArraySize": "20001", "MaxJobCount": "50000"}).env(),
    )
    Slurm(env).run(["scontrol", "update", "nodename=n1", "state=drain", "reason=test"])
    longest = ",".join(map(str, range(10_000, 20_000, 2)))[: limits.ARRAY_TEXT].rpartition(",")[0]
    assert len(longest) > limits.ARRAY_TEXT - 6 and Slurm(env).sbatch([f"--array={longest}", "--wrap=true"])
    (tmp_path / "many.yaml").write_text(
        "name: many\nwaive: [P011]\nphases: {p: {uses: tests.toy.numbers, array: 20000}}\n"
    )
    afterok("submit", tmp_path / "many.yaml", "--run", run, env=env)
    done = afterok("resubmit", run, "p", "--elements", f"{longest},19999", env=env, check=2)
    assert "the list of their tasks has 4," in done.stderr and "Slurm takes 4,094; name fewer ranges" in done.stderr
    assert Ledger(run / "ledger.jsonl").jobs()[-1].elements == range(20_000)  # nothing was cancelled or sent
