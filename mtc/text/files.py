"""The documents of one file: text, JSON lines, JSON and Parquet, packed or not.

Whatever a file's size, no more of it is held in memory than a document may have; Parquet is read by row groups. What is
damaged costs as little as its format allows: a line, a value, a row group, or of a packed file and of a JSON array what
comes after it.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow.parquet as pq

from mtc.config import DataConfig
from mtc.storage import LFS_POINTER
from mtc.text.json_array import array_elements
from mtc.text.packed import DAMAGE, unpacked
from mtc.text.sources import DataError, text_format

UTF8_BYTES, JSON_BYTES = 4, 12
"""Most bytes that a character takes in a text file, and in JSON, which may spell it as two escapes of six bytes."""
FIELDS_BYTES = 4 * 2**20
"""Bytes allowed to a line of JSON beside its text."""
DETAIL_CHARS = 200
"""Most characters that are kept of a library's error message, which may quote the document."""
NO_FIELD = "no text field"


class Document(NamedTuple):
    """A document, or what takes the place of one that cannot be used."""

    name: str
    """Where the document is: file, URL or data set, and in it the line or element (from 1), the row, row group or shard
    (from 0)."""
    text: str | None
    """Text of the document; None if it cannot be used."""
    reason: str = ""
    """Why the document cannot be used, in words that are the same for all documents of that kind; empty if it can."""
    detail: str = ""
    """Why exactly the document cannot be used; empty if it can."""
    documents: int = 1
    """How many documents this is: a damaged row group loses its rows, a file that describes others is none."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.name}" + (f" ({self.detail})" if self.detail else "")


def unusable(name: str, reason: str, detail: object = "") -> Document:
    return Document(name, None, reason, str(detail)[:DETAIL_CHARS])


def too_long(name: str, data: DataConfig) -> Document:
    return unusable(name, "too long", f"more than data.max_document_chars={data.max_document_chars} characters")


def value_document(name: str, value: Any, data: DataConfig) -> Document:
    """The document of a value of the text field."""
    if isinstance(value, str):
        return Document(name, value)
    if value is None:
        return Document(name, "")
    return unusable(name, "not text", f"data.text_field={data.text_field!r} holds {type(value).__name__}, not text")


def no_column(data: DataConfig, names: Iterable[str]) -> str:
    return f"no column data.text_field={data.text_field!r}; it has {sorted(names)}"


def is_damage(error: Exception) -> bool:
    """Whether an error says that what was read could not be decoded; errors of reading keep their own type or number
    inside Arrow."""
    return isinstance(error, DAMAGE) or (type(error) is OSError and error.errno is None)


def file_documents(url: str, data: DataConfig) -> Iterator[Document]:
    """The documents of a file that `text_format` knows, in their order; each that cannot be used has the reason.

    Raises DataError for a Parquet file without the column of text, and the storage's OSError.
    """
    kind, packing = text_format(url) or ("", None)
    if kind == ".parquet":
        yield from _parquet_rows(url, data)
        return
    read = {".txt": _text, ".json": _json}.get(kind, _json_lines)
    with fsspec.open(url, "rb") as raw:
        file = unpacked(raw, packing)
        try:
            start = file.peek(len(LFS_POINTER))[: len(LFS_POINTER)]
            if start == LFS_POINTER:
                yield unusable(url, "Git LFS pointer", "fetch the file itself: git lfs pull")
            else:
                yield from read(url, file, data) if start else [unusable(url, "empty file")]
        except Exception as error:
            if packing is None or not is_damage(error):
                raise
            yield unusable(url, f"corrupt {packing}", error)


def _text(url: str, file: io.BufferedReader, data: DataConfig) -> Iterator[Document]:
    limit = UTF8_BYTES * data.max_document_chars + len(codecs.BOM_UTF8)
    content = file.read(limit + 1)  # no more than that, however large the file is
    if len(content) > limit:
        yield too_long(url, data)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield unusable(url, "not UTF-8", error)
    else:
        yield Document(url, text) if text else unusable(url, "empty file")


def _json_lines(url: str, file: BinaryIO, data: DataConfig, first: bytes = b"") -> Iterator[Document]:
    """The documents of JSON lines, the first of which may have been read already; read as bytes, so that a line
    which is not UTF-8, or does not fit in memory, is skipped alone."""
    limit = _json_limit(data)
    blank = True
    for number in count(1):
        line = first if number == 1 and first else file.readline(limit + 1)
        if not line:
            break
        name = f"{url}, line {number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > limit:
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)
            blank = False
            yield too_long(name, data)
        elif line.strip():
            blank = False
            yield _json_document(name, line, data)
    if blank:
        yield unusable(url, "empty file")


def _json(url: str, file: io.BufferedReader, data: DataConfig) -> Iterator[Document]:
    """The documents of a .json file: an array of objects, JSON lines, or one object over several lines."""
    if file.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_array(url, file, data)
        return
    limit = _json_limit(data)
    first = file.readline(limit + 1)
    begun = first.removeprefix(codecs.BOM_UTF8).strip()
    if not begun.startswith(b"{") or (begun.endswith(b"}") and file.peek()):
        yield from _json_lines(url, file, data, first)
        return
    content = first + file.read(limit + 1 - len(first))
    whole = content.removeprefix(codecs.BOM_UTF8)
    document = too_long(url, data) if len(content) > limit else _json_document(url, whole, data)
    # metadata.json, package.json, ...: not a text that is lost
    yield document._replace(documents=0) if document.reason == NO_FIELD else document


def _json_array(url: str, file: io.BufferedReader, data: DataConfig) -> Iterator[Document]:
    """The documents of an array; where it is damaged the rest of it is lost, and counts as one document."""
    number = 0
    try:
        for number, row in enumerate(array_elements(io.TextIOWrapper(file, "utf-8-sig"), _json_limit(data)), 1):
            yield _row_document(f"{url}, element {number}", row, data)
    except UnicodeDecodeError as error:
        yield unusable(f"{url}, after element {number}", "not UTF-8", error)
    except (ValueError, RecursionError) as error:
        yield unusable(f"{url}, after element {number}", "broken JSON", error)


def _json_document(name: str, line: bytes, data: DataConfig) -> Document:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return unusable(name, "not UTF-8", error)
    except (ValueError, RecursionError) as error:  # the latter from thousands of brackets
        return unusable(name, "broken JSON", error)
    return _row_document(name, row, data)


def _row_document(name: str, row: Any, data: DataConfig) -> Document:
    if not isinstance(row, dict):
        return unusable(name, "broken JSON", f"{type(row).__name__}, not an object")
    if data.text_field not in row:
        return unusable(name, NO_FIELD, no_column(data, row))
    return value_document(name, row[data.text_field], data)


def _json_limit(data: DataConfig) -> int:
    return JSON_BYTES * data.max_document_chars + FIELDS_BYTES


def _parquet_rows(url: str, data: DataConfig) -> Iterator[Document]:
    with fsspec.open(url, "rb") as file:
        if not file.read(1):
            yield unusable(url, "empty file")
            return
        file.seek(0)
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            names = parquet.schema_arrow.names
        except Exception as error:
            if not is_damage(error):
                raise
            yield unusable(url, "corrupt Parquet", error)
            return
        if data.text_field not in names:
            raise DataError(f"{url} has {no_column(data, names)}")
        first = 0  # row of the file
        for group in range(parquet.num_row_groups):
            rows, read = parquet.metadata.row_group(group).num_rows, 0
            batches = parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[data.text_field])
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:
                    if not is_damage(error):
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
        return value_document(name, scalar.as_py(), data)
    except UnicodeDecodeError as error:  # Parquet's strings are not checked when they are written or read
        return unusable(name, "not UTF-8", error)
