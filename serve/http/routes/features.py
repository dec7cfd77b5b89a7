"""What is known of the features: `GET /features`, one of them, its examples and surroundings, and those of texts; notes
that people write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel

from mtc.results import FeatureNote
from serve.contract import (
    ByTextRequest,
    ByTextResponse,
    ExamplesResponse,
    FeatureResponse,
    FeaturesQuery,
    FeaturesResponse,
    NearMissRow,
    NoteRequest,
    NoteResponse,
    ServiceError,
    SurroundingsResponse,
    TogetherRow,
    Usage,
)
from serve.http.access import cross_site
from serve.http.bodies import read_json
from serve.http.formats import usage
from serve.http.openapi import json_body
from serve.http.routes.common import Layer, Model, TheService, errors, request_id_of
from serve.service import FeatureTable, Filters, ServedLayer, Service
from serve.service.by_text import by_text
from serve.service.surroundings import near_misses, together

router = APIRouter(tags=["features"])

Index = Annotated[int, Path(ge=0, lt=1 << 31, description="Index of the feature in the dictionary.")]


@router.get("/features", response_model=FeaturesResponse, responses=errors(404, 409, 422, 429, 502, 503))
async def features(request: Request, service: TheService, query: Annotated[FeaturesQuery, Query()]) -> Response:
    """Features that pass all filters, page by page."""
    own, table = await analysed(service, query.model, query.layer)
    rows, total, after, _ = await page(request, service, own, table, query)
    answer = FeaturesResponse.model_construct(
        run_id=own.run_id, layer=own.number, total=total, features=rows, cursor=after
    )
    return _json(answer)


@router.post(
    "/features/by-text",
    response_model=ByTextResponse,
    openapi_extra=json_body(ByTextRequest),
    responses=errors(400, 404, 408, 409, 413, 415, 422, 429, 503, 504),
)
async def features_by_text(request: Request, service: TheService) -> Response:
    """Features that tell texts from others, or from the run's background."""
    asked = await read_json(request, ByTextRequest, service.settings)
    own, table = await analysed(service, asked.model, asked.layer)
    request.state.run_id, request.state.layer = own.run_id, own.number
    found = await by_text(service, own, table, asked)
    answer = ByTextResponse(
        model=own.identity, prefix=asked.prefix or own.num_features,
        background="texts" if asked.against else "random_contexts", tokens=found.tokens,
        against_tokens=found.against_tokens, largest_z_by_chance=found.largest_by_chance, features=found.rows,
        usage=Usage(**usage(found.inputs)), request_id=request_id_of(request),
    )  # fmt: skip
    return _json(answer)


@router.get("/features/{feature}", response_model=FeatureResponse, responses=errors(404, 409, 422, 503))
async def feature(service: TheService, feature: Index, model: Model = None, layer: Layer = None) -> Response:
    """All that the analysis says of one feature, and what someone noted of it."""
    own, table = await analysed(service, model, layer)
    noted = (await own.notes.read()).get(feature, FeatureNote())
    answer = FeatureResponse(
        run_id=own.run_id, layer=own.number, feature=table.feature(feature),
        labels=table.labels_of(feature), histogram_edges=list(table.analysis.activation_edges),
        splits=table.splits(feature), absorption=table.absorption(feature),
        note=noted.note, star=noted.star, note_changed=noted.changed or None,
    )  # fmt: skip
    return _json(answer)


@router.get("/features/{feature}/examples", response_model=ExamplesResponse, responses=errors(404, 409, 422, 503))
async def examples(
    service: TheService,
    feature: Index,
    model: Model = None,
    layer: Layer = None,
    kind: Annotated[Literal["top", "sample"] | None, Query(description="Which kind; by default both.")] = None,
    offset: Annotated[int, Query(ge=0, lt=1 << 31, description="Number of examples to leave out, the first ones.")] = 0,
    limit: Annotated[int, Query(ge=1, le=500, description="Most examples of an answer.")] = 50,
) -> Response:
    """Places in held-out text where the feature fires."""
    own, table = await analysed(service, model, layer)
    rows, total = await asyncio.to_thread(table.examples, feature, kind, offset, limit)
    answer = ExamplesResponse.model_construct(
        run_id=own.run_id, layer=own.number, feature=feature, total=total, examples=rows
    )
    return _json(answer)


