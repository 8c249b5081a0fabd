"""Supervised fine-tuning on packed documents: model folder + token store + pack plan -> model folder.

With `lora` the model stays as it is and adapters are trained; the folder then has both (model_folder.py).
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop, never, silent
from megatron_ext.entrypoints import certify
from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.preflight import facts, refusals, tables
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.flops import training_flops
from megatron_ext.training import options, track, watch
from megatron_ext.training import schedule as schedules
from megatron_ext.training.options import Balance, Engine
from megatron_ext.training.schedule import Amount
from megatron_ext.training.track import Track
from megatron_ext.training.watch import Hang

FREE = {"keyed": False}  # does not change the result
INPUT = {"input": True}


@dataclass
class Config:
    model: str = field(default="", metadata=INPUT)  # model folder
    store: str = field(default="", metadata=INPUT)  # token store
    packs: str = field(default="", metadata=INPUT)  # pack plan of that store
    blend_stores: list[str] = field(default_factory=list, metadata=INPUT)  # more of both, blended by weight
    blend_packs: list[str] = field(default_factory=list, metadata=INPUT)
    blend_weights: list[float] = field(default_factory=list)  # shares of packs: that of `packs`, then of each other
    valid_stores: list[str] = field(default_factory=list, metadata=INPUT)  # validation sets
    valid_packs: list[str] = field(default_factory=list, metadata=INPUT)
    init_from: str = field(default="", metadata=INPUT)  # weights only: a model folder, a step, or a training's folder
    init_step: int = 0  # a training's step; 0: what it sealed, else its newest

    steps: int = 0  # updates; the first of the given limits ends it
    samples: int = 0  # packs; what is less than an update is left out
    tokens: int = 0  # padding counts
    minutes: float = 0.0  # of training, all attempts together; it then ends early, and the schedule with it
    global_batch: int = 2  # packs an update
    seed: int = 0  # order of the packs, dropout

    schedule: str = "wsd"  # constant | linear | cosine | wsd
    lr: float = 1e-3  # the highest rate
    min_lr: float = 0.0  # the last rate of all but constant
    warmup_steps: int = 0  # or samples, or tokens
    warmup_samples: int = 0
    warmup_tokens: int = 0
    decay_share: float = 0.2  # of all steps, wsd only

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0  # gradient norm; 0 turns clipping off
    dtype: str = ""  # float32 | bfloat16; "" keeps the model folder's
    balance: Balance = field(default_factory=Balance)  # of experts
    lora: LoraConfig = field(default_factory=LoraConfig)  # rank 0: off

    backend: str = field(default="torch", metadata=FREE)  # layer spec: torch | te
    engine: Engine = field(default_factory=Engine, metadata=FREE)
    log_every: int = field(default=10, metadata=FREE)  # steps
    track: Track = field(default_factory=Track, metadata=FREE)
    validate_every: int = field(default=0, metadata=FREE)  # steps; 0: only at the end
    checkpoint_every: int = field(default=0, metadata=FREE)  # steps; 0: only at the end
    keep_checkpoints: int = field(default=2, metadata=FREE)  # the newest
    keep_every: int = field(default=0, metadata=FREE)  # steps; checkpoints of its multiples stay for good
    save_in_background: bool = field(default=True, metadata=FREE)  # training goes on while a checkpoint is written
    hang: Hang = field(default_factory=Hang, metadata=FREE)
    distributed_timeout_minutes: int = field(default=30, metadata=FREE)  # one that waits longer for a peer is dead
    parallel: ParallelPlan = field(default_factory=ParallelPlan, metadata=FREE)
    certify: bool = field(default=False, metadata=FREE)  # first show that the layout equals one process


def _schedule(config: Config, pack_length: int | None) -> schedules.Schedule:
    """In updates. What is given in tokens counts for nothing while the length of packs is not known."""
    batch = max(config.global_batch, 1)
    warmup = Amount(config.warmup_steps, config.warmup_samples, config.warmup_tokens).in_steps(batch, pack_length)
    return schedules.Schedule(
        config.schedule,
        schedules.updates(Amount(config.steps, config.samples, config.tokens), batch, pack_length),
        config.lr,
        config.min_lr,
        warmup[0] if warmup else 0,
        config.decay_share,
    )


def _training(config: Config, site: Site) -> tuple[Training, list[Problem]]:
    training, problems = facts.prepare(
        config.model, config.packs, max(config.global_batch, 1), config.dtype, config.backend, site
    )
    return replace(training, offload=config.engine.offload_optimizer, lora=config.lora), problems


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """What can be refused before anything runs; `site` says what is known of `ranks` ranks that are yet to come."""
    site = site or Site(ranks)
    training, found = _training(config, site)
    problems = [Problem(name, "is missing") for name in ("model", "store", "packs") if not getattr(config, name)]
    problems += _check_length(config, training.workload.pack_length)
    for name in ("global_batch", "log_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            problems.append(Problem(name, f"{getattr(config, name)} is too few: the least is 1"))
    for name in ("checkpoint_every", "validate_every"):
        if getattr(config, name) < 0:
            problems.append(Problem(name, f"{getattr(config, name)} is negative: 0 does it only at the end"))
    if config.keep_every < 0:
        problems.append(Problem("keep_every", f"{config.keep_every} is negative: 0 keeps none for good"))
    if config.dtype not in ("", "float32", "bfloat16"):
        problems.append(Problem("dtype", f"{config.dtype!r} is neither float32 nor bfloat16"))
    if config.backend not in ("torch", "te"):
        problems.append(Problem("backend", f"{config.backend!r} is neither torch nor te"))
    if training.shape is not None:
        problems += options.check_balance(config.balance, training.shape.experts > 0)
    problems += _check_data(config, site) + options.check(config.engine, config.backend, environment=site.environment)
    problems += track.check(config.track) + watch.check(config.hang)
    problems += options.check_timeout(config.distributed_timeout_minutes)
    problems += loras.check(config.lora, training.shape) + _check_base(config, site)
    return problems + found + refusals.check(config.parallel, training, site)


def _check_length(config: Config, pack_length: int | None) -> list[Problem]:
    """Of how long training and warm-up are, and the rate between."""
    problems = []
    amounts = ("steps", "samples", "tokens", "minutes")
    warmups = ("warmup_steps", "warmup_samples", "warmup_tokens")
    for name in (*amounts, *warmups, "init_step"):
        if getattr(config, name) < 0:
            problems.append(Problem(name, f"{getattr(config, name)} is negative"))
    if len([name for name in warmups if getattr(config, name)]) > 1:
        problems.append(Problem("warmup_steps", f"the warm-up is given more than once: one of {', '.join(warmups)}"))
    if not (config.steps or config.samples or config.tokens):
        problems.append(Problem("steps", "how long to train is not said: give steps, samples or tokens"))
    elif not problems and (pack_length or not (config.tokens or config.warmup_tokens)):
        problems += schedules.check(_schedule(config, pack_length))
    return problems


def _check_data(config: Config, site: Site) -> list[Problem]:
    """Of blends and validation sets: as many stores as plans, packs of one length."""
    problems = []
    for stores, packs in (("blend_stores", "blend_packs"), ("valid_stores", "valid_packs")):
        counts = len(getattr(config, stores)), len(getattr(config, packs))
        if counts[0] != counts[1]:
            problems.append(Problem(packs, f"{counts[1]} plans for {counts[0]} {stores}: give one for each"))
    wanted = len(config.blend_packs) + 1 if config.blend_packs else 0
    if len(config.blend_weights) != wanted:
        problems.append(Problem("blend_weights", f"{len(config.blend_weights)} weights for {wanted} blended plans"))
    if any(weight <= 0 for weight in config.blend_weights):
        message = f"{config.blend_weights} are not all positive: leave out what has none"
        problems.append(Problem("blend_weights", message))
    lengths = {
        name: length
        for name in (config.packs, *config.blend_packs)
        if name and (length := facts.pack_facts(name, site).get("pack_length"))
    }
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        problems.append(Problem("blend_packs", f"packs of different lengths cannot be blended: {said} tokens"))
    return problems


def _check_base(config: Config, site: Site) -> list[Problem]:
    """Of the model that adapters are for: with its own weights, and no adapter of another kind."""
    problems = []
    if config.lora.rank and config.init_from:
        problems.append(Problem("init_from", "with LoRA the weights stay those of `model`: name that folder there"))
    adapter = facts.model_adapter(config.model, site)[1]
    return problems + loras.check_folder(config.lora, adapter, config.model)


def parallel_report(config: Config, site: Site, searching: bool) -> dict[str, Any]:
    """What the parallel plan costs, its rank grid, and others: see tables.report."""
    return tables.report(config.parallel, _training(config, site)[0], site, searching)


def forecast(config: Config, site: Site) -> dict[str, Any]:
    """What the model folder of a run will hold, known before it ran."""
    return facts.forecast(config.model, config.lora, site)


def run(config: Config, out: Path, keep: Path, progress: Progress = silent, stop: Stop = never) -> dict[str, Any]:
    """Train to the last step, resuming from KEEP/checkpoints; then make `out` a model folder.

    Raises Stopped on every rank, after a checkpoint, once `stop` says so on any of them.
    Facts: step, loss_first, loss_last, valid_losses, weights_digest, tokens, supervised_tokens, resumed_from, notes;
    with LoRA lora (lora/settings.py, reach); with `certify` also certificate (entrypoints/certify.py), which is kept in
    KEEP/certificates.
    """
    from data_tools.packs.blended import read_packs
    from megatron_ext.model_folders import model_folder
    from megatron_ext.parallel import ranks

    world = ranks.world_size_of_environment()
    problems = check(config, world)
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    packs = read_packs([config.store, *config.blend_stores], [config.packs, *config.blend_packs], config.blend_weights)
    validation = [read_packs([store], [plan]) for store, plan in zip(config.valid_stores, config.valid_packs)]
    weights, digest = None, folder.weights_digest
    if config.init_from:
        weights, digest = model_folder.weights_at(config.init_from, config.init_step)
    certified = {}
    if config.certify and ranks.rank_of_environment() == 0:  # the others wait for it where they join
        asked = certify.Config(config.model, world, config.parallel)
        certified = {"certificate": certify.certificate(asked, keep / "certificates")}
    training = _training(config, Site(world))[0]
    experts = training.shape is not None and training.shape.experts > 0
    fields_of_model = options.transformer_fields(config.engine, config.balance, experts)
    patience = timedelta(minutes=config.distributed_timeout_minutes)

    with ranks.started(config.parallel, config.seed, patience, config.engine.te_rng):
        from megatron_ext.training import (
            loop,
            metrics,  # megatron-core may be imported once the device is ready
        )
        from megatron_ext.training.trainer import AdamW, Trainer

        stages = model_folder.load_trainable(
            folder, config.parallel, config.lora, config.seed, config.dtype, config.backend, fields_of_model, weights
        )
        trainer = Trainer(
            stages,
            config.parallel,
            AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay, config.clip_grad),
            config.engine,
        )
        identity = _identity(config, digest)

        def sinks(resumed_from: int) -> list[Any]:
            run_id = durable.sha256_bytes(str(keep.resolve()))[:16]  # the same for all attempts at this training
            return metrics.sinks(config.track, keep, resumed_from, run_id, identity)

        outcome = loop.train_on_packs(
            trainer,
            packs,
            loop.Run(
                _schedule(config, packs.pack_length),
                config.global_batch,
                config.seed,
                config.log_every,
                config.checkpoint_every,
                config.keep_checkpoints,
                config.keep_every,
                config.save_in_background,
                config.validate_every,
                config.minutes,
                training_flops(training) if training.shape is not None else 0.0,
                config.hang,
            ),
            keep,
            identity,
            progress,
            stop,
            validation,
            sinks,
        )
        digest = model_folder.write(out, trainer.model, folder, step=folder.step + outcome.step)
    return {
        "step": outcome.step,
        "loss_first": outcome.first_loss,
        "loss_last": outcome.last_loss,
        "valid_losses": outcome.valid_losses,
        "weights_digest": digest,
        "tokens": outcome.tokens,
        "supervised_tokens": outcome.supervised_tokens,
        "resumed_from": outcome.resumed_from,
        "notes": outcome.notes,
        "parallel": asdict(config.parallel),
        **({"lora": loras.reach(config.lora, folder.shape)} if config.lora.rank else {}),
        **certified,
    }


NOT_IDENTITY = ("model", "init_from", "init_step", "minutes", "store", "packs", "blend_stores", "blend_packs",
                "valid_stores", "valid_packs")  # fmt: skip


def _identity(config: Config, weights_digest: str) -> dict[str, Any]:
    """What a checkpoint must share with a run that resumes it: all that changes the result. The weights it begins with
    and its packs by digest; where they lie does not matter, nor what it is measured by or when it has to end."""
    kept = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("keyed", True)}
    plain = {name: value for name, value in kept.items() if name not in NOT_IDENTITY}
    return {**plain, "balance": asdict(config.balance), "lora": asdict(config.lora), "model": weights_digest}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
