"""Which files a text is in: those of a hub data set, a path or URL, or an installed wheel.

Of a directory, a glob or a URL every entry is listed: as a file that is read, or with the reason why it is not. Links
are followed, and each file is read once, by whatever names it is reached.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from mtc.config import DataConfig
from mtc.errors import MtcError
from mtc.storage import absolute, filesystem, is_hub_id, missing, wheel_files

KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Names' last suffix, and the compression that it stands for; any kind but Parquet, which is compressed inside."""
HIDDEN = "hidden"
OTHER_KIND = "of no kind that is read"
ARCHIVE = "archive, to be unpacked first"
SIDE_FILE = "describes the data set"
REPEATED = "read under another name"
NO_FILE = "no regular file"
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_SIDE_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
EXAMPLES = 5
"""Most entries that are not read which are named; the others are only counted."""


class DataError(MtcError):
    """The text or its token store cannot be used; the message names the fields or the files."""


class DataUnreachableError(DataError):
    """The hub does not answer; starting again may help."""

    exit_code = 1
    event = "failed"


class SourceFile(NamedTuple):
    url: str
    """Path or URL that the file is read from."""
    name: str
    """Name of the file that does not depend on where a wheel is installed."""
    version: str
    """Size and time of change, of the file itself where the name is a link (size alone for wheels, whose version is
    pinned by the distribution)."""


class Unread(NamedTuple):
    """An entry that is listed and not read."""

    name: str
    """Path or URL of the entry; of a directory, it stands for everything below."""
    reason: str
    """Why it is not read, in words that are the same for all entries of that kind."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.name}"


class Listing(NamedTuple):
    files: list[SourceFile]
    """Files that are read, at least one, sorted by name."""
    unread: list[Unread]
    """Everything else that is there, sorted by name."""


def is_hub_dataset(data: DataConfig) -> bool:
    """Whether data.name is a hub id by its form, which is the same on every node."""
    return is_hub_id(data.name) and text_format(data.name) is None


def text_format(name: str) -> tuple[str, str | None] | None:
    """How a file of this name is read: one of KINDS, and one of PACKINGS' compressions or None; None if it is not."""
    stem, suffix = posixpath.splitext(posixpath.basename(_without_query(name)).lower())
    packing = PACKINGS.get(suffix)
    kind = posixpath.splitext(stem)[1] if packing else suffix
    return None if kind not in KINDS or (packing and kind == ".parquet") else (kind, packing)


def source_files(data: DataConfig) -> list[SourceFile]:
    """Files of a wheel, path, URL, directory or glob, sorted by name. Raises DataError if there are none."""
    return source_listing(data).files


def source_listing(data: DataConfig) -> Listing:
    """What a wheel, path, URL, directory or glob holds. Directories are listed with all below, hidden entries (`.git`)
    apart. Raises DataError if no file of it can be read."""
    if data.name.startswith("pip:"):
        return Listing(_wheel_files(data.name.removeprefix("pip:")), [])
    url = absolute(data.name)
    fs, path = filesystem(url)
    local = isinstance(fs, LocalFileSystem)
    found = _local(path) if local else _remote(fs, path)
    files: list[SourceFile] = []
    unread: list[Unread] = []
    seen: set[str] = set()
    for entry in sorted(found, key=lambda entry: entry.name):
        name = fs.unstrip_protocol(entry.name) if not local else entry.name
        if reason := entry.reason or ("" if entry.name == path else _unread_name(entry.name)) or _no_kind(entry.name):
            unread.append(Unread(name, reason))
        elif entry.real in seen:
            unread.append(Unread(name, REPEATED))
        else:
            seen.add(entry.real)
            files.append(SourceFile(name, name, entry.version))
    if not files:
        raise DataError(f"data.name={data.name!r} {_nothing(url, path, local, unread)}")
    return Listing(files, unread)


def count_reasons(unread: Iterable[Unread]) -> dict[str, int]:
    """Number of entries that are not read, by reason."""
    return dict(Counter(entry.reason for entry in unread).most_common())


class _Entry(NamedTuple):
    name: str
    real: str
    """Name that is the same for all links to a file."""
    version: str
    reason: str = ""
    """Why it is not read, as far as its name does not say."""


def _local(path: str) -> Iterator[_Entry]:
    for name, reason in _paths(path):
        if reason:
            yield _Entry(name, name, "", reason)
            continue
        real = os.path.realpath(name)
        try:
            info = os.stat(name)
        except OSError:  # a broken link: whoever reads it says so
            yield _Entry(name, real, "broken")
        else:
            version = f"{info.st_size} {info.st_mtime}" + (f" {real}" if real != name else "")
            yield _Entry(name, real, version, "" if stat.S_ISREG(info.st_mode) else NO_FILE)


