"""The arguments of vllm.LLM: which are set from our settings, which a user may give, and what each sampling means.

vLLM 0.32: LLM.__init__ names the common ones and hands the others to EngineArgs, whose fields they are.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from data_tools.mistake import Problem, nearest
from megatron_ext.rollout.settings import Sampling

OURS = {  # argument -> the setting that says it, or why it is as it is
    "model": "model",
    "tokenizer": "model: prompts and completions are token ids",
    "tokenizer_mode": "model: prompts and completions are token ids",
    "skip_tokenizer_init": "always true: prompts and completions are token ids",
    "chat_template": "chat_arguments: prompts are rendered before vLLM sees them",
    "dtype": "dtype",
    "seed": "seed: each sample has a seed of its own",
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "data_parallel_size": "the phase's array: each element has one engine",
    "generation_config": "sampling, and the end tokens of the model folder",
    "override_generation_config": "sampling, and the end tokens of the model folder",
    "logprobs_mode": "always raw_logprobs: the model's own, at temperature 1 and unfiltered",
    "runner": "always generate",
    "convert": "always generate",
    "pooler_config": "always generate",
    "enable_lora": "the model folder's adapter, which is merged into the weights",
    "default_mm_loras": "the model folder's adapter, which is merged into the weights",
    "trust_remote_code": "never: no code of a model's is run",
    "hf_token": "never: nothing is read of the hub, and settings are written down",
    **dict.fromkeys(("model_weights", "hf_config_path", "revision", "code_revision", "tokenizer_revision"), "model"),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), "resources: an engine is on one node"),
}
_COPIES = "data_parallel_"  # how all arguments of vLLM's own copies of the model begin
_FIXED = ("always", "never")
RANDOM = {"load_format": "dummy"}  # values that put others in place of the model's weights


def check(given: Mapping[str, Any], where: str = "vllm") -> list[Problem]:
    """Refuse arguments that are set from our settings. What vLLM does not know is refused by `unknown`."""
    said = {name: OURS["data_parallel_size" if name.startswith(_COPIES) else name] for name in given if is_ours(name)}
    problems = [
        Problem(f"{where}.{name}", f"is {why if why.startswith(_FIXED) else f'set from {why}'}: leave it out")
        for name, why in said.items()
    ]
    for name, value in RANDOM.items():
        if given.get(name) == value:
            problems.append(
                Problem(f"{where}.{name}", f"{value} is random weights in place of the model's: leave it out")
            )
    return problems


def is_ours(name: str) -> bool:
    """Return whether an argument is set from our settings."""
    return name in OURS or name.startswith(_COPIES)


def unknown(given: Mapping[str, Any], llm: Any, engine_args: Any, version: str, where: str = "vllm") -> list[Problem]:
    """Refuse arguments that the installed vLLM's LLM and EngineArgs do not take."""
    own = inspect.signature(llm.__init__).parameters.values()
    known = {one.name for one in own if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)} - {"self"}
    known |= {field.name for field in fields(engine_args)}
    names = sorted(known)
    return [
        Problem(f"{where}.{name}", f"vLLM {version} has no such argument{_closest(name, names)}")
        for name in given
        if name not in known
    ]


def _closest(name: str, known: list[str]) -> str:
    """Return the nearest name, without the two hundred others."""
    said = nearest(name, known)
    return said.partition("? ")[0] + "?)" if "did you mean" in said else ": `pydoc vllm.LLM` there tells them"


def sampling_arguments(sampling: Sampling, stop_ids: set[int], seed: int) -> dict[str, Any]:
    """Return the arguments of vllm.SamplingParams for one completion. Stop strings are looked for by us.

    `ignore_eos` leaves out the end token that vLLM would read from the model's files: `stop_ids` are all that end.
    """
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,  # 0: all, in vLLM too
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "seed": None if sampling.is_greedy else seed,
    }
