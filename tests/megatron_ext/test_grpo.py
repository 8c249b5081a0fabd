"""GRPO on real gloo ranks: it learns, lr 0 changes nothing, and a stopped run goes on as if it had not been."""

import itertools
import json
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest

from data_tools.mistake import UserMistake
from data_tools.progress import Stopped
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rl.position import Position
from megatron_ext.rl.rows import rollout_rows
from megatron_ext.rl.samples import Sample, batch_of
from megatron_ext.rl.settings import Advantage, Loss, Rewarding
from megatron_ext.rl.step import draw
from megatron_ext.rl.updates import totals_of
from tests.megatron_ext import tiny
from tests.megatron_ext.rl import toy
from tests.megatron_ext.rl.processes import in_ranks_of_their_own

FAMILIES = {
    "qwen2": tiny.DIMS,
    "gpt_oss": tiny.GPT_OSS_DIMS,
    "nemotron_h": tiny.hybrid("ME*-"),
}


def metrics(keep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (keep / "metrics.jsonl").read_text().splitlines()]


def samples(keep: Path) -> list[dict[str, Any]]:
    paths = sorted((keep / "samples").glob("step_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny.hf_folder(tmp_path_factory.mktemp(name), of, seed=4) for name, of in FAMILIES.items()}


def test_without_a_learning_rate_the_ratio_is_one_and_nothing_is_clipped(folders, tmp_path):
    toy.trained(folders["qwen2"], tiny.DIMS, ParallelPlan(), tmp_path, steps=20, lr=0.0, passes=2, minibatches=2,
                old_logprobs="rollout")  # fmt: skip
    found = metrics(tmp_path)
    assert len(found) == 20
    for line in found:
        assert line["updates"] in (0, 4) and line["clipped_low"] == line["clipped_high"] == 0
        assert abs(line["ratio"] - 1) < 1e-5 and line["mismatch"]["max_log"] < 1e-5


CELLS = {
    "DP2": ParallelPlan(),
    "TP2": ParallelPlan(tensor=2, sequence_parallel=True),
    "PP2": ParallelPlan(pipeline=2),
    "EP2": ParallelPlan(expert=2),
    "CP2": ParallelPlan(context=2),
    "TP2xDP2": ParallelPlan(tensor=2, sequence_parallel=True),
}


LOSSES = {
    "dapo": Loss(entropy=0.01),
    "gspo": Loss(level="sequence", aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
}


@pytest.fixture(scope="module")
def one_process(folders, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Two steps of two updates each."""
    found = {}
    for name, loss in LOSSES.items():
        keep = tmp_path_factory.mktemp(name)
        toy.trained(folders["qwen2"], tiny.DIMS, ParallelPlan(), keep, steps=2, minibatches=2, loss=loss)
        found[name] = metrics(keep)
    return found


SHORT = [("dapo", "DP2"), ("gspo", "CP2")]
OTHERS = [(loss, cell) for loss in LOSSES for cell in ("DP2", "TP2", "PP2", "CP2") if (loss, cell) not in SHORT]


@pytest.mark.parametrize("loss, cell", [*SHORT, *(pytest.param(*pair, marks=pytest.mark.soak) for pair in OTHERS)])
def test_a_step_is_the_same_under_every_layout(two_ranks, folders, one_process, tmp_path, loss, cell):
    """The same samples, rewards, loss and gradient: denominators count all ranks."""
    two_ranks.run(toy.trained, hf=folders["qwen2"], of=tiny.DIMS, plan=CELLS[cell], keep=tmp_path, steps=2,
                  minibatches=2,
                  loss=LOSSES[loss])  # fmt: skip
    for ours, theirs in zip(metrics(tmp_path), one_process[loss]):
        assert [ours[name] for name in ("reward", "samples", "trained_tokens")] == [
            theirs[name] for name in ("reward", "samples", "trained_tokens")
        ]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for name in ("entropy", "ratio", "clipped_low", "clipped_high"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)


IN_CI = ("qwen2", "PP2")
ILLEGAL = [("qwen2", "EP2"), ("nemotron_h", "CP2")]  # no experts; two ranks do not split its Mamba groups of 4 heads
LEGAL = [(family, cell) for family in FAMILIES for cell in CELLS if (family, cell) not in ILLEGAL]


def plan_of(family: str, cell: str) -> ParallelPlan:
    """Tensor ranks share the experts of a model that has them: whole ones on each are refused by the rules."""
    plan = CELLS[cell]
    return plan if family == "qwen2" or plan.tensor == 1 else replace(plan, expert=plan.tensor)


@pytest.mark.parametrize(
    "family, cell", [pytest.param(*one, marks=[] if one == IN_CI else pytest.mark.soak) for one in LEGAL]
)
def test_rewards_rise(request, folders, tmp_path, family, cell):
    pool = request.getfixturevalue("four_ranks" if cell == "TP2xDP2" else "two_ranks")
    pool.run(toy.trained, hf=folders[family], of=FAMILIES[family], plan=plan_of(family, cell), keep=tmp_path, steps=12)
    rewards = [line["reward"] for line in metrics(tmp_path)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards


def odd_judge(item: int, completion: str) -> Any:
    """What broken verifiers say, of some samples."""
    return {0: None, 1: float("nan"), 2: "a string", 3: float("inf")}.get(
        len(completion) % 7, toy.share_below(item, completion)
    )


def test_samples_without_a_usable_reward_are_masked_and_the_run_goes_on(folders, tmp_path):
    toy.trained(folders["qwen2"], tiny.DIMS, ParallelPlan(), tmp_path, steps=2, judge=odd_judge, refill_tries=1)
    lines = samples(tmp_path)
    unscored = [line for line in lines if line["reward"] is None]
    assert unscored and all(not line["trained"] and line["note"] for line in unscored)
    assert sum(line["unscorable"] for line in metrics(tmp_path)) == len(unscored)
    assert any(line["trained"] for line in lines)


def test_a_checkpoint_of_another_identity_is_refused_and_what_it_does_not_say_is_none(folders, tmp_path):
    """A name that runs did not write down yet when they began is not held against them."""
    plain = dict(hf=folders["qwen2"], of=tiny.DIMS, plan=ParallelPlan(), keep=tmp_path)
    toy.trained(steps=1, identity={"answers": "old"}, **plain)
    with pytest.raises(UserMistake, match="was written with answers = 'old', this run has 'new'"):
        toy.trained(steps=2, identity={"answers": "new"}, **plain)
    assert toy.trained(steps=2, identity={"answers": "old", "later": 1}, **plain)["resumed_from"] == 1


def test_the_kl_term_holds_the_policy_at_its_reference(folders, tmp_path):
    def last(beta: float) -> float:
        keep = tmp_path / str(beta)
        loss = Loss(kl_beta=beta)
        toy.trained(folders["qwen2"], tiny.DIMS, ParallelPlan(), keep, steps=8, loss=loss, reference=True)
        return metrics(keep)[-1]["kl"]

    assert last(3.0) < 0.5 * last(1e-9)


def test_tokens_of_replies_are_in_the_rows_and_never_trained(alone):
    """Their place in the row is the document's, their loss weight nothing, and no log-prob of theirs is compared."""
    nan = float("nan")
    drawn = [
        Sample(
            0,
            0,
            (1, 2),
            numpy.array([3, 13, 8, 9, 4], numpy.int32),
            numpy.array([-1, -2, nan, nan, -3], numpy.float32),
            "stop",
            1.0,
        ),
        Sample(0, 1, (1, 2), numpy.array([7, 5], numpy.int32), numpy.array([-4, -5], numpy.float32), "stop", 0.0),
    ]
    batch = batch_of(drawn, {0}, Advantage(scale="none"), Rewarding(), 8)
    [row] = rollout_rows(batch, ParallelPlan(), 64, 1.0, True)
    assert row.ids.tolist() == [[1, 2, 3, 13, 8, 9, 1, 2, 7]]
    assert row.supervised.tolist() == [1, 2, 5, 7, 8] and row.labels.tolist() == [3, 13, 4, 7, 5]
    assert row.behaviour.tolist() == [-1, -2, -3, -4, -5] and row.lengths.tolist() == [3, 2]
    assert row.advantage.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5] and row.sequence.tolist() == [0, 0, 0, 1, 1]
    assert totals_of(batch, toy.run_of(1, 0.1)).tokens == 5


@pytest.mark.parametrize("cell", ["DP2", pytest.param("TP2", marks=pytest.mark.soak)])
def test_a_run_of_several_turns_stopped_in_mid_rollout_ends_as_the_uninterrupted_one(
    two_ranks, folders, tmp_path, cell
):
    arguments = dict(hf=folders["qwen2"], of=tiny.DIMS, plan=CELLS[cell], steps=3, minibatches=2,
                     turns=True, max_tokens=14, advantage=Advantage(scale="none"))  # fmt: skip
    whole = two_ranks.run(toy.trained, keep=tmp_path / "whole", **arguments)[0]
    found = stop_and_go_on(two_ranks, tmp_path / "cut", [9, 6], **arguments)[0]
    assert found["digest"] == whole["digest"] and texts(tmp_path / "cut") == texts(tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    assert untimed(metrics(tmp_path / "cut")) == untimed(lines)
    assert all(
        line["turns"] > 1.2 and line["reply_tokens"] > 0.3 and line["mismatch"]["max_log"] < 1e-4 for line in lines
    )
    assert all(line["trained_tokens"] < line["length"] * line["trained_samples"] for line in lines)


ENGINES = [dict(max_batch=3, block_size=2), dict(max_batch=16, token_budget=64), dict(max_batch=1, token_budget=2)]
UPDATES = dict(passes=2, minibatches=2)  # all else as it is by default


def with_engines(train: Any, folder: Path, keep: Path, engines: list, **arguments: Any) -> tuple[set, set]:
    """(digests, mismatches of the first update) of a run under each of `engines` and the toy's own."""
    digests, mismatches = set(), set()
    for number, engine in enumerate([{}, *engines]):
        found = train(hf=folder, of=tiny.DIMS, keep=keep / str(number), engine_of=engine, **UPDATES, **arguments)
        digests |= {rank["digest"] for rank in (found if isinstance(found, list) else [found])}
        mismatches.add(next(line["mismatch"]["kl"] for line in metrics(keep / str(number)) if "mismatch" in line))
    return digests, mismatches


def test_settings_of_the_engine_change_no_bit_of_the_weights(folders, tmp_path):
    """Not even where several updates follow a rollout: what the engine records does not enter the loss."""
    digests, mismatches = with_engines(
        toy.trained, folders["qwen2"], tmp_path, ENGINES[1:], plan=ParallelPlan(), steps=3
    )
    assert len(digests) == 1
    assert len(mismatches) > 1, "the engines recorded the same bits: nothing was shown"


@pytest.mark.soak
@pytest.mark.parametrize("cell", ["DP2", "TP2", "PP2", "CP2"])
def test_settings_of_the_engine_change_no_bit_under_any_layout(two_ranks, folders, tmp_path, cell):
    def run(**arguments: Any) -> Any:
        return two_ranks.run(toy.trained, plan=CELLS[cell], **arguments)

    digests, mismatches = with_engines(run, folders["qwen2"], tmp_path, ENGINES, steps=20)
    assert len(digests) == 1 and len(mismatches) > 1


@pytest.mark.soak
@pytest.mark.parametrize("cell", ["DP2", "TP2", "PP2", "CP2", "TP2xDP2"])
def test_later_updates_of_a_step_are_those_of_one_process_under_every_layout(request, folders, tmp_path, cell):
    """Within fp32's tolerance: each layout adds up sums in an order of its own; none has the bits of one process."""
    pool = request.getfixturevalue("four_ranks" if cell == "TP2xDP2" else "two_ranks")
    plain = dict(hf=folders["qwen2"], of=tiny.DIMS, steps=2, **UPDATES)
    toy.trained(plan=ParallelPlan(), keep=tmp_path / "one", **plain)
    pool.run(toy.trained, plan=CELLS[cell], keep=tmp_path / cell, **plain)
    for ours, theirs in zip(metrics(tmp_path / cell), metrics(tmp_path / "one")):
        assert ours["updates"] == theirs["updates"] == 4 and ours["trained_tokens"] == theirs["trained_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["ratio"] == pytest.approx(theirs["ratio"], rel=1e-4)


@pytest.mark.soak
def test_what_the_engine_recorded_enters_the_loss_only_on_request(folders, tmp_path):
    asked = dict(plan=ParallelPlan(), steps=6, old_logprobs="rollout", mismatch_limit=1.0)
    assert len(with_engines(toy.trained, folders["qwen2"], tmp_path, ENGINES, **asked)[0]) > 1


# ---------------------------------------------------------------- samples dealt to replicas

FEW = dict(steps=3, prompts=2, group=4, minibatches=2, advantage=Advantage(scale="none"))  # prompts, for four replicas


@pytest.fixture(scope="module")
def few_prompts(four_ranks, folders, tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """(facts of each rank, KEEP) of a run of 2 prompts x 4 samples on 4 replicas."""
    keep = tmp_path_factory.mktemp("few")
    return four_ranks.run(toy.trained, hf=folders["qwen2"], of=tiny.DIMS, plan=ParallelPlan(), keep=keep, **FEW), keep


def test_every_replica_draws_where_prompts_are_fewer(few_prompts):
    facts, keep = few_prompts
    assert [len(rank["asked"]) for rank in facts] == [FEW["steps"] * FEW["prompts"] * FEW["group"] / 4] * 4
    assert len({rank["digest"] for rank in facts}) == 1


def test_how_samples_are_dealt_changes_no_bit(few_prompts, four_ranks, folders, tmp_path):
    facts, keep = few_prompts
    found = four_ranks.run(toy.trained, hf=folders["qwen2"], of=tiny.DIMS, plan=ParallelPlan(), keep=tmp_path,
                           dealt=toy.to_the_last, **FEW)  # fmt: skip
    assert [len(rank["asked"]) for rank in found] == [6, 0, 0, 18]
    assert {rank["digest"] for rank in found} == {facts[0]["digest"]}
    assert texts(tmp_path) == texts(keep) and untimed(metrics(tmp_path)) == untimed(metrics(keep))


@pytest.mark.parametrize("cell", ["one", pytest.param("CP2", marks=pytest.mark.soak), "DP2"])
def test_fewer_replicas_draw_the_same_and_train_the_same(few_prompts, request, folders, tmp_path, cell):
    """Within fp32's tolerance: other numbers of ranks add up gradients in other orders."""
    run = toy.trained if cell == "one" else partial(request.getfixturevalue("two_ranks").run, toy.trained)
    run(hf=folders["qwen2"], of=tiny.DIMS, plan=CELLS.get(cell, ParallelPlan()), keep=tmp_path, **FEW)
    assert texts(tmp_path) == texts(few_prompts[1])
    for ours, theirs in zip(metrics(tmp_path), metrics(few_prompts[1])):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("turns", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_samples_of_one_prompt_on_several_replicas_go_on_after_a_stop(four_ranks, folders, tmp_path, turns):
    arguments = dict(hf=folders["qwen2"], of=tiny.DIMS, plan=ParallelPlan(), checkpoint_every=2, turns=turns,
                     **FEW | dict(max_tokens=14, prompts=3))  # fmt: skip
    whole = four_ranks.run(toy.trained, keep=tmp_path / "whole", **arguments)[0]
    found = stop_and_go_on(four_ranks, tmp_path / "cut", [9, 6], **arguments)[0]
    assert found["digest"] == whole["digest"] and texts(tmp_path / "cut") == texts(tmp_path / "whole")
    assert sum(line["samples_from_journal"] for line in metrics(tmp_path / "cut")) > 0


@pytest.mark.soak
def test_what_four_replicas_recorded_two_go_on_with(request, few_prompts, folders, tmp_path):
    plain = dict(
        hf=folders["qwen2"], of=tiny.DIMS, plan=ParallelPlan(), keep=tmp_path, **FEW | dict(checkpoint_every=0)
    )
    stopped = request.getfixturevalue("four_ranks").run(toy.trained, stop_after=6, **plain)
    assert 0 < stopped[0]["stopped"] < 1
    request.getfixturevalue("two_ranks").run(toy.trained, **plain)
    assert texts(tmp_path) == texts(few_prompts[1]) and (tmp_path / "rollouts" / "step_0" / "merged.jsonl").exists()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6, 9))
def test_four_replicas_of_two_prompts_killed_at_any_moment_end_as_the_uninterrupted_run(
    four_ranks, folders, tmp_path, seed
):
    arguments = FEW | dict(steps=8, checkpoint_every=3)
    del arguments["advantage"]  # the processes take JSON
    plain = dict(hf=folders["qwen2"], of=tiny.DIMS, plan=ParallelPlan(), **arguments)
    whole = four_ranks.run(toy.trained, keep=tmp_path / "whole", **plain)[0]
    keep = tmp_path / "cut"
    for death in deaths(seed, ALL):
        found = in_ranks_of_their_own(folders["qwen2"], keep, death * 2, **arguments)
        assert -signal.SIGKILL in [rank.returncode for rank in found], found[0].stderr[-2000:]
    found = in_ranks_of_their_own(folders["qwen2"], keep, [None] * 4, **arguments)
    assert [rank.returncode for rank in found] == [0] * 4, found[0].stderr[-2000:]
    assert texts(keep) == texts(tmp_path / "whole")
    assert {json.loads(rank.stdout.splitlines()[-1])["digest"] for rank in found} == {whole["digest"]}


# ---------------------------------------------------------------- stopped, and gone on with


def test_a_step_that_is_left_while_it_draws_again_begins_anew():
    class Collector:
        def collect(self, items: range) -> list[Any]:
            if items[0] > 7:
                raise Stopped(0, 0)
            return [Sample(k, n, (1,), numpy.zeros(1, numpy.int32), numpy.zeros(1, numpy.float32), "stop", 1.0)
                    for k in items for n in range(2)]  # fmt: skip

    position = Position(cursor=7)
    with pytest.raises(Stopped):
        draw(Collector(), toy.run_of(1, 0.1, refill_tries=1), position)
    assert position.cursor == 7


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the metrics does not depend on the clock, nor on which samples shared an engine step."""
    kept = (
        "step",
        "lr",
        "reward",
        "reward_parts",
        "samples",
        "trained_samples",
        "length",
        "prompts_kept",
        "loss",
        "grad_norm",
    )
    return [{name: line[name] for name in kept} for line in lines]


def texts(keep: Path) -> list[tuple[Any, ...]]:
    return [
        (s["step"], s["item"], s["sample"], s["tokens"], s["reward"], s["advantage"], s["trained"])
        for s in samples(keep)
    ]


def stop_and_go_on(pool, keep: Path, moments: list[int], **arguments: Any) -> list[dict[str, Any]]:
    done = [0]
    for moment in moments:
        stopped = {facts["stopped"] for facts in pool.run(toy.trained, keep=keep, stop_after=moment, **arguments)}
        # also where both are in one step: else a restart is refused
        assert len(stopped) == 1 and max(stopped) > done[-1]
        done += stopped
    return pool.run(toy.trained, keep=keep, **arguments)


@pytest.mark.parametrize(
    "family, cell",
    [
        ("qwen2", "DP2"),
        *(pytest.param(*pair, marks=pytest.mark.soak) for pair in [("qwen2", "TP2"), ("gpt_oss", "EP2")]),
    ],
)
def test_a_run_stopped_in_mid_rollout_ends_as_the_uninterrupted_one_bit_for_bit(
    two_ranks, folders, tmp_path, family, cell
):
    """Several updates a step, prompts drawn again, a checkpoint every third step only."""
    arguments = dict(hf=folders[family], of=FAMILIES[family], plan=CELLS[cell], steps=5, minibatches=2, refill_tries=1,
                     checkpoint_every=3, advantage=Advantage(scale="none"))  # fmt: skip
    whole = two_ranks.run(toy.trained, keep=tmp_path / "whole", **arguments)[0]
    found = stop_and_go_on(two_ranks, tmp_path / "cut", [9, 5, 14], **arguments)[0]
    assert found["resumed_from"] > 0 and found["digest"] == whole["digest"]
    assert {**found["position"], "mismatch": 0} == {**whole["position"], "mismatch": 0}
    assert untimed(metrics(tmp_path / "cut")) == untimed(metrics(tmp_path / "whole"))
    assert sum(line["samples_from_journal"] for line in metrics(tmp_path / "cut")) > 0
    used = texts(tmp_path / "cut")
    assert used == texts(tmp_path / "whole")
    assert len({key[1:3] for key in used}) == len(used) == whole["position"]["samples"]


LONGEST = {"rollout": 0.05, "reward": 0.01, "update": 0.1, "save": 0.3}  # seconds that the stage takes, about
# each start comes to it so many times, whatever was done before
OFTEN = {"rollout": 12, "reward": 2, "update": 4, "save": 1}


def deaths(seed: int, stages: list[str]) -> list[list[Any]]:
    """For each stage a moment in it, of each rank."""
    dice = random.Random(seed)
    found = []
    for stage in dice.sample(stages, len(stages)):
        number = dice.randint(1, OFTEN[stage])
        found.append([[stage, number, dice.uniform(0, LONGEST[stage])] for _ in range(2)])
    return found


ONCE, ALL = ["save"], ["rollout", "rollout", "reward", "update", "save"]
KILLS = [
    pytest.param(1, ONCE, id="CI"),
    *(pytest.param(seed, ALL, id=f"{seed}", marks=pytest.mark.soak) for seed in (2, 3, 4, 5)),
]


@pytest.mark.parametrize("seed, stages", KILLS)
def test_ranks_killed_at_any_moment_end_as_the_uninterrupted_run_bit_for_bit(
    two_ranks, folders, tmp_path, seed, stages
):
    hf, keep = folders["qwen2"], tmp_path / "cut"
    arguments = dict(steps=10, passes=1 if stages is ONCE else 2, minibatches=2, checkpoint_every=3)
    plain = dict(hf=hf, of=tiny.DIMS, plan=ParallelPlan(), **arguments)
    whole = two_ranks.run(toy.trained, keep=tmp_path / "whole", **plain)[0]
    engines = itertools.cycle([{}] if stages is ONCE else ENGINES)  # of each start another one
    for death in deaths(seed, stages):
        found = in_ranks_of_their_own(hf, keep, death, engine_of=next(engines), **arguments)
        assert all(rank.returncode for rank in found), "the run was done before"
        assert -signal.SIGKILL in [rank.returncode for rank in found], found[0].stderr[-2000:]
    found = in_ranks_of_their_own(hf, keep, [None, None], **arguments)
    assert [rank.returncode for rank in found] == [0, 0], found[0].stderr[-2000:]
    assert texts(keep) == texts(tmp_path / "whole")
    assert untimed(metrics(keep)) == untimed(metrics(tmp_path / "whole"))
    digests = {json.loads(rank.stdout.splitlines()[-1])["digest"] for rank in found}
    assert digests == {whole["digest"]}
