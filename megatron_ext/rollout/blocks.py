"""Blocks of keys and values: who holds which, and how often. Pure Python; the tensors are cache.py's."""


class BlockManager:
    """Count who holds which of `count` blocks of `size` tokens: a block has as many holders as its references say."""

    def __init__(self, count: int, size: int):
        self.size = size
        self.references = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """The number of blocks that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """The number of blocks that somebody holds."""
        return len(self.references) - len(self._free)

    def needed(self, tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-tokens // self.size)

    def take(self) -> int:
        """Return a block of one's own. IndexError when none is free."""
        block = self._free.pop()
        self.references[block] = 1
        return block

    def share(self, blocks: list[int]) -> list[int]:
        """Return the same blocks, for one holder more."""
        for block in blocks:
            self.references[block] += 1
        return list(blocks)

    def give_back(self, blocks: list[int]) -> None:
        """Count one holder less of each block, and empty the list."""
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free.append(block)
        blocks.clear()

    def cost_of_write(self, blocks: list[int], position: int) -> int:
        """Return how many free blocks it takes to write the token at `position`.

        It is 1 for a new block or the copy of a shared one, else 0.
        """
        place = position // self.size
        return int(place == len(blocks) or self.references[blocks[place]] > 1)

    def make_writable(self, blocks: list[int], position: int) -> tuple[int, int] | None:
        """Have `blocks` own the block of `position`. Return (from, to) where its content has to be copied first."""
        place = position // self.size
        if place == len(blocks):
            blocks.append(self.take())
            return None
        old = blocks[place]
        if self.references[old] == 1:
            return None
        blocks[place] = self.take()
        self.references[old] -= 1
        return old, blocks[place]
