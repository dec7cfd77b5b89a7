"""The OpenAPI document against the service: schemathesis sends requests that fit it and that do not, and checks the
answers by it. What JSON Schema cannot say is in schemathesis.toml."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import httpx
import pytest
from serve_local import make_analysed_run, make_run, served, wait_for_interventions

from serve.http import ROUTES, keys

ANALYSIS = {"AbsorbedFeature", "Feature", "LogitEffect", "Neighbour", "Parent", "SplitFeature", "TokenCount"} | {
    "Continuation", "Faithfulness", "Graph", "GraphNode", "NextToken", "PrefixScores", "Steered",
}  # fmt: skip
"""Parts of the report and of graphs, which are described for these."""


class Api(NamedTuple):
    url: str
    headers: dict[str, str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    root = tmp_path_factory.mktemp("runs")
    key = keys.add_key(root / "keys.json", "tests", admin=True, expires=None)
    settings = {"max_input_tokens": 64, "api_keys_file": str(root / "keys.json"), "interventions": True,
                "notes": True}  # fmt: skip
    with served(make_analysed_run(root / "one"), **settings) as url:
        with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as client:
            wait_for_interventions(client)
        yield Api(url, {"Authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{api.url}/openapi.json", headers=api.headers, timeout=60).json()
    return found


def within_limits(api: Api, document: dict[str, Any]) -> dict[str, Any]:
    """The document with what a client learns of the run that answers now, from /info and from what is refused."""
    found: dict[str, Any] = json.loads(json.dumps(document))
    with httpx.Client(base_url=api.url, headers=api.headers, timeout=60) as client:
        info = client.get("/info").json()
        refused = client.post("/tokenize", json={"input_ids": [2**30]}).json()
    schemas, model = found["components"]["schemas"], info["model"]
    parameters = [parameter for methods in found["paths"].values() for operation in methods.values()
                  for parameter in operation.get("parameters", []) if parameter["name"] == "layer"]  # fmt: skip
    of_layer = [parameter["schema"] for parameter in parameters]
    of_layer += [
        schemas[f"{name}Request"]["properties"]["layer"] for name in ("Encode", "Tokenize", "Decode", "ByText")
    ]
    assert len(of_layer) == 11  # whatever answers for a layer takes it
    for schema in of_layer:
        schema["anyOf"][0] = {"type": "integer", "enum": info["layers"]}
    (sort,) = [each for each in found["paths"]["/features"]["get"]["parameters"] if each["name"] == "sort"]
    sort["schema"]["anyOf"][0]["enum"].remove("relevance")  # to what? it takes a query
    for name in ("EncodeRequest", "DecodeRequest", "ByTextRequest"):
        schemas[name]["properties"]["prefix"]["anyOf"][0] = {"type": "integer", "enum": model["prefixes"]}
    for name in ("EncodeRequest", "TokenizeRequest"):
        for part in schemas[name]["properties"]["input_ids"]["anyOf"][:2]:
            innermost = part["items"].get("items", part["items"])
            del innermost["exclusiveMaximum"]
            innermost["maximum"] = refused["detail"]["limit"]
    for index in (
        schemas["EncodeRequest"]["properties"]["features"]["anyOf"][0]["items"],
        schemas["FeatureActivation"]["properties"]["feature_index"],
    ):
        del index["exclusiveMaximum"]
        index["maximum"] = model["num_features"] - 1
    return found


def test_schemathesis_finds_nothing(api: Api, document: dict[str, Any], tmp_path: Path) -> None:
    config, schema = Path(__file__).parents[1] / "schemathesis.toml", tmp_path / "openapi.json"
    schema.write_text(json.dumps(within_limits(api, document)))
    arguments = [str(schema), "--url", api.url, "-H", f"Authorization: {api.headers['Authorization']}", "--checks",
                 "all", "--max-examples", "20", "--generation-deterministic", "--no-color"]  # fmt: skip
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config), "run", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    operations = sum(len(methods) for methods in document["paths"].values())
    assert f"Tested: {operations}" in done.stdout
    passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert passed and passed[1] == passed[2] and int(passed[1]) > 500, done.stdout


@pytest.fixture(scope="module")
def generated(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A client's package that openapi-python-client makes of the document."""
    root = tmp_path_factory.mktemp("generated")
    (root / "openapi.json").write_text(json.dumps(document))
    (root / "config.yaml").write_text("post_hooks: []\n")
    done = subprocess.run(
        [sys.executable, "-m", "openapi_python_client", "generate", "--path", "openapi.json", "--config", "config.yaml",
         "--meta", "none", "--output-path", "generated_client", "--fail-on-warning"],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


def test_generated_client_encodes(api: Api, generated: Path) -> None:
    """With types: what it sends and gets are fields, not anything."""
    client_module = importlib.import_module("generated_client")
    models = importlib.import_module("generated_client.models")
    endpoints = importlib.import_module("generated_client.api.activations")
    assert {"inputs", "input_ids", "top_k", "return_"} <= {f.name for f in attrs.fields(models.EncodeRequest)}
    key = api.headers["Authorization"].removeprefix("Bearer ")
    request = models.EncodeRequest(inputs="Hello", return_=models.EncodeRequestReturn.CSR)
    plain = httpx.post(
        f"{api.url}/encode", json={"inputs": "Hello", "return": "csr"}, headers=api.headers, timeout=60
    ).json()
    with client_module.AuthenticatedClient(base_url=api.url, token=key, timeout=httpx.Timeout(60)) as client:
        encode = importlib.import_module(f"{endpoints.__name__}.encode")
        answer = encode.sync(client=client, body=request)
        assert isinstance(answer, models.EncodeResponse)
        (result,) = answer.results
        assert result.token_ids == plain["results"][0]["token_ids"]
        assert result.csr.to_dict() == plain["results"][0]["csr"]
        assert answer.model.run_id == "one"
        refused = encode.sync(client=client, body=models.EncodeRequest(inputs="Hello", prefix=17))
        assert isinstance(refused, models.ErrorResponse) and refused.error_type == "validation"
        feature = importlib.import_module("generated_client.api.features.feature").sync(3, client=client)
        assert feature.feature.feature == 3
    with client_module.Client(base_url=api.url, timeout=httpx.Timeout(60)) as stranger:
        assert encode.sync_detailed(client=stranger, body=request).status_code == 401


def test_document_says_nothing_of_one_run(api: Api, document: dict[str, Any], tmp_path: Path) -> None:
    """Another run takes over with another dictionary, and what generators and clients have read holds."""
    names = {operation["operationId"] for methods in document["paths"].values() for operation in methods.values()}
    assert names == {
        "encode", "tokenize", "decode", "features", "features_by_text", "feature", "examples", "surroundings", "report",
        "report_file", "healthz",
        "readyz", "metrics", "runs", "load", "info", "graph", "graph_status", "graph_result", "graph_cancel", "steer",
        "ablate", "note",
    }  # fmt: skip
    with (
        served(make_analysed_run(tmp_path / "one"), make_run(tmp_path / "other")) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        before = client.get("/openapi.json").json()
        client.post("/admin/load", json={"model": "other"})
        assert before == client.get("/openapi.json").json()
    answers = {(path, method): next(iter(operation["responses"].items())) for path, methods in before["paths"].items()
               for method, operation in methods.items()}  # fmt: skip
    assert {place: status for place, (status, _) in answers.items() if status != "200"} == {
        ("/graph", "post"): "202", ("/graph/{job}", "delete"): "204",
    }  # fmt: skip
    assert [place for place, (_, answer) in answers.items() if "content" not in answer] == [("/graph/{job}", "delete")]


def test_nothing_but_the_reports_ratio_of_sums_is_called_fvu(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert not [name for name, parts in schemas.items() if "fvu" in parts.get("properties", {})]
    assert schemas["EncodeRequest"]["properties"]["include"]["items"]["enum"] == ["l0", "relative_error", "label"]


def test_document_is_complete(document: dict[str, Any]) -> None:
    listed = {
        (method.upper(), path.replace("{name}", "{name:path}"))
        for path, methods in document["paths"].items()
        for method in methods
    }
    pages = {route for route in ROUTES if route[1] == "/" or route[1].startswith(("/ui", "/docs", "/openapi.json"))}
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
