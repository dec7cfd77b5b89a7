"""Two runs side by side: their figures, what differs between them, and which features of one are in the other."""

from __future__ import annotations

from mtc.record import Record

SHOWN = 20


class Side(Record):
    """One run in figures."""

    run_id: str
    """Name of the run."""
    model: str
    """Language model."""
    layer: int
    """Layer whose MLP is imitated."""
    sites: str
    """What is read and reconstructed."""
    fingerprint: str
    """Of the configuration."""
    data_fingerprint: str
    """Of the tokenised text."""
    figures: dict[str, float | None]
    """Held-out figures by name; None if not measured."""


class Match(Record):
    """A feature of each run."""

    feature_a: int
    """Of the first run."""
    feature_b: int
    """Of the second."""
    cosine: float
    """Between their decoder rows."""
    token_a: str | None
    """Most frequent peak token of the first; None without samples."""
    token_b: str | None
    """Of the second."""


class Matching(Record):
    """The assignment as a whole."""

    pairs: int
    """Features that have a partner: the size of the smaller dictionary."""
    mean: float
    """Mean cosine of the pairs."""
    median: float
    """Median cosine."""
    shares: dict[str, float]
    """Share of the pairs with at least that cosine."""
    group_medians: tuple[float, ...]
    """Median cosine by group of the first run; NaN for a group without pairs."""
    same_token: float | None
    """Share of the pairs, of those that both have samples, whose most frequent peak token is the same."""
    nearest: tuple[Match, ...]
    """The pairs that agree best."""
    farthest: tuple[Match, ...]
    """Those that agree least."""


class Comparison(Record):
    """Two runs, the first one called a and the second b."""

    format_version: int = 1
    """Layout of this file."""
    a: Side
    """The first run."""
    b: Side
    """The second run."""
    differences: tuple[str, ...]
    """Settings that differ, as `field: a, b`."""
    matching: Matching | None
    """None where features cannot be matched."""
    not_matched: str | None
    """Why not."""
