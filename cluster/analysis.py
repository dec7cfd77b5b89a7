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

if TYPE_CHECKING:
    import numpy as np
    import ray.data

    from mtc.evaluation import Evaluation
    from mtc.examples import ExampleCollector, FeatureStatistics

UNITS_PER_ROW = 8


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


def analyse_heldout(config: RunConfig, plan: Plan, run_url: str, store_url: str) -> HeldOutResults:
    """Run the pass on `analysis.num_tokens` held-out tokens and the spliced model on `analysis.loss_tokens`."""
    from mtc.evaluation import LossSums, ReconstructionSums
    from mtc.language_model import load_tokenizer
    from mtc.runs import RunDirectory, load_transcoder
    from mtc.tokens import TokenStore, heldout_units

    configure_data_context()
    store, transcoder = TokenStore.open(store_url), load_transcoder(RunDirectory(run_url))
    units = heldout_units(store, config, config.analysis.num_tokens)
    groups = [units[i : i + UNITS_PER_ROW] for i in range(0, len(units), UNITS_PER_ROW)]
    dataset = map_on_model_actors(
        [_row(g) for g in groups], FeatureActor, plan, config=config, run_url=run_url, store_url=store_url
    )
    sums: ReconstructionSums | None = None
    dtype = ""
    collector = make_collector(config)
    for row in _rows(dataset):
        part = ReconstructionSums(**_sums(row, ReconstructionSums._fields))
        sums = part if sums is None else sums + part
        collector.merge_bytes(row["examples"])
        dtype = row["dtype"]
    assert sums is not None, "heldout_units never returns an empty list"

    losses: LossSums | None = None
    if config.analysis.loss_tokens:
        rows = [_row([unit]) for unit in heldout_units(store, config, config.analysis.loss_tokens)]
        arguments = {"config": config, "run_url": run_url, "store_url": store_url, "target_mean": sums.target_mean()}
        loss_dataset = map_on_model_actors(rows, LossActor, plan, **arguments)
        for row in _rows(loss_dataset):
            loss = LossSums(**_sums(row, LossSums._fields))
            losses = loss if losses is None else losses + loss

    tokenizer = load_tokenizer(config.model)
    examples = collector.table(store.document_ids, lambda token: str(tokenizer.decode([token])))
    evaluation = sums.evaluation(transcoder, losses.loss_recovered() if losses else None)
    return HeldOutResults(evaluation, collector.statistics, examples, dtype)


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
    """Loads what both passes need: the language model, the transcoder and the token store."""

    full_model = False

    def __init__(self, config: RunConfig, run_url: str, store_url: str, device: str, threads: int):
        import torch

        from mtc.language_model import LanguageModel
        from mtc.runs import RunDirectory, load_transcoder
        from mtc.tokens import TokenStore

        torch.set_num_threads(threads)
        self.config = config
        self.store = TokenStore.open(store_url)
        self.model = LanguageModel(config.model, device, full=self.full_model)
        self.transcoder = load_transcoder(RunDirectory(run_url), device)


class FeatureActor(_HeldOutActor):
    """Several units -> one row of reconstruction sums and candidate examples."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        import numpy as np

        from mtc.evaluation import reconstruction_sums
        from mtc.tokens import pad_windows

        collector = make_collector(self.config)
        sums = None
        for unit in batch["units"][0].as_py():
            ids = np.asarray(unit)
            windows = pad_windows(self.store.input_ids(ids), self.store.info)
            device = self.model.device
            pair = self.model.capture(windows.input_ids.to(device), windows.attention_mask.to(device))
            counted = windows.trainable.to(device)
            part, sparse = reconstruction_sums(self.transcoder, pair.source[counted], pair.target[counted])
            sums = part if sums is None else sums + part
            activations = sparse.new_zeros((*counted.shape, sparse.shape[-1]))
            activations[counted] = sparse
            collector.add(ids, windows.input_ids.numpy(), windows.trainable.numpy(), activations.cpu().numpy())
        assert sums is not None
        table = _sums_table(sums).append_column("examples", pa.array([collector.to_bytes()], pa.large_binary()))
        return table.append_column("dtype", pa.array([str(self.model.dtype).removeprefix("torch.")]))


class LossActor(_HeldOutActor):
    """One unit -> one row of cross-entropy and KL sums, from the whole language model."""

    full_model = True

    def __init__(
        self, config: RunConfig, run_url: str, store_url: str, target_mean: np.ndarray, device: str, threads: int
    ):
        import torch

        super().__init__(config, run_url, store_url, device, threads)
        self.target_mean = torch.tensor(target_mean)

    def __call__(self, batch: pa.Table) -> pa.Table:
        import numpy as np

        from mtc.evaluation import loss_sums
        from mtc.tokens import pad_windows

        (unit,) = batch["units"][0].as_py()
        windows = pad_windows(self.store.input_ids(np.asarray(unit)), self.store.info)
        return _sums_table(loss_sums(self.model, self.transcoder, windows, self.target_mean))


def _row(units: list[np.ndarray]) -> pa.Table:
    return pa.table({"units": pa.array([[u.tolist() for u in units]], pa.list_(UNIT_TYPE))})


def _sums_table(sums: NamedTuple) -> pa.Table:
    """One row with a list of float64 per field."""
    import numpy as np

    values = {name: np.atleast_1d(np.asarray(v, np.float64)) for name, v in sums._asdict().items()}
    return pa.table({name: pa.array([v], pa.list_(pa.float64())) for name, v in values.items()})


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(table, pa.Table)
        yield from table.to_pylist()


def _sums(row: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The named lists as float64 arrays; token counts and the total square are scalars."""
    import numpy as np

    values = {name: np.asarray(row[name]) for name in fields}
    return {name: v[0] if name in ("tokens", "target_square") else v for name, v in values.items()}