def _paths(path: str) -> Iterator[tuple[str, str]]:
    """Files of a local path, directory or glob, and the reason why one is not read, if known."""
    seen: set[str] = set()
    if os.path.lexists(path) or not glob.has_magic(path):
        tops = [path] if os.path.lexists(path) else []
    elif "**" not in path:
        tops = sorted(glob.glob(path))
    else:
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if "**" in part)
        try:
            wanted = re.compile(glob_translate(path))
        except ValueError as error:
            raise DataError(f"data.name={path!r}: {error}") from None
        for top in sorted(glob.glob("/".join(parts[:first]) or "/")):
            for name, reason in _walk(top, seen):
                # A directory that matches is taken with all below, as without `**`.
                above = name.split("/")
                if any(wanted.match("/".join(above[:end])) for end in range(first + 1, len(above) + 1)):
                    yield name, reason
        return
    for top in tops:
        yield from _walk(top, seen) if os.path.isdir(top) else [(top, "")]


def _walk(top: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Everything below a directory, links followed; `seen` holds the directories that were entered, so that a link to
    one above ends."""
    real = os.path.realpath(top)
    if real in seen:
        yield top, REPEATED
        return
    seen.add(real)
    try:
        names = sorted(os.listdir(top))
    except OSError as error:
        raise DataError(f"data.name: the directory {top} cannot be listed: {error.strerror}") from None
    for name in names:
        path = posixpath.join(top, name)
        if name.startswith("."):
            yield path, HIDDEN
        elif os.path.isdir(path):
            yield from _walk(path, seen)
        else:
            yield path, ""


def _remote(fs: Any, path: str) -> Iterator[_Entry]:
    try:
        tops, below = {path: fs.info(path)}, path
    except FileNotFoundError:
        tops = fs.glob(path, detail=True) if glob.has_magic(path) else {}
        below = re.split(r"[*?[]", path)[0].rpartition("/")[0]
    found: dict[str, Any] = {}
    for top, info in tops.items():
        found |= fs.find(top, detail=True) if info["type"] == "directory" else {top: info}
    for name, info in found.items():
        hidden = name != path and "/." in name.removeprefix(below.rstrip("/"))
        changed = next((info[key] for key in ("mtime", "ETag", "etag", "LastModified", "updated") if key in info), "")
        reason = HIDDEN if hidden else "" if info["type"] == "file" else NO_FILE
        yield _Entry(name, name, f"{info['size']} {changed}", reason)


def _without_query(name: str) -> str:
    """A file's name; what a web server is asked for may go on behind it."""
    return name.partition("?")[0] if name.startswith(("http://", "https://")) else name


def _unread_name(name: str) -> str:
    return SIDE_FILE if posixpath.basename(name).lower() in _SIDE_FILES else ""


def _no_kind(name: str) -> str:
    if text_format(name) is not None:
        return ""
    lower = name.lower()
    inner, suffix = posixpath.splitext(lower)
    packed = inner if suffix in PACKINGS else lower
    return ARCHIVE if packed.endswith(_ARCHIVES) else OTHER_KIND


def _nothing(url: str, path: str, local: bool, unread: list[Unread]) -> str:
    """Why a source has no file that is read."""
    kinds = f"{', '.join(KINDS)} file ({', '.join(PACKINGS)} after any but the last)"
    if unread:
        by_reason = ", ".join(f"{n} {reason}" for reason, n in count_reasons(unread).items())
        first = ", ".join(str(entry) for entry in unread[:EXAMPLES])
        return f"has no {kinds}; there are: {by_reason}; first: {first}"
    if local and not glob.has_magic(path) and not os.path.lexists(path):
        return f"is neither pip:DISTRIBUTION nor a hub data set id, and {missing(path)}"
    return f"matches no {kinds}, and it is neither pip:DISTRIBUTION nor a hub data set id"


def _wheel_files(distribution: str) -> list[SourceFile]:
    try:
        found = wheel_files(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"data.name='pip:{distribution}': the wheel is not installed; pip install {distribution}"
        ) from None
    files = []
    for name, path in found.items():
        # A wheel's own metadata (top_level.txt, entry_points.txt) is not its text.
        if path.suffix == ".txt" and not name.split("/")[0].endswith((".dist-info", ".egg-info")):
            files.append(SourceFile(str(path), name, str(path.stat().st_size)))
    if not files:
        raise DataError(f"data.name='pip:{distribution}': the wheel has no .txt files")
    return files
