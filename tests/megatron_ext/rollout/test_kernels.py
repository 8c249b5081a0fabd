"""Attention over blocks where they lie equals attention over blocks that were gathered."""

import inspect

import pytest
import torch

from megatron_ext.layers.sdpa import attend
from megatron_ext.rollout import kernels
from tests.megatron_ext.rounding import bound

BLOCK, GROUPS, D = 8, 2, 16


def gathered(query, keys, values, table, positions, scale, window, sinks):
    k, v = (held[table.flatten()].view(len(table), -1, GROUPS, D) for held in (keys, values))
    return attend(query, k, v, scale, window, sinks, positions)


@pytest.mark.parametrize("window", [None, 1, 11])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_sees_its_own_documents_blocks_and_no_others(window, with_sinks, dtype):
    documents, heads, most = 5, 6, 4
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    keys, values = (random(documents * most + 3, BLOCK, GROUPS, D) for _ in range(2))
    table = torch.randperm(documents * most, generator=generator).view(documents, most)
    positions = torch.tensor([[0], [BLOCK - 1], [BLOCK], [19], [most * BLOCK - 1]])
    query, sinks = random(documents, 1, heads, D), random(heads) if with_sinks else None
    found = kernels.attend_blocks(query, keys, values, table, positions, 0.3, window, sinks)
    expected = gathered(query, keys, values, table, positions, 0.3, window, sinks)
    doubled = [tensor.double() for tensor in (query, keys, values)]
    exact = gathered(*doubled, table, positions, 0.3, window, sinks.double() if with_sinks else None)
    assert found.dtype == dtype and (found - expected).abs().max() <= bound(expected, exact)
    keys[table[1]] = torch.nan  # another document's
    again = kernels.attend_blocks(query[2:], keys, values, table[2:], positions[2:], 0.3, window, sinks)
    assert torch.equal(again, found[2:])


def test_flash_attention_takes_what_it_is_given():
    flash = pytest.importorskip("flash_attn", reason="GPU only; like the shared data, not everywhere")
    names = inspect.signature(flash.flash_attn_with_kvcache).parameters
    assert {"cache_seqlens", "block_table", "softmax_scale", "causal", "window_size", "return_softmax_lse"} <= set(
        names
    )
