"""What `sbatch --export=NAME=VALUE,…` gave to a job, and what of it was lost on the way.

Slurm tells the job its --export as it was typed, in SLURM_EXPORT_ENV. It parts it at the commas, though not within
single or double quotes, and leaves these in the value; what has no "=" is the name of a variable of the submitter's,
and where there is none Slurm says nothing. With ALL, a variable of the submitter's shell beats the one that was typed.
(Seen with 22.05: `--export=A=x,y` gives A the value x, and `--export=A="x,y"` the value "x,y", quotes included.)
"""

import re
from collections.abc import Collection, Iterator, Mapping

from data_tools.mistake import Problem, nearest

VARIABLE = "AFTEROK_EXPORT"  # the same, kept by a door (slurm/door.sh): SLURM_EXPORT_ENV may be of another's script
WHOLE = ("ALL", "NONE", "NIL")  # words of --export that are no variables
# Variables that mean something to Slurm, Python, Hugging Face's caches or a shell, and no value of a pipeline.
MEANT_ELSEWHERE = re.compile(
    r"(AFTEROK|SLURM|SBATCH|SACCT|SQUEUE|PYTHON|LC|HF|XDG|CONDA|MODULE)\w*"
    r"|PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|http_proxy|https_proxy|no_proxy"
)
PART = re.compile(r"""(?:[^,'"]|'[^']*'|"[^"]*"|['"])+""")


def parts(typed: str) -> Iterator[tuple[str, str | None]]:
    """Yield (name, value as Slurm gives it) of each part of an --export; the value of a bare name is None."""
    for part in PART.findall(typed):
        name, assigned, value = part.partition("=")
        if name not in WHOLE:
            yield name, value if assigned else None


def _bare(value: str) -> str:
    """Return a value without the quotes around it."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def unquoted(typed: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return {name: value} of the variables whose quotes were there for Slurm alone: they held a comma together."""
    return {
        name: _bare(value)
        for name, value in parts(typed)
        if value and "," in value and environment.get(name) == value != _bare(value)
    }


def lost(typed: str, environment: Mapping[str, str]) -> list[Problem]:
    """Return what of an --export did not reach this job as it was typed."""
    problems = []
    given = list(parts(typed))
    for name, value in given:
        if value is None:
            if name not in environment:
                problems.append(
                    Problem(
                        f"--export={typed}",
                        f"{name.strip()!r} is no variable of the environment that sbatch was called in; a value with "
                        f"commas is quoted once more: --export='NAME=\"a,b\"'",
                    )
                )
        elif environment.get(name) not in (value, _bare(value)) and not MEANT_ELSEWHERE.fullmatch(name):
            why = f"with ALL, the one of your shell counts; `unset {name}` there, or leave ALL out"
            if [other for other, _ in given].count(name) > 1:
                why = "it is said more than once"
            problems.append(Problem(f"--export={typed}", f"{name} is {environment.get(name)!r} here: {why}"))
    return problems


def unknown(typed: str, declared: Collection[str], forwarded: Collection[str]) -> list[Problem]:
    """Return the variables that were given values and mean nothing: no such one is declared or forwarded."""
    return [
        Problem(
            f"--export={typed}",
            f"the pipeline has no variable {name}{nearest(name, list(declared))}; jobs get what the profile "
            "forwards (env.forward), and nothing else of --export",
        )
        for name, value in parts(typed)
        if value is not None and name not in declared and name not in forwarded
        and not MEANT_ELSEWHERE.fullmatch(name)
    ]  # fmt: skip
