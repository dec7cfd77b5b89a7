"""Experiment trackers: TensorBoard, MLflow, Weights & Biases get what the trainers say, each through two methods.

None is used unless `output.trackers` names it. They are fed by the job's driver, so workers need no account. One that
fails during a run gets nothing more, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from mtc.config import ConfigError, RunConfig
from mtc.storage import RunDirectory

logger = logging.getLogger(__name__)
SHOWN = ("loss", "l0", "dead", "lr", "gradient_norm", "tokens_per_second")
"""Figures of a row of the metrics history that trackers get, beside FVU by prefix."""
LONGEST_PARAMETER = 500  # MLflow refuses longer ones


class Tracker(Protocol):
    """One open run of one tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over the figures of a training step."""

    def finish(self, failed: bool) -> None:
        """Say that the run is over."""


class TensorBoard:
    """Event files under `tensorboard/` in the run directory; look at them with `tensorboard --logdir runs`."""

    def __init__(self, config: RunConfig, run: RunDirectory):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(run.location("tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment `output.tracking_project`, on the server of MLFLOW_TRACKING_URI."""

    def __init__(self, config: RunConfig, run: RunDirectory):
        import mlflow

        experiment = mlflow.set_experiment(config.output.tracking_project)
        self._client = mlflow.MlflowClient()
        known = self._client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run.run_id}'")
        if known:  # a job that was submitted again
            self._id = known[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment.experiment_id, run_name=run.run_id).info.run_id
        for name, value in settings(config).items():
            self._client.log_param(self._id, name, str(value)[:LONGEST_PARAMETER])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class WandB:
    """A run of the project `output.tracking_project`, by the run's id, continued if there is one."""

    def __init__(self, config: RunConfig, run: RunDirectory):
        import wandb

        self._run: Any = wandb.init(
            project=config.output.tracking_project,
            id=run.run_id,
            name=run.run_id,
            resume="allow",
            config=settings(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, type[TensorBoard] | type[MLflow] | type[WandB]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def check_trackers(config: RunConfig) -> None:
    """Raises ConfigError for a tracker whose package is not installed or that cannot write where the runs are."""
    for name in config.output.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"output.trackers: {name} is not installed; pip install -e '.[{name}]'")
    if "tensorboard" in config.output.trackers and "://" in config.output.root:
        raise ConfigError(
            f"output.trackers: tensorboard writes to disks only, and output.root={config.output.root} is a URL"
        )


@contextmanager
def tracking(config: RunConfig, run: RunDirectory) -> Iterator[list[RowTracker]]:
    """A follower of the metrics history for each tracker that is asked for.

    A tracker that cannot be reached at the start stops the job then, with its own error: somebody asked for it.
    """
    opened = [RowTracker(TRACKERS[name](config, run), config) for name in config.output.trackers]
    failed = True
    try:
        yield opened
        failed = False
    finally:
        for follower in opened:
            try:
                follower.tracker.finish(failed)
            except Exception as error:  # the run is what matters
                logger.warning("%s could not be closed: %s", type(follower.tracker).__name__, error)


class RowTracker:
    """Turns rows of the metrics history into figures with names; events and accounts are not for trackers."""

    def __init__(self, tracker: Tracker, config: RunConfig):
        self.tracker = tracker
        self._prefixes = {member.name: member.config.transcoder.prefixes for member in config.members()}

    def row(self, row: dict[str, Any]) -> None:
        place = f"{row['member']}/" if len(self._prefixes) > 1 else ""
        values = {f"{place}{name}": float(row[name]) for name in SHOWN}
        for prefix, fvu in zip(self._prefixes[row["member"]], row["fvu"], strict=True):
            values[f"{place}fvu/{prefix}"] = float(fvu)
        self.tracker.log(row["step"], values)

    def account(self, account: dict[str, Any]) -> None:
        pass

    def event(self, event: dict[str, Any]) -> None:
        pass


def settings(config: RunConfig) -> dict[str, Any]:
    """The configuration's fields by dotted name."""
    parts = config.model_dump(mode="json")
    sweep = {"sweep": entries} if (entries := parts.pop("sweep")) else {}
    return {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()} | sweep
