"""The JSON Schema of analysis.json and of the report's JSON: `python -m mtc.results.json_schema` prints it.

docs/analysis.schema.json is its output. `format_version` changes when the layout does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from mtc.results.analysis import FORMAT_VERSION, Analysis


def analysis_schema() -> dict[str, Any]:
    """The schema of an Analysis as a dict, JSON Schema 2020-12."""
    schema = Analysis.model_json_schema(schema_generator=_Generator)
    schema["properties"]["format_version"]["const"] = FORMAT_VERSION
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:mtc:analysis:{FORMAT_VERSION}",
        "required": ["format_version", *schema.pop("required")],
    }
    return head | schema


def render() -> str:
    """The schema as the text of docs/analysis.schema.json."""
    return json.dumps(analysis_schema(), indent=1) + "\n"


class _Generator(GenerateJsonSchema):
    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """A number, or the string that stands for it where JSON has none: NaN and the infinities."""
        number = super().float_schema(schema)
        return {"anyOf": [number, {"enum": ["NaN", "Infinity", "-Infinity"]}]}


if __name__ == "__main__":
    sys.stdout.write(render())
