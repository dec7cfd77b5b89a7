"""The part of `jobs/label.py` that asks for vectors of labels, embeddings.safetensors."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtc.errors import MtcError
from mtc.storage import (
    EMBEDDINGS,
    LABELS,
    Embeddings,
    LabelTable,
    RunDirectory,
    RunError,
    embeddings_to_bytes,
    parse_embeddings,
)
from mtc.telemetry import say

if TYPE_CHECKING:
    from mtc.labels import Budget, Embedded
    from mtc.labels.embeddings import Vector

PROGRESS_SECONDS = 5.0
KEEP_SECONDS = 30.0
"""Seconds after which what is there is kept again: of a large dictionary it takes 100 MB and more."""
KEPT = f"labelling/{EMBEDDINGS}"
"""What a job has so far; no manifest names it."""


class Incomplete(MtcError):
    """Some labels have no vector; those that have one are written."""

    exit_code = 1
    event = "incomplete"


def tell_cost(options: argparse.Namespace, run: RunDirectory) -> None:
    """What the vectors cost, by estimate, those of labels that are still to be given among them."""
    from mtc.labels import labels_to_embed, vector_cost  # with torch: 3 s, which a wrong option should not cost
    from mtc.labels.estimate import A_LABEL

    model, labels = options.embedding_model, labels_to_embed(run)
    if options.model:
        by = LabelTable(run.read(LABELS)).models if run.exists(LABELS) else {}
        new = [j for j in labels if by.get(j) != options.model and (options.prefix is None or j < options.prefix)]
        labels |= {feature: f"{A_LABEL} {feature}" for feature in new}
    cost = vector_cost(labels, _known(run, model))
    say(
        "embedding_cost",
        f"{run.url}: {cost.labels:,} labels without a vector by {model}: {cost.requests:,} requests, about "
        f"{cost.tokens:,} tokens",
        url=run.url, **cost._asdict(),
    )  # fmt: skip


def embed_labels(
    options: argparse.Namespace, run: RunDirectory, budget: Budget, still_ours: Callable[[], None]
) -> Embedded:
    """Ask for the vectors that are missing, and write all; nothing is published. Raises EndpointError where the
    endpoint refuses."""
    from mtc.labels import Embedder, embed, labels_to_embed  # as above

    run.verify(("features.parquet",))
    told = kept = time.monotonic()
    latest: Callable[[], Embeddings | None] = lambda: None  # noqa: E731

    def keep() -> None:
        if (found := latest()) is not None:
            run.write(KEPT, embeddings_to_bytes(found))

    def tell(done: int, of: int, so_far: Callable[[], Embeddings | None]) -> None:
        nonlocal told, kept, latest
        latest, now = so_far, time.monotonic()
        if now - told >= PROGRESS_SECONDS or done == of:
            told = now
            still_ours()
            say(
                "progress", f"vectors: {done:,} of {of:,} labels", stage="vectors", done=done, of=of, spent=budget.spent
            )
        if now - kept >= KEEP_SECONDS:
            keep()
            kept = time.monotonic()

    key = os.environ.get(options.key_variable)
    about = (options.concurrency, options.seconds, options.attempts)
    with Embedder(options.embeddings, options.embedding_model, key, *about) as embedder:
        try:
            found = embed(labels_to_embed(run), _known(run, options.embedding_model), embedder, budget, tell)
        except BaseException:
            keep()
            raise
    still_ours()
    if found.embeddings is not None:
        run.write(EMBEDDINGS, embeddings_to_bytes(found.embeddings))
    if run.exists(KEPT):
        run.remove(KEPT)
    there = 0 if found.embeddings is None else len(found.embeddings.features)
    say(
        "embedded",
        f"{run.location(EMBEDDINGS)}: {there:,} of {found.labels:,} labels have a vector by {options.embedding_model}, "
        f"{found.asked:,} asked now for {found.tokens:,} tokens",
        url=run.location(EMBEDDINGS), vectors=there, labels=found.labels, asked=found.asked, tokens=found.tokens,
        failures=found.failures,
    )  # fmt: skip
    return found


def require_all(found: Embedded, run: RunDirectory) -> None:
    """Raises Incomplete where the endpoint gave no vector of some labels."""
    if found.failures:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in found.failures.items())
        raise Incomplete(f"{run.url}: labels without a vector: {counts}; the same command asks for them again")


def _known(run: RunDirectory, model: str) -> dict[bytes, Vector]:
    """Vectors that were asked for before, by digest of the label."""
    from mtc.labels import known_vectors  # as above

    return known_vectors(model, *(_stored(run, name) for name in (EMBEDDINGS, KEPT)))


def _stored(run: RunDirectory, name: str) -> Embeddings | None:
    """What a file has; nothing of one that is not there, or can't be read: it is asked for anew."""
    try:
        return parse_embeddings(run.read(name), run.url) if run.exists(name) else None
    except RunError as error:
        say("unreadable", f"{error}: it is made anew")
        return None
