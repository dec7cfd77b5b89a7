"""What several trainers divide: steps of the same transcoders on one rank, and on two that divide tokens or these.

    python -m benchmarks.split [--json] [--transcoders N] [--features N] [--d-model N] [--batch N] [--rounds N]

Ranks are processes of a gloo group on this machine, one thread each; one rank alone has as many threads as two ranks.
Activations are random, of `batch` rows in all. All three take their steps in turn, ten at a time, so that what else the
machine does meets all of them alike; a round's time is that of the slowest rank.

- `one_ms`, `tokens_ms`, `transcoders_ms`: a step of all transcoders, median of the rounds.
- `sent_mb`: bytes that both ranks send at a step, counted on paper: gradients once around (2 (W - 1) / W times the
  weights, from each rank), or rows (what every rank lacks of its sites).

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.placement import placed_members
from cluster.routing import Routing
from cluster.train_worker import _rows_of
from mtc.config import RunConfig, SiteKey, load_preset
from mtc.training import SideBySide, Trainer
from mtc.transcoder import agree

RANKS, STEPS = 2, 10
KINDS = {"one": 1, "tokens": RANKS, "transcoders": RANKS}


def config_of(kind: str, options: argparse.Namespace) -> RunConfig:
    """Transcoders of as many layers, of which several trainers divide `kind`."""
    split = {} if kind == "one" else {"split": kind, "num_trainers": RANKS}
    return load_preset(
        "tiny",
        {
            "model": {"layers": list(range(options.transcoders))},
            "transcoder": {"group_sizes": [options.features // 4, options.features * 3 // 4], "k": 32},
            "optimizer": {"batch_tokens": options.batch, "backend": "sparse", "precision": "float32"},
            "cluster": split,
        },
    )


def prepare(kind: str, rank: int, options: argparse.Namespace) -> Callable[[], None]:
    """Trainers on this rank, initialised; what is returned makes one step of all."""
    config, ranks = config_of(kind, options), KINDS[kind]
    routing = Routing(config, rank, ranks)
    generator = torch.Generator().manual_seed(rank)
    share = options.batch // ranks
    keys: list[SiteKey] = [key for site in config.model.sites for key in (site.source_key, site.target_key)]
    taken = {key: torch.randn(share, options.d_model, generator=generator).bfloat16() for key in keys}
    with routing.alone():
        width = options.d_model
        trainers = [Trainer(member.config, width, width) for member in routing.members]
        together = SideBySide(trainers)

    def step() -> None:
        rows = routing.route(taken, [share] * ranks)
        with routing.alone():
            together.step([_rows_of(trainer, rows) for trainer in trainers], options.batch)

    first = routing.route(taken, [share] * ranks)
    with routing.alone():
        for trainer in trainers:
            trainer.initialise(*_rows_of(trainer, first))
    step()
    return step


def measure(rank: int, directory: str, options: argparse.Namespace) -> None:
    """A process of the group. Where one rank is timed, the other waits for it."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=RANKS)
    dist.barrier()
    from mtc.transcoder import alone  # beside the group, for the process that is one rank

    steps = {}
    for kind in KINDS:
        torch.set_num_threads(RANKS if kind == "one" else 1)
        if kind == "one":
            with alone():
                steps[kind] = prepare(kind, 0, options) if rank == 0 else None
        else:
            steps[kind] = prepare(kind, rank, options)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in sorted(KINDS, reverse=bool(number % 2)):
            torch.set_num_threads(RANKS if kind == "one" else 1)
            dist.barrier()
            start = time.perf_counter()
            if (step := steps[kind]) is not None:
                for _ in range(STEPS):
                    if kind == "one":
                        with alone():
                            step()
                    else:
                        step()
            (slowest,) = agree(1000 * (time.perf_counter() - start) / STEPS, op=dist.ReduceOp.MAX)
            found[kind].append(slowest)
    if rank == 0:
        Path(directory, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def sent(options: argparse.Namespace) -> dict[str, float]:
    """Megabytes that all ranks send at a step."""
    config = config_of("transcoders", options)
    weights = options.transcoders * (2 * options.d_model * options.features + options.features + options.d_model)
    rows = sum(2 * len(mine) for mine in placed_members(config, RANKS)) * options.batch * (RANKS - 1) / RANKS
    return {
        "tokens": 4 * weights * 2 * (RANKS - 1) / 1e6,
        "transcoders": 2 * rows * options.d_model / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--transcoders", type=int, default=4)
    parser.add_argument("--features", type=int, default=1152, help="of each transcoder")
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--batch", type=int, default=1024, help="tokens of a step, over all ranks")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, (directory, options), nprocs=RANKS)
        found = json.loads(Path(directory, "found.json").read_text())
    result: dict[str, Any] = {f"{kind}_ms": round(statistics.median(times), 1) for kind, times in found.items()}
    result["sent_mb"] = {kind: round(count, 1) for kind, count in sent(options).items()}
    if not options.json:
        print(f"{options.transcoders} transcoders of {options.features:,} features, {options.batch:,} tokens a step")
        for kind, ranks in KINDS.items():
            ratios = [time / one for time, one in zip(found[kind], found["one"], strict=True)]
            shown = f"{result[f'{kind}_ms']:8.1f} ms a step, {statistics.median(ratios):.2f} of one rank's"
            print(f"{ranks} rank{'s' * (ranks > 1)}, {kind:12}{shown}, {result['sent_mb'].get(kind, 0):6.1f} MB sent")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
