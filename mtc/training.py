"""The training loop's parts: a shuffle buffer, the Trainer whose step is the whole algorithm, and calibration.

No Ray and no I/O. When torch.distributed is set up, every rank makes the same calls with its share of each batch, and
the result is that of one process with the whole batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtc.config import RunConfig
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape, kth_largest


class StepMetrics(NamedTuple):
    """One training step, over the batches of all ranks."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Tokens trained on, over all steps and ranks."""
    loss: float
    """Training loss: mean over prefixes, plus AuxK."""
    fvu: tuple[float, ...]
    """Per prefix, squared error over squared deviation from the batch's mean."""
    l0: float
    """Active features per token."""
    dead: int
    """Features that have not fired for `dead_after_tokens`."""
    lr: float
    """Learning rate of this step."""
    gradient_norm: float
    """Global gradient norm before clipping."""


class Trainer:
    """Owns the transcoder, its optimizer and its schedule; `state_dict` holds all that must survive a restart."""

    def __init__(self, config: RunConfig, d_source: int, d_target: int, device: str | torch.device = "cpu"):
        self.config = config
        self.device = torch.device(device)
        groups, k = config.transcoder.group_sizes, config.transcoder.k
        shape = TranscoderShape(d_source, d_target, groups, k, config.input_norm)
        self.transcoder = MatryoshkaTranscoder(shape, config.transcoder.seed).to(self.device)
        self.module: nn.Module = self.transcoder
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Buffers are reduced here, by meaning; broadcasting rank 0's would lose the other ranks' counts.
            self.module = DistributedDataParallel(self.transcoder, broadcast_buffers=False)
        optimizer = config.optimizer
        self.optimizer = torch.optim.Adam(
            self.transcoder.parameters(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        self.autocast = choose_autocast(optimizer.precision, self.device)
        self.step_number = 0
        self.tokens = 0

    def initialise(self, source: Tensor, target: Tensor) -> None:
        """Set the transcoder's scalars and biases from the first raw activations [tokens, d]."""
        self.transcoder.initialise(source.to(self.device), target.to(self.device))

    def step(self, source: Tensor, target: Tensor) -> StepMetrics:
        """One step on this rank's share [tokens, d_source], [tokens, d_target] of the global batch, raw activations."""
        source, target = source.to(self.device), target.to(self.device)
        lr = self.learning_rate(self.step_number)
        dead = self.transcoder.tokens_since_fired >= self.config.transcoder.dead_after_tokens
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            output = self.module(
                source, target, self.config.transcoder.aux_k, self.config.transcoder.aux_coefficient, dead
            )
        self.optimizer.zero_grad()
        output.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.transcoder.parameters(), self.config.optimizer.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

        tokens = self._count_tokens(output.fired, len(source))
        self.step_number += 1
        self.tokens += tokens
        variance = self._variance(target)
        sums = torch.cat([
            torch.stack([output.loss.detach().double() * len(source), output.num_active.double()]),
            output.prefix_errors.double() * len(source) * self.transcoder.shape.d_target,
        ])  # fmt: skip
        _all_reduce(sums)
        loss, active, *errors = sums.tolist()
        fvu = tuple(e / variance for e in errors)
        return StepMetrics(
            self.step_number, self.tokens, loss / tokens, fvu, active / tokens, int(dead.sum()), lr, float(norm)
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_lr_fraction` at the last step; `step` counts from 0."""
        settings, total = self.config.optimizer, self.config.total_steps
        if step < settings.warmup_steps:
            return settings.lr * (step + 1) / settings.warmup_steps
        progress = min(1.0, (step - settings.warmup_steps) / max(1, total - 1 - settings.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return settings.lr * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine)

    def _count_tokens(self, fired: Tensor, tokens: int) -> int:
        """Advance the dead-feature counter by the global batch; returns its size."""
        total = torch.tensor(tokens, device=self.device)
        counts = torch.cat([fired.long(), total.reshape(1)])
        _all_reduce(counts)
        since = self.transcoder.tokens_since_fired
        since += counts[-1]
        since[counts[:-1] > 0] = 0
        return int(counts[-1])

    def _variance(self, target: Tensor) -> float:
        """Squared deviation of the global batch's scaled targets from their per-dimension mean, summed."""
        y = target.double() * self.transcoder.target_scale.double()
        moments = torch.cat([y.sum(0), y.square().sum().reshape(1), torch.tensor([float(len(y))]).to(y)])
        _all_reduce(moments)
        total, square, count = moments[:-2], moments[-2], moments[-1]
        return max(float(square - total.square().sum() / count), 1e-30)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything stateful as flat named tensors."""
        state = {f"transcoder.{name}": value for name, value in self.transcoder.state_dict().items()}
        for name, parameter in self.transcoder.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{key}.{name}"] = value
        state["step"] = torch.tensor(self.step_number)
        state["tokens"] = torch.tensor(self.tokens)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        prefix = "transcoder."
        self.transcoder.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        for name, parameter in self.transcoder.named_parameters():
            moments: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer.{key}.{name}" in state:
                    # Adam compares its step counter on the host unless it is fused on a GPU.
                    moments[key] = state[f"optimizer.{key}.{name}"].to(self.device)
            if moments:
                self.optimizer.state[parameter] = moments
        self.step_number, self.tokens = int(state["step"]), int(state["tokens"])


class Calibrator:
    """Finds the inference threshold: the activation that k entries per token exceed, on fresh tokens of all ranks.

    It keeps the strongest pre-activations of each batch, so memory is a small multiple of k per token; exact as long as
    no batch needs more than `headroom` times its share.
    """

    def __init__(self, transcoder: MatryoshkaTranscoder, headroom: int = 4):
        self.transcoder = transcoder
        self.headroom = headroom
        self.tokens = 0
        self.strongest: list[Tensor] = []

    @torch.no_grad()
    def add(self, source: Tensor) -> None:
        """Take in raw source activations [tokens, d_source]."""
        z = self.transcoder.pre_activations(source.to(self.transcoder.W_enc.device)).flatten()
        share = min(z.numel(), self.headroom * self.transcoder.shape.k * len(source))
        border = kth_largest_local(z, share)
        self.strongest.append(z[z >= border] if border > 0 else z[z > 0])
        self.tokens += len(source)

    @torch.no_grad()
    def finish(self) -> float:
        """Set and return the threshold; call on every rank."""
        device = self.transcoder.W_enc.device
        total = torch.tensor(self.tokens, device=device)
        _all_reduce(total)
        values = torch.cat([*self.strongest, torch.zeros(0, device=device)])
        # Entries strictly above the threshold are active, so it is the first value that is not among the k per token.
        threshold = kth_largest(values, self.transcoder.shape.k * int(total) + 1)
        self.transcoder.threshold.fill_(threshold)
        return threshold


class ShuffleBuffer:
    """Mixes the tokens of many windows: rows go in by blocks and come out as random batches, each row once."""

    def __init__(self, capacity: int, seed: int):
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.source: Tensor | None = None
        self.target: Tensor | None = None
        self.unit: Tensor | None = None
        self.size = 0

    def add(self, source: Tensor, target: Tensor, unit: int) -> None:
        """Copy in rows [tokens, d] that belong to work unit `unit`."""
        need = self.size + len(source)
        if self.source is None or self.target is None or self.unit is None or need > len(self.source):
            self._grow(source, target, max(need, self.capacity + len(source)))
        assert self.source is not None and self.target is not None and self.unit is not None
        self.source[self.size : need] = source
        self.target[self.size : need] = target
        self.unit[self.size : need] = unit
        self.size = need

    def ready(self, batch: int) -> bool:
        """Whether enough is mixed for a good batch."""
        return self.size >= max(batch, self.capacity)

    def take(self, batch: int) -> tuple[Tensor, Tensor]:
        """Remove and return `batch` random rows; raises ValueError if there are fewer."""
        if batch > self.size or self.source is None or self.target is None or self.unit is None:
            raise ValueError(f"{batch} rows were asked of a shuffle buffer that holds {self.size}")
        index = torch.randperm(self.size, generator=self.generator)[:batch]
        source, target = self.source[index], self.target[index]
        left = self.size - batch
        # Rows from the end fill the holes.
        keep = torch.ones(self.size, dtype=torch.bool)
        keep[index] = False
        holes = index[index < left]
        movers = keep[left:].nonzero().squeeze(1) + left
        for column in (self.source, self.target, self.unit):
            column[holes] = column[movers]
        self.size = left
        return source, target

    def units(self) -> set[int]:
        """Work units that still have rows here."""
        return set() if self.unit is None else set(self.unit[: self.size].unique().tolist())

    def peek(self) -> tuple[Tensor, Tensor]:
        """All rows, unmixed and not removed."""
        assert self.source is not None and self.target is not None
        return self.source[: self.size], self.target[: self.size]

    def _grow(self, source: Tensor, target: Tensor, rows: int) -> None:
        def larger(old: Tensor | None, like: Tensor) -> Tensor:
            new = torch.empty((rows, *like.shape[1:]), dtype=like.dtype)
            if old is not None:
                new[: self.size] = old[: self.size]
            return new

        self.source = larger(self.source, source)
        self.target = larger(self.target, target)
        self.unit = larger(self.unit, torch.empty(0, dtype=torch.int64))


def choose_autocast(precision: str, device: torch.device) -> bool:
    """Whether the transcoder's products run in bfloat16: `auto` says yes where the hardware multiplies it fast."""
    if precision != "auto":
        return precision == "bfloat16"
    from mtc.language_model import choose_dtype

    return choose_dtype("auto", device) == torch.bfloat16


def kth_largest_local(values: Tensor, count: int) -> float:
    """The count-th largest of this rank's values, 0 or more."""
    return max(0.0, float(values.topk(count).values[-1]))


def _all_reduce(tensor: Tensor) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
