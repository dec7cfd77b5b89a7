"""From the trainers to the person: the metrics history and the progress line."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from mtc.config import ConfigError
from mtc.errors import one_line
from mtc.storage import RunDirectory
from mtc.telemetry import for_people, output, say

if TYPE_CHECKING:
    from mtc.results import StreamTiming

logger = logging.getLogger(__name__)

RESUMED = "resume"  # a kind of event
SHOWN = ("step", "tokens", "tokens_per_second", "loss", "fvu", "l0", "dead")  # of a row, in JSON lines
OF_MEMBER = ("loss", "fvu", "l0", "dead")  # of each transcoder's row, where there are several
MOST_SHOWN = 3  # transcoders with a figure each in the progress line
QUIET = ("checkpoint",)  # kinds that are neither kept nor shown: one a minute, for weeks
DYING_SECONDS = 30.0  # until the actors of a job that was killed are gone
WAITING = 0.2
"""Share of its time, from 0 to 1, beyond which a side counts as waiting for the other."""
MOST_REPLAYS = 8
"""Most times that the balance advises to train a token."""
WRITE_SECONDS = 10.0  # between writes of the history, which is written whole,
WRITE_SHARE = 0.05  # and may take at most this share of the time


class Follower(Protocol):
    """Whoever else wants to know what the trainers say, as it arrives."""

    def row(self, row: dict[str, Any]) -> None:
        """Take a row of the metrics history."""

    def account(self, account: dict[str, Any]) -> None:
        """Take what one rank did since its last account; see `cluster.accounts.Account`."""

    def event(self, event: dict[str, Any]) -> None:
        """Take an event of the run; `undone` steps if it was a step back."""


class MetricsLog:
    """A Ray actor that trainers send metrics and events to and the driver collects them from."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex  # another one if Ray had to start this actor again
        self.rows: list[dict[str, Any]] = []
        self.collected = 0  # rows that were dropped, since the driver has them
        self.start: str | None = None

    def append(self, row: dict[str, Any]) -> None:
        """Take a row of the metrics history."""
        self.rows.append(row)

    def event(self, kind: str, message: str, step: int | None = None) -> None:
        """Take an event of the run."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows.append({"time": now, "kind": kind, "message": message, "step": step})

    def since(self, name: str, position: int) -> tuple[str, list[dict[str, Any]]]:
        """This actor's name, and its rows from `position` on, or all of them if the reader knows another name.

        There is one reader: what lies before `position` has arrived.
        """
        if name == self.name:
            del self.rows[: position - self.collected]
            self.collected = position
        else:  # a new reader counts from what is here
            self.collected = 0
        return self.name, self.rows

    def choose(self, checkpoint: str) -> None:
        """Note the name of the checkpoint that the trainers continue, or that they continue none."""
        self.start = checkpoint

    def chosen(self) -> str | None:
        """What `choose` was told last; None if this actor had to be started again since."""
        return self.start


def start_metrics_log(run: RunDirectory) -> Any:
    """The MetricsLog of a run, on the driver's node. It is named for the run, so that no two jobs train the same one.

    Raises ConfigError if another job does; one that has just died is waited for.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.outcome import ANSWER_SECONDS

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"metrics of {run.url}"
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    deadline = time.monotonic() + DYING_SECONDS
    while True:
        try:
            log: Any = ray.remote(MetricsLog).options(name=name, namespace="mtc", **options).remote()
            ray.get(log.since.remote("", 0), timeout=ANSWER_SECONDS)
            return log
        except ValueError as error:
            if "is already" not in str(error):  # Ray has no error of its own for a name that is taken
                raise
            if time.monotonic() > deadline:
                raise ConfigError(f"output.run_id={run.run_id}: another job of this cluster is training it") from None
            time.sleep(1.0)


