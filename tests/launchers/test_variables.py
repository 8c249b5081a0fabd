"""Variables of the environment: a submission writes down what they set, and a resubmission keeps to it."""

import re
from pathlib import Path

from data_tools.base import durable
from tests.command import afterok, afterok_json, one_line

TEXT = """
name: toy
params: {start: 1}
variables: {TOY_START: params.start}
phases:
  first: {uses: tests.toy.numbers, array: 2, with: {start: "${params.start}"}}
  sum: {uses: tests.toy.total, with: {numbers: "${phases.first.out}"}}
"""


def total(run: Path) -> int:
    return {phase["phase"]: phase["facts"] for phase in afterok_json("status", run)["phases"]}["sum"]["total"]


def recorded(run: Path, number: int) -> tuple[dict, list]:
    origin = durable.read_json(run / f"submissions/{number}/pipeline.json")
    return origin["variables"], origin["overrides"]


def test_a_submission_records_its_variables_and_a_resubmission_keeps_to_them(tmp_path: Path) -> None:
    pipeline, run = tmp_path / "toy.yaml", tmp_path / "run"
    pipeline.write_text(TEXT)
    here = (pipeline, "--run", run, "cluster=local")
    said = "variable TOY_START of your environment sets params.start=5"
    assert said in afterok("plan", *here, env={"TOY_START": "5"}).stderr
    assert afterok_json("plan", *here, env={"TOY_START": "5"})["variables"] == {"TOY_START": "params.start=5"}
    assert said in afterok("run", *here, env={"TOY_START": "5"}).stderr
    assert total(run) == 5 + 6
    assert recorded(run, 1) == ({"TOY_START": "params.start=5"}, ["cluster=local"])
    # not set any more: what was recorded holds, so that nothing of it runs again but what was asked for
    resubmitted = afterok("resubmit", run, "sum", "sum.with.factor=2")
    assert "variable TOY_START that an earlier submission had sets params.start=5" in resubmitted.stderr
    assert re.findall(r"^submitted (\w+) as", resubmitted.stdout, re.M) == ["sum"]
    afterok("status", run, "--watch")
    assert total(run) == 2 * (5 + 6) and recorded(run, 2)[0] == {"TOY_START": "params.start=5"}
    # set anew: that counts; and an override beats it
    resubmitted = afterok("resubmit", run, "first", env={"TOY_START": "7"})
    assert said.replace("5", "7") in resubmitted.stderr
    assert re.findall(r"^submitted (\w+) as", resubmitted.stdout, re.M) == ["first", "sum"]
    afterok("status", run, "--watch")
    assert total(run) == 2 * (7 + 8)
    done = afterok("resubmit", run, "first", "params.start=0", env={"TOY_START": "9"})
    assert "sets params.start=9, but params.start=0 of the command line counts" in done.stderr
    afterok("status", run, "--watch")
    assert total(run) == 2 * (0 + 1)
    refused = one_line(afterok("resubmit", run, "first", env={"TOY_STRAT": "9"}, check=2))
    assert "variable TOY_STRAT: the pipeline has no variable of this name (did you mean TOY_START?" in refused
