"""Features, their groups, examples and weights, as the report and the service show them."""

from __future__ import annotations

from typing import Literal

from mtc.record import Record


class Distribution(Record):
    """Mean, spread and ends of a set of float32 numbers, computed in float64."""

    mean: float
    """Mean of the numbers."""
    std: float
    """Population standard deviation of the numbers."""
    min: float
    """Smallest of the numbers."""
    max: float
    """Largest of the numbers."""


class Histogram(Record):
    """Counts of features between borders, by group."""

    edges: tuple[float, ...]
    """Borders of the histogram's bins, ascending, one more than there are bins."""
    counts: tuple[tuple[int, ...], ...]
    """[groups][bins]: features of each group in each bin."""


class Group(Record):
    """The features that one nested prefix adds."""

    group: int
    """Index of the group in the nested dictionary, from 0."""
    first: int
    """Index of the group's first feature."""
    end: int
    """Index one past the group's last feature: the size of the prefix that it completes."""
    silent_features: int
    """Features of the group that did not fire on the analysed tokens."""
    mean_density: float
    """Mean over the group's features of the share of tokens on which they fire, from 0 to 1."""
    decoder_norm: float
    """Mean Euclidean norm of the group's decoder rows, in scaled target units."""
    alignment: float | None
    """Mean cosine between the encoder and decoder rows of the group's features; None if source and target differ in
    width."""


class Weights(Record):
    """Distributions of the trained matrices' entries and row norms."""

    encoder: Distribution
    """Distribution of the entries of W_enc [features, d_source]."""
    decoder: Distribution
    """Distribution of the entries of W_dec [features, d_target]."""
    encoder_norm: Distribution
    """Distribution of the Euclidean norms of W_enc's rows."""
    decoder_norm: Distribution
    """Distribution of the Euclidean norms of W_dec's rows, in scaled target units."""
    alignment: Distribution | None
    """Distribution of the cosines between a feature's encoder and decoder row; None if source and target differ in
    width."""
    groups: tuple[Group, ...]
    """Figures of each group of the nested dictionary."""


class TokenCount(Record):
    """A token at the peaks of a feature's samples."""

    token_id: int
    """Id of the token in the language model's vocabulary."""
    token: str
    """Text of the token."""
    count: int
    """Samples of the feature that peak on the token."""


class LogitEffect(Record):
    """What one unit of a feature's activation adds to a token's logit on the direct way out."""

    token_id: int
    """Id of the token in the language model's vocabulary."""
    token: str
    """Text of the token."""
    value: float
    """Change of the token's logit per unit of activation, less the mean change over the vocabulary."""


class Neighbour(Record):
    """Another feature whose decoder row is near a feature's own."""

    feature: int
    """Index of the neighbour in the dictionary."""
    cosine: float
    """Cosine between the neighbour's decoder row and the feature's own, from -1 to 1."""


class Parent(Record):
    """The earlier feature that a feature refines."""

    feature: int
    """Index of the parent in the dictionary."""
    cosine: float
    """Cosine between the decoder rows of parent and child, from -1 to 1."""
    coactivation: float
    """P(parent fires | child fires) on the sampled tokens."""
    base_rate: float
    """P(parent fires) on the sampled tokens."""


