"""Reading a request's body: what is too long, too slow, too deep or no JSON is refused before it is parsed."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from serve.errors import ServiceError, invalid
from serve.settings import Settings

M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request, model: type[M], settings: Settings) -> M:
    """The body as `model`.

    Raises ServiceError: 400 no JSON, 408 too slow, 413 too long or too deep, 415 another media type or an encoding,
    422 JSON that is not a `model`.
    """
    body = await request.body()
    if len(body) > settings.max_body_bytes:
        raise ServiceError(413, "too_large", f"the body has more than {settings.max_body_bytes} bytes")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
