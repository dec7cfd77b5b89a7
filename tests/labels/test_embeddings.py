"""Vectors of labels, from an endpoint that gives them by known rules, and from ones that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mtc.labels import Budget, Embedded, Embedder, EndpointDown, EndpointError, embed, known_vectors, vector_cost
from mtc.labels.embeddings import BATCH
from mtc.storage import Embeddings, RunError, embeddings_to_bytes, label_digest, parse_embeddings
from mtc.vectors import MOST_DIMENSIONS, UnusableVectors, read_vectors
from tests.labels.rules_endpoint import RulesEndpoint, vector_of

LABELS = {0: "the dollar", 2: "an army", 3: "apple pie", 5: "the dollar"}


@pytest.fixture
def server() -> Iterator[RulesEndpoint]:
    with RulesEndpoint() as server:
        yield server


def ask(
    server: RulesEndpoint, labels: dict[int, str] = LABELS, model: str = "rules", known: Embeddings | None = None,
    most: int | None = None, **more: Any,
) -> tuple[Embedded, Budget]:  # fmt: skip
    budget = Budget(most, thinking_tokens=1000)
    with Embedder(server.url, model, **{"attempts": 2, "first_pause": 0.01} | more) as embedder:
        return embed(labels, known_vectors(model, known), embedder, budget), budget


def test_vectors_are_those_of_the_labels(server: RulesEndpoint) -> None:
    found, budget = ask(server)
    assert found.embeddings is not None and found.finished and found.failures == {}
    assert sorted(server.embedded) == ["an army", "apple pie", "the dollar"], "each label once, whoever has it"
    assert found.embeddings.features.tolist() == list(LABELS)
    for vector, label in zip(found.embeddings.vectors.astype(float), LABELS.values(), strict=True):
        expected = np.array(vector_of(label))
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-3)
    assert found.tokens == budget.spent == sum(map(server.count, server.embedded))
    stored = parse_embeddings(embeddings_to_bytes(found.embeddings), "run")
    assert stored.model == "rules"
    for one, other in zip(stored[1:], found.embeddings[1:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_what_has_changed_is_asked_again(server: RulesEndpoint) -> None:
    first = ask(server)[0].embeddings
    assert first is not None
    server.embedded.clear()
    again, _ = ask(server, known=first)
    assert server.embedded == [] and (again.asked, again.tokens) == (0, 0) and again.embeddings is not None
    np.testing.assert_array_equal(again.embeddings.vectors, first.vectors)
    changed, _ = ask(server, LABELS | {2: "the navy", 7: "apple pie", 3: "an army"}, known=first)
    assert server.embedded == ["the navy"], "a label that another feature had is known"
    assert changed.embeddings is not None and changed.embeddings.features.tolist() == [0, 2, 3, 5, 7]
    np.testing.assert_array_equal(changed.embeddings.vectors[2], first.vectors[1])
    assert changed.embeddings.digests[1].tobytes() == label_digest("the navy")
    server.embedded.clear()
    ask(server, model="another", known=first)
    assert len(server.embedded) == 3, "vectors of one model are no other's"


def test_requests_are_batches_and_the_limit_holds(server: RulesEndpoint) -> None:
    labels = {j: f"label {j} of many" for j in range(3 * BATCH + 1)}
    cost = vector_cost(labels, {})
    assert (cost.labels, cost.requests) == (len(labels), 4)
    half, budget = ask(server, labels, most=int(0.9 * cost.tokens))
    assert not half.finished and 0 < half.asked < len(labels) and budget.spent <= 0.9 * cost.tokens
    rest, _ = ask(server, labels, known=half.embeddings)
    assert rest.finished and half.asked + rest.asked == len(labels) == len(server.embedded)
    assert max(len(asked["input"]) for asked in server.asked) == BATCH
    assert cost.tokens == pytest.approx(sum(map(server.count, labels.values())), rel=0.3)


def test_a_request_that_is_refused_is_halved(server: RulesEndpoint) -> None:
    """Until it is as small as the endpoint takes it, or only the label that it does not take is left."""
    labels = {j: f"label {j} of many" for j in range(3 * BATCH)}
    server.most_texts = BATCH // 2
    found, budget = ask(server, labels, most=10**5)
    assert found.embeddings is not None and found.failures == {}
    assert found.embeddings.features.tolist() == list(labels)
    assert [len(asked["input"]) for asked in server.asked].count(BATCH // 2) == 6 and len(server.asked) == 9
    assert found.tokens == budget.spent == sum(map(server.count, labels.values())), "what is refused costs nothing"
    server.most_texts, server.forbidden = BATCH, labels[70]
    found, budget = ask(server, labels)
    assert found.embeddings is not None and found.failures == {"status 400": 1} and found.asked == len(labels) - 1
    assert found.embeddings.features.tolist() == [j for j in labels if j != 70]
    for vector, label in zip(
        found.embeddings.vectors.astype(float), (labels[j] for j in labels if j != 70), strict=True
    ):
        expected = np.array(vector_of(label))
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-3)
    server.asked.clear()
    ask(server, labels, known=found.embeddings)
    assert [asked["input"] for asked in server.asked] == [[labels[70]]]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("one-less", "2 vectors of 3 texts, or not in their places"), ("text", "vectors of what is no number"),
        ("twice", "3 vectors of 3 texts, or not in their places"), ("nan", "vectors that have no direction"),
        ("endless", "vectors that have no direction"), ("zero", "vectors that have no direction"),
        ("ragged", "vectors of no, of unlike or of more than 8192 dimensions"), ("unreadable", "unreadable"),
        ("cut", "cut off"), ("broken", "status 500"), ("too-long", "status 400"),
    ],
)  # fmt: skip
def test_answers_of_no_use_are_counted(server: RulesEndpoint, model: str, reason: str) -> None:
    found, budget = ask(server, model=model)
    assert found.embeddings is None and found.failures == {reason: 3} and found.asked == 0
    assert (budget.spent > 0) == (not reason.startswith("status")), "what was sent may be charged"
    with pytest.raises(EndpointError, match=r"2\d questions in a row without an answer") as ended:
        ask(server, {j: f"label {j}" for j in range(20 * BATCH)}, model=model, attempts=1)
    assert isinstance(ended.value, EndpointDown) == (model != "too-long")
    assert len(server.asked) < 300, "an endpoint that refuses everything is not asked for each label"


def test_what_is_refused_for_good_ends_it(server: RulesEndpoint) -> None:
    for model, status in (("unknown-model", 404), ("forbidden", 401)):
        with pytest.raises(EndpointError, match=f"/embeddings answers {status}: no <b>{model}</b>"):
            ask(server, model=model)
    busy, _ = ask(server, model="busy")
    assert busy.asked == 3 and busy.failures == {}
    first = ask(server, model="wider")[0].embeddings
    assert first is not None
    narrow = first._replace(vectors=first.vectors[:, :-1])
    with pytest.raises(EndpointError, match="gives vectors of 65 dimensions, earlier ones of wider have 64") as ended:
        ask(server, {9: "new"}, model="wider", known=narrow)
    assert "remove embeddings.safetensors and labelling/embeddings.safetensors" in str(ended.value)


def test_what_is_no_answer_is_none() -> None:
    def body(*vectors: Any, **more: Any) -> bytes:
        data = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        return json.dumps({"data": data} | more).encode()

    vectors, tokens = read_vectors(body([3, 4.0], [1e200, 0], usage={"prompt_tokens": 7}), 2)
    assert vectors.tolist() == pytest.approx(np.array([[0.6, 0.8], [1.0, 0.0]])) and tokens == 7
    assert read_vectors(body([1]), 1)[1] is read_vectors(body([1], usage={"prompt_tokens": "7"}), 1)[1] is None
    for content in (
        b"", b"[]", b"null", b'{"data": null}', b'{"data": [1]}', b"[" * 100_000, body(), body([1], [1]), body([True]),
        body([]), body([1] * (MOST_DIMENSIONS + 1)), body("ab"), body([None]), body([[1]]), body([10**400]),
        body({"0": 1}), b'{"data": [{"index": "0", "embedding": [1]}]}', b'{"data": [{"index": -1, "embedding": [1]}]}',
    ):  # fmt: skip
        with pytest.raises(UnusableVectors):
            read_vectors(content, 1)


def test_a_file_that_is_none_is_refused() -> None:
    whole = Embeddings("m", np.zeros(2, np.int32), np.zeros((2, 16), np.uint8), np.zeros((2, 3), np.float16))
    data = embeddings_to_bytes(whole)
    for broken in (b"", data[:40], data[:-1], data.replace(b'"format_version":"1"', b'"format_version":"9"'),
                   embeddings_to_bytes(whole._replace(features=np.zeros(3, np.int32)))):  # fmt: skip
        with pytest.raises(RunError, match=r"embeddings\.safetensors"):
            parse_embeddings(broken, "run")
