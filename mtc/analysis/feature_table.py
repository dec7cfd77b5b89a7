"""The table of features: everything that is known of each, one row per feature, as features.parquet.

Built in columns, because a dictionary may have a hundred thousand features; `read_feature` gives one as an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mtc.analysis.copies import FoundCopies
from mtc.analysis.direction_map import direction_map
from mtc.analysis.examples import Examples, FeatureStatistics
from mtc.analysis.logits import LOGIT_BINS, LogitEffects
from mtc.analysis.massive import MassiveSums
from mtc.analysis.naming import machine_labels
from mtc.analysis.nesting import Nesting
from mtc.analysis.tally import tally
from mtc.results import Feature
from mtc.transcoder import MatryoshkaTranscoder

Array = NDArray[Any]
TOP_TOKENS = 10
NEIGHBOURS = 5
_CHUNK = 1 << 25  # cosines held at a time
_EFFECTS = pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("value", pa.float32())]))
SCHEMA = pa.schema({
    "feature": pa.int32(),
    "group": pa.int32(),
    "label": pa.string(),
    "max_activation": pa.float32(),
    "mean_activation": pa.float64(),
    "count": pa.int64(),
    "density": pa.float64(),
    "massive": pa.bool_(),
    "massive_activation": pa.float64(),
    "massive_firings": pa.float64(),
    "copy_of": pa.int32(),
    "samples": pa.int32(),
    "tokens_since_fired": pa.int64(),
    "decoder_norm": pa.float64(),
    "alignment": pa.float64(),
    "histogram": pa.list_(pa.int64()),
    "top_tokens": pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("count", pa.int32())])),
    "positive_logits": _EFFECTS,
    "negative_logits": _EFFECTS,
    "logit_histogram": pa.list_(pa.int32()),
    "neighbours": pa.list_(pa.struct([("feature", pa.int32()), ("cosine", pa.float32())])),
    "parent": pa.struct([
        ("feature", pa.int32()), ("cosine", pa.float64()), ("coactivation", pa.float64()), ("base_rate", pa.float64()),
    ]),
    "children": pa.list_(pa.int32()),
    "map_x": pa.float32(),
    "map_y": pa.float32(),
})  # fmt: skip


def features_table(
    transcoder: MatryoshkaTranscoder,
    statistics: FeatureStatistics,
    examples: Examples,
    massive: MassiveSums,
    occurrences: Array,
    effects: LogitEffects | None,
    nesting: Nesting | None,
    copies: FoundCopies | None,
) -> pa.Table:
    """The table of all features, ordered by index; columns as in SCHEMA.

    Args: occurrences [vocabulary], how often each token id occurs in the text of the examples; `effects`, `nesting` and
    `copies` are None where they were not measured.
    Raises ValueError if the statistics belong to another dictionary.
    """
    total = transcoder.num_features
    if len(statistics.count) != total:
        raise ValueError(f"statistics of {len(statistics.count)} features, but the dictionary has {total}")
    count = statistics.count
    parents = nesting.parents if nesting else None
    places = direction_map(transcoder.W_dec, count > 0)
    columns = {
        "feature": np.arange(total),
        "group": np.repeat(np.arange(len(transcoder.groups)), transcoder.shape.group_sizes),
        "label": pa.array(machine_labels(examples, occurrences, total), pa.string()),
        "max_activation": statistics.maximum,
        "mean_activation": statistics.total / np.maximum(count, 1),
        "count": count,
        "density": count / max(1, statistics.tokens),
        "massive": massive.features(statistics),
        "massive_activation": massive.activation_share(statistics),
        "massive_firings": massive.fired / np.maximum(count, 1),
        "copy_of": copies and pa.array(copies.copy_of, mask=copies.copy_of < 0),
        "samples": np.bincount(examples.feature[examples.is_top], minlength=total),
        "tokens_since_fired": transcoder.tokens_since_fired.cpu().numpy(),
        "decoder_norm": transcoder.W_dec.detach().double().norm(dim=1).cpu().numpy(),
        "alignment": alignment(transcoder),
        "histogram": _lists(np.full(total, statistics.histogram.shape[1]), pa.array(statistics.histogram.ravel())),
        "top_tokens": _top_tokens(examples, total),
        "positive_logits": _logits(examples, effects and (effects.positive_ids, effects.positive)),
        "negative_logits": _logits(examples, effects and (effects.negative_ids, effects.negative)),
        "logit_histogram": effects and _lists(np.full(total, LOGIT_BINS), pa.array(effects.counts.ravel())),
        "neighbours": _neighbours(transcoder),
        "parent": _structs(parents and {
            "feature": parents.parent, "cosine": parents.cosine, "coactivation": parents.coactivation,
            "base_rate": parents.base_rate,
        }, parents and parents.parent < 0),
        "children": _children(parents.parent if parents else np.full(total, -1)),
        "map_x": pa.array(places[:, 0], from_pandas=True),
        "map_y": pa.array(places[:, 1], from_pandas=True),
    }  # fmt: skip
    arrays = []
    for field in SCHEMA:
        column = columns[field.name]
        arrays.append(pa.nulls(total, field.type) if column is None else pa.array(column).cast(field.type))
    return pa.table(arrays, schema=SCHEMA)


def features_to_parquet(table: pa.Table) -> bytes:
    """The table of features as a Parquet file with row groups of a few hundred features, so that one reads without the
    rest."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=512, compression="zstd")
    return bytes(sink.getvalue())


