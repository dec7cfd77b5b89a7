"""Attribution graphs as jobs: they wait in one queue, and are computed one after another."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtc.errors import MtcError, one_line
from mtc.text import encode_text
from serve.contract import CircuitMetrics, GraphJob, GraphRequest, RunKey, ServiceError, Settings, TargetFeature
from serve.service.circuit_model import CircuitModel, overloaded, told, too_many

if TYPE_CHECKING:
    from mtc.circuits import ReplacementModel

logger = logging.getLogger("ray.serve")

KEPT_JOBS = 32
KEPT_BYTES = 256 << 20
"""Of finished graphs, as JSON; the oldest are forgotten first."""
MAX_FEATURES = 4096
"""Where a request does not say."""
TAKEN_OUT = 64
"""Features that are taken out of the real model one at a time where faithfulness is asked for."""


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
    traced: float | None = None
    """When the run was loaded and the model's turn had come."""
    seconds: float = 0.0
    result: bytes | None = None
    error: ServiceError | None = None
    cancelled: bool = False
    future: Future[None] | None = None


class Graphs:
    """Jobs, for any number of threads. What a client is to be told is raised as ServiceError.

    `owner` is who asks: nobody else learns of a job.
    """

    def __init__(self, settings: Settings, model: CircuitModel, metrics: CircuitMetrics):
        self._settings, self._model, self._metrics = settings, model, metrics
        self._lock = threading.RLock()
        """Guards all below."""
        self._jobs: dict[str, _Job] = {}
        self._pending: list[_Job] = []
        """Jobs that wait, in order, behind the one that is worked on, even if that was cancelled."""
        self._metrics.pending.set_function(lambda: len(self._pending))

    def submit(self, key: RunKey, asked: GraphRequest, owner: str) -> GraphJob:
        """A new job. Raises 429 if too many wait, and 413 or 422 for what the run has not, if the run is in memory:
        otherwise the job fails with it."""
        self._check_room()
        if (model := self._model.loaded(key)) is not None:
            told(lambda: self._question(model, asked))
        with self._lock:
            self._check_room()
            job = _Job(secrets.token_urlsafe(16), key, asked, owner)
            job.future = self._model.submit(self._work, job)  # which waits for this lock before it ends
            self._jobs[job.id] = job
            self._pending.append(job)
            return self._status(job)

    def status(self, job_id: str, owner: str) -> GraphJob:
        """How far a job is. Raises 404 if there is none."""
        with self._lock:
            return self._status(self._find(job_id, owner))

    def result(self, job_id: str, owner: str) -> bytes:
        """The graph, `mtc.results.Graph` as JSON. Raises 404 if there is no such job, 409 while it is not done, and
        what it failed with."""
        with self._lock:
            job = self._find(job_id, owner)
            if job.error is not None:
                raise _bare(job.error)
            if job.result is None:
                message = f"the graph is not done: its job is {job.state}"
                raise ServiceError(409, "not_done", message, {"state": job.state}, {"Retry-After": "1"})
            return job.result

    def cancel(self, job_id: str, owner: str) -> None:
        """Forget a job; one that is worked on ends at its next step. Raises 404 if there is none."""
        with self._lock:
            job = self._find(job_id, owner)
            job.cancelled = True
            del self._jobs[job.id]
            waited = job.future is not None and job.future.cancel()
            if waited:
                self._pending.remove(job)
        if waited:
            self._metrics.jobs.labels("cancelled").inc()

    def close(self) -> None:
        """End all work; what runs ends at its next step."""
        with self._lock:
            for job in self._jobs.values():
                job.cancelled = True

    def _check_room(self) -> None:
        pending, limit = len(self._pending), self._settings.max_graph_jobs
        if pending >= limit:
            self._metrics.jobs.labels("refused").inc()
            raise overloaded(f"{pending} graphs wait or are computed, max_graph_jobs is {limit}", limit, pending + 1)

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

    def _work(self, job: _Job) -> None:
        """In the worker's thread."""
        job.began = time.monotonic()
        result: bytes | None = None
        error: ServiceError | None = None
        try:
            if job.cancelled:
                raise _Cancelled
            job.state = "loading"
            try:
                model = self._model.bring(job.key)
            except (MtcError, OSError, ValueError) as failed:
                message = f"run {job.key.run_id} can't be loaded for interventions: {one_line(failed)}"
                raise ServiceError(409, "run_unusable", message) from failed
            result = told(lambda: self._attribute(model, job))
        except _Cancelled:
            pass
        except ServiceError as refused:
            error = _bare(refused)
        except Exception as failed:
            error = ServiceError(500, "internal", "the graph could not be computed; the service's log has the place")
            frames = traceback.extract_tb(failed.__traceback__)[-8:]  # no message, which may hold what was sent
            where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
            logger.error("graph %s failed: %s at %s", job.id, type(failed).__name__, where)
        with self._lock:
            outcome = "cancelled" if job.cancelled else "done" if result is not None else "failed"
            job.seconds = time.monotonic() - job.began
            self._pending.remove(job)
            job.result, job.error, job.state = result, error, outcome
            self._forget_old()
        self._metrics.jobs.labels(outcome).inc()
        if outcome == "done" and job.traced is not None:
            self._metrics.seconds.observe(time.monotonic() - job.traced)

    def _attribute(self, model: ReplacementModel, job: _Job) -> bytes:
        from mtc.circuits.attribution import Limits, attribute  # as above; PyTorch is there by now

        asked = job.asked

        def tell(done: int, of: int) -> None:
            job.done, job.of = done, of
            if job.cancelled:
                raise _Cancelled
            self._model.turns.let_others()

        prompt, targets, most = self._question(model, asked)
        with self._model.turns.turn():
            if job.cancelled:
                raise _Cancelled
            job.state, job.traced = "running", time.monotonic()
            faithfulness = TAKEN_OUT if asked.faithfulness else 0
            limits = Limits(self._settings.max_graph_matrix_bytes, self._settings.max_graph_edges)
            graph = attribute(
                model, prompt, targets, asked.prefix, most, asked.node_share, asked.edge_share, faithfulness, tell,
                limits,
            )  # fmt: skip
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
            raise too_many("too_many_features", f"max_features is {most}", limit, most)
        prompt: Any = asked.prompt if asked.input_ids is None else asked.input_ids
        window, _ = check_question(model, prompt, targets, asked.prefix, most)
        tokens = len(window.input_ids)
        if tokens > self._settings.max_graph_tokens:
            message = f"the prompt has {tokens} tokens"
            raise too_many("input_too_long", message, self._settings.max_graph_tokens, tokens)
        return window.input_ids.tolist(), targets, most

    def _forget_old(self) -> None:
        """Finished jobs beyond what is kept; those that finished first came first."""
        finished = [job for job in self._jobs.values() if job.state in ("done", "failed")]
        size = sum(len(job.result or b"") for job in finished)
        for number, job in enumerate(finished[:-1]):
            if len(finished) - number <= KEPT_JOBS and size <= KEPT_BYTES:
                return
            size -= len(job.result or b"")
            del self._jobs[job.id]


def _bare(error: ServiceError) -> ServiceError:
    """The same, without the frames that it came from, which hold the model."""
    return ServiceError(*error.args)


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
