"""A random Hugging Face checkpoint from a small config, with its tokenizer: a model to rehearse a pipeline with.

Writes config.json, generation_config.json, model.safetensors and the tokenizer files into `out`. The weights are a pure
function of the config: normal with the config's standard deviation, norms 1, biases 0, as transformers starts them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools import durable
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, silent

INITIAL_STD = 0.02  # Qwen2Config.initializer_range


@dataclass
class Config:
    family: str = "qwen2"
    layers: int = 3
    hidden: int = 96
    heads: int = 4
    kv_groups: int = 2
    ffn: int = 256
    tied: bool = True  # output layer shares the embedding
    max_positions: int = 2048  # tokens
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6
    dtype: str = "float32"
    seed: int = 0
    alphabet_task: str = ""  # character tokenizer with the alphabet of this task …
    tokenizer: str = field(default="", metadata={"input": True})  # … or the tokenizer files of this folder


def check(config: Config, ranks: int) -> list[Problem]:
    from data_tools.tasks.task import load_task
    from megatron_ext.models.registry import FAMILIES

    problems = []
    if config.family not in FAMILIES:
        problems.append(Problem("family", f"{config.family!r} is not known" + nearest(config.family, FAMILIES)))
    else:
        problems += _dims(config, vocabulary=1)[1]
    if bool(config.alphabet_task) == bool(config.tokenizer):
        problems.append(Problem("tokenizer", "name exactly one of alphabet_task and tokenizer"))
    elif config.alphabet_task:
        try:
            load_task(config.alphabet_task)
        except UserMistake as mistake:
            problems.append(Problem("alphabet_task", str(mistake)))
    if ranks != 1:
        problems.append(Problem("", f"init_model runs on 1 rank, not {ranks}"))
    return problems


def _dims(
    config: Config, vocabulary: int, eos: int | None = None, pad: int | None = None
) -> tuple[Any, list[Problem], Any]:
    """(dimensions, problems, config.json) of the model; problems name fields of Config."""
    from megatron_ext.models.qwen2.config import Dims, hf_config
    from megatron_ext.models.registry import Family

    problems = []
    for name in ("layers", "hidden", "heads", "kv_groups", "ffn", "max_positions"):
        if getattr(config, name) < 1:
            problems.append(Problem(name, f"{getattr(config, name)} is too few: the least is 1"))
    if problems:
        return None, problems, None
    values = Dims(
        layers=config.layers,
        hidden=config.hidden,
        ffn=config.ffn,
        heads=config.heads,
        kv_groups=config.kv_groups,
        head_dim=config.hidden // config.heads,
        vocabulary=vocabulary,
        tied=config.tied,
        norm_epsilon=config.norm_epsilon,
        rope_base=config.rope_base,
        max_positions=config.max_positions,
        dtype=config.dtype,
    )
    file = hf_config(values, eos, pad)
    if config.hidden % config.heads:
        return None, [Problem("heads", f"hidden {config.hidden} does not divide by {config.heads} heads")], None
    dims, problems = Family(config.family).config.read(file, "")
    return dims, problems, file


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Facts: parameters, vocabulary, sha256 of the weights."""
    from data_tools.chat import load_tokenizer
    from data_tools.char_tokenizer import write_char_tokenizer
    from data_tools.tasks.task import load_task
    from megatron_ext.model_folder import copy_hf_files
    from megatron_ext.models.registry import Family

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    if config.alphabet_task:
        write_char_tokenizer(out, load_task(config.alphabet_task).ALPHABET)
    else:
        if not Path(config.tokenizer).is_dir():
            raise UserMistake(Problem("tokenizer", f"{config.tokenizer} is no folder with tokenizer files"))
        copy_hf_files(Path(config.tokenizer), out)
    tokenizer = load_tokenizer(str(out))
    family = Family(config.family)
    dims, problems, file = _dims(config, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    if problems:
        raise UserMistake(problems)

    import torch

    from megatron_ext.convert import write_safetensors
    from megatron_ext.models.rules import hf_shapes

    generator = torch.Generator().manual_seed(config.seed)
    parameters = 0

    def weights():
        nonlocal parameters
        for name, shape in hf_shapes(family.mapping.rules(dims)).items():
            parameters += torch.Size(shape).numel()
            if len(shape) > 1:
                yield name, torch.empty(shape).normal_(0.0, INITIAL_STD, generator=generator)
            else:
                yield name, torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)

    files = write_safetensors(out, weights(), getattr(torch, config.dtype))
    durable.write_json(out / "config.json", file)
    durable.write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id},
    )
    return {
        "parameters": parameters,
        "vocabulary": dims.vocabulary,
        "sha256": {name: durable.sha256_file(out / name) for name in files},
    }


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
