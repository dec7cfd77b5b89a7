"""Questions to one address of an OpenAI-compatible endpoint, many at a time, whatever is asked there.

Threads wait for the answers: a few dozen at once cost nothing, and every wait ends at a deadline. What may pass is
asked again after growing pauses, not before the endpoint's own Retry-After; what is wrong for good ends the job.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import httpx
import tenacity

from mtc.errors import MtcError, one_line

LARGEST = 4_000_000
"""Bytes above which an answer is not read to its end."""
PASSING = (408, 425, 429)
"""Refusals that may be over later."""
LONGEST_PAUSE = 60.0
GIVEN_UP = 20
"""Questions in a row without an answer after which the endpoint is given up: what is done is kept."""
BYTES_PER_TOKEN = 4.0
"""Of English text, by and large; for estimates, and for endpoints that do not count."""


class EndpointError(MtcError):
    """The endpoint refuses for good: wrong key, model or address; or it answers nothing that can be used."""


class EndpointDown(EndpointError):
    """The endpoint does not answer; later it may do, and the job goes on where it was."""

    exit_code = 1
    event = "failed"


class Reply(Protocol):
    """What came of a question."""

    @property
    def failure(self) -> str | None:
        """Why there is no answer, in a word or two; None if there is one."""


T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A", bound=Reply)


class Known(NamedTuple, Generic[Q, A]):
    """A question whose answer is there already."""

    question: Q
    """The question."""
    answer: A
    """Its answer."""


class Result(NamedTuple, Generic[T]):
    """What all attempts of one question came to."""

    answer: T | None
    """The answer; None where there is a failure."""
    failure: str | None
    """Why there is none, in a word or two."""
    broken: int
    """Tokens of attempts that came to nothing although the endpoint had the whole question."""
    refused: bool = False
    """Whether the endpoint does not answer this question, however often it is asked."""


END = object()


class MayPass(Exception):
    """An attempt that may succeed when it is repeated."""

    def __init__(self, failure: str, after: float = 0.0, sent: bool = False):
        super().__init__(failure)
        self.after = after
        """Seconds before which it is not to be repeated."""
        self.sent = sent
        """Whether the endpoint had the whole question, and may ask money for it."""


class Unusable(Exception):
    """A question that this endpoint does not answer, however often it is asked."""

    def __init__(self, failure: str, status: int | None = None, content: bytes = b"", said: str = ""):
        super().__init__(failure)
        self.status, self.content, self.said = status, content, said
        """What the endpoint answered, and what it says is wrong; nothing where it is not the endpoint's word."""


