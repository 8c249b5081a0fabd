"""A model folder as nanochat's own checkpoint, that its chat_cli, chat_eval and chat_rl load.

    OUT/SOURCE_checkpoints/TAG/model_STEP.pt, meta_STEP.json        OUT/tokenizer/tokenizer.pkl

OUT can be nanochat's folder (NANOCHAT_BASE_DIR), or these are copied into it. An adapter is merged into the weights.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base.declared import MODELS, setting
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.entrypoints import export_hf
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.settings import DTYPES
from megatron_ext.preflight import facts

SOURCES = ("base", "mid", "chatsft", "chatrl")


@dataclass
class Config:
    """The config of the phase export_nanochat."""

    model: str = setting(
        "",
        "model folder of the family nanochat",
        example="${phases.sft.out}",
        needed=True,
        input=True,
        made_by=MODELS,
    )
    source: str = setting("chatsft", "folder SOURCE_checkpoints that nanochat finds it in", choices=SOURCES)
    tag: str = setting(
        "", 'nanochat\'s model tag; "": d and the number of layers, as nanochat names them', example="d20", free=True
    )
    step: int = setting(
        -1,
        "step in the names; -1: of the training, or of the checkpoint that was imported",
        unit="steps",
        least=-1,
    )
    dtype: str = setting("", 'type of the weights in the file; "" keeps that of the folder', choices=("", *DTYPES))


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of folders that are yet to come."""
    from megatron_ext.models.registry import parse_config

    problems = []
    if config.tag and not _is_name(config.tag):
        problems.append(Problem("tag", f"{config.tag!r} is no name of a folder, such as d32"))
    if ranks != 1:
        problems.append(Problem("", f"export_nanochat runs on 1 rank, not {ranks}"))
    known, where = facts.model_config(config.model, site or Site(ranks))
    if known is not None:
        family, dims, wrong = parse_config(known, where)
        problems += wrong or _not_nanochat(family.name if family else "", dims, where)
    return problems


def _is_name(tag: str) -> bool:
    """Return whether a tag is the name of a folder that a file system takes and a shell shows: at most 255 bytes."""
    return Path(tag).name == tag.strip() == tag != ".." and tag.isprintable() and len(os.fsencode(tag)) <= 255


def _not_nanochat(family: str, dims: Any, where: str) -> list[Problem]:
    from megatron_ext.models.nanochat import checkpoint

    if family != "nanochat":
        return [Problem("model", f"{where} is of the family {family}, and nanochat has its own alone: use export_hf")]
    return checkpoint.unlike(dims, where)


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the checkpoint in the memory of its weights.

    Return the facts: weights_digest of the model, bytes of the file, path, step, dtype, dtype_changes, whether meta is
    that of the checkpoint which was imported, whether there is a tokenizer.
    """
    from megatron_ext.model_folders import model_folder
    from megatron_ext.models.nanochat import checkpoint, tokenizer
    from megatron_ext.weights.hf_files import HfTensors

    if problems := check(config, 1):
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    if problems := _not_nanochat(folder.family.name, folder.dims, config.model):
        raise UserMistake(problems)
    place = out / f"{config.source}_checkpoints" / (config.tag or f"d{folder.dims.layers}")
    with tempfile.TemporaryDirectory(dir=out) as name:
        hf = Path(name)
        exported = export_hf.run(export_hf.Config(config.model, config.dtype), hf, keep, progress)
        files = HfTensors(hf)
        tensors = {tensor: files.read(tensor) for tensor in files.shapes()}
        digest = exported["weights_digest"]
        step = folder.step if config.step < 0 and folder.step else config.step
        step, same = checkpoint.write(hf, place, folder.dims, tensors=tensors, step=step, weights_digest=digest)
        del files, tensors  # they are backed by files that go now
        if has_tokenizer := (hf / tokenizer.FILE).is_file():
            (out / "tokenizer").mkdir()
            shutil.copyfile(hf / tokenizer.FILE, out / "tokenizer" / tokenizer.FILE)
    file = place / f"model_{step:06d}.pt"
    return {
        "weights_digest": digest, "bytes": file.stat().st_size, "path": str(file.relative_to(out)), "step": step,
        "dtype": exported["dtype"], "dtype_changes": exported["dtype_changes"], "same_meta": same,
        "tokenizer": has_tokenizer,
    }  # fmt: skip


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
