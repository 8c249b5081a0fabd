"""What a LoRA is (Hu et al., arXiv 2106.09685) and what it reaches of a model; no torch.

Beside a frozen matrix W [out, in] two small ones are trained, A [rank, in] and B [out, rank], and the layer computes
W x + (alpha / rank) B A x. Targets are the module names of PEFT and Hugging Face; experts and router, which
transformers keep as bare parameters, go by "experts" and "router".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.base.declared import setting
from data_tools.mistake import Problem, nearest
from megatron_ext.parallel.shape import ATTENTION, MAMBA, MLP, WINDOW, ModelShape, Parameters

ALL_LINEAR = "all-linear"
EXPERTS, ROUTER = "experts", "router"
ROUTERS = ("router", "gate")  # what Hugging Face calls the router's module
BARE = (EXPERTS, ROUTER)  # PEFT has no dropout for these
MAMBA_OUT = "out_proj"  # PEFT refuses it: transformers' kernel reads the weight itself
NOT_IN_ALL = (*BARE, MAMBA_OUT)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one matrix each in megatron-core
NO_TARGETS = {
    "embed_tokens": "the embedding stays as it is",
    "lm_head": "the output layer stays as it is",
    "conv1d": "a convolution is no linear layer",
}


@dataclass
class LoraConfig:
    """The adapters of a model."""

    rank: int = setting(
        0, "columns of A and rows of B; 0: no LoRA, all parameters are trained", unit="columns", least=0
    )
    alpha: float = setting(16.0, "the adapter is scaled by alpha / rank", above=0)
    dropout: float = setting(0.0, "dropout of the adapters' input", least=0, below=1)
    targets: list[str] = setting(
        lambda: [ALL_LINEAR],
        "modules that get an adapter: all-linear, or q_proj, …, experts, router",
        example=["q_proj", "v_proj"],
        free=True,
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] of a block, `count` times (once an expert), and how tensor ranks share it: by
    "rows", by "columns", or not at all ("")."""

    target: str
    rows: int
    columns: int
    shared: str = "rows"
    count: int = 1

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.count

    def adapter(self, rank: int) -> Parameters:
        """Return the parameters of A and B by how they spread."""
        a, b = rank * self.columns * self.count, rank * self.rows * self.count
        if self.target == EXPERTS:
            return Parameters(expert=a + b)
        sharded = {"rows": b, "columns": a, "": 0}[self.shared]
        return Parameters(sharded=sharded, replicated=a + b - sharded)


def matrices(shape: ModelShape, block: str) -> list[Matrix]:
    """Return the matrices that adapters can reach in a block of that kind."""
    s, h = shape, shape.hidden
    if block in (ATTENTION, WINDOW):
        queries, keys = s.heads * s.head_dim, s.kv_groups * s.head_dim
        rows = {"qkv_proj": s.qkv_rows} if s.fused_qkv else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        return [*(Matrix(name, n, h) for name, n in rows.items()), Matrix("o_proj", h, queries, "columns")]
    if block == MLP:
        return _mlp(s, s.ffn)
    if block == MAMBA:
        return [Matrix("in_proj", s.mamba_projection, h), Matrix("out_proj", h, s.mamba_inner, "columns")]
    first = 2 * s.expert_ffn if s.gated else s.expert_ffn  # gate and up share an adapter, being one parameter
    experts = [
        Matrix(EXPERTS, first, h, "rows", count=s.experts),
        Matrix(EXPERTS, h, s.expert_ffn, "columns", count=s.experts),
    ]
    return [Matrix(ROUTER, s.experts, h, ""), *experts, *(_mlp(s, s.shared_ffn) if s.shared_ffn else [])]


def _mlp(s: ModelShape, width: int) -> list[Matrix]:
    *first, last = s.mlp_names
    rows = width * (s.mlp_matrices - 1) // len(first)  # gate and up may be one matrix
    return [*(Matrix(name, rows, s.hidden) for name in first), Matrix(last, s.hidden, width, "columns")]


def targets_of(shape: ModelShape) -> list[str]:
    """Return every name that a target may have in this model."""
    return list(dict.fromkeys(matrix.target for block in shape.blocks for matrix in matrices(shape, block)))


def chosen(config: LoraConfig, shape: ModelShape) -> list[str]:
    """Return the targets with "all-linear" spelled out, in the order of `targets_of`."""
    known = targets_of(shape)
    everything = [name for name in known if name not in NOT_IN_ALL] if ALL_LINEAR in config.targets else []
    return [name for name in known if name in config.targets or name in everything]


