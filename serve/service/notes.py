"""Notes and stars that are shown and written through the service, whose other work never waits for their storage."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from mtc.results import FeatureNote
from mtc.storage import Notes, NotesReadOnly, RunDirectory
from mtc.storage.hub import is_hub_url
from mtc.storage.notes import NOTES_PATIENCE
from serve.contract import NoteRequest, ServiceError

logger = logging.getLogger("ray.serve")

FRESH_S = 2.0
"""For which notes that were read are shown without a look at the storage."""
FIRST_S, AGAIN_S = 2.0, 0.5
"""For which notes are waited for that were never read, and by whoever begins to read them again."""
WRITE_S = 15.0
"""For which a note that is written is waited for."""
_WORKERS = ThreadPoolExecutor(2, thread_name_prefix="notes")
"""Of the whole process: storage that hangs takes these threads, and none that /encode needs."""


class LayerNotes:
    """The notes of one layer's features, for one event loop."""

    def __init__(self, run: RunDirectory):
        self._notes = Notes(run)
        self._reading: Future[None] | None = None
        """The last reading that was begun; one runs at a time."""
        self._first_until = self._due = 0.0
        """By time.monotonic(): until when the first reading is waited for, and when the next one may begin."""
        self._was_read = False
        self.writable = not is_hub_url(run.url)
        """Whether notes can be kept, as far as one can tell without writing."""

    async def read(self) -> Mapping[int, FeatureNote]:
        """Those features that have a note or a star; while the storage fails or hangs, as they were last."""
        now, begun = time.monotonic(), False
        if self._reading is None:
            self._first_until = now + FIRST_S
        if self._reading is None or (self._reading.done() and now >= self._due):
            self._reading, begun = _WORKERS.submit(self._read), True
        patience = AGAIN_S * begun if self._was_read else self._first_until - now
        if patience > 0:
            await asyncio.wait([asyncio.wrap_future(self._reading)], timeout=patience)
        return self._notes.known

    def _read(self) -> None:
        pause = FRESH_S
        try:
            self.writable = self._notes.writable
            self._notes.read()
        except Exception as error:  # of the storage; whoever looks at a feature can do without
            logger.warning("notes can't be read now: %s", error)
            pause = NOTES_PATIENCE
        self._due, self._was_read = time.monotonic() + pause, True

    async def write(self, run_id: str, feature: int, asked: NoteRequest) -> FeatureNote:
        """Keep a note, a star or both of a feature that there is; what is kept of it now; `read` tells it at once.

        Raises ServiceError: 409 where the run can't be written to, 412 where the note is another one than was seen, 503
        while the storage fails or hangs.
        """

        def edit(before: FeatureNote) -> FeatureNote:
            given = asked.model_fields_set
            if "seen" in given and asked.seen != (before.changed or None):
                detail = {"note": before.note, "star": before.star, "note_changed": before.changed or None}
                message = f"the note on feature {feature} was changed since it was read; read it again"
                raise ServiceError(412, "note_changed", message, detail)
            note = (asked.note or "").strip() or None if "note" in given else before.note
            return FeatureNote(note=note, star=asked.star if "star" in given else before.star)

        writing = _WORKERS.submit(self._notes.update, feature, edit)
        try:
            # One that has not begun by then is given up, so that hanging storage gathers no crowd.
            return await asyncio.wait_for(asyncio.wrap_future(writing), timeout=WRITE_S)
        except NotesReadOnly as error:
            message = f"notes can't be kept beside run {run_id}: its storage can't be written to"
            raise ServiceError(409, "read_only", message) from error
        except ServiceError:
            raise
        except TimeoutError as error:
            message = f"the run's storage has not answered for {WRITE_S:g} s; the note may yet be written"
            raise ServiceError(503, "storage", message, headers={"Retry-After": "5"}) from error
        except Exception as error:
            message = f"the note was not written: the run's storage fails ({type(error).__name__})"
            raise ServiceError(503, "storage", message, headers={"Retry-After": "5"}) from error
