"""Work units as rows of Ray Data: a unit's activations of all sites, as bytes, and what its model actor spent.

Bytes travel through Arrow without conversion or pickling: they are copied once into shared memory, where trainers view
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mtc.config import SiteKey
from mtc.training import Unit


class ActorCosts:
    """What the units that a trainer received have cost the model actors."""

    FIELDS = ("forward", "sending", "idle", "elapsed", "positions", "flops")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.FIELDS, 0.0)
        self.device_flops = 0.0

    def add(self, unit: Unit) -> None:
        for name in self.FIELDS:
            self.sums[name] += unit.costs[name]
        self.device_flops = max(self.device_flops, unit.costs["device_flops"])


def iterate_units(shard: Any, start: str = "") -> Iterator[Unit]:
    """The units of a shard of the Dataset, their activations bfloat16 views of shared memory.

    Raises RuntimeError if the Dataset continues another checkpoint than `start`.
    """
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        if table["start"][0].as_py() != start:
            raise RuntimeError(f"the stream continues {table['start'][0].as_py() or 'nothing'}, the trainers {start}")
        tokens = table["tokens"][0].as_py()
        if not tokens:
            continue
        costs = {name: table[name][0].as_py() for name in (*ActorCosts.FIELDS, "device_flops", "actor")}
        dropped = np.array(table["dropped"][0].as_py(), np.int32)
        rows = np.delete(np.arange(tokens, dtype=np.int32), dropped)
        yield Unit(table["unit"][0].as_py(), from_columns(table), rows, tokens, dropped, costs)


def to_columns(activations: Mapping[SiteKey, torch.Tensor]) -> dict[str, pa.Array]:
    """Columns of one row: `activations_LAYER_SITE` holds [tokens, d] bfloat16 as bytes, `width_LAYER_SITE` says d."""
    columns = {}
    for (layer, site), rows in activations.items():
        columns[f"activations_{layer}_{site}"] = to_binary(rows)
        columns[f"width_{layer}_{site}"] = pa.array([rows.shape[1]], pa.int64())
    return columns


def from_columns(table: pa.Table) -> dict[SiteKey, torch.Tensor]:
    """The inverse of `to_columns` for a table of one row: views of its memory, which are not to be written."""
    activations = {}
    for name in table.column_names:
        if name.startswith("activations_"):
            _, layer, site = name.split("_", 2)
            width = table[f"width_{layer}_{site}"][0].as_py()
            activations[int(layer), site] = from_binary(table[name], width)
    return activations


def to_binary(activations: torch.Tensor) -> pa.Array:
    """[tokens, d] bfloat16 on the host -> one large_binary value that shares its memory."""
    bits = activations.contiguous().view(torch.int16).numpy()
    offsets = pa.py_buffer(np.array([0, bits.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(bits)])


def from_binary(column: pa.ChunkedArray, width: int) -> torch.Tensor:
    """The inverse of `to_binary` for a column of one value, [tokens, width]: a view of its memory, which is not to be
    written."""
    import warnings

    (chunk,) = column.chunks
    _, offsets, data = chunk.buffers()  # a scalar of the column would be a copy
    start, end = np.frombuffer(offsets, np.int64, 2, 8 * chunk.offset).tolist()
    with warnings.catch_warnings():
        # The buffer lies in read-only shared memory; it is copied into the shuffle buffer and never written.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        bits = torch.from_numpy(np.frombuffer(data, np.int16, (end - start) // 2, start))
    return bits.view(torch.bfloat16).view(-1, width)
