"""How well a transcoder stands in for its MLP, on held-out tokens. `python -m mtc.evaluation RUN` recomputes a run's.

What is measured, with y the MLP's output, y_m the reconstruction of prefix m, sums over held-out tokens in float64:

    FVU_m       = sum ||y - y_m||^2 / sum ||y - mean(y)||^2         explained variance = 1 - FVU
    cosine_m    = mean of y . y_m / (||y|| ||y_m||)
    L0_m        = mean number of active features within prefix m
    recovered_m = (CE_ablated - CE_spliced,m) / (CE_ablated - CE_clean), ablated to zero or to mean(y)
    KL_m        = mean of KL(next-token distribution, clean || spliced with y_m)

Intervals are 95 % bootstraps over documents (mtc.bootstrap).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from mtc.bootstrap import Intervals, intervals
from mtc.config import RunConfig

if TYPE_CHECKING:  # who only reads figures, such as the service, should not pay for torch
    from mtc.heldout import HeldOutPass
    from mtc.sums import Array, LossSums, TokenSums
    from mtc.transcoder import MatryoshkaTranscoder
    from mtc.work import PackedWindows


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class LossRecovered(_Part):
    """Next-token cross-entropy (nats) of the language model with the transcoder in place of its MLP."""

    tokens: int
    """Predicted tokens."""
    documents: int = 0
    """Documents that they are of; more than 1,024 are resampled in as many blocks of whole documents."""
    ce_clean: float
    """The model as it is."""
    ce_zero: float
    """mlp_out replaced by zero."""
    ce_mean: float
    """mlp_out replaced by its mean over held-out tokens."""
    ce_spliced: list[float]
    """mlp_out replaced by the transcoder's reconstruction, per prefix."""
    kl: list[float]
    """Mean KL(clean || spliced) per prefix, nats."""
    recovered_zero: list[float]
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean), per prefix."""
    recovered_mean: list[float]
    """(ce_mean - ce_spliced) / (ce_mean - ce_clean), per prefix."""
    kl_interval: Intervals | None = None
    """95 % interval of `kl`; None with too few documents."""
    recovered_zero_interval: Intervals | None = None
    """95 % interval of `recovered_zero`; None with too few documents."""
    recovered_mean_interval: Intervals | None = None
    """95 % interval of `recovered_mean`; None with too few documents."""


class Slice(_Part):
    """Reconstruction of the tokens that share something."""

    low: int
    """Smallest value of what they share."""
    high: int
    """Largest value."""
    tokens: int
    """How many there are."""
    fvu: list[float]
    """Per prefix: their squared error over their squared deviation from the mean of *all* held-out targets."""
    cosine: list[float]
    """Per prefix, mean."""
    l0: float
    """Active features per token, full dictionary."""


class Evaluation(_Part):
    """Reconstruction on held-out tokens, at the calibrated threshold."""

    tokens: int
    """Held-out tokens."""
    documents: int = 0
    """Documents that they are of; more than 1,024 are resampled in as many blocks of whole documents."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    fvu: list[float]
    """Fraction of variance unexplained, per prefix."""
    fvu_interval: Intervals | None = None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    cosine: list[float] = []
    """Mean cosine between target and reconstruction, per prefix."""
    l0: list[float]
    """Active features per token within each prefix; the last is the whole dictionary's."""
    l0_interval: Intervals | None = None
    """95 % interval of `l0`; None with too few documents."""
    l0_counts: list[int] = []
    """Tokens with 0, 1, 2, ... active features of the whole dictionary, up to the largest number found."""
    never_fired: int
    """Features that fired on none of these tokens."""
    by_position: list[Slice] = []
    """Tokens by their position in the window, from 0."""
    by_frequency: list[Slice] = []
    """Tokens by how often their id occurs among all held-out tokens of the pass."""
    loss: LossRecovered | None
    """None if not measured."""

    @property
    def explained_variance(self) -> list[float]:
        return [1 - value for value in self.fvu]


def loss_recovered(sums: LossSums, documents: int | None = None) -> LossRecovered:
    """The figures of sums whose labels are documents, or blocks of so many."""
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


def _kl(sums: LossSums) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums.kl / sums.tokens[:, None]


