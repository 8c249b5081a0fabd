"""What a long GRPO leaves beside its checkpoints has a bound, and the summary says what was left out."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_tools.base import durable
from jobs.artifacts.layout import sample_logs_of
from megatron_ext.rl import completions, journal, sample_log
from megatron_ext.rl.position import Position
from megatron_ext.rl.sample_log import SampleLog
from megatron_ext.rl.samples import Sample, SampleBatch
from megatron_ext.rl.settings import GrpoSettings
from megatron_ext.rl.step import GrpoStep
from megatron_ext.training.metrics import Metrics
from megatron_ext.weights import checkpoint

STEPS, PROMPTS, GROUP = 60, 8, 2
NOTHING = SampleBatch([], np.zeros(0), np.zeros(0, bool))


def drawn(step: int) -> list[Sample]:
    tokens, logprobs = np.arange(3, dtype=np.int32), np.zeros(3, np.float32)
    items = range(step * PROMPTS, (step + 1) * PROMPTS)
    return [Sample(item, n, (1,), tokens, logprobs, "stop", 1.0) for item in items for n in range(GROUP)]


def text_of(sample: Sample) -> dict[str, str]:
    """Return texts that do not compress well: samples differ from one another."""
    words = np.random.default_rng(sample.key).integers(0, 10**9, 40)
    return {"prompt": str(sample.item), "completion": " ".join(map(str, words))}


def log_of(folder: Path, most_bytes: float) -> SampleLog:
    log = SampleLog(folder, most_bytes, STEPS)
    for step in range(1, STEPS + 1):
        if step == STEPS // 2:  # a restart goes on with the same bound
            log = SampleLog(folder, most_bytes, STEPS)
        log.write(step, drawn(step), NOTHING, differences={}, spell=text_of)
    return log


def written(path: Path, data: "bytes | str") -> None:
    """Write as durable.write_file does, without waiting for the disk."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("step_*"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_log_of_samples_stays_below_its_bound_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(sample_log, "PACKED_ABOVE", 0 if packed else 1 << 30)
    monkeypatch.setattr(sample_log.durable, "write_file", written)
    samples = tmp_path / "whole" / "samples"
    whole = log_of(samples, 1e12)
    assert whole.note() == "" and completions.write(samples, tmp_path / "all.csv") == STEPS * PROMPTS * GROUP
    bound = size(samples) / 3
    samples = tmp_path / "bounded" / "samples"
    note = log_of(samples, bound).note()
    logs = sample_logs_of(tmp_path / "bounded")
    assert size(samples) <= bound and list(logs) == list(range(1, STEPS + 1))
    assert all(path.suffix == (".zst" if packed else ".jsonl") for path in logs.values())
    count = completions.write(samples, tmp_path / "some.csv")
    assert count % GROUP == 0 and STEPS * GROUP <= count < STEPS * PROMPTS * GROUP / 2  # prompts with all their samples
    left = PROMPTS * STEPS - count // GROUP
    assert note == f"samples/ leaves out {left:,} of {PROMPTS * STEPS:,} prompts of {STEPS:,} steps (samples_gib)"
    lines = [json.loads(line) for line in (samples / sample_log.LEFT_OUT).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum(line["prompts"] - line["logged"] for line in lines) == left


def test_a_bound_below_a_prompt_a_step_is_held_by_prompts_of_some_steps_all_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_log.durable, "write_file", written)
    log_of(tmp_path / "whole" / "samples", 1e12)
    bound = size(tmp_path / "whole" / "samples") / PROMPTS * 0.4
    samples = tmp_path / "bounded" / "samples"
    note = log_of(samples, bound).note()
    logged = sorted(sample_logs_of(tmp_path / "bounded"))
    assert size(samples) <= bound and 0.4 * STEPS - 2 <= len(logged) <= 0.4 * STEPS
    assert max(b - a for a, b in zip([0, *logged], [*logged, STEPS + 1])) <= 4
    count = completions.write(samples, tmp_path / "some.csv")
    assert count == len(logged) * GROUP
    left = PROMPTS * STEPS - len(logged)
    assert note == f"samples/ leaves out {left} of {PROMPTS * STEPS} prompts of {STEPS} steps (samples_gib)"


