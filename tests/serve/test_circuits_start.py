"""The start of the process of graphs and interventions, without Ray."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve_local import key_of, make_analysed_run

from serve.contract import GraphRequest, Settings
from serve.deployments import Circuits


def test_it_starts_though_the_named_run_can_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control may have given that run up, and let another one answer."""
    run = make_analysed_run(tmp_path / "a")
    monkeypatch.setattr("serve.deployments.circuits._use_threads", lambda settings: None)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="replica"))
    monkeypatch.setattr("serve.deployments.circuits.ray_serve.get_replica_context", lambda: context)
    opened: list[Any] = []

    def fail(self: Any, key: Any) -> None:
        opened.append(key)
        raise MemoryError("no memory")

    monkeypatch.setattr("serve.service.Circuits.open", fail)

    async def scenario() -> None:
        cls: Any = Circuits.func_or_class
        for name in ("a", "gone"):
            started = cls.__new__(cls)
            await started.__init__(Settings(run=str(tmp_path / name), interventions=True), "this")
            asked = GraphRequest(prompt="Hello")
            job = await started.submit("this", key_of(run), asked, "somebody")
            assert job.state in ("queued", "loading", "running"), "the run is loaded on demand"

    asyncio.run(scenario())
    assert opened == [key_of(run)]
