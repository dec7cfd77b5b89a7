"""Attribution graphs as jobs, and steering, of one run at a time: without HTTP and without Ray.

One `ReplacementModel` is in memory, of the run that was asked for last. Graphs are computed one after another by one
thread; a prompt is steered step by step, as whoever asked fetches the steps, beside them: both take turns on the model,
a graph after every few features. Who does not fetch any more costs nothing.
"""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtc.errors import MtcError, one_line
from mtc.text import encode_text
from serve.contract import (
    CircuitMetrics,
    GraphJob,
    GraphRequest,
    RunKey,
    ServiceError,
    Settings,
    SteerRequest,
    TargetFeature,
)
from serve.service.served_run import verified
from serve.service.turns import Turns

if TYPE_CHECKING:
    from mtc.circuits import ReplacementModel
    from mtc.circuits.interventions import Steering, Step

logger = logging.getLogger("ray.serve")

KEPT_JOBS = 32
KEPT_BYTES = 256 << 20
"""Of finished graphs, as JSON; the oldest are forgotten first."""
IDLE_S = 60.0
"""After which a steered prompt whose next step nobody has fetched is forgotten."""
FAILED_FOR_S = 60.0
"""For which a run that could not be loaded is not tried again for steering."""
MAX_FEATURES = 4096
"""Where a request does not say."""
TAKEN_OUT = 64
"""Features that are taken out of the real model one at a time where faithfulness is asked for."""
PASSES = 4
"""Rows for each continuation: with interventions and without, each under both models."""

Load = Callable[[RunKey, Settings], "ReplacementModel"]


class _Cancelled(Exception):
    """Nobody wants the graph any more."""


@dataclass(eq=False)
class _Job:
    """A graph that was asked for."""

    id: str
    key: RunKey
    asked: GraphRequest
    owner: str
    state: Any = "queued"
    done: int = 0
    of: int | None = None
    began: float | None = None
    seconds: float = 0.0
    result: bytes | None = None
    error: ServiceError | None = None
    cancelled: bool = False
    future: Future[None] | None = None


@dataclass(eq=False)
class _Steered:
    """A prompt that is being steered."""

    steering: Steering
    steps: Any
    """What is left of the steering's steps."""
    seen: list[Step] = field(default_factory=list)
    fetched: float = field(default_factory=time.monotonic)
    busy: threading.Lock = field(default_factory=threading.Lock)


def load_replacement(key: RunKey, settings: Settings) -> ReplacementModel:
    """The whole language model and all transcoders of a run. Raises what is wrong with it."""
    # Not at the top: a service without interventions does without.
    from mtc.circuits import ReplacementModel
    from mtc.devices import open_device

    return ReplacementModel.load(verified(key), open_device(settings.interventions_device))


