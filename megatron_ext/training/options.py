"""How a training uses its GPUs, and how experts are balanced: parts of a training's config, by the names that
megatron-core 0.16.1 gives them. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from data_tools.mistake import Problem, nearest

ATTENTION_BACKENDS = ("auto", "flash", "fused", "unfused")  # enums.AttnBackend; its `local` is backend torch
CUDA_GRAPHS = ("none", "local", "transformer_engine")  # TransformerConfig.cuda_graph_impl
GRAPH_SCOPES = ("attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba")  # enums.CudaGraphScope
BALANCINGS = ("aux_loss", "seq_aux_loss", "global_aux_loss")  # TransformerConfig.moe_router_load_balancing_type


def keyed(config: Any) -> dict[str, Any]:
    """Return the fields of a config that change the result, as the key of its phase has them (jobs/kind.py)."""
    found = {}
    for one in fields(config):
        counts, value = one.metadata.get("keyed", True), getattr(config, one.name)
        if counts is True or counts == "if_set" and value:
            found[one.name] = value
    return found


@dataclass
class Engine:
    """None of it changes what is computed, but for the order of sums. What needs a GPU was never run on one."""

    attention: str = "auto"  # backend te: auto | flash | fused | unfused
    cuda_graphs: str = "none"  # backend te: none | local | transformer_engine
    graph_scope: list[str] = field(default_factory=list)  # what a graph captures; []: whole layers
    te_rng: bool = False  # Transformer Engine's random-number tracker, which CUDA graphs need
    overlap_grad_reduce: bool = False  # gradients are summed over data ranks while backward goes on
    overlap_param_gather: bool = False  # weights are gathered while forward goes on; needs overlap_grad_reduce
    offload_optimizer: float = 0.0  # share of the optimizer's state and update that lives in host memory
    overlap_offload: bool = False  # its copies to and fro while others compute


@dataclass
class Balance:
    """Of experts. Fine-tuning wants none: the router stays what pretraining made it, but for its gradient."""

    aux_loss: float = 0.0  # coefficient; a token weighs the same whether supervised or not
    aux_kind: str = "aux_loss"  # aux_loss | seq_aux_loss | global_aux_loss
    bias_rate: float = 0.0  # of the router's correction bias, where the model has one


def check(engine: Engine, backend: str, where: str = "engine", environment: Mapping[str, str] = {}) -> list[Problem]:
    """`environment`: variables that the cluster's profile sets for the ranks."""
    problems = []

    def refuse(name: str, message: str) -> None:
        problems.append(Problem(f"{where}.{name}", message))

    for name, known in (("attention", ATTENTION_BACKENDS), ("cuda_graphs", CUDA_GRAPHS)):
        value = getattr(engine, name)
        if value not in known:
            refuse(name, f"unknown value {value!r}{nearest(value, known)}")
        elif value != known[0] and backend != "te":
            refuse(name, f"{value} is Transformer Engine's: use backend te, or {known[0]}")
    for scope in engine.graph_scope:
        if scope not in GRAPH_SCOPES:
            refuse("graph_scope", f"unknown value {scope!r}{nearest(scope, GRAPH_SCOPES)}")
    if engine.cuda_graphs != "none" and not engine.te_rng:
        refuse("te_rng", f"cuda_graphs {engine.cuda_graphs} needs a tracker that graphs can capture: set it true")
    segments = "expandable_segments:True" in environment.get("PYTORCH_CUDA_ALLOC_CONF", "")  # cuda_graphs.py:1415
    if engine.cuda_graphs != "none" and segments and environment.get("NCCL_GRAPH_REGISTER") != "0":
        refuse("cuda_graphs", "expandable_segments need NCCL_GRAPH_REGISTER=0: set it (profile: env.set), or use none")
    if engine.te_rng and backend != "te":
        refuse("te_rng", "is Transformer Engine's: use backend te, or false")
    if engine.overlap_param_gather and not engine.overlap_grad_reduce:
        refuse("overlap_param_gather", "needs overlap_grad_reduce: true")
    if not 0 <= engine.offload_optimizer <= 1:
        refuse("offload_optimizer", f"{engine.offload_optimizer} is no share: give a number from 0 to 1")
    elif engine.offload_optimizer and backend != "te":
        refuse("offload_optimizer", "needs Transformer Engine's optimizer: use backend te, or 0")
    return problems


def check_timeout(minutes: int, where: str = "distributed_timeout_minutes") -> list[Problem]:
    return [] if minutes >= 1 else [Problem(where, f"{minutes} is too few: the least is 1")]


def check_balance(balance: Balance, experts: bool, where: str = "balance") -> list[Problem]:
    """`experts`: whether the model has any."""
    problems = []
    for name in ("aux_loss", "bias_rate"):
        value = getattr(balance, name)
        if value < 0:
            problems.append(Problem(f"{where}.{name}", f"{value} is negative: 0 turns it off"))
        elif value and not experts:
            problems.append(Problem(f"{where}.{name}", f"{value}, and the model has no experts: use 0"))
    if balance.aux_kind not in BALANCINGS:
        unknown = f"unknown value {balance.aux_kind!r}{nearest(balance.aux_kind, BALANCINGS)}"
        problems.append(Problem(f"{where}.aux_kind", unknown))
    return problems


def transformer_fields(engine: Engine, balance: Balance, experts: bool) -> dict[str, Any]:
    """Fields of TransformerConfig that these options change, enums by their names."""
    fields: dict[str, Any] = {}
    if engine.attention != "auto":
        fields["attention_backend"] = engine.attention
    if engine.cuda_graphs != "none":
        fields |= dict(cuda_graph_impl=engine.cuda_graphs, cuda_graph_scope=list(engine.graph_scope))
    if engine.te_rng:
        fields["use_te_rng_tracker"] = True
    if experts and balance.aux_loss:
        fields |= dict(moe_router_load_balancing_type=balance.aux_kind, moe_aux_loss_coeff=balance.aux_loss)
    if experts:
        fields["moe_router_bias_update_rate"] = balance.bias_rate
    return fields
