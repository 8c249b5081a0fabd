"""The pack plan: which documents of a token store lie together in one training sequence.

Best fit (best_fit.py): each document goes into the fullest open pack that still holds it, either longest first
(`decreasing`) or in a seeded shuffle (`shuffled`: packs mix lengths, which decreasing order does not when documents
are tiny against the pack; fill loses little). Documents take a multiple of `align` tokens, so that context parallelism
can cut them; that is a property of the plan and never of the tokens.

    plan.npz    pack_ptr int64[packs + 1]; of the pieces, pack after pack: doc_ids int64, starts int64, lengths int32
                (tokens of the document from `start`; whole documents unless they were cut); source int16[packs]
    plan.json   pack_length, align, order, seed, weights, group, cost, counts, digest of the store

Which packs make up global batch k, and who trains which: batches.py.
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.declared import setting
from data_tools.base.durable import canonical_json, fsync_tree, read_json, sha256_bytes, write_json
from data_tools.base.seeded import permutation
from data_tools.mistake import Problem, UserMistake
from data_tools.packs import batches
from data_tools.packs.store import Store, text_hash
from data_tools.progress import Progress, silent
from data_tools.records import sources
from data_tools.records.balance import Balance, SourceBalance

PLAN, FACTS = "plan.npz", "plan.json"
OVERLONG = ("drop", "truncate", "split", "fail")
ORDERS = ("decreasing", "shuffled")
EXPORTS = ("megatron_lm", "megatron_bridge")  # export_packs.py
ON_UNSTABLE = ("fail", "drop")
PADDING_SLOT = 1024  # tokens at most: attention over a slot costs the square of its length, and padding is for nothing

_BLOCK = 1 << 16  # pieces held as Python numbers at a time
_PREDICTED_STEPS = 64  # steps of 8 packs a rank over which idle time is predicted


@dataclass
class Config:
    """The config of the phase pack. The default costs are verl's for a 7B model."""

    store: str = setting("", "token store, such as a materialize output", needed=True, input=True)
    pack_length: int = setting(2048, "length of a pack", unit="tokens", least=2)
    align: int = setting(
        1, "documents are padded to a multiple of it: 2 * context, times tensor with sequence parallelism",
        unit="tokens", least=1,
    )  # fmt: skip
    overlong: str = setting("drop", "what becomes of a document longer than a pack", choices=OVERLONG)
    overlong_of: dict[str, str] = setting(
        dict, "the same for one source, by its name, path or a pattern", choices=OVERLONG
    )
    order: str = setting("decreasing", "how documents are taken: longest first, or shuffled", choices=ORDERS)
    apart: bool = setting(False, "two documents of one prompt never share a pack")
    weights: dict[str, float] = setting(
        dict, "share of packs that a source gets, by its name, path or a pattern; {}: all, once an epoch", least=0
    )
    group: int = setting(
        1, "packs of nearly equal cost that stay side by side, for data-parallel ranks that wait for one another",
        unit="packs", least=1,
    )  # fmt: skip
    cost_linear: float = setting(
        24576.0, "predicted cost of a document of L tokens is cost_linear * L + cost_quadratic * L^2, in any unit",
        least=0,
    )  # fmt: skip
    cost_quadratic: float = setting(1.0, "see cost_linear", least=0)
    seed: int = setting(0, "draw of the shuffle", free=True)
    export: list[str] = setting(list, "the packs are also written in these formats", choices=EXPORTS)
    tokenizer: str = setting("", "tokenizer of the store, for export megatron_lm, which wants text", input="hub")
    on_unstable: str = setting(
        "fail", "what becomes, in an export, of a document whose text gives other tokens", choices=ON_UNSTABLE
    )


def check(config: Config) -> list[Problem]:
    """Return what of the settings does not go together, before the store exists."""
    problems = []
    if config.pack_length % config.align:
        legal = config.align * max(1, round(config.pack_length / config.align))
        values = f"pack_length {config.pack_length} is not a multiple of align {config.align}"
        problems.append(Problem("align", f"{values}; nearest pack_length {legal} with align {config.align}"))
    if config.weights and not any(weight > 0 for weight in config.weights.values()):
        problems.append(Problem("weights", "every source has weight 0; give one at least a positive share"))
    if config.cost_linear + config.cost_quadratic <= 0:
        values = f"{config.cost_linear} and {config.cost_quadratic}"
        problems.append(
            Problem("cost_linear", f"costs {values} are not positive; `afterok plan --parallel` prints them")
        )
    if "megatron_lm" in config.export and not config.tokenizer:
        problems.append(Problem("tokenizer", "no tokenizer; export megatron_lm writes text, give that of the store"))
    return problems


