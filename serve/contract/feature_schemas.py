"""What the service answers about features, as JSON: pages of them, one of them, its examples."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtc.results import MOST_CHARACTERS, AbsorbedFeature, Feature, FeatureLabel, SplitFeature
from serve.contract.schemas import FeatureIndex, Layer, SchemaModel

Sort = Literal["feature", "density", "count", "max_activation", "mean_activation", "decoder_norm", "relevance"]


class FeaturesQuery(BaseModel):
    """Parameters of `GET /features`; a feature must pass all filters."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of a run; by default the current one."""
    layer: Layer | None = None
    """Layer of the run; by default its lowest."""
    feature: list[FeatureIndex] = Field(default=[], max_length=500)
    """Only features with this index; may be given several times."""
    group: int | None = Field(default=None, ge=0, lt=1 << 31)
    """Only features of this group of the nested dictionary, from 0."""
    massive: bool | None = None
    """Only features of massive tokens (true), or only others (false): those of which more than half of the summed
    activation falls on tokens with a target norm above 5 times the median."""
    min_density: float | None = Field(default=None, ge=0, le=1)
    """Only features that fire on this share of the tokens at least."""
    max_density: float | None = Field(default=None, ge=0, le=1)
    """Only features that fire on this share of the tokens at most."""
    token: str | None = Field(default=None, min_length=1, max_length=200)
    """Only features with this top token; case and space around it do not count."""
    text: str | None = Field(default=None, min_length=1, max_length=200)
    """Only features with this text in a stored context; case does not count."""
    query: str | None = Field(default=None, min_length=1, max_length=200, pattern=r"\S")
    """Only features that have to do with one of these words or their stems, the most relevant first: by their label, by
    the words on which they fire, by what stands around these, and by the tokens whose logits they raise."""
    by: Literal["words", "meaning"] = "words"
    """How `query` is looked for: by its words, or by the meaning of the features' labels, the nearest 1000 first, which
    the run and the service must be set up for; the query's text then goes to the endpoint that the service names."""
    starred: bool | None = None
    """Only features to which someone gave a star (true), or only others (false)."""
    note: str | None = Field(default=None, min_length=1, max_length=200)
    """Only features with this text in someone's note; case does not count. `query` does not search notes."""
    copies: bool | None = None
    """Only features that are copies of an earlier one (true), or only others (false)."""
    single_token: bool | None = None
    """Only features of a single token (true), on which nine tenths of their samples peak at least, or only others
    (false)."""
    max_detection: float | None = Field(default=None, ge=0, le=1)
    """Only features whose label has this score in detection at most; labels without a score do not pass."""
    sort: Sort | None = None
    """Figure that features are sorted by; equal ones by index. By default the index, with `query` the relevance."""
    order: Literal["ascending", "descending"] = "ascending"
    """Direction in which features are sorted; by relevance, ascending has the most relevant first."""
    limit: int = Field(default=50, ge=1, le=500)
    """Most features of a page."""
    cursor: str | None = Field(default=None, min_length=1, max_length=200, pattern="^[A-Za-z0-9_-]+$")
    """Where the page begins: `cursor` of the page before."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sort == "relevance" and self.query is None:
            raise ValueError("sort=relevance: relevant to what? query is wanted, too")
        return self


class FeatureRow(SchemaModel):
    """One feature on the analysed held-out tokens, in short."""

    feature: int
    """Index of the feature in the dictionary."""
    group: int
    """Group of the nested dictionary that the feature belongs to, from 0."""
    label: str | None
    """What the feature responds to, in a few words: a language model's label if there is one, otherwise that of rules,
    which quotes tokens; null without samples."""
    label_by: str | None
    """Who made the label: `rules`, or the name of a language model; null without one."""
    detection: float | None
    """How well a judge that knows the label tells contexts in which the feature is active from others: balanced
    accuracy from 0 to 1, 0.5 by chance; null if the label was not scored."""
    density: float
    """Share of the tokens on which the feature fired."""
    count: int
    """Number of tokens on which the feature fired."""
    max_activation: float
    """Strongest activation of the feature, in scaled units."""
    mean_activation: float
    """Mean activation over the tokens on which the feature fired; 0 if it never fired."""
    decoder_norm: float
    """Euclidean norm of the feature's decoder row, in scaled target units."""
    massive: bool
    """Whether the feature is of massive tokens: more than half of its summed activation falls on them."""
    copy_of: int | None
    """Index of the earliest feature that this one is a copy of, if it is one."""
    top_tokens: list[str]
    """Most frequent peak tokens of the feature's samples."""
    parent: int | None
    """Index of the earlier feature that this one refines, if one is known."""
    children: int
    """Number of features that refine this one."""
    similarity: float | None
    """Cosine of the label's and the query's vectors, from -1 to 1, with `by=meaning`; null otherwise."""
    note: str | None
    """What someone noted of the feature; null without a note."""
    star: bool
    """Whether someone gave the feature a star."""


class FeaturesResponse(SchemaModel):
    """A page of features."""

    run_id: str
    """Id of the run that was asked."""
    layer: int
    """Layer of the run whose features these are."""
    total: int
    """Number of features that pass the filters."""
    features: list[FeatureRow]
    """Features of this page."""
    cursor: str | None
    """Where the next page begins, for the same filters and order; null after the last page."""


