"""Which features have to do with some words: a full-text index of a run's features, SQLite's FTS5.

A feature is found by its label, by the words on which it fires, by the tokens whose logits it raises and by what stands
around it, in this order of weight; words are stems. The index is built once for a run's files and kept in the cache
directory, where all processes of the machine find it.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.storage import StorageError, cache_directory, locked

VERSION = 1
"""Changes with what is in an index."""
WEIGHTS = {"label": 8.0, "fires_on": 10.0, "raises": 2.0, "around": 1.0}
"""Columns of the index, and how much a word in them counts (BM25F by sqlite's bm25)."""
EXAMPLES = 20
"""Strongest examples of a feature whose words are found."""
REACH = 6
"""Tokens on each side of the peak whose words are found."""
MOST_WORDS = 16
"""Words of a query that are looked for."""
_WORD = re.compile(r"\w+")


class SearchIndex:
    """The index of one transcoder's features, for any number of threads."""

    def __init__(self, path: str):
        self._path = path
        self._own = threading.local()

    def find(self, query: str) -> NDArray[np.int64]:
        """Features with any of the query's words, the most relevant first, equal ones by index; none without words."""
        words = list(dict.fromkeys(_WORD.findall(query.casefold())))[:MOST_WORDS]
        if not words:
            return np.empty(0, np.int64)
        wanted = " OR ".join(f'"{word}"' for word in words)
        weights = ", ".join(map(str, WEIGHTS.values()))
        rows = self._connection().execute(
            f"select rowid from features where features match ? order by bm25(features, {weights}), rowid", (wanted,)
        )
        return np.fromiter((row[0] for row in rows), np.int64)

    def _connection(self) -> sqlite3.Connection:
        """Of this thread."""
        if not hasattr(self._own, "connection"):
            self._own.connection = sqlite3.connect(f"file:{self._path}?mode=ro&immutable=1", uri=True)
        connection: sqlite3.Connection = self._own.connection
        return connection


def open_index(state: str, labels: Sequence[str | None], features: pa.Table, examples: pq.ParquetFile) -> SearchIndex:
    """The index of an analysis, made if it is not there yet; `state` names the analysis and its labels."""
    name = hashlib.sha256(f"{VERSION} {state}".encode()).hexdigest()[:32]
    path = os.path.join(_directory(), f"{name}.sqlite")
    if not os.path.exists(path):
        with locked(path):
            if not os.path.exists(path):
                _build(path, labels, features, examples)
    return SearchIndex(path)


def _build(path: str, labels: Sequence[str | None], features: pa.Table, examples: pq.ParquetFile) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    raises = [" ".join(effect["token"] for effect in row or ()) for row in features["positive_logits"].to_pylist()]
    try:
        connection = sqlite3.connect(temporary)
        connection.execute("pragma journal_mode = off")
        connection.execute("pragma synchronous = off")
        columns = ", ".join(WEIGHTS)
        connection.execute(
            f"create virtual table features using fts5({columns}, content='', tokenize='porter unicode61')"
        )
        texts = dict(_texts(examples))
        rows = (
            (feature, label or "", *texts.get(feature, ("", "")), raised)
            for feature, (label, raised) in enumerate(zip(labels, raises, strict=True))
        )
        connection.executemany(
            "insert into features(rowid, label, fires_on, around, raises) values (?, ?, ?, ?, ?)", rows
        )
        connection.execute("insert into features(features) values ('optimize')")
        connection.commit()
        connection.close()
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _texts(examples: pq.ParquetFile) -> Iterator[tuple[int, tuple[str, str]]]:
    """For each feature with examples the words on which it fires, a word as often as it does, and those around, each
    once."""
    own: tuple[int, list[str], dict[str, None]] | None = None
    columns = ["feature", "kind", "rank", "context_tokens", "peak_index"]
    for batch in examples.iter_batches(4096, columns=columns, use_threads=False):
        wanted = pc.and_(pc.equal(batch["kind"], "top"), pc.less(batch["rank"], EXAMPLES))
        for row in pa.Table.from_batches([batch]).filter(wanted).to_pylist():
            if own is None or own[0] != row["feature"]:
                if own is not None:
                    yield own[0], (" ".join(own[1]), " ".join(own[2]))
                own = (row["feature"], [], {})
            word, near = _around(row["context_tokens"], row["peak_index"])
            own[1].extend(word)
            own[2].update(dict.fromkeys(near))
    if own is not None:
        yield own[0], (" ".join(own[1]), " ".join(own[2]))


def _around(tokens: Sequence[str], peak: int) -> tuple[list[str], list[str]]:
    """The whole words that the peak is part of, and the others near it."""
    first = max(0, peak - REACH)
    before, own, after = "".join(tokens[first:peak]), tokens[peak], "".join(tokens[peak + 1 : peak + 1 + REACH])
    start, end = len(before), len(before) + len(own)
    found = [(m.start() < end and m.end() > start, m.group()) for m in _WORD.finditer(before + own + after)]
    return [word for at_peak, word in found if at_peak], [word for at_peak, word in found if not at_peak]


def _directory() -> str:
    """Where indices are kept: in the cache directory, or where that can't be written, among temporary files."""
    try:
        place = os.path.join(cache_directory(), "search")
        os.makedirs(place, exist_ok=True)
        if os.access(place, os.W_OK | os.X_OK):
            return place
    except (StorageError, OSError):
        pass  # a service without a home runs as well
    place = os.path.join(tempfile.gettempdir(), f"mtc-search-{os.geteuid()}")
    os.makedirs(place, mode=0o700, exist_ok=True)
    return place if os.stat(place).st_uid == os.geteuid() else tempfile.mkdtemp(prefix="mtc-search-")
