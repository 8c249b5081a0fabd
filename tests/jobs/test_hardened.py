"""What a run survives of its filesystem and its hosts: no locks, other clocks, full, read-only, moved, copied, torn."""

import ast
import ctypes
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.base import durable
from data_tools.mistake import disk_problem
from jobs.artifacts.artifact import Artifact
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import Outcome, RunFolder
from jobs.artifacts.seal import read_seal
from jobs.task import progress_path
from launchers.cli import main
from launchers.planning.ledger import Ledger
from tests.command import ROOT, afterok, one_line, write_toy

MIB = 1 << 20


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path), tmp_path / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline and its sealed run, to be copied and then mistreated."""
    folder = tmp_path_factory.mktemp("finished")
    pipeline = write_toy(folder)
    afterok("run", pipeline, "--run", folder / "run")
    return pipeline, folder / "run"


@pytest.fixture
def say(monkeypatch, capsys):
    """`afterok` in this process, for verbs that only look: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def say(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    say.actions = lambda *args: {p["action"] for p in json.loads(say("plan", *args, "--json")[1])["phases"]}
    say.states = lambda run: {p["phase"]: p["state"] for p in json.loads(say("status", run, "--json")[1])["phases"]}
    return say


# -- no flock ---------------------------------------------------------------------------------------------------------


def test_no_package_of_ours_locks_a_file():
    """But for the dev cluster's own prefix, which holds sockets and so is on a local disk anyway."""
    for package in ("data_tools", "jobs", "launchers", "slurm", "megatron_ext"):
        for path in (ROOT / package).rglob("*.py"):
            if path == ROOT / "slurm/dev/cluster.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "attr", None) or getattr(node, "id", None)
                assert name not in ("flock", "lockf"), f"{path}:{node.lineno}"


def without_locks():
    """For preexec_fn: from here on the kernel answers flock(2) and fcntl(2) locks with ENOLCK, children included.

    A seccomp filter of classic BPF (linux/filter.h, linux/seccomp.h), for x86-64's numbers of the calls.
    """
    load, equal, ret, flock, fcntl, locks = 0x20, 0x15, 0x06, 73, 72, (5, 6, 7, 36, 37, 38)
    fail, allow = 0x00050000 | errno.ENOLCK, 0x7FFF0000
    program = [(load, 0, 0, 0), (equal, len(locks) + 3, 0, flock), (equal, 0, len(locks) + 1, fcntl), (load, 0, 0, 24)]
    program += [(equal, len(locks) - i, 0, number) for i, number in enumerate(locks)]
    program += [(ret, 0, 0, allow), (ret, 0, 0, fail)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter_):  # NO_NEW_PRIVS, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "no seccomp here")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter knows x86-64's call numbers")
def test_a_run_needs_no_file_lock(toy):
    pipeline, run = toy
    check = (
        "import fcntl\ntry: fcntl.flock(0, 2)\nexcept OSError as error: assert error.errno == 37, error\n"
        "else: raise SystemExit(9)"
    )
    try:
        assert subprocess.run([sys.executable, "-c", check], preexec_fn=without_locks).returncode == 0
    except subprocess.SubprocessError:
        pytest.skip("seccomp filters are not permitted here")
    command = [sys.executable, "-m", "launchers.cli", "run", str(pipeline), "--run", str(run)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=without_locks, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(list(run.glob("*/*/seal.json"))) == 3


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_attempts_order_outcomes_and_seals_whatever_the_clocks_of_their_hosts_say(tmp_path):
    run = RunFolder(tmp_path)
    for attempt, restart, ended in ((1, 0, 9e9), (1, 1, 3e9), (2, 0, 1e9)):
        run.record_outcome("p", Outcome(0, attempt, restart, "failed", 1, "", "h", "", ended - 1, ended))
    assert [(o.attempt, o.restart) for o in run.outcomes("p")] == [(1, 0), (1, 1), (2, 0)]
    for submission, sealed_at in ((1, 9e9), (2, 1e9)):
        artifact = Artifact(tmp_path / "p" / f"KEY{submission}")
        lease = artifact.acquire(0, Owner.me(submission, 0), lambda job: False)
        artifact.seal(lease, {"key": f"K{submission}", "submission": submission, "restart": 0})
        durable.write_checked(artifact.seal_path, durable.read_checked(artifact.seal_path) | {"sealed_at": sealed_at})
    assert [seal.content["submission"] for seal in run.seals("p")] == [1, 2]


def test_elements_worked_on_under_clocks_days_apart_fan_in_and_are_reused(toy, say):
    pipeline, run = toy
    afterok("run", pipeline, "numbers.with.fail_at=0", "--run", run, check=1)
    clock = (
        "import time, sys; real = time.time; time.time = lambda: real() + {shift}\n"
        "from jobs.worker import main\nsys.exit(main())"
    )
    for phase, shift in (("numbers", -3 * 86400), ("total", 5 * 86400), ("again", -9 * 86400)):
        for index in range(3 if phase == "numbers" else 1):
            plan = durable.read_checked(run / "submissions/1/plan.json")
            next(p for p in plan["phases"] if p["name"] == "numbers")["settings"]["fail_at"] = None
            durable.write_checked(run / "submissions/1/plan.json", plan)
            subprocess.run(
                [sys.executable, "-c", clock.format(shift=shift * (index + 1)), str(run), phase, str(index)],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
    assert set(say.states(run).values()) == {"COMPLETED"} and say.actions(pipeline, "--run", run) == {"reuse"}
    assert all(phase["seconds"] >= 0 for phase in json.loads(say("status", run, "--json")[1])["phases"])


# -- full and read-only disks -----------------------------------------------------------------------------------------


class Disk:
    """A tmpfs of its own, mounted for one test."""

    def __init__(self, path: Path):
        self.path = path
        self.balloon = path / "balloon"

    def mount(self, options: str) -> bool:
        command = ["mount", "-o", options, "-t", "tmpfs", "tmpfs", str(self.path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def fill(self) -> None:
        with open(self.balloon, "ab", buffering=0) as file:
            for size in (MIB, 4096):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def empty(self) -> None:
        self.balloon.unlink()

    @property
    def used(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*") if path != self.balloon}


@pytest.fixture
def disk(tmp_path):
    found = Disk(tmp_path / "disk")
    found.path.mkdir()
    if not found.mount("size=16m"):
        pytest.skip("needs the right to mount a tmpfs")
    yield found
    subprocess.run(["umount", "-l", found.path], check=True)


@pytest.mark.parametrize("write", [
    lambda path: durable.create_file(path, b"y" * 9000), lambda path: durable.write_json(path, "y" * 9000),
    lambda path: durable.append_line(path, "y" * 9000),
])  # fmt: skip
def test_a_full_disk_leaves_a_name_absent_or_as_it_was_and_is_named(disk, write):
    old = disk.path / "old.json"
    old.write_text('"old"\n')
    disk.fill()
    before = disk.used
    for path in (disk.path / "new.json", old):
        with pytest.raises(OSError) as caught:
            write(path)
        assert disk_problem(caught.value).startswith(f"{path}: no space is left")
    assert old.read_text() == '"old"\n'
    assert disk.used == before or (disk.path / "new.json").read_bytes() == b""  # an append makes the file first
    disk.empty()
    write(disk.path / "new.json")
    assert "y" * 9000 in (disk.path / "new.json").read_text()


def test_a_ledger_line_is_whole_or_absent_on_a_full_disk_and_after_a_power_cut(disk):
    ledger = Ledger(disk.path / "ledger.jsonl")
    ledger.append("one", text="x" * 3000)
    disk.fill()
    before = ledger.path.read_bytes()
    with pytest.raises(OSError):
        ledger.append("two", text="y" * 9000)  # the file's own last page takes a part of it
    assert ledger.path.read_bytes() == before
    disk.empty()
    with open(ledger.path, "a") as file:
        file.write('{"event": "torn", "te')
    assert [event["event"] for event in ledger.events()] == ["one"]
    ledger.append("three")
    assert [event["event"] for event in ledger.events()] == ["one", "three"]


def test_an_edited_ledger_is_one_line_that_names_its_line(toy):
    pipeline, run = toy
    run.mkdir()
    line = '{"event": "cancel", "jobs": [], "time": 0}\n'
    (run / "ledger.jsonl").write_text(f"{line}not json\n{line}")
    assert f"{run}/ledger.jsonl:2 is not whole JSON" in one_line(afterok("submit", pipeline, "--run", run, check=2))


def test_a_seal_that_does_not_fit_is_no_seal_and_fits_later(disk):
    artifact = Artifact(disk.path / "KEY")
    lease = artifact.acquire(0, Owner.me(1, 0), lambda job: False)
    (lease.folder / "f.txt").write_text("x")
    disk.fill()
    with pytest.raises(OSError) as caught:
        artifact.seal(lease, {"key": "k", "facts": "y" * 9000})
    assert disk_problem(caught.value).startswith(f"{artifact.seal_path}: no space")
    assert not artifact.seal_path.exists() and list(lease.sealing.iterdir()) == []
    disk.empty()
    assert artifact.seal(lease, {"key": "k"})
    read_seal(artifact.seal_path).verify(rehash=True)


def test_a_phase_that_fills_the_disk_fails_in_one_line_and_a_later_submit_completes_the_run(disk, tmp_path, say):
    pipeline, run = tmp_path / "w.yaml", disk.path / "run"
    pipeline.write_text(
        "name: w\nphases:\n  small: {uses: tests.toy.writer}\n"
        "  big: {uses: tests.toy.writer, with: {mib: 30, after: '${phases.small.out}'}}\n"
    )
    done = afterok("run", pipeline, "cluster=local", "--run", run, check=2)
    failed = [line for line in done.stderr.splitlines() if "big failed" in line]
    assert len(failed) == 1 and "no space is left there; free some" in failed[0] and str(run) in failed[0]
    assert "Traceback" not in (run / "big/logs/a1.0.out").read_text() + done.stderr
    assert say.states(run) == {"small": "COMPLETED", "big": "FAILED"}
    assert not list(run.glob("big/*/work/*/bytes"))  # its room was given back
    assert disk.mount("remount,size=64m")
    afterok("run", pipeline, "cluster=local", "--run", run)
    assert set(say.states(run).values()) == {"COMPLETED"} and len(list(run.glob("small/*/work/*"))) == 1


def test_a_submit_on_a_full_disk_is_one_line_and_a_later_one_works(disk, tmp_path, say):
    pipeline, run = write_toy(tmp_path), disk.path / "run"
    for room in (0, 64, 600):  # KiB: at the lock, and twice somewhere in the frozen submission
        disk.fill()
        with open(disk.balloon, "ab") as file:
            file.truncate(disk.balloon.stat().st_size - room * 1024)
        code, _, err = say("submit", pipeline, "cluster=local", "--run", run)
        assert code == 2 and "no space is left there" in err and err.count("\n") == 1
        assert not (run / "submit.lock").exists() and not list(run.glob("submissions/*/plan.json"))
        disk.empty()
    afterok("run", pipeline, "cluster=local", "--run", run)
    assert set(say.states(run).values()) == {"COMPLETED"}


def test_a_read_only_run_can_be_looked_at_and_every_writer_is_refused_in_one_line(disk, finished, say):
    pipeline, run = finished[0], disk.path / "run"
    shutil.copytree(finished[1], run, symlinks=True)
    next(run.glob("total/*/seal.json")).unlink()
    assert disk.mount("remount,ro")
    files = disk.used
    assert say.actions(pipeline, "cluster=local", "--run", run) == {"reuse", "run", "rerun"}
    assert say.states(run)["numbers"] == "COMPLETED"
    assert "attempt 1" in afterok("logs", run, "numbers:1").stdout
    for refused in (
        afterok("submit", pipeline, "cluster=local", "--run", run, check=2),
        subprocess.run([sys.executable, "-m", "jobs.worker", run, "total"], cwd=ROOT, capture_output=True, text=True),
    ):
        line = refused.stderr.strip().splitlines()[0]
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert str(run) in line and "read-only" in line
    assert disk.used == files


# -- moved and copied -------------------------------------------------------------------------------------------------


def copy(source, target):
    subprocess.run(["cp", "-r", source, target], check=True)  # bytes, not times


@pytest.mark.parametrize("how", [os.rename, copy], ids=["moved", "copied"])
def test_a_moved_or_copied_run_is_reused_whole_and_goes_on(finished, tmp_path, say, how):
    pipeline, run, target = finished[0], tmp_path / "run", tmp_path / "elsewhere/run2"
    shutil.copytree(finished[1], run, symlinks=True)
    target.parent.mkdir()
    how(run, target)
    shutil.rmtree(run, ignore_errors=True)  # nothing may reach back
    assert say.actions(pipeline, "--run", target) == {"reuse"}
    assert say.actions(pipeline, "--run", target, "--verify") == {"reuse"}
    assert set(say.states(target).values()) == {"COMPLETED"}
    assert "nothing to submit" in say("submit", pipeline, "--run", target)[1]
    assert "numbers[1] attempt 1" in afterok("logs", target, "numbers:1").stdout
    done = afterok("run", pipeline, "params.factor=5", "--run", target)
    assert "total 30" in done.stdout and set(say.states(target).values()) == {"COMPLETED"}
    assert not run.exists()


def test_no_file_of_a_finished_run_knows_where_the_run_lies(finished):
    """But for scripts, logs and the record of how it was submitted."""
    run = finished[1]
    skipped = ("submissions", "local", "logs", "attempts", "ledger.jsonl")
    for path in run.rglob("*"):
        if path.is_file() and not set(skipped) & set(path.relative_to(run).parts):
            assert str(run).encode() not in path.read_bytes(), path


# -- torn files -------------------------------------------------------------------------------------------------------

TEARS = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: b"\0" * len(data),
}


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run of which numbers is sealed and total failed, to be copied and torn."""
    folder = tmp_path_factory.mktemp("half")
    pipeline = write_toy(folder)
    afterok("run", pipeline, "total.with.die_on_rank=0", "--run", folder / "run", check=1)
    progress = progress_path(next(folder.glob("run/total/*/leases")).parent, 0)
    progress.parent.mkdir()
    progress.write_text('{"done": 1, "total": 2, "unit": "rows", "note": ""}')
    return pipeline, folder / "run"


TORN = [
    "numbers/*/leases/*",
    "*/attempts/*.json",
    "submissions/1/plan.json",
    "submissions/1/code.json",
    "local/1/state.json",
    "local/1/jobs.json",
    "submissions/1/pipeline.json",
    "submissions/1/journal.json",
    "numbers/*/seals/0001.json",
    "numbers/*/seal.json",
    "total/*/leases/*",
    "total/*/progress/*.json",
    "submissions/1/profile.yaml",
]


@pytest.mark.parametrize("kind", TEARS)
def test_a_torn_file_ends_no_verb_in_a_traceback(half_done, tmp_path, say, kind):
    pipeline, run = half_done
    for torn in TORN:
        paths = list(run.glob(torn))
        assert paths, torn
        whole = {path: path.read_bytes() for path in paths}
        for path in paths:
            path.write_bytes(TEARS[kind](whole[path]))
        for verb in (("status", run), ("plan", pipeline, "--run", run), ("cancel", run), ("repair", run)):
            code, _, err = say(*verb)
            assert code == 0 or (code == 2 and str(run) in err and err.count("\n") == 1), (torn, verb, err)
        for path in paths:
            path.write_bytes(whole[path])


def test_a_run_whose_every_small_file_is_torn_says_what_to_remove_and_is_completed(half_done, tmp_path, say):
    pipeline, run = half_done[0], tmp_path / "run"
    shutil.copytree(half_done[1], run, symlinks=True)
    for torn in TORN:
        for path in run.glob(torn):
            path.write_bytes(path.read_bytes()[:30])
    for _ in range(len(TORN)):
        done = afterok("run", pipeline, "--run", run, check=None)
        if done.returncode == 0:
            break
        words = done.stderr.replace(";", " ").split()
        assert any(word.startswith(f"{run}/") for word in words), done.stderr
        Path(next(word for word in words if word.startswith(f"{run}/"))).unlink()  # the file it names, and only that
    assert say.states(run) == {"numbers": "COMPLETED", "total": "COMPLETED", "again": "COMPLETED"}
    assert say.actions(pipeline, "--run", run) == {"reuse"}


def test_a_torn_submit_lock_and_a_dead_submitters_are_told_apart(toy):
    pipeline, run = toy
    run.mkdir()
    (run / "submit.lock").write_bytes(b"")
    assert f"{run}/submit.lock is torn" in one_line(afterok("submit", pipeline, "--run", run, check=2))
    dead = Owner(0, 0, "", os.uname().nodename, 2**22 + 1, 1)
    (run / "submit.lock").write_text(durable.canonical_json(dead.__dict__))
    afterok("run", pipeline, "--run", run)


def test_removing_a_dead_submitters_lock_leaves_a_living_ones(tmp_path):
    from launchers.submission.lock import remove_lock_of

    lock, dead, living = tmp_path / "submit.lock", Owner(0, 0, "", "h", 1, 1), Owner.me(0, 0)
    lock.write_text(durable.canonical_json(living.__dict__))  # another one was quicker to take the lock over
    remove_lock_of(dead, lock)
    assert Owner.read(lock) == living
    remove_lock_of(living, lock)
    assert list(tmp_path.iterdir()) == []
