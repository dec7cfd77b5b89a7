import pytest

from cluster.resources import Node, actor_rate, beside, make_plan, trainer_rate
from mtc.config import ConfigError, load_preset

GEMMA_2B, SMOLLM = 2304, 576  # d_model


@pytest.mark.parametrize(
    ("nodes", "trainers", "actors", "device"),
    [
        ([Node(1, 0)], 1, 1, "cpu"),
        ([Node(2, 0)], 1, 1, "cpu"),
        ([Node(2, 0)] * 2, 1, 2, "cpu"),
        ([Node(4, 0)] * 8, 1, 8, "cpu"),
        ([Node(64, 0)], 1, 8, "cpu"),
        ([Node(16, 1)], 1, 1, "cuda"),
        ([Node(64, 8)], 1, 7, "cuda"),
        ([Node(64, 8)] * 4, 1, 31, "cuda"),
    ],
)
@pytest.mark.parametrize("preset", ["gemma-2-2b-layer17", "smollm2-135m"])
def test_plans_fit_the_cluster(preset, nodes, trainers, actors, device):
    cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    plan = make_plan(load_preset(preset), nodes)
    assert (plan.num_trainers, plan.max_model_actors, plan.device) == (trainers, actors, device)
    assert 1 <= plan.num_model_actors <= plan.max_model_actors
    assert plan.num_trainers * plan.trainer_cpus + plan.max_model_actors * plan.actor_cpus <= cpus
    assert plan.num_trainers * plan.trainer_gpus + plan.max_model_actors * plan.actor_gpus <= gpus
    assert min(plan.trainer_cpus, plan.actor_cpus) > 0
    assert max(plan.trainer_cpus, plan.actor_cpus) <= max(n.cpus for n in nodes)
    assert plan.actor_threads <= max(n.cpus for n in nodes)
    assert plan.trainer_threads <= max(n.cpus for n in nodes)
    assert (plan.trainer_gpus > 0) == (plan.actor_gpus > 0) == (gpus > 0)


@pytest.mark.parametrize(
    ("nodes", "d_model", "actors", "threads"),
    [
        ([Node(2, 0)], SMOLLM, 2, 1),
        ([Node(2, 0)], GEMMA_2B, 1, 2),
        ([Node(4, 0)] * 8, SMOLLM, 32, 1),
        ([Node(64, 0)], SMOLLM, 8, 8),
    ],
)
def test_small_models_run_in_several_actors_of_one_thread(nodes, d_model, actors, threads):
    plan = make_plan(load_preset("smollm2-135m", {"model": {"layer": 20}}), nodes, d_model)
    assert (plan.num_model_actors, plan.actor_threads) == (actors, threads)
    assert plan.num_trainers * plan.trainer_cpus + actors * plan.actor_cpus <= sum(n.cpus for n in nodes)


def test_a_trainer_that_repeats_tokens_keeps_up_with_fewer_model_actors():
    nodes = [Node(64, 8)]
    plans = [make_plan(load_preset("gemma-2-2b-layer17", {"data": {"replays": r}}), nodes, GEMMA_2B) for r in (1, 8)]
    assert plans[0].num_model_actors > 1 and plans[1].num_model_actors == 1


def test_one_gpu_is_shared_and_several_are_not():
    config = load_preset("gemma-2-2b-layer17")
    one = make_plan(config, [Node(16, 1)], GEMMA_2B)
    assert (one.trainer_gpus, one.actor_gpus, one.max_model_actors) == (0.4, 0.6, 1)
    many = make_plan(config, [Node(64, 8)] * 4, GEMMA_2B)
    assert (many.trainer_gpus, many.actor_gpus, many.actor_cpus) == (1, 1, 1)
    assert (many.num_trainers, many.spread) == (1, False)  # 32 GPUs are no reason for more
    four = load_preset("gemma-2-2b-layer17", {"cluster": {"num_trainers": 4}})
    assert make_plan(four, [Node(64, 8)] * 4, GEMMA_2B).spread
    assert not make_plan(four, [Node(64, 8)], GEMMA_2B).spread


