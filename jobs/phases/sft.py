"""Fine-tunes a model folder on packs."""

from typing import Any

from data_tools.mistake import Problem
from jobs.kind import Placement
from jobs.task import Task
from megatron_ext.entrypoints import sft
from megatron_ext.entrypoints.sft import Config, costs, forecast, parallel_report
from megatron_ext.lora import settings as loras

__all__ = ["STOPS", "Config", "check", "costs", "forecast", "parallel_report", "run"]

STOPS = True


def check(config: Config, placement: Placement) -> list[Problem]:
    return sft.check(config, placement.ranks, placement)


def run(config: Config, task: Task) -> dict[str, Any]:
    facts = sft.run(config, task.out, task.keep, progress=task.progress, stop=task.stop)
    resumed = f", resumed at {facts['resumed_from']:,}" if facts["resumed_from"] else ""
    text = f"step {facts['step']:,}{resumed}, loss {facts['loss_first']:.3f} → {facts['loss_last']:.3f}"
    if lora := facts.get("lora"):
        text += f"; {loras.reach_text(lora, config.lora.rank)}"
    if certificate := facts.get("certificate"):
        worst = max(certificate["loss"], certificate["gradient"])
        text += f"; layout equals one process within {worst:.0e} on {certificate['ranks']} ranks, documents isolated"
        text += f" (megatron-core {certificate['versions']['megatron-core']})"
    return {"headline": text, **facts}
