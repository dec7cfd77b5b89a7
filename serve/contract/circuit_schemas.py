"""What the service takes and answers about graphs and interventions, as JSON; results are those of mtc.results."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mtc.results import MOST_VALUE
from serve.contract.schemas import FIRST, WHOLE, FeatureIndex, Layer, Prefix, SchemaModel, Text, TokenIds

MOST_TARGETS, MOST_INTERVENTIONS, MOST_ROWS, MOST_ABLATED = 10, 64, 16, 64
"""As mtc.circuits has them, whose import takes PyTorch along."""
_Token = Annotated[int, Field(ge=0, lt=1 << 31), WHOLE]
_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Model = Annotated[str | None, Field(min_length=1, max_length=200)]


class TargetFeature(SchemaModel):
    """A feature at a token, whose pre-activation is explained."""

    layer: Layer
    """Layer whose transcoder has the feature, from 0."""
    token: _Token
    """Position in the prompt, from 0, BOS included."""
    feature: FeatureIndex
    """Index of the feature in the layer's dictionary."""


class GraphRequest(SchemaModel):
    """A prompt whose next token, or some feature, is explained; exactly one of `prompt` and `input_ids`."""

    prompt: Text | None = None
    """Text whose next token is explained; BOS is added where the tokenizer has one."""
    input_ids: TokenIds | None = None
    """Token ids in the place of `prompt`, read as they are: BOS is not added."""
    model: _Model = None
    """Id of the run whose transcoders are used, one of `GET /runs`, with all of its layers; by default the current
    one."""
    targets: (
        Annotated[list[_Text | _Token | TargetFeature], Field(min_length=1, max_length=MOST_TARGETS), FIRST] | None
    ) = None
    """What is explained: next tokens, as text with its space in front or as token id, which count alike, or features.
    By default the most probable next tokens, which count by their probabilities."""
    prefix: Prefix | None = None
    """Number of features of each layer used, the first ones: one of the nested dictionaries; by default all."""
    max_features: Annotated[int, Field(ge=1, lt=1 << 31), WHOLE] | None = None
    """Most features that get edges of their own, the strongest by influence; by default 4096, or the service's limit if
    that is lower."""
    node_share: float = Field(default=0.8, gt=0, le=1, allow_inf_nan=False)
    """Share of the influence that the nodes hold which pruning leaves."""
    edge_share: float = Field(default=0.98, gt=0, le=1, allow_inf_nan=False)
    """Share of the influence among these that the edges hold which pruning leaves."""
    faithfulness: bool = False
    """Whether the 64 strongest features are taken out of the real model as well, to see how well the graph foretells
    that; for next tokens as targets only."""

    @model_validator(mode="after")
    def _one_prompt(self) -> GraphRequest:
        if (self.prompt is None) == (self.input_ids is None):
            raise ValueError("give either `prompt` or `input_ids`")
        if self.faithfulness and any(isinstance(each, TargetFeature) for each in self.targets or ()):
            raise ValueError("`faithfulness` is measured on next tokens: `targets` must not be features")
        return self


class GraphJob(SchemaModel):
    """How far a graph is that was asked for."""

    id: str
    """Name of the job; who does not know it cannot ask for it."""
    state: Literal["queued", "loading", "running", "done", "failed"]
    """`queued`: others are computed first; `loading`: the run's models are; `running`; `done`: there is a result;
    `failed`: there is none, and `error` says why."""
    run_id: str
    """Id of the run whose transcoders are used."""
    ahead: int
    """Number of jobs that come first."""
    done: int
    """Number of features whose edges are known."""
    of: int | None
    """Number of features whose edges are computed in all; null until it is known."""
    seconds: float
    """Time since the job began to be worked on, or that it took."""
    url: str
    """Address of this answer."""
    result_url: str
    """Address of the graph, once it is done."""
    error: str | None = None
    """What was wrong, for a person, if the job failed."""
    error_type: str | None = None
    """What was wrong, for a program, if the job failed."""


