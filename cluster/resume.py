"""Where a run's data is: the part of a checkpoint that says which tokens are trained, and how training goes on there.

Of a work unit the ledger knows how many tokens are trained; of each trainer's shuffle buffer the position knows how far
its present chunk is used up. Without torch where only the stream is planned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from mtc.config import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from cluster.batches import Batches
    from mtc.checkpoints import Checkpoint
    from mtc.ledger import Ledger, Progress
    from mtc.shuffle import ShuffleBuffer


class Position(NamedTuple):
    """Where one rank's shuffle buffer is; JSON in a checkpoint."""

    generation: int
    """How often the number of trainers changed before."""
    chunk: int
    """The chunk that rows leave at present."""
    units: list[int]
    """Its units."""
    taken: int
    """Rows that left it."""
    size: int
    """Rows that it has."""
    left: dict[int, list[int]]
    """The rows of these units that have not left."""
    filters: dict[int, list[int]]
    """Of units that other numbers of trainers left in part, the rows to be trained; the same on all ranks."""


class DataState(NamedTuple):
    """Where one rank's data is."""

    buffer: ShuffleBuffer
    """Empty; it continues within a chunk."""
    ledger: Ledger
    """What is trained; rank 0's holds the earlier starts' too."""
    filters: dict[int, np.ndarray]
    """Of units that other numbers of trainers left in part, the rows to be trained."""
    generation: int
    """How often the number of trainers changed before."""
    run_again: int
    """Tokens of all ranks' begun chunks that are trained already: the stream has them again, training has not."""


def data_state(config: RunConfig, checkpoint: Checkpoint | None, rank: int, world: int, device: Any) -> DataState:
    """What a rank starts with.

    As many trainers as before go on within their chunks; other numbers of trainers share what is left of those.
    """
    import numpy as np

    from mtc.ledger import Ledger, rows_left
    from mtc.shuffle import ShuffleBuffer

    generation, filters, run_again = 0, {}, 0
    ledger, position = Ledger(), None
    if checkpoint is not None:
        positions = [read_position(checkpoint, r) for r in range(checkpoint.manifest.world_size)]
        progress = read_progress(checkpoint)
        run_again = sum(position.taken for position in positions)
        generation = positions[0].generation
        filters = {unit: np.array(rows, np.int32) for unit, rows in positions[0].filters.items()}
        ledger = Ledger(progress if rank == 0 else None)
        if world == len(positions):
            position = positions[rank]
        else:
            generation += 1
            left = [{unit: np.array(rows, np.int32) for unit, rows in p.left.items()} for p in positions]
            finished = set(progress.finished().tolist())
            filters = {unit: rows for unit, rows in rows_left(filters, left).items() if unit not in finished}
    seed = (config.data.seed, generation, world, rank)
    buffer = ShuffleBuffer(config.data.shuffle_buffer_tokens // world, seed, device)
    if position is not None:
        buffer.restore(position.chunk, position.units, position.taken, position.size)
    return DataState(buffer, ledger, filters, generation, run_again)


def position_files(batches: Batches, generation: int, rank: int) -> dict[str, Callable[[], bytes]]:
    """One rank's position and ledger as files of a checkpoint: a snapshot of now, turned into bytes when written."""
    from mtc.ledger import to_parquet

    chunk, units, taken, size = batches.buffer.position()
    left = {unit: rows.tolist() for unit, rows in batches.buffer.left().items()}
    filters = {unit: rows.tolist() for unit, rows in batches.filters.items()} if rank == 0 else {}
    position = Position(generation, chunk, units, taken, size, left, filters)
    table = batches.ledger.table()
    return {
        f"position-{rank}.json": lambda: json.dumps(position._asdict()).encode(),
        f"units-{rank}.parquet": lambda: to_parquet(table),
    }


def read_progress(checkpoint: Checkpoint) -> Progress:
    """What is trained, from all ranks' counts."""
    from mtc.ledger import from_parquet, merge

    tables: Iterable[Any] = (
        from_parquet(checkpoint.read(f"units-{rank}.parquet")) for rank in range(checkpoint.manifest.world_size)
    )
    return merge(tables)


def unneeded_units(checkpoint: Checkpoint, world: int) -> set[int]:
    """Units that need not be streamed again to `world` trainers: finished, and not of a chunk that is begun.

    A chunk goes on in the order that it began in, for which all of its units must be there.
    """
    finished = set(read_progress(checkpoint).finished().tolist())
    if world == checkpoint.manifest.world_size:
        for rank in range(world):
            finished -= set(read_position(checkpoint, rank).units)
    return finished


def read_position(checkpoint: Checkpoint, rank: int) -> Position:
    raw = json.loads(checkpoint.read(f"position-{rank}.json"))
    for name in ("left", "filters"):
        raw[name] = {int(unit): rows for unit, rows in raw[name].items()}
    return Position(**raw)
