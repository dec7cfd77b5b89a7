"""Figures of `python -m benchmarks.gpu`: rates of the device, training steps, capture, and the memory of both.

Inputs are random and differ between repeats; every time is a median after a warm-up. Times of the device are taken by
its own events, unless they say that they are the host's.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel

from benchmarks.gpu_checks import DeviceWatch, Findings, Setting
from benchmarks.gpu_models import compilations
from benchmarks.gpu_training import training_config
from mtc.config import ModelConfig
from mtc.devices import device_name
from mtc.language_model import Capture, LanguageModel, PackedWindows, pack_windows
from mtc.training import Trainer
from mtc.training.trainer import DEAD_REFRESH
from mtc.transcoder.selection import largest_entries

CAPTURE_SHARE = 0.45
"""Target: the matrix products of capture, over what a large bfloat16 product would do in the same time."""
STEP_TOKENS_PER_SECOND = 400_000
"""Target: training steps alone, with batches of 4,096."""
GROUPS, K, WIDTH = (1152, 2304, 1152), 48, 2304
"""The reference run's dictionary, on Gemma 2 2B."""
UNIT, LAYER, BOS = 16_384, 17, 2
NEEDS_GPU = "not measured: there is no GPU"


def reached(value: float, target: float) -> dict[str, Any]:
    """A figure with its target."""
    return {"value": value, "target": target, "met": value >= target}


