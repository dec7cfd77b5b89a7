"""Features that are copies of others."""

from __future__ import annotations

from mtc.record import Record


class CopiedFeature(Record):
    """A feature and the later ones that are copies of it."""

    feature: int
    """Index of the earliest of the copies."""
    label: str | None
    """Label of the feature; None without samples."""
    massive: bool
    """Whether the feature is of massive tokens."""
    copies: tuple[int, ...]
    """Indices of the later features that are copies of it, or of such a copy."""


class Copies(Record):
    """Features that do again what an earlier one does: decoder cosine and encoder cosine are above `cosine`, and they
    fire together on at least `together` of the sampled tokens on which either fires."""

    tokens: int
    """Held-out tokens on which it was sampled which features fire together."""
    cosine: float
    """Cosine that both the decoder rows and the encoder rows of two copies exceed."""
    together: float
    """Least share of the sampled tokens where either of two copies fires on which both do."""
    features: int
    """Features that are a copy of an earlier one."""
    share: float
    """Share of all features that are a copy of an earlier one, from 0 to 1."""
    copied: tuple[CopiedFeature, ...]
    """Features of which there are copies, those with most copies first."""
    num_copied: int
    """Features of which there are copies, listed in `copied` or not."""
