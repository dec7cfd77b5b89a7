"""Which features tell two sides of text apart: how often each fires on either, and how much.

Of a feature that fires on a of n tokens of the one side and on b of m of the other,

    l = ln((a + 1/2) / (n - a + 1/2)) - ln((b + 1/2) / (m - b + 1/2))
    z = l / sqrt(1/(a + 1/2) + 1/(n - a + 1/2) + 1/(b + 1/2) + 1/(m - b + 1/2))

l is the log odds ratio of "fires on a token" with half a token added to each count (Haldane 1956, Anscombe 1956), z is
l over its standard error (Gart 1966). If tokens were independent and both sides alike, z would be distributed about
normally with deviation 1, or closer to 0 where counts are small: a few hits prove little. That a feature fires on most
tokens of both sides makes l small, whatever its density. Ranking words by such a z is Monroe, Colaresi and Quinn's
"Fightin' Words" (2008).

    d = (A/n - B/m) / M,      score = z d, or 0 where the two point in different directions

with the summed activations A and B and the feature's largest activation M: d is how much of its own range its mean
activation moves, so that a feature that barely fires does not lead.

Tokens of a text are not independent: a text about one thing repeats it, and its n counts for less than n. z orders
features, and a z that chance alone could give is nothing; but a large one is no proof about other texts than these.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.storage import RandomContexts
from serve.contract import Encoded, Tokenised

LEVEL = 0.05
"""Share of pairs of like sides among which some feature's |z| is above `largest_by_chance`, at the most."""


class Side(NamedTuple):
    """What fires on the tokens of one side."""

    tokens: int
    """Tokens that may have features."""
    fires: NDArray[np.int64]
    """[features], tokens on which each fires."""
    total: NDArray[np.float64]
    """[features], summed activation of each, in scaled units."""
    strongest: NDArray[np.float64]
    """[features], largest activation of each; 0 where it is not known."""


class Contrast(NamedTuple):
    """How the sides differ, all [features]; above 0 what the first has more of."""

    log_odds_ratio: NDArray[np.float64]
    z: NDArray[np.float64]
    difference: NDArray[np.float64]
    """Difference of the mean activations in shares of the feature's largest one, from -1 to 1."""
    score: NDArray[np.float64]
    """What features are ranked by, 0 or more."""

    def first(self, count: int) -> NDArray[np.int64]:
        """The features with the highest scores above 0, the highest first, equal ones by index."""
        order = np.argsort(-self.score, kind="stable")[:count]
        return order[self.score[order] > 0]


def side_of_texts(inputs: Iterable[tuple[Tokenised, Encoded]], features: int) -> Side:
    """All that fires on some texts; special tokens count nowhere."""
    tokens, fires = 0, np.zeros(features, np.int64)
    total, strongest = np.zeros(features), np.zeros(features)
    for text, encoded in inputs:
        tokens += int((~text.special).sum())
        fires += np.bincount(encoded.indices, minlength=features)
        total += np.bincount(encoded.indices, encoded.values, minlength=features)
        np.maximum.at(strongest, encoded.indices, encoded.values)
    return Side(tokens, fires, total, strongest)


def side_of_contexts(contexts: RandomContexts, features: int) -> Side:
    """All that fires in a run's random contexts."""
    fires, total = contexts.totals(features)
    return Side(contexts.num_tokens, fires, total, np.zeros(features))


def contrast(one: Side, other: Side, largest: NDArray[np.float64], prefix: int) -> Contrast:
    """Compare two sides with a token each at least.

    Args:
        largest: [features], largest activation of each that is known beside those of the sides.
        prefix: size of the nested dictionary whose features are compared.
    """
    a, b = (side.fires[:prefix] + 0.5 for side in (one, other))
    not_a, not_b = (side.tokens + 1 - fired for side, fired in ((one, a), (other, b)))
    ratio = np.log(a / not_a) - np.log(b / not_b)
    z = ratio / np.sqrt(1 / a + 1 / not_a + 1 / b + 1 / not_b)
    scale = np.maximum.reduce([largest[:prefix], one.strongest[:prefix], other.strongest[:prefix]])
    moved = one.total[:prefix] / one.tokens - other.total[:prefix] / other.tokens
    difference = np.divide(moved, scale, out=np.zeros(prefix), where=scale > 0)
    return Contrast(ratio, z, difference, np.maximum(z * difference, 0))


def largest_by_chance(features: int) -> float:
    """What no |z| of so many features exceeds in 95 of 100 pairs of sides that are alike, by the normal distribution
    (Bonferroni); with few hits of each its tails are too light, and it is about 91."""
    return NormalDist().inv_cdf(1 - LEVEL / 2 / features)
