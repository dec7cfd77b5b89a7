"""Sections 9 to 11: what the rules say, what to change, and the files."""

from __future__ import annotations

from mtc.report.blocks import Block, Findings, Paragraph, Section, Table
from mtc.results import Analysis, number


def insights(analysis: Analysis) -> Section:
    """Section 10: every rule that could be measured, met or not."""
    return Section(
        "Insights",
        (
            Paragraph("Each rule holds a measured value against a threshold; a rule that is met has a recommendation."),
            Findings(analysis.insights, advice=False),
        ),
    )


def recommendations(analysis: Analysis) -> Section:
    """Section 11: what to change, for the rules that are met."""
    nothing = f"None of the {number(len(analysis.insights))} rules that could be measured is met."
    body: Block = (
        Findings(analysis.recommendations, advice=True) if analysis.recommendations else Paragraph(nothing)
    )  # fmt: skip
    return Section("Recommendations", (body,))


def files(analysis: Analysis) -> Section:
    """Section 12: the run's files."""
    rows = tuple((f.name, f.description) for f in analysis.files)
    return Section("Files generated", (Table("Files", ("File", "Content"), rows),))
