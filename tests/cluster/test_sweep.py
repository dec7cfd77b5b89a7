"""Transcoders that are trained side by side on one stream: each is what it would be alone, through checkpoints too."""

import threading

import pytest
import safetensors.torch
import torch

from cluster.batches import Batches
from cluster.blocks import ActorCosts
from cluster.data_state import data_state
from cluster.memory import check_memory
from cluster.memory_training import training_bytes
from cluster.resources import Node, make_plan
from cluster.resume import unneeded_units
from cluster.routing import Routing
from cluster.train_worker import _calibrate, _initialise, _open_trainers, _step, files_of
from mtc.config import ConfigError, load_preset
from mtc.language_model.architectures import ModelInfo
from mtc.storage import Checkpoints, CheckpointWriter
from mtc.training import Clock, SideBySide, Unit

D, UNITS, CALIBRATION, TOKENS = 8, 12, 2, 96
SWEEP = [
    {}, {"transcoder.k": 5, "transcoder.seed": 3}, {"transcoder.group_sizes": [24, 40, 12], "optimizer.lr": 1e-2},
    {"transcoder.skip": True, "optimizer.backend": "dense", "transcoder.input_norm": "scalar"},
]  # fmt: skip


def settings(**changes):
    return load_preset(
        "tiny",
        {
            "model": {"layers": [1, {"layer": 0, "source": "mlp_in"}]},
            "transcoder": {"group_sizes": [16, 32], "k": 3, "dead_after_tokens": 64},
            "optimizer": {"batch_tokens": 64, "backend": "sparse", "warmup_steps": 2},
            "data": {"num_tokens": UNITS * TOKENS, "shuffle_buffer_tokens": 300},
        }
        | changes,
    )


def unit(number, sites):
    """A unit of the stream, with the activations of those sites alone."""
    generator = torch.Generator().manual_seed(number)
    keys = [(1, "resid_mid"), (1, "mlp_out"), (0, "mlp_in"), (0, "mlp_out")]
    every = {key: torch.randn(TOKENS, D, generator=generator).to(torch.bfloat16) for key in keys}
    activations = {key: every[key] for site in sites for key in (site.source_key, site.target_key)}
    rows = torch.arange(TOKENS, dtype=torch.int32).numpy()
    return Unit(number, activations, rows, TOKENS, rows[:0], dict.fromkeys((*ActorCosts.FIELDS, "device_flops"), 1.0))


def train(config, place, stop=None):
    """What train_worker does, on units of this process: to the end, or for `stop` steps and a checkpoint."""
    checkpoints = Checkpoints(str(place))
    checkpoint = checkpoints.latest()
    routing = Routing(config, 0, 1)
    trainers = _open_trainers(routing.members, D, torch.device("cpu"), checkpoint)
    together, lead = SideBySide(list(trainers.values())), next(iter(trainers.values()))
    state = data_state(config, checkpoint, 0, 1, "cpu")
    unneeded = unneeded_units(checkpoint, 1) if checkpoint else set()
    units = (unit(n, config.model.sites) for n in range(UNITS + CALIBRATION) if n not in unneeded)
    batches = Batches(units, state.buffer, 64, state.ledger, Clock(), UNITS, state.filters)
    while lead.step_number != stop and (share := batches.agree(lead.step_number == config.total_steps - 1)):
        if lead.step_number == 0:
            _initialise(trainers, batches, routing)
        _step(together, batches, share, routing)
    if stop is not None:
        writer = CheckpointWriter(checkpoints, 1, 0, 1, 2, lambda *news: None)
        writer.save(stop, files_of(trainers, batches, 0, 0)).result()
        return {}
    _calibrate(trainers, batches, routing)
    return {name: safetensors.torch.load(trainer.transcoder.to_bytes()) for name, trainer in trainers.items()}


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_each_has_the_same_bits_as_trained_alone_through_a_checkpoint(tmp_path, threads):
    """In turn, and several at a time."""
    whole = settings(sweep=SWEEP)
    assert len(whole.members()) == 8
    train(whole, tmp_path / "sweep", stop=7)
    together = train(whole, tmp_path / "sweep")
    assert len({weights["W_enc"].numpy().tobytes() for weights in together.values()}) == 8
    for name, config in whole.members():
        (alone,) = train(config, tmp_path / name).values()
        assert alone["W_enc"].shape == (config.transcoder.num_features, D)
        for tensor, value in alone.items():
            torch.testing.assert_close(together[name][tensor], value, rtol=0, atol=0, equal_nan=True, msg=name)


