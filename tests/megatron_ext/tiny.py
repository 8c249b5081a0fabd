"""Tiny models and packs that every test builds the same way, in any process and under any layout."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from data_tools.base import durable
from megatron_ext.models.gpt_oss import config as gpt_oss
from megatron_ext.models.layouts import hf_rules, hf_shapes
from megatron_ext.models.nanochat import config as nanochat
from megatron_ext.models.nemotron_h import config as nemotron_h
from megatron_ext.models.qwen2.config import Dims
from megatron_ext.models.registry import Family
from megatron_ext.models.rotary import Yarn
from megatron_ext.parallel.parts import OURS, Parts

QWEN2 = Family("qwen2")
# 19 rows: an odd vocabulary, so that tensor parallelism pads it.
DIMS = Dims(
    layers=2,
    hidden=32,
    ffn=48,
    heads=4,
    kv_groups=2,
    head_dim=8,
    vocabulary=19,
    tied=True,
    norm_epsilon=1e-6,
    rope_base=10000.0,
    max_positions=512,
    dtype="float32",
)

# Documents of the tests are shorter and longer than the window and than YaRN's original positions.
GPT_OSS_DIMS = gpt_oss.Dims(
    hidden=32,
    heads=4,
    kv_groups=2,
    head_dim=8,
    window=8,
    sliding=(True, False),
    experts=4,
    top_k=2,
    ffn=24,
    swiglu_limit=7.0,
    vocabulary=19,
    tied=False,
    norm_epsilon=1e-5,
    rope_base=150000.0,
    yarn=gpt_oss.Yarn(4.0, 16, 32.0, 1.0, truncate=False),
    max_positions=512,
    dtype="float32",
)

# Every kind of block; more heads than groups; widths that are no powers of two.
NEMOTRON_H_DIMS = nemotron_h.Dims(
    pattern="MEM*E-",
    hidden=32,
    vocabulary=19,
    norm_epsilon=1e-5,
    max_positions=512,
    dtype="float32",
    heads=4,
    kv_groups=2,
    head_dim=10,
    mamba_heads=8,
    mamba_head_dim=6,
    mamba_groups=4,
    mamba_state=7,
    ffn=40,
    experts=4,
    top_k=2,
    expert_ffn=24,
    shared_ffn=20,
    routed_scale=2.5,
)

NANOCHAT_DIMS = nanochat.Dims(
    layers=2,
    hidden=32,
    ffn=40,
    heads=4,
    kv_groups=2,
    vocabulary=19,
    tied=False,
    norm_epsilon=1e-6,
    rope_base=10000.0,
    max_positions=512,
    logit_cap=2.0,  # low, so that it matters
    dtype="float32",
)


def dims(**changes: Any) -> Dims:
    return replace(DIMS, **changes)


WINDOW = dict(window=8, sliding=(True, True))
MOE = dict(experts=4, top_k=2, expert_ffn=24)
# The other kinds of the family qwen2 (models/qwen2/kinds.py): a line here is a line in every suite of families.
KINDS: dict[str, Dims] = {
    "qwen3_moe": dims(kind="qwen3_moe", tied=False, **MOE, dense=(False, True)),
    "mistral": dims(kind="mistral", tied=False, **WINDOW),
    "mixtral": dims(kind="mixtral", tied=False, experts=4, top_k=2),
    "qwen2_moe": dims(kind="qwen2_moe", tied=False, **MOE, shared_ffn=40, norm_topk_prob=False),
    "phi3": dims(kind="phi3", tied=False, partial=0.75),
    "olmo2": dims(kind="olmo2", tied=False, kv_groups=4),
    "olmo3": dims(kind="olmo3", tied=False, window=8, sliding=(True, False), stretch=Yarn(4.0, 16, 32.0, 1.0, True)),
    "smollm3": dims(kind="smollm3", no_rope=(False, True)),
    "glm4": dims(kind="glm4", tied=False, attention_bias=True, partial=0.5),
    "glm4_moe": dims(kind="glm4_moe", tied=False, **MOE, shared_ffn=48, partial=0.5, attention_bias=True,
                     dense=(True, False), routed_scaling_factor=1.5),
    "granite": dims(kind="granite", embedding_multiplier=1.5, residual_multiplier=0.7, attention_multiplier=0.2,
                    logits_scaling=4.0),
}  # fmt: skip


def marked(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that CI runs with the families alone, and `-m soak` with KINDS too."""
    return [pytest.param(name, marks=[pytest.mark.soak] if name in KINDS else []) for name in names]


