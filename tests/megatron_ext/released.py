"""The config.json of released models, by the name of their repository on Hugging Face's hub.

They are retyped from memory, without the hub at hand; what has no effect (special tokens, versions) is the same for
all. A line gives layers, hidden size, heads, key-value heads, width of the MLP, vocabulary, positions, and what else
the file says. `PARAMETERS` has the numbers that the hub shows for the weights of a repository, as remembered: to the
last digit they bear out the sizes, and say nothing of rotary bases, epsilons or flags.
"""

from typing import Any

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
         "vocab_size", "max_position_embeddings")  # fmt: skip
COMMON = dict(attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02,
              torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True)  # fmt: skip


def file_of(kind: str, architecture: str, *sizes: int, **own: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": kind, **COMMON, **dict(zip(SIZES, sizes)), **own}


def qwen2(*sizes: int, tied: bool = False, eps: float = 1e-6, theta: float = 1e6, **own: Any) -> dict[str, Any]:
    window = dict(max_window_layers=sizes[0], sliding_window=sizes[-1], use_sliding_window=False)
    return file_of("qwen2", "Qwen2ForCausalLM", *sizes, rms_norm_eps=eps, rope_theta=theta, tie_word_embeddings=tied,
                   **{**window, **own})  # fmt: skip


def qwen3(*sizes: int, tied: bool = False, **own: Any) -> dict[str, Any]:
    return file_of("qwen3", "Qwen3ForCausalLM", *sizes, attention_bias=False, head_dim=128, max_window_layers=sizes[0],
                   rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
                   tie_word_embeddings=tied, use_sliding_window=False, **own)  # fmt: skip


def qwen3_moe(*sizes: int, experts: int, width: int, theta: float = 1e6, **own: Any) -> dict[str, Any]:
    return file_of("qwen3_moe", "Qwen3MoeForCausalLM", *sizes, attention_bias=False, decoder_sparse_step=1,
                   head_dim=128, max_window_layers=sizes[0], mlp_only_layers=[], moe_intermediate_size=width,
                   norm_topk_prob=True, num_experts=experts, num_experts_per_tok=8, output_router_logits=False,
                   rms_norm_eps=1e-6, rope_scaling=None, rope_theta=theta, router_aux_loss_coef=0.001,
                   sliding_window=None, tie_word_embeddings=False, use_sliding_window=False, **own)  # fmt: skip


def qwen2_moe(*sizes: int, experts: int, top_k: int, width: int, shared: int, **own: Any) -> dict[str, Any]:
    return file_of("qwen2_moe", "Qwen2MoeForCausalLM", *sizes, decoder_sparse_step=1, max_window_layers=sizes[0],
                   moe_intermediate_size=width, norm_topk_prob=False, num_experts=experts, num_experts_per_tok=top_k,
                   output_router_logits=False, rms_norm_eps=1e-6, rope_theta=1e6, router_aux_loss_coef=0.001,
                   shared_expert_intermediate_size=shared, sliding_window=32768, tie_word_embeddings=False,
                   use_sliding_window=False, **own)  # fmt: skip


def llama(*sizes: int, tied: bool = False, theta: float = 5e5, eps: float = 1e-5, **own: Any) -> dict[str, Any]:
    return file_of("llama", "LlamaForCausalLM", *sizes, attention_bias=False, mlp_bias=False, pretraining_tp=1,
                   rms_norm_eps=eps, rope_theta=theta, tie_word_embeddings=tied, **own)  # fmt: skip


def llama3(factor: float) -> dict[str, Any]:
    return dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
                rope_type="llama3")  # fmt: skip


def mistral(*sizes: int, theta: float = 1e6, window: int | None = None, **own: Any) -> dict[str, Any]:
    return file_of("mistral", "MistralForCausalLM", *sizes, rms_norm_eps=1e-5, rope_theta=theta, sliding_window=window,
                   tie_word_embeddings=False, **own)  # fmt: skip


