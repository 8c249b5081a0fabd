"""The pack plan: which documents of a token store lie together in one training sequence.

Best fit (best_fit.py): each document goes into the fullest open pack that still holds it, either longest first
(`decreasing`) or in a seeded shuffle (`shuffled`: packs mix lengths, which decreasing order does not when documents
are tiny against the pack; fill loses little). Documents take a multiple of `align` tokens, so that context parallelism
can cut them; that is a property of the plan and never of the tokens.

What is written, and how packs are read from it: plan.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.base.declared import STORES, setting
from data_tools.base.durable import fsync_tree, write_json
from data_tools.base.inside import expanded
from data_tools.base.seeded import permutation
from data_tools.base.tables import ShownTable
from data_tools.mistake import Problem, UserMistake
from data_tools.packs import batches
from data_tools.packs.plan import FACTS, PackPlan, Pieces, PlanFacts, stream_of, sums_of
from data_tools.packs.store import Store, text_hash
from data_tools.progress import Progress, silent
from data_tools.records import sources
from data_tools.records.balance import Balance, SourceBalance

OVERLONG = ("drop", "truncate", "split", "fail")
ORDERS = ("decreasing", "shuffled")
EXPORTS = ("megatron_lm", "megatron_bridge")  # export_packs.py
ON_UNSTABLE = ("fail", "drop")

_BLOCK = 1 << 16  # pieces held as Python numbers at a time
_PREDICTED_STEPS = 64  # steps of 8 packs a rank over which idle time is predicted


@dataclass
class Config:
    """The config of the phase pack. The default costs are verl's for a 7B model."""

    store: str = setting(
        "",
        "token store, such as a materialize output",
        example="${phases.data.out}",
        needed=True,
        input=True,
        made_by=STORES,
    )
    pack_length: int = setting(2048, "length of a pack", unit="tokens", least=2)
    align: int = setting(
        1, "documents are padded to a multiple of it: 2 * context, times tensor with sequence parallelism",
        unit="tokens", least=1, example=16
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
    tokenizer: str = setting(
        "", "tokenizer of the store, for export megatron_lm, which wants text", example="Qwen/Qwen2.5-0.5B", input="hub"
    )
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


def pieces_of(store: Store, config: Config, policies: Sequence[str]) -> tuple[Pieces, np.ndarray]:
    """Return the documents that fit, and of the longer ones what their source's policy leaves; also which documents
    those are.

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


def plan_of(pieces: Pieces, store: Store, config: Config, weights: Sequence[float]) -> PackPlan:
    """Pack the pieces, with weights each source's by themselves."""
    from data_tools.packs.best_fit import best_fit, longest_first  # loads a compiler: not for `check`

    apart = _prompt_groups(store, pieces) if config.apart else None
    shares = [np.flatnonzero(store.sources[pieces.doc] == s) for s in range(len(weights))] or [np.arange(len(pieces))]
    order, packs, source, opened = [], [], [], 0
    for number, places in enumerate(shares):
        sizes = -(-pieces.length[places] // config.align)  # in units of align
        capacity = config.pack_length // config.align
        if config.order == "decreasing":
            sequence = longest_first(sizes, capacity)
        else:
            sequence = permutation("pack order", config.seed, number, len(places))
        pack_numbers, count = best_fit(sizes[sequence], capacity, None if apart is None else apart[places[sequence]])
        order.append(places[sequence])
        packs.append(pack_numbers.astype(np.int64) + opened)
        source.append(np.full(count, number, dtype=np.int16))
        opened += count
    pack_of = np.concatenate(packs)
    by_pack = np.argsort(pack_of, kind="stable")  # within a pack in order of arrival
    pack_ptr = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=opened))]).astype(np.int64)
    return PackPlan(pack_ptr, pieces[np.concatenate(order)[by_pack]], np.concatenate(source))


