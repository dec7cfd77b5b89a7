"""Vectors of a run's labels, for search by meaning: asked of an OpenAI-compatible endpoint, each label once.

A label is known by its digest: one that several features share, that another feature had, or that was asked before is
not asked again; one that has changed is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.labels.budget import Budget
from mtc.labels.prompts import cut
from mtc.labels.transport import GIVEN_UP, EndpointError, MayPass, Transport, tokens_of
from mtc.storage import Embeddings, RunDirectory, label_digest, read_features
from mtc.vectors import LARGEST, PATH, UnusableVectors, question, read_vectors

BATCH = 64
"""Most labels of one request."""
Vector = NDArray[np.float16]


class Texts(NamedTuple):
    """Labels of one request."""

    texts: tuple[str, ...]
    """The labels, each once."""

    @property
    def text(self) -> str:
        """All of them, as far as their cost goes."""
        return "\n".join(self.texts)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, which costs none."""
        return 0


class Vectors(NamedTuple):
    """What came of a request."""

    found: dict[str, NDArray[np.float32]]
    """By label its vector, [dimensions] of length 1."""
    failures: dict[str, int]
    """Labels without one, by the reason in a few words."""
    prompt_tokens: int
    """Tokens of the labels, as the endpoint counted them; estimated if it did not."""
    answer_tokens: int = 0
    """Tokens of the answer, which costs none."""

    @property
    def failure(self) -> str | None:
        """Why there are none at all."""
        return None if self.found else next(iter(self.failures), None)


class VectorCost(NamedTuple):
    """What the vectors that are missing cost, by estimate."""

    labels: int
    """Labels to ask for."""
    requests: int
    """Requests about them."""
    tokens: int
    """Their tokens, at four characters each."""


class Embedded(NamedTuple):
    """What there is now."""

    embeddings: Embeddings | None
    """Vectors of all labels that have one; None if none has."""
    labels: int
    """Features with a label."""
    asked: int
    """Labels that were asked now and have a vector."""
    tokens: int
    """Tokens that were spent now."""
    failures: dict[str, int]
    """Labels without a vector, by reason."""
    finished: bool
    """Whether all were asked."""


