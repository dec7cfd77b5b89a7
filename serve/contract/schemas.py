"""What the service takes and answers, as JSON. `docs/serving.md` describes the other formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mtc.results import AbsorbedFeature, Feature, SplitFeature

MAX_TOP_K = 1024
MAX_LIST = 1 << 20  # beyond any body's limit; the service's own limits are in Settings

Text = Annotated[str, Field(min_length=1)]


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is 5. Lists are looked at as a whole, since they may be long."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list) and any(type(each) is float for each in value):
        return [_whole(each) for each in value]
    return value


WHOLE = BeforeValidator(_whole)
"""Comes last, or the limits before it would be missing in the document."""

_Index = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[_Index], Field(min_length=1), WHOLE]
FeatureIndex = Annotated[_Index, WHOLE]
Prefix = Annotated[int, Field(ge=1, lt=1 << 31), WHOLE]


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), strict=True, populate_by_name=True
    )


class _Input(_Model):
    """Texts, or token ids; exactly one of the two."""

    inputs: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """One text or several."""
    input_ids: TokenIds | Annotated[list[TokenIds], Field(min_length=1)] | None = None
    """One window of token ids or several, read as they are: BOS is not added."""
    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of the run that answers, one of `GET /runs`; by default the current one."""
    truncate: bool = False
    """Cut inputs that are too long, at the end, instead of refusing them."""

    @model_validator(mode="after")
    def _one_kind(self) -> _Input:
        if (self.inputs is None) == (self.input_ids is None):
            raise ValueError("give either `inputs` or `input_ids`")
        return self

    @property
    def texts(self) -> list[str] | None:
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    @property
    def windows(self) -> list[list[int]] | None:
        ids = self.input_ids
        if ids is None or isinstance(ids[0], list):
            return ids
        return [ids]


class EncodeRequest(_Input):
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K), WHOLE] | None = None
    """Strongest active features returned for each token; by default 16, in CSR form all."""
    features: Annotated[list[_Index], Field(min_length=1, max_length=4096), WHOLE] | None = None
    """Only these features."""
    min_activation: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Only activations of at least this size."""
    prefix: Prefix | None = None
    """Use only the first `prefix` features, one of the nested dictionaries: cheaper and coarser. By default all."""
    form: Literal["topk", "csr"] = Field(default="topk", alias="return")
    """Features token by token, strongest first, or all inputs' tokens as one sparse matrix (CSR)."""
    include: list[Literal["l0", "fvu"]] = Field(default=[], max_length=8)
    """Figures for each token: `l0`, the number of active features, and `fvu`, see there. Both are those of the whole
    prefix, whatever `top_k`, `features` and `min_activation` leave out."""


class TokenizeRequest(_Input):
    pass


class FeatureActivation(_Model):
    feature_index: FeatureIndex
    """Row of the transcoder's encoder."""
    activation_value: float
    """The float32 activation, not rounded."""


class Csr(_Model):
    """Activations as a sparse matrix, [tokens, features]: row t has the entries indptr[t] to indptr[t + 1]."""

    indptr: Annotated[list[_Index], Field(min_length=2), WHOLE]
    """Where each row starts, and the end: [tokens + 1]."""
    indices: Annotated[list[_Index], WHOLE]
    """Features, ascending in each row: [entries]."""
    values: list[float]
    """float32 activations, not rounded: [entries]."""


class ModelIdentity(_Model):
    """Which transcoder answered."""

    run_id: str
    """The run."""
    sha256: str
    """Digest of its weights file."""
    base_model: str
    """The language model."""
    layer: int
    """Its layer that is read."""
    source: str
    """Site that the transcoder reads."""
    target: str
    """Site that it reconstructs."""
    d_source: int
    """Width of the source site."""
    d_target: int
    """Width of the target site."""
    num_features: int
    """Size of the whole dictionary."""
    k: int
    """Active features per token on average, as trained."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""


class Tokens(_Model):
    """An input as the model reads it; all lists have one entry for each token."""

    tokens: list[str]
    """Each id decoded on its own; a character of several tokens cannot be read in any of them."""
    token_ids: list[int]
    """Ids in the model's vocabulary."""
    offsets: list[tuple[int, int]] | None
    """First and one-past-last character of the text; BOS has an empty range. None for `input_ids`."""
    is_special: list[bool]
    """BOS or another token that stands for no text; such tokens were never trained on and have no features."""
    truncated: bool
    """Whether the input was cut."""


