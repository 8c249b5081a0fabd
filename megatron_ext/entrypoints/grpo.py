"""In-place GRPO: model folder + tasks -> model folder. The training model's own parameters make the rollouts.

With `lora` the model stays as it is and adapters are trained; the folder then has both (model_folder.py).
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_tools.chats.tokenizer import load_tokenizer, told_opening
from data_tools.mistake import Problem, UserMistake
from data_tools.progress import Progress, Stop, never, silent
from data_tools.tasks.messages import check_template
from data_tools.tasks.mix import check_mix, entries_of
from megatron_ext.lora import settings as loras
from megatron_ext.parallel.plan import ParallelPlan, Site
from megatron_ext.preflight import facts, refusals, tables
from megatron_ext.preflight.costs import costs as costs_of
from megatron_ext.preflight.facts import Training
from megatron_ext.rl import memory
from megatron_ext.rl.settings import (
    GrpoSettings,
    check_comparable,
    check_completions,
    check_loss,
    check_rewarding,
    check_routing,
)
from megatron_ext.rollout.dealing import idle, idle_notes
from megatron_ext.rollout.room import Room, check_room, room, room_notes
from megatron_ext.rollout.settings import check_recording, check_rollouts
from megatron_ext.training import muon as muons
from megatron_ext.training import options
from megatron_ext.training import schedule as schedules

Config = GrpoSettings


def _training(config: Config, site: Site) -> tuple[Training, list[Problem]]:
    """Return what a training carries, and what is wrong with its model.

    A row of `row_tokens` stands in place of a pack, and documents are aligned as the plan needs it.
    """
    training, problems = facts.prepare(config, "", global_batch=1, site=site)
    workload = replace(training.workload, pack_length=None, global_batch=None)
    muon = config.optimizer == muons.MUON
    return replace(training, workload=workload, lora=config.lora, muon=muon), problems


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """Return what can be refused before anything runs; `site` says what is known of `ranks` ranks yet to come."""
    site = site or Site(ranks)
    training, problems = _training(config, site)
    if config.minibatches > config.prompts * config.group:
        samples = f"{config.prompts} prompts x {config.group} samples"
        problems.append(Problem("minibatches", f"{config.minibatches} are more than {samples}"))
    problems += schedules.check(config.rate_schedule())
    problems += check_rollouts(config, config.sampling) + check_comparable(config) + check_completions(config)
    problems += check_loss(config.loss) + check_rewarding(config.rewarding, config.sampling.max_tokens)
    problems += check_mix(config.mix)
    problems += check_template(config.mix, facts.model_template(config.model, site), config.model)
    adapter = facts.model_adapter(config.model, site)[1]
    problems += loras.check(config.lora, training.shape) + loras.check_folder(config.lora, adapter, config.model)
    problems += loras.check_base(config.base, config.lora)
    problems += muons.check(
        config.optimizer, config.muon, lora=config.lora, plan=config.parallel, shape=training.shape,
        offload=config.offload,
    )  # fmt: skip
    problems += check_room(config, training.shape, dtype=training.dtype, new=config.sampling.max_tokens)
    problems += check_recording(config, training.shape) + check_routing(config, training.shape)
    problems += refusals.check(config.parallel, training, site)
    return problems + memory.check(config, training, site)


def _room(config: Config, training: Training) -> Room | None:
    """Return what the memory of the rollouts holds; None while the model is not known."""
    if training.shape is None:
        return None
    tokens = (config.prompt_tokens or 1) + config.sampling.max_tokens
    return room(config.engine, config.parallel, training.shape, dtype=training.dtype, tokens=tokens)


def _recorded_notes(config: Config) -> list[str]:
    """Say which settings have the loss take log-probs that the engine recorded."""
    names = ["loss.correction"] if config.loss.correction.mode != "off" else []
    if config.old_logprobs == "rollout" and config.passes * config.minibatches > 1:
        names.append("old_logprobs: rollout")
    what = "the loss takes what the engine recorded: its settings, and restarts, count within their rounding"
    return [f"{' and '.join(names)}: {what}"] if names else []


def _replicas(config: Config, ranks: int) -> int:
    """Return how many copies of the model draw samples."""
    return config.parallel.data(ranks) * config.parallel.context


def parallel_report(config: Config, site: Site, searching: bool) -> dict[str, Any]:
    """Return what the parallel plan costs, its rank grid, others (tables.report), and what the rollouts' memory
    holds."""
    training = _training(config, site)[0]
    report = tables.report(config.parallel, training, site, searching, packed=False)
    told, shown, notes = memory.report(config, training, site)
    report["facts"] |= told
    report["tables"] += shown
    report["notes"] = [*notes, *report["notes"]]
    held = _room(config, training)
    if held is not None:
        report["facts"]["rollout"] = asdict(held) | {"samples": held.samples}
        report["notes"] = [*room_notes(held, config.engine, config.group), *report["notes"]]
    report["notes"] = [*report["notes"], *_recorded_notes(config)]
    report["notes"] += idle_notes(config.prompts, config.group, _replicas(config, site.ranks))
    return report


def forecast(config: Config, site: Site) -> dict[str, Any]:
    """Return what the model folder of a run will hold, known before it ran."""
    return facts.forecast(config.model, config.lora, site)


def costs(config: Config, site: Site) -> dict[str, float]:
    """Return what the training will take, as far as it is known: see preflight/costs.py."""
    training = _training(config, site)[0]
    updates = config.rate_schedule().steps
    return costs_of(config.parallel, training, updates=updates, checkpoints=config.checkpoints_at_once(updates))


def run(config: Config, out: Path, keep: Path, progress: Progress = silent, stop: Stop = never) -> dict[str, Any]:
    """Train to the last step, resuming from KEEP/checkpoints and KEEP/rollouts; then make `out` a model folder.

    Raise Stopped on every rank, with all that was sampled recorded, once `stop` says so on any of them.
    Return the facts: step, reward_first, reward_last, weights_digest, updates, samples, trained_samples, the others by
    why they were not (unscorable, cut_off, equal), tokens, resumed_from, notes, idle_replicas (which had nothing to
    draw), parts (whose layers). Raise UserMistake where nothing was trained in all steps, or every verdict of the first
    one failed (rl/untrained.py).
    """
    from megatron_ext.model_folders import model_folder
    from megatron_ext.parallel import ranks

    problems = check(config, ranks.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    with ranks.started(config.parallel, config.seed, timedelta(minutes=config.distributed_timeout_minutes)):
        from megatron_ext.rl import session  # megatron-core may be imported once the device is ready

        choice = model_folder.told_parts(folder, config)
        identity = _identity(config, folder.weights_digest)
        outcome, digest = session.run(config, folder, out, keep, identity=identity, progress=progress, stop=stop)
    position, replicas = outcome.position, _replicas(config, ranks.world_size_of_environment())
    return {
        "step": outcome.step,
        "reward_first": position.first_reward,
        "reward_last": position.last_reward,
        "weights_digest": digest,
        "updates": position.updates,
        "samples": position.samples,
        "trained_samples": position.trained_samples,
        **position.untrained,
        **told_opening(load_tokenizer(str(folder.hf)), config.bos),
        "tokens": position.tokens,
        "resumed_from": outcome.resumed_from,
        "notes": [
            *outcome.notes,
            *outcome.bounds,
            *_recorded_notes(config),
            *idle_notes(config.prompts, config.group, replicas),
        ],
        "bounds": outcome.bounds,
        "idle_replicas": idle(config.prompts * config.group, replicas),
        "parallel": asdict(config.parallel),
        "parts": choice.facts(),
        **({"lora": loras.reach(config.lora, folder.shape)} if config.lora.rank else {}),
    }


def replay(config: Config, keep: Path, step: int, item: int, number: int) -> dict[str, Any]:
    """Draw one rollout of a run whose folder is `keep` again, in this process: see rl/replay.py."""
    from megatron_ext.parallel import ranks

    with ranks.started(ParallelPlan(), config.seed):
        from megatron_ext.rl import replay as replays

        return replays.replay(config, keep, step=step, item=item, number=number)


def _identity(config: Config, model_digest: str) -> dict[str, Any]:
    """Return what a checkpoint must share with a run that resumes it: all that changes the result.

    The model goes by its digest, the prompts by theirs (session.py); where they lie does not matter.
    """
    rewards = {
        name: [entry.task, entry.options, entry.rewards, entry.evaluation_only]
        for name, entry in entries_of(config.mix).items()
    }
    return {**options.keyed(config), "mix": rewards, "model": model_digest, "reference": bool(config.reference)}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
