"""No altered file of a run is read with another meaning: single edits of every kind of JSON that decides something."""

import contextlib
import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from data_tools.base import durable
from data_tools.base.durable import TornFile
from data_tools.mistake import UserMistake
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.hash_cache import HashCache
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.artifacts.seal import read_seal
from launchers.backends.local import LocalBackend, read_jobs
from launchers.planning.ledger import Ledger
from launchers.submission.journal import Journal
from launchers.submission.steps import Cancel, Submit
from megatron_ext.files import step_manifest
from megatron_ext.rl import journal

REFUSED = (UserMistake, TornFile)
PHASE = FrozenPhase(
    "p",
    "sft",
    "0123456789abcdef",
    {"settings": {"lr": 1e-3, "on": True}, "upstream": {"a": "77ab"}},
    {"lr": 1e-3, "text": "é\u2028"},
    3,
    3,
    True,
    {"a": "afterok"},
    {"/data/in": "ff00"},
    2,
    1,
    8,
)


def sealed(folder: Path, fans_in: bool) -> Path:
    artifact = Artifact(folder / "p" / "KEY", 2, fans_in)
    lease = artifact.acquire(0, Owner.me(1, 0, "77"), lambda job: False)
    (lease.folder / "sub").mkdir()
    (lease.folder / "sub/f.txt").write_text("hello")
    artifact.seal(
        lease,
        {
            "key": "0123456789abcdef",
            "upstream": {"a": "77ab", "b": ["12", "34"]},
            "submission": 1,
            "restart": 0,
            "job": "77",
            "facts": {"loss": 1.25, "steps": 30, "whole": True},
        },
    )
    return artifact.element_seal_path(0) if fans_in else artifact.seal_path


def lease(folder: Path) -> Path:
    return Artifact(folder / "KEY").acquire(0, Owner.me(1, 0, "77"), lambda job: False).path


def manifest(folder: Path) -> Path:
    (folder / "step_12").mkdir()
    durable.write_checked(
        folder / "step_12/manifest.json",
        {
            "format": 2,
            "step": 12,
            "updates": 11,
            "weights_digest": "ab" * 32,
            "identity": {"seed": 1, "lr": 1e-3},
            "files": {"state/__0_0.distcp": [1234, "cd" * 32], "rng/0.pt": [56, "ef" * 32]},
            "position": {"pack": 77},
            "layout": "world2_tp2_pp1_cp1_ep1_etp1",
            "vocabulary": 1000,
        },
    )
    return folder / "step_12/manifest.json"


def read_manifest(path: Path):
    found, problem = step_manifest.read(path.parent)
    if problem:
        raise TornFile(problem)
    return found


def plan(folder: Path) -> Path:
    (folder / "submissions/1").mkdir(parents=True)
    RunFolder(folder).freeze(1, "pipe", [PHASE])
    return folder / "submissions/1/plan.json"


def redirects(folder: Path) -> Path:
    (folder / "submissions/1").mkdir(parents=True)
    RunFolder(folder).redirect(1, "p", 4)
    return folder / "submissions/1/redirects.json"


def steps(folder: Path) -> Path:
    (folder / "submissions/1").mkdir(parents=True)
    Journal(
        [
            Submit("p", "77ab", "run.p.a1.00ff", elements=[0, 1, 2], needs={"a": "afterok"}),
            Cancel("q", job="12"),
        ],
        {"a": "17"},
    ).write(RunFolder(folder), 1)
    return folder / "submissions/1/journal.json"


def ledger(folder: Path) -> Path:
    book = Ledger(folder / "ledger.jsonl")
    for event in ("submission", "sending", "job", "released"):
        asked = {"name": "n", "backend": "slurm", "choice": "dev", "time": 1.5}
        book.append(event, submission=1, phase="p", key="77ab", job="12", elements=[0, 1], waits={"a": "17"}, **asked)
    return book.path


def outcome(folder: Path) -> Path:
    RunFolder(folder).record_outcome(
        "p", Outcome(0, 1, 0, "stopped", 5, "said", "host", "77", 1.5, 2.5, 30, 40, "77ab")
    )
    return next(folder.glob("p/attempts/*.json"))


def driver(folder: Path) -> Path:
    (folder / "local/1").mkdir(parents=True)
    task = {"phase": "p", "job": "1.0", "index": 0, "state": "COMPLETED", "reason": "", "exit_code": 0}
    durable.write_checked(
        folder / "local/1/state.json", {"driver": dataclasses.asdict(Owner.me(1, 0)), "tasks": [task]}
    )
    return folder / "local/1/state.json"


def jobs(folder: Path) -> Path:
    job = {"phase": "p", "job": "1.0", "name": "run.p", "elements": [0, 1], "needs": {"a": "afterok"}, "cores": 2}
    durable.write_checked(folder / "jobs.json", {"jobs": [job]})
    return folder / "jobs.json"


