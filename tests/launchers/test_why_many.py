"""`why` of many elements looks up once what they share, samples the logs of those alike, and names each of them."""

from pathlib import Path

import pytest

from jobs.retry import Cause
from launchers.observe import why as whys
from launchers.observe.look import look_at
from launchers.observe.status import status_of
from launchers.observe.why import Report, why, why_of
from tests.jobs.test_scale import COUNT
from tests.launchers.planted_run import PlantedRun

OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1.0\n"


def failed(folder: Path, elements: int, logs: dict[int, str]) -> PlantedRun:
    """Plant a run whose elements all ended without a word of their workers, some with a log."""
    planted = PlantedRun(folder, {"p": "materialize"}, elements)
    phase = planted.phases["p"]
    phase.array = elements
    planted.run.freeze(1, "planted", [phase])
    planted.run.logs_folder("p").mkdir(parents=True)
    for element in range(elements):
        planted.life("p", 1, 2, "failed", element=element, cause=Cause.UNKNOWN, message="ended")
    for element, text in logs.items():
        planted.run.log_path("p", 1, element).write_text(text)
    return planted


def elements_of(report: Report) -> list[int]:
    return sorted(element for finding in report.findings for element in finding.elements)


def test_logs_of_elements_that_look_alike_are_sampled_and_all_of_them_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whys, "SAMPLED", 5)
    read = []
    real = whys.log_tail
    monkeypatch.setattr(whys, "log_tail", lambda path, *of: read.append(path) or real(path, *of))
    report = why(failed(tmp_path / "alike", 30, dict.fromkeys(range(30), OOM)).run)
    assert len(read) == 5 and [finding.diagnosis.cause for finding in report.findings] == [Cause.HOST_MEMORY]
    assert elements_of(report) == list(range(30)) and "p[0-29]" in report.findings[0].sentence
    assert report.notes == ["p: of elements that look alike 5 logs were read, 25 others were not"]


def test_where_those_read_ended_in_several_ways_the_others_are_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whys, "SAMPLED", 5)
    logs = {element: OOM if element % 2 else "ValueError: x\n" for element in range(30)}
    report = why(failed(tmp_path / "mixed", 30, logs).run)
    assert elements_of(report) == list(range(30))
    rest = next(finding for finding in report.findings if finding.diagnosis.what == "ended like others")
    assert rest.elements == list(range(5, 30)) and not rest.diagnosis.certain
    assert "2 out of host memory" in rest.diagnosis.evidence and "were not read" in rest.diagnosis.evidence


@pytest.mark.parametrize("few", [0, 3])
def test_what_waits_costs_no_file_an_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    opens = []
    for elements in (10, 40, 160):
        planted = PlantedRun(tmp_path / str(elements), {"first": "pack", "p": "materialize"}, elements)
        planted.run.logs_folder("p").mkdir(parents=True)
        for element in range(few):
            planted.run.log_path("p", 1, element).write_text("hello\n")
        for name in ("first", "p"):
            for element in range(elements):
                planted.tasks.append({"phase": name, "job": "1.0" if name == "first" else "1.1", "index": element,
                                      "state": "PENDING", "reason": "Resources", "exit_code": None, "started": None,
                                      "ended": None, "restart": 0})  # fmt: skip
        planted.going("first", element=0, state="PENDING")
        opens.append(COUNT(lambda planted=planted: why(planted.run))["opens"])
        report = why(planted.run)
        assert report.healthy and elements_of(report) == sorted([*range(elements)] * 2), report
    assert opens[1] == opens[2]


def test_a_hundred_thousand_elements_that_wait_are_known_as_one(tmp_path: Path) -> None:
    elements = 100_000
    planted = PlantedRun(tmp_path, {"p": "materialize"}, elements)
    planted.phases["p"].array = elements
    planted.run.freeze(1, "planted", list(planted.phases.values()))
    told = {"phase": "p", "job": "1.0", "elements": f"0-{elements - 1}", "state": "PENDING", "reason": "Resources"}
    planted.tasks.append({**told, "exit_code": None})
    planted.going("p", element=7)  # the last word about it
    look = look_at(planted.run)
    alike = look.elements(planted.phases["p"])
    assert [(len(each.indices), each.state().state) for each in alike] == [(elements - 1, "PENDING"), (1, "RUNNING")]
    assert status_of(look).phases[0].state == "RUNNING"
    waits, runs = sorted(why_of(look).findings, key=lambda finding: -len(finding.elements))
    assert waits.elements.spans == ((0, 7), (8, elements)) and runs.elements == [7]
    assert "p[0-6,8-99999] waits" in waits.sentence
