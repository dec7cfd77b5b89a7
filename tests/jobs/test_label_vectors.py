"""jobs/label.py --embeddings: vectors of a run's labels, alone and after labelling, and how it ends when they fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_local import make_analysed_run, make_layers_run

from jobs import label as job
from jobs import label_vectors
from mtc.storage import (
    RunDirectory,
    label_digest,
    labels_to_parquet,
    open_run,
    parse_embeddings,
    read_features,
    read_labels,
)
from tests.labels.rules_endpoint import RulesEndpoint

FILE = "embeddings.safetensors"
pytestmark = pytest.mark.usefixtures("logs_as_before")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_analysed_run(tmp_path / "runs" / "one")


@pytest.fixture
def server() -> Iterator[RulesEndpoint]:
    with RulesEndpoint() as server:
        yield server


def options(run: RunDirectory, server: RulesEndpoint, *more: str) -> list[str]:
    asked = ["--run", run.url, "--embeddings", server.url, "--embedding-model", "rules", "--log-format", "json"]
    return [*asked, "--attempts", "1", *more]


def events(text: str) -> dict[str, dict[str, Any]]:
    return {line["event"]: line for line in map(json.loads, text.splitlines())}


def names(run: RunDirectory) -> dict[int, str]:
    labels = read_features(run, ["label"])["label"].to_pylist()
    return {j: label for j, label in enumerate(labels) if label is not None}


def test_labels_of_rules_get_vectors_and_new_labels_new_ones(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = names(run)
    assert job.main(options(run, server, "--dry-run")) == 0
    cost = events(capsys.readouterr().out)["embedding_cost"]
    assert (cost["labels"], cost["requests"]) == (len(set(labels.values())), 1) and not server.asked
    assert not run.exists(FILE)
    assert job.main(options(run, server)) == 0
    assert FILE in open_run(run.url).manifest().files, "and every digest fits"
    found = parse_embeddings(run.read(FILE), run.url)
    assert dict(zip(found.features.tolist(), map(bytes, found.digests), strict=True)) == {
        j: label_digest(label) for j, label in labels.items()
    }  # fmt: skip
    assert events(capsys.readouterr().out)["embedded"]["vectors"] == len(labels)
    asked = len(server.asked)
    assert job.main(options(run, server)) == 0 and len(server.asked) == asked, "nothing is asked twice"
    assert job.main([*options(run, server), "--endpoint", server.url, "--model", "marked-words", "--dry-run"]) == 0
    said = events(capsys.readouterr().out)
    assert said["cost"]["features"] == said["embedding_cost"]["labels"] == 7
    server.embedded.clear()
    assert job.main([*options(run, server), "--endpoint", server.url, "--model", "marked-words"]) == 0
    assert set(server.embedded) == set(names(run).values()) - set(labels.values())
    assert len(server.embedded) == len(set(server.embedded)) > 0
    rows = read_labels(run)
    rows[0] = rows[0].model_copy(update={"label": "another one"})
    run.write("labels.parquet", labels_to_parquet(rows))
    server.embedded.clear()
    assert job.main(options(run, server)) == 0
    assert server.embedded == ["another one"]


def test_all_layers_and_one_of_them(tmp_path: Path, server: RulesEndpoint) -> None:
    whole = make_layers_run(tmp_path / "runs" / "two")
    assert job.main(options(whole, server, "--layer", "2")) == 0
    assert whole.exists(f"layer2/{FILE}") and not whole.exists(f"layer0/{FILE}")
    assert job.main(options(whole, server)) == 0
    assert {f"layer{n}/{FILE}" for n in (0, 2)} <= set(open_run(whole.url).manifest().files)
    assert not any("labelling" in name for name in open_run(whole.url).manifest().files)


def test_what_was_there_when_an_endpoint_failed_is_kept(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtc.labels.embeddings.BATCH", 1)
    monkeypatch.setattr(label_vectors, "PROGRESS_SECONDS", 0)
    count = len(set(names(run).values()))

    def lost(*arguments: Any, **more: Any) -> None:
        if arguments[0] == "progress" and more["done"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(label_vectors, "say", lost)
    assert job.main(options(run, server, "--concurrency", "1")) == 130
    monkeypatch.undo()
    assert not run.exists(FILE) and run.exists(f"labelling/{FILE}")
    open_run(run.url)
    before = len(server.embedded)
    assert job.main(options(run, server)) == 0
    assert before <= 3 and len(server.embedded) == before + count - 2
    assert run.exists(FILE) and not run.exists(f"labelling/{FILE}")
    capsys.readouterr()
    assert job.main(options(run, server, "--embedding-model", "nan")) == 1
    message = events(capsys.readouterr().err)["incomplete"]["message"]
    assert f"labels without a vector: vectors that have no direction {count}" in message
    assert parse_embeddings(run.read(FILE), run.url).model == "rules", "what there was stays"
    open_run(run.url)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--embedding-model", ""], "--embeddings and --embedding-model belong together: give both or neither"),
        (["--endpoint", "http://x/v1"], "--endpoint and --model belong together: give both or neither"),
        (
            ["--embeddings", "", "--embedding-model", ""],
            "nothing to do: --endpoint (or --engine) and --model ask for labels",
        ),
        (["--embeddings", "localhost:80"], "http:// or https:// is wanted"),
        (["--embedding-model", "unknown-model"], "/embeddings answers 404: no <b>unknown-model</b>"),
        (["--max-tokens", "1"], "--max-tokens 1 does not allow for more"),
    ],
)
def test_what_can_not_be_is_said(
    run: RunDirectory, server: RulesEndpoint, capsys: pytest.CaptureFixture[str], change: list[str], words: str
) -> None:
    assert job.main(options(run, server, *change)) == (1 if "--max-tokens" in change else 2)
    assert words in json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert not run.exists(FILE) and not run.exists("writer.json")
    open_run(run.url)
