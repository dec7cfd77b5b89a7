"""Rows of tokens that the whole language model goes on with, a token at a time, while MLPs may be changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mtc.language_model.attention import Rows
from mtc.language_model.mlps import Mlps, Visit


class Continuing:
    """Rows of one length; what was run before is kept in a cache."""

    def __init__(self, model: nn.Module, mlps: Mlps, visits: Mapping[int, Visit], leading: int | None):
        self._model, self._mlps, self._visits, self._leading = model, mlps, visits, leading
        config: Any = model.config
        self._cache = DynamicCache(config=config)
        self.tokens = 0
        """Tokens of each row that were run."""

    def step(self, input_ids: Tensor) -> Tensor:
        """Run the rows' next tokens, [rows, new] int64; returns the logits behind the last, [rows, vocabulary]."""
        return self._run(input_ids, 1)[:, -1]

    def logits(self, input_ids: Tensor) -> Tensor:
        """The same; returns the logits behind each of them, [rows, new, vocabulary]."""
        return self._run(input_ids, 0)

    @torch.no_grad()
    def _run(self, input_ids: Tensor, kept: int) -> Tensor:
        """Logits behind the last `kept` tokens, behind all for 0."""
        about: dict[str, Any] = {
            "position_ids": torch.arange(self.tokens, self.tokens + input_ids.shape[1], device=input_ids.device)[None],
            "past_key_values": self._cache,
            "use_cache": True,
            "windows": Rows(self._leading),
            "logits_to_keep": kept,
        }
        with self._mlps.visited(self._visits):
            logits: Tensor = self._model(input_ids=input_ids, **about).logits
        self.tokens += input_ids.shape[1]
        return logits
