"""What Slurm's commands print is read right, and spelled as they spell it."""

import pytest

from slurm import printed
from slurm.printed import QueueRow

# As printed by Slurm 22.05.8; "^" stands for the separator.
SQUEUE = """\
9^9^N/A^COMPLETED^None^(null)^n1^train^
10^10^0^RUNNING^None^(null)^n[1-2]^pack^
10^10^5-6,9%2^PENDING^JobArrayTaskLimit^(null)^^pack^
14^11^4^PENDING^Dependency^aftercorr:10_*(unfulfilled)^^a|b c^
20^20^N/A^PENDING^DependencyNeverSatisfied^afterok:9(failed)^^sft^
"""
SINFO = """\
batch*|up|1-00:00:00|1-infinite|4|64|256000|gpu:8
mixed|up|infinite|1-16|4|64|256000|gpu:a100:4(S:0-1)
mixed|up|infinite|1-16|2|96+|512000+|gpu:a100:4(S:0,1),gpu:v100:4(S:0-1),nvme:2
old|down|30:00|1-1|1|8|16000|(null)
"""
SACCT = """\
12^12^COMPLETED^0:0^65^n1^init^
13_1^15^FAILED^137:0^3^n2^sft|x^
13_[2-4]^13^CANCELLED by 1000^0:9^^None assigned^sft^
"""
CONFIG = """\
Configuration data as of 2026-11-21T00:25:40
ClusterName             = dev
MaxArraySize            = 4001
SchedulerParameters     = bf_interval=1,max_array_tasks=500
"""


def test_queue_rows_are_read_as_printed():
    rows = printed.parse_queue(SQUEUE, "^")
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
    assert printed.parse_indices(text) == indices


def test_a_list_of_indices_that_was_cut_is_an_error_not_a_shorter_array():
    with pytest.raises(ValueError):
        printed.parse_indices("0,3,9,...")


def test_indices_are_spelled_as_slurm_spells_them_and_shortened_for_people():
    assert printed.format_indices([7, 3, 8, 9, 20]) == "3,7-9,20" and printed.format_indices(range(4)) == "0-3"
    assert printed.format_indices(range(0, 40, 2), 6) == "0,2,4,6,8,10,…"
    assert printed.parse_indices(printed.format_indices([1, 2, 5])) == [1, 2, 5]


def test_partitions_of_unlike_nodes_become_one_row():
    batch, mixed, old = printed.parse_partitions(SINFO)
    assert (batch.name, batch.default, batch.max_time_minutes, batch.max_nodes) == ("batch", True, 1440, None)
    assert (mixed.nodes, mixed.max_nodes, mixed.cpus_per_node, mixed.gpus_per_node) == (6, 16, 96, 8)
    assert (mixed.default, mixed.max_time_minutes, mixed.mem_mib_per_node) == (False, None, 512000)
    assert (old.state, old.gpus_per_node, old.max_nodes, old.max_time_minutes) == ("down", 0, 1, 30)


def test_accounting_rows_are_read_as_printed():
    rows = printed.parse_accounting(SACCT, "^")
    assert [(row.job_id, row.raw_id, row.state) for row in rows] == [
        ("12", "12", "COMPLETED"), ("13_1", "15", "FAILED"), ("13_[2-4]", "13", "CANCELLED"),
    ]  # fmt: skip
    assert (rows[1].exit_code, rows[1].exit_signal, rows[1].name, rows[1].elapsed_s) == (137, 0, "sft|x", 3)
    assert (rows[2].exit_signal, rows[2].elapsed_s, rows[2].nodelist) == (9, 0, "")


def test_array_limit_is_the_lower_of_the_two_that_slurm_has():
    assert printed.array_limit(printed.parse_configuration(CONFIG)) == 500
    assert printed.array_limit({"MaxArraySize": "4001", "SchedulerParameters": "(null)"}) == 4001


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("30:15", 31), ("1:30:00", 90), ("2-00:00:00", 2880), ("2-12", 3600), ("1-0:30", 1470), ("0:90", 2)],
)
def test_slurm_times_become_minutes_rounded_up(text, minutes):
    assert printed.parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1h", "1:2:3:4", "-5", "2-", "1.5"])
def test_an_unreadable_time_is_named(text):
    with pytest.raises(ValueError, match="no Slurm time") as error:
        printed.parse_minutes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("minutes", [1, 59, 60, 1439, 1440, 10079])
def test_printed_times_read_back_equal(minutes):
    assert printed.parse_minutes(printed.format_minutes(minutes)) == minutes
