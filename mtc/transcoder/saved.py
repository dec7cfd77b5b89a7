"""The transcoder of a finished run, read from its directory wherever that lies."""

from __future__ import annotations

import tempfile

import torch

from mtc.storage import RunDirectory
from mtc.transcoder.transcoder import MatryoshkaTranscoder


def load_transcoder(
    run: RunDirectory, device: str | torch.device = "cpu", prefix: int | None = None
) -> MatryoshkaTranscoder:
    """The run's transcoder, through a temporary local file where the run is remote; with `prefix` only the nested
    dictionary of the first so many features."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(run.read("transcoder.safetensors"))
        file.flush()
        return MatryoshkaTranscoder.load(file.name, device, prefix)
