"""The matrices of several experts in one layer. Its tokens come sorted by expert."""

import torch
import torch.nn.functional as F

from transformer_engine.pytorch.constants import GemmParallelModes
from transformer_engine.pytorch.distributed import get_distributed_world_size, set_tensor_model_parallel_attributes
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, constant, normal, unset
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.utils import divide
from transformer_engine.stand_in import not_here


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms,
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
        device="cuda",
        ub_overlap_rs=False,
        ub_overlap_ag=False,
        ub_name=None,
        delay_wgrad_compute=False,
        save_original_input=False,
        name=None,
    ):
        super().__init__()
        params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.ub_name, self.save_original_input = ub_name, save_original_input
        assert not ub_overlap_rs and not ub_overlap_ag, "GroupedLinear doesn't support Userbuffer overlap."
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, rng_tracker_name
        self.name = name
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(tp_group)
        else:
            self.tp_size = get_distributed_world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)
        if self.tp_size > 1 and bias:
            raise ValueError(
                "GroupedLinear doesn't support bias when TP > 1. "
                "Because the TP communication is handled outside of this module."
            )
        self.parallel_mode = parallel_mode
        assert self.parallel_mode in GemmParallelModes, f"parallel_mode {parallel_mode} not supported"
        if self.parallel_mode == "column":
            self.out_features = divide(self.out_features, self.tp_size)
        elif self.parallel_mode == "row":
            self.in_features = divide(self.in_features, self.tp_size)
        self.sequence_parallel = (self.tp_size > 1) and sequence_parallel
        if fuse_wgrad_accumulation or delay_wgrad_compute:
            not_here("fused or delayed gradients of GroupedLinear")
        for i in range(self.num_gemms):
            self.register_parameter(
                f"weight{i}",
                unset(self.out_features, self.in_features, device=device, dtype=params_dtype),
                init_fn=init_method or normal,
                get_rng_state_tracker=get_rng_state_tracker,
                fp8_meta_index=1 + 3 * i,
            )
            if self.use_bias:
                shift = unset(self.out_features, device=device, dtype=params_dtype)
                self.register_parameter(f"bias{i}", shift, init_fn=constant(0.0))
            else:
                setattr(self, f"bias{i}", torch.Tensor().to(dtype=params_dtype, device=device))
        self.reset_parameters(defer_init=device == "meta")

    def reset_parameters(self, defer_init=False):
        super().reset_parameters(defer_init=defer_init)
        if defer_init:
            return
        for i in range(self.num_gemms):
            weight, shift = getattr(self, f"weight{i}"), getattr(self, f"bias{i}")
            dim = 1 if self.parallel_mode == "row" else 0
            set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=dim, stride=1)
            if self.use_bias and self.parallel_mode == "row":
                shift.sequence_parallel = self.sequence_parallel
            elif self.use_bias and self.parallel_mode == "column":
                set_tensor_model_parallel_attributes(shift, True, 0, 1)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        """Multiply rows inp [tokens, in], of which m_splits[i] in turn are expert i's."""
        assert not isinstance(inp, QuantizedTensorStorage), "GroupedLinear doesn't support input tensor in FP8."
        assert len(m_splits) == self.num_gemms, "Number of splits should match number of GEMMs."
        with self.prepare_forward(inp, num_gemms=self.num_gemms) as prepared:
            in_features = self.weight0.size(1)
            if inp.size(-1) != in_features:
                raise ValueError(
                    f"Input tensor (shape={tuple(inp.size())}) is not compatible with "
                    f"weight tensor (shape={tuple(self.weight0.size())})"
                )
            shifts = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
            rows = prepared.reshape(-1, in_features).split([int(tokens) for tokens in m_splits])
            outs = [
                F.linear(part, getattr(self, f"weight{i}"), shifts[i] if self.apply_bias else None)
                for i, part in enumerate(rows)
            ]
            out = torch.cat(outs).view(-1, *inp.shape[1:-1], self.weight0.size(0))
        return (out, shifts) if self.return_bias else out