class FeatureResponse(SchemaModel):
    """All that the analysis says of one feature."""

    run_id: str
    """Id of the run that was asked."""
    layer: int
    """Layer of the run that the feature is of."""
    feature: Feature
    """The feature's row of the run's features.parquet; see docs/analysis.md."""
    labels: FeatureLabel | None
    """What a language model made of the feature, and how well each label did, that of rules too; null if it was not
    asked. See docs/labels.md."""
    histogram_edges: list[float]
    """Borders of the bins of the feature's histogram."""
    splits: list[SplitFeature]
    """Splitting candidates of the report of which the feature is parent or child."""
    absorption: list[AbsorbedFeature]
    """Absorption candidates of the report of which the feature is parent or child."""
    note: str | None
    """What someone noted of the feature; null without a note."""
    star: bool
    """Whether someone gave the feature a star."""
    note_changed: str | None
    """When note or star were last changed, ISO 8601, UTC; null if they never were."""


class NoteRequest(SchemaModel):
    """A note, a star, or both; what is left out stays as it is."""

    note: str | None = Field(default=None, max_length=MOST_CHARACTERS, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    """What the feature is about, in one's own words on one line, without control characters; null or no words take the
    note away."""
    star: bool = False
    """Whether the feature gets a star, or loses it."""
    seen: str | None = Field(default=None, max_length=100)
    """`note_changed` as it was read, null if it was: a note that was changed since is not replaced, 412. Without
    `seen`, whatever there is is replaced."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not {"note", "star"} & self.model_fields_set:
            raise ValueError("give `note`, `star` or both")
        return self


class NoteResponse(SchemaModel):
    """What is kept of a feature now."""

    run_id: str
    """Id of the run that was asked."""
    layer: int
    """Layer of the run that the feature is of."""
    feature: int
    """Index of the feature in the dictionary."""
    note: str | None
    """What someone noted of the feature; null without a note."""
    star: bool
    """Whether someone gave the feature a star."""
    note_changed: str | None
    """When this was written, ISO 8601, UTC."""


class NearMissRow(SchemaModel):
    """A random context in which a feature is silent though a token of its own stands there, or a relative fires."""

    tokens: list[str]
    """Decoded tokens of the context."""
    marked: list[int]
    """Indices of the tokens that are among the feature's three most frequent ones, or on which the relative fires, its
    strongest first."""
    relative: int | None
    """Index of the related feature that fires: a neighbour, the parent, a child or a sibling; null where a token of
    the feature's own stands."""
    relative_label: str | None
    """Label of that relative; null without one."""
    activation: float | None
    """Strongest activation of the relative in the context, in scaled units; null without one."""
    position: int
    """Place of the first of `marked` in its window, from 0."""
    document_id: str
    """Id of the document that the context is from."""


class TogetherRow(SchemaModel):
    """Another feature that fires on the same tokens of the random contexts."""

    feature: int
    """Index of the other feature."""
    label: str | None
    """Label of the other feature; null without samples."""
    shared: int
    """Number of tokens on which both fire."""
    lift: float
    """How many times more tokens these are than if the two had nothing to do with each other."""
    correlation: float
    """Correlation of whether the one and whether the other fires, over tokens, from -1 to 1."""


class SurroundingsResponse(SchemaModel):
    """What random contexts of held-out text tell of one feature; see docs/serving.md."""

    run_id: str
    """Id of the run that was asked."""
    layer: int
    """Layer of the run that the feature is of."""
    feature: int
    """Index of the feature in the dictionary."""
    contexts: int
    """Number of random contexts that were looked through."""
    tokens: int
    """Number of tokens of these contexts together."""
    near_misses: list[NearMissRow]
    """A few contexts in which the feature might fire and is silent, the same whenever they are asked for."""
    together: list[TogetherRow]
    """Features that fire on at least three of the same tokens, the ten with the highest correlation, highest first."""


class ExampleRow(SchemaModel):
    """A place in held-out text where the feature fires."""

    kind: Literal["top", "sample"]
    """Whether the example is one of the strongest, `top`, or drawn uniformly, `sample`."""
    rank: int
    """Place of the example among those of its kind, from 0."""
    activation: float
    """The feature's activation at the peak, in scaled units."""
    quantile: float | None
    """Share of the uniformly drawn activations that are weaker; null for the strongest."""
    document_id: str
    """Id of the document that the example was found in."""
    position: int
    """Place of the peak in its window, from 0; at 0 and 1 the language model saw next to nothing before it."""
    token_ids: list[int]
    """Token ids around the peak, as `POST /ablate` takes them; BOS stands in front of none."""
    tokens: list[str]
    """Decoded tokens around the peak."""
    activations: list[float]
    """The feature's activation on each of the tokens."""
    peak: int
    """Index of the peak among the tokens."""


class ExamplesResponse(SchemaModel):
    """Examples of one feature."""

    run_id: str
    """Id of the run that was asked."""
    layer: int
    """Layer of the run that the feature is of."""
    feature: int
    """Index of the feature in the dictionary."""
    total: int
    """Number of stored examples of the kinds that were asked for."""
    examples: list[ExampleRow]
    """Examples of the feature: the strongest first, then the uniformly drawn ones."""
