"""The OpenAPI document: what FastAPI finds by itself, and what it cannot know.

Routes read their bodies themselves, before anything is parsed, so that the document gets the bodies' schemas from
`json_body`. Limits of the settings are written into it, as far as JSON Schema can say them: limits of tokens are in
words. Client generators read it, see tests/serve/test_serve_openapi.py: what they cannot read is said in another way.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve.contract import Settings
from serve.http.access import ROUTES

_REFERENCES = "#/components/schemas/{model}"
_HEADERS = {
    "X-Request-ID": {"description": "Names the request in the service's logs.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds after which to ask again.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string"}},
    "Location": {"description": "Address of the job that was made.", "schema": {"type": "string"}},
    "Allow": {"description": "Methods that there are.", "schema": {"type": "string"}},
}
_MODELS = "x-mtc-models"


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is JSON of `model`."""
    schema = model.model_json_schema(ref_template=_REFERENCES)
    parts = schema.pop("$defs", {}) | {model.__name__: schema}
    content = {"application/json": {"schema": {"$ref": _REFERENCES.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}, _MODELS: parts}


def document(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The whole document, for the limits of `settings`."""
    found = get_openapi(
        title="Matryoshka transcoder", version="1", routes=app.routes,
        description="Feature activations of text, the analysis of the features, graphs and interventions, of a nested "
        "transcoder.",
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
    _complete_bodies(schemas, settings)
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
        names += ["Location"] if status == "202" else []
        names += ["Retry-After"] if status in ("429", "503") else ["WWW-Authenticate"] if status == "401" else []
        for name in names:
            headers[name] = _HEADERS[name]


def _complete_bodies(schemas: dict[str, Any], settings: Settings) -> None:
    """Limits of the settings, what excludes what, examples. What depends on a run is not here: another may answer
    before the document is read again."""
    limits = f"At most {settings.max_input_tokens} tokens each, {settings.max_request_tokens} in all, BOS included."
    for name in ("EncodeRequest", "TokenizeRequest"):
        properties = schemas[name]["properties"]
        properties["inputs"]["description"] += f" {limits}"
        for part in properties["inputs"]["anyOf"] + properties["input_ids"]["anyOf"]:
            if part.get("type") == "array" and part["items"].get("type") in ("string", "array"):
                part["maxItems"] = settings.max_inputs
        for part in properties["input_ids"]["anyOf"]:
            if part.get("type") == "array":
                (part["items"] if part["items"].get("type") == "array" else part)["maxItems"] = (
                    settings.max_input_tokens
                )
        schemas[name] |= _either("inputs", "input_ids")
    sides = schemas["ByTextRequest"]["properties"]
    sides["texts"]["description"] += f" {limits} Those of `against` count with them."
    for part in sides["texts"]["anyOf"] + sides["against"]["anyOf"]:
        if part.get("type") == "array":
            part["maxItems"] = settings.max_inputs
    schemas["DecodeRequest"] |= _either("features", "csr")
    for name in ("GraphRequest", "AblateRequest"):
        schemas[name] |= _either("prompt", "input_ids")
        schemas[name]["properties"]["prompt"]["description"] += f" At most {settings.max_graph_tokens} tokens."
    schemas["GraphRequest"]["properties"]["max_features"]["description"] += f" At most {settings.max_graph_features}."
    for name, example in _EXAMPLES.items():
        schemas[name]["example"] = example


def _either(one: str, other: str) -> dict[str, Any]:
    """Exactly one of two fields is given. Not as `oneOf`: generators of clients would see two types without fields."""
    given = {name: {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in (one, other)}
    return {"if": given[one], "then": {"properties": {other: {"type": "null"}}}, "else": given[other]}


_EXAMPLES = {
    "EncodeRequest": {"inputs": "We the people", "top_k": 4},
    "TokenizeRequest": {"inputs": "We the people"},
    "DecodeRequest": {"features": [[{"feature_index": 0, "activation_value": 1.5}]]},
    "ByTextRequest": {"texts": "The dollar and the gold standard", "against": "We the people", "top_k": 4},
    "GraphRequest": {"prompt": "We the people", "max_features": 256},
    "AblateRequest": {"prompt": "We the people", "layer": 1, "features": [0]},
    "NoteRequest": {"note": "oaths and offices", "star": True},
    "SteerRequest": {"prompt": "We the people", "interventions": [{"layer": 1, "feature": 0, "value": 0.0}]},
}