def mixtral(*sizes: int, **own: Any) -> dict[str, Any]:
    return file_of("mixtral", "MixtralForCausalLM", *sizes, num_experts_per_tok=2, num_local_experts=8,
                   output_router_logits=False, rms_norm_eps=1e-5, rope_theta=1e6, router_aux_loss_coef=0.02,
                   sliding_window=None, tie_word_embeddings=False, **own)  # fmt: skip


def phi3(*sizes: int, window: int | None, original: int = 4096, **own: Any) -> dict[str, Any]:
    return file_of("phi3", "Phi3ForCausalLM", *sizes, attention_bias=False, embd_pdrop=0.0,
                   original_max_position_embeddings=original, resid_pdrop=0.0, rms_norm_eps=1e-5, rope_scaling=None,
                   sliding_window=window, tie_word_embeddings=False,
                   auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
                   **{"rope_theta": 10000.0, **own})  # fmt: skip


def olmo2(*sizes: int, **own: Any) -> dict[str, Any]:
    return file_of("olmo2", "Olmo2ForCausalLM", *sizes, attention_bias=False, rms_norm_eps=1e-6, rope_scaling=None,
                   rope_theta=500000, tie_word_embeddings=False, **own)  # fmt: skip


def olmo3(*sizes: int, **own: Any) -> dict[str, Any]:
    yarn = dict(attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
                original_max_position_embeddings=8192, rope_type="yarn")  # fmt: skip
    return file_of("olmo3", "Olmo3ForCausalLM", *sizes, attention_bias=False,
                   layer_types=["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(sizes[0])],
                   rms_norm_eps=1e-6, rope_scaling=yarn, rope_theta=500000, sliding_window=4096,
                   tie_word_embeddings=False, **own)  # fmt: skip


def glm4(*sizes: int, **own: Any) -> dict[str, Any]:
    return file_of("glm4", "Glm4ForCausalLM", *sizes, attention_bias=True, head_dim=128, partial_rotary_factor=0.5,
                   rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, **own)  # fmt: skip


def glm4_moe(
    *sizes: int, experts: int, width: int, dense: int, qk_norm: bool, scale: float, **own: Any
) -> dict[str, Any]:
    """Without the layer that drafts further tokens (num_nextn_predict_layers 1), which is refused by name."""
    return file_of("glm4_moe", "Glm4MoeForCausalLM", *sizes, attention_bias=True, first_k_dense_replace=dense,
                   head_dim=128, moe_intermediate_size=width, n_group=1, n_routed_experts=experts, n_shared_experts=1,
                   norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=0, partial_rotary_factor=0.5,
                   rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000, routed_scaling_factor=scale,
                   tie_word_embeddings=False, topk_group=1, use_qk_norm=qk_norm, **own)  # fmt: skip


def granite(*sizes: int, scores: float, logits: float, theta: float, **own: Any) -> dict[str, Any]:
    return file_of("granite", "GraniteForCausalLM", *sizes, attention_bias=False, attention_multiplier=scores,
                   embedding_multiplier=12.0, logits_scaling=logits, mlp_bias=False, residual_multiplier=0.22,
                   rms_norm_eps=1e-5, rope_scaling=None, rope_theta=theta, tie_word_embeddings=True, **own)  # fmt: skip


YARN_4 = dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")  # as Qwen's cards say for long inputs
SMOLLM3 = [int(i % 4 != 3) for i in range(36)]

RELEASED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": qwen2(24, 896, 14, 2, 4864, 151936, 32768, tied=True, max_window_layers=24, use_mrope=False),
    "Qwen/Qwen2.5-1.5B-Instruct": qwen2(28, 1536, 12, 2, 8960, 151936, 32768, tied=True, max_window_layers=21),
    "Qwen/Qwen2.5-3B": qwen2(36, 2048, 16, 2, 11008, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": qwen2(28, 3584, 28, 4, 18944, 152064, 32768, sliding_window=131072),
    "Qwen/Qwen2.5-7B-Instruct, 131,072 tokens": qwen2(28, 3584, 28, 4, 18944, 152064, 32768, rope_scaling=YARN_4),
    "Qwen/Qwen2.5-14B": qwen2(48, 5120, 40, 8, 13824, 152064, 131072, eps=1e-5),
    "Qwen/Qwen2.5-32B": qwen2(64, 5120, 40, 8, 27648, 152064, 131072, eps=1e-5),
    "Qwen/Qwen2.5-72B": qwen2(80, 8192, 64, 8, 29568, 152064, 131072, eps=1e-5),
    "Qwen/Qwen2-7B-Instruct": qwen2(28, 3584, 28, 4, 18944, 152064, 32768, sliding_window=131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": qwen2(28, 1536, 12, 2, 8960, 151936, 131072, theta=10000,
                                                       use_mrope=False, sliding_window=4096, max_window_layers=21),
    "Qwen/Qwen3-0.6B": qwen3(28, 1024, 16, 8, 3072, 151936, 40960, tied=True),
    "Qwen/Qwen3-1.7B": qwen3(28, 2048, 16, 8, 6144, 151936, 40960, tied=True),
    "Qwen/Qwen3-4B": qwen3(36, 2560, 32, 8, 9728, 151936, 40960, tied=True),
    "Qwen/Qwen3-8B": qwen3(36, 4096, 32, 8, 12288, 151936, 40960),
    "Qwen/Qwen3-14B": qwen3(40, 5120, 40, 8, 17408, 151936, 40960),
    "Qwen/Qwen3-32B": qwen3(64, 5120, 64, 8, 25600, 151936, 40960),
    "Qwen/Qwen3-30B-A3B": qwen3_moe(48, 2048, 32, 4, 6144, 151936, 40960, experts=128, width=768),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": qwen3_moe(48, 2048, 32, 4, 6144, 151936, 262144, experts=128, width=768,
                                                  theta=10000000),
    "Qwen/Qwen3-235B-A22B": qwen3_moe(94, 4096, 64, 4, 12288, 151936, 40960, experts=128, width=1536),
    "Qwen/Qwen1.5-MoE-A2.7B": qwen2_moe(24, 2048, 16, 16, 5632, 151936, 8192, experts=60, top_k=4, width=1408,
                                        shared=5632),
    "Qwen/Qwen2-57B-A14B-Instruct": qwen2_moe(28, 3584, 28, 4, 18944, 151936, 32768, experts=64, top_k=8, width=2560,
                                              shared=20480),
    "meta-llama/Llama-2-7b-hf": llama(32, 4096, 32, 32, 11008, 32000, 4096, theta=10000.0),
    "meta-llama/Meta-Llama-3-8B": llama(32, 4096, 32, 8, 14336, 128256, 8192),
    "meta-llama/Llama-3.1-8B-Instruct": llama(32, 4096, 32, 8, 14336, 128256, 131072, rope_scaling=llama3(8.0)),
    "meta-llama/Llama-3.2-1B": llama(16, 2048, 32, 8, 8192, 128256, 131072, tied=True, head_dim=64,
                                     rope_scaling=llama3(32.0)),
    "meta-llama/Llama-3.2-3B": llama(28, 3072, 24, 8, 8192, 128256, 131072, tied=True, head_dim=128,
                                     rope_scaling=llama3(32.0)),
    "meta-llama/Llama-3.3-70B-Instruct": llama(80, 8192, 64, 8, 28672, 128256, 131072, rope_scaling=llama3(8.0)),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama(22, 2048, 32, 4, 5632, 32000, 2048, theta=10000.0, rope_scaling=None),
    "HuggingFaceTB/SmolLM2-135M": llama(30, 576, 9, 3, 1536, 49152, 8192, tied=True, theta=100000, is_llama_config=True,
                                        rope_interleaved=False, rope_scaling=None),
    "HuggingFaceTB/SmolLM2-1.7B": llama(24, 2048, 32, 32, 8192, 49152, 8192, tied=True, theta=130000),
    "mistralai/Mistral-7B-v0.1": mistral(32, 4096, 32, 8, 14336, 32000, 32768, theta=10000.0, window=4096),
    "mistralai/Mistral-7B-Instruct-v0.3": mistral(32, 4096, 32, 8, 14336, 32768, 32768),
    "mistralai/Mistral-Nemo-Instruct-2407": mistral(40, 5120, 32, 8, 14336, 131072, 1024000, head_dim=128),
    "mistralai/Mistral-Small-24B-Instruct-2501": mistral(40, 5120, 32, 8, 32768, 131072, 32768, theta=1e8,
                                                         head_dim=128),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": mixtral(32, 4096, 32, 8, 14336, 32000, 32768),
    "mistralai/Mixtral-8x22B-v0.1": mixtral(56, 6144, 48, 8, 16384, 32000, 65536),
    "microsoft/Phi-3-mini-4k-instruct": phi3(32, 3072, 32, 32, 8192, 32064, 4096, window=2047),
    "microsoft/Phi-3-medium-4k-instruct": phi3(40, 5120, 40, 10, 17920, 32064, 4096, window=2047),
    "microsoft/phi-4": phi3(40, 5120, 40, 10, 17920, 100352, 16384, window=None, original=16384, rope_theta=250000),
    "allenai/OLMo-2-0425-1B": olmo2(16, 2048, 16, 16, 8192, 100352, 4096),
    "allenai/OLMo-2-1124-7B": olmo2(32, 4096, 32, 32, 11008, 100352, 4096),
    "allenai/OLMo-2-1124-13B": olmo2(40, 5120, 40, 40, 13824, 100352, 4096),
    "allenai/Olmo-3-1025-7B": olmo3(32, 4096, 32, 32, 11008, 100278, 65536),
    "allenai/Olmo-3-32B-Think": olmo3(64, 5120, 40, 8, 27648, 100278, 65536),
    "HuggingFaceTB/SmolLM3-3B": file_of(
        "smollm3", "SmolLM3ForCausalLM", 36, 2048, 16, 4, 11008, 128256, 65536, attention_bias=False,
        layer_types=["full_attention"] * 36, max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
        no_rope_layers=SMOLLM3, pretraining_tp=2, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0,
        sliding_window=None, use_sliding_window=False),
    "THUDM/GLM-4-9B-0414": glm4(40, 4096, 32, 2, 13696, 151552, 32768),
    "THUDM/GLM-4-32B-0414": glm4(61, 6144, 48, 2, 23040, 151552, 32768),
    "zai-org/GLM-4.5-Air": glm4_moe(46, 4096, 96, 8, 10944, 151552, 131072, experts=128, width=1408, dense=1,
                                    qk_norm=False, scale=1.0),
    "zai-org/GLM-4.5": glm4_moe(92, 5120, 96, 8, 12288, 151552, 131072, experts=160, width=1536, dense=3, qk_norm=True,
                                scale=2.5),
    "ibm-granite/granite-3.1-2b-instruct": granite(40, 2048, 32, 8, 8192, 49155, 131072, scores=0.015625, logits=8.0,
                                                   theta=5000000.0),
    "ibm-granite/granite-3.1-8b-instruct": granite(40, 4096, 32, 8, 12800, 49155, 131072, scores=0.0078125, logits=16.0,
                                                   theta=10000000.0),
}  # fmt: skip

PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768, "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304, "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "Qwen/Qwen2.5-14B": 14_770_033_664, "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen3-4B": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264, "Qwen/Qwen3-30B-A3B": 30_532_122_624, "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192, "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248, "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824, "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384, "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384, "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552, "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200, "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552, "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200, "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "THUDM/GLM-4-9B-0414": 9_400_279_040, "ibm-granite/granite-3.1-2b-instruct": 2_533_531_648,
    "ibm-granite/granite-3.1-8b-instruct": 8_170_848_256,
}  # fmt: skip
