"""A service that was told to serve a name: it follows it, outlives what is wrong with it, says so, and comes back."""

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import prometheus
import pytest
import yaml
from serve_local import LocalControl, key_of, make_run, make_service, serving

from mtc.storage import RunDirectory, RunError, open_run, promote, roll_back
from serve.contract import NO_REPLICA, Problem, Settings, State
from serve.deployments import Control
from serve.service import Catalogue

RULES = Path(__file__).parents[2] / "k8s" / "monitoring" / "rules.yaml"
NO_MEMORY = Problem.of(MemoryError("no memory for /home/me/model"))


class Replicas:
    """Takes the place of the replicas: which runs they can't load, and what they are told."""

    def __init__(self, *states: State):
        self.states, self.broken, self.absent = states, dict[str, Problem](), False

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        if method in ("state", "totals"):
            return list(self.states) if method == "state" else []
        before = [NO_REPLICA if method == "load" else None]  # of the deployment before, which knows of none of these
        return before if self.absent else [*before, self.broken.get(arguments[1].run_id) if method == "load" else None]


async def start(run: Path, replicas: Replicas | None = None) -> Any:
    cls: Any = Control.func_or_class
    control = cls.__new__(cls)
    control._broadcast = replicas or Replicas()
    await control.__init__(Settings(run=str(run), watch_seconds=0.01), "this")
    return control


async def until(control: Any, reached: Callable[[State], bool]) -> State:
    async with asyncio.timeout(60):
        while not reached(state := await control.state()):
            await asyncio.sleep(0.01)
    return state


def answers(run_id: str, problem: bool = False) -> Callable[[State], bool]:
    return lambda state: state.current.run_id == run_id and (state.problem is not None) is problem


def make_promoted(root: Path, *names: str) -> None:
    for seed, name in enumerate(names, 3):
        make_run(root / name, seed)
        promote(open_run(str(root / name)), "production")


def damage(root: Path, name: str) -> Callable[[], Any]:
    """Damages a run's weights; what repairs them."""
    weights = root / name / "transcoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return lambda: weights.write_bytes(whole)