def milliseconds(function: Callable[[], object], findings: Findings, repeats: int = 20, each: int = 1) -> float:
    """Median time that the device takes for `each` calls, over as many repeats as there is time for; of one call."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    times = []
    while len(times) < 3 or (len(times) < repeats and findings.seconds_left > 0):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(each):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / each)
    return statistics.median(times)


# Rates of the device ------------------------------------------------------------------------------------------------


def rates(setting: Setting, findings: Findings) -> None:
    """Copies and one large product: what the other figures are compared with."""
    if not setting.on_gpu:
        findings.figures["rates"] = NEEDS_GPU
        return
    size = 1 << 29
    a, b = (torch.randn(size // 2, device=setting.device).bfloat16() for _ in range(2))
    host = torch.empty(size // 2, dtype=torch.bfloat16, pin_memory=True).copy_(a)
    for name, copy, moved in (
        ("device to device, read and written", lambda: b.copy_(a), 2 * size),
        ("pinned host to device", lambda: b.copy_(host, non_blocking=True), size),
        ("device to pinned host", lambda: host.copy_(a, non_blocking=True), size),
    ):
        findings.figures[f"gigabytes per second, {name}"] = moved / milliseconds(copy, findings, 10) / 1e6
    findings.figures["bfloat16 product, TFLOP/s"] = matmul_rate(setting, findings) / 1e12


def matmul_rate(setting: Setting, findings: Findings, size: int = 8192) -> float:
    """Floating-point operations per second of a bfloat16 product, measured once."""
    if "matmul" not in findings.notes:
        a, b = (torch.randn(size, size, device=setting.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        findings.notes["matmul"] = 2e3 * size**3 / milliseconds(lambda: torch.mm(a, b, out=out), findings, 10)
    rate: float = findings.notes["matmul"]
    return rate


# Training steps -----------------------------------------------------------------------------------------------------


class Step:
    """Training steps of one kind, of four batches in turn."""

    def __init__(self, setting: Setting, backend: str, precision: str, batch: int, shape: tuple[Any, int, int]):
        groups, k, d = shape
        config = training_config(groups, k, batch, backend=backend, precision=precision)
        self.trainer = Trainer(config, d, d, setting.device)
        self.batches = [[torch.randn(batch, d, device=setting.device).bfloat16() for _ in range(2)] for _ in range(4)]
        self.trainer.initialise(*self.batches[0])
        self._turn = 0

    def silence(self, dead: int) -> None:
        """The last `dead` features never fire, so that AuxK works on them at every step; also not if there are none."""
        with torch.no_grad():
            self.trainer.transcoder.b_enc[-dead or self.trainer.transcoder.num_features :] = -8
        silent = self.trainer.transcoder.tokens_since_fired
        silent[-dead or len(silent) :] = 2 * self.trainer.config.transcoder.dead_after_tokens
        self.trainer._find_dead(silent >= self.trainer.config.transcoder.dead_after_tokens)

    def always_on(self) -> None:
        """One feature fires on every token."""
        with torch.no_grad():
            self.trainer.transcoder.b_enc[7] = 20

    def leave_refresh(self) -> None:
        """A few steps, until the next is none of those that look for dead features and wait for that."""
        self()
        while self.trainer.step_number % DEAD_REFRESH == 0:
            self()

    def __call__(self) -> Any:
        self._turn += 1
        return self.trainer.step(*self.batches[self._turn % len(self.batches)])


def step_figures(setting: Setting, findings: Findings) -> None:
    """A step at the reference shape by backend, precision, batch and AuxK; selection; a feature that is always on."""
    shape = ((96, 128, 96), 4, 64) if setting.small else (GROUPS, K, WIDTH)
    batches, dead = ((64,), 32) if setting.small else ((1024, 4096), 512)
    rows = []
    for batch in batches:
        for backend in ("sparse", "dense"):
            for precision in ("float32", "bfloat16"):
                step = Step(setting, backend, precision, batch, shape)
                for aux in (0, dead):
                    step.silence(aux)
                    row = {"device": device_name(setting.device), "features": sum(shape[0]), "tokens": batch}
                    row |= {"backend": backend, "bfloat16": precision == "bfloat16", "dead": aux}
                    rows.append(row | _time_step(setting, findings, step, batch))
                    loss = step().metrics().loss
                    findings.check("losses are finite", np.isfinite(loss))
    findings.figures["steps"] = rows
    if not setting.on_gpu:
        findings.figures["target"] = findings.figures["selection"] = NEEDS_GPU
        return
    # What `optimizer.backend: auto` chooses from: dense products in bfloat16 change the numbers.
    largest = [row for row in rows if row["tokens"] == batches[-1] and not row["dead"]]
    exact = [row for row in largest if (row["backend"], row["bfloat16"]) != ("dense", True)]
    target = reached(max(row["tokens_per_second"] for row in exact), STEP_TOKENS_PER_SECOND)
    findings.figures["target"] = "not measured: small shapes" if setting.small else target
    for batch in batches:
        step = Step(setting, "sparse", "bfloat16", batch, shape)
        plain = milliseconds(step, findings, 10, each=DEAD_REFRESH)
        step.always_on()
        on = milliseconds(step, findings, 10, each=DEAD_REFRESH)
        findings.figures[f"always-on feature, {batch:,} tokens"] = {"milliseconds": on, "without": plain}
    sizes = [(batch, sum(shape[0])) for batch in batches] + ([] if setting.small else [(1024, 65_536)])
    findings.figures["selection"] = [_time_selection(setting, findings, *size, shape[1]) for size in sizes]


def _time_step(setting: Setting, findings: Findings, step: Step, batch: int) -> dict[str, Any]:
    step.leave_refresh()
    with DeviceWatch() as watch:
        step()
    row: dict[str, Any] = {"operations": watch.launches}
    if not setting.on_gpu:
        return row
    torch.cuda.synchronize()
    row["milliseconds"] = milliseconds(step, findings, 10, each=DEAD_REFRESH)
    row["tokens_per_second"] = 1000 * batch / row["milliseconds"]
    host = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host.append(1000 * (time.perf_counter() - start))
    row["host_milliseconds"] = statistics.median(host)
    step.leave_refresh()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    row["kernels"] = len(kernels)
    row["kernel_milliseconds"] = sum(event.time_range.elapsed_us() for event in kernels) / 1000
    return row


def _time_selection(setting: Setting, findings: Findings, tokens: int, features: int, k: int) -> dict[str, Any]:
    z = torch.randn(tokens, features, device=setting.device)
    spent = milliseconds(lambda: largest_entries(z, k * tokens), findings)
    return {"tokens": tokens, "features": features, "milliseconds": spent}


# Capture ------------------------------------------------------------------------------------------------------------


def gemma_shaped(setting: Setting) -> str:
    """The directory of layers 0 to 17 of a random model of Gemma 2 2B's shape, made on the GPU; smaller without one."""
    directory = Path(setting.memory) / "gemma-2-2b"
    if directory.is_dir():
        return str(directory)
    shape: dict[str, Any] = {"num_hidden_layers": LAYER + 1}
    if setting.small:
        shape |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": 300, "query_pre_attn_scalar": 16}
    config = AutoConfig.for_model("gemma2", **shape)  # by default of Gemma 2 2B's shape
    with setting.device:
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return str(directory)


def gemma_config(setting: Setting) -> ModelConfig:
    return ModelConfig(name=gemma_shaped(setting), layer=1 if setting.small else LAYER, dtype="bfloat16")


