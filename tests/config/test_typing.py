"""What people type: files in other encodings, YAML's words, numbers out of all bounds, names that are nearly right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from jobs.command_line import parse_command_line
from mtc.config import ConfigError, RunConfig, load_preset, make_config, to_yaml

TINY = to_yaml(load_preset("tiny"))
BASE = load_preset("tiny").model_dump()
ZERO = {
    "analysis.coactivation_tokens", "analysis.graph_prompts", "analysis.loss_tokens", "analysis.min_activation",
    "analysis.num_random_features",
    "analysis.random_contexts",
    "analysis.samples_per_feature", "cluster.max_failures", "cluster.metrics_port", "cluster.room_seconds",
    "data.max_skipped_share", "data.seed", "data.shuffle_buffer_tokens", "model.layer", "optimizer.betas",
    "optimizer.decay_fraction",
    "optimizer.final_lr_fraction", "optimizer.warmup_steps", "transcoder.aux_coefficient", "transcoder.l0_coefficient",
    "transcoder.prefix_weights", "transcoder.seed",
}  # fmt: skip
"""Numbers of which 0 means something."""
LISTS = {
    "optimizer.betas": lambda value: [value, 0.9],
    "transcoder.group_sizes": lambda value: [16, value],
    "transcoder.prefix_weights": lambda value: [1.0, value, 1.0],
}


def read(path: Path, *options: str) -> RunConfig:
    return parse_command_line(["--config", str(path), *options], "")[0]


def numbers(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, type]]:
    """Dotted names of all fields that hold numbers, and whether these are int or float."""
    for name, field in model.model_fields.items():
        kinds: list[Any] = [field.annotation]
        for kind in kinds:
            kinds += get_args(kind)
        parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if parts and name != "layers":
            yield from numbers(parts[0], f"{before}{name}.")
        elif found := [kind for kind in kinds if kind in (int, float)]:
            yield f"{before}{name}", found[0]


def changed(field: str, value: Any) -> RunConfig:
    part, _, name = field.partition(".")
    return make_config(BASE, {part: {name: LISTS.get(field, lambda one: one)(value)}})


def test_every_number_has_its_bounds() -> None:
    fields = list(numbers(RunConfig))
    assert len(fields) > 45 and set(LISTS) | ZERO <= {field for field, _ in fields}
    for field, kind in fields:
        wrong: list[Any] = [math.nan, math.inf, -math.inf, -1, 1e308, 2**63, 10**30, "x", "", [], {}]
        wrong += [] if field in ZERO else [0]
        wrong += [2.5] if kind is int else []
        wrong.remove(2**63) if field.endswith("seed") else None
        for value in [*wrong, 2**63]:
            with pytest.raises(ConfigError) as error:
                pytest.fail(f"{field}={value} is taken: {changed(field, value)}")
            lines = str(error.value).splitlines()
            assert len(lines) == 1 and lines[0].startswith(field), (value, lines)
            assert repr(value) in lines[0] or str(value) in lines[0] or str(float(value)) in lines[0]
        if field in ZERO:
            changed(field, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  name: [x\n", r"no YAML at line 3, column 1: expected ',' or ']'"),
        (b"model:\n\tname: x\n", r"no YAML at line 2, column 1: found character '\\t'"),
        (b"", "a mapping of fields is wanted, .* it holds nothing"),
        (b"# all of it is a comment\n", "it holds nothing"),
        (b"- 1\n", "it holds a list"),
        (b"tiny", "it holds the text 'tiny'"),
        (TINY.encode() + b"data: {}\n", f"line {TINY.count(chr(10)) + 1}, column 1: data stands here twice"),
        (b"data:\n  seed: 1\n  split: x\n  seed: 2\n", "line 4, column 3: seed stands here twice"),
        ("# Müller\n".encode("latin-1") + TINY.encode(), "line 1 is not utf-8; save it as UTF-8"),
        (TINY.encode("utf-16-le"), "line 1 holds the control character"),
        (b"\xff\xfe\x00", "line 1 is not utf-16"),
        (b'!!python/object/apply:os.getcwd ["."]', "could not determine a constructor"),
        (TINY.encode() + b"---\na: 1\n", "but found another document"),
        (b"[" * 1000, "nested too deeply"),
        (
            b"optimizer:\n  # lr: 1\n" + TINY.split("optimizer:")[0].encode(),
            "^optimizer: a mapping of fields is wanted",
        ),
        (b"models: {}\n" + TINY.encode(), "^models: there is no such field, .*; did you mean model?"),
        (TINY.replace("  k: 8", "  kk: 8").encode(), "transcoder.kk: there is no such field.*mean transcoder.k?"),
        (TINY.replace("  k: 8", "  k: 8\n  lr: 1").encode(), "transcoder.lr: .*; did you mean optimizer.lr?"),
    ],
)
def test_a_file_that_cant_be_read_is_told_by_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(file)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "Is a directory"), (tmp_path / "x", "No such file"), (Path(__file__) / "x", "Not a directory"),
        (Path("a\0b"), "embedded null"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^--config .*: {message}"):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_that_say_their_encoding_are_read(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# Müller\r\n" + TINY, encoding=encoding)
    assert read(file) == load_preset("tiny")


@pytest.mark.parametrize(
    ("field", "written", "value"),
    [
        ("optimizer.lr", "3e-4", 3e-4), ("optimizer.lr", ".001", 1e-3), ("data.num_tokens", "1_000_000", 1_000_000),
        ("transcoder.k", "010", 10), ("transcoder.skip", "yes", True), ("cluster.use_gpu", "off", False),
        ("cluster.use_gpu", "null", None), ("cluster.use_gpu", "~", None),
        ("output.run_id", "2026-11-29", "2026-11-29"),
        ("output.run_id", "20261129", "20261129"), ("output.run_id", "1e5", "1e5"), ("model.revision", "no", "no"),
        ("model.revision", "12:30", "12:30"), ("data.split", "'null'", "null"),
    ],
)  # fmt: skip
def test_a_word_in_a_file_means_what_it_means_as_an_option(
    field: str, written: str, value: Any, tmp_path: Path
) -> None:
    part, _, name = field.partition(".")
    file = tmp_path / "run.yaml"
    lines = [line for line in TINY.splitlines() if not line.startswith(f"  {name}:")]
    lines.insert(lines.index(f"{part}:") + 1, f"  {name}: {written}")
    file.write_text("\n".join(lines))
    found = getattr(getattr(read(file), part), name)
    assert (found, type(found)) == (value, type(value))
    if value is not None and "'" not in written:
        option = getattr(getattr(parse_command_line(["--preset", "tiny", f"--{field}={written}"], "")[0], part), name)
        assert option == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "tinny"], "--preset 'tinny' is unknown; known presets: gemma.*, tiny; did you mean tiny?"),
        (["--transcoder.k", "x"], "transcoder.k: a whole number is wanted, got 'x'"),
        (["--model.layers", "[1"], r"--model.layers \[1: JSON is wanted"),
        (["--model.layers", "null"], "model.layers.0.layer: a whole number is wanted, got None"),
        (["--model", "{1"], "--model {1: JSON is wanted"),
        (["--transcoder.group_sizes", "[a]"], "transcoder.group_sizes.0: a whole number is wanted, got 'a'"),
        (["--transcoder.group_sizes", "[16777217]"], "transcoder.group_sizes=.16777217. sum .* at most 16777216"),
        (["--optimizer.betas", "[0.9]"], "optimizer.betas.1: required, but not given"),
        (["--cluster.use_gpu", "maybe"], "cluster.use_gpu: true or false is wanted, got 'maybe'"),
        (["--output.root="], "output.root: text is wanted, got ''"),
        (["--data.name", "a\nb"], r"data.name: text without control characters is wanted, got 'a\\nb'"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str) -> None:
    preset = [] if "--preset" in options else ["--preset", "tiny"]
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        parse_command_line([*preset, *options], "")
    assert "\n" not in str(error.value)


def test_an_unknown_option_is_told_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    for option, meant in (
        ("--optimiser.lr", "optimizer.lr"),
        ("--transcoder.kk", "transcoder.k"),
        ("--prset", "preset"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_command_line(["--preset", "tiny", option, "3"], "")
        assert capsys.readouterr().err.endswith(f"unrecognized arguments: {option} 3; did you mean {meant}?\n")
