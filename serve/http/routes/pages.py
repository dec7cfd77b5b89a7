"""The feature browser: a text's features, all features, one of them; logging in; the API's documentation."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BeforeValidator, ValidationError
from starlette.responses import RedirectResponse

from mtc.report.graph_page import GRAPH_SCRIPTS
from mtc.report.html import BADGE
from serve.contract import FeaturesQuery, ServiceError
from serve.http import map_page
from serve.http.access import COOKIE, same_origin
from serve.http.bodies import read_form
from serve.http.doubtful_page import doubted, list_of
from serve.http.errors import invalid
from serve.http.feature_page import ALL, content
from serve.http.media_types import JSON
from serve.http.pages import query, render, static_files
from serve.http.routes.common import Layer, Model, TheService, gzipped, takes_gzip
from serve.http.routes.features import Index, analysed, page
from serve.service import ServedLayer, Service

router = APIRouter(include_in_schema=False)

_HERE = re.compile(r"/(?![/\\])[!-\[\]-~]*")
"""An address on this server: no host, no character that browsers read as another."""


@router.get("/")
async def start() -> Response:
    """For those who know no more than the service's address."""
    return RedirectResponse("/ui", 303)


@router.get("/ui")
async def text(request: Request, service: TheService, model: Model = None, layer: Layer = None) -> Response:
    """A text's tokens and their features."""
    own = await service.layer(model, layer)
    frame = await _frame(request, service, own, "text", model, layer)
    return render("text.html", max_tokens=service.max_input_tokens(own.run), **frame)


@router.get("/ui/features")
async def features(request: Request, service: TheService) -> Response:
    """All features, filtered and sorted."""
    sent = request.query_params
    given = {name: sent.getlist(name) if name == "feature" else sent[name] for name in sent if sent[name]}
    try:
        wanted = FeaturesQuery.model_validate(given)  # a form also sends the fields that nobody filled in
    except ValidationError as error:
        raise invalid(error) from None
    own, table = await analysed(service, wanted.model, wanted.layer)
    rows, total, after, notes = await page(request, service, own, table, wanted)
    asked = wanted.model_dump(exclude_defaults=True, exclude={"cursor"})
    kept = {name: value for name, value in asked.items() if name not in ("model", "layer", "feature")}
    frame = await _frame(request, service, own, "features", wanted.model, wanted.layer, kept)
    return render(
        "features.html", **frame, wanted=wanted, rows=rows,
        total=total, groups=range(len(own.prefixes)), next_page=query(**asked, cursor=after) if after else None,
        first_page=query(**asked) if wanted.cursor else None, badge=BADGE,
        analysed_tokens=table.analysis.summary.analysed_tokens, labelled=table.labelled, scored=table.scored,
        by_meaning=table.with_vectors and service.settings.embeddings is not None,
        keeps_notes=_keeps_notes(service, own), noted=bool(notes),
    )  # fmt: skip


@router.get("/ui/feature/{feature}")
async def feature(
    request: Request, service: TheService, feature: Index, model: Model = None, layer: Layer = None,
    examples: Annotated[int | None, Query(ge=1, le=ALL)] = None,
    context: Annotated[int | None, Query(ge=1, le=ALL), BeforeValidator(lambda given: given or None)] = None,
) -> Response:  # fmt: skip
    """All that is known of one feature; `examples` of each part, with `context` tokens on each side of the peak."""
    own, table = await analysed(service, model, layer)
    table.check(feature)
    await table.read_contexts()
    link = query(model=model, layer=layer)
    notes = await own.notes.read()
    bos = own.run.tokeniser.bos if service.settings.interventions else None
    shown = await asyncio.to_thread(content, table, feature, examples, context, link, notes, bos)
    frame = await _frame(request, service, own, "feature", model, layer)
    return render(
        "feature.html",
        **frame | {"address": f"/ui/feature/{feature}"},
        feature=feature,
        examples=examples,
        keeps_notes=_keeps_notes(service, own),
        **shown,
    )


@router.get("/ui/feature")
async def go_to_feature(
    feature: Annotated[int | None, Query(ge=0, lt=1 << 31)] = None, model: Model = None, layer: Layer = None
) -> Response:  # fmt: skip
    """To the page of the feature that a form names, or to all features if it names none."""
    page = "/ui/features" if feature is None else f"/ui/feature/{feature}"
    return RedirectResponse(f"{page}{query(model=model, layer=layer)}", 303)


@router.get("/ui/doubtful")
async def doubtful(request: Request, service: TheService, model: Model = None, layer: Layer = None) -> Response:
    """Features of no, little or doubtful meaning, counted by kind."""
    own, table = await analysed(service, model, layer)
    groups = range(len(own.prefixes))
    frame = await _frame(request, service, own, "doubtful", model, layer)
    return render(
        "doubtful.html", **frame, features=len(table), groups=groups, list_of=list_of,
        doubted=await asyncio.to_thread(doubted, table, len(groups)),
        analysed_tokens=table.analysis.summary.analysed_tokens,
    )  # fmt: skip


