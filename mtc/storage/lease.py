"""Who writes a run: one job at a time, also where two jobs know nothing of each other.

    <run>/writer.json   {"id", "host", "pid", "beat"}, written anew every few seconds by the job that holds the run

Nothing compares clocks: a job is alive if its file changes while another one looks at it, or if its process is there.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtc.storage.runs import WRITER, RunDirectory, RunError

logger = logging.getLogger(__name__)
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""Seconds without a change of its file after which a job of another machine is dead."""


class Lease:
    """Holds a run while used as a context. Raises RunError on entering it if another job does; one that was killed on
    this machine is noticed at once, one that was killed elsewhere after `stale` seconds."""

    def __init__(self, run: RunDirectory, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS):
        self.run, self.beat, self.stale = run, beat, stale
        self._lost: str | None = None
        self._me = {"id": uuid.uuid4().hex, "host": _host(), "pid": os.getpid()}
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hold, daemon=True)

    def __enter__(self) -> Lease:
        self._wait_for_other()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(2 * self.beat)
        try:
            if self._is_mine():
                self.run.remove(WRITER)
        except FileNotFoundError:  # with all that was there
            pass
        except Exception as error:  # of the storage; the next job waits for it to become stale
            logger.warning("%s could not be removed: %s", self.run.location(WRITER), error)

    def require(self) -> None:
        """Raises RunError if this job must not write the run any longer: another one took it, for this one seemed
        dead."""
        if self._lost:
            raise RunError(self._lost)

    def _wait_for_other(self) -> None:
        first = self._read()
        if first is None or (first.get("host") == self._me["host"] and not _alive(first.get("pid"))):
            return
        deadline = time.monotonic() + self.stale
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.beat))
            now = self._read()
            if now is None:
                return
            if now != first:
                raise RunError(
                    f"output.run_id={self.run.run_id}: another job is writing this run, process {now.get('pid')} on "
                    f"{str(now.get('host')).split()[0]}"
                )

    def _hold(self) -> None:
        while not self._stop.wait(self.beat):
            try:
                if not self._is_mine():
                    return
                self._write()
            except Exception as error:  # of the storage
                logger.warning("%s could not be written: %s", self.run.location(WRITER), error)

    def _is_mine(self) -> bool:
        """Whether no other job has taken the run, as far as its file says now."""
        other = self._read()
        if other is not None and other.get("id") != self._me["id"]:
            self._lost = (
                f"output.run_id={self.run.run_id}: another job writes this run now, process {other.get('pid')} "
                f"on {str(other.get('host')).split()[0]}"
            )
        return self._lost is None

    def _write(self) -> None:
        self._beats += 1
        self.run.write(WRITER, json.dumps(self._me | {"beat": self._beats}))

    def _read(self) -> dict[str, Any] | None:
        return _sign(self.run)


def holders(runs: Sequence[RunDirectory], watch_seconds: float) -> set[str]:
    """URLs of those directories that a living job holds: its sign of life changes within `watch_seconds`, for all of
    them together, or its process is on this machine."""
    here, first = _host(), {run.url: (run, sign) for run in runs if (sign := _sign(run)) is not None}
    held = {url for url, (_, sign) in first.items() if sign.get("host") == here and _alive(sign.get("pid"))}
    waiting = {url: each for url, each in first.items() if each[1].get("host") != here}
    deadline = time.monotonic() + min(watch_seconds, STALE_SECONDS)
    while waiting and time.monotonic() < deadline:
        time.sleep(min(1.0, watch_seconds))
        changed = {url for url, (run, sign) in waiting.items() if _sign(run) not in (sign, None)}
        held |= changed
        waiting = {url: each for url, each in waiting.items() if url not in changed}
    return held


def _sign(run: RunDirectory) -> dict[str, Any] | None:
    if not run.exists(WRITER):
        return None
    try:
        found = json.loads(run.read(WRITER))
    except RunError:  # removed just now
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alive(pid: Any) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _host() -> str:
    """Name of the machine and of the space in which its process numbers count."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:  # not on Linux: nobody is found dead then, only stale
            parts.append(uuid.uuid4().hex)
    return " ".join(parts)
