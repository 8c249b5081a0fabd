"""What one release of megatron-core wrote goes on under another.

    PYTHONPATH=FOLDER_OF_ANOTHER python -m pytest tests/megatron_ext -m releases      as .ci/run does

The one release is what PYTHONPATH adds, the other what is installed without it.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from megatron_ext import versions
from tests.megatron_ext import gloo
from tests.megatron_ext.training import sft_config

pytestmark = pytest.mark.releases
STEPS = 10  # with a checkpoint in the middle


def environment(kind):
    """Return the environment of one rank under the release that is `added` by PYTHONPATH, or under the `installed`."""
    variables = {**os.environ, **gloo.environment(0, 1, gloo.free_port())}
    if kind == "installed":
        del variables["PYTHONPATH"]
    return variables


def trained(config, out, keep, kind):
    """Return the facts of a training under a release, in a process of its own."""
    out.mkdir()
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(asdict(config)))  # JSON is YAML
    words = ["-m", "megatron_ext.entrypoints.sft", "--config", str(file), "--out", str(out), "--keep", str(keep)]
    done = subprocess.run([sys.executable, *words], env=environment(kind), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_the_two_releases_are_two():
    code = "from megatron_ext import versions; print(versions.installed())"
    other = subprocess.run([sys.executable, "-c", code], env=environment("installed"), capture_output=True, text=True)
    assert {other.stdout.strip(), versions.installed()} <= versions.RELEASES.keys()
    assert other.stdout.strip() != versions.installed(), "PYTHONPATH adds no other megatron-core"


@pytest.mark.parametrize("first, second", [("installed", "added"), ("added", "installed")])
def test_a_checkpoint_and_a_model_folder_go_on_to_the_same_loss(calculator, tmp_path, first, second):
    config = sft_config(calculator, STEPS)
    whole = trained(config, tmp_path / "whole", tmp_path / "keep", first)
    shutil.copytree(tmp_path / "keep", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / f"step_{STEPS}")
    resumed = trained(config, tmp_path / "resumed", tmp_path / "half", second)
    assert resumed["resumed_from"] == STEPS // 2
    # The releases may add up in another order: float32 has 2^-24, of which five steps make no more than a thousand.
    assert resumed["loss_last"] == pytest.approx(whole["loss_last"], rel=1e3 * 2**-24)

    more = replace(config, model=str(tmp_path / "whole"), steps=STEPS // 2)
    there, here = (trained(more, tmp_path / kind, tmp_path / f"{kind} keep", kind) for kind in (first, second))
    assert here["loss_first"] == pytest.approx(there["loss_first"], rel=1e3 * 2**-24)
    assert here["loss_last"] == pytest.approx(there["loss_last"], rel=1e3 * 2**-24)
