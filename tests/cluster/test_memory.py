"""The plan in bytes, against tensors that real trainers, buffers and language models hold."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.memory import check_memory
from cluster.memory_training import capture_bytes, trainer, training_bytes, unit_bytes
from cluster.resources import Node, make_plan
from mtc.config import ConfigError, load_preset, preset_names
from mtc.language_model import Capture, LanguageModel, check_model, pack_windows
from mtc.language_model.architectures import ModelInfo
from mtc.training import ShuffleBuffer, Trainer, Unit

GB, D = 10**9, 48
GEMMA_2B = ModelInfo("gemma2", 26, 2304, 8192, 256_000, 9216, 8, 2048, 1024, True)
SMALL = ModelInfo("llama", 4, D, 512, 1000, 96, 4, D, D, True)
EVERY_LAYER = {"model": {"layers": "all"}, "transcoder": {"group_sizes": [65_536]}}


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were made inside and alive at the same time."""

    def __init__(self):
        super().__init__()
        self.peak, self._live = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inside = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (at := tensor.untyped_storage().data_ptr()) not in inside:
                self._live[at] = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        self._live = {at: each for at, each in self._live.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def settings(**overrides):
    base = {"transcoder": {"group_sizes": [600, 900], "k": 8}, "optimizer": {"batch_tokens": 128, "warmup_steps": 2}}
    base["data"] = {"unit_tokens": 256, "shuffle_buffer_tokens": 1024}
    return load_preset("tiny", {part: base.get(part, {}) | overrides.get(part, {}) for part in base | overrides})


def made(config, steps=3):
    """A Trainer that was initialised and made some steps."""
    own, generator = Trainer(config, D, D), torch.Generator().manual_seed(0)
    own.initialise(*torch.randn(2, 512, D, generator=generator))
    for _ in range(steps):
        own.step(*torch.randn(2, config.optimizer.batch_tokens, D, generator=generator))
    return own


@pytest.mark.parametrize(
    "transcoder", [{}, {"skip": True}, {"activation": "jumprelu"}, {"group_sizes": [100, 200, 300, 400]}], ids=str
)
def test_weights_and_a_checkpoint_are_counted_to_the_byte(transcoder):
    config = settings(transcoder=transcoder, optimizer={"backend": "sparse"})
    need, own = training_bytes(config, SMALL, 1), made(config)
    state = own.optimizer.state
    tensors = [*own.transcoder.parameters(), own.transcoder.tokens_since_fired, own.dead]
    for parameter in own.transcoder.parameters():
        tensors += [parameter.grad, state[parameter]["exp_avg"], state[parameter]["exp_avg_sq"]]
    assert need.weights == sum(tensor.nbytes for tensor in tensors)
    snapshot = own.state_dict()
    written = sum(tensor.nbytes for tensor in snapshot.values()) + 2 * len(save(snapshot))
    assert need.checkpoint == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("backend", ["sparse", "dense", "auto"])
def test_a_step_takes_no_more_than_is_counted_for_it_and_not_much_less(backend):
    config = settings(optimizer={"backend": backend, "precision": "float32"})
    own, rows = Trainer(config, D, D), torch.randn(2, 128, D)
    with LiveBytes() as live:
        own.step(*rows)
    need = training_bytes(config, SMALL, 1)
    later = need.weights - sum(parameter.nbytes for parameter in own.transcoder.parameters())
    assert 0.4 * (need.work + later) < live.peak < 1.1 * (need.work + later)


@pytest.mark.parametrize("replays", [1, 3])
def test_the_shuffle_buffer_grows_to_what_is_counted_and_no_further(replays):
    config = settings(data={"replays": replays, "shuffle_buffer_tokens": 1500, "unit_tokens": 256})
    (sites,), counted = config.model.sites, training_bytes(config, SMALL, 1)
    need = counted.buffer + counted.units
    buffer, most = ShuffleBuffer(1500, (0,), replays=replays), 0
    for number in range(40):
        while buffer.filled and buffer.available >= 128:
            buffer.take(128)
        rows = {key: torch.zeros(250, D, dtype=torch.bfloat16) for key in (sites.source_key, sites.target_key)}
        buffer.add(Unit(number, rows, np.arange(250, dtype=np.int32), 250))
        memories = [block.memory for block in [*buffer._blocks, buffer._collecting]] + buffer._free
        most = max(most, sum(part.nbytes for memory in memories for part in memory.values()))
    assert 0.6 * need < most <= need


@pytest.mark.parametrize("name", ["random:gemma2", "random:llama", "random:gpt2"])
def test_a_model_actor_takes_what_is_counted_for_it(name):
    config = load_preset("tiny", {"model": {"name": name, "dtype": "float32"}, "data": {"unit_tokens": 4096}})
    info = check_model(config.model, config.data.context_length)
    model = LanguageModel(config.model)
    ids = [np.arange(32, dtype=np.int32) + 40 for _ in range(4096 // 32)]
    with LiveBytes() as live:
        captured = Capture(model).start(pack_windows(ids, []))
    assert 0.5 * capture_bytes(config, info, False) < live.peak < 1.2 * capture_bytes(config, info, False)
    assert unit_bytes(config, info) == sum(rows.nbytes for rows in captured.activations.values())
    weights = sum(p.numel() for n, p in model.model.named_parameters() if "norm" not in n and p.ndim == 2)
    positions = (info.max_positions or 0) * info.d_model if "gpt2" in name else 0
    assert info.weights(config.model.layer + 1) == pytest.approx(weights - positions, rel=0.01)
    whole = LanguageModel(config.model, full=True).model
    weights = sum(p.numel() for p in whole.parameters() if p.ndim == 2)
    assert info.weights(info.num_layers, head=True) == pytest.approx(weights - positions, rel=0.01)


def refusal(config, nodes, info=GEMMA_2B):
    with pytest.raises(ConfigError) as error:
        check_memory(config, make_plan(config, nodes, info.d_model), info, disk=float("inf"))
    return str(error.value)


def every_layer(**overrides):
    return load_preset("gemma-2-2b-layer17", EVERY_LAYER | overrides).of_layers(26)


def test_a_gpu_that_is_too_small_is_refused_with_what_would_fit():
    nodes = [Node(64, 8, memory=2000 * GB, gpu_memory=80 * GB)]
    message = refusal(every_layer(), nodes)
    assert message.startswith("model.layers of 26 transcoders and transcoder.group_sizes of 65,536 features in all: ")
    parameters = 26 * (2 * 2304 * 65_536 + 65_536 + 2304)
    assert f"({(16 * parameters + 26 * 9 * 65_536) / 1e9:.3g} GB trainer: 26 transcoders' weights, gradients" in message
    assert "of a GPU's memory" in message and "a GPU has 80 GB" in message
    layers = int(re.search(r"would fit with model\.layers of (\d+) transcoders", message)[1])
    for count in (layers, layers + 2):
        config = load_preset("gemma-2-2b-layer17", EVERY_LAYER | {"model": {"layers": list(range(count))}})
        plan = make_plan(config, nodes, 2304)
        if count == layers:
            check_memory(config, plan, GEMMA_2B, disk=float("inf"))
        else:
            assert "model.layers of" in refusal(config, nodes)
    features = int(
        re.search(r"transcoder\.group_sizes of ([\d,]+) features in all(?:;|$)", message)[1].replace(",", "")
    )
    check_memory(every_layer(transcoder={"group_sizes": [features]}), plan, GEMMA_2B, disk=float("inf"))


def test_a_snapshot_that_main_memory_has_no_room_for_is_refused():
    """Whatever the GPUs have."""
    config = every_layer()
    copy = next(term.bytes for term in trainer(config, GEMMA_2B, 1, True).main if "checkpoint" in term.what)
    assert copy > 12 * 26 * 2 * 2304 * 65_536 > 94 * GB
    message = refusal(config, [Node(64, 8, memory=96 * GB)])
    assert f"{copy / 1e9:.3g} GB trainer: 26 transcoders' copy for a checkpoint" in message
    assert "main memory" in message and "the largest node has 96 GB" in message and "transcoder.group_sizes" in message


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"data": {"shuffle_buffer_tokens": 20_000_000}}, "data.shuffle_buffer_tokens"),
        ({"data": {"unit_tokens": 1 << 22}}, "data.unit_tokens"),
        ({"optimizer": {"batch_tokens": 1 << 21}}, "optimizer.batch_tokens"),
        ({"transcoder": {"group_sizes": [1 << 20]}}, "transcoder.group_sizes"),
    ],
)
def test_the_field_that_asks_for_most_is_named_and_its_offer_fits(overrides, field):
    nodes = [Node(64, 8, memory=1000 * GB, gpu_memory=80 * GB)]
    small = {"optimizer": {"warmup_steps": 0}}
    merged = {part: small.get(part, {}) | overrides.get(part, {}) for part in small | overrides}
    config = load_preset("gemma-2-2b-layer17", merged)
    message = refusal(config, nodes)
    assert message.startswith(field)
    offer = re.search(rf"would fit with.*{re.escape(field)}(?:=| of )([\d,]+)", message)[1]
    part, _, name = field.partition(".")
    value = int(offer.replace(",", "").strip())
    config = load_preset(
        "gemma-2-2b-layer17", small | {part: small.get(part, {}) | {name: [value] if "sizes" in name else value}}
    )
    check_memory(config, make_plan(config, nodes, 2304), GEMMA_2B, disk=float("inf"))


