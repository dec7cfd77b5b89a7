"""One report in all its forms, from one Analysis."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from mtc.report.html import render_html
from mtc.report.markdown import render_markdown
from mtc.report.sections import document
from mtc.results import LABEL_PLOTS, PLOTS, Analysis, plot_path, report_names


def write_report(analysis: Analysis, features: pa.Table, history: list[dict[str, Any]]) -> dict[str, bytes]:
    """The report's files by name; `features` is the table of all features, `history` has a dict per logged step.

    The same arguments give the same bytes.
    """
    # The service uses this package for its pages; it does without matplotlib.
    from mtc.report.plots import PlotData, render_plot

    layer = analysis.config.model.layer
    names = report_names(layer)
    content = document(analysis)
    plots = [*PLOTS, *(LABEL_PLOTS if analysis.labelling else ())]
    pictures = {plot: render_plot(plot, PlotData(analysis, features, history)) for plot in plots}
    paths = {plot: plot_path(plot, layer) for plot in plots}
    files = {
        names.markdown: render_markdown(content, {plot: f"{path}.png" for plot, path in paths.items()}).encode(),
        names.html: render_html(content, {plot: picture.svg for plot, picture in pictures.items()}).encode(),
        names.json: analysis.model_dump_json(indent=1).encode(),
    }
    for plot, picture in pictures.items():
        files |= {f"{paths[plot]}.png": picture.png, f"{paths[plot]}.svg": picture.svg.encode()}
    return files
