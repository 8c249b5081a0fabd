"""Which rows of its sources a recipe takes: a pure function of the rows' texts, the recipe and its seed.

A row's place in its source's draw is a hash of (seed, source, text), so that neither the number of elements nor the
order of files decides. In that order come first those held out for validation, then those up to `stop`, and of a source
with a share as many of these as the share allows. No text that is held out is trained on, whatever its loss mask, and
however often it stands there:

    rows      share · measure, rounded down       measure = what the source with `share: rest` has / its share
    tokens    the first rows that come nearest to that
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from data_tools.base.tables import ShownTable
from data_tools.mistake import Problem, UserMistake
from data_tools.recipes.recipe import Recipe

KEPT, DUPLICATE, NOT_DRAWN, VALIDATION = range(4)  # what becomes of a row
BUCKETS = {DUPLICATE: "duplicate", NOT_DRAWN: "not_drawn", VALIDATION: "validation"}

_REMEDY = "lower the stop of the source that has the rest, change the shares, or say short: report in the recipe"
_EPSILON = 1e-9  # of a product of shares: 700 / 0.7 · 0.3 is 300 rows, and not 299


@dataclass
class _Drawn:
    """Counts what a source had and gave."""

    available: int
    order: np.ndarray  # rows that may be trained on, in the order of the draw
    tokens: np.ndarray  # running sum of theirs
    wanted: float | None = None  # rows or tokens of its share; None: all
    taken: int = 0


def draw(
    recipe: Recipe, source_of: np.ndarray, hashes: np.ndarray, tokens: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, ShownTable, dict[str, int]]:
    """Return (uint8[rows] what becomes of each row, a table for people, {source: rows or tokens that it is short}).

    `source_of` int[rows] is the number of a row's source, `hashes` uint64[rows, 2] of its text, `tokens` its length,
    `first` whether no row before is equal. Raise UserMistake, with the numbers, where a source is short and that fails,
    and where the source with the rest has no row.
    """
    fate = np.where(first, NOT_DRAWN, DUPLICATE).astype(np.uint8)
    orders = [_in_order(recipe, number, source_of, hashes, first) for number in range(len(recipe.sources))]
    for source, order in zip(recipe.sources, orders):
        fate[order[: source.stop or None if source.is_validation else source.held_out]] = VALIDATION
    fate[_of_held_out_texts(fate, hashes)] = DUPLICATE
    drawn = {}
    for source, order in zip(recipe.sources, orders):
        if not source.is_validation:
            there = order[fate[order] != DUPLICATE]
            left = there[fate[there] == NOT_DRAWN][: source.stop or None]
            drawn[source.name] = _Drawn(len(there), left, np.cumsum(tokens[left], dtype=np.int64))
    short = _take(recipe, drawn)
    for given in drawn.values():
        fate[given.order[: given.taken]] = KEPT
    if recipe.short == "fail" and (none := empty(recipe, source_of, fate)):
        raise UserMistake(Problem("recipe", f"no row of {', '.join(none)} is drawn; {_REMEDY}"))
    return fate, _table(recipe, drawn, fate, source_of, tokens), short


def _of_held_out_texts(fate: np.ndarray, hashes: np.ndarray) -> list[int]:
    """Return the rows that might be drawn and whose text a row has that is held out."""
    held = hashes[fate == VALIDATION]
    texts = set(map(bytes, held))
    alike = np.flatnonzero((fate == NOT_DRAWN) & np.isin(hashes[:, 0], held[:, 0]))
    return [row for row in alike.tolist() if bytes(hashes[row]) in texts]


def empty(recipe: Recipe, source_of: np.ndarray, fate: np.ndarray) -> list[str]:
    """Return the sources that give no row, though the recipe asks for some; of a validation set, none that is held
    out."""
    wanted = [(number, source) for number, source in enumerate(recipe.sources) if source.share is None or source.share]
    fates = [(source.name, fate[source_of == number], source.is_validation) for number, source in wanted]
    return [name for name, own, is_validation in fates if not (own == (VALIDATION if is_validation else KEPT)).any()]


def undrawn(recipe: Recipe, source_of: np.ndarray, hashes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return bool[rows]: which rows of validation sets `draw` does not take."""
    left = np.zeros(len(source_of), dtype=bool)
    for number, source in enumerate(recipe.sources):
        if source.is_validation:
            left |= source_of == number
            left[_in_order(recipe, number, source_of, hashes, first)[: source.stop or None]] = False
    return left


