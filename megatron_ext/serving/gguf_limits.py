"""What llama.cpp computes otherwise than the model whose GGUF it is given, without a word.

Its converter leaves out what the format has no key for (llama.cpp's sources: src/models/openai-moe.cpp,
src/models/nemotron-h.cpp, src/llama-graph.cpp, ggml_rope_yarn_corr_dims in ggml/src/ggml.c). No torch.
"""

import math
from typing import Any

from megatron_ext.models.registry import Family, model_type

TESTED = ("qwen2", "qwen3", "llama", "gpt_oss", "nemotron_h")  # by tests/megatron_ext/test_llama_cpp.py
SWIGLU_LIMIT = 7.0  # the only one of LLM_FFN_SWIGLU_OAI_MOE
MAMBA_WIDTH, VOCABULARY_MULTIPLE = 64, 8  # conversion/granite.py, conversion/nemotron.py
WINDOW_PERIOD = 2  # every second layer has the window, the first one too


def refused(family: Family, dims: Any) -> list[str]:
    """Return why llama.cpp would compute another function; nothing where it computes this one."""
    if family.name == "nanochat":
        return ["llama.cpp has no models of the family nanochat"]
    if (kind := model_type(family, dims)) not in TESTED:
        return [f"what llama.cpp makes of a {kind} was not held against the model: {', '.join(TESTED)} were"]
    if getattr(dims, "stretch", None):
        how = type(dims.stretch).__name__.lower()
        return [f"what llama.cpp makes of a {kind} with {how} positions was not held against the model"]
    found = []
    if family.name == "gpt_oss":
        if dims.sliding != tuple(layer % WINDOW_PERIOD == 0 for layer in range(dims.layers)):
            found.append("llama.cpp gives gpt-oss's layers 0, 2, 4 … the window, and layer_types says otherwise")
        if dims.swiglu_limit != SWIGLU_LIMIT:
            found.append(
                f"llama.cpp clamps gpt-oss's experts at {SWIGLU_LIMIT:g}, and swiglu_limit is {dims.swiglu_limit:g}"
            )
        if dims.tied:
            found.append("llama.cpp has no gpt-oss with tied embeddings")
    if family.name == "nemotron_h" and {"E", "-"} <= set(dims.pattern):
        found.append(f"llama.cpp has experts in all MLP layers or in none, and the pattern is {dims.pattern}")
    if family.name == "nemotron_h" and dims.mamba_inner % MAMBA_WIDTH:
        found.append(
            f"llama.cpp's converter takes multiples of {MAMBA_WIDTH} for Mamba's width, not {dims.mamba_inner}"
        )
    if family.name == "nemotron_h" and dims.vocabulary % VOCABULARY_MULTIPLE:
        said = f"llama.cpp's converter pads nemotron_h's tokens to a multiple of {VOCABULARY_MULTIPLE}, but no weights"
        found.append(f"{said}, and vocab_size is {dims.vocabulary}")
    return found


def differs(family: Family, dims: Any) -> list[str]:
    """Return what llama.cpp computes a little otherwise, as it does for the released files."""
    yarn = dims.yarn if family.name == "gpt_oss" else None
    if yarn is None or yarn.truncate or all(edge == int(edge) for edge in _yarn_edges(dims)):
        return []
    return ["llama.cpp rounds the range of YaRN's dimensions to whole ones, and the model has truncate: false"]


def _yarn_edges(dims: Any) -> list[float]:
    """Return the dimensions that turn beta_fast and beta_slow times within the original positions."""
    original, base = dims.yarn.original_positions, math.log(dims.rope_base)
    return [
        dims.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * base)
        for turns in (dims.yarn.beta_fast, dims.yarn.beta_slow)
    ]
