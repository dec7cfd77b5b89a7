"""What a run says while it goes: logs, metrics, trackers, and what it ran on."""

from mtc.telemetry.logs import (
    FORMAT_VARIABLE,
    Format,
    configure,
    fail,
    for_people,
    output,
    prints_left_out,
    say,
    set_run,
)
from mtc.telemetry.metrics import CATALOGUE, JOB, make
from mtc.telemetry.provenance import describe_machine, git_revision, package_versions
from mtc.telemetry.tracking import check_trackers

__all__ = [
    "CATALOGUE", "FORMAT_VARIABLE", "JOB", "Format", "check_trackers", "configure", "describe_machine", "fail",
    "for_people", "git_revision", "make", "output", "package_versions", "prints_left_out", "say", "set_run",
]  # fmt: skip
