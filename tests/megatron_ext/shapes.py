"""Released models as shapes, with the numbers of their config.json."""

from megatron_ext.models.gpt_oss.config import Dims, Yarn, hf_config
from megatron_ext.parallel.shape import ATTENTION, MAMBA, MLP, MOE, WINDOW, ModelShape

QWEN_32B = ModelShape(
    layers=((ATTENTION, MLP),) * 64, hidden=5120, vocabulary=152064, max_positions=131072,
    heads=40, kv_groups=8, head_dim=128, qkv_bias=True, ffn=27648,
)  # fmt: skip


def gpt_oss(layers: int, experts: int) -> ModelShape:
    return ModelShape(
        layers=((WINDOW, MOE), (ATTENTION, MOE)) * (layers // 2), hidden=2880, vocabulary=201088, max_positions=131072,
        heads=64, kv_groups=8, head_dim=64, window=128, yarn_positions=4096, sinks=True, qkv_bias=True,
        attention_output_bias=True,
        experts=experts, top_k=4, expert_ffn=2880, expert_bias=True, activation_steps=2,
    )  # fmt: skip


GPT_OSS_20B, GPT_OSS_120B = gpt_oss(24, 32), gpt_oss(36, 128)
GPT_OSS_20B_CONFIG = hf_config(Dims(
    hidden=2880, heads=64, kv_groups=8, head_dim=64, window=128, sliding=(True, False) * 12, experts=32, top_k=4,
    ffn=2880, swiglu_limit=7.0, vocabulary=201088, tied=False, norm_epsilon=1e-5, rope_base=150000.0,
    yarn=Yarn(32.0, 4096, 32.0, 1.0, truncate=False), max_positions=131072, dtype="bfloat16", mxfp4=True,
))  # fmt: skip

NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NANO = ModelShape(
    layers=tuple(({"M": MAMBA, "E": MOE, "*": ATTENTION, "-": MLP}[symbol],) for symbol in NANO_PATTERN),
    hidden=2688, vocabulary=131072, max_positions=262144, heads=32, kv_groups=2, head_dim=128, gated=False,
    experts=128, top_k=6, expert_ffn=1856, shared_ffn=3712,
    mamba_heads=64, mamba_head_dim=64, mamba_groups=8, mamba_state=128, mamba_conv=4,
)  # fmt: skip
