"""What training comes to: its results, the check of its ledger, and the ways in which it ends early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtc.errors import MtcError, known_cause
from mtc.storage import RunError

if TYPE_CHECKING:
    from mtc.results import StreamTiming
    from mtc.storage import Progress

ANSWER_SECONDS = 120.0
"""Longest wait for an answer of the MetricsLog actor, which may have to start again first."""


class TrainResult(NamedTuple):
    """What the trainers report at the end about one transcoder."""

    member: str
    """Name of the transcoder among the run's."""
    layer: int
    """Layer of the language model whose MLP is imitated, from 0."""
    steps: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on, repeats included."""
    threshold: float
    """Inference threshold; the median where every feature has one of its own."""
    calibration_tokens: int
    """Fresh tokens that the threshold was calibrated on."""
    precision: str
    """Arithmetic of the transcoder's products."""
    compute: str = ""
    """How the training loss was computed, and how long the alternatives took."""
    skipped_steps: int = 0
    """Steps without a finite gradient, which changed no weights."""


class Trained(NamedTuple):
    """What training leaves beside the weights, of all transcoders."""

    members: tuple[TrainResult, ...]
    """Result of each of the run's transcoders, in order."""
    timing: StreamTiming
    """Where the time of training went: what waited on what."""
    progress: Progress
    """What was trained of each work unit."""


class TrainingStopped(MtcError):
    """The run cannot go on, and starting it again would not help; the message says why."""

    event = "stopped"


def permanent_cause(error: BaseException) -> MtcError | None:
    """The error that `error` comes from, if it would come again in trainers that are started again; else None.

    What is wrong with the files of a run (RunError) may not be when they are read again: other nodes write them.
    """
    known = known_cause(error)
    return known if known and known.permanent and not isinstance(known, RunError) else None


def check_ledger(progress: Progress, units: int) -> None:
    """Raises TrainingStopped unless every token of the training units 0 to `units` - 1 was trained exactly as often as
    the ledger says that it should be."""
    wrong = progress.wrong_units().tolist()
    missing = np.setdiff1d(np.arange(units), progress.finished(), assume_unique=True).tolist()
    if wrong or missing:
        raise TrainingStopped(
            f"the ledger of trained tokens is wrong, and so may be the transcoder: of {units} work units "
            f"{len(missing)} are not finished ({missing[:5]}...) and {len(wrong)} have tokens too often "
            f"({wrong[:5]}...)"
        )


def post_event(log: Any, kind: str, message: str, step: int | None = None) -> Any:
    return log.event.remote(kind, message, step)


def weights_file(kind: str, member: str) -> str:
    """Name of a transcoder's file in a checkpoint, such as `trainer-layer9.safetensors`."""
    return f"{kind}-{member}.safetensors"
