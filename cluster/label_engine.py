"""The language models that name features and judge the names, on this cluster's own GPUs: one Ray actor for each copy.

Not through `ray.data.llm`: the questions of a round build on the answers of the one before, and a Ray Data job for each
would load the model anew. Actors hold it from the first question to the last, and end with the job, whatever ends that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import ray
import ray.exceptions

from cluster.room import reserved
from mtc.config import ConfigError
from mtc.errors import one_line
from mtc.labels.endpoint import Answer, Asking
from mtc.labels.offline import OfflineModel
from mtc.labels.prompts import Question
from mtc.labels.transport import END, GIVEN_UP, EndpointDown, EndpointError, Known
from mtc.telemetry import say

BATCH, AT_ONCE = 256, 2
"""Questions that an actor is asked together, and batches that wait at each: the next is there when one ends."""
BATCH_SECONDS = 7200.0
"""After which a batch is given up; the first waits for the model to be fetched and loaded."""
GO_ON = "the same command goes on where this one ends"
ENDING_SECONDS = 30.0
"""In which an actor is to end by itself, and with it what vLLM started."""

Answerer = Callable[[Sequence[Question]], list[Answer]]
Load = Callable[[str, int, int, Mapping[str, Any]], Answerer]


class Settings(NamedTuple):
    """How the models are run."""

    copies: int = 1
    """Copies of a model."""
    gpus: int = 1
    """GPUs of each copy."""
    thinking_tokens: int = 0
    """As of OfflineModel."""
    vllm: Mapping[str, Any] = {}
    """As `settings` of OfflineModel."""
    room_seconds: float = 600.0
    """Longest wait for free GPUs."""


class Engines:
    """Models on the connected cluster, one at a time, for as long as this is used as a context.

    Args:
        load: makes what answers, in the actor; another than OfflineModel for tests.
    """

    def __init__(self, settings: Settings, load: Load = OfflineModel):
        self.settings, self._load = settings, load
        self._model: str | None = None
        self._actors: list[Any] = []
        self._room = ExitStack()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def of(self, model: str) -> Engine:
        """What answers as `model`."""
        return Engine(self, model)

    def actors(self, model: str) -> list[Any]:
        """The actors of a model; they are started if they are not there, and those of another ended before. Raises
        ConfigError for GPUs that the cluster has not, ClusterBusy where others hold them."""
        if model != self._model:
            self._end()
            own = self.settings
            _check_gpus(own)
            say("engine", f"loading {model}: {own.copies} x {own.gpus} GPUs", model=model)
            each = {"CPU": 1.0} | ({"GPU": float(own.gpus)} if own.gpus else {})
            place = self._room.enter_context(
                reserved(each, own.copies, None, own.room_seconds, f"{model} has no place")
            )
            actor = _Model.options(num_cpus=1, num_gpus=own.gpus, scheduling_strategy=place)  # type: ignore[attr-defined]
            arguments = (self._load, model, own.gpus, own.thinking_tokens, dict(own.vllm))
            self._actors = [actor.remote(*arguments) for _ in range(own.copies)]
            self._model = model
        return self._actors

    def _end(self) -> None:
        ends = [actor.__ray_terminate__.options(max_task_retries=0).remote() for actor in self._actors]
        self._model, self._actors = None, []
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=ENDING_SECONDS)
        self._room.close()


def _check_gpus(settings: Settings) -> None:
    """Raises ConfigError for what would not fit if all was free; an autoscaler is not asked for nodes."""
    gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    copies = [own // settings.gpus for own in gpus if settings.gpus]
    if settings.gpus and sum(copies) < settings.copies:
        wanted = f"--engines {settings.copies} with --engine-gpus {settings.gpus}"
        have = f"the cluster's nodes have {', '.join(map(str, gpus))} GPUs, for {sum(copies)} of them"
        raise ConfigError(f"{wanted}: {have}")


class Engine:
    """One of the models; see mtc.labels.labelling.Asked."""

    def __init__(self, engines: Engines, model: str):
        self.model, self._engines = model, engines

    def answers(self, questions: Iterable[Asking]) -> Iterator[tuple[Question, Answer]]:
        """The answers, batch by batch. Raises EndpointError where the model can't be run or answers nothing, and
        EndpointDown where it ended."""
        waiting: dict[ray.ObjectRef, tuple[Any, list[Question]]] = {}
        try:
            yield from self._answers(questions, waiting)
        finally:
            for ref in waiting:  # what has not begun need not
                ray.cancel(ref)

    def _answers(
        self, questions: Iterable[Asking], waiting: dict[ray.ObjectRef, tuple[Any, list[Question]]]
    ) -> Iterator[tuple[Question, Answer]]:
        source, ended, unanswered, answered = iter(questions), False, 0, False
        batch: list[Question] = []
        while not ended or waiting:
            item: object = None
            while not ended and len(waiting) < AT_ONCE * self._engines.settings.copies:
                item = next(source, END)
                if isinstance(item, Known):
                    answered = True
                    yield item
                    continue
                if isinstance(item, Question):
                    batch.append(item)
                ended = item is END
                if batch and (len(batch) == BATCH or not isinstance(item, Question)):
                    actor = self._idlest(waiting)
                    waiting[actor.answer.remote(batch)] = actor, batch
                    batch = []
                if item is None:
                    break
            if not waiting:
                continue
            done, _ = ray.wait(list(waiting), timeout=BATCH_SECONDS)
            if not done:
                raise EndpointDown(f"{self.model}: no answer for {BATCH_SECONDS:g} s; {GO_ON}")
            _, asked = waiting.pop(done[0])
            for question, answer in zip(asked, self._read(done[0]), strict=True):
                answered, unanswered = answered or answer.failure is None, unanswered + (answer.failure is not None)
                yield question, answer
            if unanswered >= GIVEN_UP and not answered:
                raise EndpointError(
                    f"{self.model}: {unanswered} questions without an answer, the last: {answer.failure}"
                )

    def _idlest(self, waiting: Mapping[ray.ObjectRef, tuple[Any, list[Question]]]) -> Any:
        """The actor that is asked least."""
        actors = self._engines.actors(self.model)
        asked = Counter(actor for actor, _ in waiting.values())
        return min(actors, key=lambda actor: asked[actor])

    def _read(self, done: ray.ObjectRef) -> list[Answer]:
        try:
            answers: list[Answer] = ray.get(done, timeout=BATCH_SECONDS)
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                why = one_line(error).partition(": ")[2].removeprefix("mtc.labels.transport.EndpointError: ")
                raise EndpointError(f"{self.model} can't be run: {why}") from None
            raise EndpointDown(f"{self.model} has ended: {one_line(error)}; {GO_ON}") from None
        except ray.exceptions.RayTaskError as error:
            raise EndpointError(f"{self.model}: {one_line(error)}") from None
        except ray.exceptions.RayError as error:  # of a node that died with the answers
            raise EndpointDown(f"{self.model} has ended: {one_line(error)}; {GO_ON}") from None
        return answers


@ray.remote(max_restarts=1, max_task_retries=1)
class _Model:
    """A copy of a model, and the process that it is in."""

    def __init__(self, load: Load, *arguments: Any):
        self._model = load(*arguments)

    def answer(self, questions: list[Question]) -> list[Answer]:
        return self._model(questions)
