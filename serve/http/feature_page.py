"""What the page of one feature shows: figures as in the report, its place in the tree, contexts and near misses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from mtc.report.blocks import (
    Bars,
    Block,
    Branch,
    Branches,
    Contexts,
    FeatureLink,
    Items,
    Label,
    Paragraph,
    Piece,
    Table,
    with_badges,
)
from mtc.report.html import BADGE, Renderer
from mtc.report.markdown import place_in_window
from mtc.results import Example, Feature, FeatureNote, LogitEffect, number, percent
from serve.service import DENSE, FeatureTable
from serve.service.surroundings import NearMiss, near_misses, together

STRONGEST, OF_FIFTH = 12, 4
"""Contexts that are shown until all are asked for: the strongest, and some of each fifth of the drawn ones."""
ALL = 500
"""More contexts than a feature has of a kind."""
FIFTHS = 5
_NAMES = ("strongest", "second", "middle", "fourth", "weakest")
REACHES = (2, 5, 10, 20)
"""Tokens on each side of a peak that one can choose, if more are stored."""
FEW_RELATIVES = 12
"""Children of a feature that are named in the tree."""


Names = Sequence[str | None]
"""What each feature goes by."""


class Section(NamedTuple):
    """A part of the page."""

    title: str | None
    """Its heading; None of the first part."""
    blocks: list[Markup]
    texts: str | None = None
    """Of contexts that the feature can be taken out of, JSON of what is asked for each and told beside it."""


def content(
    table: FeatureTable, feature: int, examples: int | None, reach: int | None, link: str,
    notes: Mapping[int, FeatureNote], bos: Sequence[int] | None,
) -> dict[str, Any]:  # fmt: skip
    """The values of the page's template.

    Args:
        examples: most contexts of each part; None for a few.
        reach: most tokens on each side of a peak; None for all that are stored.
        link: what ends the addresses of other features.
        notes: what people say of features, who go by that before any label.
        bos: what stands in front of a context that features are taken out of; None where none are.
    """
    renderer = Renderer(lambda index: f"/ui/feature/{index}{link}")

    def section(title: str | None, *blocks: Block) -> Section:
        massive = table.analysis.massive_indices
        return Section(title, [renderer.block(with_badges(block, massive)) for block in blocks])

    figures, names = table.feature(feature), table.names(notes)
    top, sample = (table.examples(feature, kind, 0, ALL)[0] for kind in ("top", "sample"))
    parts = [("The strongest", top, top[: examples or STRONGEST])] if top else []
    for fifth, rows in enumerate(_fifths(sample)):
        if rows:
            parts.append((_title(fifth, rows), rows, _spread(rows, examples or OF_FIFTH)))
    sizes = [max(e["peak"], len(e["tokens"]) - 1 - e["peak"]) for e in (*top, *sample)]
    return {
        "figures": figures, "massive": BADGE if figures.massive else "", "dense": figures.density >= DENSE,
        "noted": notes.get(feature, FeatureNote()),
        "last": len(table) - 1, "effects": _effects(figures),
        "effects_of_all": [renderer.block(each) for each in _effects_of_all(figures)],
        "sections": [
            section(None, *table.blocks(feature, names), _densities(table, figures)),
            *(section(title, *blocks) for title, blocks in _around(table, feature, names) if blocks),
        ],
        "contexts": [
            section(title, Contexts(tuple(_example(row, reach) for row in shown), figures.max_activation))._replace(
                texts=None if bos is None else json.dumps([_text(row, bos) for row in shown])
            )
            for title, _, shown in parts
        ],
        "near_misses": [_shown(table, names, renderer, each, reach) for each in near_misses(table, feature)],
        "reach": reach, "reaches": [n for n in REACHES if n < max(sizes, default=0) and n != reach],
        "more": ALL if any(len(shown) < len(rows) for _, rows, shown in parts) else None,
    }  # fmt: skip


def _densities(table: FeatureTable, figures: Feature) -> Bars:
    """How often all features fire, and this one among them."""
    density, share = table.analysis.density, table.more_often_than(figures.feature)
    told = "this one never fired"
    if share is not None:
        told = f"this one, at {number(figures.density)}, fires more often than {percent(share)} of the others"
    edges = tuple(10.0**edge for edge in density.edges)
    counts = tuple(sum(of_groups) for of_groups in zip(*density.counts, strict=True))
    return Bars(f"All features that fired by density; {told}", edges, counts, figures.density or None)


def _around(table: FeatureTable, feature: int, names: Names) -> list[tuple[str, list[Block]]]:
    return [
        ("In the nested tree", _tree(table, feature, names)),
        ("Splitting and absorption", _candidates(table, feature)),
        ("Fires together with", _together(table, feature, names)),
    ]


def _tree(table: FeatureTable, feature: int, names: Names) -> list[Block]:
    """Its parent with that one's children, and its own."""
    figures = table.feature(feature)
    family = table.feature(figures.parent.feature) if figures.parent else None

    def twigs(indices: tuple[int, ...]) -> tuple[Any, ...]:
        shown = [(*_name(names, i), " (this one)") if i == feature else _name(names, i) for i in indices]
        left = len(indices) - FEW_RELATIVES
        return (*shown[:FEW_RELATIVES], f"and {number(left)} more") if left > 0 else tuple(shown)

    branches = []
    if family:
        others = tuple(i for i in family.children if i != feature)
        branches.append(Branch(("Parent ", *_name(names, family.feature)), twigs((feature, *others))))
    if figures.children:
        branches.append(Branch(("This one ", *_name(names, feature)), twigs(figures.children)))
    return [Branches(tuple(branches))] if branches else []


