"""A training that stands still says where each rank is, and ends as `why` knows."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from data_tools.base import declared
from data_tools.progress import EXIT_HUNG
from jobs.retry import Cause
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Evidence
from megatron_ext.training.watch import Hang, Watch
from tests.megatron_ext import gloo, tiny

QUICK = Hang(times=3, floor_s=1.5, grace_s=1.0)


def stands_still() -> None:
    time.sleep(600)


def rank_main(hf: Path, keep: Path) -> None:
    """One rank of a training whose rank 1 stands still after its second step."""
    from megatron_ext.device import init_device

    init_device()
    from megatron_ext.parallel import ranks
    from megatron_ext.parallel.plan import ParallelPlan
    from megatron_ext.training import supervised
    from megatron_ext.training.update import AdamW, Trainer
    from tests.megatron_ext.training import run_of

    def told(done: int, *_: object) -> None:
        if done == 2 and ranks.rank_of_environment() == 1:
            stands_still()

    plan = ParallelPlan()
    with ranks.started(plan):
        trainer = Trainer(tiny.model(hf, tiny.DIMS, plan), plan, AdamW())
        supervised.train_on_packs(trainer, tiny.Packs(), run_of(9, hang=QUICK), keep, identity={}, progress=told)


def test_the_stacks_of_all_ranks_are_dumped_when_one_stands_still(tmp_path):
    hf, port = tiny.hf_folder(tmp_path / "hf"), gloo.free_port()
    command = [sys.executable, "-m", "tests.megatron_ext.test_watch", str(hf), str(tmp_path)]
    found = [
        subprocess.Popen(
            command, env={**os.environ, **gloo.environment(rank, 2, port)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    logs = [process.communicate(timeout=120)[1] for process in found]
    assert [process.returncode for process in found] == [EXIT_HUNG, EXIT_HUNG], logs
    stacks = [(tmp_path / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "stands_still" in stacks[1] and "stands_still" not in stacks[0]
    assert re.search(r"update.py\", line \d+ in (gradient|step)|in count", stacks[0])  # it waits for the other's part
    for log, stack in zip(logs, stacks):
        assert stack in log and "s are usual; its stacks are in" in log
        assert classify(Evidence("sft", log=log, exit_code=1)).cause is Cause.HANG


def test_a_rank_that_keeps_pythons_lock_is_ended_too(tmp_path):
    code = f"""
import ctypes, pathlib
from megatron_ext.training.watch import Hang, Watch
with Watch(Hang(floor_s=0.4, grace_s=0.1), pathlib.Path({str(tmp_path)!r}), 0).watching():
    import time; time.sleep(0.1)
    ctypes.PyDLL(None).sleep(60)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert found.returncode == 1 and 'File "<string>", line 6' in found.stderr
    assert classify(Evidence("sft", log=found.stderr, exit_code=1)).cause is Cause.HANG


def test_what_is_slow_is_no_hang(tmp_path):
    with Watch(Hang(times=50, floor_s=0.2, grace_s=0.1), tmp_path / "stacks", 0).watching() as watch:
        for _ in range(3):  # steps of 0.05 s: 2.5 s would be a hang, and 0.4 s is none
            time.sleep(0.05)
            watch.step()
        assert 1.0 < watch.limit() < 20.0
        time.sleep(0.4)
        watch.move()
    off = Watch(Hang(times=0, floor_s=0.05, grace_s=0.1), tmp_path / "stacks", 0)
    with off.watching():
        time.sleep(0.3)
    assert not (tmp_path / "stacks").exists()


def test_settings_are_checked():
    assert [problem.where for problem in declared.check(Hang(times=1.5, floor_s=0))] == ["times", "floor_s"]
    assert not declared.check(Hang(times=0))  # which never calls it a hang


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
