"""What a rollout is asked for, and what the engine may use. No torch: plans and checks read it too."""

import math
from dataclasses import dataclass, field

from data_tools.mistake import Problem


@dataclass
class Sampling:
    """How the next token is chosen. Filters come after the temperature: top_k, top_p of what is left, then min_p."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # the likeliest so many; 0: all
    top_p: float = 1.0  # the likeliest that together have this probability; 1: all
    min_p: float = 0.0  # those at least this likely, as a share of the likeliest; 0: all
    max_tokens: int = 256  # new ones, at most
    stop_strings: list[str] = field(default_factory=list)  # a completion ends where one of them is complete
    max_turns: int = 0  # in tasks that reply: the model's, at most; 0: as many as max_tokens leaves room for

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass
class EngineConfig:
    kv_gib: float = 1.0  # GiB of keys and values a rank holds while it generates
    block_size: int = 32  # tokens of a block; GPU kernels with block tables want 256
    max_batch: int = 32  # samples that are decoded together
    token_budget: int = 2048  # tokens of one forward pass: one a sample in decoding, the rest for prompts
    cuda_graphs: bool = False  # decoding by recorded passes: models of attention without experts, no pipeline


def check_sampling(sampling: Sampling, where: str = "sampling") -> list[Problem]:
    problems = []

    def refuse(field_: str, message: str) -> None:
        problems.append(Problem(f"{where}.{field_}", message))

    if not sampling.temperature >= 0:
        refuse("temperature", f"{sampling.temperature} is negative; 0 takes the likeliest token, 1 samples the model")
    if sampling.top_k < 0:
        refuse("top_k", f"{sampling.top_k} is negative; 0 turns it off")
    if not 0 < sampling.top_p <= 1:
        refuse("top_p", f"{sampling.top_p} is no probability above 0; 1 turns it off")
    if not 0 <= sampling.min_p < 1:
        refuse("min_p", f"{sampling.min_p} is not in [0, 1); 0 turns it off")
    if sampling.max_tokens < 1:
        refuse("max_tokens", f"{sampling.max_tokens} is too few: the least is 1")
    if sampling.max_turns < 0:
        refuse("max_turns", f"{sampling.max_turns} is negative; 0 sets no limit but max_tokens")
    if any(not text for text in sampling.stop_strings):
        refuse("stop_strings", "one of them is empty: every completion would end at once")
    return problems


def check_engine(config: EngineConfig, where: str = "engine") -> list[Problem]:
    problems = []
    for name in ("block_size", "max_batch", "token_budget"):
        if getattr(config, name) < 1:
            problems.append(Problem(f"{where}.{name}", f"{getattr(config, name)} is too few: the least is 1"))
    if config.token_budget < config.max_batch:
        message = f"{config.token_budget} tokens a pass do not hold one of each of {config.max_batch} samples"
        problems.append(Problem(f"{where}.token_budget", f"{message}; give at least max_batch"))
    if not 0 < config.kv_gib < math.inf:
        problems.append(Problem(f"{where}.kv_gib", f"{config.kv_gib} GiB hold no keys and values: give more than 0"))
    return problems


def check_graphs(
    config: EngineConfig, experts: bool, states: bool, stages: int, where: str = "engine"
) -> list[Problem]:
    """Whether a model's decoding can be recorded: its passes ask nothing of the host and wait for nobody."""
    reasons = {
        "its experts, whose numbers of tokens the host reads": experts,
        "its recurrent states": states,
        f"its pipeline, whose {stages} stages send to one another": stages > 1,
    }
    return [Problem(f"{where}.cuda_graphs", f"this model's decoding cannot be recorded, for {reason}; set it false")
            for reason, there in reasons.items() if config.cuda_graphs and there]  # fmt: skip
