"""Slurm's commands never hang us or see another job's environment."""

import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm import client, printed
from slurm.client import Slurm, SlurmError, SlurmTimeout, SlurmUnavailable
from tests.cluster import wait_until


def fake(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment in which the command `name` is `script`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_node_address_is_not_its_name(tmp_path):
    slurm = Slurm(fake(tmp_path, "scontrol", "echo NodeName=n1 Gres=gpu:8 NodeAddr=127.0.0.1 NodeHostName=localhost"))
    assert slurm.node_address("n1") == "127.0.0.1"
    slurm = Slurm(fake(tmp_path, "scontrol", "echo Node n1 not found"))
    with pytest.raises(SlurmError, match="scontrol show node n1 --oneliner.*no NodeAddr in 'Node n1 not found'"):
        slurm.node_address("n1")


def test_only_where_the_cluster_is_passes_the_scrub():
    env = {"SLURM_CONF": "/c", "SLURM_CONF_SERVER": "h", "SLURM_NTASKS": "4", "SBATCH_OUTPUT": "x", "SRUN_DEBUG": "1"}
    assert client.scrubbed_environment({**env, "SQUEUE_PARTITION": "p", "PATH": "/bin"}) == {
        "SLURM_CONF": "/c", "SLURM_CONF_SERVER": "h", "PATH": "/bin",
    }  # fmt: skip


OUTER = {  # what real launchers set for a rank, by their manuals; Slurm's by its commands' man pages
    "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_SPANK_X", "_SLURM_SPANK_OPTION_pyxis_image", "SLURMD_NODENAME", "SRUN_DEBUG",
    "SBATCH_OUTPUT", "SALLOC_ACCOUNT", "SQUEUE_PARTITION", "SINFO_FORMAT", "SACCT_FORMAT", "SCANCEL_QOS",
    "SCONTROL_ALL", "SSTAT_FORMAT", "SPRIO_FORMAT", "SREPORT_TRES", "SBCAST_FORCE", "SPANK_X", "PMI_RANK", "PMI_FD",
    "PMI2_RANK", "PMIX_RANK", "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK", "OMPI_UNIVERSE_SIZE", "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS", "HYDI_CONTROL_FD", "PALS_RANKID", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "AFTEROK_RANK",
    "AFTEROK_MEETING",
}  # fmt: skip
GPUS = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"}


def test_nothing_that_an_outer_job_is_told_of_itself_passes_the_scrub_and_what_is_the_users_does():
    users = {"PATH", "HOME", "OMPI_MCA_btl", "RANKING", "GROUP_NAME", "NCCL_DEBUG", "AFTEROK_PROFILES"}
    env = dict.fromkeys(OUTER | GPUS | users, "1")
    assert set(client.scrubbed_environment(env)) == users
    assert set(client.scrubbed_environment(env, same_place=True)) == users | GPUS  # processes on the same node


def test_a_failure_names_command_and_code_and_keeps_the_whole_message(tmp_path):
    env = fake(tmp_path, "scancel", "echo 'scancel: error: no such' >&2; echo 'scancel: error: thing' >&2; exit 3")
    with pytest.raises(SlurmError) as error:
        Slurm(env).cancel(["7", 8])
    assert str(error.value) == "`scancel --quiet 7 8` failed (exit code 3): scancel: error: no such thing"
    assert (error.value.command, error.value.returncode) == (["scancel", "--quiet", "7", "8"], 3)


def test_cancelling_nothing_runs_nothing(tmp_path):
    Slurm(fake(tmp_path, "scancel", "exit 1")).cancel([])


def test_a_requeue_is_asked_for_again_while_nobody_answers_and_the_node_excluded_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "ASK_AGAIN_S", 0.05)
    env = fake(
        tmp_path,
        "scontrol",
        f"""
        echo "$@" >> {tmp_path}/calls
        [ $(wc -l < {tmp_path}/calls) -gt 2 ] || {{ echo 'Unexpected message received for job 12_3' >&2; exit 1; }}
    """,
    )
    Slurm(env).requeue("12_3", exclude="n4")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["requeue 12_3"] * 3 + ["update jobid=12_3 excnodelist=n4"]
    env = fake(tmp_path, "scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    with pytest.raises(SlurmError, match="presently disabled"):  # an answer: asked once
        Slurm(env).requeue("12_3")


def test_a_hanging_client_is_killed_with_its_children(tmp_path):
    # the child holds the pipe open: killing the shell alone would leave us reading for a minute
    env = fake(tmp_path, "squeue", f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()
    with pytest.raises(SlurmTimeout, match=r"no answer within 0.5 s"):
        Slurm(env, timeout_s=0.5).queue()
    assert time.monotonic() - began < 60  # the sleep's own end
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_accounting_is_none_and_other_failures_are_errors(tmp_path):
    disabled = fake(tmp_path, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert Slurm(disabled).accounting(["1"]) is None
    with pytest.raises(SlurmError):
        Slurm(fake(tmp_path, "sacct", "echo 'sacct: error: slurmdbd' >&2; exit 1")).accounting(["1"])


def test_ping_survives_a_short_restart_and_names_a_dead_controller(tmp_path):
    asked = tmp_path / "asked"
    once = f"[ -e {asked} ] || {{ touch {asked}; exit 1; }}; echo 'Slurmctld(primary) at h is UP'"
    Slurm(fake(tmp_path, "scontrol", once)).ping()
    env = fake(tmp_path, "scontrol", "echo 'Slurmctld(primary) at h is DOWN'")
    began = time.monotonic()
    with pytest.raises(SlurmUnavailable) as error:
        Slurm({**env, "SLURM_CONF": "/x/slurm.conf"}).ping(timeout_s=1)
    assert time.monotonic() - began > 0.5
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 2
    for part in ("scontrol ping", "within 1 s", "SLURM_CONF=/x/slurm.conf", "is DOWN", "cluster=local"):
        assert part in text


def test_missing_commands_are_one_line_not_a_traceback(tmp_path):
    with pytest.raises(SlurmUnavailable, match="in PATH"):
        Slurm({"PATH": str(tmp_path)}).ping()


def test_sbatch_gives_the_id_without_the_cluster(tmp_path):
    assert Slurm(fake(tmp_path, "sbatch", "echo '12;west'")).sbatch(["x.sh"]) == "12"


# -- what sbatch's answer means ----------------------------------------------------------------------------------------

FAILED = "sbatch: error: Batch job submission failed: "
REFUSALS = [  # what sites write, and how Slurm closes it
    ["sbatch: error: No account given. Choose one of yours with --account and try again.",
     FAILED + "Unspecified error"],
    ["sbatch: error: Jobs need a timeout handler: see the communication of May.", FAILED + "Unspecified error"],
    ["sbatch: error: no socket", "sbatch: error: Unable to contact slurm controller (connect failure)?",
     FAILED + "Requested node configuration is not available"],
    ["try again"], ["timeout"], ["communication"], ["Socket timed out on send/recv operation"], [],
    [FAILED + "Resource temporarily unavailable, try again"],
    [FAILED + "Socket timed out on send/recv operation", "sbatch: error: (wrapper)",
     FAILED + "Job violates QOS policy"],
]  # fmt: skip
LOST = [[FAILED + text] for text in printed.LOST_CONNECTION]
LOST.append(["*** maintenance on Monday ***", FAILED + "Socket timed out on send/recv operation", "see the wiki"])


@pytest.mark.parametrize("code", [1, 2, 255])
@pytest.mark.parametrize("silent, lines", [(False, lines) for lines in REFUSALS] + [(True, lines) for lines in LOST])
def test_an_sbatch_that_answered_refused_unless_slurms_own_words_say_the_connection_was_lost(silent, lines, code):
    error = SlurmError(["sbatch"], code, "", "\n".join(lines), printed.lost_connection("sbatch", "\n".join(lines)))
    assert error.is_silence is silent


@pytest.mark.parametrize("ending, silent", [("exit 1", False), ("exit 137", True), ("kill -9 $$", True)])
def test_a_killed_sbatch_may_have_been_heard(tmp_path, ending, silent):
    with pytest.raises(SlurmError) as error:
        Slurm(fake(tmp_path, "sbatch", f"echo 'please try again' >&2; {ending}")).sbatch(["x.sh"])
    assert error.value.is_silence is silent and "please try again" in str(error.value)


def test_the_whole_of_a_sites_refusal_is_kept(tmp_path):
    site = (
        "echo '--- welcome to BigSite ---'; for w in 'Dear user,' 'say --gres=gpu:TYPE:N' 'instead.'; do "
        "echo \"sbatch: error: $w\" >&2; done; echo 'sbatch: error: Batch job submission failed: no' >&2; exit 1"
    )
    with pytest.raises(SlurmError) as error:
        Slurm(fake(tmp_path, "sbatch", site)).sbatch(["x.sh"])
    assert error.value.message == (
        "sbatch: error: Dear user, say --gres=gpu:TYPE:N instead. Batch job submission failed: "
        "no --- welcome to BigSite ---"
    )


@pytest.mark.parametrize("before", [[], ["Your project has 99 hours left."], ["77 jobs are queued"], ["5"]])
@pytest.mark.parametrize("after", [[], ["Your project has 99 hours left."], ["", "*** 12 ***"], ["id: 9"]])
@pytest.mark.parametrize("job", ["12", "12;west"])
def test_a_banner_of_the_sites_is_no_job_id(tmp_path, before, after, job):
    (tmp_path / "said").write_text("\n".join([*before, job, *after]))
    assert Slurm(fake(tmp_path, "sbatch", f"cat {tmp_path}/said; cat {tmp_path}/said >&2")).sbatch(["x.sh"]) == "12"


def test_an_sbatch_that_prints_no_id_leaves_open_whether_there_is_a_job(tmp_path):
    with pytest.raises(SlurmError, match="job's id: queued, thank you") as error:
        Slurm(fake(tmp_path, "sbatch", "echo queued, thank you")).sbatch(["x.sh"])
    assert error.value.is_silence


# -- names that their users chose ------------------------------------------------------------------------------------

NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60) | st.text(
    "\n\t|\x1f\x1b;,'\"\\%$ 1=aUserId()/_JobState", max_size=60
)


@settings(max_examples=200)
@given(st.lists(NAME, max_size=5))
def test_no_name_breaks_the_reading_of_queue_and_accounting(names):
    between = printed.separator()
    queue = "".join(
        between.join([str(i), str(i), "N/A", "RUNNING", "None", "", "n1", name, "\n"]) for i, name in enumerate(names)
    )
    assert [(row.job_id, row.name, row.state) for row in printed.parse_queue(queue, between)] == [
        (str(i), name, "RUNNING") for i, name in enumerate(names)
    ]
    rows = "".join(
        between.join([f"{i}_1", str(i), "FAILED", "1:0", "3", "n1", name, "\n"]) for i, name in enumerate(names)
    )
    assert [(row.raw_id, row.name, row.exit_code) for row in printed.parse_accounting(rows, between)] == [
        (str(i), name, 1) for i, name in enumerate(names)
    ]


ODD_NAMES = ["my\njob", "a|b;c", "tab\tx", "esc\x1b[31m", "us\x1f1\x1f2", "quote'\"", "9\n9 RUNNING", "back\\slash",
             "ünï-日本", "%j%x", " JobState=FAILED ExitCode=3:0 ", "-", "$(id)"]  # fmt: skip


def test_slurm_tells_of_jobs_whatever_their_names_hold(dev_cluster):
    slurm = Slurm(dev_cluster.env())
    jobs = {
        slurm.sbatch(["--hold", f"--job-name={name}", "--comment=JobState=FAILED", "--wrap=true"]): name
        for name in ODD_NAMES
    }
    assert {row.job_id: row.name for row in slurm.queue() if row.job_id in jobs} == jobs
    for job, name in jobs.items():
        assert slurm.job(job)["JobState"] == "PENDING"
        row = slurm.job_row(job)
        assert (row.name.strip(), row.state, row.exit_code) == (name.strip(), "PENDING", 0)
    slurm.cancel(jobs)


def test_accounting_tells_of_jobs_whatever_their_names_hold(accounted_cluster):
    slurm = Slurm(accounted_cluster.env())
    jobs = {slurm.sbatch(["--hold", f"--job-name={name}", "--wrap=true"]): name for name in ODD_NAMES}
    wait_until(lambda: len(slurm.accounting(jobs)) == len(jobs), "slurmdbd has heard of all")
    assert {row.raw_id for row in slurm.accounting(jobs)} == set(jobs)
    assert {row.name for row in slurm.accounting(jobs)} >= {"my\njob", "a|b;c", "tab\tx"}
    slurm.cancel(jobs)
