"""Tables of docs/benchmarks.md and docs/sizing.md, from the files that the benchmarks write."""

from __future__ import annotations

import json
from typing import Any

from links import ROOT

from benchmarks import memory, plans
from benchmarks import sizing as formulas
from mtc.config import load_preset

RESULTS = ROOT / "docs" / "benchmarks"


def train_step() -> str:
    found = _read("train_step")
    rows = [("", "features", "time over the encoder's product", "step, ms", "peak memory ratio")]
    for row in found["all"]:
        if row["batch"] == 2048 and row["dead"] == 0:
            spread = f"{row['ratio']:.2f} [{row['lower_quartile']:.2f}, {row['upper_quartile']:.2f}]"
            rows.append(
                (row["contender"], f"{row['features']:,}", spread, f"{row['milliseconds']:.0f}",
                 f"{row['peak_extra_ratio']:.2f}")
            )  # fmt: skip
    machine = found["machine"]
    return _table(rows) + f"\n\n{machine['cores']} cores of an {machine['cpu']}, torch {machine['torch']}."


def sharded() -> str:
    found = _read("sharded")
    rows = [("ranks", "memory of a rank, MB", "over one rank's", "step, s", "load before", "bytes told in a step",
             "by the formula", "weights differ by", "losses differ by")]  # fmt: skip
    for row in found["ranks"]:
        cells = (str(row["ranks"]), f"{row['peak_bytes'] / 1e6:.0f}")
        times = (f"{row['step_seconds']:.2f}", f"{row['load_before']:.0f}")
        if row["ranks"] == 1:
            rows.append((*cells, "1", *times, "0", "0", "", ""))
            continue
        told, predicted = (sum(row[name].values()) for name in ("sent_bytes", "predicted_bytes"))
        rows.append(
            (*cells, f"{row['memory_ratio']:.2f}", *times, f"{told:,}", f"{predicted:,}",
             f"{max(row['difference'].values()):.0e}", f"{row['loss_difference']:.0e}")
        )  # fmt: skip
    size = found["size"]
    return (
        f"{_table(rows)}\n\n{size['features']:,} features, d {size['width']}, batches of {size['batch']}, k "
        f"{size['k']}; {found['cores']} cores, one thread a rank, torch {found['torch']}. Other work ran on the "
        "machine, *load before* processes that wanted its cores, so that times say little."
    )


def token_store() -> str:
    found = _read("token_store")
    work, driver, trainer, reader = (found[name] for name in ("work", "driver", "trainer", "reader"))
    rows = [
        ("process", "peak memory, MB", "seconds"),
        (f"any, at its start: {work['units']:,} training units and their digest", str(work["peak_megabytes"]),
         f"{work['seconds']['work_units']:.1f} with nothing in the cache, then {trainer['seconds']['work_units']:.1f}"),
        ("driver: the held-out units of a million tokens; with half of the training done, the units that are left",
         str(driver["peak_megabytes"]),
         f"{driver['seconds']['heldout_units']:.1f}; {driver['seconds']['remaining']:.1f}"),
        ("trainer: the ledger of half of the units; the check of all at the end", str(trainer["peak_megabytes"]),
         f"{trainer['seconds']['ledger']:.1f}; {trainer['seconds']['check_ledger']:.1f}"),
        (f"reader: token ids of {reader['read_units']} units over the border of two groups",
         str(reader["peak_megabytes"]),
         f"{reader['seconds']['first_unit']:.1f} for the first, {reader['seconds']['read']:.1f} for all"),
    ]  # fmt: skip
    return _table(rows)


def sharded_on_paper() -> str:
    found = _read("sharded")["on_paper"]
    rows = [("GPUs", "weights, gradients and moments of one, GB", "over NVLink in a step, MB", "that takes, ms",
             "encoder's product, ms", "Adam's passes, ms")]  # fmt: skip
    rows += [
        (str(row["ranks"]), f"{row['state_gigabytes']:.1f}", f"{row['wire_bytes'] / 1e6:.0f}",
         f"{row['collectives_ms']:.2f}", f"{row['product_ms']:.1f}", f"{row['adam_ms']:.1f}")
        for row in found["ranks"]
    ]  # fmt: skip
    size = found["size"]
    return (
        f"{_table(rows)}\n\n{size['features']:,} features, d {size['width']:,}, batches of {size['batch']:,}, k "
        f"{size['k']}, three prefixes and AuxK."
    )


