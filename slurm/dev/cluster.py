"""A private, real Slurm on this machine, for tests and rehearsals: munged, slurmctld and one slurmd a pretended node;
where asked for, slurmdbd with its database too (slurm/dev/accounting.py).

Everything lives under one folder (the prefix) and listens on 127.0.0.1 only; nodes, CPUs, memory and GPUs are made up
(the GPUs are links to /dev/null). It works as root and as a normal user, whose cluster runs only that user's jobs.

* `up` writes the configuration, starts the daemons and returns when every node is idle (about 0.2 s for four nodes).
* A daemon is known by its pid and start time, so that a reused pid is never signalled.
* `down` also ends what the daemons leave behind: a slurmd that is told to stop leaves its job steps running.

Configuration and its reasons: measured on Debian 12, Slurm 22.05.8.
"""

import contextlib
import dataclasses
import fcntl
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.base import durable
from data_tools.base.inside import expanded
from data_tools.mistake import UserMistake
from slurm.client import Slurm, SlurmError, SlurmUnavailable, scrubbed_environment
from slurm.dev.accounting import DAEMONS as ACCOUNTING_DAEMONS
from slurm.dev.accounting import PACKAGES as ACCOUNTING_PACKAGES
from slurm.dev.accounting import install_database, mariadbd_options, set_up_accounts
from slurm.dev.config import Shape, configure
from slurm.dev.processes import Process, ancestors, end, gone, parent, spawn

PREFIX_VARIABLE = "AFTEROK_CLUSTER"
MARK_VARIABLE = "AFTEROK_DEV_CLUSTER"  # set, to the prefix, for what runs inside `afterok cluster exec`
RECORD = "cluster.json"  # what is known of a cluster, below its prefix
PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
SYSTEM_PATHS = "/usr/local/sbin:/usr/sbin:/sbin"  # daemons live here, and a normal user's PATH lacks it
DAEMON_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", *ACCOUNTING_DAEMONS)

START_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0
CANCEL_LIMIT_S = 7.0  # KillWait, and a little
SOCKET_PATH_LIMIT = 107  # sun_path has 108 bytes, the last of them NUL (unix(7))
# The longest socket name below the prefix is a job step's: SPOOL/NODE/NODE_JOBID.STEPID, where 4294967291 is the batch
# step and ids have at most 8 digits (MaxJobId).
LONGEST_SOCKET = "/spool/n9999/n9999_67043327.4294967291"


def default_prefix() -> Path:
    """Return where this user's dev cluster lives: $AFTEROK_CLUSTER, else ~/.cache/afterok/cluster."""
    return expanded(os.environ.get(PREFIX_VARIABLE) or "~/.cache/afterok/cluster").absolute()


def command(prefix: Path, action: str) -> str:
    """Return the command that does something with the dev cluster of a prefix, which it names unless it is the usual
    one."""
    return f"afterok cluster {action}" + (f" --prefix {shlex.quote(str(prefix))}" if prefix != default_prefix() else "")


def prefix_of(configuration: Path) -> Path | None:
    """Return the prefix of the dev cluster whose slurm.conf this is; None of any other Slurm's."""
    prefix = configuration.parent.parent
    is_ours = configuration.is_absolute() and (prefix / RECORD).is_file() and DevCluster(prefix).conf == configuration
    return prefix if is_ours else None


def missing_packages(accounting: bool = False) -> list[str]:
    """Return the Debian packages that `up` needs and this machine lacks."""
    wanted = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    return list(dict.fromkeys(package for program, package in wanted.items() if _program(program) is None))


def install_line(packages: list[str]) -> str:
    return f"apt-get install --no-install-recommends {' '.join(packages)}"


def up(
    prefix: Path,
    nodes: int = 4,
    gpus_per_node: int = 8,
    cpus: int = 64,
    memory_mib: int = 256000,
    settings: dict[str, str] | None = None,
    accounting: bool = False,
) -> "DevCluster":
    """Start a cluster at `prefix` and return it when all nodes are idle; its `started` is False if it ran already.

    A cluster there that lost a daemon is taken down first, jobs included. `settings` are added to slurm.conf, an empty
    value removes ours. Raises UserMistake: packages missing, prefix unusable, another shape already up, a daemon that
    died at once (usually a wrong setting).
    """
    shape = Shape(nodes, gpus_per_node, cpus=cpus, memory_mib=memory_mib, accounting=accounting)
    cluster = DevCluster(prefix)
    _check(cluster.prefix, shape)
    cluster.prefix.mkdir(parents=True, exist_ok=True)
    with cluster.locked():
        if cluster.is_whole():
            if (cluster.shape, cluster.settings) != (shape, settings or {}):
                raise UserMistake(
                    f"another dev cluster is already up at {cluster.prefix} ({cluster.shape}, settings "
                    f"{cluster.settings}); `afterok cluster down` first, or choose another place with {PREFIX_VARIABLE}"
                )
            cluster.started = False
            return cluster
        cluster.stop()
        try:
            cluster.start(shape, settings or {})
        except BaseException:  # Ctrl-C too: half a cluster is worse than none
            cluster.stop()
            raise
    return cluster


