"""Attribution graphs as jobs, `POST /graph` and what follows, and interventions, `POST /steer` and `POST /ablate`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from mtc.export.circuit_graph import MEDIA_TYPE as CIRCUIT_GRAPH
from mtc.export.circuit_graph import circuit_graph
from mtc.report.graph_page import graph_page
from mtc.report.graph_svg import graph_svg
from mtc.results import Ablated, Graph, Steered
from serve.contract import AblateRequest, GraphJob, GraphRequest, ServiceError, SteerRequest
from serve.http.bodies import read_json
from serve.http.errors import error_line, unexpected
from serve.http.formats import JSON, NDJSON
from serve.http.media_types import HTML
from serve.http.openapi import json_body
from serve.http.routes.common import TheService, errors, media_types, request_id_of, wanted
from serve.http.routes.report import PAGE, PICTURE
from serve.service import Interventions, Service

T = TypeVar("T")
router = APIRouter(tags=["circuits"])

SVG = "image/svg+xml"
FORMS = {"graph": JSON, "circuit-graph": CIRCUIT_GRAPH, "html": HTML, "svg": SVG}
"""What a graph is answered as, by the names of `format`."""
FEATURE_URL = "/ui/feature/{feature}?model={run}&layer={layer}"
BODY = (400, 404, 408, 409, 413, 415, 422, 429, 503)

Job = Annotated[str, Path(min_length=1, max_length=100, description="Name of the job, from the answer that made it.")]
Form = Annotated[
    Literal["graph", "circuit-graph", "html", "svg"] | None,
    Query(description="Form of the graph; by default what the Accept header prefers, JSON of the graph first."),
]


@router.post(
    "/graph",
    status_code=202,
    response_model=GraphJob,
    openapi_extra=json_body(GraphRequest),
    responses=errors(*BODY, 504),
)
async def graph(request: Request, service: TheService) -> Response:
    """Have the attribution graph of a prompt computed: what made its next token, in features. One is computed after
    another; the answer says where to ask how far it is."""
    circuits = service.interventions
    asked = await read_json(request, GraphRequest, service.settings)
    key = (await service.run(asked.model)).key
    request.state.run_id = key.run_id
    owner = _owner(request)
    submitted = circuits.submit(key, asked, owner)
    job = await _kept(service, submitted, lambda job: circuits.cancel(job.id, owner))
    return Response(job.model_dump_json(), 202, {"Location": job.url}, media_type=JSON)


@router.get("/graph/{job}", response_model=GraphJob, responses=errors(404, 409, 422, 503))
async def graph_status(request: Request, service: TheService, job: Job) -> Response:
    """How far a graph is."""
    found = await service.interventions.status(job, _owner(request))
    return Response(found.model_dump_json(), media_type=JSON)


@router.get(
    "/graph/{job}/result",
    response_model=Graph,
    responses=errors(404, 406, 409, 413, 422, 429, 503) | media_types(*FORMS.values()),
)
async def graph_result(request: Request, service: TheService, job: Job, format: Form = None) -> Response:
    """A graph that is done: as it is, as the viewers of circuit-tracer and Neuronpedia read it
    (`application/vnd.circuit-graph+json`), as a page that needs nothing beside it, or as a drawing."""
    circuits = service.interventions
    media_type = FORMS[format] if format else wanted(request, tuple(FORMS.values()))
    data = await circuits.result(job, _owner(request))
    headers = {"Vary": "Accept"}
    if media_type != JSON:
        data = await asyncio.to_thread(_WRITERS[media_type], data)
    if policy := {HTML: PAGE, SVG: PICTURE}.get(media_type):
        headers["Content-Security-Policy"] = policy
    return Response(data, media_type=media_type, headers=headers)


@router.delete("/graph/{job}", status_code=204, response_class=Response, responses=errors(404, 409, 422, 503))
async def graph_cancel(request: Request, service: TheService, job: Job) -> Response:
    """Forget a graph; what is computed of it ends."""
    await service.interventions.cancel(job, _owner(request))
    return Response(status_code=204)


@router.post(
    "/steer",
    response_model=Steered,
    openapi_extra=json_body(SteerRequest),
    responses=errors(*BODY, 406, 504) | media_types(NDJSON),
)
async def steer(request: Request, service: TheService) -> Response:
    """What the language model goes on with, with features set, scaled or added to, and without. As NDJSON, which is the
    default, a line for the prompt, one for each step as it is done, and one with all; as JSON the last alone."""
    circuits = service.interventions
    media_type = wanted(request, (NDJSON, JSON))
    asked = await read_json(request, SteerRequest, service.settings)
    key = (await service.run(asked.model)).key
    request.state.run_id = key.run_id
    begun = await _kept(service, circuits.steer(key, asked), lambda begun: circuits.end(begun[0]))
    steps = _steps(service, circuits, begun)
    if media_type == JSON or request.scope["http_version"] == "1.0":  # which has no chunks
        found = [line async for line in steps]
        last = {name: value for name, value in found[-1].items() if name != "type"}
        lines = [orjson.dumps(line) + b"\n" for line in found]
        body = orjson.dumps(last) if media_type == JSON else b"".join(lines)
        return Response(body, media_type=media_type, headers={"Vary": "Accept"})
    answer = _lines(steps, request_id_of(request))
    return StreamingResponse(answer, media_type=NDJSON, headers={"Vary": "Accept"})


@router.post("/ablate", response_model=Ablated, openapi_extra=json_body(AblateRequest), responses=errors(*BODY, 504))
async def ablate(request: Request, service: TheService) -> Response:
    """What the language model's predictions lose if features are taken out of a text: its layer's MLP writes what it
    writes, without what these features add; all else reacts as it will."""
    circuits = service.interventions
    asked = await read_json(request, AblateRequest, service.settings)
    key = (await service.run(asked.model)).key
    request.state.run_id = key.run_id
    found = await service.in_time(circuits.ablate(key, asked))
    return Response(found.model_dump_json(), media_type=JSON)


async def _kept(service: Service, asked: Awaitable[T], undo: Callable[[T], Awaitable[None]]) -> T:
    """What is asked for; if nobody waits for that any more, it is undone as soon as it is there."""
    made = asyncio.ensure_future(asked)

    def too_late(done: asyncio.Future[T]) -> None:
        if not done.cancelled() and done.exception() is None:
            _in_background(undo(done.result()))

    try:
        return await service.in_time(asyncio.shield(made))
    except BaseException:
        made.add_done_callback(too_late)
        raise


async def _steps(
    service: Service, circuits: Interventions, begun: tuple[str, dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    """What is known at once, the steps, and all; whoever stops reading ends the work."""
    steered_id, first = begun
    try:
        yield {"type": "prompt"} | first
        while True:
            line = await service.in_time(circuits.step(steered_id))
            yield line
            if line["type"] == "steered":
                return
    finally:
        _in_background(circuits.end(steered_id))  # not awaited: whoever is cancelled cannot wait


async def _lines(steps: AsyncIterator[dict[str, Any]], request_id: str) -> AsyncIterator[bytes]:
    try:
        async for line in steps:
            yield orjson.dumps(line | ({"request_id": request_id} if line["type"] == "prompt" else {})) + b"\n"
    except ServiceError as error:
        yield error_line(error, request_id)
    except Exception as error:  # the status is gone, but the line can still be told from an end
        yield error_line(unexpected(error, request_id), request_id)
    finally:
        await steps.aclose()  # type: ignore[attr-defined]


_tasks: set[asyncio.Task[None]] = set()
"""The event loop itself holds none."""


def _in_background(work: Any) -> None:
    async def quietly() -> None:
        with suppress(ServiceError):  # then it is forgotten because nobody fetches its steps
            await work

    task = asyncio.get_running_loop().create_task(quietly())
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _owner(request: Request) -> str:
    """Who asks: the name of the key's owner, nobody without keys."""
    found: str = request.scope["state"].get("user", "")
    return found


def _circuit_graph(data: bytes) -> bytes:
    slug = f"graph-{hashlib.sha256(data).hexdigest()[:12]}"
    return orjson.dumps(circuit_graph(Graph.model_validate_json(data), slug))


_WRITERS: dict[str, Callable[[bytes], bytes]] = {
    CIRCUIT_GRAPH: _circuit_graph,
    HTML: lambda data: graph_page(Graph.model_validate_json(data), FEATURE_URL).encode(),
    SVG: lambda data: graph_svg(Graph.model_validate_json(data)).encode(),
}
