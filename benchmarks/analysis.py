"""What the analysis pass costs beside the language model's own pass, and the driver's memory.

    python -m benchmarks.analysis [--json] [--save] [--tokens N] [--rounds N] [--memory-tokens N] [--large]

SmolLM2-135M layer 9 on State of the Union addresses, with a transcoder of random directions whose threshold lets 48
features fire on a token: the cost does not depend on what is learnt.

- `pass_ratio`: the same rows of work through the same model actors, in turn with all that the analysis finds in them
  (4,608 features, merged in the driver) and with the activations thrown away at once. Time between the first and the
  last result, so without loading; median of the rounds' ratios.
- `unit_ratio`: in one process, unit by unit, (capture + analysis + the driver's merge of each row) / capture, medians;
  steadier than the above on a machine that is shared, and without Ray on either side.
- `finish_s`: what the driver does after the pass: intervals, nested tree, tables, files, report.
- `driver_peak_gb`: largest resident memory of the driver process over a whole analysis of `--memory-tokens` held-out
  tokens (with fewer, more memory may be needed for a million), in a process of its own; `driver_peak_tokens` says how
  many there were.
- `large_driver_peak_gb`, `large_actor_peak_gb`, `large_s` (with --large): the same with 65,536 features, on 32,768
  tokens.

A short text has shorter rows of work, whose results are as large as those of long ones: fewer tokens flatter nobody.
The last line is one JSON object; `--save` puts its entries into docs/benchmarks/analysis.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from cluster.held_out import FeatureActor, _feature_rows
from mtc.config import RunConfig, load_preset, to_yaml
from mtc.storage import RunDirectory

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "analysis.json"
GROUPS = (1152, 2304, 1152)
LARGE = (16_384, 32_768, 16_384)
K = 48


class CaptureOnlyActor(FeatureActor):
    """Runs the language model over a row's units and throws the activations away."""

    def work(self, batch: pa.Table) -> Iterator[pa.Table]:
        import numpy as np

        from mtc.language_model import pack_windows

        (row,) = batch.to_pylist()
        for unit in row["units"]:
            windows = pack_windows(self.store.input_ids(np.asarray(unit)), self.store.info.special_ids)
            self.model.capture(windows, windows.trainable.nonzero().squeeze(1))
        yield pa.table({"done": [1]})


def make_config(root: str, groups: tuple[int, ...], tokens: int) -> RunConfig:
    return load_preset(
        "smollm2-135m",
        {
            "data": {"heldout_fraction": 0.6, "num_tokens": 8192, "unit_tokens": 4096},
            "optimizer": {"warmup_steps": 1},
            "transcoder": {"group_sizes": list(groups), "k": K, "calibration_tokens": 4096},
            # As many of the tokens are sampled for co-activations as of a million by default.
            "analysis": {"num_tokens": tokens, "loss_tokens": 2048, "coactivation_tokens": int(tokens * 0.131072)},
            "output": {"root": root, "run_id": "run"},
        },
    )


def make_run(config: RunConfig, store_url: str) -> RunDirectory:
    """A run with random weights whose threshold gives K active features on a unit of training text."""
    import torch

    from mtc.language_model import LanguageModel, pack_windows
    from mtc.text import TokenStore, work_units
    from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

    store, model = TokenStore.open(store_url), LanguageModel(config.model)
    windows = pack_windows(store.input_ids(work_units(store, config).training[0]), store.info.special_ids)
    (pair,) = model.capture(windows, windows.trainable.nonzero().squeeze(1))
    shape = TranscoderShape(model.d_model, model.d_model, config.transcoder.group_sizes, K, config.input_norm)
    transcoder = MatryoshkaTranscoder(shape)
    with torch.no_grad():
        transcoder.initialise(pair.source, pair.target)
        transcoder.W_dec.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        z = transcoder.pre_activations(pair.source)
        transcoder.threshold.copy_(z.flatten().kthvalue(z.numel() - K * len(z)).values)
    run = RunDirectory(f"{config.output.root}/run")
    run.write("config.yaml", to_yaml(config))
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.publish(latest=False)
    return run


