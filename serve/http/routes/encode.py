"""Tokens to features and back: `POST /encode`, `/tokenize`, `/decode`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from serve.contract import (
    DecodeRequest,
    DecodeResponse,
    Encoded,
    EncodeRequest,
    EncodeResponse,
    ServiceError,
    Tokenised,
    TokenizeRequest,
    TokenizeResponse,
)
from serve.http import formats
from serve.http.bodies import read_json
from serve.http.errors import error_line, unexpected
from serve.http.openapi import json_body
from serve.http.routes.common import TheService, errors, media_types, request_id_of, wanted
from serve.service import ServedLayer, Service

T = TypeVar("T")

router = APIRouter(tags=["activations"])
BODY = (400, 404, 406, 408, 409, 413, 415, 422, 429, 503)
IN_THREAD = 4096
"""Entries from which an answer is written in a thread, so that the probes are answered meanwhile."""


@router.post(
    "/encode",
    response_model=EncodeResponse,
    openapi_extra=json_body(EncodeRequest),
    responses=errors(*BODY, 504) | media_types(*formats.ENCODE_FORMATS),
)
async def encode(request: Request, service: TheService) -> Response:
    """Features of every token of one or several inputs."""
    media_type = wanted(request, formats.ENCODE_FORMATS)
    asked = await read_json(request, EncodeRequest, service.settings)
    layer = await _layer(request, service, asked)
    csr = asked.form == "csr"
    options = service.options(layer, asked, csr or media_type == formats.SAFETENSORS)
    # Read once for a run and kept: before any work, so that a run without an analysis costs none.
    table = await layer.analysis() if "label" in asked.include else None
    labels = await asyncio.to_thread(lambda: table.labels) if table is not None else None
    inputs = await service.tokenise(layer.run, asked)
    envelope = formats.Envelope(layer, asked.prefix or layer.num_features, request_id_of(request), labels)
    found = service.encode_inputs(layer.run, inputs, options)
    if media_type == formats.NDJSON:
        return await _stream(request, service, envelope, csr, inputs, found)
    encoded = [each async for _, each in found]
    with service.metrics.duration.labels("serialise").time():
        size = formats.entries(encoded)
        body = await _written(size, lambda: formats.encode_answer(media_type, envelope, csr, inputs, encoded))
    return Response(body, media_type=media_type, headers={"Vary": "Accept"})


@router.post(
    "/tokenize",
    response_model=TokenizeResponse,
    openapi_extra=json_body(TokenizeRequest),
    responses=errors(*BODY) | media_types(*formats.TOKENIZE_FORMATS),
)
async def tokenize(request: Request, service: TheService) -> Response:
    """Inputs as the model reads them, without running it."""
    media_type = wanted(request, formats.TOKENIZE_FORMATS)
    asked = await read_json(request, TokenizeRequest, service.settings)
    layer = await _layer(request, service, asked)
    inputs = await service.tokenise(layer.run, asked)
    envelope = formats.Envelope(layer, None, request_id_of(request))
    body = await _written(
        formats.usage(inputs)["tokens"], lambda: formats.tokenize_answer(media_type, envelope, inputs)
    )
    return Response(body, media_type=media_type, headers={"Vary": "Accept"})


@router.post(
    "/decode",
    response_model=DecodeResponse,
    openapi_extra=json_body(DecodeRequest),
    responses=errors(*BODY, 504) | media_types(*formats.DECODE_FORMATS),
)
async def decode(request: Request, service: TheService) -> Response:
    """Sparse features to the reconstruction of the target site."""
    media_type = wanted(request, formats.DECODE_FORMATS)
    asked = await read_json(request, DecodeRequest, service.settings)
    layer = await _layer(request, service, asked)
    reconstruction = await service.decode_request(layer, asked)
    envelope = formats.Envelope(layer, asked.prefix or layer.num_features, request_id_of(request))
    body = await _written(reconstruction.size, lambda: formats.decode_answer(media_type, envelope, reconstruction))
    return Response(body, media_type=media_type, headers={"Vary": "Accept"})


async def _layer(
    request: Request, service: Service, asked: EncodeRequest | TokenizeRequest | DecodeRequest
) -> ServedLayer:
    """The layer that answers, which the log names."""
    layer = await service.layer(asked.model, asked.layer)
    request.state.run_id, request.state.layer = layer.run_id, layer.number
    return layer


async def _written(entries: int, write: Callable[[], bytes]) -> bytes:
    return await asyncio.to_thread(write) if entries > IN_THREAD else write()


async def _stream(
    request: Request, service: Service, envelope: formats.Envelope, csr: bool, inputs: Sequence[Tokenised],
    found: AsyncIterator[tuple[int, Encoded]],
) -> Response:  # fmt: skip
    """Starts with the first result, so that what fails before has a status of its own."""
    first = await anext(found)
    serialise = service.metrics.duration.labels("serialise")

    async def line(index: int, encoded: Encoded) -> bytes:
        size = formats.entries([encoded])
        return await _written(size, lambda: formats.result_line(envelope, index, inputs[index], encoded, csr))

    async def lines() -> AsyncIterator[bytes]:
        seconds = 0.0
        yield formats.first_line(envelope)
        try:
            async for index, encoded in _chain(first, found):
                start = time.perf_counter()
                written = await line(index, encoded)
                seconds += time.perf_counter() - start
                yield written
        except ServiceError as error:
            yield error_line(error, envelope.request_id)
        except Exception as error:  # the status is gone, but the line can still be told from an end
            yield error_line(unexpected(error, envelope.request_id), envelope.request_id)
        else:
            serialise.observe(seconds)
            yield formats.last_line(inputs)

    headers = {"Vary": "Accept"}
    if request.scope["http_version"] == "1.0":  # which has no chunks
        return Response(b"".join([each async for each in lines()]), media_type=formats.NDJSON, headers=headers)
    return StreamingResponse(lines(), media_type=formats.NDJSON, headers=headers)


async def _chain(first: T, others: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for each in others:
        yield each
