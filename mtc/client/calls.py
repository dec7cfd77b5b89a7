"""The requests of both clients, and how their answers are read; nothing here waits for anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar

import httpx
from safetensors import SafetensorError

from mtc.client.answers import (
    JSON,
    MEDIA_TYPES,
    NDJSON,
    Decoding,
    EncodedInput,
    Encoding,
    SparseRows,
    Tokenisation,
    csr_of,
    encoded_input,
    read_decoding,
    read_encoding,
    read_tokenisation,
)
from mtc.client.failures import ServiceError
from mtc.client.feature_answers import (
    ByTextOptions,
    Surroundings,
    TextFeatures,
    read_by_text,
    read_surroundings,
)

if TYPE_CHECKING:
    from mtc.results.circuits import Ablated, Graph, Intervention, Steered

T = TypeVar("T")
Format = Literal["safetensors", "msgpack", "json"]
Inputs = str | Sequence[str] | None
Progress = Callable[[dict[str, Any]], object]
"""Told what `GET /graph/{id}` says: among it the state, and of how many features how many are done."""
GRAPH_TIMEOUT_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Between two questions how far a graph is; each is half as long again as the one before."""


class EncodeOptions(TypedDict, total=False):
    """What `encode` may be asked beside its inputs; see `POST /encode`."""

    input_ids: Any
    """A window of token ids, or several, to encode instead of text."""
    model: str
    """Id of the run that answers."""
    layer: int
    """Layer of the run that answers; by default its lowest."""
    top_k: int
    """Most features returned for each token, its strongest; by default all."""
    features: Sequence[int]
    """Indices of the only features that are returned; by default all."""
    min_activation: float
    prefix: int
    """Size in features of the nested dictionary that encodes; by default the whole dictionary."""
    truncate: bool
    """Cut an input that is too long instead of refusing it."""
    include: Sequence[Literal["l0", "relative_error", "label"]]


class GraphOptions(TypedDict, total=False):
    """What `graph` may be asked beside its prompt; see `POST /graph`."""

    input_ids: Any
    """Token ids in the place of the prompt, read as they are."""
    model: str
    """Id of the run whose transcoders are used."""
    targets: Sequence[str | int | Mapping[str, int]]
    """Next tokens, as text or ids, or features, each a dict of `layer`, `token` and `feature`; by default the most
    probable tokens."""
    prefix: int
    """Size in features of the nested dictionaries that are used; by default the whole ones."""
    max_features: int
    """Most features that get edges of their own."""
    node_share: float
    """Share of the influence that nodes hold which pruning leaves; by default 0.8."""
    edge_share: float
    """Share of the influence among these that edges hold which pruning leaves; by default 0.98."""
    faithfulness: bool
    """Whether the strongest features are taken out of the real model as well."""


class SteerOptions(TypedDict, total=False):
    """What `steer` may be asked beside its prompt and interventions; see `POST /steer`."""

    messages: Sequence[Mapping[str, str]]
    """Messages of a chat in the place of the prompt, each a dict of `role` and `content`."""
    input_ids: Any
    """Token ids in the place of the prompt, read as they are."""
    model: str
    """Id of the run whose transcoders are used."""
    max_tokens: int
    """Most tokens of a continuation; by default 20."""
    n: int
    """Number of continuations of each model; by default 1."""
    temperature: float
    """What logits are divided by before a token is drawn; by default 0, the most probable token."""
    seed: int
    """Start of the random numbers; by default 0."""
    attention: Literal["free", "frozen"]
    """Whether attention reacts to the interventions, the default, or looks where it looks without."""
    special: bool
    """Whether special tokens are changed too."""