def of_layers(of: Dims, layers: int) -> Dims:
    """The same with more layers, of whose kinds there are as many as there may be."""
    own = {name: getattr(of, name) for name in ("sliding", "no_rope", "dense")}
    longer = {name: (each * layers)[:layers] for name, each in own.items()}
    if of.of_kind.experts and of.of_kind.experts.dense == "first":
        longer["dense"] = tuple(sorted(longer["dense"], reverse=True))
    return replace(of, layers=layers, **longer)


def hybrid(pattern: str, **sizes: Any) -> nemotron_h.Dims:
    """NEMOTRON_H_DIMS with other layers; the sizes of blocks that it lacks are 0, as its config.json has none."""
    lacking = [fields for block, fields in nemotron_h.SIZES.items() if block not in pattern]
    nothing = {field: 0 for fields in lacking for field in fields}
    scale = NEMOTRON_H_DIMS.routed_scale if "E" in pattern else 1.0
    return replace(NEMOTRON_H_DIMS, pattern=pattern, routed_scale=scale, **nothing | sizes)


def family(of: Any) -> Family:
    """The family whose Dims these are."""
    return Family(type(of).__module__.split(".")[-2])


def hf_folder(folder: Path, of: Any = DIMS, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights, norms, biases and buffers included."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rules = family(of).mapping.rules(of)
    tensors, shapes = {}, hf_shapes(rules)
    for name, entries in hf_rules(rules).items():
        noise, start = torch.randn(shapes[name], generator=generator), entries[0][0].start
        if start is not None:
            tensors[name] = start(shapes[name], generator) + 0.25 * noise
        else:
            tensors[name] = 1 + 0.2 * noise if name.endswith("norm.weight") else 0.25 * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    durable.write_json(folder / "config.json", family(of).config.hf_config(of))
    return folder


def parts(
    hf: Path,
    of: Any,
    plan: Any,
    made_of: Parts = OURS,
    *,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] = {},
) -> list[Any]:
    """This rank's parts of the model in `hf`. Groups for `plan` must exist."""
    from megatron_ext.weights import convert

    built = family(of).build(of, plan, dtype, made_of, options)
    for part in built:
        convert.import_weights(part, hf, family(of), of)
    return built


def model(hf: Path, of: Any, plan: Any) -> Any:
    """`parts` where the pipeline is not interleaved: the rank's one part."""
    (built,) = parts(hf, of, plan)
    return built


@dataclass(frozen=True)
class Pack:
    ids: numpy.ndarray
    labels: numpy.ndarray
    loss_mask: numpy.ndarray
    positions: numpy.ndarray
    cu_seqlens: numpy.ndarray


def pack(lengths: Sequence[int], seed: int, supervised: float = 0.5, vocabulary: int = 19) -> Pack:
    """Documents of these lengths with random tokens; about a share `supervised` of each document's labels counts."""
    random = numpy.random.default_rng(seed)
    total = sum(lengths)
    ids = random.integers(0, vocabulary, total)
    labels, mask, positions = numpy.zeros_like(ids), numpy.zeros(total, numpy.float32), numpy.zeros_like(ids)
    cu = numpy.concatenate([[0], numpy.cumsum(lengths)])
    for start, end in zip(cu[:-1], cu[1:]):
        labels[start : end - 1] = ids[start + 1 : end]
        positions[start:end] = numpy.arange(end - start)
        mask[end - 1 - int((end - start) * supervised) : end - 1] = 1
    return Pack(ids, labels, mask, positions, cu.astype(numpy.int32))


class Packs:
    """Packs in memory with PackReader's interface. Pack i supervises more tokens the larger i % 5 is."""

    def __init__(self, n: int = 8, pack_length: int = 48, name: str = "tiny", align: int = 1):
        self.n_packs, self.pack_length, self.digest, self.align = n, pack_length, f"{name}-{n}-{pack_length}", align

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        return [(seed + k * global_batch + i) % self.n_packs for i in range(global_batch)]

    def share(self, k: int, global_batch: int, seed: int, rank: int, ranks: int) -> list[int]:
        return self.batch(k, global_batch, seed)[rank::ranks]

    def padding(self, i: int) -> int:
        return 0

    def pack(self, i: int) -> Pack:
        random = numpy.random.default_rng(1000 + i)
        lengths: list[int] = []
        while sum(lengths) < self.pack_length:
            length = -(-int(random.integers(2, 20)) // self.align) * self.align
            lengths.append(min(length, self.pack_length - sum(lengths)))
        return pack(lengths, i, supervised=(i % 5 + 1) / 6)
