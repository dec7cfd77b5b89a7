"""Settings in YAML, read so that a value means what the same word means as an option.

YAML 1.1 would make 8 of `010`, 90 of `1:30`, a date of `2026-11-29` and `false` of `off`. Here only `null` is more than
text; what a text stands for is the field's to say.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import yaml

from mtc.config.run_config import ConfigError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"), (b"", "utf-8-sig"),
)  # fmt: skip
"""What files of an encoding begin with."""


def read_settings(path: str | Path, name: str) -> dict[str, Any]:
    """The nested values of a YAML file; `name` is what messages call it. Raises ConfigError if they can't be read."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    return parse_settings(content, name)


def parse_settings(content: bytes, name: str) -> dict[str, Any]:
    """The nested values in YAML; `name` is what messages call it.

    Raises ConfigError with the line for what is no YAML in a Unicode encoding, no mapping, or has a key twice.
    """
    encoding = next(encoding for mark, encoding in _MARKS if content.startswith(mark))
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}: line {line} is not {encoding.removesuffix('-sig')}; save it as UTF-8") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{name}: line {line} holds the control character {chr(error.character)!r}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "its end"
        raise ConfigError(f"{name}: no YAML at {where}: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    if not isinstance(values, dict):
        found = {list: "a list", type(None): "nothing", str: f"the text {str(values)[:50]!r}"}.get(type(values), "else")
        raise ConfigError(f"{name}: a mapping of fields is wanted, such as `model: ...`, but it holds {found}")
    return values


_KNOWN = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Every scalar is text but null; no key stands twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag in _KNOWN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the loader or the fields' names say what is wrong
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
