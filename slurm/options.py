"""What the toolkit sets itself: options of sbatch and srun, and variables, that a profile must not set a second time.

Names: `man sbatch` and `man srun` of Slurm 22.05, short forms and synonyms included. Slurm takes the last of several,
and any unambiguous beginning of a long name, so that `outp` would be `output`.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from data_tools.mistake import Problem
from slurm.profile.environments import environments
from slurm.profile.resolve import time_problems
from slurm.profile.schema import VARIABLE, Profile

_OWN_LOG = "each element's log has its place in the run, where `afterok logs` and `why` read it"
_SAYS_ROLE = "say it in the role, or in a phase's resources"
_PARTITION = "say it as the partition's own key"
_TRANSACTION = "it belongs to the submission, which is built on it"
_ANOTHER_WAY = "a job's size is its role's nodes, ranks_per_node, cpus_per_task, gpus_per_node and mem_gib"

# option -> where it is said instead
RESERVED: Mapping[str, str] = {
    **dict.fromkeys(("output", "o", "error", "e", "open-mode"), _OWN_LOG),
    **dict.fromkeys(("time", "t"), "say it as the role's time, or the partition's max_time"),
    **dict.fromkeys(("nodes", "N", "cpus-per-task", "c", "gpus-per-node", "mem"), _SAYS_ROLE),
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node"), "say it as the role's ranks_per_node"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-gpu", "ntasks-per-socket", "gpus", "G", "gpus-per-task",
                     "gpus-per-socket", "cpus-per-gpu", "mem-per-cpu", "mem-per-gpu"), _ANOTHER_WAY),
    **dict.fromkeys(("partition", "p"), "say it in the role"),
    **dict.fromkeys(("account", "A"), f"{_PARTITION}, account"),
    **dict.fromkeys(("qos", "q"), f"{_PARTITION}, qos"),
    **dict.fromkeys(("constraint", "C"), f"{_PARTITION}, constraint"),
    **dict.fromkeys(("requeue", "no-requeue"), f"{_PARTITION}, requeue"),
    **dict.fromkeys(("export", "export-file"), "name variables in env.forward or env.set"),
    "signal": "say it as signal_lead_s",
    **dict.fromkeys(("array", "a"), "a phase says it as array and throttle"),
    **dict.fromkeys(("dependency", "d", "P", "kill-on-invalid-dep", "hold", "H", "job-name", "J", "parsable",
                     "wait", "W", "test-only", "wrap", "quiet", "Q", "help", "h", "usage", "version", "V", "uid", "gid",
                     "cluster-constraint", "clusters", "cluster", "M", "chdir", "D", "workdir"), _TRANSACTION),
}  # fmt: skip


# All long options of sbatch, 22.05 to 24.11: of another name it may be that a plugin of the site knows it, but a mere
# beginning of one of these would mean it, unseen by whoever looks for the option.
LONG_OPTIONS = frozenset(
    """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments constraint
