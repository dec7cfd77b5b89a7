"""Sums of reconstruction errors, cosines and active features over tokens, by label.

They are additive and all float64, so that parts of the text can be evaluated by different processes and no digits are
lost over millions of tokens. The FVU's variance is per dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtc.devices import is_gpu

Array = NDArray[Any]
MAX_ENTRIES = 1 << 26  # of dense [tokens, features] held at a time, a few copies of them


class SparseActivations(NamedTuple):
    """The entries of feature activations that are not zero, ordered by feature, then token."""

    feature: Array
    """[entries] int64, index of the active feature."""
    token: Array
    """[entries] int64, row of the activations that were encoded."""
    value: Array
    """[entries] float32, activation in scaled units, above 0."""


class TokenSums(NamedTuple):
    """Sums over the tokens that share a label, for each label; all are float64, and `total()` is over all labels."""

    tokens: Array
    """[labels], number of tokens."""
    errors: Array
    """[labels, prefixes], sum of ||y - y_m||^2 in raw units."""
    target: Array
    """[labels, d_target], sum of targets y."""
    target_square: Array
    """[labels], sum of ||y||^2."""
    cosine: Array
    """[labels, prefixes], sum of the cosine between y and y_m, the mean of neither removed."""
    active: Array
    """[labels, prefixes], sum over tokens of the active features within each prefix."""

    def __add__(self, other: object) -> TokenSums:
        assert isinstance(other, TokenSums)
        return TokenSums(*(a + b for a, b in zip(self, other, strict=True)))

    def total(self) -> TokenSums:
        """The sums over the tokens of all labels, as one label."""
        return TokenSums(*(column.sum(0, keepdims=True) for column in self))

    def halves(self) -> tuple[TokenSums, TokenSums]:
        """The first half of the labels, and the second."""
        half = len(self.tokens) // 2
        return TokenSums(*(column[:half] for column in self)), TokenSums(*(column[half:] for column in self))

    def weighted(self, weights: Array) -> TokenSums:
        """Sums of the labels combined with `weights` [results, labels]: one label per result."""
        return TokenSums(*(np.tensordot(weights, column, 1) for column in self))

    def mean(self) -> Array:
        """[d_target], mean of the targets of all labels' tokens."""
        return self.target.sum(0) / self.tokens.sum()

    def mean_deviation(self) -> float:
        """Mean over all tokens of the squared deviation of targets from their mean."""
        tokens = self.tokens.sum()
        return float((self.target_square.sum() - np.square(self.target.sum(0)).sum() / tokens) / tokens)

    def nonempty(self) -> TokenSums:
        """Sums of only those labels that have tokens."""
        return TokenSums(*(column[self.tokens > 0] for column in self))

    def fvu(self, mean: Array | None = None) -> Array:
        """[labels, prefixes]: sum ||y - y_m||^2 / sum ||y - mean||^2 over each label's tokens.

        `mean` [d_target] is by default each label's own, per dimension: one scalar variance over all elements would
        hide the mean and flatter. NaN for labels without tokens.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.errors / self.deviation(mean)[:, None]

    def deviation(self, mean: Array | None = None) -> Array:
        """[labels]: sum ||y - mean||^2 over each label's tokens; `mean` as in `fvu`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array
            if mean is None:
                found = self.target_square - np.square(self.target).sum(1) / self.tokens
            else:
                found = self.target_square - 2 * self.target @ mean + self.tokens * (mean @ mean)
            return found

    def per_token(self, column: Array) -> Array:
        """`column` [labels, prefixes] as a mean over each label's tokens; NaN without any."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return column / self.tokens[:, None]


class TokenErrors(NamedTuple):
    """How well each token is reconstructed, float64."""

    errors: Tensor
    """[tokens, prefixes], ||y - y_m||^2 in raw units."""
    target: Tensor
    """[tokens, d_target], target y in raw units."""
    cosine: Tensor
    """[tokens, prefixes], cosine between y and y_m."""
    active: Tensor
    """[tokens, prefixes], active features within each prefix."""

    @classmethod
    def of(cls, reconstructions: Tensor, target: Tensor, active: Tensor) -> TokenErrors:
        """Errors of reconstructions [prefixes, tokens, d_target] of the target [tokens, d_target], both raw.

        Products are float32, sums float64.
        """
        y = target.float()
        length = _squares(y).sqrt()
        errors, cosines = [], []
        for y_m in reconstructions.float():
            errors.append(_squares(y_m - y))
            inner = (y_m * y).sum(1, dtype=torch.float64)
            cosines.append(inner / (length * _squares(y_m).sqrt()).clamp(min=1e-300))
        return cls(torch.stack(errors, 1), y.double(), torch.stack(cosines, 1), active.double())

    def sums(self, labels: Tensor, num_labels: int) -> TokenSums:
        """The errors summed over the tokens of each label; `labels` is [tokens] int64."""
        by_label = sum_by_label(labels, num_labels)
        return TokenSums(
            tokens=by_label(torch.ones_like(self.errors[:, 0])),
            errors=by_label(self.errors),
            target=by_label(self.target),
            target_square=by_label(_squares(self.target)),
            cosine=by_label(self.cosine),
            active=by_label(self.active),
        )


def sum_by_label(labels: Tensor, num_labels: int) -> Callable[[Tensor], Array]:
    """A function that sums values, [tokens] or [tokens, d], over the tokens of each label: [num_labels] or
    [num_labels, d], float64. `labels` is [tokens] int64.

    In the order of the tokens. On a GPU `index_add_` would add in another order every time: there, tokens are sorted by
    label first.
    """
    if not is_gpu(labels.device):

        def add(values: Tensor) -> Array:
            values = values.double()
            sums: Array = values.new_zeros(num_labels, *values.shape[1:]).index_add_(0, labels, values).numpy()
            return sums

        return add
    order = labels.argsort(stable=True)
    offsets = torch.searchsorted(labels[order], torch.arange(num_labels + 1, device=labels.device))

    def reduce_sorted(values: Tensor) -> Array:
        parts = values.double()[order]
        sums: Array = torch.segment_reduce(parts, "sum", offsets=offsets, axis=0, initial=0).cpu().numpy()
        return sums

    return reduce_sorted


def _squares(rows: Tensor) -> Tensor:
    """[rows] float64, squared lengths of [rows, d]."""
    return rows.square().sum(1, dtype=torch.float64)
