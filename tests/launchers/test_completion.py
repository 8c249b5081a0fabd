"""`afterok completion`: what a shell offers after some words, by the script alone."""

import shutil
import subprocess
from pathlib import Path

import pytest

from data_tools.mistake import UserMistake
from launchers import cli
from launchers.completion import SHELLS, script_for

NAMES = ("tiny", "tidy", "$(touch pwned)", "two words", "; touch pwned")
ASKED = {
    "st": {"status"}, "report ti": {"tiny", "tidy"}, "path tiny s": {"sft"}, "logs s": {"sft"}, "plan p": {"p.yaml"},
    "path tiny ''": {"sft", "grpo"}, "cluster ''": {"up", "down", "status", "exec"}, "explain sf": {"sft"},
    "plot tiny sft g": {"grpo"}, "cancel tiny g": {"grpo"}, "completion z": {"zsh"}, "report --wa": {"--watch"},
    "plan p.yaml --diff ti": {"tiny", "tidy"},
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    pytest.importorskip("shtab", reason="shtab comes with the extra shell, which is not shared")
    return {shell: script_for(shell, cli._parser()) for shell in SHELLS}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with runs of harmless and of other names, and a pipeline."""
    for name in NAMES:
        for phase in ("sft", "grpo", "$(touch pwned)"):
            (tmp_path / "runs" / name / phase / "logs").mkdir(parents=True)
        (tmp_path / "runs" / name / "submissions").mkdir()
        (tmp_path / "runs" / name / "ledger.jsonl").touch()
    (tmp_path / "p.yaml").touch()
    return tmp_path


def test_bash_offers_verbs_options_runs_and_phases_and_runs_nothing(scripts, here):
    (here / "script").write_text(scripts["bash"])
    asked = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_afterok; printf "%s " "${COMPREPLY[@]}"; echo'
    lines = "\n".join(f"COMP_WORDS=(afterok {words}); {asked}" for words in ASKED)
    done = subprocess.run(
        ["bash", "-c", f"source ./script\n{lines}"], cwd=here, text=True, capture_output=True, timeout=60
    )
    offered = [set(line.split()) for line in done.stdout.splitlines()]
    for (words, expected), found in zip(ASKED.items(), offered, strict=True):
        wider = {"runs", "tiny", "tidy"} if words == "path tiny ''" else set()  # RUN might have been left out
        assert found - wider == expected, words
    assert not done.stderr and not (here / "pwned").exists()


def test_the_script_knows_every_verb_and_needs_its_library(scripts, monkeypatch):
    for verb in next(action for action in cli._parser()._actions if action.dest == "name").choices:
        assert all(verb in text for text in scripts.values())
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    with pytest.raises(UserMistake, match=r"pip install 'afterok\[shell\]'"):
        script_for("bash", cli._parser())


@pytest.mark.soak
@pytest.mark.parametrize("way", ["file of fpath", "source"])
def test_zsh_offers_the_same_in_a_terminal(scripts, here, way):
    """A terminal of zsh's own (zpty) types the words and Tab, and shows the line that comes of it."""
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    (here / ("_afterok" if way != "source" else "script")).write_text(scripts["zsh"])
    then = f"; source {here}/script" if way == "source" else ""
    shown = {"st": "status", "path tiny sf": "path tiny sft", "explain reject": "explain reject_filter"}
    typed = "\n".join(f"zpty -w -n z $'\\x15afterok {words}\\t'; sleep 2" for words in shown)
    script = f"""
        zmodload zsh/zpty; zpty z zsh -f -i
        zpty -w z 'PS1=; fpath=({here} $fpath); autoload -U compinit; compinit -u -d {here}/dump{then}'; sleep 4
        while zpty -r -t z line; do :; done
        {typed}
        while zpty -r -t z line; do print -r -- "$line"; done"""
    done = subprocess.run(["zsh", "-f", "-c", script], cwd=here, text=True, capture_output=True, timeout=120)
    assert all(line in done.stdout for line in shown.values()), done.stdout + done.stderr
    assert not (here / "pwned").exists()
