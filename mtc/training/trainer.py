"""The Trainer: the transcoder, its optimizer and its schedule, whose step is the whole algorithm.

No Ray and no I/O. When torch.distributed is set up, every rank makes the same calls with its share of each batch, or
with all of it and its share of the features, and the result is that of one process with the whole batch.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtc.config import ConfigError, RunConfig
from mtc.devices import choose_bfloat16, device_name, is_gpu, synchronise
from mtc.training.backends import Backend, choose_backend
from mtc.training.calibration import CALIBRATION_ROWS, Calibrator
from mtc.training.neuron_start import strongest_directions
from mtc.transcoder import (
    BY_FEATURE,
    Averaging,
    Compute,
    MatryoshkaTranscoder,
    Objective,
    Shard,
    TrainOutput,
    Workspace,
    above,
    agree,
    all_reduce,
    copy_from_first,
    massive_norm,
    native,
    transcoder_shape,
    world_size,
)

if TYPE_CHECKING:
    from mtc.language_model import Neurons

BACKENDS: tuple[Backend, ...] = ("dense", "sparse")
THRESHOLD_RATE = 25.0
"""Learning rate of trained thresholds in those of the weights: Adam moves every number by about the rate at a step, and
a pre-activation is the sum of as many moved weights as the source has dimensions."""
DEAD_REFRESH = 8
"""Steps between two looks at which features are dead, for AuxK to work on."""


class StepMetrics(NamedTuple):
    """Figures of one training step, over the batches of all ranks."""

    step: int
    """Training steps done, this one included."""
    tokens: int
    """Tokens trained on up to now, over all steps and ranks."""
    loss: float
    """Training loss: weighted mean over prefixes, plus AuxK and the activation function's penalty."""
    fvu: tuple[float, ...]
    """Squared error over squared deviation from the batch's mean, per prefix, without massive tokens."""
    l0: float
    """Active features per token of the batch, mean."""
    dead: int
    """Features that have not fired for `dead_after_tokens`."""
    dead_groups: tuple[int, ...]
    """Features of each group that have not fired for `dead_after_tokens`."""
    lr: float
    """Learning rate of the step."""
    gradient_norm: float
    """Global gradient norm before clipping."""
    skipped: int = 0
    """Steps up to now whose gradient was not finite, so that they changed no weights."""
    skipped_in_a_row: int = 0
    """Steps in a row, up to now, whose gradient was not finite."""


class StepResult(NamedTuple):
    """What a training step leaves on the device; `metrics` waits for it."""

    step: int
    """Training steps done, this one included."""
    tokens: int
    """Tokens trained on up to now, over all steps and ranks."""
    batch: int
    """Tokens of the step's global batch, over all ranks."""
    lr: float
    """Learning rate of the step."""
    ranks: int
    """Processes that trained together, each with a part of the loss."""
    gradient_norm: Tensor
    """Scalar, global gradient norm before clipping."""
    dead: Tensor
    """[groups], features of each group that have not fired for `dead_after_tokens`."""
    totals: TrainOutput
    """The step's TrainOutput, summed over all ranks; `fired` is of the features that this rank has."""
    skipped: Tensor
    """[2]: steps without a finite gradient, in all and in a row."""

    def loss_and_l0(self) -> Tensor:
        """[2], training loss and active features per token, on the device."""
        return torch.stack((self.totals.loss.reshape(()) / self.ranks, self.totals.num_active.reshape(()) / self.batch))

    def metrics(self) -> StepMetrics:
        totals = self.totals
        loss = float(totals.loss) / self.ranks
        counted = max(float(totals.counted), 1)
        deviation = float(totals.target_square) - float(totals.target_sum.square().sum()) / counted
        fvu = tuple(error / max(deviation, 1e-30) for error in totals.errors.tolist())
        l0 = float(totals.num_active) / self.batch
        norm = float(self.gradient_norm)
        skipped, in_a_row = self.skipped.tolist()
        dead = tuple(self.dead.tolist())
        return StepMetrics(self.step, self.tokens, loss, fvu, l0, sum(dead), dead, self.lr, norm, skipped, in_a_row)