def compare_passes(tokens: int, rounds: int) -> dict[str, Any]:
    """The pass with and without the analysis, in turn, on one local Ray."""
    import numpy as np

    from cluster.activations import configure_data_context, map_on_model_actors
    from cluster.held_out import _arrays, _results
    from cluster.pipeline import connected
    from cluster.resources import make_plan
    from cluster.room import cluster_nodes
    from cluster.tokenise import build_token_store
    from mtc.analysis import HeldOutPass, count_tokens
    from mtc.language_model import check_model
    from mtc.text import TokenStore, heldout_units
    from mtc.transcoder import load_transcoder

    with tempfile.TemporaryDirectory() as root, connected():
        config = make_config(root, GROUPS, tokens)
        configure_data_context()
        plan = make_plan(config, cluster_nodes(), check_model(config.model).d_model)
        store_url = build_token_store(config)
        run, store = make_run(config, store_url), TokenStore.open(store_url)
        units = heldout_units(store, config, tokens)
        document_of = {int(w): 0 for unit in units for w in unit}
        occurrences = count_tokens(store.input_ids(np.concatenate(units)), store.info.special_ids, 1 << 16)
        about: dict[str, Any] = {"occurrences": occurrences, "num_documents": 1}
        work = _feature_rows(store, config, units, document_of)

        def time_pass(actor: type) -> float:
            first = end = 0.0
            found = HeldOutPass(config, load_transcoder(run), **about)
            arguments = about | {"config": config, "run_urls": [run.url], "store_url": store_url, "sites": [0]}
            arguments |= {"numbers": [0], "summed_by": [0], "first_unit": units[0]}
            dataset = map_on_model_actors(work, actor, plan, **arguments, candidates=[found.candidates])
            for row in _results(dataset):
                if row.get("kind") == "line":
                    found.line.merge_arrays(_arrays(row["found"]))
                elif "found" in row:
                    found.merge(_arrays(row["found"]))
                end = time.perf_counter()
                first = first or end
            return end - first

        times: dict[str, list[float]] = {"capture": [], "analysis": []}
        for i in range(rounds):
            order = ("capture", "analysis") if i % 2 else ("analysis", "capture")
            for name in order:
                times[name].append(time_pass(CaptureOnlyActor if name == "capture" else FeatureActor))
                print(f"{name:10} {times[name][-1]:7.1f} s for {len(work)} rows but the first", flush=True)
    ratios = [a / b for a, b in zip(times["analysis"], times["capture"], strict=True)]
    return {
        "tokens": tokens,
        "rounds": rounds,
        "pass_ratio": statistics.median(ratios),
        "pass_ratios": ratios,
        "capture_s": statistics.median(times["capture"]),
        "analysis_s": statistics.median(times["analysis"]),
    }


def compare_units(tokens: int) -> dict[str, Any]:
    """Units one after another in this process: each captured, then analysed; each row of units then merged."""
    import numpy as np
    import torch

    from cluster.activations import configure_data_context
    from cluster.pipeline import connected
    from cluster.tokenise import build_token_store
    from mtc.analysis import HeldOutPass, count_tokens
    from mtc.language_model import LanguageModel, pack_windows
    from mtc.text import TokenStore, heldout_units
    from mtc.transcoder import load_transcoder

    with tempfile.TemporaryDirectory() as root:
        config = make_config(root, GROUPS, tokens)
        with connected():
            configure_data_context()
            store_url = build_token_store(config)
        store, transcoder = TokenStore.open(store_url), load_transcoder(make_run(config, store_url))
    torch.set_num_threads(1)  # as an actor of a small model on a CPU
    model = LanguageModel(config.model)
    units = heldout_units(store, config, tokens)
    occurrences = count_tokens(store.input_ids(np.concatenate(units)), store.info.special_ids, 1 << 16)
    total = HeldOutPass(config, transcoder, occurrences)
    capture, analysis, merge, sampled = [], [], [], 0
    for row in _feature_rows(store, config, units, {int(w): 0 for unit in units for w in unit}):
        (work,) = row.to_pylist()
        found = HeldOutPass(config, transcoder, occurrences, 1, total.candidates)
        for unit in work["units"]:
            ids = np.asarray(unit)
            windows = pack_windows(store.input_ids(ids), store.info.special_ids)
            start = time.perf_counter()
            (pair,) = model.capture(windows, windows.trainable.nonzero().squeeze(1))
            middle = time.perf_counter()
            found.add(ids, windows, pair, None, work["sampled"])
            capture.append(middle - start)
            analysis.append(time.perf_counter() - middle)
            sampled += work["sampled"]
        start = time.perf_counter()
        total.merge(found.arrays())
        merge.append((time.perf_counter() - start) / len(work["units"]))
    parts = {n: statistics.median(v) for n, v in (("capture", capture), ("analysis", analysis), ("merge", merge))}
    print(f"seconds a unit: {parts}; {sampled} of {len(capture)} units sampled for co-activations", flush=True)
    return {
        "unit_ratio": sum(parts.values()) / parts["capture"],
        **{f"unit_{name}_s": value for name, value in parts.items()},
    }


