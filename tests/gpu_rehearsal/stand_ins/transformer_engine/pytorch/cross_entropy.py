"""Fused cross entropy over tensor ranks: a name only (losses are ours)."""

from transformer_engine.stand_in import not_here


def parallel_cross_entropy(
    inp,
    target,
    label_smoothing=0.0,
    reduce_loss=False,
    dist_process_group=None,
    ignore_idx=-100,
    is_cg_capturable=False,
    *,
    _input=None,
):
    not_here("parallel_cross_entropy")
