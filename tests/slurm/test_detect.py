"""Which cluster is meant: never a fall-back from a Slurm that is configured, never a Slurm that is only installed."""

import os
import stat
import subprocess
import sys
import time

import pytest

from data_tools.mistake import UserMistake
from slurm import client, detect
from slurm.client import SlurmUnavailable
from slurm.dev import cluster as devcluster
from slurm.profile import files
from slurm.profile.schema import Profile
from tests.cluster import require_packages


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any Slurm, whose PATH the test may fill."""
    monkeypatch.setattr(detect, "CONFIGURATION_FILES", (tmp_path / "etc" / "slurm.conf",))
    monkeypatch.setattr(client, "PING_LIMIT_S", 1.0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("AFTEROK_CLUSTER", str(tmp_path / "no-cluster"))
    for key in ("SLURM_CONF", "SLURM_CONF_SERVER", devcluster.MARK_VARIABLE):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def command(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_no_slurm_at_all_is_local_and_asks_nobody(bare):
    found = detect.find_cluster()
    assert (found.kind, found.name, found.profile.kind) == ("local", "local", "local")


def test_installed_binaries_alone_are_no_slurm(bare):
    command(bare, "scontrol", "echo 'scontrol: error: fetch_config: DNS SRV lookup failed' >&2; exit 1")
    assert detect.find_cluster().kind == "local"


def test_a_configless_slurm_that_is_found_but_does_not_answer_is_an_error(bare):
    command(bare, "scontrol", "echo 'Slurmctld(primary) at h is DOWN'")
    with pytest.raises(SlurmUnavailable):
        detect.find_cluster()


def test_within_a_job_whose_path_lacks_slurms_commands_nothing_runs_on_the_node_instead(bare, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(SlurmUnavailable, match="are Slurm's commands in PATH"):
        detect.find_cluster()


@pytest.mark.parametrize("variable", ["SLURM_CONF", "SLURM_CONF_SERVER"])
def test_a_configured_slurm_that_does_not_answer_is_an_error_never_local(bare, monkeypatch, variable):
    monkeypatch.setenv(variable, "/nowhere/slurm.conf")
    with pytest.raises(SlurmUnavailable, match="/nowhere/slurm.conf"):
        detect.find_cluster()


def test_a_configuration_in_a_standard_place_is_a_configured_slurm(bare):
    (bare / "etc").mkdir()
    (bare / "etc" / "slurm.conf").touch()
    with pytest.raises(SlurmUnavailable):
        detect.find_cluster()


def test_local_is_forced_whatever_is_configured_and_sees_no_job(bare, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    monkeypatch.setenv("SLURM_PROCID", "3")
    found = detect.find_cluster("local")
    assert found.kind == "local" and not [key for key in found.env if key.startswith("SLURM_")]


def test_slurm_is_forced_even_where_nothing_is_configured(bare):
    with pytest.raises(SlurmUnavailable):
        detect.find_cluster("slurm")


def test_dev_without_a_cluster_says_how_to_start_one(bare):
    with pytest.raises(SlurmUnavailable, match="afterok cluster up"):
        detect.find_cluster("dev")


def test_a_profile_needs_an_answering_slurm_unless_it_says_local(bare):
    with pytest.raises(SlurmUnavailable):
        detect.find_cluster("example")
    (bare / "laptop.yaml").write_text("kind: local\nroles: {cpu: {}}\n")
    found = detect.find_cluster(str(bare / "laptop.yaml"))
    assert (found.kind, found.name) == ("local", "laptop")
    with pytest.raises(UserMistake, match="did you mean"):
        detect.find_cluster("exampel")


def test_local_roles_take_the_gpus_that_are_visible_except_cpu(bare, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    roles = detect.find_cluster().profile.roles
    assert {name: role.gpus_per_node for name, role in roles.items()} == {
        "cpu": 0, "train": 2, "generate": 2, "eval": 2,
    }  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect.find_cluster().profile.roles["train"].gpus_per_node == 0


def test_detection_imports_neither_torch_nor_omegaconf():
    heavy = ("torch", "omegaconf", "yaml", "submitit")
    code = f"import sys; from slurm import detect; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


# -- with a real cluster ----------------------------------------------------------------------------------------------


def test_a_dev_cluster_counts_only_inside_exec_or_by_name(dev_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr(detect, "CONFIGURATION_FILES", ())
    monkeypatch.setenv("AFTEROK_CLUSTER", str(dev_cluster.prefix))
    assert detect.find_cluster().kind == "local"  # it runs, and nobody asked for it
    monkeypatch.setenv(devcluster.MARK_VARIABLE, str(dev_cluster.prefix))
    assert detect.find_cluster().kind == "local"  # the mark alone is not being inside
    monkeypatch.delenv(devcluster.MARK_VARIABLE)
    by_name = detect.find_cluster("dev")
    for key, value in dev_cluster.env().items():
        monkeypatch.setenv(key, value)
    inside = detect.find_cluster()
    for found in (by_name, inside):
        assert (found.kind, found.name, found.profile.meta.name) == ("slurm", "dev", "dev")
        assert found.env["SLURM_CONF"] == str(dev_cluster.conf)
        found.slurm.ping()


def test_a_real_slurm_without_a_profile_gets_one_of_its_own_partitions(dev_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(dev_cluster.conf))
    found = detect.find_cluster("auto")
    assert (found.kind, found.name, found.profile.meta.name) == ("slurm", "dev", "live")  # our dev.yaml is not chosen
    assert set(found.profile.partitions) == {"batch", "long", "preempt"}
    assert found.profile.partitions["batch"].gpus_per_node == 8 and found.profile.roles["train"].partition == "batch"
    assert found.profile.max_array_size == 4001
    monkeypatch.setenv("AFTEROK_PROFILES", str(tmp_path))
    (tmp_path / "dev.yaml").write_text("meta: {contact: us}\npartitions: {batch: {}}\nroles: {cpu: {}}\n")
    assert detect.find_cluster("auto").profile.meta.contact == "us"  # the admin's, by the cluster's name


@pytest.mark.parametrize("names, chosen", [
    (["DEV"], "DEV"), (["Dev", "dev", "other"], "dev"), (["devel", "de"], None), ([], None),
])  # fmt: skip
def test_a_profile_is_named_like_its_cluster_in_any_case_and_said_with_its_file(
    dev_cluster, monkeypatch, tmp_path, names, chosen
):
    monkeypatch.setenv("SLURM_CONF", str(dev_cluster.conf))
    monkeypatch.setenv("AFTEROK_PROFILES", str(tmp_path))
    for name in names:
        (tmp_path / f"{name}.yaml").write_text("partitions: {batch: {}}\nroles: {cpu: {}}\n")
    found = detect.find_cluster("auto")
    assert (found.profile.meta.name, found.slurm_name) == (chosen or "live", "dev")
    if chosen:
        assert found.where == f"cluster dev: profile {chosen} ({tmp_path}/{chosen}.yaml)"
    else:
        assert found.where.startswith(f"cluster dev: no profile is named like it (dev.yaml in {tmp_path}, ")
        assert found.where.endswith("used is one made from its own partitions") and found.profile_file == ""


def test_two_spellings_of_a_clusters_name_are_not_guessed_between(monkeypatch, tmp_path):
    monkeypatch.setenv("AFTEROK_PROFILES", str(tmp_path))
    for name in ("BigSite", "BIGSITE"):
        (tmp_path / f"{name}.yaml").touch()
    with pytest.raises(UserMistake, match="keep one of them, or call it bigsite.yaml"):
        files.find_for_cluster("bigsite")


def test_a_configured_slurm_that_died_is_an_error_within_our_limit(short_folder, monkeypatch):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=1)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    assert detect.find_cluster().kind == "slurm"
    cluster.kill_daemon("slurmctld", 9)
    began = time.monotonic()
    with pytest.raises(SlurmUnavailable, match="does not answer"):
        detect.find_cluster()
    assert 4 < time.monotonic() - began < 60  # where Slurm itself would give up
    assert os.environ["SLURM_CONF"]


@pytest.mark.parametrize("kind", ["slurm", "dev"])
def test_a_profile_of_local_processes_is_not_used_on_a_slurm(monkeypatch, kind):
    """Its partitions, limits and locks would not be asked about, and its jobs be sent all the same."""
    local = files.Loaded(Profile(kind="local"), [files.Layer("big.yaml", {})], files.Merged())
    found = detect.Cluster("slurm", local.profile, env={}, name="big", slurm_name="big", profile_file="big.yaml",
                           loaded=local)  # fmt: skip
    monkeypatch.setattr(detect, f"_{kind}", lambda *_: found)
    monkeypatch.setattr(detect.devcluster, "default_prefix", lambda: None)
    monkeypatch.setattr(detect.devcluster, "DevCluster", lambda _: None)
    with pytest.raises(UserMistake, match="it says local, and cluster big: .* is of kind slurm; take it out"):
        detect.find_cluster(kind)
