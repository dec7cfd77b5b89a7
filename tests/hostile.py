"""Requests that mean harm, or look like it, and what each is to be answered."""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from serve.contract import Settings

NAME = "private words"
"""In every prompt; must not be found in logs."""


class Attack(NamedTuple):
    """Bytes for one connection, and the statuses that are right."""

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    error_type: str | None = None
    """Of the answer, if it is an error."""
    more: tuple[bytes, int] = (b"", 0)
    """What comes after the bytes, and how often."""
    leaves: bool = False
    """Whether the sender then closes its side, instead of waiting for the answer."""


def _post(path: str, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    fields = {"Content-Type": kind, "Content-Length": str(len(body))} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{lines}\r\n".encode("latin-1") + body


def _get(path: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{lines}\r\n".encode("latin-1")


def _json(**fields: Any) -> bytes:
    return json.dumps({"inputs": NAME} | fields).encode()


def attacks(limits: Settings) -> Iterator[Attack]:
    """All of them, for a service of the tiny preset, one token a byte, whose run `one` has the ten features of
    `report_example`."""
    tokens, inputs = limits.max_input_tokens, limits.max_inputs
    above = (
        "..",
        "%2e%2e",
        "..%2f..",
        "%2e%2e%2f%2e%2e",
        "..%5c..",
        "....//..",
        "%252e%252e",
        "%00",
        "..%00",
        "/etc",
        "%c0%ae",
    )
    for root in ("/report/files/", "/ui/static/"):
        for part in above:
            yield Attack(f"{root}{part}", _get(f"{root}{part}/etc/passwd"), (404,), "not_found")
        for name in ("../config.yaml", "../transcoder.safetensors", "../../one/config.yaml", "a" * 5000):
            yield Attack(f"{root}{name[:30]}", _get(root + name), (404,), "not_found")
    for model in (
        "..",
        "../one",
        "one/..",
        "one%00",
        "latest",
        ".",
        "one/layer1/..",
        "%2fetc%2fpasswd",
        "file:%2f%2f%2fetc",
        "one%0a",
    ):
        yield Attack(f"model {model}", _get(f"/report?model={model}"), (404,), "unknown_model")
        yield Attack(f"features model {model}", _get(f"/features?model={model}"), (404,), "unknown_model")
    yield Attack("model in a body", _post("/encode", _json(model="../../etc\0")), (404,), "unknown_model")
    yield Attack(
        "model to load", _post("/admin/load", json.dumps({"model": "../one"}).encode()), (404,), "unknown_model"
    )

    yield Attack(
        "lone surrogate", _post("/encode", b'{"inputs": "' + NAME.encode() + b' \\ud800"}'), (400,), "malformed_json"
    )
    yield Attack("not UTF-8", _post("/encode", b'{"inputs": "\xff\xfe"}'), (400,), "malformed_json")
    yield Attack("UTF-16", _post("/encode", '{"inputs": "a"}'.encode("utf-16")), (400,), "malformed_json")
    yield Attack("no JSON", _post("/encode", b"inputs=" + NAME.encode()), (400,), "malformed_json")
    yield Attack("nothing", _post("/encode", b""), (400,), "malformed_json")
    yield Attack("half", _post("/encode", b'{"inputs": "' + NAME.encode()), (400,), "malformed_json")
    for number in ("NaN", "Infinity", "-Infinity"):
        yield Attack(number, _post("/encode", f'{{"inputs": "a", "min_activation": {number}}}'.encode()), (400, 422))
    for number in ("1e999", "-1", "9" * 4000, '"0"', "true", "null"):
        yield Attack(
            number[:9], _post("/encode", f'{{"inputs": "a", "min_activation": {number}}}'.encode()), (400, 422)
        )
    for ids in (
        "[-1]",
        "[4294967296]",
        f"[{'9' * 4000}]",
        "[1.5]",
        '["1"]',
        "[true]",
        "[[1], 2]",
        "[null]",
        "{}",
        "[1e30]",
    ):
        yield Attack(f"ids {ids[:20]}", _post("/encode", f'{{"input_ids": {ids}}}'.encode()), (422,), "validation")
    yield Attack("id beyond the vocabulary", _post("/encode", b'{"input_ids": [259]}'), (422,), "validation")
    for empty in ('{"inputs": ""}', '{"inputs": []}', '{"inputs": [""]}', '{"input_ids": []}', '{"input_ids": [[]]}'):
        yield Attack(f"empty {empty}", _post("/encode", empty.encode()), (400,), "empty_inputs")
    yield Attack("unknown field", _post("/encode", _json(__proto__={"admin": True})), (422,), "validation")
    yield Attack("both", _post("/encode", _json(input_ids=[1])), (422,), "validation")

    for opening, many in ((b"[", 60_000), (b'{"a":', 12_000), (b'[{"a":', 10_000)):
        yield Attack(f"deep {opening.decode()}", _post("/encode", opening * many), (413,), "too_deep")
    yield Attack("deep features", _post("/decode", b'{"features": ' + b"[" * 99 + b"]" * 99 + b"}"), (413,), "too_deep")
    yield Attack("brackets in a string", _post("/encode", _json(inputs="[" * (tokens - 1), min_activation=0)), (200,))
    for part in (b'"\\', b'"', b"\\", b'["\\"', b'"\\\\'):  # slow to read, for what looks for strings anew at each
        body = part * (limits.max_body_bytes // len(part))
        yield Attack(f"quotes without end {part!r}", _post("/encode", body), (400,), "malformed_json")
    wrong = b'{"inputs": [' + b"1," * (limits.max_body_bytes // 2 - 8) + b"1]}"
    yield Attack("wrong items without end", _post("/encode", wrong), (422,), "validation")
    dots = _json(**{"." * (limits.max_body_bytes // 2): 1})
    yield Attack("an unknown field of dots", _post("/encode", dots), (422,), "validation")
    yield Attack("numbers without end", _post("/encode", b"9" * limits.max_body_bytes), (400, 422))

    yield Attack("100 MB announced", _post("/encode", b"", Content_Length="100000000"), (413,), "too_large")
    megabyte = b" " * (1 << 20)
    announced = _post("/encode", b"", Content_Length="100000000")
    yield Attack("100 MB sent", announced, (413,), "too_large", (megabyte, 100))
    chunked = _post("/encode", b"", Content_Length="", Transfer_Encoding="chunked")
    yield Attack("100 MB in chunks", chunked, (413,), "too_large", (b"100000\r\n" + megabyte + b"\r\n", 100))
    yield Attack("a huge number as length", _post("/encode", b"", Content_Length="9" * 30), (400, 413))
    yield Attack("too many inputs", _post("/encode", _json(inputs=["a"] * (inputs + 1))), (413,), "too_many_inputs")
    yield Attack("too many tokens", _post("/encode", _json(inputs="a" * tokens)), (413,), "input_too_long")
    yield Attack(
        "too many in all",
        _post("/encode", _json(inputs=["a" * (tokens - 1)] * (limits.max_request_tokens // tokens + 1))),
        (413,),
        "too_many_tokens",
    )

    yield Attack(
        "a form", _post("/encode", b"a=b", "application/x-www-form-urlencoded"), (415,), "unsupported_media_type"
    )
    yield Attack("no type", _post("/encode", _json(), ""), (415,), "unsupported_media_type")
    yield Attack(
        "JSON in latin-1",
        _post("/encode", _json(), "application/json; charset=latin-1"),
        (415,),
        "unsupported_media_type",
    )
    yield Attack(
        "pickle", _post("/encode", b"\x80\x04N.", "application/octet-stream"), (415,), "unsupported_media_type"
    )
    yield Attack("gzip", _post("/encode", b"\x1f\x8b", Content_Encoding="gzip"), (415,), "unsupported_encoding")

    yield Attack("Accept", _post("/encode", _json(), Accept="image/png"), (406,), "not_acceptable")
    yield Attack("Accept nonsense", _post("/encode", _json(), Accept=",;q=x,/,*"), (406,), "not_acceptable")
    for query in (
        "limit=0",
        "limit=501",
        "limit=a",
        "group=-1",
        "min_density=nan",
        "sort=__class__",
        "query=a&by=sound",
        "query=a&by=meaning&by=words",
        "query=a&by=meaning&embeddings=http://169.254.169.254/",
        "x=1",
        "text=" + "a" * 201,
    ):
        yield Attack(f"?{query[:20]}", _get(f"/features?{query}"), (422,), "validation")
    for path in ("/features", "/ui/features"):
        yield Attack(f"{path} by meaning", _get(f"{path}?query=a&by=meaning"), (409,), "no_embeddings")
    for layer in ("-1", "a", "", "1.5", "99999999999999999999", "1e3", "%00", "1/../2"):
        one = ("/features/1", "/features/1/examples", "/features/1/surroundings")
        for path in ("/features", *one, "/report", "/report/files/plots/loss.png"):
            yield Attack(f"{path} layer {layer}", _get(f"{path}?layer={layer}"), (422,), "validation")
    for layer in ("-1", '"1"', "true", "1.5", "[1]", "{}", "1e30", "9" * 4000):
        for path, rest in (
            ("/encode", '"inputs": "a"'),
            ("/tokenize", '"inputs": "a"'),
            ("/decode", '"features": [[]]'),
            ("/features/by-text", '"texts": "a"'),
        ):
            body = f'{{{rest}, "layer": {layer}}}'.encode()
            yield Attack(f"{path} layer {layer[:9]}", _post(path, body), (422,), "validation")
    for layer in (0, 2, (1 << 31) - 1):
        yield Attack(f"no layer {layer}", _get(f"/features?layer={layer}"), (422,), "unknown_layer")
        yield Attack(f"no layer {layer} to encode", _post("/encode", _json(layer=layer)), (422,), "unknown_layer")
    yield Attack("a layer twice", _get("/features?layer=1&layer=1"), (422,), "validation")
    yield Attack("a layer's name", _post("/encode", _json(model="one/layer1")), (404,), "unknown_model")
    for cursor in ("AAAA", "a" * 200, "Li4vLi4"):
        yield Attack(f"cursor {cursor[:8]}", _get(f"/features?cursor={cursor}"), (404,), "unknown_cursor")
    for index in ("-1", "99999999999999999999", "1.5", "x", "%00"):
        for part in ("", "/surroundings"):
            yield Attack(f"feature {index}{part}", _get(f"/features/{index}{part}"), (422,), "validation")
    for part in ("", "/surroundings"):
        yield Attack(f"another feature{part}", _get(f"/features/10{part}"), (404,), "unknown_feature")

    yield from _by_text(limits)
    if limits.notes:
        yield from _notes()
    if limits.interventions:
        yield from _circuits(limits)
    for method in ("TRACE", "DELETE", "PUT", "PATCH", "OPTIONS"):
        yield Attack(method, _get("/encode").replace(b"GET", method.encode(), 1), (405,), "method_not_allowed")
    yield Attack("no such page", _get("/" + "a/" * 2000), (404,), "not_found")
    yield Attack("debugger", _get("/docs/../admin/load"), (404, 405))
    yield Attack("a log line of its own", _get("/healthz", X_Request_ID="a\tb<script>" + "x" * 3000), (200,))
    yield from _duplicates()
    yield from _malformed()
    yield Attack("nothing at all", b"", (0,), leaves=True)
    yield Attack("a body that ends early", _post("/encode", _json(), Content_Length="5000"), (0, 400), leaves=True)
    yield Attack("HTML", _post("/encode", _json(inputs="<script>alert(1)</script>")), (200,))
    yield Attack("NUL", _post("/encode", _json(inputs="a\0b")), (200,))
    yield Attack("overrides and bidi", _post("/encode", _json(inputs="\u202e\u2066\ufeff\U0001f600\U000e0001")), (200,))


def _by_text(limits: Settings) -> Iterator[Attack]:
    """Features that tell texts apart."""

    def ask(name: str, answers: tuple[int, ...], kind: str | None, **fields: Any) -> Attack:
        body = json.dumps({"texts": NAME} | fields).encode()
        return Attack(f"by text {name}", _post("/features/by-text", body), answers, kind)

    tokens, no = limits.max_input_tokens, "validation"
    for name, value in (
        ("texts", {}), ("texts", [1]), ("texts", [["a"]]), ("against", 1), ("against", [None]), ("top_k", 0),
        ("top_k", 1e30), ("top_k", 1025), ("prefix", 5), ("prefix", "4"), ("truncate", 1), ("inputs", "a"),
        ("min_activation", 0), ("__proto__", {}),
    ):  # fmt: skip
        yield ask(f"{name} {str(value)[:20]}", (422,), no, **{name: value})
    for name in ("texts", "against"):
        for empty in ("", [], [""], ["a", ""]):
            yield ask(f"empty {name} {empty}", (400,), "empty_inputs", **{name: empty})
    yield ask("model", (404,), "unknown_model", model="../one")
    yield ask("too many", (413,), "too_many_inputs", texts=["a"], against=["a"] * limits.max_inputs)
    yield ask("too long", (413,), "input_too_long", against="a" * tokens)
    many = ["a" * (tokens - 1)] * (limits.max_request_tokens // tokens)
    yield ask("too many in all", (413,), "too_many_tokens", texts=many, against="a")
    yield ask("NUL", (200,), None, texts="a\0b", against="\u202e<script>")
    yield Attack("by text as a form", _post("/features/by-text", b"texts=a", "text/plain"), (415,))
    yield Attack("by text, asked for", _get("/features/by-text?texts=a"), (405,), "method_not_allowed")


def _notes() -> Iterator[Attack]:
    """Notes, of a service that keeps them; those that are taken are of a feature of their own."""

    def note(
        name: str, body: bytes, answers: tuple[int, ...], error_type: str | None, place: str = "8", **more: Any
    ) -> Attack:
        sent = _post(f"/features/{place}/note{more.pop('query', '')}", body, **more).replace(b"POST", b"PUT", 1)
        return Attack(f"note {name}", sent, answers, error_type)

    refused, no = (422,), "validation"
    for body in ({"note": NAME * 50}, {"note": [NAME]}, {"note": {}}, {"star": 1}, {"star": "true"}, {}, {"seen": NAME},
                 {"star": True, "seen": 1}, {"note": NAME, "__proto__": 1}):  # fmt: skip
        yield note(str(body)[:40], json.dumps(body).encode(), refused, no)
    yield note("with a key twice", b'{"note": "a", "note": "b"}', refused, no)
    yield note("lone surrogate", b'{"note": "\\ud800"}', (400,), "malformed_json")
    yield note("of no feature", b'{"note": "a"}', (404,), "unknown_feature", "10")
    for place in ("-1", "99999999999999999999", "..", "%2e%2e", "8%2f..", "8%00"):
        yield note(f"of {place}", b'{"note": "a"}', (404, 405, 422), None, place)
    yield note("of another layer", b'{"note": "a"}', refused, "unknown_layer", "8", query="?layer=0")
    yield note("of no run", b'{"note": "a"}', (404,), "unknown_model", "8", query="?model=..%2fone")
    yield note("as a form", b"note=a", (415,), "unsupported_media_type", kind="application/x-www-form-urlencoded")
    yield note("as text", b'{"note": "a"}', (415,), "unsupported_media_type", kind="text/plain")
    yield Attack("a note to read", _get("/features/8/note"), (405,), "method_not_allowed")
    for words in ("a\0b", "\r\nX: y", "a\x85b"):
        yield note(f"refused {words!r}", json.dumps({"note": words}).encode(), refused, no)
    for words in ("<script>alert(1)</script>", "\u202e\u2066\ufeff\U000e0001", "../../x"):
        yield note(f"taken {words[:9]!r}", json.dumps({"note": words}).encode(), (200,), None)


def _circuits(limits: Settings) -> Iterator[Attack]:
    """Graphs and interventions, of a service that has them, with limits of 32 tokens and 64 features."""
    change = {"layer": 1, "feature": 1, "value": 1}

    def graph(name: str, answers: tuple[int, ...], kind: str | None, **fields: Any) -> Attack:
        return Attack(f"graph {name}", _post("/graph", json.dumps({"prompt": NAME} | fields).encode()), answers, kind)

    def steer(name: str, answers: tuple[int, ...], kind: str | None, **fields: Any) -> Attack:
        body = {"prompt": NAME, "interventions": [change], "max_tokens": 1} | fields
        return Attack(f"steer {name}", _post("/steer", json.dumps(body).encode()), answers, kind)

    def ablate(name: str, answers: tuple[int, ...], kind: str | None, **fields: Any) -> Attack:
        body = {"prompt": NAME, "layer": 1, "features": [1]} | fields
        return Attack(f"ablate {name}", _post("/ablate", json.dumps(body).encode()), answers, kind)

    refused, no = (422,), "validation"
    for job in ("x", "..", "%2e%2e", "%00", "a" * 101, "..%2f..%2fetc", "'--", "AAAAAAAAAAAAAAAAAAAAAA"):
        for place in (f"/graph/{job}", f"/graph/{job}/result"):
            yield Attack(f"{place[:40]}", _get(place), (404, 422))
        yield Attack(f"delete {job[:30]}", _get(f"/graph/{job}").replace(b"GET", b"DELETE", 1), (404, 422))
    yield Attack("all jobs", _get("/graph"), (405,), "method_not_allowed")
    yield Attack("all jobs to delete", _get("/graph").replace(b"GET", b"DELETE", 1), (405,), "method_not_allowed")
    yield Attack("a form of a graph", _get("/graph/x/result?format=../../etc"), (422,), no)
    for targets in ([], [""], [None], [[]], [{}], [1.5], [-1], [2**31], ["a" * 1001], [NAME], ["a"] * 11, {"layer": 1}):
        yield graph(f"targets {str(targets)[:20]}", refused, no, targets=targets)
    for place in ({"layer": 1, "token": 99, "feature": 1}, {"layer": 1, "token": 1, "feature": 2**31 - 1}):
        yield graph(f"target {place['token']}", (202, 422), None, targets=[place])
    for name, value in (
        ("node_share", 0), ("node_share", 1.01), ("edge_share", -1), ("edge_share", "1"), ("max_features", 0),
        ("prefix", 0), ("prefix", "4"), ("faithfulness", 1), ("tell", 1), ("input_ids", [1]),
    ):  # fmt: skip
        yield graph(f"{name} {value}", refused, no, **{name: value})
    yield Attack("graph of nothing", _post("/graph", b'{"prompt": ""}'), (400,), "empty_inputs")
    yield Attack("graph of no ids", _post("/graph", b'{"input_ids": []}'), (400,), "empty_inputs")
    body = b'{"prompt": "a", "targets": ["a", {"layer": 1, "layer": 0, "token": 1, "feature": 1}]}'
    yield Attack("graph with a key twice", _post("/graph", body), refused, no)
    yield graph("model", (404,), "unknown_model", model="../one")
    yield Attack("graph as a form", _post("/graph", b"prompt=a", "application/x-www-form-urlencoded"), (415,))
    for interventions in (
        [], {}, [None], [{}], [change | {"feature": -1}], [change | {"feature": 64}], [change | {"layer": 0}],
        [change | {"value": 1e7}], [change | {"value": "1"}], [change | {"mode": "__class__"}],
        [change | {"positions": []}], [change | {"positions": [-1]}], [change | {"positions": [1.5]}], [change] * 65,
    ):  # fmt: skip
        yield steer(f"interventions {str(interventions)[:60]}", refused, no, interventions=interventions)
    for number in ("NaN", "Infinity", "1e999"):
        sent = json.dumps({"prompt": NAME, "interventions": [change]}).replace('"value": 1', f'"value": {number}')
        yield Attack(f"steer by {number}", _post("/steer", sent.encode()), (400, 422))
    for name, value in (
        ("max_tokens", 0), ("max_tokens", 4097), ("n", 0), ("n", 17), ("n", 2), ("temperature", -1),
        ("temperature", 101), ("seed", -1), ("seed", 2**53), ("attention", "other"), ("special", 1),
        ("messages", [{"role": "user", "content": "a"}]),
    ):  # fmt: skip
        yield steer(f"{name} {value}", refused, no, **{name: value})
    many = limits.max_input_tokens
    yield steer("too many tokens", (413,), "input_too_long", max_tokens=many)
    yield steer("too many passes", (413,), "too_many_tokens", n=16, temperature=1, max_tokens=many // 2)
    yield Attack("steer as a picture", _post("/steer", b"{}", Accept="image/png"), (406,), "not_acceptable")
    yield Attack(
        "steer NUL", _post("/steer", json.dumps({"prompt": "a\0b", "interventions": [change]}).encode()), (200,)
    )
    for features in ([], {}, [None], [-1], [64], [2**31], [1.5], ["1"], [True], [[1]], [1] * 65, 1):
        yield ablate(f"features {str(features)[:30]}", refused, no, features=features)
    for name, value in (("layer", 0), ("layer", "1"), ("layer", None), ("input_ids", [1]), ("prefix", 4), ("n", 1)):
        yield ablate(f"{name} {value}", refused, no, **{name: value})
    yield ablate("too much", (413,), "input_too_long", prompt="a" * limits.max_graph_tokens)
    yield ablate("nothing", (400,), "empty_inputs", prompt="")
    yield ablate("an unknown token", refused, no, prompt=None, input_ids=[9999])
    yield ablate("of no run", (404,), "unknown_model", model="../one")
    yield ablate("NUL and overrides", (200,), None, prompt="a\0b\u202e")
    yield Attack(
        "ablate twice", _post("/ablate", b'{"prompt": "a", "layer": 1, "layer": 1, "features": [1]}'), refused, no
    )
    yield Attack("ablate by address", _get("/ablate?prompt=a"), (405,), "method_not_allowed")
    chat = {"messages": [{"role": "{{x}}", "content": "{% raw %}"}], "interventions": [change]}
    yield Attack("steer a template", _post("/steer", json.dumps(chat).encode()), refused, no)


def _duplicates() -> Iterator[Attack]:
    """What is said twice, so that two readers may read two things."""
    twice = b'{"inputs": "a", "inputs": "' + NAME.encode() + b'"}'
    yield Attack("a key twice", _post("/encode", twice), (422,), "validation")
    yield Attack("a key twice, escaped", _post("/encode", twice.replace(b'"i', b'"\\u0069', 1)), (422,), "validation")
    many = b"{" + b'"inputs":"a",' * 70_000 + b'"inputs":"a"}'
    yield Attack("a key many times", _post("/encode", many), (422,), "validation")
    entry = b'{"feature_index": 1, "activation_value": 1.0, "feature_index": 2}'
    yield Attack("a key twice, deep", _post("/decode", b'{"features": [[' + entry + b"]]}"), (422,), "validation")
    keys = json.dumps({"inputs": ['{"inputs": "a", "inputs": "b"}', "a:b::c"]}).encode()
    yield Attack("a text like keys", _post("/encode", keys), (200,))
    yield Attack("a parameter twice", _get("/features?limit=1&limit=2"), (422,), "validation")
    yield Attack("another parameter twice", _get("/report?model=one&model=two"), (422,), "validation")
    yield Attack("a list of features", _get("/features?feature=1&feature=2"), (200,))
    form = _post("/ui/login", b"key=a&key=b", "application/x-www-form-urlencoded", Origin="http://127.0.0.1")
    yield Attack("a field twice", form, (400,), "malformed_form")
    for header in ("Authorization", "Content-Type", "Host", "Origin"):
        doubled = _post("/encode", _json(), **{header.replace("-", "_"): "a"})
        doubled = doubled.replace(b"\r\n\r\n", f"\r\n{header}: b\r\n\r\n".encode(), 1)
        yield Attack(f"{header} twice", doubled, (400,), "duplicate_header")
    ids = _get("/healthz", X_Request_ID="a").replace(b"\r\n\r\n", b"\r\nX-Request-ID: b\r\n\r\n", 1)
    yield Attack("two ids", ids, (200,))
    accepts = _post("/encode", _json(), Accept="image/png").replace(b"\r\n\r\n", b"\r\nAccept: */*\r\n\r\n", 1)
    yield Attack("a list in two headers", accepts, (200,))


def _malformed() -> Iterator[Attack]:
    """What is no HTTP request, or hardly one; a proxy may answer some itself."""
    whole = _post("/encode", _json())
    for name, sent in (
        ("two lengths", whole.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n", 1)),
        ("a length and chunks", _post("/encode", b"0\r\n\r\n", Transfer_Encoding="chunked")),
        ("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n"),
        ("a method in lower case", _get("/healthz").replace(b"GET", b"get", 1)),
        ("a made-up method", _get("/healthz").replace(b"GET", b"FOO", 1)),
        ("a long address", _get("/" + "a" * 70_000)),
        ("a space in the address", _get("/a b")),
        ("an address that is not ASCII", _get("/\xe9")),
        ("a header without a name", _get("/healthz").replace(b"\r\n\r\n", b"\r\na b: c\r\n\r\n", 1)),
        ("NUL in a header", _get("/healthz", X="a\0b")),
        ("no chunk", _post("/healthz", b"zz\r\n", Content_Length="", Transfer_Encoding="chunked")),
        ("CONNECT", _get("/healthz").replace(b"GET /healthz", b"CONNECT a:1", 1)),
    ):
        yield Attack(name, sent, (400,), "malformed_http")
    chunks = b"%x\r\n" % len(_json()) + _json() + b"\r\n0\r\nX-Trailer: a\r\n\r\n"
    trailers = _post("/encode", chunks, Content_Length="", Transfer_Encoding="chunked", Trailer="X-Trailer")
    yield Attack("trailers", trailers, (200,))
    yield Attack("many headers", _get("/healthz", **{f"X_{n}": "a" for n in range(150)}), (200,))
    for protocol in ("websocket", "h2c"):
        upgrade = _get("/healthz", Upgrade=protocol, Sec_WebSocket_Key="YQ==", Sec_WebSocket_Version="13")
        yield Attack(protocol, upgrade.replace(b"Connection: close", b"Connection: Upgrade", 1), (200,))
    yield Attack("half closed", whole, (0, 400), leaves=True)


class Answer(NamedTuple):
    status: int
    """0 if the connection ended without one."""
    headers: dict[str, str]
    """By name in lower case; what came twice is joined by a comma."""
    body: bytes


def send(url: str, attack: Attack, headers: dict[str, str] | None = None) -> Answer:
    """Send the bytes, and read the answer, or until the server closes."""
    parts = urlsplit(url)
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items()).encode()
    sent = attack.sent.replace(b"\r\n", b"\r\n" + more, 1) if more else attack.sent
    received = b""
    with socket.create_connection((parts.hostname or "", parts.port or 80), 30) as connection:
        try:
            all(_sent(connection, part) for part in chain([sent], repeat(*attack.more)))
            if attack.leaves:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer came before everything was sent, and is there to be read
        try:
            while not _whole(received) and (part := connection.recv(1 << 16)):
                received += part
        except ConnectionResetError:
            pass  # what came before counts
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/1."):
        return Answer(0, {}, received)
    fields: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines[1:]):
        fields[name.lower()] = ", ".join([*filter(None, [fields.get(name.lower())]), value.strip()])
    return Answer(int(lines[0].split()[1]), fields, body)


def _sent(connection: socket.socket, data: bytes) -> bool:
    """Send the bytes; False as soon as there is something to be read. A proxy that has the answer may take no more of
    the request: who goes on sending then waits for ever."""
    left = memoryview(data)
    while left:
        readable, writable, _ = select.select([connection], [connection], [], connection.gettimeout())
        if readable:
            return False
        if not writable:
            raise TimeoutError(f"{len(left)} bytes were not taken")
        left = left[connection.send(left) :]
    return True


def _whole(received: bytes) -> bool:
    """Whether an answer with a length has arrived; a proxy may wait for the rest of the request before it closes."""
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(end and length and len(body) >= int(length[1]))