class ChatMessage(SchemaModel):
    """One message of a chat."""

    role: str = Field(min_length=1, max_length=100)
    """Who says it, as the language model's chat template knows it: `user`, `assistant` or `system`."""
    content: str
    """What is said; it cannot spell special tokens."""


class InterventionRequest(SchemaModel):
    """A change of one feature's activation, and through it of what its layer's MLP writes."""

    layer: Layer
    """Layer whose transcoder has the feature, from 0."""
    feature: FeatureIndex
    """Index of the feature in the layer's dictionary."""
    mode: Literal["set", "scale", "add"] = "set"
    """Whether the activation becomes `value`, is multiplied with it, or `value` is added to it."""
    value: float = Field(ge=-MOST_VALUE, le=MOST_VALUE, allow_inf_nan=False)
    """Activation in the transcoder's scaled units, as features have them; a factor for `scale`."""
    positions: Annotated[list[_Token], Field(min_length=1, max_length=4096), FIRST] | None = None
    """Positions where the activation is changed, from 0, those of the prompt first, then those that follow; by default
    all."""


class SteerRequest(SchemaModel):
    """A prompt that is gone on with, with interventions and without; exactly one of `prompt`, `messages` and
    `input_ids`."""

    prompt: Text | None = None
    """Text that is gone on with; BOS is added where the tokenizer has one."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=64), FIRST] | None = None
    """Messages of a chat, of a language model that has a chat template."""
    input_ids: TokenIds | None = None
    """Token ids in the place of `prompt`, read as they are: BOS is not added."""
    model: _Model = None
    """Id of the run whose transcoders are used, one of `GET /runs`; by default the current one."""
    interventions: Annotated[list[InterventionRequest], Field(min_length=1, max_length=MOST_INTERVENTIONS), FIRST]
    """Changes that are made at once, in all passes."""
    max_tokens: Annotated[int, Field(ge=1, le=4096), WHOLE] = 20
    """Most tokens of a continuation."""
    n: Annotated[int, Field(ge=1, le=MOST_ROWS), WHOLE] = 1
    """Number of continuations with the interventions, and as many without; more than 1 take a `temperature` above 0."""
    temperature: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    """What logits are divided by before a token is drawn; 0 takes the most probable one."""
    seed: Annotated[int, Field(ge=0, lt=1 << 53), WHOLE] = 0
    """Start of the random numbers: continuation i is drawn with `seed` + i, the same with interventions and without."""
    attention: Literal["free", "frozen"] = "free"
    """Whether attention reacts to the interventions, or looks where it looks without them."""
    special: bool = False
    """Whether special tokens are changed too, which no transcoder is trained on."""

    @model_validator(mode="after")
    def _one_prompt(self) -> SteerRequest:
        if sum(each is not None for each in (self.prompt, self.messages, self.input_ids)) != 1:
            raise ValueError("give one of `prompt`, `messages` and `input_ids`")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("`n` above 1 takes a `temperature` above 0: without, all are the same")
        return self


class AblateRequest(SchemaModel):
    """A text that features of one layer are taken out of; exactly one of `prompt` and `input_ids`."""

    prompt: Text | None = None
    """The text; BOS is added where the tokenizer has one."""
    input_ids: TokenIds | None = None
    """Token ids in the place of `prompt`, read as they are: BOS is not added."""
    model: _Model = None
    """Id of the run whose transcoders are used, one of `GET /runs`; by default the current one."""
    layer: Layer
    """Layer whose transcoder has the features, from 0."""
    features: Annotated[list[FeatureIndex], Field(min_length=1, max_length=MOST_ABLATED), FIRST]
    """Indices of the features that are taken out, all at once."""

    @model_validator(mode="after")
    def _one_prompt(self) -> AblateRequest:
        if (self.prompt is None) == (self.input_ids is None):
            raise ValueError("give either `prompt` or `input_ids`")
        return self
