"""From the language model to the trainer on one GPU, as a run does it but without Ray: two processes, shared memory
between them, and MPS if it can be had.

One process captures units into a ring in shared memory; the other uploads them, mixes them in the shuffle buffer and
trains. They start as processes of a run do, so that what start-up costs is measured too.
"""

from __future__ import annotations

import itertools
import os
import queue
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_checks import PATIENCE, Findings, Setting
from benchmarks.gpu_figures import GROUPS, NEEDS_GPU, K, gemma_config, random_windows, reached
from benchmarks.gpu_training import training_config
from cluster.mps import shared_gpu
from mtc.config import ModelConfig, RunConfig
from mtc.devices import synchronise
from mtc.language_model import Capture, LanguageModel, Pending
from mtc.training import ShuffleBuffer, Trainer, Unit, on_device

TOKENS_PER_SECOND = 100_000
"""Target: trained tokens, with batches of 1,024."""
REFERENCE_TOKENS, REFERENCE_SECONDS = 15_000_000, 240.0
"""Target: the reference run's training, start-up included."""
SMALL_GPU = 24e9
"""Bytes of a GPU on which both processes should fit."""
SLOTS = 8
"""Units that the ring holds."""
SECONDS, LEAST_SECONDS = 20.0, 5.0
"""How long training is measured where there is time, and at least."""
INITIAL_ROWS = 16_384
"""From which scales and biases are set, as in a run."""
START_UP = 30.0
"""Seconds after which both processes should work."""


class Stream(NamedTuple):
    """What both processes need to know."""

    model: ModelConfig
    training: RunConfig
    device: str
    lengths: tuple[int, ...]
    """Windows of a unit."""
    width: int
    """d_model."""
    ring: str
    """File in main memory: SLOTS times a unit's source and target, bfloat16."""
    seconds: float
    """How long training is measured."""

    def slots(self, mode: Literal["r+", "w+"] = "r+") -> torch.Tensor:
        """[SLOTS, source and target, tokens, d_model], the ring itself."""
        bits = np.memmap(self.ring, np.int16, mode, shape=(SLOTS, 2, sum(self.lengths), self.width))
        return torch.from_numpy(bits).view(torch.bfloat16)


def end_to_end(setting: Setting, findings: Findings) -> None:
    """Tokens per second of capture and training together, without MPS and with it, and the memory of both."""
    batch, lengths = (64, (16,) * 16) if setting.small else (1024, (64,) * 256)
    groups, k = ((96, 128, 96), 4) if setting.small else (GROUPS, K)
    model = gemma_config(setting)
    width = 64 if setting.small else 2304
    settings = training_config(groups, k, batch, precision="auto", backend="auto")
    data = settings.data.model_copy(update={"shuffle_buffer_tokens": 8 * sum(lengths)})
    settings = settings.model_copy(update={"model": model, "data": data})
    seconds = SECONDS if setting.on_gpu else 0.5
    stream = Stream(model, settings, str(setting.device), lengths, width, f"{setting.memory}/ring", seconds)
    stream.slots("w+").fill_(1)  # the first use of a page costs more than later ones
    for name, wanted in (("", False), (", MPS", True)):
        if wanted and not setting.on_gpu:
            findings.figures["end to end, MPS"] = NEEDS_GPU
            continue
        if wanted and findings.seconds_left < START_UP + LEAST_SECONDS:
            findings.figures["end to end, MPS"] = "not measured: no time was left"
            continue
        with shared_gpu(wanted) as environment:
            if wanted and not environment:
                findings.figures["end to end, MPS"] = "not measured: MPS can't be had"
                continue
            with mock.patch.dict(os.environ, environment):  # the processes that start now inherit it
                left = max(LEAST_SECONDS, findings.seconds_left - START_UP)
                _run(setting, findings, stream._replace(seconds=min(stream.seconds, left)), name)


def _run(setting: Setting, findings: Findings, stream: Stream, name: str) -> None:
    context = get_context("spawn")
    free, ready, answers, stop = context.Queue(), context.Queue(), context.Queue(), context.Event()
    before = _used_bytes(setting)
    for slot in range(SLOTS):
        free.put(slot)
    start = time.time()
    arguments = (stream, free, ready, answers, stop)
    processes = [context.Process(target=part, args=arguments, daemon=True) for part in (_produce, _consume)]
    try:
        for process in processes:
            process.start()
        found: dict[str, Any] = {}
        while len(found) < 2:
            name_of, answer = _answer(answers, processes)
            found[name_of] = answer
    finally:
        stop.set()
        for process in processes:
            process.join(10)
            process.kill()
    trainer, capture = found["trainer"], found["capture"]
    findings.check(f"units arrive in order{name}", trainer.pop("in order"))
    findings.check(f"losses are finite{name}", bool(np.isfinite(trainer["loss"])), loss=trainer["loss"])
    startup = trainer.pop("first step at") - start
    figure = {"trainer": trainer, "capture": capture, "seconds to the first step": startup}
    if setting.on_gpu:
        figure |= {"bytes of the GPU": trainer.pop("used bytes") - before}
        figure["fits on 24 GB"] = figure["bytes of the GPU"] <= SMALL_GPU
        rate = trainer["tokens per second"]
        figure["target"] = reached(rate, TOKENS_PER_SECOND)
        estimate = startup + REFERENCE_TOKENS / rate
        figure["reference run, estimated seconds"] = {
            "value": estimate, "target": REFERENCE_SECONDS, "met": estimate < REFERENCE_SECONDS
        }  # fmt: skip
    findings.figures[f"end to end{name}"] = figure


