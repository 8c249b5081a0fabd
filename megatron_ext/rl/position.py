"""How far a run of GRPO has come: what a checkpoint holds besides weights, and what the run counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.rl import untrained
from megatron_ext.rl.samples import Sample, SampleBatch
from megatron_ext.rl.settings import Rewarding


@dataclass
class Position:
    """What the next step continues from besides weights: JSON values, the same on every rank."""

    cursor: int = 0  # the next prompt of the order
    evaluated: int = -1  # the last step that was evaluated
    mismatch: float | None = None  # KL of rollout and training log-probs, as last measured
    updates: int = 0
    samples: int = 0
    trained_samples: int = 0
    tokens: int = 0  # of completions
    first_reward: float | None = None
    last_reward: float | None = None
    signal: int = 0  # trained samples whose advantage was not 0
    unscorable: int = 0  # samples that were not trained, by why
    cut_off: int = 0
    equal: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # notes of those without a reward
    steps: int = 0
    broken_steps: int = 0  # the last ones, in which every verdict failed

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "Position":
        """Return the position of a checkpoint, which may be from before `signal` was counted."""
        return cls(**{"signal": saved.get("trained_samples", 0), "steps": 1, **saved})

    def count(
        self,
        drawn: Sequence[Sample],
        batch: SampleBatch,
        rewarding: Rewarding,
        *,
        updates: int,
        line: Mapping[str, Any],
    ) -> None:
        """Add a step that drew these samples, trained those of `batch`, and has `line` in the metrics."""
        self.steps += 1
        self.updates += updates
        self.samples += len(drawn)
        self.trained_samples += int(batch.trained.sum())
        self.tokens += sum(sample.length for sample in drawn)
        self.mismatch = line.get("mismatch", {}).get("kl", self.mismatch)
        self.last_reward = line["reward"] if line["reward"] is not None else self.last_reward
        self.first_reward = self.last_reward if self.first_reward is None else self.first_reward
        self.signal += int((batch.trained & (batch.advantages != 0)).sum())
        counts = untrained.count(drawn, batch, rewarding)
        self.unscorable += counts["unscorable"]
        self.cut_off += counts["cut_off"]
        self.equal += counts["equal"]
        untrained.add_reasons(self.reasons, drawn)
        self.broken_steps = self.broken_steps + 1 if untrained.all_failed(drawn) else 0

    @property
    def is_broken(self) -> bool:
        """Whether every verdict of the first step failed, or of so many in a row that the verifiers will not mend."""
        return self.broken_steps >= untrained.BROKEN_STEPS or 0 < self.broken_steps == self.steps

    @property
    def untrained(self) -> dict[str, int]:
        """How many samples were not trained, by category."""
        return {name: getattr(self, name) for name in untrained.CATEGORIES}
