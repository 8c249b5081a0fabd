"""Slurm's printed text is read right, and its commands never hang us or see another job's environment."""

import os
import stat
import time
from pathlib import Path

import pytest

from slurm import client
from slurm.client import QueueRow, Slurm, SlurmError, SlurmTimeout, SlurmUnavailable

# As printed by Slurm 22.05.8; "^" stands for the separator.
SQUEUE = """\
9^9^N/A^COMPLETED^None^(null)^n1^train
10^10^0^RUNNING^None^(null)^n[1-2]^pack
10^10^5-6,9%2^PENDING^JobArrayTaskLimit^(null)^^pack
14^11^4^PENDING^Dependency^aftercorr:10_*(unfulfilled)^^a|b c
20^20^N/A^PENDING^DependencyNeverSatisfied^afterok:9(failed)^^sft
"""
SINFO = """\
batch*|up|1-00:00:00|1-infinite|4|64|256000|gpu:8
mixed|up|infinite|1-16|4|64|256000|gpu:a100:4(S:0-1)
mixed|up|infinite|1-16|2|96+|512000+|gpu:a100:4(S:0,1),gpu:v100:4(S:0-1),nvme:2
old|down|30:00|1-1|1|8|16000|(null)
"""
SACCT = """\
12|12|COMPLETED|0:0|65|n1|init
13_1|15|FAILED|137:0|3|n2|sft|x
13_[2-4]|13|CANCELLED by 1000|0:9||None assigned|sft
"""
CONFIG = """\
Configuration data as of 2026-11-21T00:25:40
ClusterName             = dev
MaxArraySize            = 4001
SchedulerParameters     = bf_interval=1,max_array_tasks=500
"""


def fake(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment in which the command `name` is `script`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_queue_rows_are_read_as_printed():
    rows = client.parse_queue(SQUEUE.replace("^", client.SEPARATOR))
    assert rows == [
        QueueRow("9", None, None, "train", "COMPLETED", "", "", "n1"),
        QueueRow("10", "10", 0, "pack", "RUNNING", "", "", "n[1-2]"),
        QueueRow("10", "10", 5, "pack", "PENDING", "JobArrayTaskLimit", "", ""),
        QueueRow("10", "10", 6, "pack", "PENDING", "JobArrayTaskLimit", "", ""),
        QueueRow("10", "10", 9, "pack", "PENDING", "JobArrayTaskLimit", "", ""),
        QueueRow("14", "11", 4, "a|b c", "PENDING", "Dependency", "aftercorr:10_*(unfulfilled)", ""),
        QueueRow("20", None, None, "sft", "PENDING", "DependencyNeverSatisfied", "afterok:9(failed)", ""),
    ]


@pytest.mark.parametrize(
    ("text", "indices"),
    [("7", [7]), ("0-2,7%4", [0, 1, 2, 7]), ("0-8:4", [0, 4, 8]), ("1-9:4,20", [1, 5, 9, 20]), ("3-3", [3])],
)
def test_lists_of_array_indices_are_read_to_the_last(text, indices):
    assert client.parse_indices(text) == indices


def test_a_list_of_indices_that_was_cut_is_an_error_not_a_shorter_array():
    with pytest.raises(ValueError):
        client.parse_indices("0,3,9,...")


def test_indices_are_spelled_as_slurm_spells_them_and_shortened_for_people():
    assert client.format_indices([7, 3, 8, 9, 20]) == "3,7-9,20" and client.format_indices(range(4)) == "0-3"
    assert client.format_indices(range(0, 40, 2), 6) == "0,2,4,6,8,10,…"
    assert client.parse_indices(client.format_indices([1, 2, 5])) == [1, 2, 5]


def test_partitions_of_unlike_nodes_become_one_row():
    batch, mixed, old = client.parse_partitions(SINFO)
    assert (batch.name, batch.default, batch.max_time_minutes, batch.max_nodes) == ("batch", True, 1440, None)
    assert (mixed.nodes, mixed.max_nodes, mixed.cpus_per_node, mixed.gpus_per_node) == (6, 16, 96, 8)
    assert (mixed.default, mixed.max_time_minutes, mixed.mem_mib_per_node) == (False, None, 512000)
    assert (old.state, old.gpus_per_node, old.max_nodes, old.max_time_minutes) == ("down", 0, 1, 30)


def test_accounting_rows_are_read_as_printed():
    rows = client.parse_accounting(SACCT)
    assert [(row.job_id, row.raw_id, row.state) for row in rows] == [
        ("12", "12", "COMPLETED"), ("13_1", "15", "FAILED"), ("13_[2-4]", "13", "CANCELLED"),
    ]  # fmt: skip
    assert (rows[1].exit_code, rows[1].exit_signal, rows[1].name, rows[1].elapsed_s) == (137, 0, "sft|x", 3)
    assert (rows[2].exit_signal, rows[2].elapsed_s, rows[2].nodelist) == (9, 0, "")


def test_array_limit_is_the_lower_of_the_two_that_slurm_has():
    assert client.array_limit(client.parse_configuration(CONFIG)) == 500
    assert client.array_limit({"MaxArraySize": "4001", "SchedulerParameters": "(null)"}) == 4001


def test_node_address_is_not_its_name():
    printed = "NodeName=n1 Gres=gpu:8 NodeAddr=127.0.0.1 NodeHostName=localhost"
    assert client.parse_node_address(printed, "n1") == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("30:15", 31), ("1:30:00", 90), ("2-00:00:00", 2880), ("2-12", 3600), ("1-0:30", 1470), ("0:90", 2)],
)
def test_slurm_times_become_minutes_rounded_up(text, minutes):
    assert client.parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1h", "1:2:3:4", "-5", "2-", "1.5"])
def test_an_unreadable_time_is_named(text):
    with pytest.raises(ValueError, match="no Slurm time") as error:
        client.parse_minutes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("minutes", [1, 59, 60, 1439, 1440, 10079])
def test_printed_times_read_back_equal(minutes):
    assert client.parse_minutes(client.format_minutes(minutes)) == minutes


def test_only_where_the_cluster_is_passes_the_scrub():
    env = {"SLURM_CONF": "/c", "SLURM_CONF_SERVER": "h", "SLURM_NTASKS": "4", "SBATCH_OUTPUT": "x", "SRUN_DEBUG": "1"}
    assert client.scrubbed_environment({**env, "SQUEUE_PARTITION": "p", "PATH": "/bin"}) == {
        "SLURM_CONF": "/c", "SLURM_CONF_SERVER": "h", "PATH": "/bin",
    }  # fmt: skip


def test_a_failure_names_command_code_and_first_line(tmp_path):
    env = fake(tmp_path, "scancel", "echo 'scancel: error: no such thing' >&2; echo more >&2; exit 3")
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
