"""Checkpoints and what continues from them: no token lost or trained twice, whatever the moment and the trainers."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from ranks import run_ranks

from cluster.batches import Batches
from cluster.blocks import ActorCosts
from cluster.data_state import data_state
from cluster.outcome import TrainingStopped, check_ledger
from cluster.resume import read_progress, unneeded_units
from cluster.stream import deal
from cluster.train_worker import files_of
from mtc.config import load_preset
from mtc.storage import Checkpoints, CheckpointWriter, RunDirectory, RunError
from mtc.training import Clock, Trainer, Unit

TRAINING, CALIBRATION, BATCH = 30, 4, 64
CONFIG = load_preset("tiny", {"data": {"shuffle_buffer_tokens": 400}, "optimizer": {"batch_tokens": BATCH}})


def make_unit(number):
    """Rows that say what they are; some units lack tokens that were not finite."""
    tokens = 30 + number * 7 % 23
    dropped = np.array([1, 5] if number % 6 == 2 else [], np.int32)
    rows = np.delete(np.arange(tokens, dtype=np.int32), dropped)
    column = torch.from_numpy(number * 1000.0 + rows).unsqueeze(1)
    costs = dict.fromkeys((*ActorCosts.FIELDS, "device_flops"), 1.0)
    return Unit(number, {(0, "resid_mid"): column, (0, "mlp_out"): -column}, rows, tokens, dropped, costs)


def every_row(replays):
    rows = [int(v) for n in range(TRAINING) for v in make_unit(n).activations[0, "resid_mid"]]
    return Counter(rows * replays)


def train_some(url, steps, lost, replays, rank, world):
    """A trainer without a model: `steps` steps, a checkpoint, `lost` more steps, the end. All steps if it is None."""
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"replays": replays})})
    checkpoints = Checkpoints(url)
    checkpoint = checkpoints.latest()
    state = data_state(config, checkpoint, rank, world, "cpu")
    unneeded = unneeded_units(checkpoint, world) if checkpoint else set()
    left = np.array([number for number in range(TRAINING + CALIBRATION) if number not in unneeded], np.int64)
    units = (make_unit(int(number)) for number in deal(left, world)[rank::world] if number >= 0)
    batches = Batches(units, state.buffer, BATCH, state.ledger, Clock(), TRAINING, state.filters)
    done, shares = [], []
    while steps is None or len(done) < steps + lost:
        if len(done) == steps:
            writer = CheckpointWriter(checkpoints, os.getpid() if rank else 7, rank, world, 2, lambda *news: None)
            writer.start = 7
            step = (checkpoint.manifest.step if checkpoint else 0) + steps
            writer.save(step, files_of({}, batches, state.generation, rank)).result()
        share = batches.agree(last=False)
        if share is None:
            break
        shares.append(share.tokens)
        done.append(batches.take(share)[0, "resid_mid"].flatten().int().tolist() if share.rows else [])
    held = sum(len(unit.rows) for unit in batches.calibration()) if steps is None else 0
    wrong = [int(unit) for unit in state.ledger.table()["unit"].to_numpy() if unit >= TRAINING]
    return done, shares, held, wrong


def run_start(directory, number, world, steps, lost, replays=1):
    """One start of `world` trainers; returns their rows by step, and the sizes of the global batches."""
    found = run_ranks(train_some, world, directory / str(number), str(directory / "run"), steps, lost, replays)
    assert all(f[1] == found[0][1] for f in found), "ranks disagree on the global batch"
    assert not any(f[3] for f in found), "calibration units in the ledger"
    by_step = [[row for f in found for row in f[0][step]] for step in range(len(found[0][0]))]
    return by_step, found[0][1], sum(f[2] for f in found)


@pytest.mark.parametrize(("backend", "replays"), [("dense", 1), ("sparse", 3)])
def test_a_resumed_training_has_the_same_bits_as_one_that_was_not_interrupted(tmp_path, backend, replays):
    """Weights, moments, schedule, counters of silent features and the order of the data, through a checkpoint."""
    changes = {"optimizer": {"batch_tokens": 32, "backend": backend, "warmup_steps": 5}, "transcoder": {"k": 4}}
    changes |= {"data": {"num_tokens": 1024, "shuffle_buffer_tokens": 400, "replays": replays}}
    config = load_preset("tiny", changes)
    config = config.model_copy(
        update={
            "transcoder": config.transcoder.model_copy(
                update={"dead_after_tokens": 64, "group_sizes": (16, 240), "k": 2}
            )
        }
    )
    rows = torch.randn(TRAINING * 1000, 2, 8, generator=torch.Generator().manual_seed(0))

    def unit(number):
        made = make_unit(number)
        source, target = rows[number * 1000 + torch.from_numpy(made.rows).long()].to(torch.bfloat16).unbind(1)
        return made._replace(activations={(0, "resid_mid"): source, (0, "mlp_out"): target})

    def run(stop=None, checkpoint=None):
        trainer = Trainer(config, 8, 8)
        state = data_state(config, checkpoint, 0, 1, "cpu")
        unneeded = set()
        if checkpoint is not None:
            trainer.load_state_dict(safetensors.torch.load(checkpoint.read("trainer-layer1.safetensors")))
            unneeded = unneeded_units(checkpoint, 1)
        units = (unit(n) for n in range(TRAINING) if n not in unneeded)
        batches = Batches(units, state.buffer, 32, state.ledger, Clock(), TRAINING, state.filters)
        while trainer.step_number != stop and (share := batches.agree(last=False)) is not None:
            if not trainer.step_number:
                trainer.initialise(*state.buffer.peek().values())
            trainer.step(*batches.take(share).values(), share.tokens)
        if stop is not None:
            writer = CheckpointWriter(Checkpoints(str(tmp_path)), 1, 0, 1, 2, lambda *news: None)
            writer.save(stop, files_of({"layer1": trainer}, batches, 0, 0)).result()
        return trainer

    whole = run()
    run(stop=13 * replays)
    again = run(checkpoint=Checkpoints(str(tmp_path)).latest())
    assert again.step_number == whole.step_number > 30
    assert again.tokens == whole.tokens
    assert whole.dead.any(), "AuxK must be active for this test to say anything"
    for name, value in whole.state_dict().items():
        if not name.startswith("compute_seconds."):
            torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("worlds", "replays"),
    [((1, 1, 1), 1), ((2, 2, 2), 1), ((2, 2, 2), 3), ((2, 3, 1), 1), ((1, 2, 2, 3), 1), ((1, 2, 2, 3), 4)],
)
def test_every_token_is_trained_as_often_as_asked_whatever_the_number_of_trainers(tmp_path, worlds, replays):
    """Each start dies two steps after its checkpoint, the last one ends; what counts is what a checkpoint kept."""
    lineage, sizes = [], []
    for number, world in enumerate(worlds):
        last = number == len(worlds) - 1
        before = (5 + number) * replays
        steps, tokens, held = run_start(tmp_path, number, world, None if last else before, 0 if last else 2, replays)
        kept = steps if last else steps[:before]
        lineage += kept
        sizes += tokens[: len(kept)]
    assert Counter(row for step in lineage for row in step) == every_row(replays)
    assert sizes[:-1] == [BATCH] * (len(sizes) - 1), "the global batch depends on the trainers"
    assert held == sum(len(make_unit(n).rows) for n in range(TRAINING, TRAINING + CALIBRATION))
    if len(set(worlds)) == 1:
        (tmp_path / "whole").mkdir()
        whole, _, _ = run_start(tmp_path / "whole", 0, worlds[0], None, 0, replays)
        assert [sorted(step) for step in lineage] == [sorted(step) for step in whole]


def test_the_ledger_tells_a_token_that_took_anothers_place(tmp_path):
    run_start(tmp_path, 0, 1, 6, 1)
    progress = read_progress(Checkpoints(str(tmp_path / "run")).latest())
    assert not len(progress.wrong_units())
    assert progress.repeated_tokens() == 0
    assert progress.trained_tokens() == 6 * BATCH
    table = progress.table.to_pydict()
    done = next(at for at, n in enumerate(table["unit"]) if n in progress.finished())
    table["trained_sum"][done] += 1
    other = type(progress)(progress.table.from_pydict(table, schema=progress.table.schema))
    assert other.wrong_units().tolist() == [table["unit"][done]]
    table["trained"][done] += 3
    other = type(progress)(progress.table.from_pydict(table, schema=progress.table.schema))
    assert other.repeated_tokens() == 3


# The files ----------------------------------------------------------------------------------------------------------


def write_checkpoint(url, step, start=1, rank=0, ranks=1, keep=2, files=None, **options):
    news = []
    writer = CheckpointWriter(Checkpoints(url), start, rank, ranks, keep, lambda *event: news.append(event), **options)
    future = writer.save(step, files or {"weights": lambda: str(step).encode() * 1000})
    writer.close()
    return future, news


def test_checkpoints_are_complete_kept_by_count_and_checked(tmp_path):
    url = str(tmp_path)
    checkpoints = Checkpoints(url)
    assert checkpoints.latest() is None
    for step in (900, 1000, 1100):
        write_checkpoint(url, step)[0].result()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00001000-00000001", "step-00001100-00000001",
    ]  # fmt: skip
    assert checkpoints.latest_intact(pytest.fail).read("weights") == b"1100" * 1000
    path = tmp_path / "checkpoints" / "step-00001100-00000001" / "weights"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    news = []
    assert checkpoints.latest_intact(news.append).manifest.step == 1000
    assert "step-00001100-00000001 is not used" in news[0] and "sha256" in news[0]
    assert checkpoints.latest().manifest.step == 1000, "all readers must agree"
    (tmp_path / "checkpoints" / "step-00001000-00000001" / "checkpoint.json").write_text('{"format_ver')
    for _ in range(2):  # the second time too
        with pytest.raises(RunError, match=r"all checkpoints in .* are damaged"):
            checkpoints.latest_intact(news.append)
    assert "checkpoint.json is damaged" in news[1]


def test_a_checkpoint_stays_when_the_old_ones_cannot_be_removed(tmp_path, monkeypatch):
    url = str(tmp_path)
    write_checkpoint(url, 5, keep=1)[0].result()

    def fail(*arguments, **options):
        raise FileNotFoundError("removed by somebody else")

    monkeypatch.setattr(RunDirectory, "remove", fail)
    future, news = write_checkpoint(url, 6, keep=1)
    assert future.exception() is None
    assert [kind for kind, *_ in news] == ["checkpoint", "checkpoint_not_removed"]
    assert Checkpoints(url).latest_intact(pytest.fail).manifest.step == 6


def test_a_complete_checkpoint_stays_whatever_fails_afterwards(tmp_path, monkeypatch):
    """The storage's answer to the last write may be lost, and so may the news of it."""
    url = str(tmp_path)
    write = RunDirectory.write

    def write_without_answer(self, name, *arguments):
        write(self, name, *arguments)
        if name == "checkpoint.json":
            raise TimeoutError("no answer")

    monkeypatch.setattr(RunDirectory, "write", write_without_answer)
    future, news = write_checkpoint(url, 5)
    assert isinstance(future.exception(), TimeoutError)
    assert [kind for kind, *_ in news] == ["checkpoint_failed"]
    assert Checkpoints(url).latest_intact(pytest.fail).manifest.step == 5
    monkeypatch.undo()

    def nobody_listens(*event):
        raise ConnectionError("nobody listens")

    writer = CheckpointWriter(Checkpoints(url), 1, 0, 1, 2, nobody_listens)
    future = writer.save(6, {"weights": lambda: b"6"})
    writer.close()
    assert isinstance(future.exception(), ConnectionError)
    assert Checkpoints(url).latest_intact(pytest.fail).manifest.step == 6


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path, monkeypatch):
    url = str(tmp_path)
    for step in (5, 6):
        write_checkpoint(url, step, keep=9)[0].result()
    remove = RunDirectory.remove

    def fail(self, name=""):
        if "step-00000005" in self.url:
            raise PermissionError("somebody else's")
        remove(self, name)

    monkeypatch.setattr(RunDirectory, "remove", fail)
    for step in (7, 8):
        write_checkpoint(url, step, keep=1)[0].result()
    names = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000005-00000001", "step-00000008-00000001"]