def adapters(config: LoraConfig, shape: ModelShape, block: str) -> Parameters:
    """Return the parameters of the adapters of one block of that kind."""
    names = chosen(config, shape)
    reached = [matrix for matrix in matrices(shape, block) if matrix.target in names]
    return sum((matrix.adapter(config.rank) for matrix in reached), start=Parameters())


def held(config: LoraConfig, shape: ModelShape, block: str) -> Parameters:
    """Return the parameters that ranks hold of them: of a fused matrix B has the rows of every part, though some have
    no adapter, and theirs stay 0 (pairs.py)."""
    names, rows = chosen(config, shape), 0
    for fused in FUSED:
        own = [matrix for matrix in matrices(shape, block) if matrix.target in fused]
        left = [matrix for matrix in own if matrix.target not in names]
        rows += sum(matrix.rows for matrix in left) if len(left) < len(own) else 0
    return adapters(config, shape, block) + Parameters(sharded=config.rank * rows)


def check(config: LoraConfig, shape: ModelShape | None, where: str = "lora") -> list[Problem]:
    """Refuse settings that do not go together, and targets that the model does not have, once it is known."""
    problems = []
    if config.rank == 0:
        if config != LoraConfig():
            problems.append(Problem(f"{where}.rank", "is 0, which turns LoRA off, but other settings of it are given"))
        return problems
    if config.dropout and (bare := [name for name in config.targets if name in BARE]):
        those = "it" if len(bare) == 1 else "them"
        message = f"PEFT knows no dropout for {' and '.join(bare)}: use 0, or leave {those} out"
        problems.append(Problem(f"{where}.dropout", message))
    if not config.targets:
        problems.append(Problem(f"{where}.targets", f"names nothing: use [{ALL_LINEAR}]"))
    return problems + (_check_targets(config, shape, where) if shape else [])


def check_base(base: str, config: LoraConfig, where: str = "base") -> list[Problem]:
    """Refuse to train a model whose experts are held in a format that no update can change."""
    if not base or config.rank:
        return []
    return [Problem(where, f"{base} holds experts that stay as they are: train adapters (lora.rank), or leave it out")]


def check_folder(config: LoraConfig, adapter: LoraConfig | None, folder: str) -> list[Problem]:
    """Refuse to train with `config` on a model folder that has an adapter of another kind."""
    if adapter is None or adapter == config:
        return []
    has, wanted = (f"rank {each.rank}, alpha {each.alpha:g}, targets {each.targets}" for each in (adapter, config))
    message = f"{folder} has an adapter of {has}, not {'of ' + wanted if config.rank else 'none'}"
    return [Problem("lora", f"{message}: train it on with its own settings, or merge it first (merge_lora)")]


def _check_targets(config: LoraConfig, shape: ModelShape, where: str) -> list[Problem]:
    known = [ALL_LINEAR, *targets_of(shape)]
    problems = []
    for name in config.targets:
        if name in NO_TARGETS:
            problems.append(Problem(f"{where}.targets", f"{name} cannot be adapted: {NO_TARGETS[name]}; leave it out"))
        elif name not in known:
            problems.append(Problem(f"{where}.targets", f"this model has no {name!r}" + nearest(name, known)))
    return problems


def not_for_peft(config: LoraConfig) -> list[str]:
    """Return why PEFT would not load such an adapter; nothing where it would."""
    if MAMBA_OUT not in config.targets:
        return []
    return [f"PEFT adapts no {MAMBA_OUT}, a Mamba layer's, whose kernel in transformers reads the weight itself"]


def reach(config: LoraConfig, shape: ModelShape) -> dict[str, Any]:
    """Return what the targets reach: `targets`, `trainable` parameters of the adapters, `reached` parameters of the
    matrices beside them, all `parameters`, and `left`, those of each kind of matrix that is not reached."""
    names, sizes, trainable = chosen(config, shape), dict.fromkeys(targets_of(shape), 0), 0
    for block, count in shape.blocks.items():
        trainable += adapters(config, shape, block).total * count
        for matrix in matrices(shape, block):
            sizes[matrix.target] += matrix.parameters * count
    return {
        "targets": names,
        "trainable": trainable,
        "reached": sum(sizes[name] for name in names),
        "parameters": shape.parameters.total,
        "left": {name: size for name, size in sizes.items() if name not in names},
    }


def reach_text(reach: Mapping[str, Any], rank: int) -> str:
    """Return one line about what `reach` says: a list of targets that misses most of a model should be noticed."""
    shares = {name: size / reach["parameters"] for name, size in reach["left"].items()}
    missed = f", not {', '.join(f'{name} {share:.1%}' for name, share in shares.items())}" if shares else ""
    reached = reach["reached"] / reach["parameters"]
    return f"LoRA of rank {rank}: {reach['trainable']:,} parameters trained beside {reached:.1%} of the model{missed}"
