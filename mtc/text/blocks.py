"""Blocks: a token store's windows in runs of consecutive rows, which are read, kept on a node's disk and shuffled
together.

A block is what one range read brings. Where its borders lie follows from the window size alone, so that stores of the
same text have the same blocks, whatever their files. What the order of work needs to know of all blocks at once are a
few sums for each, `block_sums`, which are made when the store is.
"""

from __future__ import annotations

import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtc.text.windows import SPLITS

BLOCK_POSITIONS = 2**18
"""Most tokens of a block, 1 MiB of ids: large enough for a request to an object store."""
SUMS = ("windows", "positions", "tokens", "order")
"""What is summed of a block's windows by split: their number, their length, their trainable tokens, and the last two
times the window's place in the block, which tells two texts apart that have the same windows in another order."""

IN_WORK_SECONDS = 600.0
"""Time after which a file that is not whole yet is taken for one of a process that was killed."""
ABANDONED_SECONDS = 86_400.0
"""Time after which a node's files that nobody used are taken for those of one that is gone."""


def block_windows(context_length: int) -> int:
    """Windows in a block."""
    return max(1, BLOCK_POSITIONS // context_length)


class Block(NamedTuple):
    """Consecutive windows of a store, as views of a file that all processes of a node share."""

    documents: NDArray[np.bytes_]
    """[windows] S16, id of each one's document."""
    lengths: NDArray[np.int32]
    """[windows] all tokens of each."""
    trainable: NDArray[np.int32]
    """[windows] those that are not special."""
    ids: NDArray[np.int32]
    """Token ids of all windows, one after another."""
    heldout: NDArray[np.bool_]
    """[windows] whether it is of the split "heldout"."""
    starts: NDArray[np.int64]
    """[windows + 1] where each window begins in `ids`."""

    def slice(self, first: int, end: int) -> Block:
        """Windows `first` to `end` - 1, as many as there are."""
        starts = self.starts[first : end + 1]
        return Block(
            self.documents[first:end],
            self.lengths[first:end],
            self.trainable[first:end],
            self.ids[starts[0] : starts[-1]],
            self.heldout[first:end],
            starts - starts[0],
        )


def block_sums(
    first_row: int, size: int, heldout: NDArray[np.bool_], lengths: NDArray[np.int32], trainable: NDArray[np.int32]
) -> NDArray[np.int64]:
    """[blocks, splits, SUMS] of consecutive windows from row `first_row` on, for each block of `size` rows that they
    touch."""
    rows = first_row + np.arange(len(lengths))
    blocks, places = rows // size - first_row // size, rows % size
    sums = np.zeros((blocks[-1] + 1 if len(rows) else 0, len(SPLITS), len(SUMS)), np.int64)
    columns = (np.ones_like(lengths), lengths, trainable, (places + 1) * (lengths.astype(np.int64) + trainable))
    for i, column in enumerate(columns):
        np.add.at(sums[:, :, i], (blocks, heldout.astype(np.int64)), column)
    return sums


def table_sums(first_row: int, size: int, table: pa.Table) -> NDArray[np.int64]:
    """`block_sums` of a table with the columns split, length and trainable."""
    heldout = pc.equal(table["split"], SPLITS[1]).to_numpy()
    return block_sums(first_row, size, heldout, table["length"].to_numpy(), table["trainable"].to_numpy())


def block_of_table(table: pa.Table) -> Block:
    """The windows of a table of mtc.text.windows.SCHEMA."""
    lengths = table["length"].to_numpy().astype(np.int32)
    return Block(
        table["document_id"].to_numpy().astype("S16"),
        lengths,
        table["trainable"].to_numpy().astype(np.int32),
        table["input_ids"].combine_chunks().flatten().to_numpy().astype(np.int32),
        pc.equal(table["split"], SPLITS[1]).to_numpy(),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    )


def write_block(path: Path, block: Block) -> None:
    """Write a block's file as a whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(np.array([len(block.lengths), len(block.ids)], "<i8").tobytes())
        for column in block[:5]:
            file.write(np.ascontiguousarray(column).data)
    os.replace(file.name, path)


def open_block(path: Path) -> Block | None:
    """A block's file, mapped, and marked as used just now; None if it is not there or not whole."""
    try:
        os.utime(path)
        raw = np.memmap(path, np.uint8, mode="r")
    except (FileNotFoundError, ValueError):  # the latter of an empty file
        return None
    windows, tokens = (int(n) for n in raw[:16].view("<i8")) if len(raw) >= 16 else (0, 0)
    ends = np.cumsum([16, 16 * windows, 4 * windows, 4 * windows, 4 * tokens, windows]).tolist()
    if len(raw) != ends[-1]:
        return None  # a machine that lost power may leave such
    parts: list[NDArray[Any]] = [raw[a:b] for a, b in pairwise(ends)]
    documents, lengths, trainable, ids, heldout = parts
    lengths = lengths.view(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Block(
        documents.view("S16"), lengths, trainable.view(np.int32), ids.view(np.int32), heldout.view(np.bool_), starts
    )


def evict(directory: Path, node: str, most: int) -> None:
    """Remove the files of a node, `<directory>/<node>/<store>/<file>`, that were not used for longest, until they have
    at most `most` bytes; of other nodes, whose directory it may be too, and of what else is there, files that nobody
    used for ABANDONED_SECONDS.

    Who has mapped one keeps it, on the same node only: a network file system takes it from the others.
    """
    found, now = [], time.time()
    for path in (path for path in directory.rglob("*") if path.is_file()):
        try:
            about = path.stat()
        except FileNotFoundError:
            continue  # another process removed it
        in_work = path.name.startswith(".") and now - about.st_mtime < IN_WORK_SECONDS
        if in_work or path.suffix == ".lock":
            continue
        if path.relative_to(directory).parts[0] == node:
            found.append((about.st_mtime_ns, about.st_size, path))
        elif now - about.st_mtime > ABANDONED_SECONDS:
            path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        path.unlink(missing_ok=True)
        total -= size
