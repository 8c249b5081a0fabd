"""A GGUF file asked by llama.cpp, through the package xllamacpp.

Its server is llama.cpp's own, which listens: on a Unix socket in a folder of this process's, for nobody else. Prompts
go in and completions come out as token ids, so that llama.cpp's tokenizer has no say. (The package's own functions
return text, in which half a character is lost.)
"""

import http.client
import importlib.metadata
import importlib.util
import json
import os
import socket
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.mistake import Problem, UserMistake

PACKAGE = "xllamacpp"
Sampled = tuple[list[int], str]  # a completion's tokens without the one that ended it, and "stop" or "length"


def check_installed() -> list[Problem]:
    """Refuse an environment without the package."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return []
    return [
        Problem("gguf", f"{PACKAGE}, which runs llama.cpp, is not installed here: pip install 'afterok[llama_cpp]'")
    ]


@dataclass(frozen=True)
class Way:
    """How a completion is drawn; a temperature of 0 is greedy."""

    temperature: float
    top_p: float
    seed: int
    most: int  # tokens


class LlamaCpp:
    """A model in memory. `adapter` is a LoRA's GGUF file, or None."""

    def __init__(self, model: Path, adapter: Path | None, positions: int, stops: Collection[int], exact: bool = False):
        """Load it with room for `positions` tokens. `stops` end a completion, besides what the file says ends one.
        `exact`: keys and values are fp32; llama.cpp's own choice is fp16.

        Raise UserMistake where llama.cpp does not take the file.
        """
        import xllamacpp

        self._stops, self._folder = set(stops), tempfile.TemporaryDirectory()
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        self._socket = str(Path(self._folder.name) / "llama.sock")
        parameters.hostnames, parameters.verbosity = [self._socket], 1
        parameters.cpuparams.n_threads = len(os.sched_getaffinity(0))
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = positions, 1, False
        if exact:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = str(adapter), 1.0
            parameters.lora_adapters = [lora]
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise UserMistake(Problem("gguf", f"llama.cpp does not load {adapter or model}: {error}")) from None
        self.version = f"llama.cpp of {PACKAGE} {importlib.metadata.version(PACKAGE)}"

    def complete(self, prompt: Sequence[int], way: Way) -> Sampled:
        """Return one completion of a prompt's tokens."""
        said = self._ask(
            {
                "prompt": list(prompt),
                "n_predict": way.most,
                "temperature": way.temperature,
                "top_p": way.top_p,
                "samplers": ["temperature", "top_p"],  # alone and in this order, as transformers and our engine draw
                "seed": way.seed,
                "cache_prompt": False,
                "return_tokens": True,
            }
        )
        tokens = said["tokens"]
        for place, token in enumerate(tokens):
            if token in self._stops:
                return tokens[:place], "stop"
        if said["stop_type"] == "eos":  # at a token that ends a text for llama.cpp, by its name: <|endoftext|>
            return tokens[:-1], "stop"
        return tokens, "length"

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what llama.cpp's own endpoint for completions answers (tools/server/README.md)."""
        connection = _Connection(self._socket)
        try:
            connection.request("POST", "/completion", json.dumps(request), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"llama.cpp answered {response.status}: {text[:500]!r}")
        return json.loads(text)


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str):
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)
