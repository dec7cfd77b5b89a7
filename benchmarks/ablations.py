"""What each training choice is worth: the defaults with one thing changed at a time, on the validation part. Every
captured token is trained once, but where replays are what changes.

`python -m benchmarks.ablations [--task smollm2] [--only NAME ...] [--json]` prints the table of docs/quality.md.
Choices that the library does not offer, since they lost here, are written out below.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.activations import Part
from benchmarks.contenders import Ours, Task, train_ours
from benchmarks.quality import TASKS
from benchmarks.rows import Rows, load_rows
from benchmarks.scores import Score, score
from mtc.language_model import Neurons
from mtc.training import StepResult, Trainer
from mtc.transcoder import Objective
from mtc.transcoder import sparse_loss as kernels
from mtc.transcoder.selection import Chosen

LR = 6e-3


class Cosine(Trainer):
    """Warm-up, then half a cosine to the end."""

    def learning_rate(self, step: int) -> float:
        settings, total = self.config.optimizer, self.config.total_steps
        if step < settings.warmup_steps:
            return super().learning_rate(step)
        return (
            self.config.lr
            * (1 + math.cos(math.pi * (step - settings.warmup_steps) / (total - settings.warmup_steps)))
            / 2
        )


class AnnealedK(Trainer):
    """Four times k at first, falling linearly to k over the first 30 % of the steps."""

    def _objective(self, tokens: int) -> Objective:
        left = max(0.0, 1 - self.step_number / (0.3 * self.config.total_steps))
        return (
            super()._objective(tokens)._replace(num_entries=round(self.config.transcoder.k * (1 + 3 * left) * tokens))
        )


class RandomPrefixes(Trainer):
    """Three more prefixes at each step, drawn uniformly; all weigh the same (as in arXiv:2503.17547)."""

    def _objective(self, tokens: int) -> Objective:
        objective = super()._objective(tokens)
        generator = torch.Generator().manual_seed(self.step_number)
        drawn = torch.randint(1, objective.ends[-1], (3,), generator=generator).tolist()
        ends = tuple(sorted({*objective.ends, *drawn}))
        return objective._replace(ends=ends, weights=(sum(objective.weights) / len(ends),) * len(ends))


class RandomEncoder(Trainer):
    """W_enc's rows are random directions, centred by b_enc."""

    def initialise(self, source: Tensor, target: Tensor, neurons: Neurons | None = None) -> None:
        drawn = self.transcoder.W_enc.detach().clone()
        super().initialise(source, target, neurons)
        with torch.no_grad():
            self.transcoder.W_enc.copy_(drawn)
            self.transcoder.b_enc.copy_(-(drawn @ self.transcoder.normalise(source).mean(0)))


class NotCentred(Trainer):
    """b_enc starts at zero."""

    def initialise(self, source: Tensor, target: Tensor, neurons: Neurons | None = None) -> None:
        super().initialise(source, target, neurons)
        self.transcoder.b_enc.detach().zero_()


class TiedDecoder(Trainer):
    """W_dec starts as W_enc (source and target have the same width here) instead of zero."""

    def initialise(self, source: Tensor, target: Tensor, neurons: Neurons | None = None) -> None:
        super().initialise(source, target, neurons)
        self.transcoder.W_dec.detach().copy_(self.transcoder.W_enc.detach())


class UnitDecoder(TiedDecoder):
    """W_dec's rows have norm 1 after every step, so that ranking by z is ranking by contribution."""

    def step(self, source: Tensor, target: Tensor, global_tokens: int | None = None) -> StepResult:
        result = super().step(source, target, global_tokens)
        decoder = self.transcoder.W_dec.detach()
        decoder /= decoder.norm(dim=1, keepdim=True).clamp(min=1e-8)
        return result


class Resampling(Trainer):
    """Instead of AuxK, every 8 steps: dead features start anew at sources that are reconstructed badly, with a zero
    decoder and Adam moments (Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features)."""

    @torch.no_grad()
    def step(self, source: Tensor, target: Tensor, global_tokens: int | None = None) -> StepResult:
        with torch.enable_grad():
            result = super().step(source, target, global_tokens)
        t = self.transcoder
        dead = (t.tokens_since_fired >= self.config.transcoder.dead_after_tokens).nonzero().squeeze(1)
        if self.step_number % 8 or not len(dead):
            return result
        x, z = t.normalise(source), t.pre_activations(source)
        a = z * (z > self.workspace.border)
        errors = (target * t.target_scale - a @ t.W_dec - t.b_dec).square().sum(1)
        rows = x[torch.multinomial(errors, len(dead), replacement=True)] - x.mean(0)
        t.W_enc[dead] = rows / rows.norm(dim=1, keepdim=True) * t.W_enc.norm(dim=1).mean()
        t.b_enc[dead] = -(t.W_enc[dead] @ x.mean(0))
        t.W_dec[dead] = 0
        for parameter in (t.W_enc, t.b_enc, t.W_dec):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][moment][dead] = 0
        t.tokens_since_fired[dead] = 0
        return result