def _in_order(recipe: Recipe, number: int, source_of: np.ndarray, hashes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the rows of a source that equal none before them, in the order in which they are drawn."""
    rows = np.flatnonzero((source_of == number) & first)
    return rows[np.argsort(_places(recipe.seed, recipe.sources[number].name, hashes[rows]), kind="stable")]


def _places(seed: int, name: str, hashes: np.ndarray) -> np.ndarray:
    """Return uint64[rows]: the rows' places, by splitmix64 (Steele, Lea and Flood, 2014) of their hashes."""
    salt = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    words = hashes[:, 0] ^ np.uint64(salt)
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _take(recipe: Recipe, drawn: dict[str, _Drawn]) -> dict[str, int]:
    """Write into each source how many of its rows are taken; return what is short of a share."""
    for given in drawn.values():
        given.taken = len(given.order)
    rest, short = next((source for source in recipe.sources if source.is_rest), None), dict[str, int]()
    if rest is None:
        return short
    if not drawn[rest.name].taken:
        told = f"{rest.name} has no row to be trained on, and with `share: rest` it sets the measure of the others"
        raise UserMistake(Problem("recipe", f"{told}; see what became of its rows, or give other files"))
    size = _size(recipe, drawn[rest.name])
    for source in recipe.sources:
        if source.share is None or source.is_rest:
            continue
        given, wanted = drawn[source.name], size * (source.share / (rest.share or 1))
        given.wanted, has = wanted, _size(recipe, given)
        rows = min(int(wanted + _EPSILON), has)
        given.taken = _nearest(given.tokens, wanted) if recipe.by == "tokens" else rows
        if int(wanted + _EPSILON) > has:
            short[source.name] = int(wanted + _EPSILON) - has
    if short and recipe.short == "fail":
        lines = [f"{name} is {missing:,} {recipe.by} short of its share" for name, missing in short.items()]
        raise UserMistake(Problem("recipe", f"{'; '.join(lines)}; {_REMEDY}"))
    return short


def _size(recipe: Recipe, given: _Drawn) -> int:
    """Return the rows or the tokens of all that may be drawn of a source."""
    return _sum(given, len(given.order)) if recipe.by == "tokens" else len(given.order)


def _sum(given: _Drawn, rows: int) -> int:
    """Return the tokens of a source's first rows."""
    return int(given.tokens[rows - 1]) if rows else 0


def _nearest(sums: np.ndarray, wanted: float) -> int:
    """Return how many rows have the sum that is nearest to a number of tokens."""
    if not len(sums) or wanted <= 0:
        return 0
    after = int(np.searchsorted(sums, wanted))
    if after == len(sums):
        return after
    before = sums[after - 1] if after else 0
    return after + int(sums[after] - wanted < wanted - before)


def _table(
    recipe: Recipe, drawn: dict[str, _Drawn], fate: np.ndarray, source_of: np.ndarray, tokens: np.ndarray
) -> ShownTable:
    """Return a line a source: what it had, what was wanted, and its shares of the mix both by rows and by tokens."""
    mix = [source.name for source in recipe.sources if source.share is not None] or list(drawn)
    all_rows = sum(drawn[name].taken for name in mix)
    all_tokens = sum(_sum(drawn[name], drawn[name].taken) for name in mix)
    rows = []
    for number, source in enumerate(recipe.sources):
        held_out = (source_of == number) & (fate == VALIDATION)
        validation = [int(held_out.sum()), int(tokens[held_out].sum(dtype=np.int64))]
        if source.name not in drawn:
            rows.append([source.name, "", int(((source_of == number) & (fate != DUPLICATE)).sum()), "", 0, "", 0, "",
                         *validation])  # fmt: skip
            continue
        given = drawn[source.name]
        taken, sum_ = given.taken, _sum(given, given.taken)
        shared = source.name in mix
        rows.append([
            source.name, "" if source.share is None else f"{source.share:.2%}", given.available,
            "" if given.wanted is None else int(given.wanted + _EPSILON),
            taken, f"{taken / all_rows:.2%}" if shared and all_rows else "beside",
            sum_, f"{sum_ / all_tokens:.2%}" if shared and all_tokens else "beside", *validation,
        ])  # fmt: skip
    columns = ["source", "share", "rows there", f"{recipe.by} wanted", "rows", "of the mix", "tokens", "of its tokens",
               "validation rows", "validation tokens"]  # fmt: skip
    return {"title": f"Recipe {recipe.name}: shares by {recipe.by}, seed {recipe.seed}", "columns": columns,
            "rows": rows}  # fmt: skip
