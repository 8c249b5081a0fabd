"""A bundle: what `submit` would send, sent by a shell that has sh and sbatch, known to afterok afterwards."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.artifacts.run_folder import RunFolder
from launchers.planning.ledger import Ledger
from launchers.submission.bundle_script import submit_script
from tests.command import (
    ROOT,
    TINY_SHORT,
    afterok,
    afterok_json,
    one_line,
    states,
    wait_for,
    wait_until_sealed,
    write_toy,
)
from tests.launchers.shims import submitted_jobs

TOOLS = ("sbatch", "scancel", "sh", "cat", "ln", "rm", "uname")  # all that submit.sh needs


class LoginNode:
    """A shell that has nothing of our environment: `TOOLS` in PATH, and where Slurm's configuration is."""

    def __init__(self, folder: Path, env: dict):
        self.bin, self.conf = folder / "bin", env["SLURM_CONF"]
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def spoil(self, name: str, at: int, do: str) -> None:
        """Have call number `at` of a tool do something else; `real` is the tool."""
        real = (self.bin / name).resolve()
        (self.bin / name).unlink()
        (self.bin / name).write_text(
            f"#!/bin/sh\nPATH=/usr/bin:/bin; real={real}; n=$(( $(cat {self.bin}/n 2>/dev/null || echo 0) + 1 ))\n"
            f'echo $n > {self.bin}/n; if [ $n = {at} ]; then {do}; fi\nexec $real "$@"\n'
        )
        (self.bin / name).chmod(0o755)

    def mend(self, name: str) -> None:
        (self.bin / name).unlink()
        (self.bin / name).symlink_to(shutil.which(name) or name)

    def send(self, bundle: Path, *variables: str) -> subprocess.CompletedProcess:
        command = [
            "env",
            "-i",
            f"PATH={self.bin}",
            f"SLURM_CONF={self.conf}",
            *variables,
            "sh",
            str(bundle / "submit.sh"),
        ]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)


@pytest.fixture
def toy(tmp_path, dev_cluster):
    env = dev_cluster.env()
    return write_toy(tmp_path), tmp_path / "run", env, LoginNode(tmp_path, env)


def test_a_bundle_is_sent_by_a_bare_shell_and_known_afterwards(toy, tmp_path):
    pipeline, run, env, node = toy
    bundle = tmp_path / "bundle"
    done = afterok_json("bundle", pipeline, bundle, "numbers.throttle=2", "--run", run, env=env)
    assert done["submission"] == 1 and done["files"] == ["submit.sh", "numbers.sh", "total.sh", "again.sh"]
    assert "--array=0-2%2" in (bundle / "numbers.sh").read_text()
    before = afterok("status", run, env=env)
    assert "NOT_SUBMITTED" in before.stdout and f"sh {bundle}/submit.sh" in before.stderr
    outer = ["SBATCH_PARTITION=nosuch", "SLURM_NTASKS=9", "SBATCH_OUTPUT=/nowhere/x", "ODD=a\nexport SLURM_CONF=/x"]
    sent = node.send(bundle, *outer)
    assert sent.returncode == 0, sent.stderr
    entries = Ledger(run / "ledger.jsonl").jobs()
    assert [entry.phase for entry in entries] == ["numbers", "total", "again"]
    assert entries[1].waits == {"numbers": entries[0].job} and entries[2].waits == {"total": entries[1].job}
    refused = node.send(bundle)
    assert refused.returncode == 2 and "was sent before, and stands" in refused.stderr
    wait_until_sealed(run, "numbers", "total", "again", env=env)
    assert len(submitted_jobs(run, env)) == 3 and not (run / "submit.lock").exists()
    assert "numbers[1] attempt 1" in afterok("logs", run, "numbers:1", env=env).stdout
    assert "nothing to submit" in afterok("submit", pipeline, "numbers.throttle=2", "--run", run, env=env).stdout


