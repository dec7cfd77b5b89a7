"""Every limit that `/info` names, at the limit and one beyond; a language model with fewer positions and fewer rows of
its embedding than the service and the tokenizer would take."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from serve_local import LocalControl, make_run, make_service, served, wait_for_interventions
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mtc.config import load_preset
from mtc.storage import RunDirectory
from serve.contract import Encoded, Limits, Options, Settings

POSITIONS, ROWS = 48, 200
SETTINGS: dict[str, Any] = {
    "max_input_tokens": 64, "max_inputs": 4, "max_request_tokens": 96, "max_body_bytes": 2048, "max_json_depth": 4,
    "max_graph_tokens": 16, "max_graph_features": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """On a GPT-2 with a table of 48 positions, and 200 rows for a tokenizer of <bos> and 256 bytes."""
    directory = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    shape = GPT2Config(n_positions=POSITIONS, vocab_size=ROWS, n_embd=32, n_layer=3, n_head=4, bos_token_id=0)
    GPT2LMHeadModel(shape).save_pretrained(directory)
    vocabulary = {c: i for i, c in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(directory)
    config = load_preset("tiny", {"model": {"dtype": "float32", "name": str(directory)}})
    return make_run(tmp_path_factory.mktemp("runs") / "one", config=config)


@pytest.fixture(scope="module")
def client(run: RunDirectory) -> Iterator[httpx.Client]:
    with served(run, interventions=True, **SETTINGS) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_for_interventions(client)
        yield client


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def csr(tokens: int) -> bytes:
    return body(csr={"indptr": [0] * (tokens + 1), "indices": [], "values": []})


def at_limits(limits: Limits) -> Iterator[tuple[str, str, bytes, bytes]]:
    """A limit's name, a path, a body that is just within and one that is just beyond."""
    size, inputs, tokens = limits.max_body_bytes, limits.max_inputs, limits.max_input_tokens
    whole, text = body(inputs="a"), "a" * (tokens - 1)  # and BOS
    yield "max_body_bytes", "/encode", whole.ljust(size), whole.ljust(size + 1)
    yield "max_inputs", "/encode", body(inputs=["a"] * inputs), body(inputs=["a"] * (inputs + 1))
    for path in ("/encode", "/tokenize"):
        yield "max_input_tokens", path, body(inputs=text), body(inputs=text + "a")
        yield "max_input_tokens", path, body(input_ids=[5] * tokens), body(input_ids=[5] * (tokens + 1))
    yield "max_input_tokens", "/decode", csr(tokens), csr(tokens + 1)
    assert limits.max_request_tokens == 2 * tokens
    yield "max_request_tokens", "/encode", body(inputs=[text, text]), body(inputs=[text, text[1:], "a"])
    assert limits.max_json_depth == 4
    graph = limits.max_graph_tokens
    yield "max_graph_tokens", "/graph", body(prompt="a" * (graph - 1)), body(prompt="a" * graph)
    features = limits.max_graph_features
    for asked in ({"prompt": "a"}, {"input_ids": [5, 6]}):
        yield (
            "max_graph_features",
            "/graph",
            body(**asked, max_features=features),
            body(**asked, max_features=features + 1),
        )
    entry = {"feature_index": 1, "activation_value": 1.0}
    yield "max_json_depth", "/decode", body(features=[[entry]]), body(features=[[{"feature_index": [1]}]])


def test_what_info_names_is_what_holds(client: httpx.Client) -> None:
    limits = Limits.model_validate(client.get("/info").json()["limits"])
    assert limits.model_dump() == SETTINGS | {"max_input_tokens": POSITIONS}
    headers, tested = {"Content-Type": "application/json"}, set()
    for name, path, within, beyond in at_limits(limits):
        answer = client.post(path, content=within, headers=headers)
        assert answer.status_code == (202 if path == "/graph" else 200), (name, path, answer.text)
        answer = client.post(path, content=beyond, headers=headers)
        limit = getattr(limits, name)
        assert answer.status_code == 413, (name, path, answer.text)
        assert answer.json()["detail"].items() >= {"limit": limit, "value": limit + 1}.items(), (name, path)
        tested.add(name)
    assert tested == set(Limits.model_fields)


def test_what_is_too_long_is_cut_at_the_models_positions_if_asked(client: httpx.Client) -> None:
    for asked in ({"inputs": "a" * 500}, {"input_ids": [5] * 60}):
        answer = client.post("/encode", json=asked | {"truncate": True})
        assert answer.status_code == 200, answer.text
        (result,) = answer.json()["results"]
        assert (len(result["token_ids"]), result["truncated"]) == (POSITIONS, True)
    assert "first 48 tokens" in client.get("/ui").text


def test_ids_without_a_row_are_refused_wherever_they_come_from(client: httpx.Client) -> None:
    assert client.post("/encode", json={"input_ids": [ROWS - 1]}).status_code == 200
    for path in ("/encode", "/tokenize"):
        # The tokenizer knows all of these but the last; a space is the byte of the highest id among them.
        for asked, value in (
            ({"input_ids": [ROWS]}, ROWS),
            ({"inputs": ["a", "a b"]}, 221),
            ({"input_ids": [257]}, 257),
        ):
            answer = client.post(path, json=asked)
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), asked
            assert answer.json()["detail"] == {"limit": ROWS - 1, "value": value, "index": "inputs" in asked}


def test_too_long_ones_fail_alone_under_load(client: httpx.Client) -> None:
    async def load() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
            return await asyncio.gather(
                *(many.post("/encode", json={"inputs": "a" * (POSITIONS if n % 4 == 0 else 9)}) for n in range(80))
            )

    codes = [response.status_code for response in asyncio.run(load())]
    assert codes == [413 if n % 4 == 0 else 200 for n in range(80)]


def test_a_pass_that_fails_is_nobody_elses(run: RunDirectory) -> None:
    """Past the door, the model itself refuses a window that is longer than its table."""

    async def scenario() -> None:
        encode = make_service(control := LocalControl(run)).models.encode_windows
        windows = [np.full(length, 5 + length, np.int32) for length in (7, POSITIONS + 1, 9, 11)]
        key, options = control.keys[0], Options(top_k=64)
        alone = [await encode(key, [window], options) for window in windows if len(window) <= POSITIONS]
        found = await asyncio.gather(*(encode(key, [window], options) for window in windows), return_exceptions=True)
        assert isinstance(found.pop(1), ValueError)
        for one, other in zip(found, alone, strict=True):
            assert isinstance(one, list) and isinstance(one[0], Encoded)
            np.testing.assert_array_equal(one[0].indptr, other[0].indptr)
            np.testing.assert_allclose(np.sort(one[0].values), np.sort(other[0].values), rtol=1e-4, atol=1e-5)

    asyncio.run(scenario())


def test_settings_that_would_refuse_the_largest_request_are_refused() -> None:
    with pytest.raises(ValueError, match="max_queue_tokens=100 is less than max_request_tokens=16384"):
        Settings(run="one", max_queue_tokens=100)
