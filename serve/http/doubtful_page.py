"""Which features are to be doubted, at a glance: kinds of them with their numbers and the addresses of their lists."""

from __future__ import annotations

from typing import Any, NamedTuple

from mtc.results import percent
from serve.http.pages import query
from serve.service import DENSE, SINGLE_TOKEN, FeatureTable, Filters

POOR_DETECTION = 0.6
"""Score in detection up to which a label says little: 0.5 is chance."""


class Doubt(NamedTuple):
    """A reason to doubt features."""

    title: str
    """What the features are, in a few words."""
    why: str
    """Why that is a reason."""
    filters: dict[str, Any]
    """Parameters of `GET /features` that such features pass, and no others."""


class Doubted(NamedTuple):
    """How many features there is this reason to doubt."""

    doubt: Doubt
    features: int | None
    """All of them; None if it was not measured."""
    of: int
    """Features of which it was measured."""
    share: float
    """Share of these, from 0 to 1."""
    groups: list[int]
    """Those of each group of the nested dictionary."""


DOUBTS = (
    Doubt(
        "Silent", "They fired on none of the analysed tokens: dead, or rarer than this text shows.",
        {"max_density": 0, "sort": "decoder_norm", "order": "descending"},
    ),
    Doubt(
        f"Dense, on {percent(DENSE)} of the tokens or more",
        "What fires that often seldom has one meaning.",
        {"min_density": DENSE, "sort": "density", "order": "descending"},
    ),
    Doubt("Copies of an earlier feature", "They say again what another one says.", {"copies": True}),
    Doubt(
        "Of massive tokens", "Most of their activation falls on a few tokens of outlying norm, often the first ones.",
        {"massive": True, "sort": "max_activation", "order": "descending"},
    ),
    Doubt(
        f"Of a single token, at {percent(SINGLE_TOKEN)} of the samples or more",
        "They may be no more than the token's id, which the embedding has, too.",
        {"single_token": True, "sort": "count", "order": "descending"},
    ),
    Doubt(
        f"With a label that scores {POOR_DETECTION} in detection or less",
        "Who knows the label hardly tells better than by chance where the feature is active.",
        {"max_detection": POOR_DETECTION},
    ),
)  # fmt: skip


def doubted(table: FeatureTable, groups: int) -> list[Doubted]:
    """Every reason with its features' numbers; a feature may be of several."""
    found = []
    for doubt in DOUBTS:
        own = Filters(**{name: value for name, value in doubt.filters.items() if name not in ("sort", "order")})
        many = [table.count(own._replace(group=group)) for group in range(groups)]
        of = len(table) if own.max_detection is None else table.scored
        found.append(Doubted(doubt, sum(many) if _measured(table, own) else None, of, sum(many) / max(1, of), many))
    return found


def list_of(doubt: Doubt, **more: Any) -> str:
    """The address of the list of such features, as its form would have it."""
    return "/ui/features" + query(**{n: str(v).lower() for n, v in doubt.filters.items()}, **more)


def _measured(table: FeatureTable, filters: Filters) -> bool:
    if filters.copies is not None:
        return table.analysis.copies is not None
    return filters.max_detection is None or table.scored > 0