def test_what_a_run_lacks_is_bundled_and_only_the_newest_bundle_is_sent(toy, tmp_path):
    pipeline, run, env, node = toy
    afterok("bundle", pipeline, tmp_path / "first", "numbers.with.fail_at=1", "--run", run, env=env)
    afterok("bundle", run, tmp_path / "second", "params.factor=3", env=env)
    late = node.send(tmp_path / "first")
    assert late.returncode == 2 and "submission 2 of" in late.stderr and not (run / "submissions/1/sent").exists()
    assert node.send(tmp_path / "second").returncode == 0
    wait_for("the last element", lambda: list(run.glob("numbers/*/seals/0002.json")))
    wait_for("the failure", lambda: "element 1 was told to fail" in afterok("why", run, env=env).stdout)
    under_way = one_line(afterok("bundle", run, tmp_path / "third", env=env, check=2))  # what waits for `numbers`
    assert "is under way as job" in under_way and not (tmp_path / "third").exists()
    afterok("cancel", run, env=env)
    nowhere = afterok("bundle", pipeline, tmp_path / "third", "cluster=local", "--run", run, check=2).stderr
    held, refused = nowhere.splitlines()
    assert "those that are to stay: numbers.with.fail_at=1" in held and "a bundle is for Slurm" in refused


GRAPH = """
name: graph
phases:
  first: {uses: tests.toy.numbers, array: 4, throttle: 2}
  each: {uses: tests.toy.numbers, array: 4, needs: [{first: aftercorr}]}
  mended: {uses: tests.toy.numbers, needs: [{first: afternotok}]}
  last: {uses: tests.toy.counter, needs: [each, {first: afterany}]}
  alone: {uses: tests.toy.numbers, needs: [{each: singleton}, last]}
"""


def test_dependencies_are_those_of_submit_and_a_chain_is_awaited_by_its_last_link(dev_cluster, tmp_path):
    (tmp_path / "graph.yaml").write_text(GRAPH)
    env, run = dev_cluster.env(), tmp_path / "run"
    shown = afterok("submit", tmp_path / "graph.yaml", "--dry-run", "--run", run, env=env).stdout
    expected = re.findall(r"^sbatch (?:--hold )?(?:--dependency=(\S+) )?\S+/(\w+)\.sh$", shown, re.M)
    afterok("bundle", tmp_path / "graph.yaml", tmp_path / "bundle", "--run", run, env=env)
    calls = re.findall(r'^send (\d+) (\w+) \S+ "(.*)"$', (tmp_path / "bundle/submit.sh").read_text(), re.M)
    names = {f"${{j{place}}}": f"<{phase}>" for place, phase, _ in calls}
    said = [(re.sub(r"\$\{j\d+\}", lambda word: names[word[0]], condition), phase) for _, phase, condition in calls]
    assert said == expected and len(said) == 5
    chained = ["cluster.partitions.batch.requeue=false", "--run", tmp_path / "chained"]
    afterok("bundle", tmp_path / "graph.yaml", tmp_path / "chain", *chained, env=env)
    assert ',afterok:${j3}_3"' in (tmp_path / "chain/submit.sh").read_text()
    assert "#SBATCH --array=0-3%1" in (tmp_path / "chain/last.sh").read_text()


def test_a_refused_job_cancels_those_before_it_and_the_bundle_can_be_sent_again(toy, tmp_path):
    pipeline, run, env, node = toy
    slow = "numbers.with.seconds=0.1"
    afterok("bundle", pipeline, tmp_path / "bundle", slow, "--run", run, env=env)
    node.spoil("sbatch", 3, "echo 'sbatch: error: Job violates accounting/QOS policy' >&2; exit 1")
    done = node.send(tmp_path / "bundle")
    assert done.returncode == 1 and "QOS policy" in done.stderr and "sbatch refused again" in done.stderr
    wait_for("no job", lambda: not submitted_jobs(run, env))
    assert (
        Ledger(run / "ledger.jsonl").given_up().endswith("its jobs were cancelled: sbatch refused again")
    )  # two were not held
    node.mend("sbatch")
    assert node.send(tmp_path / "bundle").returncode == 0
    wait_until_sealed(run, "numbers", "total", "again", env=env)
    assert len(submitted_jobs(run, env)) == 3


