"""Neuronpedia: the batches of features that SAEDashboard's Neuronpedia runner writes, `batch-<N>.json`.

The layout is SAEDashboard 0.8's (`NeuronpediaDashboardBatch`), which Neuronpedia imports; features that never fired are
listed in `skipped_indexes.json`, as there. Lists that we have no measurement for stay empty.

These batches have no place for labels. Neuronpedia imports explanations from files of their own beside what is made of
the batches, `explanations/batch-<N>.jsonl.gz`, whose lines are rows of its table Explanation (read in
github.com/hijohnnylin/neuronpedia by apps/webapp/app/api/admin/import/route.ts into the tables of prisma/schema.prisma,
written there by batch-autointerp.py and export-data.py of utils/neuronpedia-utils). Labels and people's notes are
written so, and as `config/explanation_type.jsonl` the rows of the table ExplanationType that they name, which the
importer's config needs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mtc.analysis import label_of, read_feature
from mtc.export.card import model_card
from mtc.export.examples import examples_of
from mtc.export.subject import ExportError, Subject, describe_norm
from mtc.results import Analysis, Feature
from mtc.storage import RunDirectory, read_labels, read_notes

BATCH = 128
"""Features in one batch file."""
DECIMALS = 4
LABEL_TYPE, MODEL_TYPE, NOTE_TYPE = "mtc-machine-label", "mtc-model-label", "mtc-note"
"""Types of the explanations: labels made by rules, those by a language model, and people's notes."""
IMPORTER = "clkht01d40000jv08hvalcvly"
"""The user to whom Neuronpedia's tools ascribe what is imported, unless they are told another one: rows need one."""


def write_neuronpedia(
    subject: Subject, run: RunDirectory, directory: Path, model_id: str | None = None, set_name: str | None = None,
    notes: bool = True,
) -> None:  # fmt: skip
    """Write batches of all features of the prefix that fired, and their labels, from the run's analysis and its
    examples.parquet; and, with `notes`, what people noted of it.

    `model_id` and `set_name` are Neuronpedia's; by default the model's last name and `mtc-<run id>`. Raises ExportError
    if the run was never analysed, StorageError if notes can't be read.
    """
    analysis = subject.analysis
    if analysis is None:
        raise ExportError("this run was never analysed, so there is nothing to show of its features")
    examples, table = run.read("examples.parquet"), pq.read_table(io.BytesIO(run.read("features.parquet")))
    labels = read_labels(run)
    known = {row.feature: row.label for row in labels}
    noted = {feature: each.note for feature, each in read_notes(run).items() if each.note} if notes else {}
    model_id = model_id or subject.config.model.name.split("/")[-1].split(":")[-1].lower()
    set_name = set_name or f"mtc-{subject.run_id.replace('/', '-')}".lower()
    counts = table["count"].to_pylist()[: subject.prefix]
    fired = [feature for feature, count in enumerate(counts) if count]
    for number, start in enumerate(range(0, len(fired), BATCH)):
        some = fired[start : start + BATCH]
        shown = examples_of(examples, some[0], some[-1], samples=False)
        batch = {
            "model_id": model_id,
            "layer": subject.layer,
            "sae_set": set_name,
            "sae_id_suffix": None,
            "features": [_feature(read_feature(table, j), shown.get(j, []), analysis) for j in some],
        }
        (directory / f"batch-{number}.json").write_text(json.dumps(batch, allow_nan=False))
        source = f"{subject.layer}-{set_name}"
        rows = [_explanation(model_id, source, j, label_of(table, j), LABEL_TYPE) for j in some]
        rows += [_explanation(model_id, source, j, known.get(j), MODEL_TYPE) for j in some]
        rows += [_explanation(model_id, source, j, noted.get(j), NOTE_TYPE) for j in some]
        _write_lines(directory / "explanations" / f"batch-{number}.jsonl.gz", [row for row in rows if row])
    types = [_type_row(LABEL_TYPE, "Machine label", "What the strongest examples have in common, by rules")]
    if labels:
        said = f"What the language model {labels[0].model} says of the feature's examples"
        types.append(_type_row(MODEL_TYPE, "Label by a language model", said))
    if noted:
        types.append(_type_row(NOTE_TYPE, "Note", "What somebody who looked at the feature says of it"))
    _write_lines(directory / "config" / "explanation_type.jsonl", types)
    skipped = {
        "model_id": model_id,
        "layer": str(subject.layer),
        "sae_set": set_name,
        "log_sparsity": None,
        "skipped_indexes": [feature for feature, count in enumerate(counts) if not count],
    }
    (directory / "skipped_indexes.json").write_text(json.dumps(skipped))
    use = f"""import json

batch = json.load(open("batch-0.json"))  # Neuronpedia's source is "{subject.layer}-{set_name}" of model "{model_id}"
feature = batch["features"][0]  # feature_index, frac_nonzero, activations, ...
# Labels: explanations/batch-0.jsonl.gz, a line for each feature, for Neuronpedia's importer."""
    norm = (
        "The files hold what the features show on held-out text, not the weights. Activations are in the run's units."
    )
    if subject.input_norm != "rms":
        norm += " " + describe_norm(subject, normalised=False)
    source = subject.config.model.source
    card = model_card(subject, "SAEDashboard's batches for Neuronpedia", source, "mlp_out", use, norm)
    (directory / "README.md").write_text(card)


