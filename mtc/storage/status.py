"""How far a run is, read from its directory alone: from any machine that reaches the storage, without Ray."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Literal

from mtc.record import Record
from mtc.storage.checkpoints import Checkpoints
from mtc.storage.lease import STALE_SECONDS
from mtc.storage.runs import WRITER, RunDirectory, RunError, named_run

State = Literal["finished", "running", "stopped"]
"""Published; some job works on it; no job works on it, the same command continues it."""


class RunStatus(Record):
    """One run."""

    run_id: str
    """Its name."""
    url: str
    """Where it lies."""
    state: State
    """Whether anything more is to be expected."""
    stage: str
    """prepare, train, analyse, finished: what is done next or now."""
    step: int
    """Optimizer steps done, by the metrics history."""
    total_steps: int
    """That the run has in all."""
    tokens: int
    """Tokens trained on."""
    tokens_per_second: float | None
    """At the newest row of the history."""
    fvu: list[float] | None
    """By prefix: of held-out tokens if the run is finished, of the newest logged batch otherwise."""
    l0: float | None
    """Active features per token, likewise."""
    dead: int | None
    """Dead features, by the training counter."""
    seconds_left: float | None
    """Until training ends, at that speed; None if it is not running."""
    checkpoint_step: int | None
    """Of the newest complete checkpoint."""
    newest_row: str | None
    """When the newest row was made, ISO 8601."""
    events: list[str]
    """What else happened, the last ones."""


def run_status(url: str, watch_seconds: float = 6.0) -> RunStatus:
    """The status of a run directory, or of `<root>/latest`.

    A run that is not finished has a job if the job's sign of life changes within `watch_seconds`, which is waited for.
    Raises RunError if there is no run.
    """
    run = named_run(url)
    if not run.exists("config.yaml"):
        raise RunError(f"no run at {run.url}: there is no config.yaml")
    config = run.config()
    layer = run.for_layer(config.model.sites[0].layer)
    history, events = layer.read_lines("metrics.jsonl"), layer.read_lines("events.jsonl")
    row = history[-1] if history else {}
    finished = run.is_finished()
    state: State = "finished" if finished else "running" if _has_job(run, watch_seconds) else "stopped"
    fvu, l0 = row.get("fvu"), row.get("l0")
    if finished and layer.exists("analysis.json"):
        evaluation = json.loads(layer.read("analysis.json"))["evaluation"]
        fvu, l0 = evaluation["fvu"], evaluation["l0"][-1]
    speed = row.get("tokens_per_second")
    left = max(config.data.num_tokens - row.get("tokens", 0), 0)
    trained = layer.exists("transcoder.safetensors")
    checkpoint = None if finished else Checkpoints(run.url).latest()
    return RunStatus(
        run_id=run.run_id,
        url=run.url,
        state=state,
        stage="finished" if finished else "analyse" if trained else "train" if history else "prepare",
        step=row.get("step", 0),
        total_steps=config.total_steps,
        tokens=row.get("tokens", 0),
        tokens_per_second=speed,
        fvu=fvu,
        l0=l0,
        dead=row.get("dead"),
        seconds_left=left / speed if state == "running" and speed and not trained else None,
        checkpoint_step=checkpoint.manifest.step if checkpoint else None,
        newest_row=_iso(row.get("time")),
        events=[f"{event['time']} {event['kind']}: {event['message']}" for event in events[-5:]],
    )


def describe(status: RunStatus) -> str:
    """For people."""
    share = status.step / status.total_steps
    lines = [f"{status.run_id}: {status.state}" + (f" ({status.stage})" if status.state != "finished" else "")]
    lines.append(f"  {status.url}")
    lines.append(f"  step {status.step:,} of {status.total_steps:,} ({share:.0%}), {status.tokens:,} tokens")
    if status.state == "running" and status.tokens_per_second:
        lines[-1] += f", {status.tokens_per_second:,.0f} tok/s"
    if status.seconds_left is not None:
        minutes = status.seconds_left / 60
        lines[-1] += f", {minutes:,.0f} minutes of training left" if minutes >= 1 else ", less than a minute left"
    if status.fvu and status.l0 is not None:
        where = "held-out" if status.state == "finished" else "last batch's"
        lines.append(f"  {where} fvu {' '.join(f'{value:.3f}' for value in status.fvu)}, l0 {status.l0:.1f}")
    if status.checkpoint_step is not None:
        lines.append(f"  newest checkpoint: step {status.checkpoint_step:,}")
    if status.newest_row and status.state != "finished":
        lines.append(f"  newest figures: {status.newest_row}")
    return "\n".join([*lines, *(f"  {event}" for event in status.events)])


def _has_job(run: RunDirectory, watch_seconds: float) -> bool:
    """Whether a job writes its sign of life. Its clock and ours are not compared: a change is looked for."""
    deadline = time.monotonic() + min(watch_seconds, STALE_SECONDS)
    first = _sign(run)
    while first is not None and time.monotonic() < deadline:
        time.sleep(min(0.5, watch_seconds))
        now = _sign(run)
        if now != first:
            return now is not None
    return False


def _sign(run: RunDirectory) -> bytes | None:
    try:
        return run.read(WRITER)
    except RunError:
        return None


def _iso(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds") if seconds else None
