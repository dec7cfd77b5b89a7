"""Analyse a finished run again without training it, or put two runs side by side.

    python jobs/analyze.py --run runs/latest                                 with the run's own settings
    python jobs/analyze.py --run runs/ID --analysis.num_tokens 1_000_000     or with others
    python jobs/analyze.py --compare runs/A runs/B --output comparison

`--run` replaces the run's examples, features, analysis and report. `--compare` reads two runs and needs no cluster.
Exit codes: 0 done, 1 failed while running, 2 unusable run or option, or another job writes the run, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys

from jobs.command_line import failed, make_parser, parse_overrides, run_program
from mtc.config import ConfigError, changed_config
from mtc.report import write_comparison
from mtc.storage import check_writable, open_layer_run, open_run, prepare_environment
from mtc.telemetry import fail


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", "(--run RUN [--PART.FIELD VALUE ...] | --compare RUN_A RUN_B [--output DIR])")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="a run directory or URL, or ROOT/latest")
    what.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), help="two runs; each of one transcoder")
    parser.add_argument("--output", help="directory for the comparison (default: comparison)")
    try:
        arguments, overrides = parse_overrides(parser, sys.argv[1:] if argv is None else argv, ("analysis", "cluster"))
        if arguments.compare:
            first, second = arguments.compare
            return compare(first, second, arguments.output or "comparison", overrides)
        if arguments.output:
            raise ConfigError("--output belongs to --compare; --run writes into the run")
        run = open_run(arguments.run, verify=False)
        check_writable(f"--run {arguments.run}", run.url)
        config = changed_config(run.config(), overrides)
        prepare_environment()
        # Torch, transformers and Ray take 4 to 8 s; without them, help, wrong options and a wrong run are told in 1.
        from cluster.pipeline import connected
        from cluster.probing import check_optional
        from cluster.reporting import analyse_run
        from mtc.language_model import check_model

        # A mistake, or a model that is gone meanwhile, costs no start of a cluster.
        check_optional(config)
        check_model(config.model, config.data.context_length)
        with connected(arguments.verbose):
            signal.signal(signal.SIGTERM, _interrupt)
            try:
                analyse_run(arguments.run, overrides)
            except Exception as error:
                return failed(error)  # now: Ray may end the process while it shuts down
    except Exception as error:
        return failed(error)
    except KeyboardInterrupt:
        fail("interrupted", "interrupted")
        return 130
    return 0


def compare(first: str, second: str, output: str, overrides: dict[str, object]) -> int:
    if overrides:
        raise ConfigError(f"{', '.join(overrides)}: --compare takes no such options")
    runs = open_layer_run(first), open_layer_run(second)
    from mtc.analysis import compare_runs  # 2 to 4 s, which a wrong run should not cost

    comparison, pairs = compare_runs(*runs)
    for path in write_comparison(comparison, pairs, output):
        print(path)
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_program(main)
