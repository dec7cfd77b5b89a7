"""Files of a trainer whose features are spread over ranks: one of each rank, and the transcoder's own made of them.

A rank's file is in the layout of torch.distributed.checkpoint's safetensors files, which its HuggingFaceStorageReader
reads: each tensor's place in the whole stands in the metadata, under DCP_SHARDING_INFO. Since a rank has a share of
every group of the nested dictionary, each group is a tensor of its own, `transcoder.W_enc/0` of the first. The files
are written here, not by that library's writers: its usual one puts a pickle beside the tensors, and none knows the
digests and the commit of a run's checkpoints.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mtc.transcoder import BY_FEATURE, Shard, TranscoderShape, file_metadata

PLACES = "DCP_SHARDING_INFO"
ROWS = 4096  # copied at a time
BYTES = {"F64": 8, "I64": 8, "F32": 4, "BOOL": 1}
"""Size of a number of each type that a trainer's state has, by safetensors' name."""


def shard_bytes(state: dict[str, Tensor], shard: Shard) -> bytes:
    """A safetensors file of one rank's `Trainer.state_dict`; what all ranks have is in that of rank 0."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    for name, tensor in state.items():
        if _has_features(name, tensor.shape):
            for group, part in enumerate(shard.parts(tensor)):
                tensors[f"{name}/{group}"] = part
                places[f"{name}/{group}"] = {"saved_offsets": [shard.spans[group][0]] + [0] * (part.dim() - 1)}
        elif shard.rank == 0:
            tensors[name], places[name] = tensor, {"saved_offsets": [0] * tensor.dim()}
    return save_safetensors(tensors, {"DCP_VERSION": "1.0", PLACES: json.dumps(places)})


def read_shards(paths: Iterable[str], shard: Shard) -> dict[str, Tensor]:
    """The state of one rank for `Trainer.load_state_dict`, from the files of any number of ranks, in any order, which
    are opened one after another; `Shard(0, 1, group_sizes)` is the state of the whole. Only this rank's rows are read.

    Raises ValueError for a file that is none of these, and if features are missing.
    """
    state: dict[str, Tensor] = {}
    found: Counter[str] = Counter()
    for path in paths:
        for piece in _pieces(path):
            if piece.group is None:
                state[piece.name] = piece.rows[...]
                continue
            if piece.group >= len(shard.group_sizes):
                raise ValueError(f"{path}: {piece.name} has a group {piece.group}, not in {list(shard.group_sizes)}")
            first, end = shard.spans[piece.group]
            low, high = max(first, piece.first), min(end, piece.end)
            if low >= high:
                continue
            rows = piece.rows[low - piece.first : high - piece.first]
            whole = state.setdefault(piece.name, rows.new_empty(shard.starts[-1], *rows.shape[1:]))
            at = shard.starts[piece.group] - first
            whole[at + low : at + high] = rows
            found[piece.name] += high - low
    for name, count in found.items():
        if count != shard.starts[-1]:
            raise ValueError(f"the files have {count} of this rank's {shard.starts[-1]} rows of {name}: are all given?")
    if "step" not in state:
        raise ValueError("rank 0's file, which has what all ranks share, is not among those given")
    return state


def assemble(paths: Iterable[str], shape: TranscoderShape, target: str) -> None:
    """Write the transcoder of all ranks' files as one weights file, for MatryoshkaTranscoder.load. Memory: ROWS rows.

    `shape` is of the whole, `paths` are read twice. Raises ValueError as `read_shards` does.
    """
    paths = list(paths)
    sizes: dict[str, list[int]] = {}
    types: dict[str, str] = {}
    found: Counter[str] = Counter()
    for piece in (piece for path in paths for piece in _pieces(path)):
        if (name := piece.weight) is not None:
            sizes[name] = piece.shape if piece.group is None else [sum(shape.group_sizes), *piece.shape[1:]]
            types[name] = piece.type
            found[name] += sizes[name][0] if piece.group is None and piece.shape else piece.end - piece.first
    missing = {name: count for name, count in found.items() if sizes[name] and count != sizes[name][0]}
    if missing or "b_dec" not in sizes:
        raise ValueError(f"the files have only so many rows of {missing or 'no b_dec'}: are those of all ranks given?")
    header: dict[str, Any] = {"__metadata__": file_metadata(shape)}
    end = 0
    for name in sorted(sizes, key=lambda name: (-BYTES[types[name]], name)):  # aligned, as safetensors wants it
        begin, end = end, end + BYTES[types[name]] * prod(sizes[name])
        header[name] = {"dtype": types[name], "shape": sizes[name], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        data = out.tell()
        for piece in (piece for path in paths for piece in _pieces(path)):
            if piece.weight is not None:
                before = 0 if piece.group is None else sum(shape.group_sizes[: piece.group]) + piece.first
                row = BYTES[piece.type] * prod(piece.shape[1:])
                out.seek(data + header[piece.weight]["data_offsets"][0] + before * row)
                _copy(piece, out)


class _Piece(NamedTuple):
    """A tensor of one rank's file."""

    name: str
    """Its name in the trainer's state."""
    group: int | None
    """The group of the nested dictionary that its rows are of; None for what all ranks have."""
    first: int
    """Where its rows begin in the group."""
    shape: list[int]
    type: str
    """safetensors' name of its numbers' type."""
    rows: Any
    """Reads rows by slices."""

    @property
    def end(self) -> int:
        return self.first + (self.shape[0] if self.shape else 0)

    @property
    def weight(self) -> str | None:
        """Its name in a weights file; None if it is not the transcoder's."""
        return self.name.removeprefix("transcoder.") if self.name.startswith("transcoder.") else None


def _pieces(path: str) -> Iterable[_Piece]:
    try:
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get(PLACES, "null"))
            if places is None:
                raise ValueError(f"{path} is no file of a rank's share of a dictionary: it has no {PLACES}")
            for key in file.keys():  # noqa: SIM118
                name, _, group = key.partition("/")
                rows = file.get_slice(key)
                first = places[key]["saved_offsets"][0] if group else 0
                yield _Piece(name, int(group) if group else None, first, rows.get_shape(), rows.get_dtype(), rows)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None


def _copy(piece: _Piece, out: BinaryIO) -> None:
    blocks = [piece.rows[at : at + ROWS] for at in range(0, piece.shape[0], ROWS)] if piece.shape else [piece.rows[...]]
    for block in blocks:
        out.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)


def _has_features(name: str, shape: torch.Size) -> bool:
    return name.rpartition(".")[2] in BY_FEATURE and len(shape) > 0
