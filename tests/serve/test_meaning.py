"""Search by meaning: against vectors by known rules, over HTTP, with an endpoint that works and ones that fail."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError
from serve_local import LocalControl, make_analysed_run, make_layers_run, make_service, served

from mtc.results import FeatureLabel
from mtc.storage import (
    Embeddings,
    RunDirectory,
    embeddings_to_bytes,
    label_digest,
    labels_to_parquet,
    open_run,
    parse_embeddings,
)
from serve.contract import ServiceError, Settings
from serve.service import label_vectors, served_run
from serve.service.label_vectors import NEAREST, LabelVectors, nearest
from serve.service.query_vectors import AT_ONCE
from tests.labels.rules_endpoint import RulesEndpoint, vector_of

KEY = "sk-a-secret-that-nobody-may-see"
LABELS = {0: "the dollar", 1: "a tax", 2: "an army", 3: "apple", 4: "a banana", 6: "the navy", 7: "nothing at all"}


@pytest.fixture(scope="module")
def server() -> Iterator[RulesEndpoint]:
    with RulesEndpoint() as server:
        yield server


def write_vectors(run: RunDirectory, model: str = "rules", changed: tuple[int, ...] = ()) -> None:
    """Labels of a run, and vectors of them; those of the `changed` features are of labels that they had before."""
    labels = [label_row(j, label) for j, label in LABELS.items()]
    run.write("labels.parquet", labels_to_parquet(labels))
    before = {j: "gold" if j in changed else label for j, label in LABELS.items()}
    vectors = np.array([vector_of(label) for label in before.values()])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    digests = np.frombuffer(b"".join(map(label_digest, before.values())), np.uint8).reshape(-1, 16)
    found = Embeddings(model, np.array(list(LABELS), np.int32), digests, vectors.astype(np.float16))
    run.write("embeddings.safetensors", embeddings_to_bytes(found))
    run.publish(latest=False)


def label_row(feature: int, label: str) -> FeatureLabel:
    return FeatureLabel(
        feature=feature, label=label, reason=None, machine_label=None, first_label=None, model="m", prompts="1",
        time=None, prompt_tokens=1, answer_tokens=1, scores=(), not_scored=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = make_analysed_run(tmp_path_factory.mktemp("runs") / "one")
    write_vectors(run, changed=(7,))
    return run


@pytest.fixture(scope="module")
def client(
    run: RunDirectory, server: RulesEndpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    plain = make_analysed_run(tmp_path_factory.mktemp("others") / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_KEY", KEY)
        settings = {"embeddings": server.url, "embeddings_key_variable": "MY_KEY"}
        with served(run, plain, **settings) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client


def find(client: httpx.Client, query: str, **more: Any) -> list[int]:
    answer = client.get("/features", params={"query": query, "by": "meaning"} | more)
    assert answer.status_code == 200, answer.text
    return [row["feature"] for row in answer.json()["features"]]


def test_meaning_finds_what_words_do_not(client: httpx.Client, server: RulesEndpoint) -> None:
    words = client.get("/features", params={"query": "money"}).json()["features"]
    assert not {0, 1} & {row["feature"] for row in words} and all(row["similarity"] is None for row in words)
    assert sorted(find(client, "money")[:2]) == [0, 1] and sorted(find(client, "war")[:2]) == [2, 6]
    assert find(client, "cherry")[0] == 3, "a label of the one word before one of two"
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}" and server.asked[-1]["model"] == "rules"
    rows = client.get("/features", params={"query": "fruit", "by": "meaning"}).json()
    asked = np.array(vector_of("fruit"))
    cosines = {}
    for j, label in LABELS.items():
        vector = np.array(vector_of(label))
        cosines[j] = asked @ vector / np.linalg.norm(asked) / np.linalg.norm(vector)
    del cosines[7]  # whose label has changed since
    assert {row["feature"]: row["similarity"] for row in rows["features"]} == pytest.approx(cosines, abs=2e-3)
    assert rows["total"] == len(cosines)
    found = [row["similarity"] for row in rows["features"]]
    assert found == sorted(found, reverse=True)


def test_filters_pages_and_order_are_as_with_words(client: httpx.Client, server: RulesEndpoint) -> None:
    whole = find(client, "dollar")
    assert find(client, "dollar", order="descending") == whole[::-1]
    assert find(client, "dollar", group=1) == [j for j in whole if j >= 4]
    assert find(client, "dollar", feature=[6, 0, 9]) == [j for j in whole if j in (0, 6)]
    assert find(client, "dollar", sort="feature") == sorted(whole)
    before, found, cursor = len(server.embedded), list[int](), None
    while True:
        more = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = client.get("/features", params={"query": "dollar", "by": "meaning"} | more).json()
        found += [row["feature"] for row in page["features"]]
        if (cursor := page["cursor"]) is None:
            break
        other = client.get("/features", params={"query": "dollar", "cursor": cursor})
        assert other.json()["error_type"] == "unknown_cursor", "of words it is none"
    assert found == whole and len(server.embedded) == before, "a query that was asked is known"
    assert client.get("/features", params={"by": "meaning"}).json()["total"] == 10, "without a query there is none"


def test_the_page_offers_it_where_it_can_be_had(client: httpx.Client, run: RunDirectory) -> None:
    page = client.get("/ui/features", params={"query": "money", "by": "meaning"}).text
    assert '<select name="by">' in page and "<option selected>meaning</option>" in page
    assert page.index('/ui/feature/1"') < page.index('/ui/feature/3"')
    assert '<select name="by">' not in client.get("/ui/features", params={"model": "plain"}).text
    with served(run) as url:
        assert '<select name="by">' not in httpx.get(f"{url}/ui/features", timeout=60).text


def test_what_is_missing_is_named(
    client: httpx.Client, run: RunDirectory, server: RulesEndpoint, tmp_path: Path
) -> None:
    asked = {"query": "money", "by": "meaning"}
    answer = client.get("/features", params=asked | {"model": "plain"})
    assert (answer.status_code, answer.json()["error_type"]) == (404, "no_vectors")
    assert "plain has no vectors of its labels (embeddings.safetensors)" in answer.json()["error"]
    with served(run) as url:
        answer = httpx.get(f"{url}/features", params=asked, timeout=60)
        assert (answer.status_code, answer.json()["error_type"]) == (409, "no_embeddings")
        assert "start the service with the setting `embeddings`" in answer.json()["error"]
    assert client.get("/features", params={"query": "a", "by": "sound"}).status_code == 422
    stale, damaged = make_analysed_run(tmp_path / "stale"), make_analysed_run(tmp_path / "damaged")
    write_vectors(stale, changed=tuple(LABELS))
    damaged.write("embeddings.safetensors", b"something else")
    damaged.publish(latest=False)
    with served(stale, damaged, embeddings=server.url) as url:
        answer = httpx.get(f"{url}/features", params=asked, timeout=60)
        assert answer.json()["error_type"] == "no_vectors" and "its labels as they are now" in answer.json()["error"]
        answer = httpx.get(f"{url}/features", params=asked | {"model": "damaged"}, timeout=60)
        assert (answer.status_code, answer.json()["error_type"]) == (409, "run_unusable")
        assert httpx.get(f"{url}/features", params={"query": "the", "model": "damaged"}, timeout=60).status_code == 200


def test_pages_of_other_sites_spend_no_tokens(run: RunDirectory, server: RulesEndpoint) -> None:
    """An image's address is asked for without an Origin; a listed page's script sends its own."""
    asked, before = {"query": "an army of images", "by": "meaning"}, len(server.asked)
    listed = "https://app.example.org"
    with served(run, embeddings=server.url, cors_origins=(listed,)) as url:
        with httpx.Client(base_url=url, timeout=60, headers={"Sec-Fetch-Site": "cross-site"}) as other:
            for path, origin in (
                ("/features", {}),
                ("/ui/features", {}),
                ("/features", {"Origin": "https://evil.example"}),
            ):
                answer = other.get(path, params=asked, headers=origin)
                assert answer.status_code == 403 and "another site" in answer.text and len(server.asked) == before
            assert other.get("/features", params=asked).json()["error_type"] == "forbidden"
            assert other.get("/features", params=asked | {"by": "words"}).status_code == 200
            assert other.get("/features", params=asked, headers={"Origin": listed}).status_code == 200
        for site in ("same-origin", "none"):
            assert httpx.get(f"{url}/features", params=asked, headers={"Sec-Fetch-Site": site}).status_code == 200


def test_a_kept_vector_is_of_the_dimensions_that_are_wanted(
    run: RunDirectory, server: RulesEndpoint, tmp_path: Path
) -> None:
    """Two runs name the same model, which has become another one in between."""
    wide = make_analysed_run(tmp_path / "wide")
    write_vectors(wide)
    stored = parse_embeddings(wide.read("embeddings.safetensors"), "wide")
    vectors = np.pad(stored.vectors, ((0, 0), (0, 1)))
    wide.write("embeddings.safetensors", embeddings_to_bytes(stored._replace(vectors=vectors)))
    wide.publish(latest=False)
    asked = {"query": "money", "by": "meaning"}
    with served(run, wide, embeddings=server.url) as url:
        assert httpx.get(f"{url}/features", params=asked, timeout=60).status_code == 200
        answer = httpx.get(f"{url}/features", params=asked | {"model": "wide"}, timeout=60)
        assert (answer.status_code, answer.json()["error_type"]) == (502, "embeddings_unusable")
        assert "64 dimensions, those of the labels have 65" in answer.json()["error"]


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("broken", 503, "answers 500"), ("busy", 503, "answers 429"), ("cut", 503, "can't be reached, or broke off"),
        ("slow", 503, "did not answer within 0.5 s"), ("forbidden", 502, "answers 401"),
        ("unknown-model", 502, "answers 404"), ("unreadable", 502, "no vector that can be used: unreadable"),
        ("nan", 502, "vectors that have no direction"), ("text", 502, "vectors of what is no number"),
        ("one-less", 502, "0 vectors of 1 texts"), ("wider", 502, "65 dimensions, those of the labels have 64"),
    ],
)  # fmt: skip
def test_an_endpoint_that_fails_is_told(
    tmp_path: Path, server: RulesEndpoint, model: str, status: int, words: str
) -> None:
    run = make_analysed_run(tmp_path / "one")
    write_vectors(run, model)
    with served(run, embeddings=server.url, embeddings_timeout_s=0.5) as url:
        query = f"money {model}"
        answer = httpx.get(f"{url}/features", params={"query": query, "by": "meaning"}, timeout=60)
        kind = "embeddings_unavailable" if status == 503 else "embeddings_unusable"
        assert (answer.status_code, answer.json()["error_type"]) == (status, kind), answer.text
        assert words in answer.json()["error"] and server.url not in answer.text and query not in answer.text
        assert ("retry-after" in answer.headers) == (status == 503)
        assert httpx.get(f"{url}/features", params={"query": query}, timeout=60).status_code == 200


def test_of_many_features_the_nearest_are_found() -> None:
    """In the order of a full sort, equal ones by index, at the border too; of the wanted ones alone."""
    random = np.random.default_rng(0)
    near = random.integers(0, 50, 5000).astype(np.float32) / 50
    near[random.integers(0, 5000, 300)] = np.nan
    for wanted in (np.ones(5000, bool), random.random(5000) < 0.5, np.arange(5000) < 40):
        expected = sorted((j for j in range(5000) if wanted[j] and near[j] == near[j]), key=lambda j: (-near[j], j))
        assert nearest(near, wanted).tolist() == expected[:NEAREST]


def test_a_file_that_is_too_large_is_not_read(
    run: RunDirectory, server: RulesEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = open_run(run.url).manifest().files["embeddings.safetensors"].bytes
    for limit, status in ((size - 1, 409), (size, 200)):
        monkeypatch.setattr(served_run, "MOST_BYTES", limit)
        with served(run, embeddings=server.url) as url:
            answer = httpx.get(f"{url}/features", params={"query": "money", "by": "meaning"}, timeout=60)
            assert answer.status_code == status
            assert (f"has {size} bytes, the limit is {limit}" in answer.text) == (status == 409)


def test_cosines_of_many_labels_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their length is as float16, part by part, without those whose label has changed."""
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(50, 24)) * random.uniform(0.5, 2, (50, 1))).astype(np.float16)
    labels = [f"label {j}" for j in range(60)]
    digests = np.frombuffer(b"".join(label_digest(label) for label in labels[:50]), np.uint8).reshape(50, 16)
    features = np.arange(50, dtype=np.int32)
    monkeypatch.setattr(label_vectors, "ROWS", 7)
    data = embeddings_to_bytes(Embeddings("m", features, digests, vectors))
    found = LabelVectors(data, [*labels[:9], "another", *labels[10:]], "run")
    query = random.normal(size=24)
    query /= np.linalg.norm(query)
    exact = vectors.astype(np.float64)
    expected = np.append(exact @ query / np.linalg.norm(exact, axis=1), [np.nan] * 10)
    expected[9] = np.nan
    np.testing.assert_allclose(found.similarities(query.astype(np.float32)), expected, atol=1e-6)
    assert len(found) == 49