def test_a_step_that_is_made_again_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SampleLog(tmp_path, 1e12, STEPS)
    for most in (1 << 30, 0):
        monkeypatch.setattr(sample_log, "PACKED_ABOVE", most)
        log.write(7, drawn(7), NOTHING, differences={}, spell=lambda s: {})
        assert len(list(tmp_path.glob("step_*"))) == 1 and log.sizes == {"step_000007": size(tmp_path)}


def test_what_a_step_leaves_out_is_appended_and_its_last_word_holds_after_a_restart(tmp_path: Path) -> None:
    durable.write_checked(tmp_path / sample_log.ALL_AT_ONCE, {"1": [5, PROMPTS]})  # of a training of before
    list_of = tmp_path / sample_log.LEFT_OUT
    log, before = SampleLog(tmp_path, 1, STEPS), b""
    for step in (2, 3, 3):
        log.write(step, drawn(step), NOTHING, differences={}, spell=text_of)
        assert list_of.read_bytes().startswith(before)
        before = list_of.read_bytes()
    assert len(before.splitlines()) == 2  # the same is not said twice
    list_of.write_bytes(before + b'{"step": 4, "log')  # a power cut
    log = SampleLog(tmp_path, 1e12, STEPS)
    assert log.left_out == {1: (5, PROMPTS), 2: (0, PROMPTS), 3: (0, PROMPTS)}
    log.write(3, drawn(3), NOTHING, differences={}, spell=text_of)
    assert SampleLog(tmp_path, 1, STEPS).left_out == log.left_out == {1: (5, PROMPTS), 2: (0, PROMPTS)}
    assert log.note() == f"samples/ leaves out {PROMPTS + 3} of {2 * PROMPTS} prompts of 2 steps (samples_gib)"


def record(root: Path, step: int) -> None:
    journal.folder_of(root, step).mkdir(parents=True)
    (journal.folder_of(root, step) / "rank_0.jsonl").write_text("x" * 100)


@pytest.mark.parametrize("every, keep, milestones", [(25, 2, 0), (25, 2, 50), (10, 1, 20), (0, 2, 0)])
def test_the_journal_holds_what_a_restart_needs_and_no_more_than_its_bound(
    tmp_path: Path, every: int, keep: int, milestones: int
) -> None:
    checkpoints, root = tmp_path / "checkpoints", tmp_path / "rollouts"
    checkpoints.mkdir(), root.mkdir()
    step = GrpoStep.__new__(GrpoStep)
    step.settings = SimpleNamespace(keep_checkpoints=keep)
    step.records = journal.Bound(root, 100 * 100)
    most = 0
    for done in range(1, 301):
        record(root, done - 1)
        step.records.add(done - 1)
        if every and done % every == 0:
            (checkpoints / f"step_{done}").mkdir()
            for old in checkpoint.surplus(checkpoint.steps(checkpoints), keep, milestones):
                (checkpoints / f"step_{old}").rmdir()
            step.published(SimpleNamespace(checkpoints=checkpoints), 0.0)
        most = max(most, len(step.records.sizes))
    left = journal.steps(root)
    assert sorted(step.records.sizes) == left and most <= max(100, every * (keep + 1))
    newest = checkpoint.steps(checkpoints)[:keep]
    oldest_needed = min(newest, default=200)
    assert left == list(range(oldest_needed, 300))
    assert ("journal_gib" in step.records.note()) == (not every)


@pytest.mark.parametrize("evaluated, kept", [(2, [2, 4]), (4, [2, 4, 4]), (-1, [4])])
def test_an_evaluation_that_is_made_again_after_a_kill_is_in_the_metrics_once(
    alone: None, tmp_path: Path, evaluated: int, kept: list[int]
) -> None:
    lines = [{"step": 2, "evaluation": {}}, {"step": 4, "reward": 1.0}, {"step": 4, "evaluation": {}}, {"step": 5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step = GrpoStep(None, None, GrpoSettings(log_samples=False), tmp_path, reference=None, spell=None,
                    evaluate=lambda done: {})  # fmt: skip
    loop = SimpleNamespace(done=4, steps=9, metrics=Metrics(tmp_path / "metrics.jsonl", 4))
    step.begin(loop, asdict(Position(evaluated=evaluated)))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == kept
