"""Vectors of queries, from the endpoint that the settings name and no other.

The event loop waits for them, no thread; few at once, each until a deadline. Vectors of the last queries are kept.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict

import httpx
import numpy as np
from numpy.typing import NDArray

from mtc.vectors import PATH, UnusableVectors, question, read_vectors
from serve.contract import ServiceError, Settings

logger = logging.getLogger("ray.serve")
AT_ONCE = 8
"""Most queries that wait for the endpoint; more are refused with 429."""
KEPT = 512
"""Queries whose vectors are kept, those that were asked last."""
LARGEST = 1_000_000
"""Bytes above which an answer is not read to its end."""
PASSING = (408, 425, 429)
"""Refusals that may be over later."""


class QueryVectors:
    """Asks for vectors, within one event loop."""

    def __init__(self, settings: Settings):
        self._url = f"{(settings.embeddings or '').rstrip('/')}{PATH}"
        self._key = os.environ.get(settings.embeddings_key_variable)
        self._seconds = settings.embeddings_timeout_s
        self._client: httpx.AsyncClient | None = None
        self._waiting = 0
        self._kept: OrderedDict[tuple[str, str, int], NDArray[np.float32]] = OrderedDict()

    async def vector(self, model: str, query: str, dimensions: int) -> NDArray[np.float32]:
        """A query's vector of length 1, [dimensions] float32.

        Raises ServiceError: 429 if too many wait, 503 if the endpoint does not answer, 502 if its answer is of no use.
        """
        asked = (model, query, dimensions)  # of two runs, another model may go by the same name
        if (kept := self._kept.get(asked)) is not None:
            self._kept.move_to_end(asked)
            return kept
        if self._waiting >= AT_ONCE:
            message = f"{self._waiting} searches by meaning wait for their vectors, the limit is {AT_ONCE}"
            detail = {"limit": AT_ONCE, "value": self._waiting + 1}
            raise ServiceError(429, "overloaded", message, detail, {"Retry-After": "1"})
        self._waiting += 1
        try:
            async with asyncio.timeout(self._seconds):
                status, content = await self._ask(model, query)
        except TimeoutError:
            raise _silent(f"did not answer within {self._seconds:g} s") from None
        except httpx.HTTPError as error:
            logger.warning("the endpoint of vectors: %s", type(error).__name__)  # without the address, or a key in it
            raise _silent("can't be reached, or broke off") from None
        finally:
            self._waiting -= 1
        if status in PASSING or status >= 500:
            raise _silent(f"answers {status}")
        if status >= 300:
            raise _useless(f"answers {status}")
        try:
            found, _ = read_vectors(content, 1)
        except UnusableVectors as error:
            raise _useless(f"gave no vector that can be used: {error}") from None
        vector = found[0]
        if len(vector) != dimensions:
            raise _useless(f"gave a vector of {len(vector)} dimensions, those of the labels have {dimensions}")
        self._kept[asked] = vector
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return vector

    async def _ask(self, model: str, query: str) -> tuple[int, bytes]:
        if self._client is None:  # a client belongs to the event loop that it was made in
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            self._client = httpx.AsyncClient(headers=headers, timeout=self._seconds)
        content = bytearray()
        async with self._client.stream("POST", self._url, json=question(model, [query])) as answer:
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > LARGEST:
                    raise _useless(f"answers with more than {LARGEST} bytes")
            return answer.status_code, bytes(content)


def _silent(what: str) -> ServiceError:
    message = f"the endpoint of vectors {what}: search by words meanwhile"
    return ServiceError(503, "embeddings_unavailable", message, headers={"Retry-After": "1"})


def _useless(what: str) -> ServiceError:
    return ServiceError(502, "embeddings_unusable", f"the endpoint of vectors {what}: search by words")
