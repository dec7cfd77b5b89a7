"""The Ray Data pass over held-out text, with the final weights: metrics, examples, co-activations, and what needs the
whole language model.

Model actors encode on the spot; only sums, candidate examples and sparse co-activations travel. What one row of work
finds does not depend on who does it, and rows are merged in their order, so the result is the same whatever the number
of actors. The driver keeps what comes on its disk (cluster.spool) and merges it one transcoder at a time, so that its
memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch
from safetensors.numpy import load, save

from cluster.activations import UNIT_TYPE, ModelActor, configure_data_context, map_on_model_actors
from cluster.graph_scores import measure_graphs
from cluster.probing import measure_optional
from cluster.resources import Plan
from cluster.spool import Spool
from cluster.tables import iterate_tables
from mtc import language_model
from mtc.analysis import (
    MAX_BLOCKS,
    Findings,
    HeldOutPass,
    LogitEffects,
    LossSums,
    count_tokens,
    findings,
    logit_effects,
    loss_recovered,
    number_documents,
    recognise,
)
from mtc.analysis.coactivation import parent_candidates
from mtc.analysis.contexts import choose_windows
from mtc.analysis.loss_sums import loss_sums
from mtc.analysis.replaced_sums import ReplacedSums, replaced_layers, replaced_sums
from mtc.analysis.straight_line import FOLDS, LineSums, who_sums
from mtc.config import Member, ModelConfig, RunConfig
from mtc.devices import open_device
from mtc.language_model import PackedWindows, SitePair, load_tokenizer, pack_windows
from mtc.results import GraphScores, ReplacedLayers
from mtc.storage import RunDirectory
from mtc.telemetry import describe_machine
from mtc.text import TokenStore, TokenTexts, heldout_units
from mtc.transcoder import MatryoshkaTranscoder, load_transcoder

UNITS_PER_ROW = 8
ROWS_WANTED = 16  # of a short text, so that all actors have work; not their number, which must not change results
FEATURES_PER_ROW = 1024
"""Features of all transcoders together whose effects on the logits are one row of work, if these are not fewer than"""
LEAST_FEATURES_PER_ROW = 128
"""for each."""
TRANSCODERS_PER_UNIT = 8
"""Transcoders up to which the whole model takes a unit's windows at once."""


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
    replaced: ReplacedLayers | None
    """What the language model does with all of the run's layers replaced at once, the same for all of the run's
    transcoders; None if the whole model was not run, of a single layer, and of a sweep."""
    graphs: GraphScores | None
    """What the attribution graphs of held-out prompts explain, the same for all; None as `replaced`, and if none were
    wanted or could be made."""


def analyse_heldout(
    config: RunConfig, plan: Plan, run: RunDirectory, store_url: str, spool: Spool, at_once: int | None = None
) -> Iterator[HeldOutResults]:
    """Run the pass on `analysis.num_tokens` held-out tokens and the whole model on `analysis.loss_tokens`.

    Yields one result for each of the run's transcoders, in their order. All that is found lies in `spool` until its
    transcoder's turn: no more than one's is in memory, if the caller keeps none. A forward pass is for all of the
    transcoders, or for `at_once` of them, and then the text is gone through again for the next ones.
    """
    configure_data_context(config.cluster.stall_seconds)
    store = TokenStore.open(store_url)
    members = config.members()
    run_urls = [own.url for own in run.members().values()]
    settings = config.analysis
    units = heldout_units(store, config, settings.num_tokens)
    loss_units = heldout_units(store, config, settings.loss_tokens) if settings.loss_tokens else []
    windows = np.unique(np.concatenate(units + loss_units))
    numbers, num_documents = number_documents(store.document_ids(windows))
    document_of = dict(zip(windows.tolist(), numbers.tolist(), strict=True))
    vocabulary = len(load_tokenizer(config.model))
    occurrences = count_tokens(store.input_ids(np.concatenate(units)), store.info.special_ids, vocabulary)
    about: dict[str, Any] = {"occurrences": occurrences, "num_documents": num_documents}
    about["context_windows"] = choose_windows(np.concatenate(units), settings.random_contexts, config.data.seed)

    candidates: list[np.ndarray] = []

    def looked_at() -> Iterator[MatryoshkaTranscoder]:
        for url in run_urls:
            transcoder = load_transcoder(RunDirectory(url))
            candidates.append(parent_candidates(transcoder))
            yield transcoder

    summed_by = who_sums(looked_at(), _sites(config, members))

    def empty_pass(at: int) -> HeldOutPass:
        return HeldOutPass(
            members[at].config, load_transcoder(RunDirectory(run_urls[at])), **about, candidates=candidates[at]
        )

    how: dict[int, _How] = {}
    rows = _feature_rows(store, config, units, document_of)
    for some in _parts(len(members), at_once):
        arguments: dict[str, Any] = {
            "config": (own := _only(config, [members[at] for at in some])),
            "run_urls": [run_urls[at] for at in some],
        }
        arguments |= {"candidates": [candidates[at] for at in some], "summed_by": [summed_by[at] for at in some]}
        arguments |= {"sites": _sites(own, [members[at] for at in some])}
        arguments |= {"numbers": list(some), "store_url": store_url, "first_unit": units[0]}
        for row in _results(map_on_model_actors(rows, FeatureActor, plan, **arguments, **about)):
            if row["kind"] == "line":
                spool.sum("line", row["at"], _arrays(row["found"]))
            else:
                spool.add("sums", row["at"], row["found"])
                how.setdefault(row["at"], _How(set(), set(), set())).add(row)

    replaced = None
    if loss_units:
        rows = [_row([part], document_of) for unit in loss_units for part in _loss_parts(unit, len(members))]
        rows += _logit_rows(max(member.config.transcoder.num_features for member in members), len(members))
        means = [_target_mean(empty_pass(at), spool.rows("sums", at, "blocks.")) for at in range(len(members))]
        arguments = {
            "config": config,
            "run_urls": run_urls,
            "store_url": store_url,
            "numbers": list(range(len(members))),
        }
        arguments |= {"sites": _sites(config, members)}
        arguments |= {"target_means": means, "num_documents": num_documents}
        for row in _results(map_on_model_actors(rows, WholeModelActor, plan, **arguments)):
            if row["kind"] == "replaced":
                part = ReplacedSums(**_arrays(row["found"]))
                replaced = part if replaced is None else replaced + part
            else:
                spool.add(row["kind"], row["at"], row["found"])
    counts = (_documents(units, document_of), _documents(loss_units, document_of))
    together = None
    if replaced is not None:
        layers = [sites.layer for sites in config.model.sites]
        together = replaced_layers(replaced, sorted(layers), config.transcoder.prefixes, counts[1])
    graphs = None
    if loss_units:
        graphs = measure_graphs(config, plan, run, store_url, np.concatenate(loss_units))
    optional = measure_optional(config, plan, run_urls, store_url)
    texts = TokenTexts(load_tokenizer(config.model))
    line, line_of = LineSums(), -1
    for at, more in enumerate(optional):
        if line_of != summed_by[at]:  # most of those that share it follow each other; it is solved once for them
            line, line_of = LineSums(), summed_by[at]
            line.merge_arrays(spool.sums("line", line_of))
        # Without names of what is found: it is the caller's alone.
        yield HeldOutResults(
            _findings(store, empty_pass(at), line, spool, at, counts, texts)._replace(**more),
            *how[at].described(),
            together,
            graphs,
        )


