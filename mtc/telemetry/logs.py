"""What a job tells: one line an event, each with the run's id, for people or for machines.

    19:30:05 smollm2-135m-1  trained 49,152 tokens in 96 steps; threshold 2.3308
    {"time": "2026-11-25T19:30:05.123Z", "level": "info", "event": "trained", "run_id": ..., "tokens": ...}

Both come from Python's logging: `say` for events, loggers for the rest. `MTC_LOG_FORMAT` chooses where no option does.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

from mtc.config import ConfigError

Format = Literal["text", "json"]
FORMAT_VARIABLE = "MTC_LOG_FORMAT"
EVENTS = logging.getLogger("mtc.events")
_run_id = "-"


def configure(verbose: bool = False, form: Format | None = None) -> None:
    """Show events on standard output and warnings of everything else on standard error; more if `verbose`.

    Raises ConfigError for another format in MTC_LOG_FORMAT.
    """
    chosen = form or os.environ.get(FORMAT_VARIABLE) or "text"
    if chosen not in get_args(Format):
        raise ConfigError(f"{FORMAT_VARIABLE}={chosen}: text or json is wanted")
    formatter = JsonFormatter() if chosen == "json" else TextFormatter()
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_handler("stderr", formatter))
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    for handler in list(EVENTS.handlers):
        EVENTS.removeHandler(handler)
    EVENTS.addHandler(_handler("stdout", formatter))
    EVENTS.setLevel(logging.INFO)
    EVENTS.propagate = False


def set_run(run_id: str) -> None:
    """The run that every line from now on is about."""
    global _run_id
    _run_id = run_id


def say(event: str, message: str, /, **fields: Any) -> None:
    """Something happened: `event` is its kind, `message` for people, `fields` the same for machines."""
    EVENTS.info(message, extra={"event": event, "fields": fields})


def fail(event: str, message: str) -> None:
    """Why the job ends, as the last line on standard error."""
    record = EVENTS.makeRecord(EVENTS.name, logging.ERROR, "", 0, message, (), None, None, {"event": event})
    print(JsonFormatter().format(record) if not for_people() else message, file=sys.stderr, flush=True)


class TextFormatter(logging.Formatter):
    """Time, run, and what happened."""

    def format(self, record: logging.LogRecord) -> str:
        message = _message(record)
        if not hasattr(record, "event"):
            message = f"{record.levelname.lower()}: {record.name}: {message}"
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {_run_id}  {message}"


class JsonFormatter(logging.Formatter):
    """One object a line; what an event adds cannot replace what every line has."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname.lower(), "event": getattr(record, "event", "log")}
        line |= {"run_id": _run_id, "message": _message(record)}
        if not hasattr(record, "event"):
            line["logger"] = record.name
        more = {name: value for name, value in getattr(record, "fields", {}).items() if name not in line}
        return json.dumps(line | more, default=str)


def for_people() -> bool:
    """Whether lines are text."""
    return not any(isinstance(handler.formatter, JsonFormatter) for handler in EVENTS.handlers)


@contextmanager
def prints_as_lines(verbose: bool) -> Iterator[None]:
    """What libraries `print` meanwhile becomes lines of the log if `verbose`, and nothing otherwise.

    Ray prints what its daemons report into the driver's standard output, beside `log_to_driver`.
    """
    before = sys.stdout
    sys.stdout = _Lines(before, logging.getLogger("stdout"), verbose)
    try:
        yield
    finally:
        sys.stdout = before


@contextmanager
def stderr_without(pattern: str) -> Iterator[None]:
    """Lines on this process's standard error that match do not get through, also those of native code.

    Another process reads them, so nothing is lost if this one is killed.
    """
    sys.stderr.flush()
    read, write = os.pipe()
    before = os.dup(2)
    command = [sys.executable, "-I", "-S", "-c", _FILTER, pattern]
    # A session of its own: Ctrl-C is for this process, whose last words are still to come.
    child = subprocess.Popen(command, stdin=read, stdout=before, start_new_session=True)
    os.close(read)
    os.dup2(write, 2)
    os.close(write)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        try:  # processes that were started meanwhile may hold the pipe's other end
            child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            logging.getLogger(__name__).debug("something else still writes to standard error")


# Text is passed on as it comes, for progress bars; only what may become a line that matches is held until its end.
_FILTER = """
import os, re, sys
pattern, held = re.compile(sys.argv[1].encode()), b""
while chunk := os.read(0, 65536):
    *lines, held = (held + chunk).split(b"\\n")
    os.write(1, b"".join(line + b"\\n" for line in lines if not pattern.search(line)))
    if held[:1] != b"[":
        os.write(1, held)
        held = b""
os.write(1, held)
"""


def output() -> TextIO:
    """Standard output, also inside `prints_as_lines`."""
    return sys.stdout.real if isinstance(sys.stdout, _Lines) else sys.stdout


class _Lines(io.TextIOBase):
    def __init__(self, real: TextIO, logger: logging.Logger, verbose: bool):
        self.real, self._logger, self._verbose, self._rest = real, logger, verbose, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._verbose and line.strip():
                self._logger.info(line)
        return len(text)

    def flush(self) -> None:
        self.real.flush()

    def fileno(self) -> int:
        return self.real.fileno()


class _Stream(logging.StreamHandler[TextIO]):
    """Writes to what `sys` has at that moment."""

    def __init__(self, name: str):
        logging.Handler.__init__(self)
        self._name = name

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return output() if self._name == "stdout" else sys.stderr


def _handler(name: str, formatter: logging.Formatter) -> logging.Handler:
    handler = _Stream(name)
    handler.setFormatter(formatter)
    return handler


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    return message
