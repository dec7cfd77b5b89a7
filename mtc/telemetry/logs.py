"""What a job tells: one line an event, each with the run's id, for people or for machines.

    19:30:05 smollm2-135m-1  trained 49,152 tokens in 96 steps; threshold 2.3308
    {"time": "2026-11-25T19:30:05.123Z", "level": "info", "event": "trained", "run_id": ..., "tokens": ...}

Both come from Python's logging: `say` for events, loggers for the rest. `MTC_LOG_FORMAT` chooses where no option does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

from mtc.config import ConfigError

Format = Literal["text", "json"]
FORMAT_VARIABLE = "MTC_LOG_FORMAT"
EVENTS = logging.getLogger("mtc.events")
_run_id = "-"
_stdout: TextIO | None = None


def configure(verbose: bool = False, form: Format | None = None) -> None:
    """Show events on standard output and warnings of everything else on standard error; more if `verbose`.

    Raises ConfigError for another format in MTC_LOG_FORMAT.
    """
    chosen = form or os.environ.get(FORMAT_VARIABLE) or "text"
    if chosen not in get_args(Format):
        raise ConfigError(f"{FORMAT_VARIABLE}={chosen}: text or json is wanted")
    formatter = JsonFormatter() if chosen == "json" else TextFormatter()
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(handlers=[_Stream(lambda: sys.stderr, formatter)], level=level, force=True)
    EVENTS.handlers = [_Stream(output, formatter)]
    EVENTS.setLevel(logging.INFO)
    EVENTS.propagate = False


def set_run(run_id: str) -> None:
    """The run that every line from now on is about."""
    global _run_id
    _run_id = run_id


def say(event: str, message: str, /, **fields: Any) -> None:
    """Log an event: `event` is its kind, `message` for people, `fields` the same for machines."""
    EVENTS.info(message, extra={"event": event, "fields": fields})


def fail(event: str, message: str) -> None:
    """Log why the job ends, as the last line on standard error."""
    record = EVENTS.makeRecord(EVENTS.name, logging.ERROR, "", 0, message, (), None, None, {"event": event})
    print(JsonFormatter().format(record) if not for_people() else message, file=sys.stderr, flush=True)


class TextFormatter(logging.Formatter):
    """Lines for people: time, run, and what happened."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if not hasattr(record, "event"):
            message = f"{record.levelname.lower()}: {record.name}: {message}"
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {_run_id}  {message}"


class JsonFormatter(logging.Formatter):
    """Lines for machines, one object each; what an event adds cannot replace what every line has."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname.lower(), "event": getattr(record, "event", "log")}
        line |= {"run_id": _run_id, "message": super().format(record)}
        if not hasattr(record, "event"):
            line["logger"] = record.name
        more = {name: value for name, value in getattr(record, "fields", {}).items() if name not in line}
        return json.dumps(line | more, default=str)


def for_people() -> bool:
    """Whether log lines are text, not JSON."""
    return not any(isinstance(handler.formatter, JsonFormatter) for handler in EVENTS.handlers)


@contextmanager
def prints_left_out(verbose: bool) -> Iterator[None]:
    """A context in which what libraries `print` goes to standard error if `verbose`, and nowhere otherwise.

    Ray prints what its daemons report into the driver's standard output, beside `log_to_driver`.
    """
    global _stdout
    _stdout = sys.stdout
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stderr if verbose else nowhere):
            yield
    finally:
        _stdout = None


def output() -> TextIO:
    """Standard output, also inside `prints_left_out`."""
    return _stdout or sys.stdout


class _Stream(logging.StreamHandler[TextIO]):
    """Writes to what standard output or error is at that moment."""

    def __init__(self, find: Callable[[], TextIO], formatter: logging.Formatter):
        logging.Handler.__init__(self)
        self._find = find
        self.setFormatter(formatter)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return self._find()
