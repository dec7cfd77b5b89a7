"""Every captured token is trained `data.replays` times, spread out: the shuffle buffer by itself."""

import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from mtc.training import ShuffleBuffer, Unit

CAPACITY, BATCH = 1200, 16


def make_units(dice, count, largest=40):
    """Units of random sizes whose rows say what they are; of some a few tokens, of one all were not finite."""
    units = []
    for number in range(count):
        tokens = dice.randint(1, largest)
        dropped = np.arange(tokens, dtype=np.int32)[: dice.choice([0, 0, 0, 2]) if number != 3 else tokens]
        rows = np.arange(len(dropped), tokens, dtype=np.int32)
        column = torch.from_numpy(number * 1000.0 + rows).unsqueeze(1)
        units.append(Unit(number, {(0, "resid_mid"): column, (0, "mlp_out"): -column}, rows, tokens, dropped))
    return units


def every_row(units, replays):
    return Counter({unit.number * 1000 + int(row): replays for unit in units for row in unit.rows})


def drain(buffer, units, batch=BATCH, stop_after=None):
    """The batches as lists of the rows' values, filled as training fills its buffer."""
    units, taken = iter(units), []
    ended = False
    while stop_after is None or len(taken) < stop_after:
        while not ended and (buffer.available < batch or not buffer.filled):
            unit = next(units, None)
            ended = unit is None
            buffer.close() if ended else buffer.add(unit)
        part = buffer.take(min(batch, buffer.available))
        if not len(part.rows):
            break
        source, target = part.activations.values()
        assert torch.equal(source, -target)
        assert (part.units * 1000 + part.rows).tolist() == source.flatten().int().tolist()
        taken.append(source.flatten().int().tolist())
    return taken


@pytest.mark.parametrize("replays", [1, 2, 3, 4])
def test_a_buffer_goes_on_exactly_where_another_one_was_at_every_kill(replays):
    for seed in range(5):
        dice = random.Random(seed)
        units = make_units(dice, dice.choice([1, 4, 9, 20]))
        capacity = dice.choice([1, 40, 200])

        def new(seed=seed, capacity=capacity):
            return ShuffleBuffer(capacity, [seed], replays=replays)

        whole = drain(new(), units)
        assert Counter(row for batch in whole for row in batch) == every_row(units, replays)
        for steps in {0, 1, len(whole), *(dice.randrange(len(whole) + 1) for _ in range(6))}:
            first = new()
            before = drain(first, units, stop_after=steps)
            chunk, inside, taken, size = first.position()
            gone = Counter(row for batch in before for row in batch)
            for number, rows in first.left().items():
                wanted = Counter({k: n for k, n in every_row([units[number]], replays).items()}) - gone
                assert Counter(number * 1000 + int(row) for row in rows) == wanted
            finished = {u.number for u in units if not every_row([u], replays) - gone}
            begun = {row // 1000 for row in gone}
            assert begun <= finished | set(inside)
            again = new()
            again.restore(chunk, inside, taken, size)
            rest = [u for u in units if u.number in inside or u.number not in finished]
            assert before + drain(again, rest) == whole


@pytest.mark.parametrize("replays", [2, 4, 7])
def test_a_tokens_repeats_lie_far_apart_and_its_neighbours_change(replays):
    units = make_units(random.Random(replays), 400)
    buffer = ShuffleBuffer(CAPACITY, [replays], replays=replays)
    flat = np.array([row for batch in drain(buffer, units) for row in batch])
    where = {}
    for place, row in enumerate(flat.tolist()):
        where.setdefault(row, []).append(place)
    distances = np.concatenate([np.diff(places) for places in where.values()])
    block = CAPACITY // (replays + 1)
    assert distances.min() > block / 4
    assert np.median(distances) == pytest.approx(replays * block, rel=0.2)
    middle = [np.diff(p) for p in where.values() if len(flat) / 4 < p[0] and p[-1] < len(flat) * 3 / 4]
    assert np.concatenate(middle).min() > replays * block / 2
    # Two tokens of one batch seldom meet again.
    batches = flat[: len(flat) // BATCH * BATCH].reshape(-1, BATCH)
    assert all(len(set(batch.tolist())) == BATCH for batch in batches), "a token twice in a batch"
    of = {}
    for number, batch in enumerate(batches.tolist()):
        for row in batch:
            of.setdefault(row, set()).add(number)
    together = Counter(len(of[a] & of[b]) for a, b in batches[:, :2].tolist())
    assert together[1] > 0.9 * together.total()


def test_old_and_new_are_mixed_and_no_more_memory_is_taken_than_the_plan_counts(monkeypatch):
    replays, largest = 3, 40
    units = make_units(random.Random(1), 300, largest)
    alive, most, make = weakref.WeakSet(), 0, torch.empty

    def empty(shape, **how):
        nonlocal most
        alive.add(made := make(shape, **how))
        most = max(most, sum(len(tensor) for tensor in alive))
        return made

    monkeypatch.setattr("torch.empty", empty)
    batches = drain(ShuffleBuffer(CAPACITY, [0], replays=replays), units)
    block = CAPACITY // (replays + 1) + largest
    assert most <= 2 * (replays + 1) * block + block, "of two sites; the last is what a block grows by at a time"
    numbers = [[row // 1000 for row in batch] for batch in batches]
    for batch in numbers[len(numbers) // 4 : len(numbers) * 3 // 4]:
        assert max(batch) - min(batch) > CAPACITY / (replays + 1) / largest


def test_a_row_that_is_left_fewer_times_comes_so_often():
    """As after a start with another number of trainers."""
    units = make_units(random.Random(2), 12)
    wanted = every_row(units, 3)
    for number, unit in list(enumerate(units))[:5]:
        left = np.random.default_rng(number).integers(1, 4, len(unit.rows), np.int32)
        units[number] = unit._replace(left=left)
        for row, times in zip(unit.rows.tolist(), left.tolist(), strict=True):
            wanted[number * 1000 + row] = times
    whole = drain(ShuffleBuffer(100, [0], replays=3), units)
    assert Counter(row for batch in whole for row in batch) == wanted
