"""`afterok report`, `plot` and `path`: what they tell and leave out, and that nothing in a run becomes markup."""

import base64
import hashlib
import json
import math
import re
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_tools.mistake import UserMistake
from launchers.observe.sampled import TEXT, cut, groups_of, why_masked
from launchers.report import curves
from launchers.report.contents import contents_of
from launchers.report.graph import BOX, graph_of
from launchers.report.page import page_of
from launchers.report.timeline import timeline_of
from launchers.verbs import results
from megatron_ext.rl import untrained
from megatron_ext.rl.samples import Sample, batch_of, kept_items
from megatron_ext.rl.settings import Advantage, Rewarding
from tests.launchers.planted_run import MINUTE, START, PlantedRun, failed, finished, in_progress, sample

EVIL = (
    "\x1b]0;owned\x07</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>"
    "{{ 7 * 7 }}{% raw %}]]><!-- \u202edrow &lt;b&gt; </pre></details></title>&#60;i&#62; javascript:alert(1)"
)
RUNS = {"finished": finished, "failed": failed, "in progress": in_progress}


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script":
            self.scripts[-1] += data
        elif not self.inside or self.inside[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[tuple[str, str], str]:
    """The page of a run of each state, with plain words in it and with markup."""
    folder = tmp_path_factory.mktemp("runs")
    words = {"plain": "plain", "evil": EVIL}
    return {
        (state, kind): page_of(contents_of(plant(folder / f"{state} {kind}", word).run))
        for state, plant in RUNS.items()
        for kind, word in words.items()
    }


@pytest.mark.parametrize("state", RUNS)
def test_nothing_in_a_run_becomes_markup(pages, state):
    plain, evil = Tags(pages[state, "plain"]), Tags(pages[state, "evil"])

    def shape(page: Tags) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in page.tags]

    assert shape(evil) == shape(plain)
    assert not [name for _, names in shape(evil) for name in names if name.startswith("on")]
    cleaned = re.sub("[\x00-\x08\x0b-\x1f\u202e]", "", EVIL)
    assert cleaned in "".join(evil.text) and "\x1b" not in pages[state, "evil"] and "\u202e" not in pages[state, "evil"]
    if state == "finished":
        assert f"{cleaned}/deep" in {chart["title"] for chart in json.loads(evil.scripts[0]).values()}


