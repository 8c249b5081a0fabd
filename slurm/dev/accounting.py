"""Accounting for the dev cluster: a private MariaDB (one socket, no port) with slurmdbd before it, below the prefix.

It keeps what a strict site keeps: associations, limits and QOS are enforced, and each job's script and environment are
stored. A new cluster has a new database. Measured on Debian 12, Slurm 22.05.8, MariaDB 10.11.
"""

import os
import subprocess
from pathlib import Path

from data_tools.mistake import UserMistake

PACKAGES = {
    "slurmdbd": "slurmdbd",
    "sacctmgr": "slurm-client",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
}
DAEMONS = ("mariadbd", "slurmdbd")  # in the order they start
ACCOUNT = "main"
SMALL_QOS, SMALL_QOS_JOBS = "small", 6  # a QOS in which a user may have so many jobs or array elements in the queue
SET_UP_LIMIT_S = 60.0


def slurm_keys(prefix: Path, port: int) -> dict[str, str]:
    """Return the keys that slurm.conf has only with accounting."""
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": str(port),
        "AccountingStoragePass": f"{prefix}/run/munge.sock",  # else clients sign for slurmdbd with the machine's munge
        "AccountingStorageEnforce": "associations,limits,qos",
        "AccountingStorageTRES": "gres/gpu",
        "AccountingStoreFlags": "job_comment,job_env,job_script",
    }


def slurmdbd_conf(prefix: Path, user: str, port: int) -> str:
    """Return the text of slurmdbd.conf. MariaDB knows the user by the socket's peer, so there is no password."""
    keys = {
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": str(port),
        "SlurmUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={prefix}/run/munge.sock",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": user,
        "StorageLoc": "slurm_acct",
        "CommunicationParameters": "NoInAddrAny",
        "LogFile": f"{prefix}/log/slurmdbd.log",
        "PidFile": f"{prefix}/run/slurmdbd.pid",
        "DebugLevel": "info",
    }
    return "".join(f"{key}={value}\n" for key, value in keys.items())


def install_database(prefix: Path, user: str, program: str) -> None:
    """Make an empty MariaDB at PREFIX/mysql.

    Raises:
        UserMistake: it was not made; the message names the log.
    """
    log = prefix / "log" / "mariadb-install-db.out"
    command = [program, "--no-defaults", f"--datadir={prefix}/mysql", "--skip-test-db", "--skip-name-resolve",
               "--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}", *_as_root()]  # fmt: skip
    with open(log, "wb") as out:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=SET_UP_LIMIT_S)
    if done.returncode:
        raise UserMistake(f"the dev cluster's database was not made (exit code {done.returncode}); log: {log}")


def set_up_accounts(user: str, env: dict[str, str]) -> None:
    """Make the user's account and QOS, before slurmctld starts, which wants to find its cluster there.

    Raises:
        UserMistake: sacctmgr refused; the message tells what it said.
    """
    commands = (
        "add cluster dev",
        f"add account {ACCOUNT} Description={ACCOUNT} Organization={ACCOUNT}",
        f"add user {user} Account={ACCOUNT}",
        f"add qos {SMALL_QOS} MaxSubmitJobsPerUser={SMALL_QOS_JOBS}",
        f"modify user where name={user} set QOS=normal,{SMALL_QOS} DefaultQOS=normal DefaultAccount={ACCOUNT}",
    )
    done = subprocess.run(
        ["sacctmgr", "--immediate"],
        input="\n".join(commands),
        env=env,
        text=True,
        capture_output=True,
        timeout=SET_UP_LIMIT_S,
    )
    if done.returncode:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        raise UserMistake(f"the dev cluster's accounts were not set up; sacctmgr said: {said[-300:]}")


def mariadbd_options(prefix: Path) -> list[str]:
    """Return the options of a MariaDB that serves one socket and keeps little in memory."""
    return ["--no-defaults", f"--datadir={prefix}/mysql", f"--socket={prefix}/run/mysql.sock", "--skip-networking",
            f"--pid-file={prefix}/run/mariadbd.pid", "--skip-name-resolve", "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=2",
            *_as_root()]  # fmt: skip


def _as_root() -> list[str]:
    """Return the option that root must give; MariaDB refuses to run as root without it."""
    return ["--user=root"] if os.geteuid() == 0 else []
