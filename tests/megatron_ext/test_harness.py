"""lm-evaluation-harness beside ours: same model, same prompts, so same log-likelihoods, completions and accuracies.

It runs under `soak`, since it needs lm-eval: that of LMEVAL_PYTHON, or one that is installed into an environment of the
test from the package index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_tools.base import durable
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.tasks.mix import Entry, MixConfig, load_items
from data_tools.tasks.task import Item, Source
from megatron_ext.entrypoints import evaluate, import_hf, init_model
from megatron_ext.rollout.settings import EngineConfig
from tests.data_tools.chats import write_tokenizer
from tests.megatron_ext.rounding import logits_bound

RELEASE = "lm-eval==0.4.13"
TOKENS = 12  # new ones of a completion
SCHOOL = [
    {"id": str(n), "question": f"Which of these is number {n}?", "answerKey": "ABC"[n % 3],
     "choices": {"text": ["one", "two of them", "a b c d e f"], "label": ["A", "B", "C"]}}
    for n in range(12)
]  # fmt: skip
COMMON = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: "{{prompt}}"
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = f"""
output_type: generate_until
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {TOKENS}}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that has lm-eval, and all that this one has."""
    if given := os.environ.get("LMEVAL_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("lmeval")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python3*")) / "site-packages"
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([python, "-m", "pip", "install", "-q", RELEASE], check=True)
    return str(python)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    for name in ("hf", "model"):
        (root / name).mkdir()
    write_tokenizer(root / "tokenizer", template=None)
    sizes: dict[str, Any] = dict(hidden=48, ffn=96, layers=2, max_positions=4096)
    init_model.run(init_model.Config(tokenizer=str(root / "tokenizer"), **sizes), root / "hf", root)
    import_hf.run(import_hf.Config(str(root / "hf")), root / "model", root)
    return root


def ours(entries: dict[str, Entry], model: Path, folder: Path) -> Path:
    """Evaluate with afterok; return the folder in the harness's layout."""
    config = evaluate.Config(model=str(model / "model"), mix=MixConfig(entries), max_new_tokens=TOKENS,
                             engine=EngineConfig(kv_gib=0.5, max_batch=32))  # fmt: skip
    (folder / "ours").mkdir()
    evaluate.run(config, folder / "ours", folder / "keep")
    return folder / "ours" / "harness"


def theirs(items: dict[str, list[Item]], model: Path, folder: Path, python: str) -> Path:
    """Evaluate with the harness, on the same prompts as local tasks; return its folder."""
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, own in items.items():
        lines = []
        for item in own:
            line = {"prompt": item.prompt, "gold": item.answer}
            if "choices" in item.columns:
                gold = item.columns["letters"].index(item.answer)
                line |= {"prompt": str(item.prompt).rstrip(), "choices": item.columns["choices"], "gold": gold}
            lines.append(json.dumps(line) + "\n")
        (tasks / f"{name}.jsonl").write_text("".join(lines))
        kind = CHOICES if "choices" in own[0].columns else WRITTEN
        (tasks / f"{name}.yaml").write_text(
            (COMMON + kind).replace("NAME", name).replace("FILE", str(tasks / f"{name}.jsonl"))
        )
    # A folder of its own for the tokenizer: beside a config.json of qwen2, transformers takes Qwen2's own expression in
    # place of the one in tokenizer.json.
    arguments = f"pretrained={model / 'hf'},tokenizer={model / 'tokenizer'},dtype=float32"
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", arguments,
               "--tasks", ",".join(items), "--include_path", str(tasks), "--output_path", str(folder / "theirs"),
               "--log_samples", "--batch_size", "1", "--device", "cpu"]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = (folder / "theirs").iterdir()
    return found


def rows(folder: Path, task: str) -> list[dict[str, Any]]:
    [file] = folder.glob(f"samples_{task}*.jsonl")
    return sorted(map(json.loads, open(file)), key=lambda row: row["doc_id"])


def check_choices(model: Path, items: list[Item], mine: list[dict], other: list[dict]) -> None:
    """See that log-likelihoods agree within the rounding of two computations in fp32, and so does what follows."""
    exact = AutoModelForCausalLM.from_pretrained(model / "hf", dtype=torch.float32).eval()
    tokenizer, near = load_tokenizer(str(model / "hf")), 0.0
    for item, a, b in zip(items, mine, other, strict=True):
        found, asked = ([float(one[0]) for one in row["filtered_resps"]] for row in (a, b))
        before, texts = str(item.prompt).rstrip(), item.columns["choices"]
        own = [len(tokenizer.encode(f"{before} {text}")) - len(tokenizer.encode(before)) for text in texts]
        longest = torch.tensor([tokenizer.encode(f"{before} {max(texts, key=len)}")])
        bound = 2 * 2 * max(own) * logits_bound(exact, longest)  # a log-prob moves by at most twice what a logit does
        assert all(abs(one - two) <= bound for one, two in zip(found, asked, strict=True)), (item.uid, found, asked)
        near = max(near, *(abs(one - two) for one, two in zip(found, asked)))
        assert (a["acc"], a["acc_norm"]) == (b["acc"], b["acc_norm"]), item.uid
    print(f"log-likelihoods differ by at most {near:.2e}")


@pytest.mark.soak
def test_the_harness_gives_the_same_for_the_same_model_and_prompts(inputs, model, harness, tmp_path):
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SCHOOL))
    likely = {"answered_by": "likelihood"}
    entries = {
        "stem": Entry("mmlu", likely, Source([str(inputs.data("qwen_math/mmlu_stem.test.jsonl"))]), limit=40),
        "arc": Entry("arc_easy", {**likely, "asked_as": "texts"}, Source([str(tmp_path / "arc.jsonl")])),
        "svamp": Entry("svamp", {"chat": False}, Source([str(inputs.data("qwen_math/svamp.test.jsonl"))]), limit=20),
    }
    items = {name: load_items(name, entry) for name, entry in entries.items()}
    mine, other = ours(entries, model, tmp_path), theirs(items, model, tmp_path, harness)
    told = durable.read_json(mine / "results.json")
    [file] = other.glob("results_*.json")
    said = json.loads(file.read_text())
    for name in entries:
        pairs = list(zip(rows(mine, name), rows(other, name), strict=True))
        assert all(set(theirs_) <= set(ours_) for ours_, theirs_ in pairs), name  # the names of a line
        assert all(a["prompt_hash"] == b["prompt_hash"] for a, b in pairs), name
    assert [row["resps"] for row in rows(mine, "svamp")] == [row["resps"] for row in rows(other, "svamp")]
    for name in ("stem", "arc"):
        check_choices(model, items[name], rows(mine, name), rows(other, name))
        for metric in ("acc,none", "acc_norm,none", "acc_stderr,none", "acc_norm_stderr,none"):
            assert told["results"][name][metric] == pytest.approx(said["results"][name][metric])
    names = {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"}
    assert names <= set(told) & set(said)
    assert told["higher_is_better"]["arc"] == said["higher_is_better"]["arc"]
    assert told["n-samples"]["stem"]["effective"] == said["n-samples"]["stem"]["effective"]
    code = "import json, sys; from lm_eval.utils import make_table; print(make_table(json.load(open(sys.argv[1]))))"
    table = subprocess.run([harness, "-c", code, mine / "results.json"], capture_output=True, text=True)
    assert table.returncode == 0 and f"{told['results']['stem']['acc,none']:.4f}" in table.stdout, table.stderr[-2000:]
