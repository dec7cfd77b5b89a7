"""Sparse probing: how much of a label can be read from a few features, beside the activations they are computed from.

After Gurnee et al. 2023, arXiv:2305.01610, and Kantamneni et al. 2025 (sae-probes), arXiv:2502.16681. Each example, a
window of a text, is pooled over its tokens. On the training part, the k dimensions with the largest difference of class
means are chosen and a logistic regression is fitted to them, its L2 penalty chosen by cross-validation; the area under
the ROC curve (AUC) is measured on the test part. The same is done with the source activations, all of them and their
best k dimensions. Unlike in sae-probes, copies of a text, and texts of one group, lie on one side of the split, and
texts that the transcoder was trained on are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtc.analysis import interval, resample
from mtc.analysis.intervals import Array
from mtc.language_model import pack_windows
from mtc.probing.linear_probes import FOLDS, auc, fit_probe, grouped_folds, rank_dimensions
from mtc.probing.tasks import Labelled, load_task
from mtc.results import Pooling, ProbeResult, ProbeTask, Probing, TaskResult
from mtc.text import document_id, make_windows, special_ids, token_batches

if TYPE_CHECKING:
    import torch

    from mtc.language_model import LanguageModel
    from mtc.text import TokenStore
    from mtc.transcoder import MatryoshkaTranscoder

KS = (1, 2, 4, 8, 16)
SIDES = 3
"""Parts that a task's groups are cut into, one of which is the test part."""
MIN_GROUPS = 15
"""Fewest groups that each class must have for a task to be split."""
MIN_TEST_GROUPS = 5
"""Fewest groups that each class must have on the test side: groups may be of very different size, and whole ones are
moved."""


class Pooled(NamedTuple):
    """Examples of a task, each pooled over the tokens of a window."""

    dense: Array
    """[examples, d_source] float32, pooled raw source activations."""
    features: Array
    """[examples, features] float32, pooled feature activations."""


def trained_documents(store: TokenStore, tasks: Sequence[ProbeTask]) -> frozenset[str]:
    """Ids of those texts of these tasks that a run with this token store may have trained on."""
    names = {document_id(text) for task in tasks for text in load_task(task).texts}
    return store.known_documents("train", names)


def probe(
    language_model: LanguageModel,
    transcoder: MatryoshkaTranscoder,
    tasks: Sequence[ProbeTask],
    tokenizer: Any,
    *,
    trained: Collection[str] = (),
    at: int = 0,
    ks: Sequence[int] = KS,
    pooling: Pooling = "mean",
    context_length: int = 128,
    max_texts: int = 1000,
    unit_tokens: int = 4096,
    seed: int = 0,
) -> Probing:
    """Probe every task, in this process, on the language model's device.

    `trained` are ids (`mtc.text.document_id`) of texts to leave out, see `trained_documents`; `at` is the entry of the
    model's `config.sites` that the transcoder reads; `max_texts` of a task are used, half of each class where there are
    as many. Memory holds the pooled examples of a task and the activations of `unit_tokens` tokens. Raises DataError if
    a task cannot be read, before any work.
    """
    transcoder = transcoder.to(language_model.device)
    results = []
    for task, labelled in [(task, load_task(task)) for task in tasks]:
        unseen = [i for i, text in enumerate(labelled.texts) if document_id(text) not in trained]
        chosen = _balanced(labelled, unseen, max_texts, seed)
        counts: dict[str, Any] = {
            "task": task,
            "texts": len(labelled.texts),
            "dropped": labelled.dropped,
            "trained_texts": len(labelled.texts) - len(unseen),
            "used_texts": len(chosen),
        }
        groups, positive = np.array(labelled.groups)[chosen], labelled.positive[chosen]
        if reason := too_few(positive, groups):
            results.append(TaskResult(**counts, not_measured=reason))
            continue
        windows = [
            (np.array(ids, np.int32), i)
            for i in chosen
            for ids in text_windows(labelled.texts[i], tokenizer, context_length, task.windows_per_text)
        ]
        texts = np.array([i for _, i in windows], np.int64)
        if reason := too_few(labelled.positive[texts], np.array(labelled.groups)[texts]):
            results.append(TaskResult(**counts, not_measured=reason))
            continue
        pooled = pool(
            language_model, transcoder, [w for w, _ in windows], special_ids(tokenizer), pooling, unit_tokens, at
        )
        measured = measure_task(
            pooled, labelled.positive[texts], np.array(labelled.groups)[texts], transcoder.prefixes, ks, seed
        )
        results.append(TaskResult(**counts, **measured))
    site = language_model.config.sites[at]
    return Probing(
        layer=site.layer,
        source=site.source,
        pooling=pooling,
        context_length=context_length,
        ks=tuple(ks),
        prefixes=transcoder.prefixes,
        tasks=tuple(results),
    )


def too_few(positive: Array, groups: Array) -> str | None:
    """Why texts with these classes [texts] bool and groups [texts] cannot be split, or None."""
    for name, side in (("positive", positive), ("negative", ~positive)):
        found = len(np.unique(groups[side]))
        if found < MIN_GROUPS:
            return f"the {name} class has {found} separate groups of texts to probe, at least {MIN_GROUPS} are needed"
    return None


