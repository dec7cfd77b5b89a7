"""What tells texts apart: against planted features, what `/encode` says, the run's own files, and scipy."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import kstest, norm
from scipy.stats.contingency import odds_ratio
from serve_local import LocalControl, make_analysed_run, make_layers_run, make_run, make_service, served

from mtc.client import AsyncClient, Client
from mtc.storage import RunDirectory
from serve.contract import Encoded
from serve.http import create_app
from serve.service import Models
from serve.service.contrast import Side, contrast, largest_by_chance

FIRES_ON = {3: "q", 5: "xyz", 7: "e", 9: "#"}
"""Letters on which planted features fire with 2, but 7 with a hundredth of that."""
STRENGTH = {3: 2.0, 5: 2.0, 7: 0.02, 9: 2.0}


class Planted(Models):
    """Feature 0 fires on every token but BOS, others on their letters."""

    async def encode_windows(self, key: Any, windows: Any, options: Any) -> list[Encoded]:
        found = []
        for window in windows:
            rows: list[list[tuple[int, float]]] = []
            for token in window.tolist():
                letter = chr(token + ord("!"))  # ids of the printable ones are in their order
                fires = [(j, STRENGTH[j]) for j, letters in FIRES_ON.items() if letter in letters]
                rows.append([(0, 1.0), *fires] if token < 256 else [])
            entries = [entry for row in rows for entry in row]
            indptr = np.cumsum([0, *map(len, rows)])
            found.append(Encoded(indptr, np.array([e[0] for e in entries], np.int32),
                                 np.array([e[1] for e in entries], np.float32)))  # fmt: skip
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def planted(run: RunDirectory) -> Iterator[httpx.Client]:
    limits = {"max_inputs": 6, "max_input_tokens": 64, "max_request_tokens": 160}
    with served(run, models=Planted, **limits) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(run: RunDirectory) -> Iterator[httpx.Client]:
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, texts: Any, against: Any = None, **more: Any) -> dict[str, Any]:
    answer = client.post("/features/by-text", json={"texts": texts, "against": against} | more)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_planted_features_come_first(planted: httpx.Client) -> None:
    """The one that fires on many tokens of one side before the one that does once, the weak one last, the dense one
    nowhere."""
    texts, against = ["quail quest q.", "quite e quaq #eeee"], ["the lazy dog", "over the fence x"]
    found = ask(planted, texts, against)
    assert found["background"] == "texts" and found["tokens"] == 14 + 18 and found["against_tokens"] == 12 + 16
    by_feature = {row["feature"]: row for row in found["features"]}
    assert [row["feature"] for row in found["features"]] == [3, 5, 9, 7] and 0 not in by_feature
    assert by_feature[3]["texts"] == {"fires": 6, "share": 6 / 32, "mean_activation": 12 / 32}
    assert by_feature[3]["z"] > 1.5 > by_feature[9]["z"] > 0 > by_feature[5]["z"]
    assert by_feature[5]["log_odds_ratio"] < 0 and by_feature[5]["against"]["fires"] == 3
    turned = ask(planted, against, texts)
    assert [(r["feature"], -r["z"], r["score"]) for r in turned["features"]] == [
        (r["feature"], r["z"], r["score"]) for r in found["features"]
    ]  # fmt: skip
    assert ask(planted, texts, against, top_k=1)["features"] == found["features"][:1]
    assert [row["feature"] for row in ask(planted, texts, against, prefix=4)["features"]] == [3]


def test_two_identical_texts_differ_in_nothing(planted: httpx.Client, client: httpx.Client) -> None:
    for own in (planted, client):
        assert ask(own, "quest of the year", ["quest of the year"])["features"] == []
        close = ask(own, "quest of the year", "quest of the yeas")
        assert all(abs(row["z"]) < close["largest_z_by_chance"] for row in close["features"])


def test_real_features_are_those_of_encode(client: httpx.Client, run: RunDirectory) -> None:
    """Counted here, token by token; without `against` the other side is contexts.parquet."""
    texts, against = ["Hello, world", "naïve – ünïcode"], ["We the people of the United States"]

    def count(inputs: list[str]) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        answer = client.post("/encode", json={"inputs": inputs, "top_k": 64}).json()
        dense = [
            {each["feature_index"]: each["activation_value"] for each in features}
            for result in answer["results"]
            for special, features in zip(result["is_special"], result["features"], strict=True) if not special
        ]  # fmt: skip
        table = np.array([[row.get(j, 0.0) for j in range(10)] for row in dense])
        return len(table), (table > 0).sum(0), table

    contexts = pq.read_table(Path(run.url, "contexts.parquet")).to_pylist()
    table = np.zeros((sum(len(row["context_ids"]) for row in contexts), 10))
    for i, row in enumerate(contexts):
        for j, token, value in zip(row["feature"], row["token"], row["activation"], strict=True):
            table[3 * i + token, j] = value
    largest = np.array(pq.read_table(Path(run.url, "features.parquet"))["max_activation"].to_pylist())
    n, a, one = count(texts)
    for asked, (m, b, other) in ((against, count(against)), (None, (len(table), (table > 0).sum(0), table))):
        found = ask(client, texts, asked)
        assert (found["tokens"], found["against_tokens"]) == (n, m)
        assert found["background"] == ("texts" if asked else "random_contexts")
        assert found["usage"]["inputs"] == (3 if asked else 2)
        expected = {}
        for j in range(10):
            # As scipy has it for whole numbers; twice the counts give the same ratio and half its variance.
            cells = np.array([[2 * a[j] + 1, 2 * (n - a[j]) + 1], [2 * b[j] + 1, 2 * (m - b[j]) + 1]])
            ratio = odds_ratio(cells, kind="sample")
            width = np.log(ratio.confidence_interval(0.95).high / ratio.statistic) * np.sqrt(2) / norm.ppf(0.975)
            z, scale = np.log(ratio.statistic) / width, max(largest[j], one[:, j].max())
            scale = max(scale, other[:, j].max()) if asked else scale
            difference = (one[:, j].mean() - other[:, j].mean()) / scale
            if z * difference > 0:
                expected[j] = [np.log(ratio.statistic), z, difference, z * difference]
        rows = {row["feature"]: row for row in found["features"]}
        assert list(rows) == sorted(expected, key=lambda j: -expected[j][3]) and rows
        for j, values in expected.items():
            told = [rows[j][name] for name in ("log_odds_ratio", "z", "difference", "score")]
            assert told == pytest.approx(values, rel=1e-5), j
            assert rows[j]["texts"]["fires"] == a[j] and rows[j]["against"]["share"] == pytest.approx(b[j] / m)
            assert rows[j]["label"] == client.get(f"/features/{j}").json()["feature"]["label"]


def test_z_is_normal_where_both_sides_are_alike() -> None:
    """Of independent tokens; of rare features it stays closer to 0."""
    random = np.random.default_rng(0)
    n, m, features = 400, 3000, 20_000
    for density in (0.001, 0.01, 0.2, 0.9):
        a, b = random.binomial(n, density, features), random.binomial(m, density, features)
        sides = (Side(tokens, fires, fires * 1.0, np.ones(features)) for tokens, fires in ((n, a), (m, b)))
        z = contrast(*sides, np.ones(features), features).z
        assert np.mean(np.abs(z) > 1.96) < 0.055, density
        assert np.mean([np.abs(part).max() > largest_by_chance(20) for part in np.split(z, 1000)]) < 0.1, density
    assert kstest(z, "norm").statistic < 0.05


def test_what_is_wrong_is_named(planted: httpx.Client, tmp_path: Path) -> None:
    for asked, status, kind, words in (
        ({"texts": ["a"] * 4, "against": ["b"] * 3}, 413, "too_many_inputs", "has 7 inputs, the limit is 6"),
        ({"texts": "a", "against": ["a", "b" * 64]}, 413, "input_too_long", "against[1] has 65 tokens, the limit"),
        ({"texts": ["a", "b" * 64]}, 413, "input_too_long", "texts[1] has 65 tokens"),
        ({"texts": ["b" * 60] * 2, "against": "b" * 60}, 413, "too_many_tokens", "183 tokens, the limit is 160"),
        ({"texts": [""]}, 400, "empty_inputs", "texts[0] is empty"),
        ({"texts": "a", "prefix": 5}, 422, "validation", "prefix=5 is not one of the nested dictionaries [4, 10]"),
        ({"texts": "a", "layer": 0}, 422, "unknown_layer", "its only layer is 1"),
    ):  # fmt: skip
        answer = planted.post("/features/by-text", json=asked)
        assert (answer.status_code, answer.json()["error_type"]) == (status, kind), answer.text
        assert words in answer.json()["error"]
    assert ask(planted, "b" * 64, truncate=True)["tokens"] == 63
    without, bare = make_analysed_run(tmp_path / "without"), make_run(tmp_path / "bare")
    Path(without.url, "contexts.parquet").unlink()
    without.publish()
    with served(without, bare) as url, httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/features/by-text", json={"texts": "a"})
        assert (answer.status_code, answer.json()["error_type"]) == (404, "no_contexts")
        assert "or send a text as `against`" in answer.json()["error"]
        assert ask(client, "Hello", "world")["background"] == "texts"
        answer = client.post("/features/by-text", json={"texts": "a", "model": "bare"})
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_analysed")


def test_each_layer_and_the_clients(tmp_path: Path) -> None:
    run = make_layers_run(tmp_path / "deep")
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client, Client(url) as ours:
        answers = {}
        for layer in (0, 2):
            plain = ask(client, "Hello", "world", layer=layer)
            found = answers[layer] = ours.features_by_text("Hello", ["world"], layer=layer)
            assert found.model.layer == plain["model"]["layer"] == layer and found.features
            for row, wanted in zip(found.features, plain["features"], strict=True):
                assert row._asdict() | {"texts": row.texts._asdict(), "against": row.against._asdict()} == wanted
        assert answers[0].features != answers[2].features

        async def scenario() -> None:
            async with AsyncClient(url) as theirs:
                found = await theirs.features_by_text("Hello", "world", layer=2, top_k=1)
                assert found.features == answers[2].features[:1]
                assert await theirs.surroundings(1, layer=2) == ours.surroundings(1, layer=2)

        asyncio.run(scenario())


def test_it_is_work_as_encode_is(run: RunDirectory) -> None:
    """Refused beyond `max_concurrent_requests`, and counted among the tokens that were encoded."""
    entered, release = asyncio.Event(), asyncio.Event()

    class Slow(Planted):
        async def encode_windows(self, key: Any, windows: Any, options: Any) -> list[Encoded]:
            entered.set()
            await release.wait()
            return await super().encode_windows(key, windows, options)

    async def scenario() -> None:
        service = make_service(LocalControl(run), models=Slow, max_concurrent_requests=1)
        transport = httpx.ASGITransport(create_app(service), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:80") as client:
            first = asyncio.create_task(client.post("/features/by-text", json={"texts": "quest"}))
            await asyncio.wait_for(entered.wait(), 60)
            refused = await client.post("/features/by-text", json={"texts": "quest"})
            assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
            release.set()
            assert (await first).status_code == 200
        assert service.metrics.tokens._value.get() == 6

    asyncio.run(scenario())
