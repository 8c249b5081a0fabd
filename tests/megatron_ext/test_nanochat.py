"""nanochat: its own checkpoints by tag and step give the function that nanochat's code computes."""

import pytest
import torch
import torch.nn.functional as F

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import import_hf
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from tests.megatron_ext import tiny
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
        ({}, {}, dict(model_tag="d9"), r"'d9' has no model_\*\.pt"),
        ({}, {}, dict(), "model_tag: is missing: .* has d2"),
        ({}, {}, dict(model_tag="d2", step=8), "has no step 8; there are 7"),
        ({}, dict(window_pattern="SSSL"), dict(model_tag="d2"), "window_pattern has short windows"),
        ({}, dict(n_expert=3), dict(model_tag="d2"), "model_config has n_expert, which is not known"),
        (dict(resid_lambdas=torch.ones(2)), {}, dict(model_tag="d2"), r"tensor resid_lambdas \[2\] is not part of"),
    ],
)
def test_what_is_not_there_or_not_understood_is_named(tensors, config, wanted, words, tmp_path):
    source = checkpoint(tmp_path / "base" / "d2", weights() | tensors, **config)
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
