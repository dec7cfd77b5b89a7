"""The whole training on activations that fit into memory, for a notebook: one process, no stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtc.config import ConfigError, RunConfig
from mtc.training.calibration import CALIBRATION_ROWS, Calibrator
from mtc.training.trainer import StepMetrics, Trainer

if TYPE_CHECKING:
    from mtc.language_model import Neurons

INITIAL_ROWS = 16_384
"""Most tokens, of each rank, that set scales, encoder and biases."""


def train_in_memory(
    config: RunConfig,
    source: Tensor,
    target: Tensor,
    neurons: Neurons | None = None,
    look: Callable[[StepMetrics], None] | None = None,
    every: int = 10,
) -> Trainer:
    """Train a transcoder on raw activations [tokens, d_source], [tokens, d_target]; returns its trainer.

    The first `data.num_tokens` tokens are trained, each `data.replays` times in orders of their own; those behind them,
    as many as `transcoder.calibration_tokens` says, set the threshold. `look` is called at every so many steps, the
    first and the last. `neurons` are wanted with `transcoder.init: mlp`.

    Raises ConfigError if there are too few tokens.
    """
    trained, batch = config.data.num_tokens, config.optimizer.batch_tokens
    if len(source) < (least := trained + config.fresh_tokens):
        raise ConfigError(
            f"data.num_tokens={trained} and transcoder.calibration_tokens need {least} tokens, not {len(source)}: "
            "lower data.num_tokens, or capture more"
        )
    trainer = Trainer(config, source.shape[1], target.shape[1], source.device)
    first = min(trained, INITIAL_ROWS)
    trainer.initialise(source[:first], target[:first], neurons)
    generator = torch.Generator().manual_seed(config.data.seed)
    order = torch.cat([torch.randperm(trained, generator=generator) for _ in range(config.data.replays)])
    total = config.total_steps
    for step, rows in enumerate(order[: total * batch].split(batch), 1):
        done = trainer.step(source[rows], target[rows])
        if look and (step % every == 0 or step in (1, total)):
            look(done.metrics())
    if trainer.transcoder.activation.thresholds == "calibrated":
        calibrator = Calibrator(trainer.transcoder)
        for part in torch.arange(trained, least).split(CALIBRATION_ROWS):
            calibrator.add(trainer.calibrated_on(source[part], target[part]))
        calibrator.finish()
    return trainer
