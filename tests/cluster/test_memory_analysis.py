"""What the plan counts for the analysis, against what a pass over held-out text really holds."""

import math
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from cluster.memory import check_memory, transcoders_at_once
from cluster.memory_analysis import (
    analysis_bytes,
    analysis_driver,
    feature_actor,
    graph_bytes,
    graph_processes,
    most_at_once,
)
from cluster.resources import Node, make_plan
from mtc.analysis import HeldOutPass
from mtc.config import ConfigError, load_preset
from mtc.language_model import SitePair, pack_windows
from mtc.language_model.architectures import ModelInfo
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape


def model(d_model):
    return ModelInfo("llama", 30, d_model, None, 5000, 4 * d_model, 8, d_model, d_model, True)


def found_in_a_row(config, info):
    """Bytes of the affine map's sums, and of all else, that are found in one work unit with massive tokens."""
    rng, width = np.random.default_rng(0), info.d_model
    length = config.data.context_length
    ids = [rng.integers(0, info.num_ids, length) for _ in range(config.data.unit_tokens // length)]
    windows = pack_windows([one.astype(np.int32) for one in ids], [])
    transcoder = MatryoshkaTranscoder(TranscoderShape(width, width, config.transcoder.group_sizes, 8, "rms"), seed=0)
    pair = SitePair(*torch.randn(2, len(windows.input_ids), width))
    with torch.no_grad():
        z = transcoder.pre_activations(pair.source).flatten()
        transcoder.threshold.copy_(z.kthvalue(len(z) - config.transcoder.k * len(pair.source)).values)
        transcoder.massive_norm.fill_(1.5 * width**0.5)
    pair.target[::100] *= 10
    held = HeldOutPass(config, transcoder, np.ones(info.num_ids, np.int64), 2000, context_windows=np.arange(len(ids)))
    held.add(np.arange(len(ids)), windows, pair, np.arange(len(ids)), fold=0)
    sizes = {name: array.nbytes for name, array in held.arrays().items() if not name.startswith("sample")}
    line = sum(size for name, size in sizes.items() if name.startswith("line."))
    dense = sum(held.blocks._asdict()[name].nbytes for name in held.blocks._fields) + held.token_errors.nbytes
    return line, sum(sizes.values()) - line, dense


def test_the_plan_counts_what_the_analysis_of_many_layers_holds():
    """Against what a pass really holds; and how many layers go into one by what there is."""
    settings = {
        "model": {"layers": "0-29"}, "data": {"unit_tokens": 4096, "context_length": 64},
        "transcoder": {"group_sizes": [400, 600], "k": 8},
        "analysis": {"num_tokens": 65_536, "max_per_feature": 100, "samples_per_feature": 20, "context_tokens": 20},
    }  # fmt: skip
    config, info = load_preset("tiny", settings), model(192)
    need = analysis_bytes(config, info)
    line, found, dense = found_in_a_row(config, info)
    assert line <= need.line < 1.02 * line
    assert found <= need.found + need.counts < 2.5 * (found + dense)
    assert dense <= need.counts < 1.3 * dense
    assert need.rows == 16 and need.waiting == 0, "a unit each"
    longer = analysis_bytes(load_preset("tiny", settings | {"analysis": {"num_tokens": 10**6}}), info)
    assert longer.rows == -(-245 // 8) and longer.waiting == 1

    def at_once(memory, overrides=None, actors=2):
        config = load_preset("tiny", settings | (overrides or {}))
        plan = make_plan(config, [Node(2, 0, memory=memory)], info.d_model)._replace(num_model_actors=actors)
        return transcoders_at_once(config, plan, info)

    long = {"analysis": settings["analysis"] | {"num_tokens": 10**6}}
    longer = load_preset("tiny", settings | long)
    driver = analysis_driver(longer, info).main_bytes

    def actor(layers):
        return feature_actor(longer, info, False, layers).main_bytes

    assert at_once(driver + 2 * actor(30) + 1e6, long) == 30
    for layers in (12, 29):
        assert at_once(driver + 2 * actor(layers) + 1e6, long) == layers
    assert at_once(driver + actor(12) + 1e6, long, actors=1) == 12
    assert at_once(0, long) == 30, "of a node whose memory is not known"
    words = r"the analysis takes .*main memory \(.*2 x .*node has 2\.2 GB; it would fit with cluster.num_model_actors=1"
    with pytest.raises(ConfigError, match=words):
        at_once(2.2e9, long)
    on_gpu = [feature_actor(longer, info, True, layers).gpu_bytes for layers in (7, 8)]
    assert most_at_once(longer, info, True, math.inf, sum(on_gpu) / 2) == 7, "as a GPU has room for"
    assert most_at_once(longer, info, True, math.inf, 0.9 * feature_actor(longer, info, True, 1).gpu_bytes) == 0


def test_graphs_are_scored_by_as_many_processes_as_fit():
    config, info = load_preset("tiny", {"model": {"layers": "0-29"}}), model(512)
    need = graph_bytes(config, info)
    weights = 4 * (30 * 12 * 512**2 + 5000 * 512)
    assert weights < need < 2e9 + weights

    def processes(*memory):
        nodes = [Node(2, 0, memory=each) for each in memory]
        plan = make_plan(config, nodes, info.d_model)._replace(num_model_actors=4)
        return graph_processes(config, plan, info)

    assert [processes(need * n) for n in (0.9, 1.1, 3.5, 9)] == [0, 1, 3, 4]
    assert processes(need * 1.9, need * 2.9) == 3, "what is left over of two nodes is no place"
    assert processes(0) == 4, "of a node whose memory is not known"


def test_a_disk_without_room_for_what_waits_there_is_told_before_any_work(monkeypatch):
    config, info = load_preset("tiny", {"model": {"layers": "0-29"}}), model(4096)
    wanted = analysis_bytes(config, info).disk(30)
    assert wanted > 30 * 80 * 4096**2
    plan = make_plan(config, [Node(2, 0)], info.d_model)
    usage = namedtuple("usage", "total used free")
    for free in (wanted + 1, wanted - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        if free > wanted:
            assert transcoders_at_once(config, plan, info) == 30
            check_memory(config, plan, info)
        else:
            with pytest.raises(
                ConfigError, match=r"what is found of 30 transcoders waits on the driver's disk .* TMPDIR"
            ):
                transcoders_at_once(config, plan, info)
