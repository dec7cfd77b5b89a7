"""A permutation that is computed, not stored: where each number goes follows from a key alone.

The generalised Feistel network of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002). A number
below `size` is a pair (left, right) below (a, b), where a * b is hardly more than `size`. Rounds add to one
half what a hash makes of the other, modulo its size, which is undone by subtracting and so is a bijection of the
rectangle; numbers from outside of `size` are walked on until they are inside (cycle walking). Numbers that come with
numpy's own generators may change with numpy's version; these may not, since unfinished runs continue by them.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of 0..size-1, for 1 <= size <= 2**62, fixed by `key`: numbers and names."""

    def __init__(self, size: int, *key: int | str):
        self.size = size
        self._left = math.isqrt(max(size - 1, 0)) + 1
        self._right = -(-size // self._left)
        digest = hashlib.shake_256(json.dumps(key).encode()).digest(8 * ROUNDS)
        self._keys = np.frombuffer(digest, "<u8")

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of `numbers` goes, int64 of the same shape."""
        found = self._rectangle(numbers.astype(np.uint64))
        while len(outside := np.flatnonzero(found >= self.size)):
            found[outside] = self._rectangle(found[outside])
        return found.astype(np.int64)

    def all(self) -> NDArray[np.int64]:
        """Where 0, 1, ..., size-1 go; 8 bytes each."""
        return self(np.arange(self.size))

    def _rectangle(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = numbers % a, numbers // a
        for i, key in enumerate(self._keys):
            if i % 2:
                right = (right + _mix(left, key) % b) % b
            else:
                left = (left + _mix(right, key) % a) % a
        return right * a + left


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of 64 bits: splitmix64's finaliser, of Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators" (OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = values * np.uint64(0x9E3779B97F4A7C15) + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
