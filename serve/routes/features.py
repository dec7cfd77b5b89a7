"""What is known of the features: `GET /features`, one of them, and its examples."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response

from serve.feature_table import FeatureTable, Filters
from serve.routes.common import TheService, errors
from serve.schemas import ExamplesResponse, FeatureResponse, FeaturesResponse
from serve.served_run import ServedRun
from serve.service import Service

router = APIRouter(tags=["features"])

Model = Annotated[
    str | None, Query(min_length=1, max_length=200, description="Id of a run; by default the current one.")
]
Index = Annotated[int, Path(ge=0, lt=1 << 31, description="Index in the dictionary.")]
Density = Annotated[float | None, Query(ge=0, le=1)]
Word = Annotated[str | None, Query(min_length=1, max_length=200)]


@router.get("/features", response_model=FeaturesResponse, responses=errors(404, 409, 422, 503))
async def features(
    service: TheService,
    model: Model = None,
    group: Annotated[int | None, Query(ge=0, lt=1 << 31, description="Only of this group.")] = None,
    min_density: Density = None,
    max_density: Density = None,
    token: Annotated[
        Word, Query(description="Only with this top token; case and space around it do not count.")
    ] = None,
    text: Annotated[Word, Query(description="Only with this in a stored context; case does not count.")] = None,
    sort: Literal["feature", "density", "count", "max_activation", "mean_activation", "decoder_norm"] = "feature",
    order: Literal["ascending", "descending"] = "ascending",
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[str | None, Query(min_length=1, max_length=200, pattern="^[A-Za-z0-9_-]+$")] = None,
) -> Response:
    """Features that pass all filters, page by page."""
    run, table = await analysed(service, model)
    filters = Filters(group, min_density, max_density, token, text, sort, order == "descending")
    rows, total, after = await asyncio.to_thread(table.page, filters, limit, cursor)
    return _json(FeaturesResponse.model_construct(run_id=run.key.run_id, total=total, features=rows, cursor=after))


@router.get("/features/{feature}", response_model=FeatureResponse, responses=errors(404, 409, 422, 503))
async def feature(service: TheService, feature: Index, model: Model = None) -> Response:
    """All that the analysis says of one feature."""
    run, table = await analysed(service, model)
    row = await asyncio.to_thread(table.feature, feature)
    answer = FeatureResponse(
        run_id=run.key.run_id, feature=row, histogram_edges=table.edges, splits=table.splits(feature),
        absorption=table.absorption(feature),
    )  # fmt: skip
    return _json(answer)


@router.get("/features/{feature}/examples", response_model=ExamplesResponse, responses=errors(404, 409, 422, 503))
async def examples(
    service: TheService,
    feature: Index,
    model: Model = None,
    kind: Literal["top", "sample"] | None = None,
    offset: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Response:
    """Places in held-out text where the feature fires."""
    run, table = await analysed(service, model)
    rows, total = await asyncio.to_thread(table.examples, feature, kind, offset, limit)
    answer = ExamplesResponse.model_construct(run_id=run.key.run_id, feature=feature, total=total, examples=rows)
    return _json(answer)


async def analysed(service: Service, model: str | None) -> tuple[ServedRun, FeatureTable]:
    """The run and what is known of its features; needs no models. Raises ServiceError 404 without an analysis."""
    run = await service.run(model)
    return run, await asyncio.to_thread(lambda: run.analysed)


def _json(answer: FeaturesResponse | FeatureResponse | ExamplesResponse) -> Response:
    return Response(answer.model_dump_json(warnings=False), media_type="application/json")
