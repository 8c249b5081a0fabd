"""Supervised fine-tuning on packed documents: model folder + token store + pack plan -> model folder.

With `lora` the model stays as it is and adapters are trained; the folder then has both (model_folder.py).
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base import durable
from data_tools.base.declared import setting, with_default
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop, never, silent
from megatron_ext.entrypoints import certify
from megatron_ext.lora import settings as loras
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import preflight
from megatron_ext.preflight.planner import Training, training_flops
from megatron_ext.training import options
from megatron_ext.training import schedule as schedules
from megatron_ext.training.options import Balance, Engine
from megatron_ext.training.schedule import Amount
from megatron_ext.training.settings import TrainingSettings

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.training import loop
    from megatron_ext.training.trainer import Trainer


@dataclass
class Config(TrainingSettings):
    """Supervised fine-tuning on packs: the config of the phase sft."""

    store: str = setting("", "token store", needed=True, input=True)
    packs: str = setting("", "pack plan of that store", needed=True, input=True)
    blend_stores: list[str] = setting(list, "further token stores, blended by weight", free=True, input=True)
    blend_packs: list[str] = setting(list, "pack plans of the further stores", free=True, input=True)
    blend_weights: list[float] = setting(
        list, "shares of packs: that of `packs`, then that of each further plan", above=0
    )
    valid_stores: list[str] = setting(list, "token stores of the validation sets", free=True, input=True)
    valid_packs: list[str] = setting(list, "pack plans of the validation sets", free=True, input=True)
    init_from: str = setting(
        "", "weights to begin with: a model folder, a step, or the folder of a training", free=True, input=True
    )
    init_step: int = setting(0, "step of the training in init_from; 0: what it sealed, else its newest", least=0)

    steps: int = setting(0, "updates; the first limit that is reached ends the training; 0: no limit", least=0)
    samples: int = setting(0, "packs; what is less than an update is left out; 0: no limit", unit="packs", least=0)
    tokens: int = setting(0, "tokens, padding counts; 0: no limit", unit="tokens", least=0)
    minutes: float = setting(
        0.0, "time of training, all attempts together; it then ends early, and the schedule with it; 0: no limit",
        unit="minutes", least=0,
    )  # fmt: skip
    global_batch: int = setting(2, "packs of an update", unit="packs", least=1)
    seed: int = setting(0, "order of the packs, dropout", free=True)

    schedule: str = with_default(TrainingSettings, "schedule", "wsd")
    lr: float = with_default(TrainingSettings, "lr", 1e-3)
    warmup_samples: int = setting(0, "the warm-up in packs, in place of warmup_steps", unit="packs", least=0)
    warmup_tokens: int = setting(0, "the warm-up in tokens, in place of warmup_steps", unit="tokens", least=0)
    balance: Balance = setting(Balance, "how the work of experts is balanced")

    engine: Engine = setting(Engine, "how the training uses its GPUs", keyed=False)
    log_every: int = setting(10, "steps between two lines of metrics", unit="steps", least=1, keyed=False)
    validate_every: int = setting(
        0, "steps between two validations; 0: only at the end", unit="steps", least=0, keyed=False
    )
    certify: bool = setting(False, "first show that the parallel layout computes what one process does", keyed=False)


def _schedule(config: Config, pack_length: int | None) -> schedules.Schedule:
    """Return the schedule in updates. What is given in tokens does not count while the length of packs is not known."""
    batch = config.global_batch
    warmup = Amount(config.warmup_steps, config.warmup_samples, config.warmup_tokens).in_steps(batch, pack_length)
    return schedules.Schedule(
        shape=config.schedule,
        steps=schedules.updates(Amount(config.steps, config.samples, config.tokens), batch, pack_length),
        peak=config.lr,
        floor=config.min_lr,
        warmup=warmup[0] if warmup else 0,
        decay_share=config.decay_share,
    )


def _training(config: Config, site: Site) -> tuple[Training, list[Problem]]:
    """Return what the training would carry, as far as it is known, and what is wrong with its model."""
    training, problems = preflight.prepare(
        config.model,
        config.packs,
        global_batch=config.global_batch,
        dtype=config.dtype,
        backend=config.backend,
        site=site,
    )
    return replace(training, offload=config.engine.offload_optimizer, lora=config.lora), problems


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of `ranks` ranks yet to come."""
    site = site or Site(ranks)
    training, problems = _training(config, site)
    problems += _check_length(config, training.workload.pack_length)
    if training.shape is not None:
        problems += options.check_balance(config.balance, training.shape.experts > 0)
    problems += _check_data(config, site) + options.check(config.engine, config.backend, environment=site.environment)
    problems += loras.check(config.lora, training.shape) + _check_base(config, site)
    return problems + preflight.check(config.parallel, training, site)


def _check_length(config: Config, pack_length: int | None) -> list[Problem]:
    """Refuse lengths of training and warm-up that are not given, given twice, or do not go together."""
    problems = []
    warmups = ("warmup_steps", "warmup_samples", "warmup_tokens")
    if len([name for name in warmups if getattr(config, name)]) > 1:
        problems.append(Problem("warmup_steps", f"the warm-up is given more than once: one of {', '.join(warmups)}"))
    if not (config.steps or config.samples or config.tokens):
        problems.append(Problem("steps", "how long to train is not said: give steps, samples or tokens"))
    elif not problems and (pack_length or not (config.tokens or config.warmup_tokens)):
        problems += schedules.check(_schedule(config, pack_length))
    return problems


