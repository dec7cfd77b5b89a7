"""The Ray Data pass over held-out text, with the final weights: metrics, examples, co-activations, and what needs the
whole language model.

Model actors encode on the spot; only sums, candidate examples and sparse co-activations travel. What one row of work
finds does not depend on who does it, and rows are merged in their order, so the result is the same whatever the number
of actors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch
from safetensors.numpy import load, save

from cluster.activations import UNIT_TYPE, ModelActor, configure_data_context, map_on_model_actors
from cluster.probing import measure_optional
from cluster.resources import Plan
from cluster.tables import iterate_tables
from mtc import language_model
from mtc.analysis import (
    MAX_BLOCKS,
    Findings,
    HeldOutPass,
    LogitEffects,
    LossSums,
    analyse_nesting,
    count_tokens,
    find_copies,
    logit_effects,
    loss_recovered,
    number_documents,
    recognise,
)
from mtc.analysis.evaluation import evaluation
from mtc.analysis.loss_sums import loss_sums
from mtc.analysis.straight_line import FOLDS, who_sums
from mtc.config import RunConfig
from mtc.devices import open_device
from mtc.language_model import PackedWindows, SitePair, load_tokenizer, pack_windows
from mtc.storage import RunDirectory
from mtc.telemetry import describe_machine
from mtc.text import TokenStore, TokenTexts, heldout_units
from mtc.transcoder import load_transcoder

UNITS_PER_ROW = 8
ROWS_WANTED = 16  # of a short text, so that all actors have work; not their number, which must not change results
FEATURES_PER_ROW = 1024


class HeldOutResults(NamedTuple):
    """What the held-out pass finds about one transcoder."""

    found: Findings
    """Figures, examples and optional measurements of the transcoder."""
    dtype: str
    """Arithmetic that the language model ran in."""
    compute: tuple[str, ...]
    """How the language model's passes ran: compiled, or eager and why."""
    machines: tuple[str, ...]
    """What the model actors ran on."""


def analyse_heldout(config: RunConfig, plan: Plan, run: RunDirectory, store_url: str) -> list[HeldOutResults]:
    """Run the pass on `analysis.num_tokens` held-out tokens and the whole model on `analysis.loss_tokens`.

    Returns one result for each of the run's transcoders; all come from the same forward passes.
    """
    configure_data_context(config.cluster.stall_seconds)
    store = TokenStore.open(store_url)
    run_urls = [own.url for own in run.members().values()]
    transcoders = [load_transcoder(RunDirectory(url)) for url in run_urls]
    settings = config.analysis
    units = heldout_units(store, config, settings.num_tokens)
    loss_units = heldout_units(store, config, settings.loss_tokens) if settings.loss_tokens else []
    windows = np.unique(np.concatenate(units + loss_units))
    numbers, num_documents = number_documents(store.document_ids(windows))
    document_of = dict(zip(windows.tolist(), numbers.tolist(), strict=True))
    vocabulary = len(load_tokenizer(config.model))
    occurrences = count_tokens(store.input_ids(np.concatenate(units)), store.info.special_ids, vocabulary)
    about: dict[str, Any] = {"occurrences": occurrences, "num_documents": num_documents}
    arguments: dict[str, Any] = {"config": config, "run_urls": run_urls, "store_url": store_url}

    passes = [HeldOutPass(config, transcoder, **about) for transcoder in transcoders]
    summed_by = who_sums(transcoders, _sites(config))
    for held, first in zip(passes, summed_by, strict=True):
        held.line = passes[first].line
    dtype, compute, machines = "", set(), set()
    rows = _feature_rows(store, config, units, document_of)
    about |= {"candidates": [held.candidates for held in passes], "first_unit": units[0]}
    about["summed_by"] = summed_by
    for row in _results(map_on_model_actors(rows, FeatureActor, plan, **arguments, **about)):
        passes[row["at"]].merge(_arrays(row["found"]))
        dtype = row["dtype"]
        compute.add(row["compute"])
        machines.add(row["machine"])

    losses: list[list[dict[str, Any]]] = [[] for _ in passes]
    effects: list[list[dict[str, Any]]] = [[] for _ in passes]
    if loss_units:
        rows = [_row([unit], document_of) for unit in loss_units] + _logit_rows(
            max(transcoder.num_features for transcoder in transcoders)
        )
        means = [held.blocks.mean() for held in passes]
        arguments |= {"target_means": means, "num_documents": num_documents}
        for row in _results(map_on_model_actors(rows, WholeModelActor, plan, **arguments)):
            (effects if row["kind"] == "effects" else losses)[row["at"]].append(_arrays(row["found"]))
    counts = (_documents(units, document_of), _documents(loss_units, document_of))
    optional = measure_optional(config, plan, run_urls, store_url)
    return [
        HeldOutResults(
            _findings(store, config, held, counts, *whole)._replace(**more),
            dtype,
            tuple(sorted(compute)),
            tuple(sorted(machines)),
        )
        for held, *whole, more in zip(passes, losses, effects, optional, strict=True)
    ]


