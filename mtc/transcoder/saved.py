"""The transcoder of a finished run, read from its directory wherever that lies."""

from __future__ import annotations

import posixpath
import tempfile

import torch
from fsspec.implementations.local import LocalFileSystem

from mtc.storage import RunDirectory
from mtc.transcoder.transcoder import MatryoshkaTranscoder


def load_transcoder(
    run: RunDirectory, device: str | torch.device = "cpu", prefix: int | None = None
) -> MatryoshkaTranscoder:
    """The run's transcoder, through a temporary local file where the run is remote; with `prefix` only the nested
    dictionary of the first so many features."""
    name = "transcoder.safetensors"
    if isinstance(run.fs, LocalFileSystem) and run.exists(name):  # no more is read than is wanted
        return MatryoshkaTranscoder.load(posixpath.join(run.path, name), device, prefix)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(run.read(name))
        file.flush()
        return MatryoshkaTranscoder.load(file.name, device, prefix)
