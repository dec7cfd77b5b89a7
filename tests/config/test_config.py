from pathlib import Path

import pytest
import yaml

from cluster.pipeline import check
from jobs.command_line import parse_command_line
from mtc.config import ConfigError, load_preset, make_config, preset_names, to_yaml
from mtc.language_model import check_model

ROOT = Path(__file__).parents[2]


def test_reference_preset_is_the_reference_run():
    config = load_preset("gemma-2-2b-layer17")
    model, data, transcoder, optimizer = config.model, config.data, config.transcoder, config.optimizer
    assert (model.name, model.layer, model.source, model.target) == ("google/gemma-2-2b", 17, "resid_mid", "mlp_out")
    assert (data.name, data.num_tokens, data.context_length) == ("HuggingFaceFW/fineweb-edu", 15_000_000, 64)
    assert transcoder.group_sizes == (1152, 2304, 1152)
    assert transcoder.prefixes == (1152, 3456, 4608)
    assert (transcoder.k, transcoder.aux_coefficient, transcoder.aux_k) == (48, 1 / 32, 16)
    assert (optimizer.lr, optimizer.betas, optimizer.batch_tokens) == (3e-4, (0.9, 0.99), 1024)
    assert (optimizer.warmup_steps, optimizer.final_lr_fraction) == (500, 0.01)
    assert 14_400 < config.total_steps < 14_700
    analysis = config.analysis
    assert (analysis.max_per_feature, analysis.context_tokens, analysis.min_activation) == (100, 20, 0.1)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_yaml(name, tmp_path):
    config = load_preset(name)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    again, _ = parse_command_line(["--config", str(file)], "")
    assert again == config


def test_overrides_win_over_the_preset():
    argv = ["--preset", "tiny", "--transcoder.k", "4", "--data.num_tokens", "1_000_000", "--model.layer=0"]
    config, arguments = parse_command_line([*argv, "--transcoder.group_sizes", "[8, 24]", "--print-config"], "")
    assert (config.transcoder.k, config.data.num_tokens, config.model.layer) == (4, 1_000_000, 0)
    assert config.transcoder.prefixes == (8, 32)
    assert config.optimizer == load_preset("tiny").optimizer
    assert arguments.print_config


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"transcoder": {"k": 65}}, ["transcoder.k=65", "transcoder.group_sizes=[16, 32, 16]", "64"]),
        ({"transcoder": {"group_sizes": [16, 0]}}, ["transcoder.group_sizes", "[16, 0]"]),
        ({"cluster": {"num_trainers": 512}}, ["optimizer.batch_tokens=256", "cluster.num_trainers=512"]),
        (
            {"cluster": {"num_trainers": 2, "min_trainers": 3}},
            ["cluster.min_trainers=3 is more than cluster.num_trainers=2"],
        ),
        ({"data": {"num_tokens": 100}}, ["data.num_tokens=100", "optimizer.batch_tokens=256"]),
        ({"optimizer": {"warmup_steps": 99}}, ["optimizer.warmup_steps=99", "32 steps"]),
        ({"model": {"layer": -1}}, ["model.layer", "-1"]),
        ({"model": {"source": "mlp_out"}}, ["model.source", "model.target", "mlp_out"]),
        ({"transcoder": {"kk": 3}}, ["transcoder.kk", "3"]),
        ({"transcoder": {"prefix_weights": [1, 1]}}, ["transcoder.prefix_weights", "[1.0, 1.0]", "3 groups"]),
        (
            {"transcoder": {"rank": "contribution", "activation": "jumprelu"}},
            ["transcoder.rank=contribution", "transcoder.activation=jumprelu", "nothing is ranked"],
        ),
        (
            {"transcoder": {"rank": "contribution"}, "optimizer": {"warmup_steps": 32}},
            ["transcoder.rank=contribution", "optimizer.warmup_steps=32", "the run has 32 steps"],
        ),
        (
            {"transcoder": {"rank": "contribution"}, "optimizer": {"warmup_steps": 0}},
            ["transcoder.rank=contribution", "optimizer.warmup_steps=0", "at least 1"],
        ),
        ({"transcoder": {"prefix_weights": [0, 0, 0]}}, ["transcoder.prefix_weights", "not all 0"]),
        ({"transcoder": {"prefix_weights": [1, -1, 1]}}, ["transcoder.prefix_weights", "at least 0"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr", "fast"]),
    ],
)
def test_errors_name_the_fields_and_values(overrides, parts):
    with pytest.raises(ConfigError) as error:
        load_preset("tiny", overrides)
    for part in parts:
        assert part in str(error.value)


def test_missing_fields_and_unknown_preset():
    with pytest.raises(ConfigError, match=r"model: required"):
        make_config({})
    with pytest.raises(ConfigError, match=r"nope.*gemma-2-2b-layer17"):
        load_preset("nope")