class _HeldOutActor(ModelActor):
    """A model actor with what both passes need: the language model, the run's transcoders and the token store."""

    full_model = False

    def load(self, config: RunConfig, run_urls: list[str], store_url: str, device: str, threads: int) -> None:  # type: ignore[override]
        torch.set_num_threads(threads)
        self.config = config
        self.store = TokenStore.open(store_url)
        on = open_device(device)
        self.model = language_model.LanguageModel(config.model, on, full=self.full_model)
        self.model.warm_up(config.data.unit_tokens)
        self.machine = describe_machine()
        self.transcoders = [load_transcoder(RunDirectory(url), on) for url in run_urls]
        self.sites = _sites(config)


class FeatureActor(_HeldOutActor):
    """A model actor: several units -> for each transcoder one row with all that a HeldOutPass finds in them."""

    def load(  # type: ignore[override]
        self,
        occurrences: np.ndarray,
        num_documents: int,
        candidates: list[np.ndarray],
        first_unit: np.ndarray,
        summed_by: list[int],
        **arguments: Any,
    ) -> None:
        super().load(**arguments)
        self.summed_by = summed_by
        """Of each transcoder the first one with the same sums for the affine map, which sums them for both."""
        self.about = (occurrences, num_documents)
        self.candidates = candidates
        if any(transcoder.massive_norm.isnan() for transcoder in self.transcoders):
            # Weights from elsewhere. Every actor looks at the same tokens, whichever it works on.
            pairs = self._capture(first_unit)[1]
            for transcoder, site in zip(self.transcoders, self.sites, strict=True):
                recognise(transcoder, pairs[site].target)

    def work(self, batch: pa.Table) -> Iterator[pa.Table]:
        passes = [
            HeldOutPass(self.config, transcoder, *self.about, candidates)
            for transcoder, candidates in zip(self.transcoders, self.candidates, strict=True)
        ]
        (row,) = batch.to_pylist()
        for unit, documents in zip(row["units"], row["documents"], strict=True):
            ids = np.asarray(unit)
            windows, pairs = self._capture(ids)
            for at, (held, site) in enumerate(zip(passes, self.sites, strict=True)):
                fold = row["fold"] if self.summed_by[at] == at else None
                held.add(ids, windows, pairs[site], np.asarray(documents), row["sampled"], fold)
        dtype = str(self.model.dtype).removeprefix("torch.")
        for at, held in enumerate(passes):
            how = {"dtype": dtype, "compute": self.model.compute, "machine": self.machine}
            yield _found("sums", at, held.arrays(), **how)

    def _capture(self, ids: np.ndarray) -> tuple[PackedWindows, tuple[SitePair, ...]]:
        """Windows, and for each layer the activations of their trainable tokens."""
        windows = pack_windows(self.store.input_ids(ids), self.store.info.special_ids)
        return windows, self.model.capture(windows, windows.trainable.nonzero().squeeze(1))


class WholeModelActor(_HeldOutActor):
    """A model actor: one unit -> for each transcoder one row of losses by document; a range of features -> their
    effects on the logits."""

    full_model = True

    def load(self, target_means: list[np.ndarray], num_documents: int, **arguments: Any) -> None:  # type: ignore[override]
        super().load(**arguments)
        self.target_means = [torch.tensor(mean) for mean in target_means]
        self.num_blocks = min(num_documents, MAX_BLOCKS)

    def work(self, batch: pa.Table) -> Iterator[pa.Table]:
        (row,) = batch.to_pylist()
        if row["end"]:
            for at, transcoder in enumerate(self.transcoders):
                if row["first"] < (end := min(row["end"], transcoder.num_features)):
                    yield _found("effects", at, logit_effects(self.model, transcoder, row["first"], end)._asdict())
            return
        (unit,), (documents,) = row["units"], row["documents"]
        windows = pack_windows(self.store.input_ids(np.asarray(unit)), self.store.info.special_ids)
        labels = torch.from_numpy(np.repeat(np.asarray(documents), windows.lengths) % self.num_blocks)
        sums = loss_sums(self.model, self.transcoders, windows, self.target_means, labels, self.num_blocks, self.sites)
        for at, of_one in enumerate(sums):
            yield _found("losses", at, of_one._asdict())


