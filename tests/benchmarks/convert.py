"""Conversion of a synthetic sharded Qwen2 checkpoint, both ways, beside a plain copy with the safetensors library.

    python -m tests.benchmarks.convert [GIGABYTES] [FOLDER]

Each step is a process of its own, so that its peak anonymous memory (RssAnon of /proc/PID/status, sampled; what
memory-mapped files occupy is not in it) is its own. Every step ends with sync(2): all that it wrote is on the disk. The
copy reads each file with `load_file` and writes it with `save_file`. FOLDER (default: a temporary one) needs three
times the size.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LAYER = dict(hidden=3584, ffn=18944, heads=28, kv_groups=4, head_dim=128)  # of Qwen2.5-7B
SAMPLE_S = 0.005


def _dims(gigabytes: float):
    from megatron_ext.models.layouts import hf_shapes
    from megatron_ext.models.qwen2.config import Dims
    from megatron_ext.models.registry import Family

    def dims(layers: int) -> Dims:
        return Dims(layers=layers, vocabulary=151936, tied=False, norm_epsilon=1e-6, rope_base=1e6,
                    max_positions=32768, dtype="bfloat16", **LAYER)  # fmt: skip

    def size(layers: int) -> int:
        import math

        return 2 * sum(map(math.prod, hf_shapes(Family("qwen2").mapping.rules(dims(layers))).values()))

    layers = round((gigabytes * 1e9 - size(0)) / (size(1) - size(0)))
    return dims(max(1, layers)), size(max(1, layers))


def make(folder: Path, gigabytes: float) -> None:
    """A checkpoint in several files, of random bits that are finite numbers."""
    import torch

    from data_tools.base import durable
    from megatron_ext.models.layouts import hf_shapes
    from megatron_ext.models.qwen2.config import hf_config
    from megatron_ext.models.registry import Family
    from megatron_ext.weights.hf_files import write_safetensors

    dims, _ = _dims(gigabytes)
    shapes = hf_shapes(Family("qwen2").mapping.rules(dims))
    generator = torch.Generator().manual_seed(0)

    def values():
        for name, shape in shapes.items():
            yield name, torch.randint(0, 0x7F00, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)

    folder.mkdir()
    write_safetensors(folder, {name: ("bfloat16", shape) for name, shape in shapes.items()}, values(), 1 << 30)
    durable.write_json(folder / "config.json", hf_config(dims))


def copy(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), target / file.name)


def import_(source: Path, target: Path) -> None:
    from megatron_ext.entrypoints import import_hf

    target.mkdir()
    import_hf.run(import_hf.Config(str(source)), target, target)


def export(source: Path, target: Path) -> None:
    from megatron_ext.entrypoints import export_hf

    target.mkdir()
    export_hf.run(export_hf.Config(str(source)), target, target)


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def step(name: str, *arguments: str) -> None:
    """Run one step in this process and print its seconds and its peak of anonymous bytes."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    {"copy": copy, "import": import_, "export": export}[name](*map(Path, arguments))
    os.sync()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak": peak, "cpu": time.process_time()}))


def tensor_hashes(folder: Path) -> dict[str, str]:
    from megatron_ext.weights.hf_files import HfTensors

    tensors = HfTensors(folder)
    import torch

    return {
        name: hashlib.sha256(memoryview(tensors.read(name).reshape(-1).view(torch.uint8).numpy())).hexdigest()
        for name in sorted(tensors.shapes())
    }


def main(gigabytes: float, folder: Path) -> None:
    hf, model, out, plain = (folder / name for name in ("hf", "model", "out", "copy"))
    make(hf, gigabytes)
    os.sync()
    size = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in {len(list(hf.glob('*.safetensors')))} files")
    found = {}
    for name, source, target in (("copy", hf, plain), ("import", hf, model), ("export", model, out)):
        command = [sys.executable, "-m", "tests.benchmarks.convert", "step", name, str(source), str(target)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(said.splitlines()[-1])
        seconds, peak = found[name]["seconds"], found[name]["peak"]
        print(
            f"{name:7} {seconds:6.1f} s {size / seconds / 1e9:6.2f} GB/s  peak {peak / 1e9:.2f} GB anonymous, "
            f"{found[name]['cpu']:.1f} s of CPU",
            flush=True,
        )
        if name == "copy":
            for file in plain.iterdir():
                file.unlink()
    assert tensor_hashes(hf) == tensor_hashes(out), "import and export changed a tensor"
    print("every tensor is byte-equal after import and export")
    ours, peer = max(found[name]["seconds"] for name in ("import", "export")), found["copy"]["seconds"]
    print(json.dumps({"name": "convert", "ours": ours, "peer": peer, "ratio": peer / ours, "unit": "s",
                      "peak_anonymous_bytes": max(found[name]["peak"] for name in ("import", "export"))}))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        parent = sys.argv[2] if len(sys.argv) > 2 else None
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            main(float(sys.argv[1]) if len(sys.argv) > 1 else 8.0, Path(folder))
