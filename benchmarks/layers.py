"""What the analysis of many layers takes of the driver's memory, which should not depend on their number.

    python -m benchmarks.layers [--layers 3 10 30] [--save]

A random Llama of as many layers as are asked for most, 256 wide, with a transcoder of random directions for every layer
of a run; each run is analysed in a process of its own. Peaks are of the driver: `own_gb`, memory of its own, and
`store_gb`, pages of Ray's object store that it has looked at, which are the store's and bounded by it. `store_gb` and
`disk_gb`, what waits in the temporary directory, may grow. The last line is one JSON object; `--save` writes
docs/benchmarks/layers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtc.config import RunConfig, load_preset, to_yaml

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "layers.json"
WIDTH = 256


def make_config(root: str, deepest: int, layers: int) -> RunConfig:
    """The run of so many layers, spread over a model of `deepest` ones."""
    chosen = sorted({round(i * (deepest - 1) / max(1, layers - 1)) for i in range(layers)})
    return load_preset(
        "tiny",
        {
            "model": {"name": f"{root}/model", "layers": chosen, "dtype": "float32", "compile": False},
            "data": {"num_tokens": 8192, "unit_tokens": 1024, "context_length": 64},
            "transcoder": {"group_sizes": [256, 512], "k": 16},
            "analysis": {
                "num_tokens": 32_768, "loss_tokens": 0, "coactivation_tokens": 8192, "max_per_feature": 100,
                "samples_per_feature": 20, "context_tokens": 20,
            },
            "output": {"root": root, "run_id": f"run{layers}"},
        },
    )  # fmt: skip


def make_model(directory: str, layers: int) -> None:
    """A random model, written to disk."""
    from transformers import AutoConfig

    from mtc.language_model.weights import _make_random

    shape = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 259, "max_position_embeddings": 256}
    shape |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    Path(directory).mkdir()
    _make_random(AutoConfig.for_model("llama", **shape), Path(directory))


def make_run(config: RunConfig) -> str:
    """A finished run of random transcoders whose features fire on some of the tokens; its directory."""
    import torch

    from mtc.storage import RunDirectory
    from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

    run = RunDirectory(f"{config.output.root}/{config.output.run_id}")
    run.write("config.yaml", to_yaml(config))
    for seed, (member, own) in enumerate(zip(config.members(), run.members().values(), strict=True)):
        settings = member.config.transcoder
        shape = TranscoderShape(WIDTH, WIDTH, settings.group_sizes, settings.k, member.config.input_norm)
        transcoder = MatryoshkaTranscoder(shape, seed)
        with torch.no_grad():
            transcoder.W_dec.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
            transcoder.threshold.fill_(2.2)
        own.write("config.yaml", to_yaml(member.config))
        own.write("transcoder.safetensors", transcoder.to_bytes())
        own.publish(latest=False)
    run.publish()
    return run.url


def analyse(url: str) -> dict[str, Any]:
    """One analysis in this process, which should be fresh."""
    from cluster.pipeline import connected
    from cluster.reporting import analyse_run

    peaks, stop = {"RssAnon": 0, "RssShmem": 0, "disk": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            spools = Path(tempfile.gettempdir()).glob("mtc-analysis-*")
            peaks["disk"] = max(peaks["disk"], sum(_size(spool) for spool in spools))

    thread = threading.Thread(target=watch)
    with connected():
        thread.start()
        start = time.perf_counter()
        analyse_run(url, {})
        seconds = time.perf_counter() - start
        stop.set()
        thread.join()
    return {
        "own_gb": peaks["RssAnon"] / 1e9,
        "store_gb": peaks["RssShmem"] / 1e9,
        "disk_gb": peaks["disk"] / 1e9,
        "seconds": seconds,
    }


def _size(directory: Path) -> int:
    total = 0
    for place, _, names in os.walk(directory):  # which passes over what was merged and removed meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(f"{place}/{name}").st_size
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 10, 30])
    parser.add_argument("--save", action="store_true", help=f"write docs/benchmarks/{RESULTS.name}")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        print(json.dumps(analyse(arguments.run)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        deepest = max(arguments.layers)
        make_model(f"{root}/model", deepest)
        for layers in arguments.layers:
            url = make_run(make_config(root, deepest, layers))
            command = [sys.executable, "-m", "benchmarks.layers", "--run", url]
            Path(f"{root}/spool").mkdir(exist_ok=True)
            place = os.environ | {"TMPDIR": f"{root}/spool"}  # others of this machine have theirs elsewhere
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=place)
            results[str(layers)] = json.loads(done.stdout.splitlines()[-1])
            print(f"{layers} layers: {results[str(layers)]}", flush=True)
    if arguments.save:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
