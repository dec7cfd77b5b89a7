"""The few routes of the Hugging Face hub's API that huggingface_hub asks when it pushes and reads model repositories,
as a local server with repositories in memory. Written from that library's calls, not from mtc's."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_this-is-a-secret"
OWNER = "somebody"


class Repository(NamedTuple):
    private: bool
    commits: dict[str, dict[str, bytes]]
    """Files by commit id, oldest first."""

    @property
    def files(self) -> dict[str, bytes]:
        return list(self.commits.values())[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        said = json.dumps([len(self.commits), {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}])
        self.commits[(sha := hashlib.sha1(said.encode()).hexdigest())] = files
        return sha


class Hub:
    """`answers` replaces answers: (method, part of the path) -> (status, headers)."""

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}
        self.answers: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}

    def asked(self, method: str, part: str) -> list[str]:
        return [path for done, path in self.requests if done == method and part in path]

    def create(self, name: str, files: dict[str, bytes], private: bool = True) -> Repository:
        self.repositories[name] = Repository(private, {})
        self.repositories[name].commit({".gitattributes": b"*.bin filter=lfs\n"} | files)
        return self.repositories[name]


@contextmanager
def local_hub() -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: no wait for the first one to be acknowledged

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for (method, part), (status, headers) in self.hub.answers.items():
            if method == self.command and part in path:
                return self._send(status, b"{}", headers)
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not signed:
            return self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self._json({"name": OWNER, "type": "user"}) if signed else self._send(401, b"{}")
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body), signed)
        if path.startswith("/uploads/"):
            self.hub.uploads[path.rpartition("/")[2]] = body
            return self._send(200, b"")
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            objects = [o | {"actions": {"upload": {"href": f"{self.hub.url}/uploads/{o['oid']}"}}} for o in asked]
            return self._json({"objects": objects, "transfer": "basic"})
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)/([^/]+)(?:/(.*))?)?", path)
        repository = self.hub.repositories.get(found[1]) if found else None
        if not found or repository is None or (repository.private and not signed):
            return self._send(404 if signed else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        verb, revision, rest = found[2] or "revision", found[3] or "main", found[4] or ""
        files = repository.files if revision == "main" else repository.commits.get(revision)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return getattr(self, f"_{verb}")(found[1], repository, files, rest, body)

    def _validate(self, content: str) -> None:
        wrong = "license: nonsense" in content
        self._json(
            {"errors": [{"message": '"license" must be one of [apache-2.0, mit]'}] * wrong}, 400 if wrong else 200
        )

    def _create(self, asked: dict[str, Any], signed: bool) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not signed or asked["organization"] != OWNER:
            return self._send(403, b"{}", {"X-Error-Message": "You don't have the rights to create a model there"})
        if name in self.hub.repositories:
            return self._send(409, b"{}")
        self.hub.create(name, {}, asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}"})

    def _revision(self, name: str, repository: Repository, files: dict[str, bytes], rest: str, body: bytes) -> None:
        siblings = [{"rfilename": file} for file in files]
        sha = list(repository.commits)[list(repository.commits.values()).index(files)]
        self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def _preupload(self, name: str, repository: Repository, files: dict[str, bytes], rest: str, body: bytes) -> None:
        large = (".safetensors", ".parquet")
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def _commit(self, name: str, repository: Repository, files: dict[str, bytes], rest: str, body: bytes) -> None:
        made = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, list(repository.commits)[-1]):
                return self._send(412, b"{}")
            if line["key"] == "file":
                made[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                made[value["path"]] = self.hub.uploads[value["oid"]]
                assert hashlib.sha256(made[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del made[value["path"]]
        sha = repository.commit(made)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _tree(self, name: str, repository: Repository, files: dict[str, bytes], rest: str, body: bytes) -> None:
        inside = rest.rstrip("/") + "/" if rest else ""
        if inside and not any(file.startswith(inside) for file in files):
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        found: dict[str, dict[str, Any]] = {}
        for file, data in files.items():
            if file.startswith(inside):
                first, slash, _ = file.removeprefix(inside).partition("/")
                kind = {"type": "directory", "size": 0} if slash else {"type": "file", "size": len(data)}
                found[inside + first] = {"path": inside + first, "oid": hashlib.sha1(data).hexdigest(), **kind}
        self._json(list(found.values()))

    def _resolve(self, name: str, repository: Repository, files: dict[str, bytes], rest: str, body: bytes) -> None:
        if rest not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        data, status = files[rest], 200
        if given := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            data, status = data[int(given[1]) : int(given[2] or len(data)) + 1], 206
        self._send(status, data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
