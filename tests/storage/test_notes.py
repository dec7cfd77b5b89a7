"""Notes beside a run: on disks and object stores, by several writers, and never part of what the run is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mtc.config import load_preset, to_yaml
from mtc.results import FeatureNote
from mtc.storage import Notes, NotesReadOnly, RunDirectory, notes_to_json, open_run, read_notes
from mtc.storage.files import StorageUnreachable


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    run = RunDirectory(f"{tmp_path if request.param == 'local' else 'memory://runs'}/one")
    run.write("config.yaml", to_yaml(load_preset("tiny")))
    run.publish()
    yield run
    fsspec.filesystem("memory").store.clear()


def noted(run, feature, **given):
    return Notes(run).update(feature, lambda before: before.model_copy(update=given))


def plain(notes):
    return {feature: (each.note, each.star) for feature, each in notes.items()}


def test_what_one_writes_others_read_and_the_run_stays_the_same(run):
    before, reader = run.manifest(), Notes(run)
    assert reader.read() == {} and reader.writable
    noted(run, 3, note="oaths\n\u202e", star=True)
    assert plain(reader.read()) == {3: ("oaths\n\u202e", True)}
    noted(run, 3, star=False)
    noted(run, 4, star=True)
    assert plain(reader.read()) == {3: ("oaths\n\u202e", False), 4: (None, True)}
    noted(run, 4, star=False)  # what has neither is not listed
    assert plain(reader.read()) == plain(read_notes(run)) == {3: ("oaths\n\u202e", False)}
    assert open_run(run.url).manifest() == before
    again = run.publish(latest=False)
    assert again.files == before.files
    assert plain(reader.read()) == {3: ("oaths\n\u202e", False)}


OLD, LATE = "2020-01-01T00:00:00+00:00", "2999-01-01T01:00:00+01:00"


def test_a_file_of_all_notes_is_read_until_a_later_one_is_written(run):
    given = {3: FeatureNote(note="old", changed=OLD), 5: FeatureNote(note="five", changed=LATE)}
    run.write("notes.json", notes_to_json(given))
    assert json.loads(run.read("notes.json"))["5"] == {"note": "five", "star": False, "changed": LATE}
    noted(run, 3, note=None)
    assert plain(read_notes(run)) == {5: ("five", False)}
    for microseconds, star in ((1, True), (2, False)):  # a clock that goes wrong loses nothing, and each change shows
        assert noted(run, 5, star=star).changed == f"2999-01-01T00:00:00.00000{microseconds}+00:00"
        assert plain(read_notes(run)) == {5: ("five", star)}
    run.write("notes.json", notes_to_json({3: FeatureNote(note="newer", changed=LATE)}))
    assert plain(read_notes(run)) == {3: ("newer", False), 5: ("five", False)}
    assert "notes.json" not in run.publish(latest=False).files


@pytest.mark.parametrize("changed", ["", "9999", "9999-12-31T23:59:59.999999+00:00", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_time_is_older_than_any(run, changed):
    run.write("notes.json", notes_to_json({5: FeatureNote(note="five", changed=changed)}))
    assert noted(run, 5, star=True).changed != changed
    assert plain(read_notes(run)) == {5: ("five", True)}


def test_files_that_are_none_are_passed_over(run, caplog):
    noted(run, 3, note="kept")
    long = json.dumps({"note": "", "x": "y" * (1 << 16)})
    others = {"notes.json": "[1]", "notes/x.json": "{}", "notes/4.json": '{"note": 4}', "notes/6.json": long}
    for name, content in others.items():
        run.write(name, content)
    run.write("notes/5.json", json.dumps({"note": "x" * 501}))
    assert plain(read_notes(run)) == {3: ("kept", False)}
    assert len(caplog.messages) == 5 and all("no file of notes" in each for each in caplog.messages)


def test_one_wrong_entry_costs_no_other(run, caplog):
    wrong = {"x": {"note": "a"}, "4": {"note": 4}, "5": {"note": "b", "colour": "red"}}
    run.write("notes.json", json.dumps({"3": {"note": "kept"}} | wrong | {"6": {"star": True}}))
    assert plain(read_notes(run)) == {3: ("kept", False), 6: (None, True)}
    assert len(caplog.messages) == 1 and "in 3 of its 5 entries" in caplog.messages[0]


def test_only_what_changed_is_read_again(run, monkeypatch):
    for feature in range(3):
        noted(run, feature, note="before")
    reader, asked = Notes(run), []
    ask = reader._contents
    monkeypatch.setattr(reader, "_contents", lambda paths: asked.append(paths) or ask(paths))
    assert len(reader.read()) == 3 and len(asked.pop()) == 3
    assert len(reader.read()) == 3 and asked == []
    noted(run, 1, note="after")
    assert reader.read()[1].note == "after"
    assert [[os.path.basename(path) for path in paths] for paths in asked] == [["1.json"]]
    reader.update(2, lambda before: before.model_copy(update={"note": "own"}))
    assert reader.known[2].note == "own"


def test_several_processes_lose_no_update(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "one"))
    run.write("config.yaml", to_yaml(load_preset("tiny")))
    code = f"""
from mtc.storage import Notes, RunDirectory
notes = Notes(RunDirectory({run.url!r}))
for _ in range(40):
    notes.update(7, lambda old: old.model_copy(update={{"note": str(int(old.note or 0) + 1)}}))
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    writers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert plain(read_notes(run)) == {7: ("120", False)}


def test_where_nothing_can_be_written_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Notes(RunDirectory("hf://owner/name"))
    assert not hub.writable
    with pytest.raises(NotesReadOnly, match="hf://owner/name/notes: notes can't be kept there: a repository of the"):
        hub.update(1, lambda before: before)
    run = RunDirectory(str(tmp_path / "one"))
    run.write("config.yaml", "")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(NotesReadOnly, match="Read-only file system"):
        Notes(run).update(1, lambda before: before)


def test_notes_that_cannot_be_read_are_not_taken_for_none(run, monkeypatch):
    noted(run, 3, note="before")
    reader = Notes(run)
    assert plain(reader.read()) == {3: ("before", False)}

    def fail(call: Any, patience: float) -> None:
        assert patience == 5
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mtc.storage.notes.patiently", fail)
    with pytest.raises(StorageUnreachable, match=r"the notes of .*one can't be read: OSError: .*Input/output"):
        read_notes(run)
    for work in (reader.read, lambda: reader.update(3, lambda before: before)):
        with pytest.raises(OSError, match="Input/output"):
            work()
    assert plain(reader.known) == {3: ("before", False)}