class RectifiedAuxK(Trainer):
    """AuxK on values after the ReLU: a feature that is negative everywhere gets no gradient."""

    def step(self, source: Tensor, target: Tensor, global_tokens: int | None = None) -> StepResult:
        choose = kernels._choose_dead

        def rectified(z: Tensor, objective: Objective) -> Chosen:
            chosen = choose(z, objective)
            positive = chosen.value > 0
            return Chosen(*(part[positive] for part in chosen))

        kernels._choose_dead = rectified
        try:
            return super().step(source, target, global_tokens)
        finally:
            kernels._choose_dead = choose


class Variant(NamedTuple):
    name: str
    trainer: type[Trainer] = Trainer
    transcoder: dict[str, Any] | None = None
    """Changed fields of that section of the configuration."""
    optimizer: dict[str, Any] | None = None
    """The same; warmup_steps as a share of all steps."""
    replays: int = 1


NEURONS, CONTRIBUTION = {"init": "mlp"}, {"rank": "contribution"}
VARIANTS = (
    Variant("defaults"),
    Variant("defaults, seed 1", transcoder={"seed": 1}),
    Variant("encoder: random directions", RandomEncoder),
    Variant("encoder: not centred", NotCentred),
    Variant("decoder: starts as the encoder", TiedDecoder),
    Variant("decoder: unit norm", UnitDecoder),
    Variant("AuxK: off", transcoder={"aux_coefficient": 0.0}),
    Variant("AuxK: after the ReLU", RectifiedAuxK),
    Variant("AuxK: 512 per token", transcoder={"aux_k": 512}),
    Variant("AuxK: coefficient 1/4", transcoder={"aux_coefficient": 0.25}),
    Variant("resampling, no AuxK", Resampling, {"aux_coefficient": 0.0}),
    Variant("k annealed from 4k", AnnealedK),
    Variant("random prefixes", RandomPrefixes),
    Variant("prefix weights 1:1:2", transcoder={"prefix_weights": [1.0, 1.0, 2.0]}),
    Variant("skip connection", transcoder={"skip": True}),
    Variant("warm-up 5 %", optimizer={"warmup_steps": 0.05}),
    Variant("warm-up 5 %, AuxK off", Trainer, {"aux_coefficient": 0.0}, {"warmup_steps": 0.05}),
    Variant("warm-up 5 %, AuxK after the ReLU", RectifiedAuxK, None, {"warmup_steps": 0.05}),
    Variant("warm-up 40 %", optimizer={"warmup_steps": 0.4}),
    Variant("cosine decay", Cosine),
    Variant("betas 0.9, 0.99", optimizer={"betas": [0.9, 0.99]}),
    Variant("betas 0.9, 0.999", optimizer={"betas": [0.9, 0.999]}),
    Variant("betas 0.5, 0.99", optimizer={"betas": [0.5, 0.99]}),
    Variant("no clipping", optimizer={"gradient_clip": 1e9}),
    Variant("encoder: the MLP's neurons", transcoder=NEURONS),
    Variant("ranked by contribution", transcoder=CONTRIBUTION),
    Variant("both", transcoder=NEURONS | CONTRIBUTION),
    Variant("4 replays", replays=4),
    Variant("4 replays, both", transcoder=NEURONS | CONTRIBUTION, replays=4),
    Variant("massive tokens: kept", transcoder={"massive_tokens": "keep"}),
)


def settings(variant: Variant, task: Task) -> dict[str, Any]:
    """A variant's overrides of benchmarks.contenders.DEFAULTS: the configuration's defaults, but for what it names."""
    transcoder, optimizer = dict(variant.transcoder or {}), dict(variant.optimizer or {})
    if "warmup_steps" in optimizer:
        optimizer["warmup_steps"] = round(optimizer["warmup_steps"] * task.steps)
    plain = {"init": "tokens", "rank": "activation", "prefix_weights": None}
    return {"transcoder": plain | transcoder, "optimizer": optimizer, "data": {"replays": variant.replays}}


def run(variant: Variant, task: Task, rows: Rows) -> Score:
    """Train with LR and score on the second half of the validation part, calibrated on the first."""
    ours = Ours(settings(variant, task))
    trained = train_ours(rows, task, LR, ours.sections["transcoder"].get("seed", 0), ours, variant.trainer)
    half = len(rows.validation.source) // 2
    first, second = (Part(*(t[part] for t in rows.validation)) for part in (slice(half), slice(half, None)))
    return score(trained.dictionary, task.prefixes, task.k, False, rows, first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="smollm2")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], metavar="NAME")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    rows = load_rows(task.model, task.layer, task.train_tokens)
    found = {}
    print(f"{arguments.task}, lr {LR:g}, seed 0\n{'variant':<34}{'FVU per prefix':>24}{'L0':>8}{'dead':>8}")
    for variant in VARIANTS:
        if arguments.only and variant.name not in arguments.only:
            continue
        result = found[variant.name] = run(variant, task, rows)
        shown = " / ".join(f"{value:.3f}" for value in result.fvu)
        print(f"{variant.name:<34}{shown:>24}{result.l0:>8.2f}{result.dead:>8.1%}", flush=True)
    if arguments.json:
        print(json.dumps({name: result._asdict() for name, result in found.items()}))


if __name__ == "__main__":
    main()
