"""What an analysis knows of many transcoders, on this node's disk: memory holds what is about one of them at a time.

It lies in the temporary directory of the driver (TMPDIR) until the analysis is written. Nothing here is a run's file
yet: what comes of it is copied into the run when all of it is there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from mtc.storage import RunDirectory

Array = NDArray[Any]
MAPPED_BYTES = 1 << 20
"""From this size on arrays are added to in their file, without a copy of it in memory."""


class Spool:
    """A directory that is removed at the end, with rows of results by kind and transcoder, in the order of the work.

    `kept` is called for each of them.
    """

    def __init__(self, kept: Callable[[], None] = lambda: None) -> None:
        self._kept = kept
        self._directory = tempfile.TemporaryDirectory(prefix="mtc-analysis-")
        self.path = Path(self._directory.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._directory.cleanup()

    def add(self, kind: str, transcoder: int, data: bytes) -> None:
        """Keep one row's results, a safetensors file, behind those of earlier rows."""
        place = self._place(kind, transcoder)
        number = sum(1 for _ in place.iterdir()) if place.exists() else 0
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}").write_bytes(data)
        self._kept()

    def rows(self, kind: str, transcoder: int, prefix: str = "") -> Iterator[dict[str, Array]]:
        """The arrays of each row, in order; only those whose names begin with `prefix` are read."""
        place = self._place(kind, transcoder)
        for path in sorted(place.iterdir()) if place.exists() else ():
            with safe_open(path, "np") as file:
                yield {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def sum(self, kind: str, transcoder: int, arrays: Mapping[str, Array]) -> None:
        """Add a row's arrays to the sums of those with the same names; bit for bit as if all were added in memory."""
        place = self._place(kind, transcoder)
        place.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            path = place / f"{name}.npy"
            if not path.exists():
                np.save(path, values)
            elif values.nbytes < MAPPED_BYTES:
                np.save(path, np.load(path) + values)
            else:
                total = np.lib.format.open_memmap(path, "r+")
                total += values
                del total
        self._kept()

    def sums(self, kind: str, transcoder: int) -> dict[str, Array]:
        """What `sum` added up, by name."""
        place = self._place(kind, transcoder)
        return {path.stem: np.load(path) for path in sorted(place.iterdir())} if place.exists() else {}

    def remove(self, kind: str, transcoder: int) -> None:
        """Give back the room of what is no longer needed."""
        shutil.rmtree(self._place(kind, transcoder), ignore_errors=True)

    def _place(self, kind: str, transcoder: int) -> Path:
        return self.path / f"{kind}-{transcoder}"


class _Staged(NamedTuple):
    """A file that waits to be written into a run."""

    run: RunDirectory
    """Where it goes."""
    name: str
    """Its name there."""
    path: Path
    """Where its content is until then."""


class Staged:
    """Files for runs, in the order in which they will be written; until then they lie in a spool."""

    def __init__(self, spool: Spool):
        self._directory = spool.path / "staged"
        self._directory.mkdir()
        self._files: list[_Staged] = []

    def add(self, run: RunDirectory, files: Mapping[str, bytes]) -> None:
        """Take files for a run, by name."""
        for name, data in files.items():
            path = self._directory / f"{len(self._files):08d}"
            path.write_bytes(data)
            self._files.append(_Staged(run, name, path))

    def __iter__(self) -> Iterator[tuple[RunDirectory, str, bytes]]:
        """Each file's run, name and content."""
        for file in self._files:
            yield file.run, file.name, file.path.read_bytes()
