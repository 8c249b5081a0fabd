"""Does what the verbs say that show what came of a run: report, plot and path; and completion."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.base.printing import as_typed, count_of
from launchers.verbs.said import print_json

if TYPE_CHECKING:
    from launchers.report.contents import Contents

WATCH_S = 10  # between two reports of a run that goes on, and how often a browser loads it again


def do_report(args: argparse.Namespace) -> int:
    """Write the report of a run; with --watch, again and again until nothing is active."""
    from launchers.observe.runs import find_run
    from launchers.report.contents import contents_of
    from launchers.report.page import write_report

    run = find_run(args.run)
    path = (args.output or run.report).absolute()
    contents = contents_of(run)
    try:
        while args.watch and (contents.status.active or contents.status.may_answer):
            write_report(contents, path, WATCH_S)
            if not args.json:
                print(f"{time.strftime('%H:%M:%S')} {as_typed(path)}: {_sealed(contents)}", flush=True)
            time.sleep(WATCH_S)
            contents = contents_of(run)
    except KeyboardInterrupt:  # it only stops looking
        pass
    size = write_report(contents, path)  # one that waits for no other
    if args.json:
        return print_json(_told(contents, path, size))
    print(f"{as_typed(path)}: {_sealed(contents)}, {size:,} bytes; open it in a browser")
    for note in contents.notes:
        print(f"  {note}", file=sys.stderr)
    return 0


def do_plot(args: argparse.Namespace) -> int:
    """Draw the curves of a run into a file."""
    from launchers.observe.runs import run_and_phases
    from launchers.report.curves import curves_of
    from launchers.report.figure import chosen, draw

    run, names = run_and_phases(args.run, args.phases)
    phases = run.frozen(run.newest_submission()).values()
    curves = [found for phase in phases if (found := curves_of(run, phase)) is not None]
    charts = chosen(curves, names, args.metric)
    path = (args.output or run.curves).absolute()
    size = draw(charts, path)
    notes = [note for each in curves for note in each.notes]
    if args.json:
        drawn = [{"phase": phase, "metric": chart.metric} for phase, chart in charts]
        return print_json({"run": str(run.path), "file": str(path), "bytes": size, "charts": drawn, "notes": notes})
    of = ", ".join(dict.fromkeys(phase for phase, _ in charts))
    print(f"{as_typed(path)}: {count_of(len(charts), 'curve')} of {of}")
    for note in notes:
        print(f"  {note}", file=sys.stderr)
    return 0


def do_path(args: argparse.Namespace) -> int:
    """Print where the sealed result of a phase lies."""
    from launchers.observe.runs import find_run
    from launchers.observe.sealed import find_sealed, readable

    run = find_run(args.run)
    phase, seal = find_sealed(run, args.phase)
    place = readable(run, phase.name, seal)
    if args.json:
        files = {name: entry["size"] for name, entry in seal.content["files"].items()}
        told = {"run": str(run.path), "phase": phase.name, "kind": phase.uses, "key": phase.key}
        return print_json({**told, "path": str(seal.folder), "link": str(place), "files": files})
    print(place)
    return 0


def do_completion(args: argparse.Namespace) -> int:
    """Print the completion of the command line for a shell."""
    from launchers.completion import script_for

    print(script_for(args.shell, args.parser))
    return 0


def _sealed(contents: "Contents") -> str:
    done = sum(phase.state == "COMPLETED" for phase in contents.phases)
    return f"{contents.state}, {done} of {count_of(len(contents.phases), 'phase')} sealed"


def _told(contents: "Contents", path: Path, size: int) -> dict[str, Any]:
    return {
        "run": contents.status.run,
        "report": str(path),
        "bytes": size,
        "state": contents.state,
        "phases": [phase.phase for phase in contents.phases],
        "curves": {each.phase: [chart.metric for chart in each.charts] for each in contents.curves},
        "groups": {each.phase: [step.step for step in each.steps] for each in contents.groups},
        "evaluations": contents.scores.names if contents.scores else [],
        "notes": contents.notes,
    }
