"""The straight line: how well the least-squares affine map from source to target does on held-out tokens.

With x a source token, scaled as the transcoder scales it, with a 1 behind it, and y its target, the map is
W = (G + ridge)^-1 C, G = sum x x^T, C = sum x y^T. Tokens are in parts (folds); each part is judged by the map that the
others' sums give, from its own sums alone:

    sum ||y - W^T x||^2 = sum ||y||^2 - 2 tr(W^T C) + tr(W^T G W)

Products of a few thousand tokens, less their means, are float32 and added in float64. The ridge is 10^-6 of each
dimension's own sum of squares, so that it means the same for outlier dimensions as for others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtc.analysis.token_sums import Array
from mtc.results import StraightLine
from mtc.transcoder import MatryoshkaTranscoder

FOLDS = 5
TOKENS_PER_DIMENSION = 10
"""Fewest tokens for each dimension of the source that a map is fitted to: it judges others' tokens too badly by about
one part in as many."""
BLOCK = 8192
ROWS = 256
"""Tokens of one product. BLAS cuts a sum over more tokens into one part per thread, and the sum's last bits would then
depend on the number of threads."""
RIDGE = 1e-6
ROUNDING = 1e-12
"""Share of the targets' squares below which their deviation is rounding of the float64 sums."""
LEAST_FVU = 1e-5
"""Below it the map's FVU is rounding of the sums: nothing can be told from it."""


class _Moments(NamedTuple):
    """Sums over tokens, float64."""

    tokens: Array
    """[], number of tokens."""
    gram: Array
    """[d_source + 1, d_source + 1], sum of x x^T."""
    cross: Array
    """[d_source + 1, d_target], sum of x y^T; its last row is the sum of y."""
    square: Array
    """[], sum of ||y||^2."""

    def __add__(self, other: object) -> _Moments:
        assert isinstance(other, _Moments)
        return _Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: _Moments) -> _Moments:
        return _Moments(*(a - b for a, b in zip(self, other, strict=True)))


class LineSums:
    """Sums of each fold's tokens, massive ones (mtc.transcoder.massive) apart; folds without tokens take no room."""

    def __init__(self) -> None:
        self._folds: dict[tuple[int, bool], _Moments] = {}
        self._fvu: dict[bool, float | None] = {}

    def add(self, source: Tensor, target: Tensor, massive: Tensor, fold: int) -> None:
        """Take in tokens of one fold: source [tokens, d_source] scaled, target [tokens, d_target] raw, massive [tokens]
        bool."""
        for kind, rows in ((False, ~massive), (True, massive)):
            for some in rows.nonzero().squeeze(1).split(BLOCK):
                if len(some):
                    self._add((fold, kind), _moments(source[some].float(), target[some].float()))

    def arrays(self) -> dict[str, Array]:
        """Everything that was summed, to travel between processes."""
        return {
            f"{fold}.{int(kind)}.{name}": np.asarray(value)
            for (fold, kind), moments in self._folds.items()
            for name, value in moments._asdict().items()
        }

    def merge_arrays(self, arrays: dict[str, Any]) -> None:
        """Merge what other sums gave with `arrays`."""
        for key in sorted({name.rpartition(".")[0] for name in arrays}):
            fold, _, kind = key.partition(".")
            self._add((int(fold), kind == "1"), _Moments(*(arrays[f"{key}.{n}"] for n in _Moments._fields)))

    def fvu(self, massive: bool) -> float | None:
        """FVU of the map over all folds' tokens, massive ones included or not; None with fewer than two folds, too few
        tokens, or so few different ones that rounding decides."""
        if massive not in self._fvu:
            self._fvu[massive] = self._solved(massive)
        return self._fvu[massive]

    def _solved(self, massive: bool) -> float | None:
        folds = [self._of(fold, massive) for fold in self.folds]
        if len(folds) < 2:
            return None
        total = folds[0]
        for moments in folds[1:]:
            total = total + moments
        if min(float((total - own).tokens) for own in folds) < TOKENS_PER_DIMENSION * len(total.gram):
            return None
        deviation = float(total.square) - float(np.square(total.cross[-1]).sum() / total.tokens)
        if deviation <= ROUNDING * float(total.square):
            return None
        try:
            error = sum(_error(own, _solve(total - own)) for own in folds)
        except (
            torch.linalg.LinAlgError
        ):  # sources of a few tokens said over and over have fewer dimensions than rounding
            return None
        return error / deviation if error > LEAST_FVU * deviation else None

    @property
    def folds(self) -> list[int]:
        return sorted({fold for fold, kind in self._folds if not kind})

    @property
    def any_massive(self) -> bool:
        return any(kind for _, kind in self._folds)

    def _of(self, fold: int, massive: bool) -> _Moments:
        usual, few = self._folds[fold, False], self._folds.get((fold, True))
        return usual + few if massive and few is not None else usual

    def _add(self, key: tuple[int, bool], moments: _Moments) -> None:
        self._fvu.clear()
        self._folds[key] = self._folds[key] + moments if key in self._folds else moments


