"""What backend vllm is refused for before anything runs. No torch, and no vLLM: plan may run where there is none.

What is known to fail was seen with vLLM 0.32's CPU build, or stands in its sources.
"""

import functools
import os
import subprocess

from data_tools.mistake import Problem
from megatron_ext.foreign import vllm_arguments
from megatron_ext.parallel.plan import Site
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.preflight import facts
from megatron_ext.rollout.settings import Sampling, SamplingSettings

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # v1/attention/backends/cpu_attn.py of 0.32

TEMPERATURES = (0.01, 2.0)  # sampling_params.py 557 and 660 of 0.32, but for greedy

ABSENT = ("nanochat",)  # model types of ours that model_executor/models/registry.py of 0.32 does not have
# Those whose model of 0.32 (glm4_moe.py 559, gpt_oss.py 1459, nemotron_h.py 844) makes an output layer of its own, that
# nothing fills where it is the embedding. A tied glm4_moe said nothing but padding here.
UNTIED = ("glm4_moe", "gpt_oss", "nemotron_h")


HAS_IT = "name an environment that has it in the profile: roles.ROLE.env.python, see megatron_ext/README.md"
_ANSWER_S = 20  # for an interpreter on a slow network drive
_NO = 3  # an exit status that no failure of the interpreter's own has
_ASK = f"import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('vllm') else {_NO})"


def check(config: SamplingSettings, site: Site, shape: ModelShape | None) -> list[Problem]:
    """Return what is wrong with a phase's settings for vLLM, as far as it is known."""
    problems = vllm_arguments.check(config.vllm) + _check_place(config, site)
    if site.python and _lacks_vllm(site.python, site.environment.get("PYTHONPATH", "")):
        problems.append(Problem("backend", f"vllm: {site.python} has no package vllm: {HAS_IT}"))
    file = facts.model_config(config.model, site)[0] or {}
    model_type = file.get("model_type")
    if model_type in UNTIED and file.get("tie_word_embeddings"):
        message = f"vLLM 0.32 leaves the output layer of a {model_type} with tie_word_embeddings empty"
        problems.append(Problem("backend", f"{message}: use backend auto"))
    if model_type in ABSENT:
        problems.append(Problem("backend", f"vLLM 0.32 has no {model_type} models: use backend auto"))
    cpu = site.gpus_per_node == 0
    if cpu and config.parallel.pipeline > 1:
        message = f"{config.parallel.pipeline}: vLLM's CPU build was never seen with stages here: use tensor"
        problems.append(Problem("parallel.pipeline", message))
    if cpu and shape is not None and shape.heads and shape.head_dim not in CPU_HEADS:
        heads = (
            f"vLLM's CPU build has no attention for heads of {shape.head_dim}, only {', '.join(map(str, CPU_HEADS))}"
        )
        problems.append(Problem("backend", f"{heads}: use backend auto, or a GPU"))
    return problems


def check_sampling(sampling: Sampling, where: str = "sampling.temperature") -> list[Problem]:
    """Refuse temperatures that vLLM does not take, or takes for another, and filters that it combines to another
    distribution than ours. `where` is the setting that says the temperature."""
    least, most = TEMPERATURES
    problems = []
    if not sampling.is_greedy and not least <= sampling.temperature <= most:
        why = f"draws at {least:g} in its place" if sampling.temperature < least else "refuses it"
        remedy = f"take one from {least:g} to {most:g}, or backend auto"
        problems.append(Problem(where, f"{sampling.temperature:g}: vLLM 0.32 {why}: {remedy}"))
    if sampling.min_p > 0 and sampling.top_p < 1 and not sampling.is_greedy:
        message = (
            f"{sampling.min_p:g} beside top_p {sampling.top_p:g}: vLLM cuts by min_p before top_p counts, and our "
        )
        problems.append(Problem("sampling.min_p", f"{message}engine after: use one of them, or backend auto"))
    return problems


def _check_place(config: SamplingSettings, site: Site) -> list[Problem]:
    """Want one process an element, whose GPUs are the ranks of one copy of the model."""
    problems = []
    if site.nodes > 1:
        message = f"{site.nodes}: an element's engine is on one node: use 1, and an array for more"
        problems.append(Problem("resources.nodes", message))
    if site.ranks != max(site.nodes, 1):
        message = f"{site.ranks} ranks an element, and vLLM starts its own processes: set resources.ranks_per_node: 1"
        problems.append(Problem("backend", message))
    held = config.parallel.tensor * config.parallel.pipeline
    gpus = site.gpus_per_node
    if gpus and held != gpus:
        message = (
            f"tensor {config.parallel.tensor} × pipeline {config.parallel.pipeline} are {held} GPUs, and the element"
        )
        remedy = "set resources.gpus_per_node so, and an array for more copies of the model"
        problems.append(Problem("parallel", f"{message} has {gpus}: {remedy}"))
    return problems


@functools.cache
def _lacks_vllm(python: str, path: str) -> bool:
    """Return whether an interpreter says that it has no package vllm, with the PYTHONPATH of the profile or ours.

    One that does not answer here may do so on a node.
    """
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    try:
        asked = subprocess.run([python, "-c", _ASK], cwd="/", env=environment, capture_output=True, timeout=_ANSWER_S)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == _NO
