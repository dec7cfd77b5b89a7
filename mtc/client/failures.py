"""What goes wrong between a client and the service, and when to ask again."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

_RETRIED = {429, 502, 503, 504}


class ServiceError(Exception):
    """What the service refused, or why there is no answer."""

    def __init__(
        self, status: int | None, error_type: str, message: str, detail: Any = None, request_id: str | None = None,
        retry_after: float | None = None,
    ):  # fmt: skip
        super().__init__(status, error_type, message, detail, request_id, retry_after)
        self.status = status
        """HTTP status of the answer; None if no whole answer came."""
        self.error_type, self.message = error_type, message
        """The service's word for the error and its text; without a whole answer the word is `unreachable`, `timeout`,
        `incomplete` or `unreadable`; for an answer that is not in the service's shape, such as a proxy's,
        `http_error`."""
        self.detail, self.request_id = detail, request_id
        self.retry_after = retry_after
        """Seconds after which the service says to ask again; None if it did not say."""

    def __str__(self) -> str:
        return f"{self.status or 'no answer'} {self.error_type}: {self.message}"

    @property
    def may_be_retried(self) -> bool:
        """Whether another attempt may succeed: not for what the service itself calls wrong."""
        if self.status is None:
            return self.error_type == "unreachable"
        return self.status in _RETRIED or (self.status == 500 and self.error_type == "http_error")


@dataclass(frozen=True)
class Retry:
    """When to ask again: exponential back-off with full jitter, never earlier than the service's Retry-After."""

    attempts: int = 10
    """Most attempts of one call; 1 never asks again."""
    first_s: float = 0.1
    """Longest first pause, seconds: it is drawn from 0 to this, every further one from 0 to twice as much."""
    longest_s: float = 10.0
    """Longest pause, seconds; a Retry-After counts as no more either."""
    deadline_s: float = 60.0
    """Seconds after the first attempt from which on no other begins."""


DEFAULT_RETRY = Retry()


class Attempts:
    """Counts the attempts of one call."""

    def __init__(self, retry: Retry, clock: Callable[[], float], chance: Callable[[], float]):
        self._retry, self._clock, self._chance = retry, clock, chance
        self._failed, self._end = 0, clock() + retry.deadline_s

    def pause(self, error: ServiceError) -> float:
        """Seconds until the next attempt; raises the error if there is to be none."""
        retry = self._retry
        self._failed += 1
        seconds = self._chance() * min(retry.first_s * 2 ** (self._failed - 1), retry.longest_s)
        seconds += min(error.retry_after or 0.0, retry.longest_s)
        if not error.may_be_retried or self._failed >= retry.attempts or self._clock() + seconds > self._end:
            raise error
        return seconds


def refusal(response: httpx.Response) -> ServiceError:
    after = _seconds(response.headers.get("retry-after"))
    try:
        body = response.json()
        message, kind, request_id = body["error"], body["error_type"], body["request_id"]
    except (KeyError, TypeError, ValueError):
        message = response.text[:200] or response.reason_phrase
        return ServiceError(response.status_code, "http_error", message, retry_after=after)
    return ServiceError(response.status_code, kind, message, body.get("detail"), request_id, after)


def no_answer(error: httpx.TransportError) -> ServiceError:
    # A connection that could not be made carried no request; an answer that is slow may yet come.
    slow = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    lost = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout)
    kind = "timeout" if slow else "unreachable" if lost else "unusable"
    return ServiceError(None, kind, f"{type(error).__name__}: {error}")


def _seconds(retry_after: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, which is a number of them or a date."""
    if retry_after is None:
        return None
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
