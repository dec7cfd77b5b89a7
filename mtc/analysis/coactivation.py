"""A sample of which features fire together, and what the target does along their directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from mtc.transcoder import MatryoshkaTranscoder

Array = NDArray[Any]
PARENT_CANDIDATES = 4
"""How many earlier features, the nearest by decoder cosine, are looked at for absorption of each feature."""
CHUNK = 1 << 22  # entries of dense [children, earlier features] held at a time


class CoactivationSample(NamedTuple):
    """Entries (token, feature) of sparse activations on some tokens."""

    tokens: int
    """Sampled tokens, whether or not a feature fired on them."""
    token: Array
    """[entries] int64, where the feature fired: window id * 2^20 + position."""
    feature: Array
    """[entries] int32, index of the feature that fired."""
    activation: Array
    """[entries] uint16, the activation as a bfloat16: half the room, and weights from elsewhere may have any scale; see
    `to_bfloat16`."""
    projection: Array
    """[entries] uint16, as bfloat16 the target along the feature's direction: (y - base) . W_dec[feature] /
    ||W_dec[feature]||, y the scaled target, base what is no feature's."""
    candidate_projection: Array
    """[entries, candidates] uint16, as bfloat16 the target along each parent candidate's direction."""
    candidate_fired: Array
    """[entries, candidates] bool, whether the parent candidate fired on the token."""

    @classmethod
    def empty(cls, candidates: int) -> CoactivationSample:
        return cls(
            0, np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint16), np.empty(0, np.uint16),
            np.empty((0, candidates), np.uint16), np.empty((0, candidates), bool),
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[CoactivationSample]) -> CoactivationSample:
        """Samples of several parts of the text as one."""
        columns = list(zip(*parts, strict=True))
        return cls(sum(map(int, columns[0])), *(np.concatenate(column) for column in columns[1:]))

    def fired(self, features: int) -> sparse.csc_matrix:
        """[tokens, features] float32: 1 where the feature fired."""
        _, row = np.unique(self.token, return_inverse=True)
        shape = (int(self.tokens), features)
        return sparse.csc_matrix((np.ones(len(row), np.float32), (row, self.feature)), shape=shape)


@torch.no_grad()
def parent_candidates(transcoder: MatryoshkaTranscoder, limit: int = PARENT_CANDIDATES) -> Array:
    """[features, limit] int64: the earlier groups' features with the nearest decoder rows; -1 where there are fewer."""
    unit = decoder_directions(transcoder)
    found = np.full((transcoder.num_features, limit), -1, np.int64)
    for first, end in transcoder.groups[1:]:
        step = max(1, CHUNK // first)
        for a in range(first, end, step):
            b = min(a + step, end)
            cosine = unit[a:b] @ unit[:first].T
            found[a:b, : min(limit, first)] = cosine.topk(min(limit, first), dim=1).indices.cpu().numpy()
    return found


def to_bfloat16(values: torch.Tensor) -> Array:
    """Numbers rounded to bfloat16, as the uint16 of their bits, which numpy and safetensors know."""
    return values.bfloat16().view(torch.uint16).cpu().numpy()


def from_bfloat16(bits: Array) -> Array:
    """The float32 numbers behind `to_bfloat16`."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decoder_directions(transcoder: MatryoshkaTranscoder) -> torch.Tensor:
    rows = transcoder.W_dec.detach()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