class Call(NamedTuple, Generic[T]):
    """One request of a client, and how its answer is read."""

    method: str
    path: str
    accept: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        headers = {"Accept": self.accept}
        content = None
        if self.body is not None:
            given = {name: _plain(value) for name, value in self.body.items() if value is not None}
            content = json.dumps(given, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
            headers["Content-Type"] = JSON
        parameters = {name: value for name, value in (self.parameters or {}).items() if value is not None}
        return {"method": self.method, "url": self.path, "headers": headers, "content": content, "params": parameters}


def check_address(base_url: str) -> str:
    """The address of a service as it is; raises ValueError for what is none."""
    try:
        address = httpx.URL(base_url)
        usable = address.scheme in ("http", "https") and bool(address.host) and (address.port or 1) < 1 << 16
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise ValueError(f"base_url={base_url!r}: an address such as http://127.0.0.1:8000 is wanted")
    return base_url


def encode(inputs: Inputs, format: Format, options: EncodeOptions) -> Call[Encoding]:
    body = {"inputs": inputs, **options, "return": "csr"}
    media_type = _media_type(format)
    return Call("POST", "/encode", media_type, lambda r: read_encoding(media_type, r.content), body)


def encode_stream(inputs: Inputs, options: EncodeOptions) -> Call[None]:
    return Call("POST", "/encode", NDJSON, lambda r: None, {"inputs": inputs, **options, "return": "csr"})


def tokenize(
    inputs: Inputs, input_ids: Any, model: str | None, layer: int | None, truncate: bool
) -> Call[Tokenisation]:
    body = {"inputs": inputs, "input_ids": input_ids, "model": model, "layer": layer, "truncate": truncate}
    return Call("POST", "/tokenize", JSON, lambda r: read_tokenisation(JSON, r.content), body)


def decode(
    rows: SparseRows, prefix: int | None, model: str | None, layer: int | None, format: Format
) -> Call[Decoding]:
    body = {"csr": csr_of(rows), "prefix": prefix, "model": model, "layer": layer}
    media_type = _media_type(format)
    return Call("POST", "/decode", media_type, lambda r: read_decoding(media_type, r.content), body)


def get(path: str, **parameters: Any) -> Call[dict[str, Any]]:
    return Call("GET", path, JSON, lambda r: r.json(), None, parameters)


def surroundings(feature: int, model: str | None, layer: int | None) -> Call[Surroundings]:
    parameters = {"model": model, "layer": layer}
    return Call(
        "GET", f"/features/{feature}/surroundings", JSON, lambda r: read_surroundings(r.json()), None, parameters
    )


def features_by_text(texts: Inputs, against: Inputs, options: ByTextOptions) -> Call[TextFeatures]:
    body = {"texts": texts, "against": against, **options}
    return Call("POST", "/features/by-text", JSON, lambda r: read_by_text(r.json()), body)


def note(
    feature: int, note: str | None, star: bool | None, seen: str | None, model: str | None, layer: int | None
) -> Call[dict[str, Any]]:
    body = {"note": note, "star": star, "seen": seen}
    place = {"model": model, "layer": layer}
    return Call("PUT", f"/features/{feature}/note", JSON, lambda r: r.json(), body, place)


def load(model: str) -> Call[dict[str, Any]]:
    return Call("POST", "/admin/load", JSON, lambda r: r.json(), {"model": model})


def submit_graph(prompt: str | None, options: GraphOptions) -> Call[dict[str, Any]]:
    return Call("POST", "/graph", JSON, lambda r: r.json(), {"prompt": prompt, **options})


def graph_result(job: Mapping[str, Any]) -> Call[Graph]:
    return Call("GET", job["result_url"], JSON, _read_graph)


def steer(
    prompt: str | None, interventions: Sequence[Intervention | Mapping[str, Any]], options: SteerOptions
) -> Call[None]:
    changes = [dict(each) for each in interventions]  # a record's fields, or a dict as it is
    kept = [{name: value for name, value in each.items() if value is not None} for each in changes]
    return Call("POST", "/steer", NDJSON, lambda r: None, {"prompt": prompt, "interventions": kept, **options})


def ablate(prompt: str | None, layer: int, features: Sequence[int], input_ids: Any, model: str | None) -> Call[Ablated]:
    body = {"prompt": prompt, "input_ids": input_ids, "model": model, "layer": layer, "features": features}
    return Call("POST", "/ablate", JSON, _read_ablated, body)


def _read_ablated(response: httpx.Response) -> Ablated:
    from mtc.results.circuits import Ablated  # as below

    return Ablated.model_validate_json(response.content)


def _read_graph(response: httpx.Response) -> Graph:
    # Not at the top: all records and pydantic come along, which the other calls do without.
    from mtc.results.circuits import Graph

    return Graph.model_validate_json(response.content)


def report(format: str, model: str | None, layer: int | None) -> Call[str]:
    media_types = {"markdown": "text/markdown", "html": "text/html", "json": JSON}
    if format not in media_types:
        raise ValueError(f"format={format!r} is none of {', '.join(media_types)}")
    return Call("GET", "/report", media_types[format], lambda r: r.text, None, {"model": model, "layer": layer})


def too_slow(job: Mapping[str, Any], timeout: float) -> ServiceError:
    message = f"the graph is not done after {timeout:g} s: its job is {job['state']}"
    return ServiceError(None, "timeout", message)


def authorization(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def read(call: Call[T], response: httpx.Response) -> T:
    try:
        return call.read(response)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        message = f"the answer to {call.method} {call.path} is not {call.accept} as documented: {error!r}"
        raise ServiceError(None, "unreadable", message, request_id=response.headers.get("x-request-id")) from error


class SteeredLines:
    """An NDJSON answer to `POST /steer`, as its parts arrive."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._last: dict[str, Any] | None = None

    def feed(self, part: bytes) -> Iterator[dict[str, Any]]:
        """The lines that end in this part; raises ServiceError for a line that says so."""
        *ends, rest = part.split(b"\n")
        for end in ends:
            try:
                line = json.loads(b"".join([*self._parts, end]))
                kind = line["type"]
            except (KeyError, TypeError, ValueError) as error:
                message = f"a line of the answer to POST /steer is not as documented: {error!r}"
                raise ServiceError(None, "unreadable", message) from error
            self._parts.clear()
            if kind == "error":
                raise ServiceError(None, line["error_type"], line["error"], line.get("detail"), line["request_id"])
            self._last = line if kind == "steered" else None
            yield line
        self._parts.append(rest)

    def end(self) -> Steered:
        """All of the answer, which has ended; raises ServiceError if its last line has not come."""
        from mtc.results.circuits import Steered  # as above

        if self._last is None:
            raise ServiceError(None, "incomplete", "the answer ended before its last line")
        try:
            return Steered.model_validate({name: value for name, value in self._last.items() if name != "type"})
        except ValueError as error:
            message = f"the last line of the answer to POST /steer is not as documented: {error!r}"
            raise ServiceError(None, "unreadable", message) from error


class Lines:
    """An NDJSON answer to `POST /encode`, as its parts arrive."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._whole = False

    def feed(self, part: bytes) -> Iterator[tuple[int, EncodedInput]]:
        """Index and features of the inputs whose lines end in this part; raises ServiceError for a line that says so.

        Lines end with \\n alone: tokens may have the other characters that Python takes for ends of lines.
        """
        *ends, rest = part.split(b"\n")
        for end in ends:
            yield from self._read(b"".join([*self._parts, end]))
            self._parts.clear()
        self._parts.append(rest)

    def end(self) -> None:
        """The answer has ended; raises ServiceError if its last line has not come."""
        if not self._whole:
            raise ServiceError(None, "incomplete", "the answer ended before its last line")

    def _read(self, line: bytes) -> Iterator[tuple[int, EncodedInput]]:
        try:
            found = json.loads(line)
            kind = found["type"]
            result = (found["index"], encoded_input(found)) if kind == "result" else None
        except (KeyError, TypeError, ValueError) as error:
            message = f"a line of the answer to POST /encode is not as documented: {error!r}"
            raise ServiceError(None, "unreadable", message) from error
        if kind == "error":
            raise ServiceError(None, found["error_type"], found["error"], found.get("detail"), found["request_id"])
        self._whole = kind == "usage"
        if result is not None:
            yield result


def _media_type(format: str) -> str:
    if format not in MEDIA_TYPES:
        raise ValueError(f"format={format!r} is none of {', '.join(MEDIA_TYPES)}")
    return MEDIA_TYPES[format]


def _plain(value: Any) -> Any:
    """A value for JSON: arrays, and sequences of arrays, become lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple | range) else value
