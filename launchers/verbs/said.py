"""What verbs print, and how they end.

Imports stay inside the functions of this folder, so that --help and plan are quick.
"""

import json
import sys
from typing import TYPE_CHECKING, Any

from data_tools.base.printing import set_in

if TYPE_CHECKING:
    from launchers.planning.plan import Plan

EXIT_UNFINISHED = 1


def announce(plan: "Plan", quiet: bool = False) -> None:
    """Say which cluster and profile a plan is for, and what leaves the submitter's environment."""
    if not quiet:
        print(plan.cluster.where, flush=True)
    for note in plan.notes:
        tell(note)


def tell(what: object) -> None:
    """Print a message of ours; lines that came with what it quotes are set in, so that none looks like one of ours."""
    print(set_in(f"afterok: {what}"), file=sys.stderr)


def print_json(value: Any) -> int:
    """Print the one JSON object of a verb, and return the exit code of success."""
    print(json.dumps(value, indent=1, default=str))
    return 0
