"""Part of section 5: features that are copies of others."""

from __future__ import annotations

from mtc.report.blocks import Block, FeatureLink, Paragraph, Table, Text
from mtc.report.sections.listing import listed, maybe_label
from mtc.results import NOT_MEASURED, Analysis, number, percent

SHOWN = 12
"""Most copies of a feature that are named; features.parquet has all."""


def copies(analysis: Analysis) -> list[Block]:
    """How many features are copies of earlier ones, and which."""
    found = analysis.copies
    if found is None:
        return [Paragraph(f"Copies of features were {NOT_MEASURED}: it takes tokens on which features fire together.")]
    blocks: list[Block] = [
        Paragraph(
            f"A feature is a copy of an earlier one if both their decoder rows and their encoder rows have a cosine "
            f"above {number(found.cosine)}, and they fire together on at least {percent(found.together)} of those of "
            f"{number(found.tokens)} sampled held-out tokens on which either fires. Found: {number(found.features)} of "
            f"{number(analysis.summary.total_features)} features ({percent(found.share)})."
        )
    ]
    if found.copied:
        rows: tuple[tuple[Text, ...], ...] = tuple(
            (
                FeatureLink(c.feature), maybe_label(c.label), number(len(c.copies)),
                (
                    *listed([(FeatureLink(j),) for j in c.copies[:SHOWN]]),
                    *([f", and {number(len(c.copies) - SHOWN)} more"] if len(c.copies) > SHOWN else []),
                ),
            )
            for c in found.copied
        )  # fmt: skip
        shown = len(rows) < found.num_copied
        caption = (
            f"Features with copies, {number(len(rows))} of {number(found.num_copied)}"
            if shown
            else (f"Features with copies, all {number(found.num_copied)}")
        )
        blocks.append(Table(caption, ("Feature", "Label", "Copies", "Their numbers"), rows))
    return blocks
