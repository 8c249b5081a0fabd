"""`afterok inspect` of what grpo, generate and reject_filter sampled, on planted runs."""

import json
from argparse import Namespace

import pytest
import zstandard

from data_tools.base.declared import EVALUATIONS
from data_tools.evaluations import harness
from data_tools.mistake import UserMistake
from data_tools.tasks.mix import Entry
from data_tools.tasks.task import Item
from launchers.observe.sampled import cut, groups_of
from launchers.verbs import runs
from tests.launchers.planted_run import PlantedRun, finished, sample

EVIL = "\x1b]0;owned\x07[red]x[/red]"


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> PlantedRun:
    """A run with 40 steps of GRPO, 300 prompts that were sampled twice, and the samples that were kept of them."""
    planted = finished(tmp_path_factory.mktemp("inspect"), EVIL)
    run = PlantedRun(planted.run.path / "more", {"drawn": "generate", "kept": "reject_filter", "store": "materialize"})
    lines = [{**sample(n, k, k / 2), "prompt_id": f"sums/{n}", "task": "sums"} for n in range(300) for k in range(2)]
    for line in lines:
        for name in ("item", "trained", "entry", "uid", "advantage"):
            del line[name]
    run.seal("drawn", 5, {"samples.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    chats = [{"messages": [{"role": "user", "content": f"{n}+1="}, {"role": "assistant", "content": str(n + 1)}],
              "prompt_id": f"sums/{n}", "sample": 1, "reward": 1.0, "tokens": 2} for n in range(300)]  # fmt: skip
    run.seal("kept", 9, {"chat.jsonl": "".join(json.dumps(line) + "\n" for line in chats)})
    return planted


def inspected(planted: PlantedRun, phase: str, capsys, **words) -> dict:
    run = planted.run.path if phase in planted.phases else planted.run.path / "more"
    args = {"run": str(run), "phase": phase, "documents": 3, "pack": None, "seed": 0, "tokens": 400, "step": None}
    assert runs.do_inspect(Namespace(**{**args, "json": True, **words})) == 0
    out = capsys.readouterr().out
    return json.loads(out) if words.get("json", True) else {"text": out}


def test_any_step_of_grpo_is_shown_by_prompt_with_who_was_masked(planted, capsys):
    last, seventh = inspected(planted, "grpo", capsys), inspected(planted, "grpo", capsys, step=7, documents=1)
    assert last["step"] == 40 and last["steps"] == list(range(1, 41)) and len(last["groups"]) == 3
    assert seventh["file"].endswith("step_000007.jsonl") and [g["item"] for g in seventh["groups"]] == [1]
    masked = [[each["masked"] for each in group["samples"]] for group in last["groups"]]
    assert masked == [["", ""], ["unscorable", "cut off"], ["equal rewards in its group"] * 2]
    text = inspected(planted, "grpo", capsys, json=False)["text"]
    assert "cut off" in text and "[red]x[/red]" in text and "\x1b]" not in text


def test_samples_that_were_generated_or_kept_are_shown_and_a_seed_draws_others(planted, capsys):
    first = inspected(planted, "drawn", capsys)
    assert [g["name"] for g in first["groups"]] == ["sums/0", "sums/1", "sums/2"] and first["step"] is None
    assert [[s["reward"] for s in g["samples"]] for g in first["groups"]] == [[0.0, 0.5]] * 3
    drawn = {inspected(planted, "drawn", capsys, seed=seed, documents=1)["groups"][0]["name"] for seed in (1, 2, 3)}
    assert len(drawn) == 3 and all(
        len(inspected(planted, "drawn", capsys, seed=2)["groups"][n]["samples"]) == 2 for n in range(3)
    )
    (kept,) = inspected(planted, "kept", capsys, documents=1)["groups"]
    assert (kept["prompt"], kept["samples"][0]["completion"]) == ("user: 0+1=", "1")  # the texts of messages
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}
    assert cut(called).startswith('{"role": ')  # nothing of one that has more is dropped


