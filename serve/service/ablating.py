"""Texts that features are taken out of, one pass at a time on the model that graphs and steering use."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from serve.contract import AblateRequest, RunKey, Settings
from serve.service.circuit_model import CircuitModel, overloaded, told, too_many

if TYPE_CHECKING:
    from mtc.circuits import ReplacementModel
    from mtc.results import Ablated


class Ablations:
    """For any number of threads. What a client is to be told is raised as ServiceError."""

    def __init__(self, settings: Settings, model: CircuitModel):
        self._settings, self._model = settings, model
        self._lock = threading.Lock()
        self._inside = 0
        """Texts that wait for their turn on the model, or have it."""

    def ablate(self, key: RunKey, asked: AblateRequest) -> Ablated:
        """A text with the features and without.

        Raises 413 and 422 for what the model has not, 429 if too many wait, 503 while the run is loaded, 409 if it
        can't be.
        """
        with self._lock:
            if self._inside >= (limit := self._settings.max_steerings):
                message = f"{self._inside} texts wait for features to be taken out, max_steerings is {limit}"
                raise overloaded(message, limit, self._inside + 1)
            self._inside += 1
        try:
            model = self._model.borrow(key)
            try:
                return told(lambda: self._ablate(model, asked))
            finally:
                self._model.give_back()
        finally:
            with self._lock:
                self._inside -= 1

    def _ablate(self, model: ReplacementModel, asked: AblateRequest) -> Ablated:
        from mtc.circuits import ablate  # as in circuit_model; PyTorch is there by now

        prompt: Any = asked.prompt or asked.input_ids
        ids = model.token_ids(prompt)  # `ablate` refuses also what the model has no positions for
        limit = self._settings.max_graph_tokens
        if len(ids) > limit:
            raise too_many("input_too_long", f"the text has {len(ids)} tokens", limit, len(ids))
        with self._model.turns.turn():
            return ablate(model, ids, asked.layer, asked.features)
