"""What Ray Train calls back: the stream for as many trainers as there are at a start, and news of failures.

Imported where Ray Train is used anyway; its processes do without torch.
"""

from __future__ import annotations

import logging
from itertools import zip_longest
from typing import Any

import numpy as np
import ray.data
import ray.train
from ray.train import DataConfig

from cluster.activations import activation_dataset, configure_data_context
from cluster.resources import Plan, cluster_nodes, make_plan
from mtc.config import RunConfig

logger = logging.getLogger(__name__)

NO_UNIT = -1
Row = tuple[int, np.ndarray]


class StreamConfig(DataConfig):
    """Makes the Dataset of what the last checkpoint leaves to do and deals it to the trainers, unit by unit.

    Ray Train asks for it at every start, when it knows the number of trainers and after rank 0 chose the checkpoint.
    The model actors are planned again for the nodes that there are.
    """

    def __init__(self, config: RunConfig, plan: Plan, run_url: str, store_url: str, d_model: int):
        super().__init__()
        self.config, self.plan, self.run_url, self.store_url, self.d_model = config, plan, run_url, store_url, d_model

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        configure_data_context(self.config.cluster.stall_seconds)
        rows, start = remaining_units(self.config, self.run_url, self.store_url, world_size)
        plan = make_plan(self.config, cluster_nodes(), self.d_model, num_trainers=world_size)
        dataset = activation_dataset(self.config, plan, self.store_url, rows, start)
        # Whole units, dealt in turn: none is dropped to make the shares equal.
        splits = dataset.streaming_split(world_size, equal=False, locality_hints=None)
        return [{"train": split} for split in splits]


def remaining_units(config: RunConfig, run_url: str, store_url: str, trainers: int) -> tuple[list[Row], str]:
    """The units that are not finished, in the order in which they are dealt to the trainers, and the checkpoint's name.

    Unit u is for trainer u modulo `trainers`, now and after every restart; where one's list is shorter, units without
    windows hold its places.
    """
    from cluster.training import read_progress
    from mtc.checkpoints import Checkpoints
    from mtc.tokens import TokenStore
    from mtc.work import work_units

    checkpoint = Checkpoints(run_url).latest()
    finished = set(read_progress(checkpoint).finished().tolist()) if checkpoint else set()
    work = work_units(TokenStore.open(store_url), config)
    left = [(number, unit) for number, unit in enumerate([*work.training, *work.calibration]) if number not in finished]
    logger.info("stream of %d work units, %d trained before", len(left), len(finished))
    mine = [[row for row in left if row[0] % trainers == rank] for rank in range(trainers)]
    nothing = (NO_UNIT, np.empty(0, np.int64))
    dealt = [row for turn in zip_longest(*mine, fillvalue=nothing) for row in turn]
    return dealt, checkpoint.name if checkpoint else ""


class TellFailures(ray.train.UserCallback):
    """Tells the MetricsLog actor why trainers died."""

    def __init__(self, log: Any):
        self.log = log

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items()):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.log.event.remote(
                "failure", f"trainer {rank} died: {type(error).__name__}: {lines[-1][:300] if lines else ''}", None
            )
