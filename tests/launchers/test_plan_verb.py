"""`afterok plan` says what a plan costs and what its jobs would be, compares it with a run, and needs no Slurm."""

import json
from pathlib import Path

import pytest

from data_tools.base import durable
from data_tools.mistake import Problem, UserMistake
from data_tools.records import hub
from jobs.artifacts.layout import code_digests_beside
from jobs.artifacts.run_folder import Outcome, RunFolder
from jobs.schema.pipeline import load_pipeline
from launchers import cli
from launchers.planning.hours import MEASURED, PREDICTED, GpuHours, over_budget, planned_seconds
from launchers.planning.planner import make_plan
from launchers.planning.preflight import Job, _hub
from launchers.submission.freeze import select
from slurm.detect import Cluster, find_cluster
from slurm.profile import admins, files
from slurm.profile.environments import hub_cache
from slurm.profile.schema import Env, Partition, Profile, Role, Storage
from tests.command import ROOT
from tests.launchers.test_chain import PHASE, end

SITE = """\
partitions: {gpu: {max_time: 2-0, gpus_per_node: 8, gpu: h100, cpus: 96}}
roles: {cpu: {partition: gpu, time: 10}, train: {partition: gpu, time: 12:00:00, gpus_per_node: 8}}
storage: {scratch: /nowhere}
"""
TWO = """\
name: two
phases:
  numbers: {uses: tests.toy.numbers, array: 3, with: {file: FILE}, resources: {role: train, nodes: 2}}
  total: {uses: tests.toy.total, with: {numbers: "${phases.numbers.out}"}}
"""


@pytest.fixture
def two(tmp_path, monkeypatch):
    """(pipeline, profile, folder) on a machine without Slurm."""
    monkeypatch.setattr("slurm.detect._slurm_is_configured", lambda env: False)
    (tmp_path / "site.yaml").write_text(SITE)
    (tmp_path / "here.txt").write_text("x")
    (tmp_path / "two.yaml").write_text(TWO.replace("FILE", str(tmp_path / "here.txt")))
    return tmp_path / "two.yaml", tmp_path / "site.yaml", tmp_path


def said(capsys, *words, code=0):
    assert cli.main([str(word) for word in words]) == code
    return capsys.readouterr()


def test_a_laptop_plans_from_the_profile_alone_and_says_what_it_could_not_ask(two, capsys):
    path, site, folder = two
    words = ["plan", path, f"cluster={site}", "--run", folder / "run"]
    told = said(capsys, *words)
    assert "cluster site (not asked: no Slurm is configured on this machine): profile site" in told.out
    assert "at most 576.0 GPU-hours by the time limits" in told.out  # 3 elements x 2 nodes x 8 GPUs x 12 hours
    assert "not asked: partitions and nodes, accounts and QOS, reservations and maintenance" in told.err
    answer = json.loads(said(capsys, *words, "numbers.with.file=/there/data.txt", "--json").out)
    assert answer["gpu_hours"] == {"bound": 576.0, "planned": None} and len(answer["not_asked"]) == 2
    assert answer["not_asked"][1] == "numbers: what is in /there/data.txt, which this machine has not"
    assert [phase["gpu_hours"]["bound"] for phase in answer["phases"]] == [576.0, 0.0]
    # the profile's own limits hold here too, and nothing is sent from here
    assert "P002" in said(capsys, *words, "numbers.resources.time=3-0", code=2).err
    with pytest.raises(UserMistake, match="Slurm does not answer"):
        find_cluster(str(site))


