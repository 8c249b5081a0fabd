"""Weights in FP8: names only."""

from transformer_engine.stand_in import not_here


def replace_raw_data(tensor, new_raw_data):
    not_here("replace_raw_data")


def cast_master_weights_to_fp8(
    model_weights,
    master_weights,
    start_offsets,
    group,
    fsdp_shard_model_weights=None,
    manual_post_all_gather_processing=False,
):
    not_here("cast_master_weights_to_fp8")


def post_all_gather_processing(model_weights):
    not_here("post_all_gather_processing")
