"""A run's files with planted features: each fires on the words that are given, and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mtc.analysis import features_to_parquet
from mtc.analysis.contexts import ContextCollector, contexts_to_parquet
from mtc.analysis.examples import ExampleCollector
from mtc.analysis.feature_table import SCHEMA
from mtc.analysis.token_sums import SparseActivations
from mtc.language_model import pack_windows
from mtc.storage import RunDirectory
from mtc.text import TokenTexts
from tests.strangers.tokenizers_as_they_come import named

WORDS = [
    "apple", "banana", "cherry", "damson", "elder", "fig", "grape", "hazel", "iris", "juniper", "kiwi", "lemon",
    "mango", "nectar", "olive", "papaya", "quince", "rose", "sorrel", "thyme", "umber", "violet", "walnut",
    "yarrow", "zinnia", "aster", "birch", "cedar", "daisy", "elm", "fir", "gorse", "heath", "ivy", "jade", "knot",
    "lilac", "maple", "nettle", "oak", "pine", "reed", "sage", "tansy",
]  # fmt: skip
BOS, TOKENS, WINDOWS, WIDTH = 0, 24, 400, 13


def write_planted(
    directory: Path,
    fires_on: Sequence[Sequence[str]],
    parents: Mapping[int, int] | None = None,
    seed: int = 0,
    texts: Mapping[str, str] | None = None,
    windows: int = WINDOWS,
) -> RunDirectory:
    """Write features.parquet, examples.parquet and contexts.parquet of features that fire on words; `texts` shows some
    words as another text."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 1 + len(WORDS), (windows, TOKENS)).astype(np.int32)
    ids[:, 0] = BOS
    tokens = TokenTexts(named(lambda i: (texts or {}).get(WORDS[i - 1], f" {WORDS[i - 1]}"), 1 + len(WORDS)))
    index = {word: i for i, word in enumerate(WORDS, 1)}
    strength = rng.uniform(0.5, 4.0, (windows, TOKENS, len(fires_on))).astype(np.float32)
    fires = np.stack([np.isin(ids, [index[word] for word in words]) for words in fires_on], -1)
    dense = (strength * fires)[:, 1:].reshape(-1, len(fires_on))
    feature, token = np.nonzero(dense.T)
    sparse = SparseActivations(feature, token, dense[token, feature])
    examples = ExampleCollector(len(fires_on), 40, 20, WIDTH - 1, 0.1)
    contexts = ContextCollector(np.arange(windows), WIDTH)
    for collector in (examples, contexts):
        collector.add(np.arange(windows), pack_windows(list(ids), [BOS]), sparse)
    about = (lambda w: [ids[i] for i in w], [BOS], lambda w: [f"d{i}" for i in w], tokens)
    found = examples.examples(*about)
    parents = parents or {}
    rows = [
        {name: None for name in SCHEMA.names}
        | {
            "feature": j, "group": int(j in parents), "count": int((dense[:, j] > 0).sum()),
            "max_activation": float(dense[:, j].max()), "samples": int((found.feature[found.is_top] == j).sum()),
            "label": f"' {words[0]}' (100 %)" if words else None,
            "top_tokens": [{"token_id": index[w], "token": f" {w}", "count": 1} for w in words],
            "neighbours": [], "parent": {"feature": parents[j]} if j in parents else None,
            "children": [c for c, p in parents.items() if p == j],
        }
        for j, words in enumerate(fires_on)
    ]  # fmt: skip
    run = RunDirectory(str(directory))
    run.write(
        "features.parquet",
        features_to_parquet(pa.Table.from_pylist(rows, SCHEMA)),
    )
    run.write("examples.parquet", found.to_parquet())
    run.write("contexts.parquet", contexts_to_parquet(contexts.table(*about)))
    return run
