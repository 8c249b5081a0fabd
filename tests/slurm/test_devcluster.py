"""The dev cluster is a real Slurm: quick to start, on 127.0.0.1 only, and without a trace once it is down."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from slurm.client import Slurm, SlurmUnavailable
from slurm.dev import cluster as devcluster
from slurm.dev import config as devconfig
from slurm.dev.cluster import DevCluster
from slurm.dev.config import Shape
from slurm.dev.processes import Process
from tests.cluster import require_packages, rows_of, wait_until

SCRIPT = "#!/bin/bash\n"


def processes_mentioning(prefix: Path) -> list[str]:
    """Command lines of live processes that were started for the cluster or hold one of its files open."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid() or Process.of(int(entry.name)) is None:
            continue
        try:
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            text += "".join(os.readlink(link) for link in (entry / "fd").iterdir()).encode()
        except OSError:
            continue
        if str(prefix).encode() in text:
            found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def submit(cluster: DevCluster, script: str, *options: str) -> str:
    path = cluster.prefix / "job.sh"
    path.write_text(SCRIPT + script)
    return Slurm(cluster.env()).sbatch(["--export=NONE", f"--output={cluster.prefix}/%A_%a.out", *options, str(path)])


# -- pure -------------------------------------------------------------------------------------------------------------


def test_the_configuration_listens_on_the_loopback_only_and_takes_settings():
    text = devconfig.slurm_conf(
        Path("/p"), Shape(2, 4, 16, 1000), "me", [1, 9, 2, 3], {"MinJobAge": "2", "KillWait": ""}
    )
    lines = text.splitlines()
    assert "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" in lines
    assert "MinJobAge=2" in lines and not [line for line in lines if line.startswith("KillWait")]
    assert lines[-4].startswith("NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=3 CPUs=16 RealMemory=1000")
    assert lines[-4].endswith("Gres=gpu:4")
    assert devconfig.gres_conf(Path("/p"), Shape(2, 4)).endswith("NodeName=n[1-2] Name=gpu File=/p/dev/nvidia[0-3]\n")


