"""The pack plan: which documents of a token store lie together in one training sequence.

Best fit: each document goes into the fullest open pack that still holds it, either longest first (`decreasing`, the
classic BFD, within 11/9 of the optimum) or in a seeded shuffle (`shuffled`: packs mix lengths, which decreasing order
does not when documents are tiny against the pack; fill loses little). Documents take a multiple of `align` tokens, so
that context parallelism can cut them; that is a property of the plan and never of the tokens.

    plan.npz    pack_ptr int64[packs + 1], doc_ids int64[documents]: pack i holds doc_ids[pack_ptr[i]:pack_ptr[i+1]]
    plan.json   pack_length, align, order, seed, counts, digest of the store

The packs of global batch k are a pure function of (plan, k, global batch size, seed): data parallelism only decides
who trains which.
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from data_tools.balance import Balance, SourceBalance
from data_tools.durable import canonical_json, fsync_tree, read_json, sha256_bytes, write_json
from data_tools.mistake import Problem, UserMistake, nearest
from data_tools.progress import Progress, silent
from data_tools.seeded import permutation
from data_tools.store import Store

PLAN, FACTS, BALANCE = "plan.npz", "plan.json", "balance.json"
OVERLONG = ("drop", "fail")
ORDERS = ("decreasing", "shuffled")

_REPORT_EVERY = 50_000  # documents between two calls of progress


@dataclass
class Config:
    store: str = field(default="", metadata={"input": True})  # a materialize output
    pack_length: int = 2048  # tokens
    align: int = 1  # tokens; documents are padded to a multiple
    overlong: str = "drop"  # drop | fail: what a document longer than a pack does
    order: str = "decreasing"  # decreasing | shuffled
    seed: int = 0  # of the shuffle


def check(config: Config) -> list[Problem]:
    """What can be known wrong before the store exists, all at once."""
    problems = []
    if config.pack_length < 2:
        problems.append(Problem("pack_length", f"{config.pack_length} tokens hold no label; give at least 2"))
    if config.align < 1 or config.pack_length % max(config.align, 1):
        legal = max(config.align, 1) * max(1, round(config.pack_length / max(config.align, 1)))
        values = f"pack_length {config.pack_length} is not a multiple of align {config.align}"
        problems.append(Problem("align", f"{values}; nearest pack_length {legal} with align {max(config.align, 1)}"))
    for key, value, valid in (("overlong", config.overlong, OVERLONG), ("order", config.order, ORDERS)):
        if value not in valid:
            problems.append(Problem(key, f"unknown value {value!r}{nearest(value, valid)}"))
    if not config.store:
        problems.append(Problem("store", "no token store; give a materialize output"))
    return problems


class _Spaces:
    """The free spaces that open packs have, as a set with a fast successor: two levels of 512-bit integers.

    One integer of `capacity` bits would do, but every step would read all of it; these touch about its square root.
    """

    WORD = 512

    def __init__(self, capacity: int):
        self.words = [0] * (capacity // self.WORD + 1)
        self.filled = 0  # bit w: words[w] is not 0

    def add(self, space: int) -> None:
        word, bit = divmod(space, self.WORD)
        self.words[word] |= 1 << bit
        self.filled |= 1 << word

    def remove(self, space: int) -> None:
        word, bit = divmod(space, self.WORD)
        self.words[word] ^= 1 << bit
        if not self.words[word]:
            self.filled ^= 1 << word

    def smallest(self, least: int) -> Optional[int]:
        """The smallest member of at least `least`, or None."""
        word, bit = divmod(least, self.WORD)
        if above := self.words[word] >> bit:
            return least + _lowest_bit(above)
        if above := self.filled >> (word + 1):
            word += 1 + _lowest_bit(above)
            return word * self.WORD + _lowest_bit(self.words[word])
        return None


def _lowest_bit(value: int) -> int:
    return (value & -value).bit_length() - 1


def best_fit(sizes: np.ndarray, capacity: int, progress: Progress = silent) -> tuple[np.ndarray, int]:
    """(pack int64[n] of each size in the order given, number of packs). Sizes in 1..capacity.

    Each goes into the pack with the least free space that holds it, of equal ones the latest.
    """
    packs = np.empty(len(sizes), dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space → open packs
    spaces = _Spaces(capacity)
    opened = 0
    for place, size in enumerate(sizes.tolist()):
        if place % _REPORT_EVERY == 0:
            progress(place, len(sizes), "documents")
        space = spaces.smallest(size)
        if space is None:
            space, pack = capacity, opened
            opened += 1
        else:
            pack = waiting[space].pop()
            if not waiting[space]:
                spaces.remove(space)
        packs[place] = pack
        if space > size:
            if not waiting[space - size]:
                spaces.add(space - size)
            waiting[space - size].append(pack)
    progress(len(sizes), len(sizes), "documents")
    return packs, opened


def pack(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Plan the packs of `config.store` and write the plan and its balance into the empty folder `out`.

    Returns its facts. UserMistake for every problem of `check`, for an overlong document where that fails, and when
    no document is left.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    out = Path(out)
    store = Store(Path(config.store).expanduser())
    sizes = -(-store.lengths.astype(np.int64) // config.align)  # (documents,), in units of align
    capacity = config.pack_length // config.align
    documents = np.flatnonzero(sizes <= capacity)
    overlong = np.flatnonzero(sizes > capacity)
    if len(overlong) and config.overlong == "fail":
        raise UserMistake(_name_overlong(store, overlong, config))
    if len(documents) == 0:
        longest = f"{len(overlong)} of {len(store)} are longer than pack_length {config.pack_length}"
        raise UserMistake(f"{store.folder} gives no document to pack: {longest}; raise pack_length or add rows")
    if config.order == "decreasing":
        documents = documents[np.argsort(-sizes[documents], kind="stable")]
    else:
        documents = documents[permutation("pack order", config.seed, 0, len(documents))]
    packs, n_packs = best_fit(sizes[documents], capacity, progress)
    by_pack = np.argsort(packs, kind="stable")  # within a pack in order of arrival
    pack_ptr = np.concatenate([[0], np.cumsum(np.bincount(packs, minlength=n_packs))]).astype(np.int64)
    doc_ids = documents[by_pack].astype(np.int64)
    np.savez(out / PLAN, pack_ptr=pack_ptr, doc_ids=doc_ids)
    balance = _balance(store, documents, len(overlong))
    balance.check()
    write_json(out / BALANCE, balance.to_json())
    tokens = balance.sources[0].tokens
    facts = {
        "pack_length": config.pack_length,
        "align": config.align,
        "order": config.order,
        "seed": config.seed,
        "packs": n_packs,
        "documents": len(documents),
        "overlong": len(overlong),
        "tokens": tokens,
        "targets": balance.sources[0].supervised,
        "store": store.digest,
        "plan": _plan_digest(pack_ptr, doc_ids),
    }
    write_json(out / FACTS, facts)
    fsync_tree(out)
    return {**facts, "fill": tokens / (n_packs * config.pack_length), "table": balance.table()}


def _name_overlong(store: Store, overlong: np.ndarray, config: Config) -> str:
    longest = overlong[np.argmax(store.lengths[overlong])]
    tokens = int(store.lengths[longest])
    need = -(-tokens // config.align) * config.align
    limit = f"pack_length {config.pack_length} (align {config.align})"
    where = f"{tokens} tokens, source {store.sources[longest]} line {store.lines[longest]}"
    remedy = f"raise pack_length to {need}, or set overlong: drop"
    return f"{len(overlong)} of {len(store)} documents do not fit {limit}; the longest has {where}; {remedy}"


def _balance(store: Store, documents: np.ndarray, overlong: int) -> Balance:
    """Documents in = packed + overlong; `supervised` counts targets, so a mask on a document's first token is none."""
    sheet = SourceBalance("documents", lines=len(store), lines_with_rows=len(store), rows=len(store))
    sheet.kept = len(documents)
    sheet.tokens = int(store.lengths[documents].sum(dtype=np.int64))
    if overlong:
        sheet.dropped["overlong"] = overlong
    sheet.supervised = sum(int(np.count_nonzero(store.mask(row)[1:])) for row in documents.tolist())
    return Balance([sheet])


