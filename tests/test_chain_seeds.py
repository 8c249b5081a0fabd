"""What each phase of the chain is worth on real data: tiny.yaml with GSM8K's calculator marks on a real Slurm.

    python -m pytest tests/test_chain_seeds.py -m soak -s             # three seeds; prints a line for each evaluation
    python -m pytest tests/test_chain_seeds.py -m soak -s -k seed1    # one of them

Cold start on the marks of the training file, GRPO on the same marks, rejection sampling and SFT on what was kept, each
beside as many further steps of SFT on labels. Accuracies are those of the test file's marks that no training mark is:
greedy with its 95% interval (Wilson), the mean of four samples at temperature 1, and the gain over the start, both with
1.96 standard errors over prompts.
"""

from math import sqrt
from typing import Any

import pytest

from tests.cluster import dev_cluster, scrub_slurm  # noqa: F401
from tests.command import afterok, afterok_json
from tests.inputs import public

EVALUATIONS = ("untrained", "trained", "reinforced", "controlled", "refined", "rs_controlled")
Z = 1.96  # of a two-sided 95% interval


def wilson(correct: int, prompts: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, 1927)."""
    share, square = correct / prompts, Z * Z / prompts
    middle, half = share + square / 2, Z * sqrt(share * (1 - share) / prompts + square / prompts / 4)
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def told(name: str, facts: dict[str, Any]) -> str:
    """Return one evaluation as a line, in percent and points."""
    (low, high), prompts = wilson(facts["unseen_correct"], facts["unseen_prompts"]), facts["unseen_prompts"]
    said = f"{name:14} of {prompts:,}: greedy {facts['unseen_accuracy']:.1%} [{low:.1%}, {high:.1%}]"
    said += f"  sampled {facts['unseen_sampled_accuracy']:.1%} ± {100 * Z * facts['unseen_sampled_error']:.1f}"
    if "unseen_gain" in facts:
        said += f"  gain {100 * facts['unseen_gain']:+.1f} ± {100 * Z * facts['unseen_gain_error']:.1f}"
    return said


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3], ids="seed{}".format)
def test_the_chain_gains_on_unseen_marks_of_gsm8k(tmp_path, dev_cluster, seed):  # noqa: F811
    files = [f"params.{part}_files=[{public('data', f'gsm8k/{part}.jsonl')}]" for part in ("train", "test")]
    given = [*files, "params.train_rows=0", "params.test_rows=0", "params.control=true", f"params.seed={seed}"]
    run, env = tmp_path / "run", dev_cluster.env()
    afterok("run", "jobs/pipelines/tiny.yaml", *given, "--run", run, env=env, timeout=7200)
    phases = {phase["phase"]: phase for phase in afterok_json("status", run, env=env)["phases"]}
    print(f"\nseed {seed}")
    for name in EVALUATIONS:
        print(told(name, phases[name]["facts"]))
    print({name: round(phase["seconds"]) for name, phase in phases.items()})
    for name in ("trained", "reinforced"):
        facts = phases[name]["facts"]
        assert facts["unseen_prompts"] > 1000 and facts["unseen_gain"] > Z * facts["unseen_gain_error"], name
