"""The pytest fixture `dev_cluster`: a real Slurm that the tests of slurm and launchers start, use and break.

Import it where it is needed, with its helper fixture:

    from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401

`accounted_cluster` is one with slurmdbd, whose QOS devaccounting.SMALL_QOS takes a few jobs only.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.client import Slurm, SlurmError, scrubbed_environment
from slurm.dev import cluster as devcluster
from slurm.printed import QueueRow

REQUIRE_VARIABLE = "AFTEROK_REQUIRE_SLURM"


def require_packages(accounting: bool = False) -> None:
    """Skip where Slurm's packages are missing, or fail where the run promised to have them (CI)."""
    missing = devcluster.missing_packages(accounting)
    if not missing:
        return
    message = f"needs the packages {', '.join(missing)}: {devcluster.install_line(missing)}"
    if os.environ.get(REQUIRE_VARIABLE) == "1":
        pytest.fail(f"{REQUIRE_VARIABLE}=1, but this test {message}")
    pytest.skip(message)


@pytest.fixture(scope="session", autouse=True)
def scrub_slurm() -> Iterator[None]:
    """No test sees a Slurm of the machine, a job around it or somebody's dev cluster."""
    unwanted = {
        key for key in os.environ
        if key not in scrubbed_environment(os.environ)
        or key in ("SLURM_CONF", "SLURM_CONF_SERVER", devcluster.MARK_VARIABLE, devcluster.PREFIX_VARIABLE)
        or key.startswith("AFTEROK_PROFILE")
    }  # fmt: skip
    saved = {key: os.environ.pop(key) for key in unwanted}
    yield
    os.environ.update(saved)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for Slurm's sockets, which pytest's tmp_path does not."""
    folder = Path(tempfile.mkdtemp(prefix="aok-", dir="/tmp"))
    yield folder
    devcluster.DevCluster(folder).down()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def dev_cluster(scrub_slurm: None) -> Iterator[devcluster.DevCluster]:
    """A running cluster of 4 nodes with 8 pretended GPUs each, one a test module; nothing of it is left afterwards."""
    require_packages()
    with cluster_for_a_while() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def accounted_cluster(scrub_slurm: None) -> Iterator[devcluster.DevCluster]:
    """Like `dev_cluster`, of 2 nodes and with slurmdbd: associations, limits and QOS are enforced.

    It takes 5 s to start, so that all modules of a folder share it: leave it whole and empty.
    """
    require_packages(accounting=True)
    with cluster_for_a_while(nodes=2, accounting=True) as cluster:
        yield cluster


@contextlib.contextmanager
def cluster_for_a_while(**shape: Any) -> Iterator[devcluster.DevCluster]:
    folder = Path(tempfile.mkdtemp(prefix="aok-", dir="/tmp"))
    try:
        yield devcluster.up(folder, **shape)
    finally:
        devcluster.DevCluster(folder).down()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(ready: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    """Poll until `ready`, or fail with `what`."""
    deadline = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {limit_s:g} s: {what}")
        time.sleep(0.05)


def bring_back(cluster: devcluster.DevCluster, node: str) -> None:
    """A crashed node starts again and takes jobs."""
    if not cluster.alive(node):
        cluster.start_daemon(node)
    slurm = Slurm(cluster.env())
    wait_until(lambda: not slurm.node_states()[node].endswith("*"), f"{node} answers", 60)
    with contextlib.suppress(SlurmError):  # it may have come back by itself
        slurm.run(["scontrol", "update", f"nodename={node}", "state=resume"])
    wait_until(lambda: slurm.node_states()[node] in ("idle", "mixed"), f"{node} is back", 60)


@contextlib.contextmanager
def controller_forgets(cluster: devcluster.DevCluster) -> Iterator[None]:
    """Have what is submitted within forgotten: slurmctld dies at the end and comes back with its state of before."""
    state, saved = cluster.prefix / "state", cluster.prefix / "state.saved"
    cluster.kill_daemon("slurmctld", signal.SIGSTOP)  # it renames files there
    shutil.copytree(state, saved)
    cluster.kill_daemon("slurmctld", signal.SIGCONT)
    yield
    cluster.kill_daemon("slurmctld", signal.SIGKILL)
    shutil.rmtree(state)
    saved.rename(state)
    cluster.start_daemon("slurmctld")
    Slurm(cluster.env()).ping(timeout_s=30)


def rows_of(slurm: Slurm, job_id: str) -> list[QueueRow]:
    """The queue's rows of one job or array."""
    return [row for row in slurm.queue() if job_id in (row.job_id, row.array_job_id)]


def crash_node(cluster: devcluster.DevCluster, node: str) -> None:
    """End a node as a power cut does: its slurmd, its job steps and their tasks, at once and without a word."""
    cluster.kill_daemon(node, signal.SIGKILL)
    log = str(cluster.prefix / "log" / f"slurmd-{node}.log")
    lost: list[int] = []
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # no process, or ended meanwhile
            pid = int(entry.name)
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(pid)
            is_step = os.path.basename(os.readlink(entry / "exe")).startswith("slurmstepd")
            if is_step and log in [os.readlink(fd) for fd in (entry / "fd").iterdir()]:
                lost.append(pid)
    for pid in lost:  # grows while it is read
        lost += children.get(pid, [])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