class Circuits:
    """Jobs and steered prompts, for any number of threads. What a client is to be told is raised as ServiceError.

    `owner` is who asks: nobody else learns of a job.
    """

    def __init__(self, settings: Settings, metrics: CircuitMetrics | None = None, load: Load = load_replacement):
        self._settings, self._metrics, self._load = settings, metrics or CircuitMetrics(), load
        self._changed = threading.Condition()
        """Guards all below but the model's own work."""
        self._turns = Turns()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="graphs")
        self._key: RunKey | None = None
        self._model: ReplacementModel | None = None
        self._loading: set[RunKey] = set()
        self._failed: dict[RunKey, tuple[float, str]] = {}
        self._jobs: dict[str, _Job] = {}
        self._pending: list[_Job] = []
        """Jobs that wait, in order, behind the one that is worked on, even if that was cancelled."""
        self._steered: dict[str, _Steered | None] = {}
        """By id; None while the first pass has not ended."""
        self._metrics.pending.set_function(lambda: len(self._pending))
        self._metrics.steerings.set_function(lambda: len(self._steered))

    def open(self, key: RunKey) -> None:
        """Have a run's models ready. Raises what is wrong with it."""
        self._worker.submit(self._bring, key).result()

    def close(self) -> None:
        """End all work; what runs ends at its next step."""
        with self._changed:
            for job in self._jobs.values():
                job.cancelled = True
            self._steered.clear()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def submit(self, key: RunKey, asked: GraphRequest, owner: str) -> GraphJob:
        """A new job. Raises 429 if too many wait, and 413 or 422 for what the run has not, if the run is in memory:
        otherwise the job fails with it."""
        self._check_room()
        if (model := self._loaded(key)) is not None:
            _told(lambda: self._question(model, asked))
        with self._changed:
            self._check_room()
            job = _Job(secrets.token_urlsafe(16), key, asked, owner)
            self._jobs[job.id] = job
            self._pending.append(job)
            job.future = self._worker.submit(self._work, job)
            return self._status(job)

    def status(self, job_id: str, owner: str) -> GraphJob:
        """How far a job is. Raises 404 if there is none."""
        with self._changed:
            return self._status(self._find(job_id, owner))

    def result(self, job_id: str, owner: str) -> bytes:
        """The graph, `mtc.results.Graph` as JSON. Raises 404 if there is no such job, 409 while it is not done, and
        what it failed with."""
        with self._changed:
            job = self._find(job_id, owner)
            if job.error is not None:
                raise job.error
            if job.result is None:
                message = f"the graph is not done: its job is {job.state}"
                raise ServiceError(409, "not_done", message, {"state": job.state}, {"Retry-After": "1"})
            return job.result

    def cancel(self, job_id: str, owner: str) -> None:
        """Forget a job; one that is worked on ends at its next step. Raises 404 if there is none."""
        with self._changed:
            job = self._find(job_id, owner)
            job.cancelled = True
            del self._jobs[job.id]
            waited = job.future is not None and job.future.cancel()
            if waited:
                self._pending.remove(job)
        if waited:
            self._metrics.jobs.labels("cancelled").inc()

    def steer(self, key: RunKey, asked: SteerRequest) -> tuple[str, dict[str, Any]]:
        """Begin to steer a prompt; its id, the prompt's tokens and how the next one changes.

        Raises 413 and 422 for what the model has not, 429 if too many prompts are steered, 503 while the run is loaded,
        409 if it cannot be.
        """
        steered_id = secrets.token_urlsafe(16)
        with self._changed:
            self._forget_idle()
            if len(self._steered) >= (limit := self._settings.max_steerings):
                message = f"{len(self._steered)} prompts are being steered, max_steerings is {limit}"
                raise _overloaded(message, limit, len(self._steered) + 1)
            model = self._ready(key)
            self._steered[steered_id] = None
        try:
            steering = _told(lambda: self._begin(model, asked))
            begun = {
                "run_id": key.run_id, "base_model": model.model.config.name, "token_ids": steering.token_ids,
                "tokens": model.strings(steering.token_ids),
                "next": [each.model_dump(mode="json") for each in steering.next],
            }  # fmt: skip
            with self._changed:
                self._steered[steered_id] = _Steered(steering, steering.steps())
            return steered_id, begun
        except BaseException:
            self.end(steered_id)
            raise

    def step(self, steered_id: str) -> dict[str, Any]:
        """The next token of each continuation, `type` step, or, behind the last, all of it, `type` steered."""
        with self._changed:
            found = self._steered.get(steered_id)
        if found is None:
            raise ServiceError(404, "not_found", "this prompt is not being steered any more")
        with found.busy:
            found.fetched = time.monotonic()
            with self._turns.turn():
                step = next(found.steps, None)
            if step is None:
                self.end(steered_id)
                from mtc.circuits.interventions import collect  # as above; PyTorch is there by now

                return {"type": "steered"} | collect(found.steering, found.seen).model_dump(mode="json")
            found.seen.append(step)
            found.fetched = time.monotonic()
            self._metrics.steered.inc()
            return {"type": "step"} | _tokens(found)

    def end(self, steered_id: str) -> None:
        """Forget a prompt that is steered."""
        with self._changed:
            self._steered.pop(steered_id, None)
            self._changed.notify_all()

    def _check_room(self) -> None:
        pending, limit = len(self._pending), self._settings.max_graph_jobs
        if pending >= limit:
            self._metrics.jobs.labels("refused").inc()
            raise _overloaded(f"{pending} graphs wait or are computed, max_graph_jobs is {limit}", limit, pending + 1)

    def _find(self, job_id: str, owner: str) -> _Job:
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise ServiceError(404, "unknown_job", "there is no such job: it was cancelled, or is forgotten by now")
        return job

    def _status(self, job: _Job) -> GraphJob:
        seconds = time.monotonic() - job.began if job.began is not None and job in self._pending else job.seconds
        url = f"/graph/{job.id}"
        return GraphJob(
            id=job.id, state=job.state, run_id=job.key.run_id, done=job.done, of=job.of,
            ahead=self._pending.index(job) if job in self._pending else 0, seconds=round(seconds, 3), url=url,
            result_url=f"{url}/result", error=job.error.message if job.error else None,
            error_type=job.error.error_type if job.error else None,
        )  # fmt: skip

    def _loaded(self, key: RunKey) -> ReplacementModel | None:
        with self._changed:
            return self._model if self._key == key else None

    def _ready(self, key: RunKey) -> ReplacementModel:
        """The run's models, if they are in memory; otherwise they are loaded when the jobs before are done."""
        if self._key == key and self._model is not None:
            return self._model
        since, message = self._failed.get(key, (0.0, ""))
        if message and time.monotonic() < since + FAILED_FOR_S:
            raise ServiceError(409, "run_unusable", f"run {key.run_id} can't be steered: {message}")
        if key not in self._loading:
            self._loading.add(key)
            self._worker.submit(self._bring_for_steering, key)
        message = f"run {key.run_id} is being loaded for interventions"
        raise ServiceError(503, "loading", message, {"model": key.run_id}, {"Retry-After": "1"})

    def _bring_for_steering(self, key: RunKey) -> None:
        try:
            self._bring(key)
        except Exception as error:
            logger.error("run %s can't be steered: %s", key.run_id, one_line(error))
        finally:
            with self._changed:
                self._loading.discard(key)

    def _bring(self, key: RunKey) -> ReplacementModel:
        """In the worker's thread: the run's models, in the place of another one's, which are dropped first, when no
        prompt is steered with them any more."""
        with self._changed:
            if self._key == key and self._model is not None:
                return self._model
            self._key = None  # nobody begins with the old one any more
            while self._steered:
                self._changed.wait(timeout=1)
                self._forget_idle()
            self._model = None
        gc.collect()
        try:
            model = self._load(key, self._settings)
        except Exception as error:
            with self._changed:
                self._failed[key] = (time.monotonic(), one_line(error))
            raise
        with self._changed:
            self._failed.pop(key, None)
            self._key, self._model = key, model
        logger.info("run %s is ready for interventions, on %s", key.run_id, self._settings.interventions_device)
        return model

    def _forget_idle(self) -> None:
        old = time.monotonic() - IDLE_S
        for steered_id, found in list(self._steered.items()):
            if found is not None and found.fetched < old and not found.busy.locked():
                del self._steered[steered_id]

    def _work(self, job: _Job) -> None:
        """In the worker's thread."""
        job.began = time.monotonic()
        result, error = None, None
        try:
            if job.cancelled:
                raise _Cancelled
            job.state = "loading"
            try:
                model = self._bring(job.key)
            except (MtcError, OSError, ValueError) as failed:
                message = f"run {job.key.run_id} can't be loaded for interventions: {one_line(failed)}"
                raise ServiceError(409, "run_unusable", message) from failed
            result = _told(lambda: self._attribute(model, job))
        except _Cancelled:
            pass
        except ServiceError as told:
            error = told
        except Exception as failed:
            error = ServiceError(500, "internal", "the graph could not be computed; the service's log has the place")
            frames = traceback.extract_tb(failed.__traceback__)[-8:]  # no message, which may hold what was sent
            where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
            logger.error("graph %s failed: %s at %s", job.id, type(failed).__name__, where)
        outcome = "done" if result is not None else "failed" if error is not None else "cancelled"
        with self._changed:
            job.seconds = time.monotonic() - job.began
            self._pending.remove(job)
            job.result, job.error, job.state = result, error, outcome
            self._forget_old()
        self._metrics.jobs.labels(outcome).inc()
        if outcome == "done":
            self._metrics.seconds.observe(job.seconds)

    def _attribute(self, model: ReplacementModel, job: _Job) -> bytes:
        from mtc.circuits import attribute  # as above; PyTorch is there by now

        asked = job.asked

        def tell(done: int, of: int) -> None:
            job.done, job.of = done, of
            if job.cancelled:
                raise _Cancelled
            self._turns.let_others()

        prompt, targets, most = self._question(model, asked)
        with self._turns.turn():
            if job.cancelled:
                raise _Cancelled
            job.state = "running"
            faithfulness = TAKEN_OUT if asked.faithfulness else 0
            graph = attribute(
                model, prompt, targets, asked.prefix, most, asked.node_share, asked.edge_share, faithfulness, tell
            )
        return graph.model_dump_json().encode()

    def _question(self, model: ReplacementModel, asked: GraphRequest) -> tuple[list[int], Any, int]:
        """Prompt, targets and most features as `attribute_whole` takes them. Raises CircuitError, and ServiceError 413
        beyond the limits."""
        from mtc.circuits import FeatureTarget  # as above; PyTorch is there by now
        from mtc.circuits.attribution import check_question

        targets: Any = asked.targets and [
            FeatureTarget(each.layer, each.token, each.feature)
            if isinstance(each, TargetFeature)
            else _token_of(model, each, n)
            for n, each in enumerate(asked.targets)
        ]
        if targets and len(set(targets)) < len(targets):
            raise ServiceError(422, "validation", "targets name one thing twice")
        limit = self._settings.max_graph_features
        most = min(MAX_FEATURES, limit) if asked.max_features is None else asked.max_features
        if most > limit:
            raise _too_many("too_many_features", f"max_features is {most}", limit, most)
        prompt: Any = asked.prompt if asked.input_ids is None else asked.input_ids
        window, _ = check_question(model, prompt, targets, asked.prefix, most)
        tokens = len(window.input_ids)
        if tokens > self._settings.max_graph_tokens:
            message = f"the prompt has {tokens} tokens"
            raise _too_many("input_too_long", message, self._settings.max_graph_tokens, tokens)
        return window.input_ids.tolist(), targets, most

    def _begin(self, model: ReplacementModel, asked: SteerRequest) -> Steering:
        from mtc.circuits import Intervention  # as above; PyTorch is there by now
        from mtc.circuits.interventions import Steering

        messages: Any = asked.messages and [message.model_dump() for message in asked.messages]
        prompt: Any = asked.prompt or messages or asked.input_ids
        ids = model.window(prompt).input_ids.tolist()
        limit, tokens = self._settings.max_input_tokens, len(ids) + asked.max_tokens
        if tokens > limit:
            message = f"the prompt has {len(ids)} tokens and max_tokens is {asked.max_tokens}: {tokens}"
            raise _too_many("input_too_long", message, limit, tokens)
        limit, rows = self._settings.max_request_tokens, PASSES * asked.n
        if rows * tokens > limit:
            message = f"{rows} passes over {tokens} tokens, of n={asked.n}, are {rows * tokens}"
            raise _too_many("too_many_tokens", message, limit, rows * tokens)
        changes = [Intervention.model_validate(each.model_dump()) for each in asked.interventions]
        with self._turns.turn():
            return Steering(
                model, ids, changes, max_tokens=asked.max_tokens, n=asked.n, temperature=asked.temperature,
                seed=asked.seed, attention=asked.attention, special=asked.special,
            )  # fmt: skip

    def _forget_old(self) -> None:
        """Finished jobs beyond what is kept; those that finished first came first."""
        finished = [job for job in self._jobs.values() if job.state in ("done", "failed")]
        size = sum(len(job.result or b"") for job in finished)
        for number, job in enumerate(finished[:-1]):
            if len(finished) - number <= KEPT_JOBS and size <= KEPT_BYTES:
                return
            size -= len(job.result or b"")
            del self._jobs[job.id]


