"""What the routes ask of the service, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtc.results import Ablated
from mtc.text import token_batches
from serve.contract import (
    AblateRequest,
    DecodeRequest,
    Encoded,
    EncodeRequest,
    GraphJob,
    GraphRequest,
    Limits,
    LoadResponse,
    Options,
    ReplicaMetrics,
    RunKey,
    RunSummary,
    ServiceError,
    Settings,
    State,
    SteerRequest,
    Tokenised,
    TokenizeRequest,
)
from serve.service.feature_table import FeatureTable
from serve.service.models import Models
from serve.service.query_vectors import QueryVectors
from serve.service.served_run import ServedLayer, ServedRun, unknown_layer
from serve.service.storage_reads import OPEN_S, from_storage

T = TypeVar("T")
logger = logging.getLogger("ray.serve")

DEFAULT_TOP_K = 16
READY_TIMEOUT_S = 5.0
READY_FOR_S = 2.0
LISTED_FOR_S = 5.0
"""How long pages show the same runs: each is read from the storage."""
SHORT_TEXT = 1000
"""Characters that are tokenised at once: a thread would take longer to begin than they do."""


class Control(Protocol):
    """What is decided in one place for all replicas. All raise ServiceError with what the client is to be told."""

    async def want(self, run_id: str) -> RunKey:
        """A run that was asked for by name: 404 if there is none, 503 while it is loaded, 409 if it can't be."""

    async def runs(self) -> list[RunSummary]:
        """All finished runs beside the one that is served, newest first."""

    async def load(self, run_id: str) -> LoadResponse:
        """Verify, load and warm up a run everywhere, then let it answer; 409 if it can't, and nothing changes."""

    async def metrics(self) -> bytes:
        """All replicas' totals, in Prometheus's text format."""


class Interventions(Protocol):
    """Graphs, steering and ablation, which one process does for all replicas: `serve.service.Circuits`, awaited.

    All raise ServiceError with what the client is to be told.
    """

    async def submit(self, key: RunKey, asked: GraphRequest, owner: str) -> GraphJob:
        """A new job."""

    async def status(self, job_id: str, owner: str) -> GraphJob:
        """How far a job is."""

    async def result(self, job_id: str, owner: str) -> bytes:
        """The graph, `mtc.results.Graph` as JSON."""

    async def cancel(self, job_id: str, owner: str) -> None:
        """Forget a job."""

    async def steer(self, key: RunKey, asked: SteerRequest) -> tuple[str, dict[str, Any]]:
        """Begin to steer a prompt; its id, and what is known at once."""

    async def step(self, steered_id: str) -> dict[str, Any]:
        """The next token of each continuation, or, behind the last, all of it."""

    async def end(self, steered_id: str) -> None:
        """Forget a prompt that is steered."""

    async def ablate(self, key: RunKey, asked: AblateRequest) -> Ablated:
        """A text with features and without."""


