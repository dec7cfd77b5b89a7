"""Draw what made a language model's next token, in a run's features: its attribution graph, as a page to work with.

    python jobs/graph.py --run runs/latest --prompt "The capital of the United States is" --output graph
    python jobs/graph.py --run runs/latest --prompt "2 + 2 =" --target " 4" --coarse 192 --output graph

Writes graph.html, which needs nothing beside it, graph.svg, a drawing for documents, resolutions.svg, a plot of how
much each resolution of the dictionary explains, and graph.json, the graph itself.
Needs no cluster. Exit codes: 0 done, 1 failed while running, 2 unusable run, prompt or option, 130 interrupted.
"""

from __future__ import annotations

import argparse
import posixpath
import time

from jobs.command_line import add_options, failed, run_program
from mtc.config import ConfigError, RunConfig
from mtc.programs import described
from mtc.report.graph_page import graph_page
from mtc.report.graph_svg import graph_svg
from mtc.results import Graph, number, percent
from mtc.storage import (
    StorageError,
    check_writable,
    filesystem,
    open_run,
    output_path,
    prepare_environment,
    write_atomic,
)
from mtc.telemetry import configure, fail, say, set_run

FILES = ("graph.json", "graph.svg", "resolutions.svg", "graph.html")
TOP_FEATURES = 5
PROGRESS_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    try:
        configure()  # what is wrong with the environment is said first
        options = _parser().parse_args(argv)
        configure(options.verbose, options.log_format)
        prepare_environment()
        output = output_path(options.output)
        check_output(f"--output {options.output}", output)
        graph = make_graph(options)
        write_graph(graph, coarse_graph(graph, options), output)
        tell(graph, output)
    except Exception as error:
        return failed(error)
    except KeyboardInterrupt:
        fail("interrupted", "interrupted")
        return 130
    return 0


def check_output(what: str, output: str) -> None:
    """Raises StorageError if the files can't be written there."""
    check_writable(what, output)
    for name in FILES:
        fs, path = filesystem(posixpath.join(output, name))
        if fs.isdir(path):
            raise StorageError(f"{what}: {name} is a directory there; a file of that name is to be written")


def make_graph(options: argparse.Namespace) -> Graph:
    """The graph that the options ask for, with lines on how far it is."""
    run = open_run(options.run)
    set_run(run.run_id)
    check_options(options, run.config())
    say("loading", f"loading the language model and the transcoders of {run.url}")
    # Torch and transformers take 3 to 7 s; without them, help, a wrong option and a wrong run are told in 1.
    from mtc.circuits import ReplacementModel, attribute
    from mtc.devices import open_device

    model = ReplacementModel.load(run, open_device(options.device))
    layers = len(model.transcoders)
    say("attributing", f"tracing the prompt through {layers} transcoder{'s' if layers > 1 else ''}", layers=layers)
    last, told = time.monotonic(), -1

    def progress(done: int, of: int) -> None:
        nonlocal last, told
        if done != told and (done == of or time.monotonic() - last > PROGRESS_SECONDS):
            last, told = time.monotonic(), done
            then = ", then influence and scores" if done == of else ""
            say("progress", f"edges into {done:,} of {of:,} features{then}", done=done, of=of)

    limits = ("max_features", "node_share", "edge_share", "faithfulness")
    given = {name: value for name in limits if (value := getattr(options, name)) is not None}
    return attribute(model, options.prompt, options.target, options.prefix, tell=progress, **given)


def check_options(options: argparse.Namespace, config: RunConfig) -> None:
    """Raises ConfigError, in the words of mtc.circuits, for numbers that a graph of the run can't have."""
    for name in ("node_share", "edge_share"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"{name}={value}: above 0 and at most 1 is wanted")
    if options.max_features is not None and options.max_features < 1:
        raise ConfigError(f"max_features={options.max_features}: at least 1 is wanted")
    if options.faithfulness is not None and options.faithfulness < 0:
        raise ConfigError(f"faithfulness={options.faithfulness}: a number of features is wanted, 0 for none")
    shared = set.intersection(*(set(member.config.transcoder.prefixes) for member in config.members()))
    known = sorted(shared)
    if options.prefix is not None and options.prefix not in known:
        raise ConfigError(f"prefix={options.prefix} is not one of the nested dictionaries {known}")
    known = [prefix for prefix in known if options.prefix is None or prefix <= options.prefix]
    if options.coarse is not None and options.coarse not in known:
        raise ConfigError(f"coarse={options.coarse} is not one of the graph's nested dictionaries {known}")