def _told(work: Callable[[], Any]) -> Any:
    """What the work returns; a CircuitError is told as 422."""
    from mtc.circuits import CircuitError  # as above; PyTorch is there by now

    try:
        return work()
    except CircuitError as error:
        raise ServiceError(422, "validation", str(error)) from None


def _token_of(model: ReplacementModel, target: str | int, number: int) -> int:
    """A target's token id. Raises ServiceError 422 if it is not one token, in other words than the library's, which
    repeat the text."""
    if isinstance(target, int):
        return target
    ids = encode_text(target, model.tokenizer).ids
    if len(ids) != 1:
        message = f"targets[{number}] is {len(ids)} tokens: one is wanted, with its space in front"
        raise ServiceError(422, "validation", message, {"index": number, "value": len(ids)})
    return int(ids[0])


def _tokens(found: _Steered) -> dict[str, Any]:
    """The last step's tokens, each with what it adds to the text so far."""
    return {
        kind: [
            _token(found, [getattr(step, kind)[row] for step in found.seen])
            for row in range(len(getattr(found.seen[-1], kind)))
        ]
        for kind in ("plain", "steered")
    }


def _token(found: _Steered, drawn: Sequence[Any]) -> dict[str, Any] | None:
    if drawn[-1] is None:
        return None
    texts, last = found.steering.model.texts, drawn[-1]
    text = texts.sequence([each.token_id for each in drawn])[-1]
    if texts.is_part(last.token_id) and text.endswith("\ufffd"):
        text = ""  # the character's other tokens may follow, and it is shown at its last
    return {"token_id": last.token_id, "text": text, "plain": last.plain, "steered": last.steered}


def _overloaded(message: str, limit: int, value: int) -> ServiceError:
    return ServiceError(429, "overloaded", message, {"limit": limit, "value": value}, {"Retry-After": "2"})


def _too_many(kind: str, message: str, limit: int, value: int) -> ServiceError:
    return ServiceError(413, kind, f"{message}, the limit is {limit}", {"limit": limit, "value": value})
