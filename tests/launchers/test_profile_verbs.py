"""`afterok profile init` and `verify` against a real Slurm with accounting: each mistake is named with its check."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from launchers.backends.probe import filesystem, probe
from slurm.client import Slurm
from slurm.detect import find_cluster
from slurm.profile import admins, files
from slurm.verify.live import ask
from tests.command import afterok, afterok_json, one_line

WRONG = """\
partitions:
  batch: {max_time: 9-00:00:00, max_nodes: 2, qos: urgent}
  long: {gres: gpu:h100:8}
  gpu: {}
roles:
  cpu: {partition: long, time: 10}
  train: {partition: batch, time: 1-0}
storage: {scratch: SCRATCH}
"""


@pytest.fixture
def env(accounted_cluster):
    return {key: value for key, value in accounted_cluster.env().items() if key.startswith(("SLURM", "PATH"))}


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def memory():
    """A folder that is one machine's memory."""
    place = Path("/dev/shm")
    if not place.is_dir() or filesystem(place) != "tmpfs":
        pytest.skip("needs /dev/shm to be tmpfs")
    ours = place / f"afterok-test-{os.getpid()}"
    ours.mkdir()
    yield ours
    shutil.rmtree(ours)


def verify(env, file, *words, code):
    return afterok_json("profile", "verify", "--profile", file, *words, env=env, check=code)


def test_verify_names_a_wrong_max_time_gres_partition_qos_and_a_node_local_scratch(env, folder, memory):
    path = folder / "wrong.yaml"
    path.write_text(WRONG.replace("SCRATCH", str(memory)))
    answer = verify(env, path, code=2)
    found = {(row["check"], row["key"]) for row in answer["mismatches"]}
    assert found == {
        ("P002", "partitions.batch.max_time"), ("Q001", "partitions.batch.qos"), ("P005", "partitions.long.gres"),
        ("P001", "partitions.gpu"), ("F001", "storage.scratch"),
    }  # fmt: skip
    assert {row["file"] for row in answer["mismatches"]} == {str(path)}
    said = {row["check"]: row["message"] for row in answer["mismatches"]}
    assert "9-00:00:00" in said["P002"] and "1-00:00:00" in said["P002"]
    assert "gpu:h100" in said["P005"] and "gpu:8" in said["P005"]
    assert "normal, small" in said["Q001"] and "batch, long, preempt" in said["P001"] and "tmpfs" in said["F001"]
    text = afterok("profile", "verify", "--profile", path, env=env, check=2).stdout
    assert (
        f"{path}: partitions.gpu: Slurm has no partition gpu" in text and "[P001]\n" in text and "5 mismatches" in text
    )


def test_what_init_drafts_verifies_clean_and_is_not_written_over(env, folder):
    path = folder / "dev.yaml"
    afterok("profile", "init", "--output", path, env=env)
    answer = verify(env, path, code=0)
    assert answer["mismatches"] == [] and answer["not_asked"] == []
    drafted = path.read_text()
    assert "is there already" in one_line(afterok("profile", "init", "--output", path, env=env, check=2))
    assert afterok("profile", "init", env=env).stdout == path.read_text() == drafted


