"""Repositories of the Hugging Face hub as places that runs are read from: `hf://OWNER/NAME[@REVISION][/FOLDER]`.

huggingface_hub brings fsspec's file system for them; here is what its answers mean. Nothing is written through such an
address: each file would be a commit of its own. `mtc.export.push_directory` makes one of everything.
"""

from __future__ import annotations

import re

from mtc.errors import one_line

TOKEN = "a token that may read it, in HF_TOKEN or by `hf auth login`"
READ_ONLY = (
    "a repository of the Hugging Face hub is only read by its address; write to a directory, s3:// or gs://, and push "
    "the finished run with jobs/export.py --push"
)
_PASSING = (408, 429)


def is_hub_url(url: str) -> bool:
    return url.startswith("hf://")


def malformed(url: str) -> str | None:
    """What is wrong with an address of the hub; None for a usable one, and for every other kind."""
    named = re.match(r"hf://(?:datasets/|spaces/|buckets/)?[^/@]+/[^/@]+", url)
    return None if named or not is_hub_url(url) else "hf://OWNER/NAME is wanted, with @REVISION and /FOLDER if need be"


def is_missing(error: BaseException) -> bool:
    """Whether the hub says that a repository, a revision or a file is not there, or hidden from whoever asks."""
    names = ("RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError")
    return _of_hub(error) and type(error).__name__ in names


def refusal(error: BaseException) -> str | None:
    """What an answer of the hub means that asking again does not change; None for what may pass, for what is not there,
    and for errors of other storage."""
    if not _of_hub(error) or is_missing(error):
        return None
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "the Hugging Face hub is not asked, since HF_HUB_OFFLINE is set"
    response = getattr(error, "response", None)
    if response is None:
        return one_line(error) if isinstance(error, ValueError) else None  # a name that can be none of the hub
    if not 400 <= response.status_code < 500 or response.status_code in _PASSING:
        return None
    where = f"the Hugging Face hub answers {response.status_code} for {str(response.url).partition('?')[0]}"
    if type(error).__name__ == "GatedRepoError":
        return f"{where}: the repository is gated: accept its terms in a browser, and give {TOKEN}"
    if response.status_code == 401:
        return f"{where}: it does not take the token that it is sent; give {TOKEN}"
    if response.status_code == 403:
        return f"{where}: the token may not do this; give {TOKEN}"
    return f"{where}: {one_line(error)}"


def unreachable(error: BaseException) -> str | None:
    """That the hub does not answer or fails, which may pass; None for all else."""
    of_network = type(error).__module__.startswith(("httpx2", "httpcore2"))
    status = getattr(getattr(error, "response", None), "status_code", 0) if _of_hub(error) else 0
    if of_network or status >= 500 or status in _PASSING:
        return f"the Hugging Face hub can't be reached, or fails: {one_line(error)}"
    return None


def _of_hub(error: BaseException) -> bool:
    # By name: what reads no hub does without huggingface_hub, which takes 0.3 s to import.
    return type(error).__module__.startswith("huggingface_hub.")
