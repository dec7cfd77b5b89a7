"""The analysis job: on a run that was never trained here, again with other settings, with any number of actors."""

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import cluster.held_out
from cluster.graph_scores import measure_graphs
from cluster.reporting import analyse_run
from cluster.resources import Plan
from cluster.room import plan_in_free_room
from jobs import analyze
from mtc.analysis import HeldOutPass
from mtc.analysis.examples import Examples
from mtc.circuits import attribute
from mtc.config import ConfigError, ModelConfig, load_preset, make_config, to_yaml
from mtc.language_model import LanguageModel, pack_windows
from mtc.results import Analysis, Comparison, LayersReport
from mtc.storage import RunDirectory, RunError, open_run
from mtc.text import DataError, TokenStore, heldout_units
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

WORDS = "the people of this union shall have power to lay and collect taxes for peace war trade and general welfare"


def make_run(root: Path, run_id: str, seed: int, text: Path) -> RunDirectory:
    """A published run of weights that came from elsewhere: no history, no analysis."""
    config = load_preset(
        "tiny",
        {
            "data": {"name": str(text), "num_tokens": 2048, "heldout_fraction": 0.4},
            "transcoder": {"calibration_tokens": 256},
            "analysis": {"num_tokens": 3000, "loss_tokens": 400, "coactivation_tokens": 2000},
            "output": {"root": str(root), "run_id": run_id, "token_store": str(root / "tokens")},
        },
    )
    width = LanguageModel(config.model).d_model
    transcoder = MatryoshkaTranscoder(TranscoderShape(width, width, (16, 32, 16), 8, "rms"), seed)
    with torch.no_grad():
        transcoder.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
        transcoder.threshold.fill_(1.2)
    run = RunDirectory(str(root / run_id))
    run.write("config.yaml", to_yaml(config))
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.publish()
    return run


def make_layers_run(root: Path, run_id: str, text: Path) -> RunDirectory:
    """A published run of every layer of a model, with an older analysis of each."""
    one = make_run(root, run_id, 0, text)
    config = make_config(one.config().model_dump(), {"model": {"layers": "all"}}).of_layers(3)
    one.remove()
    run = RunDirectory(one.url)
    run.write("config.yaml", to_yaml(config))
    for seed, (member, own) in enumerate(zip(config.members(), run.members().values(), strict=True)):
        transcoder = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 32, 16), 8, "rms"), seed)
        with torch.no_grad():
            transcoder.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
            transcoder.threshold.fill_(1.0 + 0.2 * seed)
        own.write("config.yaml", to_yaml(member.config))
        own.write("transcoder.safetensors", transcoder.to_bytes())
        own.write("features.parquet", "an older analysis'")
        own.publish(latest=False)
    run.publish()
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(60):
        (directory / f"{i}.txt").write_text(f"Address {i}. " + " ".join(rng.choice(WORDS.split(), 60)))
    return directory


