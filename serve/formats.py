"""Answers as JSON, NDJSON, msgpack and safetensors. Activations are never rounded."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from serve.results import Encoded, Tokenised
from serve.schemas import EncodeRequest
from serve.served_run import ServedRun

JSON, NDJSON = "application/json", "application/x-ndjson"
MSGPACK, SAFETENSORS = "application/vnd.msgpack", "application/vnd.safetensors"
ENCODE_FORMATS = (JSON, NDJSON, MSGPACK, SAFETENSORS)


def encode_answer(
    media_type: str, run: ServedRun, request: EncodeRequest, inputs: Sequence[Tokenised], found: Sequence[Encoded],
    request_id: str,
) -> bytes:  # fmt: skip
    """A whole answer to `POST /encode` in one of the formats but NDJSON."""
    results = []
    for each, encoded in zip(inputs, found, strict=True):
        results.append({
            "tokens": [run.tokeniser.token(i) for i in each.ids.tolist()],
            "token_ids": each.ids.tolist(),
            "offsets": None if each.offsets is None else each.offsets.tolist(),
            "is_special": each.special.tolist(),
            "truncated": each.truncated,
            "features": [
                [
                    {"feature_index": i, "activation_value": v}
                    for i, v in zip(encoded.indices[a:b].tolist(), encoded.values[a:b].tolist(), strict=True)
                ]
                for a, b in zip(encoded.indptr[:-1].tolist(), encoded.indptr[1:].tolist(), strict=True)
            ],
        })  # fmt: skip
    usage = {"inputs": len(inputs), "tokens": sum(len(each.ids) for each in inputs)}
    answer = {
        "model": run.identity.model_dump(), "prefix": request.prefix or run.num_features, "results": results,
        "usage": usage, "request_id": request_id,
    }  # fmt: skip
    return orjson.dumps(answer)