def _prompt_groups(store: Store, pieces: Pieces) -> np.ndarray:
    """Return int64[pieces], a number for each prompt that several share; -1 for the others and where there is no
    prompt."""
    words = store.prompt_hashes[pieces.doc, 0]  # 64 bits: equal by chance is rare, and only keeps two apart
    _, group, count = np.unique(words, return_inverse=True, return_counts=True)
    return np.where((count[group] > 1) & (words != text_hash("")[0]), group, -1)


def pack(config: Config, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Plan the packs of `config.store` and write the plan and its balance into the empty folder `out`.

    Returns its facts. Raise UserMistake for every problem of `check`, for a source the store does not have, for an
    overlong document where that fails, and when no document is left.
    """
    problems = check(config)
    if problems:
        raise UserMistake(problems)
    out = Path(out)
    store = Store(expanded(config.store))
    names = source_names(store)
    problems = sources.check(config.weights, config.overlong_of, names)
    if problems:
        raise UserMistake(problems)
    policies = [policy or config.overlong for policy in sources.by_source("", config.overlong_of, names)[0]]
    weights = (
        [float(weight or 0) for weight in sources.by_source("", config.weights, names)[0]] if config.weights else []
    )
    pieces, overlong = pieces_of(store, config, policies)
    if weights:
        pieces = pieces[np.array(weights)[store.sources[pieces.doc]] > 0]
    if len(pieces) == 0:
        longest = f"{len(overlong)} of {len(store)} are longer than pack_length {config.pack_length}"
        raise UserMistake(f"{store.folder} gives no document to pack: {longest}; raise pack_length or add rows")
    progress(0, len(pieces), "documents")
    plan = plan_of(pieces, store, config, weights)
    progress(len(pieces), len(pieces), "documents")
    plan.write(out)
    balance = _balance(store, pieces, overlong, weights=weights, names=names)
    balance.write(out)
    total = balance.total()
    facts: PlanFacts = {
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
        "crc32": sums_of(out),
    }
    write_json(out / FACTS, facts)
    fsync_tree(out)
    stream = stream_of(facts, plan, config.seed)
    tables = {"balance": balance.table(), "idle": _idle_table(stream)}
    return {**facts, "fill": total.tokens / (len(plan.source) * config.pack_length), "tables": tables}


def source_names(store: Store) -> list[str]:
    """Names of the store's sources in the order of their numbers, from the balance sheet beside it; else the
    numbers."""
    names = sources.of_folder(store.folder)
    return names or [str(number) for number in range(int(store.sources.max(initial=0)) + 1)]


def targets_of(store: Store, pieces: Pieces) -> np.ndarray:
    """Return int64[pieces], the labels in the loss: supervised tokens but the first of a piece, which nothing
    predicts."""
    firsts = store.offsets[pieces.doc] + pieces.start
    counts = np.empty(len(pieces), dtype=np.int64)
    for block in range(0, len(pieces), _BLOCK):
        first, length = firsts[block : block + _BLOCK], pieces.length[block : block + _BLOCK]
        counts[block : block + _BLOCK] = [
            np.count_nonzero(store.all_masks[f + 1 : f + n]) for f, n in zip(first, length)
        ]
    return counts


def _idle_table(stream: batches.Stream) -> ShownTable:
    """Return the predicted idle share of the ranks for the usual sizes of data parallelism, 8 packs a rank and step."""
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
    """Return the balance: documents in = packed + overlong + weight_0, a source a line.

    `tokens` are those in packs; of a cut document the rest is in no pack, and counted as cut. `supervised` counts
    targets, so a mask on a piece's first token is none.
    """
    sheets = []
    packed = np.zeros(len(store), dtype=bool)
    packed[pieces.doc] = True
    targets = targets_of(store, pieces)
    for number, name in enumerate(names):
        is_own = store.sources == number
        sheet = SourceBalance.of_rows(name, int(is_own.sum()))
        sheet.kept = int((is_own & packed).sum())
        left = is_own & ~packed
        chosen = is_own[pieces.doc]
        sheet.tokens_in = int(store.lengths[is_own].sum(dtype=np.int64))
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
