"""What a long text costs the processes that plan and read it: seconds and memory, without writing its token ids.

    python -m benchmarks.token_store --windows 400_000_000 --save

One file of windows is written, and a store is made of it that has as many windows as asked for, all files of which are
links to the one. Each part runs in a process of its own, which tells its peak of memory:

    work        what every process begins with: units of the training and their digest
    driver      that, the held-out units and, with half of the training done, the units that are left for two trainers
    trainer     that, the ledger of the half that is done, a checkpoint of it; the check of the whole ledger at the end
    reader      that, and the token ids of consecutive units over the border of a group of blocks
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mtc.config import RunConfig, load_preset
from mtc.storage import Checkpoints, CheckpointWriter, Ledger, progress_from_parquet, progress_to_parquet
from mtc.text import TokenStore, TokenStoreWriter, heldout_units, work_units
from mtc.text.token_store import STORE_FILE, SUMS_FILE
from mtc.text.windows import SCHEMA

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "token_store.json"
CONTEXT = 64
SHARD = 65_536
HELDOUT = 20
"""One document in so many is held out."""
READ_UNITS = 600


class _Tokenizer:
    """What TokenStoreWriter asks of one."""

    all_special_ids = (0,)


def make_store(url: str, windows: int) -> None:
    """A store of `windows` windows, rounded up to whole files; one in eight is shorter than CONTEXT."""
    dice = np.random.default_rng(0)
    count = SHARD
    lengths = np.where(dice.random(count) < 1 / 8, dice.integers(4, CONTEXT, count), CONTEXT).astype(np.int32)
    ids = dice.integers(1, 50_000, int(lengths.sum()), np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids[offsets[:-1]] = 0
    documents = np.arange(count) // 8
    table = pa.table(
        {
            "document_id": [f"{n:016x}" for n in documents],
            "split": np.where(documents % HELDOUT == 0, "heldout", "train"),
            "trainable": lengths - 1,
            "length": lengths,
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        },
        schema=SCHEMA,
    )
    with TokenStoreWriter(url, "0" * 16, {}, _Tokenizer(), CONTEXT) as writer:
        writer.write(table)
        info = writer.finish(exhausted=True)
    (first,) = info.shards
    times = -(-windows // SHARD)
    shards = [first, *(first.model_copy(update={"name": f"tokens-{n:05d}.parquet"}) for n in range(1, times))]
    for shard in shards[1:]:
        os.symlink(first.name, Path(url, shard.name))
    many = {name: {split: n * times for split, n in getattr(info, name).items()} for name in ("windows", "tokens")}
    buffer = io.BytesIO()
    np.save(buffer, np.tile(np.load(Path(url, SUMS_FILE)), (times, 1, 1)))
    Path(url, SUMS_FILE).write_bytes(buffer.getvalue())
    Path(url, STORE_FILE).write_text(info.model_copy(update=many | {"shards": shards}).model_dump_json())


def make_config(store: TokenStore, unit_tokens: int) -> RunConfig:
    """A run that trains on nearly all of the store."""
    batch = 4096
    tokens = (store.info.tokens["train"] - 4_000_000) // batch * batch
    data = {"context_length": CONTEXT, "num_tokens": tokens, "unit_tokens": unit_tokens}
    return load_preset(
        "tiny", {"data": data, "optimizer": {"batch_tokens": batch}, "analysis": {"num_tokens": 1_000_000}}
    )


class Part:
    """One process's work, timed."""

    def __init__(self, root: Path, unit_tokens: int):
        self.seconds: dict[str, float] = {}
        self.found: dict[str, Any] = {}
        self.run = str(root / "run")
        self.url = str(root / "tokens" / "store")
        self.store = self.timed("open", lambda: TokenStore.open(self.url))
        self.config = make_config(self.store, unit_tokens)
        self.plan = self.timed("work_units", lambda: work_units(self.store, self.config))
        self.digest = self.timed("digest", lambda: self.plan.digest(self.store))

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = call()
        self.seconds[name] = round(time.perf_counter() - start, 2)
        return found

    def work(self) -> None:
        self.found |= {"windows": self.store.rows, "units": len(self.plan.training)}

    def driver(self) -> None:
        from cluster.stream import remaining_units

        self.timed("heldout_units", lambda: heldout_units(self.store, self.config, self.config.analysis.num_tokens))
        start = Checkpoints(self.run).latest()
        assert start is not None
        left = self.timed("remaining", lambda: remaining_units(self.config, self.run, self.url, 2, start.name))
        self.found["left_units"] = int((left >= 0).sum())

    def trainer(self) -> None:
        from cluster.outcome import check_ledger
        from cluster.resume import Position, read_progress
        from mtc.storage.ledger import merge_progress

        half, whole = (_trained(n, self.config.data.unit_tokens) for n in (len(self.plan.training) // 2,
                                                                          len(self.plan.training)))  # fmt: skip
        ledger = Ledger(merge_progress([half]))
        table = self.timed("ledger", ledger.table)
        data = self.timed("to_parquet", lambda: progress_to_parquet(table))
        position = Position(0, 0, [], 0, 0, {}, {})
        files = {"units-0.parquet": lambda: data, "position-0.json": lambda: json.dumps(position._asdict()).encode()}
        writer = CheckpointWriter(Checkpoints(self.run), 1, 0, 1, 2, lambda *news: None, work=self.digest)
        writer.save(1, files).result()
        writer.close()
        self.found["ledger_bytes"] = len(data)
        latest = Checkpoints(self.run).latest()
        assert latest is not None
        self.timed("read_progress", lambda: read_progress(latest))
        everything = merge_progress([progress_from_parquet(progress_to_parquet(whole))])
        self.timed("check_ledger", lambda: check_ledger(everything, len(self.plan.training)))

    def reader(self) -> None:
        units = self.plan.training
        border = int(np.cumsum([each.units for each in units.segments[: len(units.segments) // 2]])[-1])
        first = border - READ_UNITS // 2
        self.timed("first_unit", lambda: self.store.input_ids(units[first]))
        tokens = 0

        def read() -> None:
            nonlocal tokens
            for number in range(first, first + READ_UNITS):
                tokens += sum(len(ids) + int(ids[0]) for ids in self.store.input_ids(units[number]))

        self.timed("read", read)
        cached = sum(path.stat().st_size for path in Path(os.environ["MTC_CACHE"]).rglob("*.block"))
        self.found |= {"read_tokens": tokens, "read_units": READ_UNITS, "cache_megabytes": round(cached / 1e6, 1)}


def _trained(units: int, tokens: int) -> pa.Table:
    """A ledger of units that are trained."""
    from mtc.storage.ledger import SCHEMA as LEDGER

    sums = tokens * (tokens - 1) // 2
    column = {"tokens": tokens, "dropped": 0, "dropped_sum": 0, "trained": tokens, "trained_sum": sums, "replays": 1}
    arrays = {name: np.full(units, value, np.int64) for name, value in column.items()}
    return pa.table({"unit": np.arange(units)} | arrays, schema=LEDGER)


def measure(windows: int, unit_tokens: int) -> dict[str, Any]:
    """Every part in a process of its own, in an empty cache directory."""
    found: dict[str, Any] = {"windows": windows, "context_length": CONTEXT, "unit_tokens": unit_tokens}
    with tempfile.TemporaryDirectory() as root:
        environment = os.environ | {"MTC_CACHE": f"{root}/cache"}
        Path(root, "tokens").mkdir()
        make_store(f"{root}/tokens/store", windows)
        for part in ("work", "trainer", "driver", "reader"):
            command = [sys.executable, "-m", "benchmarks.token_store", "--part", part, "--root", root]
            command += ["--unit-tokens", str(unit_tokens)]
            answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found[part] = json.loads(answer.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=400_000_000)
    parser.add_argument("--unit-tokens", type=int, default=16_384)
    parser.add_argument("--save", action="store_true", help="write the figures to docs/benchmarks/token_store.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part = Part(arguments.root, arguments.unit_tokens)
        getattr(part, arguments.part)()
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps(part.found | {"peak_megabytes": peak, "seconds": part.seconds}))
        return
    found = measure(arguments.windows, arguments.unit_tokens)
    if arguments.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
