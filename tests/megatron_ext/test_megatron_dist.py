"""torch_dist checkpoints of Megatron-LM and of megatron-core alone become the same model."""

import importlib.util
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import transformers
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import export_megatron, import_hf
from megatron_ext.layers import loss_head
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.model_folders import model_folder
from megatron_ext.models.rotary import Linear, Yarn
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.training.rows import micro_batch
from megatron_ext.weights import checkpoint, dist_weights, megatron_arguments
from megatron_ext.weights.hf_files import HfTensors
from tests.megatron_ext import stock_gpt, tiny

DIMS = replace(tiny.DIMS, layers=stock_gpt.LAYERS, tied=False)
FAMILIES = {
    "qwen2 untied": DIMS, "qwen2 tied": tiny.DIMS, "qwen3": replace(DIMS, kind="qwen3"),
    "llama": replace(DIMS, kind="llama", rope_factor=8.0),
}  # fmt: skip
EXPERTS = {
    "qwen3_moe": replace(tiny.KINDS["qwen3_moe"], layers=stock_gpt.LAYERS, dense=(True, False, False)),
    "mixtral": replace(tiny.KINDS["mixtral"], layers=stock_gpt.LAYERS),
    "qwen2_moe": replace(tiny.KINDS["qwen2_moe"], layers=stock_gpt.LAYERS),
}
FORMS = {"layers under one name": [], "each layer under its own": ["non_homogeneous_layers"]}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def saved(request, tmp_path_factory):
    """The folder of what megatron-core saved by itself, beside config.json of that model."""
    return stock(tmp_path_factory.mktemp("stock"), "qwen2", DIMS, *request.param)


def stock(folder, kind, dims, *form):
    stock_gpt_does(folder, kind, *form)
    (tiny.hf_folder(folder / "hf", dims) / "model.safetensors").unlink()
    return folder


def stock_gpt_does(folder, *what):
    words = [sys.executable, "-W", "ignore", "-m", "tests.megatron_ext.stock_gpt", str(folder), *map(str, what)]
    subprocess.run(words, check=True)


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
    assert_same_logits(saved, tmp_path / "out", DIMS)


def assert_same_logits(saved, folder, dims):
    (model,) = tiny.family(dims).build(dims, ParallelPlan(), torch.float32)
    checkpoint.load_weights([model], model_folder.open_folder(folder).weights)
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


# ---------------------------------------------------------------- as others write them


def written(folder, dims, named):
    """A torch_dist checkpoint of random weights, each rule's tensor under the name that `named` gives it."""
    (folder / "release").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    rules, tensors = tiny.family(dims).mapping.rules(dims), HfTensors(tiny.hf_folder(folder / "hf", dims))
    writer = dist_weights.Writer(folder / "release")
    for rule in rules:
        whole = rule.layout.join([tensors.read(tensor) for tensor in rule.hf])
        for region, rows in dist_weights.regions(named(rule)):
            writer.write(region, whole[rows].reshape(region.size))
    writer.close()
    dist_weights.finish(folder / "release", writer.written)
    return folder


def with_own_names(rule):
    """ModelOpt's layers, whose norms are no part of the matrix after them."""
    return replace(rule, te_name="")


def with_local_names(rule):
    """megatron-core's local layers, which call a norm before experts as they do one before an MLP."""
    of_experts = rule.name.endswith("pre_mlp_layernorm.weight") and not rule.te_name
    name = rule.name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return replace(rule, te_name=name) if of_experts else rule


@pytest.mark.parametrize("named", [with_own_names, with_local_names])
@pytest.mark.parametrize("dims", [tiny.DIMS, tiny.NEMOTRON_H_DIMS, tiny.GPT_OSS_DIMS, EXPERTS["qwen3_moe"]])
def test_norms_are_found_under_the_names_of_any_layers(dims, named, tmp_path):
    folder = written(tmp_path / "theirs", dims, named)
    found = imported(folder, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    wanted = import_hf.run(import_hf.Config(str(folder / "hf")), tmp_path / "plain", tmp_path)
    assert found["weights_digest"] == wanted["weights_digest"]


def with_an_object(release, key):
    file = release / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", 0, 64)
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda release: with_an_object(release, "decoder.scales/shard_0_1"),
            "object decoder.scales/shard_0_1 is noth",
        ),
        (lambda release: with_an_object(release, "decoder.x._extra_state/shard_0_1"), ""),
        (
            lambda release: torch.save({"model": {"x.weight": torch.ones(2)}}, release / "common.pt"),
            "x.weight of common",
        ),
        (lambda release: (release / ".metadata").unlink(), "no whole torch_dist checkpoint"),
        (lambda release: release.rename(release.with_name("iter_0000003")), "release: is not there, and latest_check"),
    ],
)
def test_what_lies_beside_the_tensors_is_known_or_refused_by_name(change, said, tmp_path):
    folder = written(tmp_path / "theirs", tiny.DIMS, lambda rule: rule)
    change(folder / "release")
    if not said:
        imported(folder, tmp_path / "out")
        return
    with pytest.raises(UserMistake, match=said):
        imported(folder, tmp_path / "out")


