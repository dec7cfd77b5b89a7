"""Texts as they come: linked, packed, in JSON of several kinds, beside other files, damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.tokenise import _Tally, check_data
from mtc.config import DataConfig, load_preset
from mtc.language_model import load_tokenizer
from mtc.text import DataError, Document, read_piece, source_pieces, sources, store_fingerprint


def data_of(name: Path | str, **changes: Any) -> DataConfig:
    return load_preset("tiny", {"data": {"name": str(name), **changes}}).data


def documents(name: Path | str, **changes: Any) -> list[Document]:
    data = data_of(name, **changes)
    return [document for piece in source_pieces(data) for document in read_piece(piece, data)]


def texts(name: Path | str) -> list[str]:
    found = documents(name)
    assert all(document.text for document in found), found
    return sorted(document.text or "" for document in found)


def unread(name: Path | str) -> dict[str, str]:
    """Why each entry is not read, by its base name."""
    return {os.path.basename(entry.name): entry.reason for entry in sources.source_listing(data_of(name)).unread}


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


# Links --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A data set in the cache of huggingface_hub: all files are links to blobs without suffixes."""
    blobs, files = tmp_path / "blobs", tmp_path / "snapshots" / "4f1a"
    blobs.mkdir()
    (files / "data").mkdir(parents=True)
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one", "two"]}), table)
    contents = {
        "data/a.parquet": bytes(table.getvalue()), "data/b.jsonl": lines("three", "four"), "data/c.txt": b"five",
        "README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b"* filter=lfs\n", "dataset_infos.json": b"{}",
    }  # fmt: skip
    for number, (name, content) in enumerate(contents.items()):
        (blobs / f"{number:040x}").write_bytes(content)
        above = "../" * name.count("/") + "../../blobs"
        (files / name).symlink_to(f"{above}/{number:040x}")
    return files


def test_a_snapshot_of_the_hub_is_read(snapshot: Path) -> None:
    everything = ["five", "four", "one", "three", "two"]
    assert texts(snapshot) == everything
    assert texts(f"file://{snapshot}") == everything
    assert texts(snapshot / "data" / "*") == everything
    assert texts(snapshot / "**" / "*.jsonl") == ["four", "three"]
    assert texts(snapshot / "data" / "c.txt") == ["five"]
    other = {"README.md": "of no kind that is read", ".gitattributes": "hidden"}
    assert unread(snapshot) == other | {"dataset_infos.json": "describes the data set"}
    assert unread(snapshot / "*") == {name: r for name, r in unread(snapshot).items() if name != ".gitattributes"}


def test_a_mounted_config_map_is_read_once(tmp_path: Path) -> None:
    """As the kubelet mounts it: files link into ..data, which links to a directory of the time."""
    (tmp_path / "..2026_01_02").mkdir()
    (tmp_path / "..data").symlink_to("..2026_01_02")
    for name in ("a.txt", "b.txt"):
        (tmp_path / "..2026_01_02" / name).write_text(name)
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert texts(tmp_path) == texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]


