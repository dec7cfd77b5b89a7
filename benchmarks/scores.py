"""Held-out figures of a dictionary, whoever trained it: with massive tokens and, as the headline, without.

All dictionaries are scored alike. BatchTopK's get one threshold, set on the validation part without its massive tokens
so that k entries per token lie above it; sparsify's TopK, the k largest of each token. Where a dictionary is not
nested, a prefix is just its first features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.activations import Part
from benchmarks.rows import Rows
from mtc.transcoder import kth_largest

ROWS_AT_ONCE = 4096


class Dictionary(NamedTuple):
    """A trained transcoder of scaled rows."""

    W_enc: Tensor
    """[features, d_source]"""
    b_enc: Tensor
    """[features]"""
    W_dec: Tensor
    """[features, d_target]"""
    b_dec: Tensor
    """[d_target]"""
    rank_scale: Tensor
    """[features]: entries are ranked by z * rank_scale."""
    W_skip: Tensor
    """[d_target, d_source], zeros without a skip connection."""


class Score(NamedTuple):
    fvu: tuple[float, ...]
    """Squared error over squared deviation from the mean, per prefix, of the tokens that are not massive."""
    l0: float
    """Active features per token that is not massive."""
    fvu_all: tuple[float, ...]
    """The same of all tokens."""
    l0_all: float
    """Active features per token, of all tokens."""
    dead: float
    """Share of features that never fire on the part, massive tokens included."""


class LinearMap(NamedTuple):
    """Held-out FVU of least-squares affine maps from source to target."""

    fvu: float
    """Of tokens that are not massive, the map being fitted without them too."""
    fvu_all: float
    """Of all tokens, the map being fitted to all."""
    fvu_of_all: float
    """Of tokens that are not massive, the map being fitted to all."""


@torch.no_grad()
def score(
    dictionary: Dictionary, ends: tuple[int, ...], k: int, per_token: bool, rows: Rows, calibration: Part, part: Part
) -> Score:
    """Sums in float64 over `part`. `ends` are the prefixes' ends; `per_token` selects k entries of each token instead
    of those above a threshold."""
    threshold = 0.0
    if not per_token:
        source = calibration.source[rows.typical(calibration)]
        ranks = [_ranks(dictionary, x)[1].flatten() for x in source.split(ROWS_AT_ONCE)]
        threshold = float(kth_largest(torch.cat([r[r > 0] for r in ranks]), k * len(source) + 1))
    typical = rows.typical(part)
    error = torch.zeros(2, len(ends), dtype=torch.float64)  # of all tokens, and of those that are not massive
    active, fired = torch.zeros(2, dtype=torch.float64), torch.zeros(len(dictionary.b_enc))
    for x, y, counts in zip(*(t.split(ROWS_AT_ONCE) for t in (*part, typical)), strict=True):
        z, rank = _ranks(dictionary, x)
        keep = rank > threshold
        if per_token:
            keep &= torch.zeros_like(keep).scatter_(1, rank.topk(k, dim=1).indices, True)
        a = z * keep
        residual = y - x @ dictionary.W_skip.T - dictionary.b_dec
        for p, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            residual = residual - a[:, start:end] @ dictionary.W_dec[start:end]
            square = residual.double().square().sum(1)
            error[:, p] += torch.stack((square.sum(), square[counts].sum()))
        fired += keep.sum(0)
        active += torch.stack((keep.sum(), keep[counts].sum()))
    deviation = torch.stack((_deviation(part.target), _deviation(part.target[typical])))
    fvu = (error / deviation[:, None]).tolist()
    l0 = (active / torch.tensor([len(typical), int(typical.sum())])).tolist()
    return Score(tuple(fvu[1]), l0[1], tuple(fvu[0]), l0[0], float((fired == 0).float().mean()))


def linear_map(rows: Rows) -> LinearMap:
    """Fitted to the training part by normal equations in float64, scored on the test part."""
    train, test = rows.typical(rows.train), rows.typical(rows.test)
    sums, massive = _moments(rows.train, train), _moments(rows.train, ~train)
    to_typical, to_all = _solve(*sums), _solve(sums[0] + massive[0], sums[1] + massive[1])
    scored = (_fvu(to_typical, rows.test, test), _fvu(to_all, rows.test, torch.ones_like(test)))
    return LinearMap(*scored, _fvu(to_all, rows.test, test))


def _ranks(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.relu(torch.nn.functional.linear(x, dictionary.W_enc, dictionary.b_enc))
    return z, z * dictionary.rank_scale


def _deviation(target: Tensor) -> Tensor:
    """Scalar, squared deviation from the mean, summed over tokens and dimensions."""
    y = target.double()
    return (y - y.mean(0)).square().sum()


def _moments(part: Part, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 x^T x and x^T y of the rows in `mask` [tokens], x with a column of ones."""
    width = part.source.shape[1] + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment = torch.zeros(width, part.target.shape[1], dtype=torch.float64)
    for x, y, use in zip(*(t.split(ROWS_AT_ONCE) for t in (*part, mask)), strict=True):
        x = _with_one(x[use])
        gram += x.T @ x
        moment += x.T @ y[use].double()
    return gram, moment


def _solve(gram: Tensor, moment: Tensor) -> Tensor:
    """[d_source + 1, d_target]"""
    return torch.linalg.solve(gram + 1e-3 * torch.eye(len(gram)), moment)


def _fvu(fitted: Tensor, part: Part, mask: Tensor) -> float:
    error = torch.zeros((), dtype=torch.float64)
    for x, y, use in zip(*(t.split(ROWS_AT_ONCE) for t in (*part, mask)), strict=True):
        error += (y[use].double() - _with_one(x[use]) @ fitted).square().sum()
    return float(error / _deviation(part.target[mask]))


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
