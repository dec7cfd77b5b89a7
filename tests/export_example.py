"""Runs to export: random weights, and one that was analysed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtc.analysis import Findings, LogitEffects, features_to_parquet
from mtc.analysis.analyse import analyse
from mtc.analysis.contexts import SCHEMA
from mtc.analysis.examples import ExampleCollector
from mtc.analysis.massive import MassiveSums
from mtc.analysis.token_sums import SparseActivations
from mtc.config import RunConfig, load_preset, to_yaml
from mtc.language_model import pack_windows
from mtc.results import RunFacts
from mtc.storage import RunDirectory
from mtc.text import TokenTexts
from mtc.transcoder import MatryoshkaTranscoder, transcoder_shape
from tests.report_example import make_evaluation
from tests.strangers.tokenizers_as_they_come import named

BOS = 1
GROUPS, D = (16, 32, 16), 32  # of the tiny preset
F = sum(GROUPS)


def make_transcoder(config: RunConfig, seed: int = 0) -> MatryoshkaTranscoder:
    """Random weights, scales that are not 1, about a third of the features active."""
    transcoder = MatryoshkaTranscoder(transcoder_shape(config, D, D), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, size in (("W_dec", 0.2), ("b_enc", 1), ("b_dec", 1), ("W_skip", 0.1)):
            if getattr(transcoder, name) is not None:
                getattr(transcoder, name).normal_(generator=generator).mul_(size)
        transcoder.input_scale.fill_(0.37 if config.input_norm == "scalar" else 1)
        transcoder.target_scale.fill_(1.9)
        transcoder.threshold.fill_(0.5)
    return transcoder


def make_run(root: Path, norm: str = "rms", skip: bool = False, name: str = "one", **overrides: Any) -> RunDirectory:
    transcoder = {"input_norm": norm, "skip": skip} | overrides.pop("transcoder", {})
    config = load_preset("tiny", {"transcoder": transcoder, **overrides})
    run = RunDirectory(str(root / name))
    run.write("config.yaml", to_yaml(config))
    if len(config.model.sites) == 1:
        run.write("transcoder.safetensors", make_transcoder(config).to_bytes())
    members = config.members()
    for name, alone in members if len(members) > 1 else ():
        own = run.members()[name]
        own.write("config.yaml", to_yaml(alone))
        own.write("transcoder.safetensors", make_transcoder(alone, alone.model.layer).to_bytes())
        own.publish(latest=False)
    run.publish()
    return run


def analysed_run(root: Path) -> RunDirectory:
    """A run with examples of real collector output: 3 windows of 8 tokens; feature 7 never fires. Beside it
    lies the truth, truth.npz."""
    run = make_run(root, model={"name": "random:gemma2"}, data={"name": "OWNER/texts"})
    config, transcoder = run.config(), MatryoshkaTranscoder.load(run.location("transcoder.safetensors"))
    activations = np.random.default_rng(0).exponential(size=(3, 8, F)).astype(np.float32)
    activations[np.random.default_rng(1).random(activations.shape) < 0.6] = 0
    activations[:, :, 7] = 0
    ids = (np.arange(24).reshape(3, 8) + 60).astype(np.int32)
    ids[:, 0] = BOS
    collector = ExampleCollector(F, 2, 1, 4, 0.0)
    flat = activations[:, 1:].reshape(-1, F)
    feature, token = np.nonzero(flat.T)
    collector.add(np.arange(3), pack_windows(list(ids), [BOS]), SparseActivations(feature, token, flat[token, feature]))
    examples = collector.examples(
        lambda windows: ids[windows],
        [BOS],
        lambda windows: [f"doc{w}" for w in windows],
        TokenTexts(named(lambda t: f"<{chr(t)}>", 128)),
    )
    evaluation = make_evaluation([16, 48, 64], loss=False)
    evaluation = evaluation.model_copy(update={"tokens": 21, "fvu": [0.5, 0.4, 0.25], "l0": [1.0, 2, 3]})
    facts = RunFacts(
        run_id="one", steps=1, trained_tokens=100, data_name="texts", language_model_dtype="float32", devices=("cpu",),
        num_trainers=1, num_model_actors=1,
    )  # fmt: skip
    tops = (np.tile(np.arange(60, 70, dtype=kind), (F, 1)) for kind in ("i8", "f4") * 2)
    effects = LogitEffects(*tops, np.tile(np.arange(24, dtype=np.int32), (F, 1)))
    found = Findings(
        evaluation,
        collector.statistics,
        examples,
        np.zeros((128, 4)),
        1.0,
        MassiveSums.empty(128, F),
        None,
        None,
        effects,
        SCHEMA.empty_table(),
    )
    analysis, features = analyse(config, transcoder, found, [], facts)
    run.write("examples.parquet", examples.to_parquet())
    run.write("features.parquet", features_to_parquet(features))
    run.write("analysis.json", analysis.model_dump_json())
    run.publish()
    np.savez(root / "truth.npz", activations=activations, ids=ids)
    return run
