"""Imports against the library that wrote the files, and against formulas in NumPy."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from jobs.export import main
from mtc.export import read_gemma_scope, read_gemma_scope_2, read_saelens
from mtc.export.import_metadata import ARCHITECTURES, FREE, ONLY, ImportFailure
from mtc.language_model import LanguageModel, pack_windows
from mtc.storage import RunDirectory, open_layer_run
from mtc.transcoder import load_transcoder

D, F = 32, 48  # d_model of the tiny preset
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sources() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, D, generator=generator)
    x[:, 5] *= 9
    return x


def parameters(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights in the layout of Gemma Scope, thresholds of their own."""
    random = np.random.default_rng(seed)
    values = {
        "W_enc": random.normal(size=(D, F)) / D**0.5,
        "b_enc": random.normal(size=F) * 0.3,
        "W_dec": random.normal(size=(F, D)) * 0.2,
        "b_dec": random.normal(size=D),
        "threshold": random.uniform(0.1, 1, size=F),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def save_saelens(directory: Path, architecture: str, hook: str | None, norm: str = "none", **metadata: Any) -> Any:
    """A transcoder with random weights, saved by SAELens itself."""
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    names = {"hook_name": hook, "hook_name_out": "blocks.1.hook_mlp_out" if hook else None} | metadata
    cfg = {"architecture": architecture, "d_in": D, "d_sae": F, "normalize_activations": norm}
    if "transcoder" in architecture:
        cfg |= {"d_out": D, "apply_b_dec_to_input": False}
    if architecture == "topk":
        cfg["k"] = 4
    sae = SAE.from_dict(cfg | {"metadata": {n: v for n, v in names.items() if v is not None}})
    sae.cfg.metadata = SAEMetadata(**sae.cfg.metadata.to_dict())
    weights = {n: torch.from_numpy(v) for n, v in parameters().items()}
    weights["W_skip"] = torch.randn(D, D, generator=torch.Generator().manual_seed(1)) * 0.1
    sae.load_state_dict({n: weights[n] for n in sae.state_dict()})
    sae.save_model(directory)
    return sae


def run_import(path: Path, format: str, root: Path, *options: str, run_id: str = "got") -> int:
    places = ["--output.root", str(root), "--output.run_id", run_id]
    return main(["--import", str(path), "--from", format, "--preset", "tiny", *places, *options])


@pytest.mark.parametrize(("architecture", "hook", "norm", "site", "input_norm"), [
    ("jumprelu_transcoder", "hook_resid_mid", "none", "resid_mid", "none"),
    ("jumprelu_transcoder", "hook_resid_mid", "constant_norm_rescale", "resid_mid", "rms"),
    ("jumprelu_skip_transcoder", "ln2.hook_normalized", "none", "resid_mid", "rms"),
    ("transcoder", "mlp.hook_in", "none", "mlp_in", "none"),
    ("skip_transcoder", "mlp.hook_in", "none", "mlp_in", "none"),
])  # fmt: skip
def test_what_saelens_saved_is_the_same_function(
    tmp_path: Path, architecture: str, hook: str, norm: str, site: str, input_norm: str
) -> None:
    sae = save_saelens(tmp_path / "theirs", architecture, f"blocks.1.{hook}", norm)
    assert run_import(tmp_path / "theirs", "saelens", tmp_path / "runs", "--transcoder.k", "9") == 0
    run = open_layer_run(str(tmp_path / "runs" / "latest"))
    config = run.config()
    assert (config.model.layer, config.model.source, config.input_norm) == (1, site, input_norm)
    assert (config.transcoder.group_sizes, config.transcoder.k) == ((F,), 9)
    assert config.transcoder.skip == ("skip" in architecture)
    transcoder, x = load_transcoder(run), sources()
    fed = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() if "normalized" in hook else x
    with torch.no_grad():
        torch.testing.assert_close(transcoder.encode(x), sae.encode(fed), **CLOSE)
        torch.testing.assert_close(transcoder.reconstruct(x), sae(fed), **CLOSE)
        assert 0.1 < (sae.encode(fed) > 0).float().mean() < 0.7


def test_gemma_scope_npz_is_the_formula_and_can_be_served(tmp_path: Path) -> None:
    from serve.contract import Options
    from serve.service import RunEncoder, Tokeniser

    folder, p = tmp_path / "layer_1" / "width_48" / "average_l0_21", parameters()
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **p)
    assert run_import(folder, "gemma-scope-npz", tmp_path, "--model.dtype", "float32") == 0
    run = open_layer_run(str(tmp_path / "got"))
    config = run.config()
    assert (config.model.layer, config.model.source, config.input_norm) == (1, "resid_mid", "rms")
    assert (config.transcoder.k, config.transcoder.prefixes) == (21, (F,))
    assert json.loads(run.read("import.json"))["format"] == "gemma-scope-npz"

    def formula(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        z = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) @ p["W_enc"].astype(np.float64) + p["b_enc"]
        assert np.abs(z - p["threshold"]).min() > 1e-6
        return np.where(z > p["threshold"], z, 0)

    transcoder, x = load_transcoder(run), sources()
    expected = formula(x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(transcoder.encode(x), expected, **CLOSE)
        np.testing.assert_allclose(transcoder.reconstruct(x), expected @ p["W_dec"] + p["b_dec"], **CLOSE)

    ids = Tokeniser(config.model).text("We the people").ids
    (pair,) = LanguageModel(config.model).capture(pack_windows([ids], []))
    (found,) = RunEncoder(run).encode_batch([ids], [Options()])
    for token, row in list(enumerate(formula(pair.source.numpy())))[1:]:
        entries = slice(found.indptr[token], found.indptr[token + 1])
        got = dict(zip(found.indices[entries].tolist(), found.values[entries].tolist(), strict=True))
        assert got == pytest.approx({j: v for j, v in enumerate(row) if v}, rel=1e-4, abs=1e-5)


POINT_IN, POINT_OUT = (f"model.layers.1.{name}_feedforward_layernorm.output" for name in ("pre", "post"))


def save_gemma_scope_2(folder: Path, affine: bool = False, drop: str = "", **cfg: Any) -> dict[str, np.ndarray]:
    """A folder with the names, shapes and fields of google/gemma-scope-2-270m-pt/transcoder/layer_1_width_..."""
    folder.mkdir(parents=True)
    p = {name.lower(): value for name, value in parameters().items()}
    if affine:
        p["affine_skip_connection"] = np.random.default_rng(1).normal(size=(D, D)).astype(np.float32) * 0.1
    usual = {
        "hf_hook_point_in": POINT_IN, "hf_hook_point_out": POINT_OUT, "width": F, "model_name": "gemma-v3-270m-pt",
        "architecture": "jump_relu", "l0": 7, "affine_connection": affine, "type": "transcoder",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(usual | cfg))
    kept = {name: torch.from_numpy(value) for name, value in p.items() if name != drop}
    (folder / "params.safetensors").write_bytes(save(kept))
    return p


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_is_the_formula_and_what_circuit_tracer_reads(tmp_path: Path, affine: bool) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_2_transcoder, load_relu_transcoder

    p = save_gemma_scope_2(tmp_path / "theirs", affine)
    assert run_import(tmp_path / "theirs", "gemma-scope-2", tmp_path / "runs", "--model.name", "random:gemma3") == 0
    run = open_layer_run(str(tmp_path / "runs" / "latest"))
    config, transcoder, x = run.config(), load_transcoder(run), sources()
    assert (config.model.layer, config.model.source, config.input_norm) == (1, "mlp_in", "none")
    assert (config.transcoder.activation, config.transcoder.k, config.transcoder.skip) == ("jumprelu", 7, affine)
    exact = x.numpy().astype(np.float64)
    z = exact @ p["w_enc"] + p["b_enc"]
    features = np.where(z > p["threshold"], z, 0)
    y = features @ p["w_dec"] + p["b_dec"] + (exact @ p["affine_skip_connection"] if affine else 0)
    theirs = load_gemma_scope_2_transcoder(str(tmp_path / "theirs" / "params.safetensors"), 1, torch.device("cpu"))
    assert main(["--run", run.url, "--format", "circuit-tracer", "--output", str(tmp_path / "back")]) == 0
    lazy = {"device": torch.device("cpu"), "lazy_encoder": False, "lazy_decoder": False}
    back = load_relu_transcoder(str(tmp_path / "back" / "layer_1.safetensors"), 1, **lazy)
    with torch.no_grad():
        for found in (transcoder.encode(x), theirs.encode(x), back.encode(x)):
            np.testing.assert_allclose(found, features, **CLOSE)
        for found in (transcoder.reconstruct(x), theirs(x), back(x)):
            np.testing.assert_allclose(found, y, **CLOSE)


@pytest.mark.parametrize(("change", "options", "message"), [
    ({"type": "sae"}, [], "type='sae' can't be used, only transcoder"),
    ({"type": "clt"}, [], "type='clt' can't be used, only transcoder"),
    ({"architecture": "topk"}, [], "architecture='topk' can't be used, only jump_relu"),
    ({"hf_hook_point_out": None}, [], "hf_hook_point_out is missing"),
    ({"hf_hook_point_out": "model.layers.2.post_feedforward_layernorm.output"}, [], "are of several layers"),
    ({"hf_hook_point_in": "model.layers.1.output"}, [], "is not where"),
    ({"affine_connection": True}, [], "lacks affine_skip_connection"),
    ({"affine": True, "affine_connection": False}, [], "also holds affine_skip_connection"),
    ({"affine_connection": "yes"}, [], "affine_connection='yes' is neither true nor false"),
    ({"width": 9}, [], "width=9, but the tensors have 48"),
    ({"l0": 0}, [], "l0=0 is no number of features"),
    ({"scale": 2}, [], "scale=2 can't be used: nobody knows it"),
    ({"drop": "threshold"}, [], "lacks threshold"),
    ({}, ["--transcoder.activation", "topk"], "transcoder.activation=topk can't be that of an import"),
])  # fmt: skip
def test_a_gemma_scope_2_folder_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], options: list[str], message: str
) -> None:
    save_gemma_scope_2(tmp_path / "theirs", **change)
    assert run_import(tmp_path / "theirs", "gemma-scope-2", tmp_path / "runs", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_export_comes_back_with_its_groups(tmp_path: Path) -> None:
    from test_export import GROUPS, export, make_run

    run = make_run(tmp_path, "scalar", skip=True)
    assert run_import(export(run, "saelens"), "saelens", tmp_path) == 0
    cfg = json.loads((export(RunDirectory(str(tmp_path / "got")), "saelens") / "cfg.json").read_text())
    assert cfg["metadata"]["dataset_path"] is None  # the preset's text is not what it was trained on
    again, transcoder = load_transcoder(RunDirectory(str(tmp_path / "got"))), load_transcoder(run)
    assert again.shape.group_sizes == GROUPS
    assert again.shape.k == transcoder.shape.k
    assert again.threshold.dim() == 0  # they are all equal
    with torch.no_grad():
        torch.testing.assert_close(again.reconstruct(sources(), 16), transcoder.reconstruct(sources(), 16), **CLOSE)


@pytest.mark.parametrize(("source", "norm"), [
    ("mlp_in", "scalar"), ("mlp_in", "none"), ("resid_mid", "scalar"), ("resid_mid", "none"), ("resid_mid", "rms"),
])  # fmt: skip
@pytest.mark.parametrize("format", ["saelens", "gemma-scope-npz"])
def test_an_export_comes_back_as_the_same_function_of_the_same_site(
    tmp_path: Path, format: str, source: str, norm: str
) -> None:
    from test_export import export, make_run

    run = make_run(tmp_path, norm, model={"source": source, "layer": 2})
    assert run_import(export(run, format, "--prefix", "16"), format, tmp_path) == 0
    got = RunDirectory(str(tmp_path / "got"))
    config = got.config()
    assert (config.model.layer, config.model.source, config.input_norm == "rms") == (2, source, norm == "rms")
    assert (config.transcoder.group_sizes, config.transcoder.k) == ((16,), 8)
    with torch.no_grad():
        expected = load_transcoder(run).reconstruct(sources(), 16)
        torch.testing.assert_close(load_transcoder(got).reconstruct(sources()), expected, **CLOSE)


def test_groups_of_saelens_matryoshka_training_are_kept(tmp_path: Path) -> None:
    details = {"training_architecture_details": {"matryoshka_widths": [8, 20], "k": 5}}
    save_saelens(tmp_path / "theirs", "jumprelu_transcoder", "blocks.1.hook_resid_mid", **details)
    assert run_import(tmp_path / "theirs", "saelens", tmp_path) == 0
    settings = RunDirectory(str(tmp_path / "got")).config().transcoder
    assert (settings.prefixes, settings.k) == ((8, 20, F), 5)


def test_the_user_says_what_the_files_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_saelens(tmp_path / "theirs", "jumprelu_transcoder", None)
    assert run_import(tmp_path / "theirs", "saelens", tmp_path) == 2
    assert "transcoder.input_norm=None" in capsys.readouterr().err
    options = ["--model.source", "mlp_in", "--transcoder.input_norm", "none"]
    assert run_import(tmp_path / "theirs", "saelens", tmp_path, *options) == 0
    config = RunDirectory(str(tmp_path / "got")).config()
    assert (config.model.source, config.input_norm) == ("mlp_in", "none")
    assert run_import(tmp_path / "theirs", "saelens", tmp_path, *options) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "options", "message"), [
    ({"architecture": "standard"}, [], "architecture='standard' can't be used, it is no transcoder"),
    ({"architecture": "topk"}, [], "architecture='topk' can't be used, it has no threshold"),
    ({"hook": "blocks.1.hook_mlp_out"}, [], "both 'blocks.1.hook_mlp_out': this is no transcoder"),
    ({"hook_name_out": "blocks.1.hook_resid_post"}, [], "is not the MLP's output"),
    ({"norm": "layer_norm"}, [], "normalize_activations='layer_norm' can't be used"),
    ({"architecture": "skip_transcoder", "norm": "constant_norm_rescale"}, [], "reads what is not normalised"),
    ({}, ["--model.layer", "0"], "model.layer=0, but the files say 1"),
    ({}, ["--transcoder.group_sizes", "[16, 16]"], "sum to 32, but the dictionary has 48 features"),
    ({}, ["--transcoder.k", "49"], "transcoder.k=49 is larger than the dictionary"),
    ({}, ["--transcoder.input_norm", "scalar"], "input_norm=scalar can't be that of an import"),
    ({"hook": "blocks.1.ln2.hook_normalized"}, ["--model.name", "random:gpt2"], "subtracts the mean first"),
    ({}, ["--model.name", "random:unknown"], "unknown"),
])  # fmt: skip
def test_what_is_no_usable_transcoder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], options: list[str], message: str
) -> None:
    usual = {"architecture": "jumprelu_transcoder", "hook": "blocks.1.hook_resid_mid"}
    save_saelens(tmp_path / "theirs", **usual | change)
    assert run_import(tmp_path / "theirs", "saelens", tmp_path / "runs", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


OUT = "blocks.1.hook_mlp_out"
PRE, POST = "model.layers.1.post_attention_layernorm.input", "model.layers.1.post_attention_layernorm.output"


@pytest.mark.parametrize(("cfg", "metadata", "message"), [
    ({}, {"hook_name_out": "blocks.2.hook_mlp_out"}, "hook_name_out='blocks.2.hook_mlp_out' are of several layers"),
    ({}, {"hf_hook_name_out": "model.layers.2.mlp.output"}, "are of several layers"),
    ({}, {"hf_hook_name": "model.layers.0.post_attention_layernorm.input"}, "are of several layers"),
    ({}, {"hook_layer": 4}, "hook_layer=4 are of several layers"),
    ({}, {"hf_hook_name_out": "model.layers.1.self_attn.output"}, "is not the MLP's output"),
    ({}, {"hf_hook_name": POST}, f"hf_hook_name='{POST}' is not where hook_name='blocks.1.hook_resid_mid' is"),
    ({}, {"hf_hook_name": "model.layers.1"}, "hf_hook_name='model.layers.1' is not where"),
    ({}, {"hook_name": "blocks.1.hook_resid_pre"}, "hook_name='blocks.1.hook_resid_pre' can't be read from"),
    ({}, {"hook_name": 5}, "hook_name=5 is no name"),
    ({}, {"hook_head_index": 3}, "hook_head_index=3 can't be used, only null"),
    ({}, {"hook_head_index_out": 0}, "hook_head_index_out=0 can't be used, only null"),
    ({}, {"model_from_pretrained_kwargs": {"fold_ln": True}}, "model_from_pretrained_kwargs has fold_ln=True"),
    ({}, {"model_from_pretrained_kwargs": [1]}, "metadata.model_from_pretrained_kwargs=[1] is no mapping"),
    ({}, {"training_architecture_details": {"k": -1}}, "k=-1 is no number of the 48 features"),
    ({}, {"training_architecture_details": {"matryoshka_widths": [20, 8]}}, "matryoshka_widths=[20, 8] do not rise"),
    ({}, {"training_architecture_details": {"matryoshka_widths": "abc"}}, "matryoshka_widths='abc' do not rise"),
    ({}, {"mtc": {"group_sizes": [8, "x"]}}, "group_sizes=[8, 'x'] are no numbers of features"),
    ({"metadata": [1]}, {}, "metadata is no mapping"),
    ({"apply_b_dec_to_input": True}, {}, "apply_b_dec_to_input=True can't be used, only false"),
    ({"reshape_activations": "hook_z"}, {}, "reshape_activations='hook_z' can't be used, only none"),
    ({"normalize_activations": "expected_average_only_in"}, {}, "only none or constant_norm_rescale"),
    ({"activation_fn": "tanh-relu"}, {}, "activation_fn='tanh-relu' can't be used, only relu"),
    ({"finetuning_scaling_factor": True}, {}, "finetuning_scaling_factor=True can't be used"),
    ({"rescale_acts_by_decoder_norm": True}, {}, "rescale_acts_by_decoder_norm=True can't be used"),
    ({"shrink_by": 0.5}, {}, "shrink_by=0.5 can't be used: nobody knows it"),
    ({"hook_name": "blocks.1.hook_resid_mid"}, {}, "SAELens 6 keeps it in metadata"),
    ({"d_in": 64}, {}, "d_in=64, but the tensors have 32"),
    ({"d_out": 64}, {}, "d_out=64, but the tensors have 32"),
    ({"d_sae": 32}, {}, "d_sae=32, but the tensors have 48"),
])  # fmt: skip
def test_every_field_of_a_saelens_folder_is_obeyed_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cfg: dict[str, Any], metadata: dict[str, Any], message: str
) -> None:
    save_saelens(tmp_path / "theirs", "jumprelu_transcoder", "blocks.1.hook_resid_mid")
    file = tmp_path / "theirs" / "cfg.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"metadata": saved["metadata"] | metadata} | cfg))
    assert run_import(tmp_path / "theirs", "saelens", tmp_path / "runs") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_saelens_says_of_the_use_is_taken(tmp_path: Path) -> None:
    names = {
        "hook_name_out": OUT, "hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output",
        "hf_hook_name_out": "model.layers.1.post_feedforward_layernorm.output", "hook_head_index": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": False, "dtype": "float32", "revision": "step100"},
        "prepend_bos": True, "context_size": 1024, "seqpos_slice": [None], "neuronpedia_id": "gemma-2-2b/1",
    }  # fmt: skip
    save_saelens(tmp_path / "theirs", "jumprelu_transcoder", "blocks.1.hook_mlp_in", model_name="gemma-2-2b", **names)
    known = read_saelens(str(tmp_path / "theirs")).known
    assert known["model"] == {"layer": 1, "source": "mlp_in", "revision": "step100"}
    assert known["transcoder"]["input_norm"] == "none"


