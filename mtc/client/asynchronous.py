"""The client for asyncio."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

import httpx

from mtc.client import calls
from mtc.client.answers import Decoding, EncodedInput, Encoding, SparseRows, Tokenisation
from mtc.client.calls import (
    NDJSON,
    Call,
    EncodeOptions,
    Format,
    GraphOptions,
    Inputs,
    Lines,
    Progress,
    SteeredLines,
    SteerOptions,
)
from mtc.client.failures import DEFAULT_RETRY, Attempts, Retry, no_answer, refusal
from mtc.client.feature_answers import ByTextOptions, Surroundings, TextFeatures

if TYPE_CHECKING:
    from mtc.results.circuits import Ablated, Graph, Intervention, Steered

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same calls, to be awaited, as many at once as one likes."""

    def __init__(
        self, base_url: str, api_key: str | None = None, timeout: float = 60.0, retries: Retry = DEFAULT_RETRY, *,
        transport: httpx.AsyncBaseTransport | None = None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep, chance: Callable[[], float] = random.random,
    ):  # fmt: skip
        self._http = httpx.AsyncClient(
            base_url=calls.check_address(base_url),
            headers=calls.authorization(api_key),
            timeout=timeout,
            transport=transport,
        )
        self._retries, self._clock, self._sleep, self._chance = retries, clock, sleep, chance

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def encode(
        self, inputs: Inputs = None, format: Format = "safetensors", **options: Unpack[EncodeOptions]
    ) -> Encoding:
        """See `Client.encode`."""
        return await self._do(calls.encode(inputs, format, options))

    async def encode_stream(
        self, inputs: Inputs = None, **options: Unpack[EncodeOptions]
    ) -> AsyncIterator[tuple[int, EncodedInput]]:
        """See `Client.encode_stream`."""
        call, lines = calls.encode_stream(inputs, options), Lines()
        response = await self._open(call)
        try:
            async for part in response.aiter_bytes():
                for each in lines.feed(part):
                    yield each
        except httpx.TransportError as error:
            raise no_answer(error) from error
        finally:
            await response.aclose()
        lines.end()

    async def tokenize(
        self, inputs: Inputs = None, *, input_ids: Any = None, model: str | None = None, layer: int | None = None,
        truncate: bool = False,
    ) -> Tokenisation:  # fmt: skip
        """See `Client.tokenize`."""
        return await self._do(calls.tokenize(inputs, input_ids, model, layer, truncate))

    async def decode(
        self, rows: SparseRows, *, prefix: int | None = None, model: str | None = None, layer: int | None = None,
        format: Format = "safetensors",
    ) -> Decoding:  # fmt: skip
        """See `Client.decode`."""
        return await self._do(calls.decode(rows, prefix, model, layer, format))

    async def features(self, **filters: Any) -> AsyncIterator[dict[str, Any]]:
        """See `Client.features`."""
        while True:
            page = await self._do(calls.get("/features", **filters))
            for row in page["features"]:
                yield row
            if (cursor := page["cursor"]) is None:
                return
            filters |= {"cursor": cursor, "model": page["run_id"], "layer": page["layer"]}

    async def feature(self, feature: int, model: str | None = None, layer: int | None = None) -> dict[str, Any]:
        """See `Client.feature`."""
        return await self._do(calls.get(f"/features/{feature}", model=model, layer=layer))

    async def note(
        self, feature: int, note: str | None = None, *, star: bool | None = None, seen: str | None = None,
        model: str | None = None, layer: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """See `Client.note`."""
        return await self._do(calls.note(feature, note, star, seen, model, layer))

    async def examples(self, feature: int, **options: Any) -> dict[str, Any]:
        """See `Client.examples`."""
        return await self._do(calls.get(f"/features/{feature}/examples", **options))

    async def surroundings(self, feature: int, model: str | None = None, layer: int | None = None) -> Surroundings:
        """See `Client.surroundings`."""
        return await self._do(calls.surroundings(feature, model, layer))

    async def features_by_text(
        self, texts: str | Sequence[str], against: Inputs = None, **options: Unpack[ByTextOptions]
    ) -> TextFeatures:
        """See `Client.features_by_text`."""
        return await self._do(calls.features_by_text(texts, against, options))

    async def graph(
        self, prompt: str | None = None, *, timeout: float = calls.GRAPH_TIMEOUT_S, tell: Progress | None = None,
        **options: Unpack[GraphOptions],
    ) -> Graph:  # fmt: skip
        """See `Client.graph`; what is cancelled, is so in the service, too."""
        job, end = await self._do(calls.submit_graph(prompt, options)), self._clock() + timeout
        pause = calls.FIRST_PAUSE_S
        try:
            while job["state"] not in ("done", "failed"):
                if tell is not None:
                    tell(job)
                if self._clock() + pause > end:
                    raise calls.too_slow(job, timeout)
                await self._sleep(pause)
                pause = min(1.5 * pause, calls.LONGEST_PAUSE_S)
                job = await self._do(calls.get(job["url"]))
            if tell is not None:
                tell(job)
            return await self._do(calls.graph_result(job))
        except BaseException:
            await asyncio.shield(self._forget(job["url"]))
            raise

    async def steer(
        self, prompt: str | None = None, interventions: Sequence[Intervention | Mapping[str, Any]] = (), *,
        tell: Progress | None = None, **options: Unpack[SteerOptions],
    ) -> Steered:  # fmt: skip
        """See `Client.steer`."""
        call, lines = calls.steer(prompt, interventions, options), SteeredLines()
        response = await self._open(call)
        try:
            async for part in response.aiter_bytes():
                for line in lines.feed(part):
                    if tell is not None:
                        tell(line)
        except httpx.TransportError as error:
            raise no_answer(error) from error
        finally:
            await response.aclose()
        return lines.end()

    async def ablate(
        self, prompt: str | None = None, *, layer: int, features: Sequence[int], input_ids: Any = None,
        model: str | None = None,
    ) -> Ablated:  # fmt: skip
        """See `Client.ablate`."""
        return await self._do(calls.ablate(prompt, layer, features, input_ids, model))

    async def report(
        self, format: Literal["markdown", "html", "json"] = "markdown", model: str | None = None,
        layer: int | None = None,
    ) -> str:  # fmt: skip
        """See `Client.report`."""
        return await self._do(calls.report(format, model, layer))

    async def runs(self) -> list[dict[str, Any]]:
        """See `Client.runs`."""
        return list((await self._do(calls.get("/runs")))["runs"])

    async def info(self) -> dict[str, Any]:
        """See `Client.info`."""
        return await self._do(calls.get("/info"))

    async def load(self, model: str) -> dict[str, Any]:
        """See `Client.load`."""
        return await self._do(calls.load(model))

    async def health(self) -> bool:
        """See `Client.health`."""
        return await self._probe("/healthz")

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await self._probe("/readyz")

    async def _probe(self, path: str) -> bool:
        try:
            return (await self._http.get(path)).is_success
        except httpx.TransportError:
            return False

    async def _forget(self, url: str) -> None:
        with suppress(httpx.TransportError):  # then the service forgets it later
            await self._http.delete(url)

    async def _do(self, call: Call[T]) -> T:
        return calls.read(call, await self._open(call))

    async def _open(self, call: Call[Any]) -> httpx.Response:
        attempts, arguments = Attempts(self._retries, self._clock, self._chance), call.arguments()
        while True:
            try:
                response = await self._http.send(self._http.build_request(**arguments), stream=call.accept == NDJSON)
                if response.is_success:
                    return response
                await response.aread()
                await response.aclose()
                error = refusal(response)
            except httpx.TransportError as failure:
                error = no_answer(failure)
            await self._sleep(attempts.pause(error))
