"""gloo ranks that find the stand-ins for Transformer Engine and mamba-ssm, or that pretend to have a GPU; nobody else
does."""

import importlib
import sys
from pathlib import Path
from typing import Any

from tests.megatron_ext import gloo
from tests.megatron_ext.gloo import Ranks

STAND_INS = Path(__file__).parent / "stand_ins"


class RehearsalRanks(Ranks):
    """Ranks whose processes have stand_ins/ first on their path: a spawned process takes over its parent's."""

    def _start(self) -> None:
        sys.path.insert(0, str(STAND_INS))
        try:
            super()._start()
        finally:
            sys.path.remove(str(STAND_INS))

    def te(self, function: str, **arguments: Any) -> list[Any]:
        """Call a function of te_ranks.py, which this process cannot import, and return the results by rank."""
        return self.run(call, name=function, given=arguments)


class PretendedRanks(Ranks):
    """Ranks on pretended GPUs (pretended/), one each."""

    @staticmethod
    def serve(connection: Any, rank: int, world_size: int) -> None:
        from tests.gpu_rehearsal.pretended import gpu

        gpu.begin()
        gloo._serve(connection, rank, world_size)


class PretendedTeRanks(RehearsalRanks):
    """Ranks on pretended GPUs that find the stand-ins as well."""

    serve = staticmethod(PretendedRanks.serve)


def call(name: str, given: dict[str, Any], module: str = "te_ranks") -> Any:
    """Call a function of a module beside this file, which imports megatron-core."""
    return getattr(importlib.import_module(f"tests.gpu_rehearsal.{module}"), name)(**given)


def on_device(ranks: Ranks, function: str, **arguments: Any) -> list[Any]:
    """Call a function of device_ranks.py and return the results by rank."""
    return ranks.run(call, name=function, given=arguments, module="device_ranks")
