"""Runs mamba-ssm's own Triton kernels on the CPU, in Triton's interpreter, and prints what they gave as JSON.

python -m tests.gpu_rehearsal.interpreted SOURCES, with TRITON_INTERPRET=1, where SOURCES has the folder mamba_ssm of
the release. Bypassed are the package's __init__, which imports compiled extensions, the choice of a CUDA device, and
the trial of block sizes. causal-conv1d, which is C++, is the stand-in. Without a GPU factors are not rounded to TF32.
"""

import contextlib
import importlib
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ext.layers import mamba_scan
from megatron_ext.layers.mamba_scan import Parameters, Sizes, State
from tests.gpu_rehearsal.pool import STAND_INS
from tests.megatron_ext.rounding import bound

HEADS, GROUPS, SIZES = 4, 2, Sizes(head_dim=8, state_dim=4, chunk_size=16)
CHANNELS = HEADS * SIZES.head_dim + 2 * GROUPS * SIZES.state_dim
LENGTHS = (5, 9, 1, 20, 13)  # tokens of the documents; the first is under way before the row
Values = dict[str, torch.Tensor]


def prepare(sources: Path) -> None:
    """Make the release's kernels importable, and let them run where there is no GPU."""
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(sources / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    sys.path.insert(0, str(STAND_INS))
    importlib.import_module("causal_conv1d")
    sys.path.remove(str(STAND_INS))
    torch.cuda.device = lambda index: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=1)
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **named: Any) -> Any:
        self.best_config = config = self.configs[0]
        if config.pre_hook:
            config.pre_hook({**dict(zip(self.arg_names, args)), **named, **config.all_kwargs()})
        return self.fn.run(*args, **named, **config.all_kwargs())

    Autotuner.run = run


def given(dtype: torch.dtype, before: int = 0) -> tuple[torch.Tensor, torch.Tensor, State, Parameters]:
    """Return columns of a row, its documents, the state before it, of document `before`, and parameters."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    documents = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    rows = random(1, documents.size(1), HEADS * (SIZES.head_dim + 1) + CHANNELS)
    inputs, ssm = random(1, 3, CHANNELS), random(1, HEADS, SIZES.head_dim, SIZES.state_dim)
    own = Parameters(random(CHANNELS, 1, 4), random(CHANNELS), random(HEADS), random(HEADS), random(HEADS))
    return rows, documents, State(inputs, torch.full((1, 3), before), ssm), own


def by_row_sums(
    rows: torch.Tensor, documents: torch.Tensor, state: State, own: Parameters, *, sizes: Sizes
) -> tuple[torch.Tensor, State]:
    """Do `mamba_scan.advance` by sums of decays over the whole row, whose differences are taken: what the kernels do
    in each chunk, and so with no less rounding than theirs.
    """
    z, xbc, dt = sizes.columns(rows, own)
    xbc, inputs, origins = mamba_scan.convolve(xbc, documents, state, own.weight.squeeze(1), own.bias)
    x, b, c = sizes.convolved(F.silu(xbc), own)
    b, c = (t.repeat_interleave(HEADS // GROUPS, dim=2) for t in (b, c))
    dt = F.softplus(dt + own.dt_bias)
    sums = (-dt * own.log_decay.exp()).cumsum(1)  # [b, T, heads]
    same = documents[:, :, None] == documents[:, None, :]
    causal = (same & torch.ones_like(same[0]).tril())[..., None]
    spans = (sums[:, :, None] - sums[:, None, :]).masked_fill(~causal, -torch.inf).exp()  # [b, i, j, heads]
    inherits = (documents == state.documents[:, -1:])[..., None] * sums.exp()  # [b, T, heads]
    y = torch.einsum("bihn,bjhn,bijh,bjh,bjhp->bihp", c, b, spans, dt, x)
    y = y + torch.einsum("bihn,bih,bhpn->bihp", c, inherits, state.ssm)
    last = torch.einsum("bjhn,bjh,bjh,bjhp->bhpn", b, spans[:, -1], dt, x)
    last = last + inherits[:, -1, :, None, None] * state.ssm
    y = (y + x * own.skip[:, None]).flatten(-2) * F.silu(z)
    return y, State(inputs, origins, last)


def of_row(advance: Any, dtype: torch.dtype, before: int = 0) -> Values:
    """Return output, last state and gradients of a row, whose loss is of all outputs and of the last state."""
    rows, documents, state, own = given(dtype, before)
    of = {"rows": rows, "state": state.ssm, "inputs": state.inputs, **own._asdict()}
    for leaf in of.values():
        leaf.requires_grad_()
    y, last = advance(rows, documents, state, own, sizes=SIZES)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    grads = torch.autograd.grad((y * weights).sum() + last.ssm.square().sum(), list(of.values()))
    return {"y": y.detach(), "last state": last.ssm.detach(), **{f"d {name}": grad for name, grad in zip(of, grads)}}


def differences(found: Values, expected: Values, before: int = 0) -> dict[str, float]:
    """Return by name how far `found` is from `expected` in units of what rounding explains."""
    single, double = (of_row(by_row_sums, dtype, before) for dtype in (torch.float32, torch.float64))
    result = {}
    for name, value in found.items():
        explained = bound(single[name], double[name])  # 0 where the exact value is
        far = (value - expected[name]).abs().max().item()
        result[name] = far / explained if explained else math.inf if far else 0.0
    return result


def reached(advance: Any) -> list[list[bool]]:
    """Return [document]: whether its outputs have a gradient by both parts of the state before the row, and by each
    document.
    """
    rows, documents, state, own = given(torch.float32)
    leaves = [rows.requires_grad_(), state.ssm.requires_grad_(), state.inputs.requires_grad_()]
    y, _ = advance(rows, documents, state, own, sizes=SIZES)
    found = []
    for number in range(len(LENGTHS)):
        of_rows, *of_state = torch.autograd.grad(y[documents == number].square().sum(), leaves, retain_graph=True)
        by = [bool(of_rows[documents == other].any()) for other in range(len(LENGTHS))]
        found.append([*(bool(grad.any()) for grad in of_state), *by])
    return found


def decoding(fused: Any) -> float:
    """Return how far one token by the decoding kernels is from torch's, in units of what rounding explains."""
    results = []
    for advance, dtype in ((fused, torch.float32), (mamba_scan.advance, torch.float32), (by_row_sums, torch.float64)):
        rows, documents, state, own = given(dtype)
        with torch.no_grad():
            y, last = advance(rows[:, :1], documents[:, :1], state, own, sizes=SIZES)
        results.append(torch.cat([y.flatten(), last.ssm.flatten(), last.inputs.flatten()]))
    theirs, ours, exact = results
    return (theirs - ours).abs().max().item() / bound(ours, exact)


