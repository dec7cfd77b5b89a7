import pytest

from cluster.resources import Node, make_plan
from mtc.config import ConfigError, load_preset


@pytest.mark.parametrize(
    ("nodes", "trainers", "actors", "device"),
    [
        ([Node(1, 0)], 1, 1, "cpu"),
        ([Node(2, 0)], 2, 1, "cpu"),
        ([Node(2, 0)] * 2, 2, 2, "cpu"),
        ([Node(4, 0)] * 8, 2, 8, "cpu"),
        ([Node(16, 1)], 1, 1, "cuda"),
        ([Node(64, 8)], 1, 7, "cuda"),
        ([Node(64, 8)] * 4, 4, 28, "cuda"),
    ],
)
@pytest.mark.parametrize("preset", ["gemma-2-2b-layer17", "smollm2-135m"])
def test_plans_fit_the_cluster(preset, nodes, trainers, actors, device):
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    plan = make_plan(load_preset(preset), nodes)
    assert (plan.num_trainers, plan.num_model_actors, plan.device) == (trainers, actors, device)
    assert plan.num_trainers * plan.trainer_cpus + plan.num_model_actors * plan.actor_cpus <= cpus
    assert plan.num_trainers * plan.trainer_gpus + plan.num_model_actors * plan.actor_gpus <= gpus
    assert min(plan.trainer_cpus, plan.actor_cpus) > 0
    assert max(plan.trainer_cpus, plan.actor_cpus) <= max(n.cpus for n in nodes)
    assert plan.actor_threads <= max(n.cpus for n in nodes)
    assert (plan.trainer_gpus > 0) == (plan.actor_gpus > 0) == (gpus > 0)


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus", "message"),
    [
        ({"use_gpu": True}, 8, 0, "cluster.use_gpu is true, but the cluster has 0 GPUs"),
        ({"num_trainers": 4, "num_model_actors": 8}, 64, 4, "need .* 12 GPUs, the cluster has 64 CPUs and 4 GPUs"),
        ({"num_trainers": 2}, 16, 1, "cluster.num_trainers=2 trainers need a GPU each, the cluster has 1 GPUs"),
        ({"num_trainers": 8, "num_model_actors": 90}, 2, 0, "cluster.num_model_actors=90 need"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(overrides, cpus, gpus, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(load_preset("gemma-2-2b-layer17", {"cluster": overrides}), [Node(cpus, gpus)])