def test_fingerprint_changes_with_the_numbers_only():
    config = load_preset("tiny")
    assert config.fingerprint() == load_preset("tiny", {"output": {"root": "/elsewhere"}}).fingerprint()
    assert config.fingerprint() != load_preset("tiny", {"optimizer": {"lr": 1e-3}}).fingerprint()


def test_default_learning_rate_grows_with_the_batch_and_falls_with_the_dictionary():
    def lr(batch, groups):
        changes = {"transcoder": {"group_sizes": groups}, "data": {"num_tokens": 100_000}}
        return load_preset("tiny", changes | {"optimizer": {"lr": None, "batch_tokens": batch}}).lr

    assert lr(1024, [1152]) == 6e-3
    assert lr(4096, [1152]) == pytest.approx(1.2e-2)
    assert lr(1024, [1152, 3456]) == pytest.approx(3e-3)
    assert load_preset("gemma-2-2b-layer17").lr == 3e-4


def test_several_layers_are_numbers_or_mappings_and_each_is_a_run_of_its_own():
    argv = ["--preset", "tiny", "--model.layers", '[0, {"layer": 2, "source": "mlp_in"}]', "--model.dtype", "float32"]
    config, _ = parse_command_line(argv, "test")
    assert [(s.layer, s.source, s.target) for s in config.model.sites] == [
        (0, "resid_mid", "mlp_out"),
        (2, "mlp_in", "mlp_out"),
    ]
    assert make_config(yaml.safe_load(to_yaml(config))) == config
    assert [member.name for member in config.members()] == ["layer0", "layer2"]
    for (_, alone), layer, source in zip(config.members(), (0, 2), ("resid_mid", "mlp_in"), strict=True):
        assert (alone.model.layer, alone.model.source, alone.model.layers) == (layer, source, None)
        assert alone.model.dtype == "float32"
        assert alone == make_config(yaml.safe_load(to_yaml(alone)))
        assert alone == load_preset("tiny", {"model": {"layer": layer, "source": source, "dtype": "float32"}})
    one = load_preset("tiny")
    assert one.members() == (("layer1", one),)


def model_as_saved(config):
    return yaml.safe_load(to_yaml(config))["model"]


def test_layers_are_saved_in_one_way():
    one, several = (
        load_preset("tiny"),
        load_preset("tiny", {"model": {"layers": [2, {"layer": 0, "source": "mlp_in"}]}}),
    )
    assert {"layer": 1, "source": "resid_mid", "target": "mlp_out"}.items() <= model_as_saved(one).items()
    assert "layers" not in model_as_saved(one)
    assert not {"layer", "source", "target"} & model_as_saved(several).keys()
    assert model_as_saved(several)["layers"][1] == {"layer": 0, "source": "mlp_in", "target": "mlp_out"}
    for alone in (1, {"layer": 1}):
        assert load_preset("tiny", {"model": {"layers": [alone]}}) == one, "a list of one is one"
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.layer: required"):
        load_preset("tiny", {"model": {"layers": [{"source": "mlp_in"}]}})
    for config in (one, several):  # as they were saved before
        older = config.model_dump(mode="json")
        assert {"layer", "layers"} <= older["model"].keys()
        assert make_config(older) == make_config(yaml.safe_load(to_yaml(config))) == config


