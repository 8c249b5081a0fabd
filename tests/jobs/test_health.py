"""A node that is not fit for a job says so in one line with its name, whatever is wrong with it."""

import os
import subprocess
import sys

import pytest

from jobs import health
from jobs.retry import Cause
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Evidence

GOOD = "".join(f"{index}, 0, 1980, Not Active, Not Active\n" for index in range(4))


@pytest.mark.parametrize(
    "printed, found",
    [
        (GOOD, []),
        (GOOD.replace("3, 0, 1980, Not Active, Not Active\n", ""), ["3 GPUs, not 4"]),
        (GOOD.replace("2, 0", "2, 7"), ["GPU 2 has 7 uncorrected ECC errors"]),
        (GOOD.replace("1, 0", "1, [N/A]"), []),
        (GOOD.replace("0, 0, 1980", "0, 0, 345"), ["GPU 0 runs at 345 MHz at most, less than 1500"]),
        (GOOD.replace("0, 0, 1980, Not", "0, 0, 1980,"), ["GPU 0 is slowed down by heat"]),
        ("Unable to determine the device handle\n", ["1 GPUs, not 4", "nvidia-smi said 'Unable to determine"]),
    ],
)
def test_what_nvidia_smi_says_is_read(printed, found):
    said = health.gpu_problems(printed, gpus=4, ecc=True, min_clock_mhz=1500)
    assert len(said) == len(found) and all(map(str.startswith, said, found)), said
    if "MHz" in "".join(found) or "ECC" in "".join(found) or "slowed" in "".join(found):
        assert health.gpu_problems(printed, gpus=4, ecc=False, min_clock_mhz=None) == []  # not asked


def test_what_fails_is_told_with_the_node_and_read_as_the_nodes_fault(monkeypatch, capfd):
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert health.main(["--command", "true", "--command", "echo ok"]) == 0
    assert capfd.readouterr().err == ""
    code = health.main(["--command", "echo fabric down; exit 3", "--command", "sleep 9", "--limit-s", "0.2"])
    line = capfd.readouterr().err
    assert code == health.EXIT_UNHEALTHY
    assert line == (
        "afterok: health check failed on node n7: `echo fabric down; exit 3`: fabric down (exit code 3); "
        "`sleep 9`: no answer within 0.2 s\n"
    )
    found = classify(Evidence("sft", exit_code=code, log=line))
    assert (found.cause, found.node) == (Cause.NODE, "n7") and "fabric down" in found.evidence


def test_a_node_without_the_driver_has_no_gpus(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert health.main(["--gpus", "8"]) == health.EXIT_UNHEALTHY
    assert "nvidia-smi: No such file or directory" in capfd.readouterr().err
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    smi.chmod(0o755)
    assert health.main(["--ecc"]) == health.EXIT_UNHEALTHY
    assert "nvidia-smi: NVIDIA-SMI has failed" in capfd.readouterr().err


@pytest.mark.parametrize("command, said", [(r"printf '\377 ok'; exit 3", "\ufffd ok (exit code 3)"), ("sleep 9 &", "")])
def test_neither_bytes_that_are_no_text_nor_what_a_command_leaves_behind_matter(capfd, command, said):
    """A command has ended when its shell has, and a bad one's node is named whatever it printed."""
    code = health.main(["--command", command, "--limit-s", "5"])
    assert code == (health.EXIT_UNHEALTHY if said else 0) and said in capfd.readouterr().err


def test_an_all_reduce_that_hangs_is_the_nodes_fault_too(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import time\n\n\nclass cuda:\n    device_count = staticmethod(lambda: time.sleep(60))\n"
    )
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from jobs import health; sys.exit(health.main())"
    command = [sys.executable, "-c", script, "--all-reduce", "--limit-s", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SLURMD_NODENAME": "n7"})
    assert done.returncode == health.EXIT_UNHEALTHY
    assert done.stderr == "afterok: health check failed on node n7: NCCL's all-reduce: no answer within 0.2 s\n"