def test_the_scripts_are_printed_and_what_is_refused_is_in_json_too(two, capsys):
    path, site, folder = two
    words = ["plan", path, f"cluster={site}", "--run", folder / "run"]
    told = said(capsys, *words, "--sbatch").out
    assert (
        "# numbers\n#!/bin/bash" in told
        and "#SBATCH --gpus-per-node=8" in told
        and "--job-name=numbers.run.a1.TOKEN" in told
    )
    answer = json.loads(said(capsys, *words, "--sbatch", "--json").out)
    assert set(answer["sbatch"]) == {"numbers", "total"} and not (folder / "run").exists()
    told = said(capsys, *words, "--budget", "100", "numbers.resources.nodes=0", "--json", code=2)
    checks = {finding["check"]: finding["severity"] for finding in json.loads(told.out)["refused"]}
    assert checks == {"S001": "refusal"} and "nodes: 0 is too small" in told.err
    told = said(capsys, *words, "--budget", "100", code=2)
    assert "--budget: the time limits come to 576.00 GPU-hours (numbers 576.00), and the budget is 100.0" in told.err
    assert "local processes have no batch script" in said(
        capsys, "plan", path, "cluster=local", "--run", folder / "run", "numbers.resources.role=cpu",
        "numbers.resources.nodes=1", "--sbatch", code=2).err  # fmt: skip


@pytest.mark.parametrize("hours", ["-1", "nan", "-inf", "ten"])
def test_a_budget_that_is_no_number_of_hours_is_refused_as_that(two, capsys, hours):
    with pytest.raises(SystemExit) as told:
        cli.main(["plan", str(two[0]), f"--budget={hours}"])
    assert told.value.code == 2 and "argument --budget: " in capsys.readouterr().err


def test_a_budget_is_compared_in_minutes_and_told_as_it_was_said():
    tenths = {name: GpuHours(0.1, None) for name in "abc"}  # whose sum is 0.30000000000000004
    assert over_budget(tenths, 0.3) == []
    (problem,) = over_budget({"sft": GpuHours(12.0, None)}, 11.99)
    assert "come to 12.00 GPU-hours (sft 12.00), and the budget is 11.99;" in problem.message


def test_an_empty_name_of_a_run_to_compare_with_is_no_run(two, capsys):
    assert "'' is no run" in said(capsys, "plan", two[0], f"cluster={two[1]}", "--diff", "", code=2).err


def submitted(pipeline, folder):
    """Write down a submission of a pipeline without its jobs; return the run's folder."""
    run = RunFolder(folder)
    plan = make_plan(pipeline, run, find_cluster("local"))
    run.make()
    select(plan, 1)
    return folder


def test_a_plan_is_compared_with_a_run_by_settings_resources_inputs_and_code(two, capsys):
    path, _, folder = two
    small = ["numbers.resources={role: cpu, nodes: 1}", "cluster=local"]
    run = submitted(load_pipeline(path, small), folder / "run")
    words = ["plan", path, *small, "--run", folder / "other", "--diff", run]
    assert "nothing differs" in said(capsys, *words).out
    (folder / "here.txt").write_text("y")
    record = code_digests_beside(run / "submissions/1/code")
    recorded = durable.read_checked(record)
    recorded["files"]["tests/toy/total.py"] = "another"
    durable.write_checked(record, {key: recorded[key] for key in ("git", "files", "left_out")})
    changes = ["numbers.with.start=4", "numbers.with.seconds=0.5", "total.with.factor=9", "numbers.throttle=2"]
    rows = json.loads(said(capsys, *words, *changes, "--json").out)["diff"]
    found = {(row["phase"], row["what"], row["line"]) for row in rows}
    assert found >= {
        ("numbers", "settings", "numbers.with.start None → 4"),
        ("numbers", "settings", "numbers.with.seconds None → 0.5"),
        ("numbers", "resources", "throttle none → 2"),
        ("numbers", "inputs", f"{folder}/here.txt: other content"),
        ("total", "settings", "total.with.factor None → 9"),
    }, found
    assert [row["phase"] for row in rows if row["what"] == "code"] == ["total"]


