"""Checks of training on a GPU: losses and gradients, whole steps, two processes, and the way of the data there."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu_checks import PATIENCE, Findings, Setting, host_only, no_waiting, relative_error
from mtc.config import RunConfig, SiteKey, load_preset
from mtc.devices import synchronise
from mtc.training import ShuffleBuffer, Trainer, Unit, on_device
from mtc.training.trainer import DEAD_REFRESH
from mtc.transcoder import RMS_EPS, Compute, Workspace
from mtc.transcoder.dense_loss import dense_loss
from mtc.transcoder.objective import Weights

LOSS_LIMITS = {
    ("dense", False): 1e-4,
    ("sparse", False): 1e-4,
    ("sparse", True): 1e-3,  # bfloat16 finds the entries only
    # Every factor and every product is rounded to 8 bits, 2^-9 of itself; the residual is a difference of such products
    # and each gradient a product with it.
    ("dense", True): 5e-2,
}
"""Largest relative error of the loss and of each gradient, by backend and whether products are bfloat16."""
SAME_TRAINING = {"loss": 1e-3, "weights": 1e-2}
"""Two float32 trainings that round differently: now and then one of two nearly equal entries at the border is chosen
instead of the other, and Adam moves a feature's weights by a learning rate whatever the gradient's size."""


# Losses and gradients -----------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """Activations whose active features are far from all others, so that rounding never changes which are chosen."""

    source: Tensor
    """[tokens, d] bfloat16."""
    target: Tensor
    """[tokens, d] bfloat16."""
    gap: float
    """(smallest chosen value - largest other one) / smallest chosen value, of the normalised sources."""


def training_config(groups: tuple[int, ...], k: int, batch: int, **optimizer: Any) -> RunConfig:
    """The reference run with another dictionary and batch."""
    overrides = {
        "data": {"num_tokens": 1000 * batch},
        "transcoder": {"group_sizes": groups, "k": k, "dead_after_tokens": 10_000_000},
        "optimizer": {"batch_tokens": batch, "warmup_steps": 10, "precision": "float32", "backend": "sparse"},
    }
    overrides["optimizer"] |= optimizer
    return load_preset("gemma-2-2b-layer17", overrides)


def planted(trainer: Trainer, tokens: int, dead: int, generator: torch.Generator) -> Planted:
    """Tokens that are sums of k rows of W_enc each, which this draws anew, with all other weights.

    The last `dead` features are in none of them. Tokens where two of these are nearly equal at AuxK's border are left
    out: which is taken there is up to rounding.
    """
    transcoder, settings = trainer.transcoder, trainer.config.transcoder
    features, d = transcoder.W_enc.shape
    encoder = torch.randn(features, d, generator=generator, dtype=torch.float64)
    encoder = encoder / encoder.norm(dim=1, keepdim=True)
    strength = torch.rand(3 * tokens, features - dead, generator=generator)
    active = strength.topk(settings.k, dim=1)
    dense = torch.zeros(3 * tokens, features, dtype=torch.float64)
    dense.scatter_(1, active.indices, 1 + 0.1 * torch.rand(active.values.shape, generator=generator).double())
    source = (dense @ encoder).bfloat16()
    x = source.double() * (source.double().square().mean(1, keepdim=True) + RMS_EPS).rsqrt()
    bias = 0.05 * torch.randn(features, generator=generator)
    z = x @ encoder.float().double().T + bias.double()
    silent = z[:, features - dead :].sort(dim=1, descending=True).values
    spread = silent.std()
    clear = (silent[:, settings.aux_k - 1] - silent[:, settings.aux_k]) > 0.02 * spread
    chosen = clear.nonzero().squeeze(1)[:tokens]
    assert len(chosen) == tokens, f"only {len(chosen)} of {len(clear)} tokens are clear"
    z, is_active = z[chosen], dense[chosen] > 0
    smallest, largest = z[is_active].min(), z[~is_active].max()
    decoder = torch.randn(features, d, generator=generator)
    noise = torch.randn(tokens, d, generator=generator) + torch.randn(d, generator=generator)
    target = dense[chosen].float() @ decoder + 0.5 * noise
    with torch.no_grad():
        transcoder.W_enc.copy_(encoder)
        transcoder.b_enc.copy_(bias)
        transcoder.W_dec.copy_(decoder + 0.3 * torch.randn(features, d, generator=generator))
        transcoder.b_dec.copy_(torch.randn(d, generator=generator))
        transcoder.target_scale.fill_(0.7)
    return Planted(source[chosen], target.bfloat16(), float((smallest - largest) / smallest))


def losses(setting: Setting, findings: Findings) -> None:
    """The training loss and every gradient against float64, by backend, precision and whether AuxK works."""
    reference = (1152, 2304, 1152), 16, 1024, 2304, 512
    groups, k, tokens, d, dead = ((96, 128, 96), 4, 64, 384, 64) if setting.small else reference
    trainer = Trainer(training_config(groups, k, tokens), d, d, setting.device)
    data = planted(trainer, tokens, dead, torch.Generator().manual_seed(2))
    findings.check("inputs have a gap", data.gap > 0.05, gap=data.gap)
    source, target = data.source.to(setting.device), data.target.to(setting.device)
    silent = torch.arange(sum(groups), device=setting.device) >= sum(groups) - dead
    for aux in (0, dead):
        trainer._find_dead(silent & bool(aux))
        truth = _exact_loss(trainer, data)
        for backend in ("dense", "sparse"):
            for bfloat16 in (False, True):
                trainer._recycle_gradients()
                compute = Compute(backend, bfloat16)
                output = trainer.averaging.module(source, target, trainer._objective(tokens), compute, Workspace())
                trainer.averaging.backward(output.loss)
                found = {"loss": output.loss} | {n: p.grad for n, p in trainer.transcoder.named_parameters()}
                name = f"{backend}, {'bfloat16' if bfloat16 else 'float32'}{f', {aux} dead' if aux else ''}"
                for part, value in truth.items():
                    findings.compare(name, relative_error(found[part], value), LOSS_LIMITS[backend, bfloat16])
                for part in ("W_enc", "W_dec") if aux else ():  # which are little of the whole gradient
                    error = relative_error(found[part][silent], truth[part][silent.cpu()])
                    findings.compare(f"{name}: their own gradients", error, LOSS_LIMITS[backend, bfloat16])
                findings.check(f"{name}: L0", int(output.num_active) == k * tokens)


def _exact_loss(trainer: Trainer, data: Planted) -> dict[str, Tensor]:
    """The loss and its gradients in float64 on the CPU, by dense products and autograd."""
    transcoder = trainer.transcoder
    names = [name for name in Weights._fields if name != "threshold"]  # which BatchTopK does not train
    leaves = [getattr(transcoder, name).detach().cpu().double().requires_grad_() for name in names]
    source, target = data.source.double(), data.target.double() * transcoder.target_scale.cpu().double()
    x = source * (source.square().mean(1, keepdim=True) + RMS_EPS).rsqrt()
    objective = trainer._objective(len(x))
    with host_only():
        output = dense_loss(x, target, Weights(*leaves), objective._replace(dead=objective.dead.cpu()))
        gradients = torch.autograd.grad(output.loss, leaves)
    return {"loss": output.loss} | dict(zip(names, gradients, strict=True))


# Steps --------------------------------------------------------------------------------------------------------------


def batches(steps: int, tokens: int, d: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """A planted dictionary that only a sparse code can express."""
    generator = torch.Generator().manual_seed(seed)
    read, write = torch.randn(3 * d, d, generator=generator), torch.randn(3 * d, d, generator=generator)
    found = []
    for _ in range(steps):
        fires = torch.rand(tokens, 3 * d, generator=generator) < 1.0 / d
        z = torch.rand(tokens, 3 * d, generator=generator) * fires
        found.append((z @ read + 0.5, z @ write - 0.3))
    return found


def _trainer(backend: str, precision: str, batch: int, d: int, device: torch.device | str) -> Trainer:
    """A small dictionary that learns fast and has features that die."""
    config = load_preset(
        "tiny",
        {
            "transcoder": {"dead_after_tokens": 2 * batch, "aux_k": 6, "k": 4},
            # Adam divides a gradient that is zero but for rounding by itself: a larger epsilon keeps that out.
            "optimizer": {"batch_tokens": batch, "precision": precision, "backend": backend, "eps": 1e-4},
            "data": {"num_tokens": batch * 50},
        },
    )
    return Trainer(config, d, d, device)


def _train(trainer: Trainer, data: list[tuple[Tensor, Tensor]], watched: bool = False, waits: bool = False) -> Any:
    """Metrics of every step. They are read when all are done, and where no dead features are looked for the steps are
    `watched` for waits; or the host `waits` and reads after each."""
    results = []
    there = [(x.to(trainer.device), y.to(trainer.device)) for x, y in data]
    if not trainer.step_number:
        trainer.initialise(*there[0])
        with torch.no_grad():  # some features never fire, so that AuxK has something to do from the start
            trainer.transcoder.b_enc[-6:] -= 8
            trainer.transcoder.tokens_since_fired[-6:] = trainer.config.transcoder.dead_after_tokens
    for x, y in there:
        refreshes = trainer.step_number % DEAD_REFRESH == 0  # looks for dead features, which waits
        with no_waiting(trainer.device) if watched and not refreshes else nullcontext():
            results.append(trainer.step(x, y))
        if waits:
            synchronise(trainer.device)
            results[-1] = results[-1].metrics()
    return results if waits else [result.metrics() for result in results]


def _same(a: Trainer, b: Trainer) -> bool:
    """Whether all their state is equal, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value.nan_to_num(), second[name].nan_to_num())
        for name, value in first.items()
        if not name.startswith("compute_seconds.")
    )


