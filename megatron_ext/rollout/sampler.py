"""The next token of each sample, from logits whose vocabulary is split over tensor ranks; nothing is gathered.

A token is where the sample's noise u falls in the running sum of probabilities, in the order of the vocabulary
(inverse transform). So it depends on the logits and on u alone, and on logits only as far as u is near a border: how
near is the `margin`, as a probability. Ranks add up their parts of the running sum; the one that holds the token says
so.

Shapes below: n samples, V tokens of the vocabulary, t tensor ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ext.rollout.settings import Sampling

NOTHING = -1  # in place of a token
_DIGITS = ((20, 11), (10, 10), (0, 10))  # shift and width of the parts into which 31 bits are cut


class Drawn(NamedTuple):
    """What was drawn for n samples.

    tokens int64 [n], NOTHING where the logits are no distribution (NaN or infinite ones among them); log-probs fp32 [n]
    under the distribution drawn from, and of the model itself (temperature 1, no filter); margins fp32 [n], infinite
    where nothing was drawn.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    model_logprobs: torch.Tensor
    margins: torch.Tensor


class Vocabulary:
    """Adds up over the vocabulary, of whose V tokens this tensor rank holds a part [n, V / t]."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    def _reduced(self, x: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum [n, 1] of `x` [n, V / t] over the whole vocabulary."""
        return self._reduced(x.sum(-1, keepdim=True), dist.ReduceOp.SUM)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """Return the maximum [n, 1] of `x` [n, V / t] over the whole vocabulary."""
        return self._reduced(x.amax(-1, keepdim=True), dist.ReduceOp.MAX)

    def agree(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, of any shape, added over ranks."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def before(self, total: torch.Tensor) -> torch.Tensor:
        """Return the sum [n, 1] of the totals of the ranks before this one."""
        if self.size == 1:
            return torch.zeros_like(total)
        totals = [torch.empty_like(total) for _ in range(self.size)]
        dist.all_gather(totals, total.contiguous(), group=self.group)
        return torch.stack(totals[: self.rank]).sum(0) if self.rank else torch.zeros_like(total)

    def kth(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """Return the k-th largest [n, 1] of each row, from the k largest of each rank."""
        best = x.topk(min(k, x.size(-1)), dim=-1).values
        if self.size > 1:
            own = torch.tensor(best.size(-1), device=x.device)
            width = int(self._reduced(own, dist.ReduceOp.MAX))  # the last rank's part may be shorter than k
            best = torch.nn.functional.pad(best, (0, width - best.size(-1)), value=-torch.inf)
            parts = [torch.empty_like(best) for _ in range(self.size)]
            dist.all_gather(parts, best.contiguous(), group=self.group)
            best = torch.cat(parts, dim=-1)
        return best.topk(min(k, best.size(-1)), dim=-1).values[:, -1:]


@torch.no_grad()
def draw(
    logits: torch.Tensor, noise: torch.Tensor, sampling: Sampling, vocabulary: Vocabulary, first: int = 0
) -> Drawn:
    """Return the next token of each of n samples.

    Logits [n, V / t], of which the first column is token `first`; noise fp64 [n] in [0, 1).
    """
    logits = logits.float()
    top = vocabulary.max(logits)
    weights = (logits - top).exp_()  # of the model itself, the likeliest 1
    model_total = vocabulary.sum(weights).log()
    # The sum tells on every rank, and without a wait: a maximum over ranks may lose a NaN. -inf alone is no fault.
    is_sound = model_total.isfinite().squeeze(1)
    if sampling.is_greedy:
        tokens = _likeliest(logits, top, vocabulary, first).where(is_sound, NOTHING)
        logprobs = -model_total.squeeze(1)
        return Drawn(tokens, torch.zeros_like(logprobs), logprobs, torch.full_like(logprobs, torch.inf))
    if sampling.temperature != 1:
        weights = ((logits - top) / sampling.temperature).exp_()
    if sampling.is_filtered:
        weights = weights.where(weights >= _threshold(weights, sampling, vocabulary), 0)
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = vocabulary.sum(sums[:, -1:])
    before = vocabulary.before(sums[:, -1:])
    wanted = noise[:, None] * total - before  # in this rank's part of the running sum
    place = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.size(-1) - 1)
    is_here = (wanted >= 0) & (wanted < sums[:, -1:])
    upper = sums.gather(1, place)
    lower = upper - weights.gather(1, place).double()
    margin = torch.minimum(wanted - lower, upper - wanted) / total
    log_weight = ((logits.gather(1, place) - top) / sampling.temperature).double() - total.log()
    model = (logits.gather(1, place) - top - model_total).double()
    columns = torch.cat([place.double() + first, log_weight, model, margin], dim=1)
    columns = vocabulary.agree(columns.where(is_here, 0))
    tokens = columns[:, 0].long().where(is_sound, NOTHING)
    return Drawn(tokens, columns[:, 1].float(), columns[:, 2].float(), columns[:, 3].float())


def _likeliest(logits: torch.Tensor, top: torch.Tensor, vocabulary: Vocabulary, first: int) -> torch.Tensor:
    """Return int64 [n], the lowest token with the largest logit."""
    best = logits.max(-1, keepdim=True)
    token = (best.indices + first).where(best.values == top, torch.iinfo(torch.int64).max)
    if vocabulary.size > 1:
        dist.all_reduce(token, op=dist.ReduceOp.MIN, group=vocabulary.group)
    return token.squeeze(1)


def _threshold(weights: torch.Tensor, sampling: Sampling, vocabulary: Vocabulary) -> torch.Tensor:
    """Return [n, 1], the least weight that passes the filters; tokens that tie with it pass too.

    top_k, then top_p of what it leaves, then min_p, as transformers does. Neither takes the likeliest away, whose
    weight is 1, so what min_p asks for is the same wherever it stands: only top_p must not see its cut.
    """
    least = vocabulary.kth(weights, sampling.top_k) if sampling.top_k else torch.zeros_like(weights[:, :1])
    if sampling.top_p < 1:
        kept = weights.where(weights >= least, 0) if sampling.top_k else weights
        least = torch.maximum(least, _nucleus(kept, sampling.top_p, vocabulary))
    return least.clamp(min=sampling.min_p)


def _nucleus(weights: torch.Tensor, share: float, vocabulary: Vocabulary) -> torch.Tensor:
    """Return [n, 1], the largest threshold such that the weights at or above it make up `share` of all.

    There is no sort, which would have to be gathered: floats from 0 up are ordered as their bits, and the threshold's
    are found from the highest on, a table of weights by the next digit at a time.
    """
    bits, exact = weights.view(torch.int32), weights.double()
    wanted = vocabulary.sum(exact) * share
    above = torch.zeros_like(wanted)  # what lies above the digits found so far
    threshold = torch.zeros_like(bits[:, :1])
    for shift, width in _DIGITS:
        digit = (bits >> shift) & ((1 << width) - 1)
        inside = bits >> (shift + width) == threshold
        table = exact.new_zeros(len(bits), 1 << width).scatter_add_(1, digit.long(), exact.where(inside, 0))
        sums = above + vocabulary.agree(table).flip(1).cumsum(1)  # from the largest digit down
        place = (sums < wanted).sum(1, keepdim=True).clamp(max=sums.size(1) - 1)
        above = sums.gather(1, (place - 1).clamp(min=0)).where(place > 0, above)
        threshold = (threshold << width) | ((1 << width) - 1 - place).int()
    return threshold.view(torch.float32)
