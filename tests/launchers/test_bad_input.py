"""Wrong data, end to end: one line with file and line, exit code 2, no artifact and no seal of the phase it broke."""

import json
import subprocess
import sys

import pytest

from tests.command import ROOT, afterok, afterok_json, one_line

TINY = "jobs/pipelines/tiny.yaml"
GOOD = {"question": "?", "answer": "48/2 = <<48/2=24>>24, then <<24+1=25>>25\n#### 25"}
INIT = "{uses: init_model, with: {alphabet_task: calculator, layers: 1, hidden: 16, heads: 2, kv_groups: 1, ffn: 16}}"
DATA = """
    uses: materialize
    array: 2
    with: {task: calculator, tokenizer: "TOKENIZER", source: {inputs: ["ROWS"]}, OTHERS}
"""
LINES = [json.dumps(GOOD).encode()] * 6


def pipeline_of(folder, rows, others=None, tokenizer="${phases.init.out}"):
    """Write a pipeline that materializes the rows of each of several files, {name: bytes}, in a phase of that name."""
    text = f"name: only\nphases:\n  init: {INIT}\n"
    for name, data in rows.items():
        (folder / f"{name}.jsonl").write_bytes(data)
        phase = DATA.replace("ROWS", str(folder / f"{name}.jsonl")).replace("OTHERS", (others or {}).get(name, ""))
        text += f"  {name}:{phase.replace('TOKENIZER', tokenizer if name != 'empty' else str(folder / 'no_tokenizer'))}"
    (folder / "only.yaml").write_text(text)
    return folder / "only.yaml"


@pytest.fixture
def pipeline(tmp_path):
    return pipeline_of(tmp_path, {"data": b"\n".join(LINES)})


BAD = {  # phase: (the malformed line, what is said of it)
    "cut": (b'{"question": "?"', "JSON"),
    "listed": (b'["not", "an", "object"]', "object"),
    "poor": (b'{"question": "?"}', "answer"),
    "bytes": (b"\xff\xfe{}", "UTF-8"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run whose phases each read other rows: (its folder, that of the rows, the command, {phase: status})."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "no_tokenizer").mkdir()
    rows = {name: b"\n".join([*LINES[:4], bad, *LINES[4:]]) + b"\n" for name, (bad, _) in BAD.items()}
    rows |= {"bucket": b"\n".join([*LINES, b"{broken"]) + b"\n", "good": b"\n".join(LINES), "empty": b"\n".join(LINES)}
    file, run = pipeline_of(folder, rows, {"bucket": "on_bad_row: bucket, dedupe: false"}), folder / "run"
    done = afterok("run", file, "--run", run, "cluster=local", check=2)
    return run, folder, done, {phase["phase"]: phase for phase in afterok_json("status", run)["phases"]}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_line_is_named_and_nothing_is_sealed(ended, name):
    run, folder, _, phases = ended
    line = phases[name]["message"]
    assert line.startswith(f"{folder}/{name}.jsonl:5: ") and "\n" not in line and BAD[name][1] in line
    assert phases[name]["exit_code"] == 2 and "Traceback" not in (run / name / "logs/a1.1.out").read_text()
    assert not list(run.glob(f"{name}/*/seal.json"))
    assert len(list(run.glob(f"{name}/*/seals/*.json"))) == 1  # the other element is good


def test_one_of_the_mistakes_is_told_in_one_line_at_the_end(ended):
    _, _, done, phases = ended
    line = one_line(done)
    assert any(f"{name} failed: {phase['message']} (log: " in line for name, phase in phases.items())


def test_on_bad_row_bucket_counts_it_instead(ended):
    facts = ended[3]["bucket"]["facts"]
    assert (facts["lines"], facts["rows"], facts["kept"]) == (7, 12, 12)
    assert facts["buckets"] == {"malformed_line": 1}


def test_a_tokenizer_folder_without_a_tokenizer_fails_the_phase_in_one_line(ended):
    _, folder, _, phases = ended
    assert str(folder / "no_tokenizer") in phases["empty"]["message"] and phases["empty"]["exit_code"] == 2


@pytest.mark.parametrize("override, expected", [
    ("data.with.tokenizer=./no/such/tokenizer", "data.with.tokenizer: './no/such/tokenizer': no such file or folder"),
    ("data.with.on_bad_row=bukcet", "unknown value 'bukcet' (did you mean bucket?"),
    ("data.with.source.inputs=[absent.jsonl]", "data.with.source.inputs: 'absent.jsonl': no such file or folder"),
    ("data.with.task=calculater", "unknown task 'calculater' (did you mean calculator?"),
    ("data.with.source.synthetic_rows=many", "data.with.source.synthetic_rows: 'many' is not of type int"),
    ("init.with.heads=3", "heads"),
    ("init.uses=init_modle", "unknown phase kind 'init_modle' (did you mean init_model?"),
])  # fmt: skip
def test_a_wrong_setting_is_refused_before_anything_is_submitted(tmp_path, pipeline, override, expected):
    line = one_line(afterok("run", pipeline, override, "--run", tmp_path / "run", "cluster=local", check=2))
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_training_plan_that_cannot_be_is_refused_with_numbers(tmp_path):
    done = afterok(
        "plan",
        TINY,
        "sft.resources.ranks_per_node=3",
        "sft.with.schedule=cosin",
        "sft.with.parallel.tensor=2",
        "--run",
        tmp_path / "run",
        "cluster=local",
        check=2,
    )
    assert "did you mean cosine" in done.stderr and "3" in done.stderr and "Traceback" not in done.stderr


def test_an_input_that_changes_after_submission_is_noticed_by_the_job(ended):
    run, folder, _, _ = ended
    for seal in [*run.glob("good/*/seal.json"), *run.glob("good/*/seals/*.json")]:
        seal.unlink()
    (folder / "good.jsonl").write_bytes(b"\n".join(LINES[:3]))
    command = [sys.executable, "-m", "jobs.worker", str(run), "good", "0"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and "changed since it was submitted" in done.stderr
