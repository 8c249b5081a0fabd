"""The seeds' own command lines: what each gives here is planned, as the manual of the pipelines says it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.megatron_flags import translate
from jobs.schema.pipeline import load_pipeline
from launchers.planning.plan import Plan
from launchers.planning.planner import make_plan
from slurm.detect import find_cluster
from tests.command import ROOT
from tests.data_tools.chats import write_tokenizer
from tests.jobs.test_megatron_flags import EXAMPLE
from tests.launchers.test_parallel_plan import NANO, PROFILE, QWEN_32B
from tests.megatron_ext.shapes import GPT_OSS_20B_CONFIG
from tests.r1_files import small, written

MANUAL = ROOT / "jobs/pipelines/README.md"
PIPELINES = ROOT / "jobs/pipelines"
FLAGS = {  # of nanochat's chat_sft.py and prepare_dolci_think.py
    "--source": "params.source", "--model_tag": "params.tag", "--step": "params.step",
    "--sft_recipe": "params.recipe", "--ot_stop": "params.recipe_params.ot_stop",
    "--chat_ratio": "params.recipe_params.chat_ratio", "--target_rows": "params.target_rows",
    "--max_tokens": "params.max_tokens",
}  # fmt: skip
OTHERS = {"--", "--output"}  # what follows torchrun's own; where the sample goes


def rows(seed: str = "nanochat R1") -> list[tuple[str, str, str]]:
    """Return the rows of the manual's table of a seed's lines: theirs, what comes of it, ours."""
    table = MANUAL.read_text().partition(f"## From {seed}")[2].partition("\n## ")[0].partition("| its constants")[0]
    cells = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return [(seed.strip(), says.strip(), ours.strip(" |")) for seed, says, ours in cells]


def typed(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """Return (variables, words) of each command of afterok that plans a pipeline, in the code of a cell."""
    found = []
    for span in re.findall("`([^`]+)`", text):
        words = shlex.split(span)
        names = [word for word in words if re.match("[A-Z_]+=", word)]
        words = words[len(names) :]
        if words[:1] == ["afterok"] and words[1] in ("run", "submit", "plan"):
            found.append((dict(name.split("=", 1) for name in names), words[2:]))
    return found


LINES = [(seed, command, says) for seed, says, ours in rows() for command in typed(ours)]


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a nanochat run, as far as `plan` looks into it."""
    folder = tmp_path_factory.mktemp("nanochat")
    (folder / "chatsft_checkpoints" / "d2").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    for file in ("chatsft_checkpoints/d2/model_000007.pt", "tokenizer/tokenizer.pkl"):
        (folder / file).write_bytes(b"not opened by plan")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return written(tmp_path_factory.mktemp("files"))


