"""Matryoshka transcoders in plain PyTorch: configuration, capture, training, evaluation, analysis, report.

A notebook finds what it wants here; each name is loaded when it is first used. Nothing in this package imports Ray;
`cluster/` runs these parts on a cluster.
"""

from typing import TYPE_CHECKING

from mtc.lazy import lazily

if TYPE_CHECKING:
    from mtc.analysis import analyse_in_memory
    from mtc.circuits import Intervention, ReplacementModel, ablate, attribute, coarsen, steer
    from mtc.config import RunConfig, load_preset
    from mtc.language_model import LanguageModel
    from mtc.storage import RunDirectory, load_analysis, open_run
    from mtc.text import read_windows
    from mtc.training import Trainer, train_in_memory
    from mtc.transcoder import MatryoshkaTranscoder, load_transcoder

__all__ = [
    "Intervention",
    "LanguageModel",
    "MatryoshkaTranscoder",
    "ReplacementModel",
    "RunConfig",
    "RunDirectory",
    "Trainer",
    "ablate",
    "analyse_in_memory",
    "attribute",
    "coarsen",
    "load_analysis",
    "load_preset",
    "load_transcoder",
    "open_run",
    "read_windows",
    "steer",
    "train_in_memory",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "analyse_in_memory": "analysis",
        "Intervention": "circuits",
        "ReplacementModel": "circuits",
        "ablate": "circuits",
        "attribute": "circuits",
        "coarsen": "circuits",
        "steer": "circuits",
        "RunConfig": "config",
        "load_preset": "config",
        "LanguageModel": "language_model",
        "RunDirectory": "storage",
        "load_analysis": "storage",
        "open_run": "storage",
        "read_windows": "text",
        "Trainer": "training",
        "train_in_memory": "training",
        "MatryoshkaTranscoder": "transcoder",
        "load_transcoder": "transcoder",
    },
)
