"""How well a transcoder stands in for its MLP: from sums over held-out tokens to an Evaluation.

With y the MLP's output and y_m the reconstruction of prefix m, sums over held-out tokens in float64:

    FVU_m       = sum ||y - y_m||^2 / sum ||y - mean(y)||^2         explained variance = 1 - FVU
    cosine_m    = mean of y . y_m / (||y|| ||y_m||)
    L0_m        = mean number of active features within prefix m
    recovered_m = (CE_ablated - CE_spliced,m) / (CE_ablated - CE_clean), ablated to zero or to mean(y)
    KL_m        = mean of KL(next-token distribution, clean || spliced with y_m)

FVU, cosine and L0 are of the tokens that are not massive (mtc.analysis.massive), with those of all tokens beside them;
losses are of all tokens. Intervals are 95 % bootstraps over documents (mtc.analysis.intervals).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mtc.analysis.intervals import intervals
from mtc.analysis.massive import describe
from mtc.analysis.straight_line import straight_line
from mtc.results import AllTokens, Evaluation, LossRecovered, Slice

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


def evaluation(
    heldout: HeldOutPass,
    loss: LossRecovered | None,
    documents: int | None = None,
    text: Callable[[int], str] = str,
) -> Evaluation:
    """Evaluation of a pass over held-out text, of as many documents as its blocks if `documents` is not given; `text`
    gives the text of a token id."""
    usual, massive = heldout.blocks.halves()
    together = usual + massive
    usual, size = usual.nonempty(), int((together.tokens > 0).sum())
    headline, of_all = _figures(usual), _figures(together.nonempty())
    counts = np.trim_zeros(heldout.l0_counts, "b")
    return Evaluation(
        tokens=int(together.tokens.sum()),
        documents=size if documents is None else documents,
        prefixes=list(heldout.prefixes),
        **headline,
        l0_counts=counts.tolist(),
        all_tokens=AllTokens(**of_all),
        massive=describe(
            float(heldout.transcoder.massive_norm),
            heldout.norm_in_weights,
            heldout.blocks,
            heldout.positions,
            heldout.massive,
            text,
        ),
        line=straight_line(heldout.line, headline["fvu"][-1], of_all["fvu"][-1]),
        never_fired=int((heldout.examples.statistics.count == 0).sum()),
        by_position=_slices(heldout.positions, usual.mean(), lambda i: (2 ** (i - 1), 2**i - 1) if i else (0, 0)),
        by_frequency=_slices(heldout.frequencies, usual.mean(), lambda i: (10**i, 10 ** (i + 1) - 1)),
        loss=loss,
    )


def _figures(blocks: TokenSums) -> dict[str, Any]:
    """Figures of the tokens of `blocks`, none of them empty, with intervals from resampling blocks."""
    total, size = blocks.total(), len(blocks.tokens)
    return {
        "fvu": total.fvu()[0].tolist(),
        "fvu_interval": intervals(lambda w: blocks.weighted(w).fvu(), size),
        "cosine": total.per_token(total.cosine)[0].tolist(),
        "l0": total.per_token(total.active)[0].tolist(),
        "l0_interval": intervals(lambda w: _l0(blocks.weighted(w)), size),
    }


def _kl(sums: LossSums) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums.kl / sums.tokens[:, None]


def _l0(sums: TokenSums) -> Array:
    return sums.per_token(sums.active)


def _slices(both: TokenSums, mean: Array, limits: Callable[[int], tuple[int, int]]) -> list[Slice]:
    sums, massive = both.halves()
    fvu, cosine, l0 = sums.fvu(mean), sums.per_token(sums.cosine), sums.per_token(sums.active)[:, -1]
    return [
        Slice(
            low=limits(i)[0], high=limits(i)[1], tokens=int(tokens), massive=int(massive.tokens[i]),
            fvu=fvu[i].tolist(), cosine=cosine[i].tolist(), l0=float(l0[i]),
        )
        for i, tokens in enumerate(sums.tokens.tolist())
        if tokens
    ]  # fmt: skip
