"""What the service takes and answers, as JSON. `docs/serving.md` describes the other formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_TOP_K = 1024

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
FIRST = Field(fail_fast=True)
"""Of the lists that a client sends: the first wrong item is told, not each of what may be half a million."""
TokenIds = Annotated[list[_Index], Field(min_length=1), FIRST, WHOLE]
FeatureIndex = Annotated[_Index, WHOLE]
Prefix = Annotated[int, Field(ge=1, lt=1 << 31), WHOLE]
Layer = Annotated[int, Field(ge=0, lt=1 << 31), WHOLE]


class SchemaModel(BaseModel):
    # No field that is not documented, no value of another type.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), strict=True, populate_by_name=True
    )


class _Input(SchemaModel):
    """Texts, or token ids; exactly one of the two."""

    inputs: Text | Annotated[list[Text], Field(min_length=1), FIRST] | None = None
    """One text or several."""
    input_ids: TokenIds | Annotated[list[TokenIds], Field(min_length=1), FIRST] | None = None
    """One window of token ids or several, read as they are: BOS is not added."""
    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of the run that answers, one of `GET /runs`; by default the current one."""
    layer: Layer | None = None
    """Layer of the run that answers, one of its `layers` in `GET /runs`; by default the lowest. Another one is answered
    with 422, which names all layers."""
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
    """Texts or token ids to features."""

    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K), WHOLE] | None = None
    """Strongest active features returned for each token; by default 16, in CSR form all."""
    features: Annotated[list[_Index], Field(min_length=1, max_length=4096), FIRST, WHOLE] | None = None
    """Indices of the only features to return."""
    min_activation: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Least activation that is returned."""
    prefix: Prefix | None = None
    """Number of features used, the first ones: one of the nested dictionaries, cheaper and coarser. By default all."""
    form: Literal["topk", "csr"] = Field(default="topk", alias="return")
    """Features token by token, strongest first, or all inputs' tokens as one sparse matrix (CSR)."""
    include: list[Literal["l0", "relative_error", "label"]] = Field(default=[], max_length=8)
    """Figures for each token: `l0`, the number of active features, and `relative_error`, the share of the MLP output
    that is not reconstructed. Both are those of the whole prefix, whatever `top_k`, `features` and `min_activation`
    leave out. `label` adds what is said of the features that are returned, and wants an analysed run."""


class TokenizeRequest(_Input):
    """Texts or token ids to tokens, as the model reads them."""


class FeatureActivation(SchemaModel):
    """One active feature of one token."""

    feature_index: FeatureIndex
    """Index of the feature in the dictionary."""
    activation_value: float
    """The float32 activation, not rounded."""


class Csr(SchemaModel):
    """Activations as a sparse matrix, [tokens, features]: row t has the entries indptr[t] to indptr[t + 1]."""

    indptr: Annotated[list[_Index], Field(min_length=2), FIRST, WHOLE]
    """Where each row's entries start, and where the last ones end: [tokens + 1]."""
    indices: Annotated[list[_Index], FIRST, WHOLE]
    """Feature of each entry, ascending in each row: [entries]."""
    values: Annotated[list[float], FIRST]
    """float32 activation of each entry, not rounded: [entries]."""


class ModelIdentity(SchemaModel):
    """Which transcoder answered."""

    run_id: str
    """Id of the transcoder's run, as it was asked for: of several layers the whole run's, or `<run id>/layer9`."""
    sha256: str
    """Digest of the transcoder's weights file."""
    base_model: str
    """The language model whose activations the transcoder reads."""
    layer: int
    """Layer of the language model that is read, from 0."""
    source: str
    """Site that the transcoder reads."""
    target: str
    """Site that the transcoder reconstructs."""
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


class Tokens(SchemaModel):
    """An input as the model reads it; all lists have one entry for each token."""

    tokens: list[str]
    """Tokens as text, special ones by name: the others, joined, are the text. A character of several tokens is shown at
    its last, and those before it may be empty."""
    token_ids: list[int]
    """Token ids in the language model's vocabulary."""
    offsets: list[tuple[int, int]] | None
    """First and one-past-last character of each token in the text; BOS has an empty range. None for `input_ids`."""
    is_special: list[bool]
    """Whether each token is BOS or another that stands for no text: never trained on, and without features."""
    truncated: bool
    """Whether the input was cut at its end."""


class InputResult(Tokens):
    """An input's tokens and their features."""

    features: list[list[FeatureActivation]] | None = None
    """With `return: topk`: each token's active features, strongest first, equal ones by index."""
    csr: Csr | None = None
    """With `return: csr`: the tokens' active features as a sparse matrix."""
    labels: dict[str, str | None] | None = None
    """Label of each feature that is returned, by its index, with `include: label`: a language model's if there is one,
    otherwise that of rules; null for a feature that was never seen to fire."""
    l0: list[int] | None = None
    """Number of active features of each token, with `include: l0`."""
    relative_error: list[float | None] | None = None
    """Relative squared error of each token, with `include: relative_error`: ||y - y_m||^2 / ||y - b_dec||^2 for the MLP
    output y, its reconstruction y_m by the prefix m, and the decoder's bias in the units of y. 0 is perfect, 1 no
    better than the bias; None for special tokens. Not the report's FVU, which is a ratio of sums over many tokens."""


class Usage(SchemaModel):
    """How much a request made the service read."""

    inputs: int
    """Number of texts or windows that were read."""
    tokens: int
    """Number of tokens that were read, BOS included."""


class EncodeResponse(SchemaModel):
    """Features of the tokens of all inputs."""

    model: ModelIdentity
    """The transcoder that answered."""
    prefix: int
    """Number of features of the nested dictionary that was used."""
    results: list[InputResult]
    """Answers for the inputs, in the order of the request."""
    usage: Usage
    """How much was read."""
    request_id: str
    """Id of the request, equal to the X-Request-ID header."""


