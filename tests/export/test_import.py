"""Imports against the library that wrote the files, and against formulas in NumPy."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from jobs.export import main
from mtc.export import read_gemma_scope, read_saelens
from mtc.export.importing import ImportFailure
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


@pytest.mark.parametrize(("change", "message"), [
    ({"threshold": None}, "lacks threshold"),
    ({"extra": np.zeros(1)}, "also holds extra"),
    ({"b_enc": np.zeros(F - 1)}, "b_enc has the shape (47,), expected (48,)"),
    ({"W_dec": np.full((F, D), np.nan)}, "W_dec holds values that are not finite"),
    ({"W_dec": np.zeros((F, 8)), "b_dec": np.zeros(8)}, "maps 32 to 8 dimensions"),
    ({"b_dec": np.array([{}] * D)}, "not a readable npz file"),
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
    for cfg in ("[]", '{"architecture": "jumprelu_transcoder", "metadata": [1]}', "{"):
        (tmp_path / "cfg.json").write_text(cfg)
        with pytest.raises(ImportFailure, match="is not a readable SAELens folder"):
            read_saelens(str(tmp_path))


@pytest.mark.parametrize("read", [read_gemma_scope, read_saelens])
def test_a_url_is_refused_as_it_was_given(read: Any) -> None:
    with pytest.raises(ImportFailure, match="--import s3://bucket/layer_5: imports are read from local directories"):
        read("s3://bucket/layer_5")
