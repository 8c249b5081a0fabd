"""Files of strangers: none runs a command, and none has a private file of the user's copied or read."""

import json
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import export_hf, import_hf, init_model
from megatron_ext.files import pickles, stored
from megatron_ext.model_folders import model_folder
from megatron_ext.models.nanochat.checkpoint import NanochatTensors
from megatron_ext.weights import dist_weights, random_states

SECRET = "machine x login y password PRIVATE"
TENSOR = "decoder.final_layernorm.weight"


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def call(module: str, name: str, *args: str, protocol: int = 2) -> bytes:
    """A pickle that calls module.name(*args)."""
    if protocol == 4:
        return b"\x80\x04" + short(module) + short(name) + b"\x93" + b"(" + b"".join(map(text, args)) + b"tR."
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(map(text, args)) + b"tR."


def pickles_that_run(mark: Path) -> dict[str, bytes]:
    """Name -> a pickle that leaves the file `mark` where it is read by a plain unpickler, or by a list of modules."""
    shell, python = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    inner = pickle.dumps(Call(os.system, shell), 2)
    getattr_ = b"\x80\x02cbuiltins\ngetattr\n(ctorch\nserialization\n" + text("os") + b"tR."
    build = b"\x80\x02cargparse\nNamespace\n(N}" + text("__setstate__") + b"cos\nsystem\nstb" + text(shell) + b"b."
    return {
        "posix.system": pickle.dumps(Call(os.system, shell), 2),
        "a dotted name": call("torch", "os.system", shell, protocol=4),
        "a function below torch": call("torch.utils.collect_env", "run", shell),
        "a function below numpy": call("numpy.testing._private.utils", "runstring", python, "").replace(
            text(""), b"}"
        ),
        "builtins.exec": call("builtins", "exec", python),
        "__builtin__.eval": call("__builtin__", "eval", python),
        "a storage's own unpickler": pickle.dumps(Call(torch.storage._load_from_bytes, _saved(inner)), 2),
        "numpy's unpickler": b"\x80\x02cnumpy\nload\n(" + text(str(mark.with_suffix(".npy"))) + b"tR.",
        "getattr": getattr_,
        "the state of a class": build,
        "operator.attrgetter": call("operator", "attrgetter", "os.system"),
    }  # fmt: skip


def _saved(data: bytes) -> bytes:
    """torch.save's older form, which is pickles one after another, with `data` in the first one's place."""
    return data


def archive(path: Path, data: bytes, more: Mapping[str, bytes] = {}) -> Path:
    """A .pt file with that pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **more}.items():
            file.writestr(f"archive/{name}", content)
    return path


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "MARK"


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A Hugging Face folder with weights and tokenizer, by init_model; copied before it is changed."""
    folder = tmp_path_factory.mktemp("hf")
    init_model.run(init_model.Config(alphabet_task="calculator", hidden=32, ffn=48, layers=2), folder, folder)
    return folder


