"""Every answer format against an independent offline forward, over real HTTP: one text at a time, with dense codes."""

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from serve_local import make_config, make_run, served

from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import RunDirectory
from mtc.transcoder import MatryoshkaTranscoder
from serve.contract import ServiceError
from serve.service import Models

TEXTS = ["Hello, world", "a", "<bos> is spelled out", "naïve – ünïcode", "x" * 200, "two\nlines", "Ж", "Hello, world"]
JSON, NDJSON = "application/json", "application/x-ndjson"
MSGPACK, SAFETENSORS = "application/vnd.msgpack", "application/vnd.safetensors"
FORMS = [(JSON, "topk"), (JSON, "csr"), (NDJSON, "topk"), (NDJSON, "csr"), (MSGPACK, "topk"), (MSGPACK, "csr"),
         (SAFETENSORS, "topk"), (SAFETENSORS, "csr")]  # fmt: skip


class Offline(NamedTuple):
    """One text by the model alone."""

    ids: list[int]
    activations: NDArray[np.float32]
    """[tokens, prefix], BOS zero."""
    relative_error: NDArray[np.float32]


class Truth:
    def __init__(self, run: Path):
        config = make_config()
        self.tokenizer, self.model = load_tokenizer(config.model), LanguageModel(config.model)
        self.transcoder = MatryoshkaTranscoder.load(str(run / "transcoder.safetensors"))

    def __call__(self, text: str | list[int], prefix: int | None = None) -> Offline:
        transcoder, ids = self.transcoder, text
        if isinstance(text, str):
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids = [self.tokenizer.bos_token_id, *encoded]
        with torch.no_grad():
            (pair,) = self.model.capture(pack_windows([np.array(ids, np.int32)], []))
            activations = transcoder.encode(pair.source, prefix)
            y, bias = pair.target.double(), transcoder.b_dec.double() / transcoder.target_scale
            reconstruction = activations.double() @ transcoder.W_dec[: activations.shape[1]].double()
            error = y - reconstruction / transcoder.target_scale - bias
            relative_error = error.square().sum(1) / (y - bias).square().sum(1)
        special = torch.tensor(ids) == self.tokenizer.bos_token_id
        activations[special], relative_error[special] = 0.0, float("nan")
        return Offline(list(ids), activations.numpy(), relative_error.numpy())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "one"
    make_run(path)
    return path


@pytest.fixture(scope="module")
def truth(run: Path) -> Truth:
    return Truth(run)


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[httpx.Client]:
    with (
        served(RunDirectory(str(run)), max_input_tokens=256, max_batch_tokens=48) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def ask(client: httpx.Client, path: str, media_type: str, **body: Any) -> Any:
    """The parsed answer, a safetensors one as (tensors, metadata)."""
    response = client.post(path, json=body, headers={"Accept": media_type})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].partition(";")[0] == media_type
    content = response.content
    if media_type == NDJSON:
        return [json.loads(line) for line in content.splitlines()]
    if media_type == SAFETENSORS:
        size = int.from_bytes(content[:8], "little")
        return load_tensors(content), json.loads(content[8 : 8 + size])["__metadata__"]
    return msgpack.unpackb(content) if media_type == MSGPACK else json.loads(content)


def array(packed: dict[str, Any]) -> NDArray[Any]:
    return np.frombuffer(packed["data"], np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])


Rows = list[list[tuple[int, float]]]


def encode(client: httpx.Client, media_type: str, form: str, **body: Any) -> list[dict[str, Any]]:
    """Per input token_ids, offsets, is_special, truncated, l0, relative_error, and `rows`: features and values."""
    answer = ask(client, "/encode", media_type, **body, **{"return": form})
    if media_type == SAFETENSORS:
        return split(*answer)
    if media_type == NDJSON:
        assert [line["type"] for line in answer] == ["model", *["result"] * (len(answer) - 2), "usage"]
        assert [line["index"] for line in answer[1:-1]] == list(range(len(answer) - 2))
        usage, results = answer[-1], answer[1:-1]
    else:
        usage, results = answer["usage"], answer["results"]
    assert (usage["inputs"], usage["tokens"]) == (len(results), sum(len(r["token_ids"]) for r in results))
    for result in results:
        assert ("csr" in result, "features" in result) == (form == "csr", form == "topk")
        if form == "topk":
            result["rows"] = [[(f["feature_index"], f["activation_value"]) for f in row] for row in result["features"]]
        else:
            parts = {name: array(v) if media_type == MSGPACK else np.array(v) for name, v in result["csr"].items()}
            result["rows"] = rows_of(parts["indptr"], parts["indices"], parts["values"])
    return list(results)


