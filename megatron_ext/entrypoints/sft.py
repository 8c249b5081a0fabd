"""Supervised fine-tuning on packed documents: model folder + token store + pack plan -> model folder.

With `lora` the model stays as it is and adapters are trained; the folder then has both (model_folder.py).
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop, never, silent
from megatron_ext.entrypoints import certify
from megatron_ext.lora import settings as loras
from megatron_ext.parallel import rules
from megatron_ext.parallel.machine import here
from megatron_ext.parallel.parts import Needs
from megatron_ext.parallel.plan import Site
from megatron_ext.preflight import facts, refusals, tables
from megatron_ext.preflight.costs import costs as costs_of
from megatron_ext.preflight.facts import Training
from megatron_ext.preflight.flops import training_flops
from megatron_ext.training import muon as muons
from megatron_ext.training import options
from megatron_ext.training import schedule as schedules
from megatron_ext.training.settings import SftSettings

if TYPE_CHECKING:
    from megatron_ext.model_folders.model_folder import ModelFolder
    from megatron_ext.training.update import Trainer

Config = SftSettings


def _training(config: Config, site: Site) -> tuple[Training, list[Problem]]:
    """Return what the training would carry, as far as it is known, and what is wrong with its model."""
    training, problems = facts.prepare(config, config.packs, global_batch=config.global_batch, site=site)
    muon = config.optimizer == muons.MUON
    return replace(training, offload=config.engine.offload_optimizer, lora=config.lora, muon=muon), problems


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of `ranks` ranks yet to come."""
    site = site or Site(ranks)
    training, problems = _training(config, site)
    problems += _check_length(config, training.workload.pack_length)
    if training.shape is not None:
        problems += options.check_balance(config.balance, training.shape.experts > 0)
    problems += _check_data(config, site)
    needs = rules.needs_of(config.parallel, training.workload)
    problems += options.check(config.engine, facts.parts_of(config.parallel, training.workload), needs)
    problems += loras.check(config.lora, training.shape) + _check_base(config, site)
    problems += muons.check(
        config.optimizer,
        config.muon,
        lora=config.lora,
        plan=config.parallel,
        shape=training.shape,
        engine=config.engine,
    )
    return problems + refusals.check(config.parallel, training, site)


def _check_length(config: Config, pack_length: int | None) -> list[Problem]:
    """Refuse lengths of training and warm-up that are not given, given twice, or do not go together."""
    problems = []
    warmups = ("warmup_steps", "warmup_samples", "warmup_tokens")
    if len([name for name in warmups if getattr(config, name)]) > 1:
        problems.append(Problem("warmup_steps", f"the warm-up is given more than once: one of {', '.join(warmups)}"))
    if not (config.steps or config.samples or config.tokens):
        problems.append(Problem("steps", "how long to train is not said: give steps, samples or tokens"))
    elif not problems and (pack_length or not (config.tokens or config.warmup_tokens)):
        problems += schedules.check(config.rate_schedule(pack_length))
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
        if (length := facts.pack_facts(name, site).get("pack_length"))
    }
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        problems.append(Problem("blend_packs", f"packs of different lengths cannot be blended: {said} tokens"))
    return problems


def _check_base(config: Config, site: Site) -> list[Problem]:
    """Refuse other weights for a model that gets adapters, and a folder whose adapter is of another kind."""
    problems = loras.check_base(config.base, config.lora)
    if config.lora.rank and config.init_from:
        problems.append(Problem("init_from", "with LoRA the weights stay those of `model`: name that folder there"))
    adapter = facts.model_adapter(config.model, site)[1]
    return problems + loras.check_folder(config.lora, adapter, config.model)


def parallel_report(config: Config, site: Site, searching: bool) -> dict[str, Any]:
    """Return what the parallel plan costs, its rank grid, and others: see tables.report."""
    return tables.report(config.parallel, _training(config, site)[0], site, searching)


def forecast(config: Config, site: Site) -> dict[str, Any]:
    """Return what the model folder of a run will hold, known before it ran."""
    return facts.forecast(config.model, config.lora, site)


def costs(config: Config, site: Site) -> dict[str, float]:
    """Return what the training will take, as far as it is known: see preflight/costs.py."""
    training = _training(config, site)[0]
    updates = config.rate_schedule(training.workload.pack_length).steps
    return costs_of(config.parallel, training, updates=updates, checkpoints=config.checkpoints_at_once(updates))


def run(config: Config, out: Path, keep: Path, progress: Progress = silent, stop: Stop = never) -> dict[str, Any]:
    """Train to the last step, resuming from KEEP/checkpoints; then make `out` a model folder.

    Raise Stopped on every rank, after a checkpoint, once `stop` says so on any of them.
    Return the facts: step, loss_first, loss_last, valid_losses, weights_digest, tokens, supervised_tokens,
    resumed_from, notes, parts (whose layers); with LoRA lora (lora/settings.py, reach); with `certify` also certificate
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
        from megatron_ext.training import supervised  # megatron-core may be imported once the device is ready

        training = _training(config, Site(world))[0]
        choice = model_folder.told_parts(folder, config)
        dtype = config.dtype or folder.dtype
        needs = Needs(here(), folder.shape, plan=config.parallel, dtype=dtype, base=config.base)
        if problems := options.check(config.engine, choice.parts, needs):
            raise UserMistake(problems)
        trainer = _trainer(config, folder, training, weights)
        outcome = supervised.train_on_packs(
            trainer,
            packs,
            config,
            keep,
            identity=identity,
            progress=progress,
            stop=stop,
            validation=validation,
            pack_flops=training_flops(training) if training.shape is not None else 0.0,
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
        "parts": choice.facts(),
        **({"lora": loras.reach(config.lora, folder.shape)} if config.lora.rank else {}),
        **certified,
    }


def _trainer(config: Config, folder: "ModelFolder", training: Training, weights: Path | None) -> "Trainer":
    """Return the model of the folder with its optimizer. `weights`: those to begin with, None for the folder's own."""
    from megatron_ext.model_folders import model_folder
    from megatron_ext.training.update import AdamW, Trainer

    experts = training.shape is not None and training.shape.experts > 0
    stages = model_folder.load_trainable(
        folder,
        config.parallel,
        config.lora,
        config.seed,
        dtype=config.dtype,
        backend=config.backend,
        base=config.base,
        options=options.transformer_fields(config.engine, config.balance, experts),
        weights=weights,
    )
    return Trainer(stages, config.parallel, AdamW.of(config), config.engine)


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
