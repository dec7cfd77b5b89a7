"""To a model repository of the Hugging Face hub: everything in one commit, so that nobody sees a half of it.

The token is huggingface_hub's own, from HF_TOKEN or `hf auth login`; nothing here takes, stores or shows one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import ModelInfo

from mtc.errors import MtcError, one_line
from mtc.export.card import read_ours
from mtc.export.run_card import run_card
from mtc.export.subject import ExportError
from mtc.storage import NOTES_FILE, RunDirectory, filesystem, notes_to_json, read_notes, unreachable

CARD, MANIFEST = "README.md", "manifest.json"
TOKEN = "set HF_TOKEN to a token that may write, or log in with `hf auth login`"
_MEANWHILE = "the repository has changed meanwhile; push again"
_ADVICE = {
    401: f"it does not take the token: {TOKEN}",
    403: "the token may not write there: it needs the permission to write, and its owner a place in the organisation",
    404: "the owner is no user or organisation that the token may write to, or the repository is gone meanwhile",
    409: _MEANWHILE,
    412: _MEANWHILE,
}
_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


class HubUnreachable(MtcError):
    """The hub does not answer, or fails; later it may do."""

    exit_code = 1
    event = "failed"


class Pushed(NamedTuple):
    """What a push has made."""

    url: str
    """The repository's page."""
    commit: str
    """The commit's id."""
    files: int
    """Files that the repository holds of it."""
    private: bool
    """Whether only those whom its owner lets in can see it."""


def check_push(repo: str) -> None:
    """Raises ExportError if `repo` is no name for a model repository, or if there is no token; asks nobody."""
    if not re.fullmatch(_REPO, repo) or len(repo) > 96 or ".." in repo or "--" in repo or repo.endswith(".git"):
        raise ExportError(f"--push {repo}: OWNER/NAME is wanted, the name of a model repository of the hub")
    if constants.is_offline_mode():
        raise ExportError(f"--push {repo}: HF_HUB_OFFLINE is set, so that no hub is asked; unset it")
    if get_token() is None:
        raise ExportError(f"--push {repo}: there is no token for {constants.ENDPOINT}: {TOKEN}")


def stage_run(
    run: RunDirectory, repo: str, directory: Path, license: str | None = None, contact: str | None = None,
    notes: bool = True,
) -> int:  # fmt: skip
    """Copy all files of a finished run's manifest, each checked against it, with a model card for `repo`; and, with
    `notes`, what people noted of its features, as `notes.json`. Returns on how many features that is.

    Checkpoints and `writer.json` are in no manifest and stay behind. Raises RunError for a damaged file,
    StorageError for notes that can't be read: a push without them would take them from the repository.
    """
    manifest = run.manifest()
    run.run_id = manifest.run_id
    for name in manifest.files:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(run.read_verified(name, manifest))
    (directory / MANIFEST).write_bytes(run.read(MANIFEST))
    (directory / CARD).write_text(run_card(run, repo, manifest.created, license, contact))
    members = run.members()
    found = {name: read_notes(own) for name, own in members.items()} if notes else {}
    for name, each in found.items():
        if each:
            (directory / (name if len(members) > 1 else "") / NOTES_FILE).write_bytes(notes_to_json(each))
    return sum(map(len, found.values()))


def push_directory(directory: Path, repo: str, public: bool = False) -> Pushed:
    """Make the repository hold the files of `directory`, and no others but hidden ones and LICENSE, in one commit.

    `directory` has a model card of ours, which says what the files are: a repository that is there must be empty or
    hold the same of the same run. Raises ExportError if it does not, or if the hub refuses; HubUnreachable.
    """
    check_push(repo)
    api = HfApi()
    ours = read_ours((directory / CARD).read_text())
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    names.sort(key=lambda name: name == MANIFEST)  # last, as in a run's directory
    with _clear(repo):
        api.whoami()  # a wrong token is told as such, and not as a repository that is not there
        info = _existing(api, repo)
        old = set() if info is None else {file.rfilename for file in info.siblings or []}
        if info is None:
            api.create_repo(repo, private=not public)
        else:
            _check_same(info, old, ours, public)
        additions = [CommitOperationAdd(name, str(directory / name)) for name in names]
        gone = sorted(name for name in old - set(names) if not name.startswith(".") and name != "LICENSE")
        with warnings.catch_warnings():  # of Parquet in a model repository
            warnings.simplefilter("ignore", UserWarning)
            commit = api.create_commit(
                repo,
                [*additions, *(CommitOperationDelete(name) for name in gone)],
                commit_message=f"{ours['format']} of {ours['run']}",
                parent_commit=None if info is None else info.sha,
            )
    return Pushed(f"{api.endpoint}/{repo}", commit.oid, len(names), not public)


def _existing(api: HfApi, repo: str) -> ModelInfo | None:
    try:
        return api.model_info(repo)
    except hub_errors.RepositoryNotFoundError:
        return None


def _check_same(info: ModelInfo, files: set[str], ours: dict[str, object], public: bool) -> None:
    """Raises ExportError unless the repository is empty or holds what is pushed again, and is seen by as many."""
    if bool(info.private) == public:
        now, wanted = ("private", "leave --public out") if public else ("public", "give --public")
        raise ExportError(
            f"--push {info.id}: the repository is there and {now}: {wanted}, or change it in its settings"
        )
    if not {name for name in files if not name.startswith(".") and name != "LICENSE"}:
        return
    theirs = {}
    if CARD in files:
        fs, path = filesystem(f"hf://{info.id}@{info.sha}/{CARD}")
        theirs = read_ours(bytes(fs.cat_file(path)).decode(errors="replace"))
    if (theirs.get("run"), theirs.get("format")) != (ours["run"], ours["format"]):
        what = f"{theirs['format']} of {theirs.get('run')}" if "format" in theirs else "something that mtc did not push"
        raise ExportError(
            f"--push {info.id}: the repository is there and holds {what}, not {ours['format']} of {ours['run']}; name "
            "another one"
        )


@contextmanager
def _clear(repo: str) -> Iterator[None]:
    """What the hub and the network raise, as errors that say what to do."""
    try:
        yield
    except MtcError:
        raise
    except Exception as error:
        if reason := unreachable(error):
            raise HubUnreachable(f"--push {repo}: {reason}") from error
        if isinstance(error, hub_errors.HfHubHTTPError):
            status, said = error.response.status_code, error.server_message or one_line(error)
            advice = _ADVICE.get(status, "it refuses the upload")
            raise ExportError(f"--push {repo}: the hub answers {status}: {advice} ({said})") from error
        if isinstance(error, ValueError):  # of the card's metadata, such as a licence that the hub does not know
            raise ExportError(f"--push {repo}: the hub refuses the model card: {one_line(error)}") from error
        raise
