"""Overrides that a run holds: said at resubmit, by status and by plan, with the way back to the file."""

from data_tools.base import durable
from launchers.observe.status import run_status
from launchers.planning import held
from tests.command import ANY_DISK, afterok, afterok_json
from tests.launchers.planted_run import PlantedRun

TEXT = """
name: held
phases:
  first: {uses: tests.toy.numbers, array: 1, with: {start: 1}}
"""


def words(text):
    return " ".join(text.split())


LOCAL = ("cluster=local", ANY_DISK)


def test_overrides_in_force_are_said_at_resubmit_in_status_and_in_plan_with_the_way_back(tmp_path):
    file, run = tmp_path / "held.yaml", tmp_path / "run"
    file.write_text(TEXT)
    afterok("run", file, "--run", run, *LOCAL)
    assert "in force" not in afterok("status", run).stdout  # the choice of a cluster is none
    assert "drops overrides" not in afterok("plan", file, "--run", run, *LOCAL).stderr
    said = words(afterok("resubmit", run, "first", "first.with.start=5").stdout)
    way_back = f"`afterok submit {file} --run {run}` drops them"
    assert f"overrides in force: first.with.start=5 (submission 2); {way_back}" in said
    afterok("status", run, "--watch")
    afterok("resubmit", run, "first", "first.with.start=5", "first.resources.time=1:00:00", "--again")
    shown = words(afterok("status", run).stdout)
    assert "first.with.start=5 (submission 2), first.resources.time=1:00:00 (submission 3)" in shown
    assert way_back in shown and way_back in afterok_json("status", run)["overrides"]
    afterok("status", run, "--watch")
    left_out = words(afterok("plan", file, "--run", run, *LOCAL).stderr)
    assert "repeat those that are to stay: first.with.start=5 first.resources.time=1:00:00" in left_out
    assert left_out.count("first.with.start=5") == 1
    some = words(afterok("plan", file, "--run", run, *LOCAL, "first.with.start=7").stderr)
    assert "repeat those that are to stay: first.resources.time=1:00:00" in some and "start=5" not in some
    afterok("run", file, "--run", run, *LOCAL)
    assert "in force" not in afterok("status", run).stdout


def test_many_or_long_overrides_are_one_short_line_and_all_are_in_json(tmp_path):
    planted = PlantedRun(tmp_path / "run", {"data": "materialize"})
    given = [f"data.with.setting{place}=/a/long/folder/{'x' * 60}" for place in range(15)]
    planted.submit(2, ["data"], minute=1)
    origin = planted.run.pipeline_origin_path(2)
    durable.write_checked(origin, {"source": "p.yaml", "variables": {}, "overrides": given})
    told = held.told(planted.run)
    assert len(told) < 700 and "and 12 more (all: `afterok status" in told and told.endswith("drops them")
    assert run_status(planted.run).as_json()["held"] == given
