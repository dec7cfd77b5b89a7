"""The service without Ray, in the test's own process: the real routes and models, behind a real HTTP server."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import report_example as example
import torch
import uvicorn

from mtc.analysis.contexts import contexts_to_parquet
from mtc.config import RunConfig, load_preset, to_yaml
from mtc.report import write_report
from mtc.report.layers import write_layers_report
from mtc.results import Analysis, report_names
from mtc.storage import RunDirectory
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape
from serve.contract import (
    LoadResponse,
    ReplicaMetrics,
    RunKey,
    RunSummary,
    ServiceError,
    Settings,
    State,
    render_metrics,
    take_snapshot,
)
from serve.http import create_app, http_protocol
from serve.service import Catalogue, Circuits, Models, ServedRun, Service
from serve.service.circuit_model import Load, load_replacement


def make_config() -> RunConfig:
    return load_preset("tiny", {"model": {"dtype": "float32"}})


def make_run(directory: Path, seed: int = 3, config: RunConfig | None = None) -> RunDirectory:
    """A finished run of random weights: no training, a report of three small files. Feature 9 always equals 5."""
    run = RunDirectory(str(directory))
    _write_transcoder(run, seed, config or make_config())
    run.publish()
    return run


def _write_transcoder(run: RunDirectory, seed: int, config: RunConfig) -> None:
    shape = TranscoderShape(32, 32, config.transcoder.group_sizes, config.transcoder.k, config.input_norm)
    transcoder = MatryoshkaTranscoder(shape, seed=seed)
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=torch.Generator().manual_seed(seed + 1))
        transcoder.b_dec.normal_(generator=torch.Generator().manual_seed(seed + 2))
        transcoder.target_scale.fill_(0.5)
        transcoder.b_enc.fill_(0.1)
        transcoder.W_enc[9] = transcoder.W_enc[5]  # equal activations, to see ties broken
        transcoder.threshold.fill_(0.8)
    run.write("config.yaml", to_yaml(config))
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.write("analysis.json", json.dumps({"run_id": run.run_id}))
    names = report_names(config.model.layer)
    run.write(f"report/{names.markdown}", "# Report\n")
    run.write(f"report/{names.json}", json.dumps({"run_id": run.run_id}))
    run.write(f"report/{names.html}", "<!doctype html><title>é</title>")
    run.write("report/plots/loss.png", b"\x89PNG")


def make_analysed_run(directory: Path, seed: int = 3) -> RunDirectory:
    """A finished run of random weights, with the analysis of ten features of `report_example`: tokens that try to break
    out of pages, figures that can be worked out by hand. Feature 8 is of massive tokens."""
    run = RunDirectory(str(directory))
    config = example.make_config(model={"dtype": "float32"})
    _write_transcoder(run, seed, config)
    _write_analysis(run, config)
    run.publish()
    return run


def make_layers_run(directory: Path, layers: Sequence[int] = (2, 0), seed: int = 3) -> RunDirectory:
    """A finished run of several layers of other weights each, all analysed as that of `make_analysed_run`; layer 0
    reads another site. It stands as training leaves it: a run for each layer, and a report of all. `latest`
    does not name it."""
    entries = [{"layer": layer, "source": "mlp_in" if layer == 0 else "resid_mid"} for layer in layers]
    config = example.make_config(model={"dtype": "float32", "layer": layers[0], "layers": entries})
    run = RunDirectory(str(directory))
    run.write("config.yaml", to_yaml(config))
    analyses = []
    for name, own in config.members():
        member = run.members()[name]
        _write_transcoder(member, seed + own.model.layer, own)
        analyses.append(_write_analysis(member, own))
        member.publish(latest=False)
    for name, data in write_layers_report([each.headline() for each in analyses], None, None).items():
        run.write(f"report/{name}", data)
    run.publish(latest=False)
    return run


def _write_analysis(run: RunDirectory, config: RunConfig) -> Analysis:
    massive = example.make_massive_sums()
    analysis, features = example.make_analysis(config, facts=example.make_facts(run_id=run.run_id), massive=massive)
    for name, data in write_report(analysis, features, example.make_history(50)).items():
        run.write(f"report/{name}", data)
    table = io.BytesIO()
    pq.write_table(features, table)
    run.write("features.parquet", table.getvalue())
    run.write("examples.parquet", example.make_examples().to_parquet())
    run.write("contexts.parquet", contexts_to_parquet(example.make_contexts()))
    run.write("analysis.json", analysis.model_dump_json())
    return analysis


def key_of(run: RunDirectory) -> RunKey:
    return Catalogue(run.url).served().key


class LocalControl:
    """`serve.service.Control` of a service of one process; every run that it is given answers at once."""

    def __init__(self, *runs: RunDirectory):
        self.keys = [key_of(run) for run in runs]
        self.state = State("local", 1, self.keys[0], tuple(self.keys), self.keys[0])
        self.counts: ReplicaMetrics | None = None

    async def want(self, run_id: str) -> RunKey:
        raise ServiceError(
            404, "unknown_model", f"there is no run {run_id!r}", {"models": [k.run_id for k in self.keys]}
        )

    async def runs(self) -> list[RunSummary]:
        found = []
        for key in self.keys:
            run = ServedRun(key)
            own = run.default
            found.append(
                RunSummary(
                    run_id=key.run_id, created=run.manifest.created, base_model=own.identity.base_model,
                    layer=own.number, layers=list(run.layers), num_features=own.num_features,
                    prefixes=list(own.prefixes), k=own.identity.k,
                    state="current" if key == self.state.current else "loaded",
                )
            )  # fmt: skip
        return found

    async def load(self, run_id: str) -> LoadResponse:
        key = next((k for k in self.keys if k.run_id == run_id), None) or await self.want(run_id)
        previous, self.state = self.state.current, self.state._replace(version=self.state.version + 1, current=key)
        run = ServedRun(key)
        layers = list(run.layers)
        return LoadResponse(model=run.default.identity, layers=layers, previous=previous.run_id, seconds=0.0)

    async def metrics(self) -> bytes:
        return render_metrics([take_snapshot(self.counts.registry)] if self.counts else [])


class LocalInterventions:
    """`serve.service.Interventions` in the service's own process."""

    def __init__(self, circuits: Circuits):
        self.circuits = circuits

    def __getattr__(self, name: str) -> Any:
        graphs, steerings = self.circuits.graphs, self.circuits.steerings
        steers = {"steer": steerings.begin, "step": steerings.step, "end": steerings.end,
                  "ablate": self.circuits.ablations.ablate}  # fmt: skip
        method = steers.get(name) or getattr(graphs, name)

        async def call(*arguments: Any) -> Any:
            return await asyncio.to_thread(method, *arguments)

        return call