def test_the_pool_starts_at_what_the_trainers_keep_up_with_and_may_grow_to_what_fits():
    reference = load_preset("gemma-2-2b-layer17")
    # 24 * 2304^2 * 18 operations a token for the model; a step of 1,024 takes the host's 2.5 ms, not the device's 2.1.
    assert actor_rate(reference, GEMMA_2B) == pytest.approx(360e12 / (24 * 2304**2 * 18))
    assert trainer_rate(reference, GEMMA_2B) == pytest.approx(1024 / 2.5e-3)
    plan = make_plan(reference, [Node(64, 8)], GEMMA_2B)
    assert (plan.num_model_actors, plan.max_model_actors) == (3, 6)
    # With 4,096 the device's: one product, 8 rows of 2,304 for each of 48 entries a token, Adam.
    long = load_preset("gemma-2-2b-layer17-long")
    step = 2 * 4096 * 2304 * 4608 / 400e12 + (4096 * 48 * 8 * 2304 * 4 + 7 * 4 * 2 * 2304 * 4608) / 2e12
    assert trainer_rate(long, GEMMA_2B) == pytest.approx(4096 / step)
    assert make_plan(long, [Node(64, 8)], GEMMA_2B).num_model_actors == 4
    cheap = load_preset("gemma-2-2b-layer17", {"model": {"layer": 3}})
    plan = make_plan(cheap, [Node(64, 8)], GEMMA_2B)
    assert (plan.num_model_actors, plan.max_model_actors) == (1, 2)
    every_layer = load_preset("gemma-2-2b-layer17", {"model": {"layers": list(range(26))}})
    assert make_plan(every_layer, [Node(64, 8)], GEMMA_2B).num_model_actors == 1
    fixed = load_preset("gemma-2-2b-layer17", {"cluster": {"num_model_actors": 3}})
    plan = make_plan(fixed, [Node(64, 8)], GEMMA_2B)
    assert (plan.num_model_actors, plan.max_model_actors) == (3, 3)


@pytest.mark.parametrize(
    ("nodes", "lines"),
    [
        ([Node(2, 0)], ["plan for 1 node with 2 CPUs and 0 GPUs, on cpu", "trainers 1 0.5 0 2 share the node"]),
        ([Node(16, 1)], ["trainers 1 1 0.4 1 share the GPU", "model actors 1 1 0.6 1 share the GPU"]),
        (
            [Node(64, 8)],
            ["trainers 1 1 1 1 a GPU each", "model actors 3 to 6 1 1 1 a GPU each", "left over: 60 CPUs, 4 GPUs"],
        ),
        (
            [Node(64, 8)] * 4,
            ["plan for 4 nodes with 256 CPUs and 32 GPUs", "trainers 1 1 1 1 packed", "1 1 1 near the trainer"],
        ),
    ],
)
def test_a_plan_explains_itself_in_a_table(nodes, lines):
    text = make_plan(load_preset("gemma-2-2b-layer17"), nodes, GEMMA_2B).describe()
    flat = " ".join(text.split())
    assert all(line in flat for line in lines), text
    header, *rows = text.splitlines()[1:4]
    for word in ("processes", "CPUs each", "GPUs each", "threads each", "where"):
        column = header.index(word)
        assert all(row[column] != " " and row[column - 1] == " " for row in rows), text  # cells stand under their heads


def test_what_others_hold_is_no_room():
    tiny = load_preset("tiny")
    beside_service = make_plan(tiny, [Node(1.4, 0, held_cpus=0.6)], 32)
    assert beside_service.cpus() <= 1.4 < make_plan(tiny, [Node(1.4, 0, held_cpus=0.6).whole()], 32).cpus()
    assert make_plan(load_preset("smollm2-135m"), [Node(1.4, 0, held_cpus=0.6)], SMOLLM).num_model_actors == 2
    last = make_plan(load_preset("gemma-2-2b-layer17"), [Node(30, 1, held_cpus=34, held_gpus=7)], GEMMA_2B)
    assert (last.num_trainers, last.max_model_actors, last.trainer_gpus + last.actor_gpus) == (1, 1, 1)
    for free in (0.0, 0.05, 0.1):
        with pytest.raises(
            ConfigError, match=rf"the cluster has {free:g} CPUs .*, beside {2 - free:g} CPUs and 0 GPUs that"
        ):
            make_plan(tiny, [Node(free, 0, held_cpus=2 - free)], 32)
    gpus = load_preset("tiny", {"cluster": {"use_gpu": True}})
    with pytest.raises(ConfigError, match=r"the cluster has 0 GPUs, beside 8 CPUs and 8 GPUs that others hold"):
        make_plan(gpus, [Node(8, 0, held_cpus=8, held_gpus=8)], 32)
    with pytest.raises(ConfigError, match="the cluster has no node with CPUs"):  # such as a head of 0 CPUs alone
        make_plan(tiny, [], 32)


