"""A pretended GPU: `begin` makes this process believe in one, and every tensor has the device that it would have there.

The numbers lie in host memory and are computed by the CPU's kernels; what is kept beside them is which storages are
"on the GPU". So device.py takes its way of a machine with CUDA, megatron-core is not patched, and whatever leaves a
tensor behind raises, at the operator that meets it:

* an operator whose tensors lie on two devices. CUDA lets a CPU tensor without dimensions into pointwise operators, and
  so does this. It also copies a CPU tensor of indices or a mask at each use: here that raises.
* numpy on a GPU's tensor; a collective of "nccl" over CPU tensors, or of gloo over a GPU's.
* a copy with non_blocking between pinned memory and the GPU whose memory an operator uses before anybody waited for it.
* between `torch.cuda.graph` and its end: whatever makes the host wait. A replay runs the same kernels on the same
  memory again, and raises where memory of before the recording was given back.

`events` counts what makes the host wait for the GPU: "read" (numbers come to the host: item, tolist, .cpu(), nonzero),
"send" (numbers go to the GPU from memory that is not pinned, or without non_blocking), "wait" (synchronize).

Not pretended: the order of streams, memory and its end, other kernels' rounding, more than one GPU a process.
"""

import threading

from tests.gpu_rehearsal.pretended.cuda import pretend_cuda, pretend_nccl
from tests.gpu_rehearsal.pretended.tensors import Discipline, pretend_tensors


def begin(devices: int = 1, name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0)) -> None:
    """Pretend, from now to this process's end, in all of its threads."""
    pretend_tensors()
    pretend_cuda(devices, name, capability)
    pretend_nccl()
    run = threading.Thread.run

    def disciplined(self: threading.Thread) -> None:
        with Discipline():
            run(self)

    threading.Thread.run = disciplined  # type: ignore[method-assign]
    Discipline().__enter__()
