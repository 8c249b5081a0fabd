"""The sbatch script is a pure function of plan and profile; its golden text is what an admin reads."""

from pathlib import Path
from typing import Any

from data_tools.base import durable
from jobs.artifacts.run_folder import FrozenPhase, RunFolder
from jobs.schema.pipeline import load_pipeline
from launchers.backends.contract import JobSpec, request_of
from launchers.backends.slurm import dependency, never_starting
from launchers.backends.slurm_script import PhaseExecutor, phase_command, phase_parameters, script_changes
from launchers.planning.plan import PlannedPhase
from launchers.planning.planner import make_plan
from slurm.detect import Cluster
from slurm.printed import QueueRow
from slurm.profile.files import load
from slurm.profile.schema import Profile, Resources
from tests.command import write_toy

GOLDEN = """#!/bin/bash

# Parameters
#SBATCH --account=llm
#SBATCH --array=0,2%4
#SBATCH --chdir=/run/toy
#SBATCH --constraint=h100
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --export=WANDB_MODE
#SBATCH --gpus-per-node=8
#SBATCH --job-name=numbers.toy.a3.cafe
#SBATCH --kill-on-invalid-dep=no
#SBATCH --mem=1843200M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/run/toy/numbers/logs/a3.%a.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --signal=USR2@90
#SBATCH --time=1440

# setup
set -euo pipefail
export SLURM_EXPORT_ENV=ALL PATH HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"
export NCCL_SOCKET_IFNAME=ib0
export HF_HOME=/shared/hf
set +euo pipefail
afterok_say() { echo 'afterok: profile example:' "$@" >&2; }
afterok_now=env.modules
trap 'afterok_code=$?; afterok_say "$afterok_now ended the job with code $afterok_code, at or after: $BASH_COMMAND"' EXIT
command -v module > /dev/null || for file in "${MODULESHOME:-/usr/share/modules}/init/bash" "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash" "/etc/profile.d/modules.sh" "/etc/profile.d/lmod.sh" "/etc/profile.d/z00_lmod.sh"; do if [ -r "$file" ]; then . "$file"; break; fi; done
module load cuda/12.8 || { afterok_code=$?; trap - EXIT; afterok_say env.modules ended the job with code $afterok_code, at: 'module load cuda/12.8'; exit $afterok_code; }
afterok_now=env.setup
trap 'afterok_code=$?; [ ${#BASH_SOURCE[@]} -gt 1 ] || afterok_say "a command of env.setup ended with code $afterok_code: $BASH_COMMAND"' ERR
: the first line
ulimit -l unlimited
trap - ERR
[[ "$(trap -p EXIT)" != *afterok_now* ]] || trap - EXIT
unset IFS; set -euo pipefail
export PYTHONPATH=/run/toy/submissions/3/code PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$node" --oneliner | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
resolved=$(getent ahostsv4 "${address:-$node}" | awk 'NR == 1 {print $1}' || true)
export MASTER_ADDR="${resolved:-${address:-$node}}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# command
export SUBMITIT_EXECUTOR=slurm
run_element() {
    if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then
        /shared/afterok/venv/bin/python -m launchers.backends.restart /run/toy numbers $1 --submission 3 || return $?
    fi
    local code=0
    srun --kill-on-bad-exit=1 --export=ALL --unbuffered --cpus-per-task=12 --mpi=none --cpu-bind=cores /bin/sh -c \
'trap "" USR2; exec "$@"' worker /shared/afterok/venv/bin/python -m jobs.worker /run/toy numbers $1 --submission 3 \
--requeue || code=$?
    [ $code = 0 ] || /shared/afterok/venv/bin/python -m launchers.backends.restart /run/toy numbers $1 --submission 3 --code $code
    return $code
}
run_element "${SLURM_ARRAY_TASK_ID:-0}"
"""  # noqa: E501  (word for word)


def test_the_script_of_a_gpu_phase_is_this_text(tmp_path):
    profile = load("example")
    pipeline = load_pipeline(
        write_toy(tmp_path), ["numbers.resources.role=train", "numbers.resources.nodes=2", "numbers.throttle=4"]
    )
    run = RunFolder(Path("/run/toy"))
    planned = make_plan(pipeline, run, Cluster("slurm", profile, {}, "example")).phases[0]
    spec = JobSpec(planned, "numbers.toy.a3.cafe", [0, 2], {})
    parameters, command = phase_parameters(profile, run, 3, spec), phase_command(profile, run, 3, spec)
    assert PhaseExecutor(tmp_path).text(parameters, command) == GOLDEN


def test_a_job_that_waits_since_before_the_moves_has_no_other_script():
    sent = GOLDEN.replace("launchers.backends.restart", "launchers.rerun")
    assert sent != GOLDEN and script_changes(sent, GOLDEN) == ""
    assert script_changes(sent, GOLDEN.replace("--nodes=2", "--nodes=3")) == "nodes 2 → 3"
    assert script_changes(sent, GOLDEN + "true\n") == "another script"


