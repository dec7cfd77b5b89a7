"""An OpenAI-compatible endpoint (`POST .../chat/completions`) as something that answers questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mtc.labels.prompts import Question
from mtc.labels.transport import Known, MayPass, Transport, Unusable, tokens_of

logger = logging.getLogger(__name__)
TOP_LOGPROBS = 20
OPTIONAL = ("temperature", "max_tokens", "logprobs", "top_logprobs")
"""Fields of a question that are left out once an endpoint refuses them; it says which."""


class Answer(NamedTuple):
    """What came of a question."""

    text: str
    """The answer; empty where there is a failure."""
    failure: str | None
    """Why there is none, in a word or two."""
    prompt_tokens: int
    """Tokens of the prompt, as the endpoint counted them; estimated if it did not."""
    answer_tokens: int
    """Tokens of the answer."""
    logprobs: list[dict[str, Any]] | None = None
    """Tokens of the answer with the log-probabilities of what might have stood there, as the endpoint gave them."""
    time: str = ""
    """When it came, ISO 8601, UTC."""


Asking = Question | Known[Question, Answer] | None
"""What is to be asked next: a question, one that needs no asking and is handed through, or None while nothing can be
asked before another answer is there."""


class Endpoint:
    """Asks a model of an endpoint, for as long as it is used as a context.

    Args:
        url, key, concurrency, seconds, attempts, first_pause: as of Transport.
        thinking_tokens: tokens that a model may spend before its answer, beside the answer's own.
        keep: is called with every answer as soon as it is there, from any thread.
    """

    def __init__(
        self, url: str, model: str, key: str | None = None, concurrency: int = 16, seconds: float = 120.0,
        attempts: int = 6, first_pause: float = 1.0, thinking_tokens: int = 0,
        keep: Callable[[Question, Answer], None] | None = None,
    ):  # fmt: skip
        self.model, self.thinking_tokens, self._keep = model, thinking_tokens, keep
        self._transport = Transport(url, "/chat/completions", key, concurrency, seconds, attempts, first_pause)
        self._left_out: set[str] = set()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._transport.__exit__(*exception)

    def answers(self, questions: Iterable[Asking]) -> Iterator[tuple[Question, Answer]]:
        """See Transport.stream and `mtc.labels.labelling.Asked`."""
        return self._transport.stream(questions, self._ask)

    def _ask(self, question: Question) -> Answer:
        found = self._transport.patiently(lambda: self._answer(question), tokens_of(question.text))
        if found.answer is None:
            return Answer("", found.failure, found.broken, 0)
        answer = found.answer._replace(prompt_tokens=found.answer.prompt_tokens + found.broken)
        if self._keep is not None:
            self._keep(question, answer)
        return answer

    def _answer(self, question: Question) -> Answer:
        asked = self._body(question)
        try:
            return _read(question, self._transport.post(asked))
        except Unusable as error:
            refused = [name for name in OPTIONAL if name in asked and name.encode() in error.content]
            if error.status == 400 and refused:
                self._left_out |= set(refused)  # newer models take no temperature, and call the limit otherwise
                return self._answer(question)
            logger.warning("feature %d, %s: %s: %s", question.feature, question.kind, error, error.said)
            raise

    def _body(self, question: Question) -> dict[str, Any]:
        limit = question.answer_tokens + self.thinking_tokens
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question.text}]}
        body |= {"temperature": 0, "max_tokens": limit}
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if question.logprobs else {}
        body |= {"max_completion_tokens": limit} if "max_tokens" in self._left_out else {}
        return {name: value for name, value in body.items() if name not in self._left_out}


def _read(question: Question, body: bytes) -> Answer:
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        usage = answer.get("usage") or {}
        prompt, answered = usage.get("prompt_tokens"), usage.get("completion_tokens")
        logprobs = (choice.get("logprobs") or {}).get("content")
        if not isinstance(text, str) or not isinstance(logprobs, list | None):
            raise TypeError("text is wanted")
        logprobs = logprobs and slim(logprobs)
        failure = "refused" if choice.get("finish_reason") == "content_filter" else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise MayPass("unreadable", sent=True) from None
    prompt = prompt if isinstance(prompt, int) else tokens_of(question.text)
    answered = answered if isinstance(answered, int) else tokens_of(text)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Answer("" if failure else text, failure, prompt, answered, logprobs, now)


def slim(logprobs: Iterable[Any]) -> list[dict[str, Any]]:
    """Log-probabilities as an endpoint gives them, but only of those tokens that are numbers, without all else."""
    return [
        {
            "token": str(each["token"]),
            "top_logprobs": [
                {"token": str(other["token"]), "logprob": float(other["logprob"])}
                for other in each.get("top_logprobs") or ()
                if str(other["token"]).strip().isdigit()
            ],
        }
        for each in logprobs
        if str(each["token"]).strip().isdigit()
    ]
