"""jobs/label.py: a run labelled from end to end, gone on with, and how it ends when it can't be."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from serve_local import make_analysed_run, make_layers_run

from jobs import label as job
from mtc.labels import keep_labels
from mtc.report import write_report
from mtc.results import report_names
from mtc.storage import RunDirectory, load_analysis, open_run, read_labels
from tests.labels.rules_endpoint import RulesEndpoint, kind_of

KEY = "sk-a-secret-that-nobody-may-see"
pytestmark = pytest.mark.usefixtures("logs_as_before")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_analysed_run(tmp_path / "runs" / "one")


@pytest.fixture
def server() -> Iterator[RulesEndpoint]:
    with RulesEndpoint() as server:
        yield server


def options(run: RunDirectory, server: RulesEndpoint, *more: str) -> list[str]:
    asked = ["--run", run.url, "--endpoint", server.url, "--model", "marked-words", "--log-format", "json"]
    return [*asked, "--attempts", "1", *more]


def events(text: str) -> dict[str, dict[str, Any]]:
    return {line["event"]: line for line in map(json.loads, text.splitlines())}


def test_a_run_is_labelled_and_stays_whole(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    before = load_analysis(run)
    assert job.main(options(run, server)) == 0
    said = capsys.readouterr()
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert KEY not in said.out + said.err and not any(KEY.encode() in f.read_bytes() for f in _files(run))
    open_run(run.url)  # every digest fits
    rows = read_labels(run)
    assert [row.feature for row in rows] == [0, 1, 3, 4, 6, 7, 8]
    analysis = load_analysis(run)
    labelling = analysis.labelling
    assert labelling is not None and labelling.labelled == len(rows) and labelling.scored > 0
    assert labelling.requests == len(server.asked)
    assert events(said.out)["labelled"]["labelled"] == len(rows)
    names = {row.feature: row.label for row in rows}
    assert all(top.label == names.get(top.feature) for top in analysis.top_features)
    assert analysis.model_copy(update={"labelling": None}).summary == before.summary
    report = {name: run.read(f"report/{name}") for name in report_names(1)[:2]}
    listed = {file.name for file in analysis.files}
    assert {"labels.parquet", "plots/label_scores.png"} <= listed and run.exists("report/plots/label_scores.svg")
    for text in report.values():
        assert rows[0].label is not None and rows[0].label.encode() in text and b"<script>alert" not in text
    assert job.main(options(run, server)) == 0
    assert len(server.asked) == labelling.requests, "nothing is asked twice"
    assert load_analysis(run).labelling == labelling


def test_hostile_labels_are_shown_harmlessly(run: RunDirectory, server: RulesEndpoint) -> None:
    assert job.main(options(run, server, "--model", "hostile", "--judge", "marked-words")) == 0
    rows = read_labels(run)
    assert rows[0].label == "<script>alert(1)</script> | `x` [y](javascript:z) ![](http://w)"
    markdown, html = (run.read(f"report/{name}").decode() for name in report_names(1)[:2])
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>" not in markdown and "](javascript:" not in markdown.replace("\\]", "")


def test_a_dry_run_asks_and_writes_nothing(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in _files(run)}
    assert job.main(options(run, server, "--dry-run", "--simulation")) == 0
    cost = events(capsys.readouterr().out)["cost"]
    assert cost["features"] == cost["scored"] == 7 and cost["questions"] > 7 and cost["prompt_tokens"] > 1000
    assert not server.asked and {file: file.read_bytes() for file in _files(run)} == before


def test_a_limit_ends_it_with_what_there_is(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(options(run, server, "--max-tokens", "3000")) == 1
    said = capsys.readouterr()
    assert "--max-tokens 3000 does not allow for more" in events(said.err)["unfinished"]["message"]
    found = load_analysis(run).labelling
    assert found is not None and not found.finished and 0 < found.labelled < 7
    assert b"not finished" in run.read(f"report/{report_names(1).markdown}")
    assert job.main(options(run, server)) == 0
    found = load_analysis(run).labelling
    assert found is not None and found.finished and found.labelled == 7 and max(server.seen.values()) == 1


def test_one_layer_of_several_is_labelled_and_the_whole_run_stays_whole(
    tmp_path: Path, server: RulesEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_layers_run(tmp_path / "runs" / "two")
    assert job.main(options(whole, server, "--layer", "2")) == 0
    open_run(whole.url)
    assert not any("labelling" in name for name in open_run(whole.url).manifest().files), (
        "what it worked with is left out"
    )
    assert whole.exists("layer2/labels.parquet") and not whole.exists("layer0/labels.parquet")
    asked = len(server.asked)
    assert job.main(options(RunDirectory(whole.location("layer2")), server)) == 0
    assert len(server.asked) == asked, "by its own name it is the same"
    assert job.main(options(whole, server, "--scored", "0")) == 0
    assert whole.exists("layer0/labels.parquet")
    assert job.main(options(whole, server, "--layer", "5")) == 2
    assert "--layer 5: the run has 0, 2" in capsys.readouterr().err


def test_a_later_analysis_keeps_the_labels(run: RunDirectory, server: RulesEndpoint) -> None:
    fresh = load_analysis(run)
    assert keep_labels(run, fresh) == fresh
    assert job.main(options(run, server)) == 0
    later = fresh.model_copy(update={"facts": fresh.facts.model_copy(update={"analysed": "2031-01-01T00:00:00+00:00"})})
    kept = keep_labels(run, later)
    labelled = load_analysis(run)
    assert kept.labelling == labelled.labelling and kept.top_features == labelled.top_features
    text = write_report(kept, pq.read_table(run.location("features.parquet")), [])[report_names(1).markdown].decode()
    assert "on the examples of an earlier analysis" in text
    assert "earlier analysis" not in run.read(f"report/{report_names(1).markdown}").decode()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prefix", "5"], "--prefix 5 is not one of the nested dictionaries [4, 10]"),
        (["--concurrency", "0"], "--concurrency 0: above 0 is wanted"),
        (["--max-tokens", "-1"], "--max-tokens -1: above 0 is wanted"),
        (["--thinking-tokens", "-1"], "--thinking-tokens -1: 0 or more is wanted"),
        (["--endpoint", "localhost:8000"], "http:// or https:// is wanted"),
        (["--model", "unknown-model"], "answers 404: no <b>unknown-model</b>"),
        (["--model", "forbidden"], "answers 401: no <b>forbidden</b>; is the key in the environment?"),
    ],
)
def test_what_can_not_be_is_said(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert job.main(options(run, server, *more)) == 2
    assert words in json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert not run.exists("labels.parquet") and not run.exists("writer.json")


def test_one_that_is_ended_goes_on(run: RunDirectory, server: RulesEndpoint) -> None:
    """SIGTERM and SIGKILL amid slow answers; then all is there, and hardly anything was asked twice."""
    server.delay = 0.05
    for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = len(server.asked)
        command = [sys.executable, "-m", "jobs.label", *options(run, server, "--concurrency", "2")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        server.wait_for(before + 5)
        process.send_signal(number)
        assert process.wait(60) == code
        assert not run.exists("labels.parquet")
    server.delay = 0
    assert job.main(options(run, server)) == 0
    twice = sum(count - 1 for count in server.seen.values())
    assert twice <= 4, "what two at a time had in flight, twice"
    assert {kind_of(prompt) for prompt in server.seen} == {"explain", "detect", "fuzz"}


def _files(run: RunDirectory) -> list[Path]:
    return [path for path in Path(run.url).rglob("*") if path.is_file()]