class Stepping:
    """What SideBySide needs of a trainer: `step` tells in which thread it ran, and with how many of torch's."""

    device, compute = torch.device("cpu"), "chosen"

    def __init__(self, error=None):
        self.error, self.began, self.ended = error, threading.Event(), False

    def step(self, source, target, tokens):
        self.began.set()
        if self.error:
            raise self.error
        for other in source:
            assert other.began.wait(20), "the others step at the same time"
        self.ended = True
        return threading.current_thread(), torch.get_num_threads(), tokens


@pytest.mark.parametrize("threads", [5], indirect=True)
def test_on_a_cpu_trainers_step_at_the_same_time_and_share_its_threads(threads):
    one, two = Stepping(), Stepping()
    together = SideBySide([one, two])
    found = together.step([([two], None), ([one], None)], 64)
    assert [(share, tokens) for _, share, tokens in found] == [(2, 64)] * 2
    assert len({thread for thread, _, _ in found} - {threading.current_thread()}) == 2
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert seen == [threads] and torch.get_num_threads() == threads, "other threads keep theirs"
    two.compute = None  # is chosen by measuring: nobody else is at work then
    assert {thread for thread, _, _ in together.step([([], None)] * 2, 64)} == {threading.current_thread()}
    bad, good = Stepping(ValueError("first")), Stepping()
    with pytest.raises(ValueError, match="first"):
        SideBySide([bad, good]).step([([], None), ([bad], None)], 64)
    assert good.ended
    one.device = torch.device("cuda")
    assert {thread for thread, _, _ in SideBySide([one, two]).step([([], None)] * 2, 64)} == {
        threading.current_thread()
    }


def model(d_model):
    return ModelInfo("gemma2", 26, d_model, 8192, 256_000, 4 * d_model, 8, d_model, d_model // 2, True)


def bytes_held(config):
    """What trainers hold that have made steps, counted tensor by tensor: weights, gradients, moments, workspace."""
    trainers = _open_trainers(config.members(), D, torch.device("cpu"), None)
    generator, tensors = torch.Generator().manual_seed(0), []
    for trainer in trainers.values():
        for _ in range(2):
            trainer.step(*torch.randn(2, 64, D, generator=generator))
        tensors += [*trainer.transcoder.parameters(), *trainer.workspace._free.values()]
        for parameter in trainer.transcoder.parameters():
            tensors += [parameter.grad, trainer.optimizer.state[parameter]["exp_avg"]]
            tensors += [trainer.optimizer.state[parameter]["exp_avg_sq"]]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_a_plan_counts_the_memory_of_all_and_refuses_what_does_not_fit():
    entries = [{"transcoder.group_sizes": [200 * n, 300 * n]} for n in (1, 2, 3)]
    config, info = settings(model={"layer": 1}, sweep=entries), model(D)
    need, held = training_bytes(config, info, 1), bytes_held(config)
    assert need.weights < held < need.weights + need.work
    assert need.checkpoint > 3 * 4 * sum(n * 500 * (2 * D + 1) + D for n in (1, 2, 3))
    wide = load_preset("gemma-2-2b-layer17", {"sweep": {"transcoder.k": [16, 32, 64, 128]}})
    one = load_preset("gemma-2-2b-layer17")
    both = [training_bytes(each, model(2304), 1, on_gpu=True) for each in (one, wide)]
    assert both[1].weights == 4 * both[0].weights
    assert both[1].buffer == both[0].buffer, "which all share"
    many = {"transcoder.k": list(range(1, 65))}  # whose work would take 61 GB, were it not done in turn on a GPU
    large = load_preset("gemma-2-2b-layer17", {"sweep": many, "optimizer": {"batch_tokens": 16_384}})
    check_memory(large, make_plan(large, [Node(8, 2, gpu_memory=40e9)], 2304), model(2304), disk=1e12)
    with pytest.raises(
        ConfigError, match=r"^sweep of 64 transcoders and .*: the training takes .* a GPU has 20 GB; .*sweep of 4"
    ):
        check_memory(large, make_plan(large, [Node(8, 2, gpu_memory=20e9)], 2304), model(2304), disk=1e12)