@pytest.mark.parametrize("state", RUNS)
def test_a_page_loads_nothing_and_runs_nothing_but_its_own_scripts(pages, state):
    page = Tags(pages[state, "evil"])
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "unsafe" not in policy
    data, *scripts = page.scripts
    assert isinstance(json.loads(data), dict) and len(scripts) == 2
    for text in scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "input", "image", "use")
        assert not {"src", "style", "srcset", "xlink:href"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")


@pytest.mark.parametrize("state", RUNS)
def test_a_run_of_each_state_says_so_and_has_the_sections_that_it_can_have(pages, state):
    text, page = " ".join("".join(Tags(pages[state, "plain"]).text).split()), pages[state, "plain"]
    assert f"– {state}" in page
    sections = set(re.findall(r'<section id="(\w+)"', page))
    assert sections >= {"phases", "graph", "timeline", "hours", "lineage", "data"}
    assert ("why" in sections) == (state == "failed")
    grpo = {"groups", "mismatch", "evaluations"}
    assert sections & grpo == (grpo if state == "finished" else set())
    assert ("ValueError: plain" in text) == (state == "failed") == ("the end of" in text)
    if state == "finished":
        assert "unscorable" in text and "cut off" in text and "equal rewards in its group" in text
        assert "samples of 8 of 40 steps are shown" in text and "75.0% [53.1, 88.8] of 20" in text
        assert "15 rows, 50 tokens, 20 in the loss" in text and "555555555555" in text


def test_a_wait_counts_from_when_all_that_is_needed_was_sealed(tmp_path):
    attempts = contents_of(failed(tmp_path).run).attempts
    assert [(w.since, w.until) for w in attempts["data"][0].waits] == [(START, START + 1 * MINUTE)]
    sft = attempts["sft"][0]
    waits = [((w.since - START) / MINUTE, (w.until - START) / MINUTE) for w in sft.waits]
    assert waits == [(5, 7), (17, 27)]  # sealed to started; stopped to started again
    assert sft.ends == {"stopped": 1, "failed": 1} and sft.worked_s == 13 * MINUTE
    assert sft.lost_s == 3 * MINUTE  # what was stopped lost nothing
    assert sft.messages[0][0] == "asked to stop" and not attempts["after"][0].waits


def test_what_waits_in_the_queue_is_drawn_up_to_now(tmp_path):
    planted = in_progress(tmp_path)
    planted.tasks = []
    planted.going("sft", state="PENDING")
    (planted.run.artifact(planted.phases["sft"]).leases_folder / "0000.a1.r0.g0").unlink()
    found = contents_of(planted.run)
    (wait,) = found.attempts["sft"][0].waits
    assert not wait.over and wait.since == START + 5 * MINUTE and wait.until == found.written
    assert not found.attempts["after"][0].waits  # it waits for sft, not for the queue


def test_hours_of_all_attempts_add_up_and_gpus_multiply(tmp_path):
    planted = PlantedRun(tmp_path, {"sft": "sft"}, gpus=4, submissions=2)
    planted.life("sft", 0, 30, "failed")
    planted.life("sft", 60, 180, attempt=2)
    first, second = contents_of(planted.run).attempts["sft"]
    assert (first.worked_s, first.lost_s, first.gpu_s, first.gpu_lost_s) == (1800, 1800, 7200, 7200)
    assert (second.worked_s, second.lost_s, second.gpu_s) == (7200, 0, 28800)


@pytest.mark.parametrize("elements", [3, 700])  # exact rectangles, and a mean of each stretch
def test_the_area_of_a_row_is_the_time_of_its_elements(tmp_path, elements):
    planted = PlantedRun(tmp_path, {"data": "materialize"}, elements=elements)
    for element in range(elements):
        begin = 10 * element / elements
        planted.life(
            "data", begin, begin + 5 + element % 3, "failed" if element % 7 == 1 else "sealed", element=element
        )
    attempts = contents_of(planted.run).attempts
    drawn = timeline_of(attempts)
    assert drawn is not None
    (row,) = drawn.rows
    assert row.most <= elements and set(row.paths) == {"sealed", "lost", "waiting"}
    boxes = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)", row.paths["sealed"] + row.paths["lost"])
    area = sum((float(right) - float(left)) * (float(low) - float(top)) for left, low, top, right in boxes)
    seconds = area / (1000 * 24) * row.most * (drawn.end - drawn.start)
    worked = attempts["data"][0].worked_s
    # Each coordinate is printed to 0.005, so that of an area width + height times 0.01 are open.
    sides = sum(float(right) - float(left) + float(low) - float(top) + 0.01 for left, low, top, right in boxes)
    assert abs(seconds - worked) <= 0.01 * sides / (1000 * 24) * row.most * (drawn.end - drawn.start)


def test_each_phase_stands_below_what_it_needs_and_no_line_runs_behind_a_box():
    needs = {"a": {}, "b": {"a": "afterok"}, "c": {"a": "afterok"},
             "d": {"b": "afterok", "c": "afterok", "a": "afterany"},
             "e": {"d": "afterok", "a": "afterok"}, "lone": {}}  # fmt: skip
    graph = graph_of(needs)
    place = {node.phase: node for node in graph.nodes}
    assert set(place) == set(needs) and len(graph.edges) == 7
    for phase, above in needs.items():
        assert all(place[need].y + BOX[1] < place[phase].y for need in above)
    for node in graph.nodes:
        assert 0 <= node.x <= graph.width - BOX[0] and 0 <= node.y <= graph.height - BOX[1]
        for other in graph.nodes:
            assert node is other or node.y != other.y or abs(node.x - other.x) >= BOX[0]
    for edge in graph.edges:  # where a line goes straight down it is beside all boxes
        for x, top, low in re.findall(r"([\d.]+) ([\d.]+)V([\d.]+)", edge.path):
            for node in graph.nodes:
                beside = not node.x < float(x) < node.x + BOX[0]
                assert beside or float(low) <= node.y or float(top) >= node.y + BOX[1], edge.told


