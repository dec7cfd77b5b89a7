"""The computed permutation: a bijection of any size, as random as it claims, and the same for ever."""

import numpy as np
import pytest

from mtc.text.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 65_537, 99_999])
def test_every_number_comes_once(size: int) -> None:
    for key in (0, 1):
        assert np.array_equal(np.sort(Permutation(size, key, "train").all()), np.arange(size))


def test_numbers_of_a_size_that_nobody_could_store() -> None:
    size = 10**15 + 37
    order = Permutation(size, 3)
    first = order(np.arange(5000))
    assert len(np.unique(first)) == 5000 and first.min() >= 0 and first.max() < size
    assert order(np.array([4999])).tolist() == [first[4999]]
    assert 0.4 < first.mean() / size < 0.6


def test_an_order_that_unfinished_runs_continue_by_does_not_change() -> None:
    assert Permutation(10, 0, "train").all().tolist() == [7, 9, 2, 6, 1, 0, 3, 4, 8, 5]
    assert Permutation(400_000_000, 0, "train", 1)(np.arange(4)).tolist() == [19560172, 289474533, 272946768, 2577677]


@pytest.mark.parametrize(("size", "highest"), [(4, 56.0), (10, 140.0)])
def test_every_order_and_every_place_is_as_likely(size: int, highest: float) -> None:
    """Pearson's chi-square over 24,000 keys; `highest` is above its value in all but one of 10,000 cases."""
    keys = 24_000
    orders = np.stack([Permutation(size, key).all() for key in range(keys)])
    if size == 4:  # 24 orders, 23 degrees of freedom
        _, counts = np.unique(orders @ 4 ** np.arange(4), return_counts=True)
        assert len(counts) == 24
        assert float(((counts - keys / 24) ** 2 / (keys / 24)).sum()) < highest
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    assert float(((counts - keys / size) ** 2 / (keys / size)).sum()) < highest
