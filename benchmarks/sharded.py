"""One dictionary over several ranks: whether it is that of one, what a rank holds, and what ranks tell each other.

    python -m benchmarks.sharded [--ranks 2 4] [--features 262144] [--steps 12] [--save]

The same training on one rank, as runs do it without sharing, and with the features over several processes of a gloo
group on this machine, one thread each. Memory is the highest resident size during training beyond the size before the
trainer is made, when libraries, the group and the batches are there and a small trainer has stepped; a ratio is the
largest rank's over one rank's. Bytes are what one rank hands to collectives in the last step, counted, beside what a
formula says. From step 9 on AuxK works on all features that have not fired in the last two batches. `predict` does the
sums for NVLink, where nothing is measured. The last line is one JSON object; `--save` writes
docs/benchmarks/sharded.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.peer_worker import _memory
from mtc.config import RunConfig, load_preset
from mtc.training import Calibrator, Trainer, read_shards, shard_bytes
from mtc.transcoder import Shard

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "sharded.json"
HISTOGRAMS = 8 * (2**15 + 2**16)
"""Bytes of the counts by which ranks on CPUs find the border of a choice."""
INITIAL = 4096
WARM_UP = 2


class Size(NamedTuple):
    """What is trained."""

    features: int
    width: int
    batch: int
    k: int
    aux_k: int
    steps: int

    @property
    def groups(self) -> list[int]:
        return [self.features // 16, self.features // 16 * 3, self.features - self.features // 16 * 4]

    def config(self) -> RunConfig:
        transcoder = {"group_sizes": self.groups, "k": self.k, "aux_k": self.aux_k}
        # Adam divides a gradient that is zero but for rounding by itself: a larger epsilon keeps that out.
        optimizer = {"batch_tokens": self.batch, "precision": "float32", "backend": "sparse", "eps": 1e-4}
        return load_preset(
            "tiny",
            {
                "transcoder": transcoder | {"dead_after_tokens": 2 * self.batch},
                "optimizer": optimizer,
                "data": {"num_tokens": self.batch * self.steps},
            },
        )


def bytes_of_a_step(size: Size, ranks: int, on_cpu: bool, proposals: int = 1) -> dict[str, int]:
    """Bytes that one rank hands to collectives in a step with AuxK; `proposals` are how often entries are listed."""
    slots = len(size.groups) + 1
    border = HISTOGRAMS + 16 if on_cpu else 4 * size.k * size.batch
    return {
        "residuals": 4 * size.batch * slots * size.width,
        "border": border * proposals,
        "AuxK": 4 * size.batch * size.aux_k,
        "b_dec and scalars": 4 * size.width + 4 + 8 * (1 + len(size.groups)),
    }


def predict(size: Size, ranks: int, link: float = 450e9, memory: float = 3.35e12, product: float = 0.4 * 989e12) -> Any:
    """Milliseconds of a step's parts on GPUs, on paper: collectives over NVLink, `link` bytes/s in each direction
    (900 GB/s of an H100 both ways), against the encoder's product and Adam's passes over `memory`."""
    sent = bytes_of_a_step(size, ranks, on_cpu=False)
    reduced, gathered = sent["residuals"] + sent["b_dec and scalars"], sent["border"] + sent["AuxK"]
    # A ring sends every byte but a rank's own part twice to reduce it; to gather, each rank's bytes to all others.
    wire = 2 * (ranks - 1) / ranks * reduced + (ranks - 1) * gathered
    parameters = 2 * size.features * size.width / ranks
    return {
        "ranks": ranks,
        "wire_bytes": round(wire),
        "collectives_ms": round(1000 * wire / link, 3),
        "product_ms": round(1000 * 2 * size.batch * size.width * size.features / ranks / product, 3),
        "adam_ms": round(1000 * parameters * 4 * 7 / memory, 3),  # reads four arrays, writes three
        "state_gigabytes": round(16 * parameters / 1e9, 2),
    }


def batches(size: Size) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """The steps' batches and the rows that come first, which also set the threshold."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size.width, size.width, generator=generator) / size.width**0.5

    def rows(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, size.width, generator=generator)
        return x, torch.relu(x) @ mixing

    return [rows(size.batch) for _ in range(size.steps)], rows(INITIAL)


