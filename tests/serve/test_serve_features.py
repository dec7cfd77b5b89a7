"""What the service says of features and of the report, against the files of the run."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from report_example import HOSTILE, make_config
from report_pages import without_links
from serve_local import make_analysed_run, make_run, served

from mtc.client import Client
from mtc.report.format import visible
from mtc.results import FeatureLabel, Interval, LabelScore
from mtc.storage import RunDirectory, labels_to_parquet
from serve.service.feature_table import AnalysisFiles, FeatureTable, Filters
from tests.labels.planted import write_planted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDirectory]:
    root = tmp_path_factory.mktemp("runs")
    return [make_analysed_run(root / "one"), make_run(root / "bare", 5)]


@pytest.fixture(scope="module")
def client(runs: list[RunDirectory]) -> Iterator[httpx.Client]:
    with served(*runs) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def rows(runs: list[RunDirectory]) -> list[dict[str, Any]]:
    return pq.read_table(Path(runs[0].url, "features.parquet")).to_pylist()


def test_features_are_the_rows_of_the_file(client: httpx.Client, rows: list[dict[str, Any]]) -> None:
    answer = client.get("/features").json()
    assert (answer["run_id"], answer["total"], answer["cursor"]) == ("one", 10, None)
    for found, row in zip(answer["features"], rows, strict=True):
        for name in ("feature", "group", "density", "count", "max_activation", "mean_activation", "decoder_norm",
                     "massive", "copy_of"):  # fmt: skip
            assert found[name] == row[name]
        assert found["top_tokens"] == [t["token"] for t in row["top_tokens"]]
        assert found["label"] == row["label"]
        assert found["parent"] == (row["parent"] or {"feature": None})["feature"]
        assert found["children"] == len(row["children"])
    for row in rows:
        found = client.get(f"/features/{row['feature']}").json()["feature"]
        assert set(found) == set(row)
        for name, value in row.items():
            assert found[name] == (None if isinstance(value, float) and math.isnan(value) else value), name


FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"group": 1}, lambda row: row["group"] == 1),
    ({"min_density": 0.1}, lambda row: row["density"] >= 0.1),
    ({"max_density": 0}, lambda row: row["density"] == 0),
    ({"min_density": 0.05, "max_density": 0.1, "group": 1}, lambda row: row["group"] and 0.05 <= row["density"] <= 0.1),
    ({"token": " | "}, lambda row: any(t["token"].strip() == "|" for t in row["top_tokens"])),
    ({"token": HOSTILE[3].upper()}, lambda row: any(t["token"] == HOSTILE[3] for t in row["top_tokens"])),
    ({"token": "nowhere"}, lambda row: False),
    ({"massive": True}, lambda row: row["feature"] == 8),
    ({"massive": False, "group": 1}, lambda row: row["group"] == 1 and row["feature"] != 8),
    ({"feature": [7, 2, 2, 99]}, lambda row: row["feature"] in (2, 7)),
]  # fmt: skip


def test_features_are_found_by_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[RunDirectory]) -> None:
    """By the words on which they fire before those around, by stems, by labels; never by the query's own syntax."""
    run = write_planted(tmp_path / "run", [["apple"], ["banana"], ["cherry"], ["apple", "banana"], ["damson"]])
    analysis = RunDirectory(runs[0].url).read("analysis.json")
    monkeypatch.setenv("MTC_CACHE", str(tmp_path / "cache"))
    named = [label_row(4, "running for office"), label_row(2, None)]

    def table(labels: bytes | None) -> FeatureTable:
        files = (run.read("features.parquet"), run.read("examples.parquet"), analysis)
        return FeatureTable("one", f"state {labels is None}", AnalysisFiles(*files, labels))

    plain, labelled = table(None), table(labels_to_parquet(named))

    def find(query: str, own: FeatureTable = plain, **more: Any) -> list[int]:
        rows, total, _ = own.page(Filters(query=query, sort="relevance", **more), 50, None)
        assert total == len(rows)
        return [row["feature"] for row in rows]

    # All words stand around all peaks in such a text, so that only the peaks tell.
    assert find("apple") == [0, 3] and find("APPLES") == [0, 3] and find("cherry") == [2]
    assert sorted(find("apple cherry")) == [0, 2, 3]
    assert find("apple", descending=True) == [3, 0] and find("apple", features=(3, 4)) == [3]
    assert find("running") == [] and find("run", labelled) == find("offices", labelled) == [4]
    for query in ('"', "apple OR banana*", "NEAR(apple banana)", "label:apple", "'; drop table features", "- -", "\0"):
        assert set(find(query)) <= {0, 1, 3}
    with ThreadPoolExecutor(4) as pool:
        assert all(found == [0, 3] for found in pool.map(find, ["apple"] * 40))
    assert len(list((tmp_path / "cache" / "search").glob("*.sqlite"))) == 2, "one for each state, made once"


