"""In-place GRPO: model folder + tasks -> model folder. The training model's own parameters make the rollouts.

With `lora` the model stays as it is and adapters are trained; the folder then has both (model_folder.py).
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("megatron_ext", 1)[0] + "data_tools/own_packages.py")["hold"]()

from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_tools.chats.tokenizer import check_bos, load_tokenizer, told_opening
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, Stop, never, silent
from data_tools.tasks.mix import MixConfig, check_mix, entries_of
from megatron_ext.lora import settings as loras
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.parallel.plan import DEGREES, ParallelPlan, Site
from megatron_ext.parallel.shape import MAMBA, MOE, count_blocks
from megatron_ext.preflight import facts, refusals, tables
from megatron_ext.preflight.facts import Training
from megatron_ext.rl.settings import (
    OLD_LOGPROBS,
    Advantage,
    Evaluation,
    Loss,
    Rewarding,
    check_advantage,
    check_evaluation,
    check_loss,
    check_rewarding,
)  # fmt: skip
from megatron_ext.rollout.room import Room, check_room, room, room_notes
from megatron_ext.rollout.settings import EngineConfig, Sampling, check_engine, check_graphs, check_sampling
from megatron_ext.training import options, track, watch
from megatron_ext.training import schedule as schedules
from megatron_ext.training.track import Track
from megatron_ext.training.watch import Hang

FREE = {"keyed": False}  # does not change the result


@dataclass
class Config:
    model: str = field(default="", metadata={"input": True})  # model folder
    reference: str = field(default="", metadata={"input": True})  # model folder of the KL term; "": the model itself

    mix: MixConfig = field(default_factory=MixConfig)  # what is asked, and how it is rewarded
    chat_arguments: dict[str, Any] = field(default_factory=dict)  # for the chat template, where prompts are messages
    bos: str = field(default="", metadata={"keyed": "if_set"})  # of text prompts: "" as the tokenizer adds it; never
    evaluation: Evaluation = field(default_factory=Evaluation)

    steps: int = 100
    prompts: int = 64  # a step
    group: int = 8  # samples a prompt
    passes: int = 1  # over a step's rollouts
    minibatches: int = 1  # updates a pass
    refill_tries: int = 0  # times that prompts are drawn in place of those dropped, a step at most
    seed: int = 0  # order of the prompts, noise of the samples
    sampling: Sampling = field(default_factory=Sampling)
    rewarding: Rewarding = field(default_factory=Rewarding)
    advantage: Advantage = field(default_factory=Advantage)
    loss: Loss = field(default_factory=Loss)
    # Log-probs at the beginning of a step, which only several updates of it need. auto and recompute: one more forward
    # pass over the step's rows. rollout saves that pass by those recorded while sampling, as long as their KL from
    # training's, measured in the step before, is within the limit; the result then depends on the rounding of `engine`.
    old_logprobs: str = "auto"  # auto | recompute | rollout
    mismatch_limit: float = 1e-3  # nats a token, for rollout

    schedule: str = "constant"  # constant | cosine | wsd
    lr: float = 1e-6  # the highest rate
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_share: float = 0.2

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0  # gradient norm; 0 turns clipping off
    dtype: str = ""  # float32 | bfloat16; "" keeps the model folder's

    lora: LoraConfig = field(default_factory=LoraConfig)  # rank 0: off

    engine: EngineConfig = field(default_factory=EngineConfig, metadata=FREE)
    row_tokens: int = field(default=16384, metadata=FREE)  # of a packed row that is trained; a longer sample is one
    offload: bool = field(default=False, metadata=FREE)  # optimizer and gradients leave the GPU during rollouts
    verifiers: int = field(default=2, metadata=FREE)  # processes that score, a replica
    verify_limit_s: float = 10.0  # seconds that a verifier has for a sample, which is then not scorable
    record_s: float = field(default=5.0, metadata=FREE)  # seconds of sampling that a kill may cost
    log_samples: bool = field(default=True, metadata=FREE)  # every sample with its text, in KEEP/samples
    backend: str = field(default="torch", metadata=FREE)  # layer spec: torch | te
    checkpoint_every: int = field(default=0, metadata=FREE)  # steps; 0: only at the end
    keep_checkpoints: int = field(default=2, metadata=FREE)  # the newest
    keep_every: int = field(default=0, metadata=FREE)  # steps; checkpoints of its multiples stay for good
    save_in_background: bool = field(default=True, metadata=FREE)  # training goes on while a checkpoint is written
    track: Track = field(default_factory=Track, metadata=FREE)
    hang: Hang = field(default_factory=Hang, metadata=FREE)
    distributed_timeout_minutes: int = field(default=30, metadata=FREE)  # one that waits longer for a peer is dead
    parallel: ParallelPlan = field(default_factory=ParallelPlan, metadata=FREE)


def _schedule(config: Config) -> schedules.Schedule:
    return schedules.Schedule(
        config.schedule, config.steps, config.lr, config.min_lr, config.warmup_steps, config.decay_share
    )


def _training(config: Config, site: Site) -> tuple[Training, list[Problem]]:
    """A row of `row_tokens` in place of a pack; documents are aligned as the plan needs it."""
    training, problems = facts.prepare(config.model, "", 1, config.dtype, config.backend, site)
    workload = replace(training.workload, pack_length=None, global_batch=None)
    return replace(training, workload=workload, lora=config.lora), problems


def check(config: Config, ranks: int, site: Site | None = None) -> list[Problem]:
    """What can be refused before anything runs; `site` says what is known of `ranks` ranks that are yet to come."""
    problems = [] if config.model else [Problem("model", "is missing")]
    problems += schedules.check(_schedule(config))
    for name in ("prompts", "passes", "minibatches", "keep_checkpoints", "row_tokens", "verifiers"):
        if getattr(config, name) < 1:
            problems.append(Problem(name, f"{getattr(config, name)} is too few: the least is 1"))
    for name in ("refill_tries", "record_s", "mismatch_limit", "checkpoint_every", "keep_every"):
        if getattr(config, name) < 0:
            problems.append(Problem(name, f"{getattr(config, name)} is negative"))
    if config.minibatches > config.prompts * config.group:
        samples = f"{config.prompts} prompts x {config.group} samples"
        problems.append(Problem("minibatches", f"{config.minibatches} are more than {samples}"))
    if not config.verify_limit_s > 0:
        problems.append(Problem("verify_limit_s", f"{config.verify_limit_s} s is no time: 10 is usual"))
    if config.dtype not in ("", "float32", "bfloat16"):
        problems.append(Problem("dtype", f"{config.dtype!r} is neither float32 nor bfloat16"))
    if config.backend not in ("torch", "te"):
        problems.append(Problem("backend", f"{config.backend!r} is neither torch nor te"))
    if config.old_logprobs not in OLD_LOGPROBS:
        message = f"unknown value {config.old_logprobs!r}{nearest(config.old_logprobs, OLD_LOGPROBS)}"
        problems.append(Problem("old_logprobs", message))
    problems += check_sampling(config.sampling) + _check_temperature(config)
    problems += check_loss(config.loss) + check_advantage(config.advantage, config.group)
    problems += check_rewarding(config.rewarding, config.sampling.max_tokens) + check_evaluation(config.evaluation)
    problems += check_mix(config.mix) + check_engine(config.engine) + check_bos(config.bos)
    problems += track.check(config.track) + watch.check(config.hang)
    problems += options.check_timeout(config.distributed_timeout_minutes)
    if config.parallel.virtual > 1:
        problems.append(Problem("parallel.virtual", f"{config.parallel.virtual}: generation has whole stages: use 1"))
    site = site or Site(ranks)
    training, found = _training(config, site)
    adapter = facts.model_adapter(config.model, site)[1] if config.model else None
    problems += loras.check(config.lora, training.shape) + loras.check_folder(config.lora, adapter, config.model)
    problems += check_room(_room(config, training), config.engine)
    if training.shape is not None:
        positions, new = training.shape.max_positions, config.sampling.max_tokens
        if 0 < positions <= new:
            message = f"{new:,} new ones leave no room for a prompt in the model's {positions:,} positions: give fewer"
            problems.append(Problem("sampling.max_tokens", message))
        blocks = count_blocks(training.shape.layers)
        problems += check_graphs(config.engine, bool(blocks[MOE]), bool(blocks[MAMBA]), config.parallel.pipeline)
    return problems + found + refusals.check(config.parallel, training, site)


def _room(config: Config, training: Training) -> Room | None:
    """What the rollouts' memory holds; None while the model is not known or the plan makes no sense."""
    if training.shape is None or any(getattr(config.parallel, name) < 1 for name in DEGREES):
        return None
    if check_engine(config.engine):
        return None
    return room(config.engine, config.parallel, training.shape, training.dtype, 1 + config.sampling.max_tokens)


