"""The OpenAPI document: what FastAPI finds by itself, and what it cannot know.

Routes read their bodies themselves, before anything is parsed, so that the document gets the bodies' schemas from
`json_body`. Limits of the settings and of the current run are written into it, as far as JSON Schema can say
them: limits of tokens are in words.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve.contract import Settings
from serve.http.access import ROUTES
from serve.service import ServedRun

_REFERENCES = "#/components/schemas/{model}"
_HEADERS = {
    "X-Request-ID": {"description": "Names the request in the service's logs.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds after which to ask again.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string"}},
    "Allow": {"description": "Methods that there are.", "schema": {"type": "string"}},
}
_MODELS = "x-mtc-models"


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is JSON of `model`."""
    schema = model.model_json_schema(ref_template=_REFERENCES)
    parts = schema.pop("$defs", {}) | {model.__name__: schema}
    content = {"application/json": {"schema": {"$ref": _REFERENCES.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}, _MODELS: parts}


def document(app: FastAPI, settings: Settings, run: ServedRun) -> dict[str, Any]:
    """The whole document, for the limits of `settings` and of the run that is current."""
    found = get_openapi(
        title="Matryoshka transcoder", version="1", routes=app.routes,
        description="Feature activations of text, and the analysis of the features, of a nested transcoder.",
    )  # fmt: skip
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    with_keys = settings.api_keys_file is not None
    if with_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            schemas.update(operation.pop(_MODELS, {}))
            level = ROUTES.get((method.upper(), path)) or ROUTES.get(
                (method.upper(), path.replace("{name}", "{name:path}"))
            )
            public = level == "public" or not with_keys
            operation["security"] = [] if public else [{"key": []}]
            _complete(operation, public)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape, which is never answered
        schemas.pop(name, None)
    _limit(schemas, settings, run)
    return found


def _complete(operation: dict[str, Any], public: bool) -> None:
    """Headers of every answer, and none but the one shape of errors."""
    responses = operation["responses"]
    if "422" in responses and "ErrorResponse" not in str(responses["422"]):
        responses["422"] = {
            "description": "A parameter is not as documented; the answer names it.",
            "content": {"application/json": {"schema": {"$ref": _REFERENCES.format(model="ErrorResponse")}}},
        }
    if public:
        responses.pop("401", None)
    for status, response in responses.items():
        headers = response.setdefault("headers", {})
        names = ["X-Request-ID"]
        names += ["Retry-After"] if status in ("429", "503") else ["WWW-Authenticate"] if status == "401" else []
        for name in names:
            headers[name] = _HEADERS[name]


def _limit(schemas: dict[str, Any], settings: Settings, run: ServedRun) -> None:
    last = run.num_features - 1
    texts, ids = {"maxItems": settings.max_inputs}, {"maxItems": settings.max_input_tokens}
    for name in ("EncodeRequest", "TokenizeRequest"):
        properties = schemas[name]["properties"]
        for part in properties["inputs"]["anyOf"]:
            if part.get("type") == "array":
                part.update(texts)
        limits = f"At most {settings.max_input_tokens} tokens each, {settings.max_request_tokens} in all, BOS included."
        properties["inputs"]["description"] += f" {limits}"
        for part in properties["input_ids"]["anyOf"]:
            if part.get("type") == "array":
                inner = part["items"] if part["items"].get("type") == "array" else part
                inner.update(ids)
                inner["items"]["maximum"] = run.tokeniser.vocab_size - 1
                inner["items"].pop("exclusiveMaximum", None)
                if inner is not part:
                    part.update(texts)
        schemas[name]["oneOf"] = [
            {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
            for one, other in (("inputs", "input_ids"), ("input_ids", "inputs"))
        ]
    for name in ("EncodeRequest", "TokenizeRequest", "DecodeRequest"):
        schemas[name]["example"] = _EXAMPLES[name]
    encode = schemas["EncodeRequest"]["properties"]
    for part in encode["features"]["anyOf"]:
        if part.get("type") == "array":
            part["items"] = {"type": "integer", "minimum": 0, "maximum": last}
    prefix = {"anyOf": [{"type": "integer", "enum": list(run.prefixes)}, {"type": "null"}], "default": None}
    for name in ("EncodeRequest", "DecodeRequest"):
        properties = schemas[name]["properties"]
        properties["prefix"] = prefix | {"description": properties["prefix"].get("description", "")}
    decode = schemas["DecodeRequest"]
    decode["oneOf"] = [
        {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
        for one, other in (("features", "csr"), ("csr", "features"))
    ]
    index = schemas["FeatureActivation"]["properties"]["feature_index"]
    index.pop("exclusiveMaximum", None)
    index["maximum"] = last


_EXAMPLES = {
    "EncodeRequest": {"inputs": "We the people", "top_k": 4},
    "TokenizeRequest": {"inputs": "We the people"},
    "DecodeRequest": {"features": [[{"feature_index": 0, "activation_value": 1.5}]]},
}