def run_rank(rank: int, ranks: int, size: Size, directory: str) -> None:
    """Train on one rank; figures and the shard go into the directory."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/group{ranks}", rank=rank, world_size=ranks)
        dist.barrier()
    data, first = batches(size)
    small = _trainer(size._replace(features=64, batch=64), ranks)
    small.step(*data[0])
    del small
    told = _count_collectives()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    trainer = _trainer(size, ranks)
    trainer.initialise(*first)
    seconds, metrics, sent = [], [], {}
    for x, y in data:
        told.clear()
        start = time.perf_counter()
        found = trainer.step(x, y)
        metrics.append(found.metrics()._asdict())
        seconds.append(time.perf_counter() - start)
        sent = dict(told)
    peak = _memory("VmHWM")
    calibrator = Calibrator(trainer.transcoder)
    for rows in first[0].split(256):
        calibrator.add(rows)
    calibrator.finish()
    shard = trainer.shard or Shard(0, 1, tuple(size.groups))
    Path(directory, f"{ranks}-{rank}.safetensors").write_bytes(shard_bytes(trainer.state_dict(), shard))
    timed = seconds[WARM_UP:]
    answer = {"peak_bytes": peak - before, "seconds": statistics.median(timed), "sent_bytes": sent, "metrics": metrics}
    Path(directory, f"{ranks}-{rank}.json").write_text(json.dumps(answer))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _trainer(size: Size, ranks: int) -> Trainer:
    return Trainer(size.config(), size.width, size.width, split="features" if ranks > 1 else "tokens")


def measure(size: Size, ranks: int, directory: str) -> dict[str, Any]:
    mp.start_processes(run_rank, (ranks, size, directory), nprocs=ranks, start_method="spawn")
    found = [json.loads(Path(directory, f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    return {
        "ranks": ranks,
        "peak_bytes": max(each["peak_bytes"] for each in found),
        "step_seconds": max(each["seconds"] for each in found),
        "sent_bytes": found[0]["sent_bytes"],
        "metrics": found[0]["metrics"],
    }


def difference(directory: str, size: Size, ranks: int) -> dict[str, float]:
    """How far the state on so many ranks is from that of one: the largest difference over the largest number."""
    whole = Shard(0, 1, tuple(size.groups))
    one, many = (
        read_shards([f"{directory}/{count}-{rank}.safetensors" for rank in range(count)], whole) for count in (1, ranks)
    )
    found = {}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "tokens_since_fired"):
        a, b = (state[f"transcoder.{name}"].double() for state in (one, many))
        found[name] = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return found


def _count_collectives() -> Counter[str]:
    """Bytes that this process hands to each kind of collective from now on."""
    told: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            told[name] += arguments[argument].numel() * arguments[argument].element_size()
            return call(*arguments, **options)

        return counted

    for name, argument in (("all_reduce", 0), ("all_gather", 1), ("broadcast", 0)):
        setattr(dist, name, counting(name, getattr(dist, name), argument))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="beside one")
    parser.add_argument("--features", type=int, default=262_144)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS}")
    arguments = parser.parse_args()
    size = Size(arguments.features, 64, 512, 16, 16, arguments.steps)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for ranks in (1, *arguments.ranks):
            load = os.getloadavg()[0]
            row = measure(size, ranks, directory) | {"load_before": load}
            rows.append(row)
            if ranks > 1:
                row["difference"] = difference(directory, size, ranks)
                losses = [[step["loss"] for step in each["metrics"]] for each in (rows[0], row)]
                row["loss_difference"] = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
                row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
                row["predicted_bytes"] = bytes_of_a_step(size, ranks, on_cpu=True)
            print({name: value for name, value in row.items() if name != "metrics"}, flush=True)
    steps = [{name: step[name] for name in ("loss", "fvu", "l0", "dead")} for step in rows[0]["metrics"]]
    for row in rows:
        del row["metrics"]
    on_paper = Size(262_144, 2304, 4096, 48, 16, 1)
    answer = {
        "size": size._asdict(), "cores": os.cpu_count(), "torch": torch.__version__,
        "ranks": rows, "steps_of_one_rank": steps,
        "on_paper": {"size": on_paper._asdict(), "ranks": [predict(on_paper, ranks) for ranks in (1, 2, 4, 8)]},
    }  # fmt: skip
    if arguments.save:
        RESULTS.write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
