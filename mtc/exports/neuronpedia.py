"""Neuronpedia: the batches of features that SAEDashboard's Neuronpedia runner writes, `batch-<N>.json`.

The layout is SAEDashboard 0.8's (`NeuronpediaDashboardBatch`), which Neuronpedia imports; features that never fired are
listed in `skipped_indexes.json`, as there. Lists that we have no measurement for stay empty.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mtc.exports.card import model_card
from mtc.exports.subject import ExportError, Subject, describe_norm
from mtc.features import read_feature
from mtc.report.schema import Analysis, Feature
from mtc.runs import RunDirectory

BATCH = 128
"""Features in a file."""
DECIMALS = 4


def write_neuronpedia(
    subject: Subject, run: RunDirectory, directory: Path, model_id: str | None = None, set_name: str | None = None
) -> None:
    """Write batches of all features of the prefix that fired, from the run's features.parquet and examples.parquet.

    `model_id` and `set_name` are Neuronpedia's; by default the model's last name and `mtc-<run id>`. Raises ExportError
    if the run was never analysed.
    """
    analysis = subject.analysis
    if analysis is None:
        raise ExportError("this run was never analysed, so there is nothing to show of its features")
    examples = run.read("examples.parquet")
    model_id = model_id or subject.config.model.name.split("/")[-1].split(":")[-1].lower()
    set_name = set_name or f"mtc-{subject.run_id.replace('/', '-')}".lower()
    table = pq.read_table(io.BytesIO(run.read("features.parquet"))).slice(0, subject.prefix)
    counts = table["count"].to_numpy()
    fired = np.flatnonzero(counts > 0)
    for number, start in enumerate(range(0, len(fired), BATCH)):
        some = [read_feature(table, int(index)) for index in fired[start : start + BATCH]]
        shown = _top_examples(examples, some[0].feature, some[-1].feature)
        batch = {
            "model_id": model_id,
            "layer": subject.layer,
            "sae_set": set_name,
            "sae_id_suffix": None,
            "features": [_feature(feature, shown.get(feature.feature, []), analysis) for feature in some],
        }
        (directory / f"batch-{number}.json").write_text(json.dumps(batch, allow_nan=False))
    skipped = {
        "model_id": model_id,
        "layer": str(subject.layer),
        "sae_set": set_name,
        "log_sparsity": None,
        "skipped_indexes": np.flatnonzero(counts == 0).tolist(),
    }
    (directory / "skipped_indexes.json").write_text(json.dumps(skipped))
    use = f"""import json

batch = json.load(open("batch-0.json"))  # Neuronpedia's source is "{subject.layer}-{set_name}" of model "{model_id}"
feature = batch["features"][0]  # feature_index, frac_nonzero, activations, ..."""
    norm = (
        "The files hold what the features show on held-out text, not the weights. Activations are in the run's units."
    )
    if subject.input_norm != "rms":
        norm += " " + describe_norm(subject, normalised=False)
    source = subject.config.model.source
    card = model_card(subject, "SAEDashboard's batches for Neuronpedia", source, "mlp_out", use, norm)
    (directory / "README.md").write_text(card)


def _feature(feature: Feature, examples: list[dict[str, Any]], analysis: Analysis) -> dict[str, Any]:
    """One NeuronpediaDashboardFeature; every field of it, in its order."""
    tokens = analysis.config.data.context_length
    return {
        "feature_index": feature.feature,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [effect.token for effect in feature.negative_logits or ()],
        "neg_values": [round(effect.value, DECIMALS) for effect in feature.negative_logits or ()],
        "pos_str": [effect.token for effect in feature.positive_logits or ()],
        "pos_values": [round(effect.value, DECIMALS) for effect in feature.positive_logits or ()],
        "frac_nonzero": feature.density,
        **_histogram(feature, analysis.activation_edges),
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": analysis.summary.analysed_tokens // tokens,
        "n_tokens_in_prompt": tokens,
        "dataset": analysis.config.data.name,
        "decoder_weights_dist": [],
        "activations": [_activation(example, feature.max_activation) for example in examples],
        "vector": [],
    }


def _histogram(feature: Feature, edges: tuple[float, ...]) -> dict[str, list[float]]:
    """Counts of activations by size, and the middle of each bin; empty bins at both ends are left out.

    The bins widen with the size, two per octave, unlike SAEDashboard's.
    """
    filled = [index for index, count in enumerate(feature.histogram) if count]
    bins = range(filled[0], filled[-1] + 1) if filled else range(0)
    return {
        "freq_hist_data_bar_values": [round((edges[i] + edges[i + 1]) / 2, DECIMALS) for i in bins],
        "freq_hist_data_bar_heights": [feature.histogram[i] for i in bins],
    }


def _activation(example: dict[str, Any], maximum: float) -> dict[str, Any]:
    """One NeuronpediaDashboardActivation; `bin_min` and `bin_contains` of -1 mark the strongest examples there."""
    return {
        "bin_min": -1,
        "bin_max": round(maximum, DECIMALS),
        "bin_contains": -1,
        "tokens": example["context_tokens"],
        "values": [round(value, DECIMALS) for value in example["context_activations"]],
        "qualifying_token_index": example["peak_index"],
    }


def _top_examples(parquet: bytes, first: int, last: int) -> dict[int, list[dict[str, Any]]]:
    """The top examples of features first..last, strongest first; other row groups are not read."""
    columns = ["feature", "context_tokens", "context_activations", "peak_index"]
    chosen = [("feature", ">=", first), ("feature", "<=", last), ("kind", "==", "top")]
    found: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(io.BytesIO(parquet), columns=columns, filters=chosen).to_pylist():
        found.setdefault(row["feature"], []).append(row)
    return found
