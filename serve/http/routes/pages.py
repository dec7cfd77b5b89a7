"""The feature browser: a text's features, all features, one of them; logging in; the API's documentation."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.responses import RedirectResponse

from mtc.report.blocks import Branch, Branches, FeatureLink, Heading, Items, Label, with_badges
from mtc.report.graph_page import GRAPH_SCRIPTS
from mtc.report.html import BADGE, Renderer
from mtc.results import number, percent
from serve.contract import FeaturesQuery, ServiceError
from serve.http.access import COOKIE, same_origin
from serve.http.bodies import read_form
from serve.http.errors import invalid
from serve.http.pages import query, render, static_files
from serve.http.routes.common import Layer, Model, TheService
from serve.http.routes.features import Index, analysed, filters
from serve.service import FeatureTable, ServedLayer, Service

router = APIRouter(include_in_schema=False)

FEW_EXAMPLES = 12
"""Of each kind, until all are asked for."""
_HERE = re.compile(r"/(?![/\\])[!-\[\]-~]*")
"""An address on this server: no host, no character that browsers read as another."""


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
    rows, total, after = await asyncio.to_thread(table.page, filters(wanted), wanted.limit, wanted.cursor)
    asked = wanted.model_dump(exclude_defaults=True, exclude={"cursor"})
    kept = {name: value for name, value in asked.items() if name not in ("model", "layer", "feature")}
    frame = await _frame(request, service, own, "features", wanted.model, wanted.layer, kept)
    return render(
        "features.html", **frame, wanted=wanted, rows=rows,
        total=total, groups=range(len(own.prefixes)), next_page=query(**asked, cursor=after) if after else None,
        first_page=query(**asked) if wanted.cursor else None, badge=BADGE,
        analysed_tokens=table.analysis.summary.analysed_tokens, labelled=bool(table.named),
    )  # fmt: skip


@router.get("/ui/feature/{feature}")
async def feature(
    request: Request, service: TheService, feature: Index, model: Model = None, layer: Layer = None,
    examples: Annotated[int, Query(ge=0, le=500)] = FEW_EXAMPLES,
) -> Response:  # fmt: skip
    """All that is known of one feature."""
    own, table = await analysed(service, model, layer)
    content = await asyncio.to_thread(_content, table, feature, examples, query(model=model, layer=layer))
    frame = await _frame(request, service, own, "feature", model, layer)
    return render("feature.html", **frame | {"address": f"/ui/feature/{feature}"}, feature=feature, **content)


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
    page = {"features": "/ui/features", "graph": "/ui/graph"}.get(here, "/ui")
    return {
        "run": own.identity, "runs": await service.listed_runs(), "here": here, "model": model, "layer": layer,
        "served": own.run.key.run_id, "layers": list(own.run.layers), "page": page, "address": page,
        "kept": kept or {}, "with_keys": request.app.state.keys is not None,
    }  # fmt: skip


def _content(table: FeatureTable, feature: int, limit: int, link: str) -> dict[str, Any]:
    """One feature as in the report, and what is around it in the tree; `link` ends the addresses of others."""
    examples, totals = [], {}
    for kind in ("top", "sample"):
        rows, totals[kind] = table.examples(feature, kind, 0, limit)
        examples += rows
    renderer = Renderer(lambda index: f"/ui/feature/{index}{link}")
    blocks = list(table.blocks(feature, examples))
    place = len(blocks) - (1 if examples else 0)  # before the contexts, of which there are many
    blocks[place:place] = [*_tree(table, feature), *_candidates(table, feature), Heading("Contexts")]
    figures = table.feature(feature)
    return {
        "figures": figures, "badge": BADGE if figures.massive else "",
        "blocks": [renderer.block(with_badges(block, table.analysis.massive_indices)) for block in blocks],
        "more": max(totals.values()) if max(totals.values()) > limit else None,
    }  # fmt: skip


def _tree(table: FeatureTable, feature: int) -> list[Branches | Heading]:
    """Its parent with that one's children, and its own."""
    figures = table.feature(feature)
    family = table.feature(figures.parent.feature) if figures.parent else None

    def name(index: int) -> tuple[Any, ...]:
        label = table.labels[index]
        return (FeatureLink(index), *((" ", Label(label)) if label is not None else ()))

    def twigs(indices: tuple[int, ...]) -> tuple[Any, ...]:
        shown = [(*name(i), " (this one)") if i == feature else name(i) for i in indices[:FEW_EXAMPLES]]
        left = len(indices) - len(shown)
        return (*shown, f"and {number(left)} more") if left else tuple(shown)

    branches = []
    if family:
        others = tuple(i for i in family.children if i != feature)
        branches.append(Branch(("Parent ", *name(family.feature)), twigs((feature, *others))))
    if figures.children:
        branches.append(Branch(("This one ", *name(feature)), twigs(figures.children)))
    return [Heading("In the nested tree"), Branches(tuple(branches))] if branches else []


def _candidates(table: FeatureTable, feature: int) -> list[Items | Heading]:
    items: list[Any] = []
    for split in table.splits(feature):
        children = [piece for child in split.children for piece in (" ", FeatureLink(child))]
        shares = f"; a child fires on {percent(split.coverage)} of its tokens, two or more on {percent(split.overlap)}"
        head = ("Splitting candidate: feature ", FeatureLink(split.feature), " divides into")
        items.append((*head, *children, f"{shares} of these."))
    for pair in table.absorption(feature):
        count = f" is silent on {number(pair.absorbed)} of {number(pair.expected)} tokens on which feature "
        names = FeatureLink(pair.parent), FeatureLink(pair.child)
        items.append(("Absorption candidate: feature ", names[0], count, names[1], " fires and it should, too."))
    return [Heading("Splitting and absorption"), Items(tuple(items))] if items else []


def _here(address: str) -> str:
    """The address, if it is one of this server."""
    return address if _HERE.fullmatch(address) else "/ui"
