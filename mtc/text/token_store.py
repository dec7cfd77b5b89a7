"""The token store: the windows of a text as token ids, made once for all runs that read it the same way.

A token store is a directory, on a local path or any fsspec URL, that is never changed once it is finished:

    <root>/<fingerprint>-<random>/tokens-00000.parquet ...   windows in the order of the text
                                  sums.npy                   sums of each block of windows
                                  store.json                 StoreInfo, written last

Windows are numbered by their row in the store. Everything after tokenising works on these numbers: a shuffle is a
permutation of them, a work unit is a list of them, a repeated text is a repeated number. No process holds anything of
all windows at once: they are read in blocks (mtc.text.blocks), of which a node keeps what was used last.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import posixpath
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.config import RunConfig
from mtc.record import Record
from mtc.storage import absolute, cache_directory, locked, patiently
from mtc.text.blocks import (
    SUMS,
    Block,
    block_of_table,
    block_windows,
    evict,
    open_block,
    table_sums,
    write_block,
)
from mtc.text.budget import tokens_wanted
from mtc.text.sources import DataError, is_hub_dataset, source_files
from mtc.text.tokens import OVERLAP, PART_CHARS, special_ids
from mtc.text.windows import SCHEMA, SPLITS

FORMAT_VERSION = 2
STORE_FILE = "store.json"
SUMS_FILE = "sums.npy"
CACHE_BYTES = 4 * 2**30
"""Most bytes of blocks, of all stores, that a node's cache directory keeps; more only by what is being fetched."""
MAPPED_BLOCKS = 320
"""Blocks that one process has mapped at once: all that a unit of work may need, with some to spare."""
BLOCKS_AT_ONCE = 32
"""Blocks that are asked for at once where only a part of each is needed."""
FETCHES = 8
"""Blocks that one process fetches at a time: an object store answers each of them slowly."""
LOCKS = 64
"""Processes of a node fetch two blocks at once if their numbers differ modulo this; each takes an empty file."""
Read = TypeVar("Read")


def store_fingerprint(config: RunConfig, tokenizer: Any) -> tuple[str, dict[str, Any]]:
    """16 hex digits that change with anything that changes a window, and the settings they are made of.

    How many tokens are wanted is not part of it. Raises DataError if the source is not there.
    """
    data = config.data
    source: dict[str, Any] = {"name": data.name, "text_field": data.text_field}
    if is_hub_dataset(data):
        source |= {"subset": data.subset, "split": data.split}
    else:
        files = source_files(data)
        listing = json.dumps([(file.name, file.version) for file in files])
        source |= {"num_files": len(files), "files_sha256": hashlib.sha256(listing.encode()).hexdigest()}
        if data.name.startswith("pip:"):
            source["version"] = importlib.metadata.version(data.name.removeprefix("pip:"))
        else:
            source["name"] = absolute(data.name)
    settings = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "tokenizer_sha256": _tokenizer_digest(tokenizer),
        "context_length": data.context_length,
        "max_document_chars": data.max_document_chars,
        "heldout_fraction": data.heldout_fraction,
        "seed": data.seed,
    }
    if data.max_document_chars > PART_CHARS:
        settings["part_chars"], settings["overlap"] = PART_CHARS, OVERLAP  # how a longer document is read
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16], settings


class ShardInfo(Record):
    name: str
    """Name of the shard's file inside the store."""
    rows: int
    """Windows in the shard."""
    bytes: int
    """Size of the shard's file in bytes."""


class StoreInfo(Record):
    format_version: int
    """Layout of the store; readers refuse one they do not know."""
    fingerprint: str
    """`store_fingerprint` of what the store was made from."""
    settings: dict[str, Any]
    """Settings that went into the fingerprint."""
    special_ids: list[int]
    """Token ids that are never trained on, sampled or counted."""
    context_length: int
    """Most token ids in a window."""
    windows: dict[str, int]
    """Windows of each split."""
    tokens: dict[str, int]
    """Trainable tokens of each split: those that are not special."""
    documents: dict[str, int]
    """Distinct documents of each split."""
    shards: list[ShardInfo]
    """Files of the store in the order of their rows."""
    exhausted: bool
    """Whether the store holds all of the text, because it ended before the wanted number of tokens."""
    skipped: dict[str, int] = {}
    """Documents that could not be used, by reason."""
    skipped_examples: list[str] = []
    """First few documents that could not be used, in the order of the text: "reason: name"."""
    unread: dict[str, int] = {}
    """Files and other entries of `data.name` that are no text that is read, by reason, when the store was made."""
    unread_examples: list[str] = []
    """First few of them, in the order of names: "reason: name"."""


