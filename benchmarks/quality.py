"""Reconstruction for equal work: transcoders trained by us and by peer libraries on the same activations.

`python -m benchmarks.quality --peers --json` trains every contender on cached activations of real models (captured on
first use, see benchmarks.activations), each at its best learning rate of the same sweep on the validation part, and
reports on the test part: held-out FVU per nested prefix, L0 at the calibrated threshold, dead features, wall time.

All contenders read the same rows in float32: sources RMS-normalised, targets scaled by one number. All warm up for
WARMUP_FRACTION of the steps (with `--no-warm-up` the peers also without). BatchTopK dictionaries are used with one
threshold, set on the validation part so that k entries per token lie above it; sparsify's TopK, with its k largest per
token. Where a dictionary is not nested, a prefix is just its first features. A feature is dead if it never fires on the
test part.
Peers' trained weights are kept in the cache directory, by version and settings; ours are trained anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.activations import Activations, Part, load
from benchmarks.peers import NAMES, Work, batches
from mtc.config import RunConfig, load_preset
from mtc.storage import cache_directory
from mtc.training import Trainer
from mtc.transcoder import kth_largest

RATES = (3e-3, 6e-3, 1.2e-2)
BATCH = 1024
DEAD_AFTER = 20_480
WARMUP_FRACTION = 0.2
PEERS_PYTHON = Path(".venv-peers/bin/python")


class Task(NamedTuple):
    model: str
    """Name in benchmarks.activations.MODELS."""
    train_tokens: int
    """Distinct tokens."""
    steps: int
    group_sizes: tuple[int, ...] = (288, 576, 288)
    k: int = 32

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(accumulate(self.group_sizes))


TASKS = {
    "smollm2": Task("smollm2", 400_000, 390),
    "gemma3": Task("gemma3", 400_000, 390),
    "smollm2-wide": Task("smollm2", 400_000, 390, (576, 1152, 576)),
    "smollm2-long": Task("smollm2", 400_000, 1950),
}


class Score(NamedTuple):
    fvu: tuple[float, ...]
    """Held-out squared error over squared deviation from the mean, per prefix."""
    l0: float
    """Active features per token."""
    dead: float
    """Share of features that never fire on the part."""
    seconds: float
    """Wall time of training."""


class Dictionary(NamedTuple):
    """A trained transcoder of scaled rows, whoever trained it."""

    W_enc: Tensor
    """[features, d_source]"""
    b_enc: Tensor
    """[features]"""
    W_dec: Tensor
    """[features, d_target]"""
    b_dec: Tensor
    """[d_target]"""
    rank_scale: Tensor
    """[features]: entries are ranked by z * rank_scale."""
    W_skip: Tensor
    """[d_target, d_source], zeros without a skip connection."""


# Data and scores ----------------------------------------------------------------------------------------------------


def scaled(activations: Activations) -> Activations:
    """Float32 rows: sources with a root mean square of 1, targets with a mean squared norm of d_target."""
    sizes = activations.train.target.float().square().sum(1).double().mean()
    factor = (activations.train.target.shape[1] / sizes).sqrt().float()

    def scale(part: Part) -> Part:
        x = part.source.float()
        return Part(x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt(), part.target.float() * factor)

    return Activations(*(scale(part) for part in activations))


@torch.no_grad()
def score(dictionary: Dictionary, task: Task, per_token: bool, calibration: Part, part: Part, seconds: float) -> Score:
    """Sums in float64 over all rows of `part`."""
    features = len(dictionary.b_enc)
    threshold = 0.0
    if not per_token:
        ranks = [_ranks(dictionary, rows)[1].flatten() for rows in calibration.source.split(4096)]
        threshold = float(kth_largest(torch.cat([r[r > 0] for r in ranks]), task.k * len(calibration.source) + 1))
    ends = task.prefixes
    error, fired, active = torch.zeros(len(ends), dtype=torch.float64), torch.zeros(features), 0
    for x, y in zip(part.source.split(4096), part.target.split(4096), strict=True):
        z, rank = _ranks(dictionary, x)
        keep = rank > threshold
        if per_token:
            keep &= torch.zeros_like(keep).scatter_(1, rank.topk(task.k, dim=1).indices, True)
        a = z * keep
        residual = y - x @ dictionary.W_skip.T - dictionary.b_dec
        for p, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            residual = residual - a[:, start:end] @ dictionary.W_dec[start:end]
            error[p] += residual.double().square().sum()
        fired += keep.sum(0)
        active += int(keep.sum())
    y = part.target.double()
    deviation = (y - y.mean(0)).square().sum()
    return Score(tuple((error / deviation).tolist()), active / len(y), float((fired == 0).float().mean()), seconds)


def _ranks(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.relu(torch.nn.functional.linear(x, dictionary.W_enc, dictionary.b_enc))
    return z, z * dictionary.rank_scale


def linear_map_fvu(data: Activations) -> float:
    """Held-out FVU of the least-squares affine map from source to target."""
    x, y = (torch.cat([t, torch.ones(len(t), 1)], 1) if i == 0 else t for i, t in enumerate(data.train))
    gram = x.T.double() @ x.double()
    map_ = torch.linalg.solve(gram + 1e-3 * torch.eye(len(gram)), x.T.double() @ y.double())
    test = torch.cat([data.test.source, torch.ones(len(data.test.source), 1)], 1).double()
    y = data.test.target.double()
    return float((y - test @ map_).square().sum() / (y - y.mean(0)).square().sum())


# Training -----------------------------------------------------------------------------------------------------------


def our_config(task: Task, lr: float, seed: int, overrides: dict[str, Any]) -> RunConfig:
    transcoder = {
        "group_sizes": list(task.group_sizes),
        "k": task.k,
        "seed": seed,
        "input_norm": "none",  # the rows are normalised already
        "dead_after_tokens": DEAD_AFTER,
    }
    optimizer = {
        "lr": lr,
        "batch_tokens": BATCH,
        "warmup_steps": int(WARMUP_FRACTION * task.steps),
        "backend": "sparse",
        "precision": "float32",
    }
    sections = {"transcoder": transcoder, "optimizer": optimizer, "data": {"num_tokens": task.steps * BATCH}}
    for name, settings in overrides.items():
        sections[name] = sections[name] | settings
    return load_preset("smollm2-135m", sections)


def train_ours(
    data: Activations, task: Task, lr: float, seed: int, make: type[Trainer] = Trainer, **overrides: Any
) -> tuple[Dictionary, float]:
    """Train on the scaled rows; `overrides` are sections of the configuration."""
    trainer = make(our_config(task, lr, seed, overrides), data.train.source.shape[1], data.train.target.shape[1])
    trainer.initialise(data.train.source[:16_384], data.train.target[:16_384])
    start = time.perf_counter()
    for rows in batches(len(data.train.source), _work(data, task, lr, seed)):
        trainer.step(data.train.source[rows], data.train.target[rows])
    seconds = time.perf_counter() - start
    t, scale = trainer.transcoder, trainer.transcoder.target_scale
    skip = torch.zeros(t.shape.d_target, t.shape.d_source) if t.W_skip is None else t.W_skip.detach() / scale
    decoder = t.W_dec.detach() / scale, t.b_dec.detach() / scale
    return Dictionary(t.W_enc.detach(), t.b_enc.detach(), *decoder, torch.ones(t.num_features), skip), seconds


def train_peer(
    name: str, task: Task, lr: float, seed: int, data: Activations, rows_file: Path, warm_up: bool = True
) -> tuple[Dictionary, float]:
    """Train in the peers' environment, or take from the cache what was trained before."""
    work = _work(data, task, lr, seed)
    if not warm_up:
        work = work._replace(warmup_steps=0)
    key = json.dumps([name, _peer_version(name), work, task.model, task.train_tokens, _digest(data)])
    directory = Path(cache_directory()) / "benchmarks" / "peers"
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    seconds_file = out.with_suffix(".json")
    if not seconds_file.exists():
        if not rows_file.exists():
            save_file({"source": data.train.source, "target": data.train.target}, rows_file)
        order = {"cmd": "train", "name": name, "work": work._asdict(), "train": str(rows_file), "out": str(out)}
        done = subprocess.run(
            [str(PEERS_PYTHON), "benchmarks/peers.py", "worker"],
            input=json.dumps(order) + "\n", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        )  # fmt: skip
        seconds_file.write_text(done.stdout.strip())
    weights = load_file(out)
    weights["W_skip"] = torch.zeros(weights["W_dec"].shape[1], weights["W_enc"].shape[1])
    return Dictionary(**weights), json.loads(seconds_file.read_text())["seconds"]