def test_a_tensor_of_which_pieces_are_in_no_file_is_refused(tmp_path):
    writer = dist_weights.Writer(tmp_path)
    for row in (0, 2):
        writer.write(dist_weights.Region("x", (3, 4), (row, 0), (1, 4)), torch.ones(4))
    writer.close()
    dist_weights.finish(tmp_path, writer.written)
    reader = dist_weights.Reader(tmp_path)
    for first, rows, said in [(0, 3, "has 8 of 12 elements of x at [0, 0]"), (1, 1, "has nothing of x at [1, 0]")]:
        with pytest.raises(UserMistake, match=re.escape(said)):
            reader.read(dist_weights.Region("x", (3, 4), (first, 0), (rows, 4)))


def test_weights_in_another_code_are_refused_by_name(tmp_path, monkeypatch):
    write = dist_weights.Writer.write
    coded = "decoder.layers.0.mlp.linear_fc2.weight"
    as_bytes = lambda self, region, data: write(self, region, data.byte() if region.key == coded else data)  # noqa: E731
    monkeypatch.setattr(dist_weights.Writer, "write", as_bytes)
    folder = written(tmp_path / "theirs", tiny.DIMS, lambda rule: rule)
    with pytest.raises(UserMistake, match=f"tensor {coded} is uint8, no type of weights"):
        imported(folder, tmp_path / "out")


# ---------------------------------------------------------------- the way back


@pytest.mark.parametrize("rows, said", [(151936, 151936), (32001, None)])
def test_an_embedding_that_tensor_ranks_could_not_share_is_left_for_megatron_to_pad(rows, said):
    dims = replace(DIMS, vocabulary=rows)
    arguments = megatron_arguments.arguments_of(dims, tiny.family(dims).config.shape(dims))
    assert getattr(arguments, "padded_vocab_size", None) == said


@pytest.mark.parametrize("name", FAMILIES | EXPERTS)
def test_an_exported_folder_says_what_it_is_and_comes_back_as_the_same_model(name, tmp_path):
    dims = (FAMILIES | EXPERTS)[name]
    assert (
        megatron_arguments.unlike(megatron_arguments.arguments_of(dims, tiny.family(dims).config.shape(dims)), dims)
        == []
    )
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
    assert (
        "only qwen2, qwen3, llama, qwen3_moe, mixtral, qwen2_moe were shown" in found.message
        and found.message.endswith("use export_hf")
    )


def planned(dims):
    """What plan says of exporting a model that is yet to come."""
    site = Site(1, forecasts={"planned": {"hf_config": tiny.family(dims).config.hf_config(dims)}})
    return [problem.message for problem in export_megatron.check(export_megatron.Config("planned"), 1, site)]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_plan_refuses_to_export_every_other_kind_by_its_name(kind):
    found = planned(tiny.KINDS[kind])
    assert found == [] if kind in export_megatron.STOCK else f"is a {kind}, and only qwen2, qwen3, llama" in found[0]


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(stretch=Yarn(4.0, 16, 32.0, 1.0, True)), "has Yarn positions"),
        (dict(stretch=Linear(2.0)), "has Linear positions"),
        (dict(kind="mixtral", experts=4, top_k=2, window=8, sliding=(True,) * 3), "has sliding windows"),
        (dict(kind="llama", rope_factor=32.0), "factor 32, and Megatron-LM's builder leaves --rope-scaling-factor out"),
    ],
)
def test_plan_refuses_to_export_what_no_argument_was_shown_to_say(changed, said):
    (found,) = planned(replace(DIMS, **changed))
    assert said in found


def test_an_adapter_is_refused_where_it_is_only_planned():
    site = Site(1, forecasts={"planned": {"adapter": {"lora": asdict(LoraConfig(rank=2))}}})
    (found,) = export_megatron.check(export_megatron.Config("planned"), 1, site)
    assert found.message.endswith("merge it with merge_lora")


