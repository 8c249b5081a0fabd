"""The R1 pipelines from a nanochat checkpoint to an export, small, on a CPU (their plans: tests/test_seeds.py).

The model is random, so that nothing it says is right: GRPO gets a number of each text as its reward, and rejection
keeps samples by `correct: false`. What is tested is that each phase reads what the one before wrote, in the real
schemas.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from data_tools.base import durable
from launchers.planning.ledger import Ledger
from tests.command import ROOT, afterok, afterok_json
from tests.megatron_ext import test_nanochat, test_nanochat_tokenizer
from tests.r1_files import APART, small, tasks, written


@pytest.fixture
def nanochat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a nanochat run: checkpoints by source and tag, and its tokenizer."""
    monkeypatch.setitem(sys.modules, "tiktoken", ModuleType("tiktoken"))
    core = ModuleType("tiktoken.core")
    core.Encoding = test_nanochat_tokenizer.Encoding  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiktoken.core", core)
    monkeypatch.setattr(core.Encoding, "__module__", "tiktoken.core")
    folder = tmp_path / "nanochat"
    (folder / "tokenizer").mkdir(parents=True)
    test_nanochat_tokenizer.written(folder / "tokenizer", core.Encoding)
    vocabulary = len(test_nanochat_tokenizer.ranks()) + len(test_nanochat_tokenizer.SPECIAL)
    monkeypatch.setattr(test_nanochat, "PADDED", vocabulary + 3)
    config = {"vocab_size": vocabulary, "sequence_len": 512}
    test_nanochat.checkpoint(folder / "chatsft_checkpoints" / "d2", step=7, **config)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return written(tmp_path)


def facts_of(run: Path) -> dict[str, dict[str, Any]]:
    return {phase["phase"]: phase["facts"] for phase in afterok_json("status", run)["phases"]}


def sent(run: Path, submission: int) -> set[str]:
    """The phases that a submission sent."""
    return {job.phase for job in Ledger(run / "ledger.jsonl").jobs() if job.submission == submission}


FROM_RS_DATA = {"rs_data", "rs_packs", "rs_sft", "rs_evaluated", "exported", "nanochat"}
PIPELINE = ROOT / "jobs/pipelines/r1_nanochat.yaml"


@pytest.mark.soak
def test_r1_runs_from_a_nanochat_checkpoint_to_an_export(tmp_path: Path, nanochat: Path, files: dict[str, str]) -> None:
    run = tmp_path / "run"
    given = small(nanochat, files)
    afterok("run", PIPELINE, *given, "--run", run, timeout=1500, env={"SFT_RECIPE": "r1_ot_mixed", "CHAT_RATIO": "0.4"})
    facts = facts_of(run)
    assert facts["cold_data"]["recipe"]["name"] == "r1_ot_mixed" and facts["cold_data"]["validation"]["rows"] == 10
    assert facts["kept"]["kept"] > 0 and facts["rs_data"]["recipe"]["name"] == "r1_rs_sft"
    assert facts["questions"]["questions"] == 3
    origin = durable.read_json(run / "submissions/1/pipeline.json")
    assert origin["variables"] == {
        "SFT_RECIPE": "params.recipe=r1_ot_mixed", "CHAT_RATIO": "params.recipe_params.chat_ratio=0.4"
    }  # fmt: skip
    # Another recipe of the last SFT reruns what reads it, and nothing else; the first variables still hold.
    afterok("resubmit", run, "rs_data", "params.rs_recipe=dolci_rs_sft", timeout=300)
    afterok("status", run, "--watch", timeout=900)
    again = facts_of(run)
    assert again["rs_data"]["recipe"]["name"] == "dolci_rs_sft" and again["cold_data"] == facts["cold_data"]
    changed = {name for name in facts if again[name] != facts[name]}
    assert changed <= FROM_RS_DATA and "rs_sft" in changed and sent(run, 2) == FROM_RS_DATA
    # So does another share of GSM8K in GRPO's mix: issue 16's own example.
    afterok("resubmit", run, "grpo", "grpo.with.mix.entries.gsm8k.weight=0.6", timeout=300)
    afterok("status", run, "--watch", timeout=900)
    assert sent(run, 3) == {"grpo", "grpo_evaluated", "sampled", "kept"} | FROM_RS_DATA
    status = afterok_json("status", run)
    assert status["finished"] and {phase["state"] for phase in status["phases"]} == {"COMPLETED"}


@pytest.mark.soak
def test_gsm8k_by_reinforcement_runs_from_a_nanochat_checkpoint(
    tmp_path: Path, nanochat: Path, files: dict[str, str]
) -> None:
    given = [f"params.{size}" for size in (f"nanochat={nanochat}", "tag=d2", "steps=1", "prompts=2", "samples=2",
                                           "max_tokens=8", "evaluation_prompts=1")]  # fmt: skip
    given += tasks(files, gsm8k_test="gsm8k_test")
    given += [f"params.gsm8k={{task: '{APART}', source: {{inputs: [{files['dapo']}]}}}}"]
    engine = "engine={kv_gib: 0.05, block_size: 16, max_batch: 16}"
    given += [f"{phase}.with.{engine}" for phase in ("before", "grpo", "after")]
    given += [f"{phase}.resources={{role: cpu}}" for phase in ("before", "grpo", "after")]
    given += ["grpo.with.advantage.drop_equal_groups=false", "grpo.with.rewarding.mask_truncated=false"]
    run = tmp_path / "run"
    afterok("run", ROOT / "jobs/pipelines/gsm8k_rl.yaml", *given, "--run", run, "cluster=local", timeout=900)
    assert set(facts_of(run)) == {"imported", "before", "grpo", "after", "exported"}
