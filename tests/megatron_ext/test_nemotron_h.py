"""Nemotron-H: what test_families.py does not ask of every family."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from safetensors.torch import load_file, save_file

from data_tools import durable
from data_tools.mistake import UserMistake
from megatron_ext import ranks
from megatron_ext.entrypoints import init_model
from megatron_ext.layers.loss_head import position_logits
from megatron_ext.models.nemotron_h.config import hf_config, read, shape
from megatron_ext.models.registry import Family, read_config
from megatron_ext.models.rules import Replicated, placed
from megatron_ext.parallel import ParallelPlan
from megatron_ext.train import losses_of, micro_batch
from tests.megatron_ext import tiny
from tests.megatron_ext.shapes import NANO, NANO_PATTERN
from tests.megatron_ext.test_attention import forward
from tests.megatron_ext.test_families import transformers_model

def test_gradients_are_those_of_transformers(alone, tmp_path):
    folder = tiny.hf_folder(tmp_path / "hf", tiny.NEMOTRON_H_DIMS)
    oracle, ours = transformers_model(folder), tiny.model(folder, tiny.NEMOTRON_H_DIMS, ParallelPlan())
    batch = micro_batch([tiny.pack([150], seed=2)])
    losses_of(ours, batch).sum().backward()
    logits = oracle(batch.ids).logits[0, batch.supervised]
    torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
    pairs = [
        ("embedding.word_embeddings.weight", "model.embeddings.weight"),
        ("decoder.layers.1.mlp.router.weight", "model.layers.1.mixer.gate.weight"),
        ("decoder.final_norm.weight", "model.norm_f.weight"),
    ]
    for name in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "in_proj.weight", "norm.weight"):
        pairs.append((f"decoder.layers.0.mixer.{name}", f"model.layers.0.mixer.{name}"))
    mine, expected = dict(ours.named_parameters()), dict(oracle.named_parameters())
    for name, other in pairs:
        difference = (mine[name].grad - expected[other].grad).abs().max() / expected[other].grad.abs().max()
        assert difference <= 1e-4, name


def test_transformers_bounds_steps_where_we_do_not(alone, tmp_path):
    """Why the files that we write have a tiny time_step_min: config.py's docstring."""
    dims = replace(tiny.NEMOTRON_H_DIMS, pattern="M")
    folder = tiny.hf_folder(tmp_path / "hf", dims)
    logits, batch = forward(tiny.model(folder, dims, ParallelPlan()), tiny.pack([40], seed=3))
    config = json.loads((folder / "config.json").read_text())
    for bound, close in ((1e-9, True), (0.5, False)):
        durable.write_json(folder / "config.json", {**config, "time_step_min": bound})
        with torch.no_grad():
            assert torch.allclose(transformers_model(folder)(batch.ids).logits[0], logits, atol=1e-4) is close


