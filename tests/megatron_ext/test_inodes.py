"""Few files stay of an element of a large array of a kind that has a model, as of all other kinds (tests/jobs)."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.tasks.mix import Entry, MixConfig
from data_tools.tasks.task import Source
from jobs.artifacts import consolidate
from jobs.kind import find_kind, kind_names
from megatron_ext.entrypoints import evaluate, export_hf, generate, import_hf
from megatron_ext.rollout.settings import Sampling
from tests.jobs.test_inodes import MADE, Leaves

ELEMENTS = 4
# How much an element has in its folder, and the first one more. Shares of a model's weights are a folder, their file,
# and two that say what is in it; there are no more of them than tensors. Of an export's only file there is one share.
LEAVES = {"generate": (1, 1), "evaluate": (1, 0), "import_hf": (4, 0), "export_hf": (1, 1)}
ALIKE = {"merge_lora": "import_hf"}


def configs(calculator: dict[str, Path]) -> dict[str, Any]:
    model, source = str(calculator["base"]), Source(synthetic_rows=40, synthetic_split="heldout")
    mix = MixConfig({"sums": Entry("calculator", source=source, limit=2 * ELEMENTS)})
    sampled = generate.Config(model=model, mix=mix, samples=2, sampling=Sampling(max_tokens=2), verifiers=1)
    asked = evaluate.Config(model=model, source=source, limit=2 * ELEMENTS, max_new_tokens=2, verifiers=1, samples=2)
    return {"generate": sampled, "evaluate": asked, "import_hf": import_hf.Config(str(calculator["hf"])),
            "export_hf": export_hf.Config(model)}  # fmt: skip


@pytest.mark.parametrize("kind", LEAVES)
def test_an_element_of_a_model_leaves_few_inodes(
    calculator: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", ELEMENTS)
    leaves = Leaves(tmp_path / "run", kind, configs(calculator)[kind], ELEMENTS)
    leaves.sealed_with(*LEAVES[kind])


def test_the_inodes_of_every_kind_that_may_be_an_array_are_counted() -> None:
    arrays = {name for name in kind_names() if (kind := find_kind(name)) is not None and kind.can_split}
    assert arrays == (MADE.keys() - {"a user's"}) | LEAVES.keys() | ALIKE.keys()
