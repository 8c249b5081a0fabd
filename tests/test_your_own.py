"""What jobs/README.md shows of one's own, as it stands there: model and data, a reward, a kind of phase."""

import json
from pathlib import Path

import pytest

from data_tools.base.yaml_loaders import read_values
from data_tools.chats.char_tokenizer import CHAT_TEMPLATE, write_char_tokenizer
from data_tools.tasks.task import Item
from jobs.task import Task
from launchers import cli
from tests.command import ANY_DISK, afterok, afterok_json
from tests.test_readme import ROOT, fences


def jobs_blocks(language: str, holding: str) -> str:
    """Return the one block of jobs/README.md that holds some words."""
    (text,) = [text for kind, text in fences(ROOT / "jobs/README.md") if kind == language and holding in text]
    return text


def test_the_manuals_phase_counts_words(tmp_path):
    text = jobs_blocks("python", "class Config")
    names: dict = {"__name__": "a_phase"}
    exec(compile(text, "a_phase", "exec"), names)
    (tmp_path / "words.txt").write_text("a b c d e\n")
    parts = [tmp_path / "0", tmp_path / "1", tmp_path / "merged"]
    for index, part in enumerate(parts):
        part.mkdir()
        task = Task("count", index, 2, index, part, part, 0, 1)
        if index < 2:
            names["run"](names["Config"](words=str(tmp_path / "words.txt")), task)
        else:
            assert names["finish"](parts[:2], names["Config"](), task)["headline"] == "5 words in all"


def write_mine(folder: Path) -> Path:
    """Write the files of "your model, your data", "your reward" and "rejection sampling", as the manual has them."""
    below = [jobs_blocks("yaml", "rewards:score\", source: {inputs: [prompts.jsonl]}}}}\n    " + words)
             for words in ("steps: 200", "samples: 16")]  # fmt: skip
    added = "".join(f"  {line}\n" for text in below for line in text.splitlines())
    (folder / "mine.yaml").write_text(jobs_blocks("yaml", "name: mine") + added)
    (folder / "chats.jsonl").write_text(jobs_blocks("text", '"Paris."'))
    (folder / "prompts.jsonl").write_text(jobs_blocks("text", '"answer": 24'))
    (folder / "rewards.py").write_text(jobs_blocks("python", "def score"))
    return folder / "mine.yaml"


def test_the_manuals_own_model_data_and_reward_can_be_planned(tmp_path, monkeypatch, capsys):
    path = write_mine(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["plan", str(path), "cluster=local", ANY_DISK]) == 0
    assert capsys.readouterr().out.count("never ran in this run") == len(read_values(path.read_text())["phases"]) == 13


def test_the_manuals_reward_scores_the_manuals_prompt(tmp_path):
    names: dict = {}
    exec(compile(jobs_blocks("python", "def score"), "rewards", "exec"), names)
    row = json.loads(jobs_blocks("text", '"answer": 24'))
    item = Item.of(row["prompt"], row["answer"], row)
    assert [names["score"](item, said) for said in ("It is 48/2 = 24.", "25", "none")] == [1.0, 0.0, 0.0]


@pytest.mark.soak
def test_the_manuals_own_model_and_data_are_trained(tmp_path):
    """The pipeline of the manual to its end, as it stands: without a download."""
    write_mine(tmp_path)
    text = jobs_blocks("yaml", "name: mine").replace("[chats.jsonl]", f"[{tmp_path / 'chats.jsonl'}]")
    (tmp_path / "mine.yaml").write_text(text)
    few = ["sft.with.steps=2", "sft.with.global_batch=1"]
    afterok("run", tmp_path / "mine.yaml", "--run", tmp_path / "run", "cluster=local", ANY_DISK, *few, timeout=300)
    told = afterok_json("path", tmp_path / "run", "exported")
    assert "config.json" in told["files"] and any(name.endswith(".safetensors") for name in told["files"])


ALPHABETS = """
name: alphabets
phases:
  init: {uses: init_model, with: {%s}}
  imported: {uses: import_hf, with: {source: "${phases.init.out}"}}
  data: {uses: materialize, with: {%s, tokenizer: "${phases.%s.out}"}}
"""
CHATS = "source: {inputs: [chats.jsonl]}"
SUMS = "task: calculator, source: {inputs: [sums.jsonl], synthetic_rows: 20}"


@pytest.mark.parametrize("source", [CHATS, SUMS])
@pytest.mark.parametrize("through", ["init", "imported"])
def test_a_tokenizer_that_can_encode_no_row_is_refused_by_plan(source, through, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text(jobs_blocks("text", '"Paris."'))
    (tmp_path / "sums.jsonl").write_text('{"answer": "<<1+1=2>>"}\n')
    write_char_tokenizer(tmp_path / "letters", "xyz", CHAT_TEMPLATE)
    for fits, init in ((True, "alphabet: bytes"), (source is SUMS, "alphabet_task: calculator, chats: true"),
                       (False, "tokenizer: letters")):  # fmt: skip
        (tmp_path / "p.yaml").write_text(ALPHABETS % (init, source, through))
        assert cli.main(["plan", "p.yaml", "cluster=local", ANY_DISK]) == (0 if fits else 2)
        said = capsys.readouterr()
        assert fits or ("each of the first" in said.err and "alphabet: bytes" in said.err), said
        assert fits or source is SUMS or "'W', 'h'" in said.err


def test_plan_says_which_first_rows_a_tokenizer_cannot_encode(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [[{"role": "user", "content": "1+1"}, {"role": "assistant", "content": said}] for said in ("2", "two")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "p.yaml").write_text(ALPHABETS % ("alphabet_task: calculator, chats: true", CHATS, "init"))
    assert cli.main(["plan", "p.yaml", "cluster=local", ANY_DISK]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "1 of the first 2 rows of" in said and "'t', 'w', 'o'" in said
