"""Mamba-2's recurrence, token by token."""

import torch
import torch.nn.functional as F


def _mamba_chunk_scan_combined_fwd(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
):
    """Return y [batch, T, heads, headdim] and the last state. A new number in seq_idx [batch, T] begins with an empty
    state; initial_states are those of number 0 (test_interpreter.py shows it of the release).
    """
    _check_shapes(x, dt, A, B, C, D, z, seq_idx)
    if cu_seqlens is not None or dt_limit != (0.0, float("inf")):
        raise NotImplementedError("the stand-in for mamba-ssm keeps no states of single documents")
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    # The release counts elements in 32 bits, and reads elsewhere beyond (state-spaces/mamba, issue 1015).
    if max(part.size(1) * part.stride(1) for part in (x, dt, B, C)) >= 2**31:
        raise NotImplementedError("the stand-in for mamba-ssm: the release overflows here")
    if initial_states is None:
        state = x.new_zeros(batch, nheads, headdim, dstate, dtype=torch.float32)
    else:
        assert initial_states.shape == (batch, nheads, headdim, dstate)
        state = initial_states.float()
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    into, out_of = (y.float().repeat_interleave(nheads // ngroups, 2) for y in (B, C))
    wide, outs = x.float(), []
    for t in range(seqlen):
        if seq_idx is not None:
            before = seq_idx[:, t - 1] if t else 0
            state = torch.where((seq_idx[:, t] == before).view(-1, 1, 1, 1), state, 0.0)
        decay = torch.exp(step[:, t] * A.float())[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", step[:, t], wide[:, t], into[:, t])
        outs.append(torch.einsum("bhpn,bhn->bhp", state, out_of[:, t]))
    y = torch.stack(outs, 1)
    if D is not None:
        y = y + wide * (D.float() if D.dim() == 2 else D.float()[:, None])
    return (y if z is None else y * F.silu(z.float())).to(x.dtype), state


def _check_shapes(x, dt, A, B, C, D, z, seq_idx):
    batch, seqlen, nheads, headdim = x.shape
    _, _, ngroups, dstate = B.shape
    assert nheads % ngroups == 0
    assert B.shape == (batch, seqlen, ngroups, dstate)
    assert x.shape == (batch, seqlen, nheads, headdim)
    assert dt.shape == (batch, seqlen, nheads)
    assert A.shape == (nheads,)
    assert C.shape == B.shape
    if z is not None:
        assert z.shape == x.shape
    if D is not None:
        assert D.shape == (nheads, headdim) or D.shape == (nheads,)
    if seq_idx is not None:
        assert seq_idx.shape == (batch, seqlen)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    if return_varlen_states:
        assert cu_seqlens is not None, "cu_seqlens must be provided if return_varlen_states is True"
        raise NotImplementedError("the stand-in for mamba-ssm keeps no states of single documents")
    y, final_states = _mamba_chunk_scan_combined_fwd(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )
    return (y, final_states) if return_final_states else y
