"""Tokens to features and back: `POST /encode`, `/tokenize`, `/decode`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serve import formats
from serve.bodies import read_json
from serve.routes.common import TheService, errors, wanted
from serve.schemas import EncodeRequest, EncodeResponse

router = APIRouter(tags=["activations"])
WORK = (400, 404, 406, 408, 409, 413, 415, 422, 429, 503, 504)


@router.post("/encode", response_model=EncodeResponse, responses=errors(*WORK))
async def encode(request: Request, service: TheService) -> Response:
    """Features of every token of one or several inputs."""
    media_type = wanted(request, formats.ENCODE_FORMATS)
    asked = await read_json(request, EncodeRequest, service.settings)
    run = await service.run(asked.model)
    options = service.options(run, asked)
    inputs = await service.tokenise(run, asked)
    found = [encoded async for _, encoded in service.encode(run, inputs, options)]
    body = formats.encode_answer(media_type, run, asked, inputs, found, request.scope["state"]["request_id"])
    return Response(body, media_type=media_type)
