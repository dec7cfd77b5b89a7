"""Section 4: the trained matrices."""

from __future__ import annotations

from mtc.report.blocks import Paragraph, Section, Table, Text
from mtc.results import NOT_MEASURED, Analysis, Distribution, number, whole_range


def weights(analysis: Analysis) -> Section:
    """Section 4: entries, row norms, and how encoder and decoder rows align, of all features and by group."""
    w = analysis.weights

    def row(name: str, d: Distribution | None) -> tuple[Text, ...]:
        return (name, *((number(d.mean), number(d.std), number(d.min), number(d.max)) if d else (NOT_MEASURED,) * 4))

    distributions = (
        row("W_enc", w.encoder),
        row("W_dec", w.decoder),
        row("Encoder row norms", w.encoder_norm),
        row("Decoder row norms", w.decoder_norm),
        row("Encoder-decoder alignment", w.alignment),
    )
    groups = tuple(
        (
            number(g.group), whole_range(g.first, g.end - 1), number(g.decoder_norm), number(g.alignment),
            number(g.silent_features), number(g.mean_density),
        )
        for g in w.groups
    )  # fmt: skip
    headers = ("Group", "Features", "Mean decoder norm", "Mean alignment", "Silent features", "Mean density")
    return Section(
        "Model weight analysis",
        (
            Paragraph(
                "Decoder norms are in scaled target units. Alignment is the cosine between a feature's encoder and "
                "decoder row, which exists where source and target have the same width."
            ),
            Table("Distribution of the weights", ("Weights", "Mean", "Std", "Min", "Max"), distributions),
            Table("Groups of the nested dictionary", headers, groups),
        ),
    )