class Feature(Record):
    """One feature on the analysed held-out tokens: a row of features.parquet."""

    feature: int
    """Index of the feature in the dictionary."""
    group: int
    """Group of the nested dictionary that the feature is in, from 0."""
    label: str | None
    """What the feature's samples have in common, in a few words and without a language model: plain text with quoted
    tokens, on one line of at most 160 characters; None without samples. See mtc.analysis.naming."""
    max_activation: float
    """Strongest activation of the feature, in scaled units; 0 if it never fired."""
    mean_activation: float
    """Mean activation over the tokens on which the feature fired, in scaled units; 0 if it never fired."""
    count: int
    """Analysed tokens on which the feature fired."""
    density: float
    """Share of the analysed tokens on which the feature fired, from 0 to 1."""
    massive: bool
    """Whether the feature is of massive tokens: more than half of its summed activation falls on them."""
    massive_activation: float
    """Share of the feature's summed activation that falls on massive tokens, from 0 to 1; 0 if it never fired."""
    massive_firings: float
    """Share of the tokens on which the feature fired that are massive, from 0 to 1; 0 if it never fired."""
    copy_of: int | None
    """Index of the earliest feature that this one is a copy of; None if it is none, or if it was not looked for."""
    samples: int
    """Stored top examples of the feature."""
    tokens_since_fired: int | None
    """Training tokens since the feature last fired, when training ended; None if the training is not known."""
    decoder_norm: float
    """Euclidean norm of the feature's decoder row, in scaled target units."""
    alignment: float | None
    """Cosine between the feature's encoder and decoder row; None if source and target differ in width."""
    histogram: tuple[int, ...]
    """Activations of the feature by size: counts between the borders `Analysis.activation_edges`."""
    top_tokens: tuple[TokenCount, ...]
    """Up to ten most frequent peak tokens of the feature's samples; equal counts in order of strength."""
    positive_logits: tuple[LogitEffect, ...] | None
    """The ten tokens whose logits the feature raises most; None if it was not measured."""
    negative_logits: tuple[LogitEffect, ...] | None
    """The ten tokens whose logits the feature lowers most; None if it was not measured."""
    neighbours: tuple[Neighbour, ...]
    """Up to five features with the nearest decoder rows, by cosine."""
    parent: Parent | None
    """Earlier feature that a feature of a later group refines; None without one, or if it fired too rarely to tell."""
    children: tuple[int, ...]
    """Indices of the later features whose parent the feature is."""
    logit_histogram: tuple[int, ...] | None = None
    """Tokens of the vocabulary by what the feature adds to their logits: counts in bins of equal width from -m to m,
    where m is the largest effect of either sign; None if it was not measured."""
    map_x: float | None = None
    """Place of the feature on the map of decoder directions (mtc.analysis.direction_map), from 0 on the left to 1; None
    if it never fired, or if the run was analysed before there were maps."""
    map_y: float | None = None
    """Place of the feature on the map, from 0 at the top to 1; None as `map_x`."""


class Example(Record):
    """A place in the held-out text where a feature fires."""

    kind: Literal["top", "sample"]
    """`top` for one of the feature's strongest activations, `sample` for one that was drawn uniformly."""
    activation: float
    """Activation of the feature at the peak, in scaled units."""
    quantile: float | None
    """Share of the feature's uniformly drawn activations that are weaker than the peak, from 0 to 1; None for a top
    example."""
    document_id: str
    """Id of the document that the example is from, 16 hex digits."""
    tokens: tuple[str, ...]
    """Decoded tokens around the peak."""
    activations: tuple[float, ...]
    """Activation of the feature on each token of `tokens`, in scaled units."""
    peak: int
    """Index in `tokens` of the token where the activation is strongest."""
    position: int | None = None
    """Place of the peak in its window, from 0; None if it was not kept."""


class ShownFeature(Record):
    """A feature that the report shows in full."""

    reason: Literal["strongest", "drawn"]
    """Why the feature is shown: among the strongest, or drawn at random from its group's features that fired."""
    figures: Feature
    """Figures of the feature: its row of features.parquet."""
    examples: tuple[Example, ...]
    """Contexts in which the feature fires: the strongest, then one of each fifth of the uniformly drawn activations,
    strongest fifth first."""


class TopFeature(Record):
    """A row of the table of strongest features, or of strongest features of massive tokens."""

    rank: int
    """Place of the feature by maximum activation, from 1."""
    feature: int
    """Index of the feature in the dictionary."""
    group: int
    """Group of the nested dictionary that the feature is in, from 0."""
    max_activation: float
    """Strongest activation of the feature, in scaled units."""
    massive_activation: float
    """Share of the feature's summed activation that falls on massive tokens, from 0 to 1."""
    samples: int
    """Stored top examples of the feature."""
    label: str | None
    """Label of the feature; None without samples."""
