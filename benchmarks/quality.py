"""Reconstruction for equal work: transcoders trained by us and by peer libraries on the same activations.

`python -m benchmarks.quality --peers --json` trains every contender on cached activations of real models (captured on
first use, see benchmarks.activations), each at its best learning rate on the validation part, and reports on the test
part: held-out FVU per nested prefix and L0, without massive tokens and with them, dead features, seconds and CPU
seconds. It ends with the project's targets and whether they are met
(benchmarks.targets).

All contenders read the same rows (benchmarks.rows), are scored alike (benchmarks.scores), and warm up for
WARMUP_FRACTION of the steps (with `--no-warm-up` the peers also without). Ours choose from OUR_RATES; the peers' sweep
goes on by factors of two until its best rate is none of its ends, at most twice. Peers train each captured token once,
as their libraries do; we replay it (`DEFAULTS`); "mtc, no replays" takes the peers' steps. Where rows are massive,
peers are trained with and without them. Peers' weights are kept, so a run that was stopped goes on where it was; ours
are trained anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.activations import capture_cost
from benchmarks.contenders import (
    NO_MASSIVE,
    NO_WARM_UP,
    OURS,
    PEERS,
    PEERS_PYTHON,
    Task,
    Trained,
    peer_version,
    train,
)
from benchmarks.rows import Rows, load_rows
from benchmarks.scores import Score, linear_map, score
from benchmarks.targets import TARGETS, best_nested_peer, describe, figures, shown, verdict

OUR_RATES = (4e-3, 6e-3)
"""Of ours, SmolLM2's preset's and the default at these sizes. The nested one's choice goes for all of ours."""
RATES = (3e-3, 6e-3, 1.2e-2)
SIGN_RATES = (5e-3, 1e-2, 2e-2)
"""Of sparsify's sign optimizer, whose own default at 1,152 features is 0.019."""
EXTENSIONS = 2
"""Rates that a sweep may go beyond its ends."""
SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Of the captured tokens, on which ours is trained for `tokens_to_match`, until that is reached."""
TASKS = {
    "smollm2": Task("smollm2", 20),
    "smollm2-layer9": Task("smollm2", 9),
    "gemma3": Task("gemma3", 12),
    "smollm2-layer11": Task("smollm2", 11),
    "gemma3-layer0": Task("gemma3", 0),
    "smollm2-wide": Task("smollm2", 20, group_sizes=(576, 1152, 576)),
    "smollm2-long": Task("smollm2", 20, steps=1950),
}
DEFAULT_TASKS = list(TASKS)[:5]


class Result(NamedTuple):
    """One contender on one task, at its best learning rate."""

    contender: str
    lr: float
    """The one with the least full-dictionary FVU on the validation part, seed 0; of all of ours the nested one's."""
    validation: dict[str, float]
    """Full-dictionary FVU on the validation part for every rate that was tried, seed 0."""
    scores: list[Score]
    """On the test part, one per seed."""
    seconds: list[float]
    """Wall time of training, one per seed."""
    cpu_seconds: list[float]
    """CPU seconds of training, one per seed."""

    def means(self) -> dict[str, Any]:
        found = {
            name: [statistics.mean(values) for values in zip(*(getattr(s, name) for s in self.scores), strict=True)]
            for name in ("fvu", "fvu_all")
        }
        found |= {name: statistics.mean(getattr(s, name) for s in self.scores) for name in ("l0", "l0_all", "dead")}
        return found | {name: statistics.mean(getattr(self, name)) for name in ("seconds", "cpu_seconds")}

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "scores": [s._asdict() for s in self.scores], "means": self.means()}


