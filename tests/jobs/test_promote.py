"""jobs/promote.py: what a gate lets through and holds back, with its numbers; back again; the history."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import report_example as example

from jobs import promote
from mtc.config import to_yaml
from mtc.results import Analysis
from mtc.storage import RunDirectory, read_alias

GATE = "fvu: {max: 0.5, max_increase: 0.01}\nloss_recovered: {min: 0.8}\ndead: {max: 0.2}\nl0_error: {max: 0.1}\n"
GOOD = {"fvu": 0.3, "recovered": 0.9, "dead": 0.1, "l0": 4.0}


@cache
def an_analysis() -> Analysis:
    return example.make_analysis(example.make_config())[0]


def make(directory: Path, layers: Sequence[int] = (9,), analysed: bool = True, **figures: Any) -> RunDirectory:
    """A finished run whose analysis has these figures: FVU, share of zero ablation's loss, dead share, L0 (k is 4)."""
    config = example.make_config(model={"layer": layers[0], "layers": [{"layer": layer} for layer in layers]})
    run = RunDirectory(str(directory))
    run.write("config.yaml", to_yaml(config))
    for name, own in config.members():
        member, found = run.members()[name], GOOD | figures | figures.get(name, {})
        member.write("config.yaml", to_yaml(own))
        member.write("transcoder.safetensors", f"weights of {member.run_id}")
        if analysed:
            summary = an_analysis().summary
            loss = summary.loss and summary.loss.model_copy(
                update={"ce_zero": 9.0, "ce_clean": 3.0, "recovered_zero": [0.1, found["recovered"]]}
            )
            update = {
                "fvu": (0.9, found["fvu"]), "dead_fraction": found["dead"], "l0": found["l0"], "k": 4,
                "loss": loss if found["recovered"] is not None else None,
            }  # fmt: skip
            analysis = an_analysis().model_copy(update={"summary": summary.model_copy(update=update)})
            member.write("analysis.json", analysis.model_dump_json())
        if member is not run and len(layers) > 1:
            member.publish(latest=False)
    run.publish(latest=False)
    return run


def named(root: Path) -> str:
    alias = read_alias(str(root), "production")
    return alias.run_id if alias else ""


@pytest.fixture
def gate(tmp_path: Path) -> str:
    (tmp_path / "gate.yaml").write_text(GATE)
    return str(tmp_path / "gate.yaml")


def test_a_gate_and_its_memory(tmp_path: Path, gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fvu in (("a", 0.3), ("b", 0.309), ("c", 0.32), ("d", 0.6)):
        make(tmp_path / "runs" / name, fvu=fvu)
    runs = tmp_path / "runs"
    assert promote.main([str(runs / "a"), "--to", "production", "--gate", gate, "--dry-run"]) == 0
    assert "production would be a, the first" in capsys.readouterr().out and not named(runs)
    assert promote.main([str(runs / "d"), "--to", "production", "--gate", gate]) == 3
    assert not named(runs)
    assert promote.main([str(runs / "a"), "--to", "production", "--gate", gate, "--by", "me"]) == 0
    capsys.readouterr()
    assert promote.main([str(runs / "c"), "--to", "production"]) == 3, "the alias remembers its gate"
    told = capsys.readouterr()
    rows = [line.split() for line in told.out.splitlines()]
    assert rows[0] == ["layer", "figure", "value", "now", "limit"]
    assert ["layer9", "fvu", "0.32", "0.3", "at", "most", "0.5", "holds"] in rows
    broken = ["at", "most", "0.01", "more", "than", "now", "beyond", "the", "limit"]
    assert ["layer9", "fvu", "0.32", "0.3", *broken] in rows
    assert ["layer9", "dead", "0.1", "0.1", "at", "most", "0.2", "holds"] in rows and len(rows) == 6
    assert told.err.strip() == "refused: c does not become production: 1 of 5 limits of the gate do not hold"
    assert named(runs) == "a"
    assert promote.main([str(runs / "b"), "--to", "production"]) == 0 and named(runs) == "b"
    assert promote.main([str(runs / "c"), "--to", "production", "--no-gate", "--note", "why not"]) == 0
    alias = read_alias(str(runs), "production")
    assert alias and alias.gate is None and alias.history[0].by == "me" and alias.history[-1].note == "why not"
    assert alias.history[0].figures["layer9"].model_dump() == {
        "fvu": 0.3, "loss_recovered": 0.9, "dead": 0.1, "l0_error": 0.0,
    }  # fmt: skip
    assert promote.main(["--rollback", "--to", "production", "--root", str(runs)]) == 0 and named(runs) == "b"
    capsys.readouterr()
    assert promote.main(["--list", "--root", str(runs)]) == promote.main(
        ["--list", "--to", "production", "--root", str(runs)]
    ) == 0  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["alias", "run", "since"] and lines[1][:2] == ["production", "b"]
    assert [line[1:4] for line in lines[3:]][-1] == ["rolled", "back", "b"] and len(lines) == 3 + 4


@pytest.mark.parametrize(("figures", "figure"), [
    ({"fvu": 0.51}, "fvu"), ({"recovered": 0.79}, "loss_recovered"), ({"dead": 0.21}, "dead"),
    ({"l0": 4.5}, "l0_error"), ({"l0": 3.5}, "l0_error"),
])  # fmt: skip
def test_each_limit_holds_back(tmp_path: Path, gate: str, figures: dict[str, Any], figure: str, capsys: Any) -> None:
    make(tmp_path / "a", **figures)
    assert promote.main([str(tmp_path / "a"), "--to", "production", "--gate", gate]) == 3
    broken = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "beyond" in line]
    assert broken == [figure] and not named(tmp_path)


