"""Few files stay of an element of a large array of a kind that has a model, as of all other kinds (tests/jobs)."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from jobs.artifacts import consolidate
from jobs.kind import find_kind, kind_names
from megatron_ext.entrypoints import evaluate, export_hf, generate, import_hf, merge_lora
from megatron_ext.lora.settings import LoraConfig
from megatron_ext.model_folders import model_folder
from megatron_ext.parallel import ranks
from megatron_ext.parallel.plan import ParallelPlan
from megatron_ext.rollout.settings import Sampling
from tests.jobs.test_inodes import MADE, Leaves
from tests.megatron_ext import adapted

ELEMENTS = 4
# How much an element has in its folder, and the first one more. An export's files are the phase's own, linked, and not
# an element's: here there is one.
LEAVES = {"generate": (1, 1), "evaluate": (1, 0), "import_hf": (1, 0), "merge_lora": (1, 0), "export_hf": (1, 1)}


@pytest.fixture(scope="module")
def adapted_model(calculator: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an adapter."""
    folder, base = tmp_path_factory.mktemp("adapted"), model_folder.open_folder(calculator["base"])
    with ranks.started(ParallelPlan(), seed=1):
        model = model_folder.load_stages(base, ParallelPlan())
        model_folder.write(folder, adapted.attach(model, base.dims, LoraConfig(rank=2)), base, step=0)
    return folder


def configs(calculator: dict[str, Path], adapted_model: Path) -> dict[str, Any]:
    model, source = str(calculator["base"]), Source(synthetic_rows=40, synthetic_split="heldout")
    mix = MixConfig({"sums": Entry("calculator", source=source, limit=2 * ELEMENTS)})
    sampled = generate.Config(model=model, mix=mix, samples=2, sampling=Sampling(max_tokens=2), verifiers=1)
    asked = evaluate.Config(model=model, source=source, limit=2 * ELEMENTS, max_new_tokens=2, verifiers=1, samples=2)
    return {"generate": sampled, "evaluate": asked, "import_hf": import_hf.Config(str(calculator["hf"])),
            "merge_lora": merge_lora.Config(str(adapted_model)), "export_hf": export_hf.Config(model)}  # fmt: skip


@pytest.mark.parametrize("kind", LEAVES)
def test_an_element_of_a_model_leaves_few_inodes(
    calculator: dict[str, Path], adapted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", ELEMENTS)
    leaves = Leaves(tmp_path / "run", kind, configs(calculator, adapted_model)[kind], ELEMENTS)
    leaves.sealed_with(*LEAVES[kind])


def test_the_inodes_of_every_kind_that_may_be_an_array_are_counted() -> None:
    arrays = {name for name in kind_names() if (kind := find_kind(name)) is not None and kind.can_split}
    assert arrays == {name for name in MADE if not name.startswith("a user's")} | LEAVES.keys()
