"""Makes a random Hugging Face checkpoint from a small config, with its tokenizer: a model to rehearse with."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import init_model
from megatron_ext.entrypoints.init_model import Config
from megatron_ext.preflight.costs import weights


def check(config: Config, placement: Placement) -> list[Problem]:
    return init_model.check(config, placement.ranks)


def forecast(config: Config, placement: Placement) -> dict[str, Any]:
    return init_model.forecast(config)


def costs(config: Config, placement: Placement) -> dict[str, float]:
    return weights(init_model.forecast(config)["hf_config"], config.dtype)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = init_model.run(config, task.out, task.keep, task.progress)
    return {"headline": f"{facts['parameters']:,} parameters, vocabulary {facts['vocabulary']:,}", **facts}
