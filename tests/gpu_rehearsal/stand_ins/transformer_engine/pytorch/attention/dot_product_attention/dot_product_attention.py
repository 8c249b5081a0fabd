"""Attention over packed documents, and over rows."""

import math

import torch
import torch.distributed as dist

from transformer_engine.pytorch.attention.dot_product_attention import utils as dpa_utils
from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import attn_forward_func_with_cp
from transformer_engine.pytorch.constants import AttnMaskTypes, AttnTypes
from transformer_engine.pytorch.distributed import get_distributed_world_size, set_all_rng_states
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.stand_in import attend, not_here


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        self.qkv_format = qkv_format
        self.attn_mask_type = attn_mask_type.replace(",", "_")
        if self.attn_mask_type == "causal_padding":
            self.attn_mask_type = "padding_causal"
        self.window_size = dpa_utils.check_set_window_size(self.attn_mask_type, window_size)
        if tp_group is None:
            self.tp_size = tp_size
            if tp_size == 1:
                self.set_tensor_parallel_group(tp_group)
        else:
            self.tp_size = get_distributed_world_size(tp_group)
            self.set_tensor_parallel_group(tp_group)
        self.get_rng_state_tracker = get_rng_state_tracker
        self.num_attention_heads = num_attention_heads
        self.layer_number = 1 if layer_number is None else layer_number
        self.cp_group, self.cp_global_ranks, self.cp_stream = cp_group, cp_global_ranks, cp_stream
        self.cp_comm_type = cp_comm_type
        both = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = both
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.num_gqa_groups_per_partition = int(self.num_gqa_groups // self.tp_size)
        assert num_attention_heads % self.num_gqa_groups == 0, (
            "The number of attention heads must be divisible by the number of GQA groups!"
        )
        if not (sequence_parallel or get_rng_state_tracker is None):
            set_all_rng_states(get_rng_state_tracker().get_states())
        self.softmax_scale = 1.0 / math.sqrt(both[0]) if softmax_scale is None else softmax_scale
        assert attention_type in AttnTypes, f"attention_type {attention_type} not supported"
        self.attention_type, self.attention_dropout = attention_type, attention_dropout
        self.return_max_logit, self.softmax_type = return_max_logit, softmax_type
        self.softmax_offset: torch.Tensor | None
        if self.softmax_type == "vanilla":
            self.softmax_offset = None
        if self.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(self.num_attention_heads // self.tp_size, device="cuda")
        if self.softmax_type == "learnable":
            sinks = torch.full((self.num_attention_heads // self.tp_size,), float("nan"), device="cuda")
            self.register_parameter(
                "softmax_offset", torch.nn.Parameter(sinks), get_rng_state_tracker=get_rng_state_tracker
            )

        def remove_extra_states_check(self, incompatible_keys):
            for key in incompatible_keys.missing_keys:
                if "core_attention._extra_state" in key:
                    incompatible_keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(remove_extra_states_check)

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        self.cp_group, self.cp_global_ranks, self.cp_stream = cp_group, cp_global_ranks, cp_stream
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
        num_splits=1,
    ):
        """Attend within each document: query [T, heads, d] and key, value [T, groups, d] -> [T, heads * d]."""
        others = (attention_mask, core_attention_bias, alibi_slopes, inference_params)
        if any(value is not None for value in others) or checkpoint_core_attention or self.attention_dropout:
            not_here("attention with a mask, a bias, a cache or dropout")
        with self.prepare_forward(
            query_layer,
            num_gemms=3,
            allow_non_contiguous=True,
            allow_different_data_and_param_types=self.softmax_type != "vanilla",
        ) as query:
            self._check_shapes(query, key_layer, value_layer)
            kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type.replace(",", "_")
            window = self.window_size if window_size is None else window_size
            window = dpa_utils.check_set_window_size(kind, window)
            layout = self.qkv_format if qkv_format is None else qkv_format
            self._check_layout(query, key_layer, value_layer, kind, layout)
            if layout == "thd":
                self._check_documents(cu_seqlens_q, cu_seqlens_kv)
            padded = (cu_seqlens_q_padded, cu_seqlens_q), (cu_seqlens_kv_padded, cu_seqlens_kv)
            if any(ends is not None and not torch.equal(ends[:-1], starts[:-1]) for ends, starts in padded):
                not_here("padding between documents")
            _, fused = self._choose_kernel(query, layout, kind, window, num_splits)
            if self._contexts == 1:
                bounds, given = cu_seqlens_q.tolist(), (query, key_layer, value_layer)
                return attend(
                    *given, bounds=bounds, left=window[0], scale=self.softmax_scale, sinks=self.softmax_offset
                )
            return attn_forward_func_with_cp(
                self.training,
                query,
                key_layer,
                value_layer,
                cu_seqlens_q,
                cu_seqlens_kv,
                max_seqlen_q,
                max_seqlen_kv,
                cu_seqlens_q_padded,
                cu_seqlens_kv_padded,
                self.attention_dropout,
                self.cp_group,
                self.cp_global_ranks,
                self.cp_stream,
                self.cp_comm_type,
                softmax_scale=self.softmax_scale,
                qkv_format=layout,
                attn_mask_type=kind,
                use_fused_attention=fused,
                window_size=window,
                softmax_type=self.softmax_type,
                softmax_offset=self.softmax_offset,
                layer_number=self.layer_number,
            )

    def _check_shapes(self, query_layer, key_layer, value_layer):
        assert query_layer.dtype == key_layer.dtype and query_layer.dtype == value_layer.dtype, (
            "Queries, keys and values must have the same data type!"
        )
        assert key_layer.shape[:-1] == value_layer.shape[:-1], (
            "Keys and values must have the same batch size, sequence length and number of heads!"
        )
        num_gqa_groups = key_layer.shape[-2]
        assert query_layer.shape[-1] == key_layer.shape[-1], "Queries and keys must have the same head dimension!"
        head_dim_qk, head_dim_v = query_layer.shape[-1], value_layer.shape[-1]
        assert head_dim_qk == self.hidden_size_per_attention_head_k, (
            f"Keys have head_dim = {head_dim_qk}, but expected head_dim = {self.hidden_size_per_attention_head_k}!"
        )
        assert head_dim_v == self.hidden_size_per_attention_head_v, (
            f"Values have head_dim = {head_dim_v}, but expected head_dim = {self.hidden_size_per_attention_head_v}!"
        )
        assert num_gqa_groups == self.num_gqa_groups_per_partition, (
            "Keys and values must have num_gqa_group ="
            f" {self.num_gqa_groups_per_partition} heads! Found {num_gqa_groups}."
        )

    def _check_layout(self, query_layer, key_layer, value_layer, attn_mask_type, qkv_format):
        assert attn_mask_type in AttnMaskTypes, f"Attention mask type {attn_mask_type} is not supported!"
        assert qkv_format in ["sbhd", "bshd", "thd"], (
            "DotProductAttention only supports qkv_format = {'sbhd', 'bshd', 'thd'}!"
        )
        if qkv_format in ["sbhd", "bshd"]:
            assert all(len(x.shape) == 4 for x in (query_layer, key_layer, value_layer)), (
                f"Queries, keys and values must be 4D tensors when {qkv_format=}!"
            )
            not_here("attention over rows: every pass of the product is packed")
        assert all(len(x.shape) == 3 for x in (query_layer, key_layer, value_layer)), (
            "Queries, keys and values must be 3D tensors when qkv_format = thd!"
        )
        assert "padding" in attn_mask_type, "Attention mask type must be padding or padding_causal for qkv_format=thd!"

    def _check_documents(self, cu_seqlens_q, cu_seqlens_kv):
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None, (
            "cu_seqlens_q and cu_seqlens_kv can not be None when qkv_format = thd!"
        )
        assert (
            cu_seqlens_q.shape == cu_seqlens_kv.shape and len(cu_seqlens_q.shape) == 1 and len(cu_seqlens_kv.shape) == 1
        ), "cu_seqlens_q and cu_seqlens_q must both have shape [batch_size + 1]!"
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_kv.dtype == torch.int32, (
            "cu_seqlens_q and cu_seqlens_q must both be in dtype torch.int32!"
        )

    @property
    def _contexts(self):
        """The ranks that share a row."""
        return dist.get_world_size(self.cp_group) if isinstance(self.cp_group, dist.ProcessGroup) else 1

    def _choose_kernel(self, query, layout, kind, window, num_splits):
        """Return whether flash-attn or cuDNN computes."""
        asked = dpa_utils.AttentionParams(
            qkv_dtype=query.dtype,
            qkv_layout="thd_thd_thd" if layout == "thd" else "sbhd_sbhd_sbhd",
            attn_mask_type=kind,
            window_size=window,
            context_parallel=self._contexts > 1,
            cp_comm_type=self.cp_comm_type,
            is_training=self.training,
            softmax_type=self.softmax_type,
            num_splits=num_splits,
        )
        by_flash, _, fused, _, _, every = dpa_utils.get_attention_backend(asked)
        if not any(every):
            raise ValueError(
                "No dot product attention backend is available for the provided inputs. Please"
                " run with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 to find out the reasons for"
                " disabling all backends."
            )
        return by_flash, fused
