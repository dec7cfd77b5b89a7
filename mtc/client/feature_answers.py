"""What the clients return of features where the service computes it: named, with the service's own words for fields."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict

from mtc.client.answers import Model, Usage, model_of


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


class ByTextOptions(TypedDict, total=False):
    """What `features_by_text` may be asked beside its texts; see `POST /features/by-text`."""

    top_k: int
    """Most features of the answer; by default 20."""
    model: str
    """Id of the run that answers."""
    layer: int
    """Layer of the run that answers; by default its lowest."""
    prefix: int
    """Size in features of the nested dictionary whose features are compared; by default the whole dictionary."""
    truncate: bool
    """Cut a text that is too long instead of refusing it."""


class SideFigures(NamedTuple):
    """How a feature fires on the tokens of one side."""

    fires: int
    """Tokens on which it fires."""
    share: float
    """Share of the tokens on which it fires."""
    mean_activation: float
    """Mean activation over all tokens, in scaled units."""


class Contrast(NamedTuple):
    """A feature that tells texts from what they are compared with."""

    feature: int
    """Index of the feature in the dictionary."""
    label: str | None
    """Label of the feature; None without samples."""
    label_by: str | None
    """Who made the label: `rules`, or the name of a language model."""
    density: float
    """Share of the analysed tokens on which the feature fired."""
    max_activation: float
    """Strongest activation of the feature on the analysed tokens, in scaled units."""
    massive: bool
    """Whether the feature is of massive tokens."""
    copy_of: int | None
    """Index of the feature that this one is a copy of, if it is one."""
    texts: SideFigures
    """How it fires on the texts."""
    against: SideFigures
    """How it fires on what they are compared with."""
    log_odds_ratio: float
    """Log odds ratio of firing on a token, above 0 if the feature does so more often in the texts."""
    z: float
    """`log_odds_ratio` over its standard error."""
    difference: float
    """Difference of the mean activations in shares of the feature's largest one."""
    score: float
    """What features are ranked by: `z` times `difference`."""


class TextFeatures(NamedTuple):
    """The answer to `features_by_text`."""

    model: Model
    prefix: int
    """Size in features of the nested dictionary that was used."""
    background: Literal["texts", "random_contexts"]
    """What the texts are compared with: those of `against`, or the run's random contexts."""
    tokens: int
    """Tokens of the texts, special ones left out."""
    against_tokens: int
    """Tokens of what they are compared with."""
    largest_z_by_chance: float
    """What no feature's |z| exceeds in 95 of 100 pairs of sides that are alike, if tokens are independent."""
    features: tuple[Contrast, ...]
    """Features that tell the sides apart, the one that tells most first."""
    usage: Usage
    request_id: str


def read_by_text(found: dict[str, Any]) -> TextFeatures:
    """An answer to `POST /features/by-text`; see `read_surroundings`."""
    rows = tuple(
        Contrast(
            **_known(Contrast, row) | {n: SideFigures(**_known(SideFigures, row[n])) for n in ("texts", "against")}
        )
        for row in found["features"]
    )
    known = _known(TextFeatures, found) | {"model": model_of(found["model"]), "usage": Usage(**found["usage"])}
    return TextFeatures(**known | {"features": rows})


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
