"""What is made once in the cache: one process at a time, and a wait that ends."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mtc.storage import LockError, locked, locks

HOLD = """
import sys, time
from mtc.storage import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_process_that_hangs_in_the_cache_is_named_and_a_dead_one_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "SAY_SECONDS", 0.05)
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.1)
    target = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", HOLD, target], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(LockError, match=rf"holds {target}\.lock for .* MTC_CACHE"),
            locked(target),
        ):
            pass
        assert f"another process makes {target}; waiting" in caplog.text
        other.kill()
    monkeypatch.setattr(locks, "SAY_SECONDS", 30)
    with locked(target):
        pass
