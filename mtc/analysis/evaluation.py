"""How well a transcoder stands in for its MLP: from sums over held-out tokens to an Evaluation.

With y the MLP's output and y_m the reconstruction of prefix m, sums over held-out tokens in float64:

    FVU_m       = sum ||y - y_m||^2 / sum ||y - mean(y)||^2         explained variance = 1 - FVU
    cosine_m    = mean of y . y_m / (||y|| ||y_m||)
    L0_m        = mean number of active features within prefix m
    recovered_m = (CE_ablated - CE_spliced,m) / (CE_ablated - CE_clean), ablated to zero or to mean(y)
    KL_m        = mean of KL(next-token distribution, clean || spliced with y_m)

Intervals are 95 % bootstraps over documents (mtc.analysis.intervals).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mtc.analysis.intervals import intervals
from mtc.results import Evaluation, LossRecovered, Slice

if TYPE_CHECKING:
    from mtc.analysis.held_out import HeldOutPass
    from mtc.analysis.loss_sums import LossSums
    from mtc.analysis.token_sums import Array, TokenSums


def loss_recovered(sums: LossSums, documents: int | None = None) -> LossRecovered:
    """LossRecovered of sums whose labels are documents, or blocks of `documents` documents in all."""
    sums = sums.nonempty()
    blocks = len(sums.tokens)
    total = sums.weighted(np.ones((1, len(sums.tokens))))
    tokens = float(total.tokens[0])
    clean, zero, mean, *spliced = (total.ce[0] / tokens).tolist()
    return LossRecovered(
        tokens=int(tokens),
        documents=blocks if documents is None else documents,
        ce_clean=clean,
        ce_zero=zero,
        ce_mean=mean,
        ce_spliced=spliced,
        kl=(total.kl[0] / tokens).tolist(),
        recovered_zero=total.recovered(1)[0].tolist(),
        recovered_mean=total.recovered(2)[0].tolist(),
        kl_interval=intervals(lambda w: _kl(sums.weighted(w)), blocks),
        recovered_zero_interval=intervals(lambda w: sums.weighted(w).recovered(1), blocks),
        recovered_mean_interval=intervals(lambda w: sums.weighted(w).recovered(2), blocks),
    )


def evaluation(heldout: HeldOutPass, loss: LossRecovered | None, documents: int | None = None) -> Evaluation:
    """Evaluation of a pass over held-out text, of as many documents as its blocks if `documents` is not given."""
    blocks = heldout.blocks.nonempty()
    size = len(blocks.tokens)
    total = blocks.total()
    counts = np.trim_zeros(heldout.l0_counts, "b")
    return Evaluation(
        tokens=int(total.tokens[0]),
        documents=size if documents is None else documents,
        prefixes=list(heldout.prefixes),
        fvu=total.fvu()[0].tolist(),
        fvu_interval=intervals(lambda w: blocks.weighted(w).fvu(), size),
        cosine=total.per_token(total.cosine)[0].tolist(),
        l0=total.per_token(total.active)[0].tolist(),
        l0_interval=intervals(lambda w: _l0(blocks.weighted(w)), size),
        l0_counts=counts.tolist(),
        never_fired=int((heldout.examples.statistics.count == 0).sum()),
        by_position=_slices(heldout.positions, blocks.mean(), lambda i: (2 ** (i - 1), 2**i - 1) if i else (0, 0)),
        by_frequency=_slices(heldout.frequencies, blocks.mean(), lambda i: (10**i, 10 ** (i + 1) - 1)),
        loss=loss,
    )


def _kl(sums: LossSums) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums.kl / sums.tokens[:, None]


def _l0(sums: TokenSums) -> Array:
    return sums.per_token(sums.active)


def _slices(sums: TokenSums, mean: Array, limits: Callable[[int], tuple[int, int]]) -> list[Slice]:
    fvu, cosine, l0 = sums.fvu(mean), sums.per_token(sums.cosine), sums.per_token(sums.active)[:, -1]
    return [
        Slice(
            low=limits(i)[0], high=limits(i)[1], tokens=int(tokens), fvu=fvu[i].tolist(), cosine=cosine[i].tolist(),
            l0=float(l0[i]),
        )
        for i, tokens in enumerate(sums.tokens.tolist())
        if tokens
    ]  # fmt: skip
