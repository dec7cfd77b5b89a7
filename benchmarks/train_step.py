"""Cost of a training step, in units of the one dense product that every step contains.

`python -m benchmarks.train_step [--json] [--peers] [--rounds N] [--quick] [--save [DIR]] | --chart [DIR]`

Each contender is a process of its own that idles while others run. In a round every contender takes one step in turn,
directly behind one float32 product [batch, d_source] x [d_source, features] in a process that does nothing else; a
ratio is (seconds of the step) / (seconds of that product), so that a machine that slows down slows both. Medians and
quartiles are over rounds; the first two steps of every contender are thrown away. Inputs are random and stay the same,
hence features fire about equally often. "Dead" rows count that many features as dead at every step, which AuxK then
works on; otherwise none is.

Memory: the highest resident size during any step, less that before the contender was made (by then libraries are
loaded and x and y lie in memory), over the bytes that training cannot do without: parameters, gradients, Adam's two
moments and one float32 matrix [batch, features]. Growth: resident size after the last step less that after the fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import ours, peers
from benchmarks.ours import PRODUCT
from benchmarks.peer_worker import Work
from mtc.devices import choose_bfloat16
from mtc.transcoder import native

ROOT = Path(__file__).parent.parent
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
SAVED = ROOT / "docs/benchmarks"
THROWN_AWAY = 2
GROWTH_FROM = 5


class Workload(NamedTuple):
    work: Work
    contenders: tuple[str, ...]
    rounds: int
    dead: int = 0
    """How many features count as dead in a second series of rounds; 0 is no second series."""
    dead_contenders: tuple[str, ...] = ()
    """Who takes part in it."""


class Row(NamedTuple):
    """One contender at one shape."""

    contender: str
    features: int
    batch: int
    dead: int
    ratio: float
    """Seconds of the step over seconds of the product before it, median over rounds."""
    lower_quartile: float
    upper_quartile: float
    milliseconds: float
    """Of the step, median."""
    product_milliseconds: float
    """Of the product before it, median."""
    peak_extra_ratio: float
    """Highest resident bytes of all steps, those thrown away too, beyond the base, over `needed_bytes`."""
    growth_bytes: int
    """Resident after the last step less after the fifth."""
    ratios: list[float]
    """Of every round."""


class Worker:
    """A contender's process; it computes only while `ask` waits."""

    def __init__(self, name: str, work: Work):
        command = [sys.executable, "-m", "benchmarks.ours", "worker"]
        if name in peers.NAMES:
            command = [str(PEERS_PYTHON), "-m", "benchmarks.peers", "worker"]
        # Threads must sleep between steps: spinning, they would take the cores from whoever's turn it is.
        environment = os.environ | {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
        if name == "mtc-torch":
            environment["MTC_NATIVE"] = "0"
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self._base = self.ask("make", name=name, work=work._asdict())["base_rss_bytes"]
        except BaseException:
            self.close()
            raise
        self._needed = needed_bytes(work)
        self.peak_extra_ratio = 0.0
        self.resident: list[int] = []
        """Bytes after each step since `start_series`."""

    def start_series(self, dead: int) -> None:
        self.peak_extra_ratio, self.resident = 0.0, []
        if dead:
            self.ask("force_dead", features=dead)

    def step(self) -> float:
        """Seconds of one step."""
        answer = self.ask("step", repeat=1)
        self.resident.append(answer["rss_bytes"])
        self.peak_extra_ratio = max(self.peak_extra_ratio, (answer["peak_rss_bytes"] - self._base) / self._needed)
        return answer["seconds"]

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"cmd": command, **arguments}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker of {self.name} ended during {command!r}; its own message stands above")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def needed_bytes(work: Work) -> int:
    """float32 parameters, gradients and Adam's two moments, and one [batch, features]."""
    parameters = (work.d_source + work.d_target) * work.features + work.features + work.d_target
    return 4 * (4 * parameters + work.batch * work.features)