def test_planned_hours_are_measured_in_the_run_else_predicted(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert planned_seconds(run, PHASE, {}) == (None, "")
    assert planned_seconds(run, PHASE, {"seconds": 5.0}) == (5.0, PREDICTED)
    run.record_outcome("sft", end(100, 1000, 1000))  # 10 s a step, 900 left
    assert planned_seconds(run, PHASE, {"seconds": 5.0}) == (9000.0, MEASURED)
    whole = RunFolder(tmp_path / "whole")
    for element, seconds in enumerate((10.0, 20.0)):
        outcome = Outcome(element, 1, 0, "sealed", 0, "", "h", "1", started=100.0, ended=100.0 + seconds)
        whole.record_outcome("sft", outcome)
    assert planned_seconds(whole, PHASE, {"seconds": 5.0}) == (15.0, MEASURED)


# -- what pipeline and profile alone tell -------------------------------------------------------------------------

SLOW = "name: p\nphases: {counter: {uses: tests.toy.counter, resources: {time: 1}}}\n"
PAIR = """\
name: p
phases:
  few: {uses: tests.toy.numbers, array: 2}
  many: {uses: tests.toy.numbers, array: 3, needs: [{few: aftercorr}]}
"""


@pytest.mark.parametrize(
    "check, pipeline, profile, folder, words",
    [
        ("A001", "", "partitions: {p: {extra_sbatch: {output: /x}}}", "run", "afterok sets sbatch's --output itself"),
        ("A002", "", "partitions: {p: {}}\npolicy: {require_account: true}", "run", "no account is said"),
        ("E002", "", "partitions: {p: {}}\nenv: {forward: [NO_SUCH], secrets: {K: env:NO_SUCH}}", "run", "NO_SUCH is"),
        ("F003", "", "partitions: {p: {}}", "100%", "Slurm reads it as a pattern"),
        ("I001", "{file: /no/file}", "kind: local", "run", "no such file or folder"),
        ("K001", "{start: -1}", "partitions: {p: {}}", "run", "-1 is negative; take 0"),
        ("K002", PAIR, "partitions: {p: {}}", "run", "has 3 elements, few 2: say afterok"),
        ("S001", "", "partitions: {p: {}}\nphases: {tests.toy.numbers: {nodes: 0}}", "run", "0 is too small"),
        ("S002", SLOW, "partitions: {p: {}}", "run", "0:01:00 is over before the signal to stop"),
        ("S002", SLOW.replace("time: 1", "time: 9"), "partitions: {p: {extra_sbatch: {time-min: '1'}}}", "run",
         "0:01:00 is over before the signal"),
    ],
)  # fmt: skip
def test_what_needs_no_cluster_is_refused_by_its_id_too(tmp_path, monkeypatch, check, pipeline, profile, folder, words):
    monkeypatch.setattr(files, "why_no_admins", lambda file: "")
    text = f"name: p\nphases: {{numbers: {{uses: tests.toy.numbers, with: {pipeline or '{}'}}}}}\n"
    (tmp_path / "p.yaml").write_text(pipeline if pipeline.startswith("name") else text)
    (tmp_path / "site.yaml").write_text(f"{profile}\nroles: {{cpu: {{}}}}\n")
    loaded = files.read(str(tmp_path / "site.yaml"))
    kind = loaded.profile.kind
    cluster = Cluster(kind, loaded.profile, {}, "site", loaded=loaded, unasked="a test" if kind == "slurm" else "")
    with pytest.raises(UserMistake) as error:
        make_plan(load_pipeline(tmp_path / "p.yaml"), RunFolder(tmp_path / folder), cluster)
    assert [problem.check for problem in error.value.problems] == [check], error.value
    assert words in str(error.value)


# -- waivers ------------------------------------------------------------------------------------------------------


def test_a_warning_is_waived_by_pipeline_profile_or_command_line_where_the_policy_lets_it(two, monkeypatch):
    path, site, folder = two
    monkeypatch.setattr("launchers.planning.preflight._space", lambda *_: [_full()])
    run = RunFolder(folder / "run")

    def problems(text, profile=""):
        path.write_text("name: two\nphases: {numbers: {uses: tests.toy.numbers}}\n" + text)
        site.write_text("kind: local\nroles: {cpu: {}}\n" + profile)
        loaded = files.read(str(site))
        try:
            plan = make_plan(load_pipeline(path), run, Cluster("local", loaded.profile, {}, "site", loaded=loaded))
        except UserMistake as mistake:
            return [str(problem) for problem in mistake.problems]
        return [problem.check for problem in plan.waived]

    assert problems("") == ["it is full [D001]"]
    assert problems("waive: [D001]\n") == ["D001"] == problems("", "waive: [D001]\n")[0:1]
    assert problems("waive: [P002, D001]\n")[0].startswith(
        "waive: P002 (the time limit is at most the partition's) can"
    )
    monkeypatch.setattr(admins, "why_no_admins", lambda file: "")
    monkeypatch.setattr(files, "why_no_admins", lambda file: "")
    locked = "policy: {unwaivable: [D001], reason: The disk is everybody's.}\n"
    (line,) = problems("waive: [D001]\n", locked)
    assert line.startswith("waive: The disk is everybody's (the admin lets nobody waive D001")
    assert "waive: 'D001' is not a list of checks" in problems("waive: D001\n")[0]


def test_what_was_waived_at_the_first_submission_stays_so_in_those_that_follow(two, monkeypatch, capsys):
    path, _, folder = two
    monkeypatch.setattr("launchers.planning.preflight._space", lambda *_: [_full()])
    path.write_text("name: two\nphases: {numbers: {uses: tests.toy.numbers}}\n")
    words = ["run", path, "cluster=local", "--run", folder / "run"]
    assert "it is full [D001]" in said(capsys, *words, code=2).err and not (folder / "run").exists()
    assert "waived: it is full [D001]" in said(capsys, "plan", *words[1:], "--waive", "D001").err
    pipeline = load_pipeline(path, ["cluster=local"])
    pipeline.waive = ["D001"]
    submitted(pipeline, folder / "run")
    again = ["resubmit", folder / "run", "numbers", "numbers.with.start=3", "--dry-run", "--json"]
    (finding,) = json.loads(said(capsys, *again).out)["findings"]
    assert finding == {"check": "D001", "severity": "warning", "where": "", "message": "it is full", "waived": True}


def _full():
    return Problem("", "it is full", "D001")


# -- the hub's cache ----------------------------------------------------------------------------------------------


def cached(folder, name="org/set"):
    """Put a dataset of one file into a cache of the hub."""
    home = folder / f"datasets--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "snapshots" / "abc" / "train.jsonl").write_text("{}\n")
    return folder


def test_a_dataset_that_only_the_submitters_cache_has_is_refused(tmp_path, monkeypatch):
    ours = cached(tmp_path / "mine" / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(ours))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.missing(["org/set"]) == [] and hub.missing(["org/set"], tmp_path / "none")

    class Planned:
        resources = type("Of", (), {"role": "cpu"})

    def checks(**said):
        profile = Profile(partitions={"p": Partition()}, roles={"cpu": Role()}, **said)
        job = Job(type("Named", (), {"name": "data"}), Planned, "w", True, ["org/set"])
        return {problem.check: problem.message for problem in _hub(Cluster("slurm", profile, {}, "site"), job)}

    message = checks()["H002"]  # a job gets no HF_HOME of the submitter's: sbatch would take it, and it would fail
    assert f"which {ours} has, and the job will look for them in {tmp_path}/home/.cache/huggingface/hub" in message
    assert checks(env=Env(forward=["HF_HOME"])) == {} == checks(env=Env(set={"HF_HUB_CACHE": str(ours)}))
    assert checks(env=Env(setup=["export HF_HOME=/shared/hf"])) == {}  # who knows
    there = Env(set={"HF_HOME": str(tmp_path / "mine")})
    assert "each node's own" in checks(env=there, storage=Storage(node_local=str(tmp_path)))["H002"]
    assert "all nodes share" in checks(env=there, storage=Storage(shared=["/shared"]))["H002"]
    assert hub_cache(Profile(kind="local", roles={"cpu": Role()}), "cpu", {"XDG_CACHE_HOME": "/x"}) == Path(
        "/x/huggingface/hub"
    )


def test_the_shipped_pipelines_plan_on_a_laptop(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("slurm.detect._slurm_is_configured", lambda env: False)
    for name in ("megatron_grpo", "openresearcher"):
        said(capsys, "plan", ROOT / f"jobs/pipelines/{name}.yaml", "cluster=h100_preemptible", "--run", tmp_path / name)