def test_every_field_that_saelens_declares_is_listed() -> None:
    """A new version of SAELens with a new field fails here, before it is taken for what it does not say."""
    from sae_lens.saes import transcoder

    for kind in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        config = getattr(transcoder, f"{kind}Config")
        assert config.architecture() in ARCHITECTURES
        assert {field.name for field in dataclasses.fields(config)} <= FREE | ONLY.keys()


@pytest.mark.parametrize(("change", "message"), [
    ({"threshold": None}, "lacks threshold"),
    ({"extra": np.zeros(1)}, "also holds extra"),
    ({"b_enc": np.float32(1)}, "b_enc has the shape (), expected (48,)"),
    ({"b_enc": np.zeros(F - 1)}, "b_enc has the shape (47,), expected (48,)"),
    ({"W_dec": np.full((F, D), np.nan)}, "W_dec holds values that are not finite"),
    ({"W_dec": np.zeros((F, 8)), "b_dec": np.zeros(8)}, "maps 32 to 8 dimensions"),
    ({"b_dec": np.array([{}] * D)}, "not a readable npz file"),
    ({"W_enc": np.ones((D, F), np.int64)}, "W_enc holds torch.int64, no floating-point numbers"),
    ({"W_dec": np.full((F, D), 1e300)}, "W_dec holds values that are not finite"),
])  # fmt: skip
def test_damaged_npz_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    arrays = {name: value for name, value in (parameters() | change).items() if value is not None}
    np.savez(tmp_path / "params.npz", **arrays)
    assert run_import(tmp_path, "gemma-scope-npz", tmp_path / "runs") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_files_that_are_no_files_of_that_kind_are_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez(whole, W_enc=np.ones((4, 8), np.float32))
    single = io.BytesIO()
    np.save(single, np.ones(3))
    words = io.BytesIO()
    np.savez(words, W_enc=np.array(["a", "b"]))
    for content in (b"", whole.getvalue()[:-30], single.getvalue(), words.getvalue()):
        (tmp_path / "params.npz").write_bytes(content)
        with pytest.raises(ImportFailure, match="is not a readable npz file"):
            read_gemma_scope(str(tmp_path))
    (tmp_path / "sae_weights.safetensors").write_bytes(save({"W_enc": torch.ones(2, 3)}))
    for cfg in ("[]", "{", "\xff"):
        (tmp_path / "cfg.json").write_text(cfg)
        with pytest.raises(ImportFailure, match="is not a readable SAELens folder"):
            read_saelens(str(tmp_path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_that_is_damaged_anywhere_is_refused_or_read_as_it_was(tmp_path: Path, save: Any) -> None:
    file, generator = tmp_path / "params.npz", np.random.default_rng(0)
    save(file, **parameters())
    whole = file.read_bytes()
    expected = read_gemma_scope(str(file))

    def outcome(content: bytes) -> str | None:
        """The one-line error that refuses a file; None if it was read, as it was."""
        file.write_bytes(content)
        try:
            found = read_gemma_scope(str(file))
        except ImportFailure as error:
            return str(error)
        assert torch.equal(found.W_enc, expected.W_enc)  # damaged where nothing is read, such as a file's date
        assert torch.equal(found.W_dec, expected.W_dec)
        return None

    cut = [whole[:length] for length in range(0, len(whole) - 1, len(whole) // 40)]
    messages = [outcome(part) for part in cut]
    assert None not in messages
    heads = [whole.find(b"PK\x01\x02"), *([whole.find(b"NUMPY")] if save is np.savez else [])]
    places = [
        place for head in heads for place in range(head, head + 120)
    ]  # the archive's directory, an array's header
    for place in [*places, *generator.integers(0, len(whole), 150)]:
        flipped = bytes([whole[place] ^ int(generator.integers(1, 256))])
        messages.append(outcome(whole[:place] + flipped + whole[place + 1 :]))
    assert all(str(file) in message and "\n" not in message for message in messages if message is not None)


def test_a_pickle_in_an_npz_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "params.npz", **parameters() | {"b_dec": np.array([Trap()] * D, dtype=object)})
    with pytest.raises(ImportFailure, match="is not a readable npz file"):
        read_gemma_scope(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["gemma-scope-2b-pt-res", "models--google--gemma-scope-9b-it-res", "gemma-scope-2b-pt-mlp"]
)
def test_gemma_scopes_autoencoders_are_not_taken_for_transcoders(tmp_path: Path, name: str) -> None:
    for repository in (name, "gemma-scope-2b-pt-transcoders"):
        folder = tmp_path / repository / "layer_5" / "width_16k" / "average_l0_9"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **parameters())
    with pytest.raises(ImportFailure, match=f"{name.rpartition('--')[2]} holds autoencoders"):
        read_gemma_scope(str(tmp_path / name / "layer_5" / "width_16k" / "average_l0_9"))
    assert read_gemma_scope(str(folder)).known["model"]["layer"] == 5


@pytest.mark.parametrize("read", [read_gemma_scope, read_gemma_scope_2, read_saelens])
def test_a_url_is_refused_as_it_was_given(read: Any) -> None:
    with pytest.raises(ImportFailure, match="--import s3://bucket/layer_5: imports are read from local directories"):
        read("s3://bucket/layer_5")
