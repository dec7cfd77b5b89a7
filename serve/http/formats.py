"""Answers as JSON, NDJSON, msgpack and safetensors. Activations are never rounded: JSON numbers are the float32's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgpack
import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import save

from serve.contract import Encoded, Tokenised
from serve.service import ServedLayer

JSON, NDJSON = "application/json", "application/x-ndjson"
MSGPACK, SAFETENSORS = "application/vnd.msgpack", "application/vnd.safetensors"
ENCODE_FORMATS = (JSON, NDJSON, MSGPACK, SAFETENSORS)
TOKENIZE_FORMATS = (JSON, MSGPACK)
DECODE_FORMATS = (JSON, MSGPACK, SAFETENSORS)
FORMAT_VERSION = "1"


class Envelope(NamedTuple):
    """What an answer says beside its results."""

    layer: ServedLayer
    prefix: int | None
    """The nested dictionary used, or all features; not said where none is."""
    request_id: str
    labels: Sequence[str | None] | None = None
    """Labels of all features, if those of the answer's are wanted."""


def encode_answer(
    media_type: str, envelope: Envelope, csr: bool, inputs: Sequence[Tokenised], found: Sequence[Encoded]
) -> bytes:
    """A whole answer to `POST /encode` in one of the formats but NDJSON. `csr` says the form; safetensors has one."""
    if media_type == SAFETENSORS:
        return _encode_tensors(envelope, inputs, found)
    packed = media_type == MSGPACK
    results = [input_result(envelope, a, b, csr, packed) for a, b in zip(inputs, found, strict=True)]
    return _dump(media_type, _answer(envelope, results=results, usage=usage(inputs)))


def tokenize_answer(media_type: str, envelope: Envelope, inputs: Sequence[Tokenised]) -> bytes:
    """A whole answer to `POST /tokenize`."""
    results = [_tokens(envelope.layer, each) for each in inputs]
    return _dump(media_type, _answer(envelope, results=results, usage=usage(inputs)))


def decode_answer(media_type: str, envelope: Envelope, reconstruction: NDArray[np.float32]) -> bytes:
    """A whole answer to `POST /decode`; `reconstruction` is [tokens, d_target]."""
    count = {"inputs": 1, "tokens": len(reconstruction)}
    if media_type == SAFETENSORS:
        tensors = {envelope.layer.identity.target: np.ascontiguousarray(reconstruction, "<f4")}
        return save(tensors, _metadata(envelope, "mtc-decode", count))
    values = _array(reconstruction) if media_type == MSGPACK else reconstruction.tolist()
    return _dump(media_type, _answer(envelope, reconstruction=values, usage=count))


def first_line(envelope: Envelope) -> bytes:
    """How an NDJSON answer begins."""
    return orjson.dumps({"type": "model"} | _answer(envelope)) + b"\n"


def result_line(envelope: Envelope, index: int, tokenised: Tokenised, encoded: Encoded, csr: bool) -> bytes:
    """One input's line."""
    result = input_result(envelope, tokenised, encoded, csr, False)
    return orjson.dumps({"type": "result", "index": index} | result) + b"\n"


def last_line(inputs: Sequence[Tokenised]) -> bytes:
    """How a whole NDJSON answer ends."""
    return orjson.dumps({"type": "usage"} | usage(inputs)) + b"\n"


def usage(inputs: Sequence[Tokenised]) -> dict[str, int]:
    return {"inputs": len(inputs), "tokens": sum(len(each.ids) for each in inputs)}


def entries(inputs: Sequence[Encoded]) -> int:
    """How much there is to write down."""
    return sum(len(each.indices) + len(each.indptr) for each in inputs)


def input_result(envelope: Envelope, tokenised: Tokenised, encoded: Encoded, csr: bool, packed: bool) -> dict[str, Any]:
    """`serve.contract.schemas.InputResult`; `packed` keeps the matrix's arrays as bytes."""
    result = _tokens(envelope.layer, tokenised)
    if csr:
        arrays: dict[str, NDArray[Any]] = {
            "indptr": encoded.indptr,
            "indices": encoded.indices,
            "values": encoded.values,
        }
        result["csr"] = {name: _array(array) if packed else array.tolist() for name, array in arrays.items()}
    else:
        result["features"] = _pairs(encoded) if packed else orjson.Fragment(_pairs_json(encoded))
    if envelope.labels is not None:
        result["labels"] = _labels(envelope.labels, [encoded])
    if encoded.l0 is not None:
        result["l0"] = encoded.l0.tolist()
    if encoded.relative_error is not None:
        errors = encoded.relative_error.tolist()
        result["relative_error"] = [None if value != value else value for value in errors]  # NaN is not itself
    return result


