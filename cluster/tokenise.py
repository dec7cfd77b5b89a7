"""The Ray Data job that turns text into a token store: read -> tokenise -> shards written by the driver.

Reading goes through one generator for every kind of source (mtc.text.documents), instead of Ray's readers, for three
reasons: each task's share of a CPU can be set, so the job also runs on one core; the order of the documents is the
order of the list, so window numbers do not depend on the cluster; and a job that needs little of a long text stops
after reading little.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.resources import Plan
from cluster.tables import iterate_tables
from mtc.config import DataConfig, RunConfig
from mtc.errors import known_cause
from mtc.storage import Lease, RunDirectory
from mtc.text import (
    SCHEMA,
    DataError,
    Document,
    Piece,
    TokenStoreWriter,
    Unread,
    Window,
    check_hub,
    document_id,
    document_split,
    find_store,
    is_hub_dataset,
    make_windows,
    new_store_url,
    read_piece,
    rows_wanted,
    source_listing,
    source_pieces,
    special_ids,
    store_fingerprint,
    tokens_wanted,
    unusable,
    windows_table,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import ray

logger = logging.getLogger(__name__)
READ_CPUS = 0.25
TOKENIZE_CPUS = 0.5
BLOCK_BYTES = 4 * 2**20
"""Bytes of text in a block: few, so that tokenising starts before a large file is read and the job can stop in its
middle."""
BATCH_DOCUMENTS = 64
MIN_JUDGED = 100
"""Fewest documents of which a share of unusable ones is taken before all of the text was read; a share of fewer says
little."""
EXAMPLES = 5
"""Most documents that could not be used which are named; the others are only counted."""


def build_token_store(
    config: RunConfig, plan: Plan | None = None, tell: Callable[[Mapping[str, int]], None] = lambda tokens: None
) -> str:
    """URL of a token store that fits this configuration; it is built if there is none.

    A store of the same text, tokenizer and window settings is reused if it holds the wanted tokens of each split or
    all of the text. Files are read in an order shuffled by `data.seed`: collections are often sorted (by year, by
    size), and a run that needs only the beginning should see all kinds. Local files and wheels must be present on
    every node. Documents that cannot be used are skipped and counted in the store's info. Tasks run where those of
    `plan` may and take no more than what it found free on a node; without one, anywhere. `tell` gets the tokens of each
    split that are written, whenever there are more.

    Needs an initialised Ray. Raises DataError for a source that cannot be read, or of which a larger share than
    data.max_skipped_share cannot be used.
    """
    from mtc.language_model import load_tokenizer

    started = time.monotonic()
    tokenizer = load_tokenizer(config.model)
    fingerprint, settings = store_fingerprint(config, tokenizer)
    found = find_store(config, fingerprint)
    if found is not None:
        logger.info("token store: reusing %s", found)
        return found
    unread = [] if is_hub_dataset(config.data) else source_listing(config.data).unread
    for entry in unread[:EXAMPLES]:
        logger.warning("not read: %s", entry)
    left, enough = tokens_wanted(config), False
    tally = _Tally(config.data.max_skipped_share)
    url = new_store_url(config, fingerprint)
    with (
        Lease(RunDirectory(url)),  # nobody takes it for one that was given up
        TokenStoreWriter(url, fingerprint, settings, tokenizer, config.data.context_length) as writer,
        closing(_window_tables(config, tokenizer, plan)) as tables,
    ):
        for table in tables:
            table, enough = _take(table, left)
            windows, documents = _separate(table)
            for document in documents:
                tally.add(document)
            writer.write(windows)
            tell(writer.tokens)
            if enough:
                break
            left = {split: want - writer.tokens[split] for split, want in tokens_wanted(config).items()}
        tally.check()
        if not sum(writer.windows.values()):
            raise DataError(f"data.name={config.data.name!r} has no text of 2 tokens or more")
        unread += tally.no_texts
        info = writer.finish(not enough, tally.skipped, tally.examples, unread)
    logger.info(
        "token store: %d windows, %d + %d tokens (train + held-out), %d documents, %d skipped, %d entries "
        "not read, %.1f s%s -> %s",
        sum(info.windows.values()),
        info.tokens["train"],
        info.tokens["heldout"],
        sum(info.documents.values()),
        sum(info.skipped.values()),
        len(unread),
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
        check_hub(config.data)
    pieces = source_pieces(config.data)
    skipped, first = 0, ""
    # Enough to judge, as the job will; with a share of 1 it never stops, so the text may begin anywhere.
    for document in (d for piece in pieces for d in read_piece(piece, config.data)):
        if document.text is not None:
            return
        skipped += document.documents
        first = first or f"; first: {document}"
        if skipped >= MIN_JUDGED and config.data.max_skipped_share < 1:
            break
    raise DataError(f"data.name={config.data.name!r} has no text that can be used{first}")


class _Tally:
    """Counts the documents that could and could not be used; raises DataError if the latter are too large a share."""

    def __init__(self, max_share: float):
        self.skipped: Counter[str] = Counter()
        self.examples: list[str] = []
        self.no_texts: list[Unread] = []
        """Files that turned out to be none of texts."""
        self._first = ""
        self._max_share = max_share
        self._read = 0

    def add(self, document: Document) -> None:
        """Count documents, which come in the order of the text, so that where a run stops does not depend on the
        cluster."""
        if not document.reason:
            self._read += document.documents
        elif not document.documents:
            self.no_texts.append(Unread(document.name, "an object without data.text_field"))
            logger.warning("not read: %s", document)
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


def _window_tables(config: RunConfig, tokenizer: Any, plan: Plan | None) -> Generator[pa.Table, None, None]:
    """Tables of `_tokenize` in the order of the text; closing the iterator stops the tasks."""
    import ray
    from ray.data import DataContext

    rows = [piece._asdict() for piece in source_pieces(config.data)]
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True  # window numbers must not depend on which task is faster
    context.execution_no_progress_timeout_s = config.cluster.stall_seconds
    where: Any = {"label_selector": plan.label_selector} if plan and plan.label_selector else {}
    # Both kinds of tasks fit a node at the same time, or they would wait for each other.
    largest = max(node.cpus for node in plan.nodes) if plan else math.inf
    share = min(1.0, largest / (READ_CPUS + TOKENIZE_CPUS))
    read_cpus, tokenize_cpus = (math.floor(share * cpus * 1e4) / 1e4 for cpus in (READ_CPUS, TOKENIZE_CPUS))
    read: Any = _read  # Ray's type of a batch function leaves no room for fn_kwargs
    tokenize: Any = _tokenize
    with DataContext.current(context):
        dataset = (
            ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
            .map_batches(read, batch_size=None, fn_kwargs={"data": config.data}, num_cpus=read_cpus, **where)
            .map_batches(
                tokenize,
                batch_size=None,
                batch_format="pyarrow",
                # Sent once instead of loaded on every node: the nodes need no hub and cannot disagree.
                fn_kwargs={"data": config.data, "tokenizer": ray.put(tokenizer)},
                num_cpus=tokenize_cpus,
                **where,
            )
        )
    try:
        for table in iterate_tables(dataset):
            if table.num_rows:
                yield table
    except Exception as error:
        raise known_cause(error) or error from None


def _read(batch: dict[str, np.ndarray], data: DataConfig) -> Iterator[pa.Table]:
    """The documents of some pieces: {"url", "shard", "total"} -> the fields of Document."""
    for row in zip(batch["url"], batch["shard"], batch["total"], strict=True):
        documents: list[Document] = []
        size = 0
        for document in read_piece(Piece(*row), data):
            documents.append(document)
            size += len(document.text or document.name)
            if size >= BLOCK_BYTES // 4:
                yield _documents_table(documents)
                documents, size = [], 0
        yield _documents_table(documents)


def _tokenize(batch: pa.Table, data: DataConfig, tokenizer: ray.ObjectRef) -> Iterator[pa.Table]:
    """The windows of some documents: the fields of Document -> mtc.text.windows.SCHEMA and the fields of Document.

    Before a document's windows comes a row for the document itself, or for what could not be used of it, which the
    driver counts; `name` is null in rows of windows, and only there.
    """
    loaded = _tokenizer(tokenizer)
    special = special_ids(loaded)
    found = [Document(**row) for row in batch.to_pylist()]
    for first in range(0, max(len(found), 1), BATCH_DOCUMENTS):
        windows: list[Window] = []
        documents: list[Document | None] = []
        for document in found[first : first + BATCH_DOCUMENTS]:
            document, cut = _cut(document, data, loaded)
            windows += [Window("", "", []), *cut]
            documents += [document._replace(text=None), *[None] * len(cut)]
        table = windows_table(windows, special)
        for name, column in zip(Document._fields, _documents_table(documents).columns, strict=True):
            table = table.append_column(name, column)
        yield table


def _cut(document: Document, data: DataConfig, tokenizer: Any) -> tuple[Document, list[Window]]:
    """A document and its windows; none, and the document as unusable, if the tokenizer fails."""
    if document.text is None:
        return document, []
    try:
        windows = make_windows(document.text, tokenizer, data.context_length)
    except BaseException as error:
        # What the Rust tokenizers raise where they panic is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return unusable(document.name, "tokenizer failed", f"{type(error).__name__}: {error}"), []
    name = document_id(document.text)
    split = document_split(name, data.heldout_fraction, data.seed)
    return document, [Window(name, split, ids) for ids in windows]


def _documents_table(documents: Sequence[Document | None]) -> pa.Table:
    """The fields of some documents as columns, null for None."""
    import pyarrow as pa

    types = (pa.string(), pa.string(), pa.string(), pa.string(), pa.int64())
    rows = [document or (None,) * len(types) for document in documents]
    columns = [pa.array([row[i] for row in rows], kind) for i, kind in enumerate(types)]
    return pa.table(columns, names=list(Document._fields))


@lru_cache(maxsize=1)
def _tokenizer(reference: ray.ObjectRef) -> Any:
    """The tokenizer, unpickled once per worker process: a large vocabulary takes longer to unpickle than a block to
    tokenise."""
    import ray

    return ray.get(reference)


def _take(table: pa.Table, left: dict[str, int]) -> tuple[pa.Table, bool]:
    """The rows of a table that are still needed, so that what is stored does not depend on how the rows came in
    tables."""
    heldout = table["split"].to_numpy() == "heldout"
    rows, enough = rows_wanted(heldout, table["trainable"].to_numpy().astype(np.int64), left)
    return table.slice(0, rows), enough


def _separate(table: pa.Table) -> tuple[pa.Table, list[Document]]:
    """The windows in a table of `_tokenize`, and the documents in it."""
    import pyarrow.compute as pc

    of_document = pc.is_valid(table["name"])
    documents = table.filter(of_document).select(Document._fields).to_pylist()
    return table.filter(pc.invert(of_document)).select(SCHEMA.names), [Document(**row) for row in documents]