def rows_of(indptr: NDArray[Any], indices: NDArray[Any], values: NDArray[Any]) -> Rows:
    pairs = list(zip(indices.tolist(), values.tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(indptr)]


def split(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> list[dict[str, Any]]:
    kinds = {"indptr": "int64", "indices": "int32", "values": "float32", "token_ids": "int32", "offsets": "int32",
             "is_special": "uint8", "input_offsets": "int64", "l0": "int32", "relative_error": "float32"}  # fmt: skip
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {name: kinds[name] for name in tensors}
    assert (metadata["format"], metadata["format_version"]) == ("mtc-encode", "1")
    bounds, truncated = tensors["input_offsets"].tolist(), json.loads(metadata["truncated"])
    tokens = json.loads(metadata["tokens"])
    assert json.loads(metadata["usage"]) == {"inputs": len(bounds) - 1, "tokens": len(tensors["token_ids"])}
    results = []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        result: dict[str, Any] = {name: tensors[name][a:b].tolist() for name in ("token_ids", "is_special")}
        result["offsets"] = tensors["offsets"][a:b].tolist() if "offsets" in tensors else None
        result |= {name: tensors[name][a:b].tolist() for name in ("l0", "relative_error") if name in tensors}
        if "relative_error" in result:
            result["relative_error"] = [None if np.isnan(v) else v for v in result["relative_error"]]
        result["rows"] = rows_of(tensors["indptr"][a : b + 1], tensors["indices"], tensors["values"])
        results.append(result | {"truncated": truncated[i], "tokens": tokens[a:b]})
    return results


def check(results: list[dict[str, Any]], expected: list[Offline]) -> None:
    """All active features of every token, and nothing else."""
    assert len(results) == len(expected)
    for result, offline in zip(results, expected, strict=True):
        assert result["token_ids"] == offline.ids
        for row, dense in zip(result["rows"], offline.activations, strict=True):
            assert dict(row) == pytest.approx({int(i): float(dense[i]) for i in dense.nonzero()[0]}, rel=1e-4, abs=1e-5)


def strongest(row: list[tuple[int, float]], k: int) -> list[tuple[int, float]]:
    return sorted(row, key=lambda entry: (-entry[1], entry[0]))[:k]


def test_every_format_equals_the_offline_forward(client: httpx.Client, truth: Truth) -> None:
    expected = [truth(text) for text in TEXTS]
    answers = {
        form: encode(client, *form, inputs=TEXTS, top_k=64, include=["l0", "relative_error"]) for form in FORMS
    }  # fmt: skip
    first = answers[JSON, "csr"]
    check(first, expected)
    assert sum(len(row) for result in first for row in result["rows"]) > 1000
    for (media_type, form), results in answers.items():
        in_order = form == "csr" or media_type == SAFETENSORS
        for result, other, text in zip(results, first, TEXTS, strict=True):
            # Bit for bit the same everywhere.
            for name in ("tokens", "token_ids", "offsets", "is_special", "truncated", "l0", "relative_error"):
                assert result[name] == other[name], (media_type, form, name)
            rows = [sorted(row) if in_order else strongest(row, 64) for row in other["rows"]]
            assert result["rows"] == rows, (media_type, form)
            assert all(np.float32(value) == value for row in rows for _, value in row)
            assert result["is_special"] == [True] + [False] * (len(result["token_ids"]) - 1)
            (start, *ranges), position = result["offsets"], 0
            assert start == [0, 0]
            for a, b in ranges:  # tokens of one character share its range
                assert a <= position <= b
                position = b
            assert position == len(text)
    for result, offline in zip(first, expected, strict=True):
        assert result["l0"] == (offline.activations > 0).sum(1).tolist()
        relative_error = [np.nan if value is None else value for value in result["relative_error"]]
        np.testing.assert_allclose(relative_error, offline.relative_error, rtol=1e-3)
        assert result["relative_error"][0] is None
    for text, result in zip(TEXTS, first, strict=True):  # a batch changes no answer
        (alone,) = encode(client, SAFETENSORS, "csr", inputs=text)
        for row, other_row in zip(alone["rows"], result["rows"], strict=True):
            assert dict(row) == pytest.approx(dict(other_row), rel=1e-4, abs=1e-5)
    for count in range(1, len(TEXTS)):
        found = encode(client, SAFETENSORS, "csr", inputs=TEXTS[-count:])
        check(found, expected[-count:])
    for text, result in zip(TEXTS, ask(client, "/encode", JSON, inputs=TEXTS)["results"], strict=True):
        assert result["tokens"][0] == truth.tokenizer.bos_token
        assert "".join(result["tokens"][1:]) == text
        slices = [text[a:b] for a, b in result["offsets"][1:]]
        pairs = zip(result["tokens"][1:], slices, strict=True)
        assert all(token in (part, "") for token, part in pairs)  # nothing where a character goes on


@pytest.mark.parametrize(("media_type", "form"), FORMS)
def test_options_select(client: httpx.Client, truth: Truth, media_type: str, form: str) -> None:
    everything = encode(client, JSON, "csr", inputs=TEXTS)
    by_index = form == "csr" or media_type == SAFETENSORS

    def compare(chosen: Any, top_k: int = 64, **options: Any) -> None:
        found = encode(client, media_type, form, inputs=TEXTS, top_k=top_k, **options)
        for result, whole in zip(found, everything, strict=True):
            rows = [strongest([entry for entry in row if chosen(*entry)], top_k) for row in whole["rows"]]
            assert result["rows"] == ([sorted(row) for row in rows] if by_index else rows)
        assert any(row for result in found for row in result["rows"])

    compare(lambda i, v: True, top_k=3)
    compare(lambda i, v: i in (60, 5, 9), features=[60, 9, 5])
    compare(lambda i, v: i in (9, 5), top_k=1, features=[9, 5])  # always equal: the lower index stays
    limit = everything[0]["rows"][2][0][1]
    compare(lambda i, v: v >= limit, min_activation=limit)  # at least: the entry itself is in
    default = encode(client, media_type, form, inputs=TEXTS)
    check_all = [len(row) for result in default for row in result["rows"]]
    whole_rows = [len(row) for result in everything for row in result["rows"]]
    assert check_all == (whole_rows if by_index else [min(16, n) for n in whole_rows])
    assert max(whole_rows) > 16
    for prefix in (16, 48):
        found = encode(
            client, media_type, form, inputs=TEXTS, top_k=64, prefix=prefix, include=["l0", "relative_error"]
        )
        offline = [truth(text, prefix) for text in TEXTS]
        check(found, offline)
        for result, each in zip(found, offline, strict=True):
            assert result["l0"] == (each.activations > 0).sum(1).tolist()
            np.testing.assert_allclose(result["relative_error"][1:], each.relative_error[1:], rtol=1e-3)


@pytest.mark.parametrize(("media_type", "form"), FORMS)
def test_ids_and_cut_inputs(client: httpx.Client, truth: Truth, media_type: str, form: str) -> None:
    whole = truth("x" * 400)
    (cut,) = encode(client, media_type, form, inputs="x" * 400, truncate=True, top_k=64)
    assert (cut["truncated"], len(cut["token_ids"]), cut["offsets"][-1]) == (True, 256, [254, 255])
    check([cut], [truth(whole.ids[:256])])
    windows = [whole.ids[1:40], truth(TEXTS[0]).ids]  # no BOS is added to the first
    found = encode(client, media_type, form, input_ids=windows, top_k=64)
    check(found, [truth(window) for window in windows])
    assert [result["offsets"] for result in found] == [None, None]
    assert [any(result["is_special"]) for result in found] == [False, True]
    (one,) = encode(client, media_type, form, input_ids=windows[0], top_k=64)
    check([one], [truth(windows[0])])


def test_decode_undoes_encode(client: httpx.Client, truth: Truth) -> None:
    text = TEXTS[2]
    offline = truth(text)
    csr = ask(client, "/encode", JSON, inputs=text, **{"return": "csr"})["results"][0]["csr"]
    features = ask(client, "/encode", JSON, inputs=text, top_k=64)["results"][0]["features"]
    features = [sorted(row, key=lambda f: f["feature_index"]) for row in features]  # sums in the same order
    with torch.no_grad():
        prefixes = {
            m: truth.transcoder.decode(torch.from_numpy(offline.activations[:, :m])).numpy() for m in (16, 48, 64)
        }
    for prefix, expected in prefixes.items():
        body = {"csr": csr, "prefix": prefix}
        answer = ask(client, "/decode", JSON, **body)
        found = np.array(answer["reconstruction"])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert (answer["prefix"], answer["usage"]) == (prefix, {"inputs": 1, "tokens": len(offline.ids)})
        tensors, metadata = ask(client, "/decode", SAFETENSORS, **body)
        assert list(tensors) == ["mlp_out"] and metadata["format"] == "mtc-decode" and metadata["prefix"] == str(prefix)
        assert tensors["mlp_out"].dtype == np.float32
        packed = array(ask(client, "/decode", MSGPACK, **body)["reconstruction"])
        listed = ask(client, "/decode", JSON, features=features, prefix=prefix)["reconstruction"]
        for other in (tensors["mlp_out"], packed, np.array(listed)):
            np.testing.assert_array_equal(other.astype(np.float64), found)
    whole = ask(client, "/decode", SAFETENSORS, csr=csr)[0]["mlp_out"]
    np.testing.assert_allclose(whole, prefixes[64], rtol=1e-4, atol=1e-5)


def test_tokenize_and_who_answered(client: httpx.Client, truth: Truth) -> None:
    plain, packed = (ask(client, "/tokenize", each, inputs=TEXTS) for each in (JSON, MSGPACK))
    assert [result["token_ids"] for result in plain["results"]] == [truth(text).ids for text in TEXTS]
    assert plain["results"] == packed["results"]
    model = client.get("/info").json()["model"]
    request = {"inputs": TEXTS[0], "prefix": 48}
    answers = [plain, packed, ask(client, "/encode", JSON, **request), ask(client, "/encode", MSGPACK, **request)]
    line = ask(client, "/encode", NDJSON, **request)[0]
    _, metadata = ask(client, "/encode", SAFETENSORS, **request)
    assert all(answer["model"] == model for answer in [*answers, line])
    assert json.loads(metadata["model"]) == model
    assert [answer["prefix"] for answer in [*answers[2:], line]] == [48] * 3 and metadata["prefix"] == "48"
    for media_type in (JSON, NDJSON, MSGPACK, SAFETENSORS):
        headers = {"Accept": media_type, "X-Request-ID": "mine-1"}
        response = client.post("/encode", json=request, headers=headers)
        assert response.headers["x-request-id"] == "mine-1" and b"mine-1" in response.content


@pytest.mark.parametrize("accept", ["application/json; charset=utf-8", "APPLICATION/JSON", "text/html, */*;q=0.1"])
def test_what_clients_send_as_accept(client: httpx.Client, accept: str) -> None:
    response = client.post("/tokenize", json={"inputs": "a"}, headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")


NO_ROOM = ServiceError(429, "overloaded", "no room", {"limit": 1}, {"Retry-After": "1"})


@pytest.mark.parametrize("failure", [None, NO_ROOM, RuntimeError("something private")])
def test_lines_come_as_batches_are_done(run: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    """The second batch is held until the first one's lines have been read; then it may fail."""
    read = threading.Event()
    monkeypatch.setattr(Models, "encode_windows", held_back(read, failure))
    headers = {"Accept": NDJSON, "X-Request-ID": "mine-2"}
    with served(RunDirectory(str(run)), max_batch_tokens=16) as url:
        body = {"inputs": [TEXTS[0], TEXTS[4]]}
        with httpx.stream("POST", f"{url}/encode", json=body, headers=headers, timeout=60) as response:
            assert response.status_code == 200
            lines = (json.loads(line) for line in response.iter_lines())
            assert [next(lines)["type"], next(lines)["type"]] == ["model", "result"]
            read.set()
            rest = list(lines)
        alone = httpx.post(f"{url}/encode", json={"inputs": TEXTS[4]}, headers=headers, timeout=60)
    if failure is None:
        assert [line["type"] for line in rest] == ["result", "usage"] and rest[0]["index"] == 1
        return
    (line,) = rest
    assert line.pop("type") == "error" and line["request_id"] == "mine-2" and "private" not in str(line)
    # What fails before the first line has a status.
    assert alone.json() == line
    known = failure is NO_ROOM
    assert (alone.status_code, line["error_type"]) == ((429, "overloaded") if known else (500, "internal"))
    assert alone.headers.get("retry-after") == ("1" if known else None)


def test_batches_of_a_reader_that_left_are_cancelled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, cancelled = threading.Event(), threading.Event()
    monkeypatch.setattr(Models, "encode_windows", held_back(read, None, cancelled))
    with served(RunDirectory(str(run)), max_batch_tokens=16) as url:
        body, headers = {"inputs": [TEXTS[0], TEXTS[4]]}, {"Accept": NDJSON}
        with httpx.stream("POST", f"{url}/encode", json=body, headers=headers, timeout=60) as response:
            assert json.loads(next(response.iter_lines()))["type"] == "model"
        assert cancelled.wait(60)
        read.set()


def held_back(read: threading.Event, failure: Exception | None, cancelled: threading.Event | None = None) -> Any:
    """`Models.encode_windows`, but long inputs wait until `read` is set, and then fail with `failure`."""
    encode_windows = Models.encode_windows

    async def encode(self: Models, key: Any, windows: Any, options: Any) -> Any:
        if len(windows[0]) > 100:
            try:
                assert await asyncio.to_thread(read.wait, 60)
            except asyncio.CancelledError:
                if cancelled is not None:
                    cancelled.set()
                raise
            if failure is not None:
                raise failure
        return await encode_windows(self, key, windows, options)

    return encode
