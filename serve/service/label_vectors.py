"""Which features' labels are near in meaning to a query: cosines of stored vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mtc.storage import label_digest, parse_embeddings

NEAREST = 1000
"""Features that a search by meaning finds, of those that pass the filters: every label is somehow near."""

MOST_BYTES = 600_000_000
"""Bytes of a file of vectors above which it is not read, since in memory they are twice as many: 65,536 of 4,096
dimensions have 538 million."""
ROWS = 1024
"""Vectors that are converted at a time."""


class LabelVectors:
    """The vectors of a transcoder's labels, for any number of threads: float32, [labels, dimensions].

    A label that has changed since its vector was made has none. Raises RunError for a file that can't be read.
    """

    def __init__(self, data: bytes, labels: Sequence[str | None], name: str):
        found = parse_embeddings(data, name)
        self.model = found.model
        """Name of the model that made them."""
        current = [
            j < len(labels) and (label := labels[j]) is not None and label_digest(label) == digest.tobytes()
            for j, digest in zip(found.features.tolist(), found.digests, strict=True)
        ]
        kept = np.flatnonzero(current)
        self._features = found.features[kept]
        # As float16 a search would take twice as long, in parts that are converted, or a hundred times.
        self._vectors = np.empty((len(kept), found.vectors.shape[1]), np.float32)
        for start in range(0, len(kept), ROWS):
            part = found.vectors[kept[start : start + ROWS]].astype(np.float32)
            # Stored as float16, they are a little longer or shorter than 1.
            part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.float32(1e-12))
            self._vectors[start : start + ROWS] = part
        self._total = len(labels)

    def __len__(self) -> int:
        return len(self._features)

    @property
    def dimensions(self) -> int:
        return int(self._vectors.shape[1])

    def similarities(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """[features], the cosine of each label with a vector of length 1; NaN of those without."""
        found = np.full(self._total, np.nan, np.float32)
        found[self._features] = self._vectors @ vector
        return found


def nearest(similarities: NDArray[np.float32], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of the wanted features that have a similarity the NEAREST with the highest ones, these first, equal ones by
    index."""
    there = np.flatnonzero(wanted & np.isfinite(similarities))
    values = similarities[there]
    if len(there) > NEAREST:  # only these are sorted: all of 65,536 would take 8 ms
        kept = values >= np.partition(values, -NEAREST)[-NEAREST]
        there, values = there[kept], values[kept]
    return there[np.argsort(-values, kind="stable")][:NEAREST]
