"""The pipeline that a run's newest submission was made of, read again with further overrides and variables."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_tools.base import durable
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.pipeline import Pipeline, load_pipeline


def recorded_pipeline(run: RunFolder, overrides: Sequence[str], environment: Mapping[str, str]) -> Pipeline:
    """Return it as it was submitted, with `overrides` and set variables on top.

    This process moves to the folder in which it was submitted: relative inputs and the user's modules mean there what
    they meant. Raises UserMistake where nothing was submitted, and what `load_pipeline` does.
    """
    number = run.newest_submission()
    origin = durable.read_checked(run.pipeline_origin_path(number))
    if Path(origin["cwd"]).is_dir():
        os.chdir(origin["cwd"])
        sys.path.append(origin["cwd"])
    recorded = {name: override.partition("=")[2] for name, override in origin.get("variables", {}).items()}
    variables = {**recorded, **{name: value for name, value in environment.items() if value}}
    pipeline = load_pipeline(run.pipeline_path(number), [*origin["overrides"], *overrides], variables)
    pipeline.variables = [replace(each, recorded=not environment.get(each.name)) for each in pipeline.variables]
    pipeline.rehearsed = origin.get("rehearsed", 0.0)
    pipeline.waive += origin.get("waive", [])
    return pipeline
