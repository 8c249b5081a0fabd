"""Put a GRPO run together: model, engine, prompts, scorer, reference, evaluation; then train.

session.py      put a GRPO run together                   step.py         GRPO's step in the training loop
collect.py      rollouts of a step, with rewards          journal.py      what was drawn, for after a kill
samples.py      samples, what they are worth              advantages.py   rewards to advantages
rows.py         samples as packed rows on the device      losses.py       the policy loss
updates.py      the updates of a step                     position.py     how far a run has come
untrained.py    samples that teach nothing                report.py       what metrics and logs say of a step
evaluation.py   evaluation in the loop                    generation.py   samples of many prompts, without training
prompts.py      prompts, scorer and texts of a mix        turns.py        replies of tasks
replica.py      the ranks that hold one copy of a model   replay.py       one rollout drawn again
sample_log.py   the log of samples, bounded
settings.py     what a GRPO and a generation are told     memory.py      what it needs of a GPU
completions.py  all samples as one CSV file
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import expanded
from data_tools.base.tables import write_table
from data_tools.chats.tokenizer import Tokenizer
from data_tools.progress import Progress, Stop
from data_tools.tasks.messages import past_template
from data_tools.tasks.mix import Mix, counts_table
from data_tools.tasks.outcome import Outcomes
from megatron_ext.model_folders import model_folder
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.parallel.ranks import is_writer
from megatron_ext.rl import completions
from megatron_ext.rl.collect import Collector, Together
from megatron_ext.rl.evaluation import evaluate
from megatron_ext.rl.prompts import (
    Listed,
    MixPrompts,
    Texts,
    all_of,
    judged,
    mix_scorer,
    prompts_of,
    stop_ids_of,
    turns_of,
)
from megatron_ext.rl.replica import Replica
from megatron_ext.rl.rows import RolloutRow, log_probs
from megatron_ext.rl.settings import GrpoSettings, loads_reference
from megatron_ext.rl.step import ROLLOUTS, SAMPLES, GrpoTrained, train
from megatron_ext.rl.updates import Reference
from megatron_ext.rollout.engine import Engine
from megatron_ext.rollout.settings import Sampling
from megatron_ext.training.update import AdamW, Trainer


def run(
    config: GrpoSettings,
    folder: ModelFolder,
    out: Path,
    keep: Path,
    *,
    identity: dict[str, Any],
    progress: Progress,
    stop: Stop,
) -> tuple[GrpoTrained, str]:
    """Train the model of `folder`, then write `out`. Return facts and the digest of its weights. Ranks are started."""
    sampling = config.sampling
    tokenizer, mix, encoding = prompts_of(config, folder)
    if is_writer():
        _tell_prompts(keep, mix, tokenizer)
    prompts = MixPrompts(mix, encoding)
    prompts.check()
    held_out = Listed(all_of(mix, mix.evaluated(), config.evaluation.prompts), encoding)
    identity = {**identity, "prompts": mix.digest, "scoring": mix.scoring(all_of(mix, mix.trained()))}
    trainer = _trainer(config, folder)
    stop_ids = stop_ids_of(folder, tokenizer)
    texts, outcomes = Texts(tokenizer, stop_ids), Outcomes(mix.entries)

    in_training = f"{config.model}, as trained so far,"

    def engine(seed: int, records: bool = False) -> Engine:
        return Engine(trainer.model[0], config.engine, seed, stop_ids, tokenizer.decode, records_routing=records)

    with mix_scorer(mix.entries, config.verifiers, config.verify_limit_s, wanted=Replica().speaks) as scorer:
        turns = turns_of(mix, scorer, texts)
        collector = Collector(
            engine(config.seed, records=config.routing_replay),
            prompts,
            scorer,
            texts.spell,
            sampling=sampling,
            group=config.group,
            root=keep / ROLLOUTS,
            identity=durable.sha256_bytes(durable.canonical_json(identity)),
            flush_s=config.record_s,
            stop=stop,
            turns=turns,
            model=in_training,
        )

        def evaluated(step: int) -> dict[str, Any]:
            by_entry: dict[str, Any] = {}
            for way, samples in _ways(config):
                part = evaluate(
                    engine(_evaluation_seed(config.seed, step)),
                    held_out,
                    scorer,
                    texts.spell,
                    sampling=way,
                    samples=samples,
                    together=Together(stop),
                    turns=turns,
                    outcomes=outcomes,
                    model=in_training,
                )
                for name, values in part.items():
                    by_entry[name] = by_entry.get(name, {}) | values
            return by_entry

        trained = train(
            trainer,
            collector,
            config,
            keep,
            identity=identity,
            stop=stop,
            progress=progress,
            reference=reference_of(config, folder, trainer),
            evaluate=evaluated if len(held_out) else None,
            spell=lambda sample: texts.log(prompts.item(sample.item), sample),
            judge=lambda drawn: judged(drawn, prompts, outcomes),
        )
    if config.completions and config.log_samples and is_writer():
        completions.write(keep / SAMPLES, keep / expanded(config.completions))
    return trained, model_folder.write(out, trainer.model, folder, step=folder.step + trained.step)


def _tell_prompts(keep: Path, mix: Mix, tokenizer: Tokenizer) -> None:
    """Write the table of the prompts, and into the log which of them a chat template does not see."""
    write_table(keep, "prompts", **counts_table(mix.counts()))
    for line in past_template(mix.entries, mix.items, tokenizer):
        print(line, flush=True)


def _trainer(config: GrpoSettings, folder: ModelFolder) -> Trainer:
    """Return the trainer of the model in `folder`, or of adapters for it."""
    plan = config.parallel
    model = model_folder.load_trainable(
        folder, plan, config.lora, config.seed, dtype=config.dtype, backend=config.backend, base=config.base,
        options={"moe_enable_routing_replay": True} if config.routing_replay else {},
    )  # fmt: skip
    return Trainer(model, plan, AdamW.of(config))


def _ways(config: GrpoSettings) -> list[tuple[Sampling, int]]:
    """Return how an evaluation samples: greedily, and as asked for, each with the samples of a prompt."""
    evaluation = config.evaluation
    ways = [(replace(config.sampling, temperature=0.0), 1)]
    if evaluation.samples:
        ways.append((replace(config.sampling, temperature=evaluation.temperature), evaluation.samples))
    return ways


def _evaluation_seed(seed: int, step: int) -> int:
    """Return the seed of the noise of the evaluation after `step`."""
    return int.from_bytes(hashlib.sha256(f"evaluation:{seed}:{step}".encode()).digest()[:8], "little")


def reference_of(config: GrpoSettings, folder: ModelFolder, trainer: Trainer) -> Reference | None:
    """Return what gives the log-probs that the KL term is taken against; None without the term.

    They are of the model that training begins with, or of another one. New adapters leave that model in place below
    them; otherwise it is loaded a second time.
    """
    if not config.loss.kl_beta:
        return None
    if not loads_reference(config, adapted=folder.lora is not None):
        return lambda rows: _without_adapters(trainer.model, rows)
    from megatron.core.transformer.module import Float16Module

    chosen = model_folder.open_folder(config.reference) if config.reference else folder
    parts = model_folder.load_stages(chosen, config.parallel, config.dtype, backend=config.backend, base=config.base)
    for part in parts:
        part.requires_grad_(False)
    wrapped = [Float16Module(part.config, part) if part.config.bf16 else part for part in parts]
    model = [part.eval() for part in wrapped]
    return lambda rows: log_probs(model, rows)


def _without_adapters(model: list[Any], rows: list[RolloutRow]) -> list[Any]:
    from megatron_ext.lora.adapters import without

    with without(model):  # another model, whose routers choose for themselves
        return log_probs(model, [replace(row, routing=None) for row in rows])