class StoreMissingError(DataError):
    """A store, or a part of it, is not there; a node may not see yet what another one has written."""

    exit_code = 1
    event = "failed"


class TokenStore:
    """A finished store, read block by block: a block is fetched once for all processes of a node, into a part of the
    cache directory that keeps what was used last.

    `window_ids` arguments are int64 arrays of row numbers; results keep their order. Reading raises DataError if a
    shard is missing or damaged.
    """

    def __init__(self, url: str, info: StoreInfo):
        self.url = url
        self.info = info
        self.block_windows = block_windows(info.context_length)
        """Windows in a block; the last may have fewer."""
        self.rows = sum(info.windows.values())
        """Windows of both splits."""
        self._blocks: dict[int, Block] = {}
        """The blocks that this process has mapped, the one used last at the end."""

    @classmethod
    def open(cls, url: str) -> TokenStore:
        """The store at a path or URL. Raises DataError if it is missing, unfinished or of an unknown format."""
        url = absolute(url).rstrip("/")
        fs, path = fsspec.core.url_to_fs(url)
        try:
            raw = json.loads(patiently(lambda: fs.cat_file(posixpath.join(path, STORE_FILE))))
        except FileNotFoundError:
            problem = (
                f"{url} has no {STORE_FILE}: it is not finished" if fs.exists(path) else f"no token store at {url}"
            )
            raise StoreMissingError(problem) from None
        if raw.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{url}/{STORE_FILE}: format_version {raw.get('format_version')!r} is unknown; "
                f"this version reads {FORMAT_VERSION}"
            )
        return cls(url, StoreInfo.model_validate(raw))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore.open, (self.url,)  # a pickled store carries no arrays

    def window_ids(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split's windows, ascending, int64. Reads all of the store: for small ones."""
        everything = np.arange(self.rows)
        heldout = np.zeros(self.rows, bool)
        for block, places, mine in self._by_block(everything):
            heldout[mine] = block.heldout[places]
        return everything[heldout == (split == SPLITS[1])]

    def trainable_tokens(self, window_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that are not special in each window, int64."""
        found = np.empty(len(window_ids), np.int64)
        for block, places, mine in self._by_block(window_ids):
            found[mine] = block.trainable[places]
        return found

    def positions(self, window_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """All tokens of each window, int64."""
        found = np.empty(len(window_ids), np.int64)
        for block, places, mine in self._by_block(window_ids):
            found[mine] = block.lengths[places]
        return found

    def document_ids(self, window_ids: NDArray[np.int64]) -> list[str]:
        """The id of the document that each window is from."""
        found = np.empty(len(window_ids), "S16")
        for block, places, mine in self._by_block(window_ids):
            found[mine] = block.documents[places]
        return [value.decode() for value in found]

    def input_ids(self, window_ids: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """The token ids of each window, int32 views of length 1..context_length."""
        found = [_NOTHING] * len(window_ids)
        for block, places, mine in self._by_block(window_ids):
            for n, start, end in zip(mine, block.starts[places], block.starts[places + 1], strict=True):
                found[n] = block.ids[start:end]
        return found

    def known_documents(self, split: str, names: Collection[str]) -> frozenset[str]:
        """Those of these document ids that are in a split. Reads that column alone, shard by shard."""
        wanted, found = pa.array(sorted(names), pa.string()), set[str]()
        for table in self._columns(["document_id", "split"]):
            table = table.filter(pc.and_(pc.equal(table["split"], split), pc.is_in(table["document_id"], wanted)))
            found.update(table["document_id"].to_pylist())
        return frozenset(found)

    @cached_property
    def sums(self) -> NDArray[np.int64]:
        """[blocks, splits, SUMS] what mtc.text.blocks sums of each block's windows."""
        shape = (-(-self.rows // self.block_windows), len(SPLITS), len(SUMS))
        fs, path = fsspec.core.url_to_fs(self.url)
        try:
            data = patiently(lambda: fs.cat_file(posixpath.join(path, SUMS_FILE)))
        except FileNotFoundError:
            return self._sum(shape[0])
        sums = np.load(io.BytesIO(data))
        if sums.shape != shape:
            raise DataError(f"{self.url}/{SUMS_FILE} has sums of shape {sums.shape}, not {shape}")
        return np.asarray(sums, np.int64)

    def load(self, numbers: Sequence[int]) -> list[Block]:
        """Blocks by number, in the given order; those that are not on this node are fetched, several at a time."""
        new = [n for n in dict.fromkeys(numbers) if n not in self._blocks]
        if new:
            with ThreadPoolExecutor(min(FETCHES, len(new))) as threads:
                fetched = list(threads.map(self._open_block, new))
            self._blocks |= {n: block for n, (block, _) in zip(new, fetched, strict=True)}
            if any(is_new for _, is_new in fetched):
                evict(self._cache.parent.parent, self._cache.parent.name, CACHE_BYTES)
        found = []
        for n in numbers:
            found.append(block := self._blocks.pop(n))
            self._blocks[n] = block
        while len(self._blocks) > MAPPED_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        return found

    def _by_block(self, window_ids: NDArray[np.int64]) -> Iterator[tuple[Block, NDArray[np.int64], NDArray[np.int64]]]:
        """For each block of some windows: the block, the windows' places in it, and their places in `window_ids`."""
        numbers = window_ids // self.block_windows
        order = np.argsort(numbers, kind="stable")
        blocks, first = np.unique(numbers[order], return_index=True)
        parts = np.split(order, first[1:])
        for at in range(0, len(blocks), BLOCKS_AT_ONCE):
            chosen = blocks[at : at + BLOCKS_AT_ONCE].tolist()
            for n, block, mine in zip(chosen, self.load(chosen), parts[at : at + BLOCKS_AT_ONCE], strict=True):
                yield block, window_ids[mine] - n * self.block_windows, mine

    @cached_property
    def _cache(self) -> Path:
        """This store's directory of this node, since nodes may share the cache directory; another store at the same
        place, of other files, has one of its own."""
        key = hashlib.sha256((self.url + self.info.model_dump_json()).encode()).hexdigest()[:8]
        name = f"{posixpath.basename(self.url)}-{key}"
        directory = Path(cache_directory()).absolute() / "windows" / socket.gethostname() / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _open_block(self, number: int) -> tuple[Block, bool]:
        """A block, and whether it had to be fetched."""
        path = self._cache / f"{number}.block"
        fetched = False
        while (block := open_block(path)) is None:
            with locked(self._cache / f"{number % LOCKS}"):
                if open_block(path) is None:
                    self._fetch(number)
                    fetched = True
        return block, fetched

    def _fetch(self, number: int) -> None:
        """Write a block into the cache, and what else is whole in the row groups that must be read for it."""
        first, end = number * self.block_windows, min((number + 1) * self.block_windows, self.rows)
        shard = int(np.searchsorted(self._shard_starts, first, side="right")) - 1
        tables, start = [], self.rows
        while shard < len(self.info.shards) and (at := int(self._shard_starts[shard])) < end:
            begin, table = self._row_groups(self.info.shards[shard], first - at, end - at)
            tables.append(table)
            start = min(start, at + begin)
            shard += 1
        read = block_of_table(pa.concat_tables(tables))
        stop = start + len(read.lengths)
        for n in range(-(-start // self.block_windows), -(-stop // self.block_windows)):
            a, b = n * self.block_windows, min((n + 1) * self.block_windows, self.rows)
            if b <= stop:
                write_block(self._cache / f"{n}.block", read.slice(a - start, b - start))

    @cached_property
    def _shard_starts(self) -> NDArray[np.int64]:
        """[shards] the first row of each."""
        rows = np.array([shard.rows for shard in self.info.shards], np.int64)
        return np.cumsum(rows) - rows

    def _row_groups(self, shard: ShardInfo, first: int, end: int) -> tuple[int, pa.Table]:
        """The row groups of a shard that have any of its rows `first` to `end` - 1, and the row that they begin at."""

        def read(file: pq.ParquetFile) -> tuple[int, pa.Table]:
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            chosen = np.flatnonzero((ends > first) & (ends - sizes < end)).tolist()
            return int(ends[chosen[0]] - sizes[chosen[0]]), file.read_row_groups(chosen, columns=SCHEMA.names)

        return self._read(shard, read)

    def _columns(self, names: list[str]) -> Iterator[pa.Table]:
        for shard in self.info.shards:
            yield self._read(shard, lambda file: file.read(columns=names))

    def _read(self, shard: ShardInfo, read: Callable[[pq.ParquetFile], Read]) -> Read:
        """What `read` makes of a shard's file, of which nothing else is fetched."""
        fs, path = fsspec.core.url_to_fs(self.url)

        def attempt() -> Read:
            with fs.open(posixpath.join(path, shard.name), "rb", cache_type="none") as opened:
                file = pq.ParquetFile(opened, pre_buffer=True)
                if file.metadata.num_rows != shard.rows:
                    found = file.metadata.num_rows
                    raise DataError(f"{self.url}/{shard.name} has {found} windows, not {shard.rows}")
                return read(file)

        try:
            found: Read = patiently(attempt)
        except FileNotFoundError:
            raise StoreMissingError(f"{self.url} has no {shard.name}") from None
        except pa.ArrowException as error:
            raise DataError(f"{self.url}/{shard.name} is damaged: {error}") from error
        return found

    def _sum(self, blocks: int) -> NDArray[np.int64]:
        """`sums` of a store that an earlier version made, which has no file of them."""
        found = np.zeros((blocks, len(SPLITS), len(SUMS)), np.int64)
        row = 0
        for table in self._columns(["split", "trainable", "length"]):
            part = table_sums(row, self.block_windows, table)
            found[row // self.block_windows :][: len(part)] += part
            row += table.num_rows
        return found


_NOTHING = np.empty(0, np.int32)


def store_root(config: RunConfig) -> str:
    """Where this run's token stores are: output.token_store, or `tokens` in output.root if that is a URL, which all
    nodes reach, or `tokens` in the cache directory."""
    root = config.output.root if "://" in config.output.root else cache_directory()
    return absolute(config.output.token_store or posixpath.join(root, "tokens"))


def new_store_url(config: RunConfig, fingerprint: str) -> str:
    """A directory that no other job uses, so that jobs which build the same store at once cannot mix their files."""
    return posixpath.join(store_root(config), f"{fingerprint}-{uuid.uuid4().hex[:8]}")


def find_store(config: RunConfig, fingerprint: str) -> str | None:
    """URL of a finished store with this fingerprint that holds what `tokens_wanted` says, or all of the text."""
    root = store_root(config)
    fs, path = fsspec.core.url_to_fs(root)
    for found in sorted(fs.glob(posixpath.join(path, f"{fingerprint}-*", STORE_FILE))):
        try:
            store = TokenStore.open(posixpath.join(root, posixpath.basename(posixpath.dirname(found))))
        except DataError:
            continue  # of another version: left to the jobs that can read it
        if _is_enough(store.info, config):
            return store.url
    return None


def still_serves(url: str, config: RunConfig, tokenizer: Any) -> bool:
    """Whether a run's own store is still there, whatever has become of its text, is of this tokenizer, and holds what
    `tokens_wanted` says, or all of the text."""
    try:
        info = TokenStore.open(url).info
    except DataError:
        return False
    return info.settings["tokenizer_sha256"] == _tokenizer_digest(tokenizer) and _is_enough(info, config)


def _is_enough(info: StoreInfo, config: RunConfig) -> bool:
    wanted = tokens_wanted(config)
    return info.exhausted or all(info.tokens[split] >= wanted[split] for split in SPLITS)


def _tokenizer_digest(tokenizer: Any) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in ("truncation", "padding"):
        del state[key]  # what the last call set, not what the tokenizer is: encode_text undoes it
    identity = [state, tokenizer.bos_token_id, special_ids(tokenizer)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
