"""A model folder as a Hugging Face checkpoint that transformers loads and that gives the same logits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools import durable
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent


@dataclass
class Config:
    model: str = field(default="", metadata={"input": True})  # model folder
    dtype: str = ""  # of the files; "" keeps the folder's


def check(config: Config, ranks: int) -> list[Problem]:
    from megatron_ext.entrypoints.import_hf import DTYPES

    problems = []
    if not config.model:
        problems.append(Problem("model", "is missing: a model folder"))
    if config.dtype and config.dtype not in DTYPES:
        problems.append(Problem("dtype", f"{config.dtype!r} is none of {', '.join(DTYPES)}"))
    if ranks != 1:
        problems.append(Problem("", f"export_hf runs on 1 rank, not {ranks}"))
    return problems


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Facts: weights_digest of the model exported, sha256 and bytes of each weight file, dtype."""
    from megatron_ext import model_folder

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    dtype = config.dtype or folder.dtype

    import torch

    from megatron_ext import convert, ranks
    from megatron_ext.parallel import ParallelPlan

    plan = ParallelPlan()
    with ranks.started(plan):
        from megatron_ext import checkpoint  # megatron-core may be imported once the device is ready

        model = model_folder.load_model(folder, plan)
        digest = checkpoint.weights_digest(model)
        if digest != folder.weights_digest:
            raise UserMistake(
                Problem(
                    str(folder.path),
                    f"its weights have digest {digest[:12]}…, model.json says "
                    f"{folder.weights_digest[:12]}…: they were changed; make the folder again",
                )
            )
        model_folder.copy_hf_files(folder.hf, out)
        tensors = convert.hf_tensors(model, folder.family, folder.dims)
        files = convert.write_safetensors(out, tensors, getattr(torch, dtype))
    file = durable.read_json(out / "config.json")
    for key in ("dtype", "torch_dtype"):
        if key in file or key == "dtype":
            file[key] = dtype
    durable.write_json(out / "config.json", file)
    progress(len(files), len(files), "files")
    return {
        "weights_digest": digest,
        "dtype": dtype,
        "sha256": {name: durable.sha256_file(out / name) for name in files},
        "bytes": {name: (out / name).stat().st_size for name in files},
    }


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
