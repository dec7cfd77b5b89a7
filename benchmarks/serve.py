"""What the service costs beside the models: latency, throughput, overload, and the size and time of its formats.

    python -m benchmarks.serve [--json] [--save [FILE]] [--pairs N] [--rounds N] [--seconds N] [--kills N] [--threads N]

SmolLM2-135M up to layer 9 with a transcoder of the reference run's shape (4,608 features in groups of 1,152, 2,304 and
1,152). Its weights are random, with a threshold that lets 48 features fire on a token: nothing that is measured depends
on what is learnt. The service is the real one, deployed to a Ray of its own, with the settings of
serve/contract/settings.py; the load comes over the loopback interface from a process of its own, on the same cores.
"Bare" and "offline" are `serve.service.RunEncoder` in this process, with as many threads as the service's.

- `added_p50_ms`, `added_p99_ms`: one sentence (`sentence_tokens`) over HTTP as JSON, default options, one request at a
  time with a pause before each, in turn with the bare forward pass of the same ids. The median of the HTTP latencies
  less the median of the forward passes, and the same of the 99th percentiles.
- `throughput_ratio`: paragraphs (`paragraph_tokens` on average) in a closed loop, `inputs_per_request` in each request,
  answered as safetensors with all features; tokens answered per second, over those of offline batches of the same
  paragraphs and the same most tokens. In turn; median of the rounds' ratios. `single_throughput_ratio`: one paragraph
  in each request.
- `overload_goodput_ratio`: requests of one paragraph leave at four times the rate that was just answered in a closed
  loop, at random moments whatever is answered. Tokens per second of answers with status 200, over those of the closed
  loop; median of the rounds. `refused_p50_ms`, `refused_p99_ms`, `refused_max_ms`: from the moment at which a request
  was to leave until its 429 was there. `healthz_max_ms`: the slowest `GET /healthz` meanwhile.
- `recovery_s`: from SIGKILL to the only replica until the next answer with status 200, asked every
  `RECOVERY_PAUSE_S`; `recovery_statuses`, what was answered until then. Medians and sums of `recoveries` kills.
- `csr_speedup`, `csr_size_ratio`: 1,024 tokens x 96 features as an object for each entry, by the standard library's
  json from objects that lie ready, over the whole answer in safetensors from the model's arrays. `json_speedup` is the
  same for the service's own JSON of those objects, `csr_over_json_speedup` the quotient of the two.

Tokens per second are the slope of a line through (time, tokens answered until then) without the first seconds, so that
it does not matter where in a batch the time begins or ends. The last line is one JSON object; `--save` writes it to
docs/benchmarks/serve.json, or to a file that is named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Connection, Plan, Record, request, run
from cluster.local_ray import make_temporary_directory
from mtc.config import load_preset, to_yaml
from mtc.storage import WEIGHTS, RunDirectory
from mtc.text import token_batches
from serve.contract import Encoded, Options, RunKey, Tokenised
from serve.http import formats
from serve.service import ServedRun

# What brings PyTorch along is imported in functions: it reads the environment that `main` sets.
if TYPE_CHECKING:
    from serve.contract import Settings
    from serve.service import RunEncoder

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "serve.json"
SENTENCE = "The treaty was laid before the Senate, which gave its consent in the last days of the session."
PAUSE_S = 0.02
INPUTS = 8  # paragraphs in a request
CONNECTIONS = 8
OVERLOAD = 4.0
PROBE_S = 0.1
RECOVERY_PAUSE_S = 0.05


class Texts(NamedTuple):
    """Paragraphs of State of the Union addresses."""

    texts: list[str]
    ids: list[NDArray[np.int32]]


def paragraphs(served: ServedRun, count: int = 512) -> Texts:
    """Real ones, of 64 to 256 tokens."""
    from mtc.text import read_piece, source_pieces

    data = served.config.data
    texts: list[str] = []
    ids: list[NDArray[np.int32]] = []
    for piece in source_pieces(data):
        for document in read_piece(piece, data):
            for part in (document.text or "").split("\n"):
                found = served.tokeniser.text(part).ids
                if 64 <= len(found) <= 256:
                    texts.append(part)
                    ids.append(found)
                if len(texts) == count:
                    return Texts(texts, ids)
    raise SystemExit(f"{data.name} has only {len(texts)} paragraphs of 64 to 256 tokens")


def make_run(root: Path) -> RunDirectory:
    """A run of random weights whose threshold gives k active features on a token of the sentence and its like."""
    import torch

    from mtc.language_model import LanguageModel, pack_windows
    from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape
    from serve.service import Tokeniser

    shape_of_reference = {"group_sizes": [1152, 2304, 1152], "k": 48}
    output = {"root": str(root), "run_id": "run"}
    config = load_preset("smollm2-135m", {"output": output, "transcoder": shape_of_reference})
    model, k = LanguageModel(config.model), config.transcoder.k
    run = RunDirectory(str(root / "run"))
    ids = Tokeniser(config.model).text(" ".join([SENTENCE] * 20)).ids
    (pair,) = model.capture(pack_windows([ids], [int(ids[0])]))
    shape = TranscoderShape(model.d_model, model.d_model, config.transcoder.group_sizes, k, config.input_norm)
    transcoder = MatryoshkaTranscoder(shape)
    with torch.no_grad():
        transcoder.initialise(pair.source[1:], pair.target[1:])
        z = transcoder.pre_activations(pair.source[1:])
        transcoder.threshold.copy_(z.flatten().kthvalue(z.numel() - k * len(z)).values)
    run.write("config.yaml", to_yaml(config))
    run.write(WEIGHTS, transcoder.to_bytes())
    run.publish()
    return run


@contextmanager
def deployed(settings: Settings) -> Iterator[int]:
    """The service on a Ray of its own; its port."""
    import ray
    from ray import serve as ray_serve

    from serve.app import build
    from serve.contract import proxy_files

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    temporary = make_temporary_directory()
    os.environ.update(proxy_files(temporary))
    ray.init(
        address="local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, log_to_driver=False,
        _temp_dir=temporary,
    )  # fmt: skip
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(build(settings), name="mtc", route_prefix="/")
        yield port
    finally:
        ray_serve.delete("mtc")
        ray_serve.shutdown()
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def measure_latency(port: int, encoder: RunEncoder, served: ServedRun, pairs: int) -> dict[str, Any]:
    """One sentence over HTTP and by the bare forward pass, in turn."""
    ids = served.tokeniser.text(SENTENCE).ids
    sent = request("POST", "/encode", "127.0.0.1", formats.JSON, json.dumps({"inputs": SENTENCE}))
    connection = Connection("127.0.0.1", port)
    seconds: dict[str, list[float]] = {"http": [], "bare": []}

    def over_http() -> None:
        status, _ = connection.ask(sent)
        if status != 200:
            raise SystemExit(f"the service answered {status}")

    ways: dict[str, Callable[[], Any]] = {
        "http": over_http,
        "bare": lambda: encoder.encode_batch([ids], [Options(top_k=16)]),
    }
    for turn in range(pairs + 20):
        for name in ways:  # always in turn: each pass finds the caches filled by the other process's
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            ways[name]()
            if turn >= 20:  # the first ones warm up
                seconds[name].append(time.perf_counter() - start)
    connection.close()
    found = {f"{name}_{p}_ms": 1000 * percentile(each, p) for name, each in seconds.items() for p in ("p50", "p99")}
    print(f"one sentence of {len(ids)} tokens, {pairs} pairs: {rounded(found)}", flush=True)
    added = {f"added_{p}_ms": found[f"http_{p}_ms"] - found[f"bare_{p}_ms"] for p in ("p50", "p99")}
    return added | found | {"sentence_tokens": len(ids), "pairs": pairs}


def measure_load(
    port: int, encoder: RunEncoder, texts: Texts, max_batch_tokens: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Offline batches, closed loops and overload, in turn."""
    several, single = plan(port, texts, INPUTS, seconds), plan(port, texts, 1, seconds)
    ratios: dict[str, list[float]] = {
        "throughput_ratio": [],
        "single_throughput_ratio": [],
        "overload_goodput_ratio": [],
    }
    rates: dict[str, list[float]] = {"offline": [], "several": [], "single": [], "overload": []}
    refused: list[float] = []
    probes: list[Record] = []
    statuses: dict[int, int] = {}
    run(several._replace(seconds=5.0))  # warms up
    for turn in range(rounds):
        before = offline_rate(encoder, texts, max_batch_tokens, seconds / 2)
        answered = goodput(run(several).records, seconds)
        alone = run(single).records
        saturated = goodput(alone, seconds)
        # What finished within the time, in requests.
        rate = OVERLOAD * saturated / statistics.fmean(single.tokens)
        over = run(single._replace(mode="open", rate=rate, probe_s=PROBE_S, seed=turn))
        after = offline_rate(encoder, texts, max_batch_tokens, seconds / 2)
        offline = (before + after) / 2  # on both sides, since the machine's speed drifts
        overload = goodput(over.records, seconds)
        for name, value in zip(rates, (offline, answered, saturated, overload), strict=True):
            rates[name].append(value)
        ratios["throughput_ratio"].append(answered / offline)
        ratios["single_throughput_ratio"].append(saturated / offline)
        ratios["overload_goodput_ratio"].append(overload / saturated)
        refused += [record.done - record.due for record in over.records if record.status == 429]
        probes += over.probes
        for record in over.records:
            statuses[record.status] = statuses.get(record.status, 0) + 1
        print(f"tokens/s: {rounded({name: each[-1] for name, each in rates.items()})}; statuses {statuses}", flush=True)
    if bad := [probe.status for probe in probes if probe.status != 200]:
        raise SystemExit(f"/healthz answered {bad} during overload")
    waits = {f"refused_{p}_ms": 1000 * percentile(refused, p) for p in ("p50", "p99", "max")}
    return {
        **{name: statistics.median(each) for name, each in ratios.items()},
        **{f"{name}s": each for name, each in ratios.items()},
        **{f"{name}_tokens_per_s": statistics.median(each) for name, each in rates.items()},
        **waits,
        "healthz_max_ms": 1000 * max(probe.done - probe.due for probe in probes),
        "overload_statuses": {str(status): count for status, count in sorted(statuses.items())},
        "paragraph_tokens": statistics.fmean(map(len, texts.ids)),
        "inputs_per_request": INPUTS,
        "connections": several.connections,
        "single_connections": single.connections,
        "rounds": rounds,
        "seconds": seconds,
    }


