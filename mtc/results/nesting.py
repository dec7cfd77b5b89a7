"""What the report says of the nested dictionary: gains from prefix to prefix, and its tree."""

from __future__ import annotations

from mtc.record import Record


class TokenGain(Record):
    """A token that is reconstructed better with a group of features than without."""

    token_id: int
    """Id of the token in the language model's vocabulary."""
    token: str
    """Text of the token."""
    count: int
    """How often the token occurs in the evaluated text."""
    before: float
    """Mean squared error on the token without the group, over the mean squared deviation of all targets."""
    after: float
    """Mean squared error on the token with the group, over the mean squared deviation of all targets."""


class PrefixStep(Record):
    """What a group of features adds to those before it."""

    group: int
    """Index of the group in the nested dictionary, from 0."""
    prefix: int
    """Features up to and with the group."""
    fvu_before: float
    """FVU without the group; for the first group 1, the FVU of the mean."""
    fvu_after: float
    """FVU with the group."""
    recovered_before: float | None
    """Loss recovered against zero ablation without the group; None for the first group, if it was not measured
    and if zero ablation does not raise the loss."""
    recovered_after: float | None
    """Loss recovered against zero ablation with the group; None if it was not measured and if zero ablation does
    not raise the loss."""
    tokens: tuple[TokenGain, ...]
    """Tokens whose error falls most with the group, of those that occur at least `min_count` times."""
    min_count: int
    """Fewest occurrences in the evaluated text of a token in `tokens`."""


class SplitFeature(Record):
    """A feature that several later ones divide among themselves; see mtc.analysis.nesting."""

    feature: int
    """Index of the feature that is split: the parent."""
    label: str | None
    """Label of the parent; None without samples."""
    children: tuple[int, ...]
    """Indices of the later features whose parent the split feature is."""
    child_labels: tuple[str | None, ...]
    """Label of each child in `children`; None without samples."""
    fired: int
    """Sampled tokens on which the parent fires."""
    coverage: float
    """Share of the sampled tokens where the parent fires on which at least one child fires, from 0 to 1."""
    overlap: float
    """Share of the sampled tokens where the parent and a child fire on which two or more children do, from 0 to 1."""


class AbsorbedFeature(Record):
    """An earlier feature that is silent where a later one fires, though it should fire; see mtc.analysis.nesting."""

    parent: int
    """Index of the earlier feature that may be absorbed."""
    parent_label: str | None
    """Label of the earlier feature; None without samples."""
    child: int
    """Index of the later feature that may absorb the earlier one."""
    child_label: str | None
    """Label of the later feature; None without samples."""
    cosine: float
    """Cosine between the decoder rows of the earlier and the later feature, from -1 to 1."""
    expected: int
    """Sampled tokens on which the child fires and the parent should."""
    absorbed: int
    """Sampled tokens on which the child fires, the parent should but is silent, and the child's own part of the reach
    along the parent's direction is at least ABSORBER_SHARE (mtc.analysis.nesting)."""


class Child(Record):
    """A later feature under its parent in the nested tree."""

    feature: int
    """Index of the child in the dictionary."""
    group: int
    """Group of the nested dictionary that the child is in, from 0."""
    label: str | None
    """Label of the child; None without samples."""
    cosine: float
    """Cosine between the decoder rows of child and parent, from -1 to 1."""
    coactivation: float
    """P(parent fires | child fires) on the sampled tokens."""
    base_rate: float
    """P(parent fires) on the sampled tokens."""


class Family(Record):
    """A parent and its children in the nested tree."""

    feature: int
    """Index of the parent in the dictionary."""
    group: int
    """Group of the nested dictionary that the parent is in, from 0."""
    label: str | None
    """Label of the parent; None without samples."""
    num_children: int
    """Features that have this family's parent as theirs, shown or not."""
    children: tuple[Child, ...]
    """Some of the parent's children, the strongest bonds (cosine times co-activation) first."""


class Tree(Record):
    """The nested dictionary as a tree, on a sample of the held-out tokens; docs/analysis.md says how it is found."""

    tokens: int
    """Held-out tokens on which it was sampled which features fire together."""
    with_parent: tuple[int, ...]
    """Features of each group that have a parent; 0 for the first group."""
    judged: tuple[int, ...]
    """Features of each group that fired often enough on the sampled tokens to be judged."""
    families: tuple[Family, ...]
    """Parents with the most children, each with some of these."""
    splits: tuple[SplitFeature, ...]
    """Splitting candidates, those with most tokens first."""
    num_splits: int
    """Splitting candidates in all, listed in `splits` or not."""
    absorptions: tuple[AbsorbedFeature, ...]
    """Absorption candidates, those with most absorbed tokens first."""
    num_absorptions: int
    """Absorption candidates in all, listed in `absorptions` or not."""
    tested_pairs: int
    """Pairs of features for which absorption could be looked at."""
    limits: dict[str, float]
    """The thresholds of mtc.analysis.nesting by name."""
