"""The map of features as a page: a drawing that needs no script, the nested tree as an outline, and the points as JSON
for the script that draws them anew at every zoom."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import orjson

from serve.service import FeatureTable

SIZE = 4000
"""Steps of a place along each axis; a pixel is more than one of them until the map is magnified 4 times."""
COLOURS = 6
"""Colours of groups; a later group has an earlier one's again."""
MOST_ROOTS, MOST_LINES = 200, 1500
"""Families of a page of the outline, and lines of one of them; the page ends with the family that makes them more."""
MOST_CHILDREN = 40
"""Children of a feature that the outline names."""


T = TypeVar("T")


class Points(NamedTuple):
    """The points of the map, for its script."""

    packed: bytes
    """Their JSON, by gzip."""
    tag: str
    """What tells them from others, in quotation marks."""


def _once(make: Callable[[FeatureTable], T]) -> Callable[[FeatureTable], T]:
    """What is made of a table, once for as long as the table lives, which never changes: notes stand elsewhere."""
    made: WeakKeyDictionary[FeatureTable, T] = WeakKeyDictionary()
    lock = threading.Lock()

    @wraps(make)
    def kept(table: FeatureTable) -> T:
        with lock:
            if table not in made:
                made[table] = make(table)
            return made[table]

    return kept


class Line(NamedTuple):
    """A feature in the outline."""

    feature: int
    group: int
    label: str | None
    children: list[Line]
    """Those that are named."""
    left: int
    """Its children that are not."""
    size: int
    """Lines of itself and all below it."""


class Outline(NamedTuple):
    """A page of the nested tree."""

    lines: list[Line]
    """Features without a parent, with all that is below each."""
    first: int
    """Number of families before the first of the page."""
    after: int | None
    """Number of families before the first of the next page; None on the last."""
    roots: int
    """Families of all pages."""


def outline(table: FeatureTable, first: int) -> Outline:
    """The families from the `first` on, as many as a page has."""
    plan = table.plan
    lines: list[Line] = []
    count = 0
    for root in plan.roots[first : first + MOST_ROOTS]:
        lines.append(_line(table, root, MOST_LINES))
        count += lines[-1].size
        if count > MOST_LINES:
            break
    end = first + len(lines)
    return Outline(lines, first, end if end < len(plan.roots) else None, len(plan.roots))


@_once
def drawing(table: FeatureTable) -> list[tuple[int, int, str]]:
    """For each group its index, how many features of it are on the map, and a path with a dot for each of them."""
    plan = table.plan
    places, group = plan.places(SIZE), plan.group[plan.placed]
    found = []
    for each in range(int(plan.group.max()) + 1):
        own = places[group == each]
        found.append((each, len(own), "".join([f"M{x} {y}h0" for x, y in own.tolist()])))
    return found


@_once
def points(table: FeatureTable) -> Points:
    """All features on the map, in columns: feature, x, y (from 0 to `size`), group, parent (-1 without one), label."""
    plan = table.plan
    placed, places = plan.placed, plan.places(SIZE)
    labels = table.labels
    body = orjson.dumps({
        "size": SIZE, "feature": placed.tolist(), "x": places[:, 0].tolist(), "y": places[:, 1].tolist(),
        "group": plan.group[placed].tolist(), "parent": plan.parent[placed].tolist(),
        "label": [labels[i] for i in placed.tolist()],
    })  # fmt: skip
    return Points(gzip.compress(body, 6, mtime=0), f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def content(table: FeatureTable, first: int) -> dict[str, Any]:
    """The values of the page's template."""
    plan = table.plan
    return {
        "known": plan.known, "on_map": len(plan.placed), "features": len(table), "groups": drawing(table),
        "size": SIZE, "colours": COLOURS, "outline": outline(table, first), "alone": plan.alone,
    }  # fmt: skip


def _line(table: FeatureTable, feature: int, room: int) -> Line:
    """A feature and what is below it, in at most `room` lines, or one."""
    plan = table.plan
    named: list[Line] = []
    room -= 1
    for child in plan.children[feature][:MOST_CHILDREN]:
        if room <= 0:
            break
        named.append(_line(table, child, room))
        room -= named[-1].size
    left = len(plan.children[feature]) - len(named)
    return Line(feature, int(plan.group[feature]), table.labels[feature], named, left, 1 + sum(n.size for n in named))
