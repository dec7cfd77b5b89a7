"""What the control knows after a restart, without Ray: replicas that outlived it say what they answer with."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from serve_local import key_of, make_layers_run, make_run

from mtc.config import load_preset, to_yaml
from mtc.storage import RunDirectory, StorageError
from serve.contract import ServiceError, Settings, State
from serve.deployments import Control, server
from serve.deployments import control as deployed


class Told:
    """Takes the place of the replicas: what they say of their state, and what they are told."""

    def __init__(self, *states: State):
        self.states, self.used = states, list[State]()

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        if method == "state":
            return list(self.states)
        if method == "use":
            self.used.append(arguments[0])
        return [None]


async def start(run: Path, replicas: Told) -> Any:
    cls: Any = Control.func_or_class
    control = cls.__new__(cls)
    control._broadcast = replicas
    await control.__init__(Settings(run=str(run), watch_seconds=0.01), "this")
    return control


def test_a_restart_is_told_from_another_deployment(tmp_path: Path) -> None:
    c, a = (key_of(make_run(tmp_path / name, seed)) for name, seed in (("c", 5), ("a", 3)))

    async def scenario() -> None:
        fresh = State("this", 1, a, (a,), a)
        swapped = fresh._replace(version=4, current=c, loaded=(c, a))
        assert await (await start(tmp_path / "latest", Told())).state() == fresh
        for others in ([swapped], [fresh, swapped], [swapped._replace(deployment="before", version=9), swapped]):
            control = await start(tmp_path / "latest", Told(*others))
            assert await control.state() == swapped
            await asyncio.sleep(0.1)  # it looks at `latest`, which names what it did
            assert await control.state() == swapped
        control = await start(tmp_path / "latest", Told(swapped._replace(deployment="before")))
        assert await control.state() == fresh
        # A replica of the deployment before reports until it has stopped.
        assert await control.report("old", (), swapped._replace(deployment="before"), ()) == fresh
        assert await control.report("new", (), swapped, ()) == swapped
        # Nor is anything decided for its clients, who would be told of what its replicas do not have.
        for refused in (
            await control.want("before", "c"),
            await control.load("before", "c"),
            await control.runs("before"),
        ):
            assert (refused.status, refused.error_type) == (503, "unavailable")
            assert refused.headers == {"Retry-After": "5"}
        assert await control.state() == swapped
        assert await control.want("this", "c") == c

    asyncio.run(scenario())


def test_of_several_layers_one_run_is_listed_and_of_a_sweep_each_transcoder(tmp_path: Path) -> None:
    """A layer that is asked for alone is listed beside its run while it is in memory."""
    make_layers_run(tmp_path / "deep", (2, 0))
    make_run(tmp_path / "a", 3)
    swept = RunDirectory(str(tmp_path / "swept"))
    config = load_preset("tiny", {"sweep": [{"transcoder.k": 4}, {"transcoder.k": 2}]})
    swept.write("config.yaml", to_yaml(config))
    for own in swept.members().values():
        make_run(Path(own.url), 5)
        (Path(own.url) / "manifest.json").unlink()
        own.publish(latest=False)
    swept.publish()

    async def scenario() -> None:
        control = await start(tmp_path / "deep", Told())
        listed = {run.run_id: (run.layers, run.state) for run in await control.runs("this")}
        assert listed == {
            "deep": ([0, 2], "current"), "a": ([1], "not_loaded"), "swept/k4": ([1], "not_loaded"),
            "swept/k2": ([1], "not_loaded"),
        }  # fmt: skip
        for refused in (await control.want("this", "swept"), await control.load("this", "swept")):
            assert (refused.status, refused.error_type) == (404, "unknown_model")
            assert refused.detail == {"models": ["swept/k4", "swept/k2"]} and "swept/k4, swept/k2" in refused.message
        assert (await control.load("this", "deep/layer2")).layers == [2]
        states = {run.run_id: run.state for run in await control.runs("this")}
        assert (states["deep"], states["deep/layer2"], len(states)) == ("loaded", "current", 5)
        back = await control.load("this", "deep")
        assert (back.layers, back.model.layer, back.previous) == ([0, 2], 0, "deep/layer2")

    asyncio.run(scenario())


def test_a_control_that_does_not_answer_is_waited_for_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        """A handle of a deployment that does not start."""

        def __getattr__(self, method: str) -> Any:
            return self

        def remote(self, *arguments: Any) -> Any:
            return asyncio.Event().wait()

    for name in ("CONTROL_TIMEOUT_S", "LOAD_TIMEOUT_S", "START_TIMEOUT_S"):
        monkeypatch.setattr(server, name, 0.01)
    silent: Any = Silent()
    control = server.RemoteControl(silent, "this")

    async def scenario() -> None:
        async with asyncio.timeout(60):
            for asked in (control.want("c"), control.load("c"), control.runs(), control.metrics()):
                with pytest.raises(ServiceError, match="does not answer now") as refused:
                    await asked
                assert (refused.value.status, refused.value.error_type) == (503, "unavailable")
                assert refused.value.headers == {"Retry-After": "5"}
            with pytest.raises(TimeoutError, match="no answer from Control"):
                await server._in_time(server._decided(silent, "this"))

    asyncio.run(scenario())


def test_what_was_published_while_there_was_no_control_takes_over(tmp_path: Path) -> None:
    a = key_of(make_run(tmp_path / "a", 3))
    b = key_of(make_run(tmp_path / "b", 5))  # and `latest` names it

    async def scenario() -> None:
        replicas = Told(State("this", 1, a, (a,), a))
        control = await start(tmp_path / "latest", replicas)
        assert (await control.state()).current == a
        async with asyncio.timeout(60):
            while not replicas.used:
                await asyncio.sleep(0.01)
        assert await control.state() == replicas.used[-1] == State("this", 2, b, (b, a), b)

    asyncio.run(scenario())


def test_what_an_operator_loads_stays_though_replicas_reported_while_a_published_run_came(tmp_path: Path) -> None:
    """They know nothing then of what the control has seen, and what they say must not make it see that again."""
    other = key_of(make_run(tmp_path / "other", 7))
    a = key_of(make_run(tmp_path / "a", 3))
    before = State("this", 1, a, (a,), a)
    control: Any = None

    class Reporting(Told):
        async def __call__(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
            if method == "load":
                await control.report("replica", (), self.used[-1] if self.used else before, ())
            return await super().__call__(method, *arguments, **options)

    async def scenario() -> None:
        nonlocal control
        replicas = Reporting()
        control = await start(tmp_path / "latest", replicas)
        assert await control.state() == before
        b = key_of(make_run(tmp_path / "b", 5))  # and `latest` names it
        async with asyncio.timeout(60):
            while (await control.state()).current != b:
                await asyncio.sleep(0.01)
        answer = await control.load("this", "other")
        assert answer.previous == "b"
        loaded = await control.state()
        assert (loaded.current, loaded.seen) == (other, b)
        assert [state.version for state in replicas.used] == sorted({state.version for state in replicas.used})
        await asyncio.sleep(0.1)  # it looks at `latest` some ten times
        assert await control.state() == loaded

    asyncio.run(scenario())


def test_an_operator_gets_what_is_published_now_though_an_older_reading_has_not_ended(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3)
    began, end, readings = threading.Event(), threading.Event(), list[Any]()

    async def scenario() -> None:
        replicas = Told()
        control = await start(tmp_path / "latest", replicas)
        served = control._catalogue.served

        def slow() -> Any:
            readings.append(found := served())
            if len(readings) == 1:  # the watcher's
                began.set()
                end.wait(60)
            return found

        control._catalogue.served = slow
        assert await asyncio.to_thread(began.wait, 60)
        b = key_of(make_run(tmp_path / "b", 5))  # and `latest` names it
        assert (await control.load("this", "latest")).model.run_id == "b"
        end.set()
        async with asyncio.timeout(60):
            while len(readings) < 5:
                await asyncio.sleep(0.01)
        assert {state.current for state in replicas.used} == {b}

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [OSError("bucket/runs/b"), StorageError("no credentials")])
def test_storage_that_fails_is_told_and_nothing_changes(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "a", 3)
    make_run(tmp_path / "b", 5)

    def fail(*arguments: Any) -> Any:
        raise error

    async def scenario() -> None:
        control = await start(tmp_path / "a", Told())
        before = await control.state()
        with monkeypatch.context() as patch:
            patch.setattr(deployed, "identities_of", fail)
            refused = [await control.load("this", "b")]
        control._catalogue.find = control._catalogue.entries = fail
        refused += [await control.load("this", "b"), await control.want("this", "b"), await control.runs("this")]
        for each in refused:
            assert (each.status, each.error_type) == (503, "storage") and "bucket" not in each.message
        assert await control.state() == before

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["manifest", "header", "weights"])
def test_a_run_of_damaged_files_is_refused_and_nothing_changes(tmp_path: Path, what: str) -> None:
    make_run(tmp_path / "a", 3)
    run = make_run(tmp_path / "b", 5)
    if what == "manifest":  # of the format, without its fields
        run.write("manifest.json", json.dumps({"format_version": run.manifest().format_version}))
    elif what == "header":
        run.write("transcoder.safetensors", b"\xff" * 1000)
    else:
        run.remove("transcoder.safetensors")

    async def scenario() -> None:
        control = await start(tmp_path / "a", Told())
        before = await control.state()
        refused = await control.load("this", "b")
        assert (refused.status, refused.error_type) == (409, "run_unusable")
        assert await control.state() == before

    asyncio.run(scenario())
