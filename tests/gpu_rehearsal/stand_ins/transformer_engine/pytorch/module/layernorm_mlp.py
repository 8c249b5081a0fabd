"""A norm and a whole MLP in one layer: by name only, since none of megatron-core's specs has one."""

import torch

from transformer_engine.stand_in import not_here


class LayerNormMLP(torch.nn.Module):
    def __init__(
        self,
        hidden_size,
        ffn_hidden_size,
        eps=1e-5,
        sequence_parallel=False,
        return_bias=False,
        get_rng_state_tracker=None,
        tp_group=None,
        tp_size=1,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        activation="gelu",
        activation_params=None,
        output_layer_init_method=None,
        fuse_wgrad_accumulation=False,
        params_dtype=None,
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        seq_length=None,
        micro_batch_size=None,
        set_parallel_mode=False,
        zero_centered_gamma=False,
        device="cuda",
        ub_overlap_ag=False,
        name=None,
        ub_overlap_rs=False,
        ub_overlap_rs_dgrad=False,
        ub_bulk_dgrad=False,
        ub_bulk_wgrad=False,
        delay_wgrad_compute=False,
        symmetric_ar_type=None,
        checkpoint=False,
    ):
        super().__init__()
        not_here("LayerNormMLP")
