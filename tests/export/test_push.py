"""Runs to a repository of the Hugging Face hub and back by hf://, against a local server with the hub's routes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

from jobs.export import main
from mtc.results import Analysis
from mtc.storage import (
    Notes,
    RunDirectory,
    RunError,
    StorageError,
    check_writable,
    load_analysis,
    open_layer_run,
    open_run,
    read_notes,
    run_status,
    write_atomic,
)
from mtc.transcoder import MatryoshkaTranscoder, load_transcoder
from serve.service import Catalogue
from tests.export_example import analysed_run, make_run
from tests.hub import TOKEN, Hub, local_hub
from tests.report_example import make_evaluation

REPO = "somebody/tiny"
Main = Callable[..., str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Where huggingface_hub, which reads the environment when it is imported, is told to look now."""
    with local_hub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path_factory.mktemp("home") / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def push(capfd: pytest.CaptureFixture[str]) -> Main:
    """Runs jobs/export.py --push and returns what it says; the token is in nothing of it."""

    def run(run: RunDirectory, *options: str, code: int = 0, repo: str = REPO) -> str:
        assert main(["--run", run.url, "--push", repo, *options]) == code
        out, err = capfd.readouterr()
        assert TOKEN not in out + err
        return out if code == 0 else err

    return run


def with_loss(run: RunDirectory) -> Analysis:
    """The run's analysis with a loss recovered and massive tokens."""
    data = json.loads(run.read("analysis.json"))
    measured = make_evaluation([16, 48, 64], massive=True)
    assert measured.loss
    data["summary"] |= {"loss": measured.loss.model_dump(), "dead_fraction": 0.125, "dead_features": 8}
    data["evaluation"] |= {"all_tokens": measured.all_tokens.model_dump(), "massive": measured.massive.model_dump()}
    run.write("analysis.json", json.dumps(data))
    run.publish()
    return load_analysis(run)