def steps(setting: Setting, findings: Findings) -> None:
    """Whole training steps: without waits, with a bad batch, resumed, repeated, and against the CPU's."""
    batch, d = (64, 12) if setting.small else (256, 48)
    for backend, precision in (("sparse", "float32"), ("sparse", "bfloat16"), ("dense", "float32")):
        make = functools.partial(_trainer, backend, precision, batch, d, setting.device)
        name = f"{backend}, {precision}"
        data = batches(2 * DEAD_REFRESH, batch, d)
        waiting, asynchronous, again = make(), make(), make()
        metrics = _train(waiting, data, waits=True)
        found = _train(asynchronous, data, watched=True)
        findings.check(f"without waits, {name}", found == metrics and _same(waiting, asynchronous), steps=len(data))
        _train(again, data)
        findings.check(f"again, to the last bit, {name}", _same(again, asynchronous))

        resumed, more = make(), batches(3, batch, d, seed=6)
        resumed.load_state_dict(asynchronous.state_dict())
        rest = _train(resumed, more)
        findings.check(f"resumed, {name}", rest == _train(asynchronous, more) and _same(resumed, asynchronous))

        before, (bad, y) = asynchronous.state_dict(), more[0]
        bad = bad.clone()
        bad[3, 2] = math.nan
        asynchronous.step(bad.to(setting.device), y.to(setting.device))
        after = asynchronous.state_dict()
        kept = [n for n in before if n.startswith(("transcoder.W", "transcoder.b", "optimizer.exp"))]
        unchanged = all(torch.equal(before[n], after[n]) for n in kept)
        findings.check(f"a NaN changes nothing, {name}", unchanged and asynchronous.skipped.tolist() == [1, 1])
    with host_only():
        expected = _history("cpu")
    _compare_training(findings, "50 steps as on the CPU", _history(setting.device), expected)


