"""What a name in a configuration leads to, said by its form alone.

A model or a text is `pip:...`, `random:...`, a URL, a hub id (`NAME` or `OWNER/NAME`), or else a path. A relative path
counts from where a job is started; `with_absolute_paths` settles that before anything is done or stored, so that a name
means the same in every process, on every node and in every later job.
"""

from __future__ import annotations

import os
import re
import socket

import fsspec

from mtc.config import ConfigError, RunConfig
from mtc.storage.files import absolute

JOB_COPY = "/_ray_pkg_"
"""In the paths of a submitted job's copy of its working directory, which Ray deletes after the job."""


def is_hub_id(name: str) -> bool:
    """Whether a model's or a text's name has the form of a hub id, `NAME` or `OWNER/NAME`; looks at no file."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def require_on_hub(field: str, name: str) -> None:
    """Raises ConfigError if something here has the name of a hub id: libraries would read that instead."""
    if os.path.exists(name):
        raise ConfigError(
            f"{field}={name} is a hub id by its form, but there is also {absolute(name)}: write that, or ./{name}, for "
            "what lies here, and work in another directory for the hub's"
        )


def missing(path: str) -> str:
    """That a local path is not there, for an error message, and why where that is known."""
    lost = ", because Ray deletes a submitted job's copy of its working directory" if JOB_COPY in path else ""
    return f"{path} is not there on {socket.gethostname()}{lost}"


def output_path(path: str) -> str:
    """A place for output made absolute, a URL as it is; a relative path counts from the home directory in a submitted
    job, whose working directory is a copy that Ray deletes."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path):  # or what is meant as one, which check_writable refuses
        return path
    return absolute(os.path.join("~", path) if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else path)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute local paths in `model.name`, `data.name`, `output.root` and `output.token_store`.

    A name of the form of a hub id is a path if something here has it.
    """
    output = {"root": output_path(config.output.root)}
    if config.output.token_store is not None:
        output["token_store"] = output_path(config.output.token_store)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": _absolute_name(config.model.name)}),
            "data": config.data.model_copy(update={"name": _absolute_name(config.data.name)}),
            "output": config.output.model_copy(update=output),
        }
    )


def _absolute_name(name: str) -> str:
    if name.startswith(("file://", "local://")):
        return str(fsspec.core.strip_protocol(name))
    if "://" in name or name.startswith(("pip:", "random:")):
        return name
    return name if is_hub_id(name) and not os.path.exists(name) else absolute(name)
