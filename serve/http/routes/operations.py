"""For those who run the service: what it serves, whether it can, and what it counts."""

from __future__ import annotations

import platform
from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serve.contract import InfoResponse, LoadRequest, LoadResponse, RunsResponse, Status
from serve.http.bodies import read_json
from serve.http.openapi import json_body
from serve.http.routes.common import TheService, errors

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=Status, response_model_exclude_none=True)
async def healthz() -> Status:
    """This process is alive."""
    return Status(status="ok")


@router.get("/readyz", response_model=Status, response_model_exclude_none=True, responses=errors(503))
async def readyz(service: TheService) -> Status:
    """Text can be encoded: a token has just been; `detail` says if not by the run that was to be served."""
    await service.check_ready()
    return Status(status="ready", detail=service.problem)


@router.get(
    "/metrics",
    response_class=Response,
    responses=errors(503) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: TheService) -> Response:
    """What all replicas have counted, in Prometheus's text format."""
    return Response(await service.control.metrics(), media_type=CONTENT_TYPE_LATEST)


@router.get("/runs", response_model=RunsResponse, responses=errors(503))
async def runs(service: TheService) -> RunsResponse:
    """The finished runs that can be asked for as `model`."""
    return RunsResponse(runs=await service.control.runs())


@router.post(
    "/admin/load",
    response_model=LoadResponse,
    openapi_extra=json_body(LoadRequest),
    responses=errors(400, 404, 408, 409, 413, 415, 422, 503),
)
async def load(request: Request, service: TheService) -> LoadResponse:
    """Let another run answer: it is verified, loaded and warmed up, then takes over between two requests."""
    asked = await read_json(request, LoadRequest, service.settings)
    return await service.control.load(asked.model)


@router.get("/info", response_model=InfoResponse, responses=errors(503))
async def info(service: TheService) -> InfoResponse:
    """The run that answers, the limits, and the versions of what matters."""
    run = await service.open(service.state.current)
    return InfoResponse(
        model=run.default.identity,
        layers=list(run.layers),
        created=run.manifest.created,
        fingerprint=run.config.fingerprint(),
        data=run.config.data.name,
        input_norm=run.default.config.input_norm,
        limits=service.limits(run),
        notes=service.settings.notes,
        interventions=service.settings.interventions,
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("mtc", "ray", "torch", "transformers")},
    )
