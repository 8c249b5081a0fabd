"""Builds the shell lines before a phase's command, which the batch script runs outside any container.

The order is that of slurm.profile.schema.Env: set, modules, setup, ours (`forward` came with the job, secrets are read
by the worker). The admin's lines run under bash's default options and ours under strict ones: conda's activation reads
unset variables, and a `grep` without a match is no failure of a line that goes on.
"""

import shlex
from pathlib import Path

from launchers.causes.log_lines import ENDED
from slurm.profile.environments import environment_of, site_variables
from slurm.profile.schema import Env, Profile

STRICT, DEFAULTS = "set -euo pipefail", "set +euo pipefail"
LINE_FAILED = "a command of {key} ended with code"  # how the log tells of a line that did not end the job
# Where Environment Modules and Lmod have what defines `module`, in packages and from source.
MODULE_FILES = (
    "${MODULESHOME:-/usr/share/modules}/init/bash", "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash",
    "/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh", "/etc/profile.d/z00_lmod.sh",
)  # fmt: skip


def script_setup(profile: Profile, code: Path, ranks: int, role: str = "") -> list[str]:
    """Return all lines before the command; `ranks` of the whole phase, `code` its snapshot."""
    low, high = profile.network.port_range
    env = environment_of(profile, role)
    lines = [
        STRICT,
        # --export=NONE leaves a job no HOME and an unexported PATH; it speaks of sbatch, not of our srun.
        'export SLURM_EXPORT_ENV=ALL PATH HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}"',
    ]
    variables = site_variables(profile) | env.set
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if env.modules_init or env.modules or env.setup or profile.hooks.prolog:
        lines += [DEFAULTS, *_admins_lines(env, profile), f"unset IFS; {STRICT}"]
    lines += [f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1"]
    if ranks > 1:
        # An address, not a name: node names need not resolve, and NodeAddr may itself be one.
        lines += [
            'node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "address=$(scontrol show node \"$node\" --oneliner | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
            "resolved=$(getent ahostsv4 \"${address:-$node}\" | awk 'NR == 1 {print $1}' || true)",
            'export MASTER_ADDR="${resolved:-${address:-$node}}"',
            f"export MASTER_PORT=$(({low} + SLURM_JOB_ID % {high - low + 1}))",
        ]
    return lines


def _admins_lines(env: Env, profile: Profile) -> list[str]:
    """Return modules, setup and prolog, and what tells the log which command of theirs failed or ended the job.

    The two traps take no part in what the lines do: functions and sourced files do not see the one, and the other goes
    with the lines unless they set one of their own.
    """
    said = shlex.quote(f"afterok: profile {profile.meta.name}:")
    lines = [
        f'afterok_say() {{ echo {said} "$@" >&2; }}',
        "afterok_now=env.modules",
        f"""trap 'afterok_code=$?; afterok_say "$afterok_now {ENDED} $afterok_code, """
        """at or after: $BASH_COMMAND"' EXIT""",
    ]
    if env.modules_init:
        lines.append(_or_end(f". {shlex.quote(env.modules_init)}", "env.modules_init"))
    elif env.modules:
        files = " ".join(f'"{file}"' for file in MODULE_FILES)
        lines.append(
            f"command -v module > /dev/null || for file in {files}; do "
            'if [ -r "$file" ]; then . "$file"; break; fi; done'
        )
    lines += [_or_end(f"module load {shlex.quote(module)}", "env.modules") for module in env.modules]
    for key, written in (("env.setup", env.setup), ("hooks.prolog", profile.hooks.prolog)):
        if not written:
            continue
        lines += [
            f"afterok_now={key}",
            "trap 'afterok_code=$?; [ ${#BASH_SOURCE[@]} -gt 1 ] || "
            f"""afterok_say "{LINE_FAILED.format(key=key)} $afterok_code: $BASH_COMMAND"' ERR""",
            ": the first line",
            *written,
            "trap - ERR",
        ]
    return [*lines, '[[ "$(trap -p EXIT)" != *afterok_now* ]] || trap - EXIT']


def _or_end(command: str, key: str) -> str:
    """Return a command of a profile's key that ends the job where it fails, and says so."""
    return (
        f"{command} || {{ afterok_code=$?; trap - EXIT; "
        f"afterok_say {key} {ENDED} $afterok_code, at: {shlex.quote(command)}; exit $afterok_code; }}"
    )