def measure(load: Workload) -> Iterator[Row]:
    """Every contender at one shape, without dead features and then with."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in (PRODUCT, *load.contenders):
            workers[name] = Worker(name, load.work)
            stack.callback(workers[name].close)
        yield from _series(load.work, workers[PRODUCT], [workers[n] for n in load.contenders], load.rounds, dead=0)
        if load.dead:
            chosen = [workers[n] for n in load.dead_contenders]
            yield from _series(load.work, workers[PRODUCT], chosen, load.rounds, load.dead)


def _series(work: Work, product: Worker, contenders: list[Worker], rounds: int, dead: int) -> Iterator[Row]:
    for worker in contenders:
        worker.start_series(dead)
    pairs = [[(product.step(), worker.step()) for worker in contenders] for _ in range(THROWN_AWAY + rounds)]
    seconds = np.array(pairs[THROWN_AWAY:])  # [rounds, contenders, product and step]
    for worker, (products, steps) in zip(contenders, seconds.transpose(1, 2, 0), strict=True):
        ratios = steps / products
        lower, middle, upper = np.percentile(ratios, (25, 50, 75)).tolist()
        growth = worker.resident[-1] - worker.resident[min(GROWTH_FROM, len(worker.resident)) - 1]
        yield Row(
            contender=worker.name,
            features=work.features,
            batch=work.batch,
            dead=dead,
            ratio=middle,
            lower_quartile=lower,
            upper_quartile=upper,
            milliseconds=1000 * float(np.median(steps)),
            product_milliseconds=1000 * float(np.median(products)),
            peak_extra_ratio=worker.peak_extra_ratio,
            growth_bytes=growth,
            ratios=ratios.tolist(),
        )


def workloads(rounds: int, quick: bool, others: tuple[str, ...], bfloat16: bool) -> list[Workload]:
    """The reference shape first, then twice its batch, then growing dictionaries."""
    d, k, batch, dead, dictionaries = (64, 8, 64, 16, (256, 1024)) if quick else (2304, 48, 2048, 512, (4608, 18432))
    largest = dictionaries[-1] * 2 if quick else 65536
    reference = Work(
        d_source=d,
        d_target=d,
        group_sizes=_groups(dictionaries[0]),
        k=k,
        batch=batch,
        steps=1000,
        lr=3e-4,
        seed=0,
        dead_after_tokens=10_000_000,
        warmup_steps=10,
    )
    everybody = (*(n for n in ours.BACKENDS if bfloat16 or n != "mtc-bf16"), *others)
    few = max(rounds // 3, 1)
    return [
        Workload(reference, everybody, rounds, dead, everybody),
        Workload(reference._replace(batch=2 * batch), ("mtc", *others), max(rounds // 2, 1), dead, ("mtc",)),
        Workload(reference._replace(group_sizes=_groups(dictionaries[1])), ("mtc", *others), few),
        Workload(reference._replace(group_sizes=_groups(largest)), ("mtc",), few),  # the peers would not fit
    ]


def _groups(features: int) -> tuple[int, ...]:
    return features // 4, features // 2, features // 4


def machine(with_peers: bool) -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {}
    if with_peers:
        code = "import json; from benchmarks.peers import versions; print(json.dumps(versions()))"
        versions = json.loads(subprocess.check_output([PEERS_PYTHON, "-c", code], cwd=ROOT))
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, "torch": torch.__version__, "loops": native.status(), "peers": versions}


def summary(rows: list[Row], about: dict[str, Any], rounds: int) -> dict[str, Any]:
    """What --json prints; the first row's shape is the reference."""
    features, batch = rows[0].features, rows[0].batch
    plain = {row.contender: row for row in rows if (row.features, row.batch, row.dead) == (features, batch, 0)}
    dead = {row.contender: row for row in rows if (row.features, row.batch) == (features, batch) and row.dead}
    bfloat16 = plain.get("mtc-bf16"), dead.get("mtc-bf16")
    dictionaries = {str(r.features): r.ratio for r in rows if r.contender == "mtc" and r.batch == batch and not r.dead}
    others = {
        name: {
            "ratio": plain[name].ratio,
            "ratio_512_dead": dead[name].ratio,
            "peak_extra_ratio": plain[name].peak_extra_ratio,
            "version": about["peers"][name],
        }
        for name in peers.NAMES
        if name in plain
    }
    return {
        "ratio_fp32": plain["mtc"].ratio,
        "ratio_bf16": bfloat16[0] and bfloat16[0].ratio,
        "ratio_fp32_512_dead": dead["mtc"].ratio,
        "ratio_bf16_512_dead": bfloat16[1] and bfloat16[1].ratio,
        "peak_extra_ratio": plain["mtc"].peak_extra_ratio,
        "ratio_by_dictionary": dictionaries,
        "peers": others,
        "machine": about,
        "rounds": rounds,
        "all": [row._asdict() for row in rows],
    }


