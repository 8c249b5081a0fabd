"""Forward and backward of the chunked loss head beside the plain one, which builds all logits: time and extra memory.

    python -m tests.benchmarks.loss_head [--hidden 512] [--lengths 32768]

Vocabulary 151,936, fp32, one thread. Memory is resident memory at its peak over what hidden states and weight hold, and
so includes the gradients of both; each measurement runs in a fresh process.
"""

import argparse
import json
import multiprocessing
import statistics
import time

VOCABULARY, BESIDE = 151_936, 4_096


def measure(kind: str, tokens: int, hidden_size: int, repeats: int) -> tuple[float, float]:
    """CPU seconds, the median, and MiB."""
    import torch

    from megatron_ext import device
    from megatron_ext.parallel import ranks

    torch.set_num_threads(1)
    device.init_device()
    from megatron_ext.layers.loss_head import Targets, token_losses
    from megatron_ext.parallel.plan import ParallelPlan
    from tests.benchmarks.pack import grown

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")

    def chunked() -> torch.Tensor:
        return token_losses(hidden, weight, Targets(labels), VOCABULARY, torch.distributed.group.WORLD)

    def step(head) -> None:
        hidden.grad = weight.grad = None
        head().sum().backward()

    with ranks.started(ParallelPlan(), seed=1):
        weight = torch.randn(VOCABULARY, hidden_size).mul_(0.02).requires_grad_()
        labels = torch.randint(VOCABULARY, (tokens,))
        hidden = torch.randn(8, hidden_size, requires_grad=True)
        all_labels, labels = labels, labels[:8]
        step(plain), step(chunked)  # libraries load
        hidden, labels = torch.randn(tokens, hidden_size, requires_grad=True), all_labels
        weight.grad = None
        head = {"ours": chunked, "peer": plain}[kind]
        times, peaks = [], []
        for _ in range(repeats):
            hidden.grad = weight.grad = None
            start = time.process_time()  # not of the machine's other work
            peaks.append(grown(step, head))
            times.append(time.process_time() - start)
        return statistics.median(times), max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--lengths", default="32768", help="tokens, ours alone")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    runs = [(kind, BESIDE, args.repeats) for kind in ("peer", "ours")]
    runs += [("ours", int(tokens), 1) for tokens in args.lengths.split(",") if tokens]
    found = {}
    for kind, tokens, repeats in runs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[kind, tokens] = seconds, mib = pool.apply(measure, (kind, tokens, args.hidden, repeats))
        print(f"{kind} {tokens:6,} tokens: {seconds:7.2f} s CPU, {mib:8,.0f} MiB", flush=True)
    (ours_s, ours), (peer_s, peer) = found["ours", BESIDE], found["peer", BESIDE]
    print(
        json.dumps(
            {
                "name": "loss_head",
                "ours": round(ours),
                "peer": round(peer),
                "ratio": round(peer / ours, 2),
                "unit": "MiB",
                "time_ratio": round(ours_s / peer_s, 2),
                "alone_mib": {tokens: round(found["ours", tokens][1]) for _, tokens, _ in runs[2:]},
            }
        )
    )


if __name__ == "__main__":
    main()