@pytest.fixture(scope="module")
def made(hf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    import_hf.run(import_hf.Config(str(hf)), folder, folder)
    return folder


def copied(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def refused(mark: Path, function, *args) -> str:
    """What the refusal says. Nothing has run, whatever the way."""
    with pytest.raises(UserMistake) as found:
        function(*args)
    assert not mark.exists()
    return str(found.value)


NAMES = list(pickles_that_run(Path("/x")))


# ---------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_of_a_checkpoint_runs_anything(name, mark, made, hf, tmp_path):
    data = pickles_that_run(mark)[name]
    archive(tmp_path / "legacy" / "mp_rank_00" / "model_optim_rng.pt", data)
    config = import_hf.Config(str(hf), megatron=str(tmp_path / "legacy"))
    (tmp_path / "out").mkdir()
    refused(mark, import_hf.run, config, tmp_path / "out", tmp_path)
    refused(mark, NanochatTensors, archive(tmp_path / "model_000001.pt", data), 10)
    refused(mark, random_states.read, archive(tmp_path / "rng" / "0.pt", data).parent, "0.pt", 0, None)
    for number, file in enumerate((dist_weights.METADATA, dist_weights.COMMON, "__0_0.distcp")):
        folder = copied(made, tmp_path / f"model{number}")
        if file == dist_weights.METADATA:
            (folder / "weights" / file).write_bytes(data)
        elif file == dist_weights.COMMON:
            archive(folder / "weights" / file, data)
        else:
            _replace_piece(folder / "weights", data)
        (tmp_path / f"out{number}").mkdir()
        refused(mark, export_hf.run, export_hf.Config(str(folder)), tmp_path / f"out{number}", tmp_path)


def _replace_piece(weights: Path, data: bytes) -> None:
    """Put a .pt file with that pickle where .metadata says that a tensor is."""
    from dataclasses import replace

    found = stored.read(weights / dist_weights.METADATA)
    file = archive(weights / "__7_0.distcp", data)
    written = []
    for key, tensor in found.tensors.items():
        for piece in tensor.pieces:
            region = dist_weights.Region(key, tensor.shape, piece.offset, piece.size)
            whole = dist_weights.Piece(region, tensor.dtype, piece.file, piece.start, piece.length)
            mine = key == TENSOR
            written.append(replace(whole, file=file.name, start=0, length=file.stat().st_size) if mine else whole)
    dist_weights.finish(weights, written)


def test_the_pickles_would_run_in_a_plain_unpickler(mark):
    ran = []
    for name, data in pickles_that_run(mark).items():
        try:
            pickle.loads(data)
        except Exception:
            pass
        if mark.exists():
            ran.append(name)
            mark.unlink()
    assert len(ran) >= 5, ran


def test_files_of_older_and_other_formats_are_not_opened_at_all(mark, tmp_path):
    """A .pt file of before torch 1.6 is pickles one after another; a TorchScript archive is a program."""
    data = pickles_that_run(mark)["posix.system"]
    (tmp_path / "old.pt").write_bytes(data * 4)
    archive(tmp_path / "script.pt", call("collections", "OrderedDict"), {"constants.pkl": data})
    for name in ("old.pt", "script.pt"):
        with pytest.raises(pickles.Refused):
            pickles.load(tmp_path / name)
    assert not mark.exists()


def test_damaged_files_are_refused_and_never_reach_beyond_themselves(tmp_path):
    """Each byte of the pickle and of the archive's directory changed, in turn: a tensor of the file, or Refused."""
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    start = data.index(b"data.pkl") + 8
    places = [*range(start, data.index(b"PK", start), 3), *range(len(data) - 400, len(data), 3)]
    for at in places:
        for flip in (0x01, 0x80):
            (tmp_path / "y.pt").write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            try:
                found = pickles.load(tmp_path / "y.pt")
            except pickles.Refused:
                continue
            for tensor in found.values() if isinstance(found, dict) else []:
                if isinstance(tensor, torch.Tensor):
                    tensor.clone()  # every element is read


def test_what_torch_saves_comes_back(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    values = {
        "strided": torch.arange(12.0).reshape(3, 4).t()[1:],
        "shared": weight.detach()[2:],
        "parameter": weight,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in pickles.DTYPES.values()},
    }
    torch.save({"values": values, "size": torch.Size([1, 2]), "numbers": (1, 2.5, None, "x")}, tmp_path / "x.pt")
    found = pickles.load(tmp_path / "x.pt")
    assert found["size"] == (1, 2) and found["numbers"] == (1, 2.5, None, "x")
    for name, value in values.items():
        ours = found["values"][name]
        assert ours.dtype == value.dtype and ours.shape == value.shape
        assert bytes(ours.contiguous().reshape(-1).view(torch.uint8)) == bytes(
            value.detach().contiguous().reshape(-1).view(torch.uint8)
        )


def test_objects_of_others_stay_names(tmp_path):
    torch.save({"args": Namespace(heads=4, kind=Call(os.getcwd))}, tmp_path / "x.pt")
    found = pickles.load(tmp_path / "x.pt", pickles.ARGUMENTS, unknown=True)["args"]
    assert found.heads == 4 and isinstance(found.kind, pickles.Node) and found.kind.pair == ("posix", "getcwd")
    with pytest.raises(pickles.Refused, match="it names argparse.Namespace"):
        pickles.load(tmp_path / "x.pt")


# ---------------------------------------------------------------- names and links


def nothing_private(folder: Path) -> bool:
    return all(SECRET not in path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def private(tmp_path) -> Path:
    path = tmp_path / "home" / "netrc"
    path.parent.mkdir()
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def tried(function, config, out: Path) -> str:
    """What the refusal says; "" where the phase took the folder, without anything private."""
    out.mkdir()
    try:
        function(config, out, out)
    except UserMistake as mistake:
        assert nothing_private(out) and SECRET not in str(mistake)
        return str(mistake)
    assert nothing_private(out)
    return ""


@pytest.mark.parametrize(
    "name", ["vocab.txt", "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
)
def test_a_link_out_of_a_models_folder_is_refused_wherever_it_is(name, private, hf, tmp_path):
    source = copied(hf, tmp_path / "hf")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(private)
    assert f"is a link to {private}, outside of the folder" in tried(
        import_hf.run, import_hf.Config(str(source)), tmp_path / "out"
    )
    if name != "model.safetensors":
        if name != "config.json":
            assert "outside of the folder" in tried(
                import_hf.run, import_hf.Config(str(hf), tokenizer=str(source)), tmp_path / "out2"
            )
        with pytest.raises(UserMistake, match="outside of the folder"):
            load_tokenizer(str(source))


@pytest.mark.parametrize(
    "place",
    ["../outside", "{outside}", "sub/../../outside", "link", "elsewhere/outside", "/proc/self/mem", "pipe", "a\0", "."],
)
def test_an_index_names_files_of_its_folder_only(place, hf, tmp_path):
    source, outside = copied(hf, tmp_path / "hf"), tmp_path / "outside"
    names = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(outside)
    (source / "link").symlink_to(outside)
    (source / "sub").mkdir()
    (source / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(source / "pipe")
    place = place.format(outside=outside)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    assert tried(import_hf.run, import_hf.Config(str(source)), tmp_path / "out")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
def test_a_link_out_of_a_checkpoint_is_refused(name, private, made, tmp_path):
    folder = copied(made, tmp_path / "model")
    (folder / "weights" / name).unlink()
    (folder / "weights" / name).symlink_to(private)
    with pytest.raises(UserMistake, match="outside of the folder"):
        model_folder.link_files(folder / "weights", tmp_path / "linked")
    assert not any((tmp_path / "linked").iterdir())
    if name != "metadata.json":
        assert "outside of the folder" in tried(export_hf.run, export_hf.Config(str(folder)), tmp_path / "out")


def test_metadata_that_names_a_file_elsewhere_is_refused(private, made, tmp_path):
    folder = copied(made, tmp_path / "model")
    (folder / "weights" / "__0_0.distcp").rename(tmp_path / "mv.distcp")
    data = (folder / "weights" / ".metadata").read_bytes()
    (folder / "weights" / ".metadata").write_bytes(data.replace(b"__0_0.distcp", b"../mv.distcp"))
    assert "leads out of the folder" in tried(export_hf.run, export_hf.Config(str(folder)), tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_an_adapters_folder_is_refused(name, private, hf, tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    durable.write_json(peft / "adapter_config.json", config)
    save_file({}, peft / "adapter_model.safetensors")
    (peft / name).unlink()
    (peft / name).symlink_to(private)
    config = import_hf.Config(str(hf), adapter=str(peft))
    assert "outside of the folder" in tried(import_hf.run, config, tmp_path / "out")


def test_an_adapter_reads_its_own_file_and_no_other(private, hf, tmp_path):
    """Neither what an index beside it names, nor the base model that it names, nor a pipe is opened."""
    peft = tmp_path / "peft"
    peft.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(private.parent)}  # fmt: skip
    durable.write_json(peft / "adapter_config.json", config)
    durable.write_json(peft / "model.safetensors.index.json", {"weight_map": {"x": str(private)}})
    config = import_hf.Config(str(hf), adapter=str(peft))
    assert "has no adapter_model.safetensors" in tried(import_hf.run, config, tmp_path / "out")
    os.mkfifo(peft / "adapter_model.safetensors")
    assert "is no regular file" in tried(import_hf.run, config, tmp_path / "out2")


def test_a_folder_of_templates_that_is_a_link_is_refused(private, hf, tmp_path):
    folder = copied(hf, tmp_path / "tokenizer")
    (private.parent / "x.jinja").write_text(SECRET)
    (folder / "additional_chat_templates").symlink_to(private.parent)
    with pytest.raises(UserMistake, match="lies in a link to another folder"):
        load_tokenizer(str(folder))


def test_an_adapter_whose_expression_never_ends_is_refused(hf, tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": r"(m|mo|o|[a-z_.0-9])*(.*.*)*\1*!"}
    durable.write_json(peft / "adapter_config.json", config)
    save_file({}, peft / "adapter_model.safetensors")
    tried(import_hf.run, import_hf.Config(str(hf), adapter=str(peft)), tmp_path / "out")


def test_an_adapter_that_is_a_pickle_is_refused(mark, hf, tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    durable.write_json(peft / "adapter_config.json", config)
    archive(peft / "adapter_model.bin", pickles_that_run(mark)["posix.system"])
    said = tried(import_hf.run, import_hf.Config(str(hf), adapter=str(peft)), tmp_path / "out")
    assert "has no adapter_model.safetensors, but adapter_model.bin; write it with save_pretrained" in said
    assert not mark.exists()


def test_links_of_the_hubs_cache_are_followed(hf, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in hf.iterdir():
        (blobs / path.name[::-1]).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name[::-1])
    assert tried(import_hf.run, import_hf.Config(str(snapshot)), tmp_path / "out") == ""
    assert load_tokenizer(str(snapshot)).vocab_size == load_tokenizer(str(hf)).vocab_size
    own = tmp_path / "own"
    own.mkdir()
    for path in hf.iterdir():
        (own / path.name).symlink_to(blobs / path.name[::-1])
    assert tried(import_hf.run, import_hf.Config(str(own)), tmp_path / "out2") == ""


def test_blobs_that_are_a_link_are_no_cache(private, hf, tmp_path):
    snapshot = tmp_path / "evil" / "snapshots" / "0123"
    copied(hf, snapshot)
    (tmp_path / "evil" / "blobs").symlink_to(private.parent)
    (snapshot / "vocab.txt").symlink_to("../../blobs/netrc")
    assert "outside of the folder" in tried(import_hf.run, import_hf.Config(str(snapshot)), tmp_path / "out")


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("where, changes", [
    ("tokenizer_config.json", dict(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})),
    ("tokenizer_config.json", dict(auto_map={"AutoTokenizer": [None, "evil.Evil"]})),
    ("tokenizer_config.json", dict(tokenizer_class="Evil", auto_map=["evil.Evil", None])),
    ("config.json", dict(auto_map={"AutoTokenizer": "evil.Evil"})),
    ("tokenizer_config.json", dict(tokenizer_class="Qwen2Tokenizer", vocab_file="{private}")),
])  # fmt: skip
def test_a_tokenizer_neither_runs_code_nor_reads_elsewhere(where, changes, private, mark, hf, tmp_path):
    folder = copied(hf, tmp_path / "tokenizer")
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    changes = json.loads(json.dumps(changes).replace("{private}", str(private)))
    durable.write_json(folder / where, {**durable.read_json(folder / where), **changes})
    said = refused(mark, load_tokenizer, str(folder))
    assert "evil.Evil" in said and "which is not run" in said or "which is not in the folder" in said
