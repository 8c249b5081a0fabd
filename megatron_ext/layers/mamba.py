"""Mamba-2 (Dao and Gu, arXiv 2405.21060) over packed documents, for mcore's MambaLayer.

`MambaMixer.advance` runs convolution and recurrence over segments of a row, by torch (mamba_scan.py) or by the kernels
of mamba-ssm and causal-conv1d (mamba_fused.py). Each segment is recomputed in backward, so that memory grows with the
row's length by its inputs and a state a segment, whichever kernels compute. (mamba-ssm's would keep x, B, C and y too,
10,240 columns beside the 10,304 of in_proj in Nemotron-3-Nano.) It takes and returns the state of a row, so that
decoding goes on from where a prompt ended.

Parameters, checkpoints and order of in_proj's rows [z, x, B, C, dt] are those of megatron.core.ssm.mamba_mixer, whose
place it takes in every layer spec. in_proj may hold the layer's norm (Transformer Engine's).

Letters of shapes: T tokens of a row, b rows, h hidden size, CP and TP context and tensor ranks, p size of a head, n
size of its state; "width" is that of in_proj's output on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from megatron_ext.device import device
from megatron_ext.layers import mamba_scan
from megatron_ext.layers.attention import heads_for_tokens, tokens_for_heads
from megatron_ext.layers.documents import PackedDocuments
from megatron_ext.layers.mamba_scan import Parameters, Sizes, State, working
from megatron_ext.layers.marks import marks
from megatron_ext.versions import split_tensor

# Tokens that are recomputed together, by kernels. Those of mamba-ssm want more for their many launches, and no more
# than this many: they count what lies between tokens in 32 bits, and a row of 262,144 tokens with the 10,304 columns of
# Nemotron-3-Nano is past 2^31, where they read elsewhere without a word (state-spaces/mamba, issue 1015).
SEGMENTS = {"torch": 2048, "mamba_ssm": 8192}
NO_DOCUMENT = -1


class _Segments(torch.autograd.Function):
    """Runs a function such as `mamba_scan.advance` over segments of a row, each recomputed in backward.

    The function takes rows [b, T, width], documents [b, T], a State and Parameters.

    What outlives a segment lies in buffers made before the first: small blocks kept between the temporaries of
    segments would leave holes that no later one fits into.
    """

    @staticmethod
    def forward(
        ctx: Any,
        segment: Callable[..., tuple[torch.Tensor, State]],
        size: int,
        rows: torch.Tensor,
        documents: torch.Tensor,
        *others: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        state, parameters = State(*others[:3]), Parameters(*others[3:])
        tokens = rows.size(1)
        starts = [t.new_empty(-(-tokens // size), *t.shape) for t in state]
        y: torch.Tensor | None = None
        for k, first in enumerate(range(0, tokens, size)):
            for kept, now in zip(starts, state):
                kept[k] = now
            span = slice(first, first + size)
            out, state = segment(rows[:, span], documents[:, span], state, parameters)
            if y is None:
                y = out.new_empty(rows.size(0), tokens, out.size(-1))
            y[:, span] = out
        if y is None:
            raise ValueError("a row without tokens")
        ctx.segment, ctx.size = segment, size
        ctx.save_for_backward(rows, documents, *starts, *parameters)
        ctx.mark_non_differentiable(state.documents)
        return y, *state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, *grad_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, documents, inputs, origins, ssm, *parameters = ctx.saved_tensors
        parameters = [p.detach().requires_grad_(needed) for p, needed in zip(parameters, ctx.needs_input_grad[7:])]
        trained = [p for p in parameters if p.requires_grad]
        sums = [torch.zeros_like(p) for p in trained]
        grad_rows, (grad_inputs, _, grad_ssm) = torch.empty_like(rows), grad_state
        for k in reversed(range(ssm.size(0))):
            span = slice(k * ctx.size, (k + 1) * ctx.size)
            leaves = [t.detach().requires_grad_() for t in (rows[:, span], inputs[k], ssm[k])]
            with torch.enable_grad():
                state = State(leaves[1], origins[k], leaves[2])
                y, last = ctx.segment(leaves[0], documents[:, span], state, Parameters(*parameters))
            grad_rows[:, span], grad_inputs, grad_ssm, *grads = torch.autograd.grad(
                (y, last.inputs, last.ssm), (*leaves, *trained), (grad_y[:, span], grad_inputs, grad_ssm)
            )
            for total, grad in zip(sums, grads):
                total += grad
        of_parameters = iter(sums)
        return (
            None,
            None,
            grad_rows,
            None,
            grad_inputs,
            None,
            grad_ssm,
            *(next(of_parameters) if p.requires_grad else None for p in parameters),
        )


def documents_of(packed: PackedSeqParams | None, tokens: int, target: torch.device) -> torch.Tensor:
    """Return the number of the document of each of T tokens, int64 [T]; what follows the last (padded) boundary is one
    more.
    """
    if packed is None:
        return torch.zeros(tokens, dtype=torch.int64, device=target)
    ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return torch.searchsorted(ends, torch.arange(tokens, dtype=ends.dtype, device=target), right=True)


class GatedNorm(torch.nn.Module):
    """Normalises by RMSNorm each of `groups` equal parts of the last dimension; a tensor rank holds whole groups."""

    def __init__(self, width: int, groups: int, eps: float, dtype: torch.dtype, tp_group: Any):
        super().__init__()
        self.groups, self.eps, self.tp_group = groups, eps, tp_group
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype, device=device()))
        marks(self.weight).tensor_model_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_group = x.to(working(x.dtype)).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(by_group, by_group.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


@dataclass
class MambaMixerSubmodules:
    """Names the parts that are built by spec, as mcore's class of this name does."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