def test_each_layer_has_its_own(tmp_path: Path, server: RulesEndpoint) -> None:
    whole = make_layers_run(tmp_path / "deep")
    write_vectors(whole.members()["layer2"])
    whole.publish(latest=False)
    with served(whole, embeddings=server.url) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert (
            sorted(find(client, "money", layer=2)[:2]) == [0, 1] == sorted(find(client, "tax", model="deep/layer2")[:2])
        )
        answer = client.get("/features", params={"query": "money", "by": "meaning", "layer": 0})
        assert answer.json()["error_type"] == "no_vectors" and "deep/layer0" in answer.json()["error"]


def test_queries_that_wait_take_no_thread_and_are_bounded(run: RunDirectory) -> None:
    """While the endpoint is silent, others are refused at once, and the event loop has all of its threads."""

    async def scenario() -> None:
        held, release = asyncio.Queue[None](), asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await held.put(None)
            await release.wait()
            writer.close()

        endpoint = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = endpoint.sockets[0].getsockname()[1]
        service = make_service(LocalControl(run), embeddings=f"http://127.0.0.1:{port}/v1")
        table = (await service.layer(None, None)).analysed
        await asyncio.to_thread(table.require_vectors)
        waiting = [asyncio.create_task(service.query_vector(table, f"query {n}")) for n in range(AT_ONCE)]
        for _ in waiting:
            await asyncio.wait_for(held.get(), 60)
        threads = min(32, (os.cpu_count() or 1) + 4)
        barrier = threading.Barrier(threads)
        await asyncio.gather(*(asyncio.to_thread(barrier.wait, 60) for _ in range(threads)))  # passes with all of them
        with pytest.raises(ServiceError, match=f"{AT_ONCE} searches by meaning wait") as refused:
            await service.query_vector(table, "one more")
        assert (refused.value.status, refused.value.error_type) == (429, "overloaded")
        release.set()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, ServiceError) and outcome.status == 503
        endpoint.close()

    asyncio.run(scenario())


def test_the_endpoint_comes_from_the_settings_alone(client: httpx.Client) -> None:
    for name in ("embeddings", "endpoint", "url", "embedding_model"):
        answer = client.get("/features", params={"query": "a", "by": "meaning", name: "http://169.254.169.254/"})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    for wrong in ("localhost:8000", "file:///etc/passwd", "http://user:pass@host/v1", "http://host/v1?key=1", "http://",
                  "ftp://host", "http://host/a b", "http://host\nx"):  # fmt: skip
        with pytest.raises(ValidationError, match=r"a base URL such as http://host:8000/v1 is wanted"):
            Settings(run="one", embeddings=wrong)
    for right in ("http://host:8000/v1", "https://api.example.com/v1", "http://[::1]:80/v1", "http://127.0.0.1:1"):
        assert Settings(run="one", embeddings=right).embeddings == right