def test_compute_nodes_tell_what_the_controller_cannot(env, folder):
    path = folder / "p.yaml"
    (folder / "shared").mkdir()
    path.write_text(
        f"""\
partitions: {{batch: {{}}, long: {{}}}}
roles:
  cpu: {{partition: batch, time: 5}}
  train: {{partition: batch, time: 5, env: {{python: /nowhere/python}}}}
  eval: {{partition: batch, time: 5, env: {{modules: [none]}}}}
  generate: {{partition: batch, time: 5, qos: small, env: {{setup: ["false"]}}}}
storage: {{scratch: {folder}/shared, node_local: /nowhere, shared: [/nowhere/else]}}
network: {{interface: ib7, hca: mlx5_0}}
"""
    )
    answer = verify(env, path, code=2)
    found = {(row["check"], row["key"]) for row in answer["mismatches"]}
    assert found == {
        ("F002", "storage.node_local"), ("F001", "storage.shared"), ("N001", "network.interface"),
        ("N001", "network.hca"), ("E001", "roles.train"), ("E001", "roles.eval"), ("E001", "roles.generate"),
    }  # fmt: skip
    said = {row["key"]: row["message"] for row in answer["mismatches"] if row["check"] == "E001"}
    assert "/nowhere/python" in said["roles.train"] and "module load none" in said["roles.eval"]
    assert "a command of env.setup ended with code 1: false" in said["roles.generate"]
    assert list((folder / "shared").iterdir()) == []
    assert verify(env, path, "--no-jobs", code=0)["not_asked"] == ["compute nodes: --no-jobs"]


def test_a_folder_that_is_another_one_on_the_node_is_told(env, folder, accounted_cluster):
    """On one machine no folder is node-local but by a mount of its own: srun's rank looks into an empty one."""
    path = folder / "p.yaml"
    (folder / "shared").mkdir()
    path.write_text(
        f"partitions: {{batch: {{}}}}\nroles: {{cpu: {{partition: batch}}}}\nstorage: {{scratch: {folder}/shared}}\n"
    )
    slurm = Slurm(accounted_cluster.env())

    class Elsewhere(Slurm):
        def run(self, command, timeout_s=None):
            hidden = [word.replace(f"{folder}/shared/", f"{folder}/other/") for word in command]
            return super().run(hidden, timeout_s).replace(f"{folder}/other/", f"{folder}/shared/")

    for asked, checks in ((slurm, []), (Elsewhere(accounted_cluster.env()), ["F001"] * 2)):
        done = probe(files.load(str(path)), live=ask(slurm), slurm=asked, known=[])
        assert [fault.check for fault in done.mismatches] == checks and done.not_asked == []


def test_local_processes_have_nothing_to_verify():
    assert "there is no cluster" in one_line(afterok("profile", "verify", "--profile", "local", check=2))


def test_a_profile_without_the_clusters_policy_and_an_override_of_a_locked_key_are_refused(
    folder,
    accounted_cluster,
    monkeypatch,
):
    monkeypatch.setattr(admins, "admin_uids", lambda: {0, os.geteuid()})
    monkeypatch.setenv("SLURM_CONF", str(accounted_cluster.conf))
    mine = folder / "mine.yaml"
    mine.write_text("partitions: {batch: {}}\nroles: {cpu: {partition: batch}}\n")
    with tempfile.TemporaryDirectory(dir=Path.home()) as site:
        monkeypatch.setattr(files, "ADMINS_FOLDER", Path(site))
        if why := admins.why_no_admins(Path(site)):
            pytest.skip(f"no folder here is an admin's: {why}")
        admin = Path(site) / "dev.yaml"  # ClusterName
        admin.write_text(mine.read_text() + "signal_lead_s: 90\npolicy: {locked: {signal_lead_s: Ask ops first.}}\n")
        admin.chmod(0o644)
        with pytest.raises(UserMistake, match=r"mine.yaml: does not extend .*dev.yaml, which has the policy"):
            find_cluster(str(mine))
        mine.write_text("extends: [dev]\nroles: {cpu: {time: 5}}\n".replace("[dev]", f"[{admin}]"))
        found = find_cluster(str(mine), ["cluster.roles.cpu.nodes=2"])
        assert f"({mine}, which extends {admin}); the command line sets roles.cpu.nodes" in found.where
        assert found.as_json()["profile_extends"] == [str(admin)]
        with pytest.raises(UserMistake) as error:
            find_cluster(str(mine), ["cluster.signal_lead_s=10"])
        assert str(error.value) == (
            "the command line: signal_lead_s: Ask ops first (locked by the admin; it stays '90') [A002]"
        )
