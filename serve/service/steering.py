"""Prompts that are steered step by step, as whoever asked fetches the steps; who does not any more costs nothing."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve.contract import CircuitMetrics, RunKey, ServiceError, Settings, SteerRequest
from serve.service.circuit_model import CircuitModel, overloaded, told, too_many

if TYPE_CHECKING:
    from mtc.circuits import ReplacementModel
    from mtc.circuits.interventions import Steering, Step

IDLE_S = 60.0
"""After which a steered prompt whose next step nobody has fetched is forgotten."""
PASSES = 4
"""Rows for each continuation: with interventions and without, each under both models."""


@dataclass(eq=False)
class _Steered:
    """A prompt that is being steered."""

    steering: Steering
    steps: Any
    """What is left of the steering's steps."""
    seen: list[Step] = field(default_factory=list)
    fetched: float = field(default_factory=time.monotonic)
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held while a pass runs."""

    def idle_since(self, then: float) -> bool:
        return self.fetched < then and not self.busy.locked()


class Steerings:
    """Steered prompts, for any number of threads. What a client is to be told is raised as ServiceError."""

    def __init__(self, settings: Settings, model: CircuitModel, metrics: CircuitMetrics):
        self._settings, self._model, self._metrics = settings, model, metrics
        self._lock = threading.Lock()
        """Guards the dictionary."""
        self._steered: dict[str, _Steered | None] = {}
        """By id; None while the first pass has not ended. Each has borrowed the model."""
        self._metrics.steerings.set_function(self._count)

    def begin(self, key: RunKey, asked: SteerRequest) -> tuple[str, dict[str, Any]]:
        """Begin to steer a prompt; its id, the prompt's tokens and how the next one changes.

        Raises 413 and 422 for what the model has not, 429 if too many prompts are steered, 503 while the run is loaded,
        409 if it cannot be.
        """
        steered_id = secrets.token_urlsafe(16)
        self.forget_idle()
        with self._lock:
            if len(self._steered) >= (limit := self._settings.max_steerings):
                message = f"{len(self._steered)} prompts are being steered, max_steerings is {limit}"
                raise overloaded(message, limit, len(self._steered) + 1)
            model = self._model.borrow(key)
            self._steered[steered_id] = None
        try:
            steering = told(lambda: self._begin(model, asked))
            begun = {
                "run_id": key.run_id, "base_model": model.model.config.name, "token_ids": steering.token_ids,
                "tokens": model.strings(steering.token_ids),
                "next": [each.model_dump(mode="json") for each in steering.next],
            }  # fmt: skip
            with self._lock:
                if steered_id not in self._steered:
                    raise _gone()
                self._steered[steered_id] = _Steered(steering, steering.steps())
            return steered_id, begun
        except BaseException:
            self.end(steered_id)
            raise

    def step(self, steered_id: str) -> dict[str, Any]:
        """The next token of each continuation, `type` step, or, behind the last, all of it, `type` steered."""
        with self._lock:
            found = self._steered.get(steered_id)
        if found is None:
            raise _gone()
        with found.busy:
            if steered_id not in self._steered:
                raise _gone()
            with self._model.turns.turn():
                step = next(found.steps, None)
            found.fetched = time.monotonic()
            if step is not None:
                found.seen.append(step)
                self._metrics.steered.inc()
                return {"type": "step"} | _tokens(found)
        self.end(steered_id)
        from mtc.circuits.interventions import collect  # as above; PyTorch is there by now

        return {"type": "steered"} | collect(found.steering, found.seen).model_dump(mode="json")

    def end(self, steered_id: str) -> None:
        """Forget a prompt that is steered, when its pass that runs has ended."""
        with self._lock:
            if steered_id not in self._steered:
                return
            found = self._steered.pop(steered_id)
        with found.busy if found else nullcontext():
            self._model.give_back()

    def close(self) -> None:
        """Forget all."""
        for steered_id in list(self._steered):
            self.end(steered_id)

    def forget_idle(self) -> None:
        """Forget those whose steps nobody fetches any more; called when a prompt begins to be steered, another run is
        wanted, and when they are counted."""
        old = time.monotonic() - IDLE_S
        with self._lock:
            idle = [i for i, found in self._steered.items() if found and found.idle_since(old)]
        for steered_id in idle:
            self.end(steered_id)

    def _count(self) -> int:
        self.forget_idle()
        return len(self._steered)

    def _begin(self, model: ReplacementModel, asked: SteerRequest) -> Steering:
        from mtc.circuits import Intervention  # as above; PyTorch is there by now
        from mtc.circuits.interventions import Steering

        messages: Any = asked.messages and [message.model_dump() for message in asked.messages]
        prompt: Any = asked.prompt or messages or asked.input_ids
        ids = model.window(prompt).input_ids.tolist()
        limit, tokens = self._settings.max_input_tokens, len(ids) + asked.max_tokens
        if tokens > limit:
            message = f"the prompt has {len(ids)} tokens and max_tokens is {asked.max_tokens}: {tokens}"
            raise too_many("input_too_long", message, limit, tokens)
        limit, rows = self._settings.max_request_tokens, PASSES * asked.n
        if rows * tokens > limit:
            message = f"{rows} passes over {tokens} tokens, of n={asked.n}, are {rows * tokens}"
            raise too_many("too_many_tokens", message, limit, rows * tokens)
        changes = [Intervention.model_validate(each.model_dump()) for each in asked.interventions]
        with self._model.turns.turn():
            return Steering(
                model, ids, changes, max_tokens=asked.max_tokens, n=asked.n, temperature=asked.temperature,
                seed=asked.seed, attention=asked.attention, special=asked.special,
            )  # fmt: skip


def _gone() -> ServiceError:
    return ServiceError(404, "not_found", "this prompt is not being steered any more")


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
