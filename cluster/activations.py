"""Work units of the token store -> a Ray Dataset of activation blocks.

One row is one work unit: for each layer that is read, the source and target activations of its trainable tokens as two
byte strings of bfloat16. Large rows keep the stream bound by memory bandwidth rather than by the number of messages,
and bytes travel through Arrow without conversion or pickling: they are copied once into shared memory, where trainers
view them. The input is a list of tiny blocks, because a read task would ask for a whole CPU.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.resources import Plan
from mtc.config import RunConfig

if TYPE_CHECKING:
    import numpy as np
    import ray.data
    import torch

    from mtc.capture import Pending
    from mtc.shuffle import Unit

UNIT_TYPE = pa.list_(pa.int64())
TASKS_WANTED = 4096
"""Beyond so many tasks in a run, several units share one: each costs the scheduler about a millisecond."""
MOST_UNITS_PER_TASK = 16
GPU_UNITS_PER_TASK = 8  # one unit is sent while the next is computed; at a task's end there is no next
IN_FLIGHT = 4  # tasks per actor: Ray Data looks for finished ones only about ten times a second


def activation_dataset(
    config: RunConfig, plan: Plan, store_url: str, units: Iterable[tuple[int, np.ndarray]], start: str = ""
) -> ray.data.Dataset:
    """A lazy Dataset with one row and block for each (unit number, window ids), in the given order.

    `start` names the checkpoint that the list of units was made from; it travels with each.
    """
    units = list(units)
    least = GPU_UNITS_PER_TASK if plan.device == "cuda" else 1  # fewer where actors would have nothing to do
    least = max(1, min(least, len(units) // (IN_FLIGHT * plan.num_model_actors)))
    together = min(max(least, -(-len(units) // TASKS_WANTED)), MOST_UNITS_PER_TASK)
    rows = []
    for at in range(0, len(units), together):
        part = units[at : at + together]
        windows = pa.array([ids.tolist() for _, ids in part], UNIT_TYPE)
        rows.append(pa.table({"unit": [number for number, _ in part], "windows": windows}))
    return map_on_model_actors(rows, CaptureActor, plan, config=config, store_url=store_url, start=start)


def map_on_model_actors(blocks: list[pa.Table], actor: type, plan: Plan, **arguments: Any) -> ray.data.Dataset:
    """Map Arrow blocks, one at a time and in order, over the plan's pool of model actors; each table that an actor
    yields is a block of its own."""
    import ray.data

    # No more actors than blocks; on CPUs the few get the threads of all.
    least, most = (max(1, min(n, len(blocks))) for n in (plan.num_model_actors, plan.max_model_actors))
    threads = plan.actor_threads
    if plan.device == "cpu":
        largest = int(max(node.cpus for node in plan.nodes))
        threads = max(threads, min(threads * plan.num_model_actors // least, largest))
    dataset = ray.data.from_blocks(blocks)
    dataset.context.target_max_block_size = 1  # tables are never put together
    return dataset.map_batches(
        actor,
        fn_constructor_kwargs=arguments | {"device": plan.device, "threads": threads},
        # A whole block, without copying it together; Ray wants a number where it is given GPUs.
        batch_size=max((len(block) for block in blocks), default=1) if plan.actor_gpus else None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=IN_FLIGHT),
        num_cpus=plan.actor_cpus,
        num_gpus=plan.actor_gpus or None,
        runtime_env=plan.runtime_env,
        **plan.actor_placement,
    )


def configure_data_context(stall_seconds: float | None = None) -> None:
    """Settings of every Dataset here; call in the process that executes it.

    A Dataset that makes no progress for `stall_seconds` fails, because Ray Data waits for ever for a place for an actor
    whose node is gone.
    """
    import logging

    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans and timings are in Ray's own log files
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the seed fixes the order of training
    context.execution_options.verbose_progress = False
    if stall_seconds is not None:
        context.execution_no_progress_timeout_s = stall_seconds


class CaptureActor:
    """Holds the truncated language model and the token store; turns work units into activations."""

    def __init__(self, config: RunConfig, store_url: str, device: str, threads: int, start: str = ""):
        import torch

        from cluster.metrics import RayMeter
        from mtc.capture import Capture
        from mtc.devices import open_device
        from mtc.language_model import LanguageModel
        from mtc.metrics import PROCESS
        from mtc.timing import measure_device
        from mtc.tokens import TokenStore

        torch.set_num_threads(threads)
        self.name = uuid.uuid4().hex
        self.meter = RayMeter(PROCESS, run_id=config.output.run_id or "")
        self.start = start
        self.store = TokenStore.open(store_url)
        self.model = LanguageModel(config.model, open_device(device))
        self.capture = Capture(self.model)
        self.device_flops = measure_device(self.model.device, self.model.dtype)
        self.idle, self.sending = 0.0, 0.0
        self.model.warm_up(config.data.unit_tokens)  # before the account of time begins
        self.done_at = self.sent_at = time.perf_counter()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        start = time.perf_counter()
        self.idle += start - self.done_at
        pending: deque[tuple[int, Pending]] = deque()
        for number, windows in zip(batch["unit"].to_pylist(), batch["windows"].to_pylist(), strict=True):
            pending.append((number, self._start(windows)))
            if len(pending) > self.capture.ahead:
                yield from self._send(*pending.popleft())
        while pending:
            yield from self._send(*pending.popleft())
        self.done_at = time.perf_counter()

    def _start(self, window_ids: list[int]) -> Pending:
        import numpy as np

        from mtc.work import pack_windows

        ids = np.asarray(window_ids, np.int64)
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
            "widths": pa.array([[column.shape[1] for column in captured.columns]], pa.list_(pa.int64())),
            "actor": pa.array([self.name]),
            "forward": pa.array([pending.watch.seconds()], pa.float64()),
            "sending": pa.array([self.sending], pa.float64()),
            "idle": pa.array([self.idle], pa.float64()),
            "elapsed": pa.array([start - self.sent_at], pa.float64()),
            "positions": pa.array([pending.positions], pa.int64()),
            "flops": pa.array([pending.flops], pa.float64()),
            "device_flops": pa.array([self.device_flops], pa.float64()),
        }
        self.meter.add("mtc_model_actor_tokens_total", pending.positions)
        for stage in ("forward", "sending", "idle"):
            self.meter.add("mtc_model_actor_seconds_total", columns[stage][0].as_py(), stage=stage)
        self.idle, self.sending, self.sent_at = 0.0, 0.0, start
        for i, column in enumerate(captured.columns):
            columns[f"activations_{i}"] = to_binary(column)
        yield pa.table(columns)
        self.sending += time.perf_counter() - start  # Ray has written the table into shared memory


class ActorCosts:
    """What the units that a trainer received have cost the model actors."""

    FIELDS = ("forward", "sending", "idle", "elapsed", "positions", "flops")

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.FIELDS, 0.0)
        self.device_flops = 0.0

    def add(self, unit: Unit) -> None:
        for name in self.FIELDS:
            self.sums[name] += unit.costs[name]
        self.device_flops = max(self.device_flops, unit.costs["device_flops"])


def iterate_units(shard: Any, start: str = "") -> Iterator[Unit]:
    """The units of a shard of the Dataset, their columns bfloat16 views of shared memory, [tokens, d].

    Raises RuntimeError if the Dataset continues another checkpoint than `start`.
    """
    import numpy as np

    from mtc.shuffle import Unit

    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        if table["start"][0].as_py() != start:
            raise RuntimeError(f"the stream continues {table['start'][0].as_py() or 'nothing'}, the trainers {start}")
        tokens = table["tokens"][0].as_py()
        if not tokens:
            continue
        names = [name for name in table.column_names if name.startswith("activations_")]
        costs = {name: table[name][0].as_py() for name in (*ActorCosts.FIELDS, "device_flops", "actor")}
        dropped = np.array(table["dropped"][0].as_py(), np.int32)
        rows = np.delete(np.arange(tokens, dtype=np.int32), dropped)
        widths = table["widths"][0].as_py()
        columns = tuple(from_binary(table[name], width) for name, width in zip(names, widths, strict=True))
        yield Unit(table["unit"][0].as_py(), columns, rows, tokens, dropped, costs)


def to_binary(activations: torch.Tensor) -> pa.Array:
    """[tokens, d] bfloat16 on the host -> one large_binary value that shares its memory."""
    import numpy as np
    import torch

    bits = activations.contiguous().view(torch.int16).numpy()
    offsets = pa.py_buffer(np.array([0, bits.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(bits)])


def from_binary(column: pa.ChunkedArray, width: int) -> torch.Tensor:
    """The inverse of `to_binary` for a column of one value, [tokens, width]: a view of its memory, which is not to be
    written."""
    import warnings

    import numpy as np
    import torch

    (chunk,) = column.chunks
    _, offsets, data = chunk.buffers()  # a scalar of the column would be a copy
    start, end = np.frombuffer(offsets, np.int64, 2, 8 * chunk.offset).tolist()
    with warnings.catch_warnings():
        # The buffer lies in read-only shared memory; it is copied into the shuffle buffer and never written.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        bits = torch.from_numpy(np.frombuffer(data, np.int16, (end - start) // 2, start))
    return bits.view(torch.bfloat16).view(-1, width)