def _answer(answers: Any, processes: list[Any]) -> tuple[str, Any]:
    """The next answer; raises RuntimeError if a process ended without one, or after PATIENCE and the measured time."""
    deadline = time.monotonic() + PATIENCE + SECONDS
    while time.monotonic() < deadline:
        try:
            found: tuple[str, Any] = answers.get(timeout=1)
            return found
        except queue.Empty:
            dead = [process.exitcode for process in processes if process.exitcode]
            if dead:
                raise RuntimeError(f"a process ended with {dead[0]}; its own message stands above") from None
    raise RuntimeError(f"no answer within {PATIENCE + SECONDS:.0f} s")


def _used_bytes(setting: Setting) -> int:
    """Of the GPU, by all processes."""
    if not setting.on_gpu:
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _until(stop: Any, source: Any) -> Any:
    """The next thing of a queue, None once everything is to stop."""
    while not stop.is_set():
        try:
            return source.get(timeout=0.2)
        except queue.Empty:
            continue
    return None


def _produce(stream: Stream, free: Any, ready: Any, answers: Any, stop: Any) -> None:
    """Capture unit after unit into free slots."""
    _settle(stream)
    start = time.perf_counter()
    model = LanguageModel(stream.model, stream.device)
    loaded = time.perf_counter()
    model.warm_up(sum(stream.lengths))
    warm = time.perf_counter()
    slots = stream.slots()
    units = [random_windows(stream.lengths, model.vocab_size, seed) for seed in range(4)]
    runner, pending = Capture(model), deque[Pending]()
    waited, sent, began = 0.0, 0, time.perf_counter()
    for number in itertools.count():
        pending.append(runner.start(units[number % len(units)]))
        if len(pending) <= runner.ahead:
            continue
        captured = runner.finish(pending.popleft())
        asked = time.perf_counter()
        slot = _until(stop, free)
        if slot is None:
            break
        waited += time.perf_counter() - asked
        for place, rows in zip(slots[slot], captured.activations.values(), strict=True):
            place[: len(rows)] = rows
        ready.put((sent, slot, captured.tokens))
        sent += 1
    seconds = time.perf_counter() - began
    answer = {"seconds to load": loaded - start, "seconds to compile": warm - loaded, "compute": model.compute}
    answer |= {"units": sent, "share of time held back": waited / seconds}
    if torch.cuda.is_available():
        answer["peak bytes"] = torch.cuda.max_memory_reserved()
    answers.put(("capture", answer))


def _consume(stream: Stream, free: Any, ready: Any, answers: Any, stop: Any) -> None:
    """Train on what arrives until the time is over."""
    _settle(stream)
    slots = stream.slots()
    device, batch = torch.device(stream.device), stream.training.optimizer.batch_tokens
    trainer = Trainer(stream.training, stream.width, stream.width, device)
    buffer = ShuffleBuffer(stream.training.data.shuffle_buffer_tokens, [0], device)
    numbers: list[int] = []

    def units() -> Iterator[Unit]:
        while (item := _until(stop, ready)) is not None:
            number, slot, rows = item
            numbers.append(number)
            source, target = slots[slot, :, :rows]
            activations = {(0, "resid_mid"): source, (0, "mlp_out"): target}
            yield Unit(number, activations, np.arange(rows, dtype=np.int32), rows)
            free.put(slot)  # asked for the next one, the upload has copied this one

    first = begin = 0.0
    begun, waited, asked = 0, 0.0, time.perf_counter()
    with on_device(units(), device) as uploaded:
        for unit in uploaded:
            if begun:
                waited += time.perf_counter() - asked
            buffer.add(unit)
            while buffer.available >= batch:
                if not trainer.step_number:
                    trainer.initialise(*(rows[:INITIAL_ROWS] for rows in buffer.peek().values()))
                result = trainer.step(*buffer.take(batch).activations.values())
                if result.step % stream.training.cluster.log_every_steps == 0:
                    metrics = result.metrics()
                if result.step == 1:
                    synchronise(device)
                    first = time.time()
                if result.step == 20:  # until here everything is allocated, and compute is chosen
                    synchronise(device)
                    begin, begun = time.perf_counter(), trainer.tokens
            asked = time.perf_counter()
            if begun and asked - begin > stream.seconds:
                break
    synchronise(device)
    seconds = time.perf_counter() - begin
    answer = {"tokens per second": (trainer.tokens - begun) / seconds, "seconds": seconds, "loss": metrics.loss}
    answer |= {"share of time waiting": waited / seconds, "compute": trainer.describe_compute()}
    answer |= {"first step at": first, "in order": numbers == list(range(len(numbers)))}
    if device.type == "cuda":
        free_bytes, total = torch.cuda.mem_get_info()
        answer |= {"peak bytes": torch.cuda.max_memory_reserved(), "used bytes": total - free_bytes}
    answers.put(("trainer", answer))
    stop.set()


def _settle(stream: Stream) -> None:
    if stream.device == "cpu":
        torch.set_num_threads(1)