class Trained(NamedTuple):
    """What a short training leaves, on the host."""

    losses: list[float]
    dead: list[int]
    weights: dict[str, np.ndarray]


def _history(device: torch.device | str, steps: int = 50, rank: int = 0, world: int = 1) -> Trained:
    """Of this rank's share of every batch."""
    trainer, metrics = _trainer("sparse", "float32", 64, 12, device), []
    for number, (x, y) in enumerate(batches(steps, 64, 12)):
        part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        mine = x[part].to(trainer.device), y[part].to(trainer.device)
        if not number:
            trainer.initialise(*mine)
        metrics.append(trainer.step(*mine, len(x)).metrics())
    weights = {name: value.detach().cpu().numpy() for name, value in trainer.transcoder.named_parameters()}
    return Trained([m.loss for m in metrics], [m.dead for m in metrics], weights)


def _compare_training(findings: Findings, name: str, found: Trained, expected: Trained) -> None:
    ratios = np.abs(np.array(found.losses) / np.array(expected.losses) - 1)
    findings.compare(f"{name}: loss", float(ratios.max()), SAME_TRAINING["loss"])
    error = max(relative_error(found.weights[n], value) for n, value in expected.weights.items())
    same = np.mean(np.array(found.dead) == np.array(expected.dead))
    findings.compare(f"{name}: weights", error, SAME_TRAINING["weights"], steps_with_the_same_dead_features=float(same))
    findings.check(f"{name}: AuxK worked", sum(count > 0 for count in expected.dead) > len(expected.dead) // 5)


# Two processes on one GPU -------------------------------------------------------------------------------------------


def two_processes(setting: Setting, findings: Findings) -> None:
    """Two processes with half of each batch train as one does. By gloo: NCCL refuses two ranks on one GPU."""
    steps = 20
    expected = _history(setting.device, steps)
    context = get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory(dir=setting.scratch) as directory:
        arguments = (f"{directory}/group", str(setting.device), steps, answers)
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(2)]
        try:
            for process in ranks:
                process.start()
            found = dict(answers.get(timeout=PATIENCE) for _ in ranks)
            for process in ranks:
                process.join(PATIENCE)
        finally:
            for process in ranks:
                process.kill()
    for rank in range(2):
        _compare_training(findings, f"rank {rank} as one process", found[rank], expected)


