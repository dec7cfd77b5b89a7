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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.storage import StorageError, cache_directory, locked

VERSION = 3
"""Changes with what is in an index."""
WEIGHTS = {"label": 8.0, "peaks": 16.0, "fires_on": 4.0, "raises": 2.0, "around": 1.0}
"""Columns of the index, and how much a word in them counts (BM25F by sqlite's bm25)."""
OFTEN = 0.25
"""Share of a feature's examples that peak in a word, from which on the word is one of its `peaks`: how often a word
stands in a column makes little difference to BM25."""
EXAMPLES = 20
"""Strongest examples of a feature whose words are found."""
REACH = 6
"""Tokens on each side of the peak whose words are found."""
AGAIN, COMMON = 2, 0.05
"""Examples of a feature near whose peaks a word stands, for it to be found there; share of all features above which it
would say nothing of any of them."""
EVERYWHERE = 0.1
"""Share of all features above which a word of a query is left out if there are others."""
MOST_WORDS = 16
"""Words of a query that are looked for."""
_WORD = re.compile(r"\w+")


class SearchIndex:
    """The index of one transcoder's features, for any number of threads."""

    def __init__(self, path: str, features: int):
        self._path, self._features = path, features
        self._own = threading.local()

    def find(self, query: str) -> NDArray[np.int64]:
        """Features with any of the query's words, the most relevant first, equal ones by index; none without words."""
        words = list(dict.fromkeys(_WORD.findall(query.casefold())))[:MOST_WORDS]
        count = {word: self._count(word) for word in words}
        # Beside others a word that is everywhere, such as `the`, only costs time.
        rare = [word for word in words if 0 < count[word] <= EVERYWHERE * self._features]
        chosen = rare or [word for word in words if count[word]]
        if not chosen:
            return np.empty(0, np.int64)
        wanted = " OR ".join(map(_quoted, chosen))
        weights = ", ".join(map(str, WEIGHTS.values()))
        rows = self._connection().execute(
            f"select rowid from features where features match ? order by bm25(features, {weights}), rowid", (wanted,)
        )
        return np.fromiter((row[0] for row in rows), np.int64)

    def _count(self, word: str) -> int:
        """Features with a word."""
        asked = self._connection().execute("select count(*) from features where features match ?", (_quoted(word),))
        return int(asked.fetchone()[0])

    def _connection(self) -> sqlite3.Connection:
        """Of this thread."""
        if not hasattr(self._own, "connection"):
            self._own.connection = sqlite3.connect(f"file:{quote(self._path)}?mode=ro&immutable=1", uri=True)
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
    return SearchIndex(path, len(labels))


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
        texts = _texts(examples, len(labels))
        rows = (
            (feature, label or "", *texts.get(feature, ("", "", "")), raised)
            for feature, (label, raised) in enumerate(zip(labels, raises, strict=True))
        )
        connection.executemany(
            "insert into features(rowid, label, peaks, fires_on, around, raises) values (?, ?, ?, ?, ?, ?)", rows
        )
        connection.execute("insert into features(features) values ('optimize')")
        connection.commit()
        connection.close()
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _texts(examples: pq.ParquetFile, features: int) -> dict[int, tuple[str, str, str]]:
    """For each feature with examples the words in which many of them peak, those in which others do, and those that
    stand around several peaks."""
    found = {feature: _words(rows) for feature, rows in groupby(_top(examples), lambda row: row["feature"])}
    spread = Counter(word for *_, near in found.values() for word in near)
    most = COMMON * features
    return {
        feature: (" ".join(often), " ".join(others), " ".join(word for word in near if spread[word] <= most))
        for feature, (often, others, near) in found.items()
    }


def _top(examples: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    """The strongest examples of each feature, in the order of features."""
    columns = ["feature", "kind", "rank", "context_tokens", "peak_index"]
    for batch in examples.iter_batches(4096, columns=columns, use_threads=False):
        wanted = pc.and_(pc.equal(batch["kind"], "top"), pc.less(batch["rank"], EXAMPLES))
        yield from pa.Table.from_batches([batch]).filter(wanted).to_pylist()


def _words(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[str], list[str]]:
    """Of one feature's examples; see `_texts`."""
    own, near, count = Counter[str](), Counter[str](), 0
    for row in rows:
        at_peak, others = _around(row["context_tokens"], row["peak_index"])
        own.update({word.casefold() for word in at_peak})
        near.update({word.casefold() for word in others})
        count += 1
    often = [word for word, times in own.items() if times >= OFTEN * count]
    again = [word for word, times in near.items() if times >= AGAIN]
    return often, [word for word in own if own[word] < OFTEN * count], again


def _quoted(word: str) -> str:
    """A word of a query, as a word and nothing else."""
    return f'"{word}"'


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
