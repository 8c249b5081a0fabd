"""From hidden states to the loss of each supervised token, with the vocabulary split over tensor ranks.

Only supervised positions reach the output layer: in agent trajectories and short-answer tasks most positions are
prompt, and their logits would be thrown away. (Chunks over tokens, for vocabularies of 150k and more, come here.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer import TransformerConfig

from megatron_ext.layers.attention import PackedDocuments


def vocabulary_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    config: TransformerConfig,
    rows: int,
    group: torch.distributed.ProcessGroup,
    cap: float = 0.0,
) -> torch.Tensor:
    """hidden [n, h], the same on all tensor ranks, times this rank's weight [V / t, h] -> logits [n, V / t], `capped`.

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
    """cap · tanh(logits / cap); unchanged where `cap` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def token_losses(logits: torch.Tensor, labels: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """-log p(label), fp32 [n]. Logits [n, V / t] of this tensor rank, labels int64 [n] in the whole vocabulary."""
    if group.size() == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels)  # the tensor group is its default


def supervised_output(
    model: LanguageModule, hidden_states: torch.Tensor, labels: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """What `model`'s output layer makes of the rows `positions` (int64 [n] into T) of hidden_states [T, 1, h].

    With labels int64 [n]: losses [n]. Without: logits, gathered over tensor ranks, [n, vocabulary_rows].
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
    logits = vocabulary_logits(hidden, weight, model.config, model.vocabulary_rows, group, model.logit_cap)
    if labels is None:
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=group)
        return logits[:, : model.vocabulary_rows]
    return token_losses(logits, labels, group)


class SupervisedHead(GPTModel):
    """GPTModel whose forward takes `labels` of the supervised positions only and returns their losses.

    The module tree, parameters and checkpoints are GPTModel's. Build it with `vocabulary_rows`, the number of real
    rows of a padded vocabulary.
    """

    vocabulary_rows: int
    logit_cap: float = 0.0

    def _postprocess(self, hidden_states: torch.Tensor, *args, labels=None, loss_mask=None, **kwargs) -> torch.Tensor:
        """`supervised_output` at the positions `loss_mask` where they are given, otherwise GPTModel's own."""
        if loss_mask is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        return supervised_output(self, hidden_states, labels, loss_mask)


class SupervisedHybrid(MambaModel):
    """The same of MambaModel, for models without position embeddings."""

    vocabulary_rows: int
    logit_cap: float = 0.0

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """As SupervisedHead's: `loss_mask` selects positions, whose labels are `labels`."""
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
    labels: torch.Tensor,
    supervised: torch.Tensor,
) -> torch.Tensor:
    """Losses fp32 [n] of the supervised positions of one packed row.

    ids and positions int64 [1, T]; labels int64 [n] of the positions `supervised` int64 [n].
    """
    return model(ids, positions, None, labels=labels, loss_mask=supervised, packed_seq_params=documents)


def position_logits(
    model: torch.nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    documents: PackedDocuments,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Logits [n, vocabulary rows] at the positions `wanted` int64 [n] of a packed row, alike on all tensor ranks."""
    return model(ids, positions, None, loss_mask=wanted, packed_seq_params=documents)