def in_half(fused: Any) -> dict[str, float]:
    """Return how far the kernels are from torch's in fp16, in units of its rounding of the largest value.

    Rows, convolved inputs and outputs are fp16, states and parameters fp32, as in training; the interpreter cannot
    multiply bfloat16.
    """
    results = []
    for advance in (fused, mamba_scan.advance):
        rows, documents, state, own = given(torch.float32)
        state = State(state.inputs.half(), state.documents, state.ssm)
        leaves = {"rows": rows.half(), "state": state.ssm, "inputs": state.inputs, **own._asdict()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y, last = advance(leaves["rows"], documents, state, own, sizes=SIZES)
        loss = y.float().square().mean() + last.ssm.square().mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append({"y": y, "last state": last.ssm, **dict(zip(leaves, grads))})
    theirs, ours = results
    assert all(theirs[name].dtype == ours[name].dtype for name in ours)
    unit = torch.finfo(torch.float16).eps
    return {
        name: ((theirs[name].float() - ours[name].float()).abs().max() / ours[name].float().abs().max() / unit).item()
        for name in ours
    }


def main(sources: Path) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    prepare(sources)
    from megatron_ext.layers import mamba_fused

    ours, theirs = (of_row(advance, torch.float32) for advance in (mamba_scan.advance, mamba_fused.advance))
    fresh = [of_row(advance, torch.float32, before=-1) for advance in (mamba_scan.advance, mamba_fused.advance)]
    found = {
        "documents after a state": differences(theirs, ours),
        "documents after a state of none": differences(fresh[1], fresh[0], before=-1),
        "state of none": [bool(fresh[1][name].any()) for name in ("d state", "d inputs")],
        "reached": reached(mamba_fused.advance),
        "in half": in_half(mamba_fused.advance),
        "decoding": decoding(mamba_fused.advance),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