def cached(folder: Path) -> Path:
    (folder / "in.txt").write_text("x" * (HashCache.SMALL + 1))
    HashCache(folder / "cache").sha256(folder / "in.txt")
    return next(folder.glob("cache/*/*.json"))


def rollouts(folder: Path) -> Path:
    log = journal.Journal(folder, 3, "run", "rank_0")
    log.record((7, 0), [1, 2, 9], [-0.5, -0.25, -7.25], "stop")
    log.judge((7, 0), {"reward": 1.0, "note": ""})
    log.close()
    return folder / "step_3/rank_0.jsonl"


def read_rollouts(path: Path):
    """Lines from an altered one on are drawn again: what is read is a beginning of what was written."""
    entries = journal.read(path.parent.parent, 3)
    if entries != {(7, 0): journal.Entry([1, 2, 9], [-0.5, -0.25, -7.25], "stop", score={"reward": 1.0, "note": ""})}:
        assert entries == {} or entries == {(7, 0): journal.Entry([1, 2, 9], [-0.5, -0.25, -7.25], "stop")}
        raise TornFile(str(path))
    return entries


def none_is_refused(value):
    if not value:
        raise TornFile("as good as none")
    return value


KINDS = {
    "element seal": (lambda folder: sealed(folder, True), lambda path: without_sum(read_seal(path))),
    "seal": (lambda folder: sealed(folder, False), lambda path: without_sum(read_seal(path))),
    "step's manifest": (manifest, read_manifest),
    "plan": (plan, lambda path: RunFolder(path.parents[2]).frozen(1)),
    "redirects": (redirects, lambda path: RunFolder(path.parents[2]).redirected(1, "p")),
    "journal": (steps, lambda path: Journal.read(RunFolder(path.parents[2]), 1)),
    "ledger": (ledger, lambda path: list(Ledger(path).events())),
    "lease": (lease, lambda path: none_is_refused(Owner.read(path))),
    "outcome": (outcome, lambda path: none_is_refused(RunFolder(path.parents[2]).outcomes("p"))),
    "driver's state": (driver, lambda path: none_is_refused(LocalBackend(RunFolder(path.parents[2]))._state("1"))),
    "driver's jobs": (jobs, read_jobs),
    "hash cache": (cached, lambda path: HashCache(path.parents[1]).sha256(path.parents[2] / "in.txt")),
    "rollouts": (rollouts, read_rollouts),
}  # fmt: skip


def without_sum(seal):
    return seal.digest, seal.folder, {name: value for name, value in seal.content.items() if name != durable.SUM}


