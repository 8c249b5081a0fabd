"""Files of a stranger's model: config.json, tokenizer, chat template, adapter, index and headers of weights."""

import contextlib
import json
from dataclasses import replace
from datetime import date

import pytest
import torch
from safetensors.torch import save

from data_tools.chats.conversation import read_record
from data_tools.chats.template import ChatTemplate, TemplateError
from data_tools.chats.tokenizer import load_tokenizer
from megatron_ext.files import step_manifest
from megatron_ext.lora import peft_config
from megatron_ext.models.config_reading import WITHOUT_EFFECT
from megatron_ext.models.registry import read_config
from megatron_ext.weights.hf_files import HfTensors
from tests.data_tools.chats import CHATML, write_tokenizer
from tests.doors.sweep import OURS, Door, Refused, check, counts
from tests.doors.test_records import strict
from tests.megatron_ext import tiny

DIMS = {
    "qwen2": tiny.DIMS, "llama": tiny.dims(kind="llama", rope_factor=8.0),
    "gpt_oss": replace(tiny.GPT_OSS_DIMS, swiglu_limit=0.5), "nemotron_h": tiny.NEMOTRON_H_DIMS,
    "nanochat": tiny.NANOCHAT_DIMS,
}  # fmt: skip


def refuse(problems):
    if problems:
        mistake = Refused("; ".join(map(str, problems)))
        mistake.problems = problems
        raise mistake


@counts
def test_config_json(cases, tmp_path, record):
    def read(data):
        (tmp_path / "config.json").write_bytes(data)
        family, dims, problems = read_config(tmp_path)
        refuse(problems)
        return [family.name, repr(dims)]

    files = [tiny.family(dims).config.hf_config(dims) for dims in DIMS.values()]
    ignored = {key for dims in DIMS.values() for key in tiny.family(dims).config.WITHOUT_EFFECT} | WITHOUT_EFFECT
    ignored -= {"model_type", "dtype", "torch_dtype"}

    def without(file, key):
        with contextlib.suppress(Refused):
            return read(json.dumps({name: value for name, value in file.items() if name != key}).encode())

    usual = {  # what a file may leave out
        (key, repr(strict(json.dumps(value).encode())))
        for file in files
        for key, value in file.items()
        if without(file, key) == read(json.dumps(file).encode())
    }

    def told(data):  # null is absent, a key of an underscore a comment
        pairs = [pair for pair in strict(data)[1:] if pair[0] not in ignored and not pair[0].startswith("_")]
        return [[key, value] for key, value in pairs if value not in (None, False) and (key, repr(value)) not in usual]

    check(Door("config.json", [json.dumps(file).encode() for file in files], read, told), cases, record)


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers",
    "use_rslora": False, "rank_pattern": {}, "exclude_modules": ["lm_head"], "target_parameters": ["experts.down_proj"],
}  # fmt: skip


@counts
def test_settings_of_adapters(cases, tmp_path, record):
    def read(data):
        (tmp_path / peft_config.PEFT_CONFIG).write_bytes(data)
        adapter, problems = peft_config.read(tmp_path)
        refuse(problems)
        return repr(adapter)

    def told(data):
        carried = [pair for pair in strict(data)[1:] if pair[0] not in peft_config.WITHOUT_EFFECT]
        same = {
            "task_type": ("CAUSAL_LM",),
            "bias": ("none",),
            "use_rslora": (False,),
            "rank_pattern": (["object"], []),
        }
        return [[key, value] for key, value in carried if value is not None and value not in same.get(key, ())]

    check(Door("adapters", [json.dumps(ADAPTER).encode()], read, told), cases, record)


INDEX = {"metadata": {"total_size": 40}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@counts
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "one.safetensors"])
def test_weights(cases, file, tmp_path, record):
    """The index and the header; bytes of the tensors themselves can be any."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    whole = {"model.safetensors.index.json": json.dumps(INDEX).encode(), "one.safetensors": save({"a": tensors["a"]})}
    for name, data in {**whole, "two.safetensors": save({"b": tensors["b"]})}.items():
        (tmp_path / name).write_bytes(data)

    def read(data):
        (tmp_path / file).write_bytes(data)
        found = HfTensors(tmp_path)
        return {name: [str(found.dtype(name)), list(shape)] for name, shape in found.shapes().items()}

    def told(data):
        if file.endswith(".json"):
            return [pair for pair in strict(data)[1:] if pair[0] == "weight_map"]
        size = int.from_bytes(data[:8], "little")
        header = [pair for pair in strict(data[8 : 8 + size])[1:] if pair[0] != "__metadata__"]
        return [header, len(data) - 8 - size]

    check(Door(f"weights ({file})", [whole[file]], read, told), cases, record)


@counts
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_tokenizers(cases, file, tmp_path, record):
    folder = write_tokenizer(tmp_path / "tokenizer")
    whole = (folder / file).read_bytes()
    if file == "tokenizer.json":  # small enough that damage meets more than the vocabulary
        text = json.loads(whole)
        text["model"]["vocab"] = {word: number for word, number in text["model"]["vocab"].items() if number < 60}
        text["model"]["merges"] = []
        whole = json.dumps(text).encode()

    def read(data):
        (folder / file).write_bytes(data)
        tokenizer = load_tokenizer(str(folder))
        tokenizer.check_end()
        ids = tokenizer.encode("2+2?<|im_end|>A")  # of what is left in the vocabulary
        return [tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.chat_template,
                tokenizer.special_tokens, list(ids), tokenizer.decode(list(ids))]  # fmt: skip

    # What its library reads over in such a file is its own; ours is that nothing else comes out of it.
    check(Door(f"tokenizers ({file})", [whole], read, lambda data: "any"), cases, record)


@counts
def test_chat_templates(cases, record):
    (conversation,) = read_record(
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    )

    def read(data):
        template = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"}, {}, date(2026, 1, 1))
        return template.text(conversation)

    inputs = [CHATML.encode()]
    check(Door("chat templates", inputs, read, lambda data: "any", refused=(*OURS, TemplateError)), cases, record)


def test_manifests_are_swept_with_the_files_of_runs():
    """tests/jobs/test_altered_files.py has them among its kinds."""
    from tests.jobs.test_altered_files import KINDS

    assert step_manifest.MANIFEST == "manifest.json" and "step's manifest" in KINDS
