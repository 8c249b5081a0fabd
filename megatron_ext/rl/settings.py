"""What a GRPO and a generation are told, and what policy loss and advantages are made of.

No torch: plans and checks read it too. The formulas stand in rl/losses.py and rl/advantages.py.
"""

from dataclasses import dataclass

from data_tools.base.declared import MODELS, SEEDS, setting
from data_tools.mistake import Problem
from megatron_ext.parallel.shape import ModelShape
from megatron_ext.rollout.settings import RolloutSettings, Sampling, SamplingSettings
from megatron_ext.training.schedule import Schedule
from megatron_ext.training.settings import TrainingSettings

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

    mode: str = setting("off", "whether ratios are truncated or masked, by token or by sequence", choices=CORRECTIONS)
    low: float = setting(0.0, "a mask's ratios are 0 below this", least=0, example=0.5)
    high: float = setting(2.0, "ratios count up to this", above=0, example=5.0)


@dataclass
class Loss:
    """The seeds' names: dapo is token, grpo is sequence, dr_grpo is constant; GSPO is level sequence with aggregation
    sequence; CISPO is policy cispo with aggregation token."""

    policy: str = setting("clip", "what the clipped ratio does: clip (PPO) or cispo", choices=POLICIES)
    level: str = setting("token", "whose probability ratio is taken", choices=LEVELS)
    aggregation: str = setting("token", "what the mean of the loss is over", choices=AGGREGATIONS)
    clip_low: float = setting(0.2, "the ratio counts from 1 - clip_low; cispo: from 0", least=0, most=1, example=0.1)
    clip_high: float = setting(0.28, "the ratio counts up to 1 + clip_high", least=0, example=0.2)
    dual_clip: float = setting(
        0.0,
        "for a negative advantage the ratio counts up to this, above 1 + clip_high; 0: no limit",
        least=0,
        example=3.0,
    )
    kl: str = setting(
        "k3", "estimator of the KL from the reference; k3 is weighted with the ratio, for an exact gradient", choices=KL
    )
    kl_beta: float = setting(0.0, "weight of the KL term; 0: off, and no reference is needed", least=0, example=0.001)
    entropy: float = setting(
        0.0, "the mean entropy of the policy, times this, is subtracted; 0: off", least=0, example=0.001
    )
    correction: Correction = setting(
        Correction, "weight of a token by how much likelier it became since it was sampled"
    )


@dataclass
class Advantage:
    """How a sample's reward is compared with those of other samples."""

    baseline: str = setting(
        "mean",
        "what is subtracted from a reward: the mean of its prompt's samples, or of the others",
        choices=BASELINES,
    )
    scale: str = setting("group", "whose standard deviation the advantage is divided by", choices=SCALES)
    epsilon: float = setting(1e-4, "added to that standard deviation", least=0, example=1e-6)
    drop_equal_groups: bool = setting(
        True, "prompts whose samples all got the same reward are left out: they teach nothing"
    )


@dataclass
class Rewarding:
    """Which samples count, and what their length adds. A masked sample is not trained and counts in no mean."""

    mask_truncated: bool = setting(True, "samples that ended because they were too long are masked")
    overlong_tokens: int = setting(
        0, "the last so many tokens that are allowed cost up to 1 (DAPO's overlong shaping); 0: off",
        unit="tokens", least=0,
    )  # fmt: skip


def check_rewarding(rewarding: Rewarding, max_tokens: int, where: str = "rewarding") -> list[Problem]:
    """Refuse overlong shaping over more tokens than a sample may have."""
    tokens = rewarding.overlong_tokens
    if tokens <= max_tokens:
        return []
    return [Problem(f"{where}.overlong_tokens", f"{tokens} is not between 0 and sampling.max_tokens = {max_tokens}")]


@dataclass
class Evaluation:
    """In the loop, of the weights in training, on prompts that are not trained."""

    every: int = setting(0, "steps between two evaluations, and one after the last; 0: never", unit="steps", least=0)
    prompts: int = setting(32, "how many prompts, the first ones", unit="prompts", least=1)
    samples: int = setting(
        0, "samples of each prompt, for the mean accuracy, pass@k and maj@k; 0: greedy alone", unit="samples", least=0
    )
    temperature: float = setting(1.0, "temperature of these samples", above=0, example=0.7)


def check_loss(loss: Loss, where: str = "loss") -> list[Problem]:
    """Refuse limits of the ratio that leave nothing between them."""
    problems = []
    if loss.dual_clip and loss.dual_clip <= 1 + loss.clip_high:
        message = f"{loss.dual_clip} is not above 1 + clip_high = {1 + loss.clip_high:g}: 3 is usual"
        problems.append(Problem(f"{where}.dual_clip", message))
    if not loss.correction.low < loss.correction.high:
        range_ = f"{loss.correction.low} to {loss.correction.high}"
        problems.append(Problem(f"{where}.correction.low", f"{range_} is no range of ratios: 0 <= low < high"))
    return problems


@dataclass
class GenerateSettings(SamplingSettings):
    """Sampling on the prompts of tasks: the config of the phase generate."""

    samples: int = setting(8, "samples of each prompt", unit="samples", least=1)
    sampling: Sampling = setting(Sampling, "how tokens are chosen")
    seed: int = setting(0, "noise of the samples", **SEEDS)
    chunk: int = setting(1024, "prompts whose samples become a file at a time", unit="prompts", least=1, keyed=False)
    record_s: float = setting(5.0, "sampling that a kill may cost", unit="s", above=0, keyed=False)