def test_missing_packages_are_named_with_the_line_to_install_them(monkeypatch, tmp_path):
    monkeypatch.setattr(devcluster, "SYSTEM_PATHS", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserMistake, match="munge, slurmctld, slurmd, slurm-client.*apt-get install"):
        devcluster.up(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_missing_packages_skip_the_tests_except_where_they_were_promised(monkeypatch):
    monkeypatch.setattr(devcluster, "missing_packages", lambda accounting: ["munge"])
    monkeypatch.delenv("AFTEROK_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="munge: apt-get install.* munge"):
        require_packages()
    monkeypatch.setenv("AFTEROK_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="munge: apt-get install"):
        require_packages()


def test_a_place_or_shape_that_cannot_work_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(devcluster, "missing_packages", lambda accounting: [])
    with pytest.raises(UserMistake, match=r"AFTEROK_CLUSTER to a folder of at most \d+ bytes"):
        devcluster.up(Path("/tmp") / ("x" * 90))
    with pytest.raises(UserMistake, match="slurm.conf cannot hold"):
        devcluster.up(Path("/tmp/a b"))
    with pytest.raises(UserMistake, match="nodes is 0"):
        devcluster.up(Path("/tmp/aok-never"), nodes=0)
    assert not Path("/tmp/aok-never").exists()


def test_a_pid_that_another_process_has_now_is_not_signalled():
    child = subprocess.Popen(["sleep", "60"])
    try:
        now = Process.of(child.pid)
        Process(child.pid, now.started - 1).send(signal.SIGKILL)
        time.sleep(0.2)  # a signal takes effect a little later
        assert not Process(child.pid, now.started - 1).alive() and now.alive()
        now.send(signal.SIGKILL)
        wait_until(lambda: not now.alive(), "the child's end")  # a zombie until we wait for it: not alive
    finally:
        child.kill()
        child.wait()


def test_a_cluster_whose_record_was_lost_can_still_be_asked_and_taken_down(short_folder):
    (short_folder / "cluster.json").write_text('{"shape": {"no')
    cluster = DevCluster(short_folder)
    assert cluster.status()["up"] is False and cluster.status()["shape"] is None
    cluster.down()


def test_where_the_default_cluster_lives(monkeypatch):
    monkeypatch.setenv("AFTEROK_CLUSTER", "/x/y")
    assert devcluster.default_prefix() == Path("/x/y")
    monkeypatch.delenv("AFTEROK_CLUSTER")
    assert devcluster.default_prefix() == Path.home() / ".cache/afterok/cluster"


# -- the cluster of this module ---------------------------------------------------------------------------------------


def test_status_is_json_and_complete(dev_cluster):
    status = json.loads(json.dumps(dev_cluster.status()))
    assert status["up"] and status["nodes"] == {"n1": "idle", "n2": "idle", "n3": "idle", "n4": "idle"}
    assert list(status["daemons"]) == sorted(["munged", "slurmctld", "n1", "n2", "n3", "n4"])
    assert all(daemon["alive"] for daemon in status["daemons"].values())
    assert status["shape"] == {"nodes": 4, "gpus_per_node": 8, "cpus": 64, "memory_mib": 256000, "accounting": False}
    assert status["conf"] == str(dev_cluster.conf)


def test_it_listens_on_127_0_0_1_only(dev_cluster):
    inodes = set()
    for daemon in dev_cluster.status()["daemons"].values():
        for link in Path(f"/proc/{daemon['pid']}/fd").iterdir():
            inodes.add(os.readlink(link))
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # 0A: LISTEN
                listening.append(fields[1].split(":")[0])
    assert len(listening) == 5 and set(listening) == {"0100007F"}


def test_clients_see_this_cluster_and_nothing_of_another(dev_cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_OUTPUT", "/x")
    monkeypatch.setenv("SLURM_CONF_SERVER", "h")
    env = dev_cluster.env()
    named = {key: value for key, value in env.items() if key.startswith(("SLURM", "SBATCH", "AFTEROK_DEV"))}
    assert named == {"SLURM_CONF": str(dev_cluster.conf), "AFTEROK_DEV_CLUSTER": str(dev_cluster.prefix)}


def test_a_dependent_array_waits_with_the_reason_and_cancel_ends_both(dev_cluster):
    slurm = Slurm(dev_cluster.env())
    first = submit(dev_cluster, "sleep 60\n", "--array=0-3%2", "--job-name=first")
    second = submit(dev_cluster, "true\n", "--array=0,2-3", f"--dependency=aftercorr:{first}", "--job-name=second")
    wait_until(lambda: [row.state for row in rows_of(slurm, first)].count("RUNNING") == 2, "two elements run")
    wait_until(lambda: all(row.reason for row in rows_of(slurm, second)), "Slurm has looked at the second")
    waiting = rows_of(slurm, second)
    assert sorted(row.array_index for row in waiting) == [0, 2, 3]
    assert {(row.state, row.reason, row.name) for row in waiting} == {("PENDING", "Dependency", "second")}
    assert all(f"aftercorr:{first}_" in row.dependency for row in waiting)
    running = [row for row in rows_of(slurm, first) if row.state == "RUNNING"]
    assert sorted(row.array_index for row in running) == [0, 1] and {row.nodelist for row in running} == {"n1"}
    slurm.cancel([f"{first}_0", second])
    wait_until(lambda: {row.state for row in rows_of(slurm, second)} == {"CANCELLED"}, "the second is cancelled")
    states = {row.array_index: row.state for row in rows_of(slurm, first)}
    assert states[0] in ("CANCELLED", "COMPLETING") and states[1] == "RUNNING"
    slurm.cancel([first, first, "987654"])  # twice, and one that never was: no error
    wait_until(lambda: {row.state for row in rows_of(slurm, first)} == {"CANCELLED"}, "the first is cancelled")


def test_every_waiting_element_is_a_row_however_sparse_the_array(dev_cluster):
    slurm = Slurm(dev_cluster.env())
    # the first is printed with a step, the second in more than the 64 characters that squeue prints by default
    for indices in (list(range(0, 400, 4)), [number * number for number in range(60)]):
        job = submit(dev_cluster, "true\n", "--hold", f"--array={','.join(map(str, indices))}%2")
        rows = rows_of(slurm, job)
        slurm.cancel([job])
        assert sorted(row.array_index for row in rows) == indices
        assert {(row.array_job_id, row.state, row.reason) for row in rows} == {(job, "PENDING", "JobHeldUser")}


def test_a_dependent_job_runs_after_its_parent_succeeded(dev_cluster):
    slurm = Slurm(dev_cluster.env())
    first = submit(dev_cluster, "true\n", "--array=0-1")
    second = submit(dev_cluster, "true\n", f"--dependency=afterok:{first}")
    wait_until(lambda: [row.state for row in rows_of(slurm, second)] == ["COMPLETED"], "the dependent is completed")
    assert {row.state for row in rows_of(slurm, first)} == {"COMPLETED"}


def test_a_job_without_the_submitters_environment_starts_at_once_with_a_bare_one(dev_cluster, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    job = submit(dev_cluster, f"env > {dev_cluster.prefix}/env.out; date +%s.%N\n")
    output = dev_cluster.prefix / f"{job}_4294967294.out"
    wait_until(lambda: output.exists() and output.read_text().strip() != "", "the job's output")
    log = (dev_cluster.prefix / "log" / "slurmctld.log").read_text()
    # either of Slurm's two schedulers may have started it
    allocated = re.search(rf"^\[(\S+)\] sched\S*: .*(?:Started|Allocate) JobId={job} ", log, re.MULTILINE)
    delay = float(output.read_text()) - datetime.fromisoformat(allocated[1]).timestamp()
    assert -0.1 < delay < 1, f"{delay} s from allocation to the script"
    environment = dict(line.split("=", 1) for line in (dev_cluster.prefix / "env.out").read_text().splitlines())
    assert "SECRET" not in environment and "HOME" not in environment
    assert environment["SLURM_CONF"] == str(dev_cluster.conf)


def test_a_job_step_sees_its_gpus(dev_cluster):
    # an absolute path: in a job's bare environment srun finds no program
    job = submit(dev_cluster, "srun /bin/bash -c 'echo $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'\n", "--nodes=2",
                 "--ntasks-per-node=2", "--gpus-per-node=3")  # fmt: skip
    output = dev_cluster.prefix / f"{job}_4294967294.out"
    wait_until(lambda: output.exists() and len(output.read_text().splitlines()) == 4, "four ranks")
    assert sorted(output.read_text().splitlines()) == ["0 0,1,2", "0 0,1,2", "1 0,1,2", "1 0,1,2"]


def test_partitions_limits_and_addresses_of_the_live_cluster(dev_cluster):
    slurm = Slurm(dev_cluster.env())
    rows = {row.name: row for row in slurm.partitions()}
    assert tuple(rows) == devconfig.PARTITIONS and [row.name for row in rows.values() if row.default] == ["batch"]
    assert (rows["long"].max_time_minutes, rows["batch"].max_time_minutes) == (7 * 1440, 1440)
    assert (rows["batch"].nodes, rows["batch"].cpus_per_node, rows["batch"].gpus_per_node) == (4, 64, 8)
    assert slurm.max_array_size() == 4001
    assert slurm.node_address("n2") == "127.0.0.1"
    assert slurm.accounting(["1"]) is None


# -- clusters of a test's own -----------------------------------------------------------------------------------------


def test_up_is_idle_twice_is_once_and_down_leaves_no_process(short_folder):
    require_packages()
    cluster = devcluster.up(short_folder)
    assert cluster.started
    assert set(cluster.status()["nodes"].values()) == {"idle"}
    daemons = cluster.status()["daemons"]
    again = devcluster.up(short_folder)
    assert not again.started and again.status()["daemons"] == daemons
    with pytest.raises(UserMistake, match="afterok cluster down"):
        devcluster.up(short_folder, nodes=2)

    step = "srun --ntasks=2 bash -c \"trap '' TERM; sleep 301\""
    submit(cluster, f"trap '' TERM\nsleep 300 &\nuntil {step}; do sleep 1; done &\nsleep 302\n", "--ntasks=3")
    try:
        wait_until(lambda: sum("sleep 30" in line for line in processes_mentioning(short_folder)) >= 4, "its processes")
    finally:
        said = [path.read_text() for path in short_folder.glob("*.out")]
        print(cluster.status(), Slurm(cluster.env()).queue(), said, processes_mentioning(short_folder))
    cluster.down()
    assert processes_mentioning(short_folder) == []
    assert not cluster.is_up() and cluster.status()["nodes"] == {}
    cluster.down()  # and again: nothing to do

    # ids go on: an old ledger's id must not come to mean a new job
    assert int(submit(devcluster.up(short_folder, nodes=1), "true\n")) == 2
    DevCluster(short_folder).down()


def test_a_half_dead_cluster_is_cleaned_up_and_started_anew(short_folder):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=2)
    submit(cluster, "sleep 300\n")
    wait_until(lambda: [row.state for row in Slurm(cluster.env()).queue()] == ["RUNNING"], "the job runs")
    old = cluster.status()["daemons"]
    for name in ("slurmctld", "n1"):
        assert cluster.kill_daemon(name, signal.SIGKILL)
    assert not cluster.is_up()
    again = devcluster.up(short_folder, nodes=2)
    assert again.started and set(again.status()["nodes"].values()) == {"idle"}
    assert all(daemon["pid"] != old[name]["pid"] for name, daemon in again.status()["daemons"].items())
    assert not [line for line in processes_mentioning(short_folder) if "sleep 300" in line]
    assert Slurm(again.env()).queue() == []  # nor does the new cluster run the old one's jobs again


def test_an_up_that_was_killed_leaves_nothing_that_the_next_does_not_find(short_folder):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=1)
    (short_folder / "cluster.json").unlink()  # as if it died before it could write down what it had started
    again = devcluster.up(short_folder, nodes=1)
    assert again.started
    assert len([line for line in processes_mentioning(short_folder) if "munged" in line]) == 1
    again.down()
    assert processes_mentioning(short_folder) == [] and cluster.prefix == again.prefix


def test_a_dead_or_hanging_controller_is_unavailable_and_can_be_started_again(short_folder):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=1)
    slurm = Slurm(cluster.env())
    cluster.kill_daemon("slurmctld", signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(SlurmUnavailable, match="it hangs"):
        slurm.ping()
    assert 4 < time.monotonic() - began < 60  # where Slurm itself would give up
    cluster.kill_daemon("slurmctld", signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(SlurmUnavailable) as error:
        slurm.ping()
    assert 4 < time.monotonic() - began < 60
    assert str(cluster.conf) in str(error.value) and "DOWN" in str(error.value)
    cluster.start_daemon("slurmctld")
    slurm.ping()
    with pytest.raises(UserMistake, match="runs already"):
        cluster.start_daemon("slurmctld")
    with pytest.raises(UserMistake, match="no daemon 'n9'"):
        cluster.start_daemon("n9")
    cluster.kill_daemon("munged", signal.SIGKILL)
    with pytest.raises(SlurmUnavailable):
        slurm.ping(timeout_s=1)


def test_a_setting_that_slurm_refuses_is_told_in_its_words_and_leaves_nothing(short_folder):
    require_packages()
    with pytest.raises(UserMistake, match="died at once.*PreemptParameters"):
        devcluster.up(short_folder, nodes=1, settings={"PreemptParameters": "x"})
    assert processes_mentioning(short_folder) == []


def test_a_shell_inside_the_cluster_outlives_it(short_folder):
    require_packages()
    cluster = devcluster.up(short_folder, nodes=1)
    shell = subprocess.Popen(["sleep", "60"], env=cluster.env())
    try:
        cluster.down()
        assert shell.poll() is None
    finally:
        shell.kill()
        shell.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_normal_user_has_a_cluster_of_his_own_that_others_cannot_enter(short_folder):
    require_packages()
    nobody = 65534
    os.chown(short_folder, nobody, nobody)
    code = (
        "import sys; from pathlib import Path\n"
        "from slurm.dev import cluster as devcluster; from slurm.client import Slurm\n"
        f"c = devcluster.up(Path({str(short_folder)!r}), nodes=2); s = Slurm(c.env())\n"
        "s.sbatch(['--export=NONE', '--output=/dev/null', '--wait', '--wrap', 'srun /bin/true'])\n"
        "print(oct(c.prefix.stat().st_mode & 0o777), [row.state for row in s.queue()])\n"
        "c.down(); print(c.is_up())"
    )
    root = Path(devcluster.__file__).parents[2]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [_python_for_others(), "-c", code], env=env, cwd="/", user=nobody, group=nobody, extra_groups=[],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.stdout.splitlines() == ["0o700 ['COMPLETED']", "False"], ran.stderr
    assert processes_mentioning(short_folder) == []


def _python_for_others() -> str:
    """An interpreter that a normal user may run: ours may live in root's home."""
    for path in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([path, "-c", "import pathlib"], user=65534, capture_output=True, check=True)
            return path
    pytest.skip("no Python that user nobody may run")