def edited(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One accident or one hand's edit."""
    how = draw.choice(["bit", "digit", "swap", "cut", "word"])
    if how == "bit":
        at = draw.randrange(len(data))
        return how, data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if how == "cut":
        return how, data[: draw.randrange(len(data))]
    if how == "digit":
        at = draw.choice([match.start() for match in re.finditer(rb"\d", data)])
        return how, data[:at] + bytes([draw.choice([d for d in b"0123456789" if d != data[at]])]) + data[at + 1 :]
    scalars = [match.span() for match in re.finditer(rb'"[^"\\]*"|-?\d+(?:\.\d+)?|true|false|null', data)]
    if how == "word":
        start, stop = draw.choice(scalars)
        return how, data[:start] + draw.choice([b'"x"', b"null", b"[]", b"{}", b"-1", b"1e999", b'"../x"']) + data[
            stop:
        ]
    (a, b), (c, d) = sorted(draw.sample(scalars, 2))
    return how, data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


@pytest.mark.parametrize("edits", [40, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_edit_is_refused_or_means_the_same(kind, edits, tmp_path):
    make, read = KINDS[kind]
    path = make(tmp_path)
    whole = path.read_bytes()
    meaning, draw, refused = read(path), random.Random(kind), 0
    for _ in range(edits):
        how, data = edited(whole, draw)
        path.write_bytes(data)
        try:
            found = read(path)
        except REFUSED as mistake:
            refused += 1
            assert "\n" not in str(mistake)
            continue
        if kind == "ledger" and how == "cut":  # as a power cut leaves it: what was written first
            assert found == meaning[: len(found)] and len(found) >= data.count(b"\n")
        else:
            assert found == meaning, (how, data)
    path.write_bytes(whole)
    assert read(path) == meaning and (refused or kind == "hash cache")


# What a cache or a log of rollouts had before there were sums is made anew.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("hash cache", "rollouts")])
def test_what_was_written_before_there_were_sums_is_read_all_the_same(kind, tmp_path):
    make, read = KINDS[kind]
    path = make(tmp_path)
    meaning = read(path)
    lines = (
        [json.loads(line) for line in path.read_text().split("\n") if line]
        if path.suffix == ".jsonl"
        else [json.loads(path.read_text())]
    )
    for line in lines:
        assert line.pop(durable.SUM).startswith(durable.TAG)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(path) == meaning


OUTSIDE = ["../../../etc", "/etc", "work/../../x", "..", ".", "", "work//x", "work/./x", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_seal_and_no_manifest_reaches_out_of_its_folder(name, tmp_path):
    """Whoever wrote it can write the sum as well."""
    edits = (
        (False, lambda content: content | {"root": name}),
        (True, lambda content: content | {"files": {name: {"size": 1, "mtime_ns": 1, "sha256": "x"}}}),
    )
    for fans_in, put in edits:
        path = sealed(tmp_path / str(fans_in), fans_in)
        durable.write_checked(path, put(durable.read_checked(path)))
        with pytest.raises(UserMistake, match=re.escape(str(path))) as caught:
            read_seal(path)
        assert "no place in its own folder" in str(caught.value)
    path = manifest(tmp_path)
    durable.write_checked(path, durable.read_checked(path) | {"files": {name: [1, "x"]}})
    assert "no place in its own folder" in step_manifest.read(path.parent)[1]


def test_a_sum_is_that_of_what_json_gives_back(tmp_path):
    value = {"b": (1, 2.50, 1e300), 3: "é\u2028\ud800", "a": {10: None, 9: float("inf")}, "c": -0.0}
    (tmp_path / "f").write_text(json.dumps(durable.with_sum(value), indent=3))
    assert durable.read_checked(tmp_path / "f")["b"] == [1, 2.5, 1e300]
    with pytest.raises(TornFile, match="its sum"):
        (tmp_path / "f").write_text((tmp_path / "f").read_text().replace("-0.0", "0.0"))
        durable.read_checked(tmp_path / "f")


@pytest.mark.parametrize("text", ["sum", "sum:", "sum: the parts of row 3 do not add up", "sum:0123456789abcdef0"])
def test_text_that_begins_like_a_sum_is_text(text, tmp_path):
    """A message of a user's phase, a reason of Slurm's."""
    run = RunFolder(tmp_path)
    run.record_outcome("p", Outcome(0, 1, 0, "mistake", 2, text, "host", text, 0.0, node=text))
    assert [(found.message, found.job, found.node) for found in run.outcomes("p")] == [(text, text, text)]
    Ledger(tmp_path / "ledger.jsonl").append("abandoned", submission=1, why=text, jobs=[])
    assert [event["why"] for event in Ledger(tmp_path / "ledger.jsonl").events()] == [text]


@pytest.mark.parametrize("first, second", [("sum", "p"), ("p", "sum")])
def test_a_phase_called_sum_is_redirected_like_any_other(first, second, tmp_path):
    (tmp_path / "submissions/1").mkdir(parents=True)
    run = RunFolder(tmp_path)
    run.redirect(1, first, 4)
    run.redirect(1, second, 5)
    assert (run.redirected(1, first), run.redirected(1, second), run.redirected(1, "other")) == (4, 5, 1)


@pytest.mark.parametrize("torn", [b"", b"\n", b"ab" * 16, b"zz" * 32, b"\0" * 64, b"\xff" * 64])
def test_a_torn_key_of_a_meeting_is_refused(tmp_path, torn):
    """With an empty key everybody who knows the protocol could prove that he holds it."""
    run = RunFolder(tmp_path)
    run.submission_folder(1).mkdir(parents=True)
    assert len(run.meeting_key(1)) == 32 and run.meeting_key(1) == run.meeting_key(1)
    (run.submission_folder(1) / "meeting_key").write_bytes(torn)
    with pytest.raises(UserMistake, match="meeting_key holds no key .truncated or edited.; delete that file"):
        run.meeting_key(1)


OTHERS = (None, True, -1, 1.5, 10**400, float("inf"), "", "x", "\ud800", [], [[1]], {}, {"a": {}})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rollouts"])
def test_a_value_of_another_type_in_a_file_without_a_sum_is_refused_or_read(kind, tmp_path):
    """Such files are of before there were sums, or somebody's: what is in them is not taken on trust."""
    make, read = KINDS[kind]
    path = make(tmp_path)
    first, *more = path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    whole = json.loads(first)
    whole.pop(durable.SUM, None)
    for key in whole:
        for other in OTHERS:
            path.write_text("".join([json.dumps({**whole, key: other}), "\n", *more]))
            with contextlib.suppress(*REFUSED):
                read(path)
        path.write_text("".join([json.dumps({name: whole[name] for name in whole if name != key}), "\n", *more]))
        with contextlib.suppress(*REFUSED):
            read(path)


@pytest.mark.parametrize("levels", [100, 480, 600, 900, 985, 5000])
@pytest.mark.parametrize("end", ["", ', "sum": "sum:0123456789abcdef"'])
def test_a_file_nested_deep_is_read_or_torn(levels, end):
    for opened, closed in (("[", "]"), ('{"b": ', "}")):
        with contextlib.suppress(TornFile):
            durable.parse_checked(f'{{"a": {opened * levels}1{closed * levels}{end}}}', "file")