def test_links_beside_files_are_read_and_what_is_reached_twice_is_read_once(tmp_path: Path) -> None:
    text, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    (text / "below" / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (text / "a.txt").write_text("a")
    (text / "below" / "deep" / "B.TXT").write_text("b")
    (elsewhere / "c.jsonl").write_bytes(lines("c"))
    (text / "linked.jsonl").symlink_to(elsewhere / "c.jsonl")
    (text / "again.jsonl").symlink_to(elsewhere / "c.jsonl")
    (text / "below" / "loop").symlink_to(text)
    (text / "below" / "deep" / "loop").symlink_to("..")
    (text / "directory").symlink_to(elsewhere)
    assert texts(text) == texts(text / "*") == texts(text / "**") == ["a", "b", "c"]
    twice = {name: "read under another name" for name in ("linked.jsonl", "loop", "c.jsonl")}
    assert unread(text) == twice
    assert texts(text / "**" / "*.txt") == ["a"]  # patterns are as written, suffixes of whatever case
    (text / "gone.txt").symlink_to(tmp_path / "nowhere")
    (text / "itself.txt").symlink_to("itself.txt")
    broken = [d for d in documents(text) if d.text is None]
    assert sorted((os.path.basename(d.name), d.reason, d.detail) for d in broken) == [
        ("gone.txt", "broken link", f"to {tmp_path}/nowhere"),
        ("itself.txt", "broken link", "to itself.txt"),
    ]
    with pytest.raises(DataError, match=r"broken link: .*gone\.txt \(to .*nowhere\)"):
        check_data(load_preset("tiny", {"data": {"name": str(text / "gone.txt")}}))


def test_the_fingerprint_follows_the_file_behind_a_link(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(load_preset("tiny").model)

    def fingerprint() -> str:
        config = load_preset("tiny", {"data": {"name": str(tmp_path / "text")}})
        return store_fingerprint(config, tokenizer)[0]

    (tmp_path / "text").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).write_text("same")
        os.utime(tmp_path / name, (1, 1))
    link = tmp_path / "text" / "a.txt"
    link.symlink_to(tmp_path / "one")
    first = fingerprint()
    assert fingerprint() == first
    link.unlink()
    link.symlink_to(tmp_path / "two")
    second = fingerprint()
    (tmp_path / "two").write_text("different")
    assert len({first, second, fingerprint()}) == 3


# What is not read ---------------------------------------------------------------------------------------------------


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    names = ("a.csv", "b.zip", "c.tar.gz", "d", "e.txt.zip", "f.parquet.gz", ".hidden.txt", "g.TGZ")
    for name in names:
        (tmp_path / name).write_bytes(b"something")
    os.mkfifo(tmp_path / "pipe.txt")  # whoever opens it waits for a writer
    with pytest.raises(DataError) as error:
        documents(tmp_path)
    assert "4 archive, to be unpacked first, 3 of no kind that is read, 1 hidden, 1 no regular file" in str(error.value)
    assert f"first: hidden: {tmp_path}/.hidden.txt, of no kind that is read: {tmp_path}/a.csv" in str(error.value)
    for name, reason in (("d", "of no kind that is read"), ("b.zip", "archive, to be unpacked first")):
        with pytest.raises(DataError, match=rf"has no \.txt, \.jsonl.*{reason}: {tmp_path}/{name}"):
            check_data(load_preset("tiny", {"data": {"name": str(tmp_path / name)}}))
    (tmp_path / ".hidden.txt").write_text("asked for")
    assert texts(tmp_path / ".hidden.txt") == ["asked for"]
    with pytest.raises(DataError, match=rf"{tmp_path}/nothing\.txt is not there on "):
        documents(tmp_path / "nothing.txt")
    (tmp_path / "a[1].txt").write_text("no pattern")
    assert texts(tmp_path / "a[1].txt") == ["no pattern"]


def test_what_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as directory:
        text, below = Path(directory, "text"), Path(directory, "below")
        for made in (text, below, below / "deep"):
            made.mkdir()
        (text / "a.txt").write_text("secret")
        (below / "deep" / "b.txt").write_text("secret")
        for path, mode in ((Path(directory), 0o755), (text / "a.txt", 0), (below / "deep", 0)):
            path.chmod(mode)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            with pytest.raises(DataError, match=rf"{text}/a\.txt may not be read: .*Permission denied"):
                documents(text)
            with pytest.raises(DataError, match=rf"directory {below}/deep cannot be listed: Permission denied"):
                documents(below)
        finally:
            os.seteuid(user)
            (below / "deep").chmod(0o700)


def test_other_storage_has_the_same_rules() -> None:
    fs = fsspec.filesystem("memory")
    contents = {
        "a.jsonl.gz": gzip.compress(lines("a")),
        "b.TXT": b"b",
        ".git/c.txt": b"c",
        "d.csv": b"d",
        "e/f.txt": b"e",
    }
    for name, content in contents.items():
        fs.pipe_file(f"/strangers/{name}", content)
    try:
        for name in ("memory://strangers", "memory://strangers/*", "memory://strangers/**"):
            assert texts(name) == ["a", "b", "e"]
            assert set(unread(name).values()) <= {"hidden", "of no kind that is read"}
        assert unread("memory://strangers") == {"c.txt": "hidden", "d.csv": "of no kind that is read"}
        assert texts("memory://strangers/*.TXT") == texts("memory://strangers/b.TXT") == ["b"]
    finally:
        fs.rm("/strangers", recursive=True)


# Packed files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_texts_are_read_whole(suffix: str, tmp_path: Path) -> None:
    pack = PACKED[suffix]
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack("café".encode()))
    many = [f"{number} " * 500 for number in range(400)]
    # Several members one after the other, as tools for large files write them.
    members = [pack(lines(*many[:150])), pack(b""), pack(lines(*many[150:]))]
    (tmp_path / f"b.JSONL.{suffix.upper()}").write_bytes(b"".join(members))
    (tmp_path / f"c.json.{suffix}").write_bytes(pack(json.dumps([{"text": "in an array"}]).encode()))
    assert texts(tmp_path) == sorted(["café", "in an array", *many])


