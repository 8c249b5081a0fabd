"""The policy loss over trained completion tokens, as a weighted sum whose weights know the whole global batch.

Tensors hold trained tokens only, of whole rollouts one after the other: what is masked (prompts, tool results,
truncated or unscorable samples) is not among them. A rank sees its share; `Totals` count all ranks and micro-batches,
so the shares' losses and gradients add up to those of the whole, however it is cut.

Shapes below: n trained tokens of this rank; rollouts that these belong to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_ext.rl.settings import Correction, Loss

Reduce = Callable[[torch.Tensor], torch.Tensor]
_LARGEST = 40.0  # of a log ratio that is raised: e^40 = 2e17, of which float32 holds the square


def alone(sums: torch.Tensor) -> torch.Tensor:
    """Return the sums as they are: every sequence lies whole on this rank."""
    return sums


@dataclass(frozen=True)
class Totals:
    """Counts of a global batch: trained tokens; rollouts, also those without any; the longest a completion may be."""

    tokens: int
    sequences: int
    longest: int


@dataclass(frozen=True)
class Tokens:
    """Trained tokens [n] of this rank. Log-probs are at the sampling temperature, of the tokens that were sampled.

    logp: of the weights in training (with gradient). old: of the weights at the beginning of the update. behaviour: as
    recorded when sampling, where it differs from `old`. reference: of the reference model, where there is a KL term.
    entropy: of the policy (with gradient), where there is an entropy term. advantage: of the token's rollout.
    sequence int64: number of the rollout. lengths [rollouts]: trained tokens of each, over all ranks that share it.
    """

    logp: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    sequence: torch.Tensor
    lengths: torch.Tensor
    behaviour: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


def token_weights(tokens: Tokens, aggregation: str, totals: Totals) -> torch.Tensor:
    """Return [n], what each token's loss counts.

    token: 1 / all tokens (DAPO). sequence: 1 / (all rollouts · its length), the mean of means (GRPO). constant: 1 /
    (all rollouts · longest) (Dr. GRPO).
    """
    if aggregation == "sequence":
        return 1 / (totals.sequences * tokens.lengths.to(tokens.logp.dtype)[tokens.sequence])
    count = totals.tokens if aggregation == "token" else totals.sequences * totals.longest
    return torch.full_like(tokens.logp, 1 / max(count, 1), requires_grad=False)


def sequence_sums(values: torch.Tensor, tokens: Tokens, reduce: Reduce) -> torch.Tensor:
    """Return [rollouts], the sums of `values` [n] over each rollout's tokens.

    `reduce` adds those of ranks that share a rollout, and its gradient.
    """
    sums = values.new_zeros(tokens.lengths.numel()).index_add(0, tokens.sequence, values)
    return reduce(sums)


def policy_loss(
    tokens: Tokens, config: Loss, totals: Totals, reduce: Reduce = alone
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Return this rank's part of the loss, and sums over its tokens for the metrics.

        clip        -min(r·A, clip(r, 1 - low, 1 + high)·A); with a dual clip, r at most that (PPO; arXiv 1912.09729)
        cispo       -sg(min(r, 1 + high))·A·log π (arXiv 2506.13585)
        r           exp(log π - log π_old), or exp of its mean over the rollout (GSPO, arXiv 2507.18071)
        KL          k2: d²/2; k3: r·(exp(-d) - 1 + d), d = log π - log π_ref

    A ratio is bounded at e^40 before it is raised, so that what a clip, a cap or a mask leaves out is no inf, of
    which 0 times is NaN, in the gradient too. Where such a ratio would count, the loss is infinite: `beyond` counts
    them.
    """
    log_ratio = tokens.logp - tokens.old
    if config.level == "sequence":
        means = sequence_sums(log_ratio, tokens, reduce) / tokens.lengths.clamp(min=1)
        log_ratio = means[tokens.sequence]
    ratio, advantage = log_ratio.clamp(max=_LARGEST).exp(), tokens.advantage
    beyond = log_ratio.detach() > _LARGEST
    if config.policy == "cispo":
        each = -ratio.clamp(max=1 + config.clip_high).detach() * advantage * tokens.logp
        low = torch.zeros_like(ratio, dtype=torch.bool)
        counts = low
    else:
        capped = ratio.clamp(max=config.dual_clip) if config.dual_clip else ratio
        each = -torch.minimum(capped * advantage, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
        low = (ratio < 1 - config.clip_low) & (advantage < 0)
        counts = (advantage < 0) & (not config.dual_clip)
    high = (ratio > 1 + config.clip_high) & (advantage > 0)
    sums = {"ratio": ratio.detach().sum(), "clipped_low": low.sum(), "clipped_high": high.sum()}
    if config.correction.mode != "off":
        weights = correction_weights(tokens, config.correction, reduce)
        each = (each * weights).where(weights > 0, 0)
        counts = counts & (weights > 0)
        sums["masked"] = (weights == 0).sum()
    if config.kl_beta:
        difference = tokens.logp - _needed(tokens.reference, "reference")
        kl = _kl(difference, ratio, config.kl)
        each = each + config.kl_beta * kl
        sums["kl"] = kl.detach().sum()
        sums["max_below_reference"] = largest(-difference.detach())
        if config.kl == "k3":
            counts, beyond = torch.ones_like(beyond), beyond | (difference.detach() < -_LARGEST)
    sums["max_log_ratio"], sums["beyond"] = largest(log_ratio.detach()), (beyond & counts).sum()
    loss = (each * token_weights(tokens, config.aggregation, totals)).sum()
    if config.entropy:
        loss = loss - config.entropy * _needed(tokens.entropy, "entropy").sum() / max(totals.tokens, 1)
    return loss, sums


def _needed(column: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return a column [n] of the tokens that the loss asks for."""
    if column is None:
        raise ValueError(f"this loss needs `{name}` of its tokens")
    return column


def largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest of `values` [n], 0 where there is none above."""
    return values.max().clamp(min=0) if values.numel() else values.sum()


def _kl(difference: torch.Tensor, ratio: torch.Tensor, kind: str) -> torch.Tensor:
    """Return an estimate [n] of the KL whose gradient is, in expectation, that of the exact KL.

    k3 alone has another gradient: it is taken under the weights that sampled. The ratio mends that.
    """
    if kind == "k2":
        return 0.5 * difference.square()
    return ratio * (torch.exp((-difference).clamp(max=_LARGEST)) - 1 + difference)


@torch.no_grad()
def correction_weights(tokens: Tokens, config: Correction, reduce: Reduce = alone) -> torch.Tensor:
    """Return [n], each token's weight for having been sampled under other numbers than `old`.

    This is truncated importance sampling.
    """
    log_ratio = tokens.old - _needed(tokens.behaviour, "behaviour")
    if config.mode.startswith("sequence"):
        log_ratio = sequence_sums(log_ratio, tokens, reduce)[tokens.sequence]
    ratio = log_ratio.exp()
    if config.mode.endswith("truncate"):
        return ratio.clamp(max=config.high)
    return ratio.where((ratio >= config.low) & (ratio <= config.high), 0)  # not times: of inf that is NaN


@torch.no_grad()
def mismatch_sums(tokens: Tokens) -> dict[str, torch.Tensor]:
    """Return what tells the rollout's log-probs from the training's: sums over ranks, of `max_` ones the largest.

    Divided by the tokens: mean |Δp|, KL(behaviour ‖ old) by k3. Effective sample size: (Σw)² / (n·Σw²).
    """
    behaviour = _needed(tokens.behaviour, "behaviour")
    difference = tokens.old - behaviour
    weight = difference.clamp(max=_LARGEST).double().exp()  # whose squares float64 still adds up
    change = (tokens.old.exp() - behaviour.exp()).abs()
    return {
        "probability_difference": change.sum(),
        "max_probability_difference": largest(change),
        "max_log_difference": largest(difference.abs()),
        "behaviour_kl": (weight - 1 - difference).sum(),
        "weight": weight.sum(),
        "weight_squared": weight.square().sum(),
    }
