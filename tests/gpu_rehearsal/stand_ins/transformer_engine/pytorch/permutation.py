"""Fused permutation of tokens for experts: names only (`moe_permute_fusion` is off)."""

from transformer_engine.stand_in import not_here


def moe_permute(inp, routing_map, num_out_tokens=-1, max_token_num=-1, map_type="mask"):
    not_here("moe_permute")


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens=-1):
    not_here("moe_permute_with_probs")


def moe_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None, map_type="mask", probs=None):
    not_here("moe_unpermute")


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    not_here("moe_sort_chunks_by_index")


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    not_here("moe_sort_chunks_by_index_with_probs")
