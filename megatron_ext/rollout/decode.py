"""Decoding: prompts in, new tokens out.

First form: greedy, no KV cache; each round runs the packed forward pass over the whole of every live sequence, in
chunks of at most `token_budget` tokens, and asks for the logits of last positions only. Right for short answers. The
paged engine will replace the inside of `generate`, not its interface.
"""

from typing import Collection, Iterator, Sequence

import numpy
import torch

from data_tools.progress import Progress, silent
from megatron_ext.device import device, plain_torch
from megatron_ext.layers.attention import packed_documents
from megatron_ext.layers.loss_head import position_logits
from megatron_ext.models.registry import unwrap

TOKEN_BUDGET = 16384  # tokens of one forward pass


def chunks(lengths: Sequence[int], budget: int) -> Iterator[range]:
    """Consecutive indices whose lengths add up to at most `budget`; a longer one is alone."""
    first, tokens = 0, 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > budget:
            yield range(first, i)
            first, tokens = i, 0
        tokens += length
    if lengths:
        yield range(first, len(lengths))


def next_logits(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [sequences, vocabulary] of the token that follows each sequence, the same on all tensor ranks."""
    ends = numpy.cumsum([len(sequence) for sequence in sequences])
    config = unwrap(model).config
    filler = -int(ends[-1]) % config.tensor_model_parallel_size if config.sequence_parallel else 0
    ids = numpy.fromiter((token for sequence in sequences for token in sequence), numpy.int64, int(ends[-1]))
    cu_seqlens = numpy.concatenate([[0], ends])
    if filler:  # sequence parallelism shards rows evenly: a document of its own fills up
        ids = numpy.concatenate([ids, numpy.zeros(filler, numpy.int64)])
        cu_seqlens = numpy.append(cu_seqlens, len(ids))
    target = device()
    documents = packed_documents(cu_seqlens, target)
    with plain_torch():
        return position_logits(
            model,
            torch.from_numpy(ids)[None].to(target),
            documents.positions[None],
            documents,
            torch.from_numpy(ends - 1).to(target),
        )


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    *,
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = silent,
) -> list[list[int]]:
    """Greedy continuation of each prompt: at most `max_new_tokens` tokens, ending with a stop token if one came.

    Tensor ranks pass the same prompts and get the same tokens; data ranks may pass different ones. Raises ValueError
    for an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without tokens has no last position to continue from")
    was_training = model.training
    model.eval()
    stops = frozenset(stop_ids)
    sequences = [list(prompt) for prompt in prompts]
    live = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: fewer buckets a chunk
    for round_ in range(max_new_tokens):
        if not live:
            break
        progress(len(prompts) - len(live), len(prompts), "prompts", f"{round_} tokens")
        chosen: list[int] = []
        for part in chunks([len(sequences[i]) for i in live], token_budget):
            logits = next_logits(model, [sequences[live[j]] for j in part])
            chosen += logits.argmax(dim=-1).tolist()
        for i, token in zip(live, chosen):
            sequences[i].append(token)
        live = [i for i, token in zip(live, chosen) if token not in stops]
    progress(len(prompts), len(prompts), "prompts")
    model.train(was_training)
    return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts)]
