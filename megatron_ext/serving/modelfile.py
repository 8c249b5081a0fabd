"""Files to serve a model with: Ollama's Modelfiles and vLLM's command."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

# Read in Ollama's threads, not tried: https://github.com/ollama/ollama/pull/14969, .../issues/13314, .../issues/11816.
MERGED_NOTE = "Every Ollama takes FROM a GGUF file of an architecture that it knows"
GPT_OSS_NOTE = "; those of 2025-08 did not know llama.cpp's name of gpt-oss (ollama#11816)"
ADAPTER_NOTE = (
    "ADAPTER is for Ollama before 0.34.1, of Llama, Mistral, Gemma and Phi 3: since then `ollama create` refuses it "
    "(ollama#14969), and before that it refused one of gpt-oss (ollama#13314). Use Modelfile there"
)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank of vLLM 0.29


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn, as a training drew them unless told otherwise."""

    temperature: float
    top_p: float
    top_k: int


def modelfile(
    origin: str,
    adapter: str,
    template: str,
    *,
    stops: Sequence[str],
    sampling: Sampling,
    context: int,
    notes: Sequence[str],
) -> str:
    """Return a Modelfile: FROM `origin`, with an `adapter` file or "", a template of Go's or "" for the file's own."""
    lines = [*(f"# {note}." for note in notes), f"FROM {origin}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    lines += [f'TEMPLATE """{template}"""'] if template else []
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER temperature {sampling.temperature:g}", f"PARAMETER top_p {sampling.top_p:g}"]
    lines += [f"PARAMETER top_k {sampling.top_k}", "PARAMETER min_p 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n"


def vllm_command(name: str, dtype: str, context: int, *, base: str = "", rank: int = 0) -> str:
    """Return a script that serves the folder it lies in; with `base`, that model with the adapter beside it."""
    words = ["--served-model-name", name] if not base else ["--enable-lora", "--lora-modules", f"{name}=$HERE/adapter"]
    if base:
        words += ["--max-lora-rank", str(next(most for most in VLLM_RANKS if most >= rank))]
    words += ["--dtype", dtype] + (["--max-model-len", str(context)] if context else [])
    said = " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)
    model = shlex.quote(base) if base else '"$HERE"'
    here = 'HERE=$(cd "$(dirname "$0")" && pwd)'
    about = "# Serves an OpenAI-compatible API on port 8000."
    return f'#!/bin/sh\n{about}\n{here}\nexec vllm serve {model} {said} "$@"\n'