def test_thinning_keeps_ends_extremes_and_what_is_not_finite():
    rng = np.random.default_rng(1)
    for length in (1, curves.MOST_POINTS, curves.MOST_POINTS + 1, 50_000):
        values = rng.normal(size=length)
        places = {int(rng.integers(length)): bad for bad in (math.nan, math.inf, 1e6, -1e6)}
        for place, bad in places.items():
            values[place] = bad
        kept = curves.thinned(values)
        assert len(kept) <= curves.MOST_POINTS and (np.diff(kept) > 0).all()
        assert {0, length - 1} <= set(kept.tolist())
        chosen = values[kept]
        finite = values[np.isfinite(values)]
        if len(finite):
            assert (
                chosen[np.isfinite(chosen)].max() == finite.max() and chosen[np.isfinite(chosen)].min() == finite.min()
            )
        assert np.isfinite(chosen).all() == np.isfinite(values).all()


def test_hours_up_to_a_step_are_the_sum_of_the_times_of_its_steps():
    lines = [{"step": 10, "step_s": 36.0}, {"step": 20, "step_s": 72.0, "valid": {"loss": math.nan}}, {"step": 25}]
    columns = curves.columns_of(lines)
    assert columns["hours"].steps == [10, 20] and columns["hours"].values == pytest.approx([0.1, 0.3])
    assert math.isnan(columns["valid/loss"].values[0]) and set(columns) == {"step_s", "hours", "valid/loss"}


def test_every_number_of_every_line_is_in_its_curve_in_the_order_of_steps():
    """Also where lines have other names, nested ones too, and other values than numbers stand in a number's place."""
    lines = [
        {"step": 3, "loss": 1.0, "eval": {"a": 2, "b": {"c": 0.5}}},
        {"step": 1, "loss": 4, "note": "x"},
        {"step": 2, "loss": None, "lr": True, "eval": {"a": 1.5}},
        {"step": 4, "loss": 0.5, "eval": 7},
        {"step": 5, "loss": 10**400, "eval": {"b": {"c": 1}}},
        {"step": 6, "loss": 9.0, "note": "y"},
    ]
    found = {name: list(zip(column.steps, column.values)) for name, column in curves.columns_of(lines).items()}
    assert found == {
        "loss": [(1, 4), (3, 1), (4, 0.5), (5, float("inf")), (6, 9)],
        "eval/a": [(2, 1.5), (3, 2)],
        "eval/b/c": [(3, 0.5), (5, 1)],
        "eval": [(4, 7)],
    }


def test_lines_that_are_no_metrics_are_counted_and_one_that_is_being_written_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = ["nonsense", '{"loss": 3}', "[1]", '{"step": Infinity}', '{"step": NaN}']
    good = ['{"step": 1, "loss": 2}', '{"step": 2, "loss": 1, "big": 1' + "0" * 400 + "}"]
    path.write_text("\n".join([good[0], *bad, good[1], "{"]))
    lines, notes = curves.read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2] and notes == [
        "5 lines have no step or are no JSON, and were left out"
    ]
    assert curves.columns_of(lines)["big"] == curves.Column([2.0], [math.inf])


@pytest.mark.parametrize("mask_truncated", [True, False])
def test_who_was_masked_is_told_as_the_training_counts_it(mask_truncated):
    rewards = {0: [0.0, 1.0, None, 1.0], 1: [1.0, 1.0, 1.0, None], 2: [None] * 4, 3: [0.0, 0.5, 1.0, 0.0]}
    drawn = [
        Sample(item, number, (1,), np.zeros(2), np.zeros(2), "length" if number == 1 else "stop", reward)
        for item, group in rewards.items()
        for number, reward in enumerate(group)
    ]  # fmt: skip
    rewarding, advantage = Rewarding(mask_truncated=mask_truncated), Advantage()
    kept = kept_items(drawn, advantage, rewarding, limit=8)
    batch = batch_of(drawn, kept, advantage, rewarding, limit=8)
    trained = {s.key for s, good in zip(batch.samples, batch.trained) if good}
    lines = [sample(s.item, s.number, s.reward, finish=s.finish, trained=s.key in trained) for s in drawn]
    words = {"unscorable": "unscorable", "cut off": "cut_off", "equal rewards in its group": "equal", "": ""}
    told = [words[why_masked(line, mask_truncated)] for line in lines]
    counts = untrained.count(drawn, batch, rewarding)
    assert {why: told.count(why) for why in counts} == counts and told.count("") == len(trained) > 0


