"""What `sbatch --export` gave: nothing is lost in silence, and quotes around a comma are Slurm's own."""

import pytest

from slurm import exported


def said(problems) -> str:
    return " ".join(str(problem) for problem in problems)


# what 22.05 gave to a job for each --export, found by trying: (typed, the job's environment)
SEEN = {
    "plain": ("A=x,B=1", {"A": "x", "B": "1"}),
    "double quotes": ('A="x,y",B=1', {"A": '"x,y"', "B": "1"}),
    "single quotes": ("A='x,y',B=1", {"A": "'x,y'", "B": "1"}),
    "quotes within": ("A={a: 1},B='[\"q,r\",s]'", {"A": "{a: 1}", "B": "'[\"q,r\",s]'"}),
    "with ALL": ("ALL,A=x y", {"A": "x y", "OTHER": "1"}),
    "a bare name": ('PATH,A="[p,q]",C', {"PATH": "/bin", "A": '"[p,q]"', "C": "there"}),
    "nothing": ("", {"A": "x"}),
    "none": ("NONE", {}),
    "empty": ("A=,B=1", {"A": "", "B": "1"}),
}


@pytest.mark.parametrize("case", SEEN)
def test_what_slurm_gave_as_it_was_typed_is_not_lost(case):
    assert exported.lost(*SEEN[case]) == []


@pytest.mark.parametrize("case, values", [
    ("plain", {}), ("double quotes", {"A": "x,y"}), ("single quotes", {"A": "x,y"}),
    ("quotes within", {"B": '["q,r",s]'}),
    ("a bare name", {"A": "[p,q]"}),
])  # fmt: skip
def test_quotes_that_held_a_comma_together_are_taken_off_and_no_others(case, values):
    assert exported.unquoted(*SEEN[case]) == values
    assert exported.unquoted('A="1"', {"A": '"1"'}) == {}  # YAML's: a text, no number


@pytest.mark.parametrize("typed, environment, name", [
    ("A=x,y,B=1", {"A": "x", "B": "1"}, "'y'"),
    ("A=[1, 2],B=2", {"A": "[1", "B": "2"}, "'2]'"),
    ("A=x\\,y", {"A": "x\\"}, "'y'"),
    ("SFT_RECIPE", {}, "'SFT_RECIPE'"),
    ("ALL,DOLCI_STOP=8", {"DOLCI_STOP": "5"}, "DOLCI_STOP is '5' here"),
])  # fmt: skip
def test_what_was_cut_off_or_beaten_is_refused_with_the_remedy(typed, environment, name):
    assert name in said(exported.lost(typed, environment)), exported.lost(typed, environment)


def test_a_variable_that_means_nothing_is_refused_and_others_have_their_meaning():
    typed = "PATH=/bin,HF_HOME=/hf,AFTEROK_PYTHON=/p,SFT_RECIPE=a,WANDB_PROJECT=b,STF_RECIPE=c"
    (problem,) = exported.unknown(typed, ["SFT_RECIPE"], ["WANDB_PROJECT"])
    assert "no variable STF_RECIPE (did you mean SFT_RECIPE" in str(problem)
