"""What `plan` refuses of backend openai: no network, no torch.

Whether address, key and name of the model are good is asked when the phase starts, before any completion is.
"""

from collections.abc import Sequence

from data_tools.mistake import Problem, UserMistake
from data_tools.tasks.messages import asking_messages
from data_tools.tasks.mix import compared, entries_of, turn_ends
from megatron_ext.parallel.parts import OPENAI
from megatron_ext.parallel.plan import Site
from megatron_ext.rollout import endpoint
from megatron_ext.rollout.endpoint import CHAT, MIN_P, TEMPERATURE, TEMPLATE, TOP_K, TOP_P
from megatron_ext.rollout.settings import Sampling, SamplingSettings

# Settings of a phase that samples, and why a server cannot follow them.
_UNUSED = {
    "model": "the server has the model; endpoint.model says what it calls it",
    "dtype": "the server holds the weights as it was started",
    "base": "the server holds the weights as it was started",
    "bos": "the server begins a text as its tokenizer does",
    "prompt_tokens": "the server's tokenizer is not here to count with",
    "parallel": "the server has the GPUs",
    "engine": "the server has an engine of its own; endpoint.concurrency says how many requests it gets together",
}


def check(config: SamplingSettings, ways: Sequence[Sampling], site: Site, where: str = "sampling.") -> list[Problem]:
    """Refuse what the server could not do, and what would go unused. `ways` are how prompts are sampled, and their
    settings begin with `where`."""
    problems = endpoint.check(config.endpoint) + _check_unused(config) + _check_tasks(config)
    for sampling in ways:
        problems += [problem for problem in _check_sampling(config, sampling, where) if problem not in problems]
    if config.chat_arguments and TEMPLATE not in config.endpoint.takes:
        message = f"reach a server as {TEMPLATE} alone; name that in endpoint.takes if it takes it, or leave them out"
        problems.append(Problem("chat_arguments", message))
    if site.ranks != 1 or site.gpus_per_node:
        has = f"{site.ranks} ranks" + (f" and {site.gpus_per_node} GPUs a node" if site.gpus_per_node else "")
        message = f"{has}, and one process without a GPU asks the server; use a role without (resources: {{role: cpu}})"
        problems.append(Problem("backend", message))
    return problems


def check_unasked(config: SamplingSettings) -> list[Problem]:
    """Refuse the settings of a server where another backend samples."""
    if config.backend == OPENAI or config.endpoint == endpoint.Endpoint():
        return []
    return [Problem("endpoint", f"is for backend openai, and backend is {config.backend}: set that, or leave it out")]


def _check_unused(config: SamplingSettings) -> list[Problem]:
    plain = SamplingSettings()
    wrong = [name for name in _UNUSED if getattr(config, name) != getattr(plain, name)]
    return [Problem(name, f"is not used by backend openai: {_UNUSED[name]}; leave it out") for name in wrong]


def _check_sampling(config: SamplingSettings, sampling: Sampling, where: str) -> list[Problem]:
    problems = []
    for name in (TOP_K, MIN_P):
        if getattr(sampling, name) and name not in config.endpoint.takes:
            message = f"is not in OpenAI's API; name it in endpoint.takes if the server takes it, or set it 0 ({name})"
            problems.append(Problem(f"{where}{name}", message))
    for name in (TEMPERATURE, TOP_P):
        value = getattr(sampling, name)
        if name in config.endpoint.leave_out and value != 1:
            message = f"{value:g} is not sent, since endpoint.leave_out has {name}: only 1, which is no change, can be"
            problems.append(Problem(f"{where}{name}", message))
    return problems


def _check_tasks(config: SamplingSettings) -> list[Problem]:
    """Refuse tasks that want more of a model than one completion of a prompt."""
    try:
        entries = entries_of(config.mix)
        replying = turn_ends(entries)
    except UserMistake:  # which check_mix told
        return []
    why = dict.fromkeys(replying, "replies to the model, turn by turn, and a server is asked once: use another backend")
    likeliest = (
        "compares the likelihood of its choices, which no server tells: give it options {answered_by: generation}"
    )
    why |= dict.fromkeys(compared(entries), likeliest)
    if config.endpoint.api != CHAT:
        messages = "asks in messages, which api completions has not: use endpoint.api: chat, or options {chat: false}"
        why |= dict.fromkeys(asking_messages(entries), messages)
    return [Problem(f"mix.entries.{name}", message) for name, message in why.items()]
