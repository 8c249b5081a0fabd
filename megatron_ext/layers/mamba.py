"""Mamba-2 (Dao and Gu, arXiv 2405.21060) over packed documents, in torch, for mcore's MambaLayer.

Per head, with input x [p], step dt > 0, decay A < 0 and vectors B, C [n], a document's state S [p, n] starts at 0 and

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

`scan` computes it in chunks of tokens: inside a chunk as a masked matrix product, between chunks by passing the state
on. Before it, a causal convolution over the last few tokens makes x, B and C. `MambaMixer.advance` runs both over
segments of a row, each recomputed in backward, so that memory grows with the row's length by its inputs and a state a
segment; it takes and returns the state of a row, so that decoding goes on from where a prompt ended.

Isolation is exact. Where a document starts, decays are summed anew: nothing of another document enters even by
rounding, and what is masked is multiplied by zero in both directions.

Parameters, checkpoints and order of in_proj's rows [z, x, B, C, dt] are those of megatron.core.ssm.mamba_mixer, which
cannot be imported without Triton; it serves the Transformer Engine backend.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import _split_tensor_factory  # mamba_mixer's own, importable without Triton
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from megatron_ext.device import device
from megatron_ext.layers.attention import heads_for_tokens, tokens_for_heads
from megatron_ext.layers.decays import ExactDecays
from megatron_ext.layers.documents import PackedDocuments

SEGMENT = 2048  # tokens that are recomputed together
NO_DOCUMENT = -1


def _working(dtype: torch.dtype) -> torch.dtype:
    """States and decays are at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class State(NamedTuple):
    """What the next token needs of those before it, for b rows. SSM states are fp32, or fp64 for fp64 inputs."""

    inputs: torch.Tensor  # [b, width - 1, channels], what the convolution saw last
    documents: torch.Tensor  # int64 [b, width - 1], the documents of those tokens
    ssm: torch.Tensor  # [b, heads, p, n]


