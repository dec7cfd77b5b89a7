"""The Ray Data job that turns text into a token store: read -> tokenise -> shards written by the driver.

Reading goes through one generator for every kind of source, instead of Ray's readers, for three reasons: each task's
share of a CPU can be set, so the job also runs on one core; the order of the documents is the order of the list, so
window numbers do not depend on the cluster; and a job that needs little of a long text stops after reading little.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import numpy as np

from mtc.config import DataConfig, RunConfig
from mtc.tokens import (
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
HUB_TIMEOUT_S = 10.0


def build_token_store(config: RunConfig) -> str:
    """URL of a token store that fits this configuration; it is built if there is none.

    A store of the same text, tokenizer and window settings is reused if it holds the wanted tokens of each split or
    all of the text. Files are read in an order shuffled by `data.seed`: collections are often sorted (by year, by
    size), and a run that needs only the beginning should see all kinds. Local files and wheels must be present on
    every node. Needs an initialised Ray; raises DataError for a source that cannot be read.
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
    url = new_store_url(config, fingerprint)
    with (
        TokenStoreWriter(url, fingerprint, settings, tokenizer, config.data.context_length) as writer,
        closing(_window_tables(config, tokenizer)) as tables,
    ):
        for table in tables:
            table, enough = _take(table, left)
            writer.write(table)
            if enough:
                break
            left = {split: want - writer.tokens[split] for split, want in tokens_wanted(config).items()}
        if not sum(writer.windows.values()):
            raise DataError(f"data.name={config.data.name!r} has no text of 2 tokens or more")
        info = writer.finish(exhausted=not enough)
    logger.info(
        "token store: %d windows, %d + %d tokens (train + held-out), %d documents, %.1f s%s -> %s",
        sum(info.windows.values()),
        info.tokens["train"],
        info.tokens["heldout"],
        sum(info.documents.values()),
        time.monotonic() - started,
        ", all of the text" if info.exhausted else "",
        url,
    )
    return url


def check_data(config: RunConfig) -> None:
    """Read the first document, before any work on the cluster.

    Raises DataError if the wheel, the files, the hub data set or the text field are not there.
    """
    if is_hub_dataset(config.data):
        _check_hub(config.data)
    if next(_texts(_pieces(config.data)[0], config.data), None) is None:
        raise DataError(f"data.name={config.data.name!r}: the first file or shard has no text")


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
    """Tables of windows in the order of the text; closing the iterator stops the tasks."""
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


def _read(batch: dict[str, np.ndarray], data: DataConfig) -> Iterator[dict[str, list[str]]]:
    """The documents of some pieces: {"url", "shard", "total"} -> {"text"}."""
    for row in zip(batch["url"], batch["shard"], batch["total"], strict=True):
        texts: list[str] = []
        size = 0
        for text in _texts(_Piece(*row), data):
            texts.append(text)
            size += len(text)
            if size >= BLOCK_BYTES // 4:
                yield {"text": texts}
                texts, size = [], 0
        yield {"text": texts}


def _tokenize(batch: pa.Table, data: DataConfig, tokenizer: ray.ObjectRef) -> Iterator[pa.Table]:
    """The windows of some documents: {"text"} -> mtc.tokens.SCHEMA."""
    loaded = _tokenizer(tokenizer)
    special = special_ids(loaded)
    texts = batch["text"].to_pylist() if batch.num_rows else []
    for first in range(0, max(len(texts), 1), BATCH_DOCUMENTS):
        windows = []
        for text in texts[first : first + BATCH_DOCUMENTS]:
            name = document_id(text)
            split = document_split(name, data.heldout_fraction, data.seed)
            windows += [Window(name, split, ids) for ids in make_windows(text, loaded, data.context_length)]
        yield windows_table(windows, special)


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


# Reading text -------------------------------------------------------------------------------------------------------


def _texts(piece: _Piece, data: DataConfig) -> Iterator[str]:
    """The documents of a piece, without empty ones. Raises DataError that names the file and the field."""
    if not piece.url:
        shard = _open_hub(data).shard(piece.total, piece.shard)
        yield from _column(shard, data, f"{data.name} (shard {piece.shard})")
    elif piece.url.endswith(".txt"):
        with fsspec.open(piece.url, "rb") as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{piece.url} is not UTF-8 text: {error}") from None
        if text:
            yield text
    elif piece.url.endswith(".jsonl"):
        yield from _column(_json_lines(piece.url), data, piece.url)
    else:
        yield from _column(_parquet_rows(piece.url, data.text_field), data, piece.url)


def _column(rows: Iterable[dict[str, Any]], data: DataConfig, where: str) -> Iterator[str]:
    for row in rows:
        if data.text_field not in row:
            raise DataError(f"{where} has no column data.text_field={data.text_field!r}; it has {sorted(row)}")
        text = row[data.text_field]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: data.text_field={data.text_field!r} holds {type(text).__name__}, not text")
        if text:
            # JSON can spell half of a surrogate pair, which neither UTF-8 nor a tokenizer can take.
            yield text.encode("utf-8", "replace").decode()


def _json_lines(url: str) -> Iterator[dict[str, Any]]:
    with fsspec.open(url, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{url}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{url}, line {number}: not an object")
            yield row


def _parquet_rows(url: str, text_field: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if text_field not in names:
            raise DataError(f"{url} has no column data.text_field={text_field!r}; it has {sorted(names)}")
        for batch in parquet.iter_batches(batch_size=1024, columns=[text_field]):
            yield from batch.to_pylist()


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
