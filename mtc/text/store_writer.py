"""Writes a token store: shards of windows, then the sums of its blocks, then store.json, with which it opens."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.storage import RunDirectory, absolute, patiently, write_atomic
from mtc.text.blocks import SUMS, block_windows, table_sums
from mtc.text.sources import EXAMPLES, Unread, count_reasons
from mtc.text.token_store import FORMAT_VERSION, STORE_FILE, SUMS_FILE, ShardInfo, StoreInfo
from mtc.text.tokens import special_ids
from mtc.text.windows import SPLITS

SHARD_BLOCKS = 16
"""Blocks in a file of a store: fewer files than blocks, each written at once."""


class TokenStoreWriter:
    """Writes a store; used as a context manager, it removes what it wrote if the block fails before `finish`.

    Until then the directory has no store.json, so no reader opens it; afterwards another job may use it already.
    """

    def __init__(
        self,
        url: str,
        fingerprint: str,
        settings: dict[str, Any],
        tokenizer: Any,
        context_length: int,
        windows_per_shard: int | None = None,
    ):
        self.url = absolute(url)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.windows = dict.fromkeys(SPLITS, 0)
        self._fingerprint = fingerprint
        self._settings = settings
        self._special = special_ids(tokenizer)
        self._context_length = context_length
        self._block_windows = block_windows(context_length)
        self._windows_per_shard = windows_per_shard or SHARD_BLOCKS * self._block_windows
        self._documents: dict[str, list[NDArray[np.uint64]]] = {split: [] for split in SPLITS}
        self._sums: list[tuple[int, NDArray[np.int64]]] = []
        self._shards: list[ShardInfo] = []
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def write(self, table: pa.Table) -> None:
        """Append windows, a table of SCHEMA."""
        splits = table["split"].to_numpy()
        trainable = table["trainable"].to_numpy()
        documents = np.frombuffer(bytes.fromhex("".join(table["document_id"].to_pylist())), ">u8")
        for split in SPLITS:
            chosen = splits == split
            self.windows[split] += int(chosen.sum())
            self.tokens[split] += int(trainable[chosen].sum())
            self._documents[split].append(np.unique(documents[chosen]).astype(np.uint64))
        self._pending.append(table)
        self._pending_rows += table.num_rows
        while self._pending_rows >= self._windows_per_shard:
            self._write_shard(self._windows_per_shard)

    def finish(
        self,
        exhausted: bool,
        skipped: Mapping[str, int] | None = None,
        skipped_examples: Sequence[str] = (),
        unread: Sequence[Unread] = (),
    ) -> StoreInfo:
        """Write the last shard and store.json; from here on the store opens. The arguments are StoreInfo's, `unread` is
        every entry that is counted there."""
        if self._pending_rows:
            self._write_shard(self._pending_rows)
        info = StoreInfo(
            format_version=FORMAT_VERSION,
            fingerprint=self._fingerprint,
            settings=self._settings,
            special_ids=self._special,
            context_length=self._context_length,
            windows=self.windows,
            tokens=self.tokens,
            documents={split: _count(found) for split, found in self._documents.items()},
            shards=self._shards,
            exhausted=exhausted,
            skipped=dict(skipped or {}),
            skipped_examples=list(skipped_examples),
            unread=count_reasons(unread),
            unread_examples=[str(entry) for entry in unread[:EXAMPLES]],
        )
        rows = sum(self.windows.values())
        sums = np.zeros((-(-rows // self._block_windows), len(SPLITS), len(SUMS)), np.int64)
        for block, part in self._sums:
            sums[block : block + len(part)] += part
        buffer, content = io.BytesIO(), info.model_dump_json(indent=1).encode()
        np.save(buffer, sums)
        for name, data in ((SUMS_FILE, buffer.getvalue()), (STORE_FILE, content)):
            patiently(partial(write_atomic, posixpath.join(self.url, name), data))
        return info

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = RunDirectory(self.url)
        if error is not None and place.exists() and not place.exists(STORE_FILE):
            place.remove()

    def _write_shard(self, rows: int) -> None:
        pending = pa.concat_tables(self._pending)
        table = pending.slice(0, rows)
        self._pending, self._pending_rows = [pending.slice(rows)], pending.num_rows - rows
        first = sum(shard.rows for shard in self._shards)
        self._sums.append((first // self._block_windows, table_sums(first, self._block_windows, table)))
        table = table.add_column(0, "window_id", pa.array(np.arange(first, first + rows)))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=self._block_windows)
        shard = ShardInfo(name=f"tokens-{len(self._shards):05d}.parquet", rows=rows, bytes=buffer.tell())
        patiently(lambda: write_atomic(posixpath.join(self.url, shard.name), buffer.getvalue()))
        self._shards.append(shard)


def _count(parts: list[NDArray[np.uint64]], share: int = 2**60) -> int:
    """How many numbers there are, each counted once; `share` of their range at a time, so that no second copy of all
    is made."""
    ranges = range(0, 2**64, share)
    return sum(
        len(np.unique(np.concatenate([p[(p >= a) & (p <= a + share - 1)] for p in parts]))) for a in ranges if parts
    )