def run(name: str, task: Task, contenders: list[str], rates: tuple[float, ...] | None, seeds: int) -> dict[str, Any]:
    """Train everybody, print a row each, and return what was measured. `rates` None is each one's own, extended."""
    rows = load_rows(task.model, task.layer, task.train_tokens)
    massive = 1 - float(rows.typical(rows.test).float().mean())
    if rows.typical(rows.train).all():
        contenders = [name for name in contenders if NO_MASSIVE not in name]
    print(
        f"\n{name}: {task.rows()}, {task.train_tokens:,} captured tokens, {task.steps} steps of the peers, features "
        f"{list(task.group_sizes)}, k {task.k}; test part {len(rows.test.source):,} tokens, {massive:.2%} massive, "
        f"{seeds} seed(s)"
    )
    line = linear_map(rows)
    print(f"{'contender':<32}{'lr':>8}{'FVU per prefix':>24}{'L0':>8}{'dead':>8}{'train':>9}{'CPU':>8}"
          f"{'all tokens: FVU':>26}{'L0':>8}")  # fmt: skip
    print(f"{'linear map':<32}{'':>8}{line.fvu:>24.3f}{'':>33}{line.fvu_all:>26.3f}", flush=True)
    results: list[Result] = []
    for contender in contenders:
        if contender in OURS:
            asked, extensions = (results[0].lr,) if results else rates or OUR_RATES, 0
        else:
            own = SIGN_RATES if "sign" in contender.split(", ") else RATES
            asked, extensions = (rates, 0) if rates else (own, EXTENSIONS)
        results.append(_best_of(contender, task, asked, extensions, seeds, rows))
        _print_row(results[-1])
    measured = [result.as_json() for result in results]
    found = {"task": task._asdict(), "massive_share": massive, "linear_map": line._asdict(), "results": measured}
    means = {result["contender"]: result["means"] for result in measured}
    if "mtc" in contenders and (peer := best_nested_peer(means)):
        found["capture"] = capture_cost(task.model, task.layer)._asdict()
        found["shares"] = _shares(task, results[0].lr, seeds, rows, means[peer]["fvu"][-1])
    return found | {"figures": figures(found)}


def _best_of(contender: str, task: Task, rates: tuple[float, ...], extensions: int, seeds: int, rows: Rows) -> Result:
    """Sweep the rates with seed 0 on the validation part, then train the other seeds at the best rate."""
    trained: dict[float, Trained] = {}

    def validate(lr: float) -> float:
        trained[lr] = train(contender, task, lr, 0, rows)
        fvu = _score(contender, trained[lr], task, rows, "validation").fvu[-1]
        _log(contender, task, lr, 0, rows, trained[lr], fvu)
        return fvu

    validation = sweep(rates, extensions, validate)
    best = min(validation, key=lambda lr: validation[lr])
    runs = [trained[best]]
    for seed in range(1, seeds):
        runs.append(train(contender, task, best, seed, rows))
        _log(contender, task, best, seed, rows, runs[-1], None)
    return Result(
        contender, best, {f"{rate:g}": fvu for rate, fvu in sorted(validation.items())},
        [_score(contender, run, task, rows, "test") for run in runs],
        [run.seconds for run in runs], [run.cpu_seconds for run in runs],
    )  # fmt: skip


def sweep(rates: tuple[float, ...], extensions: int, validate: Callable[[float], float]) -> dict[float, float]:
    """What `validate` gives for each of the rates, and for rates beyond them by factors of two while the best one is
    an end, at most `extensions` times."""
    found = {rate: validate(rate) for rate in rates}
    for _ in range(extensions):
        best = min(found, key=lambda rate: found[rate])
        beyond = best / 2 if best == min(found) else best * 2
        if best not in (min(found), max(found)) or len(found) == 1:
            break
        found[beyond] = validate(beyond)
    return found


def _shares(task: Task, lr: float, seeds: int, rows: Rows, enough: float) -> list[dict[str, Any]]:
    """Our nested transcoder trained on the first part of the captured tokens, at the rate of all of them; a larger part
    until its full-dictionary FVU is as small as `enough`."""
    found = []
    for share in SHARES:
        part = task._replace(train_tokens=int(share * task.train_tokens), steps=0)
        runs = [train("mtc", part, lr, seed, rows) for seed in range(seeds)]
        scores = [_score("mtc", run, task, rows, "test") for run in runs]
        spent = [run.seconds for run in runs], [run.cpu_seconds for run in runs]
        means = Result("mtc", lr, {}, scores, *spent).means()
        found.append({"share": share, "means": means})
        fvu = " / ".join(f"{value:.3f}" for value in means["fvu"])
        print(f"{f'mtc, {share:g} of the tokens':<32}{lr:>8g}{fvu:>24}", flush=True)
        if means["fvu"][-1] <= enough:
            break
    return found


