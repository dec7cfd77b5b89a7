"""Exports against formulas in NumPy and the libraries that read them."""

import gzip
import io
import json
import shutil
import subprocess
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from jobs.export import main
from mtc.analysis.examples import EDGES
from mtc.export.circuit_graph import feature_number
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows, prepare_model
from mtc.storage import Notes, RunDirectory
from mtc.transcoder import MatryoshkaTranscoder
from tests.export_example import GROUPS, D, F, analysed_run, make_run
from tests.report_example import make_evaluation

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = [(norm, skip) for norm in ("rms", "scalar", "none") for skip in (False, True)]


def formula(t: MatryoshkaTranscoder, x: np.ndarray, m: int = F) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstruction of raw sources, in float64, from the transcoder's definition."""
    w = {name: value.double().numpy() for name, value in t.state_dict().items()}
    x = x.astype(np.float64)
    if t.shape.input_norm == "rms":
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    elif t.shape.input_norm == "scalar":
        x = x * w["input_scale"]
    z = x @ w["W_enc"].T + w["b_enc"]
    assert np.abs(z - w["threshold"]).min() > 1e-5  # no feature is on the edge, where rounding would decide
    a = np.where(z > w["threshold"], z, 0)[:, :m]
    y = a @ w["W_dec"][:m] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)
    return a, y / w["target_scale"]


def sources(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(40, D))
    x[:, 5] *= 9  # as in residual streams
    return x.astype(np.float32)


def normalised(x: np.ndarray) -> np.ndarray:
    """What Gemma's norm makes of a residual stream, before its gain."""
    return (x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)).astype(np.float32)


def export(run: RunDirectory, format: str, *options: str) -> Path:
    directory = Path(run.path).parent / f"{run.run_id}-{format}{''.join(options)}"
    assert main(["--run", run.url, "--format", format, "--output", str(directory), *options]) == 0
    assert [p for p in directory.parent.iterdir() if p.name.endswith(".tmp")] == []
    return directory


def card_of(directory: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(directory / "README.md")


@pytest.mark.parametrize("prefix", [None, 16])
@pytest.mark.parametrize(("norm", "skip"), KINDS)
def test_saelens_loads_the_same_function(tmp_path: Path, norm: str, skip: bool, prefix: int | None) -> None:
    from sae_lens import SAE

    run = make_run(tmp_path, norm, skip)
    directory = export(run, "saelens", *(["--prefix", str(prefix)] if prefix else []))
    sae = SAE.load_from_disk(directory)
    reads_normalised = norm == "rms" and skip
    hook = "blocks.1.ln2.hook_normalized" if reads_normalised else "blocks.1.hook_resid_mid"
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out) == (hook, "blocks.1.hook_mlp_out")
    assert sae.cfg.normalize_activations == ("constant_norm_rescale" if norm == "rms" and not skip else "none")
    assert sae.cfg.metadata.mtc["group_sizes"] == ([16] if prefix else list(GROUPS))
    x = sources()
    fed = torch.from_numpy(normalised(x) if reads_normalised else x)
    features, y = formula(MatryoshkaTranscoder.load(run.location("transcoder.safetensors")), x, prefix or F)
    with torch.no_grad():
        np.testing.assert_allclose(sae.encode(fed), features, **CLOSE)
        np.testing.assert_allclose(sae(fed), y, **CLOSE)
    assert 0.1 < (features > 0).mean() < 0.6
    assert hook in card_of(directory).text
    assert card_of(directory).data.library_name == "saelens"


@pytest.mark.parametrize("prefix", [None, 48])
@pytest.mark.parametrize(("norm", "skip"), KINDS)
def test_circuit_tracer_loads_the_same_function(tmp_path: Path, norm: str, skip: bool, prefix: int | None) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    run = make_run(tmp_path, norm, skip)
    directory = export(run, "circuit-tracer", *(["--prefix", str(prefix)] if prefix else []))
    config = yaml.safe_load((directory / "config.yaml").read_text())
    hook = "ln2.hook_normalized" if norm == "rms" else "hook_resid_mid"
    assert (config["feature_input_hook"], config["feature_output_hook"]) == (hook, "hook_mlp_out")
    file = str(directory / "layer_1.safetensors")
    cpu = torch.device("cpu")
    transcoder = load_relu_transcoder(file, 1, device=cpu, lazy_encoder=False, lazy_decoder=False)
    x = sources()
    fed = torch.from_numpy(normalised(x) if norm == "rms" else x)
    features, y = formula(MatryoshkaTranscoder.load(run.location("transcoder.safetensors")), x, prefix or F)
    with torch.no_grad():
        np.testing.assert_allclose(transcoder.encode(fed), features, **CLOSE)
        np.testing.assert_allclose(transcoder(fed), y, **CLOSE)
    assert "needs every layer" in card_of(directory).text


