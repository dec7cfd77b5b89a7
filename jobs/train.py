"""Train a Matryoshka transcoder from a preset or a configuration file, analyse it and write its report.

    python jobs/train.py --preset tiny
    ray job submit --working-dir . -- python jobs/train.py --preset smollm2-135m

Exit codes: 0 finished, 1 failed while running, 2 unusable configuration, model or data, or another job writes the run,
3 the run was finished before, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys

from jobs.command_line import failed, parse_command_line, run_program
from mtc.config import to_yaml
from mtc.storage import prepare_environment
from mtc.telemetry import fail


def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config, arguments = parse_command_line(sys.argv[1:] if argv is None else argv, __doc__ or "")
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        prepare_environment()  # Ray Train's import fails where there is no home directory
        # Torch, transformers and Ray take 4 to 8 s; without them, help and what is wrong with an option are told in 1.
        from cluster.pipeline import check, connected, run_pipeline

        config = check(config)
        with connected(arguments.verbose):
            signal.signal(signal.SIGTERM, _interrupt)  # again, since ray.init has taken it
            try:
                run_pipeline(config)
            except Exception as error:
                return failed(error)  # now: Ray may end the process while it shuts down
    except Exception as error:
        return failed(error)
    except KeyboardInterrupt:
        fail("interrupted", "interrupted: nothing was published; the same output.run_id continues the run")
        return 130
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_program(main)
