"""The one `ReplacementModel` that is in memory, of the run that was asked for last, and who uses it."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from mtc.errors import one_line
from serve.contract import RunKey, ServiceError, Settings
from serve.service.served_run import verified
from serve.service.turns import Turns

if TYPE_CHECKING:
    from mtc.circuits import ReplacementModel

T = TypeVar("T")
logger = logging.getLogger("ray.serve")

FAILED_FOR_S = 60.0
"""For which a run that could not be loaded is not tried again for those who do not wait for it."""
AWAITED_S = 15.0
"""For which a run that was loaded for steering stays, until whoever was told to ask again has."""

Load = Callable[[RunKey, Settings], "ReplacementModel"]


def load_replacement(key: RunKey, settings: Settings) -> ReplacementModel:
    """The whole language model and all transcoders of a run. Raises what is wrong with it."""
    # Not at the top: a service without interventions does without.
    from mtc.circuits import ReplacementModel
    from mtc.devices import open_device

    return ReplacementModel.load(verified(key), open_device(settings.interventions_device))


class CircuitModel:
    """Loads runs one at a time, in the thread of the work that is submitted to it; what lasts no longer than a step of
    others takes turns on the model: `turns`."""

    def __init__(self, settings: Settings, load: Load):
        self._settings, self._load = settings, load
        self.turns = Turns()
        self.drop_idle: Callable[[], None] = lambda: None
        """Called while a run's users are waited for, to give back what nobody needs any more."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="graphs")
        self._changed = threading.Condition()
        """Guards all below but the model's own work."""
        self._key: RunKey | None = None
        self._model: ReplacementModel | None = None
        self._users, self._awaited_until = 0, 0.0
        self._loading: set[RunKey] = set()
        self._failed: dict[RunKey, tuple[float, str]] = {}

    def submit(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        """Have work done in the model's thread, in order; it may `bring` runs."""
        return self._worker.submit(work, *arguments)

    def open(self, key: RunKey) -> None:
        """Have a run's models ready. Raises what is wrong with it."""
        self._worker.submit(self.bring, key).result()

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def loaded(self, key: RunKey) -> ReplacementModel | None:
        """The run's models, if they are in memory."""
        with self._changed:
            return self._model if self._key == key else None

    def borrow(self, key: RunKey) -> ReplacementModel:
        """The run's models, which stay until `give_back`. Raises ServiceError 503 if they are not in memory: they are
        loaded when the work before is done, and stay until they are asked for again; 409 if they can't be."""
        with self._changed:
            if self._key == key and self._model is not None:
                self._users, self._awaited_until = self._users + 1, 0.0
                return self._model
            since, message = self._failed.get(key, (0.0, ""))
            if message and time.monotonic() < since + FAILED_FOR_S:
                raise ServiceError(
                    409, "run_unusable", f"run {key.run_id} can't be loaded for interventions: {message}"
                )
            if key not in self._loading:
                self._loading.add(key)
                self._worker.submit(self._bring_ahead, key)
        message = f"run {key.run_id} is being loaded for interventions"
        raise ServiceError(503, "loading", message, {"model": key.run_id}, {"Retry-After": "1"})

    def give_back(self) -> None:
        with self._changed:
            self._users -= 1
            self._changed.notify_all()

    def bring(self, key: RunKey) -> ReplacementModel:
        """In the model's thread: the run's models, in the place of another one's, which are dropped first, when nobody
        has borrowed them any more or is awaited. Raises what is wrong with the run."""
        with self._changed:
            if self._key == key and self._model is not None:
                return self._model
        self._drop()
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

    def _drop(self) -> None:
        while True:
            self.drop_idle()
            with self._changed:
                if time.monotonic() >= self._awaited_until:
                    self._key = None  # nobody borrows it any more
                    if not self._users:
                        self._model = None
                        break
                self._changed.wait(timeout=1)
        gc.collect()

    def _bring_ahead(self, key: RunKey) -> None:
        try:
            self.bring(key)
            with self._changed:
                self._awaited_until = time.monotonic() + AWAITED_S
        except Exception as error:
            logger.error("run %s can't be loaded for interventions: %s", key.run_id, one_line(error))
        finally:
            with self._changed:
                self._loading.discard(key)


def told(work: Callable[[], T]) -> T:
    """What the work returns; a CircuitError is told as 422."""
    from mtc.circuits import CircuitError  # as above; PyTorch is there by now

    try:
        return work()
    except CircuitError as error:
        raise ServiceError(422, "validation", str(error)) from None


def overloaded(message: str, limit: int, value: int) -> ServiceError:
    return ServiceError(429, "overloaded", message, {"limit": limit, "value": value}, {"Retry-After": "2"})


def too_many(kind: str, message: str, limit: int, value: int) -> ServiceError:
    return ServiceError(413, kind, f"{message}, the limit is {limit}", {"limit": limit, "value": value})
