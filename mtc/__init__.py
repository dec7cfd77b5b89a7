"""Matryoshka transcoders in plain PyTorch: configuration, capture, training, evaluation, analysis, report.

A notebook finds what it wants here; each name is loaded when it is first used. Nothing in this package imports Ray;
`cluster/` runs these parts on a cluster.
"""

from typing import TYPE_CHECKING

from mtc.lazy import lazily

if TYPE_CHECKING:
    from mtc.circuits import Intervention, ReplacementModel, attribute, coarsen, steer
    from mtc.config import RunConfig, load_preset
    from mtc.language_model import LanguageModel
    from mtc.storage import load_analysis, open_run
    from mtc.training import Trainer
    from mtc.transcoder import MatryoshkaTranscoder, load_transcoder

__all__ = [
    "Intervention",
    "LanguageModel",
    "MatryoshkaTranscoder",
    "ReplacementModel",
    "RunConfig",
    "Trainer",
    "attribute",
    "coarsen",
    "load_analysis",
    "load_preset",
    "load_transcoder",
    "open_run",
    "steer",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Intervention": "circuits",
        "ReplacementModel": "circuits",
        "attribute": "circuits",
        "coarsen": "circuits",
        "steer": "circuits",
        "RunConfig": "config",
        "load_preset": "config",
        "LanguageModel": "language_model",
        "load_analysis": "storage",
        "open_run": "storage",
        "Trainer": "training",
        "MatryoshkaTranscoder": "transcoder",
        "load_transcoder": "transcoder",
    },
)