class TokenizeResponse(SchemaModel):
    """Tokens of all inputs."""

    model: ModelIdentity
    """The transcoder that answered."""
    results: list[Tokens]
    """Answers for the inputs, in the order of the request."""
    usage: Usage
    """How much was read."""
    request_id: str
    """Id of the request, equal to the X-Request-ID header."""


class DecodeRequest(SchemaModel):
    """Sparse features to a reconstruction; exactly one of `features` and `csr`."""

    features: Annotated[list[Annotated[list[FeatureActivation], FIRST]], Field(min_length=1), FIRST] | None = None
    """Active features of each token."""
    csr: Csr | None = None
    """Active features of all tokens as a sparse matrix; they may come in any order, repeated ones add up."""
    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of the run that answers; by default the current one."""
    layer: Layer | None = None
    """Layer of the run that answers; by default the lowest."""
    prefix: Prefix | None = None
    """Number of features used, the first ones: one of the nested dictionaries. By default all."""

    @model_validator(mode="after")
    def _one_form(self) -> DecodeRequest:
        if (self.features is None) == (self.csr is None):
            raise ValueError("give either `features` or `csr`")
        return self


class DecodeResponse(SchemaModel):
    """The reconstruction of the target site from features."""

    model: ModelIdentity
    """The transcoder that answered."""
    prefix: int
    """Number of features of the nested dictionary that was used."""
    reconstruction: list[list[float]]
    """Reconstruction of the target site, raw (not scaled): [tokens, d_target], float32, not rounded."""
    usage: Usage
    """How much was read."""
    request_id: str
    """Id of the request, equal to the X-Request-ID header."""


class RunSummary(SchemaModel):
    """A finished run that can be asked for as `model`."""

    run_id: str
    """Id of the run, for a transcoder that answers alone of a run of several `<run id>/<its name>`, such as
    `<run id>/k16` of a sweep."""
    created: str
    """When the run was finished, ISO 8601, UTC."""
    base_model: str
    """The language model whose activations the run reads."""
    layer: int
    """Layer that answers where none is named, the lowest of `layers`."""
    layers: list[int]
    """Layers of the language model that the run has a transcoder for, from 0, ascending: each can be asked for as
    `layer`."""
    num_features: int
    """Size of the whole dictionary of each layer."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    k: int
    """Active features per token on average, as trained."""
    state: Literal["current", "loaded", "loading", "not_loaded", "failed"]
    """Whether the run can answer: `current` answers where no `model` is named; `loaded` answers at once; the first
    request for any other loads it; `failed` could not be loaded."""
    reason: str | None = None
    """Why the run could not be loaded, if it failed."""


class RunsResponse(SchemaModel):
    """The finished runs."""

    runs: list[RunSummary]
    """Finished runs, newest first."""


class LoadRequest(SchemaModel):
    """Which run is to answer."""

    model: str = Field(min_length=1, max_length=200)
    """Id of the run that is to answer from now on, one of `GET /runs`; `latest` is what the service was started with,
    as it is now."""


class LoadResponse(SchemaModel):
    """Which run answers now."""

    model: ModelIdentity
    """The transcoder that answers now where no `layer` is named."""
    layers: list[int]
    """Layers of the run that answers now, ascending."""
    previous: str
    """Id of the run that answered before."""
    seconds: float
    """Time that verifying, loading and warming up took."""


class Limits(SchemaModel):
    """What a request may ask for; more is answered with 413."""

    max_body_bytes: int
    """Longest body of a request, in bytes."""
    max_inputs: int
    """Most texts or windows in a request."""
    max_input_tokens: int
    """Most tokens of one text or window, BOS included, and of a matrix to decode: the service's limit or, if that is
    lower, the number of positions of the language model."""
    max_request_tokens: int
    """Most tokens of all texts or windows of a request together."""
    max_json_depth: int
    """Deepest nesting of lists and objects in a body."""
    max_graph_tokens: int
    """Most tokens of the prompt of an attribution graph, and of a text that features are taken out of, BOS included."""
    max_graph_features: int
    """Most features of a graph that get edges of their own."""


class InfoResponse(SchemaModel):
    """What answers, within which limits."""

    model: ModelIdentity
    """The transcoder that answers where neither `model` nor `layer` is named."""
    layers: list[int]
    """Layers of the current run, ascending: each can be asked for as `layer`."""
    created: str
    """When the run was finished, ISO 8601, UTC."""
    fingerprint: str
    """Digest of the run's settings, of those that change its numbers."""
    data: str
    """Name of the text that the run was trained on."""
    input_norm: str
    """How that transcoder scales what it reads."""
    limits: Limits
    """What a request may ask for."""
    notes: bool
    """Whether notes and stars are written, by `PUT /features/{feature}/note`."""
    interventions: bool
    """Whether `POST /graph`, `POST /steer` and `POST /ablate` are answered."""
    versions: dict[str, str]
    """Versions of Python and of the packages that change numbers."""


class Status(SchemaModel):
    """How a process is."""

    status: Literal["ok", "ready"]
    """`ok`: the process lives; `ready`: a token was encoded."""
    detail: str | None = None
    """Why another run answers than the one that the service was told to serve; absent where that one does."""


class ErrorResponse(SchemaModel):
    """The body of every answer with a status of 400 or more."""

    error: str
    """What was wrong, for a person."""
    error_type: str
    """What was wrong, for a program: a fixed word for each kind of error."""
    request_id: str
    """Id of the request, equal to the X-Request-ID header; the service's logs name it."""
    detail: Any = None
    """What was wrong in numbers, such as the limit and the value, or the list of invalid fields."""
