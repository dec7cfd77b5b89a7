"""What a Ray Data job hands its driver."""

from __future__ import annotations

from collections.abc import Generator

import pyarrow as pa
import ray
import ray.data


def iterate_tables(dataset: ray.data.Dataset) -> Generator[pa.Table, None, None]:
    """The blocks of a Dataset of Arrow tables, in their order; closing the iterator ends the job.

    `Dataset.iter_batches` would leave threads behind where it is not read to its end. If Ray is shut down while one of
    them asks it for something, its core ends the process, with exit code 1.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.blocks:
            table = ray.get(block.ref)
            assert isinstance(table, pa.Table)
            yield table
