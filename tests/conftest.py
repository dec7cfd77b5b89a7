"""One local Ray for the whole session; models and token stores in a cache of the session's own."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local_ray import make_temporary_directory
from serve.contract import ENVIRONMENT, free_ports, proxy_files

os.environ.update(RAY_AUTH_MODE="disabled", OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", HF_HUB_OFFLINE="1")
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE"):  # of a Ray that is not ours
    os.environ.pop(name, None)
os.environ.update(ENVIRONMENT)
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
os.environ.update(free_ports())  # another Ray on this machine may have the usual ones


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    os.environ["MTC_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def ray_cluster(cache_directory: Path) -> Iterator[Any]:
    import ray

    temporary = make_temporary_directory()
    os.environ.update(proxy_files(temporary))
    context = ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=120_000_000,  # small: streams must not depend on room
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        _temp_dir=temporary,
    )
    yield context
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)
