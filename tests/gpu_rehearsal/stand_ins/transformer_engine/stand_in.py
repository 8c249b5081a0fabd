"""What this package is: Transformer Engine 2.11 in plain torch, for tests on a machine without a GPU.

Names, parameters, assertions and the choice of an attention kernel are the release's, which
tests/gpu_rehearsal/test_sources.py compares with its wheel; what they compute is written anew, slowly and for the CPU.
Beyond that nothing is promised: no FP8, no fused weight gradients, no overlap of communication.
"""

from typing import NoReturn

import torch


def not_here(name: str) -> NoReturn:
    """Refuse what the rehearsal has by name only."""
    raise NotImplementedError(f"the stand-in for Transformer Engine has {name} by name only")


def attend(query, key, value, *, bounds, left, scale, sinks=None):
    """Attend document by document in fp32: query [T, heads, d], key and value [T, groups, d] -> [T, heads * d].

    `bounds` are the documents' ends, the first 0; `left`: tokens that one sees before it, -1 for all.
    """
    outs = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        k, v = (x.repeat_interleave(q.size(0) // x.size(0), 0) for x in (k, v))
        place = torch.arange(end - start)
        hidden = place[None] > place[:, None]
        if left >= 0:
            hidden |= place[None] < place[:, None] - left
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, end - start, 1)], -1)
        outs.append((scores.softmax(-1)[..., : end - start] @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outs).flatten(1)