class Transport:
    """Posts questions as JSON, for as long as it is used as a context.

    Args:
        url: what OpenAI's clients call the base URL: `http://host:8000/v1`.
        path: what stands behind it for these questions.
        key: for the Authorization header; None sends none.
        concurrency: most questions at a time.
        seconds: deadline of one attempt.
        attempts: most attempts of one question.
        first_pause: seconds that the pause after the first attempt is at most.
        largest: bytes above which an answer is not read to its end.
    """

    def __init__(
        self, url: str, path: str, key: str | None = None, concurrency: int = 16, seconds: float = 120.0,
        attempts: int = 6, first_pause: float = 1.0, largest: int = LARGEST,
    ):  # fmt: skip
        self.concurrency, self.seconds, self.attempts = concurrency, seconds, attempts
        self.first_pause, self.largest = first_pause, largest
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._url = url.rstrip("/") + path
        self.shown = re.sub(r"//[^/@]*@", "//", self._url).partition("?")[0]
        """The address without what may be secret."""
        self._key = key
        self._client = httpx.Client(headers=headers, limits=limits, timeout=seconds)
        self._stop = threading.Event()
        self._answered, self._refusal = False, ""

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._client.close()

    @property
    def ended(self) -> bool:
        """Whether answers are no longer waited for."""
        return self._stop.is_set()

    def stream(self, questions: Iterable[Q | Known[Q, A] | None], ask: Callable[[Q], A]) -> Iterator[tuple[Q, A]]:
        """The answers that `ask` gives in threads, as they come, `concurrency` questions being asked at a time; those
        that are known are handed through, and None is waited at for another answer. Raises EndpointError if the
        endpoint refuses for good, or gives no answer any more."""
        waiting: dict[Future[A], Q] = {}
        source, silent, ended = iter(questions), 0, False
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while not ended or waiting:
                    while not ended and len(waiting) < self.concurrency:
                        item: Any = next(source, END)
                        if item is None:
                            break
                        if isinstance(item, Known):
                            silent = 0
                            yield item
                        elif item is END:
                            ended = True
                        else:
                            waiting[pool.submit(ask, item)] = item
                    if not waiting:
                        continue
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda each: each.exception() is not None):  # answers come first
                        question, answer = waiting.pop(future), future.result()
                        silent = silent + 1 if answer.failure else 0
                        yield question, answer
                        if silent >= GIVEN_UP:
                            raise self.given_up(silent, answer.failure or "")
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self._stop.clear()

    def patiently(self, attempt: Callable[[], T], tokens: int) -> Result[T]:
        """What comes of an attempt that is repeated while it may pass; `tokens` is about what each costs if it breaks
        off."""
        broken = 0

        def counted() -> T:
            nonlocal broken
            try:
                return attempt()
            except MayPass as error:
                broken += tokens * error.sent
                raise

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(MayPass),
            wait=self._pause,
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.attempts), tenacity.stop_when_event_set(self._stop)
            ),
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            answer = retrying(counted)
        except (MayPass, Unusable) as error:
            return Result(None, str(error), broken, isinstance(error, Unusable))
        self._answered = True
        return Result(answer, None, broken)

    def post(self, body: dict[str, Any]) -> bytes:
        """The answer to one attempt. Raises MayPass, Unusable, and EndpointError for what is refused for good."""
        status, headers, content = self._post(body)
        if status in PASSING or status >= 500:
            raise MayPass(f"status {status}", _retry_after(headers))
        if status < 300:
            return content
        said = self._said(content)
        # A prompt that a filter does not like gets a 403 as well.
        if status in (401, 404, 405) or status < 400 or (status == 403 and not self._answered):
            raise EndpointError(f"{self.shown} answers {status}: {said}{_advice(status)}")
        self._refusal = said
        raise Unusable(f"status {status}", status, content, said)  # such as a prompt that is too long for the model

    def given_up(self, silent: int, failure: str) -> EndpointError:
        """What ends a job after so many questions in a row without an answer, the last for that reason."""
        text = f"{self.shown}: {silent} questions in a row without an answer, the last: {failure}"
        if failure.startswith("status 4") and failure not in [f"status {status}" for status in PASSING]:
            return EndpointError(f"{text}: {self._refusal}")
        return EndpointDown(f"{text}; the same command goes on where this one ends")

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Full jitter, and never before the endpoint's own word."""
        pause = tenacity.wait_random_exponential(multiplier=self.first_pause, max=LONGEST_PAUSE)(state)
        error = state.outcome.exception() if state.outcome else None
        return max(pause, error.after) if isinstance(error, MayPass) else pause

    def _said(self, content: bytes) -> str:
        """What the endpoint says is wrong, in short, and without the key."""
        text = _message(content)
        return text.replace(self._key, "…") if self._key else text

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body; raises MayPass for an answer that does not come, or not whole, in time."""
        begun, content = time.monotonic(), bytearray()
        try:
            with self._client.stream("POST", self._url, json=body) as answer:
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > self.largest:
                        raise Unusable("too long")
                    if time.monotonic() - begun > self.seconds:
                        raise MayPass("too slow", sent=True)
                return answer.status_code, answer.headers, bytes(content)
        except httpx.TimeoutException:
            raise MayPass("too slow", sent=True) from None
        except httpx.UnsupportedProtocol as error:
            raise EndpointError(f"{self.shown}: {error}; http:// or https:// is wanted") from None
        except httpx.ConnectError:
            raise MayPass("unreachable") from None
        except (httpx.HTTPError, httpx.StreamError):
            raise MayPass("cut off", sent=True) from None


def tokens_of(text: str) -> int:
    """About how many tokens a text has."""
    return int(len(text.encode()) / BYTES_PER_TOKEN) + 1


def _retry_after(headers: httpx.Headers) -> float:
    try:
        return min(LONGEST_PAUSE, max(0.0, float(headers.get("retry-after", 0))))
    except ValueError:  # a date
        return 0.0


def _message(content: bytes) -> str:
    """What an endpoint says is wrong."""
    text = content[:2000].decode(errors="replace")
    try:
        found = json.loads(content)
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass  # no JSON, or of another shape: shown as it is
    return one_line(ValueError(text)).removeprefix("ValueError: ")[:300] or "nothing"


def _advice(status: int) -> str:
    return "; is the key in the environment?" if status in (401, 403) else "; the base URL ends in /v1, mostly"
