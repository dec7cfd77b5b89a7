"""What nesting is about: gains from one prefix to the next, and the tree of features."""

from __future__ import annotations

from mtc.record import Record


class TokenGain(Record):
    """A token that is reconstructed better with a group of features than without."""

    token_id: int
    """Id in the language model's vocabulary."""
    token: str
    """Decoded."""
    count: int
    """How often it occurs in the evaluated text."""
    before: float
    """Mean squared error without the group, over the mean squared deviation of all targets."""
    after: float
    """The same with it."""


class PrefixStep(Record):
    """What a group of features adds to those before it."""

    group: int
    """Index from 0."""
    prefix: int
    """Features up to and with this group."""
    fvu_before: float
    """FVU without the group; for the first group 1, that of the mean."""
    fvu_after: float
    """FVU with it."""
    recovered_before: float | None
    """Loss recovered against zero ablation without the group; None for the first group and if it was not measured."""
    recovered_after: float | None
    """The same with it."""
    tokens: tuple[TokenGain, ...]
    """Of the tokens that occur at least `min_count` times, those whose error falls most."""
    min_count: int
    """Least occurrences of a token in `tokens`."""


class SplitFeature(Record):
    """A feature that several later ones divide among themselves; see mtc.analysis.nesting."""

    feature: int
    """The parent."""
    top_token: str | None
    """Its most frequent peak token."""
    children: tuple[int, ...]
    """Features whose parent it is."""
    child_tokens: tuple[str | None, ...]
    """Their most frequent peak tokens."""
    fired: int
    """Sampled tokens on which the parent fires."""
    coverage: float
    """Share of these on which a child fires."""
    overlap: float
    """Share of those on which two or more children fire."""


class AbsorbedFeature(Record):
    """An earlier feature that is silent where a later one fires, though it should fire; see mtc.analysis.nesting."""

    parent: int
    """The earlier feature."""
    parent_token: str | None
    """Its most frequent peak token."""
    child: int
    """The later one."""
    child_token: str | None
    """Its most frequent peak token."""
    cosine: float
    """Between the two decoder rows."""
    expected: int
    """Sampled tokens on which the child fires and the parent should."""
    absorbed: int
    """Of these, tokens on which the parent is silent."""


class Child(Record):
    """A branch of the tree."""

    feature: int
    """The later feature."""
    group: int
    """Its group."""
    top_token: str | None
    """Its most frequent peak token."""
    cosine: float
    """Between its decoder row and its parent's."""
    coactivation: float
    """P(parent fires | it fires)."""
    base_rate: float
    """P(parent fires)."""


class Family(Record):
    """A parent and its children in the nested tree."""

    feature: int
    """The parent."""
    group: int
    """Its group."""
    top_token: str | None
    """Its most frequent peak token."""
    num_children: int
    """How many features have it as their parent."""
    children: tuple[Child, ...]
    """Some of them, the strongest bonds (cosine times co-activation) first."""


class Tree(Record):
    """The nested dictionary as a tree, on a sample of the held-out tokens; docs/analysis.md says how it is found."""

    tokens: int
    """Sampled tokens."""
    with_parent: tuple[int, ...]
    """Features of each group that have a parent; 0 for the first."""
    judged: tuple[int, ...]
    """Features of each group that fired often enough to tell."""
    families: tuple[Family, ...]
    """The parents with most children."""
    splits: tuple[SplitFeature, ...]
    """Splitting candidates, those with most tokens first."""
    num_splits: int
    """How many there are in all."""
    absorptions: tuple[AbsorbedFeature, ...]
    """Absorption candidates, those with most absorbed tokens first."""
    num_absorptions: int
    """How many there are in all."""
    tested_pairs: int
    """Pairs for which absorption could be looked at."""
    limits: dict[str, float]
    """The thresholds of mtc.analysis.nesting by name."""
