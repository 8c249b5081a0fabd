"""Every model family: transformers is the oracle of the logits, import followed by export changes no bit, and a
document of a pack sees only itself."""

import json
import re
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.entrypoints import export_hf, import_hf
from megatron_ext.model_folders import model_folder
from megatron_ext.models.gpt_oss.config import Yarn
from megatron_ext.models.registry import MODEL_TYPES, unwrap
from megatron_ext.parallel.parts import OURS
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.training.rows import micro_batch
from megatron_ext.training.update import losses_of
from tests.megatron_ext import tiny
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_attention import forward

QWEN2, GPT_OSS, NEMOTRON_H = tiny.DIMS, tiny.GPT_OSS_DIMS, tiny.NEMOTRON_H_DIMS
QWEN3, LLAMA = (replace(QWEN2, kind=kind, tied=False) for kind in ("qwen3", "llama"))
NANOCHAT = tiny.NANOCHAT_DIMS
SHAPES = {
    "qwen2 tied": QWEN2,
    "qwen2 untied": replace(QWEN2, tied=False),
    "qwen2 one group": replace(QWEN2, kv_groups=1),
    "qwen2 no grouping, 3 heads": replace(QWEN2, hidden=36, heads=3, kv_groups=3, head_dim=12),
    "qwen2 6 heads, 3 groups, own head size": replace(
        QWEN2, heads=6, kv_groups=3, head_dim=10, tied=False, rope_base=1e6
    ),
    "qwen2 one layer, wide MLP, other epsilon": replace(QWEN2, layers=1, ffn=130, norm_epsilon=1e-3, vocabulary=64),
    "qwen3": QWEN3,
    "qwen3 tied, own head size": replace(QWEN3, tied=True, head_dim=20, rope_base=1e6),
    "llama": LLAMA,
    "llama 3, stretched": replace(LLAMA, rope_factor=8.0, head_dim=16, rope_base=500000.0),
    "gpt_oss": GPT_OSS,
    "gpt_oss tied, all layers full": replace(GPT_OSS, tied=True, sliding=(False, False)),
    "gpt_oss window longer than documents": replace(GPT_OSS, window=200, sliding=(True, True, False)),
    "gpt_oss window of 1, one group": replace(GPT_OSS, window=1, kv_groups=1),
    "gpt_oss 3 heads, 5 experts, 4 chosen": replace(GPT_OSS, heads=3, kv_groups=3, head_dim=6, experts=5, top_k=4),
    "gpt_oss YaRN of factor 32, whole correction range": replace(
        GPT_OSS, head_dim=16, yarn=Yarn(32.0, 4, 8.0, 2.0, truncate=True)
    ),
    "gpt_oss plain positions, low clamp, other epsilon": replace(
        GPT_OSS, yarn=None, rope_base=1e4, swiglu_limit=0.5, norm_epsilon=1e-3, vocabulary=64
    ),
    "nemotron_h": NEMOTRON_H,
    "nemotron_h Mamba only, 5 heads": tiny.hybrid("MM", mamba_heads=5, mamba_groups=1),
    "nemotron_h dense, one group a head, other epsilon": tiny.hybrid(
        "M-M*-", mamba_heads=3, mamba_groups=3, heads=3, kv_groups=3, norm_epsilon=1e-3
    ),
    "nemotron_h groups of experts": tiny.hybrid("E*E", experts=8, top_k=4, expert_groups=4, top_groups=2),
    "nemotron_h 6 heads, 2 groups, 3 of 5 experts": tiny.hybrid(
        "ME*", mamba_heads=6, mamba_groups=2, experts=5, top_k=3, heads=6, kv_groups=1, vocabulary=64
    ),
    "nanochat": NANOCHAT,
    "nanochat tied, 3 heads, no cap": replace(
        NANOCHAT, tied=True, hidden=36, heads=3, kv_groups=1, logit_cap=0.0, norm_epsilon=1e-3, vocabulary=64
    ),
}
FAMILIES = {
    "qwen2": replace(QWEN2, tied=False), "qwen3": QWEN3, "gpt_oss": GPT_OSS, "nemotron_h": NEMOTRON_H,
    "nanochat": NANOCHAT,
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=FAMILIES)
def dims(request):
    return FAMILIES[request.param]


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    model.config.use_cache = False  # NemotronH's cache fails where no layer is attention
    return model


