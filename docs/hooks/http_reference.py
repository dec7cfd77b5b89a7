"""The service's HTTP interface as a page, from the OpenAPI document of its own application; without Ray and models."""

from __future__ import annotations

import json
from typing import Any

from serve.contract import ReplicaMetrics, RunKey, Settings, State
from serve.http import ROUTES, create_app, document
from serve.service import Service


def openapi() -> dict[str, Any]:
    """The document for the default settings, with API keys."""
    key = RunKey("reference", "runs/reference", "0" * 64, "")
    nothing: Any = None  # no route is asked
    service = Service(
        Settings(run="runs/latest"), nothing, nothing, State("one", 1, key, (key,), key), ReplicaMetrics()
    )
    return document(create_app(service), Settings(run="runs/latest", api_keys_file="keys.json"))


def reference() -> str:
    """Routes, then the objects that they take and answer."""
    found = openapi()
    text = ["## Routes", "", _summary(found), ""]
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            text += _operation(method.upper(), path, operation)
    text += ["## Objects", ""]
    for name, schema in sorted(found["components"]["schemas"].items()):
        text += _object(name, schema)
    return "\n".join(text)


def _summary(found: dict[str, Any]) -> str:
    described = {
        (method.upper(), path): operation["description"].split("\n\n")[0].replace("\n", " ")
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    }
    rows = [("Request", "Key", "")]
    for (method, path), level in ROUTES.items():
        plain = path.replace(":path", "")
        what = described.get((method, plain))
        shown = f"`{method} {plain}`" if what is None else f"[`{method} {plain}`](#{_anchor(method, plain)})"
        rows.append((shown, level, what or "for browsers"))
    return _table(rows)


def _operation(method: str, path: str, operation: dict[str, Any]) -> list[str]:
    text = [f"### {method} {path} {{ #{_anchor(method, path)} }}", "", operation["description"], ""]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [("Parameter", "In", "Type", "Required", "")]
        for each in parameters:
            required = "yes" if each.get("required") else "no"
            schema = each.get("schema", {})
            description = each.get("description") or schema.get("description", "")
            rows.append((f"`{each['name']}`", each["in"], _type(schema), required, description))
        text += [_table(rows), ""]
    if body := operation.get("requestBody"):
        text += [f"Body: {_content(body['content'])}", ""]
    rows = [("Status", "Answer", "")]
    for status, answer in operation["responses"].items():
        rows.append((status, _content(answer.get("content", {})), answer.get("description", "")))
    return [*text, _table(rows), ""]


def _object(name: str, schema: dict[str, Any]) -> list[str]:
    text = [f"### {name}", ""]
    if description := schema.get("description"):
        text += [description, ""]
    if properties := schema.get("properties"):
        required = schema.get("required", [])
        rows = [("Field", "Type", "Required", "Default", "")]
        for field, value in properties.items():
            default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
            needed = "yes" if field in required else "no"
            rows.append((f"`{field}`", _type(value), needed, default, value.get("description", "")))
        text += [_table(rows), ""]
    if example := schema.get("example"):
        text += ["```json", json.dumps(example, indent=1), "```", ""]
    return text


def _type(schema: dict[str, Any]) -> str:
    if ref := schema.get("$ref"):
        name = ref.rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for kind in ("anyOf", "oneOf", "allOf"):
        if kind in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[kind]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_type(each) for each in schema["prefixItems"]) + "]"
        return f"list of {_type(schema.get('items', {}))}" + _limits(schema)
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "anything")) + _limits(schema)


def _limits(schema: dict[str, Any]) -> str:
    words = {
        "minimum": "from", "exclusiveMinimum": "more than", "maximum": "to", "exclusiveMaximum": "less than",
        "minItems": "at least", "maxItems": "at most", "minLength": "at least", "maxLength": "at most",
    }  # fmt: skip
    units = {"Items": " entries", "Length": " characters"}
    found = [
        f"{word} {schema[name]:,}{next((unit for end, unit in units.items() if name.endswith(end)), '')}"
        for name, word in words.items()
        if name in schema
    ]
    return f" ({', '.join(found)})" if found else ""


def _content(content: dict[str, Any]) -> str:
    shown = []
    for media_type, value in content.items():
        schema = value.get("schema") or {}
        shown.append(f"`{media_type}`" + (f" {_type(schema)}" if schema and schema != {"type": "string"} else ""))
    return ", ".join(shown)


def _anchor(method: str, path: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in f"{method} {path}").lower()
    return "-".join(words.split())


def _table(rows: list[tuple[str, ...]]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