def chart(result: dict[str, Any]) -> Figure:
    """Bars at the reference shape, and ratio against dictionary size."""
    rows = [Row(**row) for row in result["all"]]
    features, batch = rows[0].features, rows[0].batch
    figure = Figure(figsize=(12, 4.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    reference = [row for row in rows if (row.features, row.batch) == (features, batch)]
    names = list(dict.fromkeys(row.contender for row in reference))
    dead = max(row.dead for row in reference)
    for offset, colour, count, label in ((-0.2, "#0072B2", 0, "none dead"), (0.2, "#E69F00", dead, f"{dead} dead")):
        chosen = [row for row in reference if row.dead == count]
        places = [names.index(row.contender) + offset for row in chosen]
        errors = np.array([[r.ratio - r.lower_quartile, r.upper_quartile - r.ratio] for r in chosen]).T
        style = {"ecolor": "#444444", "error_kw": {"lw": 1}}
        bars = left.bar(places, [row.ratio for row in chosen], 0.38, color=colour, label=label, yerr=errors, **style)
        left.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    left.axhline(1, color="#444444", linestyle="--", linewidth=1, label="the product alone")
    left.set_xticks(range(len(names)), [name.replace("dictionary-", "dictionary-\n") for name in names], fontsize=8)
    left.set_ylabel("seconds of a step / seconds of one product")
    left.set_title(f"{features:,} features, {batch:,} tokens a batch (median and quartiles)", fontsize=10)
    left.legend(fontsize=8, loc="upper center", ncols=3, frameon=False)

    markers = dict(zip(("mtc", *peers.NAMES), "osD^", strict=True))
    colours = dict(zip(markers, ("#0072B2", "#009E73", "#CC79A7", "#D55E00"), strict=True))
    for name, marker in markers.items():
        line = sorted((r for r in rows if (r.contender, r.batch, r.dead) == (name, batch, 0)), key=lambda r: r.features)
        sizes, ratios = [row.features for row in line], [row.ratio for row in line]
        if line:
            right.plot(sizes, ratios, marker=marker, color=colours[name], label=name)
        for size, ratio in zip(sizes, ratios, strict=True) if name == "mtc" else ():
            right.annotate(f"{ratio:.1f}", (size, ratio), (0, 6), textcoords="offset points", fontsize=8, ha="center")
    right.axhline(1, color="#444444", linestyle="--", linewidth=1)
    right.set_xscale("log", base=2)
    sizes = sorted({row.features for row in rows})
    right.set_xticks(sizes, [f"{size:,}" for size in sizes])
    right.minorticks_off()
    right.set_xlabel("features in the dictionary")
    right.set_ylabel("seconds of a step / seconds of its product")
    right.set_title(f"Growing dictionaries, {batch:,} tokens a batch, none dead", fontsize=10)
    right.margins(x=0.1)
    right.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    for axes in (left, right):
        axes.set_ylim(0, 1.22 * axes.get_ylim()[1])  # room for the legend
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    about = result["machine"]
    figure.supxlabel(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}", fontsize=8, color="#666666")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a training step in units of one dense product.")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--peers", action="store_true", help="measure the peer libraries too (make peers)")
    parser.add_argument("--rounds", type=int, help="rounds at the reference shape; fewer at larger ones")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    directory: dict[str, Any] = {"nargs": "?", "const": SAVED, "type": Path, "metavar": "DIR"}
    parser.add_argument("--save", **directory, help=f"write train_step.json and .png (to {SAVED.relative_to(ROOT)})")
    parser.add_argument("--chart", **directory, help="only draw the saved measurements again")
    arguments = parser.parse_args()
    if arguments.chart:
        saved = json.loads((arguments.chart / "train_step.json").read_text())
        chart(saved).savefig(arguments.chart / "train_step.png")
        return
    if arguments.peers and not PEERS_PYTHON.exists():
        parser.error(f"--peers: {PEERS_PYTHON.relative_to(ROOT)} does not exist; run `make peers` first")
    rounds = arguments.rounds or (6 if arguments.quick else 15)
    about = machine(arguments.peers)
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, loops {about['loops']}")
    if arguments.peers:
        print("peers: " + ", ".join(f"{name} {version}" for name, version in about["peers"].items()))
    bfloat16 = choose_bfloat16("auto", torch.device("cpu"))
    if not bfloat16:
        print("mtc-bf16: not measured: no bfloat16 units")

    print(f"{'contender':20} features batch dead {'ratio [quartiles]':>22} {'ms':>10} product ms memory growth MB")
    rows = []
    for load in workloads(rounds, arguments.quick, peers.NAMES if arguments.peers else (), bfloat16):
        for row in measure(load):
            rows.append(row)
            spread = f"{row.ratio:.2f} [{row.lower_quartile:.2f}, {row.upper_quartile:.2f}]"
            times = f"{row.milliseconds:10.1f} {row.product_milliseconds:10.1f}"
            memory = f"{row.peak_extra_ratio:6.2f} {row.growth_bytes / 1e6:9.1f}"
            print(
                f"{row.contender:20} {row.features:8} {row.batch:5} {row.dead:4} {spread:>22} {times} {memory}",
                flush=True,
            )
    result = summary(rows, about, rounds)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        (arguments.save / "train_step.json").write_text(json.dumps(result, indent=1) + "\n")
        chart(result).savefig(arguments.save / "train_step.png")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