def test_logits_are_those_of_transformers(alone, shape, tmp_path):
    folder = tiny.hf_folder(tmp_path / "hf", shape)
    theirs = transformers_model(folder)
    ours = tiny.model(folder, shape, ParallelPlan())
    longest = 150 if isinstance(shape, type(NEMOTRON_H)) else 50  # longer than a chunk of Mamba's scan
    pack = tiny.pack([31, 7, longest], seed=1, vocabulary=shape.vocabulary)
    logits, batch = forward(ours, pack)
    for a, b in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:]):
        with torch.no_grad():
            expected = theirs(batch.ids[:, a:b]).logits[0]
        tolerance = logits_bound(theirs, batch.ids[:, a:b])
        assert (logits[a:b] - expected).abs().max() <= tolerance
        if (a, b) == (0, 31):
            plain = ours(batch.ids[:, a:b], batch.positions[:, a:b], None)  # [1, 31, V]: no pack, mcore's own path
            assert (plain[0, :, : shape.vocabulary] - expected).abs().max() <= tolerance


def converted(source, tmp_path) -> tuple[dict, dict]:
    """Facts of import and export; the model folder is tmp_path/model, the export tmp_path/out."""
    for name in ("model", "out"):
        (tmp_path / name).mkdir()
    imported = import_hf.run(import_hf.Config(str(source)), tmp_path / "model", tmp_path)
    exported = export_hf.run(export_hf.Config(str(tmp_path / "model")), tmp_path / "out", tmp_path)
    return imported, exported


def test_import_then_export_changes_no_bit(shape, tmp_path):
    source = tiny.hf_folder(tmp_path / "hf", shape)
    imported, exported = converted(source, tmp_path)
    assert exported["weights_digest"] == imported["weights_digest"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == tiny.family(shape).config.hf_config(shape)


def test_an_exported_model_gives_transformers_the_megatron_logits(dims, tmp_path):
    from megatron_ext.parallel import ranks

    converted(tiny.hf_folder(tmp_path / "hf", dims), tmp_path)
    theirs = transformers_model(tmp_path / "out")
    with ranks.started(ParallelPlan()):
        ours = model_folder.load_model(model_folder.open_folder(tmp_path / "model"), ParallelPlan())
        logits, batch = forward(ours, tiny.pack([40], seed=2))
    with torch.no_grad():
        assert (theirs(batch.ids).logits[0] - logits).abs().max() <= logits_bound(theirs, batch.ids)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_random_start_is_what_transformers_expects(model_type, tmp_path):
    from transformers import AutoModelForCausalLM

    from megatron_ext.entrypoints import init_model

    config = init_model.Config(family=model_type, alphabet_task="calculator", hidden=32, ffn=48)
    init_model.run(config, tmp_path, tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == model_type and model.config.eos_token_id == 1
    assert model.config.num_key_value_heads == 2


def test_reading_back_a_config_gives_the_same_dimensions(shape):
    config = tiny.family(shape).config
    assert config.read(config.hf_config(shape)) == (shape, [])


def test_the_planner_counts_the_parameters_that_the_file_has(shape):
    from megatron_ext.models.layouts import hf_shapes

    family = tiny.family(shape)
    stored = hf_shapes(family.mapping.rules(shape)).items()
    counted = sum(torch.Size(size).numel() for name, size in stored if not name.endswith("correction_bias"))
    assert family.config.shape(shape).parameters.total == counted  # all but buffers


# ---------------------------------------------------------------- isolation

LENGTHS = [3, 16, 17, 1, 140, 2, 33]  # one goes on in the next chunk of Mamba's scan, where others begin


@pytest.fixture
def model(alone, dims, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf", dims), dims, ParallelPlan())


def test_a_pack_gives_the_logits_and_gradients_of_its_documents(model):
    pack = tiny.pack(LENGTHS, seed=3)
    loss = losses_of(model, micro_batch([pack])).sum()
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    logits, _ = forward(model, pack)
    model.zero_grad()
    total = 0.0
    for a, b in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:]):
        one = tiny.Pack(
            pack.ids[a:b],
            pack.labels[a:b],
            pack.loss_mask[a:b],
            pack.positions[a:b],
            numpy.array([0, b - a], numpy.int32),
        )
        assert torch.allclose(forward(model, one)[0], logits[a:b], atol=1e-5)
        if one.loss_mask.any():
            loss_one = losses_of(model, micro_batch([one])).sum()
            loss_one.backward()
            total += loss_one.item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, packed[name], atol=1e-5 * max(1, packed[name].abs().max())), name