@router.get("/ui/map")
async def feature_map(
    request: Request, service: TheService, model: Model = None, layer: Layer = None,
    first: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
) -> Response:  # fmt: skip
    """All features by direction, and their nested tree, whose `first` families are left out."""
    own, table = await analysed(service, model, layer)
    frame = await _frame(request, service, own, "map", model, layer)

    def page() -> Response:  # of a large dictionary that takes a second
        return render("map.html", **frame, **map_page.content(table, first))

    return await asyncio.to_thread(page)


@router.get("/ui/map.json")
async def map_points(request: Request, service: TheService, model: Model = None, layer: Layer = None) -> Response:
    """The points of the map, for its script."""
    _, table = await analysed(service, model, layer)
    points = await asyncio.to_thread(map_page.points, table)
    headers = {"ETag": points.tag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if points.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if takes_gzip(request):
        return Response(points.packed, media_type=JSON, headers=headers | gzipped(points.tag))
    return Response(await asyncio.to_thread(gzip.decompress, points.packed), media_type=JSON, headers=headers)


@router.get("/ui/graph")
async def graph(request: Request, service: TheService, model: Model = None, layer: Layer = None) -> Response:
    """A prompt's attribution graph: of all layers of a run, whatever layer the other pages are of."""
    own = await service.layer(model, layer)
    shared = set.intersection(*(set(each.prefixes) for each in own.run.layers.values()))
    frame = await _frame(request, service, own, "graph", model, layer)
    settings = service.settings
    return render(
        "graph.html", **frame, interventions=settings.interventions, scripts=GRAPH_SCRIPTS, prefixes=sorted(shared),
        max_tokens=settings.max_graph_tokens, max_features=settings.max_graph_features,
    )  # fmt: skip


@router.get("/ui/login")
async def login_form(request: Request, next: str = "/ui") -> Response:
    """Where a browser gives its API key."""
    if request.app.state.keys is None:
        return RedirectResponse(_here(next), 303)
    return render("login.html", next=_here(next), problem=None)


@router.post("/ui/login")
async def login(request: Request, service: TheService) -> Response:
    """Keeps the key in a cookie that no script can read."""
    if not same_origin(request.scope):
        raise ServiceError(403, "forbidden", "this form was not sent from this service's own page")
    form = await read_form(request, service.settings)
    key, target = form.get("key", "").strip(), _here(form.get("next", "/ui"))
    keys = request.app.state.keys
    if keys is not None:
        if not key or keys.check(key) is None:
            return render("login.html", 401, next=target, problem="This key is not known, or has expired.")
        if not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", key):  # a key that somebody made up may not fit into a cookie
            return render("login.html", 422, next=target, problem="This key works only in an Authorization header.")
    answer = RedirectResponse(target, 303)
    if keys is not None:
        secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        # Lax, so that links from elsewhere open; whatever changes something asks for the Origin (serve/http/access.py).
        answer.set_cookie(COOKIE, key, httponly=True, samesite="lax", secure=secure)
    return answer


@router.post("/ui/logout")
async def logout() -> Response:
    """Forgets the key."""
    answer = RedirectResponse("/ui/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="lax")
    return answer


@router.get("/docs")
async def docs() -> Response:
    """The API's documentation, with Swagger UI."""
    return render("docs.html")


@router.get("/ui/static/{name:path}")
async def static(request: Request, name: str) -> Response:
    """A file that pages load."""
    file = static_files().get(name)
    if file is None:
        raise ServiceError(404, "not_found", f"there is no file {name[:200]!r}")
    headers = {"ETag": file.tag, "Cache-Control": "no-cache"}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)


async def _frame(
    request: Request, service: Service, own: ServedLayer, here: str, model: str | None, layer: int | None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What every page shows around its content; `kept` are parameters that hold for another layer, too."""
    page = f"/ui/{here}" if here in ("features", "map", "doubtful", "graph") else "/ui"
    return {
        "run": own.identity, "runs": await service.listed_runs(), "here": here, "model": model, "layer": layer,
        "served": own.run.key.run_id, "layers": list(own.run.layers), "page": page, "address": page,
        "kept": kept or {}, "with_keys": request.app.state.keys is not None,
    }  # fmt: skip


def _keeps_notes(service: Service, own: ServedLayer) -> bool:
    """Whether a page's notes go to the service, or stay in its browser."""
    return service.settings.notes and own.notes.writable


def _here(address: str) -> str:
    """The address, if it is one of this server."""
    return address if _HERE.fullmatch(address) else "/ui"
