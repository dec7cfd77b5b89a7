"""The analysis of a run's features, for questions about many of them or one."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.report.blocks import Block
from mtc.report.sections.features import feature_blocks
from mtc.results import AbsorbedFeature, Analysis, Feature, FeatureLabel, FeatureNote, SplitFeature
from mtc.storage import LabelTable, RandomContexts, RunError, parse_analysis, with_labels
from serve.contract import ServiceError
from serve.service.feature_map import FeatureMap
from serve.service.label_vectors import LabelVectors, nearest
from serve.service.search import SearchIndex, open_index
from serve.service.storage_reads import OPEN_S, from_storage

DENSE = 0.1
"""Share of the tokens from which on a feature that fires on them is dense."""
SINGLE_TOKEN = 0.9
"""Share of a feature's samples that peak on one token from which on it is a feature of that token."""
RULES = "rules"
"""Who made a label that is no language model's."""
NO_NOTES: Mapping[int, FeatureNote] = MappingProxyType({})


class Filters(NamedTuple):
    """Which features, and in which order; see `GET /features`."""

    group: int | None = None
    massive: bool | None = None
    min_density: float | None = None
    max_density: float | None = None
    token: str | None = None
    text: str | None = None
    copies: bool | None = None
    single_token: bool | None = None
    max_detection: float | None = None
    features: tuple[int, ...] | None = None
    query: str | None = None
    by: str = "words"
    starred: bool | None = None
    note: str | None = None
    sort: str = "feature"
    descending: bool = False


class AnalysisFiles(NamedTuple):
    """Contents of the files of a run that a FeatureTable reads."""

    features: bytes
    """features.parquet, a row for each feature."""
    examples: bytes
    """examples.parquet, ordered by feature."""
    analysis: bytes
    """analysis.json."""
    labels: bytes | None = None
    """labels.parquet, if a language model was asked."""
    contexts: Callable[[], bytes] | None = None
    """Reads contexts.parquet, if there is one."""
    vectors: Callable[[], bytes] | None = None
    """Reads embeddings.safetensors, if there is one."""


