"""A random Hugging Face checkpoint from a small config, with its tokenizer: a model to rehearse a pipeline with.

Writes config.json, generation_config.json, model.safetensors and the tokenizer files into `out`. The weights are a pure
function of the config: normal with a standard deviation of 0.02, norms 1, biases 0, as transformers starts them.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, silent


@dataclass
class Config:
    family: str = "qwen2"  # a model type of config.json: qwen2, qwen3, llama, gpt_oss, nemotron_h, nanochat
    layers: int = 3
    hidden: int = 96
    heads: int = 4
    kv_groups: int = 2
    ffn: int = 256
    tied: bool | None = None  # output layer shares the embedding; None: as the family has it
    max_positions: int = 2048  # tokens
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6
    dtype: str = "float32"
    config: dict[str, Any] = field(default_factory=dict)  # further keys of config.json, or other values of them
    seed: int = 0
    alphabet_task: str = ""  # character tokenizer with the alphabet of this task …
    tokenizer: str = field(default="", metadata={"input": True})  # … or the tokenizer files of this folder


def check(config: Config, ranks: int) -> list[Problem]:
    from data_tools.tasks.task import load_row_task
    from megatron_ext.models.registry import MODEL_TYPES

    problems = []
    if config.family not in MODEL_TYPES:
        problems.append(Problem("family", f"{config.family!r} is not known" + nearest(config.family, MODEL_TYPES)))
    else:
        problems += _dims(config, vocabulary=1)[1]
    if bool(config.alphabet_task) == bool(config.tokenizer):
        problems.append(Problem("tokenizer", "name exactly one of alphabet_task and tokenizer"))
    elif config.alphabet_task:
        try:
            load_row_task(config.alphabet_task)
        except UserMistake as mistake:
            problems.append(Problem("alphabet_task", str(mistake)))
    if ranks != 1:
        problems.append(Problem("", f"init_model runs on 1 rank, not {ranks}"))
    return problems


def _dims(
    config: Config, vocabulary: int, eos: int | None = None, pad: int | None = None
) -> tuple[Any, list[Problem], Any]:
    """(dimensions, problems, config.json) of the model; problems name fields of Config."""
    from megatron_ext.models.registry import MODEL_TYPES, Family, parse_config

    problems = []
    for name in ("layers", "hidden", "heads", "kv_groups", "ffn", "max_positions"):
        if getattr(config, name) < 1:
            problems.append(Problem(name, f"{getattr(config, name)} is too few: the least is 1"))
    if not problems and config.hidden % config.heads:
        problems.append(Problem("heads", f"hidden {config.hidden} does not divide by {config.heads} heads"))
    if problems:
        return None, problems, None
    family = Family(MODEL_TYPES[config.family])
    file = family.config.small(config, vocabulary, eos, pad) | config.config
    _, dims, problems = parse_config(file, "config")
    return dims, problems, file


def forecast(config: Config) -> dict[str, Any]:
    """config.json of the checkpoint, known before it is made; the vocabulary is the tokenizer's and not yet known."""
    return {"hf_config": _dims(config, vocabulary=1)[2]}


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Facts: parameters, vocabulary, sha256 of the weights."""
    from data_tools.chats.char_tokenizer import write_char_tokenizer
    from data_tools.chats.tokenizer import load_tokenizer
    from data_tools.tasks.task import load_row_task
    from megatron_ext.model_folders.model_folder import copy_hf_files
    from megatron_ext.models.registry import MODEL_TYPES, Family

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    if config.alphabet_task:
        write_char_tokenizer(out, load_row_task(config.alphabet_task).ALPHABET)
    else:
        if not Path(config.tokenizer).is_dir():
            raise UserMistake(Problem("tokenizer", f"{config.tokenizer} is no folder with tokenizer files"))
        copy_hf_files(Path(config.tokenizer), out)
    tokenizer = load_tokenizer(str(out))
    family = Family(MODEL_TYPES[config.family])
    dims, problems, file = _dims(config, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    if problems:
        raise UserMistake(problems)

    import torch

    from megatron_ext.models.layouts import default_start, hf_rules, hf_shapes
    from megatron_ext.weights.hf_files import write_safetensors

    generator = torch.Generator().manual_seed(config.seed)
    rules = family.mapping.rules(dims)
    shapes = hf_shapes(rules)
    starts = {name: entries[0][0].start or default_start(name) for name, entries in hf_rules(rules).items()}
    tensors = ((name, starts[name](shape, generator)) for name, shape in shapes.items())
    files = write_safetensors(out, {name: (config.dtype, shape) for name, shape in shapes.items()}, tensors)
    durable.write_json(out / "config.json", file)
    durable.write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id},
    )
    return {
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "vocabulary": dims.vocabulary,
        "sha256": {name: durable.sha256_file(out / name) for name in files},
    }


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
