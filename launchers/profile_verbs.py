"""Does what `afterok profile ACTION` says: show which profiles there are, and which file set a value."""

import argparse
from typing import Any

from data_tools.mistake import UserMistake, nearest
from launchers.verbs import print_json, tell


def do_list(args: argparse.Namespace) -> int:
    """Print each profile by name, with the files that it is made of, the first lowest."""
    from slurm.profile import files

    rows, broken = [], []
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
    rows = [
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