def measure_task(
    pooled: Pooled, positive: Array, groups: Array, prefixes: Sequence[int], ks: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """The measured fields of a TaskResult, from pooled examples with `positive` [examples] bool and `groups`
    [examples]."""
    train, test = grouped_folds(positive, groups, SIDES, seed)[0]
    for rows, least, where in ((train, FOLDS, "training"), (test, MIN_TEST_GROUPS, "test")):
        found = min(len(np.unique(groups[rows][positive[rows] == side])) for side in (True, False))
        if found < least:
            return {"not_measured": f"a class has {found} groups in the {where} part, at least {least} are needed"}
    folds = grouped_folds(positive[train], groups[train], FOLDS, seed)
    weights = resample(groups[test], seed=seed)
    baseline: tuple[float, Array] | None = None

    def judge(x: Array, prefix: int | None, dimensions: Array | None) -> ProbeResult:
        nonlocal baseline
        x = x if dimensions is None else x[:, dimensions]
        fitted = fit_probe(x[train], positive[train], folds)
        scores = fitted.scores(x[test])
        value, resampled = float(auc(scores, positive[test])), auc(scores, positive[test], weights)
        baseline = baseline or (value, resampled)
        return ProbeResult(
            prefix=prefix,
            k=None if dimensions is None else len(dimensions),
            dimensions=() if dimensions is None else tuple(dimensions.tolist()),
            auc=interval(value, resampled),
            accuracy=float(((scores > 0) == positive[test]).mean()),
            beyond_dense=interval(value - baseline[0], resampled - baseline[1]),
            strength=fitted.strength,
        )

    def best(x: Array, prefix: int | None) -> list[ProbeResult]:
        order = rank_dimensions(x[train], positive[train])
        return [judge(x, prefix, order[:k]) for k in ks if k <= len(order)]

    dense = judge(pooled.dense, None, None)
    majority = positive[train].mean() > 0.5
    return {
        "train_examples": len(train),
        "test_examples": len(test),
        "test_groups": len(np.unique(groups[test])),
        "majority_accuracy": float((positive[test] == majority).mean()),
        "dense": dense,
        "dense_sparse": tuple(best(pooled.dense, None)),
        "sparse": tuple(result for m in prefixes for result in best(pooled.features[:, :m], m)),
    }


def text_windows(text: str, tokenizer: Any, context_length: int, count: int) -> list[list[int]]:
    """`count` windows of a text, evenly spread, or all if it has fewer; if one is wanted, the last `context_length`.

    Empty for a text without two trainable tokens.
    """
    windows = make_windows(text, tokenizer, context_length)
    if count == 1 and len(windows) > 1:
        first = 0 if tokenizer.bos_token_id is None else 1
        ids = [i for window in windows for i in window[first:]]
        return [windows[0][:first] + ids[-(context_length - first) :]]
    if count >= len(windows):
        return windows
    return [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]


def pool(
    language_model: LanguageModel,
    transcoder: MatryoshkaTranscoder,
    windows: Sequence[Array],
    special: Sequence[int],
    pooling: Pooling,
    unit_tokens: int = 4096,
    at: int = 0,
) -> Pooled:
    """Read `windows` of token ids and pool each over its tokens that are not `special`, of which it must have one.

    Raises ValueError if an activation is not finite.
    """
    import torch

    dense = np.empty((len(windows), transcoder.shape.d_source), np.float32)
    features = np.empty((len(windows), transcoder.num_features), np.float32)
    for rows in token_batches([len(window) for window in windows], unit_tokens):
        packed = pack_windows([windows[i] for i in rows], special)
        source = language_model.capture(packed, packed.trainable.nonzero().squeeze(1))[at].source.float()
        if not bool(source.isfinite().all()):
            raise ValueError("source activations are not finite")
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(packed.lengths))[packed.trainable]
        owner = owner.to(source.device)
        with torch.inference_mode():
            activations = transcoder.encode(source)
        for values, pooled in ((source, dense), (activations, features)):
            pooled[rows] = _pool_rows(values, owner, len(rows), pooling).cpu().numpy()
    return Pooled(dense, features)


def _pool_rows(values: torch.Tensor, owner: torch.Tensor, count: int, pooling: Pooling) -> torch.Tensor:
    """Rows [tokens, d] of windows `owner` [tokens], in order, pooled over each window: [count, d]."""
    import torch

    tokens = torch.bincount(owner, minlength=count)
    if pooling == "last":
        return values[tokens.cumsum(0) - 1]
    if pooling == "max":
        empty = values.new_full((count, values.shape[1]), -torch.inf)
        return empty.scatter_reduce(0, owner.unsqueeze(1).expand_as(values), values, "amax")
    return values.new_zeros(count, values.shape[1]).index_add(0, owner, values) / tokens.unsqueeze(1)


def _balanced(labelled: Labelled, texts: list[int], most: int, seed: int) -> list[int]:
    """At most `most` of the texts in random order, half of each class where there are as many."""
    order = np.random.default_rng(seed).permutation(texts).astype(np.int64)
    sides = [order[labelled.positive[order] == label] for label in (True, False)]
    return np.sort(np.concatenate([side[: most // 2] for side in sides])).tolist()