def _comparable(sampling: Sampling) -> bool:
    """Whether the log-probs of the sampling are known without its filters: they are recorded at temperature 1."""
    return not sampling.is_filtered or sampling.temperature == 1


def _check_temperature(config: Config) -> list[Problem]:
    if config.sampling.is_greedy:
        return [Problem("sampling.temperature", "0 gives a prompt's samples all alike: 1 is usual")]
    if _comparable(config.sampling):
        return []
    remedy = "use temperature 1, or turn top_k, top_p and min_p off"
    what = f"log-probs of filtered samples at temperature {config.sampling.temperature:g} are not recorded, and"
    problems = []
    if config.loss.correction.mode != "off":
        problems.append(Problem("loss.correction.mode", f"{what} {config.loss.correction.mode} needs them: {remedy}"))
    if config.old_logprobs == "rollout":
        problems.append(Problem("old_logprobs", f"{what} rollout takes them: {remedy}"))
    return problems


def _recorded_notes(config: Config) -> list[str]:
    """Say which settings have the loss take log-probs that the engine recorded."""
    names = ["loss.correction"] if config.loss.correction.mode != "off" else []
    if config.old_logprobs == "rollout" and config.passes * config.minibatches > 1:
        names.append("old_logprobs: rollout")
    what = "the loss takes what the engine recorded: its settings, and restarts, count within their rounding"
    return [f"{' and '.join(names)}: {what}"] if names else []


