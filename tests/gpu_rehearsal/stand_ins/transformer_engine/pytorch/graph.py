"""CUDA graphs: names only; nothing is captured on a CPU."""

from transformer_engine.stand_in import not_here


def set_capture_start():
    not_here("set_capture_start")


def set_capture_end():
    not_here("set_capture_end")


def is_graph_capturing():
    not_here("is_graph_capturing")


def save_fp8_tensors(modules, recipe):
    not_here("save_fp8_tensors")


def restore_fp8_tensors(modules, fp8_tensors):
    not_here("restore_fp8_tensors")


def make_graphed_callables(
    modules,
    sample_args,
    num_warmup_iters=3,
    allow_unused_input=False,
    sample_kwargs=None,
    fp8_enabled=None,
    fp8_calibrating=None,
    fp8_recipe=None,
    fp8_group=None,
    fp8_weight_caching=None,
    enabled=None,
    calibrating=None,
    recipe=None,
    amax_reduction_group=None,
    cache_quantized_params=None,
    _order=None,
    _num_layers_per_chunk=None,
    pool=None,
    retain_graph_in_backward=False,
    _reuse_graph_input_output_buffers=False,
):
    not_here("make_graphed_callables")
