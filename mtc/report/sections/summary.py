"""Section 1: the run in figures."""

from __future__ import annotations

from mtc.report.blocks import Block, Heading, Items, KeyFigure, KeyFigures, Link, Paragraph, Plots, Section, Table
from mtc.report.format import share
from mtc.report.sections.provenance import captured
from mtc.results import MIN_DOCUMENTS, NOT_MEASURED, Analysis, interval, number, percent, percent_interval


def summary(analysis: Analysis) -> Section:
    """Section 1: key figures with their intervals, what the rules found, the quality of each prefix, and all other
    figures."""
    blocks: list[Block] = [
        _key_figures(analysis),
        Paragraph(_intervals(analysis)),
        Paragraph(massive_line(analysis)),
        Heading("Key insights"),
        *_key_insights(analysis),
        Heading("Nested prefixes"),
        _prefixes(analysis),
        Paragraph(
            "FVU is the fraction of held-out variance left unexplained; explained variance is 1 less FVU. The affine "
            "map is the least-squares straight line from source to target; the features add 1 less FVU over its FVU. "
            "Loss recovered is the share of the loss between an ablated and the real MLP that the transcoder keeps in "
            "the MLP's place; KL is between the language model's next-token distributions with either."
        ),
        Plots(
            (
                ("prefix_fvu", "Held-out FVU of each nested prefix, with intervals; values in the table."),
                ("prefix_recovered", "Loss recovered of each nested prefix, with intervals; values in the table."),
                ("training", "Training loss and batch FVU of each prefix against trained tokens."),
                ("sparsity", "Active features per token and number of dead features against trained tokens."),
            )
        ),
        _figures(analysis),
    ]
    return Section("Executive summary", tuple(blocks))


def _key_figures(analysis: Analysis) -> KeyFigures:
    s = analysis.summary
    loss, dead_after = s.loss, analysis.config.transcoder.dead_after_tokens
    l0 = interval(analysis.evaluation.l0_interval, -1)
    recovered = share(loss.share_of_zero(-1)) if loss else NOT_MEASURED
    about = f"95 %: {percent_interval(loss.recovered_zero_interval if loss else None, -1)}"
    if loss and loss.share_of_zero(-1) is None:
        about = "zero ablation does not raise the loss"

    def beside(value: float | None) -> str:
        """The figure of all tokens, where the headline figure leaves some out."""
        return f"; all tokens: {number(value)}" if s.massive.tokens else ""

    of_all = s.all_tokens
    kl = interval(loss.kl_interval if loss else None, -1)
    figures = (
        KeyFigure("FVU", number(s.fvu[-1]), f"95 %: {interval(s.fvu_interval, -1)}{beside(of_all.fvu[-1])}"),
        KeyFigure("Explained variance", percent(s.explained_variance[-1]), "1 less FVU"),
        _line(analysis),
        KeyFigure(
            "Cosine", number(s.cosine[-1] if s.cosine else None),
            f"target and reconstruction, mean{beside(of_all.cosine[-1] if of_all.cosine else None)}",
        ),
        KeyFigure(
            "L0, active features per token", number(s.l0),
            f"k = {number(s.k)}; 95 %: {l0}{beside(of_all.l0[-1])}",
        ),
        KeyFigure("Loss recovered (zero ablation)", recovered, about),
        KeyFigure("KL (nats per token)", number(loss.kl[-1] if loss else None), f"95 %: {kl}"),
        KeyFigure(
            "Silent features", number(s.silent_features), f"{percent(s.silent_fraction)} of {number(s.total_features)}"
        ),
        KeyFigure(
            "Dead features", number(s.dead_features),
            f"{percent(s.dead_fraction)}; silent for {number(dead_after)} training tokens",
        ),
    )  # fmt: skip
    return KeyFigures("Held-out figures of the full dictionary", figures)


def _line(analysis: Analysis) -> KeyFigure:
    line = analysis.summary.line
    if line is None:
        return KeyFigure("FVU of the affine map", NOT_MEASURED, "too few tokens to fit it")
    return KeyFigure("FVU of the affine map", number(line.fvu), f"the features add {percent(line.added)}")


def massive_line(analysis: Analysis) -> str:
    """What massive tokens are to the headline figures, in a line or two."""
    m, s = analysis.summary.massive, analysis.summary
    limit = f"above {number(m.ratio)} times the median of the first activations"
    if not m.tokens:
        return f"No held-out token is massive (target norm {limit}): these figures are of all tokens."
    return (
        f"FVU, cosine and L0 are without {number(m.tokens)} massive tokens ({percent(m.share)}), whose target norms "
        f"are {limit}. These hold {percent(m.variance)} of the variance and {percent(m.error)} of the squared error; "
        f"with them FVU is {number(s.all_tokens.fvu[-1])}, cosine "
        f"{number(s.all_tokens.cosine[-1] if s.all_tokens.cosine else None)} and L0 {number(s.all_tokens.l0[-1])}."
    )