def models(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(file: Path, overrides: list[str], run: Path, environment: dict[str, str] | None = None) -> Plan:
    pipeline = load_pipeline(file, overrides, environment or {})
    pipeline.waive.append("D001")  # this disk is not a cluster's
    return make_plan(pipeline, RunFolder(run), find_cluster(pipeline.cluster, pipeline.overrides))


def test_the_manual_has_every_line_of_the_seed() -> None:
    """Those of its README, by the script or module that each runs."""
    seeds = " ".join(seed for seed, _, _ in rows())
    for script in ("prepare_dolci_think.py", "itiger_r1_ot_sft.sh", "scripts.chat_sft", "itiger_r1_full_run.sh",
                   "itiger_r1_grpo.sh", "itiger_r1_rs_generate.sh", "itiger_r1_rs_sft.sh",
                   "itiger_r1_eval.sh"):  # fmt: skip
        assert script in seeds, script
    assert len(LINES) == 7


def flags_of(seed: str) -> dict[str, str]:
    """Return the flags of a line, whether their values follow = or a space."""
    words = shlex.split(seed.strip("`").split("`")[0])
    pairs = {name: value for name, _, value in (word.partition("=") for word in words if word.startswith("--"))}
    return {name: value or (words + [""])[words.index(name) + 1] for name, value in pairs.items()}


def check_words(seed: str, environment: dict[str, str], overrides: list[str]) -> None:
    """See that a seed's own words and values are ours: variables as they stand, flags by their names."""
    if exported := re.search(r"--export=(\S+)", seed):
        assert environment == dict(pair.split("=", 1) for pair in exported[1].split(","))
        return
    flags = flags_of(seed)
    assert set(flags) <= FLAGS.keys() | OTHERS, flags
    assert {f"{FLAGS[name]}={value}" for name, value in flags.items() if name in FLAGS} <= set(overrides)


def files_beside(name: str, nanochat: Path, files: dict[str, str], folder: Path) -> list[str]:
    """Return overrides that give a pipeline the files of the test."""
    if name == "r1_nanochat":
        return small(nanochat, files)
    if name == "gsm8k_rl":
        given = [f"params.{key}.source.inputs=[{files[key]}]" for key in ("gsm8k", "gsm8k_test")]
        return [*given, f"params.nanochat={nanochat}", "params.tag=d2"]
    return [f"params.inputs=[{files['dolci']}]", f"params.tokenizer={write_tokenizer(folder / 'tokenizer')}"]


@pytest.mark.parametrize("seed, command, says", LINES, ids=[seed.strip("`")[:40] for seed, _, _ in LINES])
def test_a_line_of_nanochats_gives_what_the_manual_says(tmp_path, nanochat, files, seed, command, says):
    environment, (pipeline, *overrides) = command
    name = Path(pipeline).stem
    check_words(seed, environment, overrides)
    # Files and tags of the author's machine are those of the test; what says nothing of the machine stays.
    kept = [word for word in overrides if not re.match(r"params\.(inputs|dolci|tag|step)=", word)]
    beside = files_beside(name, nanochat, files, tmp_path)
    plan = planned(ROOT / pipeline, [*kept, *beside, "cluster=local"], tmp_path / "run", environment)
    assert all(phase.action == "run" for phase in plan.phases)
    if name != "dolci_think":
        source = plan.pipeline.phases["imported"].config.source
        assert source == f"{nanochat}/chatsft_checkpoints/d2"  # whichever of its words the seed uses
    told = "\n".join(plan.remarks)
    for text in re.findall("`([^`]+)`", says) if says != "the same" else ["recipe r1_ot_mixed", "smoltalk: share 0.3"]:
        assert text in told, told


@pytest.mark.parametrize("environment, said", [
    ({"SFT_RECIEP": "dolci_mid"}, "variable SFT_RECIEP: the pipeline has no variable of this name (did you mean"),
    ({"SFT_RECIPE": "r1_ot", "DOLCI_STOP": "5"},
     "recipe_params.dolci_stop: recipe r1_ot has no parameter of this name"),
    ({"SFT_RECIPE": "r1_mixed"}, "unknown recipe 'r1_mixed' (did you mean r1_ot_mixed?"),
    ({"SFT_SOURCE": "stf"}, "there is no params.folders.stf (did you mean sft?"),
    ({"CHAT_RATIO": "1.3"}, "1.3"),
])  # fmt: skip
def test_a_line_with_a_mistake_is_refused_with_what_was_meant(
    tmp_path, nanochat, files, environment, said
):  # fmt: skip
    with pytest.raises(UserMistake) as caught:
        planned(PIPELINES / "r1_nanochat.yaml", small(nanochat, files), tmp_path / "run", environment)
    assert said in str(caught.value) and "Traceback" not in str(caught.value), str(caught.value)


def test_an_evaluation_is_planned_an_element_a_task_and_none_is_forgotten(tmp_path, nanochat, files):
    given = small(nanochat, files)
    plan = planned(PIPELINES / "r1_nanochat.yaml", given, tmp_path / "run")
    [phase] = [phase for phase in plan.phases if phase.name == "rs_evaluated"]
    assert phase.frozen.elements == 3
    with pytest.raises(UserMistake) as caught:
        planned(PIPELINES / "r1_nanochat.yaml", [*given, "cold_evaluated.array=[aime, gsm8k_test]"], tmp_path / "run")
    assert "phases.cold_evaluated.with.mix: array: no element takes math500 of mix" in str(caught.value)


# -- TES --------------------------------------------------------------------------------------------------------------


def test_the_manual_has_every_line_of_tes() -> None:
    lines = " ".join(seed for seed, _, _ in rows("TES"))
    for line in ("convert_to_harmony.py", "calculate_reward.py data --tau 0.05 --overwrite", "train_grpo.py",
                 "test_lora_adapter.py", "test_lora_adapter_quantized.py", "export_quantized_model.py",
                 "run_exported_model.py", "ollama create", "GRPO_LOG_COMPLETIONS=1", "HF_REPO_ID="):  # fmt: skip
        assert line in lines, line


TES = [command for _, _, ours in rows("TES") for command in typed(ours)]


@pytest.fixture(scope="module")
def tes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A table of prompts, and a folder of gpt-oss-20b as far as `plan` looks into it."""
    root = tmp_path_factory.mktemp("tes")
    for name in ("data", "model"):
        (root / name).mkdir()
    header = ",".join(["prompt", *(f"q_action_{action}" for action in range(4))])
    (root / "data" / "hours.csv").write_text(f"{header}\n" + "user: Hour 3?,0,1,2,3\n" * 3)
    write_tokenizer(root / "model")
    models(root / "model", GPT_OSS_20B_CONFIG)
    (root / "model" / "model.safetensors").write_bytes(b"not opened by plan")
    for gib in (45, 80, 141):
        roles = f"{{cpu: {{}}, generate: {{}}, train: {{gpus_per_node: 1, gpu_mem_gib: {gib}}}}}"
        (root / f"{gib}.yaml").write_text(f"kind: local\nroles: {roles}\n")
    return {name: str(root / name) for name in ("data", "model", "45.yaml", "80.yaml", "141.yaml")}


@pytest.mark.parametrize(
    "command", TES, ids=[" ".join([*map("=".join, names.items()), *words[1:]]) for names, words in TES]
)
def test_a_line_of_tes_is_planned(tmp_path, tes, command):
    environment, (pipeline, *overrides) = command
    kept = [word for word in overrides if not word.startswith("params.inputs=")]
    given = [f"params.inputs=[{tes['data']}]", f"params.model={tes['model']}", "cluster=local"]
    plan = planned(ROOT / pipeline, [*kept, *given], tmp_path / "run", environment)
    planned_phases = {phase.name: phase.action for phase in plan.phases if phase.action == "run"}
    assert ("gguf" in planned_phases) == ("params.gguf=true" in overrides)
    assert {"grpo", "test_adapter", "merge_lora", "quantize_mxfp4", "run_exported", "package"} <= planned_phases.keys()
    package, grpo = (plan.pipeline.phases[name].config for name in ("package", "grpo"))
    assert (package.repo, package.push) == (environment.get("HF_REPO_ID", ""), "params.push=true" in overrides)
    assert grpo.completions == environment.get("GRPO_COMPLETION_LOG_PATH", "micro_step_completions.csv")
    assert grpo.base == ("mxfp4" if "params.base=mxfp4" in overrides else "")


def test_tes_is_refused_on_48_gb_with_what_makes_it_fit(tmp_path, tes):
    """The pipeline as it is: 45 GiB are a GPU of 48 GB."""
    given = [f"params.inputs=[{tes['data']}]", f"params.model={tes['model']}"]
    for name in ("80.yaml", "141.yaml"):
        planned(PIPELINES / "tes_grpo.yaml", [*given, f"cluster={tes[name]}"], tmp_path / "run")
    with pytest.raises(UserMistake) as caught:
        planned(PIPELINES / "tes_grpo.yaml", [*given, f"cluster={tes['45.yaml']}"], tmp_path / "run")
    (problem,) = caught.value.problems
    assert "phases.grpo.with.parallel: needs 60." in str(problem)  # with the digit that test_memory.py knows
    assert "and a GPU has 45.0: use base mxfp4 (34." in str(problem)
    planned(PIPELINES / "tes_grpo.yaml", [*given, f"cluster={tes['45.yaml']}", "params.base=mxfp4"], tmp_path / "run")


# -- OpenResearcher, Megatron-LM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, said", [
    (["1.0", "a.packed_262144.jsonl"], ['source.inputs: ["a.packed_262144.jsonl"] here, and weights: {} in pack']),
    (["0.3", "a.jsonl", "0.7", "b.jsonl"], ['["a.jsonl", "b.jsonl"]', '{"a.jsonl": 0.3, "b.jsonl": 0.7} in pack']),
    # Equal weights are shares, too: of files of different sizes.
    (["1", "a.jsonl", "1", "b.jsonl"], ['weights: {"a.jsonl": 1.0, "b.jsonl": 1.0} in pack']),
    (["a.jsonl", "b.jsonl"], ["weights: {} in pack"]),
])  # fmt: skip
def test_openresearchers_blend_is_read_and_spelled_as_the_settings_it_stands_for(tmp_path, train, said):
    blend = tmp_path / "search_blend_path.json"
    blend.write_text(json.dumps({"train": train, "valid": train[:2], "test": []}))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    given = [f"params.inputs=[{blend}]", f"params.tokenizer={tokenizer}", f"params.model={models(tmp_path, NANO)}"]
    with pytest.raises(UserMistake) as caught:
        planned(PIPELINES / "openresearcher.yaml", [*given, "cluster=local"], tmp_path / "run")
    told = str(caught.value)
    assert "phases.data.with.source.inputs[0]: " in told and "stores of their own of valid" in told
    assert all(text in told for text in said), told


def test_the_megatron_seeds_command_and_its_dapo_yaml_are_planned_for_64_ranks(tmp_path):
    (tmp_path / "dapo.yaml").write_text("""
- agent_type: DAPOAgent
  agent_args: {format_reward: 0.0}
  weight: 1.0
- agent_type: AIMEAgent
  agent_args: {format_reward: 0.0}
  weight: 0.0
  evaluation_only: true
""")
    (tmp_path / "h100.yaml").write_text(PROFILE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1?", "answer": "2", "solution": "2", "problem": "1+1?"}\n')
    model = models(tmp_path, QWEN_32B)
    overrides = [word.replace("=dapo.yaml", f"={tmp_path}/dapo.yaml") for word in translate(EXAMPLE)[0]]
    ours = [word for word in overrides if not word.startswith("imported.with.")]  # paths of its author's machine
    assert any(word == f"grpo.with.mix.environments={tmp_path}/dapo.yaml" for word in ours)
    data = [f"grpo.with.mix.entries.{name}.source.inputs=[{tmp_path}/rows.jsonl]" for name in ("dapo_math", "aime")]
    given = [f"params.model={model}", f"cluster={tmp_path}/h100.yaml", *data]
    plan = planned(PIPELINES / "megatron_grpo.yaml", [*ours, *given], tmp_path / "run")
    grpo = next(phase for phase in plan.phases if phase.name == "grpo")
    assert grpo.resources.nodes * grpo.resources.ranks_per_node == 64
    config = plan.pipeline.phases["grpo"].config
    assert config.mix.environments.endswith("dapo.yaml") and config.prompts * config.group == 1024
