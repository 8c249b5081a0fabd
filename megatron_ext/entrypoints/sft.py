"""Supervised fine-tuning on packed documents: model folder + token store + pack plan -> model folder."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop, never, silent
from megatron_ext import preflight
from megatron_ext import schedule as schedules
from megatron_ext.entrypoints import certify
from megatron_ext.parallel import ParallelPlan, Site
from megatron_ext.planner import Training

FREE = {"keyed": False}  # does not change the result


@dataclass
class Config:
    model: str = field(default="", metadata={"input": True})  # model folder
    store: str = field(default="", metadata={"input": True})  # token store
    packs: str = field(default="", metadata={"input": True})  # pack plan of that store

    steps: int = 100  # updates
    global_batch: int = 2  # packs an update
    seed: int = 0  # order of the packs, dropout

    schedule: str = "wsd"  # constant | cosine | wsd
    lr: float = 1e-3  # the highest rate
    min_lr: float = 0.0  # the last rate of cosine and wsd
    warmup_steps: int = 0
    decay_share: float = 0.2  # of all steps, wsd only

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0  # gradient norm; 0 turns clipping off
    dtype: str = ""  # float32 | bfloat16; "" keeps the model folder's

    backend: str = field(default="torch", metadata=FREE)  # layer spec: torch | te
    log_every: int = field(default=10, metadata=FREE)  # steps
    checkpoint_every: int = field(default=0, metadata=FREE)  # steps; 0: only at the end
    keep_checkpoints: int = field(default=2, metadata=FREE)
    parallel: ParallelPlan = field(default_factory=ParallelPlan, metadata=FREE)
    certify: bool = field(default=False, metadata=FREE)  # first show that the layout equals one process


def _schedule(config: Config) -> schedules.Schedule:
    return schedules.Schedule(
        config.schedule, config.steps, config.lr, config.min_lr, config.warmup_steps, config.decay_share
    )


def _training(config: Config, site: Site) -> tuple[Training, list[Problem]]:
    return preflight.prepare(
        config.model, config.packs, max(config.global_batch, 1), config.dtype, config.backend, site
    )


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """What can be refused before anything runs; `site` says what is known of `ranks` ranks that are yet to come."""
    problems = [Problem(name, "is missing") for name in ("model", "store", "packs") if not getattr(config, name)]
    problems += schedules.check(_schedule(config))
    for name in ("global_batch", "log_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            problems.append(Problem(name, f"{getattr(config, name)} is too few: the least is 1"))
    if config.checkpoint_every < 0:
        problems.append(Problem("checkpoint_every", f"{config.checkpoint_every} is negative: 0 saves only at the end"))
    if config.dtype not in ("", "float32", "bfloat16"):
        problems.append(Problem("dtype", f"{config.dtype!r} is neither float32 nor bfloat16"))
    if config.backend not in ("torch", "te"):
        problems.append(Problem("backend", f"{config.backend!r} is neither torch nor te"))
    site = site or Site(ranks)
    training, found = _training(config, site)
    return problems + found + preflight.check(config.parallel, training, site)


def parallel_report(config: Config, site: Site, searching: bool) -> dict[str, Any]:
    """What the parallel plan costs, its rank grid, and others: see preflight.report."""
    return preflight.report(config.parallel, _training(config, site)[0], site, searching)


def forecast(config: Config, site: Site) -> dict[str, Any]:
    """What the model folder of a run will hold, known before it ran."""
    return {"hf_config": preflight.model_config(config.model, site)[0]}


def run(config: Config, out: Path, keep: Path, progress: Progress = silent, stop: Stop = never) -> dict[str, Any]:
    """Train to the last step, resuming from KEEP/checkpoints; then make `out` a model folder.

    Raises Stopped on every rank, after a checkpoint, once `stop` says so on any of them.
    Facts: step, loss_first, loss_last, weights_digest, tokens, supervised_tokens, resumed_from, notes; with `certify`
    also certificate (entrypoints/certify.py), kept in KEEP/certificates.
    """
    from data_tools.pack import PackReader
    from megatron_ext import model_folder, ranks

    problems = check(config, ranks.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    packs = PackReader(Path(config.store), Path(config.packs))
    certified = {}
    if config.certify and ranks.rank_of_environment() == 0:  # the others wait for it where they join
        asked = certify.Config(config.model, ranks.world_size_of_environment(), config.parallel)
        certified = {"certificate": certify.certificate(asked, keep / "certificates")}

    with ranks.started(config.parallel, config.seed):
        from megatron_ext import train  # megatron-core may be imported once the device is ready

        trainer = train.Trainer(
            model_folder.load_stages(folder, config.parallel, config.dtype, config.backend),
            config.parallel,
            train.AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay, config.clip_grad),
        )
        outcome = train.train_on_packs(
            trainer,
            packs,
            train.Run(
                _schedule(config),
                config.global_batch,
                config.seed,
                config.log_every,
                config.checkpoint_every,
                config.keep_checkpoints,
            ),
            keep,
            _identity(config, folder.weights_digest),
            progress,
            stop,
        )
        digest = model_folder.write(out, trainer.model, folder.family, folder.hf, step=folder.step + outcome.step)
    return {
        "step": outcome.step,
        "loss_first": outcome.first_loss,
        "loss_last": outcome.last_loss,
        "weights_digest": digest,
        "tokens": outcome.tokens,
        "supervised_tokens": outcome.supervised_tokens,
        "resumed_from": outcome.resumed_from,
        "notes": outcome.notes,
        "parallel": asdict(config.parallel),
        **certified,
    }


def _identity(config: Config, model_digest: str) -> dict[str, Any]:
    """What a checkpoint must share with a run that resumes it: all that changes the result."""
    paths = ("model", "store", "packs")
    kept = {f.name: getattr(config, f.name) for f in fields(config) if f.metadata.get("keyed", True)}
    return {**{name: value for name, value in kept.items() if name not in paths}, "model": model_digest}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
