"""Vectors of a run's labels, embeddings.safetensors: what is near in meaning to what.

features  int32 [rows]          which feature each row is of
digests   uint8 [rows, 16]      of which label: a label that has changed has no vector
vectors   float16 [rows, dimensions], of length 1
metadata  format_version, model: who made them
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from mtc.storage.runs import RunError

EMBEDDINGS = "embeddings.safetensors"
VERSION = "1"
DIGEST_BYTES = 16


class Embeddings(NamedTuple):
    """Vectors of labels."""

    model: str
    """Name of the model that made them, as its endpoint calls it."""
    features: NDArray[np.int32]
    """[rows], the feature that each is of."""
    digests: NDArray[np.uint8]
    """[rows, 16], `label_digest` of its label."""
    vectors: NDArray[np.float16]
    """[rows, dimensions], of length 1."""


def label_digest(label: str) -> bytes:
    """What tells a label from others, 16 bytes."""
    return hashlib.sha256(label.encode()).digest()[:DIGEST_BYTES]


def embeddings_to_bytes(found: Embeddings) -> bytes:
    """The file of these vectors."""
    tensors = {"features": found.features, "digests": found.digests, "vectors": found.vectors}
    about = {"format_version": VERSION, "model": found.model}
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, about)


def parse_embeddings(data: bytes, name: str) -> Embeddings:
    """The vectors of a file that the run `name` has, as views of it: it may have hundreds of megabytes. Raises RunError
    for what is none, or of another version."""
    try:
        size = int.from_bytes(data[:8], "little")
        header, content = json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :]
        about = header["__metadata__"]
        kinds = {"features": ("I32", np.int32), "digests": ("U8", np.uint8), "vectors": ("F16", np.float16)}
        found = Embeddings(about["model"], *(_view(content, header[n], *kind) for n, kind in kinds.items()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{name}/{EMBEDDINGS} holds no vectors of labels: {error!r}") from None
    rows = len(found.features)
    fits = found.vectors.ndim == 2 and len(found.vectors) == rows and found.digests.shape == (rows, DIGEST_BYTES)
    if about.get("format_version") != VERSION or not fits:
        raise RunError(f"{name}/{EMBEDDINGS} is of an unknown format; this version reads format_version {VERSION}")
    return found


def _view(content: memoryview, entry: dict[str, Any], name: str, kind: type) -> NDArray[Any]:
    """A tensor of a safetensors file, read-only, without a copy; `safetensors.numpy.load` makes one."""
    start, end = entry["data_offsets"]
    if entry["dtype"] != name or not 0 <= start <= end:
        raise ValueError(f"{entry['dtype']} at {start} to {end}")
    return np.frombuffer(content[start:end], kind).reshape(entry["shape"])
