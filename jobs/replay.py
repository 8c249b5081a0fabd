"""One rollout of a grpo phase drawn again, alone, from what the run left.

python -m jobs.replay RUN PHASE STEP/PROMPT/SAMPLE
"""

import runpy

if __name__ == "__main__":
    runpy.run_path(__file__.rsplit("jobs", 1)[0] + "data_tools/own_packages.py")["hold"]()

import argparse
import sys
from pathlib import Path
from typing import Any

from data_tools.base.printing import clean_streams, json_text
from data_tools.mistake import EXIT_MISTAKE, UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.kind import find_kind
from jobs.schema.references import substitute
from jobs.schema.typed import typed_config


def main() -> int:
    """Print the rollout drawn again; return the exit code."""
    with clean_streams():
        return _main()


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.replay", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("phase")
    parser.add_argument("rollout", metavar="STEP/PROMPT/SAMPLE")
    args = parser.parse_args()
    try:
        drawn = replay(RunFolder(args.run.absolute()), args.phase, args.rollout)
    except UserMistake as mistake:
        print(f"afterok: {mistake}", file=sys.stderr)
        return EXIT_MISTAKE
    print(json_text(drawn))
    print(verdict(drawn), file=sys.stderr)
    return 0


def replay(run: RunFolder, name: str, rollout: str) -> dict[str, Any]:
    """Draw the rollout STEP/PROMPT/SAMPLE of the grpo phase `name` again, and compare it with what was recorded.

    Raises:
        UserMistake: no such phase or rollout, or what the phase began from is not sealed.
    """
    numbers = rollout.split("/")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise UserMistake(f"--replay {rollout}: write STEP/PROMPT/SAMPLE, three numbers as in samples/step_N.jsonl")
    phases = run.frozen(run.newest_submission())
    if name not in phases or phases[name].uses != "grpo":
        known = ", ".join(phase.name for phase in phases.values() if phase.uses == "grpo") or "none"
        raise UserMistake(f"{name!r} is no grpo phase of {run.path}: those are {known}")
    phase = phases[name]
    folders = {}
    for need in phase.needs:
        seal = run.seal(need, phases[need].key)
        if seal is None:
            raise UserMistake(f"{need}, which {name} began from, is not sealed")
        folders[need] = str(seal.folder)
    kind = find_kind(phase.uses)
    assert kind is not None
    from megatron_ext.entrypoints import grpo

    config = typed_config(kind, substitute(phase.settings, folders))
    return grpo.replay(config, run.artifact(phase).folder, *map(int, numbers))


def verdict(drawn: dict[str, Any]) -> str:
    """Say in one line whether the tokens are the same."""
    if not drawn["differs"]:
        return f"afterok: the same {drawn['tokens']} tokens; log-probs within {drawn['logprob_difference']:.1e}"
    where = f"token {drawn['same_tokens'] + 1} of {drawn['tokens']} differs"
    margin = (
        "the draw's margin is unknown" if drawn["margin"] is None else f"the draw's margin was {drawn['margin']:.1e}"
    )
    return f"afterok: {where}: recorded {drawn['recorded_token']}, drawn again {drawn['replayed_token']}; {margin}"


if __name__ == "__main__":
    sys.exit(main())
