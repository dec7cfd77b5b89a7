"""The Ray Data job that turns text into a token store: read -> tokenise -> shards written by the driver.

Reading goes through one generator for every kind of source, instead of Ray's readers, for three reasons: each task's
share of a CPU can be set, so the job also runs on one core; the order of the documents is the order of the list, so
window numbers do not depend on the cluster; and a job that needs little of a long text stops after reading little.
"""

from __future__ import annotations

import codecs
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import numpy as np

from mtc.config import DataConfig, RunConfig
from mtc.tokens import (
    SCHEMA,
    DataError,
    TokenStoreWriter,
    Window,
    document_id,
    document_split,
    find_store,
    is_hub_dataset,
    make_windows,
    new_store_url,
    rows_wanted,
    source_files,
    special_ids,
    store_fingerprint,
    tokens_wanted,
    windows_table,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import ray

logger = logging.getLogger(__name__)

READ_CPUS = 0.25
TOKENIZE_CPUS = 0.5
BLOCK_BYTES = 4 * 2**20
"""Text in a block: small, so that tokenising starts before a large file is read and the job can stop in its middle."""
BATCH_DOCUMENTS = 64
MIN_JUDGED = 100
"""Documents of which a share is taken before all of the text was read; a share of fewer says little."""
EXAMPLES = 5
"""Documents that could not be used which are named; the others are only counted."""
UTF8_BYTES, JSON_BYTES = 4, 12
"""The most that a character takes in a file: JSON may spell it as two escapes of six bytes."""
DETAIL_CHARS = 200
"""Of a library's error message, which may quote the document."""
HUB_TIMEOUT_S = 10.0


def build_token_store(config: RunConfig) -> str:
    """URL of a token store that fits this configuration; it is built if there is none.

    A store of the same text, tokenizer and window settings is reused if it holds the wanted tokens of each split or
    all of the text. Files are read in an order shuffled by `data.seed`: collections are often sorted (by year, by
    size), and a run that needs only the beginning should see all kinds. Local files and wheels must be present on
    every node. Documents that cannot be used are skipped and counted in the store's info.

    Needs an initialised Ray. Raises DataError for a source that cannot be read, or of which a larger share than
    data.max_skipped_share cannot be used.
    """
    from mtc.model_files import load_tokenizer

    started = time.monotonic()
    tokenizer = load_tokenizer(config.model)
    fingerprint, settings = store_fingerprint(config, tokenizer)
    found = find_store(config, fingerprint)
    if found is not None:
        logger.info("token store: reusing %s", found)
        return found
    left, enough = tokens_wanted(config), False
    tally = _Tally(config.data.max_skipped_share)
    url = new_store_url(config, fingerprint)
    with (
        TokenStoreWriter(url, fingerprint, settings, tokenizer, config.data.context_length) as writer,
        closing(_window_tables(config, tokenizer)) as tables,
    ):
        for table in tables:
            table, enough = _take(table, left)
            windows, documents = _separate(table)
            for document in documents:
                tally.add(document)
            writer.write(windows)
            if enough:
                break
            left = {split: want - writer.tokens[split] for split, want in tokens_wanted(config).items()}
        tally.check()
        if not sum(writer.windows.values()):
            raise DataError(f"data.name={config.data.name!r} has no text of 2 tokens or more")
        info = writer.finish(not enough, tally.skipped, tally.examples)
    logger.info(
        "token store: %d windows, %d + %d tokens (train + held-out), %d documents, %d skipped, %.1f s%s -> %s",
        sum(info.windows.values()),
        info.tokens["train"],
        info.tokens["heldout"],
        sum(info.documents.values()),
        sum(info.skipped.values()),
        time.monotonic() - started,
        ", all of the text" if info.exhausted else "",
        url,
    )
    return url


def check_data(config: RunConfig) -> None:
    """Read up to the first document that can be used, before any work on the cluster.

    Raises DataError if the wheel, the files, the hub data set or the text field are not there, or if there is nothing
    to use. A few files that cannot be used are no reason to fail where others can be.
    """
    if is_hub_dataset(config.data):
        _check_hub(config.data)
    pieces = _pieces(config.data)
    unusable, first = 0, ""
    # Enough to judge, as the job will; with a share of 1 it never stops, so the text may begin anywhere.
    for document in (d for piece in pieces for d in _documents(piece, config.data)):
        if document.text is not None:
            return
        unusable += document.documents
        first = first or f"; first: {document}"
        if unusable >= MIN_JUDGED and config.data.max_skipped_share < 1:
            break
    raise DataError(f"data.name={config.data.name!r} has no text that can be used{first}")


class _Document(NamedTuple):
    """A document, or what takes the place of one that cannot be used."""

    name: str
    """File, URL or data set, and in it the line (from 1), the row, row group or shard (from 0)."""
    text: str | None
    """None if it cannot be used."""
    reason: str = ""
    """Why not, in words that are the same for all documents of that kind."""
    detail: str = ""
    """Why not, exactly."""
    documents: int = 1
    """How many documents this is: a damaged row group loses its rows."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.name}" + (f" ({self.detail})" if self.detail else "")


class _Tally:
    """Counts the documents that could and could not be used; raises DataError if these are too large a share."""

    def __init__(self, max_share: float):
        self.skipped: Counter[str] = Counter()
        self.examples: list[str] = []
        self._first = ""
        self._max_share = max_share
        self._read = 0

    def add(self, document: _Document) -> None:
        """Documents come in the order of the text, so that where a run stops does not depend on the cluster."""
        if not document.reason:
            self._read += document.documents
        else:
            self.skipped[document.reason] += document.documents
            if len(self.examples) < EXAMPLES:
                self.examples.append(f"{document.reason}: {document.name}")
                self._first = self._first or str(document)
                logger.warning("skipped: %s", document)
        if self._read + self.skipped.total() >= MIN_JUDGED:
            self.check()

    def check(self) -> None:
        skipped = self.skipped.total()
        total = skipped + self._read
        if skipped > self._max_share * total:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.skipped.most_common())
            first = ", ".join([self._first, *self.examples[1:]])
            raise DataError(
                f"data.max_skipped_share={self._max_share:g}: {skipped} of {total} documents "
                f"({100 * skipped / total:.3g} %) cannot be used: {reasons}; first: {first}"
            )


class _Piece(NamedTuple):
    """What one read task reads: a file, or one of `total` shards of a hub data set."""

    url: str
    shard: int
    total: int


def _pieces(data: DataConfig) -> list[_Piece]:
    if is_hub_dataset(data):
        total = _open_hub(data).num_shards
        pieces = [_Piece("", shard, total) for shard in range(total)]
    else:
        pieces = [_Piece(file.url, 0, 1) for file in source_files(data)]
    return [pieces[i] for i in np.random.default_rng(data.seed).permutation(len(pieces))]


def _window_tables(config: RunConfig, tokenizer: Any) -> Generator[pa.Table, None, None]:
    """Tables of `_tokenize` in the order of the text; closing the iterator stops the tasks."""
    import ray
    from ray.data import DataContext

    rows = [piece._asdict() for piece in _pieces(config.data)]
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True  # window numbers must not depend on which task is faster
    read: Any = _read  # Ray's type of a batch function leaves no room for fn_kwargs
    tokenize: Any = _tokenize
    with DataContext.current(context):
        dataset = (
            ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
            .map_batches(read, batch_size=None, fn_kwargs={"data": config.data}, num_cpus=READ_CPUS)
            .map_batches(
                tokenize,
                batch_size=None,
                batch_format="pyarrow",
                # Sent once instead of loaded on every node: the nodes need no hub and cannot disagree.
                fn_kwargs={"data": config.data, "tokenizer": ray.put(tokenizer)},
                num_cpus=TOKENIZE_CPUS,
            )
        )
    try:
        table: Any
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            if table.num_rows:
                yield table
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = getattr(cause, "cause", None) or cause.__cause__  # Ray keeps a task's own error in `cause`
        if cause is None:
            raise
        raise DataError(str(cause.args[0])) from None


def _read(batch: dict[str, np.ndarray], data: DataConfig) -> Iterator[pa.Table]:
    """The documents of some pieces: {"url", "shard", "total"} -> the fields of _Document."""
    for row in zip(batch["url"], batch["shard"], batch["total"], strict=True):
        documents: list[_Document] = []
        size = 0
        for document in _documents(_Piece(*row), data):
            documents.append(document)
            size += len(document.text or document.name)
            if size >= BLOCK_BYTES // 4:
                yield _documents_table(documents)
                documents, size = [], 0
        yield _documents_table(documents)


def _tokenize(batch: pa.Table, data: DataConfig, tokenizer: ray.ObjectRef) -> Iterator[pa.Table]:
    """The windows of some documents: the fields of _Document -> mtc.tokens.SCHEMA and the fields of _Document.

    Before a document's windows comes a row for the document itself, or for what could not be used of it, which the
    driver counts; `name` is null in rows of windows, and only there.
    """
    loaded = _tokenizer(tokenizer)
    special = special_ids(loaded)
    found = [_Document(**row) for row in batch.to_pylist()]
    for first in range(0, max(len(found), 1), BATCH_DOCUMENTS):
        windows: list[Window] = []
        documents: list[_Document | None] = []
        for document in found[first : first + BATCH_DOCUMENTS]:
            document, cut = _cut(document, data, loaded)
            windows += [Window("", "", []), *cut]
            documents += [document._replace(text=None), *[None] * len(cut)]
        table = windows_table(windows, special)
        for name, column in zip(_Document._fields, _documents_table(documents).columns, strict=True):
            table = table.append_column(name, column)
        yield table


def _cut(document: _Document, data: DataConfig, tokenizer: Any) -> tuple[_Document, list[Window]]:
    """The document and its windows; none, and the document as unusable, if the tokenizer fails."""
    if document.text is None:
        return document, []
    try:
        windows = make_windows(document.text, tokenizer, data.context_length)
    except BaseException as error:
        # What the Rust tokenizers raise where they panic is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return _unusable(document.name, "tokenizer failed", f"{type(error).__name__}: {error}"), []
    name = document_id(document.text)
    split = document_split(name, data.heldout_fraction, data.seed)
    return document, [Window(name, split, ids) for ids in windows]


def _documents_table(documents: Sequence[_Document | None]) -> pa.Table:
    """The fields of the documents as columns, null for None."""
    import pyarrow as pa

    types = (pa.string(), pa.string(), pa.string(), pa.string(), pa.int64())
    rows = [document or (None,) * len(types) for document in documents]
    columns = [pa.array([row[i] for row in rows], kind) for i, kind in enumerate(types)]
    return pa.table(columns, names=list(_Document._fields))


@lru_cache(maxsize=1)
def _tokenizer(reference: ray.ObjectRef) -> Any:
    """Unpickled once per worker process: a large vocabulary takes longer to unpickle than a block to tokenise."""
    import ray

    return ray.get(reference)


def _take(table: pa.Table, left: dict[str, int]) -> tuple[pa.Table, bool]:
    """The rows that are still needed, so that what is stored does not depend on how the rows came in tables."""
    heldout = table["split"].to_numpy() == "heldout"
    rows, enough = rows_wanted(heldout, table["trainable"].to_numpy().astype(np.int64), left)
    return table.slice(0, rows), enough


def _separate(table: pa.Table) -> tuple[pa.Table, list[_Document]]:
    """The windows in a table of `_tokenize`, and the documents."""
    import pyarrow.compute as pc

    of_document = pc.is_valid(table["name"])
    documents = table.filter(of_document).select(_Document._fields).to_pylist()
    return table.filter(pc.invert(of_document)).select(SCHEMA.names), [_Document(**row) for row in documents]


# Reading text -------------------------------------------------------------------------------------------------------


def _documents(piece: _Piece, data: DataConfig) -> Iterator[_Document]:
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


def _text_file(url: str, data: DataConfig) -> Iterator[_Document]:
    limit = UTF8_BYTES * data.max_document_chars + len(codecs.BOM_UTF8)
    with fsspec.open(url, "rb") as raw:
        content = io.BufferedReader(raw).read(limit + 1)  # no more than that, however large the file is
    if len(content) > limit:
        yield _too_long(url, data)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield _unusable(url, "not UTF-8", error)
    else:
        yield _Document(url, text) if text else _unusable(url, "empty file")


def _json_lines(url: str, data: DataConfig) -> Iterator[_Document]:
    """Lines are read as bytes, so that one which is not UTF-8, or does not fit in memory, is skipped alone."""
    limit = JSON_BYTES * data.max_document_chars + BLOCK_BYTES  # the latter is for the line's other fields
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
        yield _unusable(url, "empty file")


def _json_document(name: str, line: bytes, data: DataConfig) -> _Document:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _unusable(name, "not UTF-8", error)
    except (ValueError, RecursionError) as error:  # the latter from thousands of brackets
        return _unusable(name, "broken JSON", error)
    if not isinstance(row, dict):
        return _unusable(name, "broken JSON", f"{type(row).__name__}, not an object")
    if data.text_field not in row:
        return _unusable(name, "no text field", _no_column(data, row))
    return _value(name, row[data.text_field], data)


def _parquet_rows(url: str, data: DataConfig) -> Iterator[_Document]:
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        if not file.read(1):
            yield _unusable(url, "empty file")
            return
        file.seek(0)
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            names = parquet.schema_arrow.names
        except Exception as error:
            if not _is_damage(error):
                raise
            yield _unusable(url, "corrupt Parquet", error)
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
                    yield _unusable(f"{url}, row group {group}", "corrupt Parquet", error)._replace(documents=lost)
                    break
                if batch is None:
                    break
                for row, scalar in enumerate(batch.column(0), start=first + read):
                    yield _scalar(f"{url}, row {row}", scalar, data)
                read += batch.num_rows
            first += rows


def _scalar(name: str, scalar: Any, data: DataConfig) -> _Document:
    try:
        return _value(name, scalar.as_py(), data)
    except UnicodeDecodeError as error:  # Parquet's strings are not checked when they are written or read
        return _unusable(name, "not UTF-8", error)


def _hub_documents(piece: _Piece, data: DataConfig) -> Iterator[_Document]:
    """The hub's reader cannot go on after damage, so the rest of that shard is lost; it counts as one document."""
    where = f"{data.name} (shard {piece.shard})"
    rows = iter(_open_hub(data).shard(piece.total, piece.shard))
    for number in count():
        name = f"{where}, row {number}"
        try:
            row = next(rows, None)
        except Exception as error:
            if not (_is_damage(error) or isinstance(error, ValueError)):  # ValueError: text that cannot be parsed
                raise
            yield _unusable(name, "corrupt shard", error)
            return
        if row is None:
            return
        if data.text_field not in row:
            raise DataError(f"{where} has {_no_column(data, row)}")
        yield _value(name, row[data.text_field], data)


def _value(name: str, value: Any, data: DataConfig) -> _Document:
    if isinstance(value, str):
        return _Document(name, value)
    if value is None:
        return _Document(name, "")
    return _unusable(name, "not text", f"data.text_field={data.text_field!r} holds {type(value).__name__}, not text")


def _too_long(name: str, data: DataConfig) -> _Document:
    return _unusable(name, "too long", f"more than data.max_document_chars={data.max_document_chars} characters")


def _unusable(name: str, reason: str, detail: object = "") -> _Document:
    return _Document(name, None, reason, str(detail)[:DETAIL_CHARS])


def _utf8(text: str) -> str:
    """JSON can spell half of a surrogate pair, and Python spells odd bytes of file names so; UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _no_column(data: DataConfig, names: Iterable[str]) -> str:
    return f"no column data.text_field={data.text_field!r}; it has {sorted(names)}"


def _is_damage(error: Exception) -> bool:
    """Whether Arrow could not decode what it read; errors of reading keep their own type or number inside Arrow."""
    import pyarrow as pa

    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


def _open_hub(data: DataConfig) -> Any:
    """The hub data set as a stream (datasets.IterableDataset)."""
    from datasets import load_dataset

    try:
        return load_dataset(data.name, data.subset, split=data.split, streaming=True)
    except (OSError, ValueError) as error:  # not there, not reachable, or no such subset or split
        raise DataError(
            f"data.name={data.name!r}, data.subset={data.subset!r}, data.split={data.split!r}: {error}"
        ) from error


def _check_hub(data: DataConfig) -> None:
    """One request with a short limit, because opening a data set without a network retries for minutes."""
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