class Service:
    """One replica's view of the service."""

    def __init__(
        self, settings: Settings, models: Models, control: Control, state: State, metrics: ReplicaMetrics,
        interventions: Interventions | None = None,
    ):  # fmt: skip
        self.settings, self.models, self.control, self.state, self.metrics = settings, models, control, state, metrics
        self._interventions = interventions
        self._query_vectors = QueryVectors(settings) if settings.embeddings else None
        self._used: set[RunKey] = set()
        self._ready: tuple[RunKey, float] | None = None
        self._listed: tuple[float, list[RunSummary]] | None = None
        self._opened: dict[RunKey, ServedRun] = {}

    @property
    def interventions(self) -> Interventions:
        """Who does graphs, steering and ablation. Raises ServiceError 409 if nobody does."""
        if self._interventions is None:
            message = (
                "graphs and interventions are not served: start the service with --interventions (the setting "
                "`interventions`), which takes a process more that holds the whole language model in float32"
            )
            raise ServiceError(409, "no_interventions", message)
        return self._interventions

    async def query_vector(self, table: FeatureTable, query: str) -> NDArray[np.float32]:
        """The vector of a query by the model that made those of the labels.

        Raises ServiceError: 409 if there is no endpoint for it, and as `FeatureTable.require_vectors` and
        `QueryVectors.vector`.
        """
        if self._query_vectors is None:
            message = (
                "search by meaning is not served: start the service with the setting `embeddings`, the base URL of an "
                "endpoint that gives vectors"
            )
            raise ServiceError(409, "no_embeddings", message)
        vectors = await table.read_vectors()
        return await self._query_vectors.vector(vectors.model, query, vectors.dimensions)

    async def run(self, model: str | None) -> ServedRun:
        """The run that answers a request; the whole answer is to come from it. Raises ServiceError as Control.want."""
        key = self.state.current if model is None else self._in_memory(model) or await self.control.want(model)
        return await self.open(key)

    async def asked(self, model: str | None, layer: int | None) -> ServedRun | ServedLayer:
        """What a request names by `model` and `layer`: one layer of a run, or a run of several as a whole.

        `<run id>/layer9` is that layer of the run if that is in memory, else a run of its own. Raises ServiceError as
        `run`, and 422 for a layer that the run has not.
        """
        named = None if model is None or self._in_memory(model) else await self._named(model)
        if named is not None:
            if layer not in (None, named.number):
                raise unknown_layer(named.run_id, layer, [named.number])
            return named
        run = await self.run(model)
        return run if layer is None and len(run.layers) > 1 else run.layer(layer)

    async def layer(self, model: str | None, layer: int | None) -> ServedLayer:
        """The layer of a run that answers a request: where a run of several is named without one, the lowest.

        Raises ServiceError as `asked`.
        """
        found = await self.asked(model, layer)
        return found.default if isinstance(found, ServedRun) else found

    async def open(self, key: RunKey, seconds: float = OPEN_S) -> ServedRun:
        """A run's files and tokenizer, opened once. Raises ServiceError 503 after `seconds`."""
        if key not in self._opened:
            found = await from_storage(ServedRun, key, key=("run", key), seconds=seconds)
            self._opened.setdefault(key, found)
            return found
        return self._opened[key]

    async def _named(self, model: str) -> ServedLayer | None:
        """The layer of a loaded run that `<run id>/layer9` names, under that name."""
        run_id, _, name = model.rpartition("/")
        key = self._in_memory(run_id)
        found = (await self.open(key)).layers.values() if key else ()
        return next((own.named(model) for own in found if own.place == f"{name}/"), None)

    def _in_memory(self, run_id: str) -> RunKey | None:
        """The loaded run of that id, first of all the one that answers."""
        return next((key for key in (self.state.current, *self.state.loaded) if key.run_id == run_id), None)

    def use(self, state: State) -> None:
        """Take over another state, unless it is older than this one or another deployment's; runs that are not loaded
        any more are closed."""
        if state.deployment == self.state.deployment and state.version >= self.state.version:
            self.state = state
            for key in [key for key in self._opened if key not in state.loaded]:
                del self._opened[key]

    @property
    def problem(self) -> str | None:
        """Why another run answers than the one that `Settings.run` names; None if that does."""
        problem = self.state.problem
        return f"{problem}; meanwhile run {self.state.current.run_id} answers" if problem else None

    def max_input_tokens(self, run: ServedRun) -> int:
        """Most tokens of one input: the service's limit, or the language model's if that is lower."""
        limit = self.settings.max_input_tokens
        return limit if run.max_positions is None else min(limit, run.max_positions)

    def limits(self, run: ServedRun) -> Limits:
        """What a request to the run may ask for."""
        settings = self.settings
        return Limits(
            max_body_bytes=settings.max_body_bytes, max_inputs=settings.max_inputs,
            max_input_tokens=self.max_input_tokens(run), max_request_tokens=settings.max_request_tokens,
            max_json_depth=settings.max_json_depth, max_graph_tokens=settings.max_graph_tokens,
            max_graph_features=settings.max_graph_features,
        )  # fmt: skip

    def take_used(self) -> tuple[RunKey, ...]:
        """Runs that models were asked for since the last call."""
        used, self._used = tuple(self._used), set()
        return used

    async def listed_runs(self) -> list[RunSummary]:
        """All finished runs, newest first, as they were within the last LISTED_FOR_S; as they were last while nobody
        knows: a page shows what is in memory without."""
        if self._listed is None or time.monotonic() > self._listed[0] + LISTED_FOR_S:
            try:
                found = await self.control.runs()
            except ServiceError as error:
                logger.warning("pages show the runs of before: %s", error)
                found = self._listed[1] if self._listed else []
            self._listed = time.monotonic(), found
        return self._listed[1]

    async def tokenise(
        self, run: ServedRun, request: EncodeRequest | TokenizeRequest, name: Callable[[int], str] = "inputs[{}]".format
    ) -> list[Tokenised]:
        """The request's inputs as the model reads them. Raises ServiceError: 413 beyond the limits, 422 unknown ids;
        it calls an input by the `name` of its index."""
        with self.metrics.duration.labels("tokenise").time():
            return await self._tokenise(run, request, name)

    async def _tokenise(
        self, run: ServedRun, request: EncodeRequest | TokenizeRequest, name: Callable[[int], str]
    ) -> list[Tokenised]:
        settings, tokeniser = self.settings, run.tokeniser
        inputs: Sequence[object] = request.texts or request.windows or []
        if len(inputs) > settings.max_inputs:
            raise _too_many("too_many_inputs", "inputs", settings.max_inputs, len(inputs))
        longest = self.max_input_tokens(run)
        limit = longest if request.truncate else None
        if request.texts is not None:
            texts = request.texts
            if sum(map(len, texts)) <= SHORT_TEXT:
                tokenised = [tokeniser.text(text, limit) for text in texts]
            else:
                tokenised = await asyncio.to_thread(lambda: [tokeniser.text(text, limit) for text in texts])
        else:
            windows = request.windows or []
            for index, window in enumerate(windows):
                _check_ids(run, f"input_ids[{index}]", max(window), index)
            tokenised = [tokeniser.ids(window, limit) for window in windows]
        for index, each in enumerate(tokenised):
            if not len(each.ids):
                raise ServiceError(400, "empty_inputs", f"{name(index)} has no token", {"index": index})
            if len(each.ids) > longest:
                raise _too_many("input_too_long", "tokens", longest, len(each.ids), index, name(index))
            _check_ids(run, name(index), int(each.ids.max()), index)
        total = sum(len(each.ids) for each in tokenised)
        if total > settings.max_request_tokens:
            raise _too_many("too_many_tokens", "tokens", settings.max_request_tokens, total)
        return tokenised

    def options(self, layer: ServedLayer, request: EncodeRequest, csr: bool) -> Options:
        """What the request wants of each token, for a sparse matrix or token by token.

        Raises ServiceError 422 for features or a prefix that the layer lacks.
        """
        total = layer.num_features
        self.check_prefix(layer, request.prefix)
        if request.features is not None and max(request.features) >= total:
            raise _beyond("features", max(request.features), total)
        top_k = request.top_k if request.top_k is not None or csr else DEFAULT_TOP_K
        features = None if request.features is None else tuple(request.features)
        return Options(
            request.prefix, top_k, features, request.min_activation, csr, "l0" in request.include,
            "relative_error" in request.include, layer.number,
        )  # fmt: skip

    def check_prefix(self, layer: ServedLayer, prefix: int | None) -> None:
        """Raises ServiceError 422 if the layer has no such nested dictionary."""
        if prefix is not None and prefix not in layer.prefixes:
            prefixes = list(layer.prefixes)
            message = f"prefix={prefix} is not one of the nested dictionaries {prefixes}"
            raise ServiceError(422, "validation", message, {"prefixes": prefixes, "value": prefix})

    async def encode_inputs(
        self, run: ServedRun, inputs: Sequence[Tokenised], options: Options
    ) -> AsyncIterator[tuple[int, Encoded]]:
        """Index and features of each input, in order, as batches are done."""
        start, deadline = time.perf_counter(), self._deadline()
        self._used.add(run.key)
        parts = token_batches([len(each.ids) for each in inputs], self.settings.max_batch_tokens)
        tasks = [
            asyncio.create_task(self.models.encode_windows(run.key, [inputs[i].ids for i in part], options))
            for part in parts
        ]
        try:
            for part, task in zip(parts, tasks, strict=True):
                found = await self._in_time(task, deadline)
                for index, encoded in zip(part, found, strict=True):
                    yield index, encoded
            self.metrics.duration.labels("models").observe(time.perf_counter() - start)
            self.metrics.tokens.inc(sum(len(each.ids) for each in inputs))
        finally:
            for task in tasks:
                task.cancel()

    async def decode_request(self, layer: ServedLayer, request: DecodeRequest) -> NDArray[np.float32]:
        """The reconstruction of the request's features, [tokens, d_target]. Raises ServiceError for a bad matrix."""
        run = layer.run
        self.check_prefix(layer, request.prefix)
        if layer.config.transcoder.skip:
            message = f"run {run.key.run_id} has a skip connection: its output does not follow from features alone"
            raise ServiceError(422, "skip_connection", message)
        indptr, feature, value = _matrix(request)
        tokens = len(indptr) - 1
        if tokens > (limit := self.max_input_tokens(run)):
            raise _too_many("too_many_tokens", "tokens", limit, tokens)
        if len(feature) and feature.max() >= layer.num_features:
            raise _beyond("features", int(feature.max()), layer.num_features)
        token = np.repeat(np.arange(tokens), np.diff(indptr))
        self._used.add(run.key)
        answer = self.models.decode_entries(run.key, layer.number, tokens, token, feature, value, request.prefix)
        return await self._in_time(answer, self._deadline())

    async def in_time(self, answer: Awaitable[T]) -> T:
        """What is awaited, within `request_timeout_s`; raises ServiceError 504 if it takes longer."""
        return await self._in_time(answer, self._deadline())

    def _deadline(self) -> float:
        """When the request that begins now has waited for `request_timeout_s`, in the event loop's time."""
        return asyncio.get_running_loop().time() + self.settings.request_timeout_s

    async def _in_time(self, answer: Awaitable[T], deadline: float) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                return await answer
        except TimeoutError:
            limit = self.settings.request_timeout_s
            raise ServiceError(504, "timeout", f"no answer within {limit:g} s", {"limit": limit}) from None

    async def check_ready(self) -> None:
        """One real token through the current run's models; a success is believed for READY_FOR_S.

        Raises ServiceError 503 if that is refused or takes too long, and what the models raise.
        """
        key, now = self.state.current, time.monotonic()
        if self._ready is not None and self._ready[0] == key and now < self._ready[1] + READY_FOR_S:
            return
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self.models.encode_windows(key, [np.zeros(1, np.int32)], Options(top_k=1))
        except (ServiceError, TimeoutError) as error:
            what = str(error) or f"no answer within {READY_TIMEOUT_S:g} s"
            raise ServiceError(503, "not_ready", f"not ready: {what}", headers={"Retry-After": "1"}) from error
        self._ready = (key, now)