def test_a_reader_that_left_takes_back_what_was_sent(toy, tmp_path):
    pipeline, run, env, node = toy
    afterok("bundle", pipeline, tmp_path / "bundle", "--run", run, env=env)
    command = f"env -i PATH={node.bin} SLURM_CONF={node.conf} sh {tmp_path}/bundle/submit.sh | :"
    subprocess.run(["sh", "-c", command], check=True, timeout=60)
    assert (run / "submissions/1/sent").read_text().endswith("cancelled interrupted\n")
    assert not (run / "submit.lock").exists() and not Ledger(run / "ledger.jsonl").unreleased()


def test_a_bundle_goes_to_no_other_cluster_than_its_own(toy, tmp_path):
    pipeline, run, env, node = toy
    afterok("bundle", pipeline, tmp_path / "bundle", "--run", run, env=env)
    scontrol = node.bin / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'ClusterName             = other'\n")
    scontrol.chmod(0o755)
    refused = node.send(tmp_path / "bundle")
    assert refused.returncode == 2 and "is for the cluster dev, and here answers other" in refused.stderr
    assert not (run / "submissions/1/sent").exists()
    scontrol.unlink()
    scontrol.symlink_to(shutil.which("scontrol"))
    assert node.send(tmp_path / "bundle").returncode == 0


def test_a_folder_that_cannot_be_a_bundles_is_refused_before_anything_is_written(toy, tmp_path):
    pipeline, run, env, _ = toy
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file/below", tmp_path / "file/below/it", run, run / "numbers"):
        told = one_line(afterok("bundle", pipeline, folder, "--run", run, env=env, check=2))
        assert "name another folder" in told and not list(run.glob("submissions/*/journal.json")), told


def test_a_run_whose_path_has_a_word_of_the_script(tmp_path):
    text = submit_script(RunFolder(tmp_path / "@calls@"), 1, [], "dev")
    assert f"run={tmp_path}/@calls@\n" in text and f"# Sends submission 1 of the run {tmp_path}/@calls@:" in text


@pytest.mark.parametrize(
    "do", ['$real "$@" > /dev/null; kill -9 $PPID', pytest.param("kill -9 $PPID", marks=pytest.mark.soak)]
)
def test_afterok_finishes_what_a_killed_shell_left_and_doubles_nothing(toy, tmp_path, do):
    pipeline, run, env, node = toy
    afterok("bundle", pipeline, tmp_path / "bundle", "--run", run, env=env)
    node.spoil("sbatch", 2, f"{do}; exit 1")
    assert node.send(tmp_path / "bundle").returncode == -9
    assert "is not released" in Ledger(run / "ledger.jsonl").given_up()
    assert node.send(tmp_path / "bundle").returncode == 2  # the lock, and what stands
    afterok("repair", run, env=env)
    wait_until_sealed(run, "numbers", "total", "again", env=env)
    assert len(submitted_jobs(run, env)) == 3 and len(list(run.glob("*/*/seal.json"))) == 3


@pytest.mark.soak
def test_the_quick_start_as_a_bundle_from_a_shell_without_our_environment(dev_cluster, tmp_path):
    env, run = dev_cluster.env(), tmp_path / "run"
    node = LoginNode(tmp_path, env)
    afterok("bundle", ROOT / "jobs/pipelines/tiny.yaml", tmp_path / "bundle", *TINY_SHORT, "--run", run, env=env)
    assert node.send(tmp_path / "bundle").returncode == 0
    wait_for("the end", lambda: set(states(run, env=env).values()) == {"COMPLETED"}, timeout=900)
    print(afterok("status", run, env=env).stdout, file=sys.stderr)