def test_model_actors_that_share_a_node_are_counted_together():
    config = load_preset("gemma-2-2b-layer17", {"cluster": {"num_model_actors": 8}, "data": {"unit_tokens": 4096}})
    message = refusal(config, [Node(64, 0, memory=80 * GB)])
    assert message.startswith("model.name and cluster.num_model_actors=8: ") and "8 x " in message
    fewer = int(re.search(r"cluster\.num_model_actors=(\d+)$", message)[1])
    assert 1 <= fewer < 8
    config = load_preset("gemma-2-2b-layer17", {"cluster": {"num_model_actors": fewer}, "data": {"unit_tokens": 4096}})
    check_memory(config, make_plan(config, [Node(64, 0, memory=80 * GB)], 2304), GEMMA_2B, disk=float("inf"))


def test_what_is_not_known_refuses_nothing():
    config = every_layer()
    for nodes in ([Node(64, 8)], [Node(64, 8, memory=1e9), Node(64, 8)], [Node(64, 8, gpu_memory=1e9), Node(64, 8)]):
        plan = make_plan(config, nodes, 2304)
        assert " of ?" in check_memory(config, plan, GEMMA_2B, disk=float("inf")).describe()


def test_an_object_store_that_stays_empty_is_room_for_processes():
    config, info = load_preset("tiny"), ModelInfo("gemma2", 3, 32, 1024, 259, 64, 4, 32, 16, True)
    with pytest.raises(ConfigError, match=r"takes 3\.\d+ GB of main memory .* the largest node has 2\.5 GB"):
        check_memory(config, make_plan(config, [Node(2, 0, memory=2.5e9)], 32), info, disk=float("inf"))
    small = [Node(2, 0, memory=2.5e9, object_store=1.5e9)]
    check_memory(config, make_plan(config, small, 32), info, disk=float("inf"))
    long = load_preset("tiny", {"data": {"num_tokens": 20_000_000}})  # whose activations fill it
    assert "has 2.5 GB" in refusal(long, small, info)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_fit_the_machines_that_they_are_for(preset):
    """Two cores with 16 GB, of which Ray counts 0.7 for processes; the reference runs one GPU of 24 GB."""
    config = load_preset(preset)
    if config.model.name.startswith("google/"):
        info, node = GEMMA_2B, Node(16, 1, memory=44 * GB, gpu_memory=24 * GB)
    elif "gemma" in preset:
        info, node = (
            ModelInfo("gemma3_text", 18, 640, 32_768, 262_144, 2048, 4, 1024, 256, True),
            Node(2, 0, memory=11 * GB),
        )
    else:
        info, node = check_model(config.model, config.data.context_length), Node(2, 0, memory=11 * GB)
    config = config.of_layers(info.num_layers)
    memory = check_memory(config, make_plan(config, [node], info.d_model), info, disk=float("inf"))
    assert memory.at_once == len(config.members())
    text = memory.describe()
    assert len(text.splitlines()) <= 12 and "together" in text


def test_the_table_adds_up():
    nodes = [Node(32, 1, memory=50 * GB, gpu_memory=40 * GB)]
    config = load_preset("gemma-2-2b-layer17")
    memory = check_memory(config, make_plan(config, nodes, 2304), GEMMA_2B, disk=float("inf"))
    for stage in memory.stages:
        lines = memory.describe().split(stage.name)[1].splitlines()
        together = next(line for line in lines if "together" in line)
        main, gpu = (float(size) for size in re.findall(r"([\d.]+) GB of", together))
        assert main == pytest.approx(sum(p.process.main_bytes * p.on_node for p in stage.places) / 1e9, rel=0.01)
        assert gpu == pytest.approx(sum(p.process.gpu_bytes for p in stage.places) / 1e9, rel=0.01)