class ProgressReader:
    """While used as a context, a thread copies the log's rows into each transcoder's `metrics.jsonl` and shows the
    newest.

    `runs` has the directory of each transcoder by its name. On a terminal one line is redrawn; elsewhere a line appears
    every `seconds`. A restart from a checkpoint repeats steps: their first account is replaced. Events go into
    `events.jsonl` of each directory, and are shown. `followers` get everything; one that fails gets nothing more.
    """

    def __init__(
        self,
        log: Any,
        runs: Mapping[str, RunDirectory],
        total_steps: int,
        followers: Sequence[Follower] = (),
        seconds: float = 5.0,
    ):
        self.log, self.runs, self.total_steps, self.seconds = log, runs, total_steps, seconds
        self.followers = list(followers)
        self.histories: dict[str, dict[int, dict[str, Any]]] = {}
        """Rows of the metrics history by step, in the order of steps, for each transcoder."""
        self.events: list[dict[str, Any]] = []
        for name, run in runs.items():
            rows = run.read_lines("metrics.jsonl")  # of earlier versions without `member`
            self.histories[name] = {row["step"]: {"member": name} | row for row in rows}
            self.events = run.read_lines("events.jsonl")
        self._name, self._position = "", 0
        self._shown_at = 0.0
        self._changed = False
        self._write_at = 0.0
        self._shown_step = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressReader:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._collect(final=True)
        if exception[0] is None:
            self._show(final=True)

    def rows(self, member: str) -> list[dict[str, Any]]:
        return list(self.histories[member].values())

    def _follow(self) -> None:
        while not self._stop.wait(1.0):
            self._collect()
            self._show()

    def _collect(self, final: bool = False) -> None:
        import ray

        try:
            name, rows = ray.get(self.log.since.remote(self._name, self._position), timeout=30)
        except ray.exceptions.RayError as error:  # the actor is being started again, or the job ends
            logger.warning("no news of the trainers: %s", error)
            return
        self._position = len(rows) + (self._position if name == self._name else 0)
        self._name = name
        self._changed |= bool(rows)
        # Trainers go on after a checkpoint: what led to it must not get lost with this process.
        saved = any(row.get("kind") == "checkpoint" for row in rows)
        for row in rows:
            if "kind" in row:
                self._take_event(row)
            elif "rank" in row:
                self._tell("account", row)
            else:
                self._take_metrics(row)
        if (self._changed and time.monotonic() > self._write_at) or saved or final:
            self._write()

    def _take_metrics(self, row: dict[str, Any]) -> None:
        history = self.histories[row["member"]]
        while history and _newest(history) >= row["step"]:
            history.popitem()
        history[row["step"]] = row
        self._tell("row", row)

    def _take_event(self, event: dict[str, Any]) -> None:
        newest = max(map(_newest, self.histories.values()), default=0)
        if event["kind"] == RESUMED and newest > event["step"]:
            undone = newest - event["step"]
            event["message"] += f"; {undone} step{'s' * (undone > 1)} or a few more are done again"
            event["undone"] = undone
        self._tell("event", event)
        if event["kind"] in QUIET:
            return
        self.events.append(event)
        fields = {name: value for name, value in event.items() if name not in ("kind", "message", "time")}
        self._say(event["kind"], f"{event['kind'].replace('_', ' ')}: {event['message']}", **fields)

    def _tell(self, what: str, said: dict[str, Any]) -> None:
        for follower in list(self.followers):
            try:
                getattr(follower, what)(said)
            except Exception as error:  # of somebody else's server; training does not depend on it
                self.followers.remove(follower)
                self._say("follower_failed", f"{type(follower).__name__} gets no more metrics: {one_line(error)}")

    def _write(self) -> None:
        began = time.monotonic()
        events = "".join(json.dumps(event) + "\n" for event in self.events)
        try:
            for name, run in self.runs.items():
                run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows(name)), WRITE_SECONDS)
                run.write("events.jsonl", events, WRITE_SECONDS)
            self._changed = False
        except Exception as error:  # of the storage; all rows are written again the next time
            self._say("metrics_unwritten", f"metrics could not be written: {type(error).__name__}: {error}")
        now = time.monotonic()
        self._write_at = now + max(WRITE_SECONDS, (now - began) / WRITE_SHARE)

    def _say(self, event: str, line: str, **fields: Any) -> None:
        if self._live():
            output().write("\r\x1b[K")
        say(event, line, **fields)

    @staticmethod
    def _live() -> bool:
        """Whether one line of a terminal is redrawn."""
        return output().isatty() and for_people()

    def _show(self, final: bool = False) -> None:
        newest = [history[_newest(history)] for history in self.histories.values() if history]
        if len(newest) < len(self.histories):
            return
        live = self._live()
        step = newest[0]["step"]
        if step == self._shown_step and not (final and live):
            return
        if not final and not live and time.monotonic() - self._shown_at < self.seconds:
            return
        self._shown_at, self._shown_step = time.monotonic(), step
        line = progress_line(newest, self.total_steps)
        if not live:
            fields = {name: newest[0][name] for name in SHOWN if name in newest[0]}
            if len(newest) > 1:
                fields["members"] = {row["member"]: {name: row[name] for name in OF_MEMBER} for row in newest}
            say("step", line, total_steps=self.total_steps, **fields)
            return
        output().write(f"\r{line}\x1b[K" + ("\n" if final else ""))
        output().flush()


def balance(timing: StreamTiming, replays: int | None = None) -> str:
    """What limited the run, from what was measured.

    `replays` is the run's `data.replays` where trainers have hardware of their own: the line then says how many would
    have fitted into the time that they waited, at most MOST_REPLAYS.
    """
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
        line += "; the language model is the limit"
        free = min(MOST_REPLAYS, int(replays / (1 - t.waiting_share) + 1e-9)) if replays and t.waiting_share < 1 else 0
        return f"{line}; data.replays={free} would take no longer" if replays and free > replays else line
    return f"{line}; neither side is busy, what lies between them is the limit (larger data.unit_tokens may help)"


def progress_line(rows: Sequence[dict[str, Any]], total_steps: int) -> str:
    """One line for the newest rows of the history, one for each transcoder, e.g.
    `step   120/256  47 %   1,482 tok/s  wait 71%  loss 0.612  fvu 0.71 0.60 0.55  l0 32.0  dead 0  eta 0:46`;
    of several transcoders only the full dictionaries' FVU is shown, of many the least and the most."""
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
        many, dead = len(rows) > MOST_SHOWN, [r["dead"] for r in rows]
        shown = sorted(rows, key=lambda r: r["fvu"][-1])[:: len(rows) - 1] if many else rows
        fvu = (" to " if many else " ").join(f"{r['fvu'][-1]:.3f} ({r['member']})" for r in shown)
        quality = f"fvu {fvu}  dead " + (f"{min(dead)} to {max(dead)}" if many else " ".join(map(str, dead)))
    step = f"step {row['step']:>6,}/{total_steps:,} {share:4.0%}"
    return f"{step} {speed:>8,.0f} tok/s  wait {waiting:3.0%}  {quality}  eta {eta}"


def _newest(history: Mapping[int, Any]) -> int:
    """The last step of a transcoder's history; 0 before the first."""
    return next(reversed(history), 0)