class Here:
    """`map_on_model_actors` with one actor, in this process."""

    def __init__(self, rows: Iterable[pa.Table], actor: Any, plan: Plan, **arguments: Any):
        made = actor(device=plan.device, threads=torch.get_num_threads(), **arguments)
        self.tables = (table for row in rows for table in made(row))

    @classmethod
    def takes_over(cls, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(cluster.held_out, "map_on_model_actors", cls)
        patch.setattr(cluster.held_out, "iterate_tables", lambda here: here.tables)


@pytest.fixture(scope="module")
def analysed(ray_cluster: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunDirectory]:
    """The same weights analysed in this process and by two model actors; other weights analysed again with other
    settings, whose probes and spelling run in Ray's processes."""
    root = tmp_path_factory.mktemp("runs")
    one, two = (make_run(root, name, 0, text) for name in ("one", "two"))
    analyse_run(two.url, {"cluster": {"num_model_actors": 2}})
    optional = {"probe_tasks": ["sotu/spoken"], "spelling": True}
    settings = {"analysis": {"num_tokens": 1000, "loss_tokens": 0, "coactivation_tokens": 0} | optional}
    with pytest.MonkeyPatch.context() as patch:
        Here.takes_over(patch)
        analyse_run(one.url, {"cluster": {"num_model_actors": 1}})
        shutil.copytree(one.url, root / "other")
        other = make_run(root, "other", 1, text)
        before = [other.read(name) for name in ("config.yaml", "transcoder.safetensors")]
        analyse_run(other.url, settings | {"cluster": {"num_model_actors": 1}})
    assert before == [other.read(name) for name in ("config.yaml", "transcoder.safetensors")]
    return [one, two, other]


def test_any_number_of_actors_writes_the_same_files(analysed: list[RunDirectory]) -> None:
    one, two, _ = (open_run(run.url) for run in analysed)  # verifies every digest
    for name in ("examples.parquet", "features.parquet"):
        assert one.read(name) == two.read(name)

    def figures(run: RunDirectory) -> dict[str, Any]:
        found = json.loads(run.read("analysis.json"))
        for field in ("seconds", "analysed", "run_id", "num_model_actors"):
            del found["facts"][field]
        del found["config"]["cluster"], found["config"]["output"]
        return found

    assert figures(one) == figures(two)


class Alive:
    """How much of a kind is alive whenever another one is made."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type):
        self.most, self._alive = 0, weakref.WeakSet[Any]()
        made = kind.__init__  # type: ignore[misc]

        def counted(one: Any, *arguments: Any, **named: Any) -> None:
            gc.collect()
            self.most = max(self.most, len(self._alive) + 1)
            self._alive.add(one)
            made(one, *arguments, **named)

        patch.setattr(kind, "__init__", counted)


def test_of_many_layers_one_at_a_time_is_in_memory_and_none_is_written_before_all_are_there(
    ray_cluster: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in parts, whose passes load the language model up to their deepest layer, and by two actors: the figures are
    the same to the last bit."""
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))  # others of this machine have theirs in the usual place
    names = ("whole", "parts", "actors")
    whole, parts, actors = (make_layers_run(tmp_path, name, text) for name in names)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        Here.takes_over(patch)
        findings, passes = Alive(patch, Examples), Alive(patch, HeldOutPass)
        headline, write = Analysis.headline, RunDirectory.write
        patch.setattr(Analysis, "headline", lambda a: (said.append("analysed"), headline(a))[1])

        def watched(run: RunDirectory, name: str, *arguments: Any) -> None:
            if name not in ("manifest.json", "writer.json", "token_store.json"):
                said.append("written")
                if said.count("written") == 1:
                    assert whole.members()["layer0"].read("features.parquet") == b"an older analysis'"
            write(run, name, *arguments)

        patch.setattr(RunDirectory, "write", watched)
        analyse_run(whole.url, {})
        # A pass of the model actor, which this process is here, beside the one that the driver merges.
        assert (findings.most, passes.most) == (1, 1)
        assert said.index("written") == 3 and "analysed" not in said[3:]
    with pytest.MonkeyPatch.context() as patch:
        Here.takes_over(patch)
        patch.setattr("cluster.reporting.transcoders_at_once", lambda *_: 2)
        deepest: list[int] = []
        load = LanguageModel.__init__

        def loaded(model: LanguageModel, config: ModelConfig, device: Any = "cpu", full: bool = False) -> None:
            deepest.append(99 if full else max(sites.layer for sites in config.sites))
            load(model, config, device, full)

        patch.setattr(LanguageModel, "__init__", loaded)
        analyse_run(parts.url, {})
    assert deepest == [1, 2, 99]
    analyse_run(actors.url, {"cluster": {"num_model_actors": 2}})
    assert not list(spool.iterdir()), "nothing is left behind"
    for other in (parts, actors):
        for layer in range(3):
            ours, theirs = (run.members()[f"layer{layer}"] for run in (whole, other))
            for name in ("examples.parquet", "features.parquet"):
                assert ours.read(name) == theirs.read(name) != b"an older analysis'"
            found, again = (json.loads(run.read("analysis.json")) for run in (ours, theirs))
            for part in ("summary", "evaluation", "tree", "features"):
                assert found[part] == again[part]
        reports = [LayersReport.model_validate_json(run.read("report/layers_report.json")) for run in (whole, other)]
        ours, theirs = (report.graphs for report in reports)
        assert reports[0].model_copy(update={"graphs": theirs}) == reports[1]
        assert ours is not None and theirs is not None, "by another number of processes, so but for the last digits"
        assert [prompt.token_ids for prompt in ours.prompts] == [prompt.token_ids for prompt in theirs.prompts]
        for a, b in zip(ours.prompts, theirs.prompts, strict=True):
            assert [s.model_dump() for s in a.scores] == [pytest.approx(s.model_dump(), rel=1e-4) for s in b.scores]
    graphs = reports[0].graphs
    assert graphs is not None and graphs.prefixes == (16, 48, 64) and len(graphs.prompts) == 4
    store = TokenStore.open(json.loads(whole.members()["layer0"].read("analysis.json"))["facts"]["token_store"])
    heldout = {tuple(ids[:12].tolist()) for ids in store.input_ids(store.window_ids("heldout"))}
    assert {prompt.token_ids for prompt in graphs.prompts} <= heldout, "12 tokens that nothing was trained on"
    first = graphs.prompts[0]
    for prefix, scores in zip(graphs.prefixes, first.scores, strict=True):
        alone = attribute(whole, first.token_ids, prefix=prefix).scores[-1]
        assert alone.model_dump(exclude={"prefix", "folded"}) == pytest.approx(scores.model_dump(), rel=1e-4)
    assert first.text == "".join(attribute(whole, first.token_ids).tokens)

    def broken(*_: Any) -> str:
        raise RuntimeError("the edges do not fit")

    told = list[str]()
    monkeypatch.setattr("cluster.graph_scores.say", lambda event, text: told.append(text))
    monkeypatch.setattr("cluster.graph_scores._score", broken)
    config = whole.config()
    plan = plan_in_free_room(config, 32)
    assert measure_graphs(config, plan, whole, store.url, store.window_ids("heldout")) is None
    (message,) = told
    assert message.startswith("graphs are left out, all else is written: ") and "the edges do not fit" in message
    replaced = reports[0].replaced
    assert replaced is not None and replaced.layers == (0, 1, 2) and replaced.prefixes == (16, 48, 64)
    alone = reports[0].layers[1].summary.loss
    assert alone is not None and replaced.tokens == alone.tokens
    assert replaced.ce_clean == pytest.approx(alone.ce_clean, rel=1e-6), "of the same tokens"
    assert open_run(whole.url)