def _check_data(config: Config, site: Site) -> list[Problem]:
    """Refuse blends and validation sets that have not as many stores as plans, or packs of different lengths."""
    problems = []
    for stores, packs in (("blend_stores", "blend_packs"), ("valid_stores", "valid_packs")):
        counts = len(getattr(config, stores)), len(getattr(config, packs))
        if counts[0] != counts[1]:
            problems.append(Problem(packs, f"{counts[1]} plans for {counts[0]} {stores}: give one for each"))
    wanted = len(config.blend_packs) + 1 if config.blend_packs else 0
    if len(config.blend_weights) != wanted:
        problems.append(Problem("blend_weights", f"{len(config.blend_weights)} weights for {wanted} blended plans"))
    lengths = {
        name: length
        for name in (config.packs, *config.blend_packs)
        if (length := preflight.pack_facts(name, site).get("pack_length"))
    }
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        problems.append(Problem("blend_packs", f"packs of different lengths cannot be blended: {said} tokens"))
    return problems


def _check_base(config: Config, site: Site) -> list[Problem]:
    """Refuse other weights for a model that gets adapters, and a folder whose adapter is of another kind."""
    problems = []
    if config.lora.rank and config.init_from:
        problems.append(Problem("init_from", "with LoRA the weights stay those of `model`: name that folder there"))
    adapter = preflight.model_adapter(config.model, site)[1]
    return problems + loras.check_folder(config.lora, adapter, config.model)


def parallel_report(config: Config, site: Site, searching: bool) -> dict[str, Any]:
    """Return what the parallel plan costs, its rank grid, and others: see preflight.report."""
    return preflight.report(config.parallel, _training(config, site)[0], site, searching)


def forecast(config: Config, site: Site) -> dict[str, Any]:
    """Return what the model folder of a run will hold, known before it ran."""
    return preflight.forecast(config.model, config.lora, site)


def run(config: Config, out: Path, keep: Path, progress: Progress = silent, stop: Stop = never) -> dict[str, Any]:
    """Train to the last step, resuming from KEEP/checkpoints; then make `out` a model folder.

    Raise Stopped on every rank, after a checkpoint, once `stop` says so on any of them.
    Return the facts: step, loss_first, loss_last, valid_losses, weights_digest, tokens, supervised_tokens,
    resumed_from, notes; with LoRA lora (lora/settings.py, reach); with `certify` also certificate
    (entrypoints/certify.py), which is kept in KEEP/certificates.
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
    identity = _identity(config, digest)
    certified = {}
    if config.certify and ranks.rank_of_environment() == 0:  # the others wait for it where they join
        asked = certify.Config(model=config.model, ranks=world, parallel=config.parallel)
        certified = {"certificate": certify.certificate(asked, keep / "certificates")}

    patience = timedelta(minutes=config.distributed_timeout_minutes)
    with ranks.started(config.parallel, config.seed, patience, config.engine.te_rng):
        # megatron-core may be imported once the device is ready
        from megatron_ext.training import loop, metrics

        def sinks(resumed_from: int) -> list[Any]:
            run_id = durable.sha256_bytes(str(keep.resolve()))[:16]  # the same for all attempts at this training
            return metrics.sinks(config.track, keep, resumed_from, run_id=run_id, config=identity)

        training = _training(config, Site(world))[0]
        trainer = _trainer(config, folder, training, weights)
        outcome = loop.train_on_packs(
            trainer,
            packs,
            _loop_run(config, training, packs.pack_length),
            keep=keep,
            identity=identity,
            progress=progress,
            stop=stop,
            validation=validation,
            sinks=sinks,
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


def _trainer(config: Config, folder: "ModelFolder", training: Training, weights: Path | None) -> "Trainer":
    """Return the model of the folder with its optimizer. `weights`: those to begin with, None for the folder's own."""
    from megatron_ext.model_folders import model_folder
    from megatron_ext.training.trainer import AdamW, Trainer

    experts = training.shape is not None and training.shape.experts > 0
    stages = model_folder.load_trainable(
        folder,
        config.parallel,
        config.lora,
        config.seed,
        dtype=config.dtype,
        backend=config.backend,
        options=options.transformer_fields(config.engine, config.balance, experts),
        weights=weights,
    )
    settings = AdamW(
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        clip=config.clip_grad,
    )
    return Trainer(stages, config.parallel, settings, config.engine)


def _loop_run(config: Config, training: Training, pack_length: int) -> "loop.Run":
    from megatron_ext.training import loop

    return loop.Run(
        schedule=_schedule(config, pack_length),
        global_batch=config.global_batch,
        seed=config.seed,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        keep_every=config.keep_every,
        save_in_background=config.save_in_background,
        validate_every=config.validate_every,
        minutes=config.minutes,
        pack_flops=training_flops(training) if training.shape is not None else 0.0,
        hang=config.hang,
    )


NOT_IDENTITY = ("model", "init_from", "init_step", "minutes", "store", "packs", "blend_stores", "blend_packs",
                "valid_stores", "valid_packs")  # fmt: skip


def _identity(config: Config, weights_digest: str) -> dict[str, Any]:
    """Return what a checkpoint must share with a run that resumes it: all that changes the result.

    The weights it begins with and its packs go by digest; where they lie does not matter, nor what it is measured by or
    when it has to end.
    """
    plain = {name: value for name, value in options.keyed(config).items() if name not in NOT_IDENTITY}
    return {**plain, "model": weights_digest}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