def test_circuit_tracer_loads_all_layers_of_a_run_as_one_set(tmp_path: Path) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    run = make_run(tmp_path, model={"layers": [0, 1]})
    directory = export(run, "circuit-tracer")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["model_kind"] == "transcoder_set"
    paths = {layer: str(directory / f"layer_{layer}.safetensors") for layer in (0, 1)}
    hooks = {name: config[name] for name in ("scan", "feature_input_hook", "feature_output_hook")}
    loaded = load_transcoder_set(paths, device=torch.device("cpu"), **hooks)
    x = sources()
    fed = torch.from_numpy(np.stack([normalised(x)] * 2))
    with torch.no_grad():
        features = loaded.encode(fed)
        y = loaded.decode(features, fed)
    for layer in (0, 1):
        file = run.members()[f"layer{layer}"].location("transcoder.safetensors")
        expected, target = formula(MatryoshkaTranscoder.load(file), x)
        np.testing.assert_allclose(features[layer], expected, **CLOSE)
        np.testing.assert_allclose(y[layer], target, **CLOSE)


@pytest.mark.parametrize("norm", ["rms", "scalar", "none"])
def test_gemma_scope_npz_is_the_same_function(tmp_path: Path, norm: str) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    run = make_run(tmp_path, norm)
    directory = export(run, "gemma-scope-npz", "--prefix", "48")
    p = np.load(directory / "params.npz", allow_pickle=False)
    assert {name: (p[name].shape, p[name].dtype) for name in p.files} == {
        "W_enc": ((D, 48), np.float32), "W_dec": ((48, D), np.float32), "b_enc": ((48,), np.float32),
        "b_dec": ((D,), np.float32), "threshold": ((48,), np.float32),
    }  # fmt: skip
    x = sources()
    fed = normalised(x) if norm == "rms" else x
    features, y = formula(MatryoshkaTranscoder.load(run.location("transcoder.safetensors")), x, 48)
    z = fed @ p["W_enc"] + p["b_enc"]
    a = np.where(z > p["threshold"], z, 0)
    np.testing.assert_allclose(a, features, **CLOSE)
    np.testing.assert_allclose(a @ p["W_dec"] + p["b_dec"], y, **CLOSE)
    loaded = load_gemma_scope_transcoder(str(directory / "params.npz"), 1, device=torch.device("cpu"))
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.from_numpy(fed)), y, **CLOSE)


def test_thresholds_of_their_own_are_exported(tmp_path: Path) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder
    from sae_lens import SAE

    run = make_run(tmp_path, "none")
    transcoder = MatryoshkaTranscoder.load(run.location("transcoder.safetensors"))
    transcoder.threshold = torch.linspace(-1, 2, F)  # one below 0 lets every positive pre-activation through
    transcoder.threshold[-1] = torch.finfo(torch.float32).max  # of a feature that contributes nothing
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.publish()
    x = torch.from_numpy(sources())
    z = torch.relu(x @ transcoder.W_enc.T + transcoder.b_enc).detach()
    expected = z * (z > transcoder.threshold)
    assert not expected[:, -1].any()
    file, cpu = str(export(run, "circuit-tracer") / "layer_1.safetensors"), torch.device("cpu")
    traced = load_relu_transcoder(file, 1, device=cpu, lazy_encoder=False, lazy_decoder=False)
    with torch.no_grad():
        torch.testing.assert_close(SAE.load_from_disk(export(run, "saelens")).encode(x), expected, **CLOSE)
        torch.testing.assert_close(traced.encode(x), expected, **CLOSE)


def test_features_that_compete_for_places_have_no_thresholds_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, transcoder={"activation": "topk"})
    for format in ("saelens", "circuit-tracer", "gemma-scope-npz"):
        assert main(["--run", run.url, "--format", format, "--output", str(tmp_path / "x")]) == 2
        assert "transcoder.activation=topk: features have no thresholds" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama", "gpt2"])
