"""docs/tutorial.ipynb: its cells in order on a tiny model, and what it makes against the single parts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtc import load_preset, train_in_memory
from mtc.analysis.recompute import evaluate
from mtc.config import ConfigError
from mtc.language_model import load_tokenizer, pack_windows
from mtc.storage import load_analysis, open_run
from mtc.text import DataError, read_windows, special_ids
from mtc.transcoder import load_transcoder

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"
PARAMETERS = 'PRESET, SETTINGS = "tiny", {"analysis": {"num_tokens": 2000, "max_per_feature": 5}}\n'


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the run lies, and the notebook's names when all cells are done."""
    root = tmp_path_factory.mktemp("tutorial")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells()):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            source = f"{PARAMETERS}RUN, EXPORTED = {str(root / 'run')!r}, {str(root / 'exported')!r}\n"
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    return root, names


def test_the_notebook_makes_a_run_and_an_export(made: tuple[Path, dict[str, Any]]) -> None:
    root, names = made
    run = open_run(str(root / "run"))
    assert (run.run_id, run.config()) == ("run", names["config"])
    assert load_analysis(run) == names["analysis"]
    assert sorted(file.name for file in (root / "exported").iterdir()) == [
        "README.md", "cfg.json", "sae_weights.safetensors",
    ]  # fmt: skip
    for name in ("examples.parquet", "features.parquet", "report/layer1_analysis_report.html"):
        assert run.exists(name)


def test_the_figures_are_those_of_the_command_that_recomputes_them(made: tuple[Path, dict[str, Any]]) -> None:
    root, names = made
    config, tokenizer = names["config"], names["tokenizer"]
    special = special_ids(tokenizer)
    ids = [np.asarray(window.input_ids, np.int32) for window in names["windows"]["heldout"]]
    tokens = np.cumsum([len(each) - sum(np.isin(each, special)) for each in ids])
    chosen = ids[: int(np.searchsorted(tokens, config.analysis.num_tokens)) + 1]
    found = names["analysis"].evaluation
    again = evaluate(config, load_transcoder(open_run(str(root / "run"))), [pack_windows(chosen, special)], [])
    assert found.tokens == again.tokens == tokens[len(chosen) - 1]
    assert found.fvu == pytest.approx(again.fvu, rel=1e-5) and found.l0 == pytest.approx(again.l0)
    assert 0 < found.fvu[-1] < found.fvu[0] < 1 and found.loss and len(found.loss.kl) == 3
    trained, held_out = ({window.document_id for window in names["windows"][split]} for split in ("train", "heldout"))
    assert trained and held_out and not trained & held_out


def test_every_token_is_trained_as_often_and_the_threshold_is_of_fresh_ones() -> None:
    config = load_preset("tiny", {"data": {"num_tokens": 1024, "replays": 3}, "optimizer": {"batch_tokens": 256}})
    generator = torch.Generator().manual_seed(0)
    tokens = 1024 + config.fresh_tokens
    source = torch.randn(tokens, 32, generator=generator)
    target = torch.relu(source @ torch.randn(32, 32, generator=generator))
    seen = []
    trainer = train_in_memory(config, source, target, look=lambda row: seen.append(row.step), every=5)
    assert seen == [1, 5, 10, 12] and trainer.tokens == 3 * 1024
    active = trainer.transcoder.encode(source[1024:]) > 0
    usual = ~trainer.transcoder.massive(target[1024:])
    assert float(active[usual].sum(1).float().mean()) == pytest.approx(config.transcoder.k, abs=1e-3)
    with pytest.raises(ConfigError, match=f"need {tokens} tokens, not {tokens - 1}"):
        train_in_memory(config, source[1:], target[1:])


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a short text " * 40)
    for data, message in (
        ({"num_tokens": 8192}, "the text is too short|has [0-9]+: lower data.num_tokens"),
        ({"num_tokens": 256, "heldout_fraction": 1e-9}, "has no held-out windows"),
    ):
        settings = {"data": {"name": str(tmp_path), **data}, "transcoder": {"calibration_tokens": 16}}
        config = load_preset("tiny", settings | {"optimizer": {"batch_tokens": 64, "warmup_steps": 1}})
        with pytest.raises(DataError, match=message):
            read_windows(config, load_tokenizer(config.model))


def test_outputs_are_kept_of_all_cells_or_of_none() -> None:
    printed = ["print(" in "".join(cell["source"]) for cell in cells()]
    assert [bool(cell["outputs"]) for cell in cells()] == printed
    assert "error" not in {output["output_type"] for cell in cells() for output in cell["outputs"]}
