"""How fast activations reach a trainer, and what that costs beside the language model itself.

`python -m benchmarks.stream [--json] [--parts capture,transport,...] [--rounds N] [--save [DIR]]`

capture    Tokens per second of the language model's pass at two thirds of its depth: ours against plain `transformers`
           with output_hidden_states=True in float32, and against SAELens's ActivationsStore where `make peers`
           installed it, all on 2 threads, taking turns. Twice: on paragraphs as they are (plain transformers pads a
           batch of 16 to its longest; SAELens joins texts across documents; ours joins windows without letting them see
           each other), and on windows of full length, where nobody pads. Counted are tokens of the text.
transport  Bytes per second from a model actor that computes nothing, through Ray Data, to a consumer: handed over as
           views, and copied into a buffer as the shuffle buffer does. Against one core's copy of the same bytes. Both
           after the shared memory was filled once (first use of a page costs several times more than the copy).
overlap    (seconds of the forward passes alone + seconds of the training steps alone) / seconds of the run, for the
           same tokens; start-up excluded. On a machine where both share all cores. "Alone" is in one process on all
           cores; the mean of a run before and a run after.
scaling    1, 2, 4, 8 producers that sleep for the model's time, so that only the plumbing is measured: units per second
           over (producers x units per second of one), between the first unit of the last producer and the last tenth.
memory     Peak of the object store and of the processes' own memory over 10 times more units.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import torch

from cluster.activations import map_on_model_actors
from cluster.blocks import ActorCosts, iterate_units, to_binary, to_columns
from cluster.capture import UnitCapture
from cluster.local_ray import make_temporary_directory
from cluster.resources import Node, Plan
from mtc.config import RunConfig, load_preset
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows, prepare_model, read_neurons
from mtc.results import RunFacts
from mtc.text import TokenStore, encode_text, special_ids, work_units
from mtc.text.sources import source_files
from mtc.training import ShuffleBuffer

ROOT = Path(__file__).parent.parent
PEERS_PYTHON = ROOT / ".venv-peers/bin/python"
CONTEXT, LAYER = 128, 20  # of SmolLM2's 30 layers
SECONDS_PER_UNIT, UNIT_TOKENS = 0.16384, 16_384  # 100,000 tokens/s, of a model on a large GPU
PARTS = ("capture", "transport", "overlap", "scaling", "memory")


# Capture ------------------------------------------------------------------------------------------------------------


def measure_capture(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(2)
    config = load_preset("smollm2-135m", {"model": {"layer": LAYER}, "data": {"context_length": CONTEXT}})
    texts = [p for file in source_files(config.data) for p in Path(file.url).read_text().split("\n") if len(p) > 40]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    tokenizer = load_tokenizer(config.model)
    ids = [encode_text(t, tokenizer).ids for t in texts[:3000]]
    flat = np.concatenate(ids)
    paragraphs = [part[:CONTEXT] for part in ids]
    full = list(flat[: len(flat) // CONTEXT * CONTEXT].reshape(-1, CONTEXT))
    contenders: dict[str, Callable[[], tuple[float, int]]] = {}
    ours, plain = LanguageModel(config.model), _plain_model(config)
    for name, windows in (("paragraphs", paragraphs), ("full windows", full)):
        contenders[f"ours, {name}"] = _ours(ours, windows, special_ids(tokenizer))
        contenders[f"transformers, {name}"] = _transformers(plain, windows)
    workers = []
    if PEERS_PYTHON.exists():
        for kind in ("HookedTransformer", "AutoModelForCausalLM"):
            worker = _SaeLens(prepare_model(config.model), texts, kind)
            workers.append(worker)
            contenders[f"SAELens, {kind}"] = worker.step
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for turn in range(rounds + 1):
            for name, step in contenders.items():
                spent, tokens = step()
                if turn:
                    seconds[name].append(spent / tokens)
    finally:
        for worker in workers:
            worker.close()
    rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"  {name:36} {rate:8,.0f} tokens/s")
    saelens = {kind: rates.get(f"SAELens, {kind}") for kind in ("HookedTransformer", "AutoModelForCausalLM")}
    return {
        "capture_vs_transformers": rates["ours, paragraphs"] / rates["transformers, paragraphs"],
        "capture_vs_transformers_full_windows": rates["ours, full windows"] / rates["transformers, full windows"],
        "capture_vs_saelens": _ratio(rates["ours, full windows"], saelens["HookedTransformer"]),
        "capture_vs_saelens_huggingface": _ratio(rates["ours, full windows"], saelens["AutoModelForCausalLM"]),
        "capture_tokens_per_second": rates,
        "capture_dtype": str(ours.dtype).removeprefix("torch."),
    }


def _ratio(a: float, b: float | None) -> float | None:
    return None if b is None else a / b


def _plain_model(config: RunConfig) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(prepare_model(config.model), dtype=torch.float32).eval()


def _ours(model: LanguageModel, windows: list[np.ndarray], special: list[int]) -> Callable[[], tuple[float, int]]:
    position = 0

    def step() -> tuple[float, int]:
        """One unit of at most 2,048 tokens, as a model actor runs it."""
        nonlocal position
        unit: list[np.ndarray] = []
        while sum(map(len, unit)) + CONTEXT <= 2048:
            unit.append(windows[position % len(windows)])
            position += 1
        start = time.perf_counter()
        packed = pack_windows(sorted(unit, key=len, reverse=True), special)
        pairs = model.capture(packed, packed.trainable.nonzero().squeeze(1))
        for column in (c.to(torch.bfloat16) for pair in pairs for c in pair):
            to_binary(column)
        return time.perf_counter() - start, sum(map(len, unit))

    return step


def _transformers(model: Any, windows: list[np.ndarray]) -> Callable[[], tuple[float, int]]:
    position = 0

    def step() -> tuple[float, int]:
        """One batch of 16 texts, padded to the longest."""
        nonlocal position
        unit = [windows[i % len(windows)] for i in range(position, position + 16)]
        position += 16
        start = time.perf_counter()
        width = max(map(len, unit))
        ids = torch.zeros(16, width, dtype=torch.int64)
        mask = torch.zeros(16, width, dtype=torch.int64)
        for row, window in enumerate(unit):
            ids[row, : len(window)], mask[row, : len(window)] = torch.from_numpy(window).long(), 1
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return time.perf_counter() - start, sum(map(len, unit))

    return step


class _SaeLens:
    """A process that computes only while `step` waits."""

    def __init__(self, path: str, texts: list[str], model_class: str):
        environment = os.environ | {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [str(PEERS_PYTHON), "benchmarks/saelens_capture.py"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._ask(cmd="make", path=path, layer=LAYER, texts=texts, context=CONTEXT, model_class=model_class)

    def step(self) -> tuple[float, int]:
        answer = self._ask(cmd="step", tokens=2048)
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


# The stream without a model -----------------------------------------------------------------------------------------


class SleepingActor:
    """In a model actor's place: sends the same activations again and again."""

    def __init__(self, seconds: float, tokens: int, width: int, device: str, threads: int):
        self.seconds = seconds
        self.name = str(os.getpid())
        rows = torch.ones(tokens, width, dtype=torch.bfloat16)
        self.activations = {(0, "resid_mid"): rows, (0, "mlp_out"): rows.clone()}

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch["unit"].to_pylist():
            time.sleep(self.seconds)
            row = {name: pa.array([0.0]) for name in (*ActorCosts.FIELDS, "device_flops")}
            row |= {"unit": pa.array([number]), "actor": pa.array([self.name])}
            row |= {"tokens": pa.array([len(self.activations[0, "mlp_out"])])}
            yield pa.table(row | to_columns(self.activations))