def test_sweeping_leaves_what_another_rank_has_begun(tmp_path):
    """Rank 1 is through with its part of the result before rank 0 has completed the checkpoint before."""
    checkpoints = Checkpoints(str(tmp_path))
    write_checkpoint(str(tmp_path), 4, start=2, rank=1, ranks=2)[0].result()  # never completed
    news = []
    writers = [CheckpointWriter(checkpoints, 1, rank, 2, 1, lambda *event: news.append(event)) for rank in (0, 1)]
    slow = threading.Event()
    first = writers[0].save(5, {"weights": lambda: slow.wait(30) and b"5"})
    writers[1].save(5, {"part": lambda: b"5"}).result()
    writers[1].save(6, {"part": lambda: b"6"}, result=True).result()
    last = writers[0].save(6, {"result.json": lambda: b"{}"}, result=True)
    slow.set()
    first.result()
    last.result()
    for writer in writers:
        writer.close()
    assert [kind for kind, *_ in news] == ["checkpoint", "checkpoint"]
    assert checkpoints.latest_intact(pytest.fail).is_result
    assert checkpoints.directory.names() == [checkpoints.latest().name]


def test_a_checkpoint_that_hangs_is_reported_once(tmp_path):
    news, hang = [], threading.Event()
    writer = CheckpointWriter(Checkpoints(str(tmp_path)), 1, 0, 1, 2, lambda *event: news.append(event), patience=0.0)
    writer.save(5, {"weights": lambda: hang.wait(30) and b"5"})
    assert writer.busy
    assert writer.busy
    assert [kind for kind, *_ in news] == ["checkpoint_slow"]
    hang.set()
    writer.close()
    assert not writer.busy


