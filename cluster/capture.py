"""The model actor: runs the truncated language model over packed work units and gives out activations."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from cluster.blocks import to_columns
from cluster.job_metrics import ray_metric
from mtc import language_model
from mtc.config import RunConfig
from mtc.devices import measure_device, open_device
from mtc.language_model import Capture, Pending, pack_windows
from mtc.text import TokenStore, work_units


class UnitCapture:
    """Holds the truncated language model and the token store; turns work units into activations."""

    def __init__(self, config: RunConfig, store_url: str, device: str, threads: int, start: str = ""):
        torch.set_num_threads(threads)
        self.name = uuid.uuid4().hex
        run_id = config.output.run_id or ""
        self._positions = ray_metric("mtc_model_actor_tokens_total", run_id=run_id)
        self._seconds = ray_metric("mtc_model_actor_seconds_total", run_id=run_id)
        self.start = start
        self.store = TokenStore.open(store_url)
        self.work = work_units(self.store, config)
        self.model = language_model.LanguageModel(config.model, open_device(device))
        self.capture = Capture(self.model)
        self.device_flops = measure_device(self.model.device, self.model.dtype)
        self.idle, self.sending = 0.0, 0.0
        self.model.warm_up(config.data.unit_tokens)  # before the account of time begins
        self.done_at = self.sent_at = time.perf_counter()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        start = time.perf_counter()
        self.idle += start - self.done_at
        pending: deque[tuple[int, Pending]] = deque()
        for number in batch["unit"].to_pylist():
            pending.append((number, self._start(number)))
            if len(pending) > self.capture.ahead:
                yield from self._send(*pending.popleft())
        while pending:
            yield from self._send(*pending.popleft())
        self.done_at = time.perf_counter()

    def _start(self, number: int) -> Pending:
        ids = self.work.unit(number) if number >= 0 else np.empty(0, np.int64)
        # Windows of one length next to each other are attended to without being gathered first.
        ids = ids[np.argsort(-self.store.positions(ids), kind="stable")]
        return self.capture.start(pack_windows(self.store.input_ids(ids), self.store.info.special_ids))

    def _send(self, number: int, pending: Pending) -> Iterator[pa.Table]:
        captured = self.capture.finish(pending)
        start = time.perf_counter()
        columns = {
            "unit": pa.array([number], pa.int64()),
            "start": pa.array([self.start]),
            "tokens": pa.array([captured.tokens], pa.int64()),
            "dropped": pa.array([captured.dropped], pa.list_(pa.int32())),
            "actor": pa.array([self.name]),
            "forward": pa.array([pending.watch.seconds()], pa.float64()),
            "sending": pa.array([self.sending], pa.float64()),
            "idle": pa.array([self.idle], pa.float64()),
            "elapsed": pa.array([start - self.sent_at], pa.float64()),
            "positions": pa.array([pending.positions], pa.int64()),
            "flops": pa.array([pending.flops], pa.float64()),
            "device_flops": pa.array([self.device_flops], pa.float64()),
        }
        if pending.positions:  # else the unit only holds a place
            self._positions.inc(pending.positions)
        for stage in ("forward", "sending", "idle"):
            if seconds := columns[stage][0].as_py():
                self._seconds.inc(seconds, {"stage": stage})
        self.idle, self.sending, self.sent_at = 0.0, 0.0, start
        yield pa.table(columns | to_columns(captured.activations))
        self.sending += time.perf_counter() - start  # Ray has written the table into shared memory