def measure_recovery(port: int, times: int) -> dict[str, Any]:
    """Kill the only replica, and ask until it is replaced."""
    import psutil

    sent = request("POST", "/encode", "127.0.0.1", formats.JSON, json.dumps({"inputs": SENTENCE}))
    seconds: list[float] = []
    statuses: dict[str, int] = {}

    def command_of(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            return ""

    def ask() -> int:
        try:
            connection = Connection("127.0.0.1", port)
            status, _ = connection.ask(sent)
            connection.close()
        except (OSError, IndexError, ValueError):
            status = 0  # the connection broke
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        return status

    for _ in range(times):
        children = psutil.Process().children(recursive=True)
        (victim,) = [child for child in children if "ServeReplica:mtc:Server" in command_of(child)]
        victim.kill()
        victim.wait()
        start = time.perf_counter()
        while ask() != 200:
            time.sleep(RECOVERY_PAUSE_S)
        seconds.append(time.perf_counter() - start)
    print(f"recovered in {[round(each, 1) for each in seconds]} s; statuses {statuses}", flush=True)
    return {"recovery_s": statistics.median(seconds), "recoveries": seconds, "recovery_statuses": statuses}


def plan(port: int, texts: Texts, inputs: int, seconds: float) -> Plan:
    """A closed loop of requests with so many paragraphs each, as many at once as keep batches full."""
    starts = range(0, len(texts.texts), inputs)
    bodies = [json.dumps({"inputs": texts.texts[i : i + inputs], "return": "csr"}) for i in starts]
    tokens = [sum(map(len, texts.ids[i : i + inputs])) for i in starts]
    connections = CONNECTIONS * INPUTS // inputs
    return Plan("127.0.0.1", port, formats.SAFETENSORS, bodies, tokens, "closed", seconds, connections)


def offline_rate(encoder: RunEncoder, texts: Texts, max_batch_tokens: int, seconds: float) -> float:
    """Tokens per second of whole batches, one after another."""
    rows = token_batches([len(ids) for ids in texts.ids], max_batch_tokens)
    batches = [[texts.ids[i] for i in part] for part in rows]
    tokens, number, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = batches[number % (len(batches) - 1)]  # the last one may not be full
        encoder.encode_batch(batch, [Options(by_index=True)] * len(batch))
        tokens, number = tokens + sum(map(len, batch)), number + 1
    return tokens / (time.perf_counter() - start)


def goodput(records: list[Record], seconds: float) -> float:
    """Tokens per second of answers with status 200, while the load lasted."""
    good = sorted(record.done for record in records if record.status == 200 and seconds / 5 < record.done < seconds)
    by_time = {record.done: record.tokens for record in records}
    tokens = np.cumsum([by_time[done] for done in good])
    return float(np.polyfit(good, tokens, 1)[0])


def measure_formats(served: ServedRun) -> dict[str, Any]:
    """1,024 tokens x 96 features as objects, as the service's JSON, and as safetensors."""
    tokens, k, chance = 1024, 96, np.random.default_rng(0)
    features = served.default.num_features
    indices = np.concatenate([np.sort(chance.choice(features, k, replace=False)) for _ in range(tokens)])
    values = chance.gamma(2.0, 1.0, tokens * k).astype(np.float32)
    encoded = Encoded(np.arange(tokens + 1, dtype=np.int64) * k, indices.astype(np.int32), values)
    ids = chance.integers(100, served.tokeniser.vocab_size, tokens).astype(np.int32)
    offsets = np.stack([4 * np.arange(tokens), 4 * np.arange(tokens) + 4], 1).astype(np.int32)
    inputs = [Tokenised(ids, offsets, np.zeros(tokens, bool), False)]
    envelope = formats.Envelope(served.default, features, "0" * 32)

    def answer(media_type: str) -> bytes:
        return formats.encode_answer(media_type, envelope, False, inputs, [encoded])

    objects = json.loads(answer(formats.JSON))
    ways: dict[str, Callable[[], bytes]] = {
        "naive": lambda: json.dumps(objects).encode(),
        "json": lambda: answer(formats.JSON),
        "msgpack": lambda: answer(formats.MSGPACK),
        "csr": lambda: answer(formats.SAFETENSORS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(15):
        for name, write in ways.items():
            start = time.perf_counter()
            write()
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(each) for name, each in seconds.items()}
    size = {name: len(write()) for name, write in ways.items()}
    print(f"1,024 x 96: ms {rounded({n: 1000 * t for n, t in took.items()})}, bytes {size}", flush=True)
    return {
        "csr_speedup": took["naive"] / took["csr"],
        "csr_size_ratio": size["naive"] / size["csr"],
        "json_speedup": took["naive"] / took["json"],
        "csr_over_json_speedup": took["json"] / took["csr"],
        **{f"{name}_ms": 1000 * each for name, each in took.items()},
        **{f"{name}_bytes": each for name, each in size.items()},
    }


def percentile(values: list[float], which: str) -> float:
    return float(max(values) if which == "max" else np.percentile(values, int(which[1:])))


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "torch": version("torch"), "ray": version("ray")}


def measure(pairs: int, rounds: int, seconds: float, kills: int, threads: int) -> dict[str, Any]:
    from serve.contract import Settings

    with tempfile.TemporaryDirectory() as root:
        run_directory = make_run(Path(root))
        manifest = run_directory.manifest()
        key = RunKey(run_directory.run_id, run_directory.url, manifest.files[WEIGHTS].sha256, manifest.created)
        served = ServedRun(key)
        found = measure_formats(served)
        settings = Settings(run=run_directory.url, num_threads=threads)
        with deployed(settings) as port:
            import torch

            from serve.service import RunEncoder

            torch.set_num_threads(threads)
            encoder = RunEncoder(run_directory)
            if pairs:
                found |= measure_latency(port, encoder, served, pairs)
            if rounds:
                texts = paragraphs(served)
                found |= measure_load(port, encoder, texts, settings.max_batch_tokens, rounds, seconds)
            if kills:
                found |= measure_recovery(port, kills)
    return found | {"threads": threads, "machine": machine()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the last line")
    where = f"write the figures to a file (docs/benchmarks/{RESULTS.name})"
    parser.add_argument("--save", nargs="?", type=Path, const=RESULTS, metavar="FILE", help=where)
    parser.add_argument("--pairs", type=int, default=1000, help="of requests and forward passes (default: 1,000)")
    parser.add_argument("--rounds", type=int, default=5, help="of loads (default: 5)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load (default: 20)")
    parser.add_argument("--kills", type=int, default=3, help="of the only replica (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a forward pass (default: all cores)"
    )
    arguments = parser.parse_args(argv)
    from serve.contract import ENVIRONMENT, free_ports

    # Before torch's and Ray's processes start.
    os.environ.update(RAY_AUTH_MODE="disabled", KMP_BLOCKTIME="0", OMP_WAIT_POLICY="PASSIVE")
    # Ray lets its workers go behind all other processes (nice 15), here the load generator, which stands for other
    # machines.
    os.environ.update(RAY_worker_niceness="0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(ENVIRONMENT | free_ports())
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        found = measure(arguments.pairs, arguments.rounds, arguments.seconds, arguments.kills, arguments.threads)
    if arguments.save:
        arguments.save.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    # Under its real name: what is defined in __main__ can't be imported by Ray's workers.
    from benchmarks.serve import main as imported_main

    sys.exit(imported_main())