def _intervals(analysis: Analysis) -> str:
    s = analysis.summary
    text = (
        f"FVU, cosine and L0 are of {number(s.evaluated_tokens - s.massive.tokens)} held-out tokens from "
        f"{number(s.documents)} documents"
    )
    if s.loss:
        text += f", the loss is of {number(s.loss.tokens)} tokens from {number(s.loss.documents)} documents"
    text += ". Intervals (95 %) come from resampling documents"
    few = f"; with fewer than {MIN_DOCUMENTS} documents there are none" if s.documents < MIN_DOCUMENTS else ""
    return f"{text}{few}."


def _key_insights(analysis: Analysis) -> list[Block]:
    met = [i for i in analysis.insights if i.met]
    count = f"{number(len(met))} of {number(len(analysis.insights))} rules"
    more: Block = Paragraph(
        (f"{count} that could be measured are met; all of them, with thresholds: ", Link("Insights", "#insights"), ".")
    )
    return [Items(tuple(i.text for i in met)), more] if met else [more]


def _prefixes(analysis: Analysis) -> Table:
    s = analysis.summary
    rows = []
    for i, prefix in enumerate(s.prefixes):
        row = [
            number(prefix), number(s.fvu[i]), interval(s.fvu_interval, i),
            percent(s.explained_variance[i]), number(s.cosine[i] if s.cosine else None),
            number(analysis.evaluation.l0[i]),
        ]  # fmt: skip
        if s.massive.tokens:
            row += [number(s.all_tokens.fvu[i]), interval(s.all_tokens.fvu_interval, i)]
            row += [number(s.all_tokens.cosine[i] if s.all_tokens.cosine else None), number(s.all_tokens.l0[i])]
        if s.loss:
            row += [share(s.loss.share_of_zero(i)), percent_interval(s.loss.recovered_zero_interval, i)]
            row += [share(s.loss.share_of_mean(i)), percent_interval(s.loss.recovered_mean_interval, i)]
            row += [number(s.loss.kl[i]), number(s.loss.ce_spliced[i])]
        else:
            row += [NOT_MEASURED] * 6
        rows.append(tuple(row))
    headers = ["Prefix (features)", "FVU", "FVU, 95 % interval", "Explained variance", "Cosine", "L0"]
    if s.massive.tokens:
        headers += ["FVU, all tokens", "FVU, all tokens, 95 % interval", "Cosine, all tokens", "L0, all tokens"]
    headers += ["Loss recovered (zero ablation)", "95 % interval", "Loss recovered (mean ablation)", "95 % interval"]
    headers += ["KL (nats)", "Cross-entropy, spliced (nats)"]
    return Table("Held-out quality of each nested prefix of the dictionary", tuple(headers), tuple(rows))


def _figures(analysis: Analysis) -> Table:
    s, dead_after = analysis.summary, analysis.config.transcoder.dead_after_tokens
    fit = s.training_fit
    few = f"Features that fired, with fewer than {number(analysis.config.analysis.max_per_feature)} samples"
    rows = (
        ("Total features", number(s.total_features)),
        ("Silent features (did not fire on the analysed held-out tokens)", number(s.silent_features)),
        ("Silent fraction", percent(s.silent_fraction)),
        (f"Dead features (training counter: silent for {number(dead_after)} tokens or more)", number(s.dead_features)),
        ("Dead fraction", percent(s.dead_fraction)),
        ("Dense features (fire on more than 10 % of the tokens)", number(s.dense_features)),
        ("Dense fraction", percent(s.dense_fraction)),
        ("Share of all activations that are theirs", percent(s.dense_activation_share)),
        ("Features with samples (stored top examples, at most one per window)", number(s.features_with_samples)),
        ("Total samples", number(s.total_samples)),
        ("Average samples per feature (of those with samples)", number(s.average_samples)),
        (few, percent(s.few_samples_fraction)),
        ("Uniformly drawn examples", number(s.uniform_examples)),
        ("Trained tokens", number(s.trained_tokens) + captured(analysis.facts)),
        ("Dropped tokens (activations not finite)", number(analysis.facts.dropped_tokens)),
        ("Analysed held-out tokens (examples, counts)", number(s.analysed_tokens)),
        ("Evaluated held-out tokens (FVU, L0)", number(s.evaluated_tokens - s.massive.tokens)),
        ("Documents that they are of", number(s.documents)),
        ("Massive tokens beside them", number(s.massive.tokens)),
        ("Features of massive tokens", number(s.massive_features)),
        ("Features that are copies of an earlier one", number(analysis.copies.features if analysis.copies else None)),
        ("FVU of the affine map", number(s.line.fvu if s.line else None)),
        ("Training FVU (batches of the last fifth of the logged steps)", number(fit.fvu if fit else None)),
        ("FVU of the full dictionary", number(s.fvu[-1])),
        ("FVU of the full dictionary, all tokens", number(s.all_tokens.fvu[-1])),
        ("L0, active features per token", number(s.l0)),
        ("L0, all tokens", number(s.all_tokens.l0[-1])),
        ("k, asked for", number(s.k)),
        ("Tokens for loss recovered", number(s.loss.tokens if s.loss else None)),
    )
    return Table("All figures", ("Figure", "Value"), rows)
