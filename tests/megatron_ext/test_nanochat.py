"""nanochat: its own checkpoints by tag and step give the function that nanochat's code computes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import export_hf, export_nanochat, import_hf, merge_lora
from megatron_ext.model_folders import model_folder
from megatron_ext.models.nanochat import config as nanochat_config
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan, Site
from tests.megatron_ext import adapted, tiny
from tests.megatron_ext.rounding import bound
from tests.megatron_ext.test_attention import forward

LAYERS, HEADS, GROUPS, HIDDEN, VOCABULARY, PADDED = 2, 4, 2, 32, 19, 64
CONFIG = dict(sequence_len=64, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_kv_head=GROUPS, n_embd=HIDDEN)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d = HIDDEN // HEADS
    shapes = {"transformer.wte.weight": (PADDED, HIDDEN), "lm_head.weight": (PADDED, HIDDEN)}
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        shapes |= {h + "attn.c_q.weight": (HIDDEN, HIDDEN), h + "attn.c_proj.weight": (HIDDEN, HIDDEN)}
        shapes |= {h + f"attn.c_{x}.weight": (GROUPS * d, HIDDEN) for x in "kv"}
        shapes |= {h + "mlp.c_fc.weight": (4 * HIDDEN, HIDDEN), h + "mlp.c_proj.weight": (HIDDEN, 4 * HIDDEN)}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def checkpoint(folder, tensors=None, step: int = 7, **config):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights() if tensors is None else tensors, folder / f"model_{step:06d}.pt")
    durable.write_json(folder / f"meta_{step:06d}.json", {"step": step, "model_config": CONFIG | config})
    return folder.parent


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotated(x):  # [T, heads, d], as nanochat/gpt.py's apply_rotary_emb
    d = x.size(-1) // 2
    angle = torch.outer(torch.arange(x.size(0)), 10000.0 ** (-torch.arange(0, 2 * d, 2) / (2 * d)))[:, None]
    first, second = x[..., :d], x[..., d:]
    return torch.cat([first * angle.cos() + second * angle.sin(), -first * angle.sin() + second * angle.cos()], -1)


def nanochat_logits(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """What nanochat's model says of ids [T]: logits [T, VOCABULARY]."""
    x = norm(w["transformer.wte.weight"][ids])
    for i in range(LAYERS):
        h, y = f"transformer.h.{i}.", norm(x)
        q, k, v = (F.linear(y, w[f"{h}attn.c_{c}.weight"]).unflatten(-1, (-1, HIDDEN // HEADS)) for c in "qkv")
        q, k = norm(rotated(q)), norm(rotated(k))
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        x = x + F.linear(out.transpose(0, 1).flatten(1), w[h + "attn.c_proj.weight"])
        x = x + F.linear(F.relu(F.linear(norm(x), w[h + "mlp.c_fc.weight"])).square(), w[h + "mlp.c_proj.weight"])
    return 15 * torch.tanh(F.linear(norm(x), w["lm_head.weight"]) / 15)[:, :VOCABULARY]


def test_its_own_checkpoint_gives_its_own_logits(tmp_path):
    source = checkpoint(tmp_path / "base_checkpoints" / "d2", weights(1), step=3)
    checkpoint(source / "d2", weights(2), step=21)
    (tmp_path / "model").mkdir()
    facts = import_hf.run(import_hf.Config(str(source), model_tag="d2"), tmp_path / "model", tmp_path)
    assert facts["family"] == "nanochat" and facts["dtype_changes"] == {}
    pack = tiny.pack([40], seed=3)
    with ranks.started(ParallelPlan()):
        model = model_folder.load_model(model_folder.open_folder(tmp_path / "model"), ParallelPlan())
        logits, batch = forward(model, pack)
    expected = nanochat_logits(weights(2), batch.ids[0])  # the last step, 21
    exact = nanochat_logits({name: tensor.double() for name, tensor in weights(2).items()}, batch.ids[0])
    assert (logits - expected).abs().max() <= bound(expected, exact)


@pytest.mark.parametrize(
    "tensors, config, wanted, words",
    [
        ({}, {}, dict(model_tag="d9"), r"'d9' has no model_STEP\.pt"),
        ({}, {}, dict(), "model_tag: is missing: .* has d2"),
        ({}, {}, dict(model_tag="d2", step=8), "has no step 8; there are 7"),
        ({}, dict(window_pattern="SSSL"), dict(model_tag="d2"), "window_pattern 'SSSL' is not L alone"),
        ({}, dict(window_pattern=None), dict(model_tag="d2"), "window_pattern None is not L alone"),
        ({}, dict(n_layer=2.7), dict(model_tag="d2"), "n_layer is 2.7, no whole number"),
        ({}, dict(n_layer=0), dict(model_tag="d2"), "meta_000007.json with model_000007.pt: .*num_hidden_layers"),
        ({}, dict(n_head=3, n_kv_head=3), dict(model_tag="d2"), "hidden_size 32 does not divide by 3 attention heads"),
        ({}, dict(n_kv_head=3), dict(model_tag="d2"), "4 attention heads do not divide by 3"),
        ({"lm_head.weight": None}, {}, dict(model_tag="d2"), r"tensor lm_head.weight \[19, 32\] is missing"),
        ({"lm_head.weight": torch.zeros(64, 32, dtype=torch.int32)}, {}, dict(model_tag="d2"), "int32"),
        ({}, dict(n_expert=3), dict(model_tag="d2"), "model_config has n_expert, which is not known"),
        (dict(resid_lambdas=torch.ones(2)), {}, dict(model_tag="d2"), r"tensor resid_lambdas \[2\] is not part of"),
    ],
)
def test_what_is_not_there_or_not_understood_is_named(tensors, config, wanted, words, tmp_path):
    there = {name: tensor for name, tensor in (weights() | tensors).items() if tensor is not None}
    source = checkpoint(tmp_path / "base" / "d2", there, **config)
    (source / "d2" / "model_best.pt").touch()  # a copy beside the steps, which nanochat does not read either
    (tmp_path / "model").mkdir()
    with pytest.raises(UserMistake, match=words) as found:
        import_hf.run(import_hf.Config(str(source), **wanted), tmp_path / "model", tmp_path)
    assert len(str(found.value).splitlines()) == 1 and list((tmp_path / "model").iterdir()) == []


def test_a_torn_file_is_one_line(tmp_path):
    source = checkpoint(tmp_path / "base" / "d2")
    file = source / "d2" / "model_000007.pt"
    file.write_bytes(file.read_bytes()[:-500])
    (tmp_path / "model").mkdir()
    with pytest.raises(UserMistake, match="not a whole PyTorch checkpoint"):
        import_hf.run(import_hf.Config(str(source), model_tag="d2"), tmp_path / "model", tmp_path)


# -- the way back ------------------------------------------------------------------------------------------------------


META = {"step": 21, "val_bpb": 0.8, "user_config": {"depth": 2, "run": "ä"}, "dataloader_state_dict": None}


def made(function, config, out: Path) -> dict:
    out.mkdir()
    return function(config, out, out)


def imported(tmp_path, tensors) -> Path:
    source = checkpoint(tmp_path / "base_checkpoints" / "d2", tensors, step=21)
    meta = source / "d2" / "meta_000021.json"
    meta.write_text(json.dumps(META | {"model_config": CONFIG}, indent=2))
    made(import_hf.run, import_hf.Config(str(source), model_tag="d2"), tmp_path / "m")
    return meta


def loaded(facts: dict, out: Path) -> dict[str, torch.Tensor]:
    """Load the file as nanochat does; no tensor drags the bytes of another along."""
    path = out / facts["path"]
    tensors = torch.load(path, map_location="cpu")  # weights only
    assert path.stat().st_size == facts["bytes"] < sum(t.nbytes for t in tensors.values()) + 500 * len(tensors) + 2000
    return tensors


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "mixed", "without padding"])
def test_import_and_export_give_the_same_checkpoint_bit_for_bit(kept, tmp_path):
    """On a GPU nanochat has its embedding in bfloat16 beside float32. The rows of padding are the checkpoint's, too."""
    tensors = weights(5)
    for name in tensors:
        if kept == "bfloat16" or (kept == "mixed" and "wte" in name):
            tensors[name] = tensors[name].bfloat16()
        if kept == "without padding" and len(tensors[name]) == PADDED and "h." not in name:
            tensors[name] = tensors[name][:VOCABULARY].clone()
    meta = imported(tmp_path, {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    for model in (tmp_path / "m", tmp_path / "again"):  # by way of Hugging Face's format, too
        out = tmp_path / f"out_{model.name}"
        facts = made(export_nanochat.run, export_nanochat.Config(str(model), source="base"), out)
        assert facts["path"] == "base_checkpoints/d2/model_000021.pt" and facts["same_meta"] and not facts["tokenizer"]
        found = loaded(facts, out)
        assert found.keys() == tensors.keys() and facts["dtype_changes"] == {}
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert (out / "base_checkpoints/d2/meta_000021.json").read_bytes() == meta.read_bytes()
        names = ["base_checkpoints", "d2", "meta_000021.json", "model_000021.pt"]
        assert sorted(path.name for path in out.rglob("*")) == names
        if model.name == "m":
            made(export_hf.run, export_hf.Config(str(model)), tmp_path / "hf")
            made(import_hf.run, import_hf.Config(str(tmp_path / "hf")), tmp_path / "again")


def test_a_trained_model_goes_back_with_its_own_step_and_without_what_was_measured_before(tmp_path):
    imported(tmp_path, weights(6))
    folder = model_folder.open_folder(tmp_path / "m")
    pack = tiny.pack([40], seed=3)
    (tmp_path / "trained").mkdir()
    with ranks.started(ParallelPlan()):
        model = model_folder.load_model(folder, ParallelPlan())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        logits, batch = forward(model, pack)
        digest = model_folder.write(tmp_path / "trained", model, folder, step=300)
    config = export_nanochat.Config(str(tmp_path / "trained"), source="chatrl", tag="mine")
    facts = made(export_nanochat.run, config, tmp_path / "out")
    found = loaded(facts, tmp_path / "out")
    assert facts["path"] == "chatrl_checkpoints/mine/model_000300.pt" and not facts["same_meta"]
    assert all(torch.equal(found[name], tensor * 1.5) for name, tensor in weights(6).items() if "h." in name)
    assert torch.equal(found["lm_head.weight"][:VOCABULARY], weights(6)["lm_head.weight"][:VOCABULARY] * 1.5)
    assert torch.equal(found["lm_head.weight"][VOCABULARY:], weights(6)["lm_head.weight"][VOCABULARY:])
    expected = nanochat_logits(found, batch.ids[0])
    exact = nanochat_logits({name: tensor.double() for name, tensor in found.items()}, batch.ids[0])
    assert (logits - expected).abs().max() <= bound(expected, exact)
    meta = json.loads((tmp_path / "out/chatrl_checkpoints/mine/meta_000300.json").read_text())
    assert meta == {"step": 300, "model_config": CONFIG, "user_config": META["user_config"],
                    "afterok": {"weights_digest": digest, "from_step": 21}}  # fmt: skip


def test_an_adapter_goes_back_merged_as_merge_lora_merges_it(tmp_path):
    imported(tmp_path, weights(8))
    base = model_folder.open_folder(tmp_path / "m")
    (tmp_path / "adapted").mkdir()
    with ranks.started(ParallelPlan()):
        model = adapted.attach(model_folder.load_model(base, ParallelPlan()), base.dims, adapted.lora(base.dims))
        model_folder.write(tmp_path / "adapted", model, base, step=9)
    made(merge_lora.run, merge_lora.Config(str(tmp_path / "adapted")), tmp_path / "merged")
    found = []
    for name in ("adapted", "merged"):
        facts = made(export_nanochat.run, export_nanochat.Config(str(tmp_path / name)), tmp_path / f"out_{name}")
        assert facts["path"] == "chatsft_checkpoints/d2/model_000009.pt" and not facts["same_meta"]
        found.append(loaded(facts, tmp_path / f"out_{name}"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    changed = {name for name, tensor in weights(8).items() if not torch.equal(found[0][name], tensor)}
    assert len(changed) == 5 * LAYERS  # the matrices that it is for


def test_a_model_that_never_was_nanochats_gets_its_meta_and_padding(tmp_path):
    imported(tmp_path, weights(7))
    (tmp_path / "m/hf/nanochat.json").unlink()  # as of a Hugging Face checkpoint
    facts = made(export_nanochat.run, export_nanochat.Config(str(tmp_path / "m"), step=5), tmp_path / "out")
    head = loaded(facts, tmp_path / "out")["lm_head.weight"]
    assert facts["path"] == "chatsft_checkpoints/d2/model_000005.pt" and head.shape == (PADDED, HIDDEN)
    assert torch.equal(head[:VOCABULARY], weights(7)["lm_head.weight"][:VOCABULARY]) and not head[VOCABULARY:].any()
    meta = json.loads((tmp_path / "out/chatsft_checkpoints/d2/meta_000005.json").read_text())
    assert (meta["step"], meta["model_config"], meta["afterok"]["from_step"]) == (5, CONFIG, None)


@pytest.mark.parametrize("change, words", [
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and nanochat's models have False"),
    ({"intermediate_size": 64}, "intermediate_size is 64, and nanochat's models have 128"),
    ({"final_logit_softcapping": None}, "final_logit_softcapping is 0.0, and nanochat's models have 15.0"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, and nanochat's models have 1e-06"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "rope_theta is 50000.0, and nanochat's"),
    ({}, ""), (None, "is of the family qwen2, and nanochat has its own alone: use export_hf"),
])  # fmt: skip
def test_what_nanochat_cannot_hold_is_refused_before_anything_runs(change, words):
    dims = nanochat_config.Dims(layers=LAYERS, hidden=HIDDEN, ffn=128, heads=HEADS, kv_groups=GROUPS, tied=False,
                                vocabulary=VOCABULARY, norm_epsilon=1e-6, rope_base=1e4, max_positions=64,
                                logit_cap=15.0, dtype="float32")  # fmt: skip
    file = nanochat_config.hf_config(dims) | (change or {})
    if change is None:
        file = tiny.family(tiny.DIMS).config.hf_config(tiny.DIMS)
    problems = export_nanochat.check(export_nanochat.Config("m"), 1, Site(1, forecasts={"m": {"hf_config": file}}))
    assert len(problems) == bool(words) and words in "".join(map(str, problems))


def test_a_tag_is_the_name_of_a_folder():
    for tag in ("../d2", "a/b", "..", ".", " ", "d2 ", "a\0b", "a\nb", "x" * 256):
        (problem,) = export_nanochat.check(export_nanochat.Config("m", tag=tag), 1)
        assert f"{tag!r} is no name of a folder" in str(problem)


@pytest.mark.parametrize("origin", [
    "{", [], {"step": 21}, {"meta": "{"}, {"meta": "{}"}, {"step": "x"}, {"padding": []},
    {"padding": {"lm_head.weight": 3}},
    {"padding": {"lm_head.weight": {"dtype": "float32", "rows": 4, "data": "AAAA"}}},
    {"meta": json.dumps({"model_config": CONFIG | {"n_layer": 3}})},
])  # fmt: skip
def test_an_origin_that_is_none_is_one_line(origin, tmp_path):
    imported(tmp_path, weights(7))
    path = tmp_path / "m/hf/nanochat.json"
    if origin == "{":
        path.write_text(origin)
    elif isinstance(origin, list) or "step" in origin and origin["step"] == 21:
        durable.write_json(path, origin)
    else:
        durable.write_json(path, durable.read_json(path) | origin)
    with pytest.raises(
        UserMistake, match="nanochat.json: (is not what import_hf wrote|n_layer 3 is not what c)"
    ) as told:
        made(export_nanochat.run, export_nanochat.Config(str(tmp_path / "m")), tmp_path / "out")
    assert len(str(told.value).splitlines()) == 1 and list((tmp_path / "out").iterdir()) == []
