"""Experiment trackers, read back with their own tools."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.progress import ProgressReader
from mtc.config import ConfigError, RunConfig, load_preset
from mtc.storage import RunDirectory
from mtc.telemetry import check_trackers
from mtc.telemetry.tracking import tracking

ROWS = [
    {"member": "layer1", "layer": 1, "step": step, "tokens": 256 * step, "loss": 1 / step,
     "fvu": [0.9, 0.8, 0.5 + 1 / step], "l0": 8.0, "dead": 2,
     "lr": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 100.0}
    for step in (1, 10, 20)
]  # fmt: skip


def track(tracker: str, directory: Path, fail: bool = False) -> tuple[RunConfig, RunDirectory]:
    config = load_preset("tiny", {"output": {"root": str(directory), "trackers": [tracker], "tracking_project": "p"}})
    run = RunDirectory(str(directory / "a-run"))
    check_trackers(config)
    try:
        with tracking(config, run) as (follower,):
            for row in ROWS:
                follower.row(row)
            if fail:
                raise RuntimeError("training failed")
    except RuntimeError:
        assert fail
    return config, run


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, run = track("tensorboard", tmp_path)
    seen = EventAccumulator(run.location("tensorboard"))
    seen.Reload()
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [
        (1, 1.0),
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
    ]
    last = seen.Scalars(f"fvu/{config.transcoder.prefixes[-1]}")[-1]
    assert (last.step, last.value) == (20, pytest.approx(0.55))


@pytest.mark.parametrize("fail", [False, True])
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: bool) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server would need a data base
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlflow")
    config, _ = track("mlflow", tmp_path, fail)
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "p"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "a-run"
    assert found.info.status == ("FAILED" if fail else "FINISHED")
    assert found.data.params["transcoder.k"] == str(config.transcoder.k)
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (10, 0.1), (20, 0.05)]
    track("mlflow", tmp_path)  # a job that was submitted again continues the run
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_what_cannot_be_used_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_preset("tiny", {"output": {"root": "s3://bucket/runs", "trackers": ["tensorboard"]}})
    with pytest.raises(ConfigError, match=r"tensorboard writes to disks only, and output\.root=s3://bucket/runs"):
        check_trackers(config)
    monkeypatch.setattr("mtc.telemetry.tracking.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"output\.trackers: wandb is not installed"):
        check_trackers(load_preset("tiny", {"output": {"trackers": ["wandb"]}}))
    with pytest.raises(ConfigError, match=r"output.trackers"):
        load_preset("tiny", {"output": {"trackers": ["excel"]}})


def test_one_that_fails_gets_nothing_more_and_training_goes_on(tmp_path: Path) -> None:
    class Broken:
        def __init__(self) -> None:
            self.calls = 0

        def row(self, row: dict[str, Any]) -> None:
            self.calls += 1
            raise ConnectionError("server is away")

    broken = Broken()
    run = RunDirectory(str(tmp_path / "a-run"))
    reader = ProgressReader(None, {"layer1": run}, 20, [broken])  # type: ignore[list-item]
    for row in ROWS:
        reader._take_metrics(dict(row))
    assert broken.calls == 1
    assert [row["step"] for row in reader.rows("layer1")] == [1, 10, 20]
    assert json.dumps(reader.rows("layer1"))
