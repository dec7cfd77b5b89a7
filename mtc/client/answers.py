"""What the clients return: the same objects from every format, with numpy arrays, bit for bit what the model gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import msgpack
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors

JSON, NDJSON = "application/json", "application/x-ndjson"
MSGPACK, SAFETENSORS = "application/vnd.msgpack", "application/vnd.safetensors"
MEDIA_TYPES = {"json": JSON, "msgpack": MSGPACK, "safetensors": SAFETENSORS}


class Model(NamedTuple):
    """The transcoder that answered, and what it stands for."""

    run_id: str
    sha256: str
    """Digest of the transcoder's weights file, hexadecimal."""
    base_model: str
    layer: int
    source: str
    """Site that the transcoder reads."""
    target: str
    """Site that the transcoder reconstructs."""
    d_source: int
    d_target: int
    num_features: int
    k: int
    """Active features per token on average, as trained."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries in features, ascending."""


class Usage(NamedTuple):
    inputs: int
    tokens: int
    """Tokens that the request took, BOS included."""


class TokenisedInput(NamedTuple):
    """One input as the model reads it."""

    tokens: tuple[str, ...]
    """Texts of the input's tokens: joined, those that are not special are the text. A character of several tokens is
    shown at its last."""
    token_ids: NDArray[np.int32]
    """[tokens] int32, ids of the input's tokens."""
    offsets: NDArray[np.int32] | None
    """[tokens, 2] first and one-past-last character of the text; None for an input of ids."""
    is_special: NDArray[np.bool_]
    """[tokens] bool: BOS or another token that stands for no text; has no features."""
    truncated: bool
    """Whether the input was cut."""


class SparseRows(Protocol):
    """Rows of features, as a sparse matrix (CSR)."""

    @property
    def indptr(self) -> NDArray[np.int64]: ...
    @property
    def indices(self) -> NDArray[np.int32]: ...
    @property
    def values(self) -> NDArray[np.float32]: ...


class EncodedInput(NamedTuple):
    """One input and its tokens' features: token t has the entries from indptr[t] to indptr[t + 1]."""

    tokens: tuple[str, ...]
    """Texts of the input's tokens: joined, those that are not special are the text. A character of several tokens is
    shown at its last."""
    token_ids: NDArray[np.int32]
    """[tokens] int32, ids of the input's tokens."""
    offsets: NDArray[np.int32] | None
    """[tokens, 2] first and one-past-last character of the text; None for an input of ids."""
    is_special: NDArray[np.bool_]
    """[tokens] bool: BOS or another token that stands for no text; has no features."""
    truncated: bool
    """Whether the input was cut."""
    indptr: NDArray[np.int64]
    """[tokens + 1] int64: token t has the entries from indptr[t] to indptr[t + 1]."""
    indices: NDArray[np.int32]
    """[entries] int32, indices of the active features, ascending for each token."""
    values: NDArray[np.float32]
    """[entries] float32, activations of the features in `indices`, above 0."""
    l0: NDArray[np.int32] | None
    """[tokens] int32, number of active features of each token; None if it was not asked for."""
    relative_error: NDArray[np.float32] | None
    """[tokens] float32, squared error of each token over its squared deviation from the decoder's bias, NaN for special
    tokens; None if it was not asked for."""
    labels: dict[int, str | None] | None = None
    """Labels of the features in `indices`, by index, None of a feature without; None if they were not asked for. Of an
    answer as safetensors those of all inputs' features."""

    def top(self, token: int, k: int = 16) -> list[tuple[int, float]]:
        """A token's `k` strongest features and their activations, equal ones by index."""
        start, end = self.indptr[:-1][token], self.indptr[1:][token]
        order = np.argsort(-self.values[start:end], kind="stable")[:k]
        return list(zip(self.indices[start:end][order].tolist(), self.values[start:end][order].tolist(), strict=True))

    def dense(self, num_features: int) -> NDArray[np.float32]:
        """[tokens, num_features] activations, zero where nothing was returned. Raises IndexError if there are more
        features."""
        found = np.zeros((len(self.tokens), num_features), np.float32)
        found[np.repeat(np.arange(len(self.tokens)), np.diff(self.indptr)), self.indices] = self.values
        return found


class Encoding(NamedTuple):
    """The answer to `encode`."""

    model: Model
    prefix: int
    """Size in features of the nested dictionary that encoded."""
    inputs: tuple[EncodedInput, ...]
    usage: Usage
    request_id: str


class Tokenisation(NamedTuple):
    """The answer to `tokenize`."""

    model: Model
    inputs: tuple[TokenisedInput, ...]
    usage: Usage
    request_id: str


class Decoding(NamedTuple):
    """The answer to `decode`."""

    model: Model
    prefix: int
    """Size in features of the nested dictionary that decoded."""
    reconstruction: NDArray[np.float32]
    """[tokens, d_target] float32, reconstruction of the target site, in raw units."""
    usage: Usage
    request_id: str