def native_spelling(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`model.` and expert stacks, as transformers 5 names the parameters of its own class."""
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        name = name.replace("backbone.", "model.")
        head, _, tail = name.partition(".experts.")
        if tail and "shared" not in name:
            expert, projection, _ = tail.split(".")
            stacks.setdefault(f"{head}.experts.{projection}", {})[int(expert)] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.stack([stack[i] for i in range(len(stack))]) for name, stack in stacks.items()}


def test_both_spellings_of_a_checkpoint_are_the_same_model(alone, tmp_path):
    first = tiny.hf_folder(tmp_path / "backbone", tiny.NEMOTRON_H_DIMS)
    second = tmp_path / "model"
    second.mkdir()
    save_file(native_spelling(load_file(first / "model.safetensors")), second / "model.safetensors")
    config = hf_config(tiny.NEMOTRON_H_DIMS)
    blocks = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    config["layers_block_type"] = [blocks[block] for block in config.pop("hybrid_override_pattern")]
    durable.write_json(second / "config.json", config)
    family, dims, problems = read_config(second)
    assert (family, dims, problems) == (Family("nemotron_h"), tiny.NEMOTRON_H_DIMS, [])
    models = [dict(tiny.model(folder, dims, ParallelPlan()).state_dict()) for folder in (first, second)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items() if value is not None)
    ids = torch.arange(9)[None]
    assert torch.allclose(transformers_model(second)(ids).logits, transformers_model(first)(ids).logits, atol=1e-5)


def test_a_random_start_is_what_transformers_expects(tmp_path):
    from transformers import AutoModelForCausalLM

    sizes = dict(family="nemotron_h", alphabet_task="calculator", hidden=32, ffn=48, layers=4, tied=False)
    init_model.run(init_model.Config(**sizes), tmp_path, tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.hybrid_override_pattern == "M*-E" and model.config.eos_token_id == 1
    steps = torch.nn.functional.softplus(model.model.layers[0].mixer.dt_bias)
    assert 1e-3 <= steps.min() and steps.max() <= 0.1


# ---------------------------------------------------------------- packs


@pytest.fixture
def hybrid(alone, tmp_path):
    return tiny.model(tiny.hf_folder(tmp_path / "hf", tiny.NEMOTRON_H_DIMS), tiny.NEMOTRON_H_DIMS, ParallelPlan())


LENGTHS = [3, 140, 17, 1, 40, 2]


def test_a_pack_gives_the_logits_and_gradients_of_its_documents(hybrid):
    pack = tiny.pack(LENGTHS, seed=3)
    loss = losses_of(hybrid, micro_batch([pack])).sum()
    loss.backward()
    packed = {name: p.grad.clone() for name, p in hybrid.named_parameters()}
    hybrid.zero_grad()
    total = 0.0
    for a, b in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:]):
        row = (pack.ids, pack.labels, pack.loss_mask, pack.positions)
        one = tiny.Pack(*(x[a:b] for x in row), numpy.array([0, b - a], numpy.int32))
        if one.loss_mask.any():
            loss_one = losses_of(hybrid, micro_batch([one])).sum()
            loss_one.backward()
            total += loss_one.item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for name, p in hybrid.named_parameters():
        assert torch.allclose(p.grad, packed[name], atol=1e-5 * max(1, packed[name].abs().max())), name


LAYOUTS = {
    "alone": ParallelPlan(),
    "TP2": ParallelPlan(tensor=2),
    "TP2 SP": ParallelPlan(tensor=2, sequence_parallel=True),
    "CP2": ParallelPlan(context=2),
    "CP2 a2a": ParallelPlan(context=2, context_comm="a2a"),
}
EVEN = [4, 140, 16, 8, 40, 4]  # every context rank holds two chunks of each


@pytest.fixture(params=LAYOUTS)
def on_ranks(request, two_ranks):
    """Runs a function with `plan` on as many ranks as that has; results by rank."""
    plan = LAYOUTS[request.param]

    def run(function, **arguments):
        return two_ranks.run(function, plan=plan, **arguments) if plan.model > 1 else [function(plan, **arguments)]

    run.plan = plan
    return run


def of_document(batch, number: int) -> torch.Tensor:
    """Which of this rank's positions lie in a document, bool [T / c]."""
    bounds = batch.documents.cu_seqlens_q
    held = torch.from_numpy(batch.documents.held)
    return (bounds[number] <= held) & (held < bounds[number + 1])


def logits_and_gradient(model, batch, ids, number) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of this rank's positions; the gradient of a document's logits, by the embeddings of ids."""
    inputs = []
    handle = model.embedding.register_forward_hook(
        lambda _m, _i, out: inputs.append(out.detach().requires_grad_()) or inputs[-1]
    )
    wanted = torch.arange(ids.numel())
    logits = position_logits(model, ids, batch.positions, batch.documents, wanted)
    handle.remove()
    chosen = logits[of_document(batch, number)]
    (grad,) = torch.autograd.grad((chosen * torch.linspace(-1, 1, chosen.size(1))).sum(), inputs)
    if model.config.sequence_parallel:
        grad = gather_from_sequence_parallel_region(grad)
    return logits.detach(), grad.squeeze(1)


def isolation(plan, hf, dims, number: int) -> dict[str, bool]:
    with ranks.started(plan):
        model = tiny.model(hf, dims, plan).eval()
        batch = micro_batch([tiny.pack(EVEN, seed=4)])
        mine = of_document(batch, number)
        logits, grad = logits_and_gradient(model, batch, batch.ids, number)
        changed = torch.where(mine, batch.ids, (batch.ids + 1 + batch.positions % 7) % 19)
        others, _ = logits_and_gradient(model, batch, changed, number)
        return {
            "the document's logits have the same bits": torch.equal(others[mine], logits[mine]),
            "other documents' logits changed": not torch.equal(others[~mine], logits[~mine]),
            "its own tokens reach it": bool((grad[mine].abs().sum(1) > 0).all()),
            "other tokens reach it exactly zero": grad[~mine].abs().sum().item() == 0,
        }


@pytest.mark.parametrize("number", [0, 1, 4])
def test_other_documents_cannot_reach_a_document_by_a_single_bit(on_ranks, tmp_path, number):
    """Through convolution, state and attention. Without experts, whose matrix products are over other rows when other
    documents route otherwise."""
    dims = replace(tiny.NEMOTRON_H_DIMS, pattern="M-M*M")
    hf = tiny.hf_folder(tmp_path / "hf", dims)
    for found in on_ranks(isolation, hf=hf, dims=dims, number=number):
        assert all(found.values()), found


def test_experts_pass_no_gradient_between_documents_either(alone, hybrid):
    batch = micro_batch([tiny.pack(EVEN, seed=5)])
    _, grad = logits_and_gradient(hybrid, batch, batch.ids, 1)
    mine = of_document(batch, 1)
    assert (grad[mine].abs().sum(1) > 0).all() and grad[~mine].abs().sum() == 0


def loss_and_gradients(plan, hf, dims) -> dict:
    """Of one pack, before any reduction over ranks: which positions the rank held, losses, gradients by rule name."""
    with ranks.started(plan):
        model = tiny.model(hf, dims, plan)
        batch = micro_batch([tiny.pack(EVEN, seed=6)])
        losses = losses_of(model, batch)
        losses.sum().backward()
        grads = {rule.name: p.grad for rule, p in placed(model, Family("nemotron_h").mapping.rules(dims)) if p.requires_grad}
        return {"loss": losses.sum().item(), "grads": grads}


def test_parallel_equals_one_process(on_ranks, tmp_path):
    """The gradients are put together as the training loop's reductions do: added over context ranks, and over tensor
    ranks for what each has of its own tokens (sequence parallelism)."""
    dims, plan = replace(tiny.NEMOTRON_H_DIMS, pattern="M-M*M"), on_ranks.plan
    hf = tiny.hf_folder(tmp_path / "hf", dims)
    found = on_ranks(loss_and_gradients, hf=hf, dims=dims)
    expected = loss_and_gradients(ParallelPlan(), hf, dims)
    total = sum(result["loss"] for result in found) / plan.tensor
    assert total == pytest.approx(expected["loss"], rel=1e-6)
    layouts = {rule.name: rule.layout for rule in Family("nemotron_h").mapping.rules(dims)}
    for name, grad in expected["grads"].items():
        parts = [result["grads"][name] for result in found]
        if plan.context > 1 or (plan.sequence_parallel and type(layouts[name]) is Replicated):
            whole = sum(parts)
        else:
            whole = layouts[name].unshard(parts)
        assert (whole - grad).abs().max() <= 1e-5 * grad.abs().max(), name


# ---------------------------------------------------------------- config.json

NANO_CONFIG = {
    **hf_config(replace(tiny.NEMOTRON_H_DIMS, pattern=NANO_PATTERN, dtype="bfloat16")),
    "hidden_size": 2688, "vocab_size": 131072, "max_position_embeddings": 262144, "intermediate_size": 1856,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "expand": 2,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, "time_step_limit": [0.0, float("inf")],
    "time_step_min": 0.001, "rope_theta": 10000, "partial_rotary_factor": 1.0, "norm_eps": 1e-5,
}  # fmt: skip


def test_nemotron_3_nano_is_understood():
    dims, problems = read(NANO_CONFIG)
    assert problems == [] and shape(dims) == NANO
    assert shape(dims).parameters.total == 31_577_937_344  # reference/megatron.md 1.1
    in_transformers = {**NANO_CONFIG, "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert read(in_transformers) == (dims, [])
    assert read({**NANO_CONFIG, "head_dim": None, "attention_head_dim": 128})[0] == dims


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hybrid_override_pattern="MX"), "hybrid_override_pattern = 'MX' is no string of M, *, E and -"),
        (dict(hybrid_override_pattern=None), "is missing, and so is layers_block_type"),
        (dict(layers_block_type=["rwkv"]), "layers_block_type has 'rwkv'"),
        (dict(layers_block_type=["moe"]), "is MEM*E- and layers_block_type means E"),
        (dict(num_hidden_layers=7), "num_hidden_layers is 7 and the pattern MEM*E- has 6 layers"),
        (dict(mamba_num_heads=None), "mamba_num_heads is missing"),
        (dict(mamba_num_heads=6), "6 Mamba heads do not divide by 4 groups"),
        (dict(num_attention_heads=3), "3 attention heads do not divide by 2 key-value heads"),
        (dict(routed_scaling_factor=None), "routed_scaling_factor is None: write the model's own"),
        (dict(norm_topk_prob=False), "norm_topk_prob = False with num_experts_per_tok = 2"),
        (dict(num_experts_per_tok=1), "norm_topk_prob = True with num_experts_per_tok = 1"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok = 9 is more than the 4 experts"),
        (dict(n_group=2, topk_group=2), "n_group = 2, topk_group = 2 with num_experts_per_tok = 2"),
        (dict(n_group=3), "4 experts do not split into n_group = 3"),
        (dict(mlp_hidden_act="silu"), "mlp_hidden_act = 'silu'"),
        (dict(use_conv_bias=False), "use_conv_bias = False"),
        (dict(conv_kernel=3), "conv_kernel = 3"),
        (dict(moe_latent_size=64), "moe_latent_size = 64"),
        (dict(num_nextn_predict_layers=2), "num_nextn_predict_layers = 2"),
        (dict(residual_in_fp32=True), "residual_in_fp32 = True"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings = True"),
        (dict(time_step_limit=[0.001, 0.1]), "time_step_limit = [0.001, 0.1]"),
        (dict(norm_eps=1e-6), "norm_eps = 1e-06"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (dict(new_feature=3), "new_feature = 3 is not supported for nemotron_h: it is not known"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(change, words):
    dims, problems = read({**hf_config(tiny.NEMOTRON_H_DIMS), **change})
    assert dims is None and words in str(UserMistake(problems))
