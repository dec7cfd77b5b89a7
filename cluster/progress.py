"""From the trainers to the person: the metrics history and the progress line."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, TextIO

from mtc.runs import RunDirectory

WRITE_SECONDS = 10.0  # between writes of the history, which is written whole


class MetricsLog:
    """A Ray actor that rank 0 sends metrics to and the driver collects them from."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def since(self, position: int) -> list[dict[str, Any]]:
        return self.rows[position:]


class ProgressReader:
    """While used as a context, a thread copies the log's rows into `metrics.jsonl` and shows the newest one.

    On a terminal one line is redrawn; elsewhere a line appears every `seconds`. A restart from a checkpoint repeats
    steps: their first account is replaced.
    """

    def __init__(
        self, log: Any, run: RunDirectory, total_steps: int, stream: TextIO = sys.stdout, seconds: float = 5.0
    ):
        self.log, self.run, self.total_steps, self.stream, self.seconds = log, run, total_steps, stream, seconds
        self.history: dict[int, dict[str, Any]] = {}
        if run.exists("metrics.jsonl"):
            for line in run.read("metrics.jsonl").decode().splitlines():
                row = json.loads(line)
                self.history[row["step"]] = row
        self._position = 0
        self._shown_at = 0.0
        self._written_at = 0.0
        self._shown_step = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressReader:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        if exception[0] is None:
            self._collect(final=True)
            self._show(final=True)

    def rows(self) -> list[dict[str, Any]]:
        return [self.history[step] for step in sorted(self.history)]

    def _follow(self) -> None:
        while not self._stop.wait(1.0):
            self._collect()
            self._show()

    def _collect(self, final: bool = False) -> None:
        import ray

        try:
            rows = ray.get(self.log.since.remote(self._position), timeout=30)
        except ray.exceptions.RayError as error:
            if self._stop.is_set():
                return
            self.stream.write(f"progress is not available: {error}\n")
            self._stop.set()
            return
        if not rows and not final:
            return
        self._position += len(rows)
        for row in rows:
            if self.history and row["step"] <= max(self.history):
                self.history = {step: old for step, old in self.history.items() if step < row["step"]}
            self.history[row["step"]] = row
        if final or time.monotonic() - self._written_at > WRITE_SECONDS:
            self._written_at = time.monotonic()
            self.run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows()))

    def _show(self, final: bool = False) -> None:
        if not self.history:
            return
        live = self.stream.isatty()
        newest = self.history[max(self.history)]
        if newest["step"] == self._shown_step and not (final and live):
            return
        if not final and not live and time.monotonic() - self._shown_at < self.seconds:
            return
        self._shown_at, self._shown_step = time.monotonic(), newest["step"]
        line = progress_line(newest, self.total_steps)
        self.stream.write(f"\r{line}\x1b[K" + ("\n" if final else "") if live else line + "\n")
        self.stream.flush()


def progress_line(row: dict[str, Any], total_steps: int) -> str:
    """One line for a row of the history, e.g.
    `step   120/256  47 %   1,482 tok/s  loss 0.612  fvu 0.71 0.60 0.55  l0 32.0  dead 0  eta 0:46`."""
    batch = row["tokens"] / row["step"]
    seconds = (total_steps - row["step"]) * batch / max(row["tokens_per_second"], 1e-9)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    fvu = " ".join(f"{value:.3f}" for value in row["fvu"])
    share, speed = row["step"] / total_steps, row["tokens_per_second"]
    return (
        f"step {row['step']:>6,}/{total_steps:,} {share:4.0%} {speed:>8,.0f} tok/s"
        f"  loss {row['loss']:.4f}  fvu {fvu}  l0 {row['l0']:.1f}  dead {row['dead']}  eta {eta}"
    )
