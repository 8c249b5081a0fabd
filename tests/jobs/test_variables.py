"""Environment variables that set values of a pipeline: read where declared, lost nowhere, no way for a secret."""

from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from jobs.schema.pipeline import Pipeline, load_pipeline
from launchers.planning.planner import default_run_folder, make_plan
from slurm.detect import find_cluster

TEXT = """
name: cold
params: {recipe: r1_ot, stop: 5, words: none.txt}
variables: {SFT_RECIPE: params.recipe, DOLCI_STOP: params.stop, STEP: packs.with.pack_length}
phases:
  prepared: {uses: q_rewards, with: {inputs: ["${params.words}"]}}
  packs: {uses: pack, with: {store: "${phases.prepared.out}", pack_length: 64, seed: "${params.stop}"}}
"""


def loaded(folder: Path, environment: dict, *overrides: str, text: str = TEXT) -> Pipeline:
    file = folder / "cold.yaml"
    file.write_text(text)
    return load_pipeline(file, list(overrides), environment)


@pytest.mark.parametrize("typed", ["a #b", "#b", "[a] # b", "a\nb", "'a\nb'", '"a\nb"', "[a,\n b\n c]"])
def test_what_yaml_would_leave_out_of_a_value_is_refused_wherever_it_is_typed(tmp_path, typed):
    for environment, overrides in (({"SFT_RECIPE": typed}, []), ({}, [f"params.recipe={typed}"])):
        assert "put the text in double quotes" in refused(tmp_path, environment, *overrides)


@pytest.mark.parametrize("typed, value", [
    ('"a #b"', "a #b"), ("a#b", "a#b"), ('"a\\nb"', "a\nb"), ("|\n a # b\n b", "a # b\nb"),
    ("[a,\n b]", ["a", "b"]), ("a\n", "a"),
])  # fmt: skip
def test_what_yaml_keeps_is_taken(tmp_path, typed, value):
    assert loaded(tmp_path, {"SFT_RECIPE": typed}).params["recipe"] == value
    assert loaded(tmp_path, {}, f"params.recipe={typed}").params["recipe"] == value


def refused(folder: Path, environment: dict, *overrides: str, text: str = TEXT) -> str:
    with pytest.raises(UserMistake) as caught:
        loaded(folder, environment, *overrides, text=text)
    return str(caught.value)


def test_a_declared_variable_sets_its_value_and_one_that_is_empty_does_not(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"SFT_RECIPE": "dolci_mid", "DOLCI_STOP": "", "STEP": "128", "HOME": "/root"})
    assert found.params == {"recipe": "dolci_mid", "stop": 5, "words": "none.txt"}
    assert found.phases["packs"].config.pack_length == 128
    assert [str(variable) for variable in found.variables] == [
        "variable SFT_RECIPE of your environment sets params.recipe=dolci_mid",
        "variable STEP of your environment sets packs.with.pack_length=128",
    ]
    assert found.overrides == []


@pytest.mark.parametrize("override", ["params.recipe=r1_ot_mixed", "params={recipe: r1_ot_mixed, stop: 1, words: w}"])
def test_the_command_line_beats_a_variable_and_the_plan_says_so(tmp_path: Path, override: str) -> None:
    found = loaded(tmp_path, {"SFT_RECIPE": "dolci_mid"}, override)
    assert found.params["recipe"] == "r1_ot_mixed"
    (said,) = found.variables
    assert str(said).endswith(f"params.recipe=dolci_mid, but {override} of the command line counts")


def test_an_unknown_variable_of_a_declared_prefix_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    said = refused(tmp_path, {"SFT_RECIEP": "dolci_mid", "DOLCI_STOPP": "7", "DOLCI": "1", "DOLCI_NOTHING": ""})
    assert "variable SFT_RECIEP: the pipeline has no variable of this name (did you mean SFT_RECIPE?" in said
    assert "variable DOLCI_STOPP" in said and "did you mean DOLCI_STOP?" in said
    assert len(said.splitlines()) == 2, said


def test_variables_of_others_with_a_shared_prefix_are_left_alone() -> None:
    """HF_HOME and HF_TOKEN are not the pipeline's, though it declares HF_REPO_ID."""
    environment = {"HF_REPO_ID": "me/mine", "HF_HOME": "/cache", "HF_TOKEN": "hf_secret", "GRPO_LOG_COMPLETIONS": "0"}
    found = load_pipeline(Path("jobs/pipelines/tes_grpo.yaml"), [], environment)
    assert [variable.override for variable in found.variables] == [
        "params.log_completions=0", "params.repo=me/mine",
    ]  # fmt: skip
    assert found.phases["grpo"].config.log_samples is False
    with pytest.raises(UserMistake, match="GRPO_LOG_COMPLETION: .*did you mean GRPO_LOG_COMPLETIONS"):
        load_pipeline(Path("jobs/pipelines/tes_grpo.yaml"), [], {"GRPO_LOG_COMPLETION": "0"})


def test_a_wrong_value_is_told_as_the_variables(tmp_path: Path) -> None:
    assert "variable STEP (packs.with.pack_length): 'long' is not of type int" in refused(tmp_path, {"STEP": "long"})
    assert "variable DOLCI_STOP: '[1' is not valid YAML" in refused(tmp_path, {"DOLCI_STOP": "[1"})


@pytest.mark.parametrize(
    "declared, said",
    [
        ("{SFT_RECIPE: params.recipes}", "'params.recipes': no param 'recipes' (did you mean recipe?"),
        ("{SFT_RECIPE: pack.with.seed}", "'pack.with.seed': no phase 'pack' (did you mean packs?"),
        ("{SLURM_RECIPE: params.recipe}", "variables of SLURM_ have a meaning already"),
        ("{WANDB_API_KEY: params.recipe}", "KEY says that it is a secret"),
        ("{HF_TOKEN: params.recipe}", "TOKEN says that it is a secret"),
        ("{A-B: params.recipe}", "'A-B' is not the name of an environment variable"),
        ("{A: 3}", "3 is no dotted key"),
        ("{A: params.stop, B: params.stop}", "variables.B: params.stop is set by A already (params.stop)"),
        ("{A: packs.with.pack_length, B: packs.with}", "variables.B: packs.with is set by A already"),
        ("[A]", "is not a mapping of variables"),
    ],
)
def test_a_declaration_that_leads_nowhere_or_to_a_secret_is_refused(tmp_path: Path, declared: str, said: str) -> None:
    lines = [f"variables: {declared}" if line.startswith("variables") else line for line in TEXT.splitlines()]
    assert said in refused(tmp_path, {}, text="\n".join(lines))


def test_a_variable_that_the_profile_keeps_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("q_action_0,q_action_1\n1,2\n")
    pipeline = loaded(tmp_path, {}, f"params.words={tmp_path / 'words.csv'}")
    cluster = find_cluster("local")
    cluster.profile.env.secrets["DOLCI_STOP"] = "file:/nowhere"
    with pytest.raises(UserMistake, match="variables.DOLCI_STOP: profile local has it in env.secrets"):
        make_plan(pipeline, default_run_folder(pipeline, tmp_path / "run"), cluster)