def _target_mean(held: HeldOutPass, rows: Iterator[dict[str, Any]]) -> np.ndarray:
    """[d_target], the mean of all held-out targets, of the rows of a pass that is empty yet."""
    for arrays in rows:
        held.merge_sums("blocks", arrays)
    return held.blocks.mean()


def _parts(count: int, at_once: int | None) -> list[range]:
    """Numbers of transcoders in parts of at most `at_once`."""
    size = at_once or count
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _only(config: RunConfig, some: Sequence[Member]) -> RunConfig:
    """The configuration with the layers of some of its transcoders: the language model is loaded up to the deepest."""
    layers = dict.fromkeys(member.config.model.sites[0] for member in some)
    model = config.model.model_dump() | {"layers": [sites.model_dump() for sites in layers]}
    del model["layer"]
    return config.model_copy(update={"model": ModelConfig.model_validate(model)})


def _sites(config: RunConfig, members: Sequence[Member]) -> list[int]:
    """Of each transcoder the number of its layer among those that are read."""
    layers = [sites.layer for sites in config.model.sites]
    return [layers.index(member.config.model.layer) for member in members]


class _How(NamedTuple):
    """What rows of results say of the passes that they are of."""

    dtypes: set[str]
    compute: set[str]
    machines: set[str]

    def add(self, row: dict[str, Any]) -> None:
        for name, known in self._asdict().items():
            known.add(row[name])

    def described(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """Arithmetic, how the passes ran, and the machines."""
        return " and ".join(sorted(self.dtypes)), tuple(sorted(self.compute)), tuple(sorted(self.machines))


class _HeldOutActor(ModelActor):
    """A model actor with what both passes need: the language model, the run's transcoders and the token store."""

    full_model = False

    def load(  # type: ignore[override]
        self,
        config: RunConfig,
        run_urls: list[str],
        sites: list[int],
        numbers: list[int],
        store_url: str,
        device: str,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.store = TokenStore.open(store_url)
        on = open_device(device)
        self.model = language_model.LanguageModel(config.model, on, full=self.full_model)
        self.model.warm_up(config.data.unit_tokens)
        self.machine = describe_machine()
        self.transcoders = [load_transcoder(RunDirectory(url), on) for url in run_urls]
        self.sites = sites
        """Of each transcoder the number of its layer among those that are read."""
        self.numbers = numbers
        """Of each transcoder its number among all of the run's."""


class FeatureActor(_HeldOutActor):
    """A model actor: several units -> for each transcoder one row with all that a HeldOutPass finds in them."""

    def load(  # type: ignore[override]
        self,
        occurrences: np.ndarray,
        num_documents: int,
        context_windows: np.ndarray,
        candidates: list[np.ndarray],
        first_unit: np.ndarray,
        summed_by: list[int],
        **arguments: Any,
    ) -> None:
        super().load(**arguments)
        self.summed_by = summed_by
        """Of each transcoder the number of the first one with the same sums for the affine map, which sums them for
        both."""
        self.about: dict[str, Any] = {
            "occurrences": occurrences, "num_documents": num_documents, "context_windows": context_windows,
        }  # fmt: skip
        self.candidates = candidates
        if any(transcoder.massive_norm.isnan() for transcoder in self.transcoders):
            # Weights from elsewhere. Every actor looks at the same tokens, whichever it works on.
            pairs = self._capture(first_unit)[1]
            for transcoder, site in zip(self.transcoders, self.sites, strict=True):
                recognise(transcoder, pairs[site].target)

    def work(self, batch: pa.Table) -> Iterator[pa.Table]:
        (row,) = batch.to_pylist()
        units = list(zip(row["units"], row["documents"], strict=True))
        how = {"dtypes": str(self.model.dtype).removeprefix("torch."), "compute": self.model.compute}
        how |= {"machines": self.machine}
        begun: dict[int, HeldOutPass] = {}
        for number, (unit, documents) in enumerate(units, 1):
            ids = np.asarray(unit)
            windows, pairs = self._capture(ids)
            for i, (site, at) in enumerate(zip(self.sites, self.numbers, strict=True)):
                held = begun.pop(i, None) or HeldOutPass(
                    self.config, self.transcoders[i], **self.about, candidates=self.candidates[i]
                )
                fold = row["fold"] if self.summed_by[i] == at else None
                held.add(ids, windows, pairs[site], np.asarray(documents), row["sampled"], fold)
                if number < len(units):
                    begun[i] = held
                    continue
                # Of a row of one unit no more than one transcoder's sums are there at a time.
                line, sums = _split_line(held.arrays())
                if fold is not None:
                    yield _found("line", at, line, **how)
                yield _found("sums", at, sums, **how)
                del held, line, sums  # before the next one is made

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
            for at, transcoder in zip(self.numbers, self.transcoders, strict=True):
                if row["first"] < (end := min(row["end"], transcoder.num_features)):
                    yield _found("effects", at, logit_effects(self.model, transcoder, row["first"], end)._asdict())
            return
        (unit,), (documents,) = row["units"], row["documents"]
        windows = pack_windows(self.store.input_ids(np.asarray(unit)), self.store.info.special_ids)
        labels = torch.from_numpy(np.repeat(np.asarray(documents), windows.lengths) % self.num_blocks)
        sums = loss_sums(self.model, self.transcoders, windows, self.target_means, labels, self.num_blocks, self.sites)
        for at, of_one in zip(self.numbers, sums, strict=True):
            yield _found("losses", at, of_one._asdict())
        if len(self.transcoders) > 1 and not self.config.sweep:  # of several of a layer, none is the layer's
            whole = (windows, self.target_means, labels, self.num_blocks)
            yield _found("replaced", -1, replaced_sums(self.model, self.transcoders, *whole)._asdict())


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


def _loss_parts(unit: np.ndarray, transcoders: int) -> list[np.ndarray]:
    """A unit's windows for the whole model, in parts where many transcoders are spliced in: each takes passes of its
    own, so that one unit would keep one actor busy for long while others have nothing left."""
    return np.array_split(unit, min(len(unit), -(-transcoders // TRANSCODERS_PER_UNIT)))


def _logit_rows(features: int, transcoders: int) -> list[pa.Table]:
    per_row = max(LEAST_FEATURES_PER_ROW, FEATURES_PER_ROW // transcoders)
    starts = range(0, features, per_row)
    return [_row([], {}, first=first, end=min(first + per_row, features)) for first in starts]


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


def _split_line(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sums for the affine map, which are large, and all else."""
    line = {name.removeprefix("line."): value for name, value in arrays.items() if name.startswith("line.")}
    return line, {name: value for name, value in arrays.items() if not name.startswith("line.")}


def _findings(
    store: TokenStore,
    held: HeldOutPass,
    line: LineSums,
    spool: Spool,
    at: int,
    documents: tuple[int, int],
    texts: TokenTexts,
) -> Findings:
    """What all rows of one transcoder come to; `held` is empty yet."""
    for arrays in spool.rows("sums", at):
        held.merge(arrays)
    held.line = line
    losses = [LossSums(**part) for part in spool.rows("losses", at)]
    loss = reduce(add, losses) if losses else None
    on_logits = None
    if loss:
        effects = list(spool.rows("effects", at))
        whole = {name: np.concatenate([part[name] for part in effects]) for name in LogitEffects._fields}
        on_logits = LogitEffects(**whole).scaled(float(loss.norm_scale.sum() / loss.tokens.sum()))
    for kind in ("sums", "losses", "effects"):
        spool.remove(kind, at)
    about = (store.input_ids, store.info.special_ids, store.document_ids, texts)
    recovered = loss_recovered(loss, documents[1]) if loss else None
    return findings(held, recovered, on_logits, documents[0], *about)