def _kernels(name: str) -> Callable[..., tuple[torch.Tensor, State]]:
    """Return the `advance` of the kernels "torch" or "mamba_ssm"."""
    if name == "torch":
        return mamba_scan.advance
    if name != "mamba_ssm":
        raise ValueError(f'kernels {name!r} are neither "torch" nor "mamba_ssm"')
    from megatron_ext.layers import mamba_fused  # imports the packages

    return mamba_fused.advance


class MambaMixer(MegatronModule):
    """Takes the place of mcore's MambaMixer, without its inference contexts.

    A_log, D and dt_bias are fp32 and stay so where the model is cast to bf16. `kernels` is "torch" or "mamba_ssm"
    (parallel/mamba_kernels.py says which fit).

    Tensor parallelism splits heads and groups. Context parallelism splits a tensor rank's heads further: one
    all-to-all brings each rank the whole row for its heads, another brings back its tokens for all heads, as
    mcore's MambaContextParallel does with six.
    """

    EXACT = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        d_conv: int = 4,
        chunk_size: int = 128,
        norm_epsilon: float = 1e-5,
        layer_number: int | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        kernels: str = "torch",
        name: str | None = None,  # where in the model: megatron-core says it from 0.18 on
    ):
        super().__init__(config)
        self.kernels, self.layer_number = kernels, layer_number
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
        sizes = Sizes(self.head_dim, self.state_dim, chunk_size)
        self.segment = partial(_kernels(kernels), sizes=sizes)

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
        here, dtype, exact = device(), config.params_dtype, working(config.params_dtype)
        self.conv1d = torch.nn.Conv1d(  # holds the parameters
            channels, channels, d_conv, groups=channels, dtype=dtype, device=here
        )
        self.dt_bias = torch.nn.Parameter(torch.zeros(self.heads, dtype=exact, device=here))
        self.A_log = torch.nn.Parameter(torch.zeros(self.heads, dtype=exact, device=here))
        self.D = torch.nn.Parameter(torch.ones(self.heads, dtype=exact, device=here))
        for parameter in (*self.conv1d.parameters(), self.dt_bias, self.A_log, self.D):
            marks(parameter).tensor_model_parallel = True
        self.norm = GatedNorm(inner, self.groups, eps=norm_epsilon, dtype=config.params_dtype, tp_group=self.tp_group)
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

    def _apply(self, fn: Any, recurse: bool = True) -> "MambaMixer":
        exact = {name: getattr(self, name).data for name in self.EXACT}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            parameter = getattr(self, name)
            parameter.data = value.to(parameter.device)
        return self

    def _sizes(self) -> list[int]:
        """Return the columns of z, x, B, C and dt in in_proj's output on this tensor rank."""
        inner, states = self.heads * self.head_dim, self.groups * self.state_dim
        return [inner, inner, states, states, self.heads]

    def _columns(self, rank: int) -> list[torch.Tensor]:
        """Return those columns of z, x, B, C and dt that context rank `rank` computes with: its heads, the groups they
        use.
        """
        heads, each = self.heads // self.cp_group.size(), self.heads // self.groups
        own = slice(rank * heads, (rank + 1) * heads)
        used = slice(own.start // each, (own.stop - 1) // each + 1)
        z, x, b, c, dt = torch.arange(sum(self._sizes()), device=device()).split(self._sizes())
        by_head, by_group = (self.heads, self.head_dim), (self.groups, self.state_dim)
        parts = z.view(by_head)[own], x.view(by_head)[own], b.view(by_group)[used], c.view(by_group)[used], dt[own]
        return [part.flatten() for part in parts]

    def empty_state(self, rows: torch.Tensor) -> State:
        """Return the state before the first token of each row of `rows` [b, ...]."""
        batch, width = rows.size(0), self.conv1d.kernel_size[0]
        context = self.cp_group.size()
        channels = sum(part.numel() for part in self._columns(0)[1:4])
        shape = (batch, self.heads // context, self.head_dim, self.state_dim)
        return State(
            rows.new_zeros(batch, width - 1, channels),
            torch.full((batch, width - 1), NO_DOCUMENT, device=rows.device),
            torch.zeros(shape, dtype=working(rows.dtype), device=rows.device),
        )

    def advance(
        self, projected: torch.Tensor, documents: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, State]:
        """Run convolution, recurrence and gate over the next tokens of some rows.

        projected [b, T, width]: columns z, x, B, C, dt of this context rank's heads; documents int64 [b, T], the
        document of each token, which never comes back after another; `state` after the tokens before, or None at the
        start -> y [b, T, heads * p], state.
        """
        state = state or self.empty_state(projected)
        own = self._parameters_of_context_rank(working(projected.dtype))
        size = SEGMENTS[self.kernels]
        if projected.size(1) <= size:
            y, state = self.segment(projected, documents, state, own)
            return y, state
        y, *last = _Segments.apply(self.segment, size, projected, documents, *state, *own)
        return y, State(*last)

    def _parameters_of_context_rank(self, dtype: torch.dtype) -> Parameters:
        """Return what convolution and recurrence have for this context rank's heads, as `dtype`."""
        convolution, by_head = (
            [p.to(dtype) for p in those]
            for those in ((self.conv1d.weight, self.conv1d.get_parameter("bias")), (self.dt_bias, self.A_log, self.D))
        )
        if self.cp_group.size() == 1:
            return Parameters(*convolution, *by_head)
        _, *channels, dt = self._columns(self.cp_group.rank())
        sizes = self._sizes()
        channel, head = torch.cat(channels) - sizes[0], dt - sum(sizes[:4])
        return Parameters(*(p[channel] for p in convolution), *(p[head] for p in by_head))

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output, None) of hidden_states [T / CP (/ TP with sequence parallelism), b, h], in the same shape."""
        if inference_context is not None:
            raise NotImplementedError("decode with `advance`, which takes and returns the state of a row")
        projected, _ = self.in_proj(hidden_states)  # [T / CP, b, width]
        cache = getattr(packed_seq_params, "cache", None)
        if cache is not None:
            return self.out_proj(self.norm(cache.recur(packed_seq_params, self, projected)))
        if self.cp_group.size() == 1:
            return self.out_proj(self.norm(self._whole_documents(projected, packed_seq_params)))
        if not isinstance(packed_seq_params, PackedDocuments):
            raise NotImplementedError("MambaMixer splits only packed rows (PackedDocuments) over context ranks")
        y = self._whole_documents(self._whole_row(projected, packed_seq_params), packed_seq_params)
        y = heads_for_tokens(y.squeeze(1).index_select(0, packed_seq_params.order), self.cp_group).unsqueeze(1)
        return self.out_proj(self.norm(y))

    def _whole_documents(self, projected: torch.Tensor, packed: PackedSeqParams | None) -> torch.Tensor:
        """Run `advance` from the start over rows whose documents this rank has whole: [T, b, width] -> [T, b, ...]."""
        documents = documents_of(packed, projected.size(0), projected.device)
        y, _ = self.advance(projected.transpose(0, 1), documents.expand(projected.size(1), -1))
        return y.transpose(0, 1)

    def _whole_row(self, projected: torch.Tensor, packed: PackedDocuments) -> torch.Tensor:
        """Exchange [T / CP, 1, width], all heads of this rank's tokens -> [T, 1, width / CP], this rank's heads of all
        tokens.

        Wider than that where context ranks share a group: its B and C go to each.
        """
        ranks = self.cp_group.size()
        columns = torch.cat([part for rank in range(ranks) for part in self._columns(rank)])
        by_rank = projected.squeeze(1).index_select(1, columns).unflatten(1, (ranks, -1))
        return tokens_for_heads(by_rank, self.cp_group).index_select(0, packed.order.argsort())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return mcore's keys: in_proj and conv1d in parts, so that another tensor degree can read them."""
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
            state[prefix + name] = split_tensor(state[prefix + name], parts, names, 0)
        return state
