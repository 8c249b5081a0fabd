"""Wrong data, end to end: one line with file and line, exit code 2, no artifact and no seal of the phase it broke."""

import json
import subprocess
import sys

import pytest

from tests.command import ROOT, afterok, afterok_json, one_line

TINY = "jobs/pipelines/tiny.yaml"
GOOD = {"question": "?", "answer": "48/2 = <<48/2=24>>24, then <<24+1=25>>25\n#### 25"}
ONLY_DATA = """
name: only
phases:
  init: {uses: init_model, with: {alphabet_task: calculator, layers: 1, hidden: 16, heads: 2, kv_groups: 1, ffn: 16}}
  data:
    uses: materialize
    array: 3
    with: {task: calculator, tokenizer: "${phases.init.out}", source: {inputs: [INPUT]}}
"""


@pytest.fixture
def pipeline(tmp_path):
    def write(data: bytes):
        (tmp_path / "rows.jsonl").write_bytes(data)
        path = tmp_path / "only.yaml"
        path.write_text(ONLY_DATA.replace("INPUT", str(tmp_path / "rows.jsonl")))
        return path

    return write


LINES = [json.dumps(GOOD).encode()] * 6


@pytest.mark.parametrize("bad, reason", [
    (b'{"question": "?"', "JSON"), (b'["not", "an", "object"]', "object"), (b'{"question": "?"}', "answer"),
    (b"\xff\xfe{}", "UTF-8"),
])  # fmt: skip
def test_a_malformed_line_is_named_and_nothing_is_sealed(tmp_path, pipeline, bad, reason):
    path = pipeline(b"\n".join([*LINES[:4], bad, *LINES[4:]]) + b"\n")
    done = afterok("run", path, "--run", tmp_path / "run", "cluster=local", check=2)
    line = one_line(done)
    assert f"{tmp_path}/rows.jsonl:5: " in line and reason in line
    assert not list((tmp_path / "run").glob("data/*/seal.json"))
    assert len(list((tmp_path / "run").glob("data/*/seals/*.json"))) == 2  # the other elements are good


def test_on_bad_row_bucket_counts_it_instead(tmp_path, pipeline):
    path = pipeline(b"\n".join([*LINES, b"{broken"]) + b"\n")
    afterok(
        "run", path, "data.with.on_bad_row=bucket", "data.with.dedupe=false", "--run", tmp_path / "run", "cluster=local"
    )
    facts = {p["phase"]: p["facts"] for p in afterok_json("status", tmp_path / "run")["phases"]}["data"]
    assert (facts["lines"], facts["rows"], facts["kept"]) == (7, 12, 12)
    assert facts["buckets"] == {"malformed_line": 1}


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
    line = one_line(
        afterok("run", pipeline(b"\n".join(LINES)), override, "--run", tmp_path / "run", "cluster=local", check=2)
    )
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_folder_without_a_tokenizer_fails_the_phase_in_one_line(tmp_path, pipeline):
    (tmp_path / "empty").mkdir()
    done = afterok(
        "run",
        pipeline(b"\n".join(LINES)),
        f"data.with.tokenizer={tmp_path}/empty",
        "--run",
        tmp_path / "run",
        "cluster=local",
        check=2,
    )
    assert str(tmp_path / "empty") in one_line(done)


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


def test_an_input_that_changes_after_submission_is_noticed_by_the_job(tmp_path, pipeline):
    path = pipeline(b"\n".join(LINES))
    afterok("run", path, "--run", tmp_path / "run", "cluster=local")
    next((tmp_path / "run").glob("data/*/seal.json")).unlink()
    for seal in (tmp_path / "run").glob("data/*/seals/*.json"):
        seal.unlink()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(LINES[:3]))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.worker", str(tmp_path / "run"), "data", "0"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and "changed since it was submitted" in done.stderr
