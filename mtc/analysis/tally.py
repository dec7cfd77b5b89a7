"""Which values are commonest in each of many groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Tally(NamedTuple):
    """How often each value occurs in each group, the commonest of a group first."""

    group: Array
    """[pairs] int64, ascending."""
    value: Array
    """[pairs] int64, different ones in a group."""
    times: Array
    """[pairs] int64, how often the value occurs in the group; falling within a group, equals in the order in which the
    values first came."""
    place: Array
    """[pairs] int64, 0, 1, 2, ... within a group."""


def tally(group: Array, value: Array) -> Tally:
    """Count the values [n] of each group [n]; both from 0 to 2^31 - 1."""
    pairs, first, times = np.unique(group.astype(np.int64) << 32 | value, return_index=True, return_counts=True)
    order = np.lexsort((first, -times, pairs >> 32))
    group, value = pairs[order] >> 32, pairs[order] & 0xFFFFFFFF
    return Tally(group, value, times[order], np.arange(len(group)) - np.searchsorted(group, group))


def commonest(group: Array, value: Array, groups: int) -> tuple[Array, Array]:
    """The commonest value of each group, [groups] int64, -1 in a group without values; and how often it occurs."""
    found = tally(group, value)
    first = found.place == 0
    values, times = np.full(groups, -1), np.zeros(groups, np.int64)
    values[found.group[first]], times[found.group[first]] = found.value[first], found.times[first]
    return values, times