def make_service(
    control: LocalControl, models: type[Models] = Models, load: Load = load_replacement, **settings: Any
) -> Service:
    """A replica of the service; the models are loaded when they are first asked for, also those of interventions, by
    `load`."""
    wanted, metrics = Settings(run=control.keys[0].url, **settings), ReplicaMetrics()
    control.counts = metrics
    circuits = LocalInterventions(Circuits(wanted, load=load)) if wanted.interventions else None
    return Service(wanted, models(wanted, metrics), control, control.state, metrics, circuits)


def wait_for_interventions(client: httpx.Client) -> None:
    """Until the models of the current run are in memory for graphs and steering."""
    body = {"input_ids": [1], "interventions": [{"layer": 1, "feature": 0, "value": 0}], "max_tokens": 1}
    deadline = time.monotonic() + 60
    while client.post("/steer", json=body).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def served(
    *runs: RunDirectory, models: type[Models] = Models, load: Load = load_replacement, **settings: Any
) -> Iterator[str]:
    """The base URL of a server for the runs, the first one current."""
    with serving(make_service(LocalControl(*runs), models, load, **settings)) as url:
        yield url


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The base URL of a server of a service."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service), http=http_protocol(service.metrics), host="127.0.0.1", port=port, log_level="warning"
        )
    )
    started = threading.Event()
    server_startup = server.startup

    async def startup(*arguments: Any, **options: Any) -> None:
        await server_startup(*arguments, **options)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        if service.settings.interventions:
            service.interventions.circuits.close()  # type: ignore[attr-defined]