def _explanation(model_id: str, source: str, feature: int, label: str | None, kind: str) -> dict[str, Any] | None:
    """A feature's label or note as a row of Neuronpedia's table Explanation; None of a feature without. Its id is the
    same whenever the same is written, because the importer leaves out what it has."""
    if label is None:
        return None
    row = {"modelId": model_id, "layer": source, "index": str(feature), "description": label, "typeName": kind}
    digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()
    return {"id": f"m{digest[:24]}", **row, "explanationModelName": None, "authorId": IMPORTER}


def _type_row(name: str, shown: str, description: str) -> dict[str, Any]:
    """A row of Neuronpedia's table ExplanationType."""
    return {
        "name": name, "displayName": shown, "description": description, "featured": False, "creatorName": "mtc",
        "creatorId": IMPORTER,
    }  # fmt: skip


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines, gzipped if the name says so; no file without rows."""
    if not rows:
        return
    path.parent.mkdir(exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


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
        **_logits_and_histogram(feature, analysis.activation_edges),
        "n_prompts_total": analysis.summary.analysed_tokens // tokens,
        "n_tokens_in_prompt": tokens,
        "dataset": analysis.config.data.name,
        "decoder_weights_dist": [],
        "activations": [_activation(example, feature.max_activation) for example in examples],
        "vector": [],
    }


def _logits_and_histogram(feature: Feature, edges: tuple[float, ...]) -> dict[str, Any]:
    """The tokens that the feature promotes and suppresses, strongest first, and how often its activations lie in each
    bin that has some, bars at the geometric middle of their bin; the vocabulary by effect, bars in the middle."""
    down, up = feature.negative_logits or (), feature.positive_logits or ()
    filled = [i for i, count in enumerate(feature.histogram) if count]
    most, tokens = max((abs(effect.value) for effect in (*up, *down)), default=0.0), feature.logit_histogram or ()
    return {
        "neg_str": [effect.token for effect in down],
        "neg_values": [round(effect.value, DECIMALS) for effect in down],
        "pos_str": [effect.token for effect in up],
        "pos_values": [round(effect.value, DECIMALS) for effect in up],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_values": [round((edges[i] * edges[i + 1]) ** 0.5, DECIMALS) for i in filled],
        "freq_hist_data_bar_heights": [feature.histogram[i] for i in filled],
        "logits_hist_data_bar_heights": list(tokens),
        "logits_hist_data_bar_values": [
            round(most * ((2 * i + 1) / len(tokens) - 1), DECIMALS) for i in range(len(tokens))
        ],
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