container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid gpu-bind
gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags help hint hold ignore-pbs input job-name
kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice
no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket
oom-kill-step open-mode output overcommit oversubscribe parsable partition power prefer priority profile propagate qos
quiet reboot requeue reservation resv-ports segment share signal sockets-per-node spread-job spread-segments stepmgr
switches tasks-per-node test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid usage
use-min-nodes verbose version wait wait-all-nodes wckey wrap workdir
""".split()
)
TIME_MIN = "time-min"

SRUN_RESERVED: Mapping[str, str] = {
    **{option: RESERVED[option] for option in (
        "output", "o", "error", "e", "open-mode", "time", "t", "nodes", "N", "cpus-per-task", "c", "ntasks", "n",
        "ntasks-per-node", "tasks-per-node", "partition", "p", "account", "A", "qos", "q", "constraint", "C",
        "dependency", "d", "job-name", "J", "chdir", "D", "help", "h", "usage", "version", "V")},
    "mpi": "say it as srun.mpi",
    **dict.fromkeys(("export", "unbuffered", "u", "kill-on-bad-exit", "K", "pty"), "it is how a phase's ranks are run"),
}  # fmt: skip
VARIABLES: Mapping[str, str] = {
    **dict.fromkeys(
        ("PYTHONPATH", "PYTHONSAFEPATH"),
        "jobs run the code that was frozen when they were submitted; install what they need into env.python",
    ),
    **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT"), "they are each job's own; network.port_range bounds the port"),
    **dict.fromkeys(("PYTHONUNBUFFERED", "SLURM_EXPORT_ENV", "SUBMITIT_EXECUTOR"), "it is how a phase's ranks are run"),
}

READ_ONLY = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID")  # bash(1): `export UID=5` ends a script


def own_setting_problems(profile: Profile, file: str) -> list[Problem]:
    """Return what of a profile `file` sets something that the toolkit sets itself.

    `plan` asks, so that a frozen profile of before still loads."""
    problems = []
    for name, partition in profile.partitions.items():
        problems += option_problems(partition.extra_sbatch, f"{file}: partitions.{name}.extra_sbatch")
    problems += _srun_problems(profile, file)
    problems += [
        Problem(f"{file}: {place}.{key}.{name}", f"afterok sets {name} itself: {VARIABLES[name]}")
        for place, env in environments(profile)
        for key, names in (("set", list(env.set)), ("forward", env.forward))
        for name in names
        if name in VARIABLES
    ]
    problems += [
        Problem(f"{file}: {place}.set.{name}", why)
        for place, env in environments(profile)
        for name in env.set
        if (why := _why_not_exported(name, env.set[name]))
    ]
    return problems


def _srun_problems(profile: Profile, file: str) -> list[Problem]:
    """Return the words of a profile for srun that afterok says itself, or that would be its command."""
    problems: list[Problem] = []
    in_srun = {"srun.extra": profile.srun.extra}
    if profile.container.runtime == "pyxis":  # its words are srun's too
        in_srun["container.args"] = profile.container.args
    for key, words in in_srun.items():
        before = ["", *words]
        problems += [
            Problem(f"{file}: {key}", f"srun would take {word!r} for the command that it runs; write --OPTION=VALUE")
            for word, last in zip(words, before, strict=False)
            if word == "--" or (not word.startswith("-") and ("=" in last or not last.startswith("-")))
        ]
    for key, word in ((key, word) for key, words in in_srun.items() for word in words):
        option = word.lstrip("-").partition("=")[0]
        option = option[:1] if word[1:2] != "-" else option  # -oFILE
        instead = SRUN_RESERVED.get(option) or _begins(option, SRUN_RESERVED)
        if word.startswith("-") and instead:
            problems.append(Problem(f"{file}: {key}", f"afterok sets srun's {_dashed(option)} itself: {instead}"))
    return problems


def _why_not_exported(name: str, value: str) -> str:
    """Return why no shell exports a variable, "" where one does."""
    if not VARIABLE.fullmatch(name):
        return "not the name of a variable; a name has letters, digits and _, and does not begin with a digit"
    if name in READ_ONLY:
        return f"bash lets nobody set {name}; take it out"
    return "its value has a NUL byte, which no variable can hold" if "\0" in value else ""


def option_problems(extra: Mapping[str, str], where: str) -> list[Problem]:
    """Return what is wrong with a partition's `extra_sbatch`; `where` is its place in the profile."""
    problems = []
    for key, value in extra.items():
        at, name = f"{where}.{key}", key.replace("_", "-")
        instead = RESERVED.get(name) or _begins(name, RESERVED)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            bare = name.strip("-").partition("=")[0]
            what = (
                f"afterok sets it: {RESERVED[bare]}" if bare in RESERVED else "write the bare name, such as exclusive"
            )
            problems.append(Problem(at, f"{key!r} is no name of an sbatch option; {what}"))
        elif instead:
            problems.append(Problem(at, f"afterok sets sbatch's {_dashed(name)} itself: {instead}"))
        elif re.search(r"[\n\r\0]", value):
            problems.append(Problem(at, f"{value!r} is more than one line; an option's value is one"))
        elif len(name) == 1:
            problems.append(Problem(at, f"write the long form of sbatch's {_dashed(name)}"))
        elif name not in LONG_OPTIONS and (longer := [known for known in LONG_OPTIONS if known.startswith(name)]):
            problems.append(Problem(at, f"write the whole name of the option: {' or '.join(sorted(longer))}"))
        elif name == "gres" and "gpu" in value:
            problems.append(Problem(at, f"{value!r} has GPUs, which afterok counts: say it as the partition's gres"))
        elif name == TIME_MIN:
            problems += [replace(problem, check="") for problem in time_problems(at, value)]
    return problems


def _begins(name: str, reserved: Mapping[str, str]) -> str:
    """Return where the option is said that a shortened name begins, "" for one that begins none."""
    if len(name) < 2:
        return ""
    return next((instead for option, instead in reserved.items() if option.startswith(name)), "")


def _dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"
