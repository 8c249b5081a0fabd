"""A random Hugging Face checkpoint from a small config, with its tokenizer: a model to rehearse a pipeline with.

Writes config.json, generation_config.json, model.safetensors and the tokenizer files into `out`. The weights are a pure
function of the config: normal with a standard deviation of 0.02, norms 1, biases 0, as transformers starts them.
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.declared import SEEDS, setting
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, silent
from megatron_ext.models.registry import MODEL_TYPES, Family, parse_config
from megatron_ext.parallel.settings import DTYPES

ALPHABETS = ("", "bytes")


@dataclass
class Config:
    """The config of the phase init_model."""

    family: str = setting("qwen2", "model type of config.json", choices=tuple(MODEL_TYPES))
    layers: int = setting(3, "layers", unit="layers", least=1)
    hidden: int = setting(96, "width of a token between layers, a multiple of heads", unit="numbers a token", least=1)
    heads: int = setting(4, "heads of attention", unit="heads", least=1)
    kv_groups: int = setting(2, "heads of keys and values, which the others share", unit="heads", least=1)
    ffn: int = setting(256, "width within an MLP", unit="numbers a token", least=1)
    tied: bool | None = setting(None, "whether the output layer shares the embedding; null: as the family has it")
    max_positions: int = setting(2048, "longest sequence", unit="tokens", least=1)
    rope_base: float = setting(10000.0, "base of the rotary embedding", above=0, example=1e6)
    norm_epsilon: float = setting(1e-6, "epsilon of the norms", above=0, example=1e-5)
    dtype: str = setting("float32", "type of the weights", choices=DTYPES)
    config: dict[str, Any] = setting(
        dict, "further keys of config.json, or other values of them", example={"rope_theta": 1000000}, free=True
    )
    seed: int = setting(0, "draw of the weights", **SEEDS)
    alphabet_task: str = setting("", "task whose alphabet a character tokenizer gets", example="calculator", free=True)
    alphabet: str = setting(
        "", "or a tokenizer of bytes, which encodes any text and has a chat template with tools", choices=ALPHABETS,
        keyed="if_set",
    )  # fmt: skip
    chats: bool = setting(
        False, "the character tokenizer writes chats, too: messages one after the other, as a task's rows stand",
        keyed="if_set",
    )  # fmt: skip
    tokenizer: str = setting("", "or a folder whose tokenizer files are taken", example="my_tokenizer", input=True)


def check(config: Config, ranks: int) -> list[Problem]:
    """Return what can be refused before anything runs."""
    from data_tools.tasks.task import load_row_task

    problems = _dims(config, vocabulary=1)[1]
    if sum(map(bool, (config.alphabet_task, config.alphabet, config.tokenizer))) != 1:
        message = "give exactly one of alphabet_task, alphabet and tokenizer; `alphabet: bytes` encodes any text"
        problems.append(Problem("tokenizer", message))
    elif config.alphabet_task:
        try:
            if not hasattr(load_row_task(config.alphabet_task), "ALPHABET"):
                message = f"task {config.alphabet_task} names no characters (ALPHABET); give `alphabet: bytes` instead"
                problems.append(Problem("alphabet_task", message))
        except UserMistake as mistake:
            problems.append(Problem("alphabet_task", str(mistake)))
    if config.chats and not config.alphabet_task:
        problems.append(Problem("chats", "is for the tokenizer of alphabet_task; any other has a template or has not"))
    if ranks != 1:
        problems.append(Problem("", f"init_model runs on 1 rank, not {ranks}"))
    return problems


def _dims(
    config: Config, vocabulary: int, eos: int | None = None, pad: int | None = None
) -> tuple[Any, list[Problem], Any]:
    """Return (dimensions, problems, config.json) of the model; problems name fields of Config."""
    if config.hidden % config.heads:
        return None, [Problem("heads", f"hidden {config.hidden} does not divide by {config.heads} heads")], None
    family = Family(MODEL_TYPES[config.family])
    file = family.config.small(config, vocabulary, eos, pad) | config.config
    _, dims, problems = parse_config(file, "config")
    return dims, problems, file


def forecast(config: Config) -> dict[str, Any]:
    """Return what of the checkpoint is known before it is made: config.json, with a vocabulary that is the tokenizer's
    and not yet known, whether there is a chat template, and the characters of a tokenizer that knows no others."""
    from data_tools.chats.char_tokenizer import characters_of
    from data_tools.chats.tokenizer import has_template
    from data_tools.tasks.task import load_row_task

    characters = None
    if config.tokenizer:
        template, characters = has_template(Path(config.tokenizer)), characters_of(Path(config.tokenizer))
    else:
        template = config.chats or bool(config.alphabet)
    if config.alphabet_task:
        with contextlib.suppress(UserMistake):  # which `check` tells
            characters = getattr(load_row_task(config.alphabet_task), "ALPHABET", None)
    return {"hf_config": _dims(config, vocabulary=1)[2], "chat_template": template, "characters": characters}


def run(config: Config, out: Path, keep: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the checkpoint into OUT. Return the facts: parameters, vocabulary, sha256 of the weights."""
    from data_tools.chats.byte_tokenizer import write_byte_tokenizer
    from data_tools.chats.char_tokenizer import CHAT_TEMPLATE, write_char_tokenizer
    from data_tools.chats.tokenizer import load_tokenizer
    from data_tools.tasks.task import load_row_task
    from megatron_ext.model_folders.model_folder import copy_hf_files

    problems = check(config, 1)
    if problems:
        raise UserMistake(problems)
    if config.alphabet_task:
        alphabet = load_row_task(config.alphabet_task).ALPHABET
        write_char_tokenizer(out, alphabet, CHAT_TEMPLATE if config.chats else "")
    elif config.alphabet:
        write_byte_tokenizer(out)
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
