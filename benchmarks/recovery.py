"""What faults cost: time from a kill to the next trained step, work done again, and what checkpoints take.

    python -m benchmarks.recovery [--json] [--save] [--tokens N] [--rounds N]

Two parts, on one machine:

- checkpoints: the reference shape's Trainer makes blocks of steps, in turn one without a checkpoint and one that begins
  with one; the median difference is what a checkpoint costs training. `checkpoint_overhead` is that
  per minute.
- recovery: the job with real weights (SmolLM2-135M) on a `ray start --head` of its own; its model actors and trainers
  are killed with SIGKILL in turn. A row for each step says when it was trained. `actor_recovery_s` is the longest pause
  of training in the 45 seconds after a model actor's death, `actor_reload_s` what starting one takes;
  `trainer_recovery_s` the same after a trainer's death. `repeated_tokens` and `lost_windows` come from the run's
  ledger, `redone_steps`, the work since the last checkpoint, from its events.

The last line is one JSON object; `--save` writes it to docs/benchmarks/recovery.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.faults import Job, ray_head
from cluster.progress import RESUMED
from mtc.config import load_preset

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "recovery.json"
KINDS = ("model actor", "trainer")
APART = 45.0  # seconds between kills, more than a recovery takes


def checkpoints(rounds: int) -> dict[str, Any]:
    """Seconds that one checkpoint costs training at the reference shape."""
    import torch

    from cluster.training import _to_safetensors
    from mtc.checkpoints import Checkpoints, CheckpointWriter
    from mtc.training import Trainer

    config = load_preset("gemma-2-2b-layer17", {"optimizer": {"backend": "sparse"}})
    d_model, batch = 2304, config.optimizer.batch_tokens
    trainer = Trainer(config, d_model, d_model)
    source, target = torch.randn(2, batch, d_model).unbind()
    trainer.initialise(source, target)
    steps, costs, held, written, size = 16, [], [], [], 0
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        writer = CheckpointWriter(Checkpoints(directory), 1, 0, 1, 2, lambda *news: None)

        def block(save: bool) -> float:
            nonlocal size
            start = time.perf_counter()
            future = None
            if save:
                state = trainer.state_dict()
                size = sum(value.numel() * value.element_size() for value in state.values())
                future = writer.save(trainer.step_number, {"trainer": lambda: _to_safetensors(state)})
                held.append(time.perf_counter() - start)
                future.add_done_callback(lambda _: written.append(time.perf_counter() - start))
            for _ in range(steps):
                trainer.step(source, target)
            seconds = time.perf_counter() - start
            if future is not None and not future.done():
                print("note: the block ended before the checkpoint was written", flush=True)
                future.result()
            return seconds

        block(True)  # warms up
        step = []
        for _ in range(rounds):
            without, with_one = block(False), block(True)
            step.append(without / steps)
            costs.append(with_one - without)
        writer.close()
    cost = statistics.median(costs)
    print(f"checkpoint of {size / 1e6:.0f} MB: training held for {statistics.median(held):.2f} s, written after "
          f"{statistics.median(written):.2f} s, costs {cost:.2f} s of training; one step "
          f"{statistics.median(step):.3f} s", flush=True)  # fmt: skip
    return {
        "checkpoint_overhead": cost / 60,
        "checkpoint_bytes": size,
        "checkpoint_held_s": statistics.median(held),
        "checkpoint_written_s": statistics.median(written),
        "checkpoint_cost_s": costs,
        "step_s": statistics.median(step),
    }


def recovery(tokens: int, rounds: int) -> dict[str, Any]:
    """Pauses of training after kills, and what the ledger says in the end."""
    pauses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ray_head() as head, tempfile.TemporaryDirectory() as root:
        options = ["--preset", "smollm2-135m", "--data.num_tokens", str(tokens), "--cluster.log_every_steps", "1"]
        options += ["--cluster.checkpoint_every_seconds", "5", "--analysis.loss_tokens", "0"]
        options += ["--analysis.num_tokens", "4096", "--optimizer.backend", "sparse"]
        job = Job(head, Path(root), "killed", options)
        moments = []
        for turn in range(2 * rounds):
            job.wait_for_checkpoint(job.newest())
            kind = KINDS[turn // rounds]  # first all actors: a trainer's death has rows before it written again
            moments.append((kind, time.time()))
            head.kill(kind, turn)
            time.sleep(APART)
        job.finish()
        reload = _reload(job)
        times = sorted(row["time"] for row in _rows(job))
        for kind, moment in moments:
            after = [moment, *(at for at in times if moment < at < moment + APART)]
            pauses[kind].append(max(b - a for a, b in pairwise(after)))
            print(f"{kind} killed: no new step for {pauses[kind][-1]:.1f} s", flush=True)
        return _account(job) | {
            "actor_recovery_s": statistics.median(pauses["model actor"]),
            "actor_reload_s": reload,
            "trainer_recovery_s": statistics.median(pauses["trainer"]),
            "pauses_s": pauses,
        }


def _rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]


def _reload(job: Job) -> float:
    """Seconds that a fresh process takes to be a model actor, with nothing beside it."""
    code = """
import json, sys
from cluster.activations import CaptureActor
from mtc.runs import open_run
run = open_run(sys.argv[1])
CaptureActor(run.config(), json.loads(run.read("analysis.json"))["facts"]["token_store"], "cpu", 1)
"""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(job.run)], check=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _account(job: Job) -> dict[str, Any]:
    from mtc.ledger import Progress
    from mtc.runs import open_run
    from mtc.tokens import TokenStore
    from mtc.work import work_units

    run = open_run(str(job.run))
    progress = Progress(pq.read_table(f"{run.url}/ledger.parquet"))
    store = TokenStore.open(json.loads(run.read("analysis.json"))["facts"]["token_store"])
    work = work_units(store, run.config())
    finished = set(progress.finished().tolist()) - set(progress.wrong_units().tolist())
    lost = sum(len(unit) for number, unit in enumerate(work.training) if number not in finished)
    resumed = [event["message"] for event in job.events() if event["kind"] == RESUMED]
    redone = [int(message.split("; ")[1].split()[0]) for message in resumed if "; " in message]
    return {
        "repeated_tokens": progress.repeated_tokens(),
        "lost_windows": lost,
        "windows": sum(len(unit) for unit in work.training),
        "redone_steps": redone,
        "steps": run.config().total_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the last line")
    parser.add_argument("--save", action="store_true", help="write the figures to docs/benchmarks/recovery.json")
    parser.add_argument("--tokens", type=int, default=150_000, help="length of the run that is disturbed")
    parser.add_argument("--rounds", type=int, default=3, help="kills of each kind")
    arguments = parser.parse_args()
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        found = checkpoints(7) | recovery(arguments.tokens, arguments.rounds)
    if arguments.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
