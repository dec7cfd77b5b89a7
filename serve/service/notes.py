"""Notes and stars that are written through the service."""

from __future__ import annotations

from mtc.results import FeatureNote
from mtc.storage import NotesReadOnly
from serve.contract import NoteRequest, ServiceError
from serve.service.served_run import ServedLayer


def write_note(own: ServedLayer, feature: int, asked: NoteRequest) -> FeatureNote:
    """Keep a note, a star or both of a feature; what is kept of it now.

    Raises ServiceError: 404 where there is no analysis or feature, 409 where the run can't be written to, 412 where
    the note is another one than was seen, 503 while the storage fails.
    """
    own.analysed.check(feature)

    def edit(before: FeatureNote) -> FeatureNote:
        given = asked.model_fields_set
        if "seen" in given and asked.seen != (before.changed or None):
            detail = {"note": before.note, "star": before.star, "note_changed": before.changed or None}
            message = f"the note on feature {feature} was changed since it was read; read it again"
            raise ServiceError(412, "note_changed", message, detail)
        note = (asked.note or "").strip() or None if "note" in given else before.note
        return FeatureNote(note=note, star=asked.star if "star" in given else before.star)

    try:
        return own.notes.update(feature, edit)
    except NotesReadOnly as error:
        message = f"notes can't be kept beside run {own.run_id}: its storage can't be written to"
        raise ServiceError(409, "read_only", message) from error
    except ServiceError:
        raise
    except Exception as error:
        message = f"the note was not written: the run's storage fails ({type(error).__name__})"
        raise ServiceError(503, "storage", message, headers={"Retry-After": "5"}) from error
