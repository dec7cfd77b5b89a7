"""A plan beside others, on a real Ray: what is free of it, who holds the rest, and how long that is waited for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from cluster import room
from cluster.room import ClusterBusy, PlacementWatch, cluster_nodes, plan_in_free_room, reserved
from mtc.config import ConfigError, load_preset
from mtc.joining import check_address


@contextmanager
def held(cpus: float) -> Iterator[None]:
    """CPUs that an actor holds, as a replica of the service does."""

    class Holder:
        def ready(self) -> None:
            pass

    actor = ray.remote(Holder).options(num_cpus=cpus, name=f"holds {cpus}", lifetime="detached").remote()
    ray.get(actor.ready.remote())
    try:
        yield
    finally:
        ray.kill(actor)


def tiny(**cluster):
    return load_preset("tiny", {"cluster": cluster})


@pytest.fixture(autouse=True)
def all_free(ray_cluster, monkeypatch):
    """2 CPUs, which no earlier test holds."""
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.1)
    wait_until(lambda: sum(node.cpus for node in cluster_nodes()) == 2)


def wait_until(true, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_beside_a_service_is_planned_in_what_it_leaves():
    alone = plan_in_free_room(tiny(), 32)
    with held(0.6):
        wait_until(lambda: cluster_nodes()[0].held_cpus == 0.6)
        plan = plan_in_free_room(tiny(), 32)
    assert alone.cpus() > 1.4, "this is what Ray would wait for"
    assert 0 < plan.cpus() <= 1.4 and plan.actor_cpus > 0
    assert plan.trainer_threads == alone.trainer_threads, "who sleeps costs no thread"
    assert "with 1.4 CPUs and 0 GPUs, beside 0.6 CPUs and 0 GPUs that others hold, on cpu" in plan.describe()


def test_who_holds_what_is_wanted_is_said_and_waited_for_in_bounded_time(monkeypatch):
    said = []
    monkeypatch.setattr(room, "say", lambda event, message: said.append((event, message)))
    with held(1.9):
        wait_until(lambda: cluster_nodes()[0].held_cpus == 1.9)
        with pytest.raises(ClusterBusy, match=r"the cluster has 0\.1 CPUs .*held are 1\.9 CPUs by .*holds 1\.9; stop"):
            plan_in_free_room(tiny(room_seconds=0.2), 32)
        with pytest.raises(ConfigError, match=r"cluster\.num_model_actors=90 need"):  # never fits, so no waiting
            plan_in_free_room(tiny(num_trainers=8, num_model_actors=90), 32)
        with (
            pytest.raises(ClusterBusy, match=r"no place, .*free are 0\.1 of 2 CPUs; held are 1\.9 CPUs by"),
            reserved({"CPU": 1}, 1, None, 0.2),
        ):
            pass
    ((event, message),) = said[:1]
    assert event == "waiting" and "holds 1.9" in message
    over = threading.Event()

    def leave() -> None:
        with held(1.95):
            over.set()
            wait_until(lambda: len(said) > 1)

    other = threading.Thread(target=leave)
    other.start()
    over.wait(60)
    wait_until(lambda: cluster_nodes()[0].held_cpus > 1.9)
    assert plan_in_free_room(tiny(room_seconds=60), 32).cpus() > 1.4
    other.join()


def test_trainers_without_a_place_end_the_job_in_bounded_time():
    plan = plan_in_free_room(tiny(), 32)
    group = placement_group([{"CPU": 0.5}])
    watch = PlacementWatch(plan, limit=0.3)
    assert group.wait(60)
    wait_until(lambda: watch.look() is None)
    remove_placement_group(group)
    group = placement_group([{"CPU": 8}])
    try:
        with pytest.raises(
            ClusterBusy, match=r"the trainers have no place, .*: 1 x \(0\.5 CPUs and 0 GPUs\) are wanted"
        ):
            wait_until(lambda: watch.look() is not None)
    finally:
        remove_placement_group(group)


def test_the_address_of_a_head_that_answers_is_accepted(ray_cluster):
    check_address(ray.get_runtime_context().gcs_address, "RAY_ADDRESS")
