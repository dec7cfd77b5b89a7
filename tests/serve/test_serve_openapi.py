"""The OpenAPI document against the service: schemathesis sends requests that fit it and that do not, and checks the
answers by it. What JSON Schema cannot say is in schemathesis.toml."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from serve_local import make_analysed_run, served

from serve.http import ROUTES, keys

ANALYSIS = {"AbsorbedFeature", "Feature", "LogitEffect", "Neighbour", "Parent", "SplitFeature", "TokenCount"}
"""Parts of the report, which are described for it."""


class Api(NamedTuple):
    url: str
    headers: dict[str, str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    root = tmp_path_factory.mktemp("runs")
    key = keys.add_key(root / "keys.json", "tests", admin=True, expires=None)
    with served(make_analysed_run(root / "one"), max_input_tokens=64, api_keys_file=str(root / "keys.json")) as url:
        yield Api(url, {"Authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{api.url}/openapi.json", headers=api.headers).json()
    return found


def test_schemathesis_finds_nothing(api: Api, document: dict[str, Any], tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "schemathesis.toml"
    arguments = [f"{api.url}/openapi.json", "-H", f"Authorization: {api.headers['Authorization']}", "--checks", "all",
                 "--max-examples", "20", "--generation-deterministic", "--no-color"]  # fmt: skip
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    operations = sum(len(methods) for methods in document["paths"].values())
    assert f"Tested: {operations}" in done.stdout
    passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert passed and passed[1] == passed[2] and int(passed[1]) > 500, done.stdout


def test_document_is_complete(document: dict[str, Any]) -> None:
    listed = {
        (method.upper(), path.replace("{name}", "{name:path}"))
        for path, methods in document["paths"].items()
        for method in methods
    }
    pages = {route for route in ROUTES if route[1].startswith(("/ui", "/docs", "/openapi.json"))}
    assert listed == set(ROUTES) - pages
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (method, path)
            public = ROUTES[method.upper(), path.replace("{name}", "{name:path}")] == "public"
            assert operation["security"] == ([] if public else [{"key": []}]), path
            assert ("401" in operation["responses"]) is not public
            for status, answer in operation["responses"].items():
                assert "X-Request-ID" in answer["headers"]
                if int(status) >= 400:
                    ref = answer["content"]["application/json"]["schema"]["$ref"]
                    assert ref == "#/components/schemas/ErrorResponse", (method, path, status)
    # The statuses that /encode may answer.
    encode = document["paths"]["/encode"]["post"]["responses"]
    assert set(encode) == {
        str(status) for status in (200, 400, 401, 403, 404, 406, 408, 409, 413, 415, 422, 429, 500, 503, 504)
    }
    assert "Retry-After" in encode["429"]["headers"] and "Retry-After" in encode["503"]["headers"]
    assert set(encode["200"]["content"]) == {
        "application/json", "application/x-ndjson", "application/vnd.msgpack", "application/vnd.safetensors"
    }  # fmt: skip


def test_every_field_and_parameter_is_described(document: dict[str, Any]) -> None:
    """In words that need no neighbour: a description that begins with "Of", "Its" or the like leans on another."""
    fields = {
        f"{name}.{field}": schema.get("description", "")
        for name, parts in document["components"]["schemas"].items()
        for field, schema in parts.get("properties", {}).items()
    }
    fields |= {
        f"{path} {parameter['name']}": parameter.get("description", "")
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
    }
    assert len(fields) > 120
    assert [name for name, description in fields.items() if not description] == []
    own = {name: description for name, description in fields.items() if name.split(".")[0] not in ANALYSIS}
    assert [name for name, text in own.items() if re.match(r"(Of|Its|Their|These|Only these|The run\.)\b", text)] == []
