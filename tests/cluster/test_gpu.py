"""What is written for GPUs, as far as a machine without one can tell: on the CPU with the branches of GPUs, and on
torch's meta device, which refuses what would wait for a device or mix two."""

from contextlib import contextmanager
from unittest.mock import MagicMock

import pyarrow as pa
import pytest
import ray
import torch
from torch.distributed.distributed_c10d import Backend, BackendConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster import activations, gpus, stream
from cluster.activations import activation_dataset
from cluster.gpus import check_devices, on_one_gpu
from cluster.resources import Node, make_plan
from mtc import devices
from mtc.config import ConfigError, load_preset
from mtc.devices import DeviceError, open_device, used_on
from mtc.language_model import Capture, attention, flex, pack_windows
from mtc.training import ShuffleBuffer, Trainer, Unit, Upload, backends, on_device
from mtc.training.backends import MeasuredStep, choose_backend
from mtc.transcoder import distributed
from mtc.transcoder.products import LONGEST_PIECE, bag_sums, make_bags


@pytest.fixture
def pretending(monkeypatch):
    monkeypatch.setattr(devices, "PRETENDING", True)


# Devices --------------------------------------------------------------------------------------------------------------


def test_a_gpu_that_torch_does_not_see_is_an_error_that_says_what_to_look_at(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "PRETENDING", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"build without CUDA, sees none \(CUDA_VISIBLE_DEVICES=3\): install"):
        open_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match=r"built for CUDA 13\.0, sees none .*: `nvidia-smi` tells"):
        open_device("cuda")
    assert open_device("cpu") == torch.device("cpu")


def test_memory_of_the_host_can_not_be_kept_for_a_stream_of_a_gpu():
    with pytest.raises(ValueError, match="a tensor on cpu was used on a GPU's stream"):
        used_on(torch.zeros(0), object())


# The training step ----------------------------------------------------------------------------------------------------


def meta_trainer(backend, precision, dead):
    overrides = {"transcoder": {"k": 4, "aux_k": 6}}
    overrides["optimizer"] = {"batch_tokens": 64, "precision": precision, "backend": backend, "warmup_steps": 1}
    trainer = Trainer(load_preset("tiny", overrides), 12, 10, "meta")
    trainer.optimizer.step = lambda: None  # torch has no fused Adam there
    trainer._find_dead = lambda found: None  # which looks at the device on purpose, at every eighth step
    trainer.dead_index = torch.zeros(dead, dtype=torch.int64, device="meta")
    return trainer


