"""Who makes the samples of a phase: what generation.py and evaluate.py want of our engine, and of a foreign one.

A Backend is one for a phase's element, and of it comes a Maker for each way of sampling. Ours (ours.py) is many ranks;
a foreign one (megatron_ext/foreign) is one process, without process groups and without megatron-core. No torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.progress import Progress, Stop
from data_tools.tasks.mix import Draw, Mix
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.rl.prompts import Encoding, Listed, MixScorer, Texts
from megatron_ext.rl.samples import Sample
from megatron_ext.rl.settings import GenerateSettings


@dataclass(frozen=True)
class Work:
    """What a Maker is told of the prompts of one element, and of how they are sampled.

    `prompts.item(k)` is prompt k of the element, `prompts.tokens` its token ids. `scorer` is there where
    `Backend.speaks`. `root` is the folder of the journal, `identity` names all that the samples depend on. The Maker
    asks `stop` often.
    """

    config: GenerateSettings
    folder: ModelFolder | None  # None: the model is another's, who spells the prompts too
    mix: Mix
    prompts: Listed
    scorer: MixScorer | None
    texts: Texts
    stop_ids: set[int]
    root: Path
    identity: str
    stop: Stop


class Maker(Protocol):
    """Makes the samples of one chunk after the other. What it has drawn is recorded, and is not drawn again."""

    def begin(self, chunk: int) -> None:
        """Make samples of chunk number `chunk` from now on, with what earlier attempts recorded of it."""

    def collect(self, items: range) -> list[Sample]:
        """Return `config.samples` samples of each of these prompts, by prompt and number, with their rewards; on the
        process that writes with their tokens. Nothing is open then.

        Raise Stopped once it was asked to stop: all that was drawn is recorded, and it says how many tokens, of how
        many that there can be.
        """


class Backend(Protocol):
    """What computes in one process of a phase's element."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes plain files."""

    @property
    def speaks(self) -> bool:
        """Whether this process scores samples."""

    def from_writer(self, value: Any) -> Any:
        """Return `value` of the process that writes, on every one."""

    def maker(self, work: Work) -> Maker:
        """Return who makes the samples of `work`. It is asked for where some have to be made."""

    def likeliest(self, draws: Sequence[Draw], encoding: Encoding, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yield the line of each question whose choices are compared (choices.line), on every process."""

    def facts(self) -> dict[str, Any]:
        """Return what the element's facts say of it, and as `engine` who makes the samples."""
