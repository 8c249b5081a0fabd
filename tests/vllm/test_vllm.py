"""vLLM's CPU build itself, in an environment of its own (.ci/run makes it): `pytest -m vllm`, AFTEROK_VLLM_PYTHON=…

Its greedy tokens are our engine's, and so is what it finds likeliest; whatever kills it, it goes on without a double or
a loss; it runs as an array. Under soak: the pipeline that samples, rejects, trains on what was kept and evaluates.
"""

import base64
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_tools.base import durable
from data_tools.tasks.mix import Entry, load_items
from data_tools.tasks.task import Source
from megatron_ext.entrypoints import evaluate, generate, import_hf, init_model
from megatron_ext.entrypoints.bare import read_config
from megatron_ext.foreign import exports
from megatron_ext.model_folders.model_folder import open_folder
from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401
from tests.command import ROOT, afterok, afterok_json, states
from tests.data_tools.chats import write_tokenizer
from tests.megatron_ext.rounding import logits_bound
from tests.megatron_ext.test_likelihood import SCHOOL

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
SIZES = dict(hidden=64, heads=2, kv_groups=1, ffn=96, layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make the model folder of a family, with weights so large that its words change from token to token."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(family: str) -> Path:
        if family not in made:
            hf, base = root / family / "hf", root / family / "base"
            for path in (hf, base):
                path.mkdir(parents=True)
            small = dict(config=FAMILIES[family], max_positions=256, **SIZES)
            init_model.run(init_model.Config(family=family, alphabet_task="calculator", **small), hf, root)
            enlarge(hf)
            import_hf.run(import_hf.Config(str(hf)), base, root)
            made[family] = base
        return made[family]

    return of


def enlarge(hf: Path) -> None:
    """Make the matrices of a Hugging Face folder eight times as large."""
    file = hf / "model.safetensors"
    save_file({name: 8 * w if w.dim() > 1 else w for name, w in load_file(file).items()}, file, {"format": "pt"})


def settings(model: Path, **changes) -> dict:
    source = {"synthetic_rows": 200, "synthetic_split": "heldout"}
    entries = {"sums": {"task": "calculator", "source": source, "limit": PROMPTS}}
    return {"model": str(model), "mix": {"entries": entries}, "samples": 1, "verifiers": 1, "chunk": 20,
            "sampling": {"temperature": 0, "max_tokens": 24}, **changes}  # fmt: skip


def started(root: Path, config: dict, entrypoint: str = "generate") -> subprocess.Popen:
    """Start an entrypoint in vLLM's environment."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    command = [PYTHON, "-m", f"megatron_ext.entrypoints.{entrypoint}", "--config", root / "config.yaml"]
    command += ["--out", root / "out", "--keep", root / "keep"]
    log = open(root / "log.txt", "a")
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def run(root: Path, config: dict, entrypoint=generate) -> None:
    """Run an entrypoint here."""
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "out").mkdir()
    entrypoint.run(read_config(entrypoint.Config, root / "config.yaml", []), root / "out", root / "keep")


def samples(root: Path) -> list[dict]:
    file = root / "out" / "samples.jsonl"
    assert file.is_file(), (root / "log.txt").read_text()[-3000:]
    return [json.loads(line) for line in file.read_text().splitlines()]


def vllm(config: dict) -> dict:
    return {**config, "backend": "vllm", "vllm": ARGUMENTS}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_completions_of_50_prompts_are_our_engines(family, folder, tmp_path):
    config = settings(folder(family))
    process = started(tmp_path / "theirs", vllm(config))
    run(tmp_path / "ours", config)
    process.wait()
    ours, theirs = samples(tmp_path / "ours"), samples(tmp_path / "theirs")
    assert theirs == ours and len(ours) == PROMPTS
    assert len({row["completion"] for row in ours}) > PROMPTS // 2  # they are worth comparing


@pytest.fixture
def adapted(tmp_path):
    """A model folder with an adapter that matters, whose tokenizer writes any text."""
    write_tokenizer(tmp_path / "tokenizer")
    hf, peft, base = (tmp_path / name for name in ("hf", "peft", "base"))
    for path in (hf, peft, base):
        path.mkdir()
    init_model.run(init_model.Config(tokenizer=str(tmp_path / "tokenizer"), **SIZES), hf, tmp_path)
    enlarge(hf)
    noise, factors = torch.Generator().manual_seed(0), {}
    for layer in range(SIZES["layers"]):
        for name, rows, columns in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 96)):
            key = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=noise) / 8
            factors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=noise)
    save_file(factors, peft / "adapter_model.safetensors", {"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    durable.write_json(peft / "adapter_config.json", told | {"target_modules": ["q_proj", "down_proj"]})
    import_hf.run(import_hf.Config(str(hf), adapter=str(peft)), base, tmp_path)
    return base


def test_an_adapted_model_says_and_finds_likeliest_what_it_does_in_our_engine(adapted, tmp_path):
    file = tmp_path / "arc.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in SCHOOL))
    entries = {name: {"task": "arc_easy", "options": options, "source": {"inputs": [str(file)]}} for name, options in
               {"likely": {"answered_by": "likelihood"}, "written": {"chat": False}}.items()}  # fmt: skip
    config = {"model": str(adapted), "mix": {"entries": entries}, "max_new_tokens": 12, "verifiers": 1}
    process = started(tmp_path / "theirs", vllm(config), "evaluate")
    run(tmp_path / "ours", config, evaluate)
    process.wait()
    ours, theirs = samples(tmp_path / "ours"), samples(tmp_path / "theirs")
    likely = [(line.pop("log_likelihoods", {}), theirs[n].pop("log_likelihoods", {})) for n, line in enumerate(ours)]
    assert theirs == ours and len(ours) == 2 * len(SCHOOL)
    entry = Entry("arc_easy", {"answered_by": "likelihood"}, source=Source([str(file)]))
    far = dict(bounds(adapted, entry, tmp_path))
    found = {line["prompt"]: pair for line, pair in zip(ours, likely) if pair[0]}
    assert found.keys() == far.keys()
    for prompt, (ours_of_it, theirs_of_it) in found.items():
        for one, other, bound in zip(ours_of_it.values(), theirs_of_it.values(), far[prompt], strict=True):
            assert abs(one - other) <= bound


def bounds(model: Path, entry: Entry, root: Path):
    """Yield the uid of each question, and how far two engines' log-likelihoods of each choice may be apart."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = open_folder(str(model))
    merged = AutoModelForCausalLM.from_pretrained(exports.exported(folder, "", root / "merged")).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.hf)
    for item in load_items("likely", entry):
        before, found = len(tokenizer(item.prompt)["input_ids"]), []
        for text in item.columns["choices"]:
            ids = torch.tensor([tokenizer(f"{item.prompt} {text}")["input_ids"]])
            found.append(4 * (ids.shape[1] - before) * logits_bound(merged, ids))  # a log-prob moves as two logits do
        yield item.uid, found


