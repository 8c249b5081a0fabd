"""What asking every rank whether to stop costs a training step: two gloo ranks, interleaved with steps that do not ask.

    python -m tests.benchmarks.stop_check [STEPS]

The model is the quick start's (0.3 million parameters, 416-token packs): the shortest step there is. The median is
told, since the ranks share two cores with whatever else runs here.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUND = 10  # steps of one kind in a row


def rank_main(steps: int, hf: str) -> None:
    from megatron_ext.device import init_device

    init_device()
    import torch.distributed as dist

    from data_tools.progress import never
    from megatron_ext.parallel import ranks
    from megatron_ext.parallel.plan import ParallelPlan
    from megatron_ext.training import loop, supervised
    from megatron_ext.training.update import AdamW, Trainer
    from tests.megatron_ext import tiny
    from tests.megatron_ext.training import run_of

    plan, packs, run = ParallelPlan(), tiny.Packs(pack_length=416), run_of(steps, global_batch=2)
    with ranks.started(plan):
        trainer = Trainer(tiny.model(Path(hf), DIMS, plan), plan, AdamW())
        vote = loop.StopVote(never)
        times: dict[bool, list[float]] = {True: [], False: []}
        for k in range(steps):
            asks, began = k // ROUND % 2 == 0, time.perf_counter()
            rows = supervised.rows_of_step(packs, k, run, plan)
            trainer.step(rows, 0.001, before_update=vote.send if asks else None)
            if asks:
                vote.count()
            if k >= 2 * ROUND:
                times[asks].append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            with_, without = (statistics.median(times[asks]) * 1e3 for asks in (True, False))
            print(
                f"step {without:.2f} ms, asking every rank {with_:.2f} ms: {with_ - without:+.3f} ms, "
                f"{with_ / without - 1:+.1%}"
            )


def main() -> None:
    from tests.megatron_ext import gloo, tiny

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as folder:
        hf = tiny.hf_folder(Path(folder) / "hf", DIMS)
        port = gloo.free_port()
        command = [sys.executable, "-m", "tests.benchmarks.stop_check", str(steps), str(hf)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        children = [subprocess.Popen(command, env=one_thread | gloo.environment(rank, 2, port)) for rank in range(2)]
        sys.exit(max(child.wait() for child in children))


if __name__ == "__main__":
    from tests.megatron_ext.tiny import dims

    DIMS = dims(layers=4, hidden=96, ffn=256, head_dim=24)
    rank_main(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else main()