@dataclass(frozen=True)
class Pieces:
    """What there is to pack: `length` tokens of document `doc` from token `start` on. Arrays of one length."""

    doc: np.ndarray  # int64
    start: np.ndarray  # int64
    length: np.ndarray  # int32

    def __getitem__(self, places: np.ndarray) -> "Pieces":
        return Pieces(self.doc[places], self.start[places], self.length[places])

    def __len__(self) -> int:
        return len(self.doc)


def pieces_of(store: Store, config: Config, policies: Sequence[str]) -> tuple[Pieces, np.ndarray]:
    """The documents that fit, and of the longer ones what their source's policy leaves; also which documents those are.

    A piece of a cut document stays only if it holds a target; a cut loses the target that crosses it.
    """
    longest = config.pack_length // config.align * config.align
    overlong = np.flatnonzero(store.lengths > longest)
    fail = [row for row in overlong.tolist() if policies[store.sources[row]] == "fail"]
    if fail:
        raise UserMistake(_name_overlong(store, np.array(fail), config))
    whole = np.flatnonzero(store.lengths <= longest)
    cut: list[tuple[int, int, int]] = []
    for row in overlong.tolist():
        stop = {"drop": 0, "truncate": longest, "split": int(store.lengths[row])}[policies[store.sources[row]]]
        for start in range(0, stop, longest):
            length = min(longest, stop - start)
            if store.mask(row)[start + 1 : start + length].any():
                cut.append((row, start, length))
    rows, starts, lengths = np.array(cut, dtype=np.int64).reshape(-1, 3).T
    pieces = Pieces(
        np.concatenate([whole, rows]),
        np.concatenate([np.zeros(len(whole), dtype=np.int64), starts]),
        np.concatenate([store.lengths[whole], lengths]).astype(np.int32),
    )
    return pieces[np.lexsort((pieces.start, pieces.doc))], overlong


@dataclass(frozen=True)
class Plan:
    """Pack i holds pieces[pack_ptr[i]:pack_ptr[i + 1]]; `source` int16[packs] says whose it is, 0 without weights."""

    pack_ptr: np.ndarray
    pieces: Pieces
    source: np.ndarray

    def digest(self) -> str:
        """SHA-256 over the arrays."""
        arrays = (self.pack_ptr, self.pieces.doc, self.pieces.start, self.pieces.length, self.source)
        return sha256_bytes(b"".join(a.astype("<i8").tobytes() for a in arrays))

    def costs(self, linear: float, quadratic: float) -> np.ndarray:
        """float64[packs], the predicted cost of each."""
        length = self.pieces.length.astype(np.float64)
        return np.add.reduceat(linear * length + quadratic * length * length, self.pack_ptr[:-1])


def plan_of(pieces: Pieces, store: Store, config: Config, weights: Sequence[float]) -> Plan:
    """Pack the pieces, with weights each source's by themselves."""
    from data_tools.packs.best_fit import best_fit, longest_first  # loads a compiler: not for `check`

    apart = _prompt_groups(store, pieces) if config.apart else None
    shares = [np.flatnonzero(store.sources[pieces.doc] == s) for s in range(len(weights))] or [np.arange(len(pieces))]
    order, packs, source, opened = [], [], [], 0
    for number, places in enumerate(shares):
        sizes = -(-pieces.length[places] // config.align)  # in units of align
        capacity = config.pack_length // config.align
        if config.order == "decreasing":
            mine = longest_first(sizes, capacity)
        else:
            mine = permutation("pack order", config.seed, number, len(places))
        found, count = best_fit(sizes[mine], capacity, None if apart is None else apart[places[mine]])
        order.append(places[mine])
        packs.append(found.astype(np.int64) + opened)
        source.append(np.full(count, number, dtype=np.int16))
        opened += count
    pack_of = np.concatenate(packs)
    by_pack = np.argsort(pack_of, kind="stable")  # within a pack in order of arrival
    pack_ptr = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=opened))]).astype(np.int64)
    return Plan(pack_ptr, pieces[np.concatenate(order)[by_pack]], np.concatenate(source))


