"""gloo ranks that find the stand-ins for Transformer Engine and mamba-ssm; nobody else does."""

import importlib
import sys
from pathlib import Path
from typing import Any

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


def call(name: str, given: dict[str, Any], module: str = "te_ranks") -> Any:
    return getattr(importlib.import_module(f"tests.gpu_rehearsal.{module}"), name)(**given)