def embeddings(model, change=lambda x: x):
    """Replaces what the embedding gives by `change` of it, as a leaf of the graph; returns the list of these leaves."""
    leaves = []
    model.embedding.register_forward_hook(
        lambda _module, _inputs, out: leaves.append(change(out.detach()).requires_grad_()) or leaves[-1]
    )
    return leaves


def routes(model):
    """Collects which experts each router chooses, in the order of the layers."""
    found = []
    for layer in unwrap(model).decoder.layers:
        router = getattr(getattr(layer, "mlp", None), "router", None)
        if router is not None:
            router.register_forward_hook(lambda _module, _inputs, out: found.append(out[1]))
    return found


@pytest.mark.parametrize("victim", [4, 6])
def test_other_documents_cannot_reach_a_document_by_a_single_bit(model, victim):
    """With experts: where routing stays, for other rows in an expert's product may round differently."""
    pack = tiny.pack(LENGTHS, seed=4)
    a, b = pack.cu_seqlens[victim], pack.cu_seqlens[victim + 1]
    outside = torch.ones(len(pack.ids), dtype=torch.bool)
    outside[a:b] = False
    chosen = routes(model)
    logits, _ = forward(model, pack)
    noise = torch.randn(len(pack.ids), 1, 1) * (1e-5 if chosen else 1.0)
    embeddings(model, lambda x: x + noise * outside[:, None, None])
    others, _ = forward(model, pack)
    half = len(chosen) // 2
    assert all(torch.equal(x, y) for x, y in zip(chosen[:half], chosen[half:]))
    assert torch.equal(others[a:b], logits[a:b])
    assert ((others - logits)[outside].abs().amax(dim=-1) > 0).float().mean() > 0.9


@pytest.mark.parametrize("victim", [4, 6])
def test_the_gradient_between_documents_is_exactly_zero(model, victim):
    pack = tiny.pack(LENGTHS, seed=5)
    a, b = pack.cu_seqlens[victim], pack.cu_seqlens[victim + 1]
    leaves = embeddings(model)
    logits, _ = forward(model, pack)
    (grad,) = torch.autograd.grad(logits[a:b].sum(), leaves)
    grad = grad.squeeze(1)
    assert (grad[a:b].abs().sum(1) > 0).all()
    assert grad[:a].abs().sum() == 0 and grad[b:].abs().sum() == 0


# ---------------------------------------------------------------- layer specs


@pytest.mark.parametrize("shape", [QWEN2, GPT_OSS], ids=["qwen2", "gpt_oss"])
def test_the_te_names_are_those_that_megatron_cores_spec_fuses(alone, shape):
    """Transformer Engine cannot be installed here: hold the names against mcore's source."""
    import inspect

    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_ext.models import decoder_spec

    stock = "get_gpt_layer_with_transformer_engine_"
    functions = [
        getattr(gpt_layer_specs, stock + end, None) for end in ("submodules", "spec")
    ]  # the first from 0.17 on
    source = "".join(inspect.getsource(function) for function in functions if function)
    assert "linear_qkv=backend.column_parallel_layer_norm_linear()" in source
    assert re.search(r"pre_mlp_layernorm=backend.layer_norm\(.*\) if num_experts else IdentityOp", source)
    config = tiny.family(shape).spec.transformer_config(shape, ParallelPlan(), torch.float32)
    (layer, *_) = decoder_spec.decoder_spec(config, OURS).layer_specs
    fused = layer.submodules.sharded_state_dict_keys_map
    for rule in tiny.family(shape).mapping.rules(shape):
        found = next((key for key in fused if f".{key}" in rule.name), None)
        assert rule.te_name == (rule.name.replace(found, fused[found]) if found else "")
