"""Keys, the table of routes, what may be asked at once, and what is said while nothing can be answered."""

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from serve_local import LocalControl, make_analysed_run, make_run, make_service, served

from mtc.storage import RunDirectory
from serve import keys as keys_command
from serve.contract import Encoded, Options, ReplicaMetrics, RunKey, ServiceError, Settings
from serve.http import ROUTES, check_binding, check_routes, create_app, keys
from serve.service import Models, Service

TODAY = datetime.now(UTC).date()
BODY = {"inputs": "Hello"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def user(file: Path) -> str:
    return keys.add_key(file, "someone", admin=False, expires=TODAY + timedelta(1))


@pytest.fixture(scope="module")
def admin(file: Path) -> str:
    return keys.add_key(file, "boss", admin=True, expires=None)


@pytest.fixture(scope="module")
def client(run: RunDirectory, file: Path, user: str, admin: str) -> Iterator[httpx.Client]:
    with served(run, api_keys_file=str(file)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_every_route_asks_for_its_key(client: httpx.Client, user: str, admin: str, method: str, path: str) -> None:
    level = ROUTES[method, path]
    address = path.replace("{feature}", "3").replace("{name:path}", "text.js" if "static" in path else "plots/l0.png")

    def status(headers: dict[str, str]) -> int:
        body = {"json": {}} if method in ("POST", "PUT") and "/ui" not in path else {}
        return client.request(method, address, headers=headers, **body).status_code

    assert (status({}) == 401) is (level != "public")
    for wrong in ("-", user[:-1], user + "x", user.upper(), f"{user} {user}", "\xfe", "mtc_" + "a" * 9000):
        headers = [("Authorization", f"Bearer {wrong}".encode("latin-1"))]
        assert (client.request(method, address, headers=headers).status_code == 401) is (level != "public"), wrong  # type: ignore[arg-type]
    for kind in ("Basic", "Token", "Bearer2"):
        assert (status({"Authorization": f"{kind} {user}"}) == 401) is (level != "public")
    assert (status(bearer(user)) == 403) is (level == "admin" or (path == "/ui/login" and method == "POST"))
    assert status(bearer(admin)) not in (401, 500) and (level != "admin" or status(bearer(admin)) != 403)


def test_what_is_not_listed_is_refused_too(client: httpx.Client, user: str) -> None:
    for path in ("/nothing", "/admin", "/admin/load/", "/ENCODE", "/%2fencode", "/ui/../admin/load", "/metrics/"):
        assert client.get(path).status_code == 401, path  # whoever has no key does not learn what there is
        assert client.get(path, headers=bearer(user), follow_redirects=False).status_code in (404, 405), path
    answer = client.get("/encode")
    assert answer.json()["error_type"] == "unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_table_is_the_application() -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/backdoor")
    def backdoor() -> str:
        return "open"

    with pytest.raises(ValueError, match=r"not in the table: .*backdoor.*not there: .*encode"):
        check_routes(app)


def test_keys_are_added_removed_and_expire(client: httpx.Client, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0)
    client.get("/healthz")
    now = [datetime(2030, 1, 2, 23, 59, 59, tzinfo=UTC)]
    monkeypatch.setattr(keys, "datetime", SimpleNamespace(now=lambda zone: now[0].astimezone(zone)))

    def status(key: str) -> int:
        return client.get("/info", headers=bearer(key)).status_code

    first = keys.add_key(file, "rotated", admin=False, expires=None)
    deadline = time.monotonic() + 10
    while status(first) != 200:  # the file is looked at again within a second
        assert time.monotonic() < deadline
    second = keys.add_key(file, "rotated", admin=False, expires=now[0].date())  # both hold while clients change over
    assert (status(first), status(second)) == (200, 200)
    expired = keys.add_key(file, "late", admin=True, expires=now[0].date() - timedelta(1))
    assert status(expired) == 401
    now[0] += timedelta(seconds=1)
    assert (status(first), status(second)) == (200, 401), "a key holds until its day's end"
    now[0] -= timedelta(seconds=1)
    before = file.read_bytes()
    file.write_bytes(b'{"keys": [')  # a file that can't be read leaves the keys from before
    assert (status(first), status(second)) == (200, 200)
    file.write_bytes(before)
    assert keys.remove_keys(file, "rotated", hashlib.sha256(first.encode()).hexdigest()[:12]) == 1
    assert (status(first), status(second)) == (401, 200)
    assert keys.remove_keys(file, "rotated") == 1
    assert (status(first), status(second)) == (401, 401)
    assert keys.remove_keys(file, "late") == 1
    assert first not in before.decode() and second not in before.decode()
    assert file.stat().st_mode & 0o077 == 0


def test_command_of_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run_command(*arguments: str) -> tuple[int, str]:
        code = keys_command.main([*arguments, "--file", str(tmp_path / "keys.json")])
        said = capsys.readouterr()
        return code, said.out + said.err

    status, key = run_command("add", "me", "--admin", "--expires", "2999-01-31")
    assert (status, key[:4]) == (0, "mtc_")
    assert keys.Keys(str(tmp_path / "keys.json")).check(key.strip())
    status, listed = run_command("list")
    assert status == 0 and listed.startswith("me ") and listed.endswith(" admin until 2999-01-31\n")
    assert key.strip() not in listed
    command = [sys.executable, "-m", "serve.keys", "remove", "you", "--file", str(tmp_path / "keys.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "removed 0\n")
    assert run_command("remove", "me") == (0, "removed 1\n")
    (tmp_path / "keys.json").write_text('{"keys": [{"name": "x", "sha256": "short"}]}')
    status, told = run_command("list")
    assert status == 2 and "keys.0.sha256" in told and "short" not in told


def test_cookies_work_for_this_services_own_pages_only(client: httpx.Client, user: str) -> None:
    origin = str(client.base_url).rstrip("/")
    form = {"key": user, "next": "/ui/features?group=0"}
    for wrong in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert client.post("/ui/login", data=form, headers=wrong).status_code == 403
    answer = client.post("/ui/login", data=form, headers={"Origin": origin})
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/features?group=0")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Path=/" in cookie and "Secure" not in cookie
    secure = client.post("/ui/login", data=form, headers={"Origin": origin, "X-Forwarded-Proto": "https"})
    assert "Secure" in secure.headers["set-cookie"]
    client.cookies.clear()

    sent = {"Cookie": cookie.split(";")[0]}
    assert client.get("/info", headers=sent).status_code == 200
    assert client.post("/encode", json=BODY, headers=sent).status_code == 401  # no word of where it came from
    for other in ("http://evil.example", "null", origin + ".evil.example", "http://127.0.0.1"):
        assert client.post("/encode", json=BODY, headers=sent | {"Origin": other}).status_code == 401, other
    assert client.post("/encode", json=BODY, headers=sent | {"Origin": origin}).status_code == 200
    for elsewhere in (
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nX: y",
        "",
    ):
        answer = client.post("/ui/login", data={"key": user, "next": elsewhere}, headers={"Origin": origin})
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui"), elsewhere
    client.cookies.clear()
    refused = client.post("/ui/login", data={"key": "wrong", "next": '"><script>'}, headers={"Origin": origin})
    assert refused.status_code == 401 and "<script>" not in refused.text and "set-cookie" not in refused.headers


def test_browsers_are_sent_to_log_in(client: httpx.Client) -> None:
    html = {"Accept": "text/html,application/xhtml+xml"}
    answer = client.get("/ui/feature/3?examples=5", headers=html)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login?next=/ui/feature/3%3Fexamples%3D5")
    assert client.get("/report", headers=html).status_code == 303
    assert client.get("/info", headers=html).status_code == 401
    assert client.get("/report").status_code == 401


def test_without_keys_only_this_machine_is_answered(run: RunDirectory) -> None:
    with served(run) as url, httpx.Client(base_url=url) as client:
        assert client.get("/info").status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
            answer = client.get("/info", headers={"Host": host})  # a name that was made to point here
            assert (answer.status_code, answer.json()["error_type"]) == (403, "no_keys"), host
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
            assert client.get("/info", headers={"Host": host}).status_code == 200
    check_binding("127.0.0.1", None)
    check_binding("0.0.0.0", "keys.json")
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(ValueError, match="API keys are needed"):
            check_binding(host, None)


def test_every_answer_has_the_headers(client: httpx.Client, user: str) -> None:
    wanted = {
        "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
        "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    }  # fmt: skip
    answers = [client.get("/healthz"), client.get("/nothing"), client.post("/encode", json=BODY, headers=bearer(user)),
               client.get("/features/3", headers=bearer(user))]  # fmt: skip
    for answer in answers:
        assert wanted.items() <= dict(answer.headers).items()
    for path in ("/ui", "/docs", "/ui/login", "/ui/feature/99"):
        policy = client.get(path, headers=bearer(user) | {"Accept": "text/html"}).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy


class SlowModels(Models):
    """Answer when they are told to."""

    def __init__(self, settings: Settings, metrics: ReplicaMetrics):
        super().__init__(settings, metrics)
        self.asked, self.go = 0, asyncio.Event()

    async def encode_windows(self, key: RunKey, windows: Any, options: Options) -> list[Encoded]:
        self.asked += 1
        await self.go.wait()
        return await super().encode_windows(key, windows, options)


def talk(service: Service) -> httpx.AsyncClient:
    """A client of the application in this event loop."""
    transport = httpx.ASGITransport(create_app(service), client=("127.0.0.1", 9))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)


def test_too_much_at_once_is_refused_unread(tmp_path: Path) -> None:
    async def check() -> None:
        service = make_service(LocalControl(make_run(tmp_path / "one")), SlowModels, max_concurrent_requests=2)
        models: Any = service.models
        async with talk(service) as client:
            waiting = [asyncio.create_task(client.post("/encode", json=BODY)) for _ in range(2)]
            while models.asked < 2:
                await asyncio.sleep(0)
            refused = await client.post("/encode", content=b"not even JSON")
            assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
            assert refused.json()["detail"] == {"limit": 2, "value": 3}
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200  # probes and pages are answered meanwhile
            assert (await client.get("/info")).status_code == 200
            models.go.set()
            assert [(await each).status_code for each in waiting] == [200, 200]
            assert (await client.post("/encode", json=BODY)).status_code == 200

    asyncio.run(check())


def test_late_models(tmp_path: Path) -> None:
    async def check() -> None:
        control = LocalControl(make_run(tmp_path / "one"))
        async with talk(make_service(control, SlowModels, request_timeout_s=0.05)) as client:
            late = await client.post("/encode", json=BODY)
            assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
            assert late.json()["detail"] == {"limit": 0.05}

    asyncio.run(check())


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
def test_the_time_limit_is_one_for_all_parts_of_a_request(tmp_path: Path, media_type: str) -> None:
    """Six parts, one after another, each well within the limit, all together beyond it."""

    class OneByOne(Models):
        free = asyncio.Lock()

        async def encode_windows(self, key: RunKey, windows: Any, options: Options) -> list[Encoded]:
            await self.load(key)  # that takes its time, too
            async with self.free:
                await asyncio.sleep(0.5)
            return await super().encode_windows(key, windows, options)

    async def check() -> None:
        control = LocalControl(make_run(tmp_path / "one"))
        service = make_service(control, OneByOne, request_timeout_s=2.0, max_batch_tokens=8)
        await service.models.load(service.state.current)
        async with talk(service) as client:
            short = await client.post("/encode", json={"inputs": ["abcdef"]}, headers={"Accept": media_type})
            assert short.status_code == 200 and "timeout" not in short.text
            late = await client.post("/encode", json={"inputs": ["abcdef"] * 6}, headers={"Accept": media_type})
            error = late.json() if media_type == "application/json" else json.loads(late.text.splitlines()[-1])
            assert (error["error_type"], error["detail"]) == ("timeout", {"limit": 2.0})

    asyncio.run(check())


def test_what_is_said_while_a_run_is_loaded(tmp_path: Path) -> None:
    class Loading(LocalControl):
        async def want(self, run_id: str) -> RunKey:
            raise ServiceError(503, "loading", f"run {run_id} is being loaded", headers={"Retry-After": "1"})

    async def check() -> None:
        async with talk(make_service(Loading(make_run(tmp_path / "one")))) as client:
            for path in ("/encode", "/tokenize"):
                answer = await client.post(path, json=BODY | {"model": "two"})
                assert (answer.status_code, answer.json()["error_type"]) == (503, "loading")
                assert answer.headers["retry-after"] == "1"
            page = await client.get("/ui", params={"model": "two"}, headers={"Accept": "text/html"})
            assert (page.status_code, page.headers["refresh"]) == (503, "2")
            assert "run two is being loaded" in page.text

    asyncio.run(check())


def test_readiness_is_a_real_pass_and_is_remembered(tmp_path: Path) -> None:
    class Broken(Models):
        passes, broken = 0, False

        async def encode_windows(self, key: RunKey, windows: Any, options: Options) -> list[Encoded]:
            self.passes += 1
            if self.broken:
                raise ServiceError(429, "overloaded", "too much waits")
            return await super().encode_windows(key, windows, options)

    async def check() -> None:
        service = make_service(LocalControl(make_run(tmp_path / "one")), Broken)
        models: Any = service.models
        async with talk(service) as client:
            assert [(await client.get("/readyz")).status_code for _ in range(5)] == [200] * 5
            assert models.passes == 1
        models.broken, service._ready = True, None
        async with talk(service) as client:
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["error"]) == (503, "not ready: too much waits")
            assert (await client.get("/healthz")).status_code == 200

    asyncio.run(check())


def test_what_nobody_expected_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Models):
        async def encode_windows(self, key: RunKey, windows: Any, options: Options) -> list[Encoded]:
            raise RuntimeError("secret detail")

    async def check() -> None:
        async with talk(make_service(LocalControl(make_run(tmp_path / "one")), Failing)) as client:
            answer = await client.post("/encode", json=BODY)
            assert (answer.status_code, answer.json()["error_type"]) == (500, "internal")
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
            assert "secret" not in answer.text and "secret" not in caplog.text
            assert f"request {answer.headers['x-request-id']} failed: RuntimeError at " in caplog.text

    asyncio.run(check())
