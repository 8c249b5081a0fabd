"""Answers `afterok inspect`: reads what a sealed token store or pack plan of a run holds, for people."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from data_tools.base.seeded import permutation
from data_tools.base.tables import ShownTable
from data_tools.chats.tokenizer import Tokenizer, load_tokenizer
from data_tools.mistake import UserMistake, nearest
from data_tools.packs import inspection
from data_tools.packs.plan import PackReader, PlanFacts
from data_tools.packs.store import Store, StoreFacts
from jobs.artifacts.run_folder import RunFolder
from jobs.schema.references import substitute
from launchers.observe.sealed import find_sealed, run_hint

KINDS = ("materialize", "pack")


class Contents:
    """The sealed contents of a run's stores and plans, as its newest submission has them."""

    def __init__(self, run: RunFolder):
        self.run, self.phases = run, run.frozen(run.newest_submission())
        self.names = [name for name, phase in self.phases.items() if phase.uses in KINDS]

    def folder(self, name: str) -> Path:
        """Return the sealed folder of a phase. UserMistake where it is not sealed."""
        return find_sealed(self.run, name)[1].folder

    def settings(self, name: str) -> dict[str, Any]:
        """Return a phase's config, with every reference replaced by the folder it stands for."""
        phase = self.phases[name]
        return substitute(phase.settings, {need: str(self.folder(need)) for need in phase.needs})

    def tokenizer_of(self, store: Path) -> Tokenizer:
        """Return what made the ids of `store`. UserMistake where no materialize phase of the run made it."""
        for name in self.names:
            if self.phases[name].uses == "materialize" and self._is_made_by(name, store):
                return load_tokenizer(self.settings(name)["tokenizer"])
        raise UserMistake(f"{store} was not made in {self.run.path}: inspect it in the run that made it")

    def _is_made_by(self, name: str, store: Path) -> bool:
        """Return whether `store` is the sealed folder of a phase; a phase that failed has none."""
        try:
            return self.folder(name) == store
        except UserMistake:
            return False


class Inspection(TypedDict):
    """What `inspect` shows of a phase."""

    phase: str
    folder: str
    facts: StoreFacts | PlanFacts
    balance: ShownTable
    lengths: list[Any]  # rows of a histogram: (shortest, longest, documents, tokens)
    title: str
    documents: list[dict[str, Any]]
    limit: int  # tokens of each that are shown, at most


def inspect(run: RunFolder, name: str, count: int, pack: int | None, seed: int, limit: int) -> Inspection:
    """Return facts, balance, histogram of lengths and documents of a phase's store or plan.

    Documents: `count` drawn with `seed`, or of pack number `pack` (of a plan, without one: a pack drawn with `seed`);
    of each at most `limit` tokens.

    Raises:
        UserMistake: the phase makes neither, is not sealed, or has no such pack.
    """
    contents = Contents(run)
    if name not in contents.names:
        known = nearest(name, contents.names) + run_hint(name)
        raise UserMistake(f"{name!r} is no phase of {run.path} that makes a token store or packs{known}")
    folder = contents.folder(name)
    if inspection.is_plan(folder):
        store = Path(contents.settings(name)["store"])
        reader = PackReader(store, folder)
        chosen = int(permutation("inspect", seed, 0, reader.n_packs)[0]) if pack is None else pack
        if not 0 <= chosen < reader.n_packs:
            raise UserMistake(f"{name} has packs 0 to {reader.n_packs - 1}, not {chosen}")
        documents = inspection.pack_documents(reader, chosen, contents.tokenizer_of(store), limit)[:count]
        facts: StoreFacts | PlanFacts = reader.facts
        lengths, title = reader.plan.pieces.length, f"pack {chosen} of {reader.n_packs:,}"
    elif pack is not None:
        raise UserMistake(f"{name} is a token store, not a pack plan: it has no pack {pack}")
    else:
        opened = Store(folder)
        documents = inspection.store_documents(
            opened, contents.tokenizer_of(folder), count=count, seed=seed, limit=limit
        )
        facts = opened.facts
        lengths, title = opened.lengths, f"{len(documents)} of {len(opened):,} documents"
    return {
        "phase": name,
        "folder": str(folder),
        "facts": facts,
        "balance": inspection.balance_table(folder),
        "lengths": inspection.histogram(lengths),
        "title": title,
        "limit": limit,
        "documents": [
            {**asdict(document), "spans": [span._asdict() for span in document.spans]} for document in documents
        ],
    }