def _score(contender: str, trained: Trained, task: Task, rows: Rows, part: str) -> Score:
    per_token = contender.startswith("eai-sparsify")
    return score(trained.dictionary, task.prefixes, task.k, per_token, rows, rows.validation, getattr(rows, part))


def _log(
    contender: str, task: Task, lr: float, seed: int, rows: Rows, trained: Trained, validation: float | None
) -> None:
    test = _score(contender, trained, task, rows, "test")
    print(
        f"{task.rows()}, {contender}, lr {lr:g}, seed {seed}: "
        + (f"validation {validation:.4f}, " if validation is not None else "")
        + f"test {[round(v, 4) for v in test.fvu]}, all tokens {[round(v, 4) for v in test.fvu_all]}, "
        f"L0 {test.l0:.2f} ({test.l0_all:.2f}), dead {test.dead:.2%}, {trained.seconds:.0f} s, "
        f"CPU {trained.cpu_seconds:.0f} s",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _print_row(result: Result) -> None:
    means = result.means()
    fvu, fvu_all = (" / ".join(f"{value:.3f}" for value in means[name]) for name in ("fvu", "fvu_all"))
    print(f"{result.contender:<32}{result.lr:>8g}{fvu:>24}{means['l0']:>8.2f}{means['dead']:>8.1%}"
          f"{means['seconds']:>7.0f} s{means['cpu_seconds']:>6.0f} s{fvu_all:>26}{means['l0_all']:>8.2f}",
          flush=True)  # fmt: skip


def summary(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The targets' figures, and everything measured."""
    contenders = {result["contender"] for task in tasks.values() for result in task["results"]}
    libraries = sorted({name.split(", ")[0] for name in contenders} - {"mtc"})
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "versions": {library: peer_version(library) for library in libraries},
        "seeds": len(next(iter(tasks.values()))["results"][0]["scores"]),
        **describe({name: task["figures"] for name, task in tasks.items()}),
        "tasks": tasks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", nargs="+", choices=TASKS, default=DEFAULT_TASKS, metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", metavar="LR", help="just these for everybody")
    every_peer = [name + how for name in PEERS for how in ("", f", {NO_MASSIVE}")]
    parser.add_argument(
        "--peers", nargs="*", choices=every_peer, metavar="PEER",
        help=f"also the peers, or just those named (make peers): {'; '.join(every_peer)}",
    )  # fmt: skip
    parser.add_argument("--only-peers", action="store_true", help="train and keep the peers, and none of ours")
    parser.add_argument("--no-warm-up", action="store_true", help="also the peers without any warm-up")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    parser.add_argument("--save", action="store_true", help="write docs/benchmarks/quality-TASK.json")
    arguments = parser.parse_args()
    peers = [] if arguments.peers is None else (arguments.peers or every_peer)
    if peers and not PEERS_PYTHON.exists():
        raise SystemExit(f"{PEERS_PYTHON} is missing: run `make peers` first")
    if arguments.no_warm_up:
        peers += [f"{name}, {NO_WARM_UP}" for name in peers if "sign" not in name]
    contenders = peers if arguments.only_peers else [*OURS, *peers]
    tasks = {}
    for name in arguments.task:
        rates = tuple(arguments.rates) if arguments.rates else None
        tasks[name] = run(name, TASKS[name], contenders, rates, arguments.seeds)
        if arguments.save:
            path = Path("docs/benchmarks") / f"quality-{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary({name: tasks[name]}), indent=1) + "\n")
    found = summary(tasks)
    print()
    for figure in TARGETS:
        if figure in found:
            about = found[figure]
            print(f"{figure:<22}{shown(about['worst']):<16}target {shown(about['target']):<16}{verdict(about)}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