def test_a_kill_in_mid_generation_costs_no_sample_and_doubles_none(folder, tmp_path):
    sampling = {"temperature": 1.0, "max_tokens": 64, "top_p": 0.95}
    config = vllm(settings(folder("qwen2"), samples=6, sampling=sampling, chunk=PROMPTS, record_s=0.001, seed=5))
    root = tmp_path / "killed"
    process, journal = started(root, config), None
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
    assert started(root, config).wait() == 0, (root / "log.txt").read_text()[-3000:]
    rows = samples(root)
    assert [(row["place"], row["sample"]) for row in rows] == [(p, s) for p in range(PROMPTS) for s in range(6)]
    assert len({row["completion"] for row in rows}) > PROMPTS
    for (item, number), tokens in before.items():
        assert rows[6 * item + number]["tokens"] == len(base64.b64decode(tokens)) // 4


def recorded(journal: Path) -> list[dict]:
    """Return the whole lines of a journal's file."""
    return [json.loads(line) for line in journal.read_text().split("\n")[:-1]]


def profile(folder: Path, extended: str) -> str:
    """Write the profile of a site where samples are made in vLLM's environment; return what names it."""
    env = {"python": PYTHON, "set": ENVIRONMENT}
    told = {"extends": [extended], "roles": {role: {"env": env} for role in ("generate", "eval")}}
    (folder / "profile.yaml").write_text(yaml.safe_dump(told))
    return f"cluster={folder / 'profile.yaml'}"


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
    (tmp_path / "p.yaml").write_text(PIPELINE.format(config=json.dumps(config)))
    run, env = tmp_path / "run", dev_cluster.env()
    afterok("run", tmp_path / "p.yaml", profile(tmp_path, "dev"), "--run", run, env=env, timeout=3000)
    assert set(states(run, env=env).values()) == {"COMPLETED"}
    (told,) = afterok_json("status", run, env=env)["phases"]
    assert told["facts"]["engine"]["is"] == "vllm" and told["facts"]["engine"]["version"]
    file = run / "samples" / "latest" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["place"], row["sample"]) for row in rows] == [(p, s) for p in range(PROMPTS) for s in range(2)]
    assert list(run.rglob("exported")) == []  # it was shared, and went with the phase


