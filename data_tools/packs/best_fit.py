"""Best fit: each document goes into the fullest open pack that still holds it. O(n) steps of a few operations.

The free spaces that open packs have are a set of numbers up to the capacity, kept as three levels of 64-bit words: a
bit of a word says that the number is in the set, a bit of the level above that the word is not empty. The successor of
a number is then at most five words away, whatever the capacity (64 ** 3 numbers and more). Packs with equal free space
wait in a linked list of their space.

Longest first (`longest_first`) this is best-fit decreasing: at most 11/9 of the optimum + 6/9 packs (Dosa 2007).
"""

import numpy as np

from data_tools.base.compiled import compiled

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_PLACE = np.empty(64, dtype=np.int64)  # of the lowest bit, by the top 6 bits of its product with the sequence
for _number in range(64):
    _PLACE[((1 << _number) * int(_DE_BRUIJN) & (2**64 - 1)) >> 58] = _number

_ONE, _ALL, _TOP = np.uint64(1), np.uint64(2**64 - 1), np.uint64(58)


def longest_first(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return int64[n], the places of `sizes` (each in 1..capacity) from the longest to the shortest, equal ones in
    order."""
    return _longest_first(np.ascontiguousarray(sizes, dtype=np.int32), capacity)


def best_fit(sizes: np.ndarray, capacity: int, apart: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """Return (pack int32[n] of each size, in the order given, number of packs). Sizes in 1..capacity.

    A size goes into the pack with the least free space that holds it, of equal ones the latest. `apart` int64[n] names
    a group for each size (from 0, or -1 for none): two of one group never share a pack, the later takes the next best.
    """
    sizes = np.ascontiguousarray(sizes, dtype=np.int32)
    groups = np.ascontiguousarray(np.empty(0) if apart is None else apart, dtype=np.int64)
    return _best_fit(sizes, capacity, groups, int(groups.max(initial=-1)) + 1)


@compiled()
def _longest_first(sizes, capacity):
    starts = np.zeros(capacity + 2, dtype=np.int64)
    for size in sizes:
        starts[capacity - size + 1] += 1
    starts = np.cumsum(starts)
    order = np.empty(len(sizes), dtype=np.int64)
    for place in range(len(sizes)):
        rank = capacity - sizes[place]
        order[starts[rank]] = place
        starts[rank] += 1
    return order


@compiled(inline="always")
def _lowest(word):
    """Return the place of the lowest bit of a word that is not 0."""
    return _PLACE[((word & (~word + _ONE)) * _DE_BRUIJN) >> _TOP]


@compiled(inline="always")
def _bit(number):
    return _ONE << np.uint64(number & 63)


@compiled()
def _successor(words, filled, blocks, least):
    """Return the smallest member of at least `least`, or -1."""
    word = least >> 6
    found = words[word] & (_ALL << np.uint64(least & 63))
    if found:
        return (word << 6) | _lowest(found)
    word += 1
    block = word >> 6
    if block >= len(filled):
        return -1
    found = filled[block] & (_ALL << np.uint64(word & 63))
    if not found:
        block += 1
        top = block >> 6
        if top >= len(blocks):
            return -1
        found = blocks[top] & (_ALL << np.uint64(block & 63))
        while not found:
            top += 1
            if top >= len(blocks):
                return -1
            found = blocks[top]
        block = (top << 6) | _lowest(found)
        found = filled[block]
    word = (block << 6) | _lowest(found)
    return (word << 6) | _lowest(words[word])


@compiled()
def _add(words, filled, blocks, space):
    words[space >> 6] |= _bit(space)
    filled[space >> 12] |= _bit(space >> 6)
    blocks[space >> 18] |= _bit(space >> 12)


@compiled()
def _remove(words, filled, blocks, space):
    words[space >> 6] &= ~_bit(space)
    if not words[space >> 6]:
        filled[space >> 12] &= ~_bit(space >> 6)
        if not filled[space >> 12]:
            blocks[space >> 18] &= ~_bit(space >> 12)


@compiled()
def _holds(packs, earlier, place, pack):
    """Return whether `pack` holds one of the places of the chain that starts at `place`."""
    while place >= 0:
        if packs[place] == pack:
            return True
        place = earlier[place]
    return False


@compiled()
def _best_fit(sizes, capacity, groups, n_groups):
    n = len(sizes)
    words = np.zeros((capacity >> 6) + 1, dtype=np.uint64)
    filled = np.zeros((capacity >> 12) + 1, dtype=np.uint64)
    blocks = np.zeros((capacity >> 18) + 1, dtype=np.uint64)
    head = np.full(capacity + 1, -1, dtype=np.int32)  # free space -> the latest pack with it
    after = np.empty(n, dtype=np.int32)  # pack -> the next of equal free space
    packs = np.empty(n, dtype=np.int32)
    latest = np.full(n_groups, -1, dtype=np.int32)  # group -> its last place
    earlier = np.empty(len(groups), dtype=np.int32)  # place -> the one before of its group
    opened = 0
    for place in range(n):
        size = sizes[place]
        group = groups[place] if n_groups else -1
        chain = latest[group] if group >= 0 else -1
        space = _successor(words, filled, blocks, size)
        before, pack = -1, head[space] if space >= 0 else -1
        while chain >= 0 and pack >= 0 and _holds(packs, earlier, chain, pack):
            before, pack = pack, after[pack]
            if pack < 0:
                space = _successor(words, filled, blocks, space + 1) if space < capacity else -1
                before, pack = -1, head[space] if space >= 0 else -1
        if pack < 0:
            space, pack = capacity, opened
            opened += 1
        elif before >= 0:
            after[before] = after[pack]
        else:
            head[space] = after[pack]
            if head[space] < 0:
                _remove(words, filled, blocks, space)
        packs[place] = pack
        if group >= 0:
            earlier[place] = chain
            latest[group] = place
        left = space - size
        if left > 0:
            if head[left] < 0:
                _add(words, filled, blocks, left)
            after[pack] = head[left]
            head[left] = pack
    return packs, opened
