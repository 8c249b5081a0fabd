"""Does what `afterok scores` says."""

import argparse

from data_tools.mistake import UserMistake
from launchers.verbs.said import print_json


def do_scores(args: argparse.Namespace) -> int:
    """Show the evaluations of a run side by side, and draw them where a file is named."""
    from data_tools.evaluations.plot import svg_of
    from launchers.observe.runs import run_and_phases
    from launchers.observe.scores import print_table, scores

    found = scores(*run_and_phases(args.run, args.phases))
    if args.svg:
        try:
            args.svg.write_text(svg_of(found), encoding="utf-8")
        except OSError as error:
            raise UserMistake(
                f"--svg {args.svg}: {error.strerror}; name a file in a folder that can be written"
            ) from None
    if args.json:
        return print_json(found.as_json())
    print_table(found)
    return 0