def whole_analysis(groups: tuple[int, ...], tokens: int) -> dict[str, Any]:
    """One analysis, in this process, which should be fresh: times and largest resident memories."""
    import threading

    from cluster.pipeline import connected
    from cluster.reporting import analyse_run
    from cluster.tokenise import build_token_store

    largest, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not stop.wait(0.5):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                if process.info["memory_info"] and "MapWorker" in " ".join(process.info["cmdline"] or ()):
                    largest = max(largest, process.info["memory_info"].rss)

    with tempfile.TemporaryDirectory() as root, connected():
        config = make_config(root, groups, tokens)
        store_url = build_token_store(config)
        # In a process of its own, so that the model's memory is not counted here.
        code = "import sys; from benchmarks.analysis import *; from mtc.config import make_config as m; import yaml; "
        code += "make_run(m(yaml.safe_load(open(sys.argv[1]))), sys.argv[2])"
        settings = Path(root, "config.yaml")
        settings.write_text(to_yaml(config))
        subprocess.run([sys.executable, "-c", code, str(settings), store_url], check=True)
        thread = threading.Thread(target=watch)
        thread.start()
        start = time.perf_counter()
        analyse_run(f"{root}/run", {})
        seconds = time.perf_counter() - start
        stop.set()
        thread.join()
        analysis = json.loads(Path(root, "run", "analysis.json").read_text())
    return {
        "tokens": analysis["summary"]["analysed_tokens"],
        "driver_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "actor_peak_gb": largest / 1e9,
        "whole_s": seconds,
        "finish_s": seconds - analysis["facts"]["seconds"]["analyse"],
    }


def in_own_process(groups: tuple[int, ...], tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.analysis", "--whole", str(tokens), "--groups", json.dumps(groups)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print("\n".join(done.stdout.splitlines()[:-1]), flush=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument(
        "--save", action="store_true", help=f"put what was measured into docs/benchmarks/{RESULTS.name}"
    )
    parser.add_argument("--tokens", type=int, default=262_144, help="of each timed pass (default: 262,144)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--memory-tokens", type=int, default=1_000_000, help="0 leaves it out (default: 1,000,000)")
    parser.add_argument("--large", action="store_true", help="65,536 features as well")
    parser.add_argument("--whole", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--groups", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.whole:
        print(json.dumps(whole_analysis(tuple(arguments.groups), arguments.whole)))
        return 0
    results: dict[str, Any] = compare_units(arguments.tokens)
    if arguments.rounds:
        results |= compare_passes(arguments.tokens, arguments.rounds)
    if arguments.memory_tokens:
        found = in_own_process(GROUPS, arguments.memory_tokens)
        results |= {"driver_peak_tokens": found.pop("tokens")} | found
    if arguments.large:
        found = in_own_process(LARGE, 32_768)
        results |= {f"large_{name}": value for name, value in found.items()}
    if arguments.save:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | results, indent=1) + "\n")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
