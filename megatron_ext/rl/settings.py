"""What the policy loss and the advantages are made of. No torch: plans and checks read it too.

Formulas and who else has them: reference/rl.md 2, tests/megatron_ext/rl.
"""

from dataclasses import dataclass, field

from data_tools.mistake import Problem, nearest

POLICIES = ("clip", "cispo")
LEVELS = ("token", "sequence")
AGGREGATIONS = ("token", "sequence", "constant")
KL = ("k2", "k3")
CORRECTIONS = ("off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BASELINES = ("mean", "leave_one_out")
SCALES = ("none", "group", "batch")
OLD_LOGPROBS = ("auto", "rollout", "recompute")


@dataclass
class Correction:
    """Weight of a token by how much likelier it is for the trained weights than it was where it was sampled.

    With ratio = π_old / π_behaviour, of the token or over its whole sequence: truncate takes min(ratio, high), mask
    takes the ratio between low and high and 0 outside (IcePop; the sequence mask of MIS).

    π_behaviour is what the engine recorded, in the rounding of whichever samples shared its passes: with a correction,
    other settings of the engine, or a restart, change the result within that rounding.
    """

    mode: str = "off"
    low: float = 0.0
    high: float = 2.0


@dataclass
class Loss:
    """The seeds' names: dapo is token, grpo is sequence, dr_grpo is constant; GSPO is level sequence with aggregation
    sequence; CISPO is policy cispo with aggregation token."""

    policy: str = "clip"  # clip | cispo
    level: str = "token"  # token | sequence: whose probability ratio
    aggregation: str = "token"  # token | sequence | constant: the mean is over
    clip_low: float = 0.2  # the ratio counts from 1 - clip_low
    clip_high: float = 0.28  # to 1 + clip_high; cispo: up to 1 + clip_high, from below freely
    dual_clip: float = 0.0  # for a negative advantage the ratio counts up to this at most; 0: no limit
    kl: str = "k3"  # k2 | k3: against the reference; k3 is weighted with the ratio, which makes its gradient exact
    kl_beta: float = 0.0  # 0: off, and no reference is needed
    entropy: float = 0.0  # the mean entropy of the policy, times this, is subtracted
    correction: Correction = field(default_factory=Correction)


@dataclass
class Advantage:
    baseline: str = "mean"  # mean | leave_one_out, of the other samples of the prompt
    scale: str = "group"  # none | group | batch: whose standard deviation the advantage is divided by
    epsilon: float = 1e-4  # added to it
    drop_equal_groups: bool = True  # a prompt whose samples all got the same reward teaches nothing


@dataclass
class Rewarding:
    """Which samples count, and what their length adds. A masked sample is not trained and counts in no mean."""

    mask_truncated: bool = True  # one that ended because it was too long
    overlong_tokens: int = 0  # the last so many that are allowed cost up to 1 (DAPO's overlong shaping); 0: off


def check_rewarding(rewarding: Rewarding, max_tokens: int, where: str = "rewarding") -> list[Problem]:
    tokens = rewarding.overlong_tokens
    if 0 <= tokens <= max_tokens:
        return []
    return [Problem(f"{where}.overlong_tokens", f"{tokens} is not between 0 and sampling.max_tokens = {max_tokens}")]


@dataclass
class Evaluation:
    """In the loop, of the weights in training, on prompts that are not trained."""

    every: int = 0  # steps, and after the last; 0: never
    prompts: int = 32  # the first so many
    samples: int = 0  # of each, at `temperature`, for the mean accuracy, pass@k and maj@k; 0: greedy alone
    temperature: float = 1.0


def check_evaluation(evaluation: Evaluation, where: str = "evaluation") -> list[Problem]:
    problems = []
    for name in ("every", "samples"):
        if getattr(evaluation, name) < 0:
            problems.append(Problem(f"{where}.{name}", f"{getattr(evaluation, name)} is negative; 0 turns it off"))
    if evaluation.prompts < 1:
        problems.append(Problem(f"{where}.prompts", f"{evaluation.prompts} is too few: the least is 1"))
    if not evaluation.temperature > 0:
        problems.append(Problem(f"{where}.temperature", f"{evaluation.temperature} is not above 0: 1 is usual"))
    return problems


def check_loss(loss: Loss, where: str = "loss") -> list[Problem]:
    problems = _check_choices(
        where,
        ("policy", loss.policy, POLICIES),
        ("level", loss.level, LEVELS),
        ("aggregation", loss.aggregation, AGGREGATIONS),
        ("kl", loss.kl, KL),
        ("correction.mode", loss.correction.mode, CORRECTIONS),
    )
    if not 0 <= loss.clip_low <= 1:
        problems.append(Problem(f"{where}.clip_low", f"{loss.clip_low} is not between 0 and 1: 0.2 is usual"))
    if loss.clip_high < 0:
        problems.append(Problem(f"{where}.clip_high", f"{loss.clip_high} is negative: 0.2 to 0.28 is usual"))
    if loss.dual_clip and loss.dual_clip <= 1 + loss.clip_high:
        message = f"{loss.dual_clip} is not above 1 + clip_high = {1 + loss.clip_high:g}: 3 is usual"
        problems.append(Problem(f"{where}.dual_clip", message))
    for name in ("kl_beta", "entropy"):
        if getattr(loss, name) < 0:
            problems.append(Problem(f"{where}.{name}", f"{getattr(loss, name)} is negative; 0 turns it off"))
    if not 0 <= loss.correction.low < loss.correction.high:
        range_ = f"{loss.correction.low} to {loss.correction.high}"
        problems.append(Problem(f"{where}.correction.low", f"{range_} is no range of ratios: 0 <= low < high"))
    return problems


def check_advantage(advantage: Advantage, group: int, where: str = "advantage") -> list[Problem]:
    """`group` is the number of samples a prompt."""
    problems = _check_choices(where, ("baseline", advantage.baseline, BASELINES), ("scale", advantage.scale, SCALES))
    if not advantage.epsilon >= 0:
        problems.append(Problem(f"{where}.epsilon", f"{advantage.epsilon} is negative: 1e-4 is usual"))
    if group < 2:
        problems.append(Problem("group", f"{group} samples a prompt have nothing to be compared with: the least is 2"))
    return problems


def _check_choices(where: str, *choices: tuple[str, str, tuple[str, ...]]) -> list[Problem]:
    return [
        Problem(f"{where}.{key}", f"unknown value {value!r}{nearest(value, valid)}")
        for key, value, valid in choices
        if value not in valid
    ]
