"""Environment variables that set values of a pipeline, where its file declares them.

    variables: {SFT_RECIPE: params.recipe, DOLCI_STOP: params.dolci_stop}

The submitter reads them: plan, submit, run and resubmit. Each that is set is an override, `params.recipe=$SFT_RECIPE`,
and a submission records it as such with its name; a job reads none. An override on the command line beats it. One that
is empty counts as not set, as in a script's ${SFT_RECIPE:-default}. What stands before the first underscore of a
declared name is a prefix of the pipeline's: a variable of that prefix that is not declared is an error, so that no
misspelt one is lost. That is not so of prefixes of others (SHARED).

A secret never comes this way, since overrides are written down: names that say so are refused here, and those of the
profile's secrets by the planner.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.mistake import nearest
from jobs.schema.problems import Problems

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SHARED = ("HF_",)  # prefixes that programs of others have too, such as HF_HOME: those that are not declared are theirs
TAKEN = ("SLURM", "SBATCH", "SRUN", "AFTEROK")  # prefixes of variables that Slurm and afterok set themselves
SECRET = ("TOKEN", "KEY", "APIKEY", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS")


@dataclass(frozen=True)
class Variable:
    """A variable that is set, and the override that it stands for."""

    name: str
    key: str  # dotted, as in an override
    value: str  # YAML, as in an override
    beaten_by: str = ""  # the override of the command line that decides in its place
    recorded: bool = False  # whether an earlier submission had it, and this environment does not

    @property
    def override(self) -> str:
        """Return the override as it would be typed."""
        return f"{self.key}={self.value}"

    def __str__(self) -> str:
        whose = "that an earlier submission had" if self.recorded else "of your environment"
        said = f"variable {self.name} {whose} sets {self.override}"
        return f"{said}, but {self.beaten_by} of the command line counts" if self.beaten_by else said


def declared(written: Any, problems: Problems) -> dict[str, str]:
    """Return {variable: dotted key} of what a pipeline file declares; what is wrong with it is noted."""
    if not isinstance(written, dict):
        problems.note("variables", f"{written!r} is not a mapping of variables to dotted keys")
        return {}
    good: dict[str, str] = {}
    for name, key in written.items():
        where, words = f"variables.{name}", str(name).upper().split("_")
        if not NAME.fullmatch(str(name)):
            problems.note(where, f"{name!r} is not the name of an environment variable")
        elif not isinstance(key, str) or not all(key.split(".")):
            problems.note(where, f"{key!r} is no dotted key, such as params.recipe")
        elif words[0] in TAKEN:
            problems.note(where, f"variables of {words[0]}_ have a meaning already; give it another name")
        elif secret := next((word for word in words if word in SECRET), ""):
            problems.note(
                where,
                f"{secret} says that it is a secret, and overrides are written down; "
                "a secret reaches the jobs by the profile's env.secrets",
            )
        elif other := next((other for other, its in good.items() if _overlap(its, key)), ""):
            problems.note(where, f"{key} is set by {other} already ({good[other]}); leave one of them out")
        else:
            good[str(name)] = key
    return good


def _overlap(one: str, other: str) -> bool:
    """Return whether two dotted keys are one, or one lies below the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def given(declared: Mapping[str, str], environment: Mapping[str, str], problems: Problems) -> list[Variable]:
    """Return the declared variables that are set, as declared; others of their prefixes are noted."""
    prefixes = {prefix_of(name) for name in declared if prefix_of(name)} - {*SHARED}
    for name in sorted(environment):
        if environment[name] and name not in declared and prefix_of(name) in prefixes:
            problems.note_variable(
                name,
                f"the pipeline has no variable of this name{nearest(name, list(declared))}; "
                f"`unset {name}` where it is meant for something else",
            )
    return [Variable(name, key, environment[name]) for name, key in declared.items() if environment.get(name)]


def prefix_of(name: str) -> str:
    """Return a name through its first underscore, "" where it has none."""
    word, underscore, _ = name.partition("_")
    return word + underscore if word and underscore else ""


def beaten(variable: Variable, overrides: list[str]) -> str:
    """Return the last override that writes where a variable does, above it or below it; "" where none does."""
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if _overlap(key, variable.key):
            return override
    return ""
