"""The order in which a text's windows are gone through: a shuffle in two levels that nobody stores.

A shuffle of all windows would have every unit of work read all of a store. So blocks of consecutive windows are
permuted first, then dealt into groups of at most GROUP_BLOCKS; the windows of a group are permuted among themselves.
A text of no more than GROUP_BLOCKS blocks is one group, and its windows are shuffled freely. Both permutations are
computed (mtc.text.permutation), so that the order is a matter of the seed, the epoch and the text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.text.blocks import SUMS, Block, block_sums
from mtc.text.permutation import Permutation
from mtc.text.token_store import TokenStore
from mtc.text.windows import SPLITS

GROUP_BLOCKS = 256
"""Most blocks whose windows are mixed, 67 million tokens: 256 MiB of ids, which stay in a node's cache meanwhile."""


def rows_wanted_of(store: TokenStore, wanted: Mapping[str, int]) -> int:
    """How many rows of a store are needed until each split has its wanted tokens; all of them if it has fewer.

    What `mtc.text.budget.rows_wanted` says, from the sums of the blocks and one block of each split.
    """
    needed = 0
    for number, split in enumerate(SPLITS):
        if wanted[split] <= 0:
            continue
        totals = np.cumsum(store.sums[:, number, _TOKENS])
        block = int(np.searchsorted(totals, wanted[split]))
        if block == len(totals):
            return store.rows
        (read,) = store.load([block])
        before = int(totals[block - 1]) if block else 0
        inside = np.cumsum(np.where(read.heldout == bool(number), read.trainable, 0).astype(np.int64))
        reached = block * store.block_windows + int(np.searchsorted(inside, wanted[split] - before)) + 1
        needed = max(needed, reached)
    return needed


class Windows(NamedTuple):
    """Some windows in the order in which they are gone through."""

    rows: NDArray[np.int64]
    """[windows] numbers in the store."""
    lengths: NDArray[np.int32]
    """[windows] all tokens of each."""
    trainable: NDArray[np.int32]
    """[windows] those that are not special."""
    starts: NDArray[np.int64]
    """[windows] tokens of those before each."""

    def part(self, start: int, stop: int) -> Windows:
        """Windows `start` to `stop` - 1."""
        chosen = slice(start, stop)
        return Windows(self.rows[chosen], self.lengths[chosen], self.trainable[chosen], self.starts[chosen])


class Pool:
    """The windows of a split that a run uses: of some blocks, below row `end`, without the rows in `reserved`."""

    def __init__(
        self,
        store: TokenStore,
        split: str,
        end: int,
        blocks: NDArray[np.int64] | None = None,
        reserved: NDArray[np.int64] | None = None,
    ):
        self.store, self.split, self.end = store, split, end
        self.blocks = np.arange(-(-end // store.block_windows)) if blocks is None else blocks
        """Numbers of the blocks that have them, ascending."""
        self.reserved = np.empty(0, np.int64) if reserved is None else np.sort(reserved)
        self._last: tuple[tuple[int | str, ...], Windows] | None = None

    @cached_property
    def sums(self) -> NDArray[np.int64]:
        """[blocks, SUMS] of the pool's own windows."""
        size, number = self.store.block_windows, SPLITS.index(self.split)
        sums = self.store.sums[self.blocks, number].copy()
        changed = {*(self.reserved // size).tolist(), *([self.end // size] if self.end % size else [])}
        for at in np.flatnonzero(np.isin(self.blocks, sorted(changed))).tolist():
            block = int(self.blocks[at])
            (read,) = self.store.load([block])
            places = self._places(block, read)
            kept = block_sums(0, size, read.heldout[places], read.lengths[places], read.trainable[places])
            sums[at] = kept[0, number] if len(kept) else 0
        return sums

    def windows(self, blocks: NDArray[np.int64], *key: int | str) -> Windows:
        """The windows of some of the blocks, shuffled by `key`; those that were asked for last are kept."""
        if self._last is None or self._last[0] != key:
            self._last = (key, self._shuffled(blocks, key))
        return self._last[1]

    def _shuffled(self, blocks: NDArray[np.int64], key: tuple[int | str, ...]) -> Windows:
        numbers = blocks.tolist()
        loaded = zip(numbers, self.store.load(numbers), strict=True)
        chosen = [(n, block, self._places(n, block)) for n, block in loaded]
        rows = np.concatenate([n * self.store.block_windows + places for n, _, places in chosen])
        order = Permutation(len(rows), *key).all()
        lengths = np.concatenate([block.lengths[places] for _, block, places in chosen])[order]
        trainable = np.concatenate([block.trainable[places] for _, block, places in chosen])[order]
        return Windows(rows[order], lengths, trainable, np.cumsum(lengths, dtype=np.int64) - lengths)

    def _places(self, number: int, block: Block) -> NDArray[np.int64]:
        """Places in a block of the windows that are of the pool."""
        first = number * self.store.block_windows
        places = np.flatnonzero(block.heldout == (self.split == SPLITS[1]))
        places = places[first + places < self.end]
        return places[~np.isin(first + places, self.reserved)] if len(self.reserved) else places


class Shuffle:
    """A pool's windows in the order of one epoch."""

    def __init__(self, pool: Pool, seed: int, epoch: int = 0):
        self.pool, self.epoch = pool, epoch
        self.key = (seed, pool.split, epoch)
        self._order = Permutation(len(pool.blocks), *self.key, "blocks").all()
        groups = max(1, -(-len(self._order) // GROUP_BLOCKS))
        self._borders = np.arange(groups + 1) * len(self._order) // groups

    @cached_property
    def sums(self) -> NDArray[np.int64]:
        """[groups, SUMS] of the windows of each group."""
        totals = np.cumsum(
            np.concatenate([np.zeros((1, len(self.pool.sums[0])), np.int64), self.pool.sums[self._order]]), 0
        )
        return np.diff(totals[self._borders], axis=0)

    def blocks(self, group: int) -> NDArray[np.int64]:
        """Numbers of the blocks of a group."""
        return self.pool.blocks[self._order[self._borders[group] : self._borders[group + 1]]]

    def windows(self, group: int) -> Windows:
        """All windows of a group in order."""
        return self.pool.windows(self.blocks(group), *self.key, group)


_TOKENS = SUMS.index("tokens")
