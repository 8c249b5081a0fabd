"""`afterok scores`: which evaluations of a run stand side by side, what is refused, and the drawing."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_tools.mistake import UserMistake
from launchers.observe import runs, scores
from launchers.verbs.scores import do_scores
from tests.data_tools.test_evaluations import gsm8k, written


def run_of(root: Path, sealed: dict[str, Path]) -> Any:
    """Return a run of three evaluations, one of an exported model, and a training, of which some are sealed."""
    kinds = {"before": "evaluate", "sft": "sft", "after": "run_exported", "later": "evaluate"}
    phases = {name: SimpleNamespace(uses=kind, key=name) for name, kind in kinds.items()}
    folder_of = {name: SimpleNamespace(folder=folder) for name, folder in sealed.items()}
    return SimpleNamespace(
        path=root,
        newest_submission=lambda: 1,
        frozen=lambda number: phases,
        seal=lambda name, key: folder_of.get(name),
    )


@pytest.fixture
def run(tmp_path: Path) -> Any:
    before = written(tmp_path / "a", gsm8k(False, False, True), temperature=1.0)
    after = written(tmp_path / "b", gsm8k(True, True, True), temperature=1.0)
    return run_of(tmp_path, {"before": before, "after": after})


def test_sealed_evaluations_stand_in_the_order_of_the_pipeline_or_as_they_are_named(run, capsys):
    assert scores.scores(run).names == ["before", "after"]
    found = scores.scores(run, ["after", "before"])
    assert found.names == ["after", "before"] and found.rows[0].scores[1].gain.value == pytest.approx(-2 / 3)
    scores.print_scores(run)
    printed = capsys.readouterr().out
    assert "gsm8k" in printed and "before" in printed and "+66.7" in printed


@pytest.mark.parametrize("names, said", [
    (["sft"], "'sft' is no evaluation of .* known: before, after, later"), (["befor"], "did you mean before?"),
    (["before", "later"], "later: not sealed yet; see `afterok status"),
])  # fmt: skip
def test_what_is_no_sealed_evaluation_is_refused_by_name(run, names, said):
    with pytest.raises(UserMistake, match=said.replace("?", r"\?")):
        scores.scores(run, names)


def test_a_run_without_a_sealed_evaluation_says_so_and_its_summary_leaves_the_table_out(tmp_path, capsys):
    run = run_of(tmp_path, {})
    with pytest.raises(UserMistake, match="none of before, after, later is sealed yet"):
        scores.scores(run)
    scores.print_scores(run)
    assert not capsys.readouterr().out


def test_the_verb_prints_and_draws(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "find_run", lambda name: run)
    words = {"run": None, "phases": [], "json": False, "svg": tmp_path / "scores.svg"}
    assert do_scores(Namespace(**words)) == 0
    assert "gsm8k" in capsys.readouterr().out and "<svg" in (tmp_path / "scores.svg").read_text()
    assert do_scores(Namespace(**{**words, "json": True})) == 0
    assert '"measure": "accuracy"' in capsys.readouterr().out
    for place in (tmp_path / "none" / "scores.svg", tmp_path):
        with pytest.raises(UserMistake, match="--svg .*name a file in a folder"):
            do_scores(Namespace(**{**words, "svg": place}))
