"""An attribution graph as one HTML page that needs nothing outside itself, to be looked at and worked with.

The page holds the graph as JSON that cannot end its element, and a script that makes all of the page from it, as text.
A content security policy forbids the page to load anything and to run any other script. The service's page loads the
same scripts and styles as files.
"""

from __future__ import annotations

from markupsafe import Markup

from mtc.report.format import visible
from mtc.report.html import content_hash, environment, template_text
from mtc.results import Graph

GRAPH_SCRIPTS = ("graph_fold.js", "graph_layout.js", "graph_words.js", "graph.js")
"""In the order in which pages load them; then `mtcGraph.draw(graph, options)` draws a graph."""
GRAPH_STYLES = ("report.css", "graph.css")
_START = 'mtcGraph.draw(JSON.parse(document.getElementById("graph-data").textContent));'
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def graph_page(graph: Graph, feature_url: str | None = None) -> str:
    """The graph as a page; `feature_url` is where a feature's own page is, with {run}, {layer} and {feature} in it."""
    style = Markup("".join(map(template_text, GRAPH_STYLES)))
    script = Markup("\n".join([*map(template_text, GRAPH_SCRIPTS), _START]))
    prompt = visible("".join(graph.tokens))
    return (
        environment()
        .get_template("graph.html")
        .render(
            title=f"Attribution graph: {prompt[:80]}", subtitle=_subtitle(graph), style=style, script=script,
            style_hash=content_hash(style), script_hash=content_hash(script), data=Markup(script_json(graph)),
            feature_url=feature_url,
        )
    )  # fmt: skip


def script_json(graph: Graph) -> str:
    """The graph as JSON that can stand inside a script element: no text in it can end that."""
    return graph.model_dump_json().translate(_ESCAPES)


def _subtitle(graph: Graph) -> str:
    layers = f"{len(graph.traced)} of {graph.layers} layers have transcoders"
    run = f", run {graph.run_id}" if graph.run_id else ""
    return f"{graph.base_model}{run}; {layers}"
