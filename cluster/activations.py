"""Work units of the token store -> a Ray Dataset of activation blocks (cluster.blocks), by a pool of model actors.

One row is one work unit: for each layer that is read, the source and target activations of its trainable tokens. Large
rows keep the stream bound by memory bandwidth rather than by the number of messages. The input is a list of tiny
blocks, because a read task would ask for a whole CPU.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from cluster.resources import Plan
from mtc.config import RunConfig
from mtc.errors import MtcError

UNIT_TYPE = pa.list_(pa.int64())
TASKS_WANTED = 4096
"""Most tasks of a run before several units share one: each costs the scheduler about a millisecond."""
MOST_UNITS_PER_TASK = 16
GPU_UNITS_PER_TASK = 8  # one unit is sent while the next is computed; at a task's end there is no next
LOOP_SECONDS = 0.01
IN_FLIGHT = 4  # tasks per actor: Ray Data looks for finished ones only about ten times a second


class ModelActor(ABC):
    """An actor of the pool of `map_on_model_actors`.

    What is wrong with the model or the data where it runs is raised by its first call: of a call Ray keeps the error,
    of a constructor only its text.
    """

    def __init__(self, **arguments: Any):
        self._problem: MtcError | None = None
        try:
            self.load(**arguments)
        except MtcError as error:
            self._problem = error

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self._problem:
            raise self._problem
        yield from self.work(batch)

    @abstractmethod
    def load(self, **arguments: Any) -> None:
        """Make ready what every call needs."""

    @abstractmethod
    def work(self, batch: pa.Table) -> Iterator[pa.Table]:
        """The tables that come from one block."""


class CaptureActor(ModelActor):
    """`cluster.capture.UnitCapture`, loaded where it runs."""

    def load(self, **arguments: Any) -> None:
        # Ray Data's own processes get this class as well: without torch each of them is 240 MB smaller.
        from cluster.capture import UnitCapture

        self._capture = UnitCapture(**arguments)

    def work(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from self._capture(batch)


def activation_dataset(
    config: RunConfig, plan: Plan, store_url: str, units: NDArray[np.int64], start: str = ""
) -> ray.data.Dataset:
    """A lazy Dataset with one row and block for each number of a unit of `mtc.text.work_units`, in the given order;
    negative ones hold a place. Model actors find the windows themselves.

    `start` names the checkpoint that the numbers were made from; it travels with each.
    """
    least = GPU_UNITS_PER_TASK if plan.device == "cuda" else 1  # fewer where actors would have nothing to do
    least = max(1, min(least, len(units) // (IN_FLIGHT * plan.num_model_actors)))
    together = min(max(least, -(-len(units) // TASKS_WANTED)), MOST_UNITS_PER_TASK)
    rows = [pa.table({"unit": units[at : at + together]}) for at in range(0, len(units), together)]
    return map_on_model_actors(rows, CaptureActor, plan, config=config, store_url=store_url, start=start)


def map_on_model_actors(blocks: list[pa.Table], actor: type, plan: Plan, **arguments: Any) -> ray.data.Dataset:
    """Map Arrow blocks, one at a time and in order, over the plan's pool of model actors; each table that an actor
    yields is a block of its own."""
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


class Paced(ExecutionCallback):
    """Lets Ray Data's loop rest between two looks. Where blocks are made and nobody may take them yet, as in a run of
    many layers, whose trainer is slower than the language model, it would turn without end and take half a core."""

    def on_execution_step(self, executor: object) -> None:
        time.sleep(LOOP_SECONDS)


def configure_data_context(stall_seconds: float | None = None) -> None:
    """Settings of every Dataset here; call in the process that executes it.

    A Dataset that makes no progress for `stall_seconds` fails, because Ray Data waits for ever for a place for an actor
    whose node is gone.
    """
    import logging

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans and timings are in Ray's own log files
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the seed fixes the order of training
    context.execution_options.verbose_progress = False
    context.custom_execution_callback_classes = [Paced]
    if stall_seconds is not None:
        context.execution_no_progress_timeout_s = stall_seconds
