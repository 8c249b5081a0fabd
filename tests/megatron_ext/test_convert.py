"""Conversion by shares, without a model: the same bytes as in one go, keys as mcore writes them, a ledger of
everything, and one clear message for wrong input."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import export_hf, import_hf
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.weights import checkpoint, convert, dist_weights, hf_files
from megatron_ext.weights.dist_weights import regions
from tests.megatron_ext import tiny

FAMILIES = {
    "qwen2": tiny.DIMS, "gpt_oss": tiny.GPT_OSS_DIMS, "nemotron_h": tiny.NEMOTRON_H_DIMS, "nanochat": tiny.NANOCHAT_DIMS
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def dims(request):
    return FAMILIES[request.param]


def new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def sharded(folder: Path, of=tiny.DIMS, files: int = 3) -> Path:
    """The tiny checkpoint in several files with an index."""
    tiny.hf_folder(folder, of)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    size = sum(tensor.nbytes for tensor in tensors.values()) // files
    kinds = {name: ("float32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    hf_files.write_safetensors(folder, kinds, tensors.items(), size)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = hf_files.HfTensors(folder)
    return {name: found.read(name) for name in found.shapes()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


# ---------------------------------------------------------------- shares


def test_shares_make_the_same_model_and_the_same_files(dims, tmp_path):
    source = sharded(tmp_path / "hf", dims)
    whole, config = new(tmp_path / "whole"), import_hf.Config(str(source))
    facts = import_hf.run(config, whole, tmp_path)
    parts = [new(tmp_path / f"part{i}") for i in range(3)]
    for index, part in enumerate(parts):
        import_hf.share(config, part, index=index, count=3)
    joined = new(tmp_path / "joined")
    assert import_hf.finish(config, parts, joined) == facts

    export = export_hf.Config(str(joined))
    rules = tiny.family(dims).mapping.rules(dims)
    pieces = [new(tmp_path / f"piece{i}") for i in range(2)]
    for index, piece in enumerate(pieces):
        base = convert.base_ledger(joined / "hf")
        convert.export_share(joined / "weights", rules, base, piece, "", index, 2, shard_bytes=9000)
    out = new(tmp_path / "out")
    assert export_hf.finish(export, pieces, out)["weights_digest"] == facts["weights_digest"]
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / hf_files.INDEX).is_file()
    assert equal(tensors_of(source), tensors_of(out))


def test_keys_and_shapes_are_those_that_mcore_writes(dims, alone, tmp_path):
    model = tiny.model(tiny.hf_folder(tmp_path / "hf", dims), dims, ParallelPlan())
    checkpoint.save_weights(model, tmp_path / "mcore")
    import_hf.run(import_hf.Config(str(tmp_path / "hf")), new(tmp_path / "ours"), tmp_path)
    mcore, ours = dist_weights.Reader(tmp_path / "mcore"), dist_weights.Reader(tmp_path / "ours" / "weights")
    assert ours.tensors() == mcore.tensors()
    for rule in tiny.family(dims).mapping.rules(dims):
        assert all(torch.equal(ours.read(region), mcore.read(region)) for region, _ in regions(rule))
    assert checkpoint.weights_digest(model) == model_folder.open_folder(tmp_path / "ours").weights_digest


def test_tensors_larger_than_a_piece_are_stored_in_pieces(dims, tmp_path, monkeypatch):
    monkeypatch.setattr(dist_weights, "PIECE_BYTES", 700)
    source, model = tiny.hf_folder(tmp_path / "hf", dims), new(tmp_path / "model")
    import_hf.run(import_hf.Config(str(source)), model, tmp_path)
    with ranks.started(ParallelPlan()):
        loaded = model_folder.load_model(model_folder.open_folder(model), ParallelPlan())
        assert checkpoint.weights_digest(loaded) == model_folder.open_folder(model).weights_digest
    export_hf.run(export_hf.Config(str(model)), new(tmp_path / "out"), tmp_path)
    assert equal(tensors_of(source), tensors_of(tmp_path / "out"))


def test_a_checkpoint_that_torch_wrote_is_read_wherever_its_pieces_lie(tmp_path):
    state = {"a": torch.randn(3, 5), "b": torch.randn(4, 3).bfloat16().t(), "c": torch.arange(7.0)}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    reader = dist_weights.Reader(tmp_path)
    starts = [piece.start for tensor in reader.stored.tensors.values() for piece in tensor.pieces]
    assert any(start % 4 for start in starts)  # not aligned
    for key, value in state.items():
        shape = tuple(value.shape)
        assert torch.equal(reader.read(dist_weights.Region(key, shape, (0,) * len(shape), shape)), value)


def test_conversion_needs_no_megatron_and_no_process_group(tmp_path):
    source = tiny.hf_folder(tmp_path / "hf")
    code = (
        "import sys, pathlib\n"
        "from megatron_ext.entrypoints import import_hf, export_hf\n"
        f"base = pathlib.Path({str(tmp_path)!r})\n"
        "for name in ('model', 'out'): (base / name).mkdir()\n"
        f"import_hf.run(import_hf.Config({str(source)!r}), base / 'model', base)\n"
        "export_hf.run(export_hf.Config(str(base / 'model')), base / 'out', base)\n"
        "import torch\n"
        "print('megatron.core' in sys.modules, torch.distributed.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


# ---------------------------------------------------------------- dtypes and ledger


def mixed(folder: Path) -> Path:
    """bfloat16, but for the norms, as some checkpoints keep them."""
    tiny.hf_folder(folder, replace(tiny.DIMS, dtype="bfloat16"))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t if n.endswith("norm.weight") else t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def test_dtypes_are_kept_and_every_change_is_reported(tmp_path):
    source = mixed(tmp_path / "hf")
    kept = import_hf.run(import_hf.Config(str(source)), new(tmp_path / "model"), tmp_path)
    assert kept["dtype_changes"] == {} and kept["dtype"] == "bfloat16"
    back = export_hf.run(export_hf.Config(str(tmp_path / "model")), new(tmp_path / "out"), tmp_path)
    assert back["dtype_changes"] == {} and equal(tensors_of(source), tensors_of(tmp_path / "out"))
    cast = import_hf.run(import_hf.Config(str(source), dtype="bfloat16"), new(tmp_path / "cast"), tmp_path)
    assert cast["dtype_changes"] == {"float32 to bfloat16": 5}
    again = export_hf.run(export_hf.Config(str(tmp_path / "cast")), new(tmp_path / "again"), tmp_path)
    assert again["dtype_changes"] == {"bfloat16 to float32": 5}  # the base checkpoint's dtype
    norms = [n for n, t in tensors_of(tmp_path / "again").items() if t.dtype == torch.float32]
    assert len(norms) == 5 and all(name.endswith("norm.weight") for name in norms)


def exported(tmp_path: Path, source: Path, **asked: str) -> tuple[str, dict[str, torch.Tensor]]:
    """(the dtype in config.json, the tensors) of an export of an import."""
    import_hf.run(import_hf.Config(str(source), **asked), new(tmp_path / "model"), tmp_path)
    facts = export_hf.run(export_hf.Config(str(tmp_path / "model")), new(tmp_path / "out"), tmp_path)
    config = durable.read_json(tmp_path / "out" / "config.json")
    assert facts["dtype"] == config["dtype"] == config.get("torch_dtype", config["dtype"])
    return config["dtype"], tensors_of(tmp_path / "out")


@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ["", "bfloat16", "float16", "float32"])
def test_config_json_says_the_dtype_that_the_tensors_have(said, kept, asked, tmp_path):
    """Whatever the source's config.json says, the tensors are those of the import, and config.json says which."""
    source = tiny.hf_folder(tmp_path / "hf")
    tensors = {name: tensor.to(getattr(torch, kept)) for name, tensor in tensors_of(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = {**durable.read_json(source / "config.json"), "dtype": said, "torch_dtype": said}
    durable.write_json(source / "config.json", {key: value for key, value in config.items() if value is not None})
    dtype, found = exported(tmp_path, source, dtype=asked)
    assert dtype == (asked or kept) and {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
    if not asked or asked == kept:
        assert equal(found, tensors)


def test_tensors_that_a_source_kept_in_another_dtype_keep_it(tmp_path):
    source = mixed(tmp_path / "hf")
    dtype, found = exported(tmp_path, source, dtype="float16")
    assert dtype == "float16"
    assert all((tensor.dtype == torch.float32) == name.endswith("norm.weight") for name, tensor in found.items())


def test_the_ledger_tells_source_layout_and_sum_of_every_tensor(dims, tmp_path):
    source = sharded(tmp_path / "hf", dims)
    import_hf.run(import_hf.Config(str(source)), new(tmp_path / "model"), tmp_path)
    export_hf.run(export_hf.Config(str(tmp_path / "model")), new(tmp_path / "out"), tmp_path)
    came = durable.read_json(tmp_path / "model" / "hf" / convert.LEDGER)
    went = durable.read_json(tmp_path / "out" / convert.LEDGER)
    assert (came["direction"], went["direction"]) == ("import", "export")
    assert came["tensors"] == went["tensors"]  # the same sums
    index = json.loads((source / hf_files.INDEX).read_text())["weight_map"]
    assert {name: entry["file"] for name, entry in came["hf"].items()} == index
    assert came["tensors"].keys() == {rule.name for rule in tiny.family(dims).mapping.rules(dims)}
    entry = next(entry for name, entry in came["tensors"].items() if name.endswith("linear_qkv.weight"))
    assert [name[-13:] for name in entry["hf"]] == [f"{x}_proj.weight" for x in "qkv"]
    assert entry["layout"].startswith("QueryKeyValue(heads=4, groups=2") and len(entry["keys"]) == 1


# ---------------------------------------------------------------- wrong input


def refused(source: Path) -> str:
    out = new(source.with_name("refused"))
    with pytest.raises(UserMistake) as found:
        import_hf.run(import_hf.Config(str(source)), out, out)
    assert list(out.iterdir()) == []
    return str(found.value)


def test_a_missing_shard_is_one_line(tmp_path):
    source = sharded(tmp_path / "hf")
    (source / "model-00002-of-00004.safetensors").unlink()
    message = refused(source)
    assert "model-00002-of-00004.safetensors: is missing, with" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("dims", [tiny.dims(tied=True), replace(tiny.GPT_OSS_DIMS, tied=True)], ids=["qwen2", "oss"])
def test_a_copy_is_left_out_where_it_is_one_and_refused_where_it_is_not(dims, tmp_path):
    source = tiny.hf_folder(tmp_path / "hf", dims)
    plain = import_hf.run(import_hf.Config(str(source)), new(tmp_path / "plain"), tmp_path)
    tensors, angle = tensors_of(source), "model.layers.0.self_attn.rotary_emb.inv_freq"
    embedding = tensors["model.embed_tokens.weight"]
    right = dims.rope_base ** -(torch.arange(0, dims.head_dim, 2) / dims.head_dim)

    def with_copies(**copies: torch.Tensor) -> Path:
        names = {"head": "lm_head.weight", "angles": angle}
        more = {names[name]: tensor.contiguous() for name, tensor in copies.items()}
        save_file({**tensors, **more}, source / "model.safetensors", metadata={"format": "pt"})
        return source

    same = import_hf.Config(str(with_copies(head=embedding.clone(), angles=right.bfloat16())))
    assert import_hf.run(same, new(tmp_path / "same"), tmp_path)["weights_digest"] == plain["weights_digest"]
    other = embedding.clone()
    other[3, 5] += 0.5
    said = refused(with_copies(head=other))
    assert f"lm_head.weight differs in 1 of {other.numel():,} elements, by up to 0.5 from" in said
    shutil.rmtree(tmp_path / "refused")
    assert "lm_head.weight is bfloat16 [" in refused(with_copies(head=embedding.bfloat16()))
    shutil.rmtree(tmp_path / "refused")
    said = refused(with_copies(angles=(dims.rope_base * 50.0) ** -(torch.arange(0, dims.head_dim, 2) / dims.head_dim)))
    assert f"{angle} has " in said and f"config.json gives {float(right[1]):.6g}" in said


def test_a_download_leaves_out_the_twins_of_weights_in_the_format_of_their_authors(tmp_path, monkeypatch):
    """Llama's and gpt-oss' `original` folders, Mistral's `consolidated` files."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "tokenizer.model", "merges.txt", "chat_template.jinja"]  # fmt: skip
    twins = ["original/consolidated.00.pth", "original/model.safetensors", "original/params.json", "README.md",
             "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "pytorch_model.bin"]  # fmt: skip
    found = []

    def download(source, revision, **patterns):
        found.extend(filter_repo_objects([*twins, *wanted], **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert import_hf.fetch("org/model", "") == tmp_path
    assert sorted(found) == sorted(wanted)


def test_the_weights_of_a_folder_are_those_that_transformers_reads(tmp_path):
    """model.safetensors, whatever else lies there; else the index; else all the shards, where none is missing."""
    right, other = (tensors_of(tiny.hf_folder(tmp_path / f"{seed}", seed=seed)) for seed in (0, 1))
    names, plain = sorted(right), {"format": "pt"}
    shards = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    index = {name: shards[i % 2] for i, name in enumerate(names)}

    def folder(name: str, **wanted: dict[str, torch.Tensor]) -> Path:
        source = new(tmp_path / name)
        shutil.copy(tmp_path / "0" / "config.json", source)
        save_file(other, source / "consolidated.safetensors", metadata=plain)
        (source / "pytorch_model.bin").write_bytes(b"no weights of this model")
        if "single" in wanted:
            save_file(wanted["single"], source / "model.safetensors", metadata=plain)
        for i, file in enumerate(shards if "shards" in wanted else ()):
            mine = {name: wanted["shards"][name] for name in names[i::2]}
            save_file(mine, source / file, metadata=plain)
        if "index" in wanted:
            durable.write_json(source / hf_files.INDEX, {"weight_map": wanted["index"]})
        return source

    def read(source: Path) -> dict[str, torch.Tensor]:
        found = hf_files.HfTensors(source)
        return {name: found.read(name) for name in found.shapes()}

    assert equal(read(folder("stale index", single=right, index=index)), right)
    assert equal(read(folder("old shards too", single=right, shards=other, index=index)), right)
    assert equal(read(folder("shards", shards=right, index=index)), right)
    assert equal(read(folder("shards without index", shards=right)), right)
    said = refused(folder("nothing"))
    assert "has neither model.safetensors nor model.safetensors.index.json, but consolidated.safetensors, " in said
    for name, wanted, message in (
        ("with index", dict(shards=right, index=index), f"{shards[1]}: is missing, with {len(names) // 2} tensors"),
        ("without index", dict(shards=right), "has 1 of 2 shards: number 2 is missing"),
    ):
        source = folder(name, **wanted)
        (source / shards[1]).unlink()
        shutil.rmtree(tmp_path / "refused", ignore_errors=True)
        assert message in refused(source)
    twice = folder("twice", shards=right, index=index)
    more = {name: right[name] for name in names[1::2]} | {names[0]: other[names[0]] + 1}
    save_file(more, twice / shards[1], metadata=plain)
    shutil.rmtree(tmp_path / "refused")
    assert f"tensor {names[0]} is in {shards[0]} and in {shards[1]}, where it differs in " in refused(twice)


def test_a_truncated_file_is_one_line(tmp_path):
    source = sharded(tmp_path / "hf")
    file = source / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(source)
    assert f"{file}: not a whole safetensors file" in message and len(message.splitlines()) == 1


def test_weights_of_another_model_are_one_line(tmp_path):
    source = tiny.hf_folder(tmp_path / "hf")
    save_file({"transformer.wte.weight": torch.zeros(4, 2)}, source / "model.safetensors")
    message = refused(source)
    assert "has none of the" in message and "but transformer.wte.weight [4, 2]" in message


def test_a_model_of_another_size_names_the_first_tensors_only(tmp_path):
    source = tiny.hf_folder(tmp_path / "hf", replace(tiny.DIMS, layers=3))
    durable.write_json(source / "config.json", tiny.QWEN2.config.hf_config(replace(tiny.DIMS, hidden=40)))
    message = refused(source)
    assert "has shape [19, 32], config.json gives [19, 40]" in message
    assert len(message.splitlines()) == convert.LISTED + 1 and "more tensors are wrong" in message


def test_weights_that_were_changed_by_hand_are_not_exported(tmp_path):
    import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / "hf"))), new(tmp_path / "model"), tmp_path)
    file = tmp_path / "model" / "weights" / "__0_0.distcp"
    data = file.read_bytes()
    at = data.index((tmp_path / "hf" / "model.safetensors").read_bytes()[-40:])
    file.write_bytes(data[:at] + b"\x01" + data[at + 1 :])
    with pytest.raises(UserMistake, match="they were changed"):
        export_hf.run(export_hf.Config(str(tmp_path / "model")), new(tmp_path / "out"), tmp_path)


def test_a_lost_weights_folder_is_one_line(tmp_path):
    import_hf.run(import_hf.Config(str(tiny.hf_folder(tmp_path / "hf"))), new(tmp_path / "model"), tmp_path)
    shutil.rmtree(tmp_path / "model" / "weights")
    with pytest.raises(UserMistake, match="not a distributed checkpoint"):
        export_hf.run(export_hf.Config(str(tmp_path / "model")), new(tmp_path / "out"), tmp_path)
