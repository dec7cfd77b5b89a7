"""The token store: the windows of a text as token ids, made once for all runs that read it the same way.

A token store is a directory, on a local path or any fsspec URL, that is never changed once it is finished:

    <root>/<fingerprint>-<random>/tokens-00000.parquet ...   windows in the order of the text
                                  store.json                 StoreInfo, written last

Windows are numbered by their row in the store. Everything after tokenising works on these numbers: a shuffle is a
permutation of them, a work unit is a list of them, a repeated text is a repeated number.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.config import RunConfig
from mtc.record import Record
from mtc.storage import RunDirectory, absolute, cache_directory, locked, patiently, write_atomic
from mtc.text.budget import tokens_wanted
from mtc.text.sources import EXAMPLES, DataError, Unread, count_reasons, is_hub_dataset, source_files
from mtc.text.tokens import OVERLAP, PART_CHARS, special_ids
from mtc.text.windows import SPLITS

FORMAT_VERSION = 2
STORE_FILE = "store.json"


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


class TokenStoreWriter:
    """Writes a store; used as a context manager, it removes what it wrote if the block fails before `finish`.

    Until then the directory has no store.json, so no reader opens it; afterwards another job may use it already.
    """

    def __init__(
        self,
        url: str,
        fingerprint: str,
        settings: dict[str, Any],
        tokenizer: Any,
        context_length: int,
        windows_per_shard: int = 65_536,
    ):
        self.url = absolute(url)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.windows = dict.fromkeys(SPLITS, 0)
        self._fingerprint = fingerprint
        self._settings = settings
        self._special = special_ids(tokenizer)
        self._context_length = context_length
        self._windows_per_shard = windows_per_shard
        self._documents: dict[str, list[NDArray[Any]]] = {split: [] for split in SPLITS}
        self._shards: list[ShardInfo] = []
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def write(self, table: pa.Table) -> None:
        """Append windows, a table of SCHEMA."""
        splits = table["split"].to_numpy()
        trainable = table["trainable"].to_numpy()
        documents = table["document_id"].to_numpy().astype("S16")
        for split in SPLITS:
            chosen = splits == split
            self.windows[split] += int(chosen.sum())
            self.tokens[split] += int(trainable[chosen].sum())
            self._documents[split].append(np.unique(documents[chosen]))
        self._pending.append(table)
        self._pending_rows += table.num_rows
        while self._pending_rows >= self._windows_per_shard:
            self._write_shard(self._windows_per_shard)

    def finish(
        self,
        exhausted: bool,
        skipped: Mapping[str, int] | None = None,
        skipped_examples: Sequence[str] = (),
        unread: Sequence[Unread] = (),
    ) -> StoreInfo:
        """Write the last shard and store.json; from here on the store opens. The arguments are StoreInfo's, `unread` is
        every entry that is counted there."""
        if self._pending_rows:
            self._write_shard(self._pending_rows)
        info = StoreInfo(
            format_version=FORMAT_VERSION,
            fingerprint=self._fingerprint,
            settings=self._settings,
            special_ids=self._special,
            context_length=self._context_length,
            windows=self.windows,
            tokens=self.tokens,
            documents={s: len(np.unique(np.concatenate(d))) if d else 0 for s, d in self._documents.items()},
            shards=self._shards,
            exhausted=exhausted,
            skipped=dict(skipped or {}),
            skipped_examples=list(skipped_examples),
            unread=count_reasons(unread),
            unread_examples=[str(entry) for entry in unread[:EXAMPLES]],
        )
        content = info.model_dump_json(indent=1).encode()
        patiently(lambda: write_atomic(posixpath.join(self.url, STORE_FILE), content))
        return info

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = RunDirectory(self.url)
        if error is not None and place.exists() and not place.exists(STORE_FILE):
            place.remove()

    def _write_shard(self, rows: int) -> None:
        pending = pa.concat_tables(self._pending)
        table = pending.slice(0, rows)
        self._pending, self._pending_rows = [pending.slice(rows)], pending.num_rows - rows
        first = sum(shard.rows for shard in self._shards)
        table = table.add_column(0, "window_id", pa.array(np.arange(first, first + rows)))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        shard = ShardInfo(name=f"tokens-{len(self._shards):05d}.parquet", rows=rows, bytes=buffer.tell())
        patiently(lambda: write_atomic(posixpath.join(self.url, shard.name), buffer.getvalue()))
        self._shards.append(shard)


class StoreMissingError(DataError):
    """A store, or a part of it, is not there; a node may not see yet what another one has written."""

    exit_code = 1
    event = "failed"


class TokenStore:
    """A finished store, read lazily: the columns that describe windows on first use, then the ids, as flat arrays.

    `window_ids` arguments are int64 arrays of row numbers; results keep their order. Reading raises DataError if a
    shard is missing or damaged.
    """

    def __init__(self, url: str, info: StoreInfo):
        self.url = url
        self.info = info

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
        """Row numbers of a split's windows, ascending, int64."""
        return np.flatnonzero(self._index[1] == SPLITS.index(split)).astype(np.int64)

    def trainable_tokens(self, window_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that are not special in each window, int64."""
        return self._index[2][window_ids]

    def positions(self, window_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """All tokens of each window, int64."""
        return self._index[3][window_ids]

    def document_ids(self, window_ids: NDArray[np.int64]) -> list[str]:
        """The id of the document that each window is from."""
        return [value.decode() for value in self._index[0][window_ids]]

    def input_ids(self, window_ids: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """The token ids of each window, int32 views of length 1..context_length."""
        flat, offsets = self._ids
        return [flat[offsets[i] : offsets[i + 1]] for i in window_ids]

    @cached_property
    def _index(self) -> tuple[NDArray[Any], NDArray[np.int8], NDArray[np.int64], NDArray[np.int64]]:
        """Document id, split number, trainable tokens and length of every window."""
        documents, splits, trainable = [np.empty(0, "S16")], [np.empty(0, np.int8)], [np.empty(0, np.int64)]
        lengths = [np.empty(0, np.int64)]
        for table in self._tables(["document_id", "split", "trainable", "length"]):
            lengths.append(table["length"].to_numpy().astype(np.int64))
            documents.append(table["document_id"].to_numpy().astype("S16"))
            splits.append((table["split"].to_numpy() == "heldout").astype(np.int8))
            trainable.append(table["trainable"].to_numpy().astype(np.int64))
        return np.concatenate(documents), np.concatenate(splits), np.concatenate(trainable), np.concatenate(lengths)

    @cached_property
    def _ids(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All token ids one after another, and where each window starts; the last offset is the end.

        Mapped from a copy in the cache directory that the first reader on a node makes, so that all processes there
        share one copy of a text that may be larger than their memory.
        """
        key = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        target = Path(cache_directory()).absolute() / "windows" / f"{posixpath.basename(self.url)}-{key}"
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with locked(target):
                if not target.is_dir():
                    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
                        self._write_flat(Path(scratch, "windows"))
                        os.rename(Path(scratch, "windows"), target)
        offsets = np.load(target / "offsets.npy")
        flat = np.memmap(target / "ids.bin", np.int32, mode="r") if offsets[-1] else np.empty(0, np.int32)
        return flat, offsets

    def _write_flat(self, directory: Path) -> None:
        directory.mkdir()
        with (directory / "ids.bin").open("wb") as file:
            for table in self._tables(["input_ids"]):
                file.write(table["input_ids"].combine_chunks().flatten().to_numpy().data)
        np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(self._index[3])]))

    def _tables(self, columns: list[str]) -> Iterator[pa.Table]:
        fs, path = fsspec.core.url_to_fs(self.url)
        for shard in self.info.shards:

            def read(name: str = posixpath.join(path, shard.name)) -> pa.Table:
                with fs.open(name, "rb") as file:
                    return pq.read_table(file, columns=columns)

            try:
                table = patiently(read)
            except FileNotFoundError:
                raise StoreMissingError(f"{self.url} has no {shard.name}") from None
            except pa.ArrowException as error:
                raise DataError(f"{self.url}/{shard.name} is damaged: {error}") from error
            if table.num_rows != shard.rows:
                raise DataError(f"{self.url}/{shard.name} has {table.num_rows} windows, not {shard.rows}")
            yield table


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