def _prompt_groups(store: Store, pieces: Pieces) -> np.ndarray:
    """int64[pieces], a number for each prompt that several share; -1 for the others and where there is no prompt."""
    words = store.prompt_hashes[pieces.doc, 0]  # 64 bits: equal by chance is rare, and only keeps two apart
    _, group, count = np.unique(words, return_inverse=True, return_counts=True)
    return np.where((count[group] > 1) & (words != text_hash("")[0]), group, -1)


def pack(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Plan the packs of `config.store` and write the plan and its balance into the empty folder `out`.

    Returns its facts. UserMistake for every problem of `check`, for a source the store does not have, for an overlong
    document where that fails, and when no document is left.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    out = Path(out)
    store = Store(Path(config.store).expanduser())
    names = source_names(store)
    problems = sources.check(config.weights, config.overlong_of, names)
    if problems:
        raise UserMistake(problems)
    policies = [policy or config.overlong for policy in sources.by_source("", config.overlong_of, names)[0]]
    weights = list(map(float, sources.by_source("", config.weights, names)[0])) if config.weights else []
    pieces, overlong = pieces_of(store, config, policies)
    if weights:
        pieces = pieces[np.array(weights)[store.sources[pieces.doc]] > 0]
    if len(pieces) == 0:
        longest = f"{len(overlong)} of {len(store)} are longer than pack_length {config.pack_length}"
        raise UserMistake(f"{store.folder} gives no document to pack: {longest}; raise pack_length or add rows")
    progress(0, len(pieces), "documents")
    plan = plan_of(pieces, store, config, weights)
    progress(len(pieces), len(pieces), "documents")
    np.savez(
        out / PLAN,
        pack_ptr=plan.pack_ptr,
        doc_ids=plan.pieces.doc,
        starts=plan.pieces.start,
        lengths=plan.pieces.length,
        source=plan.source,
    )
    balance = _balance(store, pieces, overlong, weights, names)
    balance.write(out)
    total = balance.total()
    facts = {
        "pack_length": config.pack_length,
        "align": config.align,
        "order": config.order,
        "seed": config.seed,
        "weights": weights,
        "group": config.group,
        "cost": [config.cost_linear, config.cost_quadratic],
        "packs": len(plan.source),
        "documents": total.kept,
        "overlong": len(overlong),
        "tokens": total.tokens,
        "padded": len(plan.source) * config.pack_length - total.tokens,
        "targets": total.supervised,
        "store": store.digest,
        "plan": plan.digest(),
    }
    write_json(out / FACTS, facts)
    fsync_tree(out)
    stream = _stream(facts, plan, config.seed)
    tables = {"balance": balance.table(), "idle": _idle_table(stream)}
    return {**facts, "fill": total.tokens / (len(plan.source) * config.pack_length), "tables": tables}


def source_names(store: Store) -> list[str]:
    """Names of the store's sources in the order of their numbers, from the balance sheet beside it; else the numbers."""
    found = sources.of_folder(store.folder)
    return found or [str(number) for number in range(int(store.sources.max(initial=0)) + 1)]


def targets_of(store: Store, pieces: Pieces) -> np.ndarray:
    """int64[pieces], the labels in the loss: supervised tokens but the first of a piece, which nothing predicts."""
    firsts = store.offsets[pieces.doc] + pieces.start
    counts = np.empty(len(pieces), dtype=np.int64)
    for block in range(0, len(pieces), _BLOCK):
        first, length = firsts[block : block + _BLOCK], pieces.length[block : block + _BLOCK]
        counts[block : block + _BLOCK] = [
            np.count_nonzero(store.all_masks[f + 1 : f + n]) for f, n in zip(first, length)
        ]
    return counts


def _stream(facts: dict[str, Any], plan: Plan, seed: int) -> batches.Stream:
    """The endless order of a plan's packs."""
    return batches.Stream(plan.costs(*facts["cost"]), plan.source, tuple(facts["weights"]), facts["group"], seed)


def _idle_table(stream: batches.Stream) -> dict[str, Any]:
    """Predicted idle share of the ranks for the usual sizes of data parallelism, 8 packs a rank and step."""
    rows = []
    for ranks in (2, 4, 8, 16, 32, 64):
        batch = 8 * ranks
        steps = min(_PREDICTED_STEPS, len(stream.costs) // batch)
        if steps:
            each_step, each_micro = batches.idle_shares(stream, batch, ranks, steps)
            rows.append([ranks, batch, f"{each_step:.1%}", f"{each_micro:.1%}"])
    columns = ["data-parallel ranks", "packs a step", "waiting once a step", "waiting every micro-batch"]
    return {"title": "Predicted idle share of the ranks", "columns": columns, "rows": rows}


def _name_overlong(store: Store, overlong: np.ndarray, config: Config) -> str:
    longest = overlong[np.argmax(store.lengths[overlong])]
    tokens = int(store.lengths[longest])
    need = -(-tokens // config.align) * config.align
    limit = f"pack_length {config.pack_length} (align {config.align})"
    where = f"{tokens} tokens, source {store.sources[longest]} line {store.lines[longest]}"
    remedy = f"raise pack_length to {need}, or set overlong: drop"
    return f"{len(overlong)} of {len(store)} documents do not fit {limit}; the longest has {where}; {remedy}"


def _balance(
    store: Store, pieces: Pieces, overlong: np.ndarray, weights: Sequence[float], names: Sequence[str]
) -> Balance:
    """Documents in = packed + overlong + weight_0, a source a line.

    `tokens` are those in packs; of a cut document the rest is in no pack, and counted as cut. `supervised` counts targets,
    so a mask on a piece's first token is none.
    """
    sheets = []
    packed = np.zeros(len(store), dtype=bool)
    packed[pieces.doc] = True
    targets = targets_of(store, pieces)
    for number, name in enumerate(names):
        mine = store.sources == number
        sheet = SourceBalance.of_rows(name, int(mine.sum()))
        sheet.kept = int((mine & packed).sum())
        left = mine & ~packed
        chosen = mine[pieces.doc]
        sheet.tokens_in = int(store.lengths[mine].sum(dtype=np.int64))
        sheet.tokens = int(pieces.length[chosen].sum(dtype=np.int64))
        lost = int(store.lengths[left].sum(dtype=np.int64))
        if left.any():
            bucket = "weight_0" if weights and weights[number] == 0 else "overlong"
            sheet.dropped[bucket], sheet.tokens_dropped[bucket] = int(left.sum()), lost
        if cut := sheet.tokens_in - sheet.tokens - lost:
            sheet.tokens_dropped["cut"] = cut
        sheet.supervised = int(targets[chosen].sum())
        sheets.append(sheet)
    return Balance(sheets)


@dataclass(frozen=True)
class Pack:
    """One training sequence of L tokens. A document fills a slot of a multiple of `align`; a slot sees only itself."""

    ids: np.ndarray  # int64[L]; padding holds the pad id
    labels: np.ndarray  # int64[L], the next token of the same document; the pad id where there is none
    loss_mask: np.ndarray  # float32[L], 1 where the label is in the loss; 0 on each document's last token and padding
    positions: np.ndarray  # int64[L], from 0 in every slot
    cu_seqlens: np.ndarray  # int32[slots + 1], slot boundaries from 0 to L; after the documents' slots those of padding
    doc_ids: np.ndarray  # int64[documents], rows of the store, in the order of slots; fewer where there is tail padding


class PackReader:
    """The packs of a plan over its store. UserMistake when either is damaged or the plan is another store's.

    `pad_id` fills ids and labels where there is no token; its value is never in the loss nor seen by a document.
    """

    def __init__(self, store: Path, plan: Path, pad_id: int = 0):
        self.store = Store(store)
        self.pad_id = pad_id
        self.facts, self.plan = read_plan(Path(plan))
        if self.facts["store"] != self.store.digest:
            raise UserMistake(f"plan {plan} was made for another store than {store}; run pack on that store")
        self.pack_length: int = self.facts["pack_length"]
        self.align: int = self.facts["align"]
        self.digest = sha256_bytes(canonical_json(self.facts))
        self._streams: dict[int, batches.Stream] = {}

    @property
    def n_packs(self) -> int:
        return len(self.plan.source)

    def stream(self, seed: int) -> batches.Stream:
        """The endless order of the packs; the stream of a seed is made once."""
        if seed not in self._streams:
            self._streams[seed] = _stream(self.facts, self.plan, seed)
        return self._streams[seed]

    def batch(self, k: int, global_batch: int, seed: int) -> list[int]:
        """The packs of global batch k (from 0), whatever the number of ranks."""
        return self.stream(seed).batch(k, global_batch).tolist()

    def share(self, k: int, global_batch: int, seed: int, rank: int, ranks: int) -> list[int]:
        """Those of them that data-parallel rank `rank` of `ranks` trains, in order, dealt by predicted cost."""
        packs, stream = self.stream(seed).batch(k, global_batch), self.stream(seed)
        return packs[batches.deal(stream.costs[packs], ranks)[:, rank]].tolist()

    def padding(self, i: int) -> int:
        """Tokens of pack i that are no document's."""
        mine = slice(int(self.plan.pack_ptr[i]), int(self.plan.pack_ptr[i + 1]))
        return self.pack_length - int(self.plan.pieces.length[mine].sum(dtype=np.int64))

    def documents(self, i: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(row of the store, ids int32[n], mask uint8[n]) of each document of pack i, as far as it lies in the pack."""
        pieces, store = self.plan.pieces, self.store
        for place in range(int(self.plan.pack_ptr[i]), int(self.plan.pack_ptr[i + 1])):
            row, start, length = int(pieces.doc[place]), int(pieces.start[place]), int(pieces.length[place])
            yield row, store.ids(row)[start : start + length], store.mask(row)[start : start + length]

    def pack(self, i: int) -> Pack:
        """Pack i, from 0."""
        length, pieces = self.pack_length, self.plan.pieces
        mine = slice(int(self.plan.pack_ptr[i]), int(self.plan.pack_ptr[i + 1]))
        doc_ids, lengths = pieces.doc[mine], pieces.length[mine].astype(np.int64)
        slots = -(-lengths // self.align) * self.align
        cu_seqlens = np.concatenate([[0], np.cumsum(slots)])
        ids = np.full(length, self.pad_id, dtype=np.int64)
        mask = np.zeros(length + 1, dtype=np.float32)
        firsts = self.store.offsets[doc_ids] + pieces.start[mine]
        for start, first, n in zip(cu_seqlens.tolist(), firsts.tolist(), lengths.tolist()):
            ids[start : start + n] = self.store.all_ids[first : first + n]
            mask[start + 1 : start + n] = self.store.all_masks[first + 1 : first + n]
        labels = np.append(ids[1:], self.pad_id)
        labels[cu_seqlens[1:] - 1] = self.pad_id
        cu_seqlens = padded_to(cu_seqlens, length, self.align)
        positions = np.arange(length, dtype=np.int64) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return Pack(ids, labels, mask[1:], positions, cu_seqlens.astype(np.int32), doc_ids)


def padded_to(cu_seqlens: np.ndarray, length: int, unit: int) -> np.ndarray:
    """Ends of documents (from 0 on), and after them of the slots that fill a row of `length` tokens up; multiples of
    `unit` as they are."""
    slot = -(-PADDING_SLOT // unit) * unit
    ends = np.concatenate([cu_seqlens, np.arange(cu_seqlens[-1] + slot, length, slot)])
    return np.append(ends, length) if ends[-1] < length else ends


def read_plan(folder: Path) -> tuple[dict[str, Any], Plan]:
    """(facts, plan) of a pack output. UserMistake when it is none or damaged."""
    remedy = "restore it or run pack again"
    for name in (FACTS, PLAN):
        if not (folder / name).is_file():
            raise UserMistake(f"{folder} is no pack plan: it has no {name}; give a pack output")
    try:
        facts = read_json(folder / FACTS)
        digest = [facts[name] for name in ("pack_length", "align", "weights", "group", "cost", "store", "plan")][-1]
    except (ValueError, KeyError, TypeError):
        raise UserMistake(f"{folder / FACTS} is damaged: not the JSON of a plan; {remedy}") from None
    try:
        with np.load(folder / PLAN) as archive:
            pieces = Pieces(archive["doc_ids"], archive["starts"], archive["lengths"])
            plan = Plan(archive["pack_ptr"], pieces, archive["source"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise UserMistake(f"{folder / PLAN} is damaged ({error}); {remedy}") from None
    if plan.digest() != digest:
        raise UserMistake(f"{folder / PLAN} is damaged: its content is not what plan.json names; {remedy}")
    return facts, plan
