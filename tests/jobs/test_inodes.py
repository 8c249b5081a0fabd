"""Few files stay of an element of a large array once its phase is sealed; what each of them is, is counted."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.packs import materialize
from data_tools.prepare import dolci, rejection
from data_tools.recipes import decontaminate
from data_tools.tasks.task import Source
from jobs.artifacts import consolidate
from jobs.artifacts.layout import GROUP
from jobs.artifacts.owner import Owner
from jobs.artifacts.run_folder import FrozenPhase, Outcome, RunFolder
from jobs.kind import find_kind
from jobs.sealing import Sealer
from jobs.secrets import Secrets
from jobs.task import Task
from jobs.upstream import Upstream
from tests.data_tools.chats import template_of, write_tokenizer
from tests.toy import numbers as toy
from tests.toy import silent as quiet


class Leaves:
    """Runs elements of a phase up to its seal as a worker does, but for their processes and for the disk's syncing."""

    def __init__(self, folder: Path, kind: str, config: Any, elements: int):
        self.run, self.kind, self.config = RunFolder(folder), find_kind(kind), config
        self.phase = FrozenPhase(
            name="p", uses=kind, key="k" * 16, material={"settings": {}}, settings=dataclasses.asdict(config),
            array=elements, elements=elements, fans_in=True, needs={}, inputs={}, ranks_per_node=1, nodes=1,
            gpus_per_node=0,
        )  # fmt: skip
        self.run.logs_folder("p").mkdir(parents=True)

    def element(self, index: int) -> None:
        run, phase, owner = self.run, self.phase, Owner.me(1, 0)
        artifact = run.artifact(phase)
        run.log_path("p", 1, index).write_text("hello\n")  # as Slurm does
        lease = artifact.acquire(index, owner, lambda job: False, environment={"SLURM_JOB_ID": "1"})
        keep = artifact.keep_folder(index, phase.elements)
        keep.mkdir(parents=True)
        task = Task(phase="p", index=index, count=phase.elements, value=index, out=lease.folder, keep=keep, rank=0,
                    world_size=1)  # fmt: skip
        facts = self.kind.run(self.config, task) or {}
        upstream = Upstream(run, {"p": phase}, phase, index)
        sealer = Sealer(
            artifact=artifact, phase=phase, kind=self.kind, upstream=upstream, owner=owner, started=0.0,
            says_ended=lambda job: False, reveal=lambda: Secrets({}),
        )  # fmt: skip
        assert sealer.seal(lease, facts) == "sealed"
        run.record_outcome("p", Outcome(index, 1, 0, "sealed", 0, "", "host", "1", 0.0, key=phase.key))

    def sealed_with(self, files: int, of_first: int = 0) -> None:
        """Run all elements, and see that each leaves a log, a seal and a folder with so many files and folders in it,
        the first one some more, and nothing else; what is not an element's is little.
        """
        for index in range(self.phase.elements):
            self.element(index)
        artifact, elements = self.run.artifact(self.phase), self.phase.elements
        assert artifact.seal_path.exists()
        found = self.inodes()
        assert found["logs"] == found["seals"] == elements + 1
        assert len(list(artifact.folder.glob("work/0*"))) == elements
        assert len(list(artifact.folder.glob("work/0*/**/*"))) == elements * files + of_first
        few = found.total() - found["logs"] - found["seals"] - found["work"]
        assert few <= 16, found  # the word and lease of the last one, what was gathered, the seal, the tables

    def inodes(self) -> Counter[str]:
        """Count what lies in the phase's folder, by the folder of the run's layout that it lies in."""
        above = self.run.phase_folder("p")
        counts: Counter[str] = Counter()
        for path in above.rglob("*"):
            parts = path.relative_to(above).parts
            counts[parts[1] if parts[0] == self.phase.key and len(parts) > 1 else parts[0]] += 1
        return counts


def conversations(folder: Path) -> tuple[str, Any]:
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": asked, "id": n} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = write_tokenizer(folder / "tokenizer", template=template_of("qwen3"))
    source = Source(inputs=[str(folder / "rows.jsonl")])
    return "materialize", materialize.Config(tokenizer=str(tokenizer), source=source, dedupe=False)


def samples(folder: Path) -> tuple[str, Any]:
    of_each = {"sample": 0, "correct": True, "reward": 1.0, "finish": "stop", "tokens": 1, "answer": "1"}
    rows = [
        {"prompt_id": n, "prompt": f"{n}+0=", "completion": f"<think>so</think>{n}", "task": "sums", **of_each}
        for n in range(8)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "reject_filter", rejection.Config(inputs=[str(folder / "samples.jsonl")])


def training_data(folder: Path) -> tuple[str, Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n} of them"}) + "\n" for n in range(16)))
    (folder / "asked.jsonl").write_text(json.dumps({"question": "row 3 of them"}) + "\n")
    config = decontaminate.Config(inputs=[str(folder / "rows.jsonl")], evaluation_sets=[str(folder / "asked.jsonl")])
    return "decontaminate", config


def chats_to_draw_from(folder: Path) -> tuple[str, Any]:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>so</think>a"}]
    rows = [{"messages": [*said, {"role": "user", "content": str(n)}, said[1]], "source": "math"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = write_tokenizer(folder / "tokenizer")
    return "dolci_prepare", dolci.Config([str(folder / "rows.jsonl")], tokenizer=str(tokenizer), target_rows=4)


def numbers(folder: Path) -> tuple[str, Any]:
    return "tests.toy.numbers", toy.Config()


def silent(folder: Path) -> tuple[str, Any]:
    """A kind that tells nothing of its progress."""
    return "tests.toy.silent", quiet.Config()


# Kinds that may be arrays, but for those of models (tests/megatron_ext/test_inodes.py).
MADE = {
    "a user's": numbers,
    "a user's that tells no progress": silent,
    "materialize": conversations,
    "reject_filter": samples,
    "decontaminate": training_data,
    "dolci_prepare": chats_to_draw_from,
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_an_element_of_a_large_array_leaves_four_inodes_once_its_phase_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], tuple[str, Any]]
) -> None:
    """They are its log, its seal, its folder, and one file in that; of another size of array it is no more."""
    elements = GROUP if made is numbers else 8  # whose other files do not count
    monkeypatch.setattr(consolidate, "FROM_ELEMENTS", elements)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    kind, config = made(tmp_path)
    Leaves(tmp_path / "run", kind, config, elements).sealed_with(1)