class InputResult(Tokens):
    features: list[list[FeatureActivation]] | None = None
    """With `return: topk`: each token's active features, strongest first, equal ones by index."""
    csr: Csr | None = None
    """With `return: csr`: the same as a sparse matrix."""
    l0: list[int] | None = None
    """Active features of each token."""
    fvu: list[float | None] | None = None
    """Of each token, ||y - y_m||^2 / ||y - b_dec||^2 for the MLP output y, its reconstruction y_m by the prefix m, and
    the decoder's bias in the units of y: 0 is perfect, 1 no better than the bias. None for special tokens."""


class Usage(_Model):
    inputs: int
    """Texts or windows."""
    tokens: int
    """Tokens that were read, BOS included."""


class EncodeResponse(_Model):
    model: ModelIdentity
    prefix: int
    """The nested dictionary used."""
    results: list[InputResult]
    """One for each input, in the order of the request."""
    usage: Usage
    request_id: str
    """Equal to the X-Request-ID header."""


class TokenizeResponse(_Model):
    model: ModelIdentity
    results: list[Tokens]
    """One for each input, in the order of the request."""
    usage: Usage
    request_id: str
    """Equal to the X-Request-ID header."""


class DecodeRequest(_Model):
    """Sparse features to a reconstruction; exactly one of `features` and `csr`."""

    features: Annotated[list[list[FeatureActivation]], Field(min_length=1)] | None = None
    """Token by token."""
    csr: Csr | None = None
    """As a sparse matrix; features may come in any order, repeated ones add up."""
    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of the run that answers; by default the current one."""
    prefix: Prefix | None = None
    """Leave out features beyond the first `prefix`, one of the nested dictionaries."""

    @model_validator(mode="after")
    def _one_form(self) -> DecodeRequest:
        if (self.features is None) == (self.csr is None):
            raise ValueError("give either `features` or `csr`")
        return self


class DecodeResponse(_Model):
    model: ModelIdentity
    prefix: int
    """The nested dictionary used."""
    reconstruction: list[list[float]]
    """At the target site, raw (not scaled): [tokens, d_target], float32, not rounded."""
    usage: Usage
    request_id: str
    """Equal to the X-Request-ID header."""


class RunSummary(_Model):
    """A finished run that can be asked for as `model`."""

    run_id: str
    """Its id, for one layer of several `<run id>/layer<N>`."""
    created: str
    """When it was finished, ISO 8601, UTC."""
    base_model: str
    """The language model."""
    layer: int
    """Its layer that is read."""
    num_features: int
    """Size of the whole dictionary."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    k: int
    """Active features per token on average, as trained."""
    state: Literal["current", "loaded", "loading", "not_loaded", "failed"]
    """`current` answers where no `model` is named; `loaded` answers at once; the first request for any other loads it;
    `failed` could not be loaded."""
    reason: str | None = None
    """Why it failed."""


class RunsResponse(_Model):
    runs: list[RunSummary]
    """Newest first."""


class LoadRequest(_Model):
    model: str = Field(min_length=1, max_length=200)
    """Id of the run that is to answer from now on, one of `GET /runs`; `latest` is what the service was started with,
    as it is now."""


class LoadResponse(_Model):
    model: ModelIdentity
    """The run that answers now."""
    previous: str
    """Id of the run that answered before."""
    seconds: float
    """Time that verifying, loading and warming up took."""


class Limits(_Model):
    """What a request may ask for; more is answered with 413."""

    max_body_bytes: int
    """Length of a request's body."""
    max_inputs: int
    """Texts or windows in a request."""
    max_input_tokens: int
    """Tokens of each, BOS included."""
    max_request_tokens: int
    """Tokens of all together."""
    max_json_depth: int
    """Nested lists and objects in a body."""