REJECTION = """\
name: rejection
phases:
  init: {{uses: init_model, with: {{alphabet_task: calculator, chats: true, {sizes}}}}}
  imported: {{uses: import_hf, with: {{source: "${{phases.init.out}}"}}}}
  before:
    uses: evaluate
    resources: {{role: generate}}
    with: &evaluation
      {{model: "${{phases.imported.out}}", samples: 2, backend: vllm, vllm: {arguments},
       source: {{synthetic_rows: 60, synthetic_split: heldout}}}}
  sampled:
    uses: generate
    array: 2
    resources: {{role: generate}}
    with:
      model: "${{phases.imported.out}}"
      backend: vllm
      vllm: {arguments}
      mix: {{entries: {{calculator: {{source: {{synthetic_rows: 400}}, limit: 40}}}}}}
      samples: 4
      sampling: {{max_tokens: 24}}
  kept:
    uses: reject_filter
    array: 2
    needs: [{{sampled: aftercorr}}]
    with: {{inputs: ["${{phases.sampled.out}}"], per_prompt: 1, correct: false}}
  rs_data:
    uses: materialize
    with:
      {{source: {{inputs: ["${{phases.kept.out}}/chat.jsonl"]}}, tokenizer: "${{phases.init.out}}", on_bad_row: bucket}}
  rs_packs: {{uses: pack, with: {{store: "${{phases.rs_data.out}}", pack_length: 128}}}}
  rs_sft:
    uses: sft
    resources: {{role: cpu}}
    with:
      {{model: "${{phases.imported.out}}", store: "${{phases.rs_data.out}}", packs: "${{phases.rs_packs.out}}",
       steps: 2, global_batch: 1, lr: 1.0e-3}}
  after:
    uses: evaluate
    resources: {{role: generate}}
    with: {{<<: *evaluation, model: "${{phases.rs_sft.out}}", compare_with: "${{phases.before.out}}"}}
"""


@pytest.mark.soak
def test_rejection_sampling_and_evaluation_run_to_the_end_by_vllm(tmp_path):
    """As the quick start has them after its first training; a random model's samples are kept whatever they say."""
    sizes = ", ".join(f"{name}: {size}" for name, size in SIZES.items())
    file, run = tmp_path / "rejection.yaml", tmp_path / "run"
    file.write_text(REJECTION.format(sizes=sizes, arguments=json.dumps(ARGUMENTS)))
    afterok("run", file, profile(tmp_path, "local"), "--run", run, timeout=3000)
    facts = {phase["phase"]: phase["facts"] for phase in afterok_json("status", run)["phases"]}
    for phase, elements in {"before": 1, "sampled": 2, "after": 1}.items():
        seals = [durable.read_json(file) for file in run.glob(f"{phase}/*/seals/*.json")]
        assert [seal["facts"]["engine"]["is"] for seal in seals] == ["vllm"] * elements
    assert facts["sampled"]["samples"] == 160 and facts["kept"]["kept"] > 0 and facts["rs_sft"]["step"] == 2
    assert facts["after"]["sampled_accuracy"] >= 0 and facts["after"]["gain_error"] >= 0
    assert list(run.rglob("exported")) == []
