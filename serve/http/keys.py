"""API keys: a JSON file of names and digests; `python -m serve.keys` makes it.

The file holds no key, only its sha256. A running service sees changes within a second or two.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

logger = logging.getLogger("ray.serve")

LOOK_AGAIN_S = 1.0


class KeyEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    """Whose key it is. Several entries may have one name, while a key is being replaced."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the key, hexadecimal."""
    admin: bool = False
    """Whether it may load runs."""
    expires: date | None = None
    """Last day, UTC, on which it is taken."""


class KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyEntry, ...]


class KeyFileError(ValueError):
    """The file of keys cannot be read or changed; the message says why, without its content."""


def read_keys(path: str | Path) -> KeyFile:
    """Raises KeyFileError."""
    try:
        return KeyFile.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        places = ", ".join(".".join(map(str, fault["loc"])) + f" ({fault['type']})" for fault in error.errors())
        raise KeyFileError(f"{path} is no file of keys: {places}") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from None


class Keys:
    """The keys of a file that may change. Raises KeyFileError if it can't be read at first."""

    def __init__(self, path: str):
        self._path = path
        self._stamp = self._look()
        self._file = read_keys(path)
        self._next_look = time.monotonic() + LOOK_AGAIN_S

    def check(self, key: str) -> KeyEntry | None:
        """The entry of a key, or None. Every entry is compared, in constant time, whichever one it is."""
        self._refresh()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        today = datetime.now(UTC).date()
        found = None
        for entry in self._file.keys:
            same = hmac.compare_digest(digest, entry.sha256)
            if same and (entry.expires is None or today <= entry.expires):
                found = entry
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_AGAIN_S
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._file = read_keys(self._path)
                logger.info("API keys were read again: %d", len(self._file.keys))
            except KeyFileError as error:
                logger.error("the API keys from before still hold: %s", error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def add_key(path: Path, name: str, admin: bool, expires: date | None) -> str:
    """Add a new key to the file, which is made if need be; returns the key, which is stored nowhere.

    Raises KeyFileError.
    """
    if not 0 < len(name) <= 100:
        raise KeyFileError(f"NAME: 1 to 100 characters are wanted, got {len(name)}")
    key = "mtc_" + secrets.token_urlsafe(32)
    entry = KeyEntry(name=name, sha256=hashlib.sha256(key.encode()).hexdigest(), admin=admin, expires=expires)
    entries = read_keys(path).keys if path.exists() else ()
    _write(path, KeyFile(keys=(*entries, entry)))
    return key


def remove_keys(path: Path, name: str, sha256: str = "") -> int:
    """Remove the keys of a name whose digest begins so, by default all; returns how many there were."""
    entries = read_keys(path).keys
    kept = tuple(entry for entry in entries if entry.name != name or not entry.sha256.startswith(sha256))
    if len(kept) < len(entries):
        _write(path, KeyFile(keys=kept))
    return len(entries) - len(kept)


def _write(path: Path, file: KeyFile) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(file.model_dump_json(indent=1))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None
