"""How far a run is, read from its directory alone: from any machine that reaches the storage, without Ray.

Finished is a run with a manifest; a job works on one whose sign of life (mtc.storage.lease) changes.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Literal

from mtc.record import Record
from mtc.storage.addresses import named_run
from mtc.storage.checkpoints import Checkpoints
from mtc.storage.ending import read_ending
from mtc.storage.lease import STALE_SECONDS
from mtc.storage.runs import WRITER, RunDirectory, RunError

State = Literal["finished", "running", "stopped"]
"""Whether a run is published, some job works on it, or no job does, so that the same command continues it."""


class RunStatus(Record):
    """How far one run is, as its directory tells."""

    run_id: str
    """Name of the run."""
    url: str
    """Path or URL of the run's directory."""
    state: State
    """Whether anything more is to be expected of the run."""
    exit_code: int | None
    """Exit code of the last job that began work on the run, 0 if that is finished; None while one works on it or if
    it was killed."""
    ended: str | None
    """Why that job ended, if the run is not finished; None where nobody knows."""
    stage: str
    """Stage that is done now or next: prepare, train, analyse, finished."""
    step: int
    """Optimizer steps done, by the metrics history."""
    total_steps: int
    """Optimizer steps that the run has in all."""
    tokens: int
    """Tokens trained on, repeats included."""
    tokens_per_second: float | None
    """Speed of training at the newest row of the metrics history; None without a row."""
    fvu: list[float] | None
    """Fraction of variance unexplained by prefix: of held-out tokens if the run is finished, of the newest logged batch
    otherwise."""
    member: str
    """Of a run of several transcoders the one whose figures these are, the first; empty for a single one."""
    massive_tokens: int
    """Held-out tokens that `fvu` and `l0` are without, if the run is finished: the massive ones."""
    l0: float | None
    """Active features per token: of held-out tokens if the run is finished, of the newest logged batch otherwise."""
    dead: int | None
    """Features that are dead by the training counter; None if that is not known."""
    seconds_left: float | None
    """Seconds until training ends at the present speed; None if the run is not training."""
    checkpoint_step: int | None
    """Optimizer steps at the newest complete checkpoint; None if there is none."""
    newest_row: str | None
    """When the newest row of the metrics history was made, ISO 8601; None without a row."""
    events: list[str]
    """Last events of the run, as text."""


def run_status(url: str, watch_seconds: float = 6.0) -> RunStatus:
    """The status of a run directory, or of `<root>/latest`.

    A run that is not finished has a job if the job's sign of life changes within `watch_seconds`, which is waited for.
    Raises RunError if there is no run.
    """
    run = named_run(url)
    if not run.exists("config.yaml"):
        raise RunError(f"no run at {run.url}: there is no config.yaml")
    config = run.config()
    (member, first), *others = run.members().items()
    history, events = first.read_lines("metrics.jsonl"), first.read_lines("events.jsonl")
    row = history[-1] if history else {}
    finished = run.is_finished()
    state: State = "finished" if finished else "running" if _has_job(run, watch_seconds) else "stopped"
    ending = read_ending(run) if state == "stopped" else None
    fvu, l0, massive = row.get("fvu"), row.get("l0"), 0
    if finished and first.exists("analysis.json"):
        evaluation = json.loads(first.read("analysis.json"))["evaluation"]
        fvu, l0 = evaluation["fvu"], evaluation["l0"][-1]
        massive = evaluation.get("massive", {}).get("tokens", 0)  # an older analysis leaves none out
    speed = row.get("tokens_per_second")
    left = max(config.data.num_tokens * config.data.replays - row.get("tokens", 0), 0)
    trained = first.exists("transcoder.safetensors")
    checkpoint = None if finished else Checkpoints(run.url).latest()
    return RunStatus(
        run_id=run.run_id,
        url=run.url,
        state=state,
        exit_code=0 if finished else ending.exit_code if ending else None,
        ended=ending.message if ending else None,
        stage="finished" if finished else "analyse" if trained else "train" if history else "prepare",
        step=row.get("step", 0),
        total_steps=config.total_steps,
        tokens=row.get("tokens", 0),
        tokens_per_second=speed,
        fvu=fvu,
        member=member if others else "",
        massive_tokens=massive,
        l0=l0,
        dead=row.get("dead"),
        seconds_left=left / speed if state == "running" and speed and not trained else None,
        checkpoint_step=checkpoint.manifest.step if checkpoint else None,
        newest_row=_iso(row.get("time")),
        events=[f"{event['time']} {event['kind']}: {event['message']}" for event in events[-5:]],
    )


def describe(status: RunStatus) -> str:
    """The status as text for people."""
    share = status.step / status.total_steps
    lines = [f"{status.run_id}: {status.state}" + (f" ({status.stage})" if status.state != "finished" else "")]
    lines.append(f"  {status.url}")
    if status.state == "stopped" and status.ended:
        lines.append(f"  the last job that began work ended with exit code {status.exit_code}: {status.ended}")
    elif status.state == "stopped":
        lines.append("  nothing tells how the last job that began work ended: it was killed, or its machine died")
    lines.append(f"  step {status.step:,} of {status.total_steps:,} ({share:.0%}), {status.tokens:,} tokens")
    if status.state == "running" and status.tokens_per_second:
        lines[-1] += f", {status.tokens_per_second:,.0f} tok/s"
    if status.seconds_left is not None:
        minutes = status.seconds_left / 60
        lines[-1] += f", {minutes:,.0f} minutes of training left" if minutes >= 1 else ", less than a minute left"
    if status.fvu and status.l0 is not None:
        where = "held-out" if status.state == "finished" else "last batch's"
        where = f"{status.member}: {where}" if status.member else where
        lines.append(f"  {where} fvu {' '.join(f'{value:.3f}' for value in status.fvu)}, l0 {status.l0:.1f}")
        lines[-1] += f", without {status.massive_tokens:,} massive tokens" if status.massive_tokens else ""
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