def test_work_stays_off_the_head_unless_it_is_needed_there():
    head, worker = Node(2, 0, True, "head"), Node(2, 0, False, "worker")
    tiny = load_preset("tiny")
    plan = make_plan(tiny, [head, worker])
    assert (plan.nodes, plan.label_selector) == ((worker,), {"ray.io/node-id": "!head"})
    assert make_plan(tiny, [head]).label_selector is None
    assert make_plan(load_preset("tiny", {"cluster": {"use_head": True}}), [head, worker]).label_selector is None
    assert make_plan(tiny, [Node(2, 1, True, "head"), worker]).device == "cuda"  # the only GPU is there
    fewer = load_preset("tiny", {"cluster": {"num_trainers": 2, "min_trainers": 1}})
    with pytest.raises(ConfigError, match=r"min_trainers=1: without the largest node 2 GPUs are left, and 2 .* need 3"):
        make_plan(fewer, [Node(8, 1)] * 3)
    assert make_plan(fewer, [Node(8, 1)] * 4).num_trainers == 2
    with pytest.raises(ConfigError, match=r"cluster\.min_trainers=1: .*--num-cpus=0, or set cluster\.use_head"):
        make_plan(fewer, [head, worker])
    with pytest.raises(ConfigError, match=r"cluster\.use_head is false, but the head is the only node"):
        make_plan(load_preset("tiny", {"cluster": {"use_head": False}}), [head])


def test_trainers_that_are_spread_leave_less_for_the_largest_model_actor():
    config = load_preset("tiny", {"cluster": {"num_trainers": 2, "num_model_actors": 1}})
    plan = make_plan(config, [Node(1, 0)] * 2)
    assert plan.spread
    assert plan.trainer_cpus + plan.actor_cpus <= 1
    elastic = make_plan(load_preset("tiny", {"cluster": {"num_trainers": 2, "min_trainers": 1}}), [Node(1, 0)] * 2)
    assert 1 // elastic.trainer_cpus == 1, "Ray Train would put both on the node that is left"


@pytest.mark.parametrize("left", [2, 1])
def test_a_plan_beside_running_trainers_leaves_room_for_an_actor(left):
    """Two trainers of a cluster of three small nodes, of which one is gone: both may be on the same node now."""
    config = load_preset("tiny", {"cluster": {"num_trainers": 2}})
    running = make_plan(config, [Node(1, 0)] * 3)
    plan = beside(make_plan(config, [Node(1, 0)] * left, num_trainers=2), running)
    assert plan.trainer_cpus == running.trainer_cpus
    assert plan.num_model_actors >= 1
    assert plan.actor_cpus + 2 * running.trainer_cpus <= 1 or left > 1


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        ({"use_gpu": True}, [Node(8, 0)], "cluster.use_gpu is true, but the cluster has 0 GPUs"),
        (
            {"num_trainers": 4, "num_model_actors": 8},
            [Node(64, 4)],
            "need .* 12 GPUs, the cluster has 64 CPUs and 4 GPUs",
        ),
        ({"num_trainers": 2}, [Node(16, 1)], "cluster.num_trainers=2 trainers need a GPU each, the cluster has 1 GPUs"),
        ({"num_trainers": 8, "num_model_actors": 90}, [Node(2, 0)], "cluster.num_model_actors=90 need"),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(overrides, nodes, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(load_preset("gemma-2-2b-layer17", {"cluster": overrides}), nodes)
