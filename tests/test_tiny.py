"""The quick start itself, short: tiny.yaml here and on a real Slurm, killed and resumed, exported and read back.

As the README shows it, with its gains, it runs under soak: python -m pytest tests/test_tiny.py -m soak -k gain -s
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.chats.chat import encode_row
from data_tools.chats.tokenizer import load_tokenizer
from data_tools.packs.store import Store
from jobs.artifacts.seal import read_seal
from launchers.planning.ledger import Ledger
from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401
from tests.command import ROOT, TINY_SHORT, afterok, afterok_json, one_line, wait_for, wait_until_sealed
from tests.megatron_ext.rounding import logits_bound

TINY = "jobs/pipelines/tiny.yaml"
FROM_SFT = {"sft", "trained", "grpo", "reinforced", "sampled", "kept", "rs_data", "rs_packs", "rs_sft", "refined",
            "exported"}  # fmt: skip
FROM_GRPO = FROM_SFT - {"sft", "trained"}


def seal_of(run: Path, phase: str):
    return read_seal(next(run.glob(f"{phase}/*/seal.json")))


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def local_run(tmp_path_factory, scrub_slurm):  # noqa: F811
    run = tmp_path_factory.mktemp("tiny") / "run"
    done = afterok("run", TINY, *TINY_SHORT, "cluster=local", "--run", run, timeout=900)
    return run, done.stdout


def test_every_phase_is_sealed_and_the_summary_says_accuracy_before_and_after(local_run):
    run, printed = local_run
    status = afterok_json("status", run)
    assert status["finished"] and len(status["phases"]) == 16
    facts = {phase["phase"]: phase["facts"] for phase in status["phases"]}
    assert facts["untrained"]["accuracy"] <= facts["trained"]["accuracy"]
    assert facts["trained"]["seen_prompts"] == 0 and facts["trained"]["unseen_prompts"] > 80
    assert facts["sft"]["loss_last"] < facts["sft"]["loss_first"]
    assert facts["grpo"]["step"] == 4 and facts["grpo"]["samples"] == 4 * 16 * 8
    for before, after in (("untrained", "trained"), ("trained", "reinforced"), ("reinforced", "refined")):
        gained = facts[after]["sampled_accuracy"] - facts[before]["sampled_accuracy"]  # on the same prompts
        assert facts[after]["gain"] == pytest.approx(gained) and facts[after]["gain_error"] >= 0
    for word in ("untrained", "trained", "accuracy", "reinforced", "refined", "gain", str(run / "exported")):
        assert word in printed


def test_the_evaluations_stand_side_by_side_with_what_each_gained_over_the_first(local_run):
    run, _ = local_run
    found = afterok_json("scores", run, "trained", "reinforced")
    (row,) = [row for row in found["rows"] if (row["task"], row["measure"]) == ("calculator", "sampled_accuracy")]
    facts = {phase["phase"]: phase["facts"] for phase in afterok_json("status", run)["phases"]}
    for name, score in zip(found["names"], row["scores"], strict=True):
        assert score["value"] == facts[name]["sampled_accuracy"]
    first, second = row["scores"]
    assert first["gain"] is None and second["gain"]["value"] == facts["reinforced"]["gain"]


def test_what_was_sampled_right_is_what_the_last_sft_learns(local_run):
    """A row of it has the ids of a prompt, of the completion as it was sampled, and of the end."""
    run, _ = local_run
    sampled, kept = (json_lines(seal_of(run, phase).folder / name) for phase, name in
                     (("sampled", "samples.jsonl"), ("kept", "chat.jsonl")))  # fmt: skip
    right = {(line["prompt"], line["completion"]) for line in sampled if line["correct"] and line["finish"] == "stop"}
    told = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in kept]
    assert len(sampled) == 256 * 4 and told and set(told) <= right
    assert sorted(prompt for prompt, _ in told) == sorted({prompt for prompt, _ in right})  # one of each
    store, tokenizer = Store(seal_of(run, "rs_data").folder), load_tokenizer(str(seal_of(run, "init").folder))
    assert {tuple(store.ids(row).tolist()) for row in range(len(told))} == {
        tuple(encode_row(tokenizer, *pair)[0].tolist()) for pair in told
    }


def test_the_rows_of_the_data_add_up(local_run):
    run, _ = local_run
    balance = json.loads((seal_of(run, "data").folder / "balance.json").read_text())
    text = json.dumps(balance)
    assert "4000" in text and "duplicate" in text


def test_the_metrics_of_every_logged_step_are_there_once(local_run):
    run, _ = local_run
    steps = [line["step"] for line in json_lines(next(run.glob("sft/*/metrics.jsonl")))]
    assert steps == sorted(set(steps)) and steps[-1] == 100


def test_each_sample_of_grpo_is_in_the_log_once_with_what_it_was_worth(local_run):
    run, _ = local_run
    paths = sorted(next(run.glob("grpo/*/samples")).glob("step_*.jsonl"))
    lines = [line for path in paths for line in json_lines(path)]
    assert len({(line["item"], line["sample"]) for line in lines}) == len(lines) == 4 * 16 * 8
    for line in lines:
        assert line["prompt"].endswith("=") and line["entry"] == "calculator"
        assert line["reward"] == line["parts"]["correct"] if line["reward"] is not None else line["note"]


def test_a_recorded_rollout_is_drawn_again_to_the_same_tokens(local_run):
    run, _ = local_run
    line = json_lines(next(run.glob("grpo/*/samples")) / "step_000003.jsonl")[5]
    name = f"3/{line['item']}/{line['sample']}"
    done = afterok("logs", run, "grpo", "--replay", name)
    found = json.loads(done.stdout)
    assert found["differs"] is False and found["tokens"] == found["same_tokens"] == line["tokens"]
    assert found["logprob_difference"] < 1e-4 and "the same" in done.stderr
    assert "recorded are those of steps 3 to 4" in one_line(afterok("logs", run, "grpo", "--replay", "1/0/0", check=2))


def test_a_second_run_submits_nothing_and_another_lr_reruns_what_depends_on_it(local_run):
    run, _ = local_run
    jobs = len(Ledger(run / "ledger.jsonl").jobs())
    assert "nothing to submit" in afterok("run", TINY, *TINY_SHORT, "cluster=local", "--run", run).stdout
    assert len(Ledger(run / "ledger.jsonl").jobs()) == jobs
    plan = afterok_json("plan", TINY, *TINY_SHORT, "sft.with.lr=1e-3", "cluster=local", "--run", run)["phases"]
    found = {phase["phase"]: (phase["action"], phase["reasons"]) for phase in plan}
    assert found["sft"] == ("rerun", ["sft.with.lr 0.002 → 0.001"])
    assert found["trained"] == found["grpo"] == ("rerun", ["because of sft"])
    assert {name for name in found if found[name][0] != "reuse"} == FROM_SFT
    again = afterok("resubmit", run, "grpo", "grpo.with.mix.entries.calculator.weight=0.6", "--dry-run").stdout
    assert {line.split()[1] for line in again.splitlines() if line.startswith("start ")} == FROM_GRPO
    layout = afterok_json("plan", TINY, *TINY_SHORT, "sft.with.parallel.tensor=2", "cluster=local", "--run", run)[
        "phases"
    ]
    assert {phase["action"] for phase in layout} == {"reuse"}  # parallel degrees are recorded, not keyed


def copied(finished: Path, run: Path, *lost: str) -> Path:
    """A copy of a finished run without what some phases made."""
    shutil.copytree(finished, run)
    for phase in lost:
        shutil.rmtree(run / phase)
    return run


def assert_same_training(here: Path, there: Path, *phases: str) -> None:
    for phase in phases:
        assert seal_of(here, phase).facts["weights_digest"] == seal_of(there, phase).facts["weights_digest"]
    results = [json.loads((seal_of(run, "trained").folder / "result.json").read_text()) for run in (here, there)]
    assert results[0] == results[1]


def test_the_same_training_on_slurm_seals_the_same_weights_bit_for_bit(local_run, dev_cluster, tmp_path):  # noqa: F811
    env = dev_cluster.env()
    run = copied(local_run[0], tmp_path / "slurm", "sft", "trained")
    afterok("submit", TINY, *TINY_SHORT, "--run", run, env=env)
    wait_until_sealed(run, "trained", timeout=400, env=env)
    assert_same_training(local_run[0], run, "sft")


@pytest.mark.soak
def test_the_same_run_on_slurm_exports_the_same_files(local_run, dev_cluster, tmp_path):  # noqa: F811
    run, env = tmp_path / "slurm", dev_cluster.env()
    afterok("run", TINY, *TINY_SHORT, "--run", run, env=env, timeout=900)
    assert_same_training(local_run[0], run, "sft", "grpo")
    sha = [seal_of(r, "exported").content["files"] for r in (local_run[0], run)]
    names = [name for name in sha[0] if name.endswith(".safetensors")]
    assert names and all(sha[0][name]["sha256"] == sha[1][name]["sha256"] for name in names)


@pytest.mark.soak
def test_each_phase_of_training_gains_more_than_two_standard_errors(tmp_path):
    """The README's first command, with its control."""
    done = afterok("run", TINY, "params.control=true", "cluster=local", "--run", tmp_path / "run", timeout=3600)
    print(done.stdout)
    facts = {phase["phase"]: phase["facts"] for phase in afterok_json("status", tmp_path / "run")["phases"]}
    for phase in ("trained", "reinforced", "refined"):
        assert facts[phase]["gain"] > 2 * facts[phase]["gain_error"], phase


