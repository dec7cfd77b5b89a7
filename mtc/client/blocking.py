"""The client that waits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Client:
    """Asks a service, one call after another; close it, or use it as a context manager.

    Args:
        api_key: a key of the service, if it wants one.
        timeout: seconds that one attempt waits to connect, and for each part of an answer.
        retries: when to ask again; `Retry(attempts=1)` never does.

    All calls raise ServiceError. What was asked wrongly is not asked again. An answer that takes longer than `timeout`
    isn't either: it would only add to the service's work.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, timeout: float = 60.0, retries: Retry = DEFAULT_RETRY, *,
        transport: httpx.BaseTransport | None = None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep, chance: Callable[[], float] = random.random,
    ):  # fmt: skip
        self._http = httpx.Client(
            base_url=calls.check_address(base_url),
            headers=calls.authorization(api_key),
            timeout=timeout,
            transport=transport,
        )
        self._retries, self._clock, self._sleep, self._chance = retries, clock, sleep, chance

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def encode(
        self, inputs: Inputs = None, format: Format = "safetensors", **options: Unpack[EncodeOptions]
    ) -> Encoding:
        """Features of every token; `format` only says how they travel."""
        return self._do(calls.encode(inputs, format, options))

    def encode_stream(
        self, inputs: Inputs = None, **options: Unpack[EncodeOptions]
    ) -> Iterator[tuple[int, EncodedInput]]:
        """Index and features of each input as soon as it is done. A failure after the first is not asked again."""
        call, lines = calls.encode_stream(inputs, options), Lines()
        response = self._open(call)
        try:
            for part in response.iter_bytes():
                yield from lines.feed(part)
        except httpx.TransportError as error:
            raise no_answer(error) from error
        finally:
            response.close()
        lines.end()

    def tokenize(
        self, inputs: Inputs = None, *, input_ids: Any = None, model: str | None = None, layer: int | None = None,
        truncate: bool = False,
    ) -> Tokenisation:  # fmt: skip
        """Inputs as the model reads them."""
        return self._do(calls.tokenize(inputs, input_ids, model, layer, truncate))

    def decode(
        self, rows: SparseRows, *, prefix: int | None = None, model: str | None = None, layer: int | None = None,
        format: Format = "safetensors",
    ) -> Decoding:  # fmt: skip
        """The reconstruction of the target site from features, such as an `EncodedInput`."""
        return self._do(calls.decode(rows, prefix, model, layer, format))

    def features(self, **filters: Any) -> Iterator[dict[str, Any]]:
        """Features that pass the filters of `GET /features`, page after page; `limit` is the size of a page."""
        while True:
            page = self._do(calls.get("/features", **filters))
            yield from page["features"]
            if (cursor := page["cursor"]) is None:
                return
            # The other pages are to come from the same run, whatever is published meanwhile.
            filters |= {"cursor": cursor, "model": page["run_id"], "layer": page["layer"]}

    def feature(self, feature: int, model: str | None = None, layer: int | None = None) -> dict[str, Any]:
        """All that the analysis says of a feature."""
        return self._do(calls.get(f"/features/{feature}", model=model, layer=layer))

    def note(
        self, feature: int, note: str | None = None, *, star: bool | None = None, seen: str | None = None,
        model: str | None = None, layer: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Keep a note on a feature, a star, or both, where the service keeps any; what is not given stays, and "" takes
        a note away. With `seen`, the `note_changed` of the feature as it was read, a note that was changed since is
        not replaced: ServiceError of status 412, whose `detail` has it. Returns what is kept now."""
        return self._do(calls.note(feature, note, star, seen, model, layer))

    def examples(self, feature: int, **options: Any) -> dict[str, Any]:
        """Contexts in which a feature fires; options as of `GET /features/{i}/examples`."""
        return self._do(calls.get(f"/features/{feature}/examples", **options))

    def surroundings(self, feature: int, model: str | None = None, layer: int | None = None) -> Surroundings:
        """What random contexts tell of a feature: where it might fire and is silent, and what fires together with
        it."""
        return self._do(calls.surroundings(feature, model, layer))

    def features_by_text(
        self, texts: str | Sequence[str], against: Inputs = None, **options: Unpack[ByTextOptions]
    ) -> TextFeatures:
        """Features that tell texts from others, or from the run's random contexts, the one that tells most first."""
        return self._do(calls.features_by_text(texts, against, options))

    def graph(
        self, prompt: str | None = None, *, timeout: float = calls.GRAPH_TIMEOUT_S, tell: Progress | None = None,
        **options: Unpack[GraphOptions],
    ) -> Graph:  # fmt: skip
        """The attribution graph of a prompt: what made its next token. It is waited for, `timeout` seconds at the most;
        `tell` hears how far it is. What is given up, such as by Ctrl-C while it waits, is cancelled in the
        service, too."""
        job, end = self._do(calls.submit_graph(prompt, options)), self._clock() + timeout
        pause = calls.FIRST_PAUSE_S
        try:
            while job["state"] not in ("done", "failed"):
                if tell is not None:
                    tell(job)
                if self._clock() + pause > end:
                    raise calls.too_slow(job, timeout)
                self._sleep(pause)
                pause = min(1.5 * pause, calls.LONGEST_PAUSE_S)
                job = self._do(calls.get(job["url"]))
            if tell is not None:
                tell(job)
            return self._do(calls.graph_result(job))
        except BaseException:
            self._forget(job["url"])
            raise

    def steer(
        self, prompt: str | None = None, interventions: Sequence[Intervention | Mapping[str, Any]] = (), *,
        tell: Progress | None = None, **options: Unpack[SteerOptions],
    ) -> Steered:  # fmt: skip
        """What the language model goes on with, with the interventions and without. Each is a
        `mtc.results.Intervention`, or a dict of its fields. `tell` hears each line of the answer, one for a step."""
        call, lines = calls.steer(prompt, interventions, options), SteeredLines()
        response = self._open(call)
        try:
            for part in response.iter_bytes():
                for line in lines.feed(part):
                    if tell is not None:
                        tell(line)
        except httpx.TransportError as error:
            raise no_answer(error) from error
        finally:
            response.close()
        return lines.end()

    def ablate(
        self, prompt: str | None = None, *, layer: int, features: Sequence[int], input_ids: Any = None,
        model: str | None = None,
    ) -> Ablated:  # fmt: skip
        """What the language model's predictions lose if these features of a layer are taken out of a text, which is a
        prompt or token ids."""
        return self._do(calls.ablate(prompt, layer, features, input_ids, model))

    def report(
        self, format: Literal["markdown", "html", "json"] = "markdown", model: str | None = None,
        layer: int | None = None,
    ) -> str:  # fmt: skip
        """The report as text: of a run of several layers that of all, unless `layer` names one."""
        return self._do(calls.report(format, model, layer))

    def runs(self) -> list[dict[str, Any]]:
        """Runs that can be asked for as `model`, newest first."""
        return list(self._do(calls.get("/runs"))["runs"])

    def info(self) -> dict[str, Any]:
        """The current run, the limits and versions."""
        return self._do(calls.get("/info"))

    def load(self, model: str) -> dict[str, Any]:
        """Let another run answer; needs an admin's key."""
        return self._do(calls.load(model))

    def health(self) -> bool:
        """Whether the service is alive; asked once."""
        return self._probe("/healthz")

    def ready(self) -> bool:
        """Whether the service could encode now; asked once."""
        return self._probe("/readyz")

    def _probe(self, path: str) -> bool:
        try:
            return self._http.get(path).is_success
        except httpx.TransportError:
            return False

    def _forget(self, url: str) -> None:
        with suppress(httpx.TransportError):  # then the service forgets it later
            self._http.delete(url)

    def _do(self, call: Call[T]) -> T:
        response = self._open(call)
        return calls.read(call, response)

    def _open(self, call: Call[Any]) -> httpx.Response:
        """A response of status 200, not read yet if it is a stream."""
        attempts, arguments = Attempts(self._retries, self._clock, self._chance), call.arguments()
        while True:
            try:
                response = self._http.send(self._http.build_request(**arguments), stream=call.accept == NDJSON)
                if response.is_success:
                    return response
                response.read()
                response.close()
                error = refusal(response)
            except httpx.TransportError as failure:
                error = no_answer(failure)
            self._sleep(attempts.pause(error))
