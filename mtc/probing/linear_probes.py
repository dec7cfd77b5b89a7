"""Logistic probes, fitted by scikit-learn, and the area under their ROC curve. Arrays in, numbers out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtc.analysis.intervals import Array

STRENGTHS = tuple(float(c) for c in np.logspace(-5, 2, 8))
"""Inverse strengths of the L2 penalty that cross-validation chooses from."""
FOLDS = 5


class LinearProbe(NamedTuple):
    """score = x . weights + bias; positive where the probe says yes."""

    weights: Array
    """[dimensions] float64, for raw inputs: the standardisation is folded in."""
    bias: float
    strength: float
    """Inverse strength C of the L2 penalty, chosen by cross-validation."""

    def scores(self, x: Array) -> Array:
        """[rows, dimensions] -> [rows] float64, log odds of the positive class."""
        return np.asarray(x, np.float64) @ self.weights + self.bias


def grouped_folds(positive: Array, groups: Array, folds: int, seed: int = 0) -> list[tuple[Array, Array]]:
    """Row numbers (rest, part) of each of `folds` parts: a group lies in one part, classes are shared out evenly.

    `positive` is [rows] bool, `groups` [rows] of any kind. Raises ValueError if a class has fewer groups than `folds`.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fewest = min(len(np.unique(groups[positive == label])) for label in (True, False))
    if fewest < folds:
        raise ValueError(f"{folds} folds need as many groups of each class, but one class has {fewest}")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [(rest, part) for rest, part in splitter.split(np.zeros(len(positive)), positive, groups)]


def fit_probe(
    x: Array,
    positive: Array,
    folds: list[tuple[Array, Array]],
    strengths: tuple[float, ...] = STRENGTHS,
    balanced: bool = False,
) -> LinearProbe:
    """L2-regularised logistic regression on standardised inputs.

    `x` is [rows, dimensions], `positive` [rows] bool. The strength with the smallest log loss over `folds`, of which
    each part is judged by a probe of the rest, is used to fit all rows; with `balanced`, both classes weigh the same.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x = np.asarray(x, np.float64)
    mean, scale = x.mean(0), x.std(0)
    scale[scale <= 1e-12 * np.abs(mean)] = 1  # a constant: nothing to scale
    x = (x - mean) / scale
    weight = np.where(positive, 0.5 / positive.mean(), 0.5 / (~positive).mean()) if balanced else np.ones(len(x))
    losses = np.zeros(len(strengths))
    with threadpool_limits(1):  # threads cost more than they save on such small products
        for rest, part in folds:
            model = LogisticRegression(max_iter=1000, warm_start=True)
            for i, strength in enumerate(strengths):
                model.set_params(C=strength).fit(x[rest], positive[rest], sample_weight=weight[rest])
                odds = model.decision_function(x[part])
                losses[i] += weight[part] @ np.logaddexp(0, np.where(positive[part], -odds, odds))
        best = strengths[int(losses.argmin())]
        model = LogisticRegression(C=best, max_iter=1000).fit(x, positive, sample_weight=weight)
    weights = model.coef_[0] / scale
    return LinearProbe(weights, float(model.intercept_[0] - mean @ weights), best)


def rank_dimensions(x: Array, positive: Array) -> Array:
    """Dimensions [d] in falling order of the difference of class means, ties by index; `x` is [rows, d].

    Each dimension is first divided by its mean absolute value where it is not zero, as in sae-probes, so that one with
    large numbers does not win by its scale. Dimensions that are zero everywhere come last.
    """
    absolute = np.abs(x)
    typical = absolute.sum(0, dtype=np.float64) / np.maximum((x != 0).sum(0), 1)
    difference = x[positive].mean(0, dtype=np.float64) - x[~positive].mean(0, dtype=np.float64)
    return np.argsort(-np.abs(difference) / np.where(typical > 0, typical, 1), kind="stable")


def auc(scores: Array, positive: Array, weights: Array | None = None) -> Array:
    """Probability that a positive row scores higher than a negative one, ties counting one half (Mann-Whitney).

    `scores` and `positive` are [rows]; `weights` [..., rows] repeats rows and gives one result for each leading index.
    NaN where a class has no weight.
    """
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])  # of runs of equal scores
    mass = weights[..., order]
    up = np.add.reduceat(mass * positive[order], starts, axis=-1)
    down = np.add.reduceat(mass * ~positive[order], starts, axis=-1)
    below = down.cumsum(-1) - down
    pairs = up.sum(-1) * down.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((up * (below + down / 2)).sum(-1) / pairs)