class Embedder:
    """Asks for vectors, for as long as it is used as a context; the arguments are those of Endpoint."""

    def __init__(
        self, url: str, model: str, key: str | None = None, concurrency: int = 16, seconds: float = 120.0,
        attempts: int = 6, first_pause: float = 1.0,
    ):  # fmt: skip
        self.model = model
        self._transport = Transport(url, PATH, key, concurrency, seconds, attempts, first_pause, LARGEST)
        self._answered, self._refused = False, 0

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._transport.__exit__(*exception)

    @property
    def shown(self) -> str:
        """The address that is asked."""
        return self._transport.shown

    def vectors(self, batches: Iterable[Texts | None]) -> Iterator[tuple[Texts, Vectors]]:
        """See Transport.stream."""
        return self._transport.stream(batches, self._ask)

    def _ask(self, batch: Texts) -> Vectors:
        """The vectors of a request; of one that is refused those of its halves, until only what the endpoint does not
        take has none."""
        cost, size = tokens_of(batch.text), len(batch.texts)
        found = self._transport.patiently(lambda: self._attempt(batch), cost)
        if found.answer is not None:
            self._answered = True
            vectors, tokens = found.answer
            spent = (cost if tokens is None else tokens) + found.broken
            return Vectors(dict(zip(batch.texts, vectors, strict=True)), {}, spent)
        failure = found.failure or ""
        if not found.refused or self._transport.ended:
            return Vectors({}, {failure: size}, found.broken)
        if size == 1:
            self._refused += 1
            if self._refused >= GIVEN_UP and not self._answered:  # it is not the labels
                raise self._transport.given_up(self._refused, failure)
            return Vectors({}, {failure: 1}, found.broken)
        halves = batch.texts[: size // 2], batch.texts[size // 2 :]
        one, other = (self._ask(Texts(half)) for half in halves)
        failures = Counter(one.failures) + Counter(other.failures)
        spent = one.prompt_tokens + other.prompt_tokens + found.broken
        return Vectors(one.found | other.found, dict(failures), spent)

    def _attempt(self, batch: Texts) -> tuple[NDArray[np.float32], int | None]:
        content = self._transport.post(question(self.model, [cut(text) for text in batch.texts]))
        try:
            return read_vectors(content, len(batch.texts))
        except UnusableVectors as error:
            raise MayPass(str(error), sent=True) from None


def labels_to_embed(run: RunDirectory) -> dict[int, str]:
    """What a run's features are called, by feature: a language model's label, else that of rules."""
    labels = read_features(run, ["feature", "label"])["label"].to_pylist()
    return {feature: label for feature, label in enumerate(labels) if label is not None and cut(label)}


def known_vectors(model: str, *stored: Embeddings | None) -> dict[bytes, Vector]:
    """By digest of the label those of some files that this model made, the later files' first."""
    return {
        digest.tobytes(): vector
        for each in stored if each is not None and each.model == model
        for digest, vector in zip(each.digests, each.vectors, strict=True)
    }  # fmt: skip


def vector_cost(labels: Mapping[int, str], known: Mapping[bytes, Vector]) -> VectorCost:
    """What `embed` will ask for."""
    batches = _batches(labels, known)
    return VectorCost(sum(len(b.texts) for b in batches), len(batches), sum(tokens_of(b.text) for b in batches))


def embed(
    labels: Mapping[int, str], known: Mapping[bytes, Vector], embedder: Embedder, budget: Budget,
    tell: Callable[[int, int, Callable[[], Embeddings | None]], None] = lambda done, of, found: None,
) -> Embedded:  # fmt: skip
    """Ask for the vectors of all labels that are not `known`; `tell` hears after each request how many labels are done,
    and can ask what there is. Raises EndpointError where that can't be gone on with."""
    found, failures, tokens, asked = dict(known), Counter[str](), 0, 0
    batches = _batches(labels, known)
    of = sum(len(batch.texts) for batch in batches)

    def so_far() -> Embeddings | None:
        return _as_embeddings(embedder.model, labels, found)

    for batch, answer in embedder.vectors(_within(batches, budget)):
        budget.settle(batch, answer)
        tokens += answer.prompt_tokens
        failures.update(answer.failures)
        for text, vector in answer.found.items():
            there = len(next(iter(found.values()), vector))
            if len(vector) != there:
                raise EndpointError(
                    f"{embedder.shown} gives vectors of {len(vector)} dimensions, earlier ones of {embedder.model} "
                    f"have {there}: another model goes by this name now; remove embeddings.safetensors and "
                    "labelling/embeddings.safetensors, or name another"
                )
            found[label_digest(text)] = vector.astype(np.float16)
        if answer.failure:
            continue
        asked += len(answer.found)
        tell(asked, of, so_far)
    return Embedded(so_far(), len(labels), asked, tokens, dict(failures.most_common()), not budget.exhausted)


def _batches(labels: Mapping[int, str], known: Mapping[bytes, Vector]) -> list[Texts]:
    new = [label for label in dict.fromkeys(labels.values()) if label_digest(label) not in known]
    return [Texts(tuple(new[start : start + BATCH])) for start in range(0, len(new), BATCH)]


def _within(batches: Iterable[Texts], budget: Budget) -> Iterator[Texts | None]:
    """As many as the budget allows; None while none fits beside those that are asked."""
    for batch in batches:
        while budget.fits(batch):
            if budget.take(batch):
                yield batch
                break
            yield None


def _as_embeddings(model: str, labels: Mapping[int, str], found: Mapping[bytes, Vector]) -> Embeddings | None:
    digests = {feature: label_digest(label) for feature, label in labels.items()}
    rows = [(feature, digest) for feature, digest in digests.items() if digest in found]
    if not rows:
        return None
    return Embeddings(
        model,
        np.array([feature for feature, _ in rows], np.int32),
        np.frombuffer(b"".join(digest for _, digest in rows), np.uint8).reshape(len(rows), -1),
        np.stack([found[digest] for _, digest in rows]),
    )
