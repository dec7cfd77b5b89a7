"""The HTTP service of one finished run: features of text, the report, and the usual probes.

    serve run serve.app:build run=runs/latest           through Serve's own command line or a serveConfigV2
    python -m serve.app --run runs/latest --port 8000   deploys to a running Ray cluster

`latest` is resolved once, when the application is built, so that all replicas answer for the same run.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` as a class, not as a string.

import argparse
import asyncio
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from mtc.report import report_names
from mtc.runs import RunError, open_layer_run, open_run
from serve.encoder import Encoder, TextTooLongError
from serve.errors import BodyLimit, ServiceError, install_error_handlers
from serve.media_types import HTML, JSON, MARKDOWN, media_type_of, negotiate
from serve.schemas import EncodeRequest, EncodeResponse, ErrorResponse, TextResult

MAX_BODY_BYTES = 1 << 20
MAX_INPUTS = 64
READY_TIMEOUT_S = 5.0


class AppArgs(BaseModel):
    """Arguments of `serve.app:build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: str = Field(min_length=1)
    """Directory or URL of a finished run of one layer, or `<root>/latest`."""
    max_input_tokens: int = Field(default=1024, ge=2)
    """Longest text in tokens, BOS included; the model's number of positions is a limit too."""
    num_replicas: int = Field(default=1, ge=1)
    """Processes that hold the language model."""
    num_cpus_encoder: float = Field(default=0.5, gt=0)
    """CPUs that Ray reserves for each of them."""
    num_gpus_encoder: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for each of them; above 0, the model runs on the GPU."""
    num_cpus_ingress: float = Field(default=0.1, gt=0)
    """CPUs that Ray reserves for the process that speaks HTTP."""
    request_timeout_s: float = Field(default=60, gt=0)
    """Longest wait for an encoding before 504."""


app = FastAPI(
    title="Matryoshka transcoder", responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
)
app.add_middleware(BodyLimit, limit=MAX_BODY_BYTES)
install_error_handlers(app)


# Larger than the encoder's numbers, so that under load the encoder refuses first, in this service's error shape, and
# not Serve's proxy in its own; the probes are still answered.
@ray_serve.deployment(max_ongoing_requests=256, max_queued_requests=256)
@ray_serve.ingress(app)  # pickles the routes here and now: a function defined further down would be missing in them
class Ingress:
    """Speaks HTTP; holds no model."""

    def __init__(self, encoder: DeploymentHandle, run: str, request_timeout_s: float):
        self._encoder = encoder
        self._timeout = request_timeout_s
        self._run = open_run(run, verify=False)
        self._manifest = self._run.manifest()
        self._config = self._run.config()
        self._ready = False

    @app.post("/encode", response_model=EncodeResponse)
    async def encode(self, request: EncodeRequest) -> Response:
        """Features of every token of one or several texts."""
        transcoder, model = self._config.transcoder, self._config.model
        self._check(request)
        results = await self._encode(request.texts, request.top_k, request.prefix, self._timeout)
        answer = EncodeResponse(
            run_id=self._run.run_id,
            layer=model.layer,
            source=model.source,
            target=model.target,
            num_features=transcoder.num_features,
            k=transcoder.k,
            prefixes=list(transcoder.prefixes),
            prefix=request.prefix or transcoder.num_features,
            results=results,
        )
        return Response(answer.model_dump_json(), media_type=JSON)  # skips FastAPI's second validation

    @app.get("/report", response_class=Response)
    def report(self, request: Request) -> Response:
        """The run's report: Markdown, or HTML or JSON if the Accept header prefers it."""
        names = report_names(self._config.model.layer)
        forms = {MARKDOWN: names.markdown, HTML: names.html, JSON: names.json}
        accept = request.headers.get("accept") or "*/*"
        media_type = negotiate(accept, list(forms))
        if media_type is None:
            offered = {"offered": list(forms)}
            message = f"the report is {', '.join(forms)}, not {accept}"
            raise ServiceError(406, "not_acceptable", message, offered)
        return self._file(f"report/{forms[media_type]}", media_type, {"Vary": "Accept"})

    @app.get("/report/files/{name:path}", response_class=Response)
    def report_file(self, name: str) -> Response:
        """A file of the report, such as a plot."""
        return self._file(f"report/{name}", media_type_of(name), {})

    @app.get("/info")
    def info(self) -> dict[str, Any]:
        """The run that is served, and with what."""
        config = self._config
        return {
            "run_id": self._run.run_id,
            "created": self._manifest.created,
            "fingerprint": config.fingerprint(),
            "model": config.model.model_dump(mode="json"),
            "data": config.data.name,
            "transcoder": {
                "num_features": config.transcoder.num_features,
                "prefixes": list(config.transcoder.prefixes),
                "k": config.transcoder.k,
                "input_norm": config.input_norm,
            },
            "limits": {"max_inputs": MAX_INPUTS, "max_body_bytes": MAX_BODY_BYTES},
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("mtc", "ray", "torch", "transformers")},
        }

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """This process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(self) -> dict[str, str]:
        """Text can be encoded: 503 until a token was, and again after the encoder was lost."""
        if not self._ready:
            try:
                await self._encode(["a"], 1, None, READY_TIMEOUT_S)
            except ServiceError as error:
                raise ServiceError(503, "not_ready", f"not ready: {error.message}") from error
        return {"status": "ready"}

    def _check(self, request: EncodeRequest) -> None:
        texts, transcoder = request.texts, self._config.transcoder
        empty = [i for i, text in enumerate(texts) if not text]
        if not texts or empty:
            what = f"inputs {empty} are empty" if texts else "inputs is an empty list"
            raise ServiceError(400, "empty_inputs", what, {"empty": empty})
        if len(texts) > MAX_INPUTS:
            detail = {"limit": MAX_INPUTS, "value": len(texts)}
            raise ServiceError(413, "too_many_inputs", f"{len(texts)} inputs, the limit is {MAX_INPUTS}", detail)
        if request.top_k > transcoder.num_features:
            message = f"top_k={request.top_k} is more than the {transcoder.num_features} features"
            raise ServiceError(422, "validation", message, {"limit": transcoder.num_features, "value": request.top_k})
        if request.prefix is not None and request.prefix not in transcoder.prefixes:
            prefixes = list(transcoder.prefixes)
            message = f"prefix={request.prefix} is not one of the nested dictionaries {prefixes}"
            raise ServiceError(422, "validation", message, {"prefixes": prefixes, "value": request.prefix})

    async def _encode(self, texts: list[str], top_k: int, prefix: int | None, timeout_s: float) -> list[TextResult]:
        try:
            answer = await asyncio.wait_for(self._encode_retrying(texts, top_k, prefix), timeout_s)
        except TimeoutError:
            raise ServiceError(504, "timeout", f"no encoding within {timeout_s:g} s", {"limit": timeout_s}) from None
        if isinstance(answer, TextTooLongError):
            detail = {"limit": answer.limit, "value": answer.tokens, "index": answer.index}
            raise ServiceError(413, "text_too_long", str(answer), detail)
        self._ready = True
        return answer

    async def _encode_retrying(
        self, texts: list[str], top_k: int, prefix: int | None
    ) -> list[TextResult] | TextTooLongError:
        """Once more if the replica died: encoding changes nothing, so that a repetition is safe."""
        message = ""
        for _ in range(2):
            try:
                return await self._encoder.encode.remote(texts, top_k, prefix)
            except BackPressureError as error:
                raise ServiceError(429, "overloaded", error.message, headers={"Retry-After": "1"}) from error
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
                self._ready = False
                message = str(error)
        raise ServiceError(503, "encoder_unavailable", f"the encoder is not available: {message}")

    def _file(self, name: str, media_type: str, headers: dict[str, str]) -> Response:
        # The manifest's names are the only ones, so that no path leads out of the run.
        if name not in self._manifest.files:
            raise ServiceError(404, "not_found", f"run {self._run.run_id} has no file {name!r}")
        return Response(self._run.read(name), media_type=media_type, headers=headers)


def build(args: AppArgs) -> ray_serve.Application:
    """The application, for `import_path: serve.app:build`. Raises RunError if the run can't be served."""
    run = open_layer_run(args.run)
    device = "cuda" if args.num_gpus_encoder else "cpu"
    encoder = (
        _deployment(Encoder)
        .options(
            num_replicas=args.num_replicas,
            ray_actor_options={"num_cpus": args.num_cpus_encoder, "num_gpus": args.num_gpus_encoder},
        )
        .bind(run.url, args.max_input_tokens, device)
    )
    ingress = _deployment(Ingress).options(ray_actor_options={"num_cpus": args.num_cpus_ingress})
    return ingress.bind(encoder, run.url, args.request_timeout_s)


def _deployment(decorated: Any) -> ray_serve.Deployment:
    """What Serve's decorator returns; its type annotations say the class."""
    assert isinstance(decorated, ray_serve.Deployment)
    return decorated


def main(argv: Sequence[str] | None = None) -> int:
    """Deploy to a running Ray cluster; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serve.app", description="Serve a finished run over HTTP.")
    parser.add_argument("--run", required=True, help="directory or URL of a finished run, or ROOT/latest")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--address", default="auto", help="the Ray cluster (%(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="processes that hold the model (%(default)s)")
    parser.add_argument("--block", action="store_true", help="stay until interrupted, then stop the service")
    options = parser.parse_args(argv)
    try:
        # Before Ray starts anything, so that a wrong run costs a second and not a failed deployment.
        application = build(AppArgs(run=options.run, num_replicas=options.replicas))
        ray.init(address=options.address)
    except (RunError, ConnectionError, ValueError) as error:
        print(f"serve.app: {error}", file=sys.stderr)
        return 2
    ray_serve.start(http_options={"host": options.host, "port": options.port})
    ray_serve.run(application, name="mtc", route_prefix="/")
    print(f"serving {options.run} at http://{options.host}:{options.port}", flush=True)
    if options.block:
        try:
            while True:
                asyncio.run(asyncio.sleep(3600))
        except KeyboardInterrupt:
            ray_serve.shutdown()
    return 0


if __name__ == "__main__":
    # Under its real name: what is defined in __main__ can't be imported by the replicas.
    from serve.app import main as imported_main

    sys.exit(imported_main())
