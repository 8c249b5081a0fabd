"""A GGUF file asked by llama.cpp, through the package xllamacpp.

Its server is llama.cpp's own, which listens: on a socket in a folder of this process's, for nobody else. Prompts go in
as token ids, so that llama.cpp's tokenizer has no say.
"""

import importlib.metadata
import importlib.util
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

    def __init__(self, model: Path, adapter: Path | None, positions: int, stops: Collection[int]):
        """Load it with room for `positions` tokens. `stops` end a completion, besides what the file says ends one.

        Raise UserMistake where llama.cpp does not take the file.
        """
        import xllamacpp

        self._stops, self._folder = set(stops), tempfile.TemporaryDirectory()
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.hostnames = [str(Path(self._folder.name) / "llama.sock")]
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = positions, 1, False
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
        said: Any = self._server.handle_completions(
            {
                "prompt": list(prompt),
                "n_predict": way.most,
                "temperature": way.temperature,
                "top_p": way.top_p,
                "top_k": 0,
                "min_p": 0.0,
                "repeat_penalty": 1.0,
                "samplers": ["temperature", "top_p"],  # in this order, as transformers and our engine draw
                "seed": way.seed,
                "cache_prompt": False,
                "return_tokens": True,
                "stream": False,
            }
        )
        if "tokens" not in said:
            raise RuntimeError(f"llama.cpp answered {str(said)[:500]}")
        tokens = said["tokens"]
        for place, token in enumerate(tokens):
            if token in self._stops:
                return tokens[:place], "stop"
        return tokens, "stop" if said.get("stop_type") == "eos" else "length"