def _plan_digest(pack_ptr: np.ndarray, doc_ids: np.ndarray) -> str:
    return sha256_bytes(pack_ptr.astype("<i8").tobytes() + doc_ids.astype("<i8").tobytes())


@dataclass(frozen=True)
class Pack:
    """One training sequence of L tokens. A document fills a slot of a multiple of `align`; a slot sees only itself."""

    ids: np.ndarray  # int64[L]; padding holds the pad id
    labels: np.ndarray  # int64[L], the next token of the same document; the pad id where there is none
    loss_mask: np.ndarray  # float32[L], 1 where the label is in the loss; 0 on each document's last token and padding
    positions: np.ndarray  # int64[L], from 0 in every slot
    cu_seqlens: np.ndarray  # int32[slots + 1], slot boundaries from 0 to L; tail padding is a slot of its own
    doc_ids: np.ndarray  # int64[documents], rows of the store; one less than slots where there is tail padding


class PackReader:
    """The packs of a plan over its store. UserMistake when either is damaged or the plan is another store's.

    `pad_id` fills ids and labels where there is no token; its value is never in the loss nor seen by a document.
    """

    def __init__(self, store: Path, plan: Path, pad_id: int = 0):
        self.store = Store(store)
        self.pad_id = pad_id
        facts, self._pack_ptr, self._doc_ids = _read_plan(Path(plan))
        if facts["store"] != self.store.digest:
            raise UserMistake(f"plan {plan} was made for another store than {store}; run pack on that store")
        self.facts = facts
        self.pack_length: int = facts["pack_length"]
        self.align: int = facts["align"]
        self.digest = sha256_bytes(canonical_json(facts))
        self._epoch: tuple[Optional[tuple[int, int]], np.ndarray] = (None, np.empty(0, dtype=np.int64))

    @property
    def n_packs(self) -> int:
        return len(self._pack_ptr) - 1

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        """The packs of global batch k (from 0): places [k·B, (k+1)·B) of an endless stream of shuffled epochs."""
        places = range(k * global_batch, (k + 1) * global_batch)
        return [int(self._permutation(seed, place // self.n_packs)[place % self.n_packs]) for place in places]

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        """int64[n_packs]; the last one is kept, which changes the time and not the answer."""
        if self._epoch[0] != (seed, epoch):
            self._epoch = ((seed, epoch), permutation("pack epoch", seed, epoch, self.n_packs))
        return self._epoch[1]

    def pack(self, i: int) -> Pack:
        """Pack i, from 0."""
        length = self.pack_length
        doc_ids = self._doc_ids[self._pack_ptr[i] : self._pack_ptr[i + 1]]
        ids = np.full(length, self.pad_id, dtype=np.int64)
        labels = np.full(length, self.pad_id, dtype=np.int64)
        loss_mask = np.zeros(length, dtype=np.float32)
        boundaries = [0]
        for row in doc_ids.tolist():
            tokens, mask = self.store.ids(row), self.store.mask(row)
            start, n = boundaries[-1], len(tokens)
            ids[start : start + n] = tokens
            labels[start : start + n - 1] = tokens[1:]
            loss_mask[start : start + n - 1] = mask[1:]
            boundaries.append(start + -(-n // self.align) * self.align)
        if boundaries[-1] < length:
            boundaries.append(length)
        cu_seqlens = np.array(boundaries, dtype=np.int32)
        starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))  # (L,), where each token's slot begins
        positions = np.arange(length, dtype=np.int64) - starts
        return Pack(ids, labels, loss_mask, positions, cu_seqlens, doc_ids)


def _read_plan(folder: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    remedy = "restore it or run pack again"
    for name in (FACTS, PLAN):
        if not (folder / name).is_file():
            raise UserMistake(f"{folder} is no pack plan: it has no {name}; give a pack output")
    try:
        facts = read_json(folder / FACTS)
        counts = [facts[name] for name in ("pack_length", "align", "packs", "documents", "store", "plan")]
    except (ValueError, KeyError, TypeError):
        raise UserMistake(f"{folder / FACTS} is damaged: not the JSON of a plan; {remedy}") from None
    try:
        with np.load(folder / PLAN) as archive:
            pack_ptr, doc_ids = archive["pack_ptr"], archive["doc_ids"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise UserMistake(f"{folder / PLAN} is damaged ({error}); {remedy}") from None
    if _plan_digest(pack_ptr, doc_ids) != counts[-1]:
        raise UserMistake(f"{folder / PLAN} is damaged: its content is not what plan.json names; {remedy}")
    return facts, pack_ptr, doc_ids
