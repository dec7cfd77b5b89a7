"""Work units of the token store -> a Ray Dataset of activation blocks.

One row is one work unit: the (source, target) activations of its trainable tokens as two byte strings of bfloat16.
Large rows keep the stream bound by memory bandwidth rather than by the number of messages, and bytes travel through
Arrow without conversion or pickling. The input is a list of tiny blocks, because a read task would ask for a whole CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.resources import WORKER_ENVIRONMENT, Plan
from mtc.config import RunConfig

if TYPE_CHECKING:
    import numpy as np
    import ray.data
    import torch


def activation_dataset(
    config: RunConfig, plan: Plan, store_url: str, units: Iterable[tuple[int, np.ndarray]]
) -> ray.data.Dataset:
    """A lazy Dataset of rows {unit, tokens, source, target} for (unit number, window ids) in the given order."""
    rows = [pa.table({"unit": [number], "windows": pa.array([ids.tolist()], UNIT_TYPE)}) for number, ids in units]
    return map_on_model_actors(rows, CaptureActor, plan, config=config, store_url=store_url)


def map_on_model_actors(rows: list[pa.Table], actor: type, plan: Plan, **arguments: Any) -> ray.data.Dataset:
    """Map one-row Arrow blocks, one at a time and in order, over the plan's pool of model actors."""
    import ray.data

    return ray.data.from_arrow(rows).map_batches(
        actor,
        fn_constructor_kwargs=arguments | {"device": plan.device, "threads": plan.actor_threads},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=plan.num_model_actors, max_tasks_in_flight_per_actor=2),
        num_cpus=plan.actor_cpus,
        num_gpus=plan.actor_gpus or None,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )


def configure_data_context() -> None:
    """Settings of every Dataset here; call in the process that executes it."""
    import logging

    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans and timings are in Ray's own log files
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the seed fixes the order of training
    context.execution_options.verbose_progress = False


class CaptureActor:
    """Holds the truncated language model and the token store; turns a work unit into activations."""

    def __init__(self, config: RunConfig, store_url: str, device: str, threads: int):
        import torch

        from mtc.language_model import LanguageModel
        from mtc.tokens import TokenStore

        torch.set_num_threads(threads)
        self.store = TokenStore.open(store_url)
        self.model = LanguageModel(config.model, device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        import numpy as np

        from mtc.tokens import pad_windows

        windows = pad_windows(self.store.input_ids(np.asarray(batch["windows"][0].as_py())), self.store.info)
        device = self.model.device
        pair = self.model.capture(windows.input_ids.to(device), windows.attention_mask.to(device))
        trainable = windows.trainable.to(device)
        source, target = pair.source[trainable], pair.target[trainable]
        columns = {
            "unit": batch["unit"].cast(pa.int64()).combine_chunks(),
            "tokens": pa.array([len(source)], pa.int64()),
            "source": _to_binary(source),
            "target": _to_binary(target),
        }
        return pa.table(columns)


UNIT_TYPE = pa.list_(pa.int64())


def iterate_units(shard: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(unit, source [tokens, d], target [tokens, d]) of a shard of the Dataset; bfloat16 views of its Arrow buffers."""
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for i in range(table.num_rows):
            tokens = table["tokens"][i].as_py()
            if tokens:
                yield (
                    table["unit"][i].as_py(),
                    _from_binary(table["source"][i], tokens),
                    _from_binary(table["target"][i], tokens),
                )


def _to_binary(activations: torch.Tensor) -> pa.Array:
    """[tokens, d] -> one large_binary value with the bfloat16 bits, not copied on a CPU that computes in bfloat16."""
    import numpy as np
    import torch

    bits = activations.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    offsets = pa.py_buffer(np.array([0, bits.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(bits)])


def _from_binary(value: pa.Scalar, tokens: int) -> torch.Tensor:
    import warnings

    import torch

    with warnings.catch_warnings():
        # The buffer lies in read-only shared memory; it is copied into the shuffle buffer and never written.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(value.as_buffer(), dtype=torch.bfloat16).view(tokens, -1)
