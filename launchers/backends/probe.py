"""Asks compute nodes what only they can tell of a profile: folders, network names, whether a role's environment works.

One short srun a role, in its partition, with the very lines before the command that its jobs have. Its answers come by
srun's output, not by a file: which folders are shared is what is asked.
"""

import secrets
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from launchers.backends.containers import contained
from launchers.backends.shell_lines import LINE_FAILED, script_setup
from slurm.client import Slurm, SlurmError
from slurm.profile.environments import environment_of
from slurm.profile.images import image_of
from slurm.profile.resolve import choices
from slurm.profile.schema import Profile, Request, Resources
from slurm.verify.checks import Mismatch
from slurm.verify.live import Live

CODE = Path(__file__).parents[2]
WAIT_S = 60  # for a free node
LIMIT_S = 180.0  # for the whole of one role
MARK = "afterok-probe"
MEMORY = ("tmpfs", "ramfs", "devtmpfs")  # filesystems that are the memory of one machine
SIZES = ("max_time", "max_nodes", "cpus", "time", "nodes", "gpus_per_node", "cpus_per_task", "mem_gib")
SHELL_KEYS = ("env.setup", "hooks.prolog")
LONGEST_ANSWER = 300  # characters of what an environment said that did not work


@dataclass
class Probed:
    """What the nodes said, and of which roles they could not be asked, and why."""

    mismatches: list[Mismatch] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)


def probe(profile: Profile, live: Live, slurm: Slurm, known: list[Mismatch]) -> Probed:
    """Ask a node or two of each role; roles whose place is known to be wrong are left out.

    Each folder that is to be shared gets a folder of ours for a moment.
    """
    done = Probed()
    folders = _shared_folders(profile, done)
    try:
        for role in profile.roles:
            _probe_role(profile, role, live=live, slurm=slurm, known=known, folders=folders, done=done)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    done.mismatches = list(dict.fromkeys(done.mismatches))
    return done


def _shared_folders(profile: Profile, done: Probed) -> dict[str, Path]:
    """Make a folder of ours in each folder that nodes are to share; return {key: ours}."""
    storage = profile.storage
    made: dict[str, Path] = {}
    places: dict[str, list[str | None]] = {"storage.scratch": [storage.scratch], "storage.shared": [*storage.shared]}
    for key, folder in ((key, Path(folder)) for key, listed in places.items() for folder in listed if folder):
        kind = filesystem(folder)
        if kind in MEMORY:
            message = f"{folder} is {kind}, the memory of one machine; write a folder that all nodes share"
            done.mismatches.append(Mismatch("F001", key, message))
            continue
        ours = folder / f".afterok-verify-{secrets.token_hex(8)}"
        try:
            ours.mkdir()
            made[f"{key} {folder}"] = ours
        except OSError as error:
            done.mismatches.append(Mismatch("F001", key, f"{folder}, on this machine: {error.strerror}"))
    return made


def filesystem(folder: Path) -> str:
    """Return the type of the filesystem that a folder lies on, "" where nobody tells."""
    real, found = folder.resolve(), ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if real.is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def _probe_role(
    profile: Profile,
    role: str,
    *,
    live: Live,
    slurm: Slurm,
    known: list[Mismatch],
    folders: dict[str, Path],
    done: Probed,
) -> None:
    """Ask the nodes of one role."""
    _, wants = choices(profile, Request(role=role))[0]
    wrong = [fault for fault in known if _concerns(fault.key, role, wants)]
    if wrong:
        done.not_asked.append(f"role {role}: {', '.join(sorted({fault.check for fault in wrong}))} first")
        return
    nodes = min(2, len(live.nodes_of(wants.partition or "")))
    try:
        printed = slurm.run(_command(profile, wants, nodes=nodes, folders=list(folders.values())), LIMIT_S)
    except SlurmError as error:
        done.not_asked.append(f"role {role}: {error}")
        return
    said: dict[str, dict[str, str]] = {}
    for line in printed.splitlines():
        if line.startswith(f"{MARK}\t"):
            _, node, key, value = line.split("\t", 3)
            said.setdefault(node, {})[key] = value
    if len(said) < nodes:
        done.not_asked.append(f"role {role}: {nodes - len(said)} of {nodes} nodes said nothing")
    if image_of(profile, role) and profile.container.runtime == "pyxis":
        done.not_asked.append(f"role {role}: whether its image works: pyxis starts one by srun only")
    for node, answers in said.items():
        done.mismatches += _faults(profile, role, node=node, answers=answers, folders=folders)