def test_a_dependency_names_every_job_and_an_elements_its_partner():
    needs, waits = {"a": "afterok", "b": "aftercorr", "sealed": "afterok"}, {"a": "41:44", "b": "42"}
    assert dependency(needs, waits) == "afterok:41:44,aftercorr:42"
    assert dependency(needs, waits, 7) == "afterok:41:44,afterok:42_7"


def test_a_singleton_names_the_jobs_it_may_not_meet_and_one_failure_of_several_jobs_is_enough():
    assert dependency({"a": "singleton", "b": "afternotok"}, {"a": "4:5", "b": "6"}) == "afterany:4:5,afternotok:6"
    assert dependency({"b": "afternotok"}, {"b": "6:7"}) == "afterany:6:7"


def test_dependents_of_a_chain_name_its_last_link():
    assert dependency({"a": "afterok", "b": "aftercorr"}, {"a": "6_3", "b": "7_1"}) == "afterok:6_3,afterok:7_1"


def test_what_waits_behind_a_job_that_can_never_start_never_starts_either():
    def row(job, reason, waits, array=None):
        return QueueRow(
            job_id=job,
            array_job_id=array,
            array_index=None,
            name="n",
            state="PENDING",
            reason=reason,
            dependency=waits,
            nodelist="",
        )

    rows = [row("2", "DependencyNeverSatisfied", "afterok:1(failed)"), row("3", "Dependency", "afterok:2(unfulfilled)"),
            row("9", "DependencyNeverSatisfied", "aftercorr:5_*(failed)", "7"),
            row("4", "Dependency", "afterany:3(unfulfilled)"),
            row("5", "Dependency", "afterok:7_*(unfulfilled)"), row("6", "Resources", "")]  # fmt: skip
    assert never_starting(rows) == {"2", "3", "5", "9"}


def script(tmp_path, profile_text, *overrides):
    """The script of the toy's first phase, as role train of a profile."""
    (tmp_path / "site.yaml").write_text(profile_text)
    profile = load(str(tmp_path / "site.yaml"))
    pipeline = load_pipeline(write_toy(tmp_path), ["numbers.resources.role=train", *overrides])
    run = RunFolder(Path("/run/toy"))
    planned = make_plan(pipeline, run, Cluster("slurm", profile, {}, "site")).phases[0]
    spec = JobSpec(planned, "numbers.toy.a3.cafe", [0, 2], {})
    parameters, command = phase_parameters(profile, run, 3, spec), phase_command(profile, run, 3, spec)
    return PhaseExecutor(tmp_path).text(parameters, command)


def options(text):
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line)


PLACES = """\
partitions: {gpu: {gres: gpu:h100:8, licenses: lustre:1, reservation: old}}
roles:
  train: {gpus_per_node: 8, account: team, reservation: course}
  cpu: {}
"""


def test_gpus_are_asked_for_by_the_name_that_the_site_gives_them(tmp_path):
    said = options(script(tmp_path, PLACES))
    assert said["gres"] == "gpu:h100:8" and "gpus-per-node" not in said
    assert (said["account"], said["reservation"], said["licenses"]) == ("team", "course", "lustre:1")
    text = script(tmp_path, PLACES.replace("gres: gpu:h100:8, ", ""), "numbers.resources.gres=nvme:1",
                  "numbers.resources.qos=high", "numbers.resources.account=mine")  # fmt: skip
    said = options(text)
    assert (said["gres"], said["gpus-per-node"], said["qos"], said["account"]) == ("nvme:1", "8", "high", "mine")


def test_a_request_that_says_nothing_new_is_that_of_jobs_of_before():
    said = dict.fromkeys(("account", "qos", "constraint", "gpu", "gpu_mem_gib", "mem_gib", "partition", "time_minutes"))
    said |= {"role": "cpu", "nodes": 1, "ranks_per_node": 1, "gpus_per_node": 0, "cpus_per_task": 1, "extra_sbatch": {}}
    frozen = FrozenPhase("p", "sft", "k", {}, {}, None, 1, False, {}, {}, 1, 1, 0)
    before = durable.sha256_bytes(durable.canonical_json(["sft", 0, 1, said]))[:16]
    assert request_of(PlannedPhase(frozen, Resources(**said), "cpu", "run")) == before
    assert request_of(PlannedPhase(frozen, Resources(**said, gres="nvme:1"), "cpu", "run")) != before


ENVIRONMENTS = """\
partitions: {gpu: {}}
roles:
  train: {nodes: 2}
  cpu: {}
env: {python: /trainer/python, modules: [cuda], setup: [ulimit -l], set: {A: "1"}}
network: {interface: ib0}
storage: {node_local: /local}
"""


