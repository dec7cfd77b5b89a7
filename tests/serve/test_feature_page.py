"""A feature's page and the page of doubtful ones, against what loops over the run's files find."""

import html
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_local import make_analysed_run, served

from mtc.results import FeatureLabel, Interval, LabelScore
from mtc.storage import RunDirectory, labels_to_parquet

AROUND = 4
"""Tokens that the contexts of the examples get on each side."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The analysed run with wider contexts, 60 random ones in which features fire at random, copies and scores."""
    root = tmp_path_factory.mktemp("runs")
    run = make_analysed_run(root / "one")
    random = np.random.default_rng(5)
    features = rows_of(run, "features")
    vocabulary = sorted({t["token_id"] for row in features for t in row["top_tokens"]})
    contexts = []
    for i in range(60):
        fires = random.random((8, 10)) < np.where(np.arange(10) == 9, 0, 0.04)
        fires[:, 6] |= fires[:, 1] & (random.random(8) < 0.8)  # a child fires with its parent
        token, feature = np.nonzero(fires)
        contexts.append({
            "window_id": i, "document_id": f"document{i}", "position": 0 if i % 2 else 20,
            "context_ids": random.choice([*vocabulary, 99, 98, 97], 8).tolist(), "context_tokens": [f"t{i}"] * 8,
            "feature": feature.tolist(), "token": token.tolist(), "activation": random.random(len(token)).tolist(),
        })  # fmt: skip
    write(run, "contexts", contexts)
    for row in features:
        row["copy_of"] = {7: 6, 5: 2}.get(row["feature"])
        if row["feature"] in (4, 6):
            row["top_tokens"][0]["count"] = row["samples"]
    write(run, "features", features)
    examples = rows_of(run, "examples")
    for row in examples:
        for name, value in (("context_ids", 0), ("context_tokens", "far"), ("context_activations", 0.0)):
            row[name] = [value] * AROUND + row[name] + [value] * AROUND
        row["peak_index"] += AROUND
    write(run, "examples", examples)
    run.write("labels.parquet", labels_to_parquet([label_of(i, round(0.4 + i / 20, 2)) for i in range(8)]))
    run.publish()
    return run


@pytest.fixture(scope="module")
def client(run: RunDirectory) -> Iterator[httpx.Client]:
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def rows_of(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Path(run.url, f"{name}.parquet")).to_pylist()
    return rows


def write(run: RunDirectory, name: str, rows: list[dict[str, Any]]) -> None:
    schema, sink = pq.read_schema(Path(run.url, f"{name}.parquet")), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    run.write(f"{name}.parquet", sink.getvalue())


def label_of(feature: int, score: float) -> FeatureLabel:
    test = LabelScore(
        labels="model", test="detection", score=Interval(value=score, low=0, high=1), said_yes=0.5, contexts=20
    )
    return FeatureLabel(
        feature=feature, label=f"named {feature}", reason=None, machine_label=None, first_label=None, model="m",
        prompts="1", time=None, prompt_tokens=1, answer_tokens=1, scores=(test,) if feature != 2 else (),
        not_scored=None,
    )  # fmt: skip


def label_in(client: httpx.Client, feature: int) -> str | None:
    label: str | None = client.get(f"/features/{feature}").json()["feature"]["label"]
    return label


