"""jobs/status.py: the state of a run from its directory alone."""

import json
from pathlib import Path

import pytest
from serve_local import make_run

from jobs.status import main
from mtc.config import load_preset, to_yaml
from mtc.language_model import ModelError
from mtc.storage import Lease, RunDirectory, RunError, noting_the_end

ROW = {
    "step": 8,
    "tokens": 2048,
    "tokens_per_second": 512.0,
    "fvu": [0.9, 0.8, 0.7],
    "l0": 8.25,
    "dead": 3,
    "time": 1e9,
}


@pytest.fixture
def unfinished(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(str(tmp_path / "runs" / "a-run"))
    run.write("config.yaml", to_yaml(load_preset("tiny")))
    run.write("metrics.jsonl", json.dumps(ROW | {"step": 1, "tokens": 256}) + "\n" + json.dumps(ROW) + "\n")
    event = {"time": "2026-01-02T03:04:05+00:00", "kind": "failure", "message": "trainer 0 died: OOM", "step": None}
    run.write("events.jsonl", json.dumps(event) + "\n")
    return run


def status(url: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    code = main([url, "--json"])
    found: dict[str, object] = json.loads(capsys.readouterr().out) | {"code": code}
    return found


def test_a_run_that_a_job_works_on(unfinished: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease(unfinished, beat=0.1):
        found = status(unfinished.url, capsys)
    config = load_preset("tiny")
    assert (found["code"], found["state"], found["stage"]) == (3, "running", "train")
    assert (found["step"], found["total_steps"], found["tokens"]) == (8, config.total_steps, 2048)
    assert found["seconds_left"] == pytest.approx((config.data.num_tokens - 2048) / 512)
    assert found["fvu"] == [0.9, 0.8, 0.7]


def test_a_run_that_nobody_works_on(
    unfinished: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtc.storage.status.STALE_SECONDS", 0.2)  # for so long it is watched
    unfinished.write("writer.json", "{}")  # of a job that was killed
    assert main([unfinished.url]) == 4
    text = capsys.readouterr().out
    assert "a-run: stopped (train)" in text
    assert "step 8 of 32 (25%), 2,048 tokens" in text
    assert "failure: trainer 0 died: OOM" in text
    unfinished.write("transcoder.safetensors", b"")
    assert status(unfinished.url, capsys)["stage"] == "analyse"


def test_how_the_last_job_ended(
    unfinished: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next job begins; and not where another job has taken the run from the one that ends."""
    monkeypatch.setattr("mtc.storage.status.STALE_SECONDS", 0.2)

    def work(error: BaseException | None) -> None:
        with Lease(unfinished, beat=0.1) as lease, noting_the_end(unfinished, lease):
            assert status(unfinished.url, capsys)["exit_code"] is None
            if error:
                raise error
            unfinished.write("writer.json", json.dumps({"id": "x", "host": "elsewhere", "pid": 7}))
            lease._thread.join()  # which notices it
            lease.require()

    for error, code, said in (
        (ModelError("m holds no weights"), 2, "m holds no weights"),
        (OSError(28, "No space left"), 1, "OSError: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        with pytest.raises(type(error)):
            work(error)
        found = status(unfinished.url, capsys)
        assert (found["code"], found["exit_code"], found["ended"]) == (4, code, said)
    main([unfinished.url])
    assert "  the last job that began work ended with exit code 130: interrupted\n" in capsys.readouterr().out
    with pytest.raises(RunError, match="another job"):
        work(None)
    unfinished.remove("writer.json")
    assert status(unfinished.url, capsys)["exit_code"] is None
    main([unfinished.url])
    assert "  nothing tells how the last job that began work ended" in capsys.readouterr().out


def test_a_note_in_a_finished_run_is_not_of_its_files(unfinished: RunDirectory) -> None:
    """A job that is interrupted after it has published; the next analysis publishes again."""
    unfinished.publish()
    with pytest.raises(KeyboardInterrupt), Lease(unfinished, beat=0.1) as lease, noting_the_end(unfinished, lease):
        raise KeyboardInterrupt
    assert unfinished.exists("ended.json")
    assert "ended.json" not in unfinished.publish().files


def test_what_ends_a_job_is_not_hidden_by_a_note_that_can_not_be_written(
    unfinished: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = RunDirectory.write

    def full(run: RunDirectory, name: str, data: bytes | str, patience: float = 60.0) -> None:
        if name == "ended.json":
            assert patience <= 10
            raise OSError(28, "No space left on device")
        write(run, name, data, patience)

    monkeypatch.setattr(RunDirectory, "write", full)
    with (
        pytest.raises(ModelError, match="no weights"),
        Lease(unfinished, beat=0.1) as lease,
        noting_the_end(unfinished, lease),
    ):
        raise ModelError("m holds no weights")
    assert "ended.json could not be written: OSError: [Errno 28] No space left" in caplog.text


def test_a_finished_run_by_name_and_as_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "done")
    run.write("analysis.json", json.dumps({"evaluation": {"fvu": [0.5, 0.4, 0.3], "l0": [4.0, 6.0, 8.0]}}))
    for url in (run.url, f"{tmp_path}/runs/latest"):
        found = status(url, capsys)
        assert (found["code"], found["state"], found["run_id"]) == (0, "finished", "done")
        assert (found["exit_code"], found["ended"]) == (0, None)
        assert (found["fvu"], found["l0"]) == ([0.5, 0.4, 0.3], 8.0)


@pytest.mark.parametrize("name", ["nope", "latest"])
def test_no_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{tmp_path}/{name}"]) == 2
    assert "no " in capsys.readouterr().err