def random_windows(lengths: Sequence[int], vocabulary: int, seed: int) -> PackedWindows:
    rng = np.random.default_rng(seed)
    return pack_windows([np.r_[BOS, rng.integers(3, vocabulary, n - 1)].astype(np.int32) for n in lengths], [BOS])


def _texts(unit: int) -> dict[str, list[list[int]]]:
    """By name the lengths of the windows of six units."""
    rng = np.random.default_rng(0)
    mixed = []
    for _ in range(6):
        lengths = rng.integers(16, 1025, unit).cumsum()
        mixed.append(np.diff(lengths[lengths <= unit], prepend=0).tolist())
    return {"short": [[64] * (unit // 64)] * 6, "long": [[1024] * (unit // 1024)] * 6, "mixed": mixed}


def capture_figures(setting: Setting, findings: Findings) -> None:
    """Gemma 2 2B's shape, random weights, layer 17: tokens/s to the host and share of the measured product's rate."""
    start = time.perf_counter()
    config = gemma_config(setting)
    findings.figures["seconds to make the model"] = time.perf_counter() - start
    if not setting.on_gpu:
        findings.figures["capture"] = NEEDS_GPU
        return
    rate = matmul_rate(setting, findings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = LanguageModel(config, setting.device)
    loaded = time.perf_counter()
    model.warm_up(UNIT)
    torch.cuda.synchronize()
    findings.figures["seconds to load"] = loaded - start
    findings.figures["seconds to compile"] = time.perf_counter() - loaded
    findings.check("compiled", model.compute == "compiled", compute=model.compute)
    before = compilations()
    for name, texts in _texts(UNIT).items():
        units = [random_windows(lengths, model.vocab_size, seed) for seed, lengths in enumerate(texts)]
        figure = _time_capture(model, units, findings)
        figure["target"] = reached(figure["tokens_per_second"] * figure.pop("flops") / rate, CAPTURE_SHARE)
        findings.figures[f"capture, {name}"] = figure
    made = compilations() - before
    findings.check("nothing is compiled after warm_up", made == 0, compilations=made)
    parameters = sum(p.numel() * p.element_size() for p in model.model.parameters())
    # A layer's input, sites and norms, then the MLP's two halves and their product; queries, keys, values; copies.
    rows = UNIT * 2 * (12 * WIDTH + 4 * 9216 + 3 * 8 * 256)
    peak = torch.cuda.max_memory_allocated()
    findings.compare("memory of capture", peak / (parameters + rows), 1.25, bytes=peak, weights=parameters)


def _time_capture(model: LanguageModel, units: list[PackedWindows], findings: Findings) -> dict[str, Any]:
    """One unit ahead, as a model actor works, activations on the host; a median over passes through all units."""
    runner, rates = Capture(model), []
    tokens = sum(sum(unit.lengths) for unit in units)
    while len(rates) < 2 or (len(rates) < 6 and findings.seconds_left > 0):
        start = time.perf_counter()
        pending = deque([runner.start(units[0])])
        for unit in units[1:]:
            pending.append(runner.start(unit))
            runner.finish(pending.popleft())
        runner.finish(pending.popleft())
        rates.append(tokens / (time.perf_counter() - start))
    flops = sum(model.flops(unit.lengths) for unit in units) / tokens
    return {"tokens_per_second": statistics.median(rates[1:]), "passes": len(rates) - 1, "flops": flops}


# Memory -------------------------------------------------------------------------------------------------------------


def memory(setting: Setting, findings: Findings) -> None:
    """The peak of a training step at the reference shape, over what it cannot do without."""
    if not setting.on_gpu:
        findings.figures["memory"] = NEEDS_GPU
        return
    for batch in (1024, 4096):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        step = Step(setting, "sparse", "bfloat16", batch, (GROUPS, K, WIDTH))
        step.silence(512)
        inputs = sum(column.numel() * column.element_size() for pair in step.batches for column in pair)
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before - inputs
        parameters = sum(p.numel() for p in step.trainer.transcoder.parameters())
        features, slots = sum(GROUPS), len(GROUPS) + 1
        # Weights, gradients and two moments; z and its positive part; x, y and their copies; H and the sums it is of.
        needed = 4 * (4 * parameters + 2 * batch * features + 4 * batch * WIDTH + 2 * batch * slots * WIDTH)
        findings.compare(f"memory of a step, {batch:,} tokens", peak / needed, 1.5, bytes=peak, needed=needed)
