"""The deployment that decides which runs answer, and adds up what the replicas count. There is one replica of it.

Requests do not pass it: while it restarts, the service answers as before. What it knows is told to it again by the
replicas, each second.

Serve replaces it at once when another deployment begins, while the replicas of before go on until those of the new one
answer, for good if they never do. These tell it nothing but their counts, and are told nothing: what they have decided
holds, and whoever wants it changed through them is answered that another deployment is taking over.

What `Settings.run` names may become unusable: an alias that can't be read, a run that is gone, damaged, or can't be
loaded. Then what answers goes on, or at a start the last usable run of that name answers, `State.problem` says why, and
the name is tried again until it can be served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mtc.errors import MtcError
from mtc.storage import RunDirectory, RunError, StorageError, SweepError
from mtc.telemetry import CATALOGUE
from serve.contract import (
    NO_REPLICA,
    Family,
    LoadResponse,
    Problem,
    RunKey,
    RunSummary,
    ServiceError,
    Settings,
    Snapshot,
    State,
    render_metrics,
)
from serve.service import (
    OPEN_S,
    STORAGE_S,
    UNUSABLE,
    Catalogue,
    Entry,
    Listed,
    StorageReads,
    identities_of,
    storage_fails,
)

logger = logging.getLogger("ray.serve")

LOAD_TIMEOUT_S = 600.0
BROADCAST_TIMEOUT_S = 10.0
ASK_TIMEOUT_S = 2.0
"""In which replicas that outlived a control are to say what it had decided; at the first start there are none."""
LONGEST_RETRY_S = 600.0
"""Longest pause before what is named, and could not be loaded, is tried again: pauses begin at `watch_seconds` and
double, for each try reads all files."""
MOST_GIVEN_UP = 3
"""Runs that no replica could load at a start, after which what is wrong is not the run."""


@ray_serve.deployment(max_ongoing_requests=1024, health_check_timeout_s=60)
class Control:
    """What a client is to be told is returned as a ServiceError, not raised.

    `deployment` of a call is the one of the replica that asks, see `serve.app.build`.
    """

    async def __init__(self, settings: Settings, deployment: str):  # type: ignore[misc]
        self._settings = settings
        self._catalogue = Catalogue(settings.run)
        self._reads = StorageReads()
        self._used: dict[RunKey, float] = {}
        self._failed: dict[RunKey, Problem] = {}
        self._given_up: set[RunKey] = set()
        self._retry: tuple[RunKey, float, float] | None = None  # the run, the time before which not, the pause
        self._loading: dict[RunKey, asyncio.Task[Problem | None]] = {}
        self._totals: dict[str, Snapshot] = {}
        self._switching = asyncio.Lock()
        states = await self._broadcast("state", timeout_s=ASK_TIMEOUT_S)
        told = [state for state in states if isinstance(state, State) and state.deployment == deployment]
        if told:
            self._state = max(told, key=lambda state: state.version)
        else:
            entry, problem = await self._reads.read(self._catalogue.usable, seconds=LOAD_TIMEOUT_S)
            self._state = State(deployment, 1, entry.key, (entry.key,), entry.key, problem)
            if problem:
                logger.error("%s; meanwhile run %s answers", problem, entry.key.run_id)
        self._watcher = asyncio.create_task(self._watch())

    async def state(self) -> State:
        """Which runs answer."""
        return self._state

    async def report(self, replica_id: str, totals: Snapshot, state: State, used: tuple[RunKey, ...]) -> State:
        """A replica's counts, in case that it dies, and the runs that it used lately; the answer is what is decided."""
        self._totals[replica_id] = totals
        self._used.update(dict.fromkeys(used, time.monotonic()))
        self._take_over(state)
        return self._state

    async def give_up(self, deployment: str, key: RunKey, reason: Problem) -> State:
        """A replica that starts could not load a run. Where no replica answers with it, another one takes its place,
        MOST_GIVEN_UP times at most; returns what holds then."""
        async with self._switching:
            if deployment != self._state.deployment or key not in self._state.loaded:
                return self._state
            states = await self._broadcast("state", timeout_s=ASK_TIMEOUT_S)
            if any(
                isinstance(state, State) and state.deployment == deployment and key in state.loaded for state in states
            ):
                return self._state
            if key != self._state.current:
                kept = tuple(other for other in self._state.loaded if other != key)
                changed = self._state._replace(version=self._state.version + 1, loaded=kept)
            elif len(self._given_up) < MOST_GIVEN_UP:
                self._given_up.add(key)
                try:
                    failed = self._failed | {key: reason}
                    usable = partial(self._catalogue.usable, failed=failed)
                    entry, problem = await self._reads.read(usable, seconds=LOAD_TIMEOUT_S)
                except (*UNUSABLE, ServiceError):
                    return self._state
                version, now = self._state.version + 1, entry.key
                changed = State(deployment, version, now, (now,), now, problem)
                self._try_later(key)
                logger.error("run %s can't be served: %s", key.run_id, reason.text)
                logger.error("%s; meanwhile run %s answers", problem, now.run_id)
            else:
                return self._state
            self._failed[key] = reason
            await self._change(changed)
        return self._state

    async def want(self, deployment: str, run_id: str) -> RunKey | ServiceError:
        """See `serve.service.Control.want`."""
        if deployment != self._state.deployment:
            return _taking_over()
        entry = await self._find(run_id)
        if isinstance(entry, ServiceError):
            return entry
        key = entry.key
        self._used[key] = time.monotonic()
        if key in self._state.loaded:
            return key
        if key in self._failed:
            return ServiceError(409, "run_unusable", f"run {run_id} can't be served: {self._failed[key].text}")
        if key not in self._loading:
            task = self._loading[key] = asyncio.create_task(self._bring(entry, current=False))
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        message = f"run {run_id} is being loaded"
        return ServiceError(503, "loading", message, {"model": run_id}, {"Retry-After": "1"})

    async def load(self, deployment: str, run_id: str) -> LoadResponse | ServiceError:
        """See `serve.service.Control.load`; a run that failed before is tried again."""
        if deployment != self._state.deployment:
            return _taking_over()
        entry = await self._find(run_id, latest=True)
        if isinstance(entry, ServiceError):
            return entry
        previous, start = self._state.current.run_id, time.monotonic()
        run = RunDirectory(entry.key.url, entry.key.run_id)
        try:  # before anything changes: what answers afterwards must be told
            identities = await self._reads.read(identities_of, run, entry.manifest, entry.layers, seconds=OPEN_S)
        except (*UNUSABLE, ServiceError) as error:
            return _unreadable(run_id, error)
        problem = await self._bring(entry, current=True, named=self._is_name(run_id))
        if problem:
            message = f"run {run_id} can't be served, {previous} still answers: {problem.text}"
            return ServiceError(409, "run_unusable", message)
        lowest = next(iter(identities.values()))
        seconds = time.monotonic() - start
        return LoadResponse(model=lowest, layers=list(identities), previous=previous, seconds=seconds)

    async def runs(self, deployment: str) -> list[RunSummary] | ServiceError:
        """All runs beside the one that the service was started with."""
        if deployment != self._state.deployment:
            return _taking_over()
        tried = {*self._state.loaded, *self._failed, *self._loading}
        try:
            found = await self._reads.read(self._entries, tried, key="runs", seconds=STORAGE_S)
        except ServiceError as error:
            return error
        except (OSError, StorageError) as error:
            return storage_fails(error)
        return [self._summary(listed) for listed in found]

    async def metrics(self) -> bytes:
        """All replicas' counts, as they are now, in Prometheus's text format."""
        answers = await self._broadcast("totals")
        if self._settings.interventions:
            answers += await self._broadcast("totals", of="Circuits")
        live = {answer[0]: answer[1] for answer in answers if not isinstance(answer, Exception)}
        self._totals.update(live)
        gone = [totals for replica, totals in self._totals.items() if replica not in live]
        return await asyncio.to_thread(render_metrics, live.values(), gone, self._info())

    def _take_over(self, state: State) -> None:
        """A replica's state was decided before a restart, and holds, unless it is that of another deployment."""
        if state.deployment == self._state.deployment and state.version >= self._state.version:
            self._state = state

    def _entries(self, tried: set[RunKey]) -> list[Listed]:
        """All runs, and those layers of a run of several that were loaded or `tried` alone."""
        found = self._catalogue.entries()
        for key in tried - {listed.key for listed in found}:
            try:
                alone = self._catalogue.find(key.run_id)
            except (RunError, ValueError):
                continue  # it is gone, and answers from memory
            if alone.key == key:
                found.append(alone.listed)
        return sorted(found, key=lambda listed: (listed.key.created, listed.key.run_id), reverse=True)

    async def _find(self, run_id: str, latest: bool = False) -> Entry | ServiceError:
        """A run by its id. `latest`: as it is now, also by the name that is served, whatever was asked before."""
        try:
            if latest and self._is_name(run_id):
                return await self._reads.read(self._catalogue.served, seconds=STORAGE_S)
            key = None if latest else ("find", run_id)
            return await self._reads.read(self._catalogue.find, run_id, key=key, seconds=STORAGE_S)
        except SweepError as sweep:
            some = ", ".join(sweep.members[:10]) + (", ..." if len(sweep.members) > 10 else "")
            message = f"run {run_id} is a sweep, whose transcoders share a layer: name one of them as `model`: {some}"
            return ServiceError(404, "unknown_model", message, {"models": list(sweep.members)})
        except RunError:
            return ServiceError(404, "unknown_model", f"there is no finished run {run_id!r}; see GET /runs")
        except (*UNUSABLE, ServiceError) as error:
            return _unreadable(run_id, error)

    def _is_name(self, run_id: str) -> bool:
        """Whether whatever the service was started with is meant."""
        return run_id in ("latest", self._catalogue.name)

    async def _bring(self, entry: Entry, current: bool, named: bool = False) -> Problem | None:
        """Load a run in all replicas, then let it answer; the reason if that can't be, and nothing changes.

        `named`: it is what `Settings.run` names. One at a time, so that replicas need room for one run more than they
        keep.
        """
        key = entry.key
        async with self._switching:
            if key not in self._state.loaded:
                problem = await self._prepare(key)
                if problem:
                    logger.error("run %s can't be served: %s", key.run_id, problem.text)
                    if problem != NO_REPLICA:  # which says nothing of the run
                        self._failed[key] = problem
                    return problem
            self._failed.pop(key, None)
            self._retry = None if self._retry and self._retry[0] == key else self._retry
            self._used[key] = time.monotonic()
            chosen = key if current else self._state.current
            kept, evicted = self._keep(chosen, key)
            changed = self._state._replace(version=self._state.version + 1, current=chosen, loaded=kept)
            if named:
                if changed.problem:
                    logger.warning("%s can be served again", self._catalogue.name)
                # At once with the rest: what replicas report, who do not know of it yet, must not undo it.
                changed = changed._replace(seen=key, problem=None)
            await self._change(changed)
            for old in evicted:
                await self._broadcast("unload", self._state.deployment, old)
            logger.info("run %s is %s", key.run_id, "current" if current else "loaded")
        return None

    async def _prepare(self, key: RunKey) -> Problem | None:
        try:
            await self._reads.read(RunDirectory(key.url, key.run_id).verify, seconds=LOAD_TIMEOUT_S)
        except (RunError, OSError, ValueError, ServiceError) as error:
            return Problem.of(error)
        answers = await self._broadcast("load", self._state.deployment, key, timeout_s=LOAD_TIMEOUT_S)
        answers = [each for each in answers if each != NO_REPLICA]  # of the deployment before
        # A replica that died meanwhile is replaced by one that loads what is needed.
        told = [each for each in answers if each is not None and not isinstance(each, RayActorError)]
        problems = [Problem.of(each) if isinstance(each, Exception) else each for each in told]
        if not problems and not answers:
            problems = [NO_REPLICA]
        if problems:
            await self._broadcast("unload", self._state.deployment, key)
        return problems[0] if problems else None

    def _keep(self, *needed: RunKey) -> tuple[tuple[RunKey, ...], list[RunKey]]:
        """Which runs stay in memory, last used first, and which make room."""
        others = [key for key in self._state.loaded if key not in needed]
        # What answered until now has waiting requests.
        others.sort(key=lambda key: (key == self._state.current, self._used.get(key, 0.0)), reverse=True)
        order = [*dict.fromkeys(needed), *others]
        limit = self._settings.max_loaded_runs
        return tuple(order[:limit]), order[limit:]

    async def _change(self, state: State) -> None:
        self._state = state
        await self._broadcast("use", state)

    async def _broadcast(
        self, method: str, *arguments: Any, timeout_s: float = BROADCAST_TIMEOUT_S, of: str = "Server"
    ) -> list[Any]:
        """Call a method of all replicas of a class of `serve.deployments`, also those of the deployment before; their
        answers or errors."""
        app_name = ray_serve.get_replica_context().app_name
        handle: DeploymentHandle = ray_serve.get_deployment_handle(of, app_name)
        response = handle.broadcast(method, *arguments)
        try:
            return list(await response.results_async(timeout_s=timeout_s, return_exceptions=True))
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            return [TimeoutError(f"no answer to {method} within {timeout_s:g} s")]

    async def _watch(self) -> None:
        """Take over what is published, or promoted, under the name that is served."""
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            try:
                await self._look()
            except Exception as error:
                logger.warning("looking for a new run: %s: %s", type(error).__name__, error)

    async def _look(self) -> None:
        seen = self._state.seen
        try:
            entry = await self._reads.read(self._catalogue.served, key="served", seconds=STORAGE_S)
        except Exception as error:  # of the storage, too
            await self._tell(Problem.of(error))
            return
        if seen != self._state.seen:
            return  # an operator loaded it meanwhile, and what was read may be older
        if entry.key == self._state.seen:
            await self._tell(None)
        elif self._retry and self._retry[0] == entry.key and time.monotonic() < self._retry[1]:
            return
        elif problem := await self._bring(entry, current=True, named=True):
            self._try_later(entry.key)
            if problem != NO_REPLICA:  # they start, and what keeps the run from them is known
                await self._tell(problem)

    async def _tell(self, reason: Problem | None) -> None:
        """Let everybody know why what is named can't be served, or that it can."""
        problem = self._catalogue.words(reason) if reason else None
        if problem == self._state.problem:
            return
        if reason:
            name, current = self._catalogue.name, self._state.current.run_id
            logger.error("%s can't be served: %s; meanwhile run %s answers", name, reason.text, current)
        else:
            logger.warning("%s can be served again", self._catalogue.name)
        await self._change(self._state._replace(version=self._state.version + 1, problem=problem))

    def _try_later(self, key: RunKey) -> None:
        again = self._retry is not None and self._retry[0] == key
        pause = min(2 * self._retry[2], LONGEST_RETRY_S) if self._retry and again else self._settings.watch_seconds
        self._retry = (key, time.monotonic() + pause, pause)

    def _summary(self, listed: Listed) -> RunSummary:
        key = listed.key
        problem = self._failed.get(key)
        reason = problem.text if problem else None
        state = "failed" if reason else "loading" if key in self._loading else "not_loaded"
        if key in self._state.loaded:
            state = "current" if key == self._state.current else "loaded"
        return RunSummary(
            run_id=key.run_id, created=key.created, base_model=listed.base_model, layer=min(listed.layers),
            layers=listed.layers, num_features=listed.num_features, prefixes=listed.prefixes, k=listed.k,
            state=state, reason=reason,  # type: ignore[arg-type]
        )  # fmt: skip

    def _info(self) -> list[Family]:
        key = self._state.current
        found = {
            "mtc_model_info": ((("run_id", key.run_id), ("sha256", key.sha256)), 1.0),
            "mtc_served_name_usable": ((("served", self._catalogue.name),), float(self._state.problem is None)),
        }
        return [
            Family(about.name, about.kind, about.documentation, ((about.name, labels, value),))
            for about, (labels, value) in ((CATALOGUE[name], each) for name, each in found.items())
        ]


def _unreadable(run_id: str, error: Exception) -> ServiceError:
    """What a client is told of what reading a run raised: one of UNUSABLE, or the answer itself."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, OSError | StorageError):
        return storage_fails(error)
    reason = str(error) if isinstance(error, MtcError) else f"its files can't be read ({type(error).__name__})"
    return ServiceError(409, "run_unusable", f"run {run_id} can't be served: {reason}")


def _taking_over() -> ServiceError:
    message = (
        "another deployment of the service is taking over: until it answers, this one answers by the runs that it has "
        "in memory, and no others"
    )
    return ServiceError(503, "unavailable", message, headers={"Retry-After": "5"})