def test_every_layer_is_held_to_the_gate_beside_the_present_one(tmp_path: Path, gate: str, capsys: Any) -> None:
    def go(name: str, *options: str) -> list[list[str]]:
        status = promote.main([str(tmp_path / name), "--to", "production", *options])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        broken = [
            line[:2] for line in lines if "beyond" in line or "compare" in line or "no such layer" in " ".join(line)
        ]
        assert (status == 3) is bool(broken)
        return broken

    make(tmp_path / "two", (9, 11), layer11={"fvu": 0.4})
    make(tmp_path / "worse", (9, 11), layer9={"fvu": 0.29}, layer11={"fvu": 0.42})
    make(tmp_path / "one", (9,))
    make(tmp_path / "three", (9, 11, 13), layer11={"fvu": 0.4})
    assert go("two", "--gate", gate) == []
    assert go("worse") == [["layer11", "fvu"]]
    assert go("one") == [["layer11", "fvu"]], "production has it"
    assert go("three") == [["layer13", "fvu"]], "nothing to compare with"
    # What is promoted is gone: the figures of its promotion stand for it.
    RunDirectory(str(tmp_path / "two")).remove()
    assert go("worse") == [["layer11", "fvu"]] and named(tmp_path) == "two"


@pytest.mark.parametrize("what", ["loss", "dead", "nan", "analysis"])
def test_what_was_not_measured_is_refused(tmp_path: Path, gate: str, what: str, capsys: Any) -> None:
    missing: dict[str, Any] = {"loss": {"recovered": None}, "dead": {"dead": None}, "nan": {"fvu": float("nan")},
                               "analysis": {"analysed": False}}  # fmt: skip
    make(tmp_path / "a", **missing[what])
    status = promote.main([str(tmp_path / "a"), "--to", "production", "--gate", gate])
    told = capsys.readouterr()
    if what == "analysis":
        assert status == 2 and "the gate needs an analysis that can be read" in told.err
    else:
        assert status == 3 and "not measured" in told.out
    assert not named(tmp_path)
    assert promote.main([str(tmp_path / "a"), "--to", "production"]) == 0, "without a gate nobody asks"


@pytest.mark.parametrize(("content", "words"), [
    ("fvu: {max: high}", "fvu.max: a number is wanted, got 'high'"),
    ("fvu: {most: 1}", "fvu.most: there is no such field, got '1'"),
    ("fvu: {min: 0.5, max: 0.4}", "fvu: min 0.5 is more than max 0.4"),
    ("fvu: {max_increase: -1}", "fvu.max_increase: at least 0.0 is wanted, got '-1'"),
    ("fvu: {max: .nan}", "fvu.max: a "), ("fvu: {}", "a gate needs one limit at least"), ("[", "no YAML"),
    ("loss: {min: 0.5}", "loss: there is no such field"),
])  # fmt: skip
def test_gates_that_are_none(tmp_path: Path, content: str, words: str, capsys: Any) -> None:
    make(tmp_path / "a")
    (tmp_path / "gate.yaml").write_text(content)
    assert promote.main([str(tmp_path / "a"), "--to", "production", "--gate", str(tmp_path / "gate.yaml")]) == 2
    assert words in capsys.readouterr().err and not named(tmp_path)


def test_a_damaged_run_and_wrong_options(tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "transcoder.safetensors").write_text("weights of b")
    run = str(tmp_path / "a")
    for arguments, words in (
        ([run, "--to", "production"], "transcoder.safetensors is damaged"),
        ([run, "--to", "latest"], "is damaged"), ([run], "--to NAME"),
        ([str(tmp_path / "none"), "--to", "x"], "no run at"),
        ([], "name a RUN to promote, or --rollback, or --list"), ([run, "--list"], "one of them"),
        ([run, "--to", "x", "--root", "y"], "--root belongs to"),
        ([run, "--to", "x", "--gate", "y", "--no-gate"], "one of them"),
        (["--rollback", "--to", "x", "--gate", "y"], "belong to a RUN"),
        (["--rollback", "--to", "x", "--root", str(tmp_path)], "has no alias 'x'"),
        (["--list", "--to", "x", "--root", str(tmp_path)], "has no such alias"),
        (["hf://owner/name", "--to", "production"], "holds one run, and no aliases"),
    ):  # fmt: skip
        assert promote.main(arguments) == 2, arguments
        assert words in capsys.readouterr().err, arguments
    assert not named(tmp_path)
