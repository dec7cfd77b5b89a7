"""What is shown of a feature to whoever names it, and what is kept back to judge the name by.

Active contexts are the feature's examples, those of one window on one side only; silent ones come from the random
contexts, of which everything that fires is known. Every choice depends on the seed and the feature alone.
"""

from __future__ import annotations

import io
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.storage import CONTEXTS, RandomContexts, RunDirectory, RunError, own_tokens, relatives

Array = NDArray[Any]
FIFTHS = 5
SHOWN_TOP, SHOWN_PER_FIFTH, SHOWN_NEAR = 10, 2, 3
"""Contexts that the explainer sees: the strongest, some of each fifth of the activations, and near misses."""
KEPT_PER_FIFTH = 2
"""Contexts of each fifth of the activations that only the judge sees."""
KEPT_ACTIVE = FIFTHS * KEPT_PER_FIFTH
KEPT_NEAR, KEPT_RANDOM = KEPT_ACTIVE // 2, KEPT_ACTIVE // 2
"""Silent contexts that the judge sees: near misses, and others."""
FEWEST = 3
"""Fewest active contexts, and fewest silent ones, that a label is judged by."""
CACHED_GROUPS = 4
"""Row groups of the examples that are kept: features are asked for in order, mostly."""


class Context(NamedTuple):
    """A few tokens of held-out text."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    activations: tuple[float, ...]
    """Activation of the feature on each, in scaled units."""
    part: str
    """`1` to `5`, the fifth of the feature's activations that the peak is in, the weakest first; `near miss` or
    `random` for a silent one."""

    @property
    def peak(self) -> float:
        """Strongest activation in it."""
        return max(self.activations, default=0.0)


class Evidence(NamedTuple):
    """All about one feature that prompts are made of."""

    feature: int
    """Index of the feature."""
    strongest: float
    """Strongest activation of the feature, in scaled units."""
    shown: tuple[Context, ...]
    """Active contexts for the explainer, the strongest first."""
    shown_near: tuple[Context, ...]
    """Near misses for the explainer."""
    kept: tuple[Context, ...]
    """Active contexts that only the judge sees."""
    silent: tuple[Context, ...]
    """Silent contexts that only the judge sees: near misses, then random ones."""
    raises: tuple[str, ...]
    """Tokens whose logits the feature raises most; none if that was not measured."""

    @property
    def too_little(self) -> str | None:
        """Why a label can't be judged; None if it can."""
        if len(self.kept) < FEWEST:
            return "too few examples"
        return "silent in too few random contexts" if len(self.silent) < FEWEST else None


class FeatureRow(NamedTuple):
    """A row of features.parquet, as far as labels go by it."""

    group: int
    samples: int
    machine_label: str | None
    parent: int | None
    children: tuple[int, ...]