def test_sums_that_transcoders_of_a_sweep_share_are_there_for_the_last_of_them(
    ray_cluster: Any, text: Path, tmp_path: Path
) -> None:
    """The first and the third have the same affine map, the one between them another."""
    one = make_run(tmp_path, "sweep", 0, text)
    entries = [{"transcoder.input_norm": norm, "transcoder.seed": n} for n, norm in enumerate(("rms", "none", "rms"))]
    config = make_config(one.config().model_dump(), {"sweep": entries})
    one.remove()
    run = RunDirectory(one.url)
    run.write("config.yaml", to_yaml(config))
    for member, own in zip(config.members(), run.members().values(), strict=True):
        settings = member.config.transcoder
        shape = TranscoderShape(32, 32, (16, 32, 16), 8, settings.input_norm or "rms")
        transcoder = MatryoshkaTranscoder(shape, settings.seed)
        with torch.no_grad():
            transcoder.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(settings.seed))
            transcoder.threshold.fill_(1.2)
            transcoder.massive_norm.fill_(1e9)
        own.write("config.yaml", to_yaml(member.config))
        own.write("transcoder.safetensors", transcoder.to_bytes())
        own.publish(latest=False)
    run.publish()
    with pytest.MonkeyPatch.context() as patch:
        Here.takes_over(patch)
        analyse_run(run.url, {})
    lines = [Analysis.model_validate_json(own.read("analysis.json")).summary.line for own in run.members().values()]
    first, between, last = (line.fvu if line else None for line in lines)
    assert first is not None and between is not None
    assert first == last != between
    report = json.loads(run.read("report/sweep_report.json"))
    assert [entry["layer"] for entry in report["members"]] == [1, 1, 1]


def test_every_figure_is_filled(analysed: list[RunDirectory]) -> None:
    analysis = Analysis.model_validate_json(analysed[0].read("analysis.json"))
    found = analysis.evaluation
    assert found.documents > 5
    assert found.loss is not None
    for intervals, values in (
        (found.fvu_interval, found.fvu), (found.loss.recovered_zero_interval, found.loss.recovered_zero),
        (found.loss.kl_interval, found.loss.kl), (found.l0_interval, found.l0),
    ):  # fmt: skip
        assert intervals is not None
        assert all(low <= value <= high for (low, high), value in zip(intervals, values, strict=True))
    assert analysis.tree is not None
    assert analysis.tree.tokens >= 2000
    assert analysis.facts.hardware
    assert analysis.summary.dead_features is None  # nobody counted: the weights came from elsewhere
    assert analysis.facts.versions["torch"] == torch.__version__
    assert analysis.facts.data_fingerprint
    assert analysis.copies is not None
    assert (found.line is not None) and found.line.folds >= 4
    # The weights do not know what is massive: the first unit of the held-out text tells.
    store = TokenStore.open(analysis.facts.token_store)
    first = heldout_units(store, analysis.config, analysis.config.analysis.num_tokens)[0]
    windows = pack_windows(store.input_ids(first), store.info.special_ids)
    (pair,) = LanguageModel(analysis.config.model).capture(windows, windows.trainable.nonzero().squeeze(1))
    norms = np.linalg.norm(pair.target.double().numpy(), axis=1)
    assert found.massive.norm == pytest.approx(5 * np.median(norms), rel=1e-2)
    table = pq.read_table(Path(analysed[0].url, "features.parquet"))
    assert table.num_rows == 64
    assert all(len(row) == 10 for row in table["positive_logits"].to_pylist())
    assert {f.reason for f in analysis.features} == {"strongest", "drawn"}