def test_a_ledger_that_lacks_something_ends_the_run(tmp_path):
    run_start(tmp_path, 0, 1, 6, 1)
    progress = read_progress(Checkpoints(str(tmp_path / "run")).latest())
    with pytest.raises(TrainingStopped, match=rf"of {TRAINING} work units \d+ are not finished"):
        check_ledger(progress, TRAINING)


def test_a_checkpoint_of_several_ranks_waits_for_all(tmp_path):
    url = str(tmp_path)
    threads = [
        threading.Thread(
            target=write_checkpoint,
            args=(url, 5),
            kwargs={"rank": rank, "ranks": 3, "files": {f"part-{rank}": lambda rank=rank: b"%d" % rank}},
        )
        for rank in (0, 2, 1)
    ]
    threads[0].start()
    assert Checkpoints(url).latest() is None
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoint = Checkpoints(url).latest()
    checkpoint.verify()
    assert {checkpoint.read(f"part-{rank}") for rank in range(3)} == {b"0", b"1", b"2"}


def test_unknown_formats_are_refused(tmp_path):
    write_checkpoint(str(tmp_path), 5)[0].result()
    manifest = tmp_path / "checkpoints" / "step-00000005-00000001" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 99'))
    with pytest.raises(
        RunError, match=r"format_version 99 is not the one .* continues, 3; give another output\.run_id"
    ):
        Checkpoints(str(tmp_path)).latest()
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "checkpoint_manager_snapshot.json").write_text("{}")
    with pytest.raises(RunError, match="format_version 2 is not"):
        Checkpoints(str(tmp_path / "old")).latest()


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    code = """
import sys
from mtc.storage import Checkpoints, CheckpointWriter
checkpoints = Checkpoints(sys.argv[1])
writer = CheckpointWriter(checkpoints, 1, 0, 1, 2, lambda *news: None)
first = checkpoints.latest()
for step in range(first.manifest.step + 1 if first else 1, 10**6):
    files = {f"file{i}": (lambda i=i: bytes([step % 256]) * (300_000 + i)) for i in range(3)}
    writer.save(step, files).result()
    print(step, flush=True)
"""
    dice = random.Random(3)
    newest = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(2):
            newest = int(process.stdout.readline())
        time.sleep(dice.uniform(0, 0.05))  # into the writing of the next one
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        newest = int(rest[-1]) if rest else newest
        checkpoint = Checkpoints(str(tmp_path)).latest_intact(pytest.fail)
        assert checkpoint is not None
        assert checkpoint.manifest.step in (newest, newest + 1)
        assert checkpoint.read("file2") == bytes([checkpoint.manifest.step % 256]) * 300_002