def test_a_service_follows_its_alias_and_what_is_published_changes_nothing(tmp_path: Path) -> None:
    make_promoted(tmp_path, "a", "b")

    async def scenario() -> None:
        control = await start(tmp_path / "production")
        assert answers("b")(await control.state())
        make_run(tmp_path / "newest", 9)
        assert roll_back(str(tmp_path), "production").alias.run_id == "a"
        await until(control, answers("a"))
        assert (await control.load("this", "newest")).previous == "a"
        await asyncio.sleep(0.1)  # it looks at the alias some ten times
        assert answers("newest")(await control.state()), "what an operator loaded stays"
        assert (await control.load("this", "production")).model.run_id == "a"
        promote(open_run(str(tmp_path / "newest")), "production")
        await until(control, answers("newest"))

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["record", "gone", "damaged", "replicas"])
def test_what_can_not_be_served_leaves_what_answers_until_it_can(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_promoted(tmp_path, "a")
    make_run(tmp_path / "b", 7)
    record = tmp_path / "aliases" / "production.json"
    words = {
        "record": "production.json is no alias", "gone": "no run at b", "replicas": "MemoryError",
        "damaged": "transcoder.safetensors is damaged",
    }  # fmt: skip

    async def scenario() -> None:
        replicas = Replicas()
        control = await start(tmp_path / "production", replicas)
        b = open_run(str(tmp_path / "b"))
        if what == "record":
            record.write_text('{"run_id": ')
            repair: Callable[[], Any] = lambda: promote(b, "production")  # noqa: E731
        else:
            promote(b, "production")
        if what == "gone":
            (tmp_path / "b").rename(tmp_path / "elsewhere")
            repair = lambda: (tmp_path / "elsewhere").rename(tmp_path / "b")  # noqa: E731
        elif what == "damaged":
            repair = damage(tmp_path, "b")
        elif what == "replicas":
            replicas.broken["b"] = NO_MEMORY
            repair = replicas.broken.clear
        state = await until(control, answers("a", problem=True))
        assert (
            state.problem and state.problem.startswith("production can't be served: ") and words[what] in state.problem
        )
        assert str(tmp_path) not in state.problem, "it is shown to all who may ask"
        restarted = await start(tmp_path / "production", Replicas(state))  # Control alone
        assert await restarted.state() == state
        repair()
        state = await until(control, answers("b"))
        assert state.seen == state.current

    asyncio.run(scenario())
    said = [record.message for record in caplog.records if "meanwhile run a answers" in record.message]
    assert len(said) >= 1 and "production can be served again" in caplog.text


@pytest.mark.parametrize("what", ["record", "gone", "damaged"])
def test_at_a_start_the_last_usable_run_of_the_name_answers(tmp_path: Path, what: str) -> None:
    make_promoted(tmp_path, "a", "b", "c", "d")
    roll_back(str(tmp_path), "production")  # from d, which is bad, to c
    repair = damage(tmp_path, "c")
    if what == "record":
        (tmp_path / "aliases" / "production.json").write_text("")
        repair()
    elif what == "gone":
        RunDirectory(str(tmp_path / "c")).remove()
        damage(tmp_path, "b")
    expected = {"record": "c", "gone": "a", "damaged": "b"}[what]

    async def scenario() -> None:
        control = await start(tmp_path / "production")
        assert answers(expected, problem=True)(await control.state())
        if what == "damaged":
            repair()
            await until(control, answers("c"))

    asyncio.run(scenario())


def test_of_latest_the_newest_finished_run_that_can_be_served_answers(tmp_path: Path) -> None:
    for seed, (name, created) in enumerate({"old": 1, "new": 2, "newest": 3}.items(), 3):
        run = make_run(tmp_path / name, seed)
        manifest = run.manifest().model_copy(update={"created": f"2026-01-0{created}T00:00:00+00:00"})
        run.write("manifest.json", manifest.model_dump_json())
    repair = damage(tmp_path, "newest")

    async def scenario() -> None:
        control = await start(tmp_path / "latest")
        assert answers("new", problem=True)(await control.state())
        repair()
        await until(control, answers("newest"))
        for name in ("old", "new", "newest"):
            damage(tmp_path, name)
        with pytest.raises(RunError, match=r"newest: transcoder\.safetensors is damaged"):
            await start(tmp_path / "latest")

    asyncio.run(scenario())


def test_a_run_that_no_replica_can_load_at_a_start_is_given_up(tmp_path: Path) -> None:
    make_promoted(tmp_path, "a", "b")
    a, b = (key_of(RunDirectory(str(tmp_path / name))) for name in "ab")

    async def scenario() -> None:
        replicas = Replicas()
        replicas.broken["b"], replicas.absent = NO_MEMORY, True  # those that start are not there yet
        control = await start(tmp_path / "production", replicas)
        state = await control.give_up("this", b, NO_MEMORY)
        assert (state.current, state.loaded, state.seen) == (a, (a,), a)
        assert state.problem == "production can't be served: MemoryError"
        assert await control.give_up("before", a, NO_MEMORY) == state, "another deployment's"
        assert (await control.give_up("this", a, NO_MEMORY)).current == a, "there is no other"
        await asyncio.sleep(0.1)  # it looks some ten times, and learns nothing of the run
        assert await control.state() == state
        replicas.absent = False
        replicas.broken.clear()
        await until(control, answers("b"))
        # A replica that comes later may lack what the others have: they go on.
        replicas.states = (await control.state(),)
        assert (await control.give_up("this", b, NO_MEMORY)).current == b

    asyncio.run(scenario())


def test_metric_and_alert_last_as_long_as_the_condition(tmp_path: Path) -> None:
    make_promoted(tmp_path, "a")
    pages: list[str] = []

    async def scenario() -> None:
        control = await start(tmp_path / "production")
        pages.append((await control.metrics()).decode())
        make_promoted(tmp_path, "b")
        repair = damage(tmp_path, "b")
        await until(control, lambda state: state.problem is not None)
        pages.append((await control.metrics()).decode())
        repair()
        await until(control, lambda state: state.problem is None and state.current.run_id == "b")
        pages.append((await control.metrics()).decode())

    asyncio.run(scenario())
    series = [
        line.rpartition(" ") for page in pages for line in page.splitlines() if line.startswith("mtc_served_name")
    ]
    assert [(name, value) for name, _, value in series] == [
        ('mtc_served_name_usable{served="production"}', value) for value in ("1.0", "0.0", "1.0")
    ]
    if not prometheus.found():
        pytest.skip("Debian's prometheus is not installed")
    values = " ".join(f"{float(value):g}+0x20" for *_, value in series)  # 21 minutes of each
    firing = {
        "exp_labels": {"served": "production", "severity": "warning"},
        "exp_annotations": {
            "summary": "production can't be served and another run answers in its place. GET /readyz says why.",
            "runbook_url": "https://mtc.example.org/runbooks/#mtcrununusable",
        },
    }
    checks = [
        {"eval_time": f"{minute}m", "alertname": "MtcRunUnusable", "exp_alerts": [firing] * (21 <= minute < 42)}
        for minute in (0, 20, 21, 30, 41, 42, 60)
    ]
    test = {"interval": "1m", "input_series": [{"series": series[0][0], "values": values}], "alert_rule_test": checks}
    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("root", "error", "shown"),
    [
        ("memory://mine/runs", RunError("no run at memory://mine/runs/b"), "no run at b"),
        ("memory://mine/runs", RunError("b: FileNotFoundError: mine/runs/b/x.json"), "b: FileNotFoundError: b/x.json"),
        ("memory://mine/runs", RunError("no finished run in memory://mine/runs"), "no finished run in ..."),
        ("memory://mine/runs", RunError("no finished run in mine/runs: empty"), "no finished run in ...: empty"),
        ("/data/runs", RunError("/data/runs/b: m.json is damaged"), "b: m.json is damaged"),
        ("/data/runs", RunError("file:///data/runs/b: m.json is damaged"), "b: m.json is damaged"),
        ("file:///data/runs", RunError("/data/runs/b: m.json is damaged"), "b: m.json is damaged"),
        ("/data/runs", RunError("no /mnt/data/runs/b, (~/.cache/hub) or https://me:key@host/x: gone"),
         "no ..., (...) or ...: gone"),
        ("/data/runs", RunError("google/gemma-2-2b and/or 1 / 2"), "google/gemma-2-2b and/or 1 / 2"),
        ("/data/runs", OSError("/home/me/.cache/hub/x.json is no file"), "OSError"),
    ],
)  # fmt: skip
def test_what_all_may_read_names_no_place(root: str, error: Exception, shown: str) -> None:
    assert Catalogue(f"{root}/b").words(Problem.of(error)) == f"b can't be served: {shown}"


def test_readyz_says_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 3)
    control = LocalControl(run)
    service = make_service(control)
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.post("/encode", json={"inputs": "a"}).raise_for_status()  # the models are loaded
        assert client.get("/readyz").json() == {"status": "ready"}
        service.use(control.state._replace(version=2, problem="production can't be served: no run at b"))
        answer = client.get("/readyz")
        assert answer.status_code == 200, "it answers"
        detail = "production can't be served: no run at b; meanwhile run a answers"
        assert json.loads(answer.text) == {"status": "ready", "detail": detail}
        assert client.get("/healthz").json() == {"status": "ok"}