def test_again_with_other_settings(analysed: list[RunDirectory]) -> None:
    first, _, run = analysed
    before = Analysis.model_validate_json(first.read("analysis.json"))
    after = Analysis.model_validate_json(open_run(run.url).read("analysis.json"))
    assert (before.facts.run_id, after.facts.run_id) == ("one", "other")
    assert after.summary.analysed_tokens < before.summary.analysed_tokens
    assert after.evaluation.loss is None
    assert after.tree is None
    assert after.features[0].figures.positive_logits is None
    assert after.spelling is not None
    assert after.spelling.not_measured  # bytes are no words
    assert after.probing is not None
    (task,) = after.probing.tasks
    assert task.used_texts > 100
    assert task.dense is not None
    assert len(task.sparse) == 3 * len(after.probing.ks)
    page = run.read("report/layer1_analysis_report.md").decode()
    assert f"{task.dense.auc.value:.4g} ({task.dense.auc.low:.4g} to {task.dense.auc.high:.4g})" in page
    assert after.spelling.not_measured in page
    assert after.config.analysis.num_tokens == 1000
    assert "import.json" not in page
    assert not open_run(run.url).exists("writer.json")


def test_what_cannot_be_analysed_is_refused(
    analysed: list[RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"transcoder\.k: the run is trained already"):
        analyse_run(analysed[0].url, {"transcoder": {"k": 3}})
    with pytest.raises(RunError, match="no run at"):
        analyse_run(str(tmp_path / "nowhere"), {})
    for option, value in (("num_tokens", "0"), ("probe_tasks", '["sotu/weather"]')):
        assert analyze.main(["--run", analysed[0].url, f"--analysis.{option}", value]) == 2
    said = capsys.readouterr().err
    assert "analysis.num_tokens" in said
    assert "sotu/weather" in said
    damaged = make_run(tmp_path, "damaged", 0, Path(analysed[0].config().data.name))
    Path(damaged.url, "transcoder.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="transcoder"):
        analyse_run(damaged.url, {})


def test_two_runs_side_by_side(analysed: list[RunDirectory], tmp_path: Path) -> None:
    one, two, other = (run.url for run in analysed)
    assert analyze.main(["--compare", one, two, "--output", str(tmp_path / "same")]) == 0
    same = Comparison.model_validate_json((tmp_path / "same" / "comparison.json").read_bytes())
    pairs = pq.read_table(tmp_path / "same" / "matches.parquet")
    assert pairs["feature_a"].to_pylist() == pairs["feature_b"].to_pylist() == list(range(64))
    assert same.matching.median == pytest.approx(1)
    assert same.matching.same_token == 1
    assert same.differences == ()
    labels = pq.read_table(Path(one, "features.parquet"))["label"].to_pylist()
    assert pairs["label_a"].to_pylist() == pairs["label_b"].to_pylist() == labels
    assert all(m.label_a == m.label_b == labels[m.feature_a] for m in same.matching.nearest)
    assert analyze.main(["--compare", one, other, "--output", str(tmp_path / "other")]) == 0
    text = (tmp_path / "other" / "comparison.md").read_text()
    found = Comparison.model_validate_json((tmp_path / "other" / "comparison.json").read_bytes())
    assert found.matching.median < 0.7
    for side, url in ((found.a, one), (found.b, other)):
        analysis = Analysis.model_validate_json(Path(url, "analysis.json").read_bytes())
        assert side.figures["FVU, 64 features"] == analysis.evaluation.fvu[-1]
        assert f"{analysis.evaluation.fvu[-1]:.4g}" in text
    assert f"{found.matching.median:.4g}" in text


def test_a_run_whose_text_is_gone_is_analysed_with_the_tokens_that_it_was_trained_on(
    analysed: list[RunDirectory], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Here.takes_over(monkeypatch)
    run = analysed[2]
    settings = {"analysis": {"num_tokens": 1000, "loss_tokens": 0, "coactivation_tokens": 0}}
    settings |= {"cluster": {"num_model_actors": 1}}
    before = run.read("examples.parquet")
    url = json.loads(run.read("analysis.json"))["facts"]["token_store"]
    gone = text.rename(text.with_name("elsewhere"))
    try:
        analyse_run(run.url, settings)
        assert run.read("examples.parquet") == before
        Path(url).rename(f"{url}-gone")
        with pytest.raises(DataError, match=rf"{text} is not there on "):
            analyse_run(run.url, settings)
    finally:
        Path(f"{url}-gone").rename(url)
        gone.rename(text)


def test_a_wrong_value_is_told_without_the_imports_of_the_analysis(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write("config.yaml", to_yaml(load_preset("tiny")))
    run.publish()
    code = "import sys; from jobs import analyze; code = analyze.main(sys.argv[1:]); "
    code += "sys.exit(100 if {'torch', 'ray'} & set(sys.modules) else code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--run", run.url, "--analysis.num_tokens=0"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: analysis.num_tokens: at least 1 is wanted, got '0'\n")