def _candidates(table: FeatureTable, feature: int) -> list[Block]:
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
    return [Items(tuple(items))] if items else []


def _together(table: FeatureTable, feature: int, names: Names) -> list[Block]:
    rows = together(table, feature)
    if not rows or table.contexts is None:
        return []
    told = (
        f"By correlation, over the {number(table.contexts.num_tokens)} tokens of {number(len(table.contexts))} random "
        "contexts. Lift is how many times more tokens they share than they would by chance."
    )
    headers = ("Feature", "Shared tokens", "Lift", "Correlation")
    figures = [(_name(names, r.feature), number(r.shared), number(r.lift), number(r.correlation)) for r in rows]
    return [Paragraph(told), Table("Features that fire on the same tokens", headers, tuple(figures))]


def _name(names: Names, index: int) -> tuple[Piece, ...]:
    label = names[index]
    return (FeatureLink(index), *((" ", Label(label)) if label is not None else ()))


def _fifths(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Uniformly drawn examples by fifth of their activations, the strongest fifth first, the strongest of it first."""
    parts: list[list[dict[str, Any]]] = [[] for _ in range(FIFTHS)]
    for row in sorted(rows, key=lambda row: -row["activation"]):
        parts[FIFTHS - 1 - min(FIFTHS - 1, int(row["quantile"] * FIFTHS))].append(row)
    return parts


def _title(fifth: int, rows: Sequence[dict[str, Any]]) -> str:
    weakest, strongest = number(rows[-1]["activation"]), number(rows[0]["activation"])
    between = f"{weakest} to {strongest}" if weakest != strongest else strongest
    return f"Drawn uniformly: the {_NAMES[fifth]} fifth, {between}"


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the rows, at even distances, the first among them."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def _example(row: dict[str, Any], reach: int | None) -> Example:
    start, end = _cut(row["peak"], len(row["tokens"]), reach)
    own = {name: row[name] for name in ("kind", "activation", "quantile", "document_id", "position")}
    tokens, activations = (tuple(row[name][start:end]) for name in ("tokens", "activations"))
    return Example(**own, tokens=tokens, activations=activations, peak=row["peak"] - start)


def _text(row: dict[str, Any], bos: Sequence[int]) -> dict[str, Any]:
    """A whole stored context as a window of its own, the activation at its peak, and whether the window began earlier
    in the analysed text."""
    ids, start = row["token_ids"], row["position"] - row["peak"]
    front = [] if ids[: len(bos)] == list(bos) else list(bos)
    return {
        "ids": [*front, *ids], "peak": len(front) + row["peak"], "activation": row["activation"],
        "cut": start > len(front),
    }  # fmt: skip


def _cut(peak: int, length: int, reach: int | None) -> tuple[int, int]:
    """First and end of the tokens around a peak that are shown."""
    return (0, length) if reach is None else (max(0, peak - reach), min(length, peak + reach + 1))


def _shown(table: FeatureTable, names: Names, renderer: Renderer, near: NearMiss, reach: int | None) -> dict[str, Any]:
    start, end = _cut(near.marked[0], len(near.tokens), reach)
    why: tuple[Piece, ...] = ("a token of its own is marked",)
    if near.relative is not None and near.activation is not None:
        why = (*_name(names, near.relative), f" fires where it is marked, up to {number(near.activation)}")
    why = (*why, f", {place_in_window(near.position)}, document {near.document_id}")
    return {
        "tokens": [(near.tokens[i], i in near.marked) for i in range(start, end)],
        "why": renderer.text(with_badges(why, table.analysis.massive_indices)),
    }


def _effects_of_all(figures: Feature) -> list[Block]:
    """All tokens by what the feature adds to their logits."""
    counts, effects = figures.logit_histogram, (*(figures.positive_logits or ()), *(figures.negative_logits or ()))
    most = max((abs(effect.value) for effect in effects), default=0.0)
    if counts is None or not most:
        return []
    edges = tuple(most * (2 * i / len(counts) - 1) for i in range(len(counts) + 1))
    return [Bars("All tokens of the vocabulary by effect", edges, counts)]


def _effects(figures: Feature) -> list[tuple[str, list[tuple[LogitEffect, float]]]]:
    """Both tables of logit effects, each effect with its bar's length in percent; nothing if they were not measured."""
    tables = [("Raises the logits of", figures.positive_logits), ("Lowers the logits of", figures.negative_logits)]
    most = max((abs(e.value) for _, effects in tables for e in effects or ()), default=0.0)
    return [
        (title, [(e, round(100 * abs(e.value) / most, 1) if most else 0.0) for e in effects])
        for title, effects in tables
        if effects
    ]