class Consumer:
    """In a trainer's place."""

    def run(self, shard: Any, copy: bool) -> list[tuple[float, str]]:
        """When which actor's unit was there, and copied if `copy`."""
        torch.set_num_threads(1)
        buffers: dict[Any, torch.Tensor] = {}
        log = []
        for unit in iterate_units(shard):
            if copy:
                for key, rows in unit.activations.items():
                    buffers.setdefault(key, torch.empty_like(rows)).copy_(rows)
            log.append((time.perf_counter(), unit.costs["actor"]))
        return log


def stream(units: int, actors: int, tokens: int, width: int, seconds: float, copy: bool) -> list[tuple[float, str]]:
    """Units from sleeping actors to one consumer; when each arrived, and whose it was."""
    import ray

    plan = Plan("cpu", 1, 0.1, 0, 1, actors, actors, 0.1, 0, 1, (Node(2, 0),))
    rows = [pa.table({"unit": [i]}) for i in range(units)]
    dataset = map_on_model_actors(rows, SleepingActor, plan, seconds=seconds, tokens=tokens, width=width)
    (shard,) = dataset.streaming_split(1, equal=True)
    consumer = ray.remote(Consumer).options(num_cpus=0.1).remote()
    log: list[tuple[float, str]] = ray.get(consumer.run.remote(shard, copy))
    ray.kill(consumer)
    return log


@contextmanager
def local_ray(object_store: int) -> Iterator[None]:
    import ray

    from cluster.activations import configure_data_context

    temporary = make_temporary_directory()
    ray.init(
        address="local", num_cpus=2, object_store_memory=object_store, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", _temp_dir=temporary,
    )  # fmt: skip
    configure_data_context()
    try:
        yield
    finally:
        ray.shutdown()


