"""What passes between the parts of the service; plain arrays, so that messages between processes are small."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mtc.errors import MtcError
from serve.contract.errors import ServiceError


class RunKey(NamedTuple):
    """One state of one run. Every request is answered by exactly one."""

    run_id: str
    """Name of the run."""
    url: str
    """Its directory."""
    sha256: str
    """Digest of its weights file, or of those of all its layers."""
    created: str = ""
    """When it was published, ISO 8601: a run that is published anew, such as after another analysis, is another key."""


class Problem(NamedTuple):
    """Why a run can't be served."""

    text: str
    """In full, for operators and the log."""
    shown: str
    """For all who may ask: of an error that is not the service's own only its kind, for its words may name anything."""

    @classmethod
    def of(cls, error: BaseException) -> Self:
        if isinstance(error, MtcError | ServiceError):
            return cls(str(error), str(error))
        return cls(f"{type(error).__name__}: {error}", type(error).__name__)


NO_REPLICA = Problem(*["no replica is there"] * 2)
"""What says nothing of a run: none of the deployment's replicas could load it."""


class State(NamedTuple):
    """Which runs answer."""

    deployment: str
    """The deployment of the service that decided it, see `serve.app.build`: for another one it holds nothing."""
    version: int
    """Grows with every change within the deployment."""
    current: RunKey
    """Answers where no run is named."""
    loaded: tuple[RunKey, ...]
    """In memory, the current one among them, the last that was loaded first."""
    seen: RunKey
    """What `Settings.run` named when that last could be served: once it names another run, that one takes over."""
    problem: str | None = None
    """Why what `Settings.run` names can't be served, so that another run answers in its place; None if it can."""


class Options(NamedTuple):
    """What is wanted of the features of a request's tokens; see `serve.contract.EncodeRequest`."""

    prefix: int | None = None
    top_k: int | None = None
    features: tuple[int, ...] | None = None
    min_activation: float = 0.0
    by_index: bool = False
    """Features of a token ascending by index; otherwise strongest first, equal ones by index."""
    l0: bool = False
    relative_error: bool = False
    layer: int | None = None
    """Number of the layer whose features are wanted; by default the run's lowest."""


class Encoded(NamedTuple):
    """Sparse activations of one input's tokens."""

    indptr: NDArray[np.int64]
    """[tokens + 1]: where each token's entries start, and the end."""
    indices: NDArray[np.int32]
    """[entries] features, in the order that the options ask for."""
    values: NDArray[np.float32]
    """[entries] activations, above 0."""
    l0: NDArray[np.int32] | None = None
    """[tokens] active features."""
    relative_error: NDArray[np.float32] | None = None
    """[tokens], NaN for special tokens."""


class Tokenised(NamedTuple):
    """One input as the model reads it."""

    ids: NDArray[np.int32]
    """[tokens]."""
    offsets: NDArray[np.int32] | None
    """[tokens, 2] characters of the text; None for an input of ids."""
    special: NDArray[np.bool_]
    """[tokens]: stands for no text."""
    truncated: bool
    """Whether the input was cut."""
