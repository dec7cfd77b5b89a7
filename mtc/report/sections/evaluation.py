"""Section 3: held-out metrics in detail: sparsity, density, error by position and frequency, loss."""

from __future__ import annotations

import numpy as np

from mtc.report.blocks import Block, Heading, Paragraph, Plots, Section, Table
from mtc.report.format import share
from mtc.report.sections.headline import massive_tokens, overfitting, straight_line
from mtc.results import (
    NOT_MEASURED,
    Analysis,
    LossRecovered,
    Slice,
    interval,
    number,
    percent,
    percent_interval,
    whole_range,
)

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def evaluation(analysis: Analysis) -> Section:
    """Section 3: how many features are active, how often each, what is reconstructed badly, and what that costs the
    model."""
    e = analysis.evaluation
    blocks: list[Block] = [
        Heading("Massive tokens"),
        *massive_tokens(analysis),
        Heading("The straight line"),
        straight_line(analysis),
        Heading("Training and held-out text"),
        overfitting(analysis),
        Heading("Active features per token"),
        *_sparsity(analysis),
        Heading("Density of features"),
        *_density(analysis),
        Heading("Reconstruction by position and by frequency of the token"),
        Paragraph(
            "FVU of some tokens is their squared error over their squared deviation from the mean of all held-out "
            f"targets{', massive tokens left out' if e.massive.tokens else ''}. Frequency counts how often the token's "
            "id occurs in the held-out text of the pass."
        ),
        _slices("Tokens by position in the window", "Position", e.by_position, analysis),
        _slices("Tokens by frequency in the held-out text", "Occurrences", e.by_frequency, analysis),
        Plots(
            (
                ("fvu_by_position", "FVU of each prefix against the position in the window; values in the table."),
                ("fvu_by_frequency", "FVU of each prefix against the token's frequency; values in the table."),
            )
        ),
        Heading("Loss of the language model"),
        *_loss(analysis),
    ]
    return Section("Evaluation", tuple(blocks))


def _sparsity(analysis: Analysis) -> list[Block]:
    e = analysis.evaluation
    counts = np.array(e.l0_counts, np.int64)
    if not counts.sum():
        return [Paragraph(f"The number of active features by token was {NOT_MEASURED}.")]
    below = np.cumsum(counts) / counts.sum()
    rows = [(f"{percent(share)} of the tokens have at most", number(int((below < share).sum()))) for share in SHARES]
    rows += [
        ("Largest number", number(len(counts) - 1)),
        ("Tokens with no active feature", percent(float(counts[0] / counts.sum()))),
        ("Mean (L0)", number(e.l0[-1])),
        ("Mean, 95 % interval", interval(e.l0_interval, -1)),
        ("k, asked for", number(analysis.summary.k)),
    ]
    return [
        Table("Active features of the full dictionary on a held-out token", ("Figure", "Value"), tuple(rows)),
        Plots((("l0", "Histogram of active features per token; quantiles in the table."),)),
    ]


def _density(analysis: Analysis) -> list[Block]:
    histogram, groups = analysis.density, analysis.weights.groups
    total = np.array(histogram.counts, np.int64).sum(0)
    used = np.flatnonzero(total)
    rows = tuple(
        (
            f"{number(histogram.edges[i])} to {number(histogram.edges[i + 1])}",
            *(number(counts[i]) for counts in histogram.counts),
        )
        for i in (range(used[0], used[-1] + 1) if len(used) else ())
    )
    silent = number(analysis.summary.silent_features)
    blocks: list[Block] = [
        Paragraph(
            "Density is the share of the analysed held-out tokens on which a feature fires. "
            f"Silent features, which have none, are left out: {silent}."
        ),
        Plots((("density", "Histogram of features by log10 of their density, per group; values in the table."),)),
    ]
    if rows:
        headers = ("log10 of density", *(f"Features of group {g.group}" for g in groups))
        blocks.append(Table("Features by density", headers, rows, folded=True))
    return blocks


def _slices(caption: str, what: str, slices: list[Slice], analysis: Analysis) -> Block:
    if not slices:
        return Paragraph(f"{caption}: {NOT_MEASURED}.")
    prefixes = analysis.summary.prefixes
    rows = tuple(
        (
            whole_range(s.low, s.high), number(s.tokens), *(number(v) for v in s.fvu),
            number(s.cosine[-1] if s.cosine else None), number(s.l0),
            *([number(s.massive)] if analysis.summary.massive.tokens else []),
        )
        for s in slices
    )  # fmt: skip
    headers = [what, "Tokens", *(f"FVU, {number(m)} features" for m in prefixes), "Cosine, full", "L0"]
    headers += ["Massive tokens left out"] if analysis.summary.massive.tokens else []
    return Table(caption, tuple(headers), rows)


def _loss(analysis: Analysis) -> list[Block]:
    loss = analysis.summary.loss
    if loss is None:
        return [Paragraph(f"The language model with the transcoder in the MLP's place was {NOT_MEASURED}.")]
    rows: list[tuple[str, ...]] = [
        (name, number(ce), number(ce - loss.ce_clean), *("–",) * 6)
        for name, ce in (
            ("The model as it is", loss.ce_clean),
            ("MLP output set to zero", loss.ce_zero),
            ("MLP output set to its mean", loss.ce_mean),
        )
    ]
    rows += [_spliced(analysis, loss, i) for i in range(len(analysis.summary.prefixes))]
    headers = ["MLP output", "Cross-entropy (nats per token)", "More than the model as it is", "KL (nats)"]
    headers += ["KL, 95 % interval", "Loss recovered (zero ablation)", "95 % interval"]
    headers += ["Loss recovered (mean ablation)", "95 % interval"]
    blocks: list[Block] = [
        Table(
            f"Next-token loss on {number(loss.tokens)} tokens of {number(loss.documents)} documents",
            tuple(headers), tuple(rows),
        ),
    ]  # fmt: skip
    harmless = [
        name for name, of in (("zero", loss.share_of_zero), ("the mean", loss.share_of_mean)) if of(-1) is None
    ]  # fmt: skip
    if harmless:
        blocks.append(
            Paragraph(
                f"Setting the MLP's output to {' or '.join(harmless)} does not raise the loss of this model: loss "
                "recovered against it says nothing here."
            )
        )
    return blocks


def _spliced(analysis: Analysis, loss: LossRecovered, i: int) -> tuple[str, ...]:
    return (
        f"Reconstruction, {number(analysis.summary.prefixes[i])} features",
        number(loss.ce_spliced[i]), number(loss.ce_spliced[i] - loss.ce_clean),
        number(loss.kl[i]), interval(loss.kl_interval, i),
        share(loss.share_of_zero(i)), percent_interval(loss.recovered_zero_interval, i),
        share(loss.share_of_mean(i)), percent_interval(loss.recovered_mean_interval, i),
    )  # fmt: skip
