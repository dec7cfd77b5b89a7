"""Aliases: addresses, names, histories, and two that move one at once."""

import errno
import json
import os
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.pipeline import check
from mtc.config import load_preset, to_yaml
from mtc.storage import (
    Alias,
    Move,
    RunDirectory,
    RunError,
    is_alias,
    last_known,
    move_alias,
    named_run,
    open_run,
    promote,
    read_alias,
    read_aliases,
    roll_back,
    run_status,
)
from serve.service import Catalogue


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "runs")
    else:
        yield f"memory://{tmp_path.name}/runs"  # directories outlive their files there
        fsspec.filesystem("memory").store.clear()


def make(root, name, **settings):
    run = RunDirectory(f"{root}/{name}")
    config = load_preset("tiny", settings)
    run.write("config.yaml", to_yaml(config))
    for own in run.members().values():
        own.write(
            "config.yaml",
            to_yaml(dict(config.members())[own.run_id.rpartition("/")[2]]) if own is not run else to_yaml(config),
        )
        own.write("transcoder.safetensors", f"weights of {own.run_id}")
        if own is not run:
            own.publish(latest=False)
    run.publish(latest=False)
    return run


def moved(run_id, what="promoted"):
    return Move(run_id=run_id, when="2026-01-02T03:04:05+00:00", what=what)


def test_an_alias_is_an_address_wherever_latest_is_one(root):
    make(root, "a").publish()
    make(root, "b", model={"layers": [0, 1]})
    promote(open_run(f"{root}/b"), "production")
    assert open_run(f"{root}/production").url == f"{root}/b" and open_run(f"{root}/latest").run_id == "a"
    assert open_run(f"{root}/production/layer1").run_id == "b/layer1"
    assert run_status(f"{root}/production").run_id == "b"
    assert Catalogue(f"{root}/production").served().key.run_id == "b"
    one = Catalogue(f"{root}/production/layer1")
    assert (one.root, one.name, one.served().key.run_id) == (root, "production/layer1", "b/layer1")
    promote(open_run(f"{root}/b/layer0"), "ground")
    assert open_run(f"{root}/ground").run_id == "b/layer0"
    assert {name: alias.run_id for name, alias in read_aliases(root).items()} == {
        "production": "b", "ground": "b/layer0",
    }  # fmt: skip
    with pytest.raises(RunError, match=r"no run at .*/b/layer7"):
        open_run(f"{root}/production/layer7")
    for none in ("staging", "staging/layer1"):
        with pytest.raises(RunError, match=f"no run at .*/{none}$"):
            open_run(f"{root}/{none}")
    RunDirectory(f"{root}/production").write("config.yaml", "")  # a directory of the name comes first
    assert named_run(f"{root}/production").url == f"{root}/production" and not is_alias(f"{root}/production")


def test_relative_addresses_count_from_the_directory(tmp_path, monkeypatch):
    make(str(tmp_path / "runs"), "a")
    monkeypatch.chdir(tmp_path)
    promote(open_run("runs/a"), "production")
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert open_run("../production").url == str(tmp_path / "runs" / "a")


def test_an_ordinary_address_costs_two_questions(monkeypatch):
    make("memory://counted", "a")
    promote(open_run("memory://counted/a"), "production")
    asked = []

    def count(name, real):
        def counted(self, path, *arguments, **options):
            asked.append((name, path))
            return real(self, path, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, name, counted)

    for name in ("info", "cat_file", "ls"):
        count(name, getattr(MemoryFileSystem, name))
    try:
        open_run("memory://counted/a", verify=False)
        assert [what for what, _ in asked] == ["info", "cat_file"]
        asked.clear()
        open_run("memory://counted/production", verify=False)
        assert len({path for _, path in asked}) == 3, "the name, its alias, the run's manifest"
    finally:
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("name", ["latest", "aliases", "tokens", "a", "", ".hidden", "a/b", "../x", "x" * 101, "naïve"])
def test_names_that_no_alias_can_have(root, name):
    run = make(root, "a")
    with pytest.raises(RunError, match="can't be an alias"):
        promote(run, name)
    assert read_aliases(root) == {}


def test_no_run_is_trained_under_the_name_of_an_alias(tmp_path):
    promote(make(str(tmp_path), "a"), "production")
    for name, words in (
        ("production", "has an alias of that name"),
        ("aliases", "a meaning of its own"),
        ("tokens", "a meaning of its own"),
    ):
        with pytest.raises(RunError, match=f"output.run_id={name}: .* {words}"):
            check(load_preset("tiny", {"output": {"root": str(tmp_path), "run_id": name}}))


def test_a_hub_repository_has_no_aliases():
    with pytest.raises(RunError, match="holds one run, and no aliases"):
        move_alias("hf://owner/name", "production", lambda before: Alias(run_id="a"))


@pytest.mark.parametrize(("moves", "before"), [
    ("a", ""), ("a b", "a"), ("a b c", "b a"), ("a b <a", ""), ("a b c <b", "a"), ("a b <a c", "a"),
    ("a b a", "b"), ("a a b b", "a"), ("a b c <a d", "a"), ("<x b", "x"),
])  # fmt: skip
def test_what_was_taken_back_is_not_gone_back_to(moves, before):
    history = [moved(each.strip("<"), "rolled back" if "<" in each else "promoted") for each in moves.split()]
    assert Alias(run_id=history[-1].run_id, history=tuple(history)).before() == before.split()


