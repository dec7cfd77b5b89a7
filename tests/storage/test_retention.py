"""Runs are listed from an index that never misleads, and what nobody needs goes: never what somebody does."""

import json
import os
import posixpath
import time
from datetime import UTC, datetime, timedelta

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jobs.runs import main
from mtc.config import load_preset, to_yaml
from mtc.storage import (
    Checkpoints,
    Lease,
    RunDirectory,
    RunError,
    find_waste,
    finished_runs,
    list_runs,
    open_run,
    promote,
)
from mtc.storage.index import RunIndex, index_entry
from mtc.storage.retention import remove_run, remove_waste, repair_index

STORE = "tokens/0123456789abcdef-00000001"


class Counting(MemoryFileSystem):
    """Storage in memory that counts what is asked of it."""

    protocol = "counting"
    store, pseudo_dirs, calls = {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("counting://"))

    def ls(self, path, detail=True, **kwargs):
        self.calls.append(("ls", path))
        return super().ls(path, detail, **kwargs)

    def info(self, path, **kwargs):
        self.calls.append(("info", path))
        return super().info(path, **kwargs)

    def cat_file(self, path, *arguments, **kwargs):
        self.calls.append(("cat", path))
        return super().cat_file(path, *arguments, **kwargs)


fsspec.register_implementation("counting", Counting, clobber=True)


