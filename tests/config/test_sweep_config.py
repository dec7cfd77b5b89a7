"""The settings of a sweep: both forms, the names of its transcoders, and what is refused."""

import re

import pytest
import yaml

from jobs.command_line import parse_command_line
from mtc.config import ConfigError, load_preset, make_config, parse_settings, to_yaml
from mtc.config.sweep import LONGEST_NAME, entry_names

SWEEP = """
sweep:
  - {transcoder.k: 4}
  - {transcoder: {k: 8, seed: 1}, optimizer.lr: 3e-3}
  - transcoder.group_sizes: [8, 8]
  - {transcoder.skip: on, transcoder.input_norm: none}
  - {}
"""


def test_each_entry_is_a_transcoder_with_its_settings_in_a_directory_of_a_name_of_its_own():
    config = load_preset("tiny", parse_settings(SWEEP.encode(), "x"))
    members = dict(config.members())
    assert list(members) == ["k4", "k8-seed1-lr0.003", "groups8x8", "skip-input-norm-none", "base"]
    assert members["k8-seed1-lr0.003"] == load_preset(
        "tiny", {"transcoder": {"k": 8, "seed": 1}, "optimizer": {"lr": 3e-3}}
    )
    assert members["base"] == load_preset("tiny")
    assert make_config(yaml.safe_load(to_yaml(config))) == config
    assert make_config(parse_settings(to_yaml(config).encode(), "x")) == config
    assert "sweep" not in yaml.safe_load(to_yaml(members["k4"]))
    assert len({one.fingerprint() for one in [config, *members.values()]}) == 6


def test_a_grid_is_all_combinations_at_every_layer():
    argv = ["--preset", "tiny", "--model.layers", "[1, 0]"]
    config, _ = parse_command_line([*argv, "--sweep", '{"transcoder.k": [4, 8], "optimizer.lr": ["1e-3", 2e-3]}'], "")
    of_one = ["k4-lr0.001", "k4-lr0.002", "k8-lr0.001", "k8-lr0.002"]
    assert [m.name for m in config.members()] == [f"layer{layer}-{name}" for layer in (1, 0) for name in of_one]
    last = config.members()[-1].config
    assert (last.model.layer, last.transcoder.k, last.optimizer.lr, last.sweep) == (0, 8, 2e-3, None)
    listed = [str(dict(zip(("transcoder.k", "optimizer.lr"), pair, strict=True))).replace("'", '"') for pair in
              ((4, 0.001), (4, 0.002), (8, 0.001), (8, 0.002))]  # fmt: skip
    assert parse_command_line([*argv, "--sweep", f"[{', '.join(listed)}]"], "")[0] == config
    as_in_a_file = ["[{transcoder.k: 4, optimizer.lr: 1e-3}, {transcoder: {k: 4}, optimizer.lr: 0.002}]",
                    '{"transcoder.k": 8, "optimizer.lr": 0.001}', "{transcoder.k: 8, optimizer.lr: 0.002}"]  # fmt: skip
    options = [part for text in as_in_a_file for part in ("--sweep", text)]
    assert parse_command_line([*argv, *options], "")[0] == config
    replaced = make_config(yaml.safe_load(to_yaml(config)), {"sweep": {"transcoder.seed": [1, 2]}})
    assert [m.name for m in replaced.members()][:2] == ["layer1-seed1", "layer1-seed2"], "a sweep replaces another"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"transcoder.k": [4, 8], "optimizer.lr": 0.003}', r"sweep\.optimizer\.lr: a list of values .* got 0\.003"),
        ("{transcoder.k: 4}", r"sweep\.transcoder\.k: a list of values is wanted in a grid, got '4'"),
        ("5", r"sweep: a list of overrides, .* or a grid, .*, is wanted, got '5'"),
        ("[{transcoder.k: 4}", r"--sweep \[\{transcoder\.k: 4\}: no YAML at line"),
    ],
)
def test_an_option_that_is_no_sweep_is_told_as_in_a_file(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_command_line(["--preset", "tiny", "--sweep", text], "")


def test_an_option_takes_a_files_sweep_back(tmp_path):
    (tmp_path / "sw.yaml").write_text(to_yaml(load_preset("tiny", {"sweep": {"transcoder.k": [4, 8]}})))
    argv = ["--config", str(tmp_path / "sw.yaml")]
    assert len(parse_command_line(argv, "")[0].members()) == 2
    assert parse_command_line([*argv, "--sweep", "null"], "")[0] == load_preset("tiny")


def test_names_are_short_unique_and_can_stand_in_paths_and_urls():
    weights = [[1.5, 2 + i / 1e9, 1e-7] for i in range(3)]
    long = [{"transcoder.prefix_weights": w, "optimizer.eps": 1e-12, "optimizer.betas": [0.9, 0.99]} for w in weights]
    assert entry_names([{"transcoder.k": 4}, {"optimizer.k": 4}]) == ["k4", "k4-1"]
    names = [member.name for member in load_preset("tiny", {"sweep": long}).members()]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[a-z][A-Za-z0-9._-]*", name) and len(name) <= LONGEST_NAME + 4 for name in names)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ([], r"sweep: at least 2 transcoders are wanted, got 0; one transcoder's settings stand in transcoder and opt"),
        ([{"transcoder.k": 4}], r"sweep: at least 2 transcoders are wanted, got 1"),
        ("k", r"sweep: a list of overrides, such as .* or a grid, such as .*, is wanted, got 'k'"),
        ([{}, 3], r"sweep\.1: a mapping of fields is wanted, such as transcoder\.k: 16, got '3'"),
        ([{"transcoder.k": 4}, {"transcoder": {"k": "4"}}], r"sweep\.1 and sweep\.0 are the same settings: .*k': 4"),
        ([{}, {"transcoder.k": 8}], r"sweep\.1 and sweep\.0 are the same settings"),  # the preset's k
        ([{"transcoder.k": 4, "transcoder": {"k": 4}}, {}], r"sweep\.0\.transcoder\.k stands there twice"),
        ([{"data.num_tokens": 9}, {}], r"sweep\.0\.data\.num_tokens can't be swept; what may be is transcoder\.\* and"),
        ([{}, {"k": 3}], r"sweep\.1\.k can't be swept; .*; did you mean transcoder\.k\?"),
        ([{"optimizer.batch_tokens": 8}, {}], r"sweep\.0\.optimizer\.batch_tokens: all transcoders of a sweep share"),
        ([{"transcoder.calibration_tokens": 8}, {}], r"sweep\.0\.transcoder\.calibration_tokens: all transcoders of a"),
        ([{"transcoder.k": 0}, {}], r"sweep\.0\.transcoder\.k: at least 1 is wanted, got 0"),
        ([{}, {"transcoder.k": 999}], r"sweep\.1: transcoder\.k=999 is larger than the dictionary"),
        ([{}, {"optimizer.warmup_steps": 999}], r"sweep, warmup-steps999: optimizer\.warmup_steps=999 is more than"),
        ({"transcoder.k": 4}, r"sweep\.transcoder\.k: a list of values is wanted in a grid, got 4"),
        ({"transcoder.seed": list(range(300))}, r"sweep: at most 256 transcoders are wanted, the grid has 300"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_named(sweep, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset("tiny", {"sweep": sweep})
    assert "\n" not in str(caught.value)


def test_layers_times_entries_are_limited_together():
    with pytest.raises(
        ConfigError, match=r"model\.layers=3 layers and sweep=100 entries make 300 transcoders; at most"
    ):
        load_preset("tiny", {"model": {"layers": [0, 1, 2]}, "sweep": {"transcoder.seed": list(range(100))}})
