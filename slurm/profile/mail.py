"""Which mail Slurm sends of a pipeline's jobs: sbatch's --mail-user and --mail-type, said once for all of them.

Slurm sends mail for each job by itself. So that a pipeline sends few, BEGIN is asked for by the phases that need no
other, END by those that no other needs, and all else by each job. An array is one job to Slurm's mail.
"""

import re

from data_tools.mistake import Problem, nearest
from slurm.profile.schema import Mail, Profile

BEGIN, END, FAIL = "BEGIN", "END", "FAIL"
OF_EACH = (FAIL, "REQUEUE", "INVALID_DEPEND", "TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50")
ALL = (BEGIN, END, FAIL, "REQUEUE", "INVALID_DEPEND")  # sbatch's ALL, but for its burst buffers
TYPES = (BEGIN, END, *OF_EACH, "ALL", "NONE")
UNTYPED = (END, FAIL)  # where only the user is said
OPTIONS = ("mail-user", "mail-type")
# What sbatch takes and a line of a script holds as it is: a user's name, or an address.
ADDRESS = re.compile(r"[A-Za-z0-9._%+=-]+(@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*)?")


def mail_problems(profile: Profile, file: str) -> list[Problem]:
    """Return what is wrong with a profile's `mail`, or says the same a second time."""
    mail, problems = profile.mail, []
    if mail.user is not None and not ADDRESS.fullmatch(mail.user):
        problems.append(Problem(f"{file}: mail.user", f"{mail.user!r} is no address and no user; write me@example.org"))
    for type_ in mail.type:
        if type_ == "ARRAY_TASKS":
            why = "would send a mail for each element; leave it out: an array sends one"
            problems.append(Problem(f"{file}: mail.type", f"{type_} {why}"))
        elif type_ not in TYPES:
            problems.append(Problem(f"{file}: mail.type", f"unknown type {type_!r}{nearest(type_.upper(), TYPES)}"))
    if mail == Mail():
        return problems
    for name, partition in profile.partitions.items():
        problems += [
            Problem(f"{file}: partitions.{name}.extra_sbatch.{key}", "mail says it too, once for all; keep one of them")
            for key in partition.extra_sbatch
            if key.replace("_", "-") in OPTIONS
        ]
    return problems


def mail_options(mail: Mail, first: bool, last: bool, mixed: bool) -> dict[str, str]:
    """Return sbatch's options for one job, {} where it sends no mail.

    Args:
        first: its phase needs no other.
        last: no other phase needs it.
        mixed: Slurm may call the job failed though all went well (a chain of links, a phase that is not needed): that
            it ended is told in place of that it failed.
    """
    said = mail.type or (UNTYPED if mail.user else ())
    asked = {type_ for word in said for type_ in (ALL if word == "ALL" else (word,))} - {"NONE"}
    if mixed and FAIL in asked:
        asked = asked - {FAIL} | {END}
        last = True
    types = [
        type_ for type_ in (BEGIN, END, *OF_EACH)
        if type_ in asked and (first or type_ != BEGIN) and (last or type_ != END)
    ]  # fmt: skip
    if not types:
        return {}
    return {"mail-type": ",".join(types)} | ({"mail-user": mail.user} if mail.user else {})