@pytest.fixture(params=["local", "counting"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "runs")
    else:
        yield "counting://runs"
        Counting.store.clear()
        Counting.pseudo_dirs[:] = [""]


def make(root, name, finished=True, store=STORE, **changes):
    run = RunDirectory(f"{root}/{name}")
    run.write("config.yaml", to_yaml(load_preset("tiny", changes)))
    run.write("transcoder.safetensors", name.encode())
    run.write("checkpoints/step-00000032-00000001-result/trainer.safetensors", bytes(500))
    run.write("checkpoints/step-00000032-00000001-result/checkpoint.json", "{}")
    analysis = {"evaluation": {"fvu": [0.9, 0.5]}, "facts": {"token_store": f"{root}/{store}"}}
    run.write("analysis.json", json.dumps(analysis))
    if finished:
        run.publish()
    return run


def age(run, days):
    """As if nothing below a directory had been written for so long."""
    for path in run.fs.find(run.path):
        if isinstance(run.fs, Counting):
            run.fs.store[path].modified = run.fs.store[path].created = datetime.now(UTC) - timedelta(days=days)
        else:
            os.utime(path, (time.time() - days * 86400,) * 2)


def make_store(root, number, finished=True, days=30):
    store = RunDirectory(f"{root}/tokens/0123456789abcdef-{number:08d}")
    store.write("tokens-00000.parquet", bytes(100))
    if finished:
        store.write("store.json", "{}")
    age(store, days)
    return store


def gc(root, *options):
    return main(["gc", root, *options])


def wasted(root, days=7.0):
    return {posixpath.relpath(each.url, root) for each in find_waste(root, days, watch_seconds=0.2).waste}


def truth(root, names):
    return {name: index_entry(RunDirectory(f"{root}/{name}")) for name in names}


def test_two_hundred_runs_are_listed_in_three_calls_and_as_their_manifests_say():
    names = [f"run-{number:03d}" for number in range(200)]
    for name in names:
        make("counting://many", name)
    expected = truth("counting://many", names)
    Counting.calls.clear()
    assert finished_runs("counting://many") == expected
    assert len(Counting.calls) == 3, Counting.calls[:10]
    Counting.store.clear()


def test_an_index_never_hides_a_run_nor_shows_one_that_is_gone(root):
    for name in "abcde":
        make(root, name)
    index = RunDirectory(f"{root}/.index")

    def entry(name):
        return next(each for each in index.names() if each.startswith(f"{name}@"))

    index.write("all.json", b"damaged")
    index.write(entry("a"), b"damaged")
    index.remove(entry("b"))
    index.write(f"c@{'0' * 16}.json", index.read(entry("c")).replace(b"gemma2", b"other"))  # of a job that was killed
    RunDirectory(f"{root}/d").remove()
    make(root, "f", finished=False)
    RunDirectory(f"{root}/e").write("transcoder.safetensors", b"other weights")
    RunDirectory(f"{root}/e").publish(latest=False)
    assert finished_runs(root) == truth(root, "abce")
    index.remove()  # as of a version without one
    assert finished_runs(root) == truth(root, "abce")


def test_an_entry_of_a_manifest_that_an_older_version_replaced_is_repaired(root, monkeypatch):
    run, removed = make(root, "a"), make(root, "b")
    with monkeypatch.context() as older:
        for what in ("forget", "add"):
            older.setattr(RunIndex, what, lambda *arguments: None)
        run.write("report/index.html", bytes(1000))
        run.publish()
    removed.remove("manifest.json")
    repair_index(root)
    assert RunIndex(root).read() == truth(root, "a")
    assert repair_index(root) == (0, 0)


def test_publications_at_once_lose_no_entry(root, monkeypatch):
    """Each job reads what all.json had before the other wrote it."""
    from mtc.storage.index import RunIndex

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(RunIndex, "_read_all", lambda self: {})
        meanwhile.setattr(RunIndex, "_names", lambda self: [])
        make(root, "a")
        make(root, "b")
    Counting.calls.clear()
    assert set(finished_runs(root)) == {"a", "b"}
    assert not [call for call in Counting.calls if "manifest" in call[1]], "the index has both"


def test_gc_removes_what_nobody_needs_and_nothing_else(root, capsys):
    kept = make(root, "kept", output={"keep_checkpoints_after_finish": True})
    named, plain = make(root, "named"), make(root, "plain", store="tokens/0123456789abcdef-00000002")
    old, young, held = (make(root, name, finished=False) for name in ("old", "young", "held"))
    RunDirectory(f"{root}/aliases").write("production.json", '{"run_id": "named"}')
    for number in (1, 2, 3):
        make_store(root, number)
    make_store(root, 4, days=1)
    make_store(root, 5, finished=False)
    for run in (old, held):
        age(run, 30)
    young.write("token_store.json", json.dumps({"url": f"{root}/tokens/0123456789abcdef-00000001"}))
    expected = {
        "named/checkpoints", "plain/checkpoints", "old", "tokens/0123456789abcdef-00000003",
        "tokens/0123456789abcdef-00000005",
    }  # fmt: skip
    published = {run.run_id: set(run.manifest().files) for run in (kept, named, plain)}
    with Lease(held, beat=0.05):
        assert "tokens/0123456789abcdef-00000003" not in wasted(root), "a job may be about to read it"
        assert wasted(root) == expected - {"tokens/0123456789abcdef-00000003"}
    held.remove()
    everything = {path for path in young.fs.find(young.fs._strip_protocol(root))}
    assert wasted(root) == expected
    assert gc(root) == 0
    assert "nothing was removed" in capsys.readouterr().out
    assert set(young.fs.find(young.fs._strip_protocol(root))) == everything, "by default it only tells"
    assert gc(root, "--yes") == 0
    assert wasted(root) == set()
    for run in (kept, named, plain):
        assert set(open_run(run.url).verify().files) == published[run.run_id]
    assert Checkpoints(kept.url).directory.names() and not named.exists("checkpoints")
    assert not old.exists() and young.exists("checkpoints")
    assert gc(root, "--yes", "--older-than", "0") == 0
    assert not young.exists()


def test_a_temporary_file_that_vanishes_does_not_lend_its_name(root, monkeypatch):
    """Of those directly in a directory of runs one goes, and another is still being written."""
    make(root, "a")
    place = RunDirectory(root)
    place.write("old.tmp", b"x")
    age(RunDirectory(f"{root}/old.tmp"), 30)
    place.write("young.tmp", b"x")
    names = RunDirectory.names
    monkeypatch.setattr(
        RunDirectory, "names", lambda run: ["gone.tmp", "old.tmp", "young.tmp"] if run.url == root else names(run)
    )
    assert {each for each in wasted(root) if each.endswith(".tmp")} == {"old.tmp"}


def test_a_directory_that_is_no_run_stays(root, capsys):
    """An export has a config.yaml, another program checkpoints and temporary files."""
    make(root, "a")
    export, other = RunDirectory(f"{root}/export"), RunDirectory(f"{root}/other")
    export.write("config.yaml", "model_name: m\nmodel_kind: transcoder_set\n")
    export.write("layer_0.safetensors", bytes(100))
    other.write("checkpoints/step-100/weights.bin", bytes(100))
    other.write("notes.tmp", b"x")
    for run in (export, other):
        age(run, 30)
    assert wasted(root) == {"a/checkpoints"}
    assert gc(root, "--yes") == 0
    assert "stays run export: its config.yaml is not one of a run" in capsys.readouterr().out
    for run in (export, other):
        assert main(["rm", run.url, "--yes"]) == 2
        assert "neither a configuration nor a manifest of a run" in capsys.readouterr().err
        assert len(run.fs.find(run.path)) == 2
    assert [row.run_id for row in list_runs(root, 0.2)] == ["a"]


def test_a_run_that_does_not_say_what_it_reads_keeps_all_tokens(root):
    make(root, "a")
    begun = make(root, "begun", finished=False)
    make_store(root, 3)
    assert "tokens/0123456789abcdef-00000003" not in wasted(root)
    age(begun, 30)  # it goes, too
    assert {"begun", "tokens/0123456789abcdef-00000003"} <= wasted(root)


def test_what_a_job_takes_up_meanwhile_stays(root):
    run = make(root, "a", finished=False)
    age(run, 30)
    (waste,) = [each for each in find_waste(root, 7, watch_seconds=0.2).waste if each.kind == "unfinished run"]
    with Lease(run, beat=0.05), pytest.raises(RunError, match="another job is writing this run"):
        remove_waste(waste, 7, [root])
    run.publish()
    with pytest.raises(RunError, match="has changed meanwhile"):
        remove_waste(waste, 7, [root])
    assert open_run(run.url).run_id == "a"


@pytest.mark.parametrize("meanwhile", ["continued", "new run", "fails"])
def test_tokens_stay_that_somebody_needs_by_the_time_they_would_go(root, meanwhile, monkeypatch, capsys):
    """While gc removes something else, a run that was to go is continued or can't be removed, or a new one begins."""
    make(root, "a", store="tokens/0123456789abcdef-00000009")
    old, store, real = make(root, "old", finished=False), make_store(root, 1), remove_waste
    age(old, 30)

    def removal(waste, *arguments):
        if waste.kind == "checkpoints" and meanwhile == "continued":
            old.write("metrics.jsonl", "{}")
            old.write("token_store.json", json.dumps({"url": store.url}))
        elif waste.kind == "checkpoints" and meanwhile == "new run":
            make(root, "new", finished=False).write("token_store.json", json.dumps({"url": store.url}))
        elif waste.kind == "unfinished run" and meanwhile == "fails":
            raise OSError("storage")
        real(waste, *arguments)

    monkeypatch.setattr("jobs.runs.remove_waste", removal)
    assert gc(root, "--yes") == (meanwhile == "fails")
    assert store.exists("store.json") and old.exists() == (meanwhile != "new run")
    assert f"token store {store.url}" in capsys.readouterr().out


@pytest.mark.parametrize("needed", ["named", "a job works"])
def test_each_token_store_is_asked_for_anew(root, needed):
    make(root, "a")
    store = make_store(root, 3)
    (waste,) = [each for each in find_waste(root, 7, watch_seconds=0.2).waste if each.kind == "token store"]
    run = make(root, "b", store="tokens/0123456789abcdef-00000003" if needed == "named" else STORE)
    if needed == "named":
        with pytest.raises(RunError, match="is needed by now: a run reads it"):
            remove_waste(waste, 7, [root])
        run.remove()
    else:
        with Lease(run, beat=0.05), pytest.raises(RunError, match="is needed by now: a job works"):
            remove_waste(waste, 7, [root])
    remove_waste(waste, 7, [root])
    assert not store.exists()


def test_a_list_says_failed_by_what_the_last_job_noted(root):
    """As `jobs/status.py`: not by an event that some job survived."""
    notes = {
        "failed": '{"exit_code": 2, "message": "m"}', "interrupted": '{"exit_code": 130, "message": "interrupted"}',
        "killed": None, "damaged": "{",
    }  # fmt: skip
    for name, note in notes.items():
        run = make(root, name, finished=False)
        run.write("events.jsonl", json.dumps({"time": "", "kind": "failure", "message": "trainer 0 died"}))
        if note:
            run.write("ended.json", note)
    found = {row.run_id: row.state for row in list_runs(root, 0.2)}
    assert found == dict.fromkeys(notes, "unfinished") | {"failed": "failed"}


def test_a_run_is_removed_unless_somebody_relies_on_it(root, capsys):
    first, second, third = (make(root, name) for name in "abc")
    RunDirectory(f"{root}/aliases").write("production.json", '{"run_id": "a"}')
    for wrong, message in (
        ("a", "run a has the alias production"), ("c", "--force removes it all the same"), ("none", "no run at"),
    ):  # fmt: skip
        assert main(["rm", f"{root}/{wrong}", "--yes"]) == 2
        assert message in capsys.readouterr().err
    assert main(["rm", second.url]) == 0 and second.is_finished()
    with Lease(second, beat=0.05):
        assert main(["rm", second.url, "--yes"]) == 2
    assert main(["rm", second.url, "--yes"]) == 0 and not second.exists()
    assert main(["rm", third.url, "--yes", "--force"]) == 0
    assert open_run(f"{root}/latest").run_id == "a"
    assert [row.run_id for row in list_runs(root, 0.2)] == ["a"] and first.is_finished()


def test_what_a_rollback_would_go_back_to_goes_by_force_only(root, capsys):
    for name in "abc":
        promote(make(root, name), "production")
    for options in ([], ["--yes"]):
        assert main(["rm", f"{root}/b", *options]) == 2
        assert "run b is what a rollback of production would go back to: --force" in capsys.readouterr().err
    assert main(["rm", f"{root}/b", "--yes", "--force"]) == 0
    assert main(["rm", f"{root}/a", "--yes"]) == 2, "now that is it"


def test_a_run_that_is_promoted_while_it_would_go_stays(root, monkeypatch):
    run, forget = make(root, "a"), RunIndex.forget
    make(root, "b")

    def meanwhile(index, name):
        forget(index, name)
        promote(run, "production")

    monkeypatch.setattr(RunIndex, "forget", meanwhile)
    with pytest.raises(RunError, match="run a has the alias production"):
        remove_run(run)
    assert open_run(f"{root}/production").run_id == "a" and set(finished_runs(root)) == {"a", "b"}


def test_latest_goes_on_naming_what_is_published_while_a_run_goes(root, monkeypatch):
    make(root, "a")
    leaving = make(root, "b")

    def meanwhile(root):
        found = finished_runs(root)
        make(root, "c")
        return found

    monkeypatch.setattr("mtc.storage.retention.finished_runs", meanwhile)
    remove_run(leaving, force=True)
    assert open_run(f"{root}/latest").run_id == "c"


def test_one_transcoder_of_several_does_not_go_alone_and_the_whole_goes_manifests_first(root, monkeypatch):
    swept = RunDirectory(f"{root}/swept")
    swept.write("config.yaml", to_yaml(load_preset("tiny", {"sweep": [{"transcoder.k": 4}, {"transcoder.k": 2}]})))
    for own in swept.members().values():
        own.write("config.yaml", to_yaml(load_preset("tiny")))
        own.write("transcoder.safetensors", b"x")
        own.publish(latest=False)
    swept.publish()
    with pytest.raises(RunError, match="one transcoder of a run of several"):
        remove_run(RunDirectory(f"{root}/swept/k4"))

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("mtc.storage.retention._empty", dies)
        with pytest.raises(KeyboardInterrupt):
            remove_run(swept, force=True)
    for url in (swept.url, f"{root}/swept/k4", f"{root}/latest"):
        with pytest.raises(RunError):
            open_run(url)
    assert finished_runs(root) == {}
    remove_run(swept)
    assert not swept.exists()
