"""The work of a run: which windows of the token store are trained on or held out, in which order and in which units.

A work unit is a list of windows: what one forward pass of the language model takes, one message carries and the ledger
of finished work counts. Units are computed when they are asked for, from their number: what a process holds of them is
a row for each group of blocks (mtc.text.shuffle) and the windows of one such group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mtc.config import RunConfig
from mtc.text.blocks import SUMS
from mtc.text.budget import tokens_wanted
from mtc.text.shuffle import Pool, Shuffle, rows_wanted_of
from mtc.text.sources import DataError
from mtc.text.token_store import TokenStore

SCHEME = 2
"""Number of the way in which units follow from seed and text; raised with every change of it."""
WINDOWS, POSITIONS, TOKENS = (SUMS.index(name) for name in ("windows", "positions", "tokens"))


def token_batches(lengths: Sequence[int] | NDArray[np.int64], max_tokens: int) -> list[range]:
    """Numbers of rows with so many tokens each, in order, cut into batches of at most `max_tokens`, or of one row that
    has more."""
    ends = np.cumsum(lengths)
    borders = [0]
    while borders[-1] < len(ends):
        start = borders[-1]
        before = int(ends[start - 1]) if start else 0
        borders.append(max(start + 1, int(np.searchsorted(ends, before + max_tokens, side="right"))))
    return [range(start, end) for start, end in pairwise(borders)]


class Segment(NamedTuple):
    """Consecutive windows of one group, which are cut into units by themselves."""

    shuffle: Shuffle
    """Order of the epoch."""
    group: int
    """Number of the group in it."""
    start: int
    """Number of the first window in the group."""
    stop: int
    """Number of the window behind the last."""
    units: int
    """Units that they make."""
    by_length: bool
    """Whether units have equal shares of the windows' positions; else equal numbers of windows."""

    def unit(self, number: int) -> NDArray[np.int64]:
        """Row numbers of the windows of a unit, in order."""
        count = self.stop - self.start
        windows = self.shuffle.windows(self.group).part(self.start, self.stop)
        if not self.by_length:
            return windows.rows[number * count // self.units : (number + 1) * count // self.units]
        starts = windows.starts
        first, total = int(starts[0]), int(starts[-1] - starts[0] + windows.lengths[-1])
        # A window belongs to the unit in whose share it begins.
        borders = [first - (-n * total // self.units) for n in (number, number + 1)]
        first, stop = np.searchsorted(starts, borders)
        return windows.rows[first:stop]


def segment(shuffle: Shuffle, group: int, start: int, stop: int, positions: int, config: RunConfig) -> Segment:
    """The Segment of some windows that have `positions` tokens in all.

    As many windows as always fit make a unit; where windows are short on the whole, equal shares of the positions make
    fewer units, each with room for one window more than its share.
    """
    count, unit, longest = stop - start, config.data.unit_tokens, config.data.context_length
    by_count = -(-count // max(1, unit // longest))
    by_length = -(-positions // max(1, unit - longest + 1))
    # Of shares that are no shorter than a window none is empty.
    if by_length < by_count and by_length * longest <= positions:
        return Segment(shuffle, group, start, stop, by_length, True)
    return Segment(shuffle, group, start, stop, by_count, False)


class Units(Sequence[NDArray[np.int64]]):
    """Work units by number, each an int64 array of window ids with at most `data.unit_tokens` positions, or of one
    window that has more."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments = [each for each in segments if each.units]
        self._ends = np.cumsum([each.units for each in self.segments], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, number: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, number: slice) -> list[NDArray[np.int64]]: ...
    def __getitem__(self, number: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"unit {number} of {len(self)}")
        number %= len(self)
        at = int(np.searchsorted(self._ends, number, side="right"))
        own = self.segments[at]
        return own.unit(number - int(self._ends[at]) + own.units)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[n] for n in range(len(self)))


class Work(NamedTuple):
    """The training run as work units, numbered through, those for calibration after those for training."""

    training: Units
    """Work units that are trained on, each token of them `data.replays` times."""
    calibration: Units
    """Work units that set the threshold; no epoch trains on them."""

    def unit(self, number: int) -> NDArray[np.int64]:
        """Window ids of a unit of either kind."""
        split = len(self.training)
        return self.training[number] if number < split else self.calibration[number - split]

    def digest(self, store: TokenStore) -> str:
        """A hexadecimal digest, the same as long as the units hold the same windows of the same text.

        Of each block it has the sums of the windows that are used, and where every segment begins and ends: no window
        is looked at.
        """
        found = hashlib.sha256(json.dumps([SCHEME, store.info.fingerprint, store.block_windows]).encode())
        for units in self:
            for each in units.segments:
                about = (each.shuffle.key, each.group, each.start, each.stop, each.units, each.by_length)
                found.update(json.dumps(about).encode())
            # Sums tell a text that has changed behind the same name.
            for pool in {id(each.shuffle.pool): each.shuffle.pool for each in units.segments}.values():
                found.update(pool.blocks.astype("<i8").tobytes())
                found.update(pool.sums.astype("<i8").tobytes())
        return found.hexdigest()


def work_units(store: TokenStore, config: RunConfig) -> Work:
    """The windows to train on, from one shuffle of the text per epoch, and fresh ones for calibration.

    The training units, each token `data.replays` times, hold a batch for each of `total_steps` steps, and less than a
    window more of each time. The order depends on `data.seed` and the text alone. Only the part of the text that this
    configuration wants is used, so that a run does not change when a larger store is found in the cache.

    Raises DataError if the text is too short.
    """
    data, calibration = config.data, config.fresh_tokens
    wanted = -(-config.total_steps * config.optimizer.batch_tokens // data.replays)
    least = -(-wanted // data.max_epochs)
    whole = Shuffle(Pool(store, "train", rows_wanted_of(store, tokens_wanted(config))), data.seed)
    total = int(whole.sums[:, TOKENS].sum())
    border = _until(whole, total - calibration)  # what is behind it has the calibration
    if border is None or border.tokens < least:
        trained = border.tokens if border else 0
        calibrating = f" and transcoder.calibration_tokens={calibration}" if calibration else ""
        repeats = f"raise data.max_epochs to {-(-data.num_tokens // trained)}, " if trained else ""
        raise DataError(
            f"data.num_tokens={data.num_tokens}{calibrating} with "
            f"data.max_epochs={data.max_epochs} need {least + calibration} tokens of training text, but {store.url} "
            f"has {total} in {whole.sums[:, WINDOWS].sum()} windows: "
            f"lower data.num_tokens, {repeats}or give a longer text in data.name"
        )
    segments: list[Segment] = []
    left, epoch = wanted, 0
    order, behind = whole, border
    pool = None
    while left > 0:
        if epoch:
            pool = pool or _without(whole, border)
            order = Shuffle(pool, data.seed, epoch)
            behind = _Border(len(order.sums), 0, int(order.sums[:, TOKENS].sum()))
        part = _least(order, left) if left < behind.tokens else behind
        segments += _segments(order, _Border(0, 0, 0), part, config)
        left -= part.tokens
        epoch += 1
    end = _Border(len(whole.sums), 0, total)
    return Work(Units(segments), Units(list(_segments(whole, border, end, config))))


def heldout_units(store: TokenStore, config: RunConfig, num_tokens: int) -> list[NDArray[np.int64]]:
    """Work units of the first held-out windows, in seeded order, that hold `num_tokens` trainable tokens.

    All held-out windows if they hold fewer. Raises DataError if there are none.
    """
    order = Shuffle(Pool(store, "heldout", rows_wanted_of(store, tokens_wanted(config))), config.data.seed)
    if not order.sums[:, WINDOWS].sum():
        raise DataError(
            f"{store.url} has no held-out windows among {store.info.documents['train']} documents: "
            f"raise data.heldout_fraction={config.data.heldout_fraction}, or give more documents in "
            "data.name (a .txt file is one, a line of JSONL is one)"
        )
    units: list[NDArray[np.int64]] = []
    for group in range(len(order.sums)):
        if num_tokens <= 0:
            break
        windows = order.windows(group)
        totals = np.cumsum(windows.trainable, dtype=np.int64)
        windows = windows.part(0, int(np.searchsorted(totals, num_tokens)) + 1)
        num_tokens -= int(windows.trainable.sum())
        batches = token_batches(windows.lengths.astype(np.int64), config.data.unit_tokens)
        units += [windows.rows[rows.start : rows.stop] for rows in batches]
    return units


class _Border(NamedTuple):
    """A place between two windows of an order."""

    group: int
    """Group that it lies in; the number of groups for the end."""
    window: int
    """Windows of the group before it."""
    tokens: int
    """Trainable tokens of all windows before it."""


def _until(order: Shuffle, tokens: int) -> _Border | None:
    """The last border with at most so many trainable tokens before it; None for less than none."""
    if tokens < 0:
        return None
    ends = np.cumsum(order.sums[:, TOKENS])
    group = int(np.searchsorted(ends, tokens, side="right"))
    before = int(ends[group - 1]) if group else 0
    if group == len(ends) or tokens == before:
        return _Border(group, 0, before)
    inside = np.cumsum(order.windows(group).trainable, dtype=np.int64)
    window = int(np.searchsorted(inside, tokens - before, side="right"))
    return _Border(group, window, before + (int(inside[window - 1]) if window else 0))


def _least(order: Shuffle, tokens: int) -> _Border:
    """The first border with as many trainable tokens before it, which the order has."""
    ends = np.cumsum(order.sums[:, TOKENS])
    group = int(np.searchsorted(ends, tokens))
    before = int(ends[group - 1]) if group else 0
    inside = np.cumsum(order.windows(group).trainable, dtype=np.int64)
    window = int(np.searchsorted(inside, tokens - before)) + 1
    return _Border(group, window, before + int(inside[window - 1]))


def _segments(order: Shuffle, start: _Border, stop: _Border, config: RunConfig) -> Iterator[Segment]:
    """The windows between two borders."""
    last = stop.group + (stop.window > 0)
    for group in range(start.group, last):
        count, positions = (int(order.sums[group, of]) for of in (WINDOWS, POSITIONS))
        first, end = start.window if group == start.group else 0, stop.window if group == stop.group else count
        if (first, end) != (0, count):
            positions = int(order.windows(group).lengths[first:end].sum())
        yield segment(order, group, first, end, positions, config)


def _without(order: Shuffle, border: _Border) -> Pool:
    """The pool of an order's windows before a border."""
    whole = order.pool
    groups = range(border.group + (border.window > 0))
    blocks = np.sort(np.concatenate([order.blocks(group) for group in groups]))
    reserved = order.windows(border.group).rows[border.window :] if border.window else None
    return Pool(whole.store, whole.split, whole.end, blocks, reserved)
