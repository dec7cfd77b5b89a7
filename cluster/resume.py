"""Where a run's data is: the part of a checkpoint that says which tokens are trained, and how training goes on there.

Of a work unit the ledger knows how many tokens are trained; of each trainer's shuffle buffer the position knows how far
its present chunk is used up. Without torch where only the stream is planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.storage import Checkpoint, Progress, merge_progress, progress_from_parquet


class Position(NamedTuple):
    """Where one rank's shuffle buffer is; JSON in a checkpoint."""

    generation: int
    """How often the number of trainers changed before this start."""
    chunk: int
    """Number of the chunk that rows leave at present."""
    units: list[int]
    """Numbers of the units in the present chunk's blocks, as far as rows of these have left the buffer."""
    taken: int
    """Rows that left the present chunk."""
    size: int
    """Rows that `units` have in all."""
    left: dict[int, list[int]]
    """Rows of `units` that have not left the buffer for the last time, by unit, each as often as it is to leave yet."""
    filters: dict[int, list[int]]
    """Rows to be trained of units that other numbers of trainers left in part, by unit, each as often as it is left;
    the same on all ranks."""


def read_progress(checkpoint: Checkpoint) -> Progress:
    """What is trained by a checkpoint, from all ranks' counts."""
    tables: Iterable[Any] = (
        progress_from_parquet(checkpoint.read(f"units-{rank}.parquet"))
        for rank in range(checkpoint.manifest.world_size)
    )
    return merge_progress(tables)


def unneeded_units(checkpoint: Checkpoint, world: int) -> NDArray[np.int64]:
    """Numbers of the units that need not be streamed again to `world` trainers: finished, and in no block that a
    trainer still needs.

    A chunk goes on in the order that it began in, for which all units of its blocks must be there.
    """
    finished = read_progress(checkpoint).finished()
    if world == checkpoint.manifest.world_size:
        for rank in range(world):
            finished = np.setdiff1d(finished, read_position(checkpoint, rank).units)
    return finished


def read_position(checkpoint: Checkpoint, rank: int) -> Position:
    raw = json.loads(checkpoint.read(f"position-{rank}.json"))
    for name in ("left", "filters"):
        raw[name] = {int(unit): rows for unit, rows in raw[name].items()}
    return Position(**raw)
