"""From hidden states to the loss of each supervised token, with the vocabulary split over tensor ranks.

Only supervised positions reach the output layer: in agent trajectories and short-answer tasks most positions are
prompt, and their logits would be thrown away. Of those that do, the logits of one chunk exist at a time, and backward
computes them again: a matrix product more (4 for 3) for a memory that does not grow with the number of tokens. Where
one chunk is all, backward finds it as forward left it.

Letters of shapes: T tokens of a row, n supervised tokens among them, h hidden size, V rows of the vocabulary with its
padding, t tensor ranks (each holds V / t rows).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer import TransformerConfig

from megatron_ext import versions
from megatron_ext.layers.documents import PackedDocuments, PackedRow
from megatron_ext.parallel.calibration import CHUNK_LOGITS

EXPONENTIALS = 2**20  # that the sum of a softmax holds at a time


@dataclass(frozen=True)
class Targets:
    """Says what is wanted of the supervised positions.

    Wanted are the losses of `labels` (int64 [n], in the whole vocabulary) under softmax(logits / temperature), and with
    `entropy` the entropy of that distribution too.
    """

    labels: torch.Tensor
    temperature: float = 1.0
    entropy: bool = False


def vocabulary_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    config: TransformerConfig,
    rows: int,
    group: torch.distributed.ProcessGroup,
    cap: float = 0.0,
) -> torch.Tensor:
    """Multiply hidden [n, h], the same on all tensor ranks, by this rank's weight [V / t, h]: logits [n, V / t],
    `capped`.

    Rows from `rows` on are padding and get -inf, so that the softmax is over the real vocabulary.
    """
    logits = linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        allreduce_dgrad=group.size() > 1,
        sequence_parallel=False,
        tp_group=group,
    )
    logits = capped(logits, cap)
    first = group.rank() * weight.size(0)
    if first + weight.size(0) > rows:
        real = max(0, rows - first)
        logits = torch.cat([logits[:, :real], logits.new_full((logits.size(0), weight.size(0) - real), -torch.inf)], 1)
    return logits


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Return cap · tanh(logits / cap); unchanged where `cap` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def _real_rows(weight: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the rows of this tensor rank's `weight` that are no padding of a vocabulary of `rows`; perhaps none."""
    return weight[: max(0, rows - group.rank() * weight.size(0))]


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _rows_at_once(logits: torch.Tensor) -> int:
    """Return the number of rows whose exponentials exist at a time: less memory, and on a CPU pages that are warm."""
    return max(1, EXPONENTIALS // max(1, logits.size(1)))


def _scaled_logits(hidden: torch.Tensor, real: torch.Tensor, cap: float, temperature: float) -> torch.Tensor:
    """Return logits / temperature in fp32, [chunk, real rows]."""
    logits = (hidden @ real.t()).float()
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
    return logits if temperature == 1 else logits.div_(temperature)


class _ChunkedLoss(torch.autograd.Function):
    """Computes `token_losses`, stacked [1 or 2, n].

    Ranks speak once a pass, not once a chunk: forward adds up their softmax statistics, backward their gradients of
    hidden.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: Targets,
        rows: int,
        group: dist.ProcessGroup,
        cap: float,
    ) -> torch.Tensor:
        real = _real_rows(weight, rows, group)
        column = targets.labels - group.rank() * weight.size(0)
        held = (0 <= column) & (column < len(real))  # whose label this rank has
        column = column.where(held, 0)[:, None]
        log_sum = hidden.new_zeros(len(hidden), dtype=torch.float32)  # over this rank's logits
        picked, spread = torch.zeros_like(log_sum), torch.zeros_like(log_sum)  # the label's logit; the entropy
        chunks = _chunks(len(hidden), len(real))
        for part in chunks:
            logits = _scaled_logits(hidden[part], real, cap, targets.temperature)
            log_sum[part] = torch.cat([block.logsumexp(1) for block in logits.split(_rows_at_once(logits))])
            if len(real):
                picked[part] = logits.gather(1, column[part]).squeeze(1) * held[part]
            if targets.entropy:
                spread[part] = torch.special.entr(logits.softmax(1)).sum(1)

        highest = log_sum.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        share = (log_sum - highest).exp()
        sums = torch.stack([share, picked, share * spread + torch.special.entr(share)])
        dist.all_reduce(sums, group=group)
        share, picked, spread = sums
        log_sum = highest + share.log()
        out = torch.stack([log_sum - picked, share.log() + spread / share][: 1 + targets.entropy])
        ctx.save_for_backward(hidden, weight, column, held, log_sum, out)
        ctx.constants = targets, rows, group, cap
        ctx.only_chunk = logits if len(chunks) == 1 and any(ctx.needs_input_grad) else None
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, column, held, log_sum, out = ctx.saved_tensors
        targets, rows, group, cap = ctx.constants
        real = _real_rows(weight, rows, group)
        label_share = -(grad_out[0] * held)[:, None]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for part in _chunks(len(hidden), len(real)):
            logits, ctx.only_chunk = ctx.only_chunk, None  # overwritten below: a second backward computes it again
            if logits is None:
                logits = _scaled_logits(hidden[part], real, cap, targets.temperature)
            slope = 1 - (logits * (targets.temperature / cap)).square_() if cap else None  # of the cap
            grad = _through_softmax(logits.sub_(log_sum[part, None]), out[:, part, None], grad_out[:, part, None])
            if len(real):
                grad.scatter_add_(1, column[part], label_share[part])
            if targets.temperature != 1:
                grad.div_(targets.temperature)
            grad = (grad if slope is None else grad.mul_(slope)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ real
            if grad_weight is not None:
                _add_product(grad_weight[: len(real)], grad.t(), hidden[part])
        if grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=group)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _through_softmax(log_p: torch.Tensor, out: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the scaled logits, in the place of log_p, without what a label's own logit gets.

    ∂loss/∂z = p - onehot(label) and ∂entropy/∂z = -p (log p + entropy).
    """
    factor = grad_out[0]
    if len(out) == 2:
        factor = (log_p + out[1]).mul_(-grad_out[1]).add_(factor)
    return log_p.exp_().mul_(factor)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total`, which may be fp32 where the product is bf16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: Targets,
    rows: int,
    group: dist.ProcessGroup,
    cap: float = 0.0,
) -> torch.Tensor:
    """Return -log p(label), fp32 [n]; with `targets.entropy` [2, n], the losses and the entropies, in nats.

    hidden [n, h], the same on all tensor ranks; weight [V / t, h] of this one; logits `capped`; the vocabulary's real
    rows are the first `rows`. Gradients are those of the logits written out, for any gradient of the output.
    """
    out = _ChunkedLoss.apply(hidden, weight, targets, rows, group, cap)
    return out if targets.entropy else out.squeeze(0)


def supervised_output(
    model: "SupervisedHead | SupervisedHybrid",
    hidden_states: torch.Tensor,
    targets: Targets | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return what `model`'s output layer makes of the rows `positions` (int64 [n] into T) of hidden_states [T, 1, h].

    With targets: `token_losses`. Without: this tensor rank's logits [n, V / t].
    """
    group = model.pg_collection.tp
    if model.config.sequence_parallel:
        # Every tensor rank gets all tokens; each then computes the same selection, so backward only slices.
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=group
        )
    hidden = hidden_states.squeeze(1).index_select(0, positions)  # [T, 1, h] -> [n, h]
    if model.share_embeddings_and_output_weights:
        weight = model.shared_embedding_or_output_weight()
    else:
        weight = model.output_layer.weight
    if targets is None:
        return vocabulary_logits(
            hidden, weight, config=model.config, rows=model.vocabulary_rows, group=group, cap=model.logit_cap
        )
    return token_losses(hidden, weight, targets=targets, rows=model.vocabulary_rows, group=group, cap=model.logit_cap)


class SupervisedHead(GPTModel):
    """Extends GPTModel: its forward takes as `labels` the `Targets` of the supervised positions, and returns their
    losses.

    The module tree, parameters and checkpoints are GPTModel's. Build it with `vocabulary_rows`, the number of real
    rows of a padded vocabulary.
    """

    vocabulary_rows: int
    logit_cap: float = 0.0

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: Targets | None = None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return `supervised_output` at the positions `loss_mask` where they are given, otherwise GPTModel's own."""
        if loss_mask is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        return supervised_output(self, hidden_states, labels, loss_mask)


class SupervisedHybrid(versions.named(versions.release().hybrid_model)):  # type: ignore[misc]  # known when it runs
    """Gives megatron-core's hybrid model the forward of SupervisedHead, for models without position embeddings."""

    vocabulary_rows: int
    logit_cap: float = 0.0

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None,
        labels: Targets | None = None,
        loss_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Compute as SupervisedHead does: `loss_mask` selects positions, whose targets are `labels`."""
        if loss_mask is None or not self.post_process:
            return super().forward(input_ids, position_ids, attention_mask, labels=labels, **others)
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask, **others)
        return supervised_output(self, hidden, labels, loss_mask)


def supervised_losses(
    model: torch.nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    documents: PackedDocuments,
    targets: Targets,
    supervised: torch.Tensor,
) -> torch.Tensor:
    """Return `token_losses` of one packed row: ids and positions int64 [1, T], `targets` of the positions `supervised`
    [n].

    A pipeline's stages before the last return what goes to the next.
    """
    return model(ids, positions, None, labels=targets, loss_mask=supervised, packed_seq_params=documents)


def position_logits(
    model: torch.nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    documents: PackedRow,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Return the logits [n, V / t] of this tensor rank at the positions `wanted` int64 [n] of a packed row; padding has
    -inf.
    """
    return model(ids, positions, None, loss_mask=wanted, packed_seq_params=documents)
