"""The TES pipeline on a small gpt-oss, on a CPU: from CSV tables and an MXFP4 model to one that decides better.

The model is random but for a habit that transformers taught it: it answers with one of four actions in Harmony's final
channel, each as often. Its experts were made MXFP4 by our own export.
"""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_tools.prepare import harmony
from jobs.schema.pipeline import load_pipeline
from jobs.schema.references import substitute
from jobs.task import Task
from megatron_ext.entrypoints import export_hf, import_hf
from megatron_ext.models.gpt_oss.config import Dims, Yarn, hf_config
from megatron_ext.serving import converter, llama_cpp
from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401
from tests.command import afterok, afterok_json
from tests.megatron_ext.byte_bpe import byte_bpe

PIPELINE = Path("jobs/pipelines/tes_grpo.yaml")
HARMONY = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"]
IDENTITY = "You run a tank."  # in place of the long one, for prompts of few tokens
DATE = "2026-01-01"


def prompt(load: str, price: str, hour: int) -> str:
    return f"system: Answer with [0], [1], [2] or [3].\nuser: Hour {hour}. Load {load}, price {price}."


def values(load: str, price: str) -> list[float]:
    """Q-values of four actions: 2 where the load is high, else 0 or 1 by the price."""
    best = 2 if load == "high" else ("low", "high").index(price)
    return [1.0 if action == best else 0.5 + 0.1 * action for action in range(4)]


def table(path: Path, hours: range) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "timestep", *(f"q_action_{action}" for action in range(4))])
        for hour, load, price in itertools.product(hours, ("high", "low"), ("high", "low")):
            writer.writerow([prompt(load, price, hour), hour, *values(load, price)])
    return path


def answer(action: int) -> str:
    return f"<|channel|>final<|message|>[{action}]<|return|>"


def tokenizer(folder: Path) -> Any:
    """Byte-level BPE of the prompts, with Harmony's tokens."""
    texts = [rendered(load, price, 1) for load in ("high", "low") for price in ("high", "low")] * 9
    return byte_bpe(folder, [*texts, *map(answer, range(4))], HARMONY, eos="<|return|>", pad="<|endoftext|>")