def test_going_back_passes_over_what_is_not_whole(root):
    for name in ("a", "b", "c", "d"):
        promote(make(root, name), "production", by="me")
    RunDirectory(f"{root}/c").write("transcoder.safetensors", "damaged")
    RunDirectory(f"{root}/b").remove()
    assert roll_back(root, "production", dry_run=True).alias.run_id == "a"
    assert read_alias(root, "production").run_id == "d"
    done = roll_back(root, "production", note="d is bad")
    assert done.previous == "d" and open_run(f"{root}/production").run_id == "a"
    assert list(done.passed_over) == ["c", "b"] and "transcoder.safetensors" in done.passed_over["c"]
    last = read_alias(root, "production").history[-1]
    assert (last.run_id, last.what, last.by, last.note) == ("a", "rolled back", None, "d is bad")
    with pytest.raises(RunError, match="no run to go back to from a"):
        roll_back(root, "production")
    with pytest.raises(RunError, match="has no alias 'other'"):
        roll_back(root, "other")


def test_only_what_can_be_served_is_promoted(root):
    make(root, "swept", sweep=[{"transcoder.k": 4}, {"transcoder.k": 2}])
    with pytest.raises(RunError, match=r"holds 2 transcoders; name one of them: .*swept/k4"):
        promote(open_run(f"{root}/swept"), "production")
    bare = RunDirectory(f"{root}/bare")
    bare.write("config.yaml", to_yaml(load_preset("tiny")))
    bare.publish()
    with pytest.raises(RunError, match=r"bare has no transcoder\.safetensors"):
        promote(open_run(f"{root}/bare"), "production")
    make(root, "was").fs.mv(f"{root}/was", f"{root}/is", recursive=True)
    with pytest.raises(RunError, match="holds the run 'was'"):
        promote(open_run(f"{root}/is"), "production")
    assert read_aliases(root) == {}
    promote(open_run(f"{root}/swept/k2"), "production")
    assert open_run(f"{root}/production").run_id == "swept/k2"


@pytest.mark.parametrize("before", ["a", None])
def test_a_run_that_is_removed_while_it_is_promoted_leaves_the_alias_as_it_was(root, before, monkeypatch):
    if before:
        promote(make(root, before), "production")
    run, write = make(root, "b"), RunDirectory.write

    def meanwhile(directory, name, *arguments):
        if name == "production.json" and run.exists():
            run.remove()
        write(directory, name, *arguments)

    expected = read_alias(root, "production")
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write", meanwhile)
        with pytest.raises(RunError, match="was removed while it was promoted: production is what it was"):
            promote(run, "production")
    assert read_alias(root, "production") == expected == last_known(root, "production")


def test_two_that_promote_at_once_both_stand_in_the_history(tmp_path):
    root, inside, go_on = str(tmp_path), threading.Event(), threading.Event()

    def first(before):
        inside.set()
        assert go_on.wait(60)
        return Alias(run_id="a", history=(moved("a"),))

    def second(before):
        return Alias(run_id="b", history=(*before.history, moved("b")))

    one = threading.Thread(target=move_alias, args=(root, "production", first))
    one.start()
    assert inside.wait(60)
    two = threading.Thread(target=move_alias, args=(root, "production", second))
    two.start()
    go_on.set()
    for each in (one, two):
        each.join(60)
    assert [move.run_id for move in read_alias(root, "production").history] == ["a", "b"]


def test_where_there_are_no_locks_what_moved_meanwhile_is_noticed(root):
    def decide(before):
        RunDirectory(f"{root}/aliases").write("production.json", Alias(run_id="other").model_dump_json())
        return Alias(run_id="mine")

    with pytest.raises(RunError, match="moved by another promotion meanwhile"):
        move_alias(root, "production", decide)
    assert read_alias(root, "production").run_id == "other"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "../x"}', '{"run_id": "a/b/c"}', '{"run": "a"}'])
def test_a_damaged_record_is_said_and_its_copy_has_the_history(root, content):
    run = make(root, "a")
    promote(run, "production")
    RunDirectory(f"{root}/aliases").write("production.json", content)
    with pytest.raises(RunError, match=r"aliases/production\.json is no alias that can be read"):
        open_run(f"{root}/production")
    assert read_aliases(root)["production"].run_id == "a", "lists go by the copy"
    assert is_alias(f"{root}/production") and last_known(root, "production").run_id == "a"
    promote(run, "production", note="again")
    assert [move.note for move in read_alias(root, "production").history] == [None, "again"]


def test_an_alias_whose_copy_can_not_be_written_has_moved_and_that_is_said(root, monkeypatch, caplog):
    run, write = make(root, "a"), RunDirectory.write

    def full(directory, name, *arguments):
        if name.endswith(".copy"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(directory, name, *arguments)

    monkeypatch.setattr(RunDirectory, "write", full)
    assert promote(run, "production").alias.run_id == open_run(f"{root}/production").run_id == "a"
    assert "production.json.copy could not be written: OSError: [Errno 28] No space left" in caplog.text


def test_a_place_that_can_not_be_written_is_said(tmp_path, monkeypatch):
    run = make(str(tmp_path), "a")

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(RunError, match=r"aliases: aliases can't be kept there: .*Read-only"):
        promote(run, "production")


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    promote(make(str(tmp_path), "a"), "production", by="A. Name")
    raw = json.loads((tmp_path / "aliases" / "production.json").read_text())
    assert raw["run_id"] == "a" and raw["history"][0]["by"] == "A. Name" and raw["history"][0]["figures"] == {}