@pytest.mark.soak  # by CI in tests/megatron_ext/test_resume.py, of ranks that nobody launched
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_training_rank_resumes_to_the_same_weights_bit_for_bit(local_run, tmp_path, victim):
    finished, _ = local_run
    run = copied(finished, tmp_path / "run", *FROM_SFT)
    afterok("submit", TINY, *TINY_SHORT, "cluster=local", "--run", run)
    wait_for("a checkpoint", lambda: list(run.glob("sft/*/checkpoints/step_*")), 120)
    ranks = subprocess.run(["pgrep", "-f", f"jobs.worker {run} sft"], capture_output=True, text=True).stdout.split()
    children = [int(pid) for pid in ranks if b"AFTEROK_RANK=%d\0" % victim in Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(children) == 1
    os.kill(children[0], signal.SIGKILL)
    wait_for("the restart", lambda: list(run.glob("sft/*/leases/0000.a2.r1.*")))
    assert not list(run.glob("sft/*/seal.json"))
    wait_for("the end of training", lambda: list(run.glob("sft/*/seal.json")), 300)
    afterok("cancel", run)
    facts = seal_of(run, "sft").facts
    assert facts["resumed_from"] > 0
    assert facts["weights_digest"] == seal_of(finished, "sft").facts["weights_digest"]
    here, there = ([line["step"] for line in json_lines(next(r.glob("sft/*/metrics.jsonl")))] for r in (run, finished))
    assert here == there


LOGITS = """
import sys, torch
from pathlib import Path
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
ids = torch.load(sys.argv[2])
with ranks.started(ParallelPlan(), 0), torch.no_grad():
    import numpy
    from megatron_ext.layers.documents import packed_documents
    from megatron_ext.layers.loss_head import position_logits
    model = model_folder.load_model(model_folder.open_folder(sys.argv[1]), ParallelPlan(), "", "torch")
    documents = packed_documents(numpy.array([0, len(ids)]), ids.device)
    wanted = torch.arange(len(ids))
    torch.save(position_logits(model, ids[None], documents.positions[None], documents, wanted), sys.argv[3])
"""


def test_the_exported_model_gives_the_logits_of_the_megatron_model(local_run, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = local_run
    exported = seal_of(run, "exported").folder
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(exported)("48/2=42")["input_ids"])
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run(
        [
            sys.executable,
            "-c",
            LOGITS,
            str(seal_of(run, "rs_sft").folder),
            str(tmp_path / "ids.pt"),
            str(tmp_path / "logits.pt"),
        ],
        cwd=ROOT,
        check=True,
    )
    ours = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    assert (ours[:, : theirs.size(1)] - theirs).abs().max() <= logits_bound(model, ids[None])