def _labels(labels: Sequence[str | None], found: Sequence[Encoded]) -> dict[str, str | None]:
    """Those of the features that are active somewhere."""
    indices = np.unique(np.concatenate([each.indices for each in found]))
    return {str(i): labels[i] for i in indices.tolist()}


def _pairs(encoded: Encoded) -> list[list[dict[str, float]]]:
    pairs = [
        {"feature_index": i, "activation_value": v}
        for i, v in zip(encoded.indices.tolist(), encoded.values.tolist(), strict=True)
    ]
    bounds = encoded.indptr.tolist()
    return [pairs[a:b] for a, b in pairwise(bounds)]


def _pairs_json(encoded: Encoded) -> bytes:
    """`_pairs` as JSON, put together from text, which spares an object for each entry: a third less time."""
    count = len(encoded.indices)
    pieces = [b'},{"feature_index":', b"", b',"activation_value":', b""] * count
    pieces[1::4], pieces[3::4] = _numbers(encoded.indices), _numbers(encoded.values.astype(np.float64))
    rows = [b"".join(pieces[4 * a : 4 * b]) for a, b in pairwise(encoded.indptr.tolist())]
    return b"[" + b",".join(b"[" + row[2:] + b"}]" if row else b"[]" for row in rows) + b"]"


def _numbers(array: NDArray[Any]) -> list[bytes]:
    """Each as JSON."""
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",") if len(array) else []


def _tokens(layer: ServedLayer, tokenised: Tokenised) -> dict[str, Any]:
    ids = tokenised.ids.tolist()
    return {
        "tokens": layer.run.tokeniser.strings(tokenised),
        "token_ids": ids,
        "offsets": None if tokenised.offsets is None else tokenised.offsets.tolist(),
        "is_special": tokenised.special.tolist(),
        "truncated": tokenised.truncated,
    }


def _answer(envelope: Envelope, **parts: Any) -> dict[str, Any]:
    prefix = {} if envelope.prefix is None else {"prefix": envelope.prefix}
    return {"model": envelope.layer.identity.model_dump()} | prefix | parts | {"request_id": envelope.request_id}


def _dump(media_type: str, answer: dict[str, Any]) -> bytes:
    if media_type == MSGPACK:
        packed: bytes = msgpack.packb(answer)
        return packed
    return orjson.dumps(answer)


def _array(array: NDArray[Any]) -> dict[str, Any]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": little.tobytes()}


def _metadata(envelope: Envelope, kind: str, count: dict[str, int]) -> dict[str, str]:
    return {
        "format": kind, "format_version": FORMAT_VERSION, "model": envelope.layer.identity.model_dump_json(),
        "prefix": str(envelope.prefix), "usage": json.dumps(count), "request_id": envelope.request_id,
    }  # fmt: skip


def _encode_tensors(envelope: Envelope, inputs: Sequence[Tokenised], found: Sequence[Encoded]) -> bytes:
    """One matrix over all inputs' tokens."""
    starts = np.cumsum([0, *(len(each.indices) for each in found)])
    tensors: dict[str, NDArray[Any]] = {
        "indptr": np.concatenate([each.indptr[:-1] + start for each, start in zip(found, starts, strict=False)]
                                 + [starts[-1:]]).astype("<i8"),
        "indices": np.concatenate([each.indices for each in found]).astype("<i4"),
        "values": np.concatenate([each.values for each in found]).astype("<f4"),
        "token_ids": np.concatenate([each.ids for each in inputs]).astype("<i4"),
        "is_special": np.concatenate([each.special for each in inputs]).astype(np.uint8),
        "input_offsets": np.cumsum([0, *(len(each.ids) for each in inputs)]).astype("<i8"),
    }  # fmt: skip
    for name, kind, parts in (
        ("offsets", "<i4", [each.offsets for each in inputs]), ("l0", "<i4", [each.l0 for each in found]),
        ("relative_error", "<f4", [each.relative_error for each in found]),
    ):  # fmt: skip
        if parts[0] is not None:
            tensors[name] = np.concatenate([part for part in parts if part is not None]).astype(kind)
    tokens = [string for each in inputs for string in envelope.layer.run.tokeniser.strings(each)]
    metadata = _metadata(envelope, "mtc-encode", usage(inputs)) | {
        "tokens": orjson.dumps(tokens).decode(),
        "truncated": json.dumps([each.truncated for each in inputs]),
    }
    if envelope.labels is not None:
        metadata["labels"] = orjson.dumps(_labels(envelope.labels, found)).decode()
    return save(tensors, metadata)
