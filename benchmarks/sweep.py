"""What a sweep costs beside a single transcoder: whole jobs, in turn on this machine.

    python -m benchmarks.sweep [--json] [--save] [--rounds N] [--preset NAME] [--transcoders N]

The job as users start it, `jobs/train.py` in a process of its own with a local Ray: from the token store, which is
there before, over training and the held-out pass to the reports. Once with the preset's transcoder alone, once with
eight of its size (seeds 0 to 7, the preset's own among them), interleaved; the first of each round changes from round
to round.

- `wall_ratio`: wall time of the sweep over that of the single transcoder, median of the rounds' ratios.
- `one_s`, `sweep_s`: medians; `one_train_s`, `one_analyse_s`, `sweep_train_s`, `sweep_analyse_s` are the stages' as the
  runs themselves note them.

The last line is one JSON object; `--save` writes it to docs/benchmarks/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from mtc.storage import load_analysis, open_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "sweep.json"


def run_job(preset: str, root: Path, name: str, transcoders: int) -> dict[str, float]:
    """Seconds of a whole job, and of its stages."""
    command = [sys.executable, "jobs/train.py", "--preset", preset, "--output.root", str(root)]
    command += ["--output.run_id", name, "--output.token_store", str(root / "tokens")]
    if transcoders > 1:
        command += ["--sweep", json.dumps({"transcoder.seed": list(range(transcoders))})]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    run = open_run(str(root / name))
    stages = load_analysis(next(iter(run.members().values()))).facts.seconds
    return {"s": wall, "train_s": stages["train"], "analyse_s": stages["analyse"]}


def measure(preset: str, transcoders: int, rounds: int) -> dict[str, Any]:
    """Both jobs in turn; the result as it is printed."""
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        run_job(preset, root, "tokens-only", 1)  # makes the token store, and the model in the cache
        for number in range(rounds):
            kinds = {"one": 1, "sweep": transcoders}
            for kind in sorted(kinds, reverse=bool(number % 2)):
                for name, value in run_job(preset, root, f"{kind}-{number}", kinds[kind]).items():
                    seconds[f"{kind}_{name}"].append(value)
                print(f"round {number + 1}, {kind:5} {seconds[f'{kind}_s'][-1]:7.1f} s", file=sys.stderr)
    ratios = [many / one for one, many in zip(seconds["one_s"], seconds["sweep_s"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    about = {"preset": preset, "transcoders": transcoders, "rounds": rounds, "wall_ratios": ratios}
    return {"wall_ratio": statistics.median(ratios)} | medians | about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--transcoders", type=int, default=8)
    options = parser.parse_args()
    result = measure(options.preset, options.transcoders, options.rounds)
    if not options.json:
        print(f"{options.transcoders} transcoders take {result['wall_ratio']:.2f} times the wall time of one")
    if options.save:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
