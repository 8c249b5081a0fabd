"""Puts a GRPO run together: model, engine, prompts, scorer, reference, evaluation, loop."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.tables import write_table
from data_tools.chats.tokenizer import Tokenizer, load_tokenizer
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop
from data_tools.tasks.mix import Mix, counts_table, entries_of
from data_tools.tasks.outcome import Outcomes
from megatron_ext.model_folders import model_folder
from megatron_ext.model_folders.model_folder import ModelFolder
from megatron_ext.parallel.ranks import is_writer
from megatron_ext.rl import grpo
from megatron_ext.rl.collect import Collector, Together
from megatron_ext.rl.evaluation import evaluate
from megatron_ext.rl.prompts import Listed, MixPrompts, Texts, all_of, mix_scorer, turns_of
from megatron_ext.rl.rows import RolloutRow, log_probs
from megatron_ext.rl.samples import Sample
from megatron_ext.rollout.engine import Engine
from megatron_ext.training import metrics
from megatron_ext.training import schedule as schedules
from megatron_ext.training.trainer import AdamW, Trainer


def run(
    config: Any, folder: ModelFolder, identity: dict[str, Any], out: Path, keep: Path, progress: Progress, stop: Stop
) -> tuple[grpo.Outcome, str]:
    """(outcome, digest of the weights in `out`). `config` is entrypoints.grpo.Config; the ranks are started."""
    plan, sampling = config.parallel, config.sampling
    tokenizer, mix, encoding = prompts_of(config, folder)
    if is_writer():
        write_table(keep, "prompts", **counts_table(mix.counts()))
    prompts = MixPrompts(mix, *encoding)
    prompts.check()
    held_out = Listed(all_of(mix, mix.evaluated(), config.evaluation.prompts), *encoding)
    identity = {**identity, "prompts": mix.digest, "scoring": mix.scoring(all_of(mix, mix.trained()))}
    trainer = Trainer(
        model_folder.load_trainable(folder, plan, config.lora, config.seed, config.dtype, config.backend),
        plan,
        AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay, config.clip_grad),
    )
    stop_ids = stop_ids_of(folder, tokenizer)
    texts, outcomes = Texts(tokenizer, stop_ids), Outcomes(mix.entries)

    in_training = f"{config.model}, as trained so far,"

    def engine(seed: int) -> Engine:
        return Engine(trainer.model[0], config.engine, seed, stop_ids, tokenizer.decode)

    def log_of(sample: Sample) -> dict[str, Any]:
        draw, tokens = prompts.item(sample.item), sample.tokens.tolist()
        line = {"entry": draw.entry, "uid": draw.item.uid, "prompt": tokenizer.decode(sample.prompt)}
        return {**line, "completion": texts.spell(tokens, sample.finish), **texts.spell_turns(tokens, sample.logprobs)}

    def sinks(resumed_from: int) -> list[Any]:
        run_id = durable.sha256_bytes(str(keep.resolve()))[:16]  # the same for all attempts at this training
        return metrics.sinks(config.track, keep, resumed_from, run_id, identity)

    with mix_scorer(mix.entries, config.verifiers, config.verify_limit_s) as scorer:
        turns = turns_of(mix, scorer, texts)
        collector = Collector(
            engine(config.seed), prompts, scorer, texts.spell, sampling, config.group, keep / grpo.ROLLOUTS,
            durable.sha256_bytes(durable.canonical_json(identity)), config.record_s, stop, turns=turns,
            model=in_training,
        )  # fmt: skip

        def evaluated(step: int) -> dict[str, Any]:
            seed = int.from_bytes(hashlib.sha256(f"evaluation:{config.seed}:{step}".encode()).digest()[:8], "little")
            ways = [(replace(sampling, temperature=0.0), 1)]
            if config.evaluation.samples:
                ways.append((replace(sampling, temperature=config.evaluation.temperature), config.evaluation.samples))
            found: dict[str, Any] = {}
            for way, samples in ways:
                part = evaluate(engine(seed), held_out, scorer, texts.spell, way, samples, Together(stop), turns,
                                outcomes, in_training)  # fmt: skip
                for name, values in part.items():
                    found[name] = found.get(name, {}) | values
            return found

        outcome = grpo.train(
            trainer,
            collector,
            run_of(config),
            keep,
            identity,
            stop,
            progress,
            reference=reference_of(config, folder, trainer),
            evaluate=evaluated if len(held_out) else None,
            spell=log_of,
            sinks=sinks,
        )
    digest = model_folder.write(out, trainer.model, folder, step=folder.step + outcome.step)
    return outcome, digest


def prompts_of(config: Any, folder: ModelFolder) -> tuple[Tokenizer, Mix, tuple[Any, ...]]:
    """(tokenizer, the run's prompts, what they are encoded with)."""
    tokenizer = load_tokenizer(str(folder.hf))
    room = (folder.family.config.shape(folder.dims).max_positions or 2**62) - config.sampling.max_tokens  # 0: no limit
    return tokenizer, Mix(entries_of(config.mix), config.seed), (tokenizer, config.chat_arguments, room, config.bos)


def run_of(config: Any) -> grpo.Run:
    sampling = config.sampling
    return grpo.Run(
        schedule=schedules.Schedule(
            config.schedule, config.steps, config.lr, config.min_lr, config.warmup_steps, config.decay_share
        ),
        prompts=config.prompts,
        loss=config.loss,
        advantage=config.advantage,
        rewarding=config.rewarding,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        comparable=not sampling.is_filtered or sampling.temperature == 1,
        row_tokens=config.row_tokens,
        passes=config.passes,
        minibatches=config.minibatches,
        refill_tries=config.refill_tries,
        old_logprobs=config.old_logprobs,
        mismatch_limit=config.mismatch_limit,
        seed=config.seed,
        log_samples=config.log_samples,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        evaluate_every=config.evaluation.every,
        offload=config.offload,
        keep_every=config.keep_every,
        save_in_background=config.save_in_background,
        hang=config.hang,
    )


def stop_ids_of(folder: ModelFolder, tokenizer: Any) -> set[int]:
    """The end tokens of generation_config.json, where there is one, and the tokenizer's. UserMistake for a torn one."""
    file = folder.hf / "generation_config.json"
    try:
        found = durable.read_json(file).get("eos_token_id") if file.exists() else None
    except (durable.TornFile, AttributeError) as error:
        message = f"is no generation config ({error}): make the model folder again"
        raise UserMistake(Problem(str(file), message)) from None
    ids = found if isinstance(found, list) else [found]
    return {token for token in [*ids, tokenizer.eos_id] if token is not None}


def reference_of(config: Any, folder: ModelFolder, trainer: Trainer) -> grpo.Reference | None:
    """What the KL term is taken against: the model that training begins with, or another one; None without the term.

    New adapters leave that model in place below them; otherwise it is loaded a second time.
    """
    if not config.loss.kl_beta:
        return None
    if config.lora.rank and not folder.lora and not config.reference:
        return lambda rows: _without_adapters(trainer.model, rows)
    from megatron.core.transformer.module import Float16Module

    chosen = model_folder.open_folder(config.reference) if config.reference else folder
    parts = model_folder.load_stages(chosen, config.parallel, config.dtype, config.backend)
    for part in parts:
        part.requires_grad_(False)
    wrapped = [Float16Module(part.config, part) if part.config.bf16 else part for part in parts]
    model = [part.eval() for part in wrapped]
    return lambda rows: log_probs(model, rows)


def _without_adapters(model: list[Any], rows: list[RolloutRow]) -> list[Any]:
    from megatron_ext.lora.adapters import without

    with without(model):
        return log_probs(model, rows)