def _matrix(request: DecodeRequest) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """indptr, features and values. Raises ServiceError 422 for lists that are no matrix."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        if request.csr is None:
            rows = request.features or []
            entries = [entry for row in rows for entry in row]
            indptr = np.cumsum([0, *map(len, rows)])
            feature = np.array([entry.feature_index for entry in entries], np.int64)
            value = np.array([entry.activation_value for entry in entries], np.float32)
        else:
            csr = request.csr
            indptr, feature = np.array(csr.indptr, np.int64), np.array(csr.indices, np.int64)
            value = np.array(csr.values, np.float32)
            whole = len(indptr) > 1 and indptr[0] == 0 and indptr[-1] == len(feature) == len(value)
            if not whole or (np.diff(indptr) < 0).any():
                message = (
                    "csr.indptr must go from 0 to the number of entries without descending, with two numbers or more"
                )
                raise ServiceError(422, "validation", message)
    if not np.isfinite(value).all():
        raise ServiceError(422, "validation", "activations must be finite float32 numbers")
    return indptr, feature, value


def _too_many(
    kind: str, what: str, limit: int, value: int, index: int | None = None, where: str = "the request"
) -> ServiceError:
    detail = {"limit": limit, "value": value} | ({} if index is None else {"index": index})
    return ServiceError(413, kind, f"{where} has {value} {what}, the limit is {limit}", detail)


def _check_ids(run: ServedRun, where: str, largest: int, index: int) -> None:
    """Raises ServiceError 422 for an id that the tokenizer or the language model has no row for."""
    last = run.num_ids - 1
    if largest > last:
        detail = {"limit": last, "value": largest, "index": index}
        raise ServiceError(422, "validation", f"{where} has the token id {largest}, the largest is {last}", detail)


def _beyond(field: str, value: int, total: int) -> ServiceError:
    message = f"{field}: there is no feature {value}, the dictionary has {total}"
    return ServiceError(422, "validation", message, {"limit": total - 1, "value": value})
