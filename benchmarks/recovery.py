"""What faults cost: time from a kill to the next trained step, work done again, and what checkpoints take.

    python -m benchmarks.recovery [--json] [--save] [--tokens N] [--rounds N]

Two parts, on one machine:

- checkpoints: the reference shape's Trainer makes blocks of steps, in turn one without a checkpoint and one that begins
  with one; the median difference is what a checkpoint costs training. `checkpoint_overhead` is that
  per minute.
- recovery: the job with real weights (SmolLM2-135M) on a `ray start --head` of its own; its model actors and trainers
  are killed with SIGKILL. A row for each step says when it was trained. `actor_recovery_s` is the longest pause of
  training in the 45 seconds after a model actor's death, `actor_reload_s` the time from its death until its successor
  has loaded the model and takes work, `actor_pause_beyond_reload_s` the difference of the two; `trainer_recovery_s` is
  the longest pause after a trainer's death, `ordinary_pause_s` the longest of 45 seconds in which nothing dies, since
  trainers wait for whole units anyway. `repeated_tokens` and `lost_windows` come from the run's ledger,
  `redone_steps`, the work since the last checkpoint, from its events. Times after kills are medians over the rounds.

The last line is one JSON object; `--save` writes it to docs/benchmarks/recovery.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.faults import Head, Job, ray_head, wait_for
from cluster.progress import RESUMED
from mtc.config import load_preset

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "recovery.json"
KINDS = ("model actor", "trainer")
APART = 45.0  # seconds between kills, more than a recovery takes


def checkpoints(rounds: int) -> dict[str, Any]:
    """Seconds that one checkpoint costs training at the reference shape."""
    import torch

    from cluster.train_worker import _to_safetensors
    from mtc.storage import Checkpoints, CheckpointWriter
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
        moments, reloads = [], []
        job.wait_for_checkpoint(0)
        quiet = time.time()
        time.sleep(APART)
        for turn in range(2 * rounds):
            job.wait_for_checkpoint(job.newest())
            kind = KINDS[turn // rounds]  # first all actors: a trainer's death has rows before it written again
            before = {process.pid for process in head.processes("model actor")}
            moments.append((kind, time.time()))
            head.kill(kind, turn)
            if kind == "model actor":
                wait_for("another model actor", lambda before=before: _ready(head, before))
                reloads.append(time.time() - moments[-1][1])
            time.sleep(max(0.0, moments[-1][1] + APART - time.time()))
        job.finish()
        times = sorted(row["time"] for row in _rows(job))
        ordinary = _longest(times, quiet)
        for kind, moment in moments:
            pauses[kind].append(_longest(times, moment))
            print(f"{kind} killed: no new step for {pauses[kind][-1]:.1f} s", flush=True)
        beyond = [pause - reload for pause, reload in zip(pauses["model actor"], reloads, strict=True)]
        print(f"model actors took {[round(r, 1) for r in reloads]} s to come back; with nothing dead the longest pause "
              f"was {ordinary:.1f} s", flush=True)  # fmt: skip
        return _account(job) | {
            "actor_recovery_s": statistics.median(pauses["model actor"]),
            "actor_reload_s": statistics.median(reloads),
            "actor_pause_beyond_reload_s": statistics.median(beyond),
            "trainer_recovery_s": statistics.median(pauses["trainer"]),
            "ordinary_pause_s": ordinary,
            "pauses_s": pauses,
            "reloads_s": reloads,
        }


def _longest(times: list[float], since: float) -> float:
    """The longest pause between steps in the time after `since`."""
    after = [since, *(at for at in times if since < at < since + APART)]
    return max(b - a for a, b in pairwise(after))


def _ready(head: Head, before: set[int]) -> bool:
    """Whether a model actor that is not among `before` has loaded its model."""
    for process in head.processes("model actor"):
        try:
            if process.pid not in before and "__init__" not in process.cmdline()[0]:
                return True
        except (psutil.Error, IndexError):
            continue  # it ended while we looked
    return False


def _rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]


def _account(job: Job) -> dict[str, Any]:
    from mtc.storage import Progress, open_run
    from mtc.text import TokenStore, work_units

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
    parser.add_argument("--tokens", type=int, default=360_000, help="length of the run that is disturbed")
    parser.add_argument("--rounds", type=int, default=3, help="kills of each kind")
    arguments = parser.parse_args()
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        found = checkpoints(7) | recovery(arguments.tokens, arguments.rounds)
    if arguments.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