class Trainer:
    """Owns the transcoder, its optimizer and its schedule; `state_dict` holds all that must survive a restart."""

    def __init__(
        self,
        config: RunConfig,
        d_source: int,
        d_target: int,
        device: str | torch.device = "cpu",
        split: Literal["tokens", "features"] = "tokens",
    ):
        """`split` says what the ranks of torch.distributed share: each batch's tokens, and all have the same weights;
        or the features of one dictionary, of which each holds its Shard, and all see all tokens. Raises ConfigError for
        features with the dense backend, or with a group of fewer features than ranks."""
        if split == "features" and config.optimizer.backend == "dense":
            raise ConfigError("optimizer.backend='dense' has no features over several trainers; take sparse or auto")
        self.shard = Shard.of_this_rank(config.transcoder.group_sizes) if split == "features" else None
        """This rank's features of the dictionary; None where every rank has all."""
        self.replicas = world_size() if self.shard is None else 1
        """Ranks that have the same weights and share each batch's tokens."""
        self.config = config
        self.device = torch.device(device)
        settings, optimizer = config.transcoder, config.optimizer
        shape = transcoder_shape(config, d_source, d_target)
        self.transcoder = MatryoshkaTranscoder(shape, settings.seed, self.shard).to(self.device)
        self.averaging = Averaging(self.transcoder, self.device, self.shard is None)
        named = dict(self.transcoder.named_parameters())
        thresholds = [named.pop("threshold")] if "threshold" in named else []
        groups = [{"params": list(named.values()), "rate": 1.0}, {"params": thresholds, "rate": THRESHOLD_RATE}]
        self.optimizer: Any = torch.optim.Adam(
            groups, lr=config.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        self.compute: Compute | None = None
        """How losses are computed, which is chosen at the first step; None before."""
        self.compute_timings: dict[str, float] = {}
        """Seconds of each backend's forward and backward pass, where `optimizer.backend: auto` measured them."""
        self.compute_reason = ""
        """Why `optimizer.backend: auto` took its backend on a GPU."""
        self.workspace = Workspace()
        self.dead = torch.zeros(self.transcoder.num_features, dtype=torch.bool, device=self.device)
        """[features] bool: the dead features that AuxK works on; looked up every DEAD_REFRESH steps, since that waits
        for the device."""
        self.dead_index = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.dead_elsewhere = 0
        """Features that AuxK works on at ranks that hold other features."""
        self.skipped = torch.zeros(2, dtype=torch.int64, device=self.device)
        """[2], steps without a finite gradient, in all and in a row; on the device, so that looking for them waits for
        nothing."""
        self.step_number = 0
        self.tokens = 0

    def initialise(self, source: Tensor, target: Tensor, neurons: Neurons | None = None) -> None:
        """Set the transcoder's scalars, encoder and biases from the first raw activations [tokens, d], the encoder as
        far as there are any from the MLP's strongest `neurons`, and thresholds that are trained so that k features per
        token are active. Every rank has its share of these tokens, or all where ranks share features. Raises
        ValueError for `transcoder.init: mlp` without neurons."""
        if neurons is None and self.config.transcoder.init == "mlp":
            raise ValueError(
                "transcoder.init='mlp' starts from the MLP's neurons: give those of mtc.language_model.read_neurons, "
                "or set transcoder.init='tokens'"
            )
        source, target, seed = source.to(self.device), target.to(self.device), self.config.transcoder.seed
        keep = self.config.transcoder.massive_tokens == "keep"
        everything = source, target
        if self.shard is not None:  # each looks at a part of what all have
            source, target = self.shard.share(source), self.shard.share(target)
        norm = massive_norm(target)
        usual = source[~above(target, norm) | keep]
        directions = None if neurons is None else strongest_directions(neurons, usual)
        self.transcoder.initialise(source, target, seed, directions, keep)
        if self.transcoder.activation.thresholds == "trained":
            first = Calibrator(self.transcoder)
            source, target = everything
            for rows in source[~above(target, norm) | keep].split(CALIBRATION_ROWS):
                first.add(rows)
            first.finish()

    def calibrated_on(self, source: Tensor, target: Tensor) -> Tensor:
        """Those of raw sources [tokens, d_source] on which a threshold is set: k is what tokens that are not massive
        have, or with `massive_tokens: keep` all."""
        keep = self.config.transcoder.massive_tokens == "keep"
        return source if keep else source[~self.transcoder.massive(target.to(self.device)).to(source.device)]

    def step(self, source: Tensor, target: Tensor, global_tokens: int | None = None) -> StepResult:
        """One step on this rank's share [tokens, d_source], [tokens, d_target] of the global batch, raw activations; on
        all of it where ranks share features.

        `global_tokens` is the size of all ranks' shares together; it must be given where they are not equal.
        """
        source, target = source.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
        tokens = global_tokens or len(source) * self.replicas
        if self.step_number % DEAD_REFRESH == 0:
            self._find_dead(self.transcoder.tokens_since_fired >= self.config.transcoder.dead_after_tokens)
        objective = self._objective(tokens)
        if self.compute is None:
            self._choose_compute(source, target, objective)
        self._recycle_gradients()
        output = self.averaging.module(source, target, objective, self.compute, self.workspace)
        self.averaging.backward(output.loss)

        norm = self._gradient_norm()
        # Fused Adam divides gradients by this on the way, so that clipping costs no pass of its own.
        self.optimizer.grad_scale = (norm / self.config.optimizer.gradient_clip).clamp(min=1)
        bad = ~norm.isfinite()  # then Adam changes nothing
        self.optimizer.found_inf = bad.float()
        lr = self.learning_rate(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()
        self.transcoder.project()

        self.step_number += 1
        self.tokens += tokens
        sums = [part.detach().double().reshape(-1) for part in output]
        total = torch.cat(sums)
        if self.shard is None:
            all_reduce(total)
        totals = TrainOutput(*total.split([len(part) for part in sums]))
        self.skipped = torch.stack((self.skipped[0] + bad, (self.skipped[1] + 1) * bad))
        dead = self._count_silence((totals.fired > 0) & ~bad, tokens)
        if self.shard is not None:  # all else is the same on every rank, or of its own features
            counts = torch.cat([totals.num_active, dead])
            all_reduce(counts)
            totals, dead = totals._replace(num_active=counts[:1]), counts[1:].long()
        return StepResult(self.step_number, self.tokens, tokens, lr, self.replicas, norm, dead, totals, self.skipped)

    def healthy(self) -> bool:
        """Whether the newest step changed the weights; waits for the device."""
        return not int(self.skipped[1])

    def describe_compute(self) -> str:
        """How losses are computed, for the run's record: "sparse, compiled (auto: dense 80.1 ms, sparse 21.4 ms)"."""
        if self.compute is None:
            return "not chosen yet"
        how = ""
        if is_gpu(self.device):
            how = f" on {device_name(self.device)}"
        elif self.compute.backend == "sparse":
            how = f", {native.status()}"
        timings = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in self.compute_timings.items())
        if self.shard is not None:
            how += f", features over {self.shard.ranks} trainers"
        why = timings or self.compute_reason
        return f"{self.compute.backend}{how}" + (f" (auto: {why})" if why else "")

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, a constant, then a linear decay to
        `final_lr_fraction` at the last step."""
        settings, total = self.config.optimizer, self.config.total_steps
        if step < settings.warmup_steps:
            return self.config.lr * (step + 1) / settings.warmup_steps
        start = max(settings.warmup_steps, round(total * (1 - settings.decay_fraction)))
        progress = min(1.0, max(0.0, (step - start) / max(1, total - 1 - start)))
        return self.config.lr * (1 - (1 - settings.final_lr_fraction) * progress)

    def _objective(self, tokens: int) -> Objective:
        """The Objective of a global batch of `tokens` tokens."""
        settings, ends = self.config.transcoder, self.transcoder.prefixes
        per_token = self.replicas / (tokens * self.transcoder.shape.d_target)  # DDP averages over ranks
        weights = settings.prefix_weights or (1.0,) * len(ends)
        return Objective(
            ends=ends,
            weights=tuple(w / sum(weights) * per_token for w in weights),
            num_entries=settings.k * tokens,
            dead=self.dead_index if settings.aux_coefficient else self.dead_index[:0],
            aux_k=settings.aux_k,
            aux_weight=settings.aux_coefficient * per_token,
            activation=settings.activation,
            k=settings.k,
            by_contribution=settings.rank == "contribution" and self.step_number >= self.config.optimizer.warmup_steps,
            l0_weight=settings.l0_coefficient * self.replicas / tokens,
            bandwidth=settings.bandwidth,
            cap_massive=settings.massive_tokens == "cap",
            sharded=self.shard is not None,
            dead_elsewhere=self.dead_elsewhere if settings.aux_coefficient else 0,
        )

    def _choose_compute(self, source: Tensor, target: Tensor, objective: Objective) -> None:
        settings = self.config.optimizer
        # Ranks must make the same collective calls.
        (everywhere,) = agree(choose_bfloat16(settings.precision, self.device), op=dist.ReduceOp.MIN)
        bfloat16 = bool(everywhere)
        if settings.backend != "auto":
            self.compute = Compute(settings.backend, bfloat16)
            return
        if self.shard is not None:
            self.compute, self.compute_reason = Compute("sparse", bfloat16), "ranks share features"
            return
        if is_gpu(self.device):
            tokens, features = settings.batch_tokens // world_size(), self.transcoder.num_features
            found, self.compute_reason = choose_backend(device_name(self.device), features, tokens, bfloat16)
            (dense,) = agree(found == "dense", op=dist.ReduceOp.MIN)
            self.compute = Compute("dense", False) if dense else Compute("sparse", bfloat16)
            if self.compute.backend != found:
                self.compute_reason = "another trainer's GPU takes it"
            return
        for backend in BACKENDS:
            self.compute_timings[backend] = self._time(Compute(backend, bfloat16), source, target, objective)
        fastest = min(BACKENDS, key=lambda backend: self.compute_timings[backend])
        self.compute = Compute(fastest, bfloat16)

    def _time(self, compute: Compute, source: Tensor, target: Tensor, objective: Objective) -> float:
        """Median seconds of a backend's forward and backward pass on the slowest rank; the same number on all ranks."""
        seconds = []
        for _ in range(4):
            synchronise(self.device)
            start = time.perf_counter()
            self._recycle_gradients()
            self.transcoder(source, target, objective, compute, self.workspace).loss.backward()
            synchronise(self.device)
            seconds.append(time.perf_counter() - start)
        (slowest,) = agree(statistics.median(seconds[1:]), op=dist.ReduceOp.MAX)  # the first one warms up
        return slowest

    def _gradient_norm(self) -> Tensor:
        """Scalar, norm of the whole dictionary's gradient. Where ranks share features, what all of them have gets rank
        0's gradient, so that rounding never tells their weights apart."""
        gradients = {n: p.grad for n, p in self.transcoder.named_parameters() if p.grad is not None}
        if self.shard is None:
            return nn.utils.get_total_norm(list(gradients.values()))
        common = [gradient for name, gradient in gradients.items() if name not in BY_FEATURE]
        for gradient in common:
            copy_from_first(gradient)
        square = nn.utils.get_total_norm([g for name, g in gradients.items() if name in BY_FEATURE]).square()
        all_reduce(square)
        return (square + nn.utils.get_total_norm(common).square()).sqrt()

    def _recycle_gradients(self) -> None:
        """Drop the last step's gradients; the sparse backward writes the large ones into the same memory again."""
        for name, parameter in self.transcoder.named_parameters():
            sparse = self.compute is not None and self.compute.backend == "sparse"
            if sparse and name in ("W_enc", "W_dec") and parameter.grad is not None and native.runs(parameter.grad):
                self.workspace.give(name, parameter.grad)
            parameter.grad = None

    def _find_dead(self, dead: Tensor) -> None:
        self.dead = dead
        self.dead_index = dead.nonzero().squeeze(1)
        if self.shard is not None:
            (everywhere,) = agree(len(self.dead_index))
            self.dead_elsewhere = int(everywhere) - len(self.dead_index)

    def _count_silence(self, fired: Tensor, tokens: int) -> Tensor:
        """Advance the dead-feature counter by the global batch; returns how many features are dead, [groups], of those
        that this rank has."""
        since = self.transcoder.tokens_since_fired
        since.add_(tokens).masked_fill_(fired, 0)
        dead = since >= self.config.transcoder.dead_after_tokens
        return torch.stack([group.sum() for group in dead.split(list(self.transcoder.shape.group_sizes))])

    def state_dict(self) -> dict[str, Tensor]:
        """Everything of the trainer that must survive a restart, as flat named tensors: a snapshot, which later steps
        do not change."""
        state = {f"transcoder.{name}": value for name, value in self.transcoder.state_dict().items()}
        for name, parameter in self.transcoder.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{key}.{name}"] = value
        if self.compute is not None:
            state[f"compute.{self.compute.backend}"] = torch.tensor(self.compute.bfloat16)
        for name, seconds in self.compute_timings.items():
            state[f"compute_seconds.{name}"] = torch.tensor(seconds)
        state["dead"] = self.dead
        state["skipped"] = self.skipped
        state["step"] = torch.tensor(self.step_number)
        state["tokens"] = torch.tensor(self.tokens)
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave; raises ConfigError if it names a backend that this version lacks."""
        self.transcoder.load_state_dict(_part(state, "transcoder."))
        for name, parameter in self.transcoder.named_parameters():
            moments: dict[str, Any] = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer.{key}.{name}" in state:
                    # Adam compares its step counter on the host unless it is fused on a GPU.
                    moments[key] = state[f"optimizer.{key}.{name}"].to(self.device)
            if moments:
                self.optimizer.state[parameter] = moments
        state = _name_backends(state)
        for backend, bfloat16 in _part(state, "compute.").items():  # a run goes on as it began, on the same rounding
            self.compute = Compute(_known(backend), bool(bfloat16))
            self.compute_timings = {name: float(s) for name, s in _part(state, "compute_seconds.").items()}
            if self.config.optimizer.backend == "auto":
                self.compute_reason = "as the run began"
        self._find_dead(state["dead"].to(self.device))
        self.skipped = state["skipped"].to(self.device)
        self.step_number, self.tokens = int(state["step"]), int(state["tokens"])


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _known(backend: str) -> Backend:
    for known in BACKENDS:
        if backend == known:
            return known
    raise ConfigError(
        f"the checkpoint needs the backend {backend!r}, which this version lacks (it has {', '.join(BACKENDS)}); "
        "continue the run with the version that began it, or give another output.run_id"
    )


def _name_backends(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with backends by name; the first checkpoints held their places in ("dense", "sparse")."""
    if "compute" not in state:
        return state
    names: tuple[Backend, ...] = ("dense", "sparse")
    place, bfloat16 = state["compute"].tolist()
    seconds = {f"compute_seconds.{n}": s for n, s in zip(names, state["compute_seconds"], strict=True) if s}
    return state | {f"compute.{names[place]}": torch.tensor(bool(bfloat16))} | seconds