class Flaky(LocalFileSystem):
    """A disk that answers with errors while `failures` is positive."""

    protocol = "flaky"
    failures = 0

    def _fail(self):
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise OSError("503 Slow Down")

    def pipe_file(self, *arguments, **options):
        self._fail()
        return super().pipe_file(*arguments, **options)

    def info(self, *arguments, **options):
        self._fail()
        return super().info(*arguments, **options)

    def cat_file(self, *arguments, **options):
        self._fail()
        return super().cat_file(*arguments, **options)


def test_storage_that_fails_for_a_while_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    url = f"flaky://{tmp_path}"
    write_checkpoint(url, 5)[0].result()
    Flaky.failures = 3
    write_checkpoint(url, 6)[0].result()
    Flaky.failures = 3
    assert Checkpoints(url).latest_intact(pytest.fail).manifest.step == 6
    Flaky.failures = 10**6
    future, news = write_checkpoint(url, 7, patience=0.3)
    Flaky.failures = 0
    with pytest.raises(OSError, match="503"):
        future.result()
    assert news[0] == ("checkpoint_failed", "the checkpoint was given up: OSError: 503 Slow Down", 7)
    assert [kind for kind, *_ in news] == ["checkpoint_failed", "checkpoint_not_removed"]
    assert Checkpoints(url).latest().manifest.step == 6


def test_a_run_directory_asks_again_but_not_for_what_is_missing(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    run = RunDirectory(f"flaky://{tmp_path}")
    Flaky.failures = 4
    run.write("a", b"content")
    assert pauses == [0.25, 0.5, 1.0, 2.0]
    Flaky.failures = 2
    assert run.exists("a"), "an error is not a no"
    assert pauses[4:] == [0.25, 0.5]
    assert not run.exists("b")
    assert not run.exists("a/b")
    with pytest.raises(RunError, match="no file 'b'"):
        run.read("b")
    assert len(pauses) == 6