def evaluation(heldout: HeldOutPass, loss: LossRecovered | None, documents: int | None = None) -> Evaluation:
    """The figures of a pass over held-out text, of as many documents as its blocks if their number is not given."""
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


def evaluate(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    units: Iterable[PackedWindows],
    loss_units: Iterable[PackedWindows],
    device: str = "cpu",
) -> Evaluation:
    """Evaluate in this process: metrics on `units`, losses on `loss_units` (possibly none); without intervals."""
    import torch

    from mtc.heldout import HeldOutPass
    from mtc.language_model import LanguageModel
    from mtc.sums import loss_sums

    transcoder = transcoder.to(device)
    model = LanguageModel(config.model, device)
    total = HeldOutPass(config, transcoder, np.zeros(model.vocab_size, np.int64))
    for windows in units:
        (pair,) = model.capture(windows, windows.trainable.nonzero().squeeze(1))
        total.add(np.zeros(len(windows.lengths), np.int64), windows, pair)
    if not total.blocks.tokens.sum():
        raise ValueError("there are no held-out windows to evaluate on")
    losses: LossSums | None = None
    full: LanguageModel | None = None
    for windows in loss_units:
        full = full or LanguageModel(config.model, device, full=True)
        (part,) = loss_sums(full, [transcoder], windows, [torch.from_numpy(total.blocks.mean())])
        losses = part if losses is None else losses + part
    return evaluation(total, loss_recovered(losses) if losses else None)


def main(argv: list[str] | None = None) -> int:
    """Recompute a finished run's held-out metrics from its directory and compare; 0 if they agree, 1 if not."""
    import torch

    from mtc.runs import RunError, load_analysis, load_transcoder, open_layer_run
    from mtc.tokens import DataError, TokenStore
    from mtc.work import heldout_units, pack_windows

    parser = argparse.ArgumentParser(prog="python -m mtc.evaluation", description=main.__doc__)
    parser.add_argument("run", help="a run directory or URL, or <root>/latest")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference (default: 0.001)")
    parser.add_argument("--skip-loss", action="store_true", help="leave out the passes of the whole language model")
    arguments = parser.parse_args(argv)
    try:
        run = open_layer_run(arguments.run)
        analysis = load_analysis(run)
        config = analysis.config
        store = TokenStore.open(analysis.facts.token_store)
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def batches(tokens: int) -> Iterable[PackedWindows]:
        for unit in heldout_units(store, config, tokens) if tokens else []:
            yield pack_windows(store.input_ids(unit), store.info.special_ids)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss_tokens = 0 if arguments.skip_loss else config.analysis.loss_tokens
    fresh = evaluate(config, load_transcoder(run), batches(config.analysis.num_tokens), batches(loss_tokens), device)
    stored = analysis.evaluation
    pairs: list[tuple[str, float, float]] = [("tokens", stored.tokens, fresh.tokens)]
    for i, m in enumerate(fresh.prefixes):
        pairs += [(f"fvu[{m}]", stored.fvu[i], fresh.fvu[i]), (f"l0[{m}]", stored.l0[i], fresh.l0[i])]
    pairs.append(("never_fired", stored.never_fired, fresh.never_fired))
    if fresh.loss and stored.loss:
        pairs += [(name, getattr(stored.loss, name), getattr(fresh.loss, name)) for name in ("ce_clean", "ce_zero")]
        pairs.append(("ce_mean", stored.loss.ce_mean, fresh.loss.ce_mean))
        pairs += [
            (f"recovered_zero[{m}]", stored.loss.recovered_zero[i], fresh.loss.recovered_zero[i])
            for i, m in enumerate(fresh.prefixes)
        ]
    print(f"{run.run_id}: {fresh.tokens:,} held-out tokens\n{'':24}{'report':>14}{'recomputed':>14}{'difference':>12}")
    worst = 0.0
    for name, old, new in pairs:
        difference = abs(new - old) / max(abs(old), 1e-9) if old != new else 0.0
        worst = max(worst, difference)
        print(f"{name:24}{old:14.6g}{new:14.6g}{difference:12.1e}")
    print(f"largest relative difference {worst:.1e}, tolerance {arguments.tolerance:g}")
    return 0 if worst <= arguments.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