class OneDevice(TorchDispatchMode):
    """Raises where an operation takes tensors of the host and of the device, but for numbers, or copies one there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        given = {x.device.type for x in tensors}
        result = func(*args, **(kwargs or {}))
        made = {x.device.type for x in tree_leaves(result) if torch.is_tensor(x)}
        if len(given | made) > 1:
            raise RuntimeError(f"{func} takes {given} and makes {made}")
        return result


def test_two_devices_in_one_operation_are_noticed():
    on_host, there = torch.arange(3), torch.zeros(3, device="meta")
    for mixed in (lambda: on_host.to("meta"), lambda: there[on_host], lambda: there + on_host):
        with pytest.raises(RuntimeError), OneDevice():
            mixed()


@pytest.mark.parametrize("dead", [0, 7])
@pytest.mark.parametrize(
    ("backend", "precision"), [("sparse", "float32"), ("sparse", "bfloat16"), ("dense", "float32")]
)
def test_a_step_neither_waits_for_the_device_nor_leaves_it(pretending, backend, precision, dead):
    trainer = meta_trainer(backend, precision, dead)
    for tokens in (64, 64, 40):  # the last batch is shorter
        source, target = torch.randn(tokens, 12, device="meta"), torch.randn(tokens, 10, device="meta")
        with OneDevice():
            result = trainer.step(source, target)
        assert result.loss_and_l0().device.type == "meta"
    assert all(p.grad.device.type == "meta" for p in trainer.transcoder.parameters())


def test_the_meta_device_does_refuse_what_waits(pretending):
    """So that the test above can fail."""
    trainer = meta_trainer("sparse", "float32", 3)
    devices.PRETENDING = False  # the choice of CPUs looks at what it has found
    with pytest.raises(RuntimeError, match="meta"):
        trainer.step(torch.randn(64, 12, device="meta"), torch.randn(64, 10, device="meta"))


def test_long_bags_are_cut_into_pieces_that_add_up(pretending):
    """Among them one of a feature that is always on, empty ones, and none at all."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([0, 4096, 1, 0, 0, LONGEST_PIECE, LONGEST_PIECE + 1, 37, 0])
    for counts in (lengths, lengths * 0, lengths[1:2]):
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        entries = int(offsets[-1])
        index = torch.randint(300, (entries,), generator=generator)
        weight = torch.randn(entries, generator=generator, dtype=torch.float64)
        bags = make_bags(offsets, entries)
        assert bags.pieces is not None and bags.first is not None
        assert int(bags.pieces.diff().max()) <= LONGEST_PIECE and int(bags.pieces.diff().min()) >= 0
        assert int(bags.pieces[-1]) == entries
        sums = bag_sums(table, index, weight, bags)
        bag = torch.repeat_interleave(torch.arange(len(counts)), counts)
        expected = torch.zeros(len(counts), 5, dtype=torch.float64).index_add(0, bag, weight[:, None] * table[index])
        torch.testing.assert_close(sums, expected)
        assert torch.equal(sums, bag_sums(table, index, weight, bags))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_what_is_not_finite_stays_in_its_window(monkeypatch, bad, softcap):
    """One token of the second of four windows: whoever sees it is not finite either, whoever does not is untouched."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled_flex", lambda: flex_attention)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 16, generator=generator) for heads in (4, 2, 2))
    windows = attention.Windows([60, 100, 37, 103], kernel=flex.Kernel())
    token = 60 + 40
    clean, _ = attention.attend(None, q, k, v, None, softcap=softcap, windows=windows)
    v[0, :, token, 3] = bad
    out, _ = attention.attend(None, q, k, v, None, softcap=softcap, windows=windows)
    finite = out.isfinite().all(-1).all(-1)[0]
    assert (~finite).nonzero().squeeze(1).tolist() == list(range(token, 160))
    torch.testing.assert_close(out[0, finite], clean[0, finite], rtol=0, atol=0)


# Which backend --------------------------------------------------------------------------------------------------------


def test_auto_takes_what_was_measured_on_this_gpu_near_this_shape():
    steps = (
        MeasuredStep("H", 4608, 1024, "sparse", True, 2.0),
        MeasuredStep("H", 4608, 1024, "dense", True, 0.5),  # rounds every product: not the same result
        MeasuredStep("H", 4608, 1024, "dense", False, 3.0),
        MeasuredStep("H", 1024, 1024, "sparse", True, 1.5),
        MeasuredStep("H", 1024, 1024, "dense", False, 0.9),
    )
    backend, why = choose_backend("H", 4608, 1024, True, steps)
    assert (backend, why) == ("sparse", "H, 4,608 features, 1,024 tokens: dense 3.00 ms, sparse 2.00 ms")
    assert choose_backend("H", 1152, 1024, True, steps)[0] == "dense"
    alone = (*steps, MeasuredStep("H", 4608, 2048, "dense", False, 0.1))  # beside which nothing was measured
    assert choose_backend("H", 4608, 2048, True, alone)[1] == why
    for device, features, tokens in (("A", 4608, 1024), ("H", 65536, 1024), ("H", 4608, 8192)):
        backend, why = choose_backend(device, features, tokens, True, steps)
        assert backend == "sparse" and f"no step was measured on {device} near this shape" in why
    assert all(isinstance(step, MeasuredStep) for step in backends.measured_steps())


def test_auto_times_nothing_and_the_record_says_why(pretending):
    config = load_preset("tiny", {"optimizer": {"batch_tokens": 64, "backend": "auto", "precision": "bfloat16"}})
    trainer = Trainer(config, 12, 12)
    assert trainer.describe_compute() == "not chosen yet"
    x, y = torch.randn(64, 12), torch.randn(64, 12)
    trainer.initialise(x, y)
    trainer.step(x, y)
    assert trainer.compute == ("sparse", True) and not trainer.compute_timings
    expected = "sparse on cpu (auto: no step was measured on cpu near this shape; one product instead of five)"
    assert trainer.describe_compute() == expected
    again = Trainer(config, 12, 12)
    again.load_state_dict(trainer.state_dict())
    assert again.describe_compute() == "sparse on cpu (auto: as the run began)"


# The way of the activations -------------------------------------------------------------------------------------------


def test_a_unit_without_windows_lies_on_the_models_device(pretending):
    """What only holds a place in the order is copied to the host like any other, from where the model is."""

    class Model:
        device = torch.device("meta")

        def flops(self, lengths):
            return 0.0

    capture, seen = Capture(Model()), []
    capture._to_host = lambda tensors: (seen.extend(tensors), (tensors, None))[1]
    pending = capture.start(pack_windows([], []))
    assert [tensor.device.type for tensor in seen] == ["meta"]
    assert pending.activations == {} and pending.positions == 0


def test_uploaded_units_are_the_units_and_the_thread_ends(pretending):
    sizes = {(0, "resid_mid"): 4, (0, "mlp_out"): 3}
    made = [Unit(n, {key: torch.randn(5 + 7 * n % 11, d) for key, d in sizes.items()}, None, 0) for n in range(12)]
    with on_device(iter(made), torch.device("cpu")) as units:
        assert isinstance(units, Upload)
        for expected, unit in zip(made, units, strict=True):
            assert unit.number == expected.number
            assert unit.activations.keys() == expected.activations.keys()
            for key, rows in expected.activations.items():
                got = unit.activations[key]
                assert torch.equal(got, rows) and got.data_ptr() != rows.data_ptr()

    def failing():
        yield made[0]
        raise OSError("the stream broke")

    with on_device(failing(), torch.device("cpu")) as units:
        next(units)
        with pytest.raises(OSError, match="the stream broke"):
            next(units)


def test_rows_that_leave_the_shuffle_buffer_survive_what_comes_next(pretending):
    """Slots of pinned memory are used again while units are on their way."""
    import numpy as np

    made = []
    for n in range(9):
        rows = torch.arange(6 * n, 6 * n + 6).float().unsqueeze(1).expand(6, 4).contiguous()
        made.append(Unit(n, {(0, "resid_mid"): rows}, np.arange(6, dtype=np.int32), 6))
    buffer, seen = ShuffleBuffer(24, [0]), []
    with on_device(iter(made), torch.device("cpu")) as units:
        for unit in units:
            buffer.add(unit)
            seen += buffer.take(buffer.available).activations[0, "resid_mid"][:, 0].tolist() if buffer.available else []
    buffer.close()
    seen += buffer.take(buffer.available).activations[0, "resid_mid"][:, 0].tolist()
    assert sorted(seen) == list(range(54))


def test_model_actors_are_given_eight_units_at_a_time(monkeypatch):
    """At the end of a task the GPU has nothing to do until the next one begins."""
    import numpy as np

    given = []
    monkeypatch.setattr(activations, "map_on_model_actors", lambda rows, *_, **__: given.append(rows))
    config, units = load_preset("gemma-2-2b-layer17"), np.arange(900)
    plan = make_plan(config, [Node(16, 4)], 2304)
    activation_dataset(config, plan, "store", units)
    activation_dataset(config, plan, "store", units[:25])
    assert [len(row) for row in given[0]] == [8] * 112 + [4]
    assert [len(row) for row in given[1]] == [2] * 12 + [1], "few units are shared by all actors"
    assert given[0][0].schema == pa.schema([("unit", pa.int64())])
    assert [n for row in given[0] for n in row["unit"].to_pylist()] == list(range(900))


def test_processes_on_gpus_get_what_they_need_to_share_a_node():
    plan = make_plan(load_preset("gemma-2-2b-layer17"), [Node(64, 8)], 2304)
    environment = plan.worker_environment
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == str(64 // 7)
    together = plan._replace(environment=(("CUDA_MPS_PIPE_DIRECTORY", "/tmp/x"),))
    assert together.worker_environment["CUDA_MPS_PIPE_DIRECTORY"] == "/tmp/x"
    on_cpus = make_plan(load_preset("tiny"), [Node(2, 0)]).worker_environment
    assert not {"PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"} & set(on_cpus)


def test_model_actors_go_to_the_only_trainers_node_while_it_has_room():
    plan = make_plan(load_preset("tiny"), [Node(64, 8)] * 2, 32)
    assert plan.actor_placement == {}
    near = {"label_selector": {"ray.io/node-id": "a"}}
    assert plan._replace(near="a").actor_placement == near | {"fallback_strategy": [{"label_selector": {}}]}
    off_head = {"label_selector": {"ray.io/node-id": "!head"}}
    assert plan._replace(not_on="head").actor_placement == off_head
    assert plan._replace(not_on="head", near="a").actor_placement == near | {"fallback_strategy": [off_head]}


def test_mps_is_refused_where_no_gpu_is_shared(ray_cluster):
    config, here = load_preset("tiny", {"cluster": {"mps": True}}), ray.get_runtime_context().get_node_id()
    for nodes in ([Node(2, 0, node_id=here)], [Node(8, 4, node_id=here)], [Node(2, 1, node_id="other")]):
        with pytest.raises(ConfigError, match=r"cluster\.mps is true, but no two processes share a GPU of the node"):
            check_devices(config, make_plan(config, nodes, 32))


def test_processes_get_what_mps_needs_and_only_while_it_runs(monkeypatch):
    """From the daemon through the plan, also the one that is made anew for the stream at every start."""
    wanted, running = [], []

    @contextmanager
    def shared_gpu(asked):
        wanted.append(asked)
        running.append(True)
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/pipes"} if asked else {}
        running.pop()

    monkeypatch.setattr(gpus, "shared_gpu", shared_gpu)
    nodes = [Node(8, 1, node_id="a")]
    config = load_preset("tiny", {"cluster": {"mps": True}})
    plan = make_plan(config, nodes, 32)
    with on_one_gpu(config, plan) as together:
        assert running and together.runtime_env["env_vars"]["CUDA_MPS_PIPE_DIRECTORY"] == "/pipes"
        used = []
        monkeypatch.setattr(stream, "configure_data_context", lambda seconds: None)
        monkeypatch.setattr(stream, "remaining_units", lambda *_: [])
        monkeypatch.setattr(stream, "cluster_nodes", lambda: nodes)
        monkeypatch.setattr(stream.ray, "get", lambda reference, timeout: "")
        monkeypatch.setattr(stream, "activation_dataset", lambda config, plan, *_: used.append(plan) or MagicMock())
        stream.StreamConfig(config, together, "run", "store", 32, MagicMock()).configure({}, 1, None, ["a"])
        assert (used[0].environment, used[0].near) == (together.environment, "a")
    assert not running
    with on_one_gpu(load_preset("tiny"), plan) as same:
        assert same == plan
    assert wanted == [True, False]


def test_a_cluster_whose_gpus_torch_does_not_see_is_refused_before_any_work(ray_cluster, monkeypatch):
    """A build of torch without CUDA on machines with GPUs, or an old driver: here the tests' own torch and machine."""
    tiny, here = load_preset("tiny"), ray.get_runtime_context().get_node_id()
    plan = make_plan(tiny, [Node(2, 1, node_id=here)], 32)
    with pytest.raises(ConfigError, match=r"node \w{8}: this process was given a GPU, but torch .* sees none"):
        check_devices(tiny, plan._replace(actor_gpus=0))  # this Ray has none to give
    check_devices(tiny, make_plan(tiny, [Node(2, 0, node_id=here)], 32))


def test_gpus_that_others_have_are_waited_for_by_ray(ray_cluster, monkeypatch, caplog):
    monkeypatch.setattr(gpus, "FREE_SECONDS", 0)
    tiny, here = load_preset("tiny"), ray.get_runtime_context().get_node_id()
    plan = make_plan(tiny, [Node(2, 1, node_id=here)], 32)
    check_devices(tiny, plan._replace(actor_gpus=0))  # no process answers at once
    assert f"node {here[:8]}: no GPU came free within 0 s" in caplog.text


def test_hosts_agree_without_their_gpus(monkeypatch):
    monkeypatch.setattr(devices, "PRETENDING", False)
    by_device = BackendConfig(Backend(distributed.backend("cuda"))).get_device_backend_map()
    assert (by_device["cpu"], by_device["cuda"]) == ("gloo", "nccl")
    assert BackendConfig(Backend(distributed.backend("cpu"))).get_device_backend_map()["cpu"] == "gloo"
