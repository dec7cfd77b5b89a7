"""One local Ray for the whole session; models and token stores in a cache of the session's own.

With `-n` (pytest-xdist), what uses the session's Ray stays in one process and each other file in one, so that modules'
fixtures are made once; what takes longest starts first.
"""

import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.local_ray import make_temporary_directory
from serve.contract import ENVIRONMENT, free_ports, proxy_files

os.environ.update(RAY_AUTH_MODE="disabled", OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", HF_HUB_OFFLINE="1")
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE"):  # of a Ray that is not ours
    os.environ.pop(name, None)
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # what forgets to ask for `ray_cluster` fails, and joins no other Ray
# After a second, Ray would end idle processes that the next test's tasks can use, and start as many anew.
os.environ.update(RAY_idle_worker_killing_time_threshold_ms="10000")
# How often Ray's own daemons look at processes and log files, which otherwise takes a tenth of two cores.
os.environ.update(REPORTER_UPDATE_INTERVAL_MS="10000", LOG_NAME_UPDATE_INTERVAL_S="5")
os.environ.update(ENVIRONMENT)
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
os.environ.update(free_ports())  # another Ray on this machine may have the usual ones
# Of processes that tests fork. torch imports the last two by itself when DDP or an optimizer first works.
PRELOADED = ["cluster.training", "cluster.resume", "cluster.batches", "mtc.training.trainer", "torch._dynamo", "sympy"]
multiprocessing.set_forkserver_preload(PRELOADED)


@cache
def shares_ray(file: Path) -> bool:
    return "ray_cluster" in file.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> tuple[bool, bool]:
        return not shares_ray(item.path), item.get_closest_marker("slow") is None

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Not xdist's own groups: those of 3.8 do nothing with pytest 9.2, and say nothing."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "those that share Ray" if shares_ray(config.rootpath / file) else file

    config.option.loadscopereorder = False  # it would start with the file that has most tests
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    path.mkdir(exist_ok=True)
    os.environ["MTC_CACHE"] = str(path)
    return path


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Programs that tests call in this process set up its logs and what SIGTERM does; both are put back."""
    from mtc.telemetry.logs import EVENTS

    before = [(logger, logger.handlers[:], logger.level) for logger in (EVENTS, logging.getLogger())]
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture(scope="session")
def ray_cluster(cache_directory: Path) -> Iterator[Any]:
    import ray

    temporary = make_temporary_directory()
    os.environ.update(proxy_files(temporary))
    context = ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=120_000_000,  # small: streams must not depend on room
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=temporary,
    )
    yield context
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)
