"""Our engine as a Backend (makers.py): the ranks that hold the model, whose Collector GRPO uses too."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from data_tools.progress import Progress
from data_tools.tasks.mix import Draw
from megatron_ext.model_folders import model_folder
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.parts import Choice
from megatron_ext.rl.makers import Maker, Work
from megatron_ext.rl.prompts import Encoding, turns_of
from megatron_ext.rl.samples import Sample
from megatron_ext.rollout.settings import RolloutSettings


class Ours:
    """One rank of those that hold the model. They are started, and all of them call each of its functions."""

    def __init__(self, config: RolloutSettings, folder: ModelFolder, choice: Choice):
        from megatron_ext.rl.replica import Replica

        self.config, self.folder, self.choice = config, folder, choice
        self.is_writer, self.speaks = ranks.is_writer(), Replica().speaks

    @cached_property
    def model(self) -> Any:
        """The model, loaded once it is needed."""
        return model_folder.load_told(self.folder, self.config)

    def from_writer(self, value: Any) -> Any:
        """Return `value` of rank 0, on every rank."""
        from megatron_ext.weights.exchange import from_rank_zero

        return from_rank_zero(value)

    def maker(self, work: Work) -> Maker:
        """Return our Collector on an engine of its own."""
        from megatron_ext.rl.collect import Collector
        from megatron_ext.rollout.engine import Engine

        config = work.config
        decode = work.texts.tokenizer.decode
        collector = Collector(
            Engine(self.model, config.engine, config.seed, work.stop_ids, detokenize=decode),
            work.prompts,
            work.scorer,
            work.texts.spell,
            sampling=config.sampling,
            group=config.samples,
            root=work.root,
            identity=work.identity,
            flush_s=config.record_s,
            stop=work.stop,
            turns=turns_of(work.mix, work.scorer, work.texts),
            model=config.model,
        )
        return _OurMaker(collector)

    def likeliest(self, draws: Sequence[Draw], encoding: Encoding, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yield the line of each question whose choices are compared."""
        from megatron_ext.rl import likelihood

        config = self.config
        return likelihood.answered(
            self.model,
            draws,
            encoding,
            plan=config.parallel,
            row_tokens=config.engine.token_budget,
            progress=progress,
        )

    def facts(self) -> dict[str, Any]:
        """Return that the engine is ours, and whose each part of the layers is."""
        return {"engine": {"is": "afterok"}, "parts": self.choice.facts()}


class _OurMaker:
    """The Collector as a Maker."""

    def __init__(self, collector: Any):
        self.collector = collector

    def begin(self, chunk: int) -> None:
        """Make samples of a chunk from now on."""
        self.collector.begin(chunk)

    def collect(self, items: range) -> list[Sample]:
        """Return the samples of these prompts, with their tokens on rank 0."""
        samples = self.collector.collect(items)
        self.collector.close()
        self.collector.bring(samples, [], written=True)
        return samples


@contextlib.contextmanager
def opened(config: RolloutSettings, folder: ModelFolder) -> Iterator[Ours]:
    """Start the ranks, and stop them in the end."""
    with ranks.started(config.parallel):
        yield Ours(config, folder, model_folder.told_parts(folder, config))