@pytest.mark.parametrize(("source", "norm", "skip"), [
    ("resid_mid", "rms", False), ("resid_mid", "rms", True), ("resid_mid", "scalar", True), ("mlp_in", "scalar", False),
])  # fmt: skip
def test_hooks_hold_what_the_transcoder_reads(
    tmp_path: Path, architecture: str, source: str, norm: str, skip: bool
) -> None:
    """What TransformerLens has at the exported hooks, through the exported SAE, is ours through our transcoder."""
    from sae_lens import SAE
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    model = {"name": f"random:{architecture}", "source": source, "dtype": "float32"}
    run = make_run(tmp_path, norm, skip, model=model)
    if architecture == "gpt2" and norm == "rms" and skip:  # LayerNorm subtracts the mean: no hook holds what we read
        assert main(["--run", run.url, "--format", "saelens", "--output", str(tmp_path / "x")]) == 2
        assert not (tmp_path / "x").exists()
        return
    sae = SAE.load_from_disk(export(run, "saelens"))
    config = run.config()
    path, tokenizer = prepare_model(config.model), load_tokenizer(config.model)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers(path, hf_model=hf, tokenizer=tokenizer, device="cpu")
    ids = [tokenizer.bos_token_id or 0, *range(40, 60)]
    metadata, seen = sae.cfg.metadata, {}
    for name in (metadata.hf_hook_name, metadata.hf_hook_name_out):
        if name:
            module, _, side = name.rpartition(".")
            hf.get_submodule(module).register_forward_hook(
                lambda _, a, out, name=name, side=side: seen.update({name: (a[0] if side == "input" else out)[0]})
            )
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([ids]))
        hf(torch.tensor([ids]))
        (pair,) = LanguageModel(config.model).capture(pack_windows([np.array(ids, np.int32)], []))
        torch.testing.assert_close(cache[metadata.hook_name_out][0], pair.target, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[metadata.hf_hook_name_out], pair.target, rtol=1e-4, atol=1e-4)
        if metadata.hf_hook_name:
            torch.testing.assert_close(seen[metadata.hf_hook_name], pair.source, rtol=1e-4, atol=1e-4)
        features, y = formula(MatryoshkaTranscoder.load(run.location("transcoder.safetensors")), pair.source.numpy())
        np.testing.assert_allclose(sae.encode(cache[metadata.hook_name][0]), features, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sae(cache[metadata.hook_name][0]), y, rtol=1e-4, atol=1e-4)


@pytest.fixture
def analysed(tmp_path: Path) -> RunDirectory:
    return analysed_run(tmp_path)