def who_sums(transcoders: Iterable[MatryoshkaTranscoder], sites: Iterable[int]) -> list[int]:
    """For each transcoder, at the site with its number, the first one whose sums are the same: they depend on the site,
    on how sources are scaled and on which tokens are massive."""
    kinds = [
        (site, t.shape.input_norm, float(t.input_scale), float(t.massive_norm))
        for t, site in zip(transcoders, sites, strict=True)
    ]
    return [kinds.index(kind) for kind in kinds]


def straight_line(sums: LineSums, fvu: float, all_tokens_fvu: float) -> StraightLine | None:
    """The StraightLine of sums, beside the full dictionary's FVU of the tokens that are not massive, and of all; None
    where `LineSums.fvu` is."""
    line = sums.fvu(massive=False)
    if line is None:
        return None
    of_all = (sums.fvu(massive=True) if sums.any_massive else line) or float("nan")
    return StraightLine(
        fvu=line, added=1 - fvu / line, all_tokens_fvu=of_all, all_tokens_added=1 - all_tokens_fvu / of_all,
        folds=len(sums.folds),
    )  # fmt: skip


def _moments(x: Tensor, y: Tensor) -> _Moments:
    """Of a block of tokens: what is multiplied in float32 is free of the means, which may be far larger than it."""
    tokens = len(x)
    mean_x, mean_y = x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)
    x, y = (x - mean_x).float(), (y - mean_y).float()
    mean_x = torch.cat([mean_x, mean_x.new_ones(1)])
    gram = tokens * mean_x.outer(mean_x)
    gram[:-1, :-1] += _product(x, x).double()
    cross = tokens * mean_x.outer(mean_y)
    cross[:-1] += _product(x, y).double()
    square = torch.linalg.vector_norm(y, dim=1).double().square().sum() + tokens * mean_y.square().sum()
    return _Moments(np.float64(tokens), *(part.cpu().numpy() for part in (gram, cross, square)))  # type: ignore[arg-type]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y [d_x, d_y] of float32 rows, the same to the bit on any number of threads."""
    total = x.new_zeros(x.shape[1], y.shape[1])
    for some_x, some_y in zip(x.split(ROWS), y.split(ROWS), strict=True):
        total.addmm_(some_x.T, some_y)
    return total


def _solve(moments: _Moments) -> Array:
    """[d_source + 1, d_target], the map of the tokens summed."""
    scale = np.sqrt(np.diag(moments.gram))
    scale[scale == 0] = 1
    gram = moments.gram / scale[:, None] / scale + RIDGE * np.eye(len(scale))
    # By Cholesky's factor: scipy.linalg.solve(assume_a="pos") takes 27 times the CPU time at 577 dimensions.
    factor = torch.linalg.cholesky(torch.from_numpy(gram))
    found: Array = torch.cholesky_solve(torch.from_numpy(moments.cross / scale[:, None]), factor).numpy()
    return found / scale[:, None]


def _error(moments: _Moments, map_: Array) -> float:
    """Squared error of a map on the tokens summed."""
    return float(moments.square) - float((map_ * (2 * moments.cross - moments.gram @ map_)).sum())