def part(page: str, title: str) -> str:
    """What stands under a heading, up to the next one; nothing without it."""
    found = re.search(rf"<h[23][^>]*>{re.escape(title)}.*?</h[23]>(.*?)(<h[23]|</article>)", page, re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("feature", range(10))
def test_what_fires_together(client: httpx.Client, run: RunDirectory, feature: int) -> None:
    fires = np.zeros((10, 60 * 8))
    for i, row in enumerate(rows_of(run, "contexts")):
        for each, token in zip(row["feature"], row["token"], strict=True):
            fires[each, 8 * i + token] = 1
    expected = []
    for other in range(10):
        both = int((fires[feature] * fires[other]).sum())
        if other != feature and both >= 3:
            lift = fires[feature] @ fires[other] / 480 / (fires[feature].mean() * fires[other].mean())
            expected.append((np.corrcoef(fires[feature], fires[other])[0, 1], other, both, lift))
    expected.sort(key=lambda one: -one[0])
    shown = part(client.get(f"/ui/feature/{feature}").text, "Fires together with")
    rows = re.findall(r"<tr><th.*?>(\d+)</a>.*?</th><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)<", shown)
    assert [int(row[0]) for row in rows] == [one[1] for one in expected]
    for row, (correlation, _, both, lift) in zip(rows, expected, strict=True):
        assert [float(value) for value in row[1:]] == pytest.approx([both, lift, correlation], rel=1e-3)
    assert feature not in (1, 6) or expected
    answer = client.get(f"/features/{feature}/surroundings").json()
    assert (answer["feature"], answer["contexts"], answer["tokens"]) == (feature, 60, 480)
    for found, (correlation, other, both, lift) in zip(answer["together"], expected, strict=True):
        assert (found["feature"], found["shared"], found["label"]) == (other, both, label_in(client, other))
        assert (found["lift"], found["correlation"]) == pytest.approx((lift, correlation))


@pytest.mark.parametrize("feature", range(10))
def test_near_misses(client: httpx.Client, run: RunDirectory, feature: int) -> None:
    features, contexts = rows_of(run, "features"), rows_of(run, "contexts")
    own = features[feature]
    related = {n["feature"] for n in own["neighbours"] if n["cosine"] > 0} | set(own["children"])
    if own["parent"]:
        related |= {own["parent"]["feature"], *features[own["parent"]["feature"]]["children"]} - {feature}
    tokens = {t["token_id"] for t in own["top_tokens"][:3]}
    missed, strongest = {}, {}
    for i, row in enumerate(contexts):
        at = {j for j, token in enumerate(row["context_ids"]) if token in tokens}
        fired = [f for f in zip(row["activation"], row["feature"], row["token"], strict=True) if f[1] in related]
        if feature not in row["feature"] and (at or fired):
            relative = None if at else max(fired)[1]
            missed[i] = (at or {token for _, each, token in fired if each == relative}, relative)
            strongest[i] = None if at else max(fired)[0]
    shown = re.findall(r"<li>(.*?)</li>", part(client.get(f"/ui/feature/{feature}").text, "Near misses"))
    assert len(shown) == min(8, len(missed))
    left = dict(missed)
    for near in client.get(f"/features/{feature}/surroundings").json()["near_misses"]:
        i = int(near["document_id"].removeprefix("document"))
        assert (set(near["marked"]), near["relative"]) == left.pop(i) and near["activation"] == strongest[i]
        assert near["tokens"] == contexts[i]["context_tokens"]
        assert near["position"] == contexts[i]["position"] + near["marked"][0]
        relative = near["relative"]
        assert near["relative_label"] == (None if relative is None else label_in(client, relative))
    assert len(left) == len(missed) - len(shown)
    for item in shown:
        context = int(re.search(r"document document(\d+)", item)[1])  # type: ignore[index]
        marked, relative = missed.pop(context)
        pieces = re.findall(rf"(<mark>)?t{context}(?:</mark>)?", item)
        assert {i for i, mark in enumerate(pieces) if mark} == marked
        link = re.search(r'href="/ui/feature/(\d+)"', item)
        assert (int(link[1]) if link else None) == relative
    assert feature == 9 or len(shown) == 8  # 9 has neither tokens nor relatives


def test_examples_by_interval(client: httpx.Client, run: RunDirectory) -> None:
    page = client.get("/ui/feature/3").text
    own = [row for row in rows_of(run, "examples") if row["feature"] == 3]
    parts = {"The strongest": [r for r in own if r["kind"] == "top"]}
    for fifth, name in enumerate(("weakest", "fourth", "middle", "second", "strongest")):
        inside = [r for r in own if r["kind"] == "sample" and fifth / 5 <= r["quantile"] < (fifth + 1) / 5]
        parts[f"Drawn uniformly: the {name} fifth"] = sorted(inside, key=lambda r: -r["activation"])
    assert sum(map(len, parts.values())) == len(own) > 0
    for title, rows in parts.items():
        shown = re.findall(r"<li>(.*?)</li>", part(page, title))
        said = [float(re.search(r"<small>([\d.]+)", item)[1]) for item in shown]  # type: ignore[index]
        assert said == pytest.approx([row["activation"] for row in rows], rel=1e-3), title
        assert all(
            f"position {row['position']} (next to nothing before it)" in i for row, i in zip(rows, shown, strict=True)
        )
    headings = re.findall(r"<h3>(?:The strongest|Drawn uniformly: the (\w+) fifth)", page)
    order = ["", "strongest", "second", "middle", "fourth", "weakest"]
    assert headings == sorted(headings, key=order.index)
    assert "<option>2</option>" in page and "<option>5</option>" not in page
    few = client.get("/ui/feature/3", params={"context": 2}).text
    assert (page.count("far"), few.count("far")) == (2 * AROUND * len(own), 2 * len(own))
    assert client.get("/ui/feature/3", params={"context": ""}).text == page  # a form sends what nobody filled in
    assert client.get("/ui/feature/3", params={"context": 0}).status_code == 422


@pytest.mark.parametrize("feature", [0, 2, 4, 9])
def test_its_density_among_all(client: httpx.Client, run: RunDirectory, feature: int) -> None:
    counts = [row["count"] for row in rows_of(run, "features")]
    own, fired = counts[feature], [count for count in counts if count]
    page = client.get(f"/ui/feature/{feature}").text
    drawn = re.search(r"<figcaption>All features that fired by density; ([^<]*)</figcaption>(.*?)</figure>", page, re.S)
    assert drawn is not None
    bars = {float(x): int(n) for x, n in re.findall(r'<rect x="([^"]*)"[^>]*><title>[^:]*: (\d+)', drawn[2])}
    assert sum(bars.values()) == len(fired)
    mark = re.search(r'class="mark" d="M([\d.]+) ', drawn[2])
    if not own:
        assert (drawn[1], mark) == ("this one never fired", None)
        return
    share = sum(count < own for count in fired) / (len(fired) - 1)
    assert f"fires more often than {100 * share:.4g} % of the others" in drawn[1]
    assert f"at {own / 1000:.4g}," in drawn[1]  # of the 1,000 tokens of report_example
    assert f'aria-label="All features that fired by density; {drawn[1]}:' in drawn[2]
    # The mark is over the bar of its half decade, which is 14 wide.
    (over,) = [x for x in bars if x <= float(mark[1]) < x + 14]  # type: ignore[index]
    halves = [int(np.floor(2 * np.log10(count / 1000))) for count in fired]
    assert bars[over] == halves.count(int(np.floor(2 * np.log10(own / 1000))))


def test_from_feature_to_feature(client: httpx.Client) -> None:
    page = client.get("/ui/feature/7").text
    assert '<a href="/ui/feature/6" rel="prev">' in page and '<a href="/ui/feature/8" rel="next">' in page
    badges = re.sub(r"<[^>]*>|\s+", " ", re.search(r'<p class="badges">(.*?)</p>', page, re.DOTALL)[1])  # type: ignore[index]
    assert " ".join(badges.split()) == "dense copy of 6 parent 1"
    assert 'rel="prev"' not in client.get("/ui/feature/0").text
    assert 'rel="next"' not in client.get("/ui/feature/9").text
    answer = client.get("/ui/feature", params={"feature": 3, "model": "one"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/feature/3?model=one")
    assert client.get("/ui/feature", params={"feature": "x"}).status_code == 422


def test_doubtful_features(client: httpx.Client, run: RunDirectory) -> None:
    features = rows_of(run, "features")
    kinds = {
        "Silent": lambda row: row["count"] == 0,
        "Dense": lambda row: row["density"] >= 0.1,
        "Copies": lambda row: row["feature"] in (5, 7),
        "Of massive tokens": lambda row: row["feature"] == 8,
        "Of a single token": lambda row: row["samples"] and row["top_tokens"][0]["count"] >= 0.9 * row["samples"],
        "With a label": lambda row: row["feature"] in (0, 1, 3, 4),  # 2 has no score, those after 4 more than 0.6
    }
    page = client.get("/ui/doubtful").text
    found = re.findall(r'<tr><th scope="row">(.*?)</tr>', page, re.DOTALL)
    assert len(found) == len(kinds)
    for row, (title, passes) in zip(found, kinds.items(), strict=True):
        assert row.startswith(title)
        expected = [each for each in features if passes(each)]
        links = re.findall(r'<a href="(/ui)(/features[^"]*)">(\d+)</a>', row)
        assert [int(count) for _, _, count in links] == [
            len(expected), *(sum(each["group"] == group for each in expected) for group in (0, 1))
        ]  # fmt: skip
        listed = client.get(html.unescape(links[0][1])).json()
        assert {each["feature"] for each in listed["features"]} == {each["feature"] for each in expected}, title
        assert client.get("/ui" + html.unescape(links[0][1])).status_code == 200


def test_runs_without_or_with_damaged_contexts(tmp_path: Path, run: RunDirectory) -> None:
    without, damaged = make_analysed_run(tmp_path / "without"), make_analysed_run(tmp_path / "damaged")
    Path(without.url, "contexts.parquet").unlink()
    without.publish()
    Path(damaged.url, "contexts.parquet").write_bytes(b"something else")
    with served(without, damaged) as url:
        page = httpx.get(f"{url}/ui/feature/3", timeout=60)
        assert page.status_code == 200
        assert "Near misses" not in page.text and "Fires together" not in page.text
        assert "not measured" in httpx.get(f"{url}/ui/doubtful").text  # no label was scored
        answer = httpx.get(f"{url}/ui/feature/3", params={"model": "damaged"})
        assert (answer.status_code, answer.json()["error_type"]) == (409, "run_unusable")
        assert "contexts.parquet is not what the manifest says" in answer.json()["error"]
        assert httpx.get(f"{url}/features/3", params={"model": "damaged"}).status_code == 200
        answer = httpx.get(f"{url}/features/3/surroundings", params={"model": "damaged"})
        assert (answer.status_code, answer.json()["error_type"]) == (409, "run_unusable")
        answer = httpx.get(f"{url}/features/3/surroundings")
        assert (answer.status_code, answer.json()["error_type"]) == (404, "no_contexts")
        assert "without has no random contexts" in answer.json()["error"]