def coarse_graph(graph: Graph, options: argparse.Namespace) -> Graph:
    """The graph at the resolution of `--coarse`, as it is without that."""
    if options.coarse is None:
        return graph
    from mtc.circuits import coarsen

    return coarsen(graph, options.coarse)


def write_graph(graph: Graph, coarse: Graph, output: str) -> None:
    """The files, each whole or not at all; `coarse` is what the drawing shows."""
    from mtc.report.graph_plot import resolutions  # with matplotlib, which takes half a second

    texts = (graph.model_dump_json(), graph_svg(coarse), resolutions(graph).svg, graph_page(graph))
    for name, text in zip(FILES, texts, strict=True):
        write_atomic(posixpath.join(output, name), text.encode())


def tell(graph: Graph, output: str) -> None:
    """What came out, in a few lines."""
    places = [posixpath.join(output, name) for name in FILES]
    nodes, edges = len(graph.nodes), len(graph.edges)
    say(
        "written",
        f"wrote {', '.join(places)}: {nodes:,} nodes, {edges:,} edges",
        files=places,
        nodes=nodes,
        edges=edges,
    )
    for score in graph.scores:
        said = f"prefix {score.prefix:,}: replacement {number(score.replacement)}, completeness "
        said += f"{number(score.completeness)}; errors hold {percent(1 - score.replacement)} of the influence, "
        said += f"{percent(score.special_errors)} at special tokens"
        if score.folded.features > score.features:
            said += f"; with {score.folded.features - score.features:,} later features folded in "
            said += f"{number(score.folded.replacement)}, {number(score.folded.completeness)}"
        say("scores", said, errors=1 - score.replacement, **score.model_dump())
    if without := graph.layers - len(graph.traced):
        said = (
            f"{without} of the model's {graph.layers} layers have no transcoder: all that their MLPs write is error; "
        )
        said += "a run of all layers has one for each (--model.layers all)"
        say("untraced", said, layers=without)
    if found := graph.faithfulness:
        said = (
            f"{found.features} features taken out of the real model one at a time: rank correlation of the change with "
        )
        said += f"what the graph foretells {number(found.spearman)}, of one sign {percent(found.same_sign)}"
        say("faithfulness", said, **found.model_dump(include={"features", "spearman", "same_sign"}))
    features = [node for node in graph.nodes if node.kind == "feature" and not node.target]
    for node in sorted(features, key=lambda node: -node.influence)[:TOP_FEATURES]:
        at = f"token {node.token} {graph.tokens[node.token]!r}"
        text = f": {node.text}" if node.text else ""
        said = f"feature {node.feature} of layer {node.layer} at {at}: influence {number(node.influence)}{text}"
        say("top_feature", said, **node.model_dump(include={"feature", "layer", "token", "influence", "text"}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="directory or URL of a finished run, or ROOT/latest")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text whose next token is explained")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="directory or URL for the files, old ones replaced"
    )
    parser.add_argument(
        "--target", action="append", metavar="TEXT",
        help="a next token to explain, with its space in front; several times for several (default: the most probable)",
    )  # fmt: skip
    parser.add_argument(
        "--prefix", type=int, metavar="N", help="size of a nested dictionary; by default all features are used"
    )
    parser.add_argument(
        "--coarse", type=int, metavar="N", help="draw graph.svg with later features folded into the first N that they "
        "refine; the page folds by itself",
    )  # fmt: skip
    parser.add_argument(
        "--max-features", type=int, metavar="N", help="features with edges of their own (default: 4096)"
    )
    parser.add_argument(
        "--node-share", type=float, metavar="X", help="share of the influence that nodes keep, above 0 (default: 0.8)"
    )
    parser.add_argument(
        "--edge-share", type=float, metavar="X", help="share of the influence that edges keep, above 0 (default: 0.98)"
    )
    parser.add_argument(
        "--faithfulness", type=int, metavar="N", help="take so many features out of the real model, one at a time, and "
        "compare with what the graph foretells",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute (default: cpu)")
    add_options(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