@router.get(
    "/features/{feature}/surroundings", response_model=SurroundingsResponse, responses=errors(404, 409, 422, 503)
)
async def surroundings(service: TheService, feature: Index, model: Model = None, layer: Layer = None) -> Response:
    """Near misses of a feature, and what fires together with it."""
    own, table = await analysed(service, model, layer)
    table.check(feature)  # a feature that there is not is said first
    # A route of its own: it reads all random contexts, without which the rest of what is known can be had.
    await table.read_contexts()
    return _json(await asyncio.to_thread(_surroundings, own, table, feature))


def _surroundings(own: ServedLayer, table: FeatureTable, feature: int) -> SurroundingsResponse:
    contexts = table.require_contexts()
    return SurroundingsResponse(
        run_id=own.run_id, layer=own.number, feature=feature, contexts=len(contexts), tokens=contexts.num_tokens,
        near_misses=[
            NearMissRow(
                tokens=list(near.tokens), marked=list(near.marked), relative=near.relative,
                relative_label=None if near.relative is None else table.labels[near.relative],
                activation=near.activation, position=near.position, document_id=near.document_id,
            )
            for near in near_misses(table, feature)
        ],
        together=[
            TogetherRow(label=table.labels[each.feature], **each._asdict()) for each in together(table, feature)
        ],
    )  # fmt: skip


@router.put(
    "/features/{feature}/note",
    response_model=NoteResponse,
    openapi_extra=json_body(NoteRequest),
    responses=errors(400, 404, 408, 409, 412, 413, 415, 422, 503),
)
async def note(
    request: Request, service: TheService, feature: Index, model: Model = None, layer: Layer = None
) -> Response:
    """Keep one's own words for a feature, a star, or both, beside the run's files."""
    if not service.settings.notes:
        message = "notes are not written here: start the service with --notes (the setting `notes`)"
        raise ServiceError(409, "no_notes", message)
    asked = await read_json(request, NoteRequest, service.settings)
    own, table = await analysed(service, model, layer)
    table.check(feature)
    kept = await own.notes.write(own.run_id, feature, asked)
    answer = NoteResponse(
        run_id=own.run_id, layer=own.number, feature=feature, note=kept.note, star=kept.star, note_changed=kept.changed
    )
    return _json(answer)


async def page(
    request: Request, service: Service, own: ServedLayer, table: FeatureTable, query: FeaturesQuery
) -> tuple[list[dict[str, Any]], int, str | None, Mapping[int, FeatureNote]]:
    """See FeatureTable.page, and the notes of now; raises also as `Service.query_vector`, and ServiceError 403 for a
    search by meaning, which costs tokens, that another site's page asks for."""
    by_meaning = query.query is not None and query.by == "meaning"
    origin = request.headers.get("origin")
    if by_meaning and cross_site(request.scope) and origin not in service.settings.cors_origins:
        raise ServiceError(403, "forbidden", "another site's page may not ask for a search by meaning")
    vector = await service.query_vector(table, query.query) if query.query is not None and by_meaning else None
    notes = await own.notes.read()
    return *await asyncio.to_thread(table.page, filters(query), query.limit, query.cursor, notes, vector), notes


def filters(query: FeaturesQuery) -> Filters:
    return Filters(
        query.group, query.massive, query.min_density, query.max_density, query.token, query.text,
        query.copies, query.single_token, query.max_detection,
        tuple(query.feature) if query.feature else None, query.query, query.by, query.starred, query.note,
        query.sort or ("relevance" if query.query else "feature"), query.order == "descending",
    )  # fmt: skip


async def analysed(service: Service, model: str | None, layer: int | None) -> tuple[ServedLayer, FeatureTable]:
    """The layer and what is known of its features; needs no models. Raises ServiceError 404 without an analysis."""
    own = await service.layer(model, layer)
    return own, await own.analysis()


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(warnings=False), media_type="application/json")
