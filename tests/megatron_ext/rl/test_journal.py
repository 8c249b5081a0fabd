"""What was drawn before a kill is known afterwards, exactly, whatever the kill tore."""

import json
import random
from pathlib import Path

import numpy
import pytest

from megatron_ext.rl import journal
from megatron_ext.rl.journal import Journal, folder_of, gather


def floats(*values: float) -> list[float]:
    return numpy.array(values, numpy.float32).tolist()


def written(root: Path, name: str = "rank_0") -> Journal:
    log = Journal(root, 3, "run", name)
    log.record((7, 0), [1, 2], floats(-0.1, -0.2))
    log.record((7, 1), [5], floats(-1 / 3))
    log.record((7, 0), [1, 2, 9], floats(-0.1, -0.2, -7.25), "stop")
    log.judge((7, 0), {"reward": 1.0, "parts": {"correct": 1.0}, "note": ""})
    return log


def test_tokens_log_probs_ends_and_scores_come_back_bit_for_bit(tmp_path):
    written(tmp_path).close()
    found = gather(tmp_path, 3, "run")
    assert found[7, 0].tokens == [1, 2, 9] and found[7, 0].logprobs == floats(-0.1, -0.2, -7.25)
    assert found[7, 0].finish == "stop" and found[7, 0].score["reward"] == 1.0
    assert found[7, 1].tokens == [5] and found[7, 1].finish == "" and found[7, 1].score is None
    assert gather(tmp_path, 3, "run") == found and journal.read(tmp_path, 3) == found  # merged once, merged twice


def test_a_later_attempt_appends_to_what_it_resumed(tmp_path):
    written(tmp_path).close()
    log = Journal(tmp_path, 3, "run", "rank_1")  # another layout: another rank has the sample now
    log.resume({key: len(entry.tokens) for key, entry in gather(tmp_path, 3, "run").items()})
    log.record((7, 1), [5, 6], floats(-1 / 3, -0.5), "length")
    log.close()
    found = gather(tmp_path, 3, "run")
    assert found[7, 1].tokens == [5, 6] and found[7, 1].finish == "length" and found[7, 0].finish == "stop"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_costs_itself_and_what_follows_only(tmp_path, cut):
    written(tmp_path).close()
    path = folder_of(tmp_path, 3) / "rank_0.jsonl"
    raw = path.read_bytes()
    path.write_bytes(raw[:-cut])
    found = gather(tmp_path, 3, "run")
    assert found[7, 0].tokens == [1, 2, 9] and found[7, 0].score is None
    assert all(json.loads(line) for line in (folder_of(tmp_path, 3) / journal.MERGED).read_text().splitlines())


def damaged(raw: bytes, dice: random.Random) -> bytes:
    """Flip a bit, cut the end, put bytes in, take some out, or shuffle the lines."""
    at, how = dice.randrange(len(raw)), dice.randrange(5)
    if how == 0:
        return raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]
    if how == 1:
        return raw[:at]
    if how == 2:
        return raw[:at] + dice.randbytes(dice.randint(1, 20)) + raw[at:]
    if how == 3:
        return raw[:at] + raw[at + dice.randint(1, 300) :]
    lines = raw.splitlines(True)
    dice.shuffle(lines)
    return b"".join(lines)


def test_of_a_damaged_file_nothing_is_taken_that_was_not_drawn(tmp_path):
    """Also where the damage leaves a line that is JSON: seeds 63, 117 and others take its sum out with half of it."""
    drawn = ([], []), ([1, 2], floats(-0.1, -0.2)), ([1, 2, 9], floats(-0.1, -0.2, -7.25)), ([5], floats(-1 / 3))
    for seed in [*range(70), 117, 237, 597, 635]:
        root, dice = tmp_path / str(seed), random.Random(seed)
        for rank in range(2):
            written(root, f"rank_{rank}").close()
        if dice.random() < 0.5:
            gather(root, 3, "run")
        path = dice.choice(sorted(folder_of(root, 3).glob("*.jsonl")))
        path.write_bytes(damaged(path.read_bytes(), dice))
        for entry in gather(root, 3, "run").values():
            assert (entry.tokens, entry.logprobs) in drawn
            assert not entry.finish or entry.tokens == [1, 2, 9]


@pytest.mark.parametrize("cut", [0, 30])
def test_what_many_ranks_wrote_of_a_step_that_is_over_is_one_file_and_says_the_same(tmp_path, cut):
    """Also after an earlier attempt, and a torn line costs no other rank's."""
    for rank in range(journal.FEW + 2):
        log = Journal(tmp_path, 3, "run", f"rank_{rank}")
        log.record((rank, 0), [1, 2], floats(-0.1, -0.2))
        log.record((rank, 0), [1, 2, 9], floats(-0.1, -0.2, -7.25), "stop")
        log.judge((rank, 0), {"reward": float(rank), "parts": {}, "note": ""})
        log.close()
        if rank == 0:
            gather(tmp_path, 3, "run")
    other = Journal(tmp_path, 3, "another", "rank_x")
    other.judge((0, 0), {"reward": -1.0})
    other.close()
    folder = folder_of(tmp_path, 3)
    torn = folder / "rank_5.jsonl"
    torn.write_bytes(torn.read_bytes()[: -cut or None])
    before = journal.read(tmp_path, 3, "run")
    journal.join(tmp_path, 3, "run")
    assert [path.name for path in folder.iterdir()] == [journal.MERGED] and journal.read(tmp_path, 3, "run") == before
    assert len(before) == journal.FEW + 2 and (before[5, 0].score is None) == bool(cut)
    assert gather(tmp_path, 3, "run") == before == journal.read(tmp_path, 3)


def test_records_of_another_run_are_dropped_and_old_steps_forgotten(tmp_path):
    written(tmp_path).close()
    assert gather(tmp_path, 3, "another") == {} and gather(tmp_path, 3, "run") == {}
    assert journal.steps(tmp_path) == [3]
    journal.forget(tmp_path, 3)
    assert journal.steps(tmp_path) == [3]
    journal.forget(tmp_path, 4)
    assert journal.steps(tmp_path) == []