def read_feature(table: pa.Table, feature: int) -> Feature:
    """One row of the table of features as an object."""
    return Feature.model_validate(table.slice(feature, 1).to_pylist()[0])


def label_of(table: pa.Table, feature: int) -> str | None:
    """The label of a feature; None without samples."""
    label: str | None = table["label"][feature].as_py()
    return label


@torch.no_grad()
def alignment(transcoder: MatryoshkaTranscoder) -> Array | None:
    """[features] cosines between encoder and decoder rows; None if they live in spaces of different width."""
    if transcoder.shape.d_source != transcoder.shape.d_target:
        return None
    encoder, decoder = transcoder.W_enc.double(), transcoder.W_dec.double()
    return torch.nn.functional.cosine_similarity(encoder, decoder, dim=1).cpu().numpy()


def _top_tokens(examples: Examples, total: int) -> pa.Array:
    found = tally(examples.feature[examples.is_top], examples.token_id[examples.is_top])
    kept = found.place < TOP_TOKENS  # examples come in the order of strength: of equals the strongest's comes first
    feature, token, count = found.group[kept], found.value[kept], found.times[kept]
    structs = _structs({"token_id": token, "token": _texts(examples, token), "count": count})
    return _lists(np.bincount(feature, minlength=total), structs)


def _logits(examples: Examples, effects: tuple[Array, Array] | None) -> pa.Array | None:
    if effects is None:
        return None
    ids, values = effects
    structs = _structs({"token_id": ids.ravel(), "token": _texts(examples, ids.ravel()), "value": values.ravel()})
    return _lists(np.full(len(ids), ids.shape[1]), structs)


def _texts(examples: Examples, token_ids: Array) -> pa.Array:
    unique, which = np.unique(token_ids, return_inverse=True)
    return pa.array([examples.token(int(t)) for t in unique], pa.string()).take(pa.array(which))


@torch.no_grad()
def _neighbours(transcoder: MatryoshkaTranscoder) -> pa.Array:
    rows = transcoder.W_dec
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    total = len(unit)
    k = min(NEIGHBOURS, total - 1)
    step = max(1, _CHUNK // total)
    ids, values = [], []
    for a in range(0, total, step):
        cosine = unit[a : a + step] @ unit.T
        cosine[torch.arange(len(cosine)), torch.arange(a, a + len(cosine))] = -2  # itself
        nearest = cosine.topk(k, dim=1)
        ids.append(nearest.indices.cpu().numpy())
        values.append(nearest.values.cpu().numpy())
    structs = _structs({"feature": np.concatenate(ids).ravel(), "cosine": np.concatenate(values).ravel()})
    return _lists(np.full(total, k), structs)


def _children(parent: Array) -> pa.Array:
    has = np.flatnonzero(parent >= 0)
    order = np.argsort(parent[has], kind="stable")
    return _lists(np.bincount(parent[has], minlength=len(parent)), pa.array(has[order]))


def _lists(lengths: Array, values: pa.Array) -> pa.Array:
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _structs(columns: dict[str, Any] | None, mask: Array | None = None) -> pa.Array | None:
    if columns is None:
        return None
    arrays: Sequence[pa.Array] = [pa.array(c) for c in columns.values()]
    return pa.StructArray.from_arrays(arrays, list(columns), mask=None if mask is None else pa.array(mask))
