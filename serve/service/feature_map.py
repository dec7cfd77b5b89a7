"""The map of a run's features and their nested tree, as columns: what a page of all of them needs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Array = NDArray[Any]


class FeatureMap:
    """Places, groups and families of all features, from the table of features."""

    def __init__(self, table: pa.Table):
        self.known = "map_x" in table.column_names
        """Whether the run was analysed since there are maps."""
        columns = ("map_x", "map_y") if self.known else ()
        self._places = [table[name].to_numpy() for name in columns] or [np.full(len(table), np.nan)] * 2
        self.group: Array = table["group"].to_numpy()
        """[features], each one's group of the nested dictionary."""
        self.parent = np.array([p["feature"] if p else -1 for p in table["parent"].to_pylist()], np.int64)
        """[features], each one's parent in the nested tree; -1 without one."""
        self.children: list[list[int]] = [[] for _ in self.parent]
        """For each feature those whose parent it is."""
        for child in np.flatnonzero(self.parent >= 0).tolist():
            self.children[self.parent[child]].append(child)

    @cached_property
    def placed(self) -> Array:
        """[placed], indices of the features that have a place, ascending."""
        return np.flatnonzero(np.isfinite(self._places[0]))

    def places(self, size: int) -> Array:
        """[placed, 2] whole numbers from 0 to `size`, from left to right and from the top down."""
        return np.rint(np.stack(self._places, 1)[self.placed] * size).astype(np.int64)

    @cached_property
    def roots(self) -> list[int]:
        """Features with children and without a parent, those with most descendants first."""
        below = np.zeros(len(self.parent), np.int64)
        # A parent is of an earlier group, so that it comes before its children.
        for child in np.flatnonzero(self.parent >= 0)[::-1].tolist():
            below[self.parent[child]] += 1 + below[child]
        found = [i for i, many in enumerate(self.children) if many and self.parent[i] < 0]
        return sorted(found, key=lambda i: (-below[i], i))

    @cached_property
    def alone(self) -> int:
        """How many features have neither parent nor children."""
        return sum(not many and parent < 0 for many, parent in zip(self.children, self.parent.tolist(), strict=True))
