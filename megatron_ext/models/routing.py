"""How a token finds its experts by sigmoid scores and a correction bias (DeepSeek-V3's way, Nemotron-H's and GLM's). No
torch.
"""

from dataclasses import dataclass

from megatron_ext.models.config_reading import Reading


@dataclass(frozen=True)
class Routing:
    """How a token finds its experts."""

    groups: int = 1
    top_groups: int = 1  # groups among whose experts it chooses
    scale: float = 1.0  # of the routed experts' weights


def routing_of(reading: Reading, experts: int, top_k: int, scale: float | None = None) -> Routing:
    """Read how a token finds its experts; what mcore's router would do otherwise is refused.

    `scale` is the weights' where a file may leave it out.
    """
    config = reading.config
    groups, top_groups = (
        reading.sizes({key: key}).get(key, 1) if config.get(key) is not None else 1 for key in ("n_group", "topk_group")
    )
    if config.get("routed_scaling_factor") is None and scale is None:
        reading.wrong("routed_scaling_factor is missing: write the model's own (Nemotron-3-Nano has 2.5)")
    scale = reading.number("routed_scaling_factor", scale or 1.0)
    if config.get("n_shared_experts") is not None:
        reading.sizes({"n_shared_experts": "n_shared_experts"})  # at least one
    normalized = reading.flag("norm_topk_prob", True)
    if reading.problems:
        return Routing()
    if normalized != (top_k > 1):
        reading.wrong(
            f"norm_topk_prob = {normalized} with num_experts_per_tok = {top_k} is not supported: "
            "megatron-core's sigmoid router normalizes the weights of two and more, and never those of one"
        )
    if top_k > experts:
        reading.wrong(f"num_experts_per_tok = {top_k} is more than the {experts} experts")
    if experts % groups or not 1 <= top_groups <= groups:
        reading.wrong(f"{experts} experts do not split into n_group = {groups} of which {top_groups}")
    elif groups > 1 and (top_k // top_groups != 2 or top_k > top_groups * experts // groups):
        reading.wrong(
            f"n_group = {groups}, topk_group = {top_groups} with num_experts_per_tok = {top_k} is not supported: "
            "megatron-core ranks groups by their best num_experts_per_tok / topk_group experts, the model by two"
        )
    return Routing(groups, top_groups, float(scale))
