"""`afterok cluster up|exec|status|down`: a private Slurm, as a user starts it."""

import sys

import pytest

from tests.cluster import require_packages
from tests.command import afterok, afterok_json, one_line, write_toy


@pytest.mark.soak
def test_a_dev_cluster_from_up_to_down(short_folder, tmp_path):
    require_packages()
    env = {"AFTEROK_CLUSTER": str(short_folder)}
    assert "afterok cluster up" in one_line(
        afterok("run", write_toy(tmp_path), "cluster=dev", "--run", tmp_path / "r", env=env, check=2)
    )
    assert "2 nodes × 4 fake GPUs" in afterok("cluster", "up", "--nodes", 2, "--gpus-per-node", 4, env=env).stdout
    assert afterok("cluster", "exec", "--", "sinfo", "-h", "-o", "%D %G", env=env).stdout.split() == ["2", "gpu:4"]
    inside = afterok(
        "cluster",
        "exec",
        "--",
        sys.executable,
        "-m",
        "launchers.cli",
        "run",
        write_toy(tmp_path),
        "--run",
        tmp_path / "inside",
        env=env,
    )
    assert "total 12" in inside.stdout
    chosen = afterok(
        "run", write_toy(tmp_path), "cluster=dev", "numbers.resources.gpus_per_node=1", "--run", tmp_path / "r", env=env
    )
    assert "total 12" in chosen.stdout
    refused = afterok(
        "plan",
        write_toy(tmp_path),
        "cluster=dev",
        "numbers.resources.gpus_per_node=9",
        "--run",
        tmp_path / "r",
        env=env,
        check=2,
    )
    assert "9 GPUs a node" in one_line(refused) and "at most 4" in one_line(refused)
    assert afterok_json("cluster", "status", env=env)["prefix"] == str(short_folder)
    afterok("cluster", "down", env=env)
    assert "is not up" in one_line(afterok("cluster", "exec", "sinfo", env=env, check=2))


def test_the_status_is_told_in_words_whatever_state_the_cluster_is_in(dev_cluster, tmp_path):
    none = afterok("cluster", "status", "--prefix", tmp_path / "none").stdout
    assert none.startswith(f"not up: {tmp_path}/none; start it with `afterok cluster up --prefix {tmp_path}/none`")
    told = afterok("cluster", "status", "--prefix", dev_cluster.prefix).stdout
    nodes, gpus = dev_cluster.shape.nodes, dev_cluster.shape.gpus_per_node
    assert f"up: {dev_cluster.prefix}\n" in told and f"shape: {nodes} nodes, each of " in told
    assert f"{gpus} fake GPUs" in told and "slurmctld (" in told and "nodes: " in told and "n1" in told
    assert not set("{}") & set(none + told)
