"""The nested dictionary as a tree: which earlier feature a later one refines, what was split, what may be absorbed.

Features of group g see all features of the groups before it as possible parents. Three questions, each answered from
the weights and from which features fire together on held-out tokens:

- *Parent.* The earlier feature p with the largest cos(W_dec[p], W_dec[c]) * excess, where
  excess = (P(p fires | c fires) - P(p fires)) / (1 - P(p fires)): 1 if p always fires with c, 0 if independently.
- *Splitting.* A parent whose children together fire on most of its tokens, hardly ever two at a time.
- *Absorption* (after Chanin et al. 2024, arXiv:2409.14507, where a probe tells what the parent stands for; here its own
  direction does). On a token where c fires, p *should* fire if the target, less b_dec, reaches at least as far along
  W_dec[p] as it does in the median over the tokens where p fires. It is absorbed if p is silent all the same, and c's
  own part of that reach, a_c W_dec[c] . W_dec[p] / ||W_dec[p]||, is at least ABSORBER_SHARE of it.

All of these are candidates to look at, not proofs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse, special

from mtc.analysis.coactivation import CHUNK, CoactivationSample, decoder_directions, from_bfloat16
from mtc.transcoder import MatryoshkaTranscoder

Array = NDArray[Any]
MIN_EXCESS = 0.1
"""Least excess of a parent: how much more often it fires with the child than without regard to it, from 0 to 1."""
MIN_FIRED = 10
"""Fewest tokens of the sample on which a feature must fire before anything is said about it."""
SPLIT_COVERAGE = 0.5
"""Least share of a split feature's tokens on which at least one child fires."""
SPLIT_OVERLAP = 0.1
"""Largest share of the tokens where a split feature and a child fire on which two or more children do."""
ABSORBER_SHARE = 0.4
"""Least share of the reach along the parent's direction that is the child's own where it absorbs; the paper's limit."""
ABSORBED_RATE = 0.5
"""Least share of absorbed tokens, among those where the child fires and the parent should, of a pair that is a
candidate."""
_ENTRIES = 1 << 19  # of the sample looked at at a time


class Parents(NamedTuple):
    """For each feature the earlier one that it refines, its parent."""

    parent: Array
    """[features] int64, index of the parent; -1 for the first group, for features that fired too rarely and for those
    without one."""
    cosine: Array
    """[features] float64, cosine between the decoder rows of feature and parent; NaN without a parent."""
    coactivation: Array
    """[features] float64, P(parent fires | feature fires); NaN without a parent."""
    base_rate: Array
    """[features] float64, P(parent fires); NaN without a parent."""
    fired: Array
    """[features] int64, sampled tokens on which the feature fired: the support of `coactivation`."""


class Split(NamedTuple):
    """A feature that several later ones divide among themselves."""

    feature: int
    children: tuple[int, ...]
    """Indices of the later features whose parent the split feature is."""
    fired: int
    """Sampled tokens on which the split feature fires."""
    coverage: float
    """Share of the split feature's sampled tokens on which a child fires too, from 0 to 1."""
    overlap: float
    """Share of the sampled tokens where the split feature and a child fire on which two or more children do, from 0 to
    1."""


class Absorption(NamedTuple):
    """An earlier feature that stays silent where a later one fires, though it should fire."""

    parent: int
    child: int
    cosine: float
    """Cosine between the decoder rows of the earlier and the later feature, from -1 to 1."""
    expected: int
    """Sampled tokens on which the child fires and the parent should."""
    absorbed: int
    """Sampled tokens on which the child fires, the parent should but is silent, and the child makes up ABSORBER_SHARE
    of the reach."""


class Nesting(NamedTuple):
    """Parents, split features and absorption of one dictionary."""

    tokens: int
    """Tokens of the sample that was looked at."""
    parents: Parents
    splits: list[Split]
    """Features that meet both limits of splitting, those with most tokens first."""
    absorptions: list[Absorption]
    """Pairs that meet the limits of absorption, those with most absorbed tokens first."""
    min_cosine: float
    """Cosine that the decoder rows of a pair must exceed to be called near; see `chance_cosine`."""
    tested_pairs: int
    """Pairs for which absorption could be looked at: the parent is expected on at least MIN_FIRED tokens."""


def analyse_nesting(transcoder: MatryoshkaTranscoder, sample: CoactivationSample, candidates: Array) -> Nesting | None:
    """Parents, splits and absorption; None without sampled tokens or with a single group.

    `candidates` are those that the sample was taken with.
    """
    if not sample.tokens or len(transcoder.groups) < 2:
        return None
    fired = sample.fired(transcoder.num_features)
    parents = _parents(transcoder, fired)
    absorptions, tested = _absorptions(transcoder, sample, candidates)
    near = chance_cosine(transcoder.num_features, transcoder.shape.d_target)
    return Nesting(int(sample.tokens), parents, _splits(parents, fired), absorptions, near, tested)


def chance_cosine(count: int, width: int) -> float:
    """The median of the largest cosine that a direction has with `count` random ones of `width` dimensions, 2 or more:
    what lies below says nothing. The square of a random cosine has a Beta(1/2, (width - 1)/2) distribution."""
    tail = 1 - 0.5 ** (1 / count)
    return float(special.betainccinv(0.5, (width - 1) / 2, min(1.0, 2 * tail)) ** 0.5)


