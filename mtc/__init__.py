"""Matryoshka transcoders in plain PyTorch: configuration, capture, training, evaluation, analysis, report.

A notebook finds what it wants here; each name is loaded when it is first used. Nothing in this package imports Ray;
`cluster/` runs these parts on a cluster.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtc.config import RunConfig, load_preset
    from mtc.language_model import LanguageModel
    from mtc.storage import load_analysis, open_run
    from mtc.training import Trainer
    from mtc.transcoder import MatryoshkaTranscoder, load_transcoder

__all__ = [
    "LanguageModel",
    "MatryoshkaTranscoder",
    "RunConfig",
    "Trainer",
    "load_analysis",
    "load_preset",
    "load_transcoder",
    "open_run",
]

_PACKAGES = {
    "RunConfig": "config",
    "load_preset": "config",
    "LanguageModel": "language_model",
    "load_analysis": "storage",
    "open_run": "storage",
    "Trainer": "training",
    "MatryoshkaTranscoder": "transcoder",
    "load_transcoder": "transcoder",
}


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mtc.{_PACKAGES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
