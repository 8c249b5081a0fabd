"""What other users of the machine can see of a run, and do to it: nothing, unless it is shared with their group."""

import grp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_tools.base import rendezvous
from tests.command import afterok, one_line, wait_for, write_toy

STRANGER = 65534
PIPELINE = """
name: pair
phases:
  use: {uses: tests.toy.secretive, with: {variables: [KEY], seconds: 60, leak: print}, resources: {ranks_per_node: 2}}
"""
PROFILE = "kind: local\nroles: {cpu: {}}\nenv:\n  secrets: {KEY: 'cmd:cat %s'}\n"

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


def as_stranger(code: str, *, groups: tuple[int, ...] = (), timeout: float = 60) -> str:
    """What Python code says that runs as another user, who may be in groups."""
    become = (
        f"import os, socket, encodings.idna; os.setgroups({list(groups)!r}); "
        f"os.setgid({STRANGER}); os.setuid({STRANGER})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", become + code], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readable_below(folder: Path, **kwargs) -> list[str]:
    code = (
        "import os\n"
        f"for root, folders, files in os.walk({str(folder)!r}):\n"
        "    for name in files:\n"
        "        try: open(os.path.join(root, name), 'rb').read(1); print(os.path.join(root, name))\n"
        "        except OSError: pass\n"
    )
    return as_stranger(code, **kwargs).splitlines()


@pytest.fixture
def open_folder():
    """A folder that everybody can reach, as a shared scratch is; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="afterok-open-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_nobody_else_reads_a_run_unless_its_group_may(open_folder):
    pipeline = write_toy(open_folder)
    before = os.umask(0o022)
    try:
        afterok("run", pipeline, "--run", open_folder / "mine")
        os.umask(0o077)
        group = grp.getgrgid(os.getgid()).gr_name
        afterok("run", pipeline, "--run", open_folder / "ours", "--group", group)
    finally:
        os.umask(before)
    assert readable_below(open_folder) == [str(pipeline)]
    shared = readable_below(open_folder / "ours", groups=(os.getgid(),))
    every = [str(path) for path in (open_folder / "ours").rglob("*") if path.is_file() and not path.is_symlink()]
    assert sorted(set(every) - set(shared)) == [str(open_folder / "ours/submissions/1/meeting_key")]
    assert readable_below(open_folder / "mine", groups=(os.getgid(),)) == []


def test_a_group_that_is_none_is_refused_and_a_run_of_before_keeps_its_mode(open_folder):
    pipeline = write_toy(open_folder)
    said = one_line(afterok("run", pipeline, "--run", open_folder / "run", "--group", "no_such_group", check=2))
    assert "--group no_such_group: no group of yours" in said
    (open_folder / "old").mkdir(mode=0o755)
    afterok("run", pipeline, "--run", open_folder / "old")
    assert (open_folder / "old").stat().st_mode & 0o777 == 0o755


def ports_of(run: Path) -> list[int]:
    """The ports at which processes of a run listen."""
    sockets = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (folder / "cmdline").read_bytes():
                sockets |= {os.readlink(handle) for handle in (folder / "fd").iterdir()}
        except OSError:  # it ended
            continue
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [
        int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    ]


ATTACK = """
held = []
for port in PORTS:
    junk = b"\\x00\\xce\\xc0\\x85\\x3c" + b"\\x09" + b"\\0" * 64
    for sent in (b"\\0" * 64, junk, b"GET / HTTP/1.1\\r\\n\\r\\n" * 20):
        try:
            s = socket.create_connection(("127.0.0.1", port), timeout=5); held.append(s); print("reached")
            s.sendall(sent)
            while said := s.recv(4096): print("said", len(said), "STOLEN" * (b"VALUE" in said or b"afterok" in said))
        except OSError: pass
for number in {*filter(str.isdigit, os.listdir("/proc"))} - {str(os.getpid())}:
    for name in ("environ", "maps", "mem", "fd"):
        try:
            path = f"/proc/{number}/{name}"
            if os.stat(path).st_uid == 65534: continue
            data = os.listdir(path) if name == "fd" else open(path, "rb").read(4096)
            if data and name in ("environ", "mem"): print("READ", path)
        except OSError: pass
    try:
        line = open(f"/proc/{number}/cmdline", "rb").read()
        if b"VALUE" in line or b"KEYHEX" in line: print("SEEN", number, line)
        os.kill(int(number), 0)
    except OSError: pass
"""


def test_another_user_learns_nothing_of_a_running_pair_of_ranks_and_does_not_disturb_it(open_folder):
    """Ports, store, files and /proc, tried by a real second uid while two ranks work; then the job ends as usual."""
    key, value = open_folder / "keys" / "key", "planted-value-of-the-secret"
    key.parent.mkdir(mode=0o700)
    key.write_text(value + "\n")
    (open_folder / "site.yaml").write_text(PROFILE % key)
    (open_folder / "pair.yaml").write_text(PIPELINE)
    run = open_folder / "run"
    afterok("submit", open_folder / "pair.yaml", f"cluster={open_folder}/site.yaml", "--run", run)
    meeting_key = wait_for(
        "the ranks to have met",
        lambda: list(run.glob("use/*/leases/0000.*")) and (run / "submissions/1/meeting_key").read_text().strip(),
    )
    log = run / "use/logs/a1.0.out"
    wait_for("the phase", lambda: log.exists() and "2 rank(s)" in log.read_text())
    ports = ports_of(run)
    assert len(ports) == 1
    said = as_stranger(ATTACK.replace("PORTS", str(ports)).replace("VALUE", value).replace("KEYHEX", meeting_key))
    assert {"reached"} <= set(said.splitlines()) <= {"reached", f"said {rendezvous.NONCE} "}, said
    assert sorted(readable_below(open_folder)) == [
        str(open_folder / name) for name in sorted(("pair.yaml", "site.yaml"))
    ]
    next(run.glob("use/*/leases")).with_name("enough").touch()
    wait_for("the seal", lambda: list(run.glob("use/*/seal.json")))
    assert value not in log.read_text() and meeting_key not in log.read_text()  # it prints its environment
