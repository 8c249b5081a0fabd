"""Every kind of phase starts under plain python or torchrun, by the command that the manual has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import bare
from jobs.kind import find_kind, kind_names
from jobs.schema.pipeline import load_pipeline
from megatron_ext.entrypoints.bare import read_config
from tests.command import ROOT, TINY_SHORT
from tests.data_tools.chats import write_tokenizer

SHIPPED = sorted((ROOT / "jobs/pipelines").glob("*.yaml"))


def start(folder: Path, words: list[str], launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "jobs.bare", *words, "--out", str(folder / "out")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def written(folder: Path, **settings) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "config.yaml")]


@pytest.mark.parametrize("kind", kind_names())
def test_each_kind_reads_its_settings_and_refuses_what_it_has_not(kind, tmp_path, capsys):
    words = [kind, *written(tmp_path), "--out", str(tmp_path / "out"), "nosuch=1"]
    assert bare.main(words) == 2
    told = capsys.readouterr().err
    assert "nosuch" in told and "Traceback" not in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, words, said", [
    ("[1]", [], "settings are a mapping, and this is [1]"),
    ("3", [], "settings are a mapping"),
    ("", ["tau"], "'tau': write it as dotted.key=value"),
    ("", ["inputs=a #b"], "from ' #' on it is a comment"),
    ("inputs: [FILE]", ["--out=FILE/out"], "is a file; name another folder"),
    ("inputs: [FILE]", ["--out=FILE"], "is a file; name another folder"),
    ("inputs: [FILE]", ["--out=out", "--keep=FILE"], "is a file; name another folder"),
])  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(tmp_path, monkeypatch, capsys, text, words, said):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("prompt,q_action_0\n")
    Path("config.yaml").write_text(text)
    assert bare.main(["q_rewards", "--config", "config.yaml", "--out", "out", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not Path("out").exists()


def test_an_empty_file_and_typed_values_are_read_as_a_pipelines(tmp_path):
    (tmp_path / "config.yaml").write_text("# none\n")
    config = read_config(find_kind("q_rewards").config, tmp_path / "config.yaml", ["inputs=[1:30:00]", "tau=1e-2"])
    assert config.inputs == ["1:30:00"] and config.tau == 0.01


@pytest.mark.parametrize("pipeline", SHIPPED, ids=lambda path: path.stem)
def test_the_settings_of_every_shipped_phase_are_read_as_the_pipeline_reads_them(pipeline, tmp_path):
    for phase in load_pipeline(pipeline).phases.values():
        words = written(tmp_path, **phase.settings)
        assert read_config(find_kind(phase.uses).config, Path(words[1]), []) == phase.config, phase.name


def test_shipped_pipelines_have_most_kinds():
    used = {phase.uses for path in SHIPPED for phase in load_pipeline(path).phases.values()}
    assert len(used & set(kind_names())) >= 9  # the others have the first test


def test_a_data_phase_by_plain_python(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,q_action_0,q_action_1\na,0.1,0.2\nb,0.3,0.1\n")
    done = start(tmp_path, ["q_rewards", *written(tmp_path, inputs=[str(tmp_path / "prompts.csv")]), "tau=0.5"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2 and list((tmp_path / "out").iterdir())
    again = start(tmp_path, ["q_rewards", *written(tmp_path, inputs=[str(tmp_path / "nowhere.csv")])])
    assert again.returncode == 2 and "no such file or folder" in again.stderr and "Traceback" not in again.stderr


def test_a_phase_that_can_be_split_runs_its_elements_and_merges_them(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = written(tmp_path, task="calculator", tokenizer=str(tokenizer), source={"synthetic_rows": 40})
    words = ["materialize", *settings, "--elements", "2"]
    one = start(tmp_path, [*words, "--index", "1"])
    assert one.returncode == 0, one.stderr
    early = start(tmp_path, [*words, "--merge"])
    assert early.returncode == 2 and "run --index 0 first" in early.stderr
    whole = start(tmp_path, words)
    assert whole.returncode == 0 and json.loads(whole.stdout)["rows"] == 40, whole.stderr


def test_a_phase_of_the_users_on_two_ranks_of_torchrun(tmp_path):
    (tmp_path / "numbers.txt").write_text("1\n2\n")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(tmp_path, ["tests.toy.total", *written(tmp_path, numbers=str(tmp_path)), "factor=5"], torchrun)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"total": 15} and (tmp_path / "out/total.txt").read_text() == "15\n"


@pytest.mark.soak
def test_the_quick_starts_training_by_hand(tmp_path):
    """init_model, import_hf, materialize, pack by python; sft on two ranks of torchrun; evaluate by python."""
    made: dict[str, str] = {}
    pipeline = load_pipeline(ROOT / "jobs/pipelines/tiny.yaml", TINY_SHORT)
    for name in ("init", "imported", "data", "packs", "untrained", "sft", "trained"):
        phase, folder = pipeline.phases[name], tmp_path / name
        folder.mkdir()
        text = yaml.safe_dump(phase.settings)
        for need, out in made.items():
            text = text.replace(f"@{{phases.{need}.out}}", out)
        (folder / "config.yaml").write_text(text)
        ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") if name == "sft" else ()
        split = ["--elements", str(phase.elements)]
        done = start(folder, [phase.uses, "--config", str(folder / "config.yaml"), *split], ranks)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        made[name] = str(folder / "out")
        print(name, json.loads(done.stdout).get("headline"), file=sys.stderr)