@pytest.mark.parametrize("suffix", PACKED)
def test_what_comes_before_damage_counts(suffix: str, tmp_path: Path) -> None:
    many = [random.randbytes(1200).hex() for _ in range(300)]
    file = tmp_path / f"a.jsonl.{suffix}"
    whole = b"".join(PACKED[suffix](lines(*many[start : start + 100])) for start in (0, 100, 200))
    third = len(PACKED[suffix](lines(*many[200:])))
    beheaded = whole[:-third] + b"\xff\xff\xff" + whole[3 - third :]
    for content in (whole[:-4000], whole[:-1], whole[: len(whole) // 2], beheaded):
        file.write_bytes(content)
        *read, last = documents(file)
        assert [d.text for d in read] == many[: len(read)]
        sound = 100 * min(len(content) * 3 // len(whole), 2)
        assert sound - 4 <= len(read) <= 300  # 8 KiB before the damage may be lost
        assert (last.text, last.name) == (None, str(file))
        assert last.reason.startswith("corrupt ")
    file.write_bytes(lines("never packed"))
    assert [(d.text, d.name) for d in documents(file)] == [(None, str(file))]


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz"])
def test_a_bomb_costs_no_memory(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtc.text.files.FIELDS_BYTES", 2**16)
    bomb = PACKED[suffix](b"[" + b" " * 2**24 + b"x" * 2**24)
    for kind in ("txt", "jsonl", "json"):
        (tmp_path / f"a.{kind}.{suffix}").write_bytes(bomb)
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    try:
        found = documents(tmp_path, max_document_chars=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(document.reason for document in found) == ["broken JSON", "too long", "too long"]
    assert peak < 2**24
    assert pa.total_allocated_bytes() - arrow < 2**23


# JSON ---------------------------------------------------------------------------------------------------------------


def test_json_is_an_array_or_lines_or_one_object(tmp_path: Path) -> None:
    # Larger than what is read at once, with what a scanner by hand would stumble on.
    rows = [
        {"text": f'{n} "]}},[{{\\ é\u2028😀' * (1 + n % 200), "id": n, "more": [{"text": []}, -1.5e3]}
        for n in range(1, 1000)
    ]
    for name, content in {
        "array.json": json.dumps(rows), "pretty.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "lines.json": "".join(json.dumps(row) + "\n" for row in rows), "bom.json": "\ufeff\n" + json.dumps(rows),
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
        found = documents(tmp_path / name)
        assert [d.text for d in found] == [row["text"] for row in rows], name
    (tmp_path / "one.json").write_text(json.dumps({"id": 1, "text": "alone"}, indent=2))
    (tmp_path / "line.json").write_text(json.dumps({"id": 1, "text": "in one line"}))
    assert texts(tmp_path / "one.json") + texts(tmp_path / "line.json") == ["alone", "in one line"]


@pytest.mark.parametrize(
    ("content", "read", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"', ["a"], "broken JSON"),
        (b'[{"text": "a"}, {"text": "b"} {"text": "c"}]', ["a", "b"], "broken JSON"),
        (b'[{"text": "a"}, {"text": "b"}', ["a", "b"], "broken JSON"),
        (b'[{"text": "a"}, ]', ["a"], "broken JSON"),
        (b'[{"text": "a"}] and more', ["a"], "broken JSON"),
        (b'[{"text": "a"}, "b", {"text": "c"}, 1]', ["a", "c"], "broken JSON"),
        (b'[{"text": "a"}, {"body": "b"}, {"text": "c"}]', ["a", "c"], "no text field"),
        (b'[{"text": "a"}, {"text": 1}]', ["a"], "not text"),
        (b'[{"text": "caf\xe9"}]', [], "not UTF-8"),
        (b"[" * 100_000, [], "broken JSON"),
        (b'{"data": [\n{"text": "a"}]}', [], "no text field"),
        (b'{"text": \n', [], "broken JSON"),
        (b'{"text": }\n{"text": "b"}\n', ["b"], "broken JSON"),
        (b"", [], "empty file"),
        (b" \n\n", [], "empty file"),
    ],
)
def test_damaged_json(content: bytes, read: list[str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    found = documents(tmp_path / "a.json")
    assert [d.text for d in found if d.text is not None] == read
    assert {d.reason for d in found if d.text is None} == {reason}


def test_an_empty_array_has_no_documents_and_a_pointer_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ] ")
    assert documents(tmp_path / "a.json") == []
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("b.txt", "b.jsonl"):
        (tmp_path / name).write_text(pointer)
        assert [d.reason for d in documents(tmp_path / name)] == ["Git LFS pointer"]


def test_a_description_beside_texts_is_counted_as_not_read_and_no_text_that_is_lost(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "metadata.json").write_text('{"author": "me"}')
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}\n')
    tally = _Tally(max_share=0)
    for document in documents(tmp_path):
        tally.add(document)
    tally.check()
    assert not tally.skipped and not tally.examples
    assert {os.path.basename(entry.name): entry.reason for entry in tally.no_texts} == dict.fromkeys(
        ("metadata.json", "package.json"), "an object without data.text_field"
    )