def rendered(load: str, price: str, hour: int) -> str:
    return harmony.render(harmony.parse_legacy(prompt(load, price, hour)), DATE, "low", IDENTITY)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The folder of a model as it is released: MXFP4 experts, the rest bfloat16."""
    from transformers import GptOssConfig, GptOssForCausalLM

    root = tmp_path_factory.mktemp("tes")
    taught, folder = root / "taught", root / "released"
    words = tokenizer(taught)
    dims = Dims(
        hidden=64, heads=4, kv_groups=2, head_dim=16, window=32, sliding=(True, False), experts=4, top_k=2, ffn=64,
        swiglu_limit=7.0, vocabulary=len(words), tied=False, norm_epsilon=1e-5, rope_base=150000.0,
        yarn=Yarn(4.0, 64, 32.0, 1.0, truncate=False), max_positions=256, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**hf_config(dims, words.eos_token_id, words.pad_token_id))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # sinks and biases too
    texts = [rendered(load, price, 0) for load, price in itertools.product(("high", "low"), repeat=2)]
    asked = [words(text)["input_ids"] for text in texts]
    said = [words(answer(action))["input_ids"] for action in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(30):
        rows = [(asked[(step + row) % 4], said[row]) for row in range(4)]
        width = max(len(a) + len(b) for a, b in rows)
        ids = torch.tensor([a + b + [words.pad_token_id] * (width - len(a) - len(b)) for a, b in rows])
        labels = torch.full_like(ids, -100)
        for row, (a, b) in enumerate(rows):
            labels[row, len(a) : len(a) + len(b)] = ids[row, len(a) : len(a) + len(b)]
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(taught)
    for out in (root / "model", folder):
        out.mkdir()
    import_hf.run(import_hf.Config(str(taught)), root / "model", root)
    export_hf.run(export_hf.Config(str(root / "model"), quantization="mxfp4"), folder, folder)
    return folder


def overrides(released: Path, root: Path, **params: Any) -> list[str]:
    """Overrides that make the pipeline small."""
    given = {
        "model": released,
        "inputs": [str(table(root / "hours.csv", range(6)))],
        "held_out": [str(table(root / "held_out.csv", range(6, 9)))],
        "reasoning": "low",
        "prompt_tokens": 200,
        "max_tokens": 12,
        **params,
    }
    words = [f"params.{name}={json.dumps(value, default=str)}" for name, value in given.items()]
    words += [f"{phase}.with.identity={IDENTITY!r}" for phase in ("harmony_convert", "held_out_harmony")]
    words += [f"{phase}.with.engine.kv_gib=0.01" for phase in ("base_tested", "grpo", "test_adapter")]
    words += [f"{phase}.with.verifiers=1" for phase in ("base_tested", "grpo", "test_adapter", "run_exported")]
    return [*words, "grpo.with.engine.max_batch=16", "cluster=local"]


def run(words: list[str], root: Path, only: tuple[str, ...] = ()) -> dict[str, tuple[dict[str, Any], Path]]:
    """Facts and folder of each phase of the pipeline, run one after the other in this process."""
    made: dict[str, tuple[dict[str, Any], Path]] = {}
    for name, phase in load_pipeline(PIPELINE, words, {}).phases.items():
        if only and name not in only:
            continue
        config = substitute(phase.config, {earlier: str(out) for earlier, (_, out) in made.items()})
        out, part, keep = (root / name / folder for folder in ("out", "part", "keep"))
        for folder in (out, part, keep):
            folder.mkdir(parents=True)
        finish = getattr(phase.kind.module, "finish", None)
        task = Task(name, 0, 1, 0, part if finish else out, keep, 0, 1)
        facts = phase.kind.module.run(config, task)
        if finish:
            task.out = out
            facts = finish([part], config, task)
        made[name] = facts, out
    return made


def test_the_whole_pipeline_from_tables_to_mxfp4_again(released, tmp_path):
    words = overrides(released, tmp_path, steps=2, prompts=2, group=4, test_samples=1, test_prompts=4, save_steps=0)
    made = run([*words, "params.lr=0.01", "params.base=mxfp4"], tmp_path / "run")
    facts = {name: told for name, (told, _) in made.items()}
    assert facts["harmony_convert"]["rows"] == facts["q_rewards"]["rows"] == 24
    assert facts["grpo"]["samples"] == 16 and facts["grpo"]["parts"]["experts"]["is"] == "mxfp4"
    assert facts["grpo"]["lora"]["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"]
    for tested in ("base_tested", "test_adapter", "run_exported"):
        assert facts[tested]["prompts"] == 4 and facts[tested]["held_out_prompts"] == 4
    assert "reward_gain" in facts["test_adapter"] and "reward_gain" in facts["run_exported"]
    assert (facts["run_exported"]["quantized"], facts["run_exported"]["dtype"]) == ("mxfp4", "bfloat16")
    told = facts["quantize_mxfp4"]["quantized"]
    assert told["matrices"] == 2 * 2 * 4 and 0 < told["relative_error"] < 0.1
    exported, before = (load_file(folder / "model.safetensors") for folder in (made["quantize_mxfp4"][1], released))
    assert {name: tensor.dtype for name, tensor in exported.items()} == {n: t.dtype for n, t in before.items()}
    untouched = ("norm.weight", "sinks", "embed_tokens.weight", "lm_head.weight")
    same = [torch.equal(exported[name], before[name]) for name in before if name.endswith(untouched)]
    assert same and all(same)
    _check_completions(tmp_path / "run" / "grpo" / "keep")
    lines = map(json.loads, (tmp_path / "run" / "grpo" / "keep" / "metrics.jsonl").read_text().splitlines())
    outcomes = [line["outcomes"]["decisions"] for line in lines if "outcomes" in line]
    assert len(outcomes) == 2 and all({"reward", "regret"} <= outcome.keys() for outcome in outcomes)
    packaged = made["package"][1]
    assert {"README.md", "serve_vllm.sh", "config.json", "model.safetensors"} <= {
        file.name for file in packaged.iterdir()
    }
    card = (packaged / "README.md").read_text()  # there are no seals here, so results go by their folders
    assert all(f"* {name}/out: " in card for name in ("base_tested", "test_adapter", "run_exported"))


def _check_completions(kept: Path) -> None:
    """The table that the pipeline asks for: each sample of 2 steps, 2 prompts and 4 samples once, in both files."""
    with open(kept / "micro_step_completions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (kept / "micro_step_completions.jsonl").read_text().splitlines()]
    assert list(rows[0]) == list(lines[0]) == ["step", "micro_step", "prompt", "completion", "action", "reward"]
    assert len(rows) == len(lines) == 16 and {(row["step"], row["micro_step"]) for row in rows} == {
        (step, number) for step in "12" for number in "01"
    }
    scored = [row for row in rows if row["reward"]]
    assert scored and all(f"[{row['action']}]" in row["completion"] for row in scored)


@pytest.mark.soak
# Expected reward on 2026-11-30: before, of the adapter, of the exported model. The gains are paired by prompt:
# seed 1  -0.287 ± 0.023   0.112 ± 0.049   0.127 ± 0.046   gains 0.399 ± 0.059 and 0.414 ± 0.053
# seed 2  -0.354 ± 0.014   0.152 ± 0.042   0.171 ± 0.058   gains 0.506 ± 0.044 and 0.525 ± 0.058
# seed 3  -0.297 ± 0.015  -0.082 ± 0.038  -0.080 ± 0.039   gains 0.215 ± 0.038 and 0.217 ± 0.043
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_expected_reward_on_held_out_rows_rises_by_more_than_two_errors(released, tmp_path, seed):
    # Half of what this model says names no action. Masked, or worth 0 where a reward is 0.1 on average, that teaches no
    # format: seed 1 then gained 0.061 ± 0.031 in 40 steps.
    words = overrides(released, tmp_path, steps=80, prompts=8, group=8, test_samples=16, save_steps=0, seed=seed)
    words += [
        "params.lr=0.005",
        "params.on_invalid=penalty",
        "params.penalty=-0.5",
        "grpo.with.rewarding.mask_truncated=false",
    ]
    made = run(words, tmp_path / "run")
    for tested in ("base_tested", "test_adapter", "run_exported"):
        facts = made[tested][0]
        print(f"seed {seed}: {tested} {facts['sampled_reward']:.3f} ± {facts['sampled_reward_error']:.3f}")
    for tested in ("test_adapter", "run_exported"):
        facts = made[tested][0]
        print(f"seed {seed}: {tested} gains {facts['reward_gain']:.3f} ± {facts['reward_gain_error']:.3f}")
        assert facts["reward_gain"] > 2 * facts["reward_gain_error"], facts


@pytest.mark.soak
@pytest.mark.parametrize("where", ["local", "slurm"])
def test_afterok_runs_it_and_reuses_what_is_sealed(where, released, tmp_path, request):
    """The command line, with variables of the environment, to all seals: a second run has nothing left to do."""
    words = overrides(released, tmp_path, steps=2, prompts=2, group=4, test_samples=1, test_prompts=4, save_steps=0)
    log = tmp_path / "log.csv"
    environment = {"GRPO_COMPLETION_LOG_PATH": str(log), "HF_HOME": str(tmp_path)}
    if where == "slurm":
        environment |= request.getfixturevalue("dev_cluster").env()
        roles = [f"{name}.resources.role=cpu" for name in ("base_tested", "grpo", "test_adapter", "run_exported")]
        words = [word for word in words if word != "cluster=local"] + roles
    if not (converter.check_installed("") or llama_cpp.check_installed()):
        words += ["params.gguf=true", 'package.with.gguf=["${phases.gguf.out}"]', "run_gguf.with.verifiers=1"]
        words += ["run_gguf.resources.role=cpu"] * (where == "slurm")
    command = ("run", PIPELINE, "--run", tmp_path / "run", *words)
    print(afterok(*command, env=environment, timeout=1500).stdout)
    assert len(log.read_text().splitlines()) > 16 and log.with_suffix(".jsonl").is_file()
    planned = afterok_json("plan", *command[1:], env=environment)
    assert {phase["action"] for phase in planned["phases"]} == {"reuse"}, planned
