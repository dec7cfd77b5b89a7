"""What the service takes and answers, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class EncodeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    inputs: str | list[str]
    """One text or several."""
    top_k: int = Field(default=16, ge=1, le=1024)
    """Strongest active features returned for each token; at most the dictionary's size."""
    prefix: int | None = None
    """Use only the first `prefix` features, one of the nested dictionaries; by default all."""

    @property
    def texts(self) -> list[str]:
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class FeatureActivation(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    feature_index: int
    """Row of the transcoder's encoder."""
    activation_value: float
    """The float32 activation, not rounded."""


class TokenFeatures(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    token_id: int
    """Id in the model's vocabulary."""
    token: str
    """The id decoded on its own."""
    is_special: bool
    """BOS or another token that stands for no text; such tokens were never trained on and have no features."""
    features: list[FeatureActivation]
    """Active features, strongest first, equal ones by index."""


class TextResult(BaseModel):
    tokens: list[TokenFeatures]


class EncodeResponse(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    run_id: str
    """The run whose transcoder answered."""
    layer: int
    """Layer of the language model that is read."""
    source: str
    """Site that the transcoder reads."""
    target: str
    """Site that it reconstructs."""
    num_features: int
    """Size of the whole dictionary."""
    k: int
    """Active features per token on average, as trained."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    prefix: int
    """The nested dictionary used."""
    results: list[TextResult]
    """One for each input, in the order of the request."""


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or more."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    error: str
    """What was wrong, for a person."""
    error_type: str
    """What was wrong, for a program: a fixed word for each kind of error."""
    request_id: str
    """Equal to the X-Request-ID header; the service's logs name it."""
    detail: Any = None
    """More for a program, such as the limit and the value, or the list of invalid fields."""
