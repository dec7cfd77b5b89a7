"""Features that are copies of each other: they read the same, write the same, and fire together.

Two features are copies if the cosine of their decoder rows and that of their encoder rows are above COSINE, and both
fire on at least TOGETHER of the sampled tokens on which either does. The later one is then a copy of the earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from mtc.analysis.coactivation import CHUNK, Array, CoactivationSample, decoder_directions
from mtc.transcoder import MatryoshkaTranscoder

COSINE = 0.95
TOGETHER = 0.5


class FoundCopies(NamedTuple):
    """Which features are copies of earlier ones."""

    tokens: int
    """Sampled tokens on which it was seen what fires together."""
    copy_of: Array
    """[features] int64, the earliest feature that each is a copy of, or of whose copy; -1 of others."""


@torch.no_grad()
def find_copies(transcoder: MatryoshkaTranscoder, sample: CoactivationSample) -> FoundCopies | None:
    """Copies among the features that fired on the sampled tokens; None without such tokens.

    Features are compared in blocks of at most CHUNK pairs, so that a large dictionary needs no matrix of all pairs.
    """
    if not sample.tokens:
        return None
    fired = sample.fired(transcoder.num_features)
    count = np.diff(fired.indptr)
    copy_of = np.full(transcoder.num_features, -1, np.int64)
    for earlier, later in _near(transcoder, np.flatnonzero(count)):
        # What fires together, only of the features that are near another one.
        rows, row = np.unique(later, return_inverse=True)
        columns, column = np.unique(earlier, return_inverse=True)
        both = (fired[:, rows].T @ fired[:, columns]).toarray()[row, column]
        same = both >= TOGETHER * (count[earlier] + count[later] - both)
        for i, j in zip(earlier[same].tolist(), later[same].tolist(), strict=True):
            if copy_of[j] < 0:
                copy_of[j] = i if copy_of[i] < 0 else copy_of[i]
    return FoundCopies(int(sample.tokens), copy_of)


def _near(transcoder: MatryoshkaTranscoder, chosen: Array) -> Iterator[tuple[Array, Array]]:
    """Pairs of the chosen features, earlier and later ones, whose rows are near; ordered by the later, then by the
    earlier."""
    index = torch.from_numpy(chosen).to(transcoder.W_dec.device)
    decoder = decoder_directions(transcoder)[index]
    encoder = torch.nn.functional.normalize(transcoder.W_enc.detach()[index], dim=1)
    step = max(1, CHUNK // max(1, len(chosen)))
    for a in range(0, len(chosen), step):
        b = min(a + step, len(chosen))
        later, earlier = (decoder[a:b] @ decoder[:b].T > COSINE).nonzero(as_tuple=True)
        kept = earlier < later + a
        later, earlier = later[kept] + a, earlier[kept]
        for part in range(0, len(later), step):
            some = slice(part, part + step)
            near = (encoder[later[some]] * encoder[earlier[some]]).sum(1) > COSINE
            if near.any():
                yield tuple(chosen[pair[some][near].cpu().numpy()] for pair in (earlier, later))
