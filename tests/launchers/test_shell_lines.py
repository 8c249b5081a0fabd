"""The lines before a phase's command: one order, the admin's under bash's defaults, ours under strict options."""

import subprocess

import pytest

from jobs.retry import Cause
from launchers.backends.shell_lines import MODULE_FILES, script_setup
from launchers.causes.diagnosis import classify
from launchers.causes.evidence import Evidence
from slurm.profile import Env, Meta, Profile

MODULE = "module() { [ $2 != none ] || return 1; export STEPS=$STEPS:module.$2; }\n"
CONDA = """\
# the shape of conda's activate.d scripts, which read unset variables and hold conditions that fail
if [ "${CONDA_BUILD:-0}" = "1" ]; then :; fi
export CONDA_BACKUP_ADDR2LINE="$ADDR2LINE"
[ -n "$CONDA_PREFIX" ] && export OLD=$CONDA_PREFIX
false | cat
export STEPS="$STEPS:conda"
"""


def bash(tmp_path, lines, env=None):
    script = tmp_path / "script"
    script.write_text("\n".join(["#!/bin/bash", *lines]))
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/root", "MODULESHOME": str(tmp_path), **(env or {})}
    return subprocess.run(["bash", script], capture_output=True, text=True, env=environment)


def run(tmp_path, after="echo $STEPS", before=(), sent=None, **env):
    (tmp_path / "conda.sh").write_text(CONDA)
    lines = script_setup(Profile(meta=Meta(name="it's"), env=Env(**env)), tmp_path / "code", 1)
    return bash(tmp_path, [*before, *lines, after], sent)


def test_the_order_is_forward_set_modules_setup_ours(tmp_path):
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text(MODULE)  # as Environment Modules has it: found where MODULESHOME says
    done = run(
        tmp_path,
        'echo "$STEPS" $PYTHONPATH',
        sent={"STEPS": "forward"},
        set={"A": "set"},
        modules=["cuda", "mpi"],
        setup=["export STEPS=$STEPS:setup.$A PYTHONPATH=theirs", f"source {tmp_path}/conda.sh"],
    )
    assert (done.stdout, done.stderr) == (f"forward:module.cuda:module.mpi:setup.set:conda {tmp_path}/code\n", "")
    assert MODULE_FILES[0].endswith("/init/bash")


@pytest.mark.parametrize("line", [
    "export LD_LIBRARY_PATH=/opt/x/lib:$LD_LIBRARY_PATH", "grep nothing /etc/hostname", "echo hi | grep -q no", "false",
    "source CONDA", "if true; then\nfalse\nfi", "f() { false; true; }\nf", "[ -e /nowhere ] && true", "IFS=,", "cd /",
    "set -euo pipefail", "set -f", "trap 'echo mine' EXIT", "trap '' ERR",
])  # fmt: skip
def test_lines_of_the_admin_run_as_in_any_shell_and_ours_run_on_strictly(tmp_path, line):
    done = run(
        tmp_path,
        'set -o | grep -E "errexit|nounset|pipefail" | tr -d " \\t"; echo "${IFS-unset}"',
        setup=line.replace("CONDA", f"{tmp_path}/conda.sh").split("\n"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("mine\n") == "errexiton\nnounseton\npipefailon\nunset\n"


@pytest.mark.parametrize("setup, told", [
    (["false"], "false"), (["source /nowhere"], "source /nowhere"),
    (["true", "grep -q @ /dev/null"], "grep -q @ /dev/null"),
])  # fmt: skip
def test_a_command_that_fails_is_told_in_the_log_and_the_job_goes_on(tmp_path, setup, told):
    done = run(tmp_path, "echo on", setup=setup)
    told_lines = [line for line in done.stderr.splitlines() if line.startswith("afterok: ")]
    assert done.stdout == "on\n"
    assert told_lines == [f"afterok: profile it's: a command of env.setup ended with code 1: {told}"]


@pytest.mark.parametrize("env, code, where, told", [
    ({"setup": ["exit 3"]}, 3, "env.setup", "exit 3"),
    ({"setup": ["set -eu", "echo $NOPE"]}, 1, "env.setup", "echo $NOPE"),
    ({"setup": ["if then"]}, 2, "env.setup", "the first line"),
    ({"setup": ["set -e", "false"]}, 1, "env.setup", "false"),
    ({"modules": ["none"]}, 1, "env.modules", "module load none"), ({"setup": ["echo 'open"]}, 2, "env.setup", "first"),
])  # fmt: skip
def test_a_job_that_ends_there_says_where_and_why_reads_it(tmp_path, env, code, where, told):
    done = run(tmp_path, "echo on", before=[MODULE], **env)
    assert done.returncode == code and "on\n" not in done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"afterok: profile it's: {where} ended the job with code {code}, at") and told in line
    found = classify(Evidence("sft", exit_code=code, log=done.stderr, log_path="/r/sft/logs/a1.0.out"))
    assert (found.cause, where in found.what) == (Cause.ENVIRONMENT, True)
    assert found.evidence.startswith("afterok: profile it's:") and "/r/sft/logs/a1.0.out" in found.remedy


def test_without_a_module_command_the_log_says_so(tmp_path):
    done = run(tmp_path, modules=["cuda"])
    assert done.returncode == 127 and "env.modules ended the job with code 127, at: module load cuda" in done.stderr


def test_a_profile_without_lines_of_its_own_has_none_of_this_in_its_script(tmp_path):
    lines = script_setup(Profile(), tmp_path, 1)
    assert len(lines) == 3 and not any("afterok" in line for line in lines)
