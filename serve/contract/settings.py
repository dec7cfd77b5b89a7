"""Settings of the service, and how its processes are set up."""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` as a class, not as a string.

import re
import socket
from contextlib import ExitStack
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mtc.storage import absolute

_PROXY_ERRORS = [
    f"http-error status {status} content-type application/json lf-string "
    f"""'{{"error":"{error}","error_type":"{error_type}","request_id":"%ID","detail":null}}' hdr X-Request-ID %ID"""
    + (" hdr Retry-After 1" if error_type == "unavailable" else "")
    for status, error_type, error in (
        (
            400,
            "malformed_http",
            "the proxy could not read the request, or the client closed its side of the connection",
        ),
        (408, "slow_request", "the request had not arrived in time"),
        (502, "unavailable", "the process that worked on the request was lost"),
        (503, "unavailable", "no process can take the request now"),
        (504, "unavailable", "the process that works on the request did not answer in time"),
    )
]
"""What HAProxy answers in place of the service, in the shape of `ErrorResponse`."""

ENVIRONMENT = {
    # HAProxy in front of the replicas' own HTTP servers, instead of a Python process that copies every message:
    # 1 ms instead of 6 for each request.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # All requests may be repeated, so one that a dying process swallowed goes to another, if it fits a buffer: 16,384
    # tokens (max_request_tokens) as JSON do.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(1 << 18),
    # Serve copies the name of the algorithm into HAProxy's defaults: lines that follow it are read there, too.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "\n    ".join(["leastconn", "unique-id-format %[uuid()]", *_PROXY_ERRORS]),
    # A client's X-Request-ID is a plain word before Serve sends it back.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mtc.request_ids:serve_middlewares",
    # Routes run in the event loop that reads the requests, not in that of a second thread.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Request logs reach the disk by the hundred.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # On a busy machine a proxy's process takes longer to start than Serve's 5 s, after which it would be killed, and
    # whoever deploys meanwhile told so.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""For every node of a Ray cluster that serves, before Ray starts there. Without it the service works, but slower.

It holds for all Serve applications of the cluster: each one's environment needs this package (`mtc.request_ids`), and
what HAProxy answers in their place has this service's shape.
"""

_ORIGIN = re.compile(r"(?!http:.*:80$|https:.*:443$)https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[1-9]\d{0,4})?")
"""As browsers send it: scheme, host in lower case, a port that is not the usual one, no path."""
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(:[1-9]\d{0,4})?(/[A-Za-z0-9._~/-]*)?")
"""Keys are no part of it: settings are shown."""
_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)  # fmt: skip


def free_ports() -> dict[str, str]:
    """Environment that gives a second Ray cluster on one machine ports of its own beside the one that it serves on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in _PORTS]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return {name: str(probe.getsockname()[1]) for name, probe in zip(_PORTS, probes, strict=True)}


_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg", "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock", "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}  # fmt: skip


def proxy_files(directory: str) -> dict[str, str]:
    """Environment that puts HAProxy's files and sockets into a directory of its own: the usual one, /tmp/haproxy-serve,
    is that of the first user of the machine, and no other can write there. Sockets' paths must be short."""
    return {name: f"{directory}/{file}".rstrip("/") for name, file in _FILES.items()}


_MOST = 1 << 24
"""More tokens, inputs or requests than any service has room for."""


class Settings(BaseModel):
    """Arguments of `serve.app:build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    run: str = Field(min_length=1)
    """Directory or URL of a finished run of one layer or several, `<root>/latest`, an alias such as
    `<root>/production`, or one transcoder of these (`<root>/latest/layer9`; of a sweep it must be one,
    `<root>/latest/k16`). With `latest`, runs that are published later replace it; with an alias, those that are
    promoted later."""
    api_keys_file: str | None = None
    """JSON file of API keys, see `python -m serve.keys`. Without it only this machine is answered, and anyone on it."""
    watch_seconds: float = Field(default=10, gt=0, le=86_400)
    """How often it is looked at what `run` names."""
    max_loaded_runs: int = Field(default=3, ge=2, le=1000)
    """Runs that each replica keeps in memory: the current one, its predecessor, and others that were asked
    for; the one that was not used for longest makes room."""

    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask from a browser, such as `https://app.example.org`, with a key in `Authorization`; by
    default none but the service's own. Several are a list, or one text with commas."""

    max_input_tokens: int = Field(default=1024, ge=2, le=_MOST)
    """Longest input in tokens, BOS included; where the model has fewer positions, their number is the limit."""
    max_inputs: int = Field(default=64, ge=1, le=_MOST)
    """Most inputs of a request."""
    max_request_tokens: int = Field(default=16384, ge=2, le=_MOST)
    """Most tokens of a request, all inputs together."""
    max_body_bytes: int = Field(default=1 << 20, ge=1024, le=1 << 32)
    """Longest body of a request."""
    max_json_depth: int = Field(default=16, ge=4, le=128)
    """Deepest nesting of lists and objects in a body."""
    body_timeout_s: float = Field(default=10, gt=0, le=86_400)
    """Longest time in which a request's body must have arrived, else 408."""
    request_timeout_s: float = Field(default=60, gt=0, le=86_400)
    """Longest wait for the models in all parts of a request together, before 504."""

    max_batch_tokens: int = Field(default=4096, ge=1, le=_MOST)
    """Most tokens of one forward pass; a longer input is a batch of its own."""
    max_queue_tokens: int = Field(default=16384, ge=1, le=_MOST)
    """Most tokens that wait for a forward pass in one replica; more are refused with 429."""
    max_concurrent_requests: int = Field(default=128, ge=1, le=_MOST)
    """Most encode and decode requests that one replica works on; more are refused with 429, unread."""

    notes: bool = False
    """Whether `PUT /features/{feature}/note` is answered: everyone who may ask then writes notes and stars beside the
    run's files. Without it they are shown, and those that a browser's pages make stay in that browser."""

    interventions: bool = False
    """Whether `POST /graph`, `POST /steer` and `POST /ablate` are answered, by a process of their own that holds the
    whole language model in float32; the replicas hold no more than without."""
    max_graph_tokens: int = Field(default=128, ge=2, le=_MOST)
    """Longest prompt of an attribution graph, and longest text that features are taken out of, in tokens, BOS
    included."""
    max_graph_features: int = Field(default=8192, ge=1, le=_MOST)
    """Most features of a graph that get edges of their own."""
    max_graph_matrix_bytes: int = Field(default=2 << 30, ge=1 << 20, le=1 << 50)
    """Largest matrix of a graph's edges before pruning in bytes, 4 for each feature with edges of its own and each that
    it may read; about three times that is held while the graph is computed."""
    max_graph_edges: int = Field(default=500_000, ge=1, le=_MOST)
    """Most edges that pruning may leave of a graph; an answer's JSON has about 32 bytes for each, and making a page or
    drawing of it takes about ten times that in a replica."""
    max_graph_jobs: int = Field(default=8, ge=1, le=1000)
    """Most graphs that wait or are computed, one of them at a time; more are refused with 429."""
    max_steerings: int = Field(default=4, ge=1, le=1000)
    """Most prompts that are steered at once, and as many texts that features are taken out of; more are refused with
    429."""
    interventions_num_cpus: float = Field(default=0.6, gt=0, le=10_000)
    """CPUs that Ray reserves for the process of graphs and interventions."""
    interventions_num_gpus: float = Field(default=0, ge=0, le=1000)
    """GPUs that Ray reserves for it; above 0, graphs and interventions are computed on the GPU."""

    embeddings: str | None = None
    """Base URL of an endpoint compatible with OpenAI's, such as `http://host:8000/v1`, that gives vectors of queries
    for `GET /features?by=meaning`: the text of each such query goes there. Without it features are found by words
    alone."""
    embeddings_key_variable: str = Field(default="OPENAI_API_KEY", pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable of the replicas that holds the key of that endpoint; none is sent where it is not set."""
    embeddings_timeout_s: float = Field(default=10, gt=0, le=86_400)
    """Longest wait for the vector of a query, before 503."""

    num_replicas: int = Field(default=1, ge=1, le=10_000)
    """Processes that answer, each with the models; the least number where `max_replicas` is more."""
    max_replicas: int | None = Field(default=None, ge=1, le=10_000)
    """Most replicas, for autoscaling; by default `num_replicas`."""
    target_ongoing_requests: float = Field(default=4, gt=0, le=1e6)
    """Requests in a replica above which autoscaling adds another."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Replicas that start before those of the deployment that they replace stop, in percent of `num_replicas`. There
    must be room for one at least; with 0, old ones make room first, and where there was one alone requests wait."""
    num_cpus: float = Field(default=0.6, gt=0, le=10_000)
    """CPUs that Ray reserves for each replica."""
    num_gpus: float = Field(default=0, ge=0, le=1000)
    """GPUs that Ray reserves for each replica; above 0, the models run on the GPU."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of a forward pass on a CPU; by default the machine's cores, divided by `num_replicas`."""

    @field_validator("run", "api_keys_file")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Replicas run in other directories than whoever deploys."""
        return None if path is None else absolute(path)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than num_replicas={self.num_replicas}")
        if self.max_request_tokens < self.max_input_tokens:
            raise ValueError(
                f"max_request_tokens={self.max_request_tokens} is less than max_input_tokens={self.max_input_tokens}"
            )
        if self.max_queue_tokens < self.max_request_tokens:
            raise ValueError(
                f"max_queue_tokens={self.max_queue_tokens} is less than max_request_tokens={self.max_request_tokens}: "
                "the largest requests would always be refused"
            )
        return self

    @field_validator("embeddings")
    @classmethod
    def _endpoint(cls, url: str | None) -> str | None:
        if url is not None and not _ENDPOINT.fullmatch(url):
            raise ValueError(
                "embeddings: a base URL such as http://host:8000/v1 is wanted, without a user, a password or a query"
            )
        return url

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _listed(cls, origins: object) -> object:
        return tuple(origins.replace(",", " ").split()) if isinstance(origins, str) else origins

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"cors_origins has {origin!r}, which is no origin such as https://app.example.org")
        return origins

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    @property
    def interventions_device(self) -> str:
        return "cuda" if self.interventions_num_gpus else "cpu"
