"""Run an entrypoint without a pipeline:

    torchrun --nproc-per-node 2 -m megatron_ext.entrypoints.sft --config sft.yaml --out DIR [--keep DIR] [key=value ...]

The YAML file holds the fields of the entrypoint's Config. Rank 0 prints the facts as JSON. Exit code 2 and one line
for a user's mistake.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.base import declared
from data_tools.base.yaml_loaders import read_file, read_typed, read_values
from data_tools.mistake import UserMistake

LINE_S = 5.0  # between two progress lines


class Lines:
    """Prints progress as plain lines, one every few seconds."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - self.last >= LINE_S:
            self.last = now
            print(f"{done:,}/{total:,} {unit}  {note}".rstrip(), flush=True)


def main(config_class: type, run: Callable[..., dict[str, Any]], check: Callable[..., list]) -> int:
    """Read the command line, check the config, and run the entrypoint on this rank. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the fields of Config")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not hold anything yet")
    parser.add_argument("--keep", type=Path, help="checkpoints and metrics, kept between attempts (default OUT.keep)")
    parser.add_argument("overrides", nargs="*", help="dotted key=value")
    arguments = parser.parse_args()
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        config = read_config(config_class, arguments.config, arguments.overrides)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        problems = declared.check_with(config, lambda legal: check(legal, world))
        if problems:
            raise UserMistake(problems)
        out = arguments.out
        keep = arguments.keep or out.with_name(out.name + ".keep")
        if first:
            check_folders(out, keep)
            out.mkdir(parents=True, exist_ok=True)
            keep.mkdir(parents=True, exist_ok=True)
        facts = run(config, out, keep, Lines() if first else (lambda *_, **__: None))
    except UserMistake as mistake:
        if first or getattr(mistake, "of_some_ranks", False):
            print(mistake, file=sys.stderr)
        return mistake.exit_code
    if first:
        print(json.dumps(facts, indent=1, sort_keys=True))
    return 0


def check_folders(out: Path, keep: Path) -> None:
    """Raise UserMistake where `out` holds something, or a file lies where one of the two has to be made."""
    for folder in (out, keep):
        if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
            raise UserMistake(f"{folder} cannot be made: {file} is a file; name another folder")
    if out.exists() and any(out.iterdir()):
        raise UserMistake(f"{out} is not empty: name a folder that does not exist yet")


def read_config(config_class: type, path: Path, overrides: list[str]) -> Any:
    """Return the typed config of a YAML file. Raise UserMistake for unknown keys and wrong types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        written = read_values(read_file(path))
        if not isinstance(written, dict | None):
            raise UserMistake(f"{path}: settings are a mapping, and this is {written!r:.60}")
        given = OmegaConf.create(written or {})
        for override in overrides:  # values are read as those of a pipeline's overrides
            key, separator, text = override.partition("=")
            if not separator:
                raise UserMistake(f"{override!r}: write it as dotted.key=value")
            OmegaConf.update(given, key, read_typed(text))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), given))
    except OSError as error:
        raise UserMistake(f"{path}: {error.strerror or error}") from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserMistake(f"{path}: {' '.join(str(error).split())}") from None