def test_what_is_not_shown_of_samples_is_said(tmp_path):
    planted = PlantedRun(tmp_path, {"grpo": "grpo"})
    planted.samples("grpo", 7, [sample(item, n, completion="c" * 9000) for item in range(20) for n in range(20)])
    (path,) = (planted.run.artifact(planted.phases["grpo"]).folder / "samples").iterdir()
    path.write_text("torn\n" + path.read_text())
    found = groups_of(planted.run, planted.phases["grpo"])
    assert found is not None
    (step,) = found.steps
    assert step.more and len(step.groups) == 12 and step.groups[0].left_out == 4 and len(step.groups[0].samples) == 16
    assert step.groups[0].samples[0].completion == f"{'c' * TEXT} … (cut: 9,000 characters)"
    assert any("the first 12 prompts" in note for note in found.notes)
    assert any("lines of it are no samples" in note for note in found.notes) and cut({"a": 1}) == '{"a": 1}'


def test_no_value_of_any_field_of_a_sample_breaks_the_page(tmp_path, monkeypatch):
    """A sample that others wrote, or of a reward of any size; what is nested otherwise is no sample."""
    odd = [None, True, "x", "\ud800", [], [1], {}, {"a": {"b": 1}}, math.inf, math.nan, 10**400, -(10**400)]
    lines = [{**sample(0, 0), name: value} for name in sample(0, 0) if name != "item" for value in odd]
    lines += [{"item": 1, "messages": value} for value in odd]
    planted = PlantedRun(tmp_path, {"grpo": "grpo"})
    planted.samples("grpo", 7, [{**line, "item": item} for item, line in enumerate(lines)])
    planted.metrics("grpo", [{"step": 1, "step_s": 10**400, "loss": -(10**400)}, {"step": 2, "loss": 1.0}])
    monkeypatch.setattr("launchers.observe.sampled.GROUPS", len(lines))
    found = contents_of(planted.run)
    assert len(found.groups[0].steps[0].groups) > 0.8 * len(lines) and "lines of it are no samples" in page_of(found)


def test_what_is_damaged_is_left_out_and_said(tmp_path):
    planted = finished(tmp_path)
    for name, file in (("data", "balance.json"), ("after", "samples.jsonl")):
        (planted.run.seal(name, planted.phases[name].key).folder / file).write_text("{")
    found = contents_of(planted.run)
    assert not found.balances and found.scores is None
    assert any("data: its balance sheet is torn or altered" in note for note in found.notes)
    assert any("evaluations are not shown: " in note for note in found.notes) and "are not shown" in page_of(found)


def told_by(run: PlantedRun, capsys, **words) -> str:
    args = Namespace(run=str(run.run.path), output=None, watch=False, json=False)
    assert results.do_report(Namespace(**{**vars(args), **words})) == 0
    return capsys.readouterr().out


def test_the_verb_writes_beside_the_ledger_or_where_it_is_told(tmp_path, capsys):
    planted = finished(tmp_path / "run")
    assert "finished, 5 of 5 phases sealed" in told_by(planted, capsys)
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    found = json.loads(told_by(planted, capsys, output=tmp_path / "x.html", json=True))
    assert found["report"] == str(tmp_path / "x.html") and found["bytes"] == (tmp_path / "x.html").stat().st_size
    assert found["evaluations"] == ["before", "after"] and found["groups"] == {"grpo": [1, 6, 12, 17, 23, 28, 34, 40]}
    assert "loss" in found["curves"]["sft"] and found["state"] == "finished"
    for place in (tmp_path / "none" / "x.html", tmp_path):
        with pytest.raises(UserMistake, match="name a file in a folder that can be written: --output"):
            told_by(planted, capsys, output=place)


def test_watching_loads_the_page_again_until_nothing_is_active(tmp_path, capsys, monkeypatch):
    planted, texts = in_progress(tmp_path), []

    def sleep(seconds: float) -> None:
        texts.append((tmp_path / "report.html").read_text())
        if len(texts) == 2:
            planted.tasks.clear()
            planted.going("sft", state="FAILED")

    monkeypatch.setattr(results.time, "sleep", sleep)
    told = told_by(planted, capsys, watch=True)
    again = f'http-equiv="refresh" content="{results.WATCH_S}"'
    assert len(texts) == 2 and all(again in text for text in texts) and told.count("in progress") == 2
    assert again not in (tmp_path / "report.html").read_text()
    planted.tasks.clear()
    planted.going("sft")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.time, "sleep", interrupt)
    told_by(planted, capsys, watch=True)
    assert again not in (tmp_path / "report.html").read_text()


def test_a_run_without_anything_is_refused_in_a_line(tmp_path):
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(UserMistake, match="nothing was submitted there yet"):
        results.do_report(Namespace(run=str(tmp_path), output=None, watch=False, json=False))


