"""Slurm's commands never hang us or see another job's environment."""

import os
import stat
import time
from pathlib import Path

import pytest

from slurm import client
from slurm.client import Slurm, SlurmError, SlurmTimeout, SlurmUnavailable


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
    env = fake(tmp_path, "scontrol", f"""
        echo "$@" >> {tmp_path}/calls
        [ $(wc -l < {tmp_path}/calls) -gt 2 ] || {{ echo 'slurm_requeue error: Unable to contact slurm controller' >&2; exit 1; }}
    """)
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
    assert time.monotonic() - began < 5
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
    assert 0.5 < time.monotonic() - began < 2
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 2
    for part in ("scontrol ping", "within 1 s", "SLURM_CONF=/x/slurm.conf", "is DOWN", "cluster=local"):
        assert part in text


def test_missing_commands_are_one_line_not_a_traceback(tmp_path):
    with pytest.raises(SlurmUnavailable, match="in PATH"):
        Slurm({"PATH": str(tmp_path)}).ping()


def test_sbatch_gives_the_id_without_the_cluster(tmp_path):
    assert Slurm(fake(tmp_path, "sbatch", "echo '12;west'")).sbatch(["x.sh"]) == "12"
