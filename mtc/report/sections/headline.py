"""Part of section 3: what headline figures are of, and what they are held against."""

from __future__ import annotations

from mtc.report.blocks import Block, Paragraph, Table, Token
from mtc.results import NOT_MEASURED, Analysis, number, percent


def massive_tokens(analysis: Analysis) -> list[Block]:
    """Which tokens are left out of headline figures, what they hold, and where they are."""
    m, s = analysis.evaluation.massive, analysis.summary
    limit = f"{number(m.norm)}, {number(m.ratio)} times the median of the first activations"
    if not m.tokens:
        return [Paragraph(f"None: no held-out token has a target norm above {limit}.")]
    of_all = s.all_tokens
    rows = (
        ("Tokens", number(s.evaluated_tokens - m.tokens), number(m.tokens), number(s.evaluated_tokens)),
        ("Share of the variance", percent(1 - m.variance), percent(m.variance), percent(1.0)),
        ("Share of the squared error, full dictionary", percent(1 - m.error), percent(m.error), percent(1.0)),
        ("L0", number(s.l0), number(m.l0), number(of_all.l0[-1])),
        ("FVU, full dictionary", number(s.fvu[-1]), "–", number(of_all.fvu[-1])),
        (
            "Cosine, full dictionary", number(s.cosine[-1] if s.cosine else None), "–",
            number(of_all.cosine[-1] if of_all.cosine else None),
        ),
    )  # fmt: skip
    tokens = tuple((Token(t.token), number(t.count), percent(t.count / m.tokens)) for t in m.top_tokens)
    return [
        Paragraph(
            f"A token is massive if its target norm is above {limit}. Headline figures leave these tokens out: they "
            "may hold most of the variance along one direction, which hides how the others are reconstructed. "
            f"{percent(m.beyond_first)} of them lie beyond the first {number(m.first_positions)} positions of their "
            f"window; they have {number(m.different_ids)} different token ids."
        ),
        Table("Figures with and without massive tokens", ("Figure", "Headline", "Massive tokens", "All tokens"), rows),
        Table("The most frequent massive tokens", ("Token", "Massive tokens", "Share of them"), tokens),
    ]


def straight_line(analysis: Analysis) -> Block:
    """What a straight line does, and what the features add over it."""
    s = analysis.summary
    if s.line is None:
        return Paragraph(
            f"The affine map was {NOT_MEASURED}: it takes more held-out tokens, or more different ones "
            "(analysis.num_tokens)."
        )
    rows = [("tokens that are not massive" if s.massive.tokens else "all tokens", s.line.fvu, s.fvu[-1], s.line.added)]
    if s.massive.tokens:
        rows.append(("all tokens", s.line.all_tokens_fvu, s.all_tokens.fvu[-1], s.line.all_tokens_added))
    skip = ", with its skip connection" if analysis.config.transcoder.skip else ""
    caption = (
        f"The least-squares affine map from the scaled source, fitted to {number(s.line.folds - 1)} of "
        f"{number(s.line.folds)} parts of the held-out tokens and judged on the other"
    )
    headers = ("Held-out tokens", "FVU of the affine map", f"FVU of the transcoder{skip}", "What the features add")
    return Table(caption, headers, tuple((name, number(a), number(b), percent(c)) for name, a, b, c in rows))


def overfitting(analysis: Analysis) -> Block:
    """The fit to the tokens that were trained on, beside the held-out one."""
    fit = analysis.summary.training_fit
    if fit is None:
        return Paragraph(f"The fit to the training tokens was {NOT_MEASURED}: no training is known.")
    caption = "FVU of the full dictionary, without massive tokens"
    headers = ("Training batches, last fifth of the logged steps", "Held-out text", "Held-out above training")
    held_out = analysis.summary.fvu[-1]
    return Table(caption, headers, ((number(fit.fvu), number(held_out), percent(fit.excess)),))
