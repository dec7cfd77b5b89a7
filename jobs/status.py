"""Show how far a run is, from any machine that reaches its storage; neither Ray nor the job is asked.

    python jobs/status.py runs/smollm2-135m-1
    python jobs/status.py s3://bucket/runs/latest --json

Exit codes: 0 the run is finished, 1 nobody knows (its storage fails), 2 there is no such run, 3 a job works on it, 4 it
is not finished and no job does.
"""

from __future__ import annotations

import argparse

from jobs.command_line import failed, run_program
from mtc.programs import described
from mtc.storage import describe, run_status
from mtc.telemetry import configure

CODES = {"finished": 0, "running": 3, "stopped": 4}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run directory or URL, or ROOT/latest")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    try:
        configure()
        status = run_status(arguments.run)
    except Exception as error:
        return failed(error)
    print(status.model_dump_json() if arguments.json else describe(status))
    return CODES[status.state]


if __name__ == "__main__":
    run_program(main)
