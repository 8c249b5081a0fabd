"""torch_dist checkpoints of Megatron-LM and of megatron-core alone become the same model."""

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import export_megatron, import_hf
from megatron_ext.layers import loss_head
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.training.rows import micro_batch
from megatron_ext.weights import checkpoint, legacy, megatron_dist
from tests.megatron_ext import stock_gpt, tiny

DIMS = replace(tiny.DIMS, layers=stock_gpt.LAYERS, tied=False)
FAMILIES = {
    "qwen2 untied": DIMS, "qwen2 tied": tiny.DIMS, "qwen3": replace(DIMS, kind="qwen3"),
    "llama": replace(DIMS, kind="llama", rope_factor=8.0),
}  # fmt: skip
FORMS = {"layers under one name": [], "each layer under its own": ["non_homogeneous_layers"]}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def saved(request, tmp_path_factory):
    """The folder of what megatron-core saved by itself, beside config.json of that model."""
    folder = tmp_path_factory.mktemp("stock")
    words = [sys.executable, "-W", "ignore", "-m", "tests.megatron_ext.stock_gpt", str(folder), *request.param]
    subprocess.run(words, check=True)
    (tiny.hf_folder(folder / "hf", DIMS) / "model.safetensors").unlink()
    return folder


def imported(saved, out):
    out.mkdir()
    return import_hf.run(import_hf.Config(str(saved / "hf"), megatron=str(saved)), out, out)


def refused(saved, tmp_path, dims=DIMS) -> str:
    """Return what is said of the checkpoint, where config.json is that of `dims`."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    tiny.hf_folder(folder / "hf", dims)
    with pytest.raises(UserMistake) as found:
        imported(folder, tmp_path / "out")
    return str(found.value)


def test_a_model_that_megatron_core_saved_alone_gives_its_logits(saved, alone, tmp_path):
    imported(saved, tmp_path / "out")
    (model,) = tiny.family(DIMS).build(DIMS, ParallelPlan(), torch.float32)
    checkpoint.load_weights([model], model_folder.open_folder(tmp_path / "out").weights)
    found = torch.load(saved / "logits.pt", weights_only=True)
    for tokens, logits in zip(found["tokens"], found["logits"]):
        batch = micro_batch([tiny.pack([len(tokens)], seed=0)])  # of which the logits need positions alone
        with torch.no_grad():
            ours = loss_head.position_logits(
                model, tokens[None], batch.positions, batch.documents, torch.arange(len(tokens))
            )
        assert torch.allclose(ours, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(ffn=56), "linear_fc2.weight is .*48.*, config.json gives .*56"),
        (dict(layers=4), "missing|config.json gives"),
        (dict(tied=True), "output_layer.weight .* is not part of the model"),
        (dict(rope_base=1e6), "trained otherwise: rotary_base is 10000, config.json has 1000000"),
        (dict(vocabulary=40), "word_embeddings.weight is .*32, 32.*config.json gives .*40, 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_config_json_says_otherwise_is_refused_by_name(saved, tmp_path, changed, said):
    assert re.search(said, refused(saved, tmp_path, replace(DIMS, **changed)))


def test_arguments_that_are_none_of_megatrons_are_refused(saved, tmp_path):
    common = saved / "iter_0000003" / "common.pt"
    if not common.is_file():
        pytest.skip("from 0.18 on they are an object among the tensors")
    kept = common.read_bytes()
    torch.save({"args": ["--lr", "1"]}, common)
    try:
        assert "`args`" in refused(saved, tmp_path)
    finally:
        common.write_bytes(kept)


def test_a_damaged_piece_is_refused(saved, tmp_path):
    (file, *_) = sorted((saved / "iter_0000003").glob("*.distcp"))
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    try:
        assert "damaged" in refused(saved, tmp_path)
    finally:
        file.write_bytes(kept)


# ---------------------------------------------------------------- the way back


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_folder_says_what_it_is_and_comes_back_as_the_same_model(name, tmp_path):
    dims = FAMILIES[name]
    assert legacy.unlike(megatron_dist.arguments_of(dims, tiny.family(dims).config.shape(dims)), dims) == []
    hf = tiny.hf_folder(tmp_path / "hf", dims)
    for folder in ("model", "exported", "again"):
        (tmp_path / folder).mkdir()
    wanted = import_hf.run(import_hf.Config(str(hf)), tmp_path / "model", tmp_path)
    export_megatron.run(export_megatron.Config(str(tmp_path / "model")), tmp_path / "exported", tmp_path)
    config = import_hf.Config(str(hf), megatron=str(tmp_path / "exported"))
    assert import_hf.run(config, tmp_path / "again", tmp_path)["weights_digest"] == wanted["weights_digest"]


@pytest.mark.parametrize("dims", [tiny.GPT_OSS_DIMS, tiny.NEMOTRON_H_DIMS, tiny.NANOCHAT_DIMS])
def test_a_model_whose_arguments_were_not_shown_is_not_exported(dims, tmp_path):
    (tmp_path / "model").mkdir()
    import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / "hf", dims))), tmp_path / "model", tmp_path)
    (found,) = export_megatron.check(export_megatron.Config(str(tmp_path / "model")), 1)
    assert "only qwen2, qwen3, llama were shown" in found.message and found.message.endswith("use export_hf")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_plan_refuses_to_export_every_other_kind_by_its_name(kind):
    dims = tiny.KINDS[kind]
    site = Site(1, forecasts={"planned": {"hf_config": tiny.family(dims).config.hf_config(dims)}})
    (found,) = export_megatron.check(export_megatron.Config("planned"), 1, site)
    assert f"is a {kind}, and only qwen2, qwen3, llama" in found.message


def test_an_adapter_is_refused_where_it_is_only_planned():
    site = Site(1, forecasts={"planned": {"adapter": {"lora": asdict(LoraConfig(rank=2))}}})
    (found,) = export_megatron.check(export_megatron.Config("planned"), 1, site)
    assert found.message.endswith("merge it with merge_lora")


def test_megatron_cores_own_model_and_loader_take_an_exported_folder(saved, alone, tmp_path):
    """The way there and back: what megatron-core saved, imported and exported, gives megatron-core its logits again."""
    imported(saved, tmp_path / "model")
    (tmp_path / "exported").mkdir()
    export_megatron.run(export_megatron.Config(str(tmp_path / "model")), tmp_path / "exported", tmp_path)
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.megatron_ext.stock_gpt",
        str(saved),
        str(tmp_path / "exported"),
    ]
    subprocess.run(words, check=True)
