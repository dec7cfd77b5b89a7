"""Where model actors go on two nodes that believe in GPUs: to the trainer's node, elsewhere if it is full."""

import sys
import time
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.activations import configure_data_context, map_on_model_actors
from cluster.resources import Node, Plan

pytestmark = pytest.mark.chaos


class WhereAmI:
    """A model actor that says on which node it is."""

    def __init__(self, device: str, threads: int):
        pass

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(0.05)
        return pa.table({"node": [ray.get_runtime_context().get_node_id()]})


@ray.remote(num_gpus=1, num_cpus=1)
class Taken:
    def ready(self) -> bool:
        return True


def test_model_actors_are_near_the_trainer_while_there_is_room(monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    small = {"num_cpus": 4, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_gpus": 2})
    try:
        cluster.add_node(**small, num_gpus=3)
        ray.init(address=cluster.address, log_to_driver=False)
        configure_data_context()
        of_gpus = {int(node["Resources"]["GPU"]): node["NodeID"] for node in ray.nodes()}
        nodes = tuple(Node(4, gpus, False, name) for gpus, name in of_gpus.items())

        def seen(near: str) -> set[str]:
            plan = Plan("cuda", 1, 1, 1.0, 1, 2, 2, 1.0, 1.0, 1, nodes, near=near)
            rows = [pa.table({"unit": [i]}) for i in range(100)]
            return {row["node"] for row in map_on_model_actors(rows, WhereAmI, plan).iter_rows()}

        assert seen(of_gpus[2]) == {of_gpus[2]}
        assert seen(of_gpus[3]) == {of_gpus[3]}
        here = NodeAffinitySchedulingStrategy(of_gpus[2], soft=False)
        others = [Taken.options(scheduling_strategy=here).remote() for _ in range(2)]
        ray.get([other.ready.remote() for other in others])
        assert seen(of_gpus[2]) == {of_gpus[3]}
    finally:
        ray.shutdown()
        cluster.shutdown()