def _sites(config: RunConfig) -> list[int]:
    """Of each transcoder the number of its layer among those that are read."""
    layers = [sites.layer for sites in config.model.sites]
    return [layers.index(member.config.model.layer) for member in config.members()]


def _feature_rows(
    store: TokenStore, config: RunConfig, units: list[np.ndarray], document_of: dict[int, int]
) -> list[pa.Table]:
    """Rows of work of several units each; the first rows, until they hold analysis.coactivation_tokens, are sampled for
    co-activations."""
    per_row = max(1, min(UNITS_PER_ROW, len(units) // ROWS_WANTED))
    rows: list[pa.Table] = []
    sampled = 0
    for i in range(0, len(units), per_row):
        some = units[i : i + per_row]
        rows.append(
            _row(some, document_of, sampled=sampled < config.analysis.coactivation_tokens, fold=len(rows) % FOLDS)
        )
        sampled += int(sum(store.trainable_tokens(unit).sum() for unit in some))
    return rows


def _documents(units: list[np.ndarray], document_of: dict[int, int]) -> int:
    return len({document_of[window] for unit in units for window in unit.tolist()})


def _logit_rows(features: int) -> list[pa.Table]:
    starts = range(0, features, FEATURES_PER_ROW)
    return [_row([], {}, first=first, end=min(first + FEATURES_PER_ROW, features)) for first in starts]


def _row(
    units: list[np.ndarray],
    document_of: dict[int, int],
    sampled: bool = False,
    fold: int = 0,
    first: int = 0,
    end: int = 0,
) -> pa.Table:
    """One row of work: window ids by unit and the number of each one's document, or a range of features."""
    ids = [unit.tolist() for unit in units]
    documents = [[document_of[window] for window in unit] for unit in ids]
    columns = {"units": pa.array([ids], pa.list_(UNIT_TYPE)), "documents": pa.array([documents], pa.list_(UNIT_TYPE))}
    return pa.table(columns | {"sampled": [sampled], "fold": [fold], "first": [first], "end": [end]})


def _found(kind: str, at: int, arrays: dict[str, Any], **more: str) -> pa.Table:
    """One row of results: arrays as a safetensors file, what they are, and which transcoder they are of."""
    data = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
    columns = {"kind": [kind], "at": [at], "found": pa.array([data], pa.large_binary())}
    return pa.table(columns | {name: [value] for name, value in more.items()})


def _arrays(data: bytes) -> dict[str, Any]:
    return load(data)


def _results(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Rows of results in the order of the work."""
    for table in iterate_tables(dataset):
        yield from table.to_pylist()


def _findings(
    store: TokenStore,
    config: RunConfig,
    held: HeldOutPass,
    documents: tuple[int, int],
    losses: list[dict[str, Any]],
    effects: list[dict[str, Any]],
) -> Findings:
    loss = reduce(add, [LossSums(**part) for part in losses]) if losses else None
    texts = TokenTexts(load_tokenizer(config.model))
    on_logits = None
    if loss:
        whole = {name: np.concatenate([part[name] for part in effects]) for name in LogitEffects._fields}
        on_logits = LogitEffects(**whole).scaled(float(loss.norm_scale.sum() / loss.tokens.sum()))
    return Findings(
        evaluation=evaluation(held, loss_recovered(loss, documents[1]) if loss else None, documents[0], texts.token),
        statistics=held.examples.statistics,
        examples=held.examples.examples(store.input_ids, store.info.special_ids, store.document_ids, texts),
        token_errors=held.token_errors,
        deviation=held.blocks.halves()[0].mean_deviation(),
        massive=held.massive,
        copies=find_copies(held.transcoder, held.sample),
        nesting=analyse_nesting(held.transcoder, held.sample, held.candidates),
        effects=on_logits,
    )
