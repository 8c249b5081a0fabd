"""vLLM's CPU build itself, in an environment of its own (.ci/run makes it): `pytest -m vllm`, AFTEROK_VLLM_PYTHON=…

Its greedy tokens are our engine's, whatever kills it it goes on without a double or a loss, and it runs as an array.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_ext.entrypoints import import_hf, init_model
from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401
from tests.command import ROOT, afterok, states

pytestmark = pytest.mark.vllm
PYTHON = os.environ.get("AFTEROK_VLLM_PYTHON", "")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
ARGUMENTS = {"enforce_eager": True, "max_num_seqs": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES = {  # heads of 32, which vLLM's CPU build has
    "qwen2": {},
    "llama": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [], **EXPERTS},
}
PROMPTS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make the model folder of a family, with weights so large that its words change from token to token."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(family: str) -> Path:
        if family not in made:
            hf, base = root / family / "hf", root / family / "base"
            for path in (hf, base):
                path.mkdir(parents=True)
            small = dict(hidden=64, heads=2, kv_groups=1, ffn=96, layers=2, max_positions=256)
            config = init_model.Config(family=family, alphabet_task="calculator", config=FAMILIES[family], **small)
            init_model.run(config, hf, root)
            file = hf / "model.safetensors"
            larger = {name: 8 * w if w.dim() > 1 else w for name, w in load_file(file).items()}
            save_file(larger, file, {"format": "pt"})
            import_hf.run(import_hf.Config(str(hf)), base, root)
            made[family] = base
        return made[family]

    return of


def settings(model: Path, **changes) -> dict:
    source = {"synthetic_rows": 200, "synthetic_split": "heldout"}
    entries = {"sums": {"task": "calculator", "source": source, "limit": PROMPTS}}
    return {"model": str(model), "mix": {"entries": entries}, "samples": 1, "verifiers": 1, "chunk": 20,
            "sampling": {"temperature": 0, "max_tokens": 24}, **changes}  # fmt: skip


def started(python: str, root: Path, config: dict) -> subprocess.Popen:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    command = [python, "-m", "megatron_ext.entrypoints.generate", "--config", root / "config.yaml"]
    command += ["--out", root / "out", "--keep", root / "keep"]
    log = open(root / "log.txt", "a")
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def samples(root: Path) -> list[dict]:
    file = root / "out" / "samples.jsonl"
    assert file.is_file(), (root / "log.txt").read_text()[-3000:]
    return [json.loads(line) for line in file.read_text().splitlines()]


def vllm(config: dict) -> dict:
    return {**config, "backend": "vllm", "vllm": ARGUMENTS}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_completions_of_50_prompts_are_our_engines(family, folder, tmp_path):
    config = settings(folder(family))
    both = [started(sys.executable, tmp_path / "ours", config), started(PYTHON, tmp_path / "theirs", vllm(config))]
    for process in both:
        process.wait()
    ours, theirs = samples(tmp_path / "ours"), samples(tmp_path / "theirs")
    assert theirs == ours and len(ours) == PROMPTS
    assert len({row["completion"] for row in ours}) > PROMPTS // 2  # they are worth comparing


def test_a_kill_in_mid_generation_costs_no_sample_and_doubles_none(folder, tmp_path):
    sampling = {"temperature": 1.0, "max_tokens": 64, "top_p": 0.95}
    config = vllm(settings(folder("qwen2"), samples=6, sampling=sampling, chunk=PROMPTS, record_s=0.001, seed=5))
    root = tmp_path / "killed"
    process, journal = started(PYTHON, root, config), None
    while process.poll() is None:
        journal = next((root / "keep").glob("element_0000/rollouts/step_0/rank_0.jsonl"), None)
        if journal and journal.read_text().count('"finish"') >= 40:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, (root / "log.txt").read_text()[-3000:]
    before = {(line["item"], line["sample"]): line["tokens"] for line in recorded(journal) if "tokens" in line}
    assert 40 <= len(before) < 6 * PROMPTS
    (root / "out").rmdir()
    assert started(PYTHON, root, config).wait() == 0, (root / "log.txt").read_text()[-3000:]
    rows = samples(root)
    assert [(row["place"], row["sample"]) for row in rows] == [(p, s) for p in range(PROMPTS) for s in range(6)]
    assert len({row["completion"] for row in rows}) > PROMPTS
    for (item, number), tokens in before.items():
        assert rows[6 * item + number]["tokens"] == len(base64.b64decode(tokens)) // 4


def recorded(journal: Path) -> list[dict]:
    """Return the whole lines of a journal's file."""
    return [json.loads(line) for line in journal.read_text().split("\n")[:-1]]


PROFILE = """\
extends: [dev]
roles:
  generate: {{env: {{python: {python}, set: {environment}}}}}
"""
PIPELINE = """\
name: foreign
phases:
  samples:
    uses: generate
    array: 4
    resources: {{role: generate, mem_gib: 4}}
    with: {config}
"""


def test_an_array_of_four_runs_in_its_roles_own_environment(folder, tmp_path, dev_cluster):  # noqa: F811
    config = vllm(settings(folder("llama"), samples=2, sampling={"temperature": 1.0, "max_tokens": 8}))
    (tmp_path / "profile.yaml").write_text(PROFILE.format(python=PYTHON, environment=json.dumps(ENVIRONMENT)))
    (tmp_path / "p.yaml").write_text(PIPELINE.format(config=json.dumps(config)))
    run, env = tmp_path / "run", dev_cluster.env()
    cluster = f"cluster={tmp_path / 'profile.yaml'}"
    afterok("run", tmp_path / "p.yaml", cluster, "--run", run, env=env, timeout=3000)
    assert set(states(run, env=env).values()) == {"COMPLETED"}
    file = run / "samples" / "latest" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["place"], row["sample"]) for row in rows] == [(p, s) for p in range(PROMPTS) for s in range(2)]
    assert list(run.rglob("exported")) == []  # it was shared, and went with the phase