class InfoResponse(_Model):
    model: ModelIdentity
    """The run that answers where no `model` is named."""
    created: str
    """When it was finished, ISO 8601, UTC."""
    fingerprint: str
    """Changes with every setting that changes the run's numbers."""
    data: str
    """The text it was trained on."""
    input_norm: str
    """How the transcoder scales its source."""
    limits: Limits
    versions: dict[str, str]
    """Of the packages that matter."""


class Status(_Model):
    status: Literal["ok", "ready"]


class FeaturesQuery(BaseModel):
    """Parameters of `GET /features`; a feature must pass all filters."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of a run; by default the current one."""
    feature: list[FeatureIndex] = Field(default=[], max_length=500)
    """Only these; may be given several times."""
    group: int | None = Field(default=None, ge=0, lt=1 << 31)
    """Only of this group of the nested dictionary, from 0."""
    min_density: float | None = Field(default=None, ge=0, le=1)
    """Only those that fire on this share of the tokens at least."""
    max_density: float | None = Field(default=None, ge=0, le=1)
    """Only those that fire on this share of the tokens at most."""
    token: str | None = Field(default=None, min_length=1, max_length=200)
    """Only with this top token; case and space around it do not count."""
    text: str | None = Field(default=None, min_length=1, max_length=200)
    """Only with this in a stored context; case does not count."""
    sort: Literal["feature", "density", "count", "max_activation", "mean_activation", "decoder_norm"] = "feature"
    order: Literal["ascending", "descending"] = "ascending"
    limit: int = Field(default=50, ge=1, le=500)
    """Features of a page."""
    cursor: str | None = Field(default=None, min_length=1, max_length=200, pattern="^[A-Za-z0-9_-]+$")
    """Where the page begins, as the page before said."""


class FeatureRow(_Model):
    """One feature on the analysed held-out tokens, in short."""

    feature: int
    """Index in the dictionary."""
    group: int
    """Group of the nested dictionary, from 0."""
    density: float
    """Share of tokens on which it fired."""
    count: int
    """Tokens on which it fired."""
    max_activation: float
    """Strongest activation, in scaled units."""
    mean_activation: float
    """Mean over the tokens on which it fired; 0 if it never fired."""
    decoder_norm: float
    """Euclidean norm of its decoder row, in scaled target units."""
    top_tokens: list[str]
    """Most frequent peak tokens of its samples."""
    parent: int | None
    """The earlier feature that it refines, if one is known."""
    children: int
    """How many features refine it."""


class FeaturesResponse(_Model):
    run_id: str
    """The run."""
    total: int
    """Features that pass the filters."""
    features: list[FeatureRow]
    cursor: str | None
    """Where the next page begins, for the same filters and order; null after the last one."""


class FeatureResponse(_Model):
    run_id: str
    """The run."""
    feature: Feature
    """The feature's row of the run's features.parquet; see docs/analysis.md."""
    histogram_edges: list[float]
    """Borders of the histogram's bins."""
    splits: list[SplitFeature]
    """Splitting candidates of the report of which it is parent or child."""
    absorption: list[AbsorbedFeature]
    """Absorption candidates of the report of which it is a part."""


class ExampleRow(_Model):
    """A place in held-out text where the feature fires."""

    kind: Literal["top", "sample"]
    """One of the strongest, or drawn uniformly."""
    rank: int
    """Place among those of its kind, from 0."""
    activation: float
    """At the peak, in scaled units."""
    quantile: float | None
    """Share of the uniformly drawn activations that are weaker; null for the strongest."""
    document_id: str
    """The document."""
    tokens: list[str]
    """Decoded tokens around the peak."""
    activations: list[float]
    """The feature's activation on each of them."""
    peak: int
    """Index of the peak among them."""


class ExamplesResponse(_Model):
    run_id: str
    """The run."""
    feature: int
    """The feature."""
    total: int
    """Stored examples of the kinds that were asked for."""
    examples: list[ExampleRow]
    """The strongest first, then the uniformly drawn ones."""


class ErrorResponse(_Model):
    """The body of every answer with a status of 400 or more."""

    error: str
    """What was wrong, for a person."""
    error_type: str
    """What was wrong, for a program: a fixed word for each kind of error."""
    request_id: str
    """Equal to the X-Request-ID header; the service's logs name it."""
    detail: Any = None
    """More for a program, such as the limit and the value, or the list of invalid fields."""
