"""The recurrence of Mamba-2 over packed documents, and the convolution before it: functions without parameters.

Per head, with input x [p], step dt > 0, decay A < 0 and vectors B, C [n], a document's state S [p, n] starts at 0 and

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

`scan` computes it in chunks of tokens: inside a chunk as a masked matrix product, between chunks by passing the state
on. Before it, `convolve` makes x, B and C of the last few tokens.

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


def convolve(
    x: torch.Tensor, documents: torch.Tensor, state: State, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolve causally within documents, each channel by itself.

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
