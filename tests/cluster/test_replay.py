"""Tokens that are trained several times, through kills at any moment and starts with other numbers of trainers."""

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.batches import Batches
from cluster.blocks import ActorCosts
from cluster.data_state import data_state
from cluster.outcome import TrainingStopped, check_ledger
from cluster.resume import read_progress, unneeded_units
from cluster.stream import deal
from cluster.train_worker import files_of
from mtc.config import load_preset
from mtc.storage import Checkpoints, CheckpointWriter, progress_from_parquet, progress_to_parquet
from mtc.training import Clock, Unit

BATCH = 16


def make_units(dice, count):
    units = []
    for number in range(count):
        tokens = dice.randint(1, 40)
        dropped = np.arange(tokens if number == count // 2 else dice.choice([0, 0, 0, 2]), dtype=np.int32)[:tokens]
        rows = np.arange(len(dropped), tokens, dtype=np.int32)
        column = torch.from_numpy(number * 1000.0 + rows).unsqueeze(1)
        costs = dict.fromkeys((*ActorCosts.FIELDS, "device_flops"), 1.0)
        units.append(Unit(number, {(0, "resid_mid"): column, (0, "mlp_out"): -column}, rows, tokens, dropped, costs))
    return units


def start(url, config, units, world, dice):
    """Trainers that take turns until they die at random or, without dice, until the end. Each then leaves its part of a
    checkpoint, and trains on for a moment in vain. Returns the rows of what the checkpoint keeps, by trainer."""
    checkpoints = Checkpoints(url)
    checkpoint = checkpoints.latest()
    unneeded = unneeded_units(checkpoint, world) if checkpoint else set()
    left = deal(np.array([unit.number for unit in units if unit.number not in unneeded], np.int64), world)
    kept, files = [], []
    for rank in range(world):
        state = data_state(config, checkpoint, rank, world, "cpu")
        mine = (units[number] for number in left[rank::world] if number >= 0)
        batches = Batches(mine, state.buffer, BATCH, state.ledger, Clock(), len(units), state.filters)
        rows, steps = [], dice.randrange(40) if dice else -1
        while len(rows) != steps and (share := batches.agree(last=False)) is not None:
            rows.append(batches.take(share)[0, "resid_mid"].flatten().int().tolist())
        if dice:
            batches.agree(last=False)  # the buffer fills before a checkpoint
        files.append({name: make() for name, make in files_of({}, batches, state.generation, rank).items()})
        if dice and (share := batches.agree(last=False)) is not None:
            batches.take(share)
        kept.append(rows)
    number = dice.getrandbits(31) if dice else 0
    step = checkpoint.manifest.step + 1 if checkpoint else 1
    for rank in reversed(range(world)):  # rank 0 waits for the others' parts
        writer = CheckpointWriter(checkpoints, number, rank, world, 2, lambda *news: None)
        writer.save(step, {name: lambda data=data: data for name, data in files[rank].items()}).result()
        writer.close()
    return kept


@pytest.mark.parametrize("replays", [1, 2, 3, 4])
def test_every_token_is_trained_as_often_whatever_dies_and_however_many_go_on(tmp_path, replays):
    for seed, worlds in enumerate([(1, 1, 1, 1), (2, 2, 2), (1, 2, 1, 3), (3, 2, 2, 1), (2, 1, 2, 2)]):
        dice = random.Random(seed)
        data = {"shuffle_buffer_tokens": dice.choice([1, 150, 400]), "replays": replays}
        config = load_preset("tiny", {"data": data, "optimizer": {"batch_tokens": BATCH}})
        units = make_units(dice, 30)
        url = str(tmp_path / str(seed))
        kept = [
            start(url, config, units, world, dice if n < len(worlds) - 1 else None) for n, world in enumerate(worlds)
        ]
        found = Counter(row for ranks in kept for rank in ranks for step in rank for row in step)
        assert found == Counter({u.number * 1000 + int(row): replays for u in units for row in u.rows})
        progress = read_progress(Checkpoints(url).latest())
        check_ledger(progress, len(units))
        assert progress.repeated_tokens() == 0
        assert progress.captured_tokens() * replays == progress.trained_tokens() == found.total()
        if len(set(worlds)) == 1:
            whole = start(url + "-whole", config, units, worlds[0], None)
            for rank, rows in enumerate(whole):
                assert [step for ranks in kept for step in ranks[rank]] == rows


def test_a_token_that_is_trained_too_seldom_or_too_often_is_found(tmp_path):
    config = load_preset("tiny", {"data": {"replays": 3}, "optimizer": {"batch_tokens": BATCH}})
    units = make_units(random.Random(0), 4)
    start(str(tmp_path), config, units, 1, None)
    progress = read_progress(Checkpoints(str(tmp_path)).latest())
    check_ledger(progress, 4)
    for change, message in ((-1, "1 are not finished"), (1, "1 have tokens too often")):
        table = progress.table.to_pydict()
        table["trained"][0] += change
        with pytest.raises(TrainingStopped, match=message):
            check_ledger(type(progress)(progress.table.from_pydict(table, schema=progress.table.schema)), 4)
    table = progress.table.to_pydict()
    table["trained_sum"][0] += 1  # one instead of another
    with pytest.raises(TrainingStopped, match="1 have tokens too often"):
        check_ledger(type(progress)(progress.table.from_pydict(table, schema=progress.table.schema)), 4)
    old = progress.table.drop_columns(["replays"])  # of before tokens could be trained more than once
    assert progress_from_parquet(progress_to_parquet(old))["replays"].to_pylist() == [1] * 4
    assert type(progress)(old).repeated_tokens() == 2 * progress.captured_tokens()


def test_checkpoints_of_before_tokens_were_repeated_are_continued(tmp_path):
    """Positions and ledgers as they were written then, within a chunk and with rows of another number of trainers."""
    config = load_preset("tiny", {"data": {"shuffle_buffer_tokens": 100}, "optimizer": {"batch_tokens": BATCH}})
    # 3 units of 25 tokens; units 0 and 1 are the first chunk, 16 of whose 50 rows have left.
    units = [
        Unit(n, {(0, s): torch.from_numpy(n * 1000.0 + np.arange(25)).unsqueeze(1) for s in ("resid_mid", "mlp_out")},
             np.arange(25, dtype=np.int32), 25, costs=dict.fromkeys((*ActorCosts.FIELDS, "device_flops"), 1.0))
        for n in range(3)
    ]  # fmt: skip
    order = np.random.default_rng([0, 0, 1, 0, 0]).permutation(50)
    gone, rest = order[:BATCH], np.sort(order[BATCH:])
    left = {str(n): [int(r) - 25 * n for r in rest if r // 25 == n] for n in (0, 1)}
    position = {"generation": 0, "chunk": 0, "units": [0, 1], "taken": BATCH, "size": 50, "left": left, "filters": {}}
    rows = [gone[gone // 25 == n] - 25 * n for n in (0, 1)]
    columns = {"unit": [0, 1], "tokens": [25, 25], "dropped": [0, 0], "dropped_sum": [0, 0]}
    columns |= {"trained": [len(r) for r in rows], "trained_sum": [int(r.sum()) for r in rows]}
    table = pa.Table.from_pydict(columns)
    files = {"position-0.json": json.dumps(position).encode(), "units-0.parquet": progress_to_parquet(table)}
    writer = CheckpointWriter(Checkpoints(str(tmp_path)), 1, 0, 1, 2, lambda *news: None)
    writer.save(1, {name: lambda data=data: data for name, data in files.items()}).result()
    writer.close()
    (found,) = start(str(tmp_path), config, units, 1, None)
    flat = [row for step in found for row in step]
    assert flat[:34] == [int(r) // 25 * 1000 + int(r) % 25 for r in order[BATCH:]]
    assert sorted(flat[34:]) == [2000 + n for n in range(25)]
    check_ledger(read_progress(Checkpoints(str(tmp_path)).latest()), 3)


def test_the_last_step_is_less_than_two_batches_however_much_units_hold_beyond_the_steps():
    config = load_preset("tiny", {"data": {"replays": 8, "shuffle_buffer_tokens": 100}})
    units = make_units(random.Random(3), 12)
    state = data_state(config, None, 0, 1, "cpu")
    batches = Batches(iter(units), state.buffer, BATCH, state.ledger, Clock(), len(units), state.filters)
    sizes = []
    while (share := batches.agree(last=len(sizes) >= 9)) is not None:  # the run was to have 10 steps
        batches.take(share)
        sizes.append(share.rows)
    assert set(sizes[:-1]) == {BATCH} and BATCH <= sizes[-1] < 2 * BATCH and len(sizes) > 10
    assert sum(sizes) == 8 * sum(len(unit.rows) for unit in units)