def parallel_report(config: Config, site: Site, searching: bool) -> dict[str, Any]:
    """What the parallel plan costs, its rank grid, others (tables.report), and what the rollouts' memory holds."""
    training = _training(config, site)[0]
    report = tables.report(config.parallel, training, site, searching)
    found = _room(config, training)
    if found is not None:
        report["facts"]["rollout"] = asdict(found) | {"samples": found.samples}
        report["notes"] = [*room_notes(found, config.engine, config.group), *report["notes"]]
    report["notes"] = [*report["notes"], *_recorded_notes(config)]
    return report


def forecast(config: Config, site: Site) -> dict[str, Any]:
    """What the model folder of a run will hold, known before it ran."""
    return facts.forecast(config.model, config.lora, site)


def run(config: Config, out: Path, keep: Path, progress: Progress = silent, stop: Stop = never) -> dict[str, Any]:
    """Train to the last step, resuming from KEEP/checkpoints and KEEP/rollouts; then make `out` a model folder.

    Raises Stopped on every rank, with all that was sampled recorded, once `stop` says so on any of them.
    Facts: step, reward_first, reward_last, weights_digest, updates, samples, trained_samples, the others by why they
    were not (unscorable, cut_off, equal), tokens, resumed_from, notes. UserMistake where nothing was trained in all
    steps, or every verdict of the first one failed (rl/fruit.py).
    """
    from megatron_ext.model_folders import model_folder
    from megatron_ext.parallel import ranks

    problems = check(config, ranks.world_size_of_environment())
    if problems:
        raise UserMistake(problems)
    folder = model_folder.open_folder(config.model)
    with ranks.started(config.parallel, config.seed, timedelta(minutes=config.distributed_timeout_minutes)):
        from megatron_ext.rl import session  # megatron-core may be imported once the device is ready

        identity = _identity(config, folder.weights_digest)
        outcome, digest = session.run(config, folder, identity, out, keep, progress, stop)
    position = outcome.position
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
        "notes": [*outcome.notes, *_recorded_notes(config)],
        "parallel": asdict(config.parallel),
        **({"lora": loras.reach(config.lora, folder.shape)} if config.lora.rank else {}),
    }


def replay(config: Config, keep: Path, step: int, item: int, number: int) -> dict[str, Any]:
    """One rollout of a run whose folder is `keep`, drawn again in this process: see rl/replay.py."""
    from megatron_ext.parallel import ranks

    with ranks.started(ParallelPlan(), config.seed):
        from megatron_ext.rl import replay as replays

        return replays.replay(config, keep, step, item, number)


def _identity(config: Config, model_digest: str) -> dict[str, Any]:
    """What a checkpoint must share with a run that resumes it: all that changes the result. The model by digest, the
    prompts by theirs (session.py); where they lie does not matter."""
    kept = options.keyed(config)
    plain = {name: asdict(value) if is_dataclass(value) else value for name, value in kept.items()}
    rewards = {name: [e.task, e.options, e.rewards, e.evaluation_only] for name, e in entries_of(config.mix).items()}
    return {**plain, "mix": rewards, "model": model_digest, "reference": bool(config.reference)}


if __name__ == "__main__":
    import sys

    from megatron_ext.entrypoints.bare import main

    sys.exit(main(Config, run, check))
