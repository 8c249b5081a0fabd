"""Which Backend (rl/makers.py) a phase samples with, and what its settings may say. No torch until one is opened.

With vllm a phase runs in its role's own environment, which has torch and transformers and need not have megatron-core:
what is opened there imports none of it, and starts no process group.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.mix import entries_of, turn_ends
from megatron_ext.foreign import exports, openai_limits, vllm_limits
from megatron_ext.parallel.parts import OPENAI, VLLM
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.rollout.room import check_positions
from megatron_ext.rollout.settings import EngineConfig, Sampling, SamplingSettings

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.rl.makers import Backend


@dataclass(frozen=True)
class Asked:
    """What is asked of an engine: how tokens are chosen, and which setting says how many at most."""

    sampling: Sampling
    where: str = "sampling.max_tokens"


def world_size_of_environment() -> int:
    """Return the number of this element's processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def folder_of(config: SamplingSettings) -> "ModelFolder | None":
    """Return the model folder, None where the model is a server's."""
    from megatron_ext.model_folders import model_folder

    return None if config.backend == OPENAI else model_folder.open_folder(config.model)


def which(config: SamplingSettings, folder: "ModelFolder | None") -> str:
    """Return what the title of a table says of the model: "at step 12", or what a server calls it."""
    return f"at step {folder.step}" if folder else f"of {config.endpoint.model}"


def opened(config: SamplingSettings, folder: "ModelFolder | None", keep: Path) -> AbstractContextManager["Backend"]:
    """Return what opens the Backend of a phase's element, and closes it in the end; KEEP is the phase's folder."""
    if folder is None:
        from megatron_ext.foreign import openai_backend

        return openai_backend.opened(config)
    if config.backend == VLLM:
        from megatron_ext.foreign import vllm_backend

        return vllm_backend.opened(config, folder, keep)
    from megatron_ext.rl import ours

    return ours.opened(config, folder)


def forget(config: SamplingSettings, keep: Path) -> None:
    """Delete what foreign engines were given of the model, once a phase is over."""
    if config.is_foreign:
        exports.forget(keep)


def check_unused(config: SamplingSettings) -> list[Problem]:
    """Refuse settings of foreign engines where the engine is another, and a model folder that is missing."""
    problems = openai_limits.check_unasked(config)
    if config.vllm and config.backend != VLLM:
        said = f"{config.vllm} is for backend vllm, and backend is {config.backend}: leave it out"
        problems.append(Problem("vllm", said))
    if not config.model and config.backend != OPENAI:
        problems.append(Problem("model", "is missing: model folder"))
    return problems


def check_server(config: SamplingSettings, ways: Sequence[Sampling], site: Site, where: str) -> list[Problem]:
    """Return what is wrong with the settings of backend openai; those of sampling begin with `where`."""
    return check_unused(config) + openai_limits.check(config, ways, site, where)


def check(config: SamplingSettings, asked: Asked, site: Site, shape: ModelShape | None) -> list[Problem]:
    """Return what is wrong with the settings of a foreign engine. `shape` is None while the model is not known."""
    problems = check_unused(config) + _check_ours(config) + _check_turns(config)
    problems += check_positions(shape, asked.sampling.max_tokens, asked.where)
    temperature = asked.where.rpartition("max_")[0] + "temperature"  # beside the setting that says how many tokens
    return problems + vllm_limits.check_sampling(asked.sampling, temperature) + vllm_limits.check(config, site, shape)


def _check_ours(config: SamplingSettings) -> list[Problem]:
    """Refuse what only our engine understands: nothing that is set goes unused."""
    problems = []
    usual = EngineConfig()
    for name in vars(usual):
        if getattr(config.engine, name) != getattr(usual, name):
            remedy = f"leave it out; {config.backend} is told by the setting {config.backend}"
            problems.append(Problem(f"engine.{name}", f"is our engine's, and backend is {config.backend}: {remedy}"))
    if config.base:
        message = f"{config.base} is how our layers hold a frozen model, and backend is {config.backend}: leave it out"
        problems.append(Problem("base", message))
    used = replace(ParallelPlan(), tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    for name in vars(used):
        told = ("virtual", "micro_batch")  # by check_rollouts
        if getattr(config.parallel, name) != getattr(used, name) and name not in told:
            message = (
                f"{getattr(config.parallel, name)}: {config.backend} takes tensor and pipeline alone: leave it out"
            )
            problems.append(Problem(f"parallel.{name}", message))
    return problems


def _check_turns(config: SamplingSettings) -> list[Problem]:
    """Refuse tasks that reply: their turns are our engine's."""
    try:
        ends = turn_ends(entries_of(config.mix))
    except UserMistake:  # which check_mix told
        return []
    remedy = "use backend auto, or leave the task out"
    return [Problem(f"mix.entries.{name}", f"replies to the model, which {config.backend} cannot wait for: {remedy}")
            for name in ends]  # fmt: skip