def test_megatron_cores_own_model_and_loader_take_an_exported_folder(saved, alone, tmp_path):
    """The way there and back: what megatron-core saved, imported and exported, gives megatron-core its logits again."""
    imported(saved, tmp_path / "model")
    (tmp_path / "exported").mkdir()
    export_megatron.run(export_megatron.Config(str(tmp_path / "model")), tmp_path / "exported", tmp_path)
    stock_gpt_does(saved, "qwen2", tmp_path / "exported")


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", *(pytest.param(k, marks=pytest.mark.soak) for k in ("mixtral", "qwen2_moe"))]
)
def test_megatron_cores_own_experts_are_taken_and_given_back(kind, alone, tmp_path):
    saved = stock(tmp_path, kind, EXPERTS[kind])
    imported(saved, tmp_path / "model")
    assert_same_logits(saved, tmp_path / "model", EXPERTS[kind])
    (tmp_path / "exported").mkdir()
    export_megatron.run(export_megatron.Config(str(tmp_path / "model")), tmp_path / "exported", tmp_path)
    stock_gpt_does(saved, kind, tmp_path / "exported")


# ---------------------------------------------------------------- Megatron-LM itself

RUN = {
    **FAMILIES, **EXPERTS,
    "wide heads, other numbers": replace(
        DIMS, kind="qwen3", head_dim=24, rope_base=5e6, norm_epsilon=1e-5, vocabulary=131, layers=2
    ),
    "one head of keys": replace(DIMS, kv_groups=1, vocabulary=128),
    "as many heads of keys": replace(DIMS, kind="llama", kv_groups=4),
    "experts weighed before they are chosen": replace(EXPERTS["qwen3_moe"], norm_topk_prob=False),
    "shared experts, weighed after": replace(EXPERTS["qwen2_moe"], norm_topk_prob=True),
}  # fmt: skip


def megatron_lm_saved(folder, dims, form):
    """Export a model of `dims`, let Megatron-LM load and save it; return the import of that, and the digest."""
    if sys.version_info < (3, 12) or not importlib.util.find_spec("megatron.training.models.gpt"):
        pytest.skip("Megatron-LM's own packages are in megatron-core's wheels from 0.19 on, for Python 3.12")
    hf = tiny.hf_folder(folder / "hf", dims)
    for name in ("model", "exported", "saved"):
        (folder / name).mkdir()
    wanted = import_hf.run(import_hf.Config(str(hf)), folder / "model", folder)
    export_megatron.run(export_megatron.Config(str(folder / "model")), folder / "exported", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    tokens = torch.randint(0, dims.vocabulary, (2, 40))
    with torch.no_grad():
        said = {"tokens": tokens, "logits": model(tokens).logits, "rows": dims.vocabulary}
    torch.save(said, folder / "logits.pt")
    words = [sys.executable, "-W", "ignore", "-m", "tests.megatron_ext.megatron_lm", str(folder), form]
    subprocess.run(words, check=True)
    (hf / "model.safetensors").unlink()
    return import_hf.Config(str(hf), megatron=str(folder / "saved")), wanted["weights_digest"]


@pytest.mark.soak
@pytest.mark.parametrize("form", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", RUN)
def test_megatron_lm_loads_what_is_exported_and_what_it_saves_comes_back(name, form, tmp_path):
    """Its model of the exported words has transformers' logits; what it saves becomes the same model, bit for bit."""
    config, digest = megatron_lm_saved(tmp_path, RUN[name], form)
    (tmp_path / "again").mkdir()
    assert import_hf.run(config, tmp_path / "again", tmp_path)["weights_digest"] == digest


@pytest.mark.soak
@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_what_megatron_lm_says_of_its_training_is_held_against_config_json(form, tmp_path):
    """Of all that changes a model's function and no tensor's shape."""
    dims = EXPERTS["qwen3_moe"]
    config, _ = megatron_lm_saved(tmp_path, dims, form)
    for changed in (
        dict(norm_epsilon=1e-5), dict(rope_base=5e5), dict(norm_topk_prob=False), dict(top_k=3),
        dict(stretch=Yarn(4.0, 16, 32.0, 1.0, True)), dict(stretch=Linear(2.0)),
    ):  # fmt: skip
        (tmp_path / "hf" / "config.json").unlink()
        durable.write_json(
            tmp_path / "hf" / "config.json", tiny.family(dims).config.hf_config(replace(dims, **changed))
        )
        (tmp_path / "again").mkdir()
        with pytest.raises(UserMistake, match="was trained otherwise: .* config.json has"):
            import_hf.run(config, tmp_path / "again", tmp_path)
        shutil.rmtree(tmp_path / "again")
