"""Fused kernels of routers: names only (`moe_router_fusion` is off)."""

from transformer_engine.stand_in import not_here


def fused_topk_with_score_function(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
):
    not_here("fused_topk_with_score_function")


def fused_compute_score_for_moe_aux_loss(logits, topk, score_function):
    not_here("fused_compute_score_for_moe_aux_loss")


def fused_moe_aux_loss(probs, tokens_per_expert, total_num_tokens, num_experts, topk, coeff):
    not_here("fused_moe_aux_loss")