def test_a_run_is_pushed_in_one_commit_and_opened_again(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = analysed_run(tmp_path)
    run.write("checkpoints/9/state.pt", b"no part of the run")
    run.write("writer.json", b"{}")
    said = push(run)
    repository = hub.repositories[REPO]
    assert repository.private and "(private)" in said and f"hf://{REPO}" in said
    assert len(repository.commits) == 2  # the empty one that makes a repository, and ours
    files = {name: data for name, data in repository.files.items() if not name.startswith(".")}
    assert sorted(files) == sorted([*run.manifest().files, "README.md", "manifest.json"])
    assert all(data == run.read(name) for name, data in files.items() if name != "README.md")

    again = open_run(f"hf://{REPO}")
    assert (again.run_id, again.config()) == (run.run_id, run.config())
    there, here = load_transcoder(again).state_dict(), load_transcoder(run).state_dict()
    assert there.keys() == here.keys()
    torch.testing.assert_close(there, here, rtol=0, atol=0, equal_nan=True)
    assert load_analysis(again) == load_analysis(run)
    assert run_status(f"hf://{REPO}", watch_seconds=0).state == "finished"


def test_the_card_has_the_figures_of_the_analysis(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = analysed_run(tmp_path)
    analysis = with_loss(run)
    push(run, "--license", "apache-2.0", "--contact", "ask@example.org")
    card = ModelCard(hub.repositories[REPO].files["README.md"].decode())
    data: Any = card.data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "mtc", ["OWNER/texts"])
    assert data.model_name == run.run_id
    found = {(r.metric_type, r.metric_args["features"]): r.metric_value for r in data.eval_results}
    summary, evaluation = analysis.summary, analysis.evaluation
    assert summary.loss
    for i, m in enumerate((16, 48, 64)):
        assert found.pop(("fvu", m)) == evaluation.fvu[i]
        assert found.pop(("l0", m)) == evaluation.l0[i]
        assert found.pop(("fvu_all_tokens", m)) == evaluation.all_tokens.fvu[i]
        assert found.pop(("l0_all_tokens", m)) == evaluation.all_tokens.l0[i]
        assert found.pop(("loss_recovered", m)) == summary.loss.recovered_zero[i]
        assert found.pop(("silent_share", m)) == 1 / m  # feature 7 never fires
    assert found == {("dead_share", 64): 0.125}
    assert all(r.dataset_type == "OWNER/texts" and r.metric_args["layer"] == 1 for r in data.eval_results)
    assert f'open_run("hf://{REPO}")' in card.text and "## Contact\n\nask@example.org\n" in card.text
    assert "```bibtex\n@misc{one,\n" in card.text and "arXiv:2503.17547" in card.text


def test_a_run_of_several_layers_is_pushed_whole(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = make_run(tmp_path, model={"layers": [0, 1]})
    push(run, "--public")
    assert not hub.repositories[REPO].private
    assert set(run.manifest().files) < set(hub.repositories[REPO].files)
    whole = open_run(f"hf://{REPO}")
    assert list(whole.members()) == ["layer0", "layer1"]
    with pytest.raises(RunError, match=f"name one of them: hf://{REPO}/layer0"):
        open_layer_run(f"hf://{REPO}")
    one = open_run(f"hf://{REPO}/layer1")
    assert one.run_id == "one/layer1"
    here = MatryoshkaTranscoder.load(run.members()["layer1"].location("transcoder.safetensors"))
    torch.testing.assert_close(load_transcoder(one).state_dict(), here.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert f'open_run("hf://{REPO}/layer0")  # or layer1' in hub.repositories[REPO].files["README.md"].decode()
    served = Catalogue(f"hf://{REPO}")
    assert list(served.served().layers) == [0, 1] and [e.key.run_id for e in served.entries()] == ["one"]
    assert served.find("one/layer1").key.url == f"hf://{REPO}/layer1"
    with pytest.raises(RunError, match="holds the run 'one' and no 'two'"):
        served.find("two")
    assert not [path for _, path in hub.requests if "latest" in path]


def test_notes_go_along_unless_they_are_left_out(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = make_run(tmp_path, model={"layers": [0, 1]})
    for name, own in run.members().items():
        Notes(own).update(3, lambda old, name=name: old.model_copy(update={"note": f"of {name}", "star": True}))
    assert "notes and stars on 2 features" in push(run)
    assert not [name for name in hub.repositories[REPO].files if name.startswith("notes") or "/notes/" in name]
    there = Notes(open_run(f"hf://{REPO}/layer1"))
    assert there.read()[3].note == "of layer1" and there.read()[3].star and not there.writable
    assert "notes and stars" not in push(run, "--no-notes")
    assert read_notes(open_run(f"hf://{REPO}/layer1")) == {}
    public = "somebody/public"
    assert "without people's notes and stars, which --notes makes public" in push(run, "--public", repo=public)
    assert not [name for name in hub.repositories[public].files if "notes" in name]
    assert "(public), with people's notes and stars on 2 features" in push(run, "--public", "--notes", repo=public)
    assert read_notes(open_run(f"hf://{public}/layer1"))[3].note == "of layer1"
    assert "--notes and --no-notes: saelens has no place for notes" in push(
        run, "--notes", "--format", "saelens", code=2
    )


def test_notes_that_can_not_be_read_stay_in_the_repository(
    hub: Hub, push: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    Notes(run).update(3, lambda old: old.model_copy(update={"note": "mine"}))
    push(run)
    before = hub.repositories[REPO].files["notes.json"]

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mtc.storage.notes._local_files", fail)
    monkeypatch.setattr("mtc.storage.notes.NOTES_PATIENCE", 0)
    assert f"the notes of {run.url} can't be read: OSError" in push(run, code=1)
    assert hub.repositories[REPO].files["notes.json"] == before and len(hub.repositories[REPO].commits) == 2


def test_an_earlier_push_is_replaced_and_kept_as_a_revision(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = analysed_run(tmp_path)
    push(run)
    first = list(hub.repositories[REPO].commits)[-1]
    hub.repositories[REPO].commit(hub.repositories[REPO].files | {"LICENSE": b"mine", "report/old.png": b"stale"})
    run.remove("features.parquet")
    transcoder = load_transcoder(run)
    transcoder.threshold.fill_(0.75)
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.publish()
    push(run)
    assert len(hub.repositories[REPO].commits) == 4
    files = set(hub.repositories[REPO].files)
    assert "LICENSE" in files and not {"features.parquet", "report/old.png"} & files
    assert load_transcoder(open_run(f"hf://{REPO}")).threshold.item() == 0.75
    assert load_transcoder(open_run(f"hf://{REPO}@{first}")).threshold.item() == 0.5


def test_an_export_is_pushed_too(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = analysed_run(tmp_path)
    push(run, "--format", "saelens", "--prefix", "48", "--output", str(tmp_path / "kept"))
    files = hub.repositories[REPO].files
    assert sorted(files) == [".gitattributes", "README.md", "cfg.json", "sae_weights.safetensors"]
    assert all((tmp_path / "kept" / name).read_bytes() == files[name] for name in files if name[0] != ".")
    assert "private: leave --public out" in push(run, "--format", "saelens", "--public", code=2)
    assert "holds SAELens of one, not run of one" in push(run, code=2)
    with pytest.raises(RunError, match=r"no manifest\.json"):
        open_run(f"hf://{REPO}")
    assert len(hub.repositories[REPO].commits) == 2


def test_nothing_is_asked_before_everything_here_is_right(
    hub: Hub, push: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    assert "OWNER/NAME is wanted" in push(run, repo="tiny", code=2)
    assert "without --format the run is pushed as it is" in push(run, "--output", str(tmp_path / "x"), code=2)
    Path(run.location("transcoder.safetensors")).write_bytes(b"damaged")
    assert "transcoder.safetensors has 7 bytes" in push(run, code=2)
    half = RunDirectory(str(tmp_path / "half"))
    half.write("config.yaml", "")
    assert "not finished" in push(half, code=2)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token" in push(make_run(tmp_path, name="two"), code=2)
    assert hub.requests == []


@pytest.mark.parametrize(("answer", "code", "message"), [
    ({("GET", "/api/whoami-v2"): (401, {})}, 2, "the hub answers 401: it does not take the token: set HF_TOKEN"),
    ({("POST", "/commit/"): (403, {"X-Error-Message": "read-only token"})}, 2, "403: the token may not write there"),
    ({("POST", "/repos/create"): (404, {})}, 2, "404: the owner is no user or organisation"),
    ({("POST", "/commit/"): (412, {})}, 2, "412: the repository has changed meanwhile; push again"),
    ({("POST", "/commit/"): (503, {})}, 1, "the Hugging Face hub can't be reached, or fails"),
])  # fmt: skip
def test_what_the_hub_refuses_is_told(
    hub: Hub, push: Main, tmp_path: Path, answer: dict[tuple[str, str], Any], code: int, message: str
) -> None:
    hub.answers |= answer
    assert message in push(make_run(tmp_path), code=code)
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_repositories_of_other_things_are_left_alone(hub: Hub, push: Main, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hub.create(REPO, {"model.safetensors": b"somebody's"})
    assert "holds something that mtc did not push, not run of one" in push(run, code=2)
    assert "403: the token may not write there" in push(run, repo="others/tiny", code=2)
    hub.create("somebody/open", {}, private=False)
    assert "the repository is there and public: give --public" in push(run, repo="somebody/open", code=2)
    push(run, "--public", repo="somebody/open")  # empty, so it may
    assert "the hub refuses the model card" in push(
        run, "--license", "nonsense", "--public", repo="somebody/open", code=2
    )
    assert [len(each.commits) for each in hub.repositories.values()] == [1, 2]


@pytest.mark.parametrize("url", ["hf://somebody", "hf://@main/x"])
def test_addresses_that_are_none_are_refused(hub: Hub, url: str) -> None:
    with pytest.raises(StorageError, match="hf://OWNER/NAME is wanted"):
        open_run(url)
    assert hub.requests == []


def test_what_is_damaged_missing_or_hidden_is_told_at_once(
    hub: Hub, push: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    push(run)
    pushed = hub.repositories[REPO].files
    damaged = bytearray(pushed["transcoder.safetensors"])
    damaged[-1] ^= 1
    hub.repositories[REPO].commit(pushed | {"transcoder.safetensors": bytes(damaged)})
    with pytest.raises(RunError, match=r"transcoder\.safetensors is damaged"):
        open_run(f"hf://{REPO}")
    hub.repositories[REPO].commit({name: data for name, data in pushed.items() if name != "config.yaml"})
    with pytest.raises(RunError, match=r"has no file 'config\.yaml'"):
        open_run(f"hf://{REPO}")
    for url in ("hf://somebody/else", f"hf://{REPO}@nowhere", f"hf://{REPO}/layer9"):
        with pytest.raises(RunError, match="no such repository, revision or folder, or hides it"):
            open_run(url)
    hub.answers = {("GET", "/resolve/"): (403, {"X-Error-Code": "GatedRepo"})}
    with pytest.raises(StorageError, match=r"answers 403 for .*: the repository is gated: accept its terms"):
        open_run(f"hf://{REPO}")
    hub.answers = {}
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    before = len(hub.requests)
    with pytest.raises(StorageError, match=r"answers 401 .* does not take the token") as caught:
        open_run(f"hf://{REPO}")
    assert "hf_expired" not in str(caught.value) and len(hub.requests) == before + 1
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match="or hides it from all without a token"):
        open_run(f"hf://{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="HF_HUB_OFFLINE is set"):
        open_run(f"hf://{REPO}")


def test_nothing_is_written_by_such_an_address(hub: Hub) -> None:
    for write in (lambda: check_writable("output.root=hf://a/b", "hf://a/b"), lambda: write_atomic("hf://a/b/c", b"")):
        with pytest.raises(StorageError, match=r"only read by its address; .* jobs/export\.py --push"):
            write()
    assert hub.requests == []


def test_the_command_as_it_is_started(tmp_path: Path) -> None:
    """The environment alone says where the hub is and who asks."""
    run = make_run(tmp_path)
    code = (
        f"from mtc import load_transcoder, open_run; print(load_transcoder(open_run('hf://{REPO}')).threshold.item())"
    )
    with local_hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "0", "MTC_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        said = ""
        for command in (["-m", "jobs.export", "--run", run.url, "--push", REPO], ["-c", code]):
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            said += done.stdout + done.stderr
        assert hub.repositories[REPO].private
    assert said.endswith("0.5\n") and TOKEN not in said