def test_a_roles_own_environment_is_its_scripts(tmp_path):
    before = script(tmp_path, ENVIRONMENTS)
    role = "{nodes: 2, env: {python: /vllm/python, modules_init: /opt/lmod/init, modules: [vllm], set: {B: x y}}}"
    text = script(tmp_path, ENVIRONMENTS.replace("{nodes: 2}", role))
    for line in (
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export TMPDIR=/local",
        "export A=1",
    ):
        assert line in before.splitlines() and line in text.splitlines()
    assert "export B='x y'" in text and "module load vllm ||" in text and "module load cuda" not in text
    assert ". /opt/lmod/init ||" in text and "MODULESHOME" not in text and "ulimit -l" in text
    assert "/vllm/python -m jobs.worker" in text and "/trainer" not in text


HOOKS = """\
partitions: {gpu: {}}
roles:
  train: {nodes: 2, gpus_per_node: 8, cpus_per_task: 4}
  cpu: {}
env: {python: python}
hooks:
  prolog: [mkdir -p /local/$SLURM_JOB_ID]
  health: {gpus: true, ecc: true, min_clock_mhz: 1500, all_reduce: true, commands: ["test -e '/x y'"], limit_s: 30}
"""
HEALTH = """\
    local code=0
    echo "numbers[$1] attempt 3 asks its nodes for their health"
    srun --export=ALL --unbuffered --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=4 python -m jobs.health \
--limit-s 30 --gpus 8 --ecc --min-clock-mhz 1500 --all-reduce --command 'test -e '"'"'/x y'"'"'' || code=$?
    [ $code != 0 ] || srun --kill-on-bad-exit=1 --export=ALL --unbuffered --cpus-per-task=4 """


def test_nodes_are_asked_for_their_health_before_the_ranks_start(tmp_path):
    text = script(tmp_path, HOOKS)
    assert HEALTH in text
    assert "afterok_now=hooks.prolog\n" in text and "\nmkdir -p /local/$SLURM_JOB_ID\ntrap - ERR\n" in text
    gpus_only = HOOKS.replace(", commands: [\"test -e '/x y'\"]", "").replace("gpus_per_node: 8, ", "")
    assert "jobs.health" not in script(tmp_path, gpus_only)  # a role without GPUs is asked nothing of them
    assert "jobs.health" not in script(tmp_path, PLACES)


MAILED = """\
partitions: {gpu: {}}
roles: {cpu: {}}
mail: {user: me@example.org, type: [BEGIN, END, FAIL, TIME_LIMIT_80]}
"""


def test_a_pipeline_sends_few_mails(tmp_path):
    """One when it begins, one when it ends and one a failure, arrays whole, and not one a phase."""
    (tmp_path / "site.yaml").write_text(MAILED)
    pipeline, run = load_pipeline(write_toy(tmp_path)), RunFolder(tmp_path / "run")

    def mails(profile: Profile, **changed: Any) -> dict[str, tuple[str, str]]:
        phases = make_plan(pipeline, run, Cluster("slurm", profile, {}, "site")).phases
        found = {}
        for planned in phases:
            for name, value in changed.items():
                setattr(planned if name == "conditional" else planned.frozen, name, value)
            spec = JobSpec(planned, "a.name", planned.missing, {}, links=changed.get("links", 0))
            said = phase_parameters(profile, run, 1, spec)["additional_parameters"]
            found[planned.name] = said.get("mail-type", ""), said.get("mail-user", "")
        return found

    profile = load(str(tmp_path / "site.yaml"))
    me = "me@example.org"
    assert mails(profile) == {"numbers": ("BEGIN,FAIL,TIME_LIMIT_80", me), "total": ("FAIL,TIME_LIMIT_80", me),
                              "again": ("END,FAIL,TIME_LIMIT_80", me)}  # fmt: skip
    # Slurm calls a link that handed over failed, and a phase that is not needed too
    for changed in ({"links": 3}, {"conditional": True}):
        assert mails(profile, **changed)["total"] == ("END,TIME_LIMIT_80", me)
    profile.mail.type = []
    assert [types for types, _ in mails(profile).values()] == ["FAIL", "FAIL", "END,FAIL"]
    profile.mail.type, profile.mail.user = ["ALL"], None
    assert mails(profile)["again"] == ("END,FAIL,REQUEUE,INVALID_DEPEND", "")
    for nothing in (["NONE"], []):
        profile.mail.type = nothing
        assert set(mails(profile).values()) == {("", "")}


def test_local_processes_say_that_they_send_no_mail(tmp_path):
    profile = load("local")
    profile.mail.user = "me"
    plan = make_plan(load_pipeline(write_toy(tmp_path)), RunFolder(tmp_path / "run"), Cluster("local", profile, {}, ""))
    assert [note for note in plan.notes if note.startswith("mail: ")]