def evaluation(folder, entries) -> dict[str, str]:
    """Return the files of an evaluation of two prompts a task, written as `evaluate` writes them."""
    items = {name: [Item.of(f"{EVIL}{name} {n}", str(n)) for n in range(2)] for name in entries}
    evaluated = harness.Evaluated(entries, model="m", samples=2, seed=0, greedy={}, sampled={})
    lines = [
        {"prompt": item.uid, "completion": f"it is {n}", "finish": "stop", "correct": n == 0, "said": str(n),
         "seen": None, "kind": name, "votes": [("0", True), ("1", False)], "completions": ["first", "second"],
         "sampled": 2, "sampled_correct": 1}
        for name in entries for n, item in enumerate(items[name])
    ]  # fmt: skip
    harness.write_samples(folder, evaluated, lines, harness.documents(evaluated, items))
    texts = {f"harness/{path.name}": path.read_text() for path in (folder / "harness").iterdir()}
    return {**texts, "samples.jsonl": "".join(json.dumps(line) + "\n" for line in lines), "result.json": "{}"}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_what_an_evaluation_asked_is_shown_task_by_task_right_or_wrong(tmp_path, capsys, kind):
    planted = PlantedRun(tmp_path / "run", {"scored": kind, "drawn": "generate"})
    with pytest.raises(UserMistake, match="scored is not sealed yet"):
        inspected(planted, "scored", capsys)
    files = evaluation(tmp_path, {"gsm8k": Entry("gsm8k"), "svamp": Entry("svamp")})
    planted.seal("scored", 5, files if kind == "evaluate" else {name: files[name] for name in ("samples.jsonl",)})
    groups = inspected(planted, "scored", capsys, documents=4)["groups"]
    assert [(group["task"]) for group in groups] == ["gsm8k"] * 2 + ["svamp"] * 2
    for number, group in enumerate(groups):
        greedy, *samples = group["samples"]
        assert greedy["completion"] == f"it is {number % 2}" and greedy["note"].startswith("greedy, ")
        assert ("right" if number % 2 == 0 else "wrong") in greedy["note"].split(", ")[1]
        if kind == "evaluate":
            assert group["prompt"].startswith(EVIL) and "wanted" in group["name"]
            assert [(each["completion"], each["note"]) for each in samples] == [
                ("first", "sampled, answers 0"), ("second", "sampled, answers 1")
            ]  # fmt: skip
        else:
            assert "1 of 2 samples right" in greedy["note"]
    text = inspected(planted, "scored", capsys, json=False)["text"]
    assert "it is 1" in text and "\x1b]" not in text and "advantage" not in text
    with pytest.raises(UserMistake, match="which has no steps"):
        inspected(planted, "scored", capsys, step=1)


@pytest.mark.parametrize("phase, words, said", [
    ("grpo", {"step": 99}, "--step 99: grpo has samples of steps 1 to 40"),
    ("grpo", {"pack": 1}, "--pack 1: grpo is a grpo phase, which has no packs"),
    ("drawn", {"step": 1}, "--step 1: drawn is a generate phase, which has no steps"),
    ("store", {"step": 1}, "--step 1: only of a grpo phase"),
])  # fmt: skip
def test_what_is_not_there_is_refused_in_a_line(planted, capsys, phase, words, said):
    with pytest.raises(UserMistake, match=said):
        inspected(planted, phase, capsys, **words)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_damaged_log_is_shown_up_to_the_damage(tmp_path, capsys, seed):
    planted = PlantedRun(tmp_path, {"grpo": "grpo"})
    planted.samples("grpo", 7, [sample(item, 0) for item in range(100)])
    (path,) = (planted.run.artifact(planted.phases["grpo"]).folder / "samples").iterdir()
    frame = zstandard.compress(path.read_bytes())
    path.rename(path.with_suffix(".old"))
    path.with_name("step_000007.jsonl.zst").write_bytes(frame + b"no frame")
    notes = inspected(planted, "grpo", capsys, documents=1000, seed=seed)["notes"]
    assert "it is damaged, and what comes after that is left out" in notes[0]


def test_a_phase_that_has_sampled_nothing_says_so(tmp_path, capsys):
    planted = PlantedRun(tmp_path, {"grpo": "grpo", "drawn": "generate"})
    with pytest.raises(UserMistake, match="grpo has logged no samples yet; see `afterok status"):
        inspected(planted, "grpo", capsys)
    with pytest.raises(UserMistake, match="drawn is not sealed yet"):
        inspected(planted, "drawn", capsys)


def test_of_an_array_the_report_shows_samples_of_several_elements(tmp_path):
    """Of a kind of phase of the user's that logs samples as GRPO does."""
    planted = PlantedRun(tmp_path, {"grpo": "my.grpo"}, elements=7)
    for element in range(7):
        keep = planted.run.artifact(planted.phases["grpo"]).keep_folder(element, 7)
        (keep / "samples").mkdir(parents=True)
        for step in range(1, 6):
            line = {"step": step, **sample(1, 0, completion=f"of {element}")}
            (keep / "samples" / f"step_{step:06d}.jsonl").write_text(json.dumps(line))
    found = groups_of(planted.run, planted.phases["grpo"])
    told = [(step.element, step.step, step.groups[0].samples[0].completion) for step in found.steps]
    assert told == [(n, step, f"of {n}") for n in (0, 2, 4, 6) for step in (1, 5)]
    assert found.notes[0] == "grpo: samples of the elements 0, 2, 4, 6 of 7 are shown"