def _work(data: Activations, task: Task, lr: float, seed: int) -> Work:
    sizes = data.train.source.shape[1], data.train.target.shape[1]
    warmup = int(WARMUP_FRACTION * task.steps)
    return Work(*sizes, task.group_sizes, task.k, BATCH, task.steps, lr, seed, DEAD_AFTER, warmup)


def _digest(data: Activations) -> str:
    return hashlib.sha256(data.train.target[::997].numpy().tobytes()).hexdigest()[:16]


def _peer_version(name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.run([str(PEERS_PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# The benchmark ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One contender on one task, at its best learning rate."""

    contender: str
    lr: float
    """The one of RATES with the least full-dictionary FVU on the validation part, seed 0."""
    validation: dict[str, float]
    """Full-dictionary FVU on the validation part for every rate, seed 0."""
    scores: list[Score]
    """On the test part, one per seed."""

    def mean(self, field: str) -> float:
        return statistics.mean(getattr(score, field) for score in self.scores)

    def fvu(self) -> list[float]:
        return [statistics.mean(values) for values in zip(*(score.fvu for score in self.scores), strict=True)]


OURS: dict[str, dict[str, Any]] = {"mtc": {}, "mtc, skip": {"transcoder": {"skip": True}}, "mtc, not nested": {}}


def run(name: str, task: Task, contenders: list[str], rates: tuple[float, ...], seeds: int) -> dict[str, Any]:
    """Train everybody, print a row each, and return what was measured."""
    data = scaled(load(task.model, task.train_tokens))
    rows_file = Path(cache_directory()) / "benchmarks" / f"rows-{task.model}-{task.train_tokens}.safetensors"
    print(
        f"\n{name}: {task.model}, {task.steps * BATCH:,} training tokens ({task.train_tokens:,} distinct), features "
        f"{list(task.group_sizes)}, k {task.k}; test part {len(data.test.source):,} tokens, {seeds} seed(s)"
    )
    linear = linear_map_fvu(data)
    print(f"{'contender':<32}{'lr':>8}{'FVU per prefix':>26}{'L0':>8}{'dead':>8}{'train':>9}")
    print(f"{'linear map':<32}{'':>8}{linear:>26.3f}", flush=True)
    results = []
    for contender in contenders:
        wanted = (results[0].lr,) if contender in OURS and results else rates  # our variants take the rate of "mtc"
        result = _best_of(contender, task, wanted, seeds, data, rows_file)
        results.append(result)
        shown = " / ".join(f"{value:.3f}" for value in result.fvu())
        print(f"{contender:<32}{result.lr:>8g}{shown:>26}{result.mean('l0'):>8.2f}{result.mean('dead'):>8.1%}"
              f"{result.mean('seconds'):>7.0f} s", flush=True)  # fmt: skip
    return {"task": task._asdict(), "linear_map_fvu": linear, "results": [_as_json(r) for r in results]}


def _best_of(
    contender: str, task: Task, rates: tuple[float, ...], seeds: int, data: Activations, rows_file: Path
) -> Result:
    """Sweep the rates with seed 0 on the validation part, then train the other seeds at the best rate."""
    validation: dict[str, float] = {}
    best, scores = rates[0], []
    for lr in rates:
        dictionary, seconds = _train(contender, task, lr, 0, data, rows_file)
        found = _score(contender, dictionary, task, data, data.validation, seconds)
        validation[str(lr)] = found.fvu[-1]
        if found.fvu[-1] == min(validation.values()):
            best, scores = lr, [_score(contender, dictionary, task, data, data.test, seconds)]
    for seed in range(1, seeds):
        dictionary, seconds = _train(contender, task, best, seed, data, rows_file)
        scores.append(_score(contender, dictionary, task, data, data.test, seconds))
    return Result(contender, best, validation, scores)


def _train(
    contender: str, task: Task, lr: float, seed: int, data: Activations, rows_file: Path
) -> tuple[Dictionary, float]:
    name, _, variant = contender.partition(", ")
    if name in NAMES:
        return train_peer(name, task, lr, seed, data, rows_file, warm_up=not variant)
    asked = task._replace(group_sizes=(sum(task.group_sizes),)) if "not nested" in contender else task
    return train_ours(data, asked, lr, seed, **OURS[contender])


def _score(contender: str, dictionary: Dictionary, task: Task, data: Activations, part: Part, seconds: float) -> Score:
    return score(dictionary, task, contender.startswith("eai-sparsify"), data.validation, part, seconds)


def _as_json(result: Result) -> dict[str, Any]:
    means = {
        "fvu": result.fvu(),
        "l0": result.mean("l0"),
        "dead": result.mean("dead"),
        "seconds": result.mean("seconds"),
    }
    return {**result._asdict(), "scores": [score._asdict() for score in result.scores], "means": means}


def summary(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The first task's figures under short names, ratios to the best peers of each task, and everything measured."""
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}
    ratios = {}
    for name, task in tasks.items():
        means = {r["contender"]: r["means"] for r in task["results"]}
        ours, nested = means["mtc"]["fvu"], [means[n]["fvu"] for n in NAMES[:2] if n in means]
        if nested:
            ratios[name] = {"to_best_nested_peer": [o / min(n[p] for n in nested) for p, o in enumerate(ours)]}
        if "eai-sparsify" in means:
            ratios.setdefault(name, {})["to_best_peer_not_nested"] = ours[-1] / means["eai-sparsify"]["fvu"][-1]
        if "mtc, not nested" in means:
            ratios.setdefault(name, {})["to_ours_not_nested"] = ours[-1] / means["mtc, not nested"]["fvu"][-1]
    first = next(iter(tasks.values()))
    means = {r["contender"]: r["means"] for r in first["results"]}
    found |= {
        "fvu": means["mtc"]["fvu"][-1],
        "fvu_prefixes": means["mtc"]["fvu"],
        "dead_fraction": means["mtc"]["dead"],
        "l0_error": abs(means["mtc"]["l0"] / first["task"]["k"] - 1),
        "seeds": len(first["results"][0]["scores"]),
        "peers": {n: means[n] | {"version": _peer_version(n)} for n in NAMES if n in means},
        "ratios": ratios,
        "tasks": tasks,
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR")
    parser.add_argument(
        "--peers", nargs="*", choices=NAMES, help="also the peer libraries, or those named (make peers)"
    )
    parser.add_argument("--no-warm-up", action="store_true", help="also the peers without any warm-up")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    parser.add_argument("--save", action="store_true", help="write docs/benchmarks/quality-TASK.json")
    arguments = parser.parse_args()
    peers = [] if arguments.peers is None else (arguments.peers or list(NAMES))
    if peers and not PEERS_PYTHON.exists():
        raise SystemExit(f"{PEERS_PYTHON} is missing: run `make peers` first")
    if arguments.no_warm_up:
        peers += [f"{name}, no warm-up" for name in peers]
    names = list(TASKS) if arguments.task == "all" else [arguments.task]
    tasks = {}
    for name in names:
        tasks[name] = run(name, TASKS[name], [*OURS, *peers], tuple(arguments.rates), arguments.seeds)
        if arguments.save:
            path = Path("docs/benchmarks") / f"quality-{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary({name: tasks[name]}), indent=1) + "\n")
    found = summary(tasks)
    for name, ratios in found["ratios"].items():
        print(f"\n{name}: FVU over the best nested peer's, per prefix "
              f"{[round(v, 3) for v in ratios.get('to_best_nested_peer', [])]}; over the peer's without nesting "
              f"{ratios.get('to_best_peer_not_nested', float('nan')):.3f}; over ours without nesting "
              f"{ratios['to_ours_not_nested']:.3f}")  # fmt: skip
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
