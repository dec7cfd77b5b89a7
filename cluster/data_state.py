"""Where one trainer's data is: what it starts with, and its part of a checkpoint.

That is which tokens of which work units are trained, and how far the shuffle buffer's present chunk is used up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cluster.batches import Batches
from cluster.resume import Position, read_position, read_progress
from mtc.config import RunConfig
from mtc.storage import Checkpoint, Ledger, progress_to_parquet, rows_left
from mtc.training import ShuffleBuffer


class DataState(NamedTuple):
    """What one rank's data begins with: buffer, ledger and what is left of units."""

    buffer: ShuffleBuffer
    """Empty shuffle buffer that continues within a chunk."""
    ledger: Ledger
    """Counts of what is trained; rank 0's holds those of earlier starts too."""
    filters: dict[int, np.ndarray]
    """Rows to be trained of units that other numbers of trainers left in part, by unit, each as often as it is left."""
    generation: int
    """How often the number of trainers changed before this start."""
    run_again: int
    """Tokens of all ranks' begun chunks that were trained before, once at least: the stream has them again."""


def data_state(config: RunConfig, checkpoint: Checkpoint | None, rank: int, world: int, device: Any) -> DataState:
    """The DataState that a rank starts with, from a checkpoint or new.

    As many trainers as before go on within their chunks; other numbers of trainers share what is left of those.
    """
    generation, filters, run_again = 0, {}, 0
    replays = config.data.replays
    ledger, position = Ledger(replays=replays), None
    if checkpoint is not None:
        positions = [read_position(checkpoint, r) for r in range(checkpoint.manifest.world_size)]
        progress = read_progress(checkpoint)
        run_again = sum(position.size - _untouched(position, replays) for position in positions)
        generation = positions[0].generation
        filters = {unit: np.array(rows, np.int32) for unit, rows in positions[0].filters.items()}
        ledger = Ledger(progress if rank == 0 else None, replays)
        if world == len(positions):
            position = positions[rank]
        else:
            generation += 1
            left = [{unit: np.array(rows, np.int32) for unit, rows in p.left.items()} for p in positions]
            still = rows_left(filters, left)
            begun = np.setdiff1d(np.array(list(still), np.int64), progress.finished())
            filters = {unit: still[unit] for unit in begun.tolist()}
    seed = (config.data.seed, generation, world, rank)
    buffer = ShuffleBuffer(config.data.shuffle_buffer_tokens // world, seed, device, replays)
    if position is not None:
        buffer.restore(position.chunk, position.units, position.taken, position.size)
    return DataState(buffer, ledger, filters, generation, run_again)


def position_files(batches: Batches, generation: int, rank: int) -> dict[str, Callable[[], bytes]]:
    """One rank's position and ledger as files of a checkpoint: a snapshot of now, turned into bytes when written."""
    chunk, units, taken, size = batches.buffer.position()
    left = {unit: rows.tolist() for unit, rows in batches.buffer.left().items()}
    filters = {unit: rows.tolist() for unit, rows in batches.filters.items()} if rank == 0 else {}
    position = Position(generation, chunk, units, taken, size, left, filters)
    table = batches.ledger.table()
    return {
        f"position-{rank}.json": lambda: json.dumps(position._asdict()).encode(),
        f"units-{rank}.parquet": lambda: progress_to_parquet(table),
    }


def _untouched(position: Position, replays: int) -> int:
    """Rows of the begun chunks' units that are still to be trained as often as all are."""
    return sum(int((np.bincount(rows) == replays).sum()) for rows in position.left.values() if rows)
