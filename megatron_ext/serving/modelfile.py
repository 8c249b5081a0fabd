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
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # --max-lora-rank of vLLM 0.29 and 0.32


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
    for stop in stops:
        unread = f"# Left out is the stop {json.dumps(stop)}, which no Modelfile can hold."
        lines.append(f"PARAMETER stop {quoted(stop)}" if quoted(stop) else unread)
    lines += [f"PARAMETER temperature {sampling.temperature:g}", f"PARAMETER top_p {sampling.top_p:g}"]
    lines += [f"PARAMETER top_k {sampling.top_k}", "PARAMETER min_p 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Return a text as Ollama reads it from a Modelfile (parser/parser.go); "" where it can read no such text.

    Between its quotes are no escapes, and what cannot be printed is dropped, but for white space.
    """
    if '"""' in text or not all(char.isprintable() or char in "\n\r\t" for char in text):
        return ""
    quote = '"""' if '"' in text else '"'
    return quote + text + quote


def vllm_command(name: str, dtype: str, context: int, *, base: str = "", rank: int = 0) -> str:
    """Return a script that serves the folder it lies in; with `base`, that model with the adapter beside it."""
    words = ["--served-model-name", shlex.quote(name)]
    if base:
        rank = next(most for most in VLLM_RANKS if most >= rank)
        words = [
            "--enable-lora",
            "--lora-modules",
            f'{shlex.quote(name)}="$HERE"/adapter',
            "--max-lora-rank",
            str(rank),
        ]
    said = " ".join([*words, "--dtype", dtype, *(["--max-model-len", str(context)] if context else [])])
    model = shlex.quote(base) if base else '"$HERE"'
    here = 'HERE=$(cd "$(dirname "$0")" && pwd)'
    about = "# Serves an OpenAI-compatible API on port 8000."
    return f'#!/bin/sh\n{about}\n{here}\nexec vllm serve {model} {said} "$@"\n'