def convolve(
    x: torch.Tensor, documents: torch.Tensor, state: State, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution within documents.

    x [b, T, channels], documents int64 [b, T], weight [channels, width], bias [channels] -> output like x, and the
    state's next `inputs` and `documents`.
    """
    tokens, last = x.size(1), weight.size(1) - 1
    inputs = torch.cat([state.inputs.to(x.dtype), x], dim=1)
    origins = torch.cat([state.documents, documents], dim=1)
    y = x * weight[:, last] + bias
    for tap in range(last):
        same = origins[:, tap : tap + tokens] == documents
        y = y + inputs[:, tap : tap + tokens].masked_fill(~same[..., None], 0) * weight[:, tap]
    return y, inputs[:, tokens:].clone(), origins[:, tokens:].clone()  # views would keep the whole row alive


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    documents: torch.Tensor,
    state: torch.Tensor,
    before: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of this module's docstring without D, over documents, chunk by chunk.

    x [B, T, heads, p], dt [B, T, heads], decay [heads] (A), b and c [B, T, groups, n], documents int64 [B, T]; state
    [B, heads, p, n] after the token before, of document `before` int64 [B] -> y [B, T, heads, p], the last state.
    Group j serves heads j * heads / groups and following.
    """
    tokens, heads, groups = x.size(1), x.size(2), b.size(2)
    size = min(chunk_size, tokens)
    if padding := -tokens % size:  # steps of length zero leave the state as it is
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, padding))
        documents = torch.cat([documents, documents[:, -1:].expand(-1, padding)], dim=1)
    x, dt, b, c, documents = (t.unflatten(1, (-1, size)) for t in (x, dt, b, c, documents))  # [B, k, size, ...]
    by_group = (groups, heads // groups)

    # Logarithms of decays, summed token by token within a document: from after token j to token i, and from the chunk's
    # start, for tokens of the document that was under way there.
    steps = (dt * decay).transpose(2, 3)  # [B, k, heads, size]
    one = documents[..., :, None] == documents[..., None, :]  # [B, k, size, size]
    after = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    spans = steps[..., :, None].masked_fill(~(one & after)[:, :, None], 0).cumsum(dim=-2)
    within = spans.masked_fill(~(one & ~after.T)[:, :, None], -torch.inf).exp()  # [B, k, heads, i, j]
    before = torch.cat([before[:, None], documents[:, :-1, -1]], dim=1)
    inherits = (documents == before[..., None])[:, :, None]  # [B, k, 1, size]
    since = steps.masked_fill(~inherits, 0).cumsum(dim=-1).exp() * inherits
    within, since = within.unflatten(2, by_group), since.unflatten(2, by_group)

    x = (x * dt[..., None]).unflatten(3, by_group)  # [B, k, size, groups, heads of a group, p]
    weights = torch.einsum("bkign,bkjgn->bkgij", c, b)[:, :, :, None] * within
    y = torch.einsum("bkgrij,bkjgrp->bkigrp", weights, x)
    to_end = within[..., -1, :].permute(0, 1, 4, 2, 3)  # [B, k, j, groups, heads of a group]
    added = torch.einsum("bkjgn,bkjgrp->bkgrpn", b, x * to_end[..., None])
    state, entering = state.unflatten(1, by_group), []
    for fade, new in zip(since[..., -1, None, None].unbind(1), added.unbind(1)):
        entering.append(state)
        state = fade * state + new
    inherited = torch.einsum("bkign,bkgrpn->bkigrp", c, torch.stack(entering, dim=1))
    y = y + inherited * since.permute(0, 1, 4, 2, 3)[..., None]
    return y.flatten(3, 4).flatten(1, 2)[:, :tokens], state.flatten(1, 2)


class _Segments(torch.autograd.Function):
    """A function of rows [b, T, width], documents [b, T], a State and parameters, as `MambaMixer._segment`, over
    segments of a row, each recomputed in backward.

    What outlives a segment lies in buffers made before the first: small blocks kept between the temporaries of
    segments would leave holes that no later one fits into.
    """

    @staticmethod
    def forward(
        ctx: Any, segment: Callable[..., tuple[torch.Tensor, State]], rows: torch.Tensor, documents: torch.Tensor,
        *others: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        state, parameters = State(*others[:3]), others[3:]
        tokens = rows.size(1)
        starts = [t.new_empty(-(-tokens // SEGMENT), *t.shape) for t in state]
        y = None
        for k, first in enumerate(range(0, tokens, SEGMENT)):
            for kept, now in zip(starts, state):
                kept[k] = now
            span = slice(first, first + SEGMENT)
            out, state = segment(rows[:, span], documents[:, span], state, *parameters)
            if y is None:
                y = out.new_empty(rows.size(0), tokens, out.size(-1))
            y[:, span] = out
        ctx.segment, ctx.size = segment, SEGMENT
        ctx.save_for_backward(rows, documents, *starts, *parameters)
        ctx.mark_non_differentiable(state.documents)
        return y, *state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, *grad_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, documents, inputs, origins, ssm, *parameters = ctx.saved_tensors
        parameters = [p.detach().requires_grad_(needed) for p, needed in zip(parameters, ctx.needs_input_grad[6:])]
        trained = [p for p in parameters if p.requires_grad]
        sums = [torch.zeros_like(p) for p in trained]
        grad_rows, (grad_inputs, _, grad_ssm) = torch.empty_like(rows), grad_state
        for k in reversed(range(ssm.size(0))):
            span = slice(k * ctx.size, (k + 1) * ctx.size)
            leaves = [t.detach().requires_grad_() for t in (rows[:, span], inputs[k], ssm[k])]
            with torch.enable_grad():
                state = State(leaves[1], origins[k], leaves[2])
                y, last = ctx.segment(leaves[0], documents[:, span], state, *parameters)
            grad_rows[:, span], grad_inputs, grad_ssm, *grads = torch.autograd.grad(
                (y, last.inputs, last.ssm), (*leaves, *trained), (grad_y[:, span], grad_inputs, grad_ssm)
            )
            for total, grad in zip(sums, grads):
                total += grad
        of_parameters = iter(sums)
        return (
            None,
            grad_rows,
            None,
            grad_inputs,
            None,
            grad_ssm,
            *(next(of_parameters) if p.requires_grad else None for p in parameters),
        )


def documents_of(packed: PackedSeqParams | None, tokens: int, target: torch.device) -> torch.Tensor:
    """Number of the document of each of T tokens, int64 [T]; what follows the last (padded) boundary is one more."""
    if packed is None:
        return torch.zeros(tokens, dtype=torch.int64, device=target)
    ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return torch.searchsorted(ends, torch.arange(tokens, dtype=ends.dtype, device=target), right=True)


class GatedNorm(torch.nn.Module):
    """RMSNorm over each of `groups` equal parts of the last dimension; a tensor rank holds whole groups."""

    def __init__(self, width: int, groups: int, eps: float, dtype: torch.dtype, tp_group: Any):
        super().__init__()
        self.groups, self.eps, self.tp_group = groups, eps, tp_group
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype, device=device()))
        self.weight.tensor_model_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_group = x.to(_working(x.dtype)).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(by_group, by_group.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


@dataclass
class MambaMixerSubmodules:
    """As mcore's class of this name."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class MambaMixer(ExactDecays, MegatronModule):
    """Drop-in for mcore's MambaMixer in training and evaluation, without its inference contexts.

    Tensor parallelism splits heads and groups. Context parallelism splits a tensor rank's heads further: one
    all-to-all brings each rank the whole row for its heads, another brings back its tokens for all heads, as
    mcore's MambaContextParallel does with six.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        d_conv: int = 4,
        chunk_size: int = 128,
        norm_epsilon: float = 1e-5,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
    ):
        super().__init__(config)
        self.chunk_size, self.layer_number = chunk_size, layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        ranks, context = self.tp_group.size(), self.cp_group.size()
        heads, groups = config.mamba_num_heads, config.mamba_num_groups
        self.head_dim, self.state_dim = config.mamba_head_dim, config.mamba_state_dim
        if heads % groups or heads % (ranks * context) or groups % ranks:
            raise ValueError(f"{heads} Mamba heads in {groups} groups do not split over TP {ranks} and CP {context}")
        self.heads, self.groups = heads // ranks, groups // ranks  # of this tensor rank
        if self.groups % context and context % self.groups:
            raise ValueError(f"{self.groups} Mamba groups a tensor rank and CP {context}: neither divides the other")
        inner, states = self.heads * self.head_dim, self.groups * self.state_dim

        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            (2 * inner + 2 * states + self.heads) * ranks,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=self.tp_group,
        )
        channels = inner + 2 * states
        at = dict(dtype=config.params_dtype, device=device())
        self.conv1d = torch.nn.Conv1d(channels, channels, d_conv, groups=channels, **at)  # holds the parameters
        exact = dict(dtype=_working(config.params_dtype), device=device())
        self.dt_bias = torch.nn.Parameter(torch.zeros(self.heads, **exact))
        self.A_log = torch.nn.Parameter(torch.zeros(self.heads, **exact))
        self.D = torch.nn.Parameter(torch.ones(self.heads, **exact))
        for parameter in (*self.conv1d.parameters(), self.dt_bias, self.A_log, self.D):
            parameter.tensor_model_parallel = True
        self.norm = GatedNorm(inner, self.groups, norm_epsilon, config.params_dtype, self.tp_group)
        self.out_proj = build_module(
            submodules.out_proj,
            inner * ranks,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.tp_group,
        )

    def _sizes(self) -> list[int]:
        """Columns of z, x, B, C and dt in in_proj's output on this tensor rank."""
        inner, states = self.heads * self.head_dim, self.groups * self.state_dim
        return [inner, inner, states, states, self.heads]

    def _columns(self, rank: int) -> list[torch.Tensor]:
        """Those of z, x, B, C and dt that context rank `rank` computes with: its heads, the groups they use."""
        heads, each = self.heads // self.cp_group.size(), self.heads // self.groups
        own = slice(rank * heads, (rank + 1) * heads)
        used = slice(own.start // each, (own.stop - 1) // each + 1)
        z, x, b, c, dt = torch.arange(sum(self._sizes()), device=device()).split(self._sizes())
        by_head, by_group = (self.heads, self.head_dim), (self.groups, self.state_dim)
        parts = z.view(by_head)[own], x.view(by_head)[own], b.view(by_group)[used], c.view(by_group)[used], dt[own]
        return [part.flatten() for part in parts]

    def empty_state(self, rows: torch.Tensor) -> State:
        """Before the first token of each row of `rows` [b, ...]."""
        batch, width = rows.size(0), self.conv1d.kernel_size[0]
        context = self.cp_group.size()
        channels = sum(part.numel() for part in self._columns(0)[1:4])
        shape = (batch, self.heads // context, self.head_dim, self.state_dim)
        return State(
            rows.new_zeros(batch, width - 1, channels),
            torch.full((batch, width - 1), NO_DOCUMENT, device=rows.device),
            torch.zeros(shape, dtype=_working(rows.dtype), device=rows.device),
        )

    def advance(
        self, projected: torch.Tensor, documents: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Convolution, recurrence and gate over the next tokens of some rows.

        projected [b, T, width]: columns z, x, B, C, dt of this context rank's heads; documents int64 [b, T], the
        document of each token; `state` after the tokens before, or None at the start -> y [b, T, heads * p], state.
        """
        state = state or self.empty_state(projected)
        parameters = self._parameters_of_context_rank(_working(projected.dtype))
        if projected.size(1) <= SEGMENT:
            return self._segment(projected, documents, state, *parameters)
        y, *state = _Segments.apply(self._segment, projected, documents, *state, *parameters)
        return y, State(*state)

    def _segment(
        self,
        rows: torch.Tensor,
        documents: torch.Tensor,
        state: State,
        weight: torch.Tensor,
        bias: torch.Tensor,
        dt_bias: torch.Tensor,
        log_decay: torch.Tensor,
        skip: torch.Tensor,
    ) -> tuple[torch.Tensor, State]:
        """`advance` at once, with the parameters of `_parameters_of_context_rank`."""
        work = weight.dtype
        heads, states = dt_bias.numel(), (weight.size(0) - dt_bias.numel() * self.head_dim) // 2
        inner = heads * self.head_dim
        z, xbc, dt = rows.to(work).split([inner, inner + 2 * states, heads], dim=-1)
        xbc, inputs, origins = convolve(xbc, documents, state, weight.squeeze(1), bias)
        x, b, c = F.silu(xbc).split([inner, states, states], dim=-1)
        x = x.unflatten(-1, (heads, -1))
        b, c = (t.unflatten(-1, (-1, self.state_dim)) for t in (b, c))
        dt = F.softplus(dt + dt_bias)
        decay = -torch.exp(log_decay)
        y, ssm = scan(x, dt, decay, b, c, documents, state.ssm, state.documents[:, -1], self.chunk_size)
        y = (y + x * skip[:, None]).flatten(-2) * F.silu(z)
        return y.to(rows.dtype), State(inputs.to(rows.dtype), origins, ssm)

    def _parameters_of_context_rank(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """conv1d's weight and bias, dt_bias, A_log and D of this context rank's heads, as `dtype`."""
        convolution, by_head = (
            [p.to(dtype) for p in those]
            for those in ((self.conv1d.weight, self.conv1d.bias), (self.dt_bias, self.A_log, self.D))
        )
        if self.cp_group.size() == 1:
            return *convolution, *by_head
        _, *channels, dt = self._columns(self.cp_group.rank())
        sizes = self._sizes()
        channel, head = torch.cat(channels) - sizes[0], dt - sum(sizes[:4])
        return *(p[channel] for p in convolution), *(p[head] for p in by_head)

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [T / CP (/ TP with sequence parallelism), b, h] -> (the same shape, no bias)."""
        if inference_context is not None:
            raise NotImplementedError("decode with `advance`, which takes and returns the state of a row")
        projected, _ = self.in_proj(hidden_states)  # [T / CP, b, width]
        if getattr(packed_seq_params, "cache", None) is not None:
            return self.out_proj(self.norm(packed_seq_params.cache.recur(packed_seq_params, self, projected)))
        whole = projected if self.cp_group.size() == 1 else self._whole_row(projected, packed_seq_params)
        documents = documents_of(packed_seq_params, whole.size(0), whole.device)
        y, _ = self.advance(whole.transpose(0, 1), documents.expand(whole.size(1), -1))
        y = y.transpose(0, 1)
        if self.cp_group.size() > 1:
            y = heads_for_tokens(y.squeeze(1).index_select(0, packed_seq_params.order), self.cp_group).unsqueeze(1)
        return self.out_proj(self.norm(y))

    def _whole_row(self, projected: torch.Tensor, packed: PackedSeqParams | None) -> torch.Tensor:
        """[T / CP, 1, width], all heads of this rank's tokens -> [T, 1, width / CP], this rank's heads of all tokens.

        Wider than that where context ranks share a group: its B and C go to each.
        """
        if not isinstance(packed, PackedDocuments):
            raise NotImplementedError("MambaMixer splits only packed rows (PackedDocuments) over context ranks")
        ranks = self.cp_group.size()
        columns = torch.cat([part for rank in range(ranks) for part in self._columns(rank)])
        by_rank = projected.squeeze(1).index_select(1, columns).unflatten(1, (ranks, -1))
        return tokens_for_heads(by_rank, self.cp_group).index_select(0, packed.order.argsort())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """mcore's keys: in_proj and conv1d in parts, so that another tensor degree can read them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        groups = dict(tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        state = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups)
        convolution = self.conv1d.state_dict(prefix="", keep_vars=True)
        state |= make_sharded_tensors_for_checkpoint(
            convolution, f"{prefix}conv1d.", dict.fromkeys(convolution, 0), sharded_offsets, **groups
        )
        for name in ("in_proj", "norm", "out_proj"):
            state |= sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        sizes = self._sizes()
        for name, parts, names in (
            ("in_proj.weight", sizes, ["z", "x", "B", "C", "dt"]),
            ("conv1d.weight", sizes[1:4], ["x", "B", "C"]),
            ("conv1d.bias", sizes[1:4], ["x", "B", "C"]),
        ):
            state[prefix + name] = _split_tensor_factory(state[prefix + name], parts, names, 0)
        return state
