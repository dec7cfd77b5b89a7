"""The cluster of `nodes.py` is what it claims: separate addresses and disks, one shared directory, a token, a death."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.nodes import RealCluster, available, real_cluster

pytestmark = pytest.mark.chaos

ALIVE = """
import json, ray
ray.init("auto", log_to_driver=False)
print("JSON" + json.dumps([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]))
"""
WRITE = """
import json, os, sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init("auto", log_to_driver=False)

@ray.remote(num_cpus=1)
def write(address, directories):
    for directory in directories:
        open(os.path.join(directory, address), "w").close()

@ray.remote(num_cpus=1)
def read(directories):
    return [sorted(os.listdir(directory)) for directory in directories]

nodes = {node["NodeManagerAddress"]: On(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]}
ray.get([write.options(scheduling_strategy=on).remote(address, sys.argv[1:]) for address, on in nodes.items()])
found = {address: read.options(scheduling_strategy=on).remote(sys.argv[1:]) for address, on in nodes.items()}
print("JSON" + json.dumps({address: ray.get(listings) for address, listings in found.items()}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    if reason := available():
        pytest.skip(reason)
    with real_cluster(tmp_path_factory.mktemp("cluster"), token="0123456789abcdef" * 4) as cluster:
        yield cluster


def python(cluster: RealCluster, script: str, *arguments: str | Path) -> list[str] | dict[str, list[list[str]]]:
    result = cluster.run(["python", "-c", script, *map(str, arguments)])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()  # Ray prints the deaths of nodes among them
    return json.loads(next(line for line in lines if line.startswith("JSON")).removeprefix("JSON"))


def wait_for(cluster: RealCluster, addresses: list[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (found := sorted(python(cluster, ALIVE))) != addresses:
        assert time.monotonic() < deadline, found


def submit(cluster: RealCluster, env: dict[str, str | None]) -> tuple[bool, str]:
    command = ["ray", "job", "submit", "--address", f"http://{cluster.addresses[0]}:8265"]
    result = cluster.run([*command, "--", "python", "-c", "print('o' + 'k')"], env=env)
    assert (result.returncode == 0) == ("ok" in result.stdout.splitlines())
    return result.returncode == 0, result.stdout + result.stderr


def test_three_nodes_with_addresses_of_their_own(cluster: RealCluster) -> None:
    assert len(set(cluster.addresses)) == 3
    assert sorted(python(cluster, ALIVE)) == cluster.addresses
    networks = {os.readlink(f"/proc/{pid}/ns/net") for node in range(3) for pid in cluster.pids(node)}
    assert len(networks) == 3 and os.readlink("/proc/self/ns/net") not in networks


def test_only_the_shared_directory_is_shared(cluster: RealCluster) -> None:
    found = python(cluster, WRITE, cluster.private, cluster.shared, cluster.home, "/tmp")
    assert isinstance(found, dict) and set(found) == set(cluster.addresses)
    for address, (private, shared, home, temporary) in found.items():
        assert private == [address]
        assert shared == cluster.addresses
        for listing in (home, temporary):
            assert set(listing) & set(cluster.addresses) == {address}
    assert sorted(os.listdir(cluster.shared)) == cluster.addresses  # on the host
    assert not cluster.private.exists()


def test_jobs_need_the_token(cluster: RealCluster) -> None:
    accepted, output = submit(cluster, {})
    assert accepted, output
    accepted, output = submit(cluster, {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None})
    assert not accepted and "Unauthorized: Missing authentication token" in output  # HTTP 401
    accepted, output = submit(cluster, {"RAY_AUTH_TOKEN": "wrong"})
    assert not accepted and "Forbidden: Invalid authentication token" in output  # HTTP 403


def test_a_timeout_kills_the_command_on_the_node(cluster: RealCluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["sleep", "1234"], node=1, timeout=1)
    time.sleep(0.2)
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in cluster.pids(1)]
    assert commands and b"sleep\x001234\x00" not in commands


def test_a_cut_node_is_out_of_reach_until_mended(cluster: RealCluster) -> None:
    def reached() -> bool:
        connect = f"import socket; socket.create_connection(({cluster.addresses[0]!r}, 6379), timeout=3)"
        return cluster.run(["python", "-c", connect], node=1).returncode == 0

    assert reached()
    cluster.cut(1)
    assert not reached()
    cluster.mend(1)
    assert any(reached() for _ in range(5))  # the first attempt may find an unanswered ARP request
    assert sorted(python(cluster, ALIVE)) == cluster.addresses


def test_a_killed_node_dies_and_comes_back_empty(cluster: RealCluster) -> None:
    (cluster.root(2) / str(cluster.private / "lost").lstrip("/")).touch()
    pids = cluster.pids(2)
    cluster.kill_node(2)
    assert pids and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    wait_for(cluster, cluster.addresses[:2], timeout=60)
    cluster.start_node(2)
    wait_for(cluster, cluster.addresses, timeout=30)
    assert cluster.run(["ls"], node=2, check=True).stdout == ""
