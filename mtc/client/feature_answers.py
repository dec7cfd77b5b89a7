"""What the clients return of features where the service computes it: named, with the service's own words for fields."""

from __future__ import annotations

from typing import Any, NamedTuple


class NearMiss(NamedTuple):
    """A random context in which a feature is silent though a token of its own stands there, or a relative fires."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    marked: tuple[int, ...]
    """Indices of the tokens that are the feature's own, or on which the relative fires, its strongest first."""
    relative: int | None
    """Index of the related feature that fires; None where a token of the feature's own stands."""
    relative_label: str | None
    """Label of that relative; None without one."""
    activation: float | None
    """Strongest activation of the relative, in scaled units; None without one."""
    position: int
    """Place of the first of `marked` in its window, from 0."""
    document_id: str
    """Id of the document that the context is from."""


class Together(NamedTuple):
    """Another feature that fires on the same tokens."""

    feature: int
    """Index of the other feature."""
    label: str | None
    """Label of the other feature; None without samples."""
    shared: int
    """Tokens on which both fire."""
    lift: float
    """How many times more tokens these are than if the two had nothing to do with each other."""
    correlation: float
    """Correlation of whether the one and whether the other fires, over tokens, from -1 to 1."""


class Surroundings(NamedTuple):
    """The answer to `surroundings`: what random contexts tell of a feature."""

    run_id: str
    """Id of the run that answered."""
    layer: int
    """Layer of the run that the feature is of."""
    feature: int
    """Index of the feature in the dictionary."""
    contexts: int
    """Random contexts that were looked through."""
    tokens: int
    """Tokens of these contexts together."""
    near_misses: tuple[NearMiss, ...]
    """A few contexts in which the feature might fire and is silent."""
    together: tuple[Together, ...]
    """Features that fire together with it, by correlation, the highest first."""


def read_surroundings(found: dict[str, Any]) -> Surroundings:
    """An answer to `GET /features/{i}/surroundings`; fields that a newer service adds are left out. Raises KeyError or
    TypeError if it is none."""
    own = {name: found[name] for name in Surroundings._fields}
    near = tuple(
        NearMiss(**_known(NearMiss, row) | {"tokens": tuple(row["tokens"]), "marked": tuple(row["marked"])})
        for row in own["near_misses"]
    )
    together = tuple(Together(**_known(Together, row)) for row in own["together"])
    return Surroundings(**own | {"near_misses": near, "together": together})


def _known(kind: Any, row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in kind._fields}