class FeatureTable:
    """The features of one transcoder, for any number of threads. Raises RunError or ValueError for files that can't be
    read.

    Args:
        run_id: names the transcoder's run where its analysis is refused.
        state: names this analysis of these weights and no other: cursors hold for one.
    """

    def __init__(self, run_id: str, state: str, files: AnalysisFiles):
        self._state = state
        self.analysis: Analysis = parse_analysis(files.analysis, run_id)
        self._named = None if files.labels is None else LabelTable(files.labels)
        """What a language model made of features, by index."""
        self._table = with_labels(pq.read_table(io.BytesIO(files.features)), self._named.labels if self._named else {})
        self._run_id, self._read_contexts, self._read_vectors = run_id, files.contexts, files.vectors
        self._reading = threading.Lock()
        self._examples, self._metadata = files.examples, pq.read_metadata(io.BytesIO(files.examples))
        groups = range(self._metadata.num_row_groups)
        statistics = [self._metadata.row_group(i).column(0).statistics for i in groups]
        self._borders = [(s.min, s.max) for s in statistics]
        """First and last feature of each row group of the examples."""

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def page(
        self, filters: Filters, limit: int, cursor: str | None, notes: Mapping[int, FeatureNote] = NO_NOTES,
        vector: NDArray[np.float32] | None = None,
    ) -> tuple[list[dict[str, Any]], int, str | None]:  # fmt: skip
        """Rows of a page, how many features pass the filters, and the cursor of the next page; `notes` are those of
        now, and by meaning `vector` is the query's.

        Raises ServiceError 404 for a cursor of another run or other filters, and without `vector` as
        `require_vectors`.
        """
        near = None if vector is None else self.require_vectors().similarities(vector)
        found = self._found(filters, notes, near)
        start = self._start(filters, cursor)
        rows = self.rows(found[start : start + limit], notes)
        if near is not None:
            rows = [row | {"similarity": float(near[row["feature"]])} for row in rows]
        after = start + limit
        return rows, len(found), self._cursor(filters, after) if after < len(found) else None

    def rows(self, indices: Iterable[int], notes: Mapping[int, FeatureNote] = NO_NOTES) -> list[dict[str, Any]]:
        """Features in short, as `GET /features` lists them."""
        return [self._short(index, notes.get(index, FeatureNote())) for index in map(int, indices)]

    def feature(self, index: int) -> Feature:
        """A feature's row. Raises ServiceError 404 if there is none."""
        return Feature.model_validate(_plain(self.row(index)))

    def row(self, index: int) -> dict[str, Any]:
        """A feature's row of features.parquet, with the label that it goes by. Raises ServiceError 404 if there is
        none."""
        row: dict[str, Any] = self._table.slice(self.check(index), 1).to_pylist()[0]
        return row

    @cached_property
    def contexts(self) -> RandomContexts | None:
        """Random contexts with all that fires in them, read when they are first asked for; None of runs without. Raises
        ServiceError 409 if they can't be read."""
        if self._read_contexts is None:
            return None
        try:
            return RandomContexts(self._read_contexts())
        except (RunError, ValueError) as error:
            message = f"the random contexts of {self._run_id} can't be read: {error}"
            raise ServiceError(409, "run_unusable", message) from error

    async def read_contexts(self) -> None:
        """Have the random contexts in memory, if there are any. Raises as `contexts`, and ServiceError 503 while the
        storage fails or hangs."""
        if "contexts" not in vars(self):
            await from_storage(lambda: self.contexts, key=("contexts", id(self)), seconds=OPEN_S)

    async def read_vectors(self) -> LabelVectors:
        """As `require_vectors`; raises ServiceError 503, too."""
        if "_vectors" in vars(self):
            return self.require_vectors()
        return await from_storage(self.require_vectors, key=("vectors", id(self)), seconds=OPEN_S)

    def require_contexts(self, otherwise: str = "") -> RandomContexts:
        """The random contexts. Raises ServiceError 404 for a run that has none, with what else one can do, 409 if they
        can't be read."""
        contexts = self.contexts
        if contexts is None or not len(contexts):
            message = (
                f"{self._run_id} has no random contexts (contexts.parquet): analyse it again with "
                f"--analysis.random_contexts 2048{otherwise}"
            )
            raise ServiceError(404, "no_contexts", message)
        return contexts

    @property
    def with_vectors(self) -> bool:
        """Whether there are vectors of labels."""
        return self._read_vectors is not None

    def require_vectors(self) -> LabelVectors:
        """Vectors of the labels, read when they are first asked for. Raises ServiceError 404 for a run that has none,
        409 if they can't be read."""
        try:
            with self._reading:  # one thread alone: of a large dictionary they take hundreds of megabytes
                found = self._vectors
        except (RunError, ValueError) as error:
            message = f"the vectors of {self._run_id} can't be read: {error}"
            raise ServiceError(409, "run_unusable", message) from error
        if not found:
            which = "its labels as they are now" if self.with_vectors else "its labels"
            message = (
                f"{self._run_id} has no vectors of {which} (embeddings.safetensors), which search by meaning goes by: "
                "jobs/label.py --embeddings URL --embedding-model NAME makes them"
            )
            raise ServiceError(404, "no_vectors", message)
        return found

    @cached_property
    def _vectors(self) -> LabelVectors | None:
        return None if self._read_vectors is None else LabelVectors(self._read_vectors(), self.labels, self._run_id)

    def count(self, filters: Filters) -> int:
        """How many features pass the filters."""
        return len(self._found(filters))

    @cached_property
    def labels(self) -> list[str | None]:
        """The label of each feature, a language model's if there is one, otherwise that of rules; None without
        samples."""
        labels: list[str | None] = self._table["label"].to_pylist()
        return labels

    def more_often_than(self, index: int) -> float | None:
        """Share of the other features that fired which fire on fewer tokens; None of one that never fired, and without
        others."""
        count = self._column("count")
        own, others = count[self.check(index)], int((count > 0).sum()) - 1
        return float((count[count > 0] < own).sum() / others) if own and others else None

    @property
    def max_activations(self) -> NDArray[np.float64]:
        """[features], the strongest activation of each on the analysed tokens, in scaled units."""
        return self._column("max_activation").astype(np.float64)

    def names(self, notes: Mapping[int, FeatureNote]) -> list[str | None]:
        """What each feature goes by: someone's note if there is one, otherwise its label."""
        return [notes[i].note or label if i in notes else label for i, label in enumerate(self.labels)]

    def labels_of(self, index: int) -> FeatureLabel | None:
        """What a language model made of a feature; None if it was not asked."""
        return self._named.row(self.check(index)) if self._named else None

    @cached_property
    def plan(self) -> FeatureMap:
        """Where the features are on the map, and their nested tree."""
        return FeatureMap(self._table)

    @property
    def labelled(self) -> bool:
        """Whether a language model was asked."""
        return self._named is not None

    def splits(self, index: int) -> list[SplitFeature]:
        """Splitting candidates of the report of which it is a part."""
        tree = self.analysis.tree
        return [s for s in tree.splits if index == s.feature or index in s.children] if tree else []

    def absorption(self, index: int) -> list[AbsorbedFeature]:
        """Absorption candidates of the report of which it is a part."""
        tree = self.analysis.tree
        return [a for a in tree.absorptions if index in (a.parent, a.child)] if tree else []

    def blocks(self, index: int, names: Sequence[str | None]) -> tuple[Block, ...]:
        """Its figures as in the report, without examples and logit effects; others go by `names`, one for each."""
        figures, analysis = self.feature(index), self.analysis
        near = [n.feature for n in figures.neighbours] + ([figures.parent.feature] if figures.parent else [])
        known = {i: name for i in (*near, *figures.children) if (name := names[i]) is not None}
        with_tree, own = analysis.tree is not None, self.labels_of(index)
        return feature_blocks(figures, (), analysis.activation_edges, with_tree, known, own, effects=False)

    def examples(self, index: int, kind: str | None, offset: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Examples of one feature and how many there are; reads only the parts of the file that have it."""
        self.check(index)
        groups = [i for i, (first, last) in enumerate(self._borders) if first <= index <= last]
        if not groups:
            return [], 0
        columns = ["feature", "kind", "rank", "activation", "quantile", "document_id", "position", "context_tokens"]
        table = self._reader().read_row_groups(
            groups, [*columns, "context_ids", "context_activations", "peak_index"], use_threads=False
        )
        table = table.filter(pc.equal(table["feature"], index))
        if kind is not None:
            table = table.filter(pc.equal(table["kind"], kind))
        table = table.sort_by([("kind", "descending"), ("rank", "ascending")])  # top before sample
        renamed = {"context_ids": "token_ids", "context_tokens": "tokens", "context_activations": "activations",
                   "peak_index": "peak"}  # fmt: skip
        rows = table.drop_columns(["feature"]).slice(offset, limit).to_pylist()
        return [_plain({renamed.get(name, name): value for name, value in row.items()}) for row in rows], table.num_rows

    def _reader(self) -> pq.ParquetFile:
        """Of the examples, for one call: two threads that read through one reader end the process."""
        return pq.ParquetFile(pa.BufferReader(self._examples), metadata=self._metadata)

    def check(self, index: int) -> int:
        """The index. Raises ServiceError 404 if there is no such feature."""
        if not 0 <= index < len(self):
            detail = {"limit": len(self) - 1, "value": index}
            message = f"there is no feature {index}, the last one is {len(self) - 1}"
            raise ServiceError(404, "unknown_feature", message, detail)
        return index

    def _found(
        self, filters: Filters, notes: Mapping[int, FeatureNote] = NO_NOTES, near: NDArray[np.float32] | None = None
    ) -> NDArray[np.int64]:
        wanted = np.ones(len(self), bool)
        if filters.starred is not None:
            stars = [feature for feature, each in notes.items() if each.star]
            wanted &= np.isin(np.arange(len(self)), stars) == filters.starred
        if filters.note is not None:
            text = filters.note.casefold()
            with_text = [feature for feature, each in notes.items() if text in (each.note or "").casefold()]
            wanted &= np.isin(np.arange(len(self)), with_text)
        density = self._column("density")
        if filters.group is not None:
            wanted &= self._column("group") == filters.group
        if filters.massive is not None:
            wanted &= np.isin(np.arange(len(self)), self.analysis.massive_indices) == filters.massive
        if filters.copies is not None:
            wanted &= np.array([of is not None for of in self._table["copy_of"].to_pylist()], bool) == filters.copies
        if filters.single_token is not None:
            wanted &= self._single_token == filters.single_token
        if filters.max_detection is not None:
            wanted &= self._detections <= filters.max_detection  # NaN, of those without a score, is not
        if filters.min_density is not None:
            wanted &= density >= filters.min_density
        if filters.max_density is not None:
            wanted &= density <= filters.max_density
        if filters.token is not None:
            token = filters.token.strip().casefold()
            wanted &= np.array([any(token == t.strip().casefold() for t in many) for many in self._tokens], bool)
        if filters.features is not None:
            wanted &= np.isin(np.arange(len(self)), np.array(filters.features))
        if filters.text is not None:
            wanted &= self._with_text(filters.text)
        relevant = None
        if near is not None:
            relevant = nearest(near, wanted)
        elif filters.query is not None:
            relevant = self._index.find(filters.query)
        if relevant is not None and filters.sort == "relevance":
            relevant = relevant[wanted[relevant]]
            return relevant[::-1] if filters.descending else relevant
        if relevant is not None:
            wanted &= np.isin(np.arange(len(self)), relevant)
        found = np.flatnonzero(wanted)
        keys = self._column(filters.sort)[found]
        order = np.argsort(-keys if filters.descending else keys, kind="stable")  # equal ones by index
        return found[order]

    def _with_text(self, text: str) -> NDArray[np.bool_]:
        """Features with a stored context that holds the text, in any case."""
        features, contexts = self._contexts
        hits = pc.match_substring(contexts, text.casefold())
        wanted = np.zeros(len(self), bool)
        wanted[features.filter(hits).to_numpy()] = True
        return wanted

    @cached_property
    def _index(self) -> SearchIndex:
        return open_index(self._state, self.labels, self._table, self._reader())

    @cached_property
    def _contexts(self) -> tuple[pa.Array, pa.Array]:
        table = self._reader().read(["feature", "context_tokens"], use_threads=False).combine_chunks()
        joined = pc.binary_join(table["context_tokens"].combine_chunks(), "")
        return table["feature"].combine_chunks(), pa.array(
            [text.casefold() for text in joined.to_pylist()], pa.string()
        )

    @cached_property
    def _single_token(self) -> NDArray[np.bool_]:
        most = [many[0]["count"] if many else 0 for many in self._table["top_tokens"].to_pylist()]
        samples = self._column("samples")
        return (samples > 0) & (np.array(most) >= SINGLE_TOKEN * samples)

    @property
    def scored(self) -> int:
        """How many labels have a score in detection."""
        return int(np.isfinite(self._detections).sum())

    @cached_property
    def _detections(self) -> NDArray[np.float64]:
        """[features], how well a judge does with each label; NaN where that was not measured."""
        found = np.full(len(self), np.nan)
        for feature, score in self._named.detections().items() if self._named else ():
            found[feature] = score
        return found

    @cached_property
    def _tokens(self) -> list[list[str]]:
        return [[token["token"] for token in many or ()] for many in self._table["top_tokens"].to_pylist()]

    def _column(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = self._table[name].to_numpy()
        return column

    def _short(self, index: int, note: FeatureNote) -> dict[str, Any]:
        columns = [
            "feature",
            "group",
            "label",
            "density",
            "count",
            "max_activation",
            "mean_activation",
            "decoder_norm",
            "massive",
            "copy_of",
            "parent",
        ]
        row = self._table.select([*columns, "children"]).slice(index, 1).to_pylist()[0]
        parent = row.pop("parent")
        row |= {"top_tokens": self._tokens[index], "children": len(row["children"] or ())}
        row |= {"label_by": self._label_by(index), "detection": float(self._detections[index]), "similarity": None}
        row |= {"note": note.note, "star": note.star}
        return _plain(row | {"parent": parent["feature"] if parent else None})

    def _label_by(self, index: int) -> str | None:
        """Who made its label."""
        if self._named and index in self._named.labels:
            return self._named.models[index]
        return None if self.labels[index] is None else RULES

    def _signature(self, filters: Filters) -> str:
        return hashlib.sha256(repr((self._state, filters)).encode()).hexdigest()[:16]

    def _cursor(self, filters: Filters, start: int) -> str:
        return base64.urlsafe_b64encode(f"{self._signature(filters)}:{start}".encode()).decode().rstrip("=")

    def _start(self, filters: Filters, cursor: str | None) -> int:
        if cursor is None:
            return 0
        try:
            signature, start = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().split(":")
            if signature == self._signature(filters) and start.isascii() and start.isdigit():
                return int(start)
        except ValueError:
            pass  # said below, as for a cursor that can be read and does not fit
        raise ServiceError(404, "unknown_cursor", "the cursor is not one of this run, these filters and this order")


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
