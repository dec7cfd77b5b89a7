"""The documents of a data source, files and data sets of the hub, read and checked.

A source is split into pieces, each a file or a shard, which can be read apart from each other. A piece gives its
documents in their order, and among them what cannot be used, with its place and the reason: whoever reads all pieces
counts that and decides whether to go on (cluster.tokenise does both). An error is raised only for a source that is
wrong as a whole (DataError) or cannot be reached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from mtc.config import DataConfig
from mtc.storage import missing, require_on_hub
from mtc.text.files import Document, file_documents, is_damage, no_column, too_long, unusable, value_document
from mtc.text.sources import DataError, DataUnreachableError, is_hub_dataset, source_files

HUB_TIMEOUT_S = 10.0


def check_hub(data: DataConfig) -> None:
    """Ask the hub for the data set with a short limit, because opening one without a network retries for minutes.

    Raises DataError if there is none, DataUnreachableError if the hub does not answer.
    """
    require_on_hub("data.name", data.name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(data.name, timeout=HUB_TIMEOUT_S)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise DataError(
            f"data.name={data.name!r} is no file or directory here, and the hub has no such data set for you: "
            f"check the name, and HF_TOKEN if it is private or gated ({type(error).__name__})"
        ) from error
    except Exception as error:  # the HTTP client's errors differ between versions of the hub library
        raise DataUnreachableError(
            f"data.name={data.name!r} is no file or directory here, and the hub cannot be reached: "
            f"check the network and HF_TOKEN ({type(error).__name__}: {error})"
        ) from error


class Piece(NamedTuple):
    """What one read task reads: a file, or one of `total` shards of a hub data set."""

    url: str
    shard: int
    total: int


def source_pieces(data: DataConfig) -> list[Piece]:
    """The pieces of the whole source, in an order shuffled by `data.seed`."""
    if is_hub_dataset(data):
        total = _open_hub(data).num_shards
        pieces = [Piece("", shard, total) for shard in range(total)]
    else:
        pieces = [Piece(file.url, 0, 1) for file in source_files(data)]
    return [pieces[i] for i in np.random.default_rng(data.seed).permutation(len(pieces))]


def read_piece(piece: Piece, data: DataConfig) -> Iterator[Document]:
    """The documents of a piece, without empty ones; each that cannot be used is there with the reason.

    What is damaged costs as little as its format allows: a line, a value or a row group; the rest of the file is read.
    Raises DataError if a whole file or hub data set has no column of text, or if a file is not there or forbidden. That
    storage cannot be reached is no damage: its error is raised.
    """
    for document in _file(piece.url, data) if piece.url else _hub_documents(piece, data):
        name, text = _utf8(document.name), document.text
        if text is None:
            yield document._replace(name=name)
        elif len(text) > data.max_document_chars:
            yield too_long(name, data)
        elif text:
            yield document._replace(name=name, text=_utf8(text))


def _file(url: str, data: DataConfig) -> Iterator[Document]:
    if os.path.islink(url) and not os.path.exists(url):
        yield unusable(url, "broken link", f"to {os.readlink(url)}")
        return
    try:
        yield from file_documents(url, data)
    except FileNotFoundError:
        raise DataError(f"data.name: {missing(url)}; local files must be on every node") from None
    except PermissionError as error:
        raise DataError(f"data.name: {url} may not be read: {error}") from None


def _open_hub(data: DataConfig) -> Any:
    """The hub data set as a stream (datasets.IterableDataset)."""
    from datasets import load_dataset

    if is_hub_dataset(data):
        require_on_hub("data.name", data.name)
    try:
        return load_dataset(data.name, data.subset, split=data.split, streaming=True)
    except (OSError, ValueError) as error:  # not there, not reachable, or no such subset or split
        raise DataError(
            f"data.name={data.name!r}, data.subset={data.subset!r}, data.split={data.split!r}: {error}"
        ) from error


def _hub_documents(piece: Piece, data: DataConfig) -> Iterator[Document]:
    """The documents of a shard of a hub data set. The hub's reader cannot go on after damage, so the rest of that shard
    is lost; it counts as one document."""
    where = f"{data.name} (shard {piece.shard})"
    rows = iter(_open_hub(data).shard(piece.total, piece.shard))
    for number in count():
        name = f"{where}, row {number}"
        try:
            row = next(rows, None)
        except Exception as error:
            if not (is_damage(error) or isinstance(error, ValueError)):  # ValueError: text that cannot be parsed
                raise
            yield unusable(name, "corrupt shard", error)
            return
        if row is None:
            return
        if data.text_field not in row:
            raise DataError(f"{where} has {no_column(data, row)}")
        yield value_document(name, row[data.text_field], data)


def _utf8(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold: JSON can spell half of a surrogate pair, and Python spells odd
    bytes of file names so."""
    return text.encode("utf-8", "replace").decode()