@torch.no_grad()
def _parents(transcoder: MatryoshkaTranscoder, fired: sparse.csc_matrix) -> Parents:
    features = transcoder.num_features
    min_cosine = chance_cosine(features, transcoder.shape.d_target)
    unit = decoder_directions(transcoder).cpu().numpy()
    count = np.diff(fired.indptr).astype(np.int64)
    rate = count / fired.shape[0]
    parent = np.full(features, -1, np.int64)
    cosine, coactivation, base = (np.full(features, np.nan) for _ in range(3))
    for first, end in transcoder.groups[1:]:
        step = max(1, CHUNK // first)
        earlier = fired[:, :first]
        for a in range(first, end, step):
            b = min(a + step, end)
            near = (unit[a:b] @ unit[:first].T).astype(np.float64)
            together = (fired[:, a:b].T @ earlier).toarray() / np.maximum(count[a:b, None], 1)
            excess = (together - rate[:first]) / np.maximum(1 - rate[:first], 1e-12)
            allowed = (near > min_cosine) & (excess >= MIN_EXCESS) & (count[a:b, None] >= MIN_FIRED)
            score = np.where(allowed, near * excess, -1)
            best = score.argmax(1)
            at = np.flatnonzero(score[np.arange(b - a), best] > 0)
            best = best[at]
            parent[a + at] = best
            cosine[a + at], coactivation[a + at], base[a + at] = near[at, best], together[at, best], rate[best]
    return Parents(parent, cosine, coactivation, base, count)


def _splits(parents: Parents, fired: sparse.csc_matrix) -> list[Split]:
    children: dict[int, list[int]] = {}
    for child in np.flatnonzero(parents.parent >= 0).tolist():
        children.setdefault(int(parents.parent[child]), []).append(child)
    found = []
    for p, own in children.items():
        tokens = fired.indices[fired.indptr[p] : fired.indptr[p + 1]]
        if len(own) < 2 or len(tokens) < MIN_FIRED:
            continue
        per_token = Counter[int]()
        for child in own:
            both = np.intersect1d(tokens, fired.indices[fired.indptr[child] : fired.indptr[child + 1]])
            per_token.update(both.tolist())
        coverage = len(per_token) / len(tokens)
        overlap = sum(n > 1 for n in per_token.values()) / max(1, len(per_token))
        if coverage >= SPLIT_COVERAGE and overlap <= SPLIT_OVERLAP:
            found.append(Split(p, tuple(own), len(tokens), coverage, overlap))
    return sorted(found, key=lambda s: (-s.fired, s.feature))


@torch.no_grad()
def _absorptions(
    transcoder: MatryoshkaTranscoder, sample: CoactivationSample, candidates: Array
) -> tuple[list[Absorption], int]:
    usual = _medians(sample.feature, from_bfloat16(sample.projection), transcoder.num_features)
    unit, length = decoder_directions(transcoder).cpu(), transcoder.W_dec.detach().norm(dim=1).cpu().numpy()
    # [features, candidates]; -1 stands for no candidate, and takes no part below.
    cosines = np.stack([(unit * unit[column]).sum(1).numpy() for column in candidates.T], 1)
    wanted, absorbed = np.zeros(candidates.size, np.int64), np.zeros(candidates.size, np.int64)
    for start in range(0, len(sample.feature), _ENTRIES):
        some = slice(start, start + _ENTRIES)
        feature = sample.feature[some].astype(np.int64)
        possible, reach = candidates[feature], from_bfloat16(sample.candidate_projection[some])
        # NaN, of parents that fire too rarely to know, is never reached.
        expected = (possible >= 0) & (reach >= usual[possible])
        own = (from_bfloat16(sample.activation[some]) * length[feature])[:, None] * cosines[feature]
        taken = expected & ~sample.candidate_fired[some] & (own >= ABSORBER_SHARE * reach)
        pair = feature[:, None] * candidates.shape[1] + np.arange(candidates.shape[1])
        wanted += np.bincount(pair[expected], minlength=candidates.size)
        absorbed += np.bincount(pair[taken], minlength=candidates.size)
    tested = wanted >= MIN_FIRED
    chosen = np.flatnonzero(tested & (absorbed >= ABSORBED_RATE * wanted))
    child, parent = chosen // candidates.shape[1], candidates.ravel()[chosen]
    cosine = cosines.ravel()[chosen].tolist()
    min_cosine = chance_cosine(transcoder.num_features, transcoder.shape.d_target)
    found = [
        Absorption(int(p), int(c), near, int(wanted[i]), int(absorbed[i]))
        for p, c, near, i in zip(parent, child, cosine, chosen, strict=True)
        if near > min_cosine
    ]
    return sorted(found, key=lambda x: (-x.absorbed, x.parent, x.child)), int(tested.sum())


def _medians(feature: Array, value: Array, num_features: int) -> Array:
    """[features] median of each feature's values; NaN with fewer than MIN_FIRED of them."""
    order = np.lexsort((value, feature))
    count = np.bincount(feature, minlength=num_features)
    starts = np.cumsum(count) - count
    ordered = np.r_[value[order], np.float32(np.nan)]
    low, high = ((starts + (count + shift) // 2).clip(max=len(value)) for shift in (-1, 0))
    medians = (ordered[low] + ordered[high]) / 2
    return np.where(count >= MIN_FIRED, medians, np.nan)
