"""A norm and a matrix in one layer."""

import torch
import torch.nn.functional as F

from transformer_engine.pytorch.constants import GemmParallelModes
from transformer_engine.pytorch.module.base import constant, unset
from transformer_engine.pytorch.module.linear import Matrix
from transformer_engine.stand_in import not_here


class LayerNormLinear(Matrix):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        parameters_split=None,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_wgrad=False,
        ub_bulk_dgrad=False,
        ub_name=None,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        name=None,
    ):
        super().__init__()
        params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.normalization = normalization
        assert normalization in ["LayerNorm", "RMSNorm"], "Unsupported normalization type!"
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.return_layernorm_output, self.zero_centered_gamma = return_layernorm_output, zero_centered_gamma
        self.symmetric_ar_type, self.name = symmetric_ar_type, name
        self.parallel_mode = parallel_mode
        assert self.parallel_mode in GemmParallelModes, f"parallel_mode {parallel_mode} not supported"
        self.split_over(tp_group, tp_size)
        self.sequence_parallel = (self.tp_size > 1) and sequence_parallel
        overlaps = [ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad]
        outputs = [return_layernorm_output, return_layernorm_output_gathered]
        if any([*overlaps, *outputs, fuse_wgrad_accumulation, parameters_split, delay_wgrad_compute]):
            not_here("overlaps, split parameters, two outputs and fused gradients of LayerNormLinear")
        self.ub_name = ub_name
        self.eps = eps
        scale = unset(self.in_features, device=device, dtype=params_dtype)
        self.register_parameter("layer_norm_weight", scale, init_fn=constant(float(not zero_centered_gamma)))
        self.layer_norm_bias: torch.nn.Parameter | None
        if self.normalization != "RMSNorm":
            shift = unset(self.in_features, device=device, dtype=params_dtype)
            self.register_parameter("layer_norm_bias", shift, init_fn=constant(0.0))
        else:
            self.layer_norm_bias = None
        self.make_matrix(device, params_dtype, init_method, get_rng_state_tracker)
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init=defer_init)
        if not defer_init:
            self.layer_norm_weight.sequence_parallel = self.sequence_parallel
            if self.normalization != "RMSNorm":
                self.layer_norm_bias.sequence_parallel = self.sequence_parallel
            self.mark_matrix()

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        with self.prepare_forward(inp) as prepared:
            weight = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
            shape = prepared.shape[-1:]
            if self.layer_norm_bias is None:
                return self.multiply(F.rms_norm(prepared, shape, weight, self.eps))
            return self.multiply(F.layer_norm(prepared, shape, weight, self.layer_norm_bias, self.eps))
