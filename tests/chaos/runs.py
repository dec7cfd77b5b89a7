"""What the runs of these tests have in common."""

import pyarrow.parquet as pq

from mtc.storage import Progress

OPTIONS = ["--preset", "tiny", "--optimizer.backend", "sparse", "--data.max_epochs", "40"]
OPTIONS += ["--cluster.checkpoint_every_seconds", "2", "--analysis.loss_tokens", "0"]


def none_too_often(run_url):
    """The run's ledger; fails if a token was trained more often than asked."""
    progress = Progress(pq.read_table(f"{run_url}/ledger.parquet"))
    assert not len(progress.wrong_units())
    assert progress.repeated_tokens() == 0
    return progress
