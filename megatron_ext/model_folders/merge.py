"""What becomes of a model folder's adapter: it is added to the weights, tensor by tensor, or exported alone.

Neither takes a model or a process group.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from data_tools.base.inside import files, inside
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.files.digest import combined
from megatron_ext.lora import peft_format
from megatron_ext.lora.pairs import pairs
from megatron_ext.lora.peft_config import PEFT_CONFIG
from megatron_ext.model_folders import model_folder
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.weights import convert, dist_weights, shares
from megatron_ext.weights.dist_weights import regions

NOT_TOKENIZER = ("config.json", "generation_config.json")  # of a Hugging Face folder; the model's


def changes(folder: ModelFolder) -> convert.Changes:
    """Return what the adapter adds to each matrix it is for; {} where the folder has none."""
    if folder.lora is None:
        return {}
    adapted = pairs(folder.family, folder.dims, folder.lora)
    reader = peft_format.Reader(folder.adapter, adapted, folder.lora)
    return {pair.matrix.name: partial(reader.change, pair) for pair in adapted}


def share(folder: ModelFolder, out: Path, index: int, count: int, progress: Progress = silent) -> int:
    """Write every `count`-th merged tensor into OUT, for `finish`. Returns how many."""
    torch.set_num_threads(1)
    rules, added = folder.family.mapping.rules(folder.dims)[index::count], changes(folder)
    reader = dist_weights.Reader(folder.weights)
    writer = shares.writer_of(out, index, count)
    dtypes = {key: dtype for key, (dtype, _) in reader.tensors().items()}
    sums: dict[str, Counter[str]] = {"before": Counter(), "after": Counter()}
    with convert.summing() as pool:
        for done, rule in enumerate(rules):
            whole, before = convert.read_whole(reader, rule, pool)
            dtype = dtypes[next(regions(rule))[0].key]
            sums["after"].update(
                convert.write_whole(writer, rule, blocks=[convert.changed(rule, whole, added)], dtype=dtype, pool=pool)
            )
            sums["before"].update(before.total())
            progress(done + 1, len(rules), "tensors")
    shares.close(writer, {"sums": {when: {key: str(total) for key, total in of.items()} for when, of in sums.items()}})
    return len(rules)


def finish(folder: ModelFolder, parts: Sequence[Path], out: Path) -> str:
    """Make OUT the merged model folder of all shares. Returns its weights digest.

    UserMistake where the folder's weights are not those that the adapter was trained on.
    """
    told = [shares.read(part) for part in parts]
    stored = dist_weights.Reader(folder.weights).tensors()
    rules = folder.family.mapping.rules(folder.dims)
    shapes = {region.key: region.shape for rule in rules for region, _ in regions(rule)}
    if _digest(told, "before", stored, shapes) != folder.base_digest:
        message = f"its weights are not those of model.json ({folder.base_digest[:12]}…): they were changed"
        raise UserMistake(Problem(str(folder.path), f"{message}; make the folder again"))
    shares.finish_weights(parts, told, out)
    model_folder.copy_hf_files(folder.hf, out / "hf")
    digest = _digest(told, "after", stored, shapes)
    model_folder.describe(out, folder.family, step=folder.step, weights_digest=digest, dtype=folder.dtype)
    return digest


def _digest(
    told: Sequence[dict[str, Any]],
    when: str,
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
    shapes: Mapping[str, tuple[int, ...]],
) -> str:
    """Return the digest as checkpoint.weights_digest does. `shapes` are without vocabulary padding."""
    total: Counter[str] = Counter()
    for share in told:
        total.update({key: int(value) for key, value in share["sums"][when].items()})
    return combined({key: (stored[key][0], shapes[key], total[key]) for key in shapes})


def export_adapter(folder: ModelFolder, out: Path, dtype: str) -> None:
    """Make OUT a PEFT folder of a model folder's adapter, with the tokenizer, its tensors as `dtype`. No ranks."""
    names = {path.name for path in files(folder.hf)} - {*NOT_TOKENIZER, convert.LEDGER}
    for name in sorted(names):
        shutil.copyfile(inside(folder.hf, name), out / name)
    config = durable.read_json(inside(folder.adapter, PEFT_CONFIG))
    config["base_model_name_or_path"] = convert.base_ledger(folder.hf).get("source") or ""
    durable.write_json(out / PEFT_CONFIG, config)
    tensors = load_file(inside(folder.adapter, peft_format.TENSORS))
    converted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(converted, out / peft_format.TENSORS, metadata={"format": "pt"})
