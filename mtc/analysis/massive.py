"""What massive tokens (mtc.transcoder.massive) are, and which features are theirs.

A feature is *of massive tokens* if more than half of its summed activation falls on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mtc.analysis.examples import FeatureStatistics
from mtc.analysis.token_sums import Array, TokenSums
from mtc.results import Massive, TokenCount
from mtc.transcoder import MASSIVE_RATIO, Codes, MatryoshkaTranscoder, massive_norm

MASSIVE_SHARE = 0.5
"""Share of a feature's summed activation above which it is of massive tokens."""
FIRST_POSITIONS = 4
"""Positions of a window, from 0, that count as its first ones."""
TOP_TOKENS = 10


class MassiveSums(NamedTuple):
    """Which tokens are massive, and what fires on them."""

    tokens: Array
    """[vocabulary] int64, massive tokens with each id."""
    fired: Array
    """[features] int64, massive tokens on which the feature fired."""
    activation: Array
    """[features] float64, the feature's activations on massive tokens, summed."""

    @classmethod
    def empty(cls, vocabulary: int, features: int) -> MassiveSums:
        return cls(np.zeros(vocabulary, np.int64), np.zeros(features, np.int64), np.zeros(features))

    def __add__(self, other: object) -> MassiveSums:
        assert isinstance(other, MassiveSums)
        return MassiveSums(*(a + b for a, b in zip(self, other, strict=True)))

    def add(self, massive: Tensor, token_ids: Tensor, codes: Codes) -> MassiveSums:
        """With some more tokens: massive [tokens] bool, token_ids [tokens] int64 and their codes."""
        there = massive[codes.token]
        feature, value = (part[there].cpu().numpy() for part in (codes.feature, codes.value))
        return self + MassiveSums(
            np.bincount(token_ids[massive].cpu().numpy(), minlength=len(self.tokens)),
            np.bincount(feature, minlength=len(self.fired)),
            np.bincount(feature, weights=value.astype(np.float64), minlength=len(self.fired)),
        )

    def activation_share(self, statistics: FeatureStatistics) -> Array:
        """[features] float64: share of each feature's summed activation that falls on massive tokens; 0 of silent
        ones."""
        share: Array = self.activation / np.maximum(statistics.total, np.finfo(np.float64).tiny)
        return share.clip(0, 1)

    def features(self, statistics: FeatureStatistics) -> Array:
        """[features] bool: which features are of massive tokens."""
        chosen: Array = self.activation_share(statistics) > MASSIVE_SHARE
        return chosen


def recognise(transcoder: MatryoshkaTranscoder, target: Tensor) -> None:
    """Set `massive_norm` from the raw targets of an analysis' first tokens, [tokens, d_target], where the weights do
    not know it."""
    if transcoder.massive_norm.isnan():
        transcoder.massive_norm.copy_(massive_norm(target))


def describe(
    norm: float,
    in_weights: bool,
    blocks: TokenSums,
    positions: TokenSums,
    sums: MassiveSums,
    text: Callable[[int], str],
) -> Massive:
    """The Massive of a held-out pass, whose sums have labels of tokens that are not massive, then as many of massive
    ones (mtc.analysis.held_out); `text` gives the text of a token id."""
    of_all, few = blocks.total(), blocks.halves()[1].total()
    tokens = int(few.tokens[0])
    mean = of_all.mean()
    at = positions.halves()[1].tokens
    first = at[: FIRST_POSITIONS.bit_length()].sum()
    found = np.argsort(-sums.tokens, kind="stable")[:TOP_TOKENS]
    return Massive(
        ratio=MASSIVE_RATIO,
        norm=float(norm),
        in_weights=in_weights,
        tokens=tokens,
        share=tokens / float(of_all.tokens[0]),
        variance=float(few.deviation(mean)[0] / of_all.deviation(mean)[0]) if tokens else 0.0,
        error=float(few.errors[0, -1] / of_all.errors[0, -1]) if tokens and of_all.errors[0, -1] else 0.0,
        l0=float(few.active[0, -1]) / tokens if tokens else None,
        beyond_first=float(1 - first / tokens) if tokens else None,
        first_positions=FIRST_POSITIONS,
        different_ids=int((sums.tokens > 0).sum()),
        top_tokens=tuple(
            TokenCount(token_id=int(i), token=text(int(i)), count=int(sums.tokens[i])) for i in found if sums.tokens[i]
        ),
    )
