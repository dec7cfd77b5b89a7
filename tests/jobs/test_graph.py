"""jobs/graph.py: a tiny run's graph from end to end, and how it ends when it can't be made."""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from serve_local import make_analysed_run

import mtc.circuits
from jobs import graph as job
from mtc.circuits import coarsen
from mtc.report.graph_page import graph_page
from mtc.report.graph_plot import resolutions
from mtc.report.graph_svg import graph_svg
from mtc.results import Graph

PROMPT = "Hello, <you>!"

pytestmark = pytest.mark.usefixtures("logs_as_before")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one").url


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_graph_of_a_tiny_run(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "graph"
    options = ["--run", run, "--prompt", PROMPT, "--output", str(output), "--log-format", "json"]
    assert job.main([*options, "--node-share", "1", "--edge-share", "1", "--faithfulness", "3"]) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted(job.FILES)
    graph = Graph.model_validate_json((output / "graph.json").read_bytes())
    assert "".join(graph.tokens[1:]) == PROMPT and graph.run_id == "one"
    features = [node for node in graph.nodes if node.kind == "feature"]
    labels = pq.read_table(Path(run, "features.parquet"))["label"].to_pylist()
    assert [node.text for node in features] == [labels[node.feature or 0] for node in features]
    assert features and graph.traced == (1,)
    assert (output / "graph.html").read_text() == graph_page(graph)
    drawing = ElementTree.parse(output / "graph.svg").getroot()
    assert PROMPT in (drawing[0].text or "")
    assert (output / "resolutions.svg").read_text() == resolutions(graph).svg

    said = lines(capsys.readouterr().out)
    events = [line["event"] for line in said]
    kinds = ["loading", "attributing", "progress", "written", "scores", "untraced", "faithfulness", "top_feature"]
    assert list(dict.fromkeys(events)) == kinds and {line["run_id"] for line in said} == {"one"}
    assert [line["prefix"] for line in said if line["event"] == "scores"] == [4, 10]
    scores = next(line for line in reversed(said) if line["event"] == "scores")
    assert scores["errors"] == pytest.approx(1 - graph.scores[-1].replacement)
    top = [line for line in said if line["event"] == "top_feature"]
    assert [line["influence"] for line in top] == sorted((n.influence for n in features), reverse=True)[:5]
    assert next(line for line in said if line["event"] == "written")["files"][-1] == str(output / "graph.html")

    assert job.main([*options, "--target", "a", "--target", "b", "--prefix", "4", "--max-features", "3"]) == 0
    graph = Graph.model_validate_json((output / "graph.json").read_bytes())  # in place of the first
    assert [node.text for node in graph.nodes if node.target] == ["a", "b"]
    assert (graph.prefix, graph.read) == (4, 3)

    assert job.main([*options, "--coarse", "4"]) == 0
    graph = Graph.model_validate_json((output / "graph.json").read_bytes())
    assert graph.coarse is None and graph.prefix == 10
    assert (output / "graph.svg").read_text() == graph_svg(coarsen(graph, 4)) != graph_svg(graph)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefix", "5"], "error: prefix=5 is not one of the nested dictionaries [4, 10]"),
        (["--coarse", "5"], "error: coarse=5 is not one of the graph's nested dictionaries [4, 10]"),
        (["--prefix", "4", "--coarse", "10"], "error: coarse=10 is not one of the graph's nested dictionaries [4]"),
        (["--prompt", ""], "error: prompt has no token but special ones"),
        (["--target", "Hello"], "error: target 'Hello' is 5 tokens"),
        (["--node-share", "0"], "error: node_share=0.0: above 0 and at most 1 is wanted"),
        (["--max-features", "0"], "error: max_features=0"),
        (["--run", "nowhere"], "error: "),
    ],
)
def test_what_cannot_be_drawn_is_told_in_the_last_line_and_nothing_is_written(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    output = tmp_path / "graph"
    assert job.main(["--run", run, "--prompt", PROMPT, "--output", str(output), *options]) == 2
    out, error = capsys.readouterr()
    assert error.splitlines()[-1].startswith(message) and "Traceback" not in error
    assert ("loading" in out) == ("--prompt" in options or "--target" in options), "all else is told before"
    assert not output.exists()


def test_an_analysis_of_another_version_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_analysed_run(tmp_path / "old")
    run.write("analysis.json", json.dumps(json.loads(run.read("analysis.json")) | {"format_version": 3}))
    run.publish()
    assert job.main(["--run", run.url, "--prompt", PROMPT, "--output", str(tmp_path / "graph")]) == 2
    assert "format_version 3 is unknown" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "make_graph", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "graph.svg").mkdir(parents=True)
    for output, reason in (("file", "is there and is no directory"), ("taken", "graph.svg is a directory there")):
        assert job.main(["--run", run, "--prompt", PROMPT, "--output", str(tmp_path / output)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"error: --output {tmp_path / output}: ") and reason in last


def test_files_appear_whole_or_not_at_all(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", run, "--prompt", PROMPT, "--output", str(tmp_path)]
    seen = list[set[str]]()
    replace = os.replace

    def interrupt(source: str, target: str) -> None:
        seen.append({path.name for path in tmp_path.iterdir() if not path.name.endswith(".tmp")})
        if target.endswith("graph.svg"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    assert job.main(options) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert seen == [set(), {"graph.json"}] and [path.name for path in tmp_path.iterdir()] == ["graph.json"]


def test_a_fault_of_the_package_shows_where(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(mtc.circuits, "attribute", fail)
    assert job.main(["--run", run, "--prompt", PROMPT, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "failed: ZeroDivisionError: by nothing" and "Traceback" in error
