"""The ledger: which tokens of which work units are trained.

Every rank counts what it trains on. A checkpoint holds the ranks' counts; put together they say which units are
finished, which tokens of the others are left, and whether any token was trained twice or never.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

SCHEMA = pa.schema(
    {
        "unit": pa.int64(),
        "tokens": pa.int64(),  # trainable tokens of the unit
        "dropped": pa.int64(),  # of which so many have activations that are not finite,
        "dropped_sum": pa.int64(),  # the sum of their numbers in the unit;
        "trained": pa.int64(),  # so many were trained on, each time counted,
        "trained_sum": pa.int64(),  # the sum of their numbers: a token that took another's place would change it
        "replays": pa.int64(),  # so often each token is to be trained
    }
)


# A unit that was streamed again has the same tokens and lacks the same ones.
_TOGETHER = {
    "tokens": "max", "dropped": "max", "dropped_sum": "max", "trained": "sum", "trained_sum": "sum", "replays": "max",
}  # fmt: skip


class Progress(NamedTuple):
    """What is trained of each work unit, over all ranks and starts."""

    table: pa.Table
    """One row of SCHEMA for each work unit that was begun, ordered by unit."""

    def finished(self) -> NDArray[np.int64]:
        """Numbers of the work units of which nothing is left to train."""
        column = self._columns()
        return column["unit"][column["trained"] >= _wanted(column)]

    def dropped_tokens(self) -> int:
        return int(self._columns()["dropped"].sum())

    def captured_tokens(self) -> int:
        """Tokens of the units that were begun whose activations are finite, each counted once."""
        column = self._columns()
        return int((column["tokens"] - column["dropped"]).sum())

    def trained_tokens(self) -> int:
        """Tokens trained on, each time counted."""
        return int(self._columns()["trained"].sum())

    def repeated_tokens(self) -> int:
        """Tokens that were trained too often, for certain: beyond what `data.replays` makes of those that the units
        have."""
        column = self._columns()
        return int(np.maximum(column["trained"] - _wanted(column), 0).sum())

    def wrong_units(self) -> NDArray[np.int64]:
        """Numbers of the work units in which a token was trained too often, or one instead of another."""
        column = self._columns()
        tokens, wanted = column["tokens"], _wanted(column)
        numbers = tokens * (tokens - 1) // 2 - column["dropped_sum"]
        mixed = (column["trained"] == wanted) & (column["trained_sum"] != column["replays"] * numbers)
        return column["unit"][(column["trained"] > wanted) | mixed]

    def _columns(self) -> dict[str, NDArray[np.int64]]:
        table = _with_replays(self.table)
        return {name: table[name].to_numpy() for name in SCHEMA.names}


def _wanted(column: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """[units] tokens of each unit that are to be trained, repeats included."""
    return column["replays"] * (column["tokens"] - column["dropped"])


def _with_replays(table: pa.Table) -> pa.Table:
    """A table of SCHEMA, also if it was written before tokens could be trained more than once."""
    if "replays" in table.column_names:
        return table
    return table.append_column("replays", pa.array(np.ones(len(table), np.int64)))


def merge_progress(tables: Iterable[pa.Table]) -> Progress:
    """Put the counts of several ranks and starts together."""
    groups = pa.concat_tables([SCHEMA.empty_table(), *tables]).group_by("unit", use_threads=False)
    sums = groups.aggregate(list(_TOGETHER.items()))
    columns = {name: sums[f"{name}_{how}"] for name, how in _TOGETHER.items()} | {"unit": sums["unit"]}
    table = pa.table({name: columns[name] for name in SCHEMA.names}, schema=SCHEMA)
    return Progress(table.take(pc.sort_indices(table["unit"])))


class Ledger:
    """One rank's counts; rank 0 also carries those of earlier starts."""

    def __init__(self, earlier: Progress | None = None, replays: int = 1):
        self.replays = replays
        self._settled = earlier.table if earlier else SCHEMA.empty_table()
        self._open: dict[int, list[int]] = {}
        self.received_tokens = int(pc.sum(self._settled["tokens"]).as_py() or 0)
        """Tokens of the units that this rank received, and of those that it carries from earlier starts."""
        self.dropped_tokens = int(pc.sum(self._settled["dropped"]).as_py() or 0)
        """Received tokens whose activations are not finite."""

    def receive(self, unit: int, tokens: int, dropped: NDArray[np.int32]) -> None:
        """Count a unit that arrived with `tokens` trainable tokens; `dropped` are the numbers of those that are not
        finite."""
        self._open[unit] = [tokens, len(dropped), int(dropped.sum()), 0, 0, self.replays]
        self.received_tokens += tokens
        self.dropped_tokens += len(dropped)

    def train(self, units: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
        """Count the tokens of a training step: [rows] the unit of each, and its number in the unit."""
        units, owner = np.unique(units, return_inverse=True)
        counts = np.bincount(owner, minlength=len(units))
        sums = np.bincount(owner, weights=rows, minlength=len(units))
        for unit, count, total in zip(units.tolist(), counts.tolist(), sums.tolist(), strict=True):
            row = self._open[unit]
            row[3] += count
            row[4] += int(total)

    def table(self) -> pa.Table:
        """What is trained up to now, as a table of SCHEMA."""
        names = SCHEMA.names[1:]
        rows = [{"unit": unit, **dict(zip(names, row, strict=True))} for unit, row in self._open.items()]
        together = merge_progress([self._settled, pa.Table.from_pylist(rows, schema=SCHEMA)])
        finished = set(np.intersect1d(together.finished(), np.array(list(self._open), np.int64)).tolist())
        if finished:  # so that a long run does not make Python objects of all its units at each checkpoint
            done = [row for row in rows if row["unit"] in finished]
            self._settled = merge_progress([self._settled, pa.Table.from_pylist(done, schema=SCHEMA)]).table
            self._open = {unit: row for unit, row in self._open.items() if unit not in finished}
        return together.table


def progress_to_parquet(table: pa.Table) -> bytes:
    """A table of SCHEMA as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def progress_from_parquet(data: bytes) -> pa.Table:
    """The table of SCHEMA in the bytes of a Parquet file."""
    return _with_replays(pq.read_table(io.BytesIO(data)))


def rows_left(
    earlier: Mapping[int, NDArray[np.int32]], now: Iterable[Mapping[int, NDArray[np.int32]]]
) -> dict[int, NDArray[np.int32]]:
    """Rows still to be trained of each unit that is begun but not finished, each as often as it is left: the fewest
    that anybody knows of."""
    left = dict(earlier)
    for part in now:
        for unit, rows in part.items():
            left[unit] = _in_both(left[unit], rows) if unit in left else rows
    return left


def _in_both(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    """Numbers that are in both, each as often as in the one that has fewer of it."""
    most = max(a.max(initial=-1), b.max(initial=-1)) + 1
    counts = np.minimum(np.bincount(a, minlength=most), np.bincount(b, minlength=most))
    return np.repeat(np.arange(most, dtype=np.int32), counts)
