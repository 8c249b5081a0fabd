"""vLLM's offline engine as a Backend (rl/makers.py)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.rollout.settings import SamplingSettings

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.rl.makers import Backend


@contextlib.contextmanager
def opened(config: SamplingSettings, folder: "ModelFolder", keep: Path) -> Iterator["Backend"]:
    """Give the Backend of one element, and end its engine."""
    raise NotImplementedError
    yield
