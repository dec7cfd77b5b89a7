"""Reading a request's body: what is too long, too slow, too deep or no JSON is refused before it is parsed."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import TypeVar
from urllib.parse import parse_qsl

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from serve.contract import ServiceError, Settings
from serve.http.errors import invalid, repeated

M = TypeVar("M", bound=BaseModel)

IN_THREAD = 1 << 16
"""Bytes from which a body is parsed in a thread."""
_JSON, _FORM = (
    re.compile(rf"application/{kind}\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE)
    for kind in ("json", "x-www-form-urlencoded")
)
# Matches at every quote, whatever follows: else the search would begin anew at each, in quadratic time.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_STEP = np.zeros(256, np.int32)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_EMPTY = {"string_too_short", "too_short"}
_INPUTS = {"inputs", "input_ids", "prompt", "messages", "texts", "against"}
MIXED = 64
"""Longest list in which texts or numbers may stand beside objects."""


async def read_json(request: Request, model: type[M], settings: Settings) -> M:
    """The body as `model`.

    Raises ServiceError: 400 no JSON or empty inputs, 408 too slow, 413 too long or too deep, 415 another media type or
    an encoding, 422 JSON that is not a `model`. None of them repeats what was sent.
    """
    _check_headers(request, settings, _JSON, "application/json")
    body = await _read(request, settings)
    if len(body) > IN_THREAD:
        return await asyncio.to_thread(parse, body, model, settings.max_json_depth)
    return parse(body, model, settings.max_json_depth)


async def read_form(request: Request, settings: Settings) -> dict[str, str]:
    """The fields of a form that a page sent. Raises ServiceError as `read_json`, 400 for what is no form."""
    _check_headers(request, settings, _FORM, "application/x-www-form-urlencoded")
    body = await _read(request, settings)
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=16, errors="strict")
    except ValueError:
        raise ServiceError(400, "malformed_form", "the body is not a form of a few fields") from None
    if len(form := dict(pairs)) < len(pairs):
        raise ServiceError(400, "malformed_form", "a field of the form is given twice")
    return form


def parse(body: bytes, model: type[M], max_depth: int) -> M:
    """JSON as `model`; raises ServiceError as `read_json`."""
    bare = _STRING.sub(b"", body)
    found = depth(bare)
    if found > max_depth:
        detail = {"limit": max_depth, "value": found}
        raise ServiceError(413, "too_deep", f"the body nests {found} deep, the limit is {max_depth}", detail)
    try:
        asked = model.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        if any(fault["type"] == "json_invalid" for fault in faults):
            raise ServiceError(400, "malformed_json", "the body is not JSON in UTF-8") from None
        for fault in faults:
            if fault["type"] in _EMPTY and fault["loc"][0] in _INPUTS:
                field, *rest = (
                    str(part)
                    for part in fault["loc"]
                    if not str(part).startswith(("list[", "constrained", "function-"))
                )
                where = field + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in rest)
                raise ServiceError(400, "empty_inputs", f"{where} is empty", {"field": where}) from None
        raise invalid(error) from None
    # Outside strings, each key has a colon: the parser keeps the last one of several, and no model has a map.
    if bare.count(b":") > _keys(asked):
        raise repeated(_repeated_keys(body))
    return asked


def depth(bare: bytes) -> int:
    """How deep lists and objects nest in JSON without its strings. Linear, whatever the body holds."""
    codes = np.frombuffer(bare, np.uint8)
    return int(_STEP[codes].cumsum().max(initial=0)) if len(codes) else 0


def _keys(value: object) -> int:
    """Keys of the objects that were read."""
    if isinstance(value, BaseModel):
        return len(value.model_fields_set) + sum(_keys(getattr(value, name)) for name in value.model_fields_set)
    if not isinstance(value, list) or not value:
        return 0
    if isinstance(value[0], list):
        return sum(map(_keys, value))
    if isinstance(value[0], BaseModel) or len(value) <= MIXED:  # of what has no objects inside
        return sum(len(each.model_fields_set) for each in value if isinstance(each, BaseModel))
    return 0


def _repeated_keys(body: bytes) -> list[str]:
    """Keys that an object has more than once; slower than the parser, and for bodies that are refused."""
    found: set[str] = set()

    def collect(pairs: list[tuple[str, object]]) -> None:
        names = Counter(name for name, _ in pairs)
        found.update(name for name, times in names.items() if times > 1)

    json.loads(body, object_pairs_hook=collect)
    return sorted(found)


def _check_headers(request: Request, settings: Settings, wanted: re.Pattern[str], name: str) -> None:
    content_type = request.headers.get("content-type", "")
    if not wanted.fullmatch(content_type.strip()):
        message = f"Content-Type is {content_type[:100]!r}, {name} is wanted"
        raise ServiceError(415, "unsupported_media_type", message)
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ServiceError(415, "unsupported_encoding", f"Content-Encoding {encoding[:100]!r} is not taken")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > settings.max_body_bytes:
        raise _too_large(settings.max_body_bytes, int(length))


async def _read(request: Request, settings: Settings) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > settings.max_body_bytes:
                    raise _too_large(settings.max_body_bytes, size)
                parts.append(part)
    except TimeoutError:
        limit = settings.body_timeout_s
        message = f"the body had not arrived after {limit:g} s"
        raise ServiceError(408, "slow_body", message, {"limit": limit}, {"Connection": "close"}) from None
    except ClientDisconnect:
        raise ServiceError(400, "malformed_json", "the body ended early") from None
    return b"".join(parts)


def _too_large(limit: int, value: int) -> ServiceError:
    message = f"the body has {value} bytes or more, the limit is {limit}"
    return ServiceError(413, "too_large", message, {"limit": limit, "value": value}, {"Connection": "close"})
