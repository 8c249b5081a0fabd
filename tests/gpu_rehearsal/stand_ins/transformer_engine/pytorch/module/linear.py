"""A matrix, whole or split over tensor ranks."""

import torch
import torch.nn.functional as F

from transformer_engine.pytorch.constants import GemmParallelModes
from transformer_engine.pytorch.distributed import (
    after_rows,
    before_columns,
    get_distributed_world_size,
    set_tensor_model_parallel_attributes,
)
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, constant, normal, unset
from transformer_engine.pytorch.utils import divide
from transformer_engine.stand_in import not_here


class Matrix(TransformerEngineBaseModule):
    """What Linear and LayerNormLinear share here."""

    def split_over(self, tp_group, tp_size):
        """Take the group whose ranks share the matrix, or its size where the group comes later."""
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(tp_group)
        else:
            self.tp_size = get_distributed_world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)
        if self.parallel_mode == "column":
            self.out_features = divide(self.out_features, self.tp_size)
        elif self.parallel_mode == "row":
            self.in_features = divide(self.in_features, self.tp_size)

    def make_matrix(self, device, dtype, init_method, get_rng_state_tracker):
        weight = unset(self.out_features, self.in_features, device=device, dtype=dtype)
        self.register_parameter(
            "weight",
            weight,
            init_fn=init_method or normal,
            get_rng_state_tracker=get_rng_state_tracker,
            fp8_meta_index=1,
        )
        if self.use_bias:
            bias = unset(self.out_features, device=device, dtype=dtype)
            self.register_parameter("bias", bias, init_fn=constant(0.0))
        else:
            self.bias = torch.Tensor().to(dtype=dtype, device=device)

    def mark_matrix(self):
        set_tensor_model_parallel_attributes(
            tensor=self.weight, is_parallel=True, dim=1 if self.parallel_mode == "row" else 0, stride=1
        )
        if self.use_bias:
            if self.parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            elif self.parallel_mode == "column":
                set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def multiply(self, inp):
        """Multiply the last dimension; with `return_bias`, also give the bias that the caller adds."""
        in_features = self.weight.size(1)
        assert inp.shape[-1] == in_features, "GEMM not possible"
        split = self.tp_size > 1
        if self.parallel_mode == "column" and split:
            inp = before_columns(inp, self.tp_group, self.sequence_parallel)
        own_bias = self.bias if self.apply_bias and not (self.parallel_mode == "row") else None
        out = F.linear(inp, self.weight, own_bias)
        if self.parallel_mode == "row" and split:
            out = after_rows(out, self.tp_group, self.sequence_parallel)
        if self.apply_bias and self.parallel_mode == "row":
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class Linear(Matrix):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, rng_tracker_name
        self.symmetric_ar_type, self.save_original_input = symmetric_ar_type, save_original_input
        self.name = name
        if device == "meta":
            assert parameters_split is None, "Cannot split module parameters on 'meta' device."
        self.parallel_mode = parallel_mode
        assert self.parallel_mode in GemmParallelModes, f"parallel_mode {parallel_mode} not supported"
        self.split_over(tp_group, tp_size)
        self.sequence_parallel = (self.tp_size > 1) and sequence_parallel
        overlaps = [ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad]
        if any([*overlaps, fuse_wgrad_accumulation, parameters_split, delay_wgrad_compute, symmetric_ar_type]):
            not_here("overlaps, split parameters and fused or delayed gradients of Linear")
        self.ub_name = ub_name
        self.make_matrix(device, params_dtype, init_method, get_rng_state_tracker)
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init=defer_init)
        if not defer_init:
            self.mark_matrix()

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        with self.prepare_forward(inp) as prepared:
            return self.multiply(prepared)
