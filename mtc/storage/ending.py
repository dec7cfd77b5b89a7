"""How the last job that began work on a run ended, noted in the run: where Ray runs the job, all of its exit codes
but 0 become 1.

<run>/ended.json   {"exit_code", "message"}, there until the next job begins; a job that was killed leaves none
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mtc.errors import exit_code, known_cause, one_line
from mtc.record import Record
from mtc.storage.lease import Lease
from mtc.storage.runs import ENDED, RunDirectory, RunError

logger = logging.getLogger(__name__)
NOTE_PATIENCE = 5.0
"""Seconds for which storage that fails is asked to keep the note: the job is ending."""


class Ending(Record):
    """How a job ended that did not finish the run."""

    exit_code: int
    """Exit code of the job."""
    message: str
    """Why it ended, in one line."""


@contextmanager
def noting_the_end(run: RunDirectory, lease: Lease) -> Iterator[None]:
    """A context for a job's work on a run that it holds: what ends it is noted, unless another job took the run."""
    if run.exists(ENDED):
        run.remove(ENDED)
    try:
        yield
    except BaseException as error:
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else str(known_cause(error) or one_line(error))
        ending = Ending(exit_code=exit_code(error), message=said)
        try:
            lease.require()
            run.write(ENDED, ending.model_dump_json(), NOTE_PATIENCE)
        except Exception as unwritten:  # of the storage, or the run is another job's: what ended this one is more
            logger.warning("%s could not be written: %s", run.location(ENDED), one_line(unwritten))
        raise


def read_ending(run: RunDirectory) -> Ending | None:
    """How the last job that began work ended, if it did not finish the run; None if it was killed, has not ended, or
    its note can't be read."""
    try:
        return Ending.model_validate_json(run.read(ENDED)) if run.exists(ENDED) else None
    except (RunError, ValueError):  # removed just now by the next job; damaged
        return None
