"""The report's content: one function per section, each from the Analysis alone, as blocks (mtc.report.blocks)."""

from __future__ import annotations

from mtc.report.blocks import Document, with_badges
from mtc.report.sections.configuration import configuration
from mtc.report.sections.evaluation import evaluation
from mtc.report.sections.features import feature_cards, top_features
from mtc.report.sections.findings import files, insights, recommendations
from mtc.report.sections.labels import labels
from mtc.report.sections.nesting import nesting
from mtc.report.sections.probing import probing
from mtc.report.sections.provenance import captured, provenance, stamp
from mtc.report.sections.summary import summary
from mtc.report.sections.weights import weights
from mtc.results import Analysis, number

SECTIONS = (
    summary,
    configuration,
    evaluation,
    weights,
    top_features,
    feature_cards,
    nesting,
    probing,
    labels,
    insights,
    recommendations,
    files,
)


def document(analysis: Analysis) -> Document:
    """The report of one run."""
    model = analysis.config.model
    return Document(
        title=f"Matryoshka transcoder, {model.name}, layer {model.layer}",
        subtitle=f"Run {analysis.facts.run_id}: {number(analysis.summary.total_features)} features on layer "
        f"{model.layer} ({model.source} to {model.target}), {number(analysis.facts.trained_tokens)} trained tokens"
        f"{captured(analysis.facts)}. "
        "Numbers have four significant digits; the JSON file has all of them.",
        sections=with_badges(tuple(section(analysis) for section in SECTIONS), frozenset(analysis.massive_indices)),
        provenance=provenance(analysis),
        stamp=stamp(analysis),
    )