def _rank(rank: int, file: str, device: str, steps: int, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    dist.barrier()  # where the first collective is one-way, as in DDP, gloo may hang while it connects
    answers.put((rank, _history(device, steps, rank, 2)))
    dist.barrier()
    dist.destroy_process_group()


# The way to the device ----------------------------------------------------------------------------------------------


def row_sums(column: Tensor) -> Tensor:
    """[rows] int64, exact, of bfloat16 [rows, d]; it tells the order of a row's numbers too."""
    bits = column.view(torch.int16).long()
    return (bits * torch.arange(1, column.shape[1] + 1, device=column.device)).sum(1)


def upload(setting: Setting, findings: Findings) -> None:
    """40 uneven units arrive whole and in order while the device is busy, and leave the shuffle buffer once each."""
    rows, d, capacity, size = (60, 16, 400, 64) if setting.small else (6000, 2304, 32_768, 4096)
    rng = np.random.default_rng(0)
    pool = torch.randn(rows, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = rng.integers(0, rows, 40).tolist()
    drawn = [torch.from_numpy(rng.permutation(rows)[:count]) for count in counts]
    truth = torch.stack([row_sums(pool), row_sums(-pool)], 1)  # [rows, source and target]

    def units() -> Iterator[Unit]:
        for number, which in enumerate(drawn):
            activations = {(0, "resid_mid"): pool[which], (0, "mlp_out"): -pool[which]}
            yield Unit(number, activations, np.arange(len(which), dtype=np.int32), len(which))

    def sums(activations: Mapping[SiteKey, Tensor]) -> Tensor:
        return torch.stack([row_sums(rows) for rows in activations.values()], 1)

    square = torch.randn(size, size, device=setting.device)
    arrived: list[tuple[int, Tensor]] = []
    buffer, taken = ShuffleBuffer(capacity, [0], setting.device), []
    with on_device(units(), setting.device) as stream:
        for unit in stream:
            for _ in range(3):  # so that the next copies run ahead of what reads this one
                square = torch.mm(square, square).div_(size)
            arrived.append((unit.number, sums(unit.activations)))
            buffer.add(unit)
            del unit
            torch.full((rows, d), 1.0, dtype=torch.bfloat16, device=setting.device)  # takes memory that became free
            while buffer.available >= rows // 3:
                part = buffer.take(rows // 3)
                taken.append((part.units * rows + part.rows, sums(part.activations)))
    buffer.close()
    part = buffer.take(buffer.available)
    taken.append((part.units * rows + part.rows, sums(part.activations)))
    findings.check("units in order", [number for number, _ in arrived] == list(range(40)))
    whole = all(torch.equal(found.cpu(), truth[which]) for (_, found), which in zip(arrived, drawn, strict=True))
    findings.check("every row of 40 units", whole, rows=sum(counts))
    names = np.concatenate([name for name, _ in taken])
    every = np.concatenate([n * rows + np.arange(count) for n, count in enumerate(counts)])
    findings.check("the shuffle buffer gives each row once", np.array_equal(np.sort(names), every))
    place = dict(zip(every.tolist(), torch.cat(drawn).tolist(), strict=True))
    of_pool = torch.tensor([place.get(name, 0) for name in names.tolist()])
    right = torch.equal(torch.cat([found for _, found in taken]).cpu(), truth[of_pool])
    findings.check("the shuffle buffer gives rows under their names", right)
