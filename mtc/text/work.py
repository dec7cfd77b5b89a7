"""The work of a run: which windows of the token store are trained on or held out, in which order and in which units.

A work unit is a list of windows: what one forward pass of the language model takes, one message carries and the ledger
of finished work counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.config import RunConfig
from mtc.text.budget import rows_wanted, tokens_wanted
from mtc.text.sources import DataError
from mtc.text.token_store import TokenStore


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


class Work(NamedTuple):
    """The training run as lists of work units, each an int64 array of the ids of as many windows as fit into
    `data.unit_tokens` positions. Units are numbered through, those for calibration after those for training."""

    training: list[NDArray[np.int64]]
    """Work units that are trained on, each token of them `data.replays` times."""
    calibration: list[NDArray[np.int64]]
    """Work units that set the threshold; no epoch trains on them."""

    def digest(self, store: TokenStore) -> str:
        """A hexadecimal digest, the same as long as the units hold the same windows of the same text."""
        found = hashlib.sha256(store.info.fingerprint.encode())
        for unit in (*self.training, *self.calibration):
            # Lengths and counts tell a text that has changed behind the same name.
            for numbers in (unit, store.positions(unit), store.trainable_tokens(unit)):
                found.update(numbers.astype("<i8").tobytes())
        return found.hexdigest()


def work_units(store: TokenStore, config: RunConfig) -> Work:
    """The windows to train on, from one permutation of the text per epoch, and fresh ones for calibration.

    The training units, each token `data.replays` times, hold a batch for each of `total_steps` steps, and less than a
    window more of each time. The order depends on `data.seed` alone. Only the part of the text that this configuration
    wants is used, so that a run does not change when a larger store is found in the cache.

    Raises DataError if the text is too short.
    """
    data, calibration = config.data, config.fresh_tokens
    wanted = -(-config.total_steps * config.optimizer.batch_tokens // data.replays)
    windows = _wanted_windows(store, config, "train")
    windows = windows[np.random.default_rng(data.seed).permutation(len(windows))]
    total = np.concatenate([[0], np.cumsum(store.trainable_tokens(windows))])  # total[n]: tokens of the first n windows
    least = -(-wanted // data.max_epochs)
    border = int(np.searchsorted(total, total[-1] - calibration, side="right")) - 1  # the rest has the calibration
    if int(np.searchsorted(total, least)) > border:
        trained = max(int(total[max(border, 0)]), 0)
        calibrating = f" and transcoder.calibration_tokens={calibration}" if calibration else ""
        repeats = f"raise data.max_epochs to {-(-data.num_tokens // trained)}, " if trained else ""
        raise DataError(
            f"data.num_tokens={data.num_tokens}{calibrating} with "
            f"data.max_epochs={data.max_epochs} need {least + calibration} tokens of training text, but {store.url} "
            f"has {total[-1]} in {len(windows)} windows: "
            f"lower data.num_tokens, {repeats}or give a longer text in data.name"
        )
    pool, reserved = np.split(windows, [border])
    units: list[NDArray[np.int64]] = []
    left, epoch = wanted, 0
    while left > 0:
        order = np.random.default_rng([data.seed, epoch]).permutation(pool) if epoch else pool
        tokens = np.cumsum(store.trainable_tokens(order))
        order = order[: int(np.searchsorted(tokens, left)) + 1]
        units += _cut(store, order, data.unit_tokens)
        left -= int(tokens[len(order) - 1])
        epoch += 1
    return Work(units, _cut(store, reserved, data.unit_tokens))


def heldout_units(store: TokenStore, config: RunConfig, num_tokens: int) -> list[NDArray[np.int64]]:
    """Work units of the first held-out windows, in seeded order, that hold `num_tokens` trainable tokens.

    All held-out windows if they hold fewer. Raises DataError if there are none.
    """
    windows = _wanted_windows(store, config, "heldout")
    if not len(windows):
        raise DataError(
            f"{store.url} has no held-out windows among {store.info.documents['train']} documents: "
            f"raise data.heldout_fraction={config.data.heldout_fraction}, or give more documents in "
            "data.name (a .txt file is one, a line of JSONL is one)"
        )
    windows = windows[np.random.default_rng(config.data.seed).permutation(len(windows))]
    before = np.cumsum(store.trainable_tokens(windows)) - store.trainable_tokens(windows)
    return _cut(store, windows[before < num_tokens], config.data.unit_tokens)


def _wanted_windows(store: TokenStore, config: RunConfig, split: str) -> NDArray[np.int64]:
    everything = np.arange(sum(store.info.windows.values()))
    heldout = np.zeros(len(everything), dtype=bool)
    heldout[store.window_ids("heldout")] = True
    rows, _ = rows_wanted(heldout, store.trainable_tokens(everything), tokens_wanted(config))
    windows = store.window_ids(split)
    return windows[windows < rows]


def _cut(store: TokenStore, windows: NDArray[np.int64], unit_tokens: int) -> list[NDArray[np.int64]]:
    return [windows[rows.start : rows.stop] for rows in token_batches(store.positions(windows), unit_tokens)]
