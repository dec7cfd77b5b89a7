"""The Ray Data pass over held-out text, with the final weights: metrics, examples, and the language model's loss.

Model actors encode on the spot; only sums and candidate examples travel, and they merge to the same result whatever
the number of actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from cluster.activations import UNIT_TYPE, configure_data_context, map_on_model_actors
from cluster.resources import Plan
from mtc.config import RunConfig
from mtc.runs import RunDirectory

if TYPE_CHECKING:
    import numpy as np
    import ray.data

    from mtc.evaluation import Evaluation, ReconstructionSums
    from mtc.examples import ExampleCollector, FeatureStatistics

UNITS_PER_ROW = 8
ROWS_WANTED = 16  # of a short text, so that all actors have work; not their number, which must not change results


class HeldOutResults(NamedTuple):
    """What the pass finds."""

    evaluation: Evaluation
    """Metrics at the calibrated threshold."""
    statistics: FeatureStatistics
    """Counts and maxima per feature."""
    examples: pa.Table
    """Activating examples ordered by feature."""
    dtype: str
    """Arithmetic that the language model ran in."""


def analyse_heldout(config: RunConfig, plan: Plan, run: RunDirectory, store_url: str) -> list[HeldOutResults]:
    """Run the pass on `analysis.num_tokens` held-out tokens and the spliced model on `analysis.loss_tokens`.

    Returns one result for each entry of `model.sites`; all come from the same forward passes.
    """
    from mtc.evaluation import LossSums, ReconstructionSums
    from mtc.model_files import load_tokenizer
    from mtc.runs import load_transcoder
    from mtc.tokens import TokenStore
    from mtc.work import heldout_units

    configure_data_context()
    store = TokenStore.open(store_url)
    run_urls = [run.for_layer(sites.layer).url for sites in config.model.sites]
    units = heldout_units(store, config, config.analysis.num_tokens)
    per_row = max(1, min(UNITS_PER_ROW, len(units) // ROWS_WANTED))
    groups = [units[i : i + per_row] for i in range(0, len(units), per_row)]
    arguments = {"config": config, "run_urls": run_urls, "store_url": store_url}
    dataset = map_on_model_actors([_row(g) for g in groups], FeatureActor, plan, **arguments)
    sums: dict[int, ReconstructionSums] = {}
    collectors = [make_collector(config) for _ in run_urls]
    dtype = ""
    for row in _rows(dataset):
        at = row["at"]
        part = ReconstructionSums(**_sums(row, ReconstructionSums._fields))
        sums[at] = sums[at] + part if at in sums else part
        collectors[at].merge_bytes(row["examples"])
        dtype = row["dtype"]

    losses: dict[int, LossSums] = {}
    if config.analysis.loss_tokens:
        rows = [_row([unit]) for unit in heldout_units(store, config, config.analysis.loss_tokens)]
        arguments["target_means"] = [sums[at].target_mean() for at in range(len(run_urls))]
        for row in _rows(map_on_model_actors(rows, LossActor, plan, **arguments)):
            loss = LossSums(**_sums(row, LossSums._fields))
            losses[row["at"]] = losses[row["at"]] + loss if row["at"] in losses else loss

    tokenizer = load_tokenizer(config.model)
    results = []
    for at, url in enumerate(run_urls):
        examples = collectors[at].table(store.document_ids, lambda token: str(tokenizer.decode([token])))
        loss_recovered = losses[at].loss_recovered() if at in losses else None
        evaluation = sums[at].evaluation(load_transcoder(RunDirectory(url)), loss_recovered)
        results.append(HeldOutResults(evaluation, collectors[at].statistics, examples, dtype))
    return results


def make_collector(config: RunConfig) -> ExampleCollector:
    from mtc.examples import ExampleCollector

    settings = config.analysis
    return ExampleCollector(
        config.transcoder.num_features,
        settings.max_per_feature,
        settings.samples_per_feature,
        settings.context_tokens,
        settings.min_activation,
    )


class _HeldOutActor:
    """Loads what both passes need: the language model, each layer's transcoder and the token store."""

    full_model = False

    def __init__(self, config: RunConfig, run_urls: list[str], store_url: str, device: str, threads: int):
        import torch

        from mtc.language_model import LanguageModel
        from mtc.runs import load_transcoder
        from mtc.tokens import TokenStore

        torch.set_num_threads(threads)
        self.config = config
        self.store = TokenStore.open(store_url)
        self.model = LanguageModel(config.model, device, full=self.full_model)
        self.transcoders = [load_transcoder(RunDirectory(url), device) for url in run_urls]


class FeatureActor(_HeldOutActor):
    """Several units -> for each layer one row of reconstruction sums and candidate examples."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        import numpy as np

        from mtc.evaluation import reconstruction_sums
        from mtc.work import pack_windows

        collectors = [make_collector(self.config) for _ in self.transcoders]
        sums: dict[int, ReconstructionSums] = {}
        for unit in batch["units"][0].as_py():
            ids = np.asarray(unit)
            windows = pack_windows(self.store.input_ids(ids), self.store.info.special_ids)
            pairs = self.model.capture(windows, windows.trainable.nonzero().squeeze(1))
            for at, (transcoder, pair) in enumerate(zip(self.transcoders, pairs, strict=True)):
                part, sparse = reconstruction_sums(transcoder, *pair)
                sums[at] = sums[at] + part if at in sums else part
                collectors[at].add_packed(ids, windows, sparse.cpu().numpy())
        dtype = str(self.model.dtype).removeprefix("torch.")
        for at, collector in enumerate(collectors):
            examples = pa.array([collector.to_bytes()], pa.large_binary())
            yield (
                _sums_table(sums[at], at).append_column("examples", examples).append_column("dtype", pa.array([dtype]))
            )


class LossActor(_HeldOutActor):
    """One unit -> for each layer one row of cross-entropy and KL sums, from the whole language model."""

    full_model = True

    def __init__(
        self,
        config: RunConfig,
        run_urls: list[str],
        store_url: str,
        target_means: list[np.ndarray],
        device: str,
        threads: int,
    ):
        import torch

        super().__init__(config, run_urls, store_url, device, threads)
        self.target_means = [torch.tensor(mean) for mean in target_means]

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        import numpy as np

        from mtc.evaluation import loss_sums
        from mtc.work import pack_windows

        (unit,) = batch["units"][0].as_py()
        windows = pack_windows(self.store.input_ids(np.asarray(unit)), self.store.info.special_ids)
        for at, sums in enumerate(loss_sums(self.model, self.transcoders, windows, self.target_means)):
            yield _sums_table(sums, at)


def _row(units: list[np.ndarray]) -> pa.Table:
    return pa.table({"units": pa.array([[u.tolist() for u in units]], pa.list_(UNIT_TYPE))})


def _sums_table(sums: NamedTuple, at: int) -> pa.Table:
    """One row with a list of float64 per field, and which layer's they are."""
    import numpy as np

    values = {name: np.atleast_1d(np.asarray(v, np.float64)) for name, v in sums._asdict().items()}
    columns = {name: pa.array([v], pa.list_(pa.float64())) for name, v in values.items()}
    return pa.table(columns | {"at": pa.array([at])})


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield from table.to_pylist()


def _sums(row: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The named lists as float64 arrays; token counts and the total square are scalars."""
    import numpy as np

    values = {name: np.asarray(row[name]) for name in fields}
    return {name: v[0] if name in ("tokens", "target_square") else v for name, v in values.items()}
