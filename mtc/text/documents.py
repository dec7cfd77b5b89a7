"""The documents of a data source: text files, JSON lines, Parquet and data sets of the hub, read and checked.

A source is split into pieces, each a file or a shard, which can be read apart from each other. A piece gives its
documents in their order, and among them what cannot be used, with its place and the reason: whoever reads all pieces
counts that and decides whether to go on (cluster.tokenise does both). An error is raised only for a source that is
wrong as a whole (DataError) or cannot be reached.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import fsspec
import numpy as np

from mtc.config import DataConfig
from mtc.text.sources import DataError, is_hub_dataset, source_files

UTF8_BYTES, JSON_BYTES = 4, 12
"""Most bytes that a character takes in a text file, and in JSON, which may spell it as two escapes of six bytes."""
FIELDS_BYTES = 4 * 2**20
"""Bytes allowed to a line of JSON beside its text."""
DETAIL_CHARS = 200
"""Most characters that are kept of a library's error message, which may quote the document."""
HUB_TIMEOUT_S = 10.0


def check_hub(data: DataConfig) -> None:
    """Ask the hub for the data set with a short limit, because opening one without a network retries for minutes."""
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
        raise DataError(
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


class Document(NamedTuple):
    """A document, or what takes the place of one that cannot be used."""

    name: str
    """Where the document is: file, URL or data set, and in it the line (from 1), the row, row group or shard (from
    0)."""
    text: str | None
    """Text of the document; None if it cannot be used."""
    reason: str = ""
    """Why the document cannot be used, in words that are the same for all documents of that kind; empty if it can."""
    detail: str = ""
    """Why exactly the document cannot be used; empty if it can."""
    documents: int = 1
    """How many documents this is: a damaged row group loses its rows."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.name}" + (f" ({self.detail})" if self.detail else "")


def read_piece(piece: Piece, data: DataConfig) -> Iterator[Document]:
    """The documents of a piece, without empty ones; each that cannot be used is there with the reason.

    What is damaged costs as little as its format allows: a line, a value or a row group; the rest of the file is read.
    Raises DataError if a whole file or hub data set has no column of text. A file that cannot be reached is no damage:
    its OSError is raised.
    """
    if not piece.url:
        found = _hub_documents(piece, data)
    elif piece.url.endswith(".txt"):
        found = _text_file(piece.url, data)
    elif piece.url.endswith(".jsonl"):
        found = _json_lines(piece.url, data)
    else:
        found = _parquet_rows(piece.url, data)
    for document in found:
        name, text = _utf8(document.name), document.text
        if text is None:
            yield document._replace(name=name)
        elif len(text) > data.max_document_chars:
            yield _too_long(name, data)
        elif text:
            yield document._replace(name=name, text=_utf8(text))


def unusable(name: str, reason: str, detail: object = "") -> Document:
    return Document(name, None, reason, str(detail)[:DETAIL_CHARS])


def _open_hub(data: DataConfig) -> Any:
    """The hub data set as a stream (datasets.IterableDataset)."""
    from datasets import load_dataset

    try:
        return load_dataset(data.name, data.subset, split=data.split, streaming=True)
    except (OSError, ValueError) as error:  # not there, not reachable, or no such subset or split
        raise DataError(
            f"data.name={data.name!r}, data.subset={data.subset!r}, data.split={data.split!r}: {error}"
        ) from error


def _text_file(url: str, data: DataConfig) -> Iterator[Document]:
    limit = UTF8_BYTES * data.max_document_chars + len(codecs.BOM_UTF8)
    with fsspec.open(url, "rb") as raw:
        content = io.BufferedReader(raw).read(limit + 1)  # no more than that, however large the file is
    if len(content) > limit:
        yield _too_long(url, data)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield unusable(url, "not UTF-8", error)
    else:
        yield Document(url, text) if text else unusable(url, "empty file")


def _json_lines(url: str, data: DataConfig) -> Iterator[Document]:
    """The documents of a file of JSON lines, read as bytes, so that a line which is not UTF-8, or does not fit in
    memory, is skipped alone."""
    limit = JSON_BYTES * data.max_document_chars + FIELDS_BYTES
    blank = True
    with fsspec.open(url, "rb") as raw:
        file = io.BufferedReader(raw)
        for number in count(1):
            line = file.readline(limit + 1)
            if not line:
                break
            name = f"{url}, line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > limit:
                while line and not line.endswith(b"\n"):
                    line = file.readline(limit)
                blank = False
                yield _too_long(name, data)
            elif line.strip():
                blank = False
                yield _json_document(name, line, data)
    if blank:
        yield unusable(url, "empty file")


def _json_document(name: str, line: bytes, data: DataConfig) -> Document:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return unusable(name, "not UTF-8", error)
    except (ValueError, RecursionError) as error:  # the latter from thousands of brackets
        return unusable(name, "broken JSON", error)
    if not isinstance(row, dict):
        return unusable(name, "broken JSON", f"{type(row).__name__}, not an object")
    if data.text_field not in row:
        return unusable(name, "no text field", _no_column(data, row))
    return _value(name, row[data.text_field], data)


def _parquet_rows(url: str, data: DataConfig) -> Iterator[Document]:
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        if not file.read(1):
            yield unusable(url, "empty file")
            return
        file.seek(0)
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            names = parquet.schema_arrow.names
        except Exception as error:
            if not _is_damage(error):
                raise
            yield unusable(url, "corrupt Parquet", error)
            return
        if data.text_field not in names:
            raise DataError(f"{url} has {_no_column(data, names)}")
        first = 0  # row of the file
        for group in range(parquet.num_row_groups):
            rows, read = parquet.metadata.row_group(group).num_rows, 0
            batches = parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[data.text_field])
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:
                    if not _is_damage(error):
                        raise
                    lost = max(rows - read, 1)
                    yield unusable(f"{url}, row group {group}", "corrupt Parquet", error)._replace(documents=lost)
                    break
                if batch is None:
                    break
                for row, scalar in enumerate(batch.column(0), start=first + read):
                    yield _scalar(f"{url}, row {row}", scalar, data)
                read += batch.num_rows
            first += rows


def _scalar(name: str, scalar: Any, data: DataConfig) -> Document:
    try:
        return _value(name, scalar.as_py(), data)
    except UnicodeDecodeError as error:  # Parquet's strings are not checked when they are written or read
        return unusable(name, "not UTF-8", error)


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
            if not (_is_damage(error) or isinstance(error, ValueError)):  # ValueError: text that cannot be parsed
                raise
            yield unusable(name, "corrupt shard", error)
            return
        if row is None:
            return
        if data.text_field not in row:
            raise DataError(f"{where} has {_no_column(data, row)}")
        yield _value(name, row[data.text_field], data)


def _value(name: str, value: Any, data: DataConfig) -> Document:
    if isinstance(value, str):
        return Document(name, value)
    if value is None:
        return Document(name, "")
    return unusable(name, "not text", f"data.text_field={data.text_field!r} holds {type(value).__name__}, not text")


def _too_long(name: str, data: DataConfig) -> Document:
    return unusable(name, "too long", f"more than data.max_document_chars={data.max_document_chars} characters")


def _utf8(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold: JSON can spell half of a surrogate pair, and Python spells odd
    bytes of file names so."""
    return text.encode("utf-8", "replace").decode()


def _no_column(data: DataConfig, names: Iterable[str]) -> str:
    return f"no column data.text_field={data.text_field!r}; it has {sorted(names)}"


def _is_damage(error: Exception) -> bool:
    """Whether an error says that Arrow could not decode what it read; errors of reading keep their own type or number
    inside Arrow."""
    import pyarrow as pa

    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
