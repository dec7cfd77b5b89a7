"""Who takes part in benchmarks.quality, and how each is trained on the rows of a task.

Ours are trained anew by `mtc.training.Trainer` on the arrays, as the preset of the task's model says but for
`DEFAULTS`, `OURS` and the task. Peers are trained in an environment of their own (benchmarks/peers.py), and their
weights kept in the cache directory by version, settings and rows.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.activations import MODELS
from benchmarks.peer_worker import Work
from benchmarks.rows import MASSIVE_SAMPLE, Rows
from benchmarks.scores import Dictionary
from mtc.config import RunConfig, load_preset
from mtc.language_model import read_neurons
from mtc.storage import cache_directory
from mtc.training import ShuffleBuffer, Trainer, Unit

BATCH = 1024
UNIT_ROWS = 4064
"""Rows that come into the shuffle buffer together: 32 windows of 127."""
DEAD_AFTER = 20_480
WARMUP_FRACTION = 0.2
PEERS_PYTHON = Path(".venv-peers/bin/python")
ADAPTERS = 2
"""Part of the key of peers' kept weights; raise it when an adapter of benchmarks/peers.py trains otherwise."""
PEERS = (
    "sae-lens",
    "eai-sparsify",
    "eai-sparsify, skip",
    "eai-sparsify, sign",
    "eai-sparsify, skip, sign",
    "dictionary-learning",
)
NO_WARM_UP = "no warm-up"
NO_MASSIVE = "no massive rows"
"""What may follow a peer's name: how it is trained, which the library does not know of."""


class Task(NamedTuple):
    model: str
    """Name in benchmarks.activations.MODELS."""
    layer: int
    train_tokens: int = 400_000
    """Captured tokens, all different."""
    steps: int = 390
    """Steps of the peers, of BATCH tokens."""
    group_sizes: tuple[int, ...] = (288, 576, 288)
    k: int = 32

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(accumulate(self.group_sizes))

    def rows(self) -> str:
        return f"{self.model} layer {self.layer}"


class Ours(NamedTuple):
    """How we take part."""

    sections: dict[str, Any] = {}
    """Overrides of DEFAULTS."""
    nested: bool = True


DEFAULTS: dict[str, Any] = {
    "data": {"replays": 8, "shuffle_buffer_tokens": 400_000},
    "transcoder": {"skip": False, "prefix_weights": (1.0, 1.0, 2.0)},
}
"""Overrides, for all of ours, of the preset of the task's model, which says where features start and how they
compete."""
OURS: dict[str, Ours] = {
    "mtc": Ours(),
    "mtc, skip": Ours({"transcoder": {"skip": True}}),
    "mtc, not nested": Ours(nested=False),
    "mtc, no replays": Ours({"data": {"replays": 1}}),
}
"""The first is what we take part with; the others differ from it in what their name says."""


class Trained(NamedTuple):
    dictionary: Dictionary
    seconds: float
    """Wall time of the steps."""
    cpu_seconds: float
    """Of all threads of the process over the steps, user and system: hardly changed by whoever else is at work."""


def train(contender: str, task: Task, lr: float, seed: int, rows: Rows) -> Trained:
    """Train a contender by its name: one of OURS, or of PEERS, which NO_WARM_UP and NO_MASSIVE may follow."""
    if contender in OURS:
        return train_ours(rows, task, lr, seed, OURS[contender])
    return train_peer(contender, task, lr, seed, rows)


def train_ours(rows: Rows, task: Task, lr: float, seed: int, ours: Ours, make: type[Trainer] = Trainer) -> Trained:
    """Train on the first `task.train_tokens` rows, in the order in which a run's shuffle buffer gives them out."""
    sections = ours.sections
    if not ours.nested:
        task = task._replace(group_sizes=(sum(task.group_sizes),))
        sections = {**sections, "transcoder": {**sections.get("transcoder", {}), "prefix_weights": None}}
    source, target = (part[: task.train_tokens] for part in rows.train)
    config = our_config(task, lr, seed, sections)
    trainer = make(config, source.shape[1], target.shape[1])
    neurons = read_neurons(config.model, task.layer) if config.transcoder.init == "mlp" else None
    trainer.initialise(source[:MASSIVE_SAMPLE], target[:MASSIVE_SAMPLE], neurons)
    start, cpu = time.perf_counter(), time.process_time()
    for chosen in row_order(config, len(source), seed):
        trainer.step(source[chosen], target[chosen])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    t, scale = trainer.transcoder, trainer.transcoder.target_scale
    skip = torch.zeros(t.shape.d_target, t.shape.d_source) if t.W_skip is None else t.W_skip.detach() / scale
    decoder = t.W_dec.detach() / scale, t.b_dec.detach() / scale
    rank_scale = t.rank_scale()
    ranked = torch.ones(t.num_features) if rank_scale is None else rank_scale
    return Trained(Dictionary(t.W_enc.detach(), t.b_enc.detach(), *decoder, ranked, skip), seconds, cpu_seconds)


