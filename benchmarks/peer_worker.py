"""A process that trains one contender of a comparison on JSON orders, in whichever environment its library wants; so
this imports neither `mtc` nor ray."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DECAY_FRACTION = 0.2
SAMPLE_ROWS = 4096


class Work(NamedTuple):
    """What every contender is asked to do."""

    d_source: int
    d_target: int
    group_sizes: tuple[int, ...]
    """New features per prefix, smallest prefix first. Peers that cannot nest use the sum."""
    k: int
    batch: int
    steps: int
    """Length of the schedule; what the rate is past its end is up to each library, so take no more steps than this."""
    lr: float
    seed: int
    dead_after_tokens: int
    """A feature silent this long is dead and takes part in AuxK."""
    warmup_steps: int

    @property
    def features(self) -> int:
        return sum(self.group_sizes)

    @property
    def decay_steps(self) -> int:
        return int(DECAY_FRACTION * self.steps)


class Peer(Protocol):
    """One library, ready to train."""

    nested: bool

    def step(self, x: Tensor, y: Tensor) -> None:
        """One whole training step on scaled x [batch, d_source], y [batch, d_target], float32."""

    def force_dead(self, features: int) -> None:
        """From now on the last `features` features count as dead at every step, whether they fire or not."""

    def export(self) -> dict[str, Tensor]:
        """W_enc [features, d_source], b_enc [features], W_dec [features, d_target], b_dec [d_target] and rank_scale.

        With z = relu(x @ W_enc.T + b_enc), features are ranked by z * rank_scale [features], and those selected decode
        as z @ W_dec + b_dec; a prefix of m features as z[:, :m] @ W_dec[:m] + b_dec. With a skip connection there is
        W_skip [d_target, d_source] too, and x @ W_skip.T is added to both.
        """


def batches(tokens: int, work: Work) -> Iterator[Tensor]:
    """Row indices [batch] for work.steps steps: a new seeded permutation each epoch, its last partial batch dropped."""
    if tokens < work.batch:
        raise ValueError(f"{tokens} tokens are fewer than one batch of {work.batch}")
    generator = torch.Generator().manual_seed(work.seed + 1)
    per_epoch = tokens // work.batch
    for step in range(work.steps):
        if step % per_epoch == 0:
            order = torch.randperm(tokens, generator=generator)
        yield order[step % per_epoch * work.batch :][: work.batch]


def run_worker(make: Callable[[str, Work, Tensor, Tensor], Peer]) -> None:
    """Obey one JSON object per line of stdin; answer on stdout, where the libraries' own prints do not get.

    make {name, work}: a peer on random x, y [batch, d] -> base_rss_bytes, resident before it, x and y included.
    force_dead {features}; step {repeat} -> seconds, peak_rss_bytes during, rss_bytes after; quit.
    train {name, work, rows, largest_norm, out}: safetensors with float32 train.source, train.target in, of which rows
    whose target has a larger norm than that are left out unless it is null; safetensors of `Peer.export` out ->
    seconds, cpu_seconds of all its threads.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer, x, y = None, torch.empty(0), torch.empty(0)
    for line in sys.stdin:
        order = json.loads(line)
        command = order["cmd"]
        if command == "make":
            work, generator, peer = Work(**order["work"]), torch.Generator().manual_seed(0), None
            x = torch.randn(work.batch, work.d_source, generator=generator)
            y = torch.randn(work.batch, work.d_target, generator=generator)
            _warm_up(make, order["name"])
            answer: dict[str, Any] = {"ok": True, "base_rss_bytes": _memory("VmRSS")}
            peer = make(order["name"], work, x, y)
        elif command == "force_dead":
            peer.force_dead(order["features"])
            answer = {"ok": True}
        elif command == "step":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
            start = time.perf_counter()
            for _ in range(order["repeat"]):
                peer.step(x, y)
            answer = {"seconds": time.perf_counter() - start, "peak_rss_bytes": _memory("VmHWM")}
            answer["rss_bytes"] = _memory("VmRSS")
        elif command == "train":
            work, data = Work(**order["work"]), load_file(order["rows"])
            source, target = data["train.source"], data["train.target"]
            used = torch.arange(len(source))
            if order["largest_norm"] is not None:
                used = used[torch.cat([y.norm(dim=1) <= order["largest_norm"] for y in target.split(SAMPLE_ROWS)])]
            trained = make(order["name"], work, source[used[:SAMPLE_ROWS]], target[used[:SAMPLE_ROWS]])
            start, cpu = time.perf_counter(), time.process_time()
            for rows in batches(len(used), work):
                trained.step(source[used[rows]], target[used[rows]])
            answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            save_file(trained.export(), order["out"])
        elif command == "quit":
            return
        else:
            raise ValueError(f"unknown command {command!r}")
        print(json.dumps(answer), file=answers, flush=True)


def _warm_up(make: Callable[[str, Work, Tensor, Tensor], Peer], name: str) -> None:
    """Import the library and start torch's threads, by way of one step of a tiny peer."""
    tiny = Work(8, 8, (8, 8), k=2, batch=4, steps=10, lr=1e-3, seed=0, dead_after_tokens=1000, warmup_steps=1)
    rows = torch.randn(4, 8)
    make(name, tiny, rows, rows).step(rows, rows)
    torch.randn(256, 256) @ torch.randn(256, 256)


def _memory(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