def _concerns(key: str, role: str, wants: Resources) -> bool:
    """Return whether a mismatch keeps a role's job from starting where it is to be asked: a short one, of no size."""
    place = f"partitions.{wants.partition}"
    return f"{key}.".startswith((f"roles.{role}.", f"{place}.")) and key.rpartition(".")[2] not in SIZES


def _command(profile: Profile, wants: Resources, nodes: int, folders: list[Path]) -> list[str]:
    """Return the srun of one role: one rank a node, in its partition, with nothing of the caller's environment."""
    env = environment_of(profile, wants.role)
    said = {
        "partition": wants.partition, "account": wants.account, "qos": wants.qos, "constraint": wants.constraint,
        "reservation": wants.reservation, "nodes": nodes, "ntasks-per-node": 1, "time": 5, "immediate": WAIT_S,
        "job-name": "afterok-verify", "chdir": "/", "export": ",".join(env.forward) or "NONE",
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in said.items() if value is not None]
    return ["srun", *options, "/bin/bash", "-c", probe_script(profile, wants.role, folders)]


def probe_script(profile: Profile, role: str, folders: list[Path]) -> str:
    """Return what a node runs: it prints one line `MARK node key value` (tabs between) for each question."""
    wants = choices(profile, Request(role=role))[0][1]
    inside = contained(profile, role, Path("/tmp"), with_gpus=wants.gpus_per_node > 0)
    python = environment_of(profile, role).python or sys.executable
    worker = shlex.join([python, "-m", "jobs.worker", "--help"])
    if inside.before:  # a run brings its code along; here only whether the image has a Python can be asked
        worker += f" && {shlex.join([*inside.before, inside.python, '-c', ''])}"
    local = profile.storage.node_local
    lines = [
        "export PATH",
        'node="${SLURMD_NODENAME:-$(hostname)}"',
        f'say() {{ printf "{MARK}\\t%s\\t%s\\t%s\\n" "$node" "$1" "$2"; }}',
    ]
    for folder in folders:
        path = shlex.quote(str(folder))
        lines.append(f'if [ -d {path} ]; then touch {path}/"$node" && say {path} yes; else say {path} no; fi')
    if local:
        there = f"[ -d {shlex.quote(local)} ] && [ -w {shlex.quote(local)} ]"
        lines.append(f"if {there}; then say node_local yes; else say node_local no; fi")
    lines += [
        'say interfaces "$(ls /sys/class/net 2> /dev/null | tr "\\n" " ")"',
        'say hcas "$(ls /sys/class/infiniband 2> /dev/null | tr "\\n" " ")"',
        "answer=$( (",
        *script_setup(profile, CODE, ranks=1, role=role),
        *inside.exports,
        f"{{ {worker}; }} > /dev/null",
        ") 2>&1 )",  # no && behind it: bash would take -e from the lines within
        'code=$?; if [ $code = 0 ]; then worked=yes; else worked="no, code $code"; fi',
        'say environment "$worked: $(printf "%s" "$answer" | tr "\\n\\t" "  ")"',
    ]
    return "\n".join(lines)


def _faults(
    profile: Profile, role: str, *, node: str, answers: dict[str, str], folders: dict[str, Path]
) -> list[Mismatch]:
    """Return what one node's answers show to be wrong."""
    found = []
    for key, ours in folders.items():
        if answers.get(str(ours)) != "yes" or not (ours / node).exists():
            message = f"{ours.parent} is another folder on {node} than here; write one that all nodes share"
            found.append(Mismatch("F001", key.partition(" ")[0], message))
    if answers.get("node_local") == "no":
        message = f"{profile.storage.node_local}: {node} has no such folder, or it may not be written there"
        found.append(Mismatch("F002", "storage.node_local", message))
    network = profile.network
    interfaces, hcas = answers.get("interfaces", "").split(), answers.get("hcas", "").split()
    for name in (network.interface or "").lstrip("=").split(","):
        if name and name not in interfaces:
            found.append(Mismatch("N001", "network.interface", f"{name}: {node} has {', '.join(interfaces) or 'none'}"))
    for name in (network.hca or "").lstrip("=").split(","):
        begins = name.partition(":")[0]  # the port follows
        if begins and not begins.startswith("^") and not any(hca.startswith(begins) for hca in hcas):
            found.append(Mismatch("N001", "network.hca", f"{name}: {node} has {', '.join(hcas) or 'none'}"))
    worked = answers.get("environment", "no: it said nothing")
    if not worked.startswith("yes") or any(LINE_FAILED.format(key=key) in worked for key in SHELL_KEYS):
        message = f"on {node} the environment of role {role} does not work: {worked[:LONGEST_ANSWER]}"
        found.append(Mismatch("E001", f"roles.{role}", message))
    return found
