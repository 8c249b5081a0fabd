"""The dev cluster with accounting: a real slurmdbd on a MariaDB of its own, limits enforced, gone with the cluster."""

import signal
import time
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from slurm.client import Slurm, SlurmError
from slurm.dev import accounting as devaccounting
from slurm.dev import cluster as devcluster
from tests.cluster import require_packages, wait_until
from tests.slurm.test_devcluster import processes_mentioning


def accounted(slurm: Slurm, job: str) -> list[str]:
    """What slurmdbd says of a job; nothing while it does not answer."""
    try:
        return [row.state for row in slurm.accounting([job]) or []]
    except SlurmError:
        return []


def wrapped(slurm: Slurm, command: str, *options: str) -> str:
    return slurm.sbatch(["--output=/dev/null", *options, f"--wrap={command}"])


def test_missing_packages_are_named_with_the_line_to_install_them(monkeypatch):
    found = {*devcluster.PACKAGES, "sacctmgr", "my_print_defaults"}
    monkeypatch.setattr(devcluster, "_program", lambda name: name if name in found else None)
    with pytest.raises(
        UserMistake, match="with accounting .* slurmdbd, mariadb-server-core, .*apt-get install"
    ) as refused:
        devcluster.up(Path("/tmp/aok-never"), accounting=True)
    assert "mariadb-client-core" not in str(refused.value) and not Path("/tmp/aok-never").exists()


def test_a_job_is_recorded_with_its_script_and_a_limit_of_its_qos_holds(accounted_cluster):
    slurm = Slurm(accounted_cluster.env())
    job = wrapped(slurm, "exit 3")
    wait_until(lambda: accounted(slurm, job) == ["FAILED"], "its record", 30)
    assert slurm.accounting([job])[0].exit_code == 3
    wait_until(lambda: "exit 3" in slurm.run(["sacct", "--batch-script", f"--jobs={job}"]), "its script", 30)
    most = devaccounting.SMALL_QOS_JOBS
    small = wrapped(slurm, "true", f"--qos={devaccounting.SMALL_QOS}", "--hold", f"--array=1-{most}")
    with pytest.raises(SlurmError, match="QOSMaxSubmitJobPerUserLimit"):
        wrapped(slurm, "true", f"--qos={devaccounting.SMALL_QOS}")
    slurm.cancel([small])
    wait_until(lambda: wrapped(slurm, "true", f"--qos={devaccounting.SMALL_QOS}"), "room again")


def test_without_slurmdbd_jobs_run_and_their_records_arrive_when_it_is_back(accounted_cluster):
    slurm = Slurm(accounted_cluster.env())
    assert accounted_cluster.kill_daemon("slurmdbd", signal.SIGKILL)
    try:
        job = wrapped(slurm, "true")
        wait_until(lambda: slurm.job(job)["JobState"] == "COMPLETED", "the job")
        began = time.monotonic()
        with pytest.raises(SlurmError):
            slurm.accounting([job])
        assert time.monotonic() - began < slurm.timeout_s
    finally:
        accounted_cluster.start_daemon("slurmdbd")
    wait_until(lambda: accounted(slurm, job) == ["COMPLETED"], "its record", 60)


def test_a_cluster_with_accounting_is_another_shape_and_leaves_no_process(short_folder):
    require_packages(accounting=True)
    cluster = devcluster.up(short_folder, nodes=1, accounting=True)
    assert cluster.is_whole() and cluster.daemons == ["munged", "mariadbd", "slurmdbd", "slurmctld", "n1"]
    job = wrapped(Slurm(cluster.env()), "sleep 300")
    wait_until(lambda: accounted(Slurm(cluster.env()), job) == ["RUNNING"], "its record", 30)
    with pytest.raises(UserMistake, match="another dev cluster is already up"):
        devcluster.up(short_folder, nodes=1)
    cluster.down()
    assert processes_mentioning(short_folder) == []
