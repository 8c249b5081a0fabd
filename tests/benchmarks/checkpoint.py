"""How long a checkpoint keeps training from going on: saved in the background beside saved at once.

    python -m tests.benchmarks.checkpoint [--layers 18] [--hidden 512]

One process, a Qwen2 in fp32 whose weights and optimizer take at least 1 GB. What a background save costs is the time
until training goes on; told apart, by how much the steps made meanwhile are slower than others (on a GPU node the
writing thread shares no processor with them).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

STEPS = 6  # before anything is saved, for the usual time of one
SAVES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--hidden", type=int, default=512)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_ext import device
    from megatron_ext.parallel import ranks

    device.init_device()
    from megatron_ext.parallel.plan import ParallelPlan
    from megatron_ext.training import supervised
    from megatron_ext.training.update import AdamW, Trainer
    from megatron_ext.weights import checkpoint
    from tests.megatron_ext import tiny
    from tests.megatron_ext.training import run_of

    dims = tiny.dims(layers=args.layers, hidden=args.hidden, ffn=4 * args.hidden, head_dim=args.hidden // 4)
    plan, packs = ParallelPlan(), tiny.Packs(pack_length=64)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder, ranks.started(plan):
        root = Path(folder)
        trainer = Trainer(tiny.model(tiny.hf_folder(root / "hf", dims), dims, plan), plan, AdamW())
        rows = supervised.rows_of_step(packs, 0, run_of(), plan)

        def step() -> float:
            began = time.perf_counter()
            trainer.step(rows, 1e-5)
            return time.perf_counter() - began

        usual = statistics.median([step() for _ in range(STEPS)][1:])
        held: dict[str, list[float]] = {"at once": [], "background": []}
        slowed: dict[str, list[float]] = {"at once": [], "background": []}
        for name in held:
            (root / name).mkdir()
            background = name == "background"
            saver = checkpoint.Saver(root / name, trainer.model, trainer.optimizer, plan, 1, background=background)
            for number in range(1, SAVES + 1):
                began = time.perf_counter()
                saver.save(number, {}, {})
                blocked, slower, meanwhile = time.perf_counter() - began, 0.0, 0
                while saver._thread is not None and saver._thread.is_alive():
                    slower += step() - usual
                    meanwhile += 1
                saver.wait()
                held[name].append(blocked)
                slowed[name].append(max(slower, 0.0))
                print(
                    f"{name} {number}: blocked {blocked:.2f} s, {meanwhile} steps meanwhile, slower by {slower:.2f} s"
                )
            saver.close()
        written = sum(f.stat().st_size for f in (root / "background").rglob("*") if f.is_file())
    ours, peer = (statistics.median(held[name]) for name in ("background", "at once"))
    slower = statistics.median(slowed["background"])
    print(
        json.dumps(
            {
                "name": "checkpoint",
                "ours": round(ours, 2),
                "peer": round(peer, 2),
                "ratio": round(peer / ours, 2),
                "unit": "s",
                "ratio_with_slower_steps": round(peer / (ours + slower), 2),
                "gb": round(written / 1e9, 2),
                "step_s": round(usual, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
