"""What an address names: a run's directory, `<root>/latest`, an alias such as `<root>/production`, or one transcoder of
any of them (`<root>/production/layer9`).

A directory of the name comes first. That costs an ordinary address one question, and an alias one or two more.
"""

from __future__ import annotations

import posixpath

from mtc.storage.aliases import ALIASES, is_name, read_alias
from mtc.storage.files import absolute, filesystem, patiently
from mtc.storage.hub import is_hub_url
from mtc.storage.runs import RunDirectory, RunError, require_one_layer


def open_run(url: str, verify: bool = True) -> RunDirectory:
    """A finished run by its directory, `<root>/latest` or an alias, or one transcoder of these
    (`<root>/latest/layer9`); also `hf://OWNER/NAME[@REVISION]`, a repository of the Hugging Face hub, and `hf://OWNER/NAME/layer9`.

    Raises RunError if it is missing, unfinished or damaged.
    """
    run = named_run(url)
    run.run_id = (run.verify() if verify else run.manifest()).run_id
    return run


def named_run(url: str) -> RunDirectory:
    """The directory that `open_run` opens, unread: there may be no run. Raises RunError if `latest` names none, or an
    alias can't be read."""
    url = absolute(url).rstrip("/")
    above, name = posixpath.split(url)
    if is_hub_url(url):
        return RunDirectory(url)  # a repository holds one run: nothing in it names the newest
    if name == "latest":
        return RunDirectory(_latest(url))
    if is_latest(above):
        return RunDirectory(posixpath.join(_latest(above), name))
    run = RunDirectory(url)
    if run.exists():
        return run
    if named := _by_alias(url):
        return RunDirectory(named)
    if named := _by_alias(above):
        return RunDirectory(posixpath.join(named, name))
    return run


def open_layer_run(url: str, verify: bool = True) -> RunDirectory:
    """Like `open_run`, for readers of one transcoder: also raises RunError if the run holds several."""
    run = open_run(url, verify)
    require_one_layer(run)
    return run


def is_latest(url: str) -> bool:
    """Whether `url` is `<root>/latest`, which names a run; a directory of runs may have that name, too."""
    if posixpath.basename(url) != "latest" or is_hub_url(url):
        return False
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        return bool(patiently(lambda: fs.info(path))["type"] != "directory")
    except FileNotFoundError:
        return True


def is_alias(url: str) -> bool:
    """Whether `url` is `<root>/<name>` of an alias, one that can't be read included, and no directory."""
    root, name = posixpath.split(url)
    if is_hub_url(url) or not is_name(name):
        return False
    return RunDirectory(posixpath.join(root, ALIASES)).exists(f"{name}.json") and not RunDirectory(url).exists()


def _latest(url: str) -> str:
    fs, path = filesystem(url)
    try:
        name = bytes(patiently(lambda: fs.cat_file(path))).decode().strip()
    except FileNotFoundError:
        raise RunError(f"no finished run in {posixpath.dirname(url)}") from None
    return posixpath.join(posixpath.dirname(url), name)


def _by_alias(url: str) -> str | None:
    """What `<root>/<name>` of an alias names; None if there is no such alias. Raises RunError if it can't be read."""
    root, name = posixpath.split(url)
    alias = read_alias(root, name) if is_name(name) else None
    return posixpath.join(root, alias.run_id) if alias else None
