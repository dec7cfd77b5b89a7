"""Aliases: names such as `production` beside the runs, each of a run that a person chose.

    <root>/aliases/<name>.json    Alias

`<root>/latest` follows what is published; an alias moves by a promotion alone.
"""

from __future__ import annotations

import posixpath

from mtc.record import Record
from mtc.storage.runs import RunDirectory

ALIASES = "aliases"


class Alias(Record):
    run_id: str
    """The run that has the name now: a directory beside `aliases`."""


def read_aliases(root: str) -> dict[str, Alias]:
    """What each alias of a directory of runs names."""
    directory = RunDirectory(posixpath.join(root, ALIASES))
    names = sorted(name.removesuffix(".json") for name in directory.names() if name.endswith(".json"))
    return {name: Alias.model_validate_json(directory.read(f"{name}.json")) for name in names}