def test_the_charts_library_is_the_one_that_is_named():
    uplot = Path(results.__file__).parents[1] / "report" / "assets" / "uplot"
    assert "uPlot (v1.6.32)" in (uplot / "uPlot.iife.min.js").read_text()[:200]
    assert "MIT License" in (uplot / "LICENSE").read_text()


# -- plot and path ----------------------------------------------------------------------------------------------------


def plotted(planted: PlantedRun, capsys, **words) -> str:
    args = {"run": str(planted.run.path), "phases": [], "metric": [], "output": None, "json": False}
    assert results.do_plot(Namespace(**{**args, **words})) == 0
    return capsys.readouterr().out


def test_curves_are_plotted_as_the_ending_of_the_file_says(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra plot, which is not shared")
    planted = finished(tmp_path / "run", "$\\frac{x$\x1b]0;x")
    found = json.loads(plotted(planted, capsys, json=True))
    drawn = [(each["phase"], each["metric"]) for each in found["charts"]]
    times = ["step_s", "hours"]
    assert drawn == [("sft", m) for m in ["loss", *times]] + [("grpo", m) for m in ["reward", *times]]
    text = (tmp_path / "run" / "curves.svg").read_text()
    assert text.count('<g id="axes_') == 6 and found["bytes"] == (tmp_path / "run" / "curves.svg").stat().st_size
    deep = "$\\frac{x$\x1b]0;x/deep"
    assert "1 curve of sft" in plotted(planted, capsys, phases=["sft"], metric=[deep], output=tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("words, said", [
    ({"phases": ["stf"]}, "'stf' is no phase with metrics .*did you mean sft"),
    ({"metric": ["los"]}, "--metric 'los'.*did you mean loss"),
    ({"output": Path("x.gif")}, "the ending says the format; known: svg, png, pdf"),
    ({"output": Path("x")}, "the ending says the format"),
])  # fmt: skip
def test_what_cannot_be_plotted_is_refused_in_a_line(tmp_path, capsys, words, said):
    with pytest.raises(UserMistake, match=said):
        plotted(finished(tmp_path), capsys, **words)


@pytest.mark.parametrize("line, drawn", [
    ({"step": 1}, None), ({"step": 1, "mismatch": {"kl": 0.1}}, "mismatch/kl"), ({"step": 1, "\ud800": 1}, "\ud800"),
    ({"step": 1, "loss": [1], "reward": -1e308}, "reward"),
])  # fmt: skip
def test_what_there_is_is_drawn_also_of_steps_without_numbers(tmp_path, capsys, line, drawn):
    planted = PlantedRun(tmp_path, {"sft": "sft"})
    planted.metrics("sft", [line, {**line, "reward": 1e308} if drawn == "reward" else line])
    if drawn is None:
        with pytest.raises(UserMistake, match="no phase of the run has written metrics yet"):
            plotted(planted, capsys)
    else:
        assert [chart["metric"] for chart in json.loads(plotted(planted, capsys, json=True))["charts"]] == [drawn]


def test_a_run_without_metrics_and_a_machine_without_matplotlib_say_so(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserMistake, match="no phase of the run has written metrics yet"):
        plotted(failed(tmp_path / "a"), capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserMistake, match=r"pip install 'afterok\[plot\]'"):
        plotted(finished(tmp_path / "b"), capsys)


def test_the_path_of_a_sealed_phase_is_printed_and_of_no_other(tmp_path, capsys):
    planted = failed(tmp_path)
    args = Namespace(run=str(tmp_path), phase="data", json=False)
    assert results.do_path(args) == 0
    place = Path(capsys.readouterr().out.strip())
    assert (place / "balance.json").is_file()
    assert results.do_path(Namespace(**{**vars(args), "json": True})) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["path"] == found["link"] == str(place)
        and found["kind"] == "materialize"
        and found["key"] == planted.phases["data"].key
    )
    assert found["files"] == {"balance.json": (place / "balance.json").stat().st_size}
    planted.run.link_latest("data")
    assert results.do_path(args) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "data" / "latest")
    for phase, said in (("dat", "did you mean data"), ("sft", "sft is not sealed yet; see `afterok status")):
        with pytest.raises(UserMistake, match=said):
            results.do_path(Namespace(run=str(tmp_path), phase=phase, json=False))
