"""Features, groups and their examples, as the report and the service show them."""

from __future__ import annotations

from typing import Literal

from mtc.record import Record


class Distribution(Record):
    """Of a set of float32 numbers, computed in float64."""

    mean: float
    """Mean."""
    std: float
    """Population standard deviation."""
    min: float
    """Smallest."""
    max: float
    """Largest."""


class Histogram(Record):
    """Counts of features between borders, by group."""

    edges: tuple[float, ...]
    """Borders of the bins, ascending, one more than there are bins."""
    counts: tuple[tuple[int, ...], ...]
    """[groups][bins]."""


class Group(Record):
    """The features that one nested prefix adds."""

    group: int
    """Index from 0."""
    first: int
    """First feature."""
    end: int
    """One past the last feature: the prefix that this group completes."""
    silent_features: int
    """Features that did not fire on the analysed tokens."""
    mean_density: float
    """Mean over features of the share of tokens on which they fire."""
    decoder_norm: float
    """Mean Euclidean norm of the decoder rows, in scaled target units."""
    alignment: float | None
    """Mean cosine between a feature's encoder and decoder row; None if source and target differ in width."""


class Weights(Record):
    """The trained matrices."""

    encoder: Distribution
    """Entries of W_enc [features, d_source]."""
    decoder: Distribution
    """Entries of W_dec [features, d_target]."""
    encoder_norm: Distribution
    """Euclidean norms of W_enc's rows."""
    decoder_norm: Distribution
    """Euclidean norms of W_dec's rows, in scaled target units."""
    alignment: Distribution | None
    """Cosines between encoder and decoder rows; None if source and target differ in width."""
    groups: tuple[Group, ...]
    """Per group of the nested dictionary."""


class TokenCount(Record):
    """A token at the peaks of a feature's samples."""

    token_id: int
    """Id in the language model's vocabulary."""
    token: str
    """Decoded."""
    count: int
    """Samples of the feature that peak on it."""


class LogitEffect(Record):
    """What one unit of a feature's activation adds to a token's logit on the direct way out."""

    token_id: int
    """Id in the language model's vocabulary."""
    token: str
    """Decoded."""
    value: float
    """Logits per unit of activation, less the mean over the vocabulary."""


class Neighbour(Record):
    """Another feature whose decoder row is near."""

    feature: int
    """Index in the dictionary."""
    cosine: float
    """Between the two decoder rows."""


class Parent(Record):
    """The earlier feature that a feature refines."""

    feature: int
    """Index in the dictionary."""
    cosine: float
    """Between the two decoder rows."""
    coactivation: float
    """P(parent fires | this feature fires) on the sampled tokens."""
    base_rate: float
    """P(parent fires) on the sampled tokens."""


class Feature(Record):
    """One feature on the analysed held-out tokens: a row of features.parquet."""

    feature: int
    """Index in the dictionary."""
    group: int
    """Group of the nested dictionary, from 0."""
    max_activation: float
    """Strongest activation, in scaled units; 0 if it never fired."""
    mean_activation: float
    """Mean over the tokens on which it fired; 0 if it never fired."""
    count: int
    """Tokens on which it fired."""
    density: float
    """Share of tokens on which it fired."""
    samples: int
    """Stored top examples."""
    tokens_since_fired: int | None
    """Training tokens since it last fired, when training ended; None if the training is not known."""
    decoder_norm: float
    """Euclidean norm of its decoder row, in scaled target units."""
    alignment: float | None
    """Cosine between its encoder and decoder row; None if source and target differ in width."""
    histogram: tuple[int, ...]
    """Activations by size: counts between the borders `Analysis.activation_edges`."""
    top_tokens: tuple[TokenCount, ...]
    """Up to ten most frequent peak tokens of its samples; equal counts in order of strength."""
    positive_logits: tuple[LogitEffect, ...] | None
    """The ten tokens whose logits it raises most; None if it was not measured."""
    negative_logits: tuple[LogitEffect, ...] | None
    """The ten whose logits it lowers most."""
    neighbours: tuple[Neighbour, ...]
    """Up to five nearest features by decoder cosine."""
    parent: Parent | None
    """Of a nested dictionary's later groups; None without one, or if it fired too rarely to tell."""
    children: tuple[int, ...]
    """Features whose parent it is."""


class Example(Record):
    """A place in the held-out text where a feature fires."""

    kind: Literal["top", "sample"]
    """One of the strongest, or drawn uniformly."""
    activation: float
    """At the peak, in scaled units."""
    quantile: float | None
    """Share of the uniformly drawn activations that are weaker; None for the strongest."""
    document_id: str
    """The document."""
    tokens: tuple[str, ...]
    """Decoded tokens around the peak."""
    activations: tuple[float, ...]
    """The feature's activation on each of them."""
    peak: int
    """Index of the peak among them."""


class ShownFeature(Record):
    """A feature that the report shows in full."""

    reason: Literal["strongest", "drawn"]
    """Why it is shown: among the strongest, or drawn at random from its group's features that fired."""
    figures: Feature
    """Its row of features.parquet."""
    examples: tuple[Example, ...]
    """Contexts: the strongest, then one of each fifth of the uniformly drawn activations, strongest fifth first."""


class TopFeature(Record):
    """A row of the table of strongest features."""

    rank: int
    """From 1, by maximum activation."""
    feature: int
    """Index in the dictionary."""
    group: int
    """Group of the nested dictionary, from 0."""
    max_activation: float
    """Strongest activation, in scaled units."""
    samples: int
    """Stored top examples."""
    top_token: str | None
    """Most frequent peak token, decoded; None without samples."""