@dataclass
class GrpoSettings(TrainingSettings, RolloutSettings):
    """In-place GRPO on tasks: the config of the phase grpo."""

    reference: str = setting(
        "",
        'model folder of the KL term; "": the model itself',
        example="${phases.imported.out}",
        free=True,
        input=True,
        made_by=MODELS,
    )
    evaluation: Evaluation = setting(Evaluation, "evaluation in the loop, of the weights in training")

    steps: int = setting(100, "how often prompts are drawn, sampled and trained on", unit="steps", least=1)
    prompts: int = setting(64, "prompts of a step", unit="prompts", least=1)
    group: int = setting(8, "samples of a prompt, which are compared with one another", unit="samples", least=2)
    passes: int = setting(1, "passes over the rollouts of a step", unit="passes", least=1)
    minibatches: int = setting(1, "updates of a pass", unit="updates", least=1)
    refill_tries: int = setting(
        0, "times a step, at most, that prompts are drawn in place of those dropped", unit="times", least=0
    )
    seed: int = setting(0, "order of the prompts, noise of the samples", **SEEDS)
    sampling: Sampling = setting(Sampling, "how tokens are chosen")
    rewarding: Rewarding = setting(Rewarding, "which samples count, and what their length costs")
    advantage: Advantage = setting(Advantage, "how rewards become advantages")
    loss: Loss = setting(Loss, "the policy loss")
    # Only several updates of a step need log-probs of its beginning. The result of `rollout` depends on the rounding of
    # the engine.
    old_logprobs: str = setting(
        "auto", "log-probs at the beginning of a step: of one more forward pass (auto, recompute), or those recorded "
        "while sampling (rollout) as long as their KL from training's is within mismatch_limit",
        choices=OLD_LOGPROBS,
    )  # fmt: skip
    mismatch_limit: float = setting(
        1e-3, "largest KL of recorded log-probs, measured in the step before, for old_logprobs: rollout",
        unit="nats a token", least=0, example=0.01
    )  # fmt: skip

    routing_replay: bool = setting(
        False, "training sends each token to the experts that the rollout chose (R3), in models that have some; data "
        "and expert ranks only", keyed="if_set",
    )  # fmt: skip

    row_tokens: int = setting(
        16384, "length of a packed row that is trained; a longer sample is one", unit="tokens", least=1, keyed=False
    )
    offload: bool = setting(False, "optimizer and gradients leave the GPU during rollouts", keyed=False)
    record_s: float = setting(5.0, "sampling that a kill may cost", unit="s", least=0, keyed=False)
    journal_gib: float = setting(
        64.0, "tokens that are recorded for a restart, at most; those of older steps are drawn again",
        unit="GiB", above=0, keyed=False,
    )  # fmt: skip
    log_samples: bool = setting(True, "samples are logged with their texts, in KEEP/samples", keyed=False)
    samples_gib: float = setting(
        16.0, "log of samples, at most; where more is drawn, each step logs some of its prompts",
        unit="GiB", above=0, keyed=False,
    )  # fmt: skip
    completions: str = setting(
        "", "CSV file of all samples that were logged, made at the end, with a .jsonl beside it; below KEEP unless it "
        "is an absolute path", example="completions.csv", free=True, keyed=False,
    )  # fmt: skip

    def rate_schedule(self) -> Schedule:
        """Return the learning rate of each step; all updates of a step have the same."""
        return self.schedule_of(self.steps, self.warmup_steps)


def loads_reference(config: GrpoSettings, adapted: bool) -> bool:
    """Return whether the KL term's model is loaded beside the one in training.

    New adapters are turned off instead; `adapted` says that the folder of that model has some of its own.
    """
    return bool(config.loss.kl_beta) and not (config.lora.rank and not adapted and not config.reference)


def check_routing(config: GrpoSettings, shape: ModelShape | None) -> list[Problem]:
    """Refuse router replay for a model without experts, and under layouts that cut rows, for which it was not shown."""
    if not config.routing_replay:
        return []
    problems = []
    if shape is not None and not shape.experts:
        problems.append(Problem("routing_replay", "true, and the model has no experts: use false"))
    for axis in ("tensor", "pipeline", "context"):
        if (degree := getattr(config.parallel, axis)) > 1:
            message = (
                f"was shown with data and expert ranks only, and parallel.{axis} is {degree}: use false, or 1 there"
            )
            problems.append(Problem("routing_replay", message))
    return problems


def check_completions(config: GrpoSettings) -> list[Problem]:
    """Refuse a file of completions beside which there is no place for the JSONL."""
    if not config.completions or config.completions.endswith(".csv"):
        return []
    return [Problem("completions", f"{config.completions} is made a CSV file: give it a name that ends in .csv")]


def check_comparable(config: GrpoSettings) -> list[Problem]:
    """Refuse a sampling whose samples are all alike, or whose log-probs are not known where the loss needs them."""
    sampling, correction = config.sampling, config.loss.correction.mode
    if sampling.is_greedy:
        return [Problem("sampling.temperature", "0 gives a prompt's samples all alike: 1 is usual")]
    if sampling.is_comparable:
        return []
    remedy = "use temperature 1, or turn top_k, top_p and min_p off"
    what = f"log-probs of filtered samples at temperature {sampling.temperature:g} are not recorded, and"
    problems = []
    if correction != "off":
        problems.append(Problem("loss.correction.mode", f"{what} {correction} needs them: {remedy}"))
    if config.old_logprobs == "rollout":
        problems.append(Problem("old_logprobs", f"{what} rollout takes them: {remedy}"))
    return problems