def test_neuronpedia_batches_are_saedashboards(analysed: RunDirectory, tmp_path: Path) -> None:
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    directory = export(analysed, "neuronpedia", "--prefix", "48", "--neuronpedia-set", "mine")
    (file,) = directory.glob("batch-*.json")
    batch = json.loads(file.read_text())
    assert NeuronpediaDashboardBatch(**batch).to_dict() == batch  # no field is unknown there, none is missing here
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("gemma2", 1, "mine")
    assert [f["feature_index"] for f in batch["features"]] == [j for j in range(48) if j != 7]
    assert json.loads((directory / "skipped_indexes.json").read_text())["skipped_indexes"] == [7]
    truth = np.load(tmp_path / "truth.npz")
    activations, ids = truth["activations"], truth["ids"]
    activations[:, 0] = 0
    # Columns of the table Explanation of Neuronpedia's schema.prisma; those that are left out have defaults there.
    packed = (directory / "explanations" / "batch-0.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    labels = pq.read_table(Path(analysed.url, "features.parquet"))["label"].to_pylist()
    assert {row["index"]: row["description"] for row in rows} == {str(j): labels[j] for j in range(48) if j != 7}
    about = {(row["modelId"], row["layer"], row["typeName"], row["explanationModelName"]) for row in rows}
    assert about == {("gemma2", "1-mine", "mtc-machine-label", None)}
    assert len({row["id"] for row in rows}) == len(rows) and all(row["authorId"] for row in rows)
    (kind,) = (directory / "config" / "explanation_type.jsonl").read_text().splitlines()
    assert json.loads(kind)["name"] == "mtc-machine-label"
    assert {"displayName", "description", "creatorName", "creatorId"} < set(json.loads(kind))
    for feature in batch["features"]:
        values = activations[:, :, feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx((values > 0).sum() / 21)
        peaks = sorted(((w.max(), i, int(w.argmax())) for i, w in enumerate(values) if w.max() > 0), reverse=True)[:2]
        assert len(feature["activations"]) == len(peaks)
        for shown, (peak, window, at) in zip(feature["activations"], peaks, strict=True):
            reach = [p for p in range(at - 2, at + 3) if 1 <= p < 8]
            assert shown["tokens"] == [f"<{chr(ids[window, p])}>" for p in reach]
            assert shown["values"] == pytest.approx([values[window, p] for p in reach], abs=1e-4)
            assert shown["values"][shown["qualifying_token_index"]] == pytest.approx(peak, abs=1e-4)
            assert shown["bin_max"] == pytest.approx(values.max(), abs=1e-4)
        assert feature["pos_str"] == feature["neg_str"] == [f"<{chr(t)}>" for t in range(60, 70)]
        assert feature["pos_values"] == list(range(60, 70))
        assert feature["logits_hist_data_bar_heights"] == list(range(24))
        middles = feature["logits_hist_data_bar_values"]
        assert middles == pytest.approx([69 * (2 * i + 1 - 24) / 24 for i in range(24)], abs=1e-4)
        heights = np.histogram(values[values > 0].clip(EDGES[0], EDGES[-1]), EDGES)[0]
        assert feature["freq_hist_data_bar_heights"] == heights[heights > 0].tolist()


def test_notes_are_explanations_of_their_own(analysed: RunDirectory, tmp_path: Path) -> None:
    for feature, note in ((3, "mine"), (7, "of a silent one"), (4, None)):
        Notes(analysed).update(feature, lambda old, note=note: old.model_copy(update={"note": note, "star": True}))
    directory = export(analysed, "neuronpedia", "--neuronpedia-set", "mine")
    packed = (directory / "explanations" / "batch-0.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    found = [(row["index"], row["description"]) for row in rows if row["typeName"] == "mtc-note"]
    assert found == [("3", "mine")]  # features that never fired are left out, stars are no words
    kinds = (directory / "config" / "explanation_type.jsonl").read_text().splitlines()
    assert [json.loads(kind)["name"] for kind in kinds] == ["mtc-machine-label", "mtc-note"]
    without = export(analysed, "neuronpedia", "--no-notes")
    assert b"mtc-note" not in gzip.decompress((without / "explanations" / "batch-0.jsonl.gz").read_bytes())


def test_feature_files_are_what_circuit_tracer_reads(analysed: RunDirectory, tmp_path: Path) -> None:
    from circuit_tracer.frontend.feature_models import Model

    directory = export(analysed, "circuit-tracer", "--prefix", "48") / "features"
    index = json.loads(gzip.decompress((directory / "index.json.gz").read_bytes()))
    assert list(index) == ["1"] and index["1"]["filename"] == "layer_1.bin"
    data, offsets = (directory / "layer_1.bin").read_bytes(), index["1"]["offsets"]
    assert len(offsets) == 49 and offsets[-1] == len(data)
    samples: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(io.BytesIO(analysed.read("examples.parquet"))).to_pylist():
        samples.setdefault(row["feature"], []).append(row)
    truth = np.load(tmp_path / "truth.npz")
    activations, ids = truth["activations"], truth["ids"]
    activations[:, 0] = 0
    for j, (start, end) in enumerate(pairwise(offsets)):
        assert int.from_bytes(data[start : start + 4], "little") == end - start - 4
        feature = json.loads(gzip.decompress(data[start + 4 : end]))
        assert Model.model_validate(feature).model_dump() == feature  # no field is unknown there, none is missing here
        assert (feature["index"], feature["transcoder_id"]) == (j, "one")
        values = activations[:, :, j]
        assert feature["activation_frequency"] == pytest.approx((values > 0).sum() / 21)
        assert sum(feature["histogram"]) == pytest.approx((values > 0).sum(), abs=1e-2)
        assert feature["act_max"] == pytest.approx(values.max(), abs=1e-4)
        if j == 7:
            assert feature["examples_quantiles"] == feature["histogram"] == feature["quantile_values"] == []
            continue
        top, *fifths = feature["examples_quantiles"]
        assert top["quantile_name"] == "Top activations"
        peaks = sorted(((w.max(), i, int(w.argmax())) for i, w in enumerate(values) if w.max() > 0), reverse=True)[:2]
        for shown, (_, window, at) in zip(top["examples"], peaks, strict=True):
            reach = [p for p in range(at - 2, at + 3) if 1 <= p < 8]
            assert shown["tokens"] == [f"<{chr(ids[window, p])}>" for p in reach]
            assert shown["tokens_acts_list"] == pytest.approx([values[window, p] for p in reach], abs=1e-4)
            assert shown["train_token_ind"] == reach.index(at)
        drawn = [example for fifth in fifths for example in fifth["examples"]]
        (sample,) = (row for row in samples[j] if row["kind"] == "sample")
        fifth = min(int(5 * sample["quantile"]), 4)
        assert [each["quantile_name"] for each in fifths] == [f"Percentiles {20 * fifth} to {20 * fifth + 20}"]
        assert [each["tokens"] for each in drawn] == [sample["context_tokens"]]
        strongest = {(tuple(e["tokens"]), e["train_token_ind"]) for e in top["examples"]}
        for example in drawn:
            assert example["is_repeated_datapoint"] == (
                (tuple(example["tokens"]), example["train_token_ind"]) in strongest
            )
        median = feature["quantile_values"][49]
        share = (values[values > 0] <= median * 1.4).mean(), (values[values > 0] < median / 1.4).mean()
        assert share[0] >= 0.5 >= share[1]  # bins are a third of their activations wide
        assert feature["top_logits"] == [f"<{chr(t)}>" for t in range(60, 70)]


def test_circuit_tracers_viewer_finds_the_features_of_every_layer(analysed: RunDirectory, tmp_path: Path) -> None:
    """Its own code, run by node: the first and the last feature of a file, and others by their numbers in graphs."""
    if (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    run = make_run(tmp_path, name="both", model={"name": "random:gemma2", "layers": [0, 1]})
    for name, own in run.members().items():
        for file in ("examples.parquet", "features.parquet", "analysis.json"):
            if name == "layer1":
                own.write(file, analysed.read(file))
        own.publish(latest=False)
    run.publish()
    directory = export(run, "circuit-tracer")
    assert "`features/` holds what circuit-tracer's viewer shows" in card_of(directory).text
    numbers = [feature_number(1, j) for j in (0, 7, 30, F - 1)]
    assets = Path(str(resources.files("circuit_tracer"))) / "frontend/assets"
    command = [node, str(Path(__file__).with_name("viewer.cjs")), str(assets), str(directory / "features")]
    done = subprocess.run([*command, *map(str, numbers)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [each["index"] for each in found] == [0, 7, 30, F - 1]
    assert [each["featureIndex"] for each in found] == numbers
    assert [bool(each["examples_quantiles"]) for each in found] == [True, False, True, True]


def test_runs_that_were_never_analysed_have_no_feature_files(tmp_path: Path) -> None:
    directory = export(make_run(tmp_path), "circuit-tracer")
    assert sorted(file.name for file in directory.iterdir()) == ["README.md", "config.yaml", "layer_1.safetensors"]
    assert "features/" not in card_of(directory).text


def test_analysis_of_another_version_is_refused(analysed: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    analysed.write("analysis.json", json.dumps(json.loads(analysed.read("analysis.json")) | {"format_version": 1}))
    analysed.publish()
    assert main(["--run", analysed.url, "--format", "saelens", "--output", analysed.url + "-x"]) == 2
    assert "format_version 1 is unknown" in capsys.readouterr().err


def test_model_card_says_what_the_run_says(analysed: RunDirectory) -> None:
    card = card_of(export(analysed, "saelens", "--prefix", "48", "--license", "apache-2.0"))
    found = card.data.to_dict()
    assert [
        (each["type"], each["args"]["features"]) for each in found.pop("model-index")[0]["results"][0]["metrics"]
    ] == [(kind, features) for features in (16, 48) for kind in ("fvu", "l0", "silent_share")]
    assert found == {
        "license": "apache-2.0", "library_name": "saelens", "datasets": ["OWNER/texts"],
        "tags": ["transcoder", "matryoshka", "sparse-autoencoder", "interpretability", "mtc", "saelens"],
        "mtc": {
            "run": "one", "format": "SAELens",
            "hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out", "group_sizes": [16, 32],
            "k": 8,
        },
    }  # fmt: skip
    assert "| 16 | 0.5000 | 1.00 |\n| 48 | 0.4000 | 2.00 |\n\nOn 21 held-out tokens of `OWNER/texts`" in card.text
    assert "the first 48 of 64, in nested groups [16, 32]" in card.text
    data = json.loads(analysed.read("analysis.json"))
    for part in (data["evaluation"], data["summary"]):
        massive = make_evaluation([16, 48, 64], massive=True)
        part |= {"all_tokens": massive.all_tokens.model_dump(), "massive": massive.massive.model_dump()}
    analysed.write("analysis.json", json.dumps(data))
    analysed.publish()
    text = card_of(export(analysed, "saelens", "--prefix", "16")).text
    assert "| 16 | 0.5000 | 1.00 | 0.3000 | 3.10 |\n\nWhere it is not said, without 20 massive tokens" in text
    assert "which hold 51.8% of the variance" in text
    assert "affine map from the same source has an FVU of 0.6200 there" in text


def test_model_card_says_nothing_of_a_loss_that_zero_ablation_does_not_raise(analysed: RunDirectory) -> None:
    data = json.loads(analysed.read("analysis.json"))
    loss = make_evaluation(data["evaluation"]["prefixes"]).loss
    assert loss
    for prefix, ce_zero, said in (("16", 5.0, True), ("48", 2.9, False)):
        data["summary"]["loss"] = loss.model_copy(update={"ce_zero": ce_zero}).model_dump()
        analysed.write("analysis.json", json.dumps(data))
        analysed.publish()
        text = card_of(export(analysed, "saelens", "--prefix", prefix)).text
        assert ("the language model recovers 74.4% of the loss" in text) == ("recovers" in text) == said


def test_base_model_is_named_if_it_is_on_a_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, model={"name": "google/gemma-2-2b", "notice": "Gemma's terms apply."})
    assert main(["--run", run.url, "--format", "saelens", "--output", str(tmp_path / "x")]) == 2
    assert "--model-type" in capsys.readouterr().err  # tests have no hub
    card = card_of(export(run, "gemma-scope-npz", "--model-type", "gemma2"))
    assert card.data.base_model == "google/gemma-2-2b"
    assert card.text.rstrip().endswith("Gemma's terms apply.")


def test_examples_are_readable_with_datasets(analysed: RunDirectory, tmp_path: Path) -> None:
    import datasets

    file = analysed.location("examples.parquet")
    rows = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    truth = np.load(tmp_path / "truth.npz")["activations"]
    truth[:, 0] = 0
    top = rows.filter(lambda row: row["kind"] == "top" and row["feature"] == 5)
    peaks = sorted((w.max() for w in truth[:, :, 5] if w.max() > 0), reverse=True)[:2]
    assert top["activation"][:] == pytest.approx(peaks)
    for row in top:
        assert len(row["context_ids"]) == len(row["context_tokens"]) == len(row["context_activations"])
        assert row["context_tokens"][row["peak_index"]] == row["token"] == f"<{chr(row['token_id'])}>"
        assert row["context_activations"][row["peak_index"]] == row["activation"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--format", "gemma-scope-npz"], "no place for a skip connection"),
    (["--format", "saelens", "--prefix", "17"], "--prefix 17 is not one of the nested dictionaries [16, 48, 64]"),
    (["--format", "neuronpedia"], "never analysed"),
    (["--format", "saelens", "--model-type", "gemma9"], "gemma9 is unknown"),
    (["--format", "saelens", "--model-type", "gpt_neox"], "no other library has a hook"),
])  # fmt: skip
def test_what_a_format_cannot_say_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = make_run(tmp_path, skip=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["--run", run.url, "--output", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_places_and_runs_that_cannot_be_used_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    (tmp_path / "taken").mkdir()
    several = make_run(tmp_path, name="several", model={"layers": [0, 1]})
    RunDirectory(str(tmp_path / "half")).write("config.yaml", "")
    for url, output, message in [
        (run.url, str(tmp_path / "taken"), "exists already"),
        (run.url, "s3://bucket/x", "local directories"),
        (several.url, str(tmp_path / "x"), "several/layer0"),
        (str(tmp_path / "half"), str(tmp_path / "x"), "not finished"),
    ]:
        assert main(["--run", url, "--format", "saelens", "--output", output]) == 2
        assert message in capsys.readouterr().err
    assert list((tmp_path / "taken").iterdir()) == []
    assert not (tmp_path / "x").exists()