def test_a_query_over_http(client: httpx.Client) -> None:
    found = client.get("/features", params={"query": "script alert", "limit": 2}).json()
    everything = client.get("/features", params={"query": "script alert"}).json()
    assert found["total"] == everything["total"] > 0
    after = client.get("/features", params={"query": "script alert", "limit": 2, "cursor": found["cursor"] or ""})
    assert found["total"] <= 2 or after.json()["features"] == everything["features"][2:4]
    assert client.get("/features", params={"query": "nowhereatall"}).json()["total"] == 0
    refused = client.get("/features", params={"sort": "relevance"})
    assert refused.status_code == 422 and "query is wanted" in refused.text


def test_a_language_models_labels_are_served_with_their_scores(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    run = make_analysed_run(tmp_path / "labelled")
    label = "<b>what</b> it does"
    run.write("labels.parquet", labels_to_parquet([label_row(1, label), label_row(3, None)]))
    run.publish()
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        by_feature = {row["feature"]: row for row in client.get("/features").json()["features"]}
        told = {j: (row["label"], row["label_by"], row["detection"]) for j, row in by_feature.items()}
        assert told[1] == (label, "a-model", 0.75) and told[3] == (rows[3]["label"], "rules", 0.5)
        assert told[0] == (rows[0]["label"], "rules", None) and told[2] == (None, None, None)
        one = client.get("/features/1").json()
        assert one["feature"]["label"] == label and one["labels"]["scores"][0]["score"]["value"] == 0.5
        assert client.get("/features/0").json()["labels"] is None
        page = client.get("/ui/feature/1", headers={"Accept": "text/html"}).text
        assert "&lt;b&gt;what&lt;/b&gt; it does" in page and label not in page and "detection 0.75" in page
        shown = unescape(re.sub("</?span[^>]*>", "", page))
        assert rows[1]["label"] is None or visible(rows[1]["label"]) in shown, "and what rules say"
        listed = client.get("/ui/features", headers={"Accept": "text/html"}).text
        assert "&lt;b&gt;what&lt;/b&gt;" in listed and ">Detection<" in listed
        for form in ("topk", "csr"):
            asked = {"inputs": ["Hello, you!", "x"], "include": ["label"], "top_k": 64, "return": form}
            answer = client.post("/encode", json=asked).json()
            for result in answer["results"]:
                active = (
                    result["csr"]["indices"] if form == "csr"
                    else [each["feature_index"] for token in result["features"] for each in token]
                )  # fmt: skip
                assert active and result["labels"] == {str(j): told[j][0] for j in sorted(set(active))}
        assert "labels" not in client.post("/encode", json={"inputs": "x"}).json()["results"][0]
        with Client(url) as own:
            found = own.encode("Hello, you!", include=["label"], top_k=64).inputs[0]
            assert found.labels == {int(j): told[int(j)][0] for j in set(found.indices.tolist())}
            assert own.encode("x").inputs[0].labels is None
    bare = make_run(tmp_path / "bare", 5)
    with served(bare) as url, httpx.Client(base_url=url, timeout=60) as client:
        refused = client.post("/encode", json={"inputs": "x", "include": ["label"]})
        assert refused.status_code == 404 and refused.json()["error_type"] == "not_analysed"


def label_row(feature: int, label: str | None) -> FeatureLabel:
    """A feature's label, with which detection is 0.75 for the model's and 0.5 for that of rules."""
    scores = tuple(
        LabelScore(
            labels=kind, test="detection", score=Interval(value=value, low=0.2, high=0.9), said_yes=0.5, contexts=20
        )
        for kind, value in (("machine", 0.5), ("model", 0.75)) if kind == "machine" or label is not None
    )  # fmt: skip
    return FeatureLabel(
        feature=feature, label=label, reason=None if label else "refused", machine_label="'x' (100 %)",
        first_label=None, model="a-model", prompts="0", time=None, prompt_tokens=1, answer_tokens=1, scores=scores,
        not_scored=None,
    )  # fmt: skip


@pytest.mark.parametrize(("filters", "passes"), FILTERS, ids=[str(filters)[:40] for filters, _ in FILTERS])
def test_filters(client: httpx.Client, rows: list[dict[str, Any]], filters: dict[str, Any], passes: Any) -> None:
    answer = client.get("/features", params=filters).json()
    expected = [row["feature"] for row in rows if passes(row)]
    assert [row["feature"] for row in answer["features"]] == expected
    assert answer["total"] == len(expected)


def test_text_in_a_context(client: httpx.Client, runs: list[RunDirectory]) -> None:
    examples = pq.read_table(Path(runs[0].url, "examples.parquet")).to_pylist()
    for text in ("THE<script>", "`code` of|", "the", "alert(1)</script> of", "the of", "no such"):
        expected = sorted(
            {e["feature"] for e in examples if text.casefold() in "".join(e["context_tokens"]).casefold()}
        )
        found = client.get("/features", params={"text": text}).json()["features"]
        assert [row["feature"] for row in found] == expected, text


@pytest.mark.parametrize("sort", ["feature", "density", "count", "max_activation", "mean_activation", "decoder_norm"])
@pytest.mark.parametrize("descending", [False, True])
def test_pages_follow_each_other(client: httpx.Client, rows: list[dict[str, Any]], sort: str, descending: bool) -> None:
    options = {"sort": sort, "order": "descending" if descending else "ascending", "limit": 3}
    found, cursor = [], None
    while True:
        page = client.get("/features", params=options | ({"cursor": cursor} if cursor else {})).json()
        assert page["total"] == 10
        found += [row["feature"] for row in page["features"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    sign = -1 if descending else 1
    assert found == [r["feature"] for r in sorted(rows, key=lambda r: (sign * r[sort], r["feature"]))]  # equal by index


def test_cursor_of_other_filters_is_refused(client: httpx.Client) -> None:
    cursor = client.get("/features", params={"limit": 3}).json()["cursor"]
    assert client.get("/features", params={"limit": 5, "cursor": cursor}).status_code == 200
    for other in ({"group": 0}, {"sort": "count"}, {"order": "descending"}, {"token": "a"}):
        answer = client.get("/features", params={"cursor": cursor} | other)
        assert (answer.status_code, answer.json()["error_type"]) == (404, "unknown_cursor")


def test_examples_are_those_of_the_file(client: httpx.Client, runs: list[RunDirectory]) -> None:
    examples = pq.read_table(Path(runs[0].url, "examples.parquet")).to_pylist()
    names = {
        "token_ids": "context_ids",
        "tokens": "context_tokens",
        "activations": "context_activations",
        "peak": "peak_index",
    }
    for feature in range(10):
        own = [e for e in examples if e["feature"] == feature]
        own.sort(key=lambda e: (e["kind"] != "top", e["rank"]))
        for kind in (None, "top", "sample"):
            wanted = [e for e in own if kind in (None, e["kind"])]
            found = client.get(f"/features/{feature}/examples", params={"kind": kind} if kind else {}).json()
            assert (found["feature"], found["total"]) == (feature, len(wanted))
            for answer, example in zip(found["examples"], wanted, strict=True):
                for name, value in answer.items():
                    expected = example[names.get(name, name)]
                    assert value == (None if isinstance(expected, float) and math.isnan(expected) else expected), name
    part = client.get("/features/3/examples", params={"offset": 7, "limit": 2}).json()
    assert [(e["kind"], e["rank"]) for e in part["examples"]] == [("sample", 0), ("sample", 1)]
    assert part["total"] == 9


def test_all_of_one_feature(client: httpx.Client) -> None:
    """Splits and absorption are those of `report_example.make_nesting`."""
    one = client.get("/features/1").json()
    assert [(s["feature"], s["children"], s["coverage"], s["overlap"]) for s in one["splits"]] == [
        (1, [6, 7], 0.75, 0.0625)
    ]
    assert one["feature"]["children"] == [6, 7]
    assert client.get("/features/7").json()["splits"] == one["splits"]
    for feature in (0, 8):
        (pair,) = client.get(f"/features/{feature}").json()["absorption"]
        assert (pair["parent"], pair["child"], pair["expected"], pair["absorbed"]) == (0, 8, 20, 15)
    assert client.get("/features/3").json()["absorption"] == client.get("/features/3").json()["splits"] == []
    assert len(one["histogram_edges"]) == len(one["feature"]["histogram"]) + 1


def test_runs_without_or_with_another_analysis(client: httpx.Client, tmp_path: Path) -> None:
    for path in ("/features", "/features/3", "/features/3/examples"):
        answer = client.get(path, params={"model": "bare"})
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_analysed")
        assert client.get(path, params={"model": "nothing"}).json()["error_type"] == "unknown_model"
    run = make_analysed_run(tmp_path / "old")
    run.write("analysis.json", json.dumps({"format_version": "1"}))
    run.publish()
    changed = make_analysed_run(tmp_path / "changed")
    Path(changed.url, "features.parquet").write_bytes(b"something else")
    with served(run, changed) as url:
        answer = httpx.get(f"{url}/features")
        assert (answer.status_code, answer.json()["error_type"]) == (409, "run_unusable")
        assert "analyse the run again" in answer.json()["error"]
        answer = httpx.get(f"{url}/features", params={"model": "changed"})
        assert (answer.status_code, answer.json()["error_type"]) == (409, "run_unusable")
        assert "features.parquet is not what the manifest says" in answer.json()["error"]
        assert httpx.post(f"{url}/encode", json={"inputs": "a"}, timeout=60).status_code == 200


def test_report_by_accept(client: httpx.Client, runs: list[RunDirectory]) -> None:
    directory = Path(runs[0].url, "report")
    for accept, name, kind in [
        ("*/*", "md", "text/markdown; charset=utf-8"), ("text/markdown", "md", "text/markdown; charset=utf-8"),
        ("text/html,*/*;q=0.1", "html", "text/html; charset=utf-8"), ("application/json", "json", "application/json"),
        ("text/*;q=0.5, application/json;q=0.4", "md", "text/markdown; charset=utf-8"),
    ]:  # fmt: skip
        answer = client.get("/report", headers={"Accept": accept})
        # httpx takes gzip, and unpacks it.
        assert answer.headers["content-encoding"] == "gzip"
        assert without_links(answer.content) == (directory / f"layer1_analysis_report.{name}").read_bytes(), accept
        assert (answer.headers["content-type"], answer.headers["vary"]) == (kind, "Accept, Accept-Encoding")
        for encoding in ("identity", "gzip;q=0", "br, gzip; q=0.0"):
            plain = client.get("/report", headers={"Accept": accept, "Accept-Encoding": encoding})
            assert "content-encoding" not in plain.headers
            assert plain.content == answer.content
        again = client.get("/report", headers={"Accept": accept, "If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/report", headers={"Accept": "image/png"}).status_code == 406
    for file in directory.rglob("*"):
        if file.is_file():
            answer = client.get(f"/report/files/{file.relative_to(directory)}")
            assert answer.content == file.read_bytes()
    assert client.get("/report", params={"model": "bare"}).text == "# Report\n"


def test_the_report_leads_to_features_and_back(client: httpx.Client, rows: list[dict[str, Any]]) -> None:
    page = client.get("/report", headers={"Accept": "text/html"}).text
    assert page.count('<a href="/ui/features?model=one">Feature browser</a>') == 1
    found = re.findall(r'<a data-feature="(\d+)" href="/ui/feature/(\d+)\?model=one">([^<]*)</a>', page)
    shown = [int(feature) for feature in re.findall(r'<div id="feature-(\d+)" class="inside">', page)]
    cards = [int(feature) for feature, _, text in found if text == f"Feature {feature} in the feature browser"]
    assert cards == shown != []
    # Of the others, which have no card in the report, every number that is said leads there.
    assert "data-feature" not in re.sub(r'<a data-feature="\d+" href', "", page)
    assert all(feature == target and text.endswith(("browser", feature)) for feature, target, text in found)
    assert client.get("/ui/feature/3", params={"model": "one"}).status_code == 200


def test_info_and_runs(client: httpx.Client, runs: list[RunDirectory]) -> None:
    info, config = client.get("/info").json(), make_config()
    assert info["model"] == {
        "run_id": "one", "sha256": runs[0].manifest().files["transcoder.safetensors"].sha256,
        "base_model": config.model.name, "layer": 1, "source": "resid_mid", "target": "mlp_out", "d_source": 32,
        "d_target": 32, "num_features": 10, "k": 4, "prefixes": [4, 10],
    }  # fmt: skip
    assert [(run["run_id"], run["state"]) for run in client.get("/runs").json()["runs"]] == [
        ("one", "current"), ("bare", "loaded")
    ]  # fmt: skip


def test_the_http_side_needs_no_torch() -> None:
    """Nor who reads an analysis or renders pages; starting the process would take seconds longer."""
    code = "import sys, mtc.report.html, serve.http; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
