"""Recognizes ends for want of memory, of a GPU or of the host."""

from jobs.retry import Cause
from launchers.causes.evidence import Diagnosis, Evidence
from launchers.causes.log_lines import ENGINE_MEMORY_LINE, GPU_MEMORY_LINE, HOST_MEMORY_LINE


def gpu_memory(e: Evidence) -> Diagnosis | None:
    """Tell of a rank that PyTorch refused memory of its GPU, or of vLLM's engine, which found too little to start."""
    if line := e.find(ENGINE_MEMORY_LINE):
        lower = "max_model_len, max_num_seqs; or raise gpu_memory_utilization where nothing else is on the GPU"
        what = f"lower what vLLM holds ({e.phase}.with.vllm: {lower})"
        return Diagnosis(Cause.GPU_MEMORY, "ran out of GPU memory", line, f"{what}, or spread it by parallel.tensor")
    if not (line := e.find(GPU_MEMORY_LINE)):
        return None
    return Diagnosis(
        Cause.GPU_MEMORY,
        "ran out of GPU memory",
        line,
        f"lower what one GPU holds (micro-batch, pack length, recomputation), or spread {e.phase} over more GPUs",
    )


def host_memory(e: Evidence, line: str, certain: bool = True) -> Diagnosis:
    """Return the diagnosis of an element that the host had no memory for; `line` shows it."""
    remedy = f"raise {e.phase}.resources.mem_gib" + (f" above {e.asked_memory}" if e.asked_memory else "")
    if certain:
        return Diagnosis(Cause.HOST_MEMORY, "ran out of host memory", line, remedy)
    return Diagnosis(
        Cause.HOST_MEMORY,
        "was killed by signal 9 without a word, most likely out of host memory",
        line,
        f"{remedy} unless somebody killed it (the node's `dmesg` tells)",
        certain=False,
    )


def host_memory_in_log(e: Evidence) -> Diagnosis | None:
    """Tell of a process whose log says that the host had no memory for it."""
    line = e.find(HOST_MEMORY_LINE)
    return host_memory(e, line) if line else None
