"""Mamba-2's convolution and recurrence over packed documents by the kernels of causal-conv1d and mamba-ssm.

`advance` is that of mamba_scan.py. What the kernels do with documents was read in the sources of the pinned releases
(megatron_ext/versions.py), and the scan was run in Triton's interpreter (tests/gpu_rehearsal/test_interpreter.py). They
have not run on a GPU yet.

* `mamba_chunk_scan_combined` takes documents and a state to start from together: the state is that of document 0. So
  documents are counted from the one that was under way, and no document may come back after another.
* `causal_conv1d_fn` takes documents or a state, not both, and documents only where channels lie next to each other and
  they and the strides are multiples of 8. So the inputs that a state holds stand before the row, as tokens of their own
  documents, in a copy that has no other columns. That makes heads a rank of any number right. (in_proj's columns end
  with a number for each head: a view of them has strides that are multiples of 8 only where heads are, and without a
  copy the kernel refuses others.) Negative documents are padding to it, whose outputs are 0: those of a state only.
* Both hold what they multiply in the dtype of the model, where mamba_scan.py has fp32. Nothing of another document
  enters a sum. But decays are differences of sums over a chunk, which other documents of the chunk round; and the
  gradients of A_log, dt_bias and conv1d are added up in any order (atomics): two runs may differ in their last bits.
* The decoding kernels, `selective_state_update` and `causal_conv1d_update`, have no gradient and change the state that
  they are given: they serve a single token where none is asked for, on a copy.

Letters of shapes: b rows, T tokens of a row, p size of a head, n size of its state.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

from megatron_ext.layers.mamba_scan import Parameters, Sizes, State, convolve, window
from megatron_ext.parallel.mamba_kernels import WIDTHS, why_torch_convolution


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """Import a kernel of mamba-ssm past the package's __init__.py: that imports models, which want names that
    transformers 5 has no more (utils/generation.py, line 14).
    """
    if "mamba_ssm" not in sys.modules and (spec := importlib.util.find_spec("mamba_ssm")) is not None:
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)  # which knows where its modules are
    return getattr(importlib.import_module(f"mamba_ssm.ops.triton.{module}"), name)


selective_state_update = _kernel("selective_state_update", "selective_state_update")
mamba_chunk_scan_combined = _kernel("ssd_combined", "mamba_chunk_scan_combined")


def advance(
    rows: torch.Tensor, documents: torch.Tensor, state: State, own: Parameters, *, sizes: Sizes
) -> tuple[torch.Tensor, State]:
    """Do what `mamba_scan.advance` does."""
    if rows.size(1) == 1 and own.weight.size(2) in WIDTHS and not torch.is_grad_enabled():
        return _decode(rows, documents, state, own, sizes)
    z, xbc, dt = sizes.columns(rows, own)
    xbc, inputs, origins = _convolve(xbc, documents, state, own)
    x, b, c = sizes.convolved(xbc, own)
    y, ssm = mamba_chunk_scan_combined(
        x,
        dt,
        A=-torch.exp(own.log_decay),
        B=b,
        C=c,
        chunk_size=sizes.chunk_size,
        D=own.skip,
        z=z.unflatten(-1, (-1, sizes.head_dim)),
        dt_bias=own.dt_bias,
        initial_states=state.ssm,
        seq_idx=(documents - state.documents[:, -1:]).int(),
        dt_softplus=True,
        return_final_states=True,
    )
    return y.flatten(-2), State(inputs, origins, ssm)


def _convolve(
    xbc: torch.Tensor, documents: torch.Tensor, state: State, own: Parameters
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolve [b, T, channels] and apply SiLU; return the state's next `inputs` and `documents` too."""
    channels, _, width = own.weight.shape
    if why_torch_convolution(channels, width):
        y, inputs, origins = convolve(xbc.to(own.weight.dtype), documents, state, own.weight.squeeze(1), own.bias)
        return F.silu(y).to(xbc.dtype), inputs.to(xbc.dtype), origins
    inputs, origins = window(xbc, documents, state)
    y = causal_conv1d_fn(
        inputs.mT, own.weight.squeeze(1), own.bias, seq_idx=origins.int(), activation="silu"
    )  # [b, channels, width - 1 + T], channels next to each other
    tokens, last = xbc.size(1), width - 1
    return y.mT[:, last:], inputs[:, tokens:].clone(), origins[:, tokens:].clone()


def _decode(
    rows: torch.Tensor, documents: torch.Tensor, state: State, own: Parameters, sizes: Sizes
) -> tuple[torch.Tensor, State]:
    """Do `advance` for one token of each row, without gradients."""
    z, xbc, dt = (columns.squeeze(1) for columns in sizes.columns(rows, own))  # [b, columns]
    other = state.documents != documents  # [b, width - 1]
    inputs = state.inputs.to(xbc.dtype).masked_fill(other[..., None], 0)
    ssm = state.ssm.masked_fill(other[:, -1, None, None, None], 0)
    xbc = causal_conv1d_update(xbc, inputs.mT, own.weight.squeeze(1), own.bias, activation="silu")
    x, b, c = sizes.convolved(xbc, own)  # [b, heads, p], [b, groups, n]
    of_head = (-1, -1, sizes.head_dim)
    y = selective_state_update(
        ssm,
        x,
        dt[..., None].expand(of_head),
        A=-torch.exp(own.log_decay)[:, None, None].expand(-1, *ssm.shape[2:]),
        B=b,
        C=c,
        D=own.skip[:, None].expand(of_head[1:]),
        z=z.unflatten(-1, (-1, sizes.head_dim)),
        dt_bias=own.dt_bias[:, None].expand(of_head[1:]),
        dt_softplus=True,
    )
    return y.flatten(1)[:, None], State(inputs, torch.cat([state.documents[:, 1:], documents], dim=1), ssm)