def model_of(found: dict[str, Any]) -> Model:
    """The Model that an answer names; fields that a newer service adds are left out."""
    known = {name: found[name] for name in Model._fields}
    return Model(**known | {"prefixes": tuple(found["prefixes"])})


def read_encoding(media_type: str, content: bytes) -> Encoding:
    """An answer to `POST /encode` in CSR form. Raises KeyError, TypeError or ValueError if it is none."""
    if media_type == SAFETENSORS:
        return _encoding_of_tensors(content)
    found = _unpacked(media_type, content)
    inputs = tuple(encoded_input(result) for result in found["results"])
    return Encoding(model_of(found["model"]), found["prefix"], inputs, Usage(**found["usage"]), found["request_id"])


def read_tokenisation(media_type: str, content: bytes) -> Tokenisation:
    """An answer to `POST /tokenize`; raises as `read_encoding`."""
    found = _unpacked(media_type, content)
    inputs = tuple(tokenised_input(result) for result in found["results"])
    return Tokenisation(model_of(found["model"]), inputs, Usage(**found["usage"]), found["request_id"])


def read_decoding(media_type: str, content: bytes) -> Decoding:
    """An answer to `POST /decode`; raises as `read_encoding`."""
    if media_type == SAFETENSORS:
        about = _metadata(content)
        model = model_of(json.loads(about["model"]))
        values = load_tensors(content)[model.target]
        usage = Usage(**json.loads(about["usage"]))
        return Decoding(model, int(about["prefix"]), values, usage, about["request_id"])
    found = _unpacked(media_type, content)
    model, usage = model_of(found["model"]), Usage(**found["usage"])
    reconstruction = _array(found["reconstruction"], np.float32).reshape(-1, model.d_target)
    return Decoding(model, found["prefix"], reconstruction, usage, found["request_id"])


def encoded_input(result: dict[str, Any]) -> EncodedInput:
    """One input's result in CSR form, from JSON, NDJSON or msgpack."""
    csr, l0, relative_error, labels = (result.get(name) for name in ("csr", "l0", "relative_error", "labels"))
    assert csr is not None
    return EncodedInput(
        **tokenised_input(result)._asdict(),
        indptr=_array(csr["indptr"], np.int64),
        indices=_array(csr["indices"], np.int32),
        values=_array(csr["values"], np.float32),
        l0=None if l0 is None else np.array(l0, np.int32),
        relative_error=None if relative_error is None else np.array(relative_error, np.float32),  # None becomes NaN
        labels=None if labels is None else _labels(labels),
    )


def tokenised_input(result: dict[str, Any]) -> TokenisedInput:
    offsets = result["offsets"]
    return TokenisedInput(
        tuple(result["tokens"]),
        np.array(result["token_ids"], np.int32),
        None if offsets is None else np.array(offsets, np.int32).reshape(-1, 2),
        np.array(result["is_special"], np.bool_),
        result["truncated"],
    )


def csr_of(rows: SparseRows) -> dict[str, Sequence[float]]:
    """Rows of features as `POST /decode` takes them; numbers are the float32s'."""
    parts = (("indptr", rows.indptr), ("indices", rows.indices), ("values", np.asarray(rows.values, np.float32)))
    return {name: np.asarray(part).tolist() for name, part in parts}


def _encoding_of_tensors(content: bytes) -> Encoding:
    about, tensors = _metadata(content), load_tensors(content)
    tokens, truncated = json.loads(about["tokens"]), json.loads(about["truncated"])
    indptr, bounds = tensors["indptr"], pairwise(tensors["input_offsets"].tolist())
    labels = _labels(json.loads(about["labels"])) if "labels" in about else None
    inputs = []
    for (start, end), cut in zip(bounds, truncated, strict=True):
        first, last = indptr[start], indptr[end]
        offsets, l0, relative_error = (tensors.get(name) for name in ("offsets", "l0", "relative_error"))
        inputs.append(
            EncodedInput(
                tuple(tokens[start:end]), tensors["token_ids"][start:end],
                None if offsets is None else offsets[start:end], tensors["is_special"][start:end].astype(np.bool_), cut,
                indptr[start : end + 1] - first, tensors["indices"][first:last], tensors["values"][first:last],
                None if l0 is None else l0[start:end], None if relative_error is None else relative_error[start:end],
                labels,
            )
        )  # fmt: skip
    usage = Usage(**json.loads(about["usage"]))
    return Encoding(model_of(json.loads(about["model"])), int(about["prefix"]), tuple(inputs), usage,
                    about["request_id"])  # fmt: skip


def _labels(found: dict[str, str | None]) -> dict[int, str | None]:
    return {int(index): label for index, label in found.items()}


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return found


def _unpacked(media_type: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(content) if media_type == MSGPACK else json.loads(content)
    return found


def _array(found: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """An array from a list of numbers, or from msgpack's {"dtype", "shape", "data"}."""
    if isinstance(found, dict):
        little = np.dtype(found["dtype"]).newbyteorder("<")
        found = np.frombuffer(found["data"], little).reshape(found["shape"])
    return np.array(found, dtype)
