"""Weights and overlong_of by file name, in a pipeline whose inputs are paths and other phases' outputs."""

import json

from jobs.artifacts.seal import read_seal
from tests.command import afterok
from tests.data_tools.chats import template_of, write_tokenizer

PIPELINE = """
name: blend
phases:
  kept: {uses: tests.toy.chats}
  data:
    uses: materialize
    with:
      tokenizer: TOKENIZER
      source: {inputs: [FOLDER/maths.jsonl, FOLDER/chat.jsonl, "${phases.kept.out}/chat.jsonl"]}
  packs:
    uses: pack
    with:
      store: "${phases.data.out}"
      pack_length: 64
      overlong_of: {maths.jsonl: split}
      weights: {maths.jsonl: 3, "FOLDER/chat.jsonl": 1, "${phases.kept.out}/chat.jsonl": 2}
"""


def test_weights_and_overlong_of_go_by_file_name_and_by_a_phases_output(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template=template_of("qwen3"))
    for name, length in (("maths.jsonl", 60), ("chat.jsonl", 1)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {row}"},
                    {"role": "assistant", "content": f"{row} " * length},
                ]
            }
            for row in range(12)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, run = tmp_path / "p.yaml", tmp_path / "run"
    text = PIPELINE.replace("TOKENIZER", str(tokenizer)).replace("FOLDER", str(tmp_path))
    path.write_text(text)
    for wrong, told in (
        ("packs.with.weights={mats.jsonl: 1}", "did you mean"),
        ("packs.with.overlong_of={mats.jsonl: split}", "no source matches"),
        ("packs.with.weights={maths.jsonl: 1}", "has none; give a share"),
    ):
        refused = afterok("plan", path, wrong, "cluster=local", "--run", run, check=2)
        assert told in refused.stderr and "Traceback" not in refused.stderr
    afterok("run", path, "cluster=local", "--run", run)
    facts = read_seal(next(run.glob("packs/*/seal.json"))).facts
    assert facts["weights"] == [3.0, 1.0, 2.0]
    sheet = json.loads(next(run.glob("packs/*/work/*/balance.json")).read_text())["sources"]
    assert sheet[0]["kept"] == 12 and "overlong" not in sheet[0]["dropped"]  # split, not dropped
