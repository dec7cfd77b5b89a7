"""Other users of a machine: without a home directory, without an entry in the list of users, on their own scratch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.local_ray import session_directory
from mtc.config import ConfigError
from mtc.storage import StorageError, absolute, cache_directory, check_writable, places, prepare_environment

ROOT = Path(__file__).parents[2]
STRANGER = 4242
# Reads what root reads (the checkout may lie where others can't look), writes where a stranger may write.
AS_STRANGER = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
AS_STRANGER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.fixture
def own() -> Iterator[Path]:
    """A directory of the stranger's, in one that everybody may pass."""
    able = os.getuid() == 0 and shutil.which("setpriv") is not None
    if not able or subprocess.run([*AS_STRANGER, "true"], check=False).returncode:
        pytest.skip("only root with all its capabilities can be somebody else, with setpriv")
    directory = Path(tempfile.mkdtemp(prefix="mtc-user-"))
    directory.chmod(0o755)
    for name in ("work", "cache"):
        (directory / name).mkdir()
        os.chown(directory / name, STRANGER, STRANGER)
    yield directory
    shutil.rmtree(directory)


def stranger(own: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "MTC_CACHE", "XDG_CACHE_HOME")}
    kept |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*AS_STRANGER, sys.executable, *command], cwd=own / "work", env=kept | environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_a_user_without_a_home_is_told_what_to_set_and_nothing_is_written(own: Path) -> None:
    for environment, message in (
        ({}, f"user {STRANGER} has no home directory (HOME is not set): set MTC_CACHE to a directory"),
        ({"HOME": "/"}, "MTC_CACHE is not set and the cache directory is /.cache/mtc: user 4242 may not write in /"),
        ({"MTC_CACHE": str(own / "mine")}, f"MTC_CACHE={own}/mine: user {STRANGER} may not write in {own}"),
    ):
        done = stranger(own, "-m", "jobs.train", "--preset", "tiny", "--output.root", "runs", **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not list((own / "work").iterdir())


def test_the_cache_takes_the_place_of_a_home_that_is_not_there(own: Path) -> None:
    """All that a job does before Ray starts, and what it compiles; the whole of it is the next test."""
    others = own / "others"
    others.mkdir()
    code = f"""
from jobs import train
assert train.main(["--preset", "tiny", "--output.root", "{others}/runs"]) == 2
from cluster.local_ray import session_directory
from cluster.pipeline import check
from mtc.config import load_preset
from mtc.language_model import prepare_model
from mtc.transcoder import native
config = load_preset("tiny", {{"output": {{"root": "runs"}}}})
check(config)
prepare_model(config.model)
print(session_directory(), native.status(), sep="\\n")
"""
    done = stranger(own, "-c", code, MTC_CACHE="../cache", USER="root")
    assert done.returncode == 0, done.stderr
    assert f"error: output.root={others}/runs: user {STRANGER} may not write in {others}" in done.stderr.splitlines()
    session, status = done.stdout.splitlines()
    assert session.endswith(f"/ray-{STRANGER}")
    assert status == "compiled" or status.startswith("torch (no C compiler")
    assert not list((own / "work").iterdir()), "a directory named ~, or a half-made run"
    assert not list(others.iterdir())
    assert (own / "cache" / "models").is_dir()


@pytest.mark.chaos
def test_a_user_without_a_home_trains_beside_others(own: Path) -> None:
    options = ["--output.root", "runs", "--output.run_id", "a", "--cluster.num_trainers", "1"]
    done = stranger(own, "-m", "jobs.train", "--preset", "tiny", *options, MTC_CACHE=str(own / "cache"), USER="root")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (own / "work").iterdir()] == ["runs"]
    assert (own / "work/runs/a/manifest.json").stat().st_uid == STRANGER
    mine = [path for path in Path(tempfile.gettempdir()).iterdir() if path.lstat().st_uid == STRANGER]
    assert not [path for path in mine if path.name.startswith("mtc-train-")]


def test_a_home_is_never_a_directory_named_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom nobody knows
    for use in (lambda: absolute("~/runs"), cache_directory, prepare_environment):
        with pytest.raises(StorageError, match="has no home directory"):
            use()
    monkeypatch.setenv("MTC_CACHE", "caches")
    monkeypatch.setenv("HOME", "/nowhere")
    prepare_environment()
    assert os.environ["HOME"] == os.environ["MTC_CACHE"] == cache_directory() == str(tmp_path / "caches")
    assert not list(tmp_path.iterdir())


def test_a_session_directory_that_is_anothers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as root:
        monkeypatch.setenv("RAY_TMPDIR", root)
        mine = Path(session_directory())
        assert mine == Path(root) / f"ray-{os.getuid()}"
        mine.mkdir()
        assert session_directory() == str(mine)
        mine.rmdir()
        mine.symlink_to("/tmp")
        with pytest.raises(ConfigError, match=f"{mine} is not user .* own directory: .* RAY_TMPDIR"):
            session_directory()


class NoCredentialsError(Exception):
    """As s3fs raises botocore's."""


class Bucket(MemoryFileSystem):
    protocol = "bucket"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if "secret" in path:
            raise NoCredentialsError("Unable to locate credentials")
        if "down" in path:
            raise ConnectionError("no route to host")
        super().pipe_file(path, value, mode, **options)


def test_places_that_cant_be_written_are_told_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setattr(places, "PROBE_SECONDS", 0.1)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for url, message, code in (
        (f"{tmp_path}/file", f"{tmp_path}/file is there and is no directory", 2),
        (f"{tmp_path}/file/runs", f"{tmp_path}/file is there and is no directory", 2),
        (f"{tmp_path}/dangling/runs", f"{tmp_path}/dangling is there and is no directory", 2),
        (f"{tmp_path}/{'x' * 256}", "a name in it is longer than the 255 bytes of file systems", 2),
        ("s3:/bucket/runs", "two slashes are wanted behind the colon", 2),
        ("s4://bucket/runs", "Protocol not known: s4; a directory, s3:// or gs:// is wanted", 2),
        ("abfs://bucket/runs", "Install adlfs to access Azure Datalake Gen2 and Azure Blob Storage", 2),
        ("bucket://secret", "the storage asks for credentials: NoCredentialsError: Unable to locate credentials", 2),
        ("bucket://down", "it can't be written: ConnectionError: no route to host", 1),
    ):
        with pytest.raises(StorageError) as error:
            check_writable(f"output.root={url}", url)
        assert (str(error.value), error.value.exit_code) == (f"output.root={url}: {message}", code)
    before = list(tmp_path.iterdir())
    for url in (f"{tmp_path}/a/b/c", f"file://{tmp_path}/a", "bucket://open/runs"):
        check_writable("x", url)
    assert list(tmp_path.iterdir()) == before
    assert not Bucket().find("open")
