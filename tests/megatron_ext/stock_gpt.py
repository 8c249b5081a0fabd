"""A GPTModel of megatron-core, built, saved and loaded by it alone, as a program without afterok would.

    python -m tests.megatron_ext.stock_gpt FOLDER KIND [non_homogeneous_layers]  saves
    python -m tests.megatron_ext.stock_gpt FOLDER KIND CHECKPOINT                loads another, and compares the logits

KIND is one of KINDS. FOLDER/iter_0000003 becomes a torch_dist checkpoint with Megatron-LM's state beside the model's;
FOLDER/logits.pt holds tokens and the logits that the model gives them. `init_device` is ours: without it megatron-core
does not run on a CPU.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_ext.device import init_device

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCABULARY, ROWS = 3, 32, 48, 4, 2, 19, 32
EXPERTS = dict(
    num_moe_experts=4, moe_router_topk=2, moe_router_dtype="fp32", moe_router_load_balancing_type="none",
    moe_aux_loss_coeff=0.0, moe_token_dispatcher_type="alltoall", moe_grouped_gemm=False,
)  # fmt: skip
KINDS = {  # what a kind's configuration has beside that of all
    "qwen2": dict(add_qkv_bias=True),
    "qwen3_moe": dict(EXPERTS, qk_layernorm=True, moe_ffn_hidden_size=24, moe_layer_freq=[0, 1, 1]),
    "mixtral": dict(EXPERTS, moe_ffn_hidden_size=FFN),
    "qwen2_moe": dict(
        EXPERTS, add_qkv_bias=True, moe_ffn_hidden_size=24, moe_router_pre_softmax=True,
        moe_shared_expert_intermediate_size=40, moe_shared_expert_gate=True,
    ),
}  # fmt: skip


def built(kind: str, fused: bool) -> torch.nn.Module:
    """Return the model. With `fused` it calls the norms before experts as Transformer Engine's layers do, in which
    only those before a matrix are part of it.
    """
    init_device()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_query_groups=GROUPS,
        gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm", layernorm_epsilon=1e-6,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, bias_activation_fusion=False,
        **KINDS[kind],
    )  # fmt: skip
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    often = KINDS[kind].get("moe_layer_freq", [int("num_moe_experts" in KINDS[kind])] * LAYERS)
    for layer in [layer for layer, has in zip(spec.layer_specs, often) if has and fused]:
        names = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {k: v for k, v in names.items() if "mlp" not in k}
    return GPTModel(
        config, spec, ROWS, 512, position_embedding_type="rope", share_embeddings_and_output_weights=False
    ).eval()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.size(1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return model(tokens, torch.arange(length).expand(2, -1), mask)[..., :VOCABULARY]


def state_of(model: torch.nn.Module, **metadata: bool) -> dict:
    from megatron.core import parallel_state

    return model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group(), **metadata})


def save(folder: Path, kind: str, **metadata: bool) -> None:
    model = built(kind, fused=False)
    from megatron.core import dist_checkpointing

    for parameter in model.parameters():  # norms and biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    torch.save({"tokens": tokens, "logits": logits_of(model, tokens)}, folder / "logits.pt")
    arguments = Namespace(num_attention_heads=HEADS, kv_channels=HIDDEN // HEADS, norm_epsilon=1e-6, rotary_base=10000)
    (folder / "iter_0000003").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    rng = dist_checkpointing.ShardedObject("rng_state", [torch.get_rng_state()], (1,), (0,))
    counters = {"args": arguments, "iteration": 3, "checkpoint_version": 3.0}
    state = {"model": state_of(model, **metadata), "rng_state": rng, **counters}
    dist_checkpointing.save(state, str(folder / "iter_0000003"))


def load(folder: Path, kind: str, checkpoint: Path) -> None:
    """Load as Megatron-LM does, which asks for tensors by what the checkpoint says of itself, and for a model by its
    arguments (megatron/training/checkpointing.py, `load_checkpoint`).
    """
    model = built(kind, fused=True)
    from megatron.core import dist_checkpointing

    release = str(checkpoint / (checkpoint / "latest_checkpointed_iteration.txt").read_text())
    common = dist_checkpointing.load_common_state_dict(release)
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    wanted = {"model": state_of(model, **content)}
    state = dist_checkpointing.load(wanted, release, strict="log_all")  # --dist-ckpt-strictness
    lacks = model.load_state_dict(state["model"], strict=False)
    assert not lacks.unexpected_keys and all(name.endswith("_extra_state") for name in lacks.missing_keys)
    found = torch.load(folder / "logits.pt", weights_only=True)
    assert torch.equal(logits_of(model, found["tokens"]), found["logits"])
    said, config = vars(state["args"]), vars(model.config)
    for name in said.keys() & config.keys():
        assert said[name] == config[name], (name, said[name], config[name])
    assert said["swiglu"] and said["num_query_groups"] == GROUPS and said["hidden_size"] == HIDDEN
    words = (checkpoint / "arguments.txt").read_text().split()
    assert float(words[words.index("--norm-epsilon") + 1]) == config["layernorm_epsilon"]
    assert ("--qk-layernorm" in words) == config["qk_layernorm"]
    assert ("--moe-shared-expert-gate" in words) == config["moe_shared_expert_gate"]


if __name__ == "__main__":
    where, kind_, *others = sys.argv[1:]
    if others and "/" in others[0]:
        load(Path(where), kind_, Path(others[0]))
    else:
        save(Path(where), kind_, **dict.fromkeys(others, True))