def test_an_option_replaces_what_a_file_says_of_layers_in_the_other_way(tmp_path):
    several = load_preset("tiny", {"model": {"layers": [2, {"layer": 0, "source": "mlp_in"}]}})
    older, saved = tmp_path / "older.yaml", tmp_path / "saved.yaml"
    older.write_text(yaml.safe_dump(several.model_dump(mode="json")))
    saved.write_text(to_yaml(several))

    def sites(*options):
        config, _ = parse_command_line(options, "")
        assert config.model.layer == config.model.sites[0].layer
        assert config.model.source == config.model.sites[0].source
        return [(s.layer, s.source) for s in config.model.sites]

    for file in (older, saved):
        assert sites("--config", str(file)) == [(2, "resid_mid"), (0, "mlp_in")]
        assert sites("--config", str(file), "--model.layer=1") == [(1, "resid_mid")]
        assert sites("--config", str(file), "--model.layers", "[1]") == [(1, "resid_mid")]
        assert sites("--config", str(file), "--model.source", "mlp_in") == [(2, "mlp_in"), (0, "mlp_in")]
    assert sites("--preset", "tiny", "--model.layers", "[0, 2]") == [(0, "resid_mid"), (2, "resid_mid")]
    assert sites("--preset", "tiny", "--model.layer", "0", "--model.layers", "[0, 2]")[0] == (0, "resid_mid")
    with pytest.raises(ConfigError, match=r"model\.layer=1 and model\.layers=\[0, 2\] disagree: give one of them"):
        sites("--preset", "tiny", "--model.layer", "1", "--model.layers", "[0, 2]")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1, 1], r"model\.layers=\[1, 1\] names a layer twice"),
        ([], r"model\.layers: a list of at least 1 is wanted"),
        ([0, -1], r"model\.layers\.1\.layer: at least 0 is wanted, got -1"),
        (["x"], r"model\.layers='x': all, a number, a range such as 4-20, or a list of numbers and ranges"),
        ([0, {"layer": 1, "source": "mlp_out"}], r"model\.source and model\.target of layer 1 are both mlp_out"),
        ([{"layer": 1, "sit": "mlp_in"}], r"model\.layers\.0\.sit: there is no such field"),
        ("", r"model\.layers='': all, a number, a range such as 4-20"),
        ("6-4", r"model\.layers='6-4': the range ends at 4, before it begins at 6"),
        (["4-6", 5], r"model\.layers=\[4, 5, 6, 5\] names a layer twice: 5"),
        ("0-10000", r"model\.layers='0-10000': layers up to 9999 are wanted, the range ends at 10000"),
        ("-3", r"model\.layers\.0\.layer: at least 0 is wanted, got '-3'"),
        ([0, "all"], r"model\.layers: all stands alone, without other layers beside it"),
    ],
)
def test_bad_layers_are_named(layers, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("tiny", {"model": {"layers": layers}})


def test_a_layer_beyond_the_model_is_named():
    config = load_preset("tiny", {"model": {"layers": [0, 7]}})
    with pytest.raises(ConfigError, match=r"model\.layers=7 is out of range: random:gemma2 has 3 layers"):
        check_model(config.model)


def test_a_range_is_its_numbers():
    def model(layers, **more):
        return load_preset("tiny", {"model": {"layers": layers, **more}}).model

    assert model("4-6") == model([4, 5, 6]) == model(["4-5", 6])
    assert model([0, "4-6"]) == model([0, 4, 5, 6])
    assert model([0, {"layer": "1-2", "source": "mlp_in"}]) == model(
        [0, {"layer": 1, "source": "mlp_in"}, {"layer": 2, "source": "mlp_in"}]
    )
    assert model("2-2") == model([2]) == load_preset("tiny", {"model": {"layer": 2}}).model


@pytest.mark.parametrize("written", ["all", "0-2", "0,1-2", "[0, 1, 2]", '["0-1", 2]'])
def test_all_layers_are_the_same_run_as_their_numbers(written, tmp_path):
    """`random:gemma2` has 3."""
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(load_preset("tiny", {"model": {"source": "mlp_in", "layers": "all"}})))
    options = ["--config", str(file), "--output.root", str(tmp_path / "runs")]
    asked, _ = parse_command_line([*options, "--model.layers", written], "")
    config = check(asked)
    assert config == make_config(asked.model_dump(), {"model": {"layers": [0, 1, 2]}})
    assert [(s.layer, s.source) for s in config.model.sites] == [(layer, "mlp_in") for layer in range(3)]
    assert (
        config.fingerprint() == load_preset("tiny", {"model": {"source": "mlp_in", "layers": [0, 1, 2]}}).fingerprint()
    )
    assert make_config(yaml.safe_load(to_yaml(config))) == config


def test_all_layers_wait_for_the_model():
    config = load_preset("tiny", {"model": {"layers": "all"}})
    assert make_config(yaml.safe_load(to_yaml(config))) == config
    for ask in (config.members, config.fingerprint, lambda: config.total_steps and config.fresh_tokens):
        with pytest.raises(ValueError, match="how many layers the model has is not known yet"):
            ask()
    assert check_model(config.model).num_layers == 3
    assert len(config.of_layers(3).members()) == 3
    assert config.of_layers(1) == load_preset("tiny", {"model": {"layer": 0}}), "a model of one layer"
    with pytest.raises(ConfigError, match=r"model\.layers=3 is out of range: random:gemma2 has 3 layers"):
        check_model(load_preset("tiny", {"model": {"layers": "2-3"}}).model)
    with pytest.raises(ConfigError, match=r"model\.layer=1 and model\.layers=all disagree"):
        load_preset("tiny", {"model": {"layer": 1, "layers": "all"}})
    many = {"sweep": {"transcoder.seed": list(range(100))}, "model": {"layers": "all"}}
    with pytest.raises(ConfigError, match=r"model\.layers=3 layers and sweep=100 entries make 300 transcoders"):
        load_preset("tiny", many).of_layers(3)
    assert (
        load_preset("tiny", {"model": {"layers": "all"}}).model.of_layers(3)
        == load_preset("tiny", {"model": {"layers": [0, 1, 2]}}).model
    )
    one_again, _ = parse_command_line(["--preset", "tiny", "--model.layers", "all", "--model.source", "mlp_in"], "")
    assert one_again.model.layers == "all"
