"""Asks the node it runs on whether it is fit for a job: its GPUs, their errors and clocks, NCCL, the site's commands.

    srun --ntasks-per-node=1 python -m jobs.health --gpus 8 --ecc --min-clock-mhz 1500 --all-reduce --command "..."

The batch script runs it before the ranks start, where a profile says hooks.health. A node that fails is named in the
job's log (launchers/causes/log_lines.py reads it), and the job runs again without that node.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

EXIT_UNHEALTHY = 8
FAILED_ON = "health check failed on node"
FIELDS = (
    "index", "ecc.errors.uncorrected.volatile.total", "clocks.max.sm",
    "clocks_throttle_reasons.hw_thermal_slowdown", "clocks_throttle_reasons.hw_power_brake_slowdown",
)  # fmt: skip
QUERY = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
ELEMENTS = 1 << 20  # of the tensor that all GPUs add up


def run(command: list[str], limit_s: float) -> tuple[int | None, str]:
    """Return the exit code of a command (None: it did not end, or there is none) and what it said.

    What it leaves behind is not waited for, nor one that no signal ends since it hangs in a driver.
    """
    with os.fdopen(os.memfd_create("said"), "r+b") as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, f"no answer within {limit_s:g} s"
        except OSError as error:
            return None, str(error.strerror)
        said.seek(0)
        return code, said.read().decode(errors="replace")


def gpu_problems(printed: str, gpus: int, ecc: bool, min_clock_mhz: int | None) -> list[str]:
    """Return what is wrong with the GPUs that nvidia-smi printed with QUERY; fields it does not know are none."""
    rows = [[cell.strip() for cell in line.split(",")] for line in printed.splitlines() if line.strip()]
    found = [] if len(rows) >= gpus else [f"{len(rows)} GPUs, not {gpus}"]
    for row in rows:
        if len(row) != len(FIELDS):
            found.append(f"nvidia-smi said {','.join(row)!r}")
            continue
        index, errors, clock, hot, braked = row
        if ecc and errors.isdigit() and int(errors):
            found.append(f"GPU {index} has {errors} uncorrected ECC errors")
        if min_clock_mhz is not None and clock.isdigit() and int(clock) < min_clock_mhz:
            found.append(f"GPU {index} runs at {clock} MHz at most, less than {min_clock_mhz}")
        if min_clock_mhz is not None:
            reasons = (("heat", hot), ("its power supply", braked))
            found += [f"GPU {index} is slowed down by {why}" for why, is_on in reasons if is_on == "Active"]
    return found


def all_reduce_problem(limit_s: float) -> str:
    """Return why the node's GPUs cannot add up a tensor by NCCL, "" where they can.

    Where they do not within the limit, that is told at once and this process ends: nothing else leaves CUDA's calls.
    """
    import torch

    def give_up() -> None:
        _tell([f"NCCL's all-reduce: no answer within {limit_s:g} s"])
        os._exit(EXIT_UNHEALTHY)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        return _all_reduce(torch)
    finally:
        timer.cancel()


def _all_reduce(torch: Any) -> str:
    """Return what all_reduce_problem does, whenever it ends."""
    count = torch.cuda.device_count()
    if not count:
        return "torch sees no GPU"
    try:
        tensors = [torch.full((ELEMENTS,), float(rank + 1), device=f"cuda:{rank}") for rank in range(count)]
        torch.cuda.nccl.all_reduce(tensors)
        wrong = [rank for rank, tensor in enumerate(tensors) if not bool((tensor == count * (count + 1) / 2).all())]
    except Exception as error:  # whatever CUDA and NCCL raise condemns the node
        return f"NCCL's all-reduce of {count} GPUs: {' '.join(str(error).split())[:200]}"
    return f"NCCL's all-reduce gave GPUs {wrong} a wrong sum" if wrong else ""


def problems(args: argparse.Namespace) -> list[str]:
    """Return all that is wrong with this node."""
    found = []
    if args.gpus or args.ecc or args.min_clock_mhz is not None:
        code, said = run(QUERY, args.limit_s)
        if code != 0:
            found.append(f"nvidia-smi: {' '.join(said.split())[:200] or f'exit code {code}'}")
        else:
            found += gpu_problems(said, gpus=args.gpus, ecc=args.ecc, min_clock_mhz=args.min_clock_mhz)
    for command in args.command:
        code, said = run(["/bin/bash", "-c", command], args.limit_s)
        if code != 0:
            ended = "" if code is None else f" (exit code {code})"
            found.append(f"`{command}`: {' '.join(said.split())[:200] or 'it said nothing'}{ended}")
    if args.all_reduce and not found:
        found += filter(None, [all_reduce_problem(args.limit_s)])
    return found


def _tell(found: list[str]) -> None:
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(f"afterok: {FAILED_ON} {node}: {'; '.join(found)}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print what is wrong with this node, one line with its name; return EXIT_UNHEALTHY where anything is."""
    parser = argparse.ArgumentParser(prog="python -m jobs.health", description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=0, help="so many at the least")
    parser.add_argument("--ecc", action="store_true", help="no uncorrected error of memory")
    parser.add_argument("--min-clock-mhz", type=int, help="no GPU is limited to less, or slowed down")
    parser.add_argument("--all-reduce", action="store_true", help="its GPUs add up a tensor by NCCL")
    parser.add_argument("--command", action="append", default=[], help="ends with 0; more than once for several")
    parser.add_argument("--limit-s", type=float, default=60.0, help="of each command and of the all-reduce, in seconds")
    found = problems(parser.parse_args(argv))
    if found:
        _tell(found)
    return EXIT_UNHEALTHY if found else 0


if __name__ == "__main__":
    sys.exit(main())
