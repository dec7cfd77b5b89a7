import pytest

from cluster.resources import make_plan
from mtc.config import ConfigError, load_preset


@pytest.mark.parametrize(
    ("cpus", "gpus", "trainers", "actors", "device"),
    [(1, 0, 1, 1, "cpu"), (2, 0, 2, 1, "cpu"), (16, 1, 1, 1, "cuda"), (64, 8, 1, 7, "cuda"), (256, 32, 4, 28, "cuda")],
)
def test_plans_fit_the_cluster(cpus, gpus, trainers, actors, device):
    plan = make_plan(load_preset("gemma-2-2b-layer17"), cpus, gpus)
    assert (plan.num_trainers, plan.num_model_actors, plan.device) == (trainers, actors, device)
    assert plan.num_trainers * plan.trainer_cpus + plan.num_model_actors * plan.actor_cpus <= cpus
    assert plan.num_trainers * plan.trainer_gpus + plan.num_model_actors * plan.actor_gpus <= gpus
    assert min(plan.trainer_cpus, plan.actor_cpus) > 0
    assert (plan.trainer_gpus > 0) == (plan.actor_gpus > 0) == (gpus > 0)


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus", "message"),
    [
        ({"use_gpu": True}, 8, 0, "cluster.use_gpu is true, but the cluster has 0 GPUs"),
        ({"num_trainers": 8, "num_model_actors": 8}, 64, 4, "need .* 16 GPUs, the cluster has 64 CPUs and 4 GPUs"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(overrides, cpus, gpus, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(load_preset("gemma-2-2b-layer17", {"cluster": overrides}), cpus, gpus)
