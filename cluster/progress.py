"""From the trainers to the person: the metrics history and the progress line."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mtc.runs import RunDirectory

if TYPE_CHECKING:
    from mtc.timing import StreamTiming

WAITING = 0.2
"""Share of its time beyond which a side counts as waiting for the other."""
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
    """While used as a context, a thread copies the log's rows into each layer's `metrics.jsonl` and shows the newest.

    `runs` maps a layer to the directory of its transcoder. On a terminal one line is redrawn; elsewhere a line appears
    every `seconds`. A restart from a checkpoint repeats steps: their first account is replaced.
    """

    def __init__(
        self,
        log: Any,
        runs: Mapping[int, RunDirectory],
        total_steps: int,
        stream: TextIO = sys.stdout,
        seconds: float = 5.0,
    ):
        self.log, self.runs, self.total_steps, self.stream, self.seconds = log, runs, total_steps, stream, seconds
        self.histories: dict[int, dict[int, dict[str, Any]]] = {layer: {} for layer in runs}
        for layer, run in runs.items():
            if run.exists("metrics.jsonl"):
                rows = map(json.loads, run.read("metrics.jsonl").decode().splitlines())
                self.histories[layer] = {row["step"]: row for row in rows}
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

    def rows(self, layer: int) -> list[dict[str, Any]]:
        history = self.histories[layer]
        return [history[step] for step in sorted(history)]

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
            history = self.histories[row["layer"]]
            if history and row["step"] <= max(history):
                for step in [step for step in history if step >= row["step"]]:
                    del history[step]
            history[row["step"]] = row
        if final or time.monotonic() - self._written_at > WRITE_SECONDS:
            self._written_at = time.monotonic()
            for layer, run in self.runs.items():
                run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows(layer)))

    def _show(self, final: bool = False) -> None:
        newest = [history[max(history)] for history in self.histories.values() if history]
        if len(newest) < len(self.histories):
            return
        live = self.stream.isatty()
        step = newest[0]["step"]
        if step == self._shown_step and not (final and live):
            return
        if not final and not live and time.monotonic() - self._shown_at < self.seconds:
            return
        self._shown_at, self._shown_step = time.monotonic(), step
        line = progress_line(newest, self.total_steps)
        self.stream.write(f"\r{line}\x1b[K" + ("\n" if final else "") if live else line + "\n")
        self.stream.flush()


def balance(timing: StreamTiming) -> str:
    """What limited the run, from what was measured."""
    t = timing
    line = f"stream: {t.tokens_per_second:,.0f} tok/s; trainers waited {t.waiting_share:.0%} of {t.wall_seconds:.0f} s"
    if t.forward_share is None:
        return line
    line += f", model actors computed {t.forward_share:.0%}"
    if t.waiting_share <= WAITING:
        part = max((p for p in t.trainer_seconds if p != "waiting"), key=lambda p: t.trainer_seconds[p])
        share = t.trainer_seconds[part] / t.wall_seconds
        busy = "both sides are busy" if t.forward_share > 1 - WAITING else "the trainers are the limit"
        return f"{line}; {busy} (largest part of their time: {part.replace('_', '-')}, {share:.0%})"
    if t.forward_share > 0.5:
        return f"{line}; the language model is the limit"
    return f"{line}; neither side is busy, what lies between them is the limit (larger data.unit_tokens may help)"


def progress_line(rows: Sequence[dict[str, Any]], total_steps: int) -> str:
    """One line for the newest rows of the history, one for each layer, e.g.
    `step   120/256  47 %   1,482 tok/s  wait 71%  loss 0.612  fvu 0.71 0.60 0.55  l0 32.0  dead 0  eta 0:46`;
    of several layers only the full dictionaries' FVU is shown."""
    row = rows[0]
    batch = row["tokens"] / row["step"]
    seconds = (total_steps - row["step"]) * batch / max(row["tokens_per_second"], 1e-9)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    if row["step"] == 1:
        eta = "?"  # its rate is that of filling the shuffle buffer
    share, speed, spent = row["step"] / total_steps, row["tokens_per_second"], row["seconds"]
    waiting = spent["waiting"] / max(sum(spent.values()), 1e-9)
    if len(rows) == 1:
        fvu = " ".join(f"{value:.3f}" for value in row["fvu"])
        quality = f"loss {row['loss']:.4f}  fvu {fvu}  l0 {row['l0']:.1f}  dead {row['dead']}"
    else:
        fvu = " ".join(f"{r['fvu'][-1]:.3f} (layer {r['layer']})" for r in rows)
        quality = f"fvu {fvu}  dead {' '.join(str(r['dead']) for r in rows)}"
    step = f"step {row['step']:>6,}/{total_steps:,} {share:4.0%}"
    return f"{step} {speed:>8,.0f} tok/s  wait {waiting:3.0%}  {quality}  eta {eta}"