def quality() -> str:
    rows = [("", "", "FVU per prefix", "L0", "dead", "train, s")]
    tasks = {
        "quality-smollm2": "SmolLM2 layer 20", "quality-smollm2-layer9": "SmolLM2 layer 9",
        "quality-smollm2-layer11": "SmolLM2 layer 11", "quality-gemma3": "Gemma-3-270M layer 12",
    }  # fmt: skip
    for name, title in tasks.items():
        found = _read(name)
        (task,) = found["tasks"].values()
        for result in task["results"]:
            means = result["means"]
            fvu = " / ".join(f"{value:.3f}" for value in means["fvu"])
            rows.append(
                (title, result["contender"], fvu, f"{means['l0']:.2f}", f"{100 * means['dead']:.1f} %",
                 f"{means['seconds']:.0f}")
            )  # fmt: skip
            title = ""
    return _table(rows) + f"\n\n{found['seeds']} seeds each; {found['machine']}."


def stream() -> str:
    found = _read("stream")
    capture, transport, overlap = found["capture"], found["transport"], found["overlap"]
    speed, gigabytes = capture["capture_tokens_per_second"], transport["transport_gigabytes_per_second"]
    rows = [
        ("", "measured"),
        ("capture, paragraphs as they are, over plain transformers", f"{capture['capture_vs_transformers']:.2f}"),
        ("capture, full windows, over plain transformers", f"{capture['capture_vs_transformers_full_windows']:.2f}"),
        ("capture, over SAELens's store (its default model class)", f"{capture['capture_vs_saelens']:.2f}"),
        ("capture, full windows", f"{speed['ours, full windows']:.0f} tokens/s"),
        ("transport of views", f"{gigabytes['views']:.2f} GB/s"),
        ("transport into a buffer", f"{gigabytes['copied']:.2f} GB/s"),
        ("passes and steps alone, over the run that streams", f"{overlap['overlap']:.2f}"),
        ("a run's training tokens", f"{overlap['overlap_timing']['tokens_per_second']:,.0f} tokens/s"),
        ("eight producers over eight times one", f"{found['scaling']['scaling_8']:.2f}"),
        ("object store's growth over ten times more units", f"{100 * found['memory']['memory_growth']:.1f} %"),
    ]
    return _table(rows) + f"\n\n{capture['machine']}, torch {capture['torch']}, {capture['capture_dtype']}."


def analysis() -> str:
    found = _read("analysis")
    return _table(
        [
            ("", "measured"),
            ("the pass with everything that is found, over the language model's pass", f"{found['pass_ratio']:.2f}"),
            (f"a whole analysis of {found['driver_peak_tokens']:,} tokens", f"{found['whole_s']:.0f} s"),
            ("of it after the passes", f"{found['finish_s']:.0f} s"),
            ("peak memory of the driver", f"{found['driver_peak_gb']:.2f} GB"),
            ("peak memory of a model actor", f"{found['actor_peak_gb']:.2f} GB"),
            (f"65,536 features, {found['large_tokens']:,} tokens", f"{found['large_whole_s']:.0f} s"),
        ]
    )


def recovery() -> str:
    found = _read("recovery")
    return _table(
        [
            ("", "measured"),
            ("size of a checkpoint of the reference shape", f"{found['checkpoint_bytes'] / 1e6:.0f} MB"),
            ("it holds training for", f"{found['checkpoint_held_s']:.2f} s"),
            ("share of training time at one a minute", f"{100 * found['checkpoint_overhead']:.1f} %"),
            ("a model actor killed: time without a new step", f"{found['actor_recovery_s']:.1f} s"),
            ("a trainer killed: time without a new step", f"{found['trainer_recovery_s']:.0f} s"),
            (f"tokens trained twice, windows lost, of {found['windows']:,} windows",
             f"{found['repeated_tokens']}, {found['lost_windows']}"),
        ]
    )  # fmt: skip


