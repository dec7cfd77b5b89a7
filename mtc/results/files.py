"""What the files of a run's report are called and what they hold."""

from __future__ import annotations

from typing import NamedTuple

OVERVIEW = "overview"
PLOTS = {
    OVERVIEW: "quality, training, density, activations and samples at a glance",
    "prefix_fvu": "held-out FVU of each nested prefix, with 95 % intervals",
    "prefix_recovered": "loss recovered against zero ablation of each nested prefix, with 95 % intervals",
    "training": "training loss and batch FVU per prefix",
    "sparsity": "active features per token and dead features during training",
    "l0": "held-out tokens by their number of active features",
    "density": "features by density, per group",
    "fvu_by_position": "held-out FVU by position in the window, per prefix",
    "fvu_by_frequency": "held-out FVU by frequency of the token, per prefix",
    "max_activation": "features by strongest activation, per group",
    "samples": "features by number of samples, per group",
    "activation_vs_samples": "strongest activation of each feature against its number of samples",
}
"""Plots by name, each a PNG and an SVG file."""

LABEL_PLOT = "label_scores"
"""Plot of a run whose features a language model has labelled."""
LABEL_PLOTS = {LABEL_PLOT: "how often a judge that knows the labels calls contexts active, by activation"}


class ReportNames(NamedTuple):
    """File names of one report in its three forms; paths inside the report directory."""

    markdown: str
    html: str
    json: str


LAYERS_REPORT = ReportNames("layers_report.md", "layers_report.html", "layers_report.json")
"""The report of a run of several layers, which leads to those of the layers."""


def report_names(layer: int) -> ReportNames:
    stem = f"layer{layer}_analysis_report"
    return ReportNames(f"{stem}.md", f"{stem}.html", f"{stem}.json")


def plot_path(plot: str, layer: int) -> str:
    """Path of a plot inside the report directory, without its extension."""
    if plot == OVERVIEW:
        return f"layer{layer}_analysis_overview"
    return plot if plot == "activation_vs_samples" else f"plots/{plot}"


def report_files(layer: int, labelled: bool = False) -> dict[str, str]:
    """Every file of the report with what it holds, in the order in which the report lists them; `labelled` ones have a
    plot more."""
    names = report_names(layer)
    files = {
        names.markdown: "this report as text",
        names.html: "this report as one page without outside parts",
        names.json: "the same figures for programs; docs/analysis.schema.json describes it",
    }
    for plot, description in (PLOTS | (LABEL_PLOTS if labelled else {})).items():
        files |= {f"{plot_path(plot, layer)}.{kind}": description for kind in ("png", "svg")}
    return files
