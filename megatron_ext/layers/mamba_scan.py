"""The recurrence of Mamba-2 over packed documents, and the convolution before it: functions without parameters.

Per head, with input x [p], step dt > 0, decay A < 0 and vectors B, C [n], a document's state S [p, n] starts at 0 and

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

`scan` computes it in chunks of tokens: inside a chunk as a masked matrix product, between chunks by passing the state
on. Before it, `convolve` makes x, B and C of the last few tokens. `advance` is both, with the gate; mamba_fused.py has
it by the kernels of mamba-ssm and causal-conv1d.

Isolation is exact. Where a document starts, decays are summed anew: nothing of another document enters even by
rounding, and what is masked is multiplied by zero in both directions.

Letters of shapes: B (or b) rows, T tokens of a row, k chunks of a row, size tokens of a chunk, p size of a head, n size
of its state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and decays: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class State(NamedTuple):
    """Holds what the next token needs of those before it, for b rows. SSM states are fp32, or fp64 for fp64 inputs."""

    inputs: torch.Tensor  # [b, width - 1, channels], what the convolution saw last
    documents: torch.Tensor  # int64 [b, width - 1], the documents of those tokens
    ssm: torch.Tensor  # [b, heads, p, n]


class Parameters(NamedTuple):
    """Holds the parameters of convolution and recurrence for the heads of one rank, of the dtype of `working`."""

    weight: torch.Tensor  # [channels, 1, width]
    bias: torch.Tensor  # [channels]
    dt_bias: torch.Tensor  # [heads]
    log_decay: torch.Tensor  # [heads], A_log
    skip: torch.Tensor  # [heads], D


class Sizes(NamedTuple):
    """Says how columns split into heads and groups, and how many tokens `scan` takes at once."""

    head_dim: int  # p
    state_dim: int  # n
    chunk_size: int

    def columns(self, rows: torch.Tensor, own: Parameters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split in_proj's columns [b, T, width] into z, what is convolved (x, B and C), and dt."""
        heads = own.dt_bias.numel()
        z, xbc, dt = rows.split([heads * self.head_dim, own.bias.numel(), heads], dim=-1)
        return z, xbc, dt

    def convolved(self, xbc: torch.Tensor, own: Parameters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split what was convolved [b, T, channels] into x [b, T, heads, p], B and C [b, T, groups, n]."""
        inner = own.dt_bias.numel() * self.head_dim
        states = (own.bias.numel() - inner) // 2
        x, b, c = xbc.split([inner, states, states], dim=-1)
        return (
            x.unflatten(-1, (-1, self.head_dim)),
            b.unflatten(-1, (-1, self.state_dim)),
            c.unflatten(-1, (-1, self.state_dim)),
        )


def advance(
    rows: torch.Tensor, documents: torch.Tensor, state: State, own: Parameters, *, sizes: Sizes
) -> tuple[torch.Tensor, State]:
    """Run convolution, recurrence and gate over the next tokens of some rows.

    rows [b, T, width] of in_proj, columns z, x, B, C, dt; documents int64 [b, T], the document of each token; `state`
    after the tokens before -> y [b, T, heads * p], state.
    """
    z, xbc, dt = sizes.columns(rows.to(own.weight.dtype), own)
    xbc, inputs, origins = convolve(xbc, documents, state, own.weight.squeeze(1), own.bias)
    x, b, c = sizes.convolved(F.silu(xbc), own)
    y, ssm = scan(
        x,
        F.softplus(dt + own.dt_bias),
        decay=-torch.exp(own.log_decay),
        b=b,
        c=c,
        documents=documents,
        state=state.ssm,
        before=state.documents[:, -1],
        chunk_size=sizes.chunk_size,
    )
    y = (y + x * own.skip[:, None]).flatten(-2) * F.silu(z)
    return y.to(rows.dtype), State(inputs.to(rows.dtype), origins, ssm)


def window(x: torch.Tensor, documents: torch.Tensor, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [b, T, channels] with the inputs before it [b, width - 1 + T, channels], and the documents of both."""
    return torch.cat([state.inputs.to(x.dtype), x], dim=1), torch.cat([state.documents, documents], dim=1)


def convolve(
    x: torch.Tensor, documents: torch.Tensor, state: State, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolve causally within documents, each channel by itself.

    x [b, T, channels], documents int64 [b, T], weight [channels, width], bias [channels] -> output like x, and the
    state's next `inputs` and `documents`.
    """
    tokens, last = x.size(1), weight.size(1) - 1
    inputs, origins = window(x, documents, state)
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
    """Compute the recurrence of this module's docstring without D, over documents, chunk by chunk.

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
    same = documents[..., :, None] == documents[..., None, :]  # [B, k, size, size]
    after = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
    spans = steps[..., :, None].masked_fill(~(same & after)[:, :, None], 0).cumsum(dim=-2)
    within = spans.masked_fill(~(same & ~after.T)[:, :, None], -torch.inf).exp()  # [B, k, heads, i, j]
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