def service() -> str:
    found = _read("serve")
    machine = found["machine"]
    rows = [
        ("", "measured"),
        ("one sentence over HTTP, beyond the bare forward pass, median", f"{found['added_p50_ms']:.1f} ms"),
        ("the same, 99th percentile", f"{found['added_p99_ms']:.1f} ms"),
        ("tokens/s in a closed loop, over offline batches", f"{found['throughput_ratio']:.2f}"),
        ("tokens/s at four times that load, over the closed loop", f"{found['overload_goodput_ratio']:.2f}"),
        ("slowest 429 meanwhile", f"{found['refused_max_ms']:.0f} ms"),
        ("safetensors over naive JSON: time, size",
         f"{found['csr_speedup']:.0f} times, {found['csr_size_ratio']:.1f} times"),
        ("only replica killed: until the next answer", f"{found['recovery_s']:.1f} s"),
    ]  # fmt: skip
    return _table(rows) + f"\n\n{machine['cores']} cores of an {machine['cpu']}, load generator included."


def circuits() -> str:
    found = _read("circuits-circuit-tracer")
    names = ("replacement", "completeness")
    rows = [
        ("", "features", "edges", "largest difference, edges", "shares", "nodes kept, of both",
         *(f"{name}: ours, ours as there, theirs" for name in names))
    ]  # fmt: skip
    cases = found["agreement"]["cases"] | {"SmolLM2-135M, 30 layers, skip, rms": found["time"]["agreement"]}
    for name, case in cases.items():
        kept = case.get("nodes_kept")
        rows.append(
            (name, f"{case['features']:,}", f"{case['edges']:,}", f"{case['edges_as_there']:.0e}",
             f"{case['shares_as_there']:.0e}",
             f"{kept['ours']}, {kept['theirs']}, {kept['both']}" if kept else "",
             *(", ".join(f"{case[n][of]:.3f}" for of in ("ours", "ours_as_there", "theirs")) if kept else ""
               for n in names))
        )  # fmt: skip
    took, versions = found["time"], found["time"]["versions"]
    medians = {name: took["medians"][name]["cpu_seconds"] for name in ("ours", "theirs")}
    return (
        f"{_table(rows)}\n\nThe graph of SmolLM2-135M, before pruning, takes {took['cpu_ratio']:.2f} times "
        f"circuit-tracer's processor time ({medians['ours']:.0f} s and {medians['theirs']:.0f} s on 2 threads) and "
        f"{took['ratio']:.2f} times its wall time, which others on the machine disturb; medians of "
        f"{took['rounds']} runs each, in turn, and of "
        f"{len(took['batches'])} batch sizes of circuit-tracer's the fastest ({took['batch']}). "
        f"circuit-tracer {versions['circuit-tracer']}, TransformerLens {versions['transformer-lens']}; "
        f"{took['machine']}."
    )


def sizing() -> str:
    """For the reference run's preset."""
    config = load_preset("gemma-2-2b-layer17")
    work = formulas.work_of(config)
    stream = formulas.measured_stream()
    facts = [
        ("operations of a token, forward pass", f"{work.forward / 1e9:.2f} GFLOP"),
        ("tokens a second of one trainer on a GPU, estimated", f"{work.trained:,.0f}"),
        ("activations of a token", f"{work.stream_bytes:,.0f} bytes"),
        ("stream into one trainer, measured on 2 CPU cores",
         f"{stream / 1e9:.2f} GB/s, {stream / work.stream_bytes:,.0f} tokens/s"),
        ("a checkpoint",
         f"{formulas.checkpoint_bytes(2304, config.transcoder.num_features) / 1e6:.0f} MB"),
        *((f"token ids of {tokens:,} tokens",
           f"{formulas.token_store_bytes(tokens, config.data.context_length) / 1e9:.2f} GB")
          for tokens in formulas.TOKENS),
    ]  # fmt: skip
    predicted = formulas.table(config, formulas.TOKENS, formulas.GPUS, formulas.PEAK, formulas.EFFICIENCY, price=None)
    return f"{_table([('', 'gemma-2-2b-layer17'), *facts])}\n\n{predicted}"


def sizing_checks() -> str:
    return formulas.check_table()


def memory_plans() -> str:
    return plans.table()


def memory_checks() -> str:
    return memory.table(memory.ratios())


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
