"""Two runs side by side: their figures, what differs between them, and which features of one are in the other."""

from __future__ import annotations

from mtc.record import Record

SHOWN = 20


class Side(Record):
    """One of the two runs that are compared, in figures."""

    run_id: str
    """Name of the compared run."""
    model: str
    """Name of the language model whose MLP is imitated."""
    layer: int
    """Layer whose MLP is imitated, from 0."""
    sites: str
    """Sites that the transcoder reads and reconstructs, as `SOURCE to TARGET`."""
    fingerprint: str
    """Fingerprint of the configuration, 16 hex digits."""
    data_fingerprint: str
    """Fingerprint of the tokenised text, 16 hex digits."""
    figures: dict[str, float | None]
    """Held-out figures of the run by name; None for one that was not measured."""


class Match(Record):
    """A feature of the first run and the feature of the second run that it is matched with."""

    feature_a: int
    """Index of the first run's feature."""
    feature_b: int
    """Index of the second run's feature."""
    cosine: float
    """Cosine between the two features' decoder rows, from -1 to 1."""
    token_a: str | None
    """Most frequent peak token of the first run's feature; None without samples."""
    token_b: str | None
    """Most frequent peak token of the second run's feature; None without samples."""
    label_a: str | None
    """Label of the first run's feature; None without samples."""
    label_b: str | None
    """Label of the second run's feature; None without samples."""


class Matching(Record):
    """One-to-one assignment of two runs' features, in figures."""

    pairs: int
    """Matched pairs of features: as many as the smaller dictionary has features."""
    mean: float
    """Mean decoder cosine of the matched pairs."""
    median: float
    """Median decoder cosine of the matched pairs."""
    shares: dict[str, float]
    """Share of the matched pairs, from 0 to 1, whose decoder cosine is at least the number that is the key."""
    group_medians: tuple[float, ...]
    """Median decoder cosine of the matched pairs by group of the first run; NaN for a group without pairs."""
    same_token: float | None
    """Share of the pairs whose most frequent peak token is the same, from 0 to 1, of those that both have samples; None
    if no pair has."""
    nearest: tuple[Match, ...]
    """Matched pairs with the largest decoder cosines."""
    farthest: tuple[Match, ...]
    """Matched pairs with the smallest decoder cosines."""


class Comparison(Record):
    """Two runs side by side, the first one called a and the second b."""

    format_version: int = 2
    """Version of the layout of comparison.json."""
    a: Side
    """Figures of the first run."""
    b: Side
    """Figures of the second run."""
    differences: tuple[str, ...]
    """Settings that differ, as `field: a, b`."""
    matching: Matching | None
    """How well the two runs' features match; None where they cannot be matched."""
    not_matched: str | None
    """Why the features were not matched; None if they were."""
