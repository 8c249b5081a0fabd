"""What rules and predictions know of a model: kinds of blocks and sizes, no torch. A family's config.py makes one with
`shape(dims)`. Comments give the usual symbol of each size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# Blocks. A layer is one or two of them, each with its norm: ATTENTION then MLP in Qwen2, a single one in Nemotron-H.
ATTENTION, WINDOW, MLP, MOE, MAMBA = "attention", "window", "mlp", "moe", "mamba"
MXFP4_BLOCK = 32  # values of a row that share a scale (layers/mxfp4.py)
Layer = tuple[str, ...]


def count_blocks(layers: Sequence[Layer]) -> Counter[str]:
    return Counter(block for layer in layers for block in layer)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by how they spread."""

    sharded: int = 0  # over tensor ranks
    replicated: int = 0  # norms, router: whole on every tensor rank
    expert: int = 0  # over expert and expert-tensor ranks

    @property
    def total(self) -> int:
        return self.sharded + self.replicated + self.expert

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.sharded + other.sharded, self.replicated + other.replicated, self.expert + other.expert)

    def __mul__(self, number: int) -> "Parameters":
        return Parameters(self.sharded * number, self.replicated * number, self.expert * number)


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements. What a model has none of is 0 or False."""

    layers: tuple[Layer, ...]
    hidden: int  # h
    vocabulary: int  # V, rows of the checkpoint's embedding
    tied: bool = False  # one matrix for embedding and output
    max_positions: int = 0  # tokens of the longest document; 0: no limit
    learned_norms: bool = True  # the norms have weights
    norms_a_block: int = 1  # of the hidden size: before a block, after it, or both

    heads: int = 0  # n, query heads
    kv_groups: int = 0  # g
    head_dim: int = 0  # d
    window: int = 0  # tokens that a WINDOW block sees, itself included
    yarn_positions: int = 0  # those before YaRN stretched them
    sinks: bool = False  # a learned logit per head
    qkv_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: bool = False  # of each head
    wide_qk_norm: bool = False  # one over all heads of queries, one over those of keys
    fused_qkv: bool = False  # q, k and v are one matrix in Hugging Face's model, too

    ffn: int = 0  # f, of MLP blocks
    gated: bool = True  # gate and up projections, here and in experts
    activation_steps: int = 0  # of the gate's activation beyond silu's: of gpt-oss the clamp and the sigmoid
    own_mlp_names: tuple[str, ...] = ()  # of an MLP's matrices in Hugging Face's model, if they are not the usual ones

    experts: int = 0  # E
    top_k: int = 0  # k
    expert_ffn: int = 0  # f_e
    shared_ffn: int = 0  # f_s, over all shared experts
    shared_gate: bool = False  # the shared experts' output has a gate
    expert_bias: bool = False  # biases of router and experts, as gpt-oss; not the router's correction buffer

    mamba_heads: int = 0  # H_m
    mamba_head_dim: int = 0  # P
    mamba_groups: int = 0  # G
    mamba_state: int = 0  # N
    mamba_conv: int = 0  # K, width of the convolution

    @cached_property
    def blocks(self) -> Counter[str]:
        """How many blocks of each kind."""
        return count_blocks(self.layers)

    @property
    def mamba_inner(self) -> int:
        """d_in: width of x and z, H_m P whatever `expand` says."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def mamba_projection(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return 2 * self.mamba_inner + 2 * self.mamba_groups * self.mamba_state + self.mamba_heads

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP or expert."""
        return 3 if self.gated else 2

    @property
    def mlp_names(self) -> tuple[str, ...]:
        """Of an MLP's matrices in Hugging Face's model, the one back to the hidden size last."""
        return self.own_mlp_names or (("gate_proj",) * self.gated + ("up_proj", "down_proj"))

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_groups) * self.head_dim

    @cached_property
    def block_parameters(self) -> dict[str, Parameters]:
        """Parameters of one block of each kind, its norms included."""
        counts = {
            ATTENTION: self._attention,
            WINDOW: self._attention,
            MLP: self._mlp,
            MOE: self._moe,
            MAMBA: self._mamba,
        }
        return {kind: self._norm * self.norms_a_block + counts[kind]() for kind in self.blocks}

    @property
    def _norm(self) -> Parameters:
        return Parameters(replicated=self.hidden * self.learned_norms)

    def _attention(self) -> Parameters:
        rows, wide = self.heads * self.head_dim, (self.heads + self.kv_groups) * self.head_dim * self.wide_qk_norm
        matrices = self.qkv_rows * (self.hidden + self.qkv_bias) + rows * self.hidden
        return Parameters(
            sharded=matrices + wide + self.heads * self.sinks,
            replicated=self.hidden * self.attention_output_bias + 2 * self.head_dim * self.qk_norm,
        )

    def _mlp(self) -> Parameters:
        return Parameters(sharded=self.mlp_matrices * self.hidden * self.ffn)

    def _moe(self) -> Parameters:
        bias = (self.mlp_matrices - 1) * self.expert_ffn + self.hidden
        return Parameters(
            sharded=self.mlp_matrices * self.hidden * self.shared_ffn,
            replicated=self.experts * (self.hidden + self.expert_bias) + self.hidden * self.shared_gate,
            expert=self.experts * (self.mlp_matrices * self.hidden * self.expert_ffn + bias * self.expert_bias),
        )

    def _mamba(self) -> Parameters:
        convolved = self.mamba_inner + 2 * self.mamba_groups * self.mamba_state
        per_head = 3 * self.mamba_heads  # A_log, D, dt_bias
        norm = self.mamba_inner  # the gated norm
        projections = self.mamba_projection * self.hidden + self.mamba_inner * self.hidden
        return Parameters(sharded=projections + convolved * (self.mamba_conv + 1) + per_head + norm)

    @property
    def embedding(self) -> int:
        """Parameters of one vocabulary matrix, unpadded."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> Parameters:
        """All, exactly as the checkpoint has them; buffers are not counted."""
        ends = Parameters(sharded=self.embedding * (1 if self.tied else 2)) + self._norm
        return sum((self.block_parameters[kind] * number for kind, number in self.blocks.items()), start=ends)

    @property
    def active(self) -> int:
        """Parameters that one token meets: the top k experts, and not the embedding table (unless it is the output)."""
        all_ = self.parameters
        experts = all_.expert * self.top_k // self.experts if self.experts else 0
        return all_.sharded + all_.replicated + experts - (0 if self.tied else self.embedding)
