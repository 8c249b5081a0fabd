"""How a training uses its GPUs, and how experts are balanced: parts of a training's config, by the names that
megatron-core 0.16.1 gives them. No torch."""

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from data_tools.base.declared import setting
from data_tools.mistake import Problem
from megatron_ext.parallel.parts import NOTHING_KNOWN, TE, Needs, Parts, kernel_is_missing

ATTENTION_BACKENDS = ("auto", "flash", "fused", "unfused")  # enums.AttnBackend; its `local` is backend torch
CUDA_GRAPHS = ("none", "local", "transformer_engine")  # TransformerConfig.cuda_graph_impl
GRAPH_SCOPES = ("attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba")  # enums.CudaGraphScope
BALANCINGS = ("aux_loss", "seq_aux_loss", "global_aux_loss")  # TransformerConfig.moe_router_load_balancing_type


def keyed(config: Any) -> dict[str, Any]:
    """Return the fields of a config that change the result (jobs/kind.py), as plain data, for a training's identity."""
    plain = {}
    for field in fields(config):
        counts, value = field.metadata.get("keyed", True), getattr(config, field.name)
        if counts is True or counts == "if_set" and value:
            plain[field.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return plain


@dataclass
class Engine:
    """None of it changes what is computed, but for the order of sums. What needs a GPU was never run on one."""

    attention: str = setting(
        "auto", "kernels of Transformer Engine's attention; auto where attention is ours", choices=ATTENTION_BACKENDS
    )
    cuda_graphs: str = setting("none", "refused but for none: a graph fits one pack only", choices=CUDA_GRAPHS)
    graph_scope: list[str] = setting(list, "what a CUDA graph would capture", choices=GRAPH_SCOPES)
    te_rng: bool = setting(False, "Transformer Engine's random-number tracker, where parts are Transformer Engine's")
    overlap_grad_reduce: bool = setting(False, "gradients are summed over data ranks while backward goes on")
    overlap_param_gather: bool = setting(False, "weights are gathered while forward goes on; needs overlap_grad_reduce")
    offload_optimizer: float = setting(
        0.0, "share of the optimizer's state and update that lives in host memory; above 0 with Transformer Engine",
        least=0, most=1, example=0.5
    )  # fmt: skip
    overlap_offload: bool = setting(False, "the offloaded state is copied while the GPU computes")


@dataclass
class ExpertBalance:
    """Of experts. Fine-tuning wants none: the router stays what pretraining made it, but for its gradient."""

    aux_loss: float = setting(
        0.0, "coefficient of the balancing loss, in which a token weighs the same whether supervised or not; 0: off",
        least=0, example=0.01
    )  # fmt: skip
    aux_kind: str = setting("aux_loss", "what the balancing loss balances over", choices=BALANCINGS)
    bias_rate: float = setting(
        0.0, "rate of the router's correction bias, where the model has one; 0: the bias stays", least=0, example=0.001
    )


ONE_PACK = (
    "a recorded pass holds the document boundaries of the pack that it was recorded with, and is wrong for any other "
    "(megatron-core records per layer, attention included; of Transformer Engine's graphs it has none without a helper "
    "that nothing here calls): use none"
)


def check(engine: Engine, parts: Parts | None, needs: Needs = NOTHING_KNOWN, where: str = "engine") -> list[Problem]:
    """Refuse what needs a part that is Transformer Engine's, or another setting. `parts`: None while not known."""
    problems = []

    def refuse(name: str, message: str) -> None:
        problems.append(Problem(f"{where}.{name}", message))

    if engine.attention != "auto" and parts and parts.attention != TE:
        refuse("attention", f"{engine.attention} is Transformer Engine's, and attention is ours here: use auto")
    elif missing := kernel_is_missing(engine.attention, needs):
        refuse("attention", f"no {engine.attention} attention of Transformer Engine's is here ({missing}): use auto")
    if engine.cuda_graphs != "none":
        refuse("cuda_graphs", f"{engine.cuda_graphs}: {ONE_PACK}")
    if engine.te_rng and parts and not parts.uses_te:
        refuse("te_rng", "is Transformer Engine's, of which no part is here: use false")
    if engine.overlap_param_gather and not engine.overlap_grad_reduce:
        refuse("overlap_param_gather", "needs overlap_grad_reduce: true")
    if engine.offload_optimizer and parts and not parts.uses_te:
        refuse("offload_optimizer", "needs Transformer Engine's optimizer, and no part is Transformer Engine's: use 0")
    return problems


def check_balance(balance: ExpertBalance, experts: bool, where: str = "balance") -> list[Problem]:
    """Refuse balancing where the model has no experts (`experts`)."""
    return [
        Problem(f"{where}.{name}", f"{value}, and the model has no experts: use 0")
        for name in ("aux_loss", "bias_rate")
        if (value := getattr(balance, name)) and not experts
    ]


def transformer_fields(engine: Engine, balance: ExpertBalance, experts: bool) -> dict[str, Any]:
    """Return the fields of TransformerConfig that these options change, enums by their names."""
    fields: dict[str, Any] = {}
    if engine.attention != "auto":
        fields["attention_backend"] = engine.attention
    if engine.te_rng:
        fields["use_te_rng_tracker"] = True
    if experts and balance.aux_loss:
        fields |= dict(moe_router_load_balancing_type=balance.aux_kind, moe_aux_loss_coeff=balance.aux_loss)
    if experts:
        fields["moe_router_bias_update_rate"] = balance.bias_rate
    return fields