def measure_transport(rounds: int) -> dict[str, Any]:
    """Rates after the store was filled once, the copy measured between; then smaller and larger units, copied."""
    views, copies, memcpys = [], [], [_memcpy(2 * UNIT_TOKENS * 2304)]
    for _ in range(max(1, rounds // 3)):
        for results, copy in ((views, False), (copies, True)):
            results.append(_transport_rate(UNIT_TOKENS, copy))
            memcpys.append(_memcpy(2 * UNIT_TOKENS * 2304))
    by_tokens = {UNIT_TOKENS: statistics.median(copies)}
    for tokens in (2048, 4096, 8192, 32_768):
        by_tokens[tokens] = _transport_rate(tokens, True)
    memcpy, view, copied = (statistics.median(values) for values in (memcpys, views, copies))
    print(f"  one core's memcpy {memcpy / 1e9:.2f} GB/s, views {view / 1e9:.2f} GB/s, copied {copied / 1e9:.2f} GB/s")
    for tokens, rate in sorted(by_tokens.items()):
        print(f"  units of {tokens:6,} tokens, {4 * tokens * 2304 / 1e6:4.0f} MB, copied: {rate / 1e9:.2f} GB/s")
    return {
        "transport_vs_memcpy": view / memcpy,
        "transport_copied_vs_memcpy": copied / memcpy,
        "transport_gigabytes_per_second": {"memcpy": memcpy / 1e9, "views": view / 1e9, "copied": copied / 1e9},
        "transport_copied_by_unit_tokens": {str(n): rate / 1e9 for n, rate in sorted(by_tokens.items())},
    }


def _transport_rate(tokens: int, copy: bool) -> float:
    """Bytes per second of units of this size, two sites of 2,304 bfloat16 numbers a token."""
    store, unit_bytes = 2_000_000_000, 2 * tokens * 2304 * 2
    warm, measured = -(-2 * store // unit_bytes), max(60, 6_000_000_000 // unit_bytes)
    with local_ray(store):
        log = stream(warm + measured, 1, tokens, 2304, 0.0, copy)
    times = [at for at, _ in log[warm:]]
    return (len(times) - 1) * unit_bytes / (times[-1] - times[0])


def _memcpy(size: int) -> float:
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds)


def measure_scaling(rounds: int) -> dict[str, Any]:
    rates: dict[int, float] = {}
    with local_ray(1_000_000_000):
        for actors in (1, 2, 4, 8):
            log = stream(20 * rounds * actors // 2, actors, UNIT_TOKENS, 64, SECONDS_PER_UNIT, True)
            rates[actors] = _steady_rate(log, actors)
            print(f"  {actors} producers: {rates[actors]:6.2f} units/s, {rates[actors] * UNIT_TOKENS:10,.0f} tokens/s, "
                  f"efficiency {rates[actors] / actors / rates[1]:.2f}")  # fmt: skip
    efficiency = {str(n): rate / n / rates[1] for n, rate in rates.items()}
    ideal = 1 / SECONDS_PER_UNIT
    return {
        "scaling_8": efficiency["8"],
        "scaling_efficiency": efficiency,
        "scaling_one_producer_vs_sleep": rates[1] / ideal,
    }


def _steady_rate(log: list[tuple[float, str]], actors: int) -> float:
    names = [name for _, name in log]
    assert len(set(names)) == actors, "a producer sent nothing"
    first = max(names.index(name) for name in set(names))
    last = len(log) - 1 - len(log) // 10
    return (last - first) / (log[last][0] - log[first][0])


def measure_memory() -> dict[str, Any]:
    """Peaks over a short and a 10 times longer stream, each in a Ray of its own with a small object store."""
    peaks = []
    for units in (100, 1000):
        with local_ray(150_000_000), _MemoryWatch() as watch:
            stream(units, 2, 2048, 576, 0.01, True)  # units of 4.7 MB
        peaks.append(watch)
        print(f"  {units:5} units: object store {watch.store / 1e6:.0f} MB, own memory of all processes "
              f"{watch.private / 1e6:.0f} MB, spilled {watch.spilled} B")  # fmt: skip
    short, long = peaks
    return {
        "memory_growth": max(long.store / short.store, long.private / short.private) - 1,
        "memory_peaks_megabytes": [{"store": w.store / 1e6, "private": w.private / 1e6} for w in peaks],
        "memory_spilled_bytes": long.spilled,
    }


class _MemoryWatch:
    """Samples the object store and the private memory of all processes below this one."""

    def __enter__(self) -> _MemoryWatch:
        self.store = self.private = self.spilled = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not self._stop.wait(0.2):
            stats = get_memory_info_reply(state).store_stats
            self.store = max(self.store, stats.object_store_bytes_used)
            self.spilled = max(self.spilled, stats.spilled_bytes_total)
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss - process.memory_info().shared
                except psutil.Error:
                    continue  # it ended while we looked
            self.private = max(self.private, total)


# The real stream ----------------------------------------------------------------------------------------------------


def measure_overlap() -> dict[str, Any]:
    """The quickstart's run, then its forward passes and its training steps alone, on the same threads."""
    from cluster.pipeline import run_pipeline
    from mtc.results import Analysis

    torch.set_num_threads(2)
    overrides = {"data": {"num_tokens": 65_536}, "analysis": {"num_tokens": 1024, "loss_tokens": 0}}
    facts, forward, step = None, 0.0, 0.0
    walls = []
    for turn in range(2):  # the machine's speed drifts: a run before and a run after
        with tempfile.TemporaryDirectory() as directory, local_ray(1_000_000_000):
            config = load_preset("smollm2-135m", overrides | {"output": {"root": directory}})
            run = run_pipeline(config)
            facts = Analysis.model_validate_json(run.read("analysis.json")).facts
        assert facts.timing is not None
        timing = facts.timing
        walls.append(timing.wall_seconds)
        if not turn:
            forward, step = _alone(config, facts)
    wall = statistics.mean(walls)
    runs = " and ".join(f"{seconds:.1f}" for seconds in walls)
    print(f"  forward passes alone {forward:.1f} s, training alone {step:.1f} s, the runs {runs} s for "
          f"{timing.tokens:,} tokens ({timing.tokens / wall:,.0f} tokens/s)")  # fmt: skip
    return {
        "overlap": (forward + step) / wall,
        "overlap_seconds": {"forward": forward, "training": step, "runs": walls},
        "overlap_timing": timing.model_dump(),
    }


def _alone(config: RunConfig, facts: RunFacts) -> tuple[float, float]:
    """Seconds of the run's forward passes and of its training steps, one after the other, each on all cores."""
    from mtc.training import Trainer

    timing = facts.timing
    assert timing is not None
    store = TokenStore.open(facts.token_store)
    work = work_units(store, config)
    actor = UnitCapture(config, store.url, "cpu", 2)
    trainer = Trainer(config, actor.model.d_model, actor.model.d_model)
    neurons = read_neurons(config.model, LAYER) if config.transcoder.init == "mlp" else None
    buffer = ShuffleBuffer(config.data.shuffle_buffer_tokens, [0])
    batch = config.optimizer.batch_tokens
    forward = step = 0.0
    positions = trained = 0
    for number in range(1, len(work.training) + len(work.calibration)):
        if positions >= timing.captured_tokens:
            break
        start = time.perf_counter()
        (table,) = actor(pa.table({"unit": [number]}))
        forward += time.perf_counter() - start
        positions += table["positions"][0].as_py()
        unit = next(iterate_units(_One(table)))
        if not trainer.tokens:
            trainer.initialise(*unit.activations.values(), neurons)
        start = time.perf_counter()
        buffer.add(unit)
        while buffer.available >= batch:
            trainer.step(*buffer.take(batch).activations.values())
            trained += batch
        step += time.perf_counter() - start
    forward *= timing.captured_tokens / positions
    step *= facts.trained_tokens / trained  # calibration tokens take no step
    return forward, step


class _One:
    """A shard of one table."""

    def __init__(self, table: pa.Table):
        self._table = table

    def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
        yield self._table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", nargs="?", const=str(ROOT / "docs/benchmarks"), metavar="DIR")
    arguments = parser.parse_args(argv)
    wanted = arguments.parts.split(",")
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: known are {', '.join(PARTS)}")
    # Before torch's and Ray's processes start.
    os.environ.update(RAY_AUTH_MODE="disabled", KMP_BLOCKTIME="0", OMP_WAIT_POLICY="PASSIVE")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "capture": lambda: measure_capture(arguments.rounds),
        "transport": lambda: measure_transport(arguments.rounds),
        "overlap": measure_overlap,
        "scaling": lambda: measure_scaling(arguments.rounds),
        "memory": measure_memory,
    }
    where = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__}
    results: dict[str, Any] = dict(where)
    saved: dict[str, Any] = {}  # by part, since parts may be measured on different machines
    for part in PARTS:
        if part not in wanted:
            continue
        print(f"{part}:", flush=True)
        found = measures[part]()
        saved[part] = where | found
        results |= found
    print(f"\n{'figure':40}{'value':>10}")
    for name, value in results.items():
        if isinstance(value, float) or value is None:
            print(f"{name:40}{'not measured' if value is None else format(value, '10.3f'):>10}")
    if arguments.save:
        target = Path(arguments.save) / "stream.json"
        earlier = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps(earlier | saved, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    # Under its real name: what is defined in __main__ can't be imported by Ray's workers.
    from benchmarks.stream import main as imported_main

    sys.exit(imported_main())
