"""What can be known to fail before any work on a cluster, within seconds: all checks of a configuration, in one place.

A job ends at the first that fails; `jobs/check.py` goes on and says all. They are made without a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.places import check_same_run, check_unfinished, run_directory
from cluster.tokenise import check_data
from mtc.config import RunConfig
from mtc.language_model import check_model
from mtc.storage import check_writable, require_run_name, with_absolute_paths
from mtc.telemetry import check_trackers

if TYPE_CHECKING:
    from mtc.language_model import ModelInfo


class Checked(NamedTuple):
    """What the checks find out besides."""

    config: RunConfig
    """The configuration with the model's layers in the place of `model.layers: all`."""
    info: ModelInfo | None
    """Sizes of the language model; None where a guard has kept a fault of it."""


def check_config(config: RunConfig, guard: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Checked:
    """Check everything that can be known to fail, each under a `guard` of its own, which may keep the error.

    Raises what the guards let through: ConfigError (FinishedError for a finished run), StorageError, ModelError or
    DataError.
    """
    given, config = config.output, with_absolute_paths(config)
    info = None
    with guard():
        check_writable(f"output.root={given.root}", config.output.root)
    if config.output.token_store:
        with guard():
            check_writable(f"output.token_store={given.token_store}", config.output.token_store)
    if config.output.run_id:
        with guard():
            require_run_name(run_directory(config))
            check_unfinished(run_directory(config))
    with guard():
        info = check_model(config.model, config.data.context_length)
        config = config.of_layers(info.num_layers)
    if config.output.run_id and info:
        with guard():
            check_same_run(config, run_directory(config))
    with guard():
        check_data(config)
    if config.analysis.probe_tasks:
        from cluster.probing import check_optional  # with scikit-learn: 1 s, of those who probe

        with guard():
            check_optional(config)
    with guard():
        check_trackers(config)
    return Checked(config.model_copy(update={"output": given}), info)