class RunEvidence:
    """The evidence of every feature of an analysed run. Raises RunError if the run was analysed without random
    contexts."""

    def __init__(self, run: RunDirectory, seed: int = 0):
        self.seed = seed
        if not run.exists(CONTEXTS):
            raise RunError(
                f"{run.url} has no {CONTEXTS}, which labels are judged by: analyse the run again "
                f"(jobs/analyze.py --run {run.url})"
            )
        self._features = pq.read_table(io.BytesIO(run.read("features.parquet")))
        self._examples = run.read("examples.parquet")
        self._metadata = pq.read_metadata(io.BytesIO(self._examples))
        self._group = lru_cache(CACHED_GROUPS)(self._read_group)
        statistics = [self._metadata.row_group(i).column(0).statistics for i in range(self._metadata.num_row_groups)]
        self._borders = [(s.min, s.max) for s in statistics]
        self._contexts = RandomContexts(run.read(CONTEXTS))
        if not len(self._contexts):
            raise RunError(
                f"{run.url} was analysed without random contexts, which labels are judged by: analyse it again with "
                "--analysis.random_contexts 2048"
            )

    @cached_property
    def rows(self) -> list[FeatureRow]:
        """One for each feature."""
        columns = ["group", "samples", "label", "parent", "children"]
        return [
            FeatureRow(
                row["group"], row["samples"], row["label"], row["parent"] and row["parent"]["feature"],
                tuple(row["children"] or ()),
            )
            for row in self._features.select(columns).to_pylist()
        ]  # fmt: skip

    def of(self, feature: int) -> Evidence:
        """The evidence of one feature; none of an unused one."""
        row = self._features.slice(feature, 1).to_pylist()[0]
        random = np.random.default_rng([self.seed, feature])
        examples = self._read(feature)
        shown, kept = _split(examples, random)
        silent, near = self._silent(feature, row, random, {example["window_id"] for example in examples})
        few = min(SHOWN_NEAR, len(near) // 3)
        judged_near = near[few : few + KEPT_NEAR]
        rest = silent[~np.isin(silent, near[: few + KEPT_NEAR])]
        others = rest[: KEPT_RANDOM + KEPT_NEAR - len(judged_near)]
        context = self._silent_context
        return Evidence(
            feature=feature,
            strongest=row["max_activation"],
            shown=shown,
            shown_near=tuple(context(i, "near miss") for i in near[:few]),
            kept=kept,
            silent=(*(context(i, "near miss") for i in judged_near), *(context(i, "random") for i in others)),
            raises=tuple(effect["token"] for effect in (row["positive_logits"] or ())[:5]),
        )

    def _read(self, feature: int) -> list[dict[str, Any]]:
        groups = [i for i, (first, last) in enumerate(self._borders) if first <= feature <= last]
        if not groups:
            return []
        rows: list[dict[str, Any]] = []
        for group in groups:
            table = self._group(group)
            features = table["feature"].to_numpy()
            first, end = np.searchsorted(features, feature, "left"), np.searchsorted(features, feature, "right")
            rows += table.slice(first, end - first).to_pylist()
        return rows

    def _read_group(self, group: int) -> pa.Table:
        file = pq.ParquetFile(pa.BufferReader(self._examples), metadata=self._metadata)
        columns = ["feature", "kind", "activation", "window_id", "position", "context_tokens", "context_activations"]
        return file.read_row_group(group, columns, use_threads=False)

    def _silent(
        self, feature: int, row: dict[str, Any], random: np.random.Generator, windows: set[int]
    ) -> tuple[Array, Array]:
        """Contexts in which the feature is silent, in random order, none of the `windows` of its examples, and those of
        them that are near misses: a related feature fires there, or one of the feature's own tokens stands there."""
        silent = self._contexts.silent(feature, random)
        silent = silent[~np.isin(self._contexts.window_ids[silent], list(windows))]
        siblings = self.rows[row["parent"]["feature"]].children if row["parent"] else ()
        return silent, self._contexts.near_misses(silent, relatives(row, siblings), own_tokens(row))

    def _silent_context(self, index: int, part: str) -> Context:
        tokens = self._contexts.tokens(index)
        return Context(tokens, (0.0,) * len(tokens), part)


def _split(rows: list[dict[str, Any]], random: np.random.Generator) -> tuple[tuple[Context, ...], tuple[Context, ...]]:
    """Contexts for the explainer and for the judge, no window on both sides.

    Of the windows of each fifth of the drawn activations half go to the judge, first those without a strongest example:
    rules made their labels of all of these.
    """
    drawn = [row for row in rows if row["kind"] == "sample"]
    border = np.quantile([row["activation"] for row in drawn or rows], np.arange(1, FIFTHS) / FIFTHS) if rows else None
    strongest = {row["window_id"] for row in rows if row["kind"] == "top"}
    stratum: dict[int, str] = {}
    for row in (*drawn, *rows):
        stratum.setdefault(row["window_id"], "top" if row["kind"] == "top" else _fifth(row, border))
    for_judge: set[int] = set()
    for name in sorted(set(stratum.values())):
        own = random.permutation([window for window, part in stratum.items() if part == name]).tolist()
        for_judge |= set(sorted(own, key=strongest.__contains__)[: len(own) // 2])
    shown = [row for row in rows if row["window_id"] not in for_judge]
    kept = [row for row in rows if row["window_id"] in for_judge]
    explained = [row for row in shown if row["kind"] == "top"][:SHOWN_TOP]
    judged: list[dict[str, Any]] = []
    for fifth in map(str, range(FIFTHS, 0, -1)):
        explained += [r for r in shown if r["kind"] == "sample" and _fifth(r, border) == fifth][:SHOWN_PER_FIFTH]
        judged += [r for r in kept if r["kind"] == "sample" and _fifth(r, border) == fifth][:KEPT_PER_FIFTH]
    judged += [r for r in kept if r["kind"] == "top"]
    explained, judged = _once(explained, len(explained)), _once(judged, KEPT_ACTIVE)
    explained.sort(key=lambda row: -row["activation"])
    return tuple(_context(r, border) for r in explained), tuple(_context(r, border) for r in judged)


def _once(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The first rows, one place of the text only once."""
    return list({(row["window_id"], row["position"]): row for row in reversed(rows)}.values())[::-1][:most]


def _fifth(row: dict[str, Any], border: Any) -> str:
    return str(1 + int(np.searchsorted(border, row["activation"], "right")))


def _context(row: dict[str, Any], border: Any) -> Context:
    return Context(tuple(row["context_tokens"]), tuple(row["context_activations"]), _fifth(row, border))
