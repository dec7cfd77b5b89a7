"""An OpenAI-compatible endpoint (`POST .../chat/completions`) as something that answers questions.

Threads wait for the answers: a few dozen at once cost nothing, and every wait ends at a deadline. What may pass is
asked again after growing pauses, not before the endpoint's own Retry-After; what is wrong for good ends the job.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx
import tenacity

from mtc.errors import MtcError, one_line
from mtc.labels.prompts import Question

logger = logging.getLogger(__name__)
LARGEST = 4_000_000
"""Bytes above which an answer is not read to its end."""
PASSING = (408, 425, 429)
"""Refusals that may be over later."""
LONGEST_PAUSE = 60.0
TOP_LOGPROBS = 20
GIVEN_UP = 20
"""Questions in a row without an answer after which the endpoint is given up: what is done is kept."""
OPTIONAL = ("temperature", "max_tokens", "logprobs", "top_logprobs")
"""Fields of a question that are left out once an endpoint refuses them; it says which."""
BYTES_PER_TOKEN = 4.0
"""Of English text, by and large; for estimates, and for endpoints that do not count."""


class EndpointError(MtcError):
    """The endpoint refuses for good: wrong key, model or address; or it answers nothing that can be used."""


class EndpointDown(EndpointError):
    """The endpoint does not answer; later it may do, and the job goes on where it was."""

    exit_code = 1
    event = "failed"


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


class Known(NamedTuple):
    """A question whose answer is there already."""

    question: Question
    """The question."""
    answer: Answer
    """Its answer."""


Asking = Question | Known | None
"""What is to be asked next: a question, one that needs no asking and is handed through, or None while nothing can be
asked before another answer is there."""
END = object()


class _MayPass(Exception):
    """An attempt that may succeed when it is repeated."""

    def __init__(self, failure: str, after: float = 0.0, sent: bool = False):
        super().__init__(failure)
        self.after = after
        """Seconds before which it is not to be repeated."""
        self.sent = sent
        """Whether the endpoint had the whole question, and may ask money for it."""


class _Unusable(Exception):
    """A question that this endpoint does not answer, however often it is asked."""


class Endpoint:
    """Asks a model of an endpoint, for as long as it is used as a context.

    Args:
        url: what OpenAI's clients call the base URL: `http://host:8000/v1`.
        key: for the Authorization header; None sends none.
        seconds: deadline of one attempt.
        attempts: most attempts of one question.
        first_pause: seconds that the pause after the first attempt is at most.
        thinking_tokens: tokens that a model may spend before its answer, beside the answer's own.
        keep: is called with every answer as soon as it is there, from any thread.
    """

    def __init__(
        self, url: str, model: str, key: str | None = None, concurrency: int = 16, seconds: float = 120.0,
        attempts: int = 6, first_pause: float = 1.0, thinking_tokens: int = 0,
        keep: Callable[[Question, Answer], None] | None = None,
    ):  # fmt: skip
        self.thinking_tokens = thinking_tokens
        self.model, self.concurrency, self.seconds, self.attempts = model, concurrency, seconds, attempts
        self.first_pause = first_pause
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._url = url.rstrip("/") + "/chat/completions"
        self._shown = re.sub(r"//[^/@]*@", "//", self._url).partition("?")[0]
        self._key, self._keep = key, keep
        self._client = httpx.Client(headers=headers, limits=limits, timeout=seconds)
        self._stop = threading.Event()
        self._left_out: set[str] = set()
        self._answered, self._refusal = False, ""

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._client.close()

    def answers(self, questions: Iterable[Asking]) -> Iterator[tuple[Question, Answer]]:
        """The answers as they come, `concurrency` questions being asked at a time; see `mtc.labels.labelling.Asked`.
        Raises EndpointError if the endpoint refuses for good, or gives no answer any more."""
        waiting: dict[Future[Answer], Question] = {}
        source, silent, ended = iter(questions), 0, False
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while not ended or waiting:
                    while not ended and len(waiting) < self.concurrency:
                        item = next(source, END)
                        if item is None:
                            break
                        if isinstance(item, Known):
                            yield item
                        elif isinstance(item, Question):
                            waiting[pool.submit(self._ask, item)] = item
                        else:
                            ended = True
                    if not waiting:
                        continue
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda each: each.exception() is not None):  # answers come first
                        question, answer = waiting.pop(future), future.result()
                        silent = silent + 1 if answer.failure else 0
                        yield question, answer
                        if silent >= GIVEN_UP:
                            raise self._given_up(silent, answer)
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stop.clear()

    def _given_up(self, silent: int, answer: Answer) -> EndpointError:
        text = f"{self._shown}: {silent} questions in a row without an answer, the last: {answer.failure}"
        passing = [f"status {status}" for status in PASSING]
        if (answer.failure or "").startswith("status 4") and answer.failure not in passing:
            return EndpointError(f"{text}: {self._refusal}")
        return EndpointDown(f"{text}; the same command goes on where this one ends")

    def _ask(self, question: Question) -> Answer:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_MayPass),
            wait=self._pause,
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.attempts), tenacity.stop_when_event_set(self._stop)
            ),
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        broken: list[int] = []
        try:
            answer = retrying(self._attempt, question, broken)
        except (_MayPass, _Unusable) as error:
            return Answer("", str(error), sum(broken), 0)
        answer = answer._replace(prompt_tokens=answer.prompt_tokens + sum(broken))
        if self._keep is not None:
            self._keep(question, answer)
        return answer

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Full jitter, and never before the endpoint's own word."""
        pause = tenacity.wait_random_exponential(multiplier=self.first_pause, max=LONGEST_PAUSE)(state)
        error = state.outcome.exception() if state.outcome else None
        return max(pause, error.after) if isinstance(error, _MayPass) else pause

    def _attempt(self, question: Question, broken: list[int]) -> Answer:
        """One attempt; what it costs although nothing comes of it is added to `broken`, in tokens."""
        try:
            return self._answer(question)
        except _MayPass as error:
            if error.sent:
                broken.append(tokens_of(question.text))
            raise

    def _answer(self, question: Question) -> Answer:
        asked = self._body(question)
        status, headers, body = self._post(asked)
        if status == 400 and (refused := [n for n in OPTIONAL if n in asked and n.encode() in body]):
            self._left_out |= set(refused)  # newer models of OpenAI's take no temperature, and call the limit otherwise
            return self._answer(question)
        if status in PASSING or status >= 500:
            raise _MayPass(f"status {status}", _retry_after(headers))
        said = self._message(body)
        # A prompt that a filter does not like gets a 403 as well.
        if status in (401, 404, 405) or 300 <= status < 400 or (status == 403 and not self._answered):
            raise EndpointError(f"{self._shown} answers {status}: {said}{_advice(status)}")
        if status >= 400:  # such as a prompt that is too long for the model
            logger.warning("feature %d, %s: status %d: %s", question.feature, question.kind, status, said)
            self._refusal = said
            raise _Unusable(f"status {status}")
        answer = _read(question, body)
        self._answered = True
        return answer

    def _body(self, question: Question) -> dict[str, Any]:
        limit = question.answer_tokens + self.thinking_tokens
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": question.text}]}
        body |= {"temperature": 0, "max_tokens": limit}
        body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if question.logprobs else {}
        body |= {"max_completion_tokens": limit} if "max_tokens" in self._left_out else {}
        return {name: value for name, value in body.items() if name not in self._left_out}

    def _message(self, body: bytes) -> str:
        """What the endpoint says is wrong, in short, and without the key."""
        text = _message(body)
        return text.replace(self._key, "…") if self._key else text

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; raises _MayPass for an answer that does not come, or not whole, in time."""
        begun, content = time.monotonic(), bytearray()
        try:
            with self._client.stream("POST", self._url, json=body) as answer:
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > LARGEST:
                        raise _Unusable("too long")
                    if time.monotonic() - begun > self.seconds:
                        raise _MayPass("too slow", sent=True)
                return answer.status_code, answer.headers, bytes(content)
        except httpx.TimeoutException:
            raise _MayPass("too slow", sent=True) from None
        except httpx.UnsupportedProtocol as error:
            raise EndpointError(f"{self._shown}: {error}; http:// or https:// is wanted") from None
        except httpx.ConnectError:
            raise _MayPass("unreachable") from None
        except (httpx.HTTPError, httpx.StreamError):
            raise _MayPass("cut off", sent=True) from None


def tokens_of(text: str) -> int:
    """About how many tokens a text has."""
    return int(len(text.encode()) / BYTES_PER_TOKEN) + 1


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
        raise _MayPass("unreadable", sent=True) from None
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


def _retry_after(headers: httpx.Headers) -> float:
    try:
        return min(LONGEST_PAUSE, max(0.0, float(headers.get("retry-after", 0))))
    except ValueError:  # a date
        return 0.0


def _message(body: bytes) -> str:
    """What an endpoint says is wrong."""
    text = body[:2000].decode(errors="replace")
    try:
        found = json.loads(body)
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass  # no JSON, or of another shape: shown as it is
    return one_line(ValueError(text)).removeprefix("ValueError: ")[:300] or "nothing"


def _advice(status: int) -> str:
    return "; is the key in the environment?" if status in (401, 403) else "; the base URL ends in /v1, mostly"
