"""Does what `afterok profile ACTION` says: list, explain, draft and verify profiles."""

import argparse
from typing import TYPE_CHECKING, Any

from data_tools.mistake import EXIT_MISTAKE, Problem, UserMistake, nearest
from launchers.verbs.said import print_json, tell

if TYPE_CHECKING:
    from slurm.detect import Cluster
    from slurm.verify.checks import Mismatch


def do_list(args: argparse.Namespace) -> int:
    """Print each profile by name, with the files that it is made of, the first lowest."""
    from slurm.profile import files

    rows: list[dict[str, Any]] = []
    broken: list[Problem] = []
    for name in files.names():
        try:
            loaded = files.read(name)
        except UserMistake as mistake:
            broken += mistake.problems
            continue
        rows.append(
            {
                "profile": name,
                "kind": loaded.profile.kind,
                "description": loaded.profile.meta.description,
                "files": [layer.file for layer in loaded.layers],
                "admins": [layer.file for layer in loaded.layers if layer.is_admins],
            }
        )
    if args.json:
        return print_json({"profiles": rows, "problems": [str(problem) for problem in broken]})
    from launchers.observe.show import console, table

    shown = [[row["profile"], row["kind"], "\n".join(_marked(row)), row["description"]] for row in rows]
    console().print(table(["profile", "kind", "files, each laid upon those above", "description"], shown))
    for problem in broken:
        tell(problem)
    return 0


def _marked(row: dict[str, Any]) -> list[str]:
    return [f"{file} (an admin's)" if file in row["admins"] else file for file in row["files"]]


def do_explain(args: argparse.Namespace) -> int:
    """Print each value below a key, the file that set it, and what a user who changes it is told."""
    from slurm.detect import find_cluster
    from slurm.profile import files
    from slurm.profile.layers import command_line, leaves
    from slurm.profile.policy import locked_by

    if "=" in args.key:  # no key was given, and argparse took the first override for it
        args.key, args.overrides = "", [args.key, *args.overrides]
    if args.profile:
        loaded = files.read(args.profile, command_line(args.overrides))
    else:
        cluster = find_cluster("auto", args.overrides)
        assert cluster.loaded is not None, "each cluster that was found has its profile's layers"
        loaded = cluster.loaded
    values = leaves(loaded.merged.values)
    chosen = [key for key in values if not args.key or key == args.key or key.startswith(f"{args.key}.")]
    if not chosen:
        raise UserMistake(f"profile {loaded.profile.meta.name} sets no {args.key!r}{nearest(args.key, list(values))}")
    policy = loaded.profile.policy
    rows: list[dict[str, Any]] = [
        {
            "key": key,
            "value": values[key],
            "file": loaded.merged.origin(key),
            "locked": policy.locked[entry] or "by the admin" if (entry := locked_by(policy, key)) else "",
        }
        for key in chosen
    ]
    if args.json:
        return print_json({"profile": loaded.profile.meta.name, "values": rows})
    from launchers.observe.show import console, table

    cells = [[row["key"], _written(row["value"]), row["file"], row["locked"]] for row in rows]
    console().print(table(["key", "value", "set by", "locked"], cells))
    return 0


def _written(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def do_init(args: argparse.Namespace) -> int:
    """Print, or write to a file, a profile drafted from the live cluster."""
    from slurm.client import Slurm
    from slurm.verify.draft import draft, text
    from slurm.verify.live import ask

    slurm = Slurm()
    slurm.ping()
    live = ask(slurm)
    drafted = text(draft(live), live)
    if args.output is None:
        print(drafted, end="")
        return 0
    try:
        with open(args.output, "x") as file:
            file.write(drafted)
    except FileExistsError:
        raise UserMistake(f"{args.output} is there already; remove it, or name another file") from None
    print(f"drafted {args.output}; read it, then: afterok profile verify --profile {args.output}")
    return 0


def do_verify(args: argparse.Namespace) -> int:
    """Print where the profile and its live cluster disagree; exit with EXIT_MISTAKE where they do.

    What passes by (maintenance, nodes that are down) and what refuses nothing is told apart.
    """
    from datetime import datetime

    from launchers.backends.probe import probe
    from slurm.checks import CHECKS, NOTE
    from slurm.detect import find_cluster
    from slurm.verify.checks import mismatches
    from slurm.verify.live import ask

    cluster = find_cluster(args.profile or "auto", args.overrides)
    if cluster.kind != "slurm" or cluster.loaded is None:
        raise UserMistake(f"profile {cluster.profile.meta.name} is of local processes: there is no cluster to verify")
    live = ask(cluster.slurm)
    every = mismatches(cluster.profile, live, datetime.now())
    told = [fault for fault in every if CHECKS[fault.check].severity == NOTE or CHECKS[fault.check].passes_by]
    found = [fault for fault in every if fault not in told]
    not_asked: list[str] = []
    if live.accounts is None:
        not_asked.append("accounts and QOS: the cluster keeps no accounting, or that does not answer")
    if args.no_jobs:
        not_asked.append("compute nodes: --no-jobs")
    else:
        probed = probe(cluster.profile, live=live, slurm=cluster.slurm, known=found)
        found, not_asked = found + probed.mismatches, not_asked + probed.not_asked
    return _report(args, cluster, found, told=told, not_asked=not_asked)


def _report(
    args: argparse.Namespace,
    cluster: "Cluster",
    found: "list[Mismatch]",
    told: "list[Mismatch]",
    not_asked: list[str],
) -> int:
    """Print the mismatches, what is told beside them, and what was not asked; return the exit code."""
    origin = cluster.loaded.merged.origin if cluster.loaded else lambda key: ""
    rows = [{**vars(fault), "file": origin(fault.key)} for fault in found]
    if args.json:
        notes = [vars(fault) for fault in told]
        print_json({"profile": cluster.as_json(), "mismatches": rows, "told": notes, "not_asked": not_asked})
        return EXIT_MISTAKE if found else 0
    print(cluster.where)
    for row in rows:
        print(Problem(f"{row['file']}: {row['key']}", row["message"], row["check"]))
    for fault in told:
        tell(Problem(fault.key, fault.message, fault.check))
    for line in not_asked:
        tell(f"not asked: {line}")
    agrees = "no mismatch in what was asked" if not_asked else "the profile agrees with the cluster"
    print(f"{len(rows)} mismatches" if rows else agrees)
    return EXIT_MISTAKE if found else 0
