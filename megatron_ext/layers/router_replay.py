"""Router replay (R3, Ma et al., arXiv 2510.11370): training sends each token to the experts that the rollout chose.

Two computations of one token round differently, and where two experts are nearly as likely, bfloat16 can choose
otherwise: the log-prob then differs by far more than rounding. With `moe_enable_routing_replay` each router of
megatron-core has a RouterReplay, which records its choice or takes one that it is given. The weights of the chosen
experts are always computed anew, so that the router has its gradient.

Letters of shapes: T tokens of a row, r = (layers with experts) x (experts of a token), layer by layer.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction

Chosen = numpy.ndarray  # int16 [tokens, r]: numbers of experts
_found: "weakref.WeakKeyDictionary[torch.nn.Module, Routers]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Routers:
    """The routers of a model that can be replayed, the first layer's first: none where it has none or may not be."""

    replays: tuple[Any, ...]  # mcore's
    top_k: int
    experts: int

    @staticmethod
    def of(model: torch.nn.Module) -> "Routers":
        """Return those of a model, which are looked for once."""
        if model not in _found:
            modules = [each for each in model.modules() if getattr(each, "router_replay", None) is not None]
            found = tuple(each.router_replay for each in modules)
            first: Any = modules[0] if modules else None
            _found[model] = Routers(found, first.topk if first else 0, first.config.num_moe_experts if first else 0)
        return _found[model]

    @property
    def width(self) -> int:
        """The numbers of a token (r)."""
        return len(self.replays) * self.top_k

    def record(self) -> None:
        """Have the passes from now on choose by themselves, and keep what they chose."""
        for replay in self.replays:
            replay.clear_indices()
            replay.set_router_replay_action(RouterReplayAction.RECORD)

    def recorded(self, tokens: int) -> Chosen:
        """Return what the last pass chose for its first `tokens` tokens. The host waits for it."""
        each = [replay.get_recorded_indices()[:tokens].to(torch.int16) for replay in self.replays]
        return torch.cat(each, dim=1).cpu().numpy()

    def steer(self, chosen: torch.Tensor | None) -> None:
        """Have the passes from now on take the experts `chosen`, int64 [T, r]; None: choose by themselves."""
        for number, replay in enumerate(self.replays):
            replay.clear_indices()
            if chosen is None:
                replay.clear_router_replay_action()
            else:
                replay.target_topk_idx = chosen[:, number * self.top_k : (number + 1) * self.top_k]
                replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)  # recomputation asks it again

    def any_experts(self, tokens: int) -> Chosen:
        """Return experts for tokens of which no log-prob is asked: padding, and what stands behind the last one."""
        numbers = numpy.arange(tokens)[:, None] + numpy.arange(self.top_k)
        return numpy.tile(numbers % self.experts, len(self.replays)).astype(numpy.int16)


def steer(model: torch.nn.Module, chosen: torch.Tensor | None) -> None:
    """Have a model's next pass, and its backward, take the experts `chosen`, int64 [T, r]; None: its own choice."""
    Routers.of(model).steer(chosen)