class DevCluster:
    """The cluster at `prefix`, up or not. What is known of it is on disk, so any process may ask or stop it."""

    def __init__(self, prefix: Path):
        self.prefix = expanded(prefix).resolve()
        self.conf = self.prefix / "etc" / "slurm.conf"
        self.started = True

    # -- asking ------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        return Shape(**self._record().get("shape", {}))

    @property
    def settings(self) -> dict[str, str]:
        return self._record().get("settings", {})

    @property
    def nodes(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.shape.nodes + 1)]

    @property
    def daemons(self) -> list[str]:
        """Return the names of all daemons, in the order they start."""
        return ["munged", *(ACCOUNTING_DAEMONS if self.shape.accounting else ()), "slurmctld", *self.nodes]

    def env(self) -> dict[str, str]:
        """Return this process's environment, in which Slurm's commands mean this cluster, without traces of another."""
        env = scrubbed_environment(os.environ)
        env.pop("SLURM_CONF_SERVER", None)
        return {**env, "SLURM_CONF": str(self.conf), MARK_VARIABLE: str(self.prefix)}

    def alive(self, name: str) -> bool:
        process = self._process(name)
        return process is not None and process.alive()

    def is_up(self) -> bool:
        """Return whether it can answer: its controller and its authentication run."""
        return self.alive("munged") and self.alive("slurmctld")

    def is_whole(self) -> bool:
        return bool(self._record()) and all(self.alive(name) for name in self.daemons)

    def status(self) -> dict[str, Any]:
        """Return, ready for JSON: prefix, conf, up, shape, settings, daemons (pid, alive), nodes (name: Slurm's state
        word).
        """
        known = self._record()
        states: dict[str, str] = {}
        if self.is_up():
            with contextlib.suppress(SlurmError):  # a status of a broken cluster is a status too
                states = self._node_states()
        return {
            "prefix": str(self.prefix),
            "conf": str(self.conf),
            "up": self.is_up(),
            "shape": dataclasses.asdict(self.shape) if known else None,
            "settings": self.settings,
            "daemons": {
                name: {"pid": pid, "alive": self.alive(name)} for name, (pid, _) in known.get("daemons", {}).items()
            },
            "nodes": states,
        }

    # -- up and down -------------------------------------------------------------------------------------------------

    def down(self) -> None:
        """Cancel all jobs, stop all daemons, end every process of theirs. Do nothing where it is down already."""
        if self.prefix.is_dir():
            with self.locked():
                self.stop()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the cluster's lock: one `up` or `down` works at a time, the second waits."""
        with open(self.prefix / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def start(self, shape: Shape, settings: dict[str, str]) -> None:
        """Configure and start, holding the lock and with nothing of the cluster running."""
        configure(self.prefix, shape, _user(), settings)
        record = {"shape": dataclasses.asdict(shape), "settings": settings, "daemons": {}}
        durable.write_json(self.prefix / RECORD, record)
        self.start_daemon("munged")
        self._wait("munged", lambda: _answers(self.prefix / "run" / "munge.sock"))
        if shape.accounting:
            self._start_accounting()
        # -c forgets the jobs and node states of an earlier cluster here, but not how far its job ids went: ids in
        # the ledger of an old rehearsal must not come to mean new jobs.
        self.start_daemon("slurmctld", ["-c"])
        # asked before its port is open, a client sleeps a second before it tries again
        self._wait("slurmctld", lambda: _listens(self._port("SlurmctldPort")))
        for node in self.nodes:
            self.start_daemon(node)
        self._wait("the nodes", lambda: list(self._node_states().values()) == ["idle"] * shape.nodes)

    def _start_accounting(self) -> None:
        install_database(self.prefix, _user(), _program("mariadb-install-db") or "mariadb-install-db")
        self.start_daemon("mariadbd")
        self._wait("mariadbd", lambda: _answers(self.prefix / "run" / "mysql.sock"))
        self.start_daemon("slurmdbd")
        self._wait("slurmdbd", lambda: _listens(self._port("AccountingStoragePort")))
        set_up_accounts(_user(), self.env())

    def stop(self) -> None:
        """End everything, holding the lock: jobs by scancel, daemons by SIGTERM, what is left by SIGKILL."""
        if self.is_up():
            with contextlib.suppress(SlurmError, SlurmUnavailable):  # a controller that hangs is killed like the rest
                slurm = self._slurm()
                slurm.ping(timeout_s=2)
                slurm.cancel_all()
                deadline = time.monotonic() + CANCEL_LIMIT_S
                while slurm.active_job_ids() and time.monotonic() < deadline:
                    time.sleep(0.05)
        remains = self._leftovers()  # before the daemons end: later a job's child may have no parent to tell of it
        record = self._record().get("daemons", {})
        serving = [Process(*daemon) for name, daemon in record.items() if name not in ("munged", *ACCOUNTING_DAEMONS)]
        for process in serving:
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)  # one that a test has stopped must hear it
        gone(serving, STOP_LIMIT_S)
        for name in (*reversed(ACCOUNTING_DAEMONS), "munged"):  # the controller's last records reach the database
            self.kill_daemon(name)
        end(remains)  # their jobs were told before
        clean, deadline = 0, time.monotonic() + STOP_LIMIT_S
        while clean < 2 and time.monotonic() < deadline:  # one look can miss what forks or execs meanwhile
            remains = self._leftovers()
            end(remains)
            clean = 0 if remains else clean + 1
            time.sleep(0.05)

    def start_daemon(self, name: str, extra: list[str] | None = None) -> Process:
        """Start one daemon: munged, slurmctld, or a node by its name. Returns at once.

        Raises UserMistake when there is no such daemon or it runs already.
        """
        if name not in self.daemons:
            raise UserMistake(f"the dev cluster has no daemon {name!r}; it has {', '.join(self.daemons)}")
        if self.alive(name):
            raise UserMistake(f"{name} of the dev cluster at {self.prefix} runs already")
        with open(self.prefix / "log" / f"{name}.out", "ab") as log:
            process = spawn(
                [*self._command(name), *(extra or [])],
                env=self._daemon_env(name),
                cwd=self.prefix,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C of the terminal that started the cluster is not meant for it
            )
        record = self._record()
        record["daemons"][name] = [process.pid, process.started]
        durable.write_json(self.prefix / RECORD, record)
        return process

    def kill_daemon(self, name: str, sig: int = signal.SIGTERM, wait_s: float = STOP_LIMIT_S) -> bool:
        """Signal one daemon and wait until it is gone; True if it is. SIGTERM that is not heeded becomes SIGKILL.

        A slurmd's job steps live on, as they do when a real slurmd dies.
        """
        process = self._process(name)
        if process is None or not process.alive():
            return True
        process.send(sig)
        if sig not in (signal.SIGTERM, signal.SIGKILL):
            return not process.alive()
        if not gone([process], wait_s):
            process.send(signal.SIGKILL)
        return gone([process], wait_s)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _record(self) -> dict[str, Any]:
        try:
            return durable.read_json(self.prefix / RECORD)
        except (OSError, durable.TornFile):
            return {}

    def _process(self, name: str) -> Process | None:
        daemon = self._record().get("daemons", {}).get(name)
        return Process(*daemon) if daemon else None

    def _daemon_env(self, name: str) -> dict[str, str]:
        """Return a daemon's environment: nothing of the user's shell, so no secret of it and nothing that differs next
        time.
        """
        env = {"PATH": _search_path(), "SLURM_CONF": str(self.conf), "LC_ALL": "C.UTF-8"}
        # slurmdbd has no setting for the database's socket
        return env | {"MYSQL_UNIX_PORT": f"{self.prefix}/run/mysql.sock"} if name == "slurmdbd" else env

    def _command(self, name: str) -> list[str]:
        run = self.prefix / "run"
        if name == "munged":
            # --force: it would refuse a socket folder that others cannot enter, which is what we want of a user's
            return [
                _program("munged") or "munged", "--foreground", "--force", "--num-threads=4",
                f"--socket={run}/munge.sock", f"--key-file={self.prefix}/munge/munge.key",
                f"--log-file={self.prefix}/log/munged.log", f"--pid-file={run}/munged.pid",
                f"--seed-file={self.prefix}/munge/munged.seed",
            ]  # fmt: skip
        if name == "mariadbd":
            return [_program("mariadbd") or "mariadbd", *mariadbd_options(self.prefix)]
        if name == "slurmdbd":
            return [_program("slurmdbd") or "slurmdbd", "-D"]
        if name == "slurmctld":
            return [_program("slurmctld") or "slurmctld", "-D"]
        stepd = _program("slurmstepd")
        return [_program("slurmd") or "slurmd", "-D", "-N", name, *(["-d", stepd] if stepd else [])]

    def _port(self, key: str) -> int:
        line = re.search(rf"^{key}=(\d+)$", self.conf.read_text(), re.MULTILINE)
        if line is None:
            raise UserMistake(f"{self.conf} has no {key}; bring the dev cluster down and up again")
        return int(line[1])

    def _slurm(self) -> Slurm:
        return Slurm(self.env(), timeout_s=5)

    def _node_states(self) -> dict[str, str]:
        return self._slurm().node_states()

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait until `ready` returns True.

        Raises:
            UserMistake: a daemon died meanwhile (with its last words), or nothing came within the limit.
        """
        deadline = time.monotonic() + START_LIMIT_S
        problem = f"not ready within {START_LIMIT_S:g} s"
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except SlurmError as error:
                problem = str(error)
            dead = [name for name in self._record()["daemons"] if not self.alive(name)]
            if dead:
                raise UserMistake(f"the dev cluster's {dead[0]} died at once: {self._last_words(dead[0])}")
            time.sleep(0.02)
        raise UserMistake(f"the dev cluster did not start: {what}: {problem}; logs are in {self.prefix}/log")

    def _last_words(self, name: str) -> str:
        log = self.prefix / "log" / f"{name}.out"
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line or "fatal" in line]
        return f"{'; '.join(lines[-3:]) or 'it said nothing'}; log: {log}"

    def _leftovers(self) -> list[Process]:
        """Return the cluster's processes, recorded or not: daemons, job steps, jobs and all their descendants.

        slurmd's children inherit the cluster's SLURM_CONF. So does a shell of `cluster exec`, which is neither a
        daemon nor has a job's id.
        """
        conf, socket_option = f"SLURM_CONF={self.conf}", f"--socket={self.prefix}/run/munge.sock"
        children: dict[int, list[int]] = {}
        pids: list[int] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            try:
                children.setdefault(parent(pid), []).append(pid)
                program = os.path.basename(os.readlink(entry / "exe")).removesuffix(" (deleted)")
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # ended meanwhile, a kernel thread, or another user's
                continue
            daemon = program.removesuffix("-wlm") in DAEMON_PROGRAMS
            in_job = any(variable.startswith("SLURM_JOB_ID=") for variable in variables)
            if (conf in variables and (daemon or in_job)) or (daemon and socket_option in arguments):
                pids.append(pid)
        for pid in pids:  # grows while it is read
            pids += [child for child in children.get(pid, []) if child not in pids]
        spared = ancestors()  # `down` may be typed in a job's shell
        processes = (Process.of(pid) for pid in pids if pid not in spared)
        return [process for process in processes if process]


def _check(prefix: Path, shape: Shape) -> None:
    """Refuse what cannot work, before anything is written."""
    missing = missing_packages(shape.accounting)
    if missing:
        cluster = f"the dev cluster{' with accounting' if shape.accounting else ''}"
        message = f"{cluster} needs the packages {', '.join(missing)}, not installed here"
        raise UserMistake(f"{message}: {install_line(missing)}")
    # spaces, commas, brackets, # and % mean something in Slurm's files
    if not re.fullmatch(r"[A-Za-z0-9/._+@~-]+", str(prefix)):
        raise UserMistake(f"{str(prefix)!r} has characters that slurm.conf cannot hold; set {PREFIX_VARIABLE}")
    longest = len(f"{prefix}{LONGEST_SOCKET}")
    if longest > SOCKET_PATH_LIMIT:
        most = SOCKET_PATH_LIMIT - len(LONGEST_SOCKET)
        message = f"{prefix} is {len(str(prefix))} bytes long, and a unix socket's path below it would be {longest}"
        raise UserMistake(f"{message}; set {PREFIX_VARIABLE} to a folder of at most {most} bytes")
    for key, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus", 1), ("memory_mib", 1)):
        if getattr(shape, key) < least:
            raise UserMistake(f"{key} is {getattr(shape, key)}; the least is {least}")


def _program(name: str) -> str | None:
    return shutil.which(name, path=_search_path())


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _search_path() -> str:
    return f"{os.environ.get('PATH', '/usr/local/bin:/usr/bin:/bin')}:{SYSTEM_PATHS}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(unix_socket: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(unix_socket)) == 0