def row_order(config: RunConfig, tokens: int, seed: int) -> Iterator[Tensor]:
    """Row indices [batch] of every step: each of `tokens` rows `data.replays` times, over again if steps are left."""
    data, batch = config.data, config.optimizer.batch_tokens
    key, left, epoch = (0, "row"), config.total_steps, 0
    while left > 0:
        buffer = ShuffleBuffer(data.shuffle_buffer_tokens, (seed, epoch), replays=data.replays)
        units = list(torch.arange(tokens)[:, None].split(UNIT_ROWS))
        for number, rows in enumerate(units):
            buffer.add(Unit(number, {key: rows}, np.arange(len(rows), dtype=np.int32), len(rows)))
            if number == len(units) - 1:
                buffer.close()
            while buffer.available >= batch and left:
                yield buffer.take(batch).activations[key][:, 0]
                left -= 1
        epoch += 1


def our_config(task: Task, lr: float, seed: int, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a task's run; its steps are those that the replays ask, and at least the task's."""
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
        "backend": "sparse",
        "precision": "float32",
    }
    sections: dict[str, Any] = {"transcoder": transcoder, "optimizer": optimizer}
    for layer in (DEFAULTS, overrides):
        for name, settings in layer.items():
            sections[name] = sections.get(name, {}) | settings
    replays, batch = sections["data"]["replays"], sections["optimizer"]["batch_tokens"]
    captured = max(task.train_tokens // batch, -(-task.steps // replays)) * batch
    sections["data"] = {"num_tokens": captured} | sections["data"]
    warmup = int(WARMUP_FRACTION * captured * replays / batch)
    sections["optimizer"] = {"warmup_steps": warmup} | sections["optimizer"]
    sections["model"] = {"layer": task.layer}
    return load_preset(MODELS[task.model], sections)


def train_peer(contender: str, task: Task, lr: float, seed: int, rows: Rows) -> Trained:
    """Train in the peers' environment, or take from the cache what was trained before."""
    parts = contender.split(", ")
    name, library = ", ".join(part for part in parts if part not in (NO_WARM_UP, NO_MASSIVE)), parts[0]
    work = _work(rows, task, lr, seed)
    if NO_WARM_UP in parts:
        work = work._replace(warmup_steps=0)
    norm = rows.massive_norm if NO_MASSIVE in parts else None
    how = name if norm is None else f"{name}, rows up to {norm:g}"
    key = json.dumps([ADAPTERS, how, peer_version(library), work, task.model, task.layer, _digest(rows)])
    directory = Path(cache_directory()) / "benchmarks" / "peers"
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / f"{library}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    answer = out.with_suffix(".json")  # is written last
    if not answer.exists():
        order = {"cmd": "train", "name": name, "work": work._asdict(), "out": str(out)}
        order |= {"rows": str(rows.file), "largest_norm": norm}
        done = subprocess.run(
            [str(PEERS_PYTHON), "-m", "benchmarks.peers", "worker"],
            input=json.dumps(order) + "\n", capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not done.stdout:
            raise RuntimeError(f"{contender} was not trained: {done.stderr[-2000:]}")
        answer.with_suffix(".part").write_text(done.stdout)
        answer.with_suffix(".part").rename(answer)
    weights, spent = load_file(out), json.loads(answer.read_text())
    weights.setdefault("W_skip", torch.zeros(weights["W_dec"].shape[1], weights["W_enc"].shape[1]))
    return Trained(Dictionary(**weights), spent["seconds"], spent["cpu_seconds"])


@cache
def peer_version(library: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({library!r}))"
    return subprocess.run([str(PEERS_PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _work(rows: Rows, task: Task, lr: float, seed: int) -> Work:
    sizes = rows.train.source.shape[1], rows.train.target.shape[1]
    warmup = int(WARMUP_FRACTION * task.steps)
    return Work(*sizes, task.group_sizes, task.k, BATCH, task.steps, lr, seed, DEAD_AFTER, warmup)


def _digest(rows: Rows) -> str:
    return hashlib.sha256(rows.train.target[::997].numpy().tobytes()).hexdigest()[:16]
