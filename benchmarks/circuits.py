"""Attribution graphs beside circuit-tracer's: the same edges, influence, scores and pruning, and what they take.

    python -m benchmarks.circuits [--json] [--save [DIR]] [--parts agreement,time,files] [--rounds N] [--run RUN]

circuit-tracer runs in an environment of its own (`make circuits-peer`, benchmarks/circuit_tracer_worker.py), on a model
of TransformerLens that is checked to give transformers' logits. Parts:

agreement  Tiny random models (Gemma 2, Llama) with random transcoders on every layer, with skip connection and without,
           which `mtc.export.write_circuit_tracer` exports. Every active feature is read. Differences are of the largest
           entry, of edges as they are and as shares of their readers' absolute sums. What circuit-tracer does
           otherwise and why is in DIFFERENCES.
time       Both on the same prompt of SmolLM2-135M, random transcoders of 1,024 features on all 30 layers, or with
           `--run` those of a run on all layers. In turn in processes of their own; ratios are of medians. `cpu` is the
           processor time of all threads, which others on the machine hardly change.
files      Only with `--run`, of an analysed run on all layers: its export with the features' files, and a graph's JSON,
           through the models of circuit-tracer's viewer; every feature of the graph is looked up.

Without `--save` nothing is written; with it, circuits-circuit-tracer.json in docs/benchmarks or DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mtc.circuits import ReplacementModel
from mtc.circuits.adjacency import Adjacency, Influence, prune, scores, shares_of
from mtc.circuits.attribution import attribute, attribute_whole
from mtc.circuits.edges import Traced
from mtc.circuits.graph import Whole
from mtc.config import ModelConfig, load_preset
from mtc.export import Subject, load_subject, write_circuit_tracer
from mtc.export.circuit_graph import circuit_graph
from mtc.language_model import LanguageModel, load_tokenizer, prepare_model
from mtc.storage import open_run
from mtc.transcoder import MatryoshkaTranscoder
from mtc.transcoder.shape import TranscoderShape

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = ROOT / ".venv-circuits/bin/python"
PROMPT = "The capital of the state is"
PARTS = ("agreement", "time", "files")
BATCHES = (16, 32, 64, 128)
"""Of circuit-tracer's backward passes; the fastest is used."""
DIFFERENCES = (
    "circuit-tracer takes no error and no feature at the first token, and lets a skip connection read it; here special "
    "tokens, which no transcoder is trained on, are all error. Edges from later tokens do not depend on that and are "
    "compared as they are; for the whole matrix, influence, scores and pruning the first token is treated as there.",
    "circuit-tracer's logits are before a soft cap; here the cap is held as a factor. The Gemma 2 that is compared has "
    "none but in the case that says so, of which the edges into features are compared.",
    "circuit-tracer's completeness counts errors and embeddings, which nothing flows into, as complete nodes; here "
    "only nodes with edges into them count. Both are given, and theirs is computed from our matrix too.",
)


class Case(NamedTuple):
    """A tiny model with random transcoders."""

    architecture: str
    skip: bool
    input_norm: str = "rms"
    """With rms circuit-tracer reads `ln2.hook_normalized`, otherwise `hook_resid_mid`."""
    softcap: float | None = None
    """Of logits."""

    @property
    def name(self) -> str:
        parts = [self.architecture, "skip" if self.skip else "no skip", self.input_norm]
        return ", ".join(parts + ["soft cap"] * (self.softcap is not None))


CASES = (
    Case("llama", skip=False), Case("llama", skip=True), Case("llama", skip=True, input_norm="scalar"),
    Case("gemma2", skip=False), Case("gemma2", skip=True), Case("gemma2", skip=True, softcap=30.0),
)  # fmt: skip


# Agreement -----------------------------------------------------------------------------------------------------------


def measure_agreement() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with peer() as ask:
        for case in CASES:
            with tempfile.TemporaryDirectory() as directory:
                found[case.name], versions = measure_case(ask, case, Path(directory))
            print(case.name, found[case.name])
    return {"cases": found, "versions": versions, "differences": DIFFERENCES}


def measure_case(ask: Any, case: Case, place: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures, and the versions that they are of."""
    model = tiny_model(case, place / "model")
    ids = model.window(PROMPT).input_ids.tolist()
    versions = hand_over(ask, model, subjects_of(model, case.input_norm), ids, place)
    ask(cmd="attribute", ids=ids, batch=128, out=str(place / "theirs.safetensors"))
    return compare(model, ids, load_file(place / "theirs.safetensors"), case.softcap is None), versions


class FirstTokenAsThere(Traced):
    """The first token as circuit-tracer has it: no error, no feature, and skip connections that read it."""

    def __init__(self, model: ReplacementModel, window: Any, prefix: int | None = None):
        super().__init__(model, window, prefix)
        self.taken = {
            layer: taken._replace(trained=torch.ones_like(taken.trained)) for layer, taken in self.taken.items()
        }
        for error in self.errors:
            error[0] = 0
        self._leaves, self._pass = self._with_gradients()


def whole_as_there(model: ReplacementModel, ids: list[int]) -> Whole:
    with mock.patch("mtc.circuits.attribution.Traced", FirstTokenAsThere):
        return attribute_whole(model, ids, max_features=10**6)


def compare(model: ReplacementModel, ids: list[int], theirs: dict[str, Tensor], with_logits: bool) -> dict[str, Any]:
    """Our graph of the ids and theirs; without `with_logits` only what flows into features."""
    ours, alike = attribute_whole(model, ids, max_features=10**6), whole_as_there(model, ids)
    n, tokens, layers = ours.adjacency.num_features, ours.adjacency.tokens, ours.adjacency.layers
    places = torch.stack([ours.adjacency.layer, ours.adjacency.token, ours.adjacency.feature], 1)
    if not torch.equal(places, theirs["features"]) or list(ours.targets) != theirs["logits"].tolist():
        raise RuntimeError("the graphs have different nodes")
    rows = torch.cat([theirs["adjacency"][:n], theirs["adjacency"][-len(ours.targets) :]])
    rows = rows[:, : n + (layers + 1) * tokens]
    used = slice(None) if with_logits else slice(n)
    later = torch.ones(rows.shape[1], dtype=torch.bool)
    later[n::tokens] = False
    about = {
        "features": n,
        "tokens": tokens,
        "layers": layers,
        "targets": len(ours.targets),
        "edges": int(torch.count_nonzero(rows)),
        "activations": difference(ours.adjacency.activation, theirs["activation"]),
        "probabilities": difference(ours.adjacency.weights, theirs["probabilities"]),
        "edges_from_later_tokens": difference(ours.adjacency.edges[used][:, later], rows[used][:, later]),
        "edges_as_there": difference(alike.adjacency.edges[used], rows[used]),
        "shares_as_there": difference(shares_of(alike.adjacency.edges)[used], shares_of(rows)[used]),
    }
    return about | (compare_scores(ours, alike, theirs) if with_logits else {})


def compare_scores(ours: Whole, alike: Whole, theirs: dict[str, Tensor]) -> dict[str, Any]:
    found, reach = alike.adjacency, alike.influence
    columns, targets = found.edges.shape[1], len(alike.targets)
    pruned = prune(found, reach, 0.8, 0.98)
    there = theirs["edges"]
    edges = torch.cat([there[: found.num_features], there[-targets:]])[:, :columns]
    replacement, completeness = theirs["scores"].tolist()
    own = scores(ours.adjacency, ours.influence)
    same = scores(found, reach)
    return {
        "influence_as_there": difference(reach.nodes, theirs["influence"][:columns]),
        "nodes_kept": {"ours": int(pruned.nodes.sum()), "theirs": int(theirs["nodes"][:columns].sum()),
                       "both": int((pruned.nodes & theirs["nodes"][:columns]).sum())},
        "edges_kept": {"ours": int(pruned.edges.sum()), "theirs": int(edges.sum()),
                       "both": int((pruned.edges & edges).sum())},
        "replacement": {"ours": own.replacement, "ours_as_there": same.replacement, "theirs": replacement},
        "completeness": {"ours": own.completeness, "ours_as_there": same.completeness, "theirs": completeness,
                         "theirs_from_our_matrix": completeness_as_there(found, reach)},
    }  # fmt: skip


def completeness_as_there(found: Adjacency, reach: Influence) -> float:
    """Nodes that nothing flows into count as complete."""
    n, errors = found.num_features, found.layers * found.tokens
    not_error = 1 - reach.shares[:, n : n + errors].sum(1)
    without_edges = reach.nodes[n:].sum()
    return float(((not_error * reach.readers).sum() + without_edges) / (reach.readers.sum() + without_edges))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, of the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Time ----------------------------------------------------------------------------------------------------------------


def measure_time(rounds: int, run: str | None) -> dict[str, Any]:
    torch.set_num_threads(2)
    model, subjects = from_run(run) if run else smollm2()
    ids = model.window(PROMPT).input_ids.tolist()
    spent: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as directory, peer() as ask:
        versions = hand_over(ask, model, subjects, ids, Path(directory))
        out = Path(directory) / "theirs.safetensors"
        ask(cmd="attribute", ids=ids, batch=BATCHES[0], out=str(out))
        agreement = compare(model, ids, load_file(out), with_logits=True)
        print(agreement)
        first = {batch: ask(cmd="attribute", ids=ids, batch=batch, out=None) for batch in BATCHES}
        batch = min(first, key=lambda each: first[each]["cpu_seconds"])
        for _ in range(rounds):
            spent["ours"].append(time_ours(model, ids))
            spent["theirs"].append(ask(cmd="attribute", ids=ids, batch=batch, out=None))
            print({name: times[-1] for name, times in spent.items()})
    medians = {
        name: {unit: statistics.median(each[unit] for each in times) for unit in times[0]}
        for name, times in spent.items()
    }
    return {
        "model": model.model.config.name,
        "transcoders": "a run's" if run else "random",
        "agreement": agreement,
        "rounds": rounds,
        "batch": batch,
        "batches": {str(each): spent_there["cpu_seconds"] for each, spent_there in first.items()},
        "medians": medians,
        "all": spent,
        "ratio": medians["ours"]["seconds"] / medians["theirs"]["seconds"],
        "cpu_ratio": medians["ours"]["cpu_seconds"] / medians["theirs"]["cpu_seconds"],
        "versions": versions,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
    }


def time_ours(model: ReplacementModel, ids: list[int]) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    attribute_whole(model, ids, max_features=10**6)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


# Files ---------------------------------------------------------------------------------------------------------------


def check_files(url: str) -> dict[str, Any]:
    """Numbers of what circuit-tracer's models accepted. Raises RuntimeError if they refuse something."""
    members = list(open_run(url).members().values())
    with tempfile.TemporaryDirectory() as directory, peer() as ask:
        place = Path(directory)
        write_circuit_tracer([load_subject(own) for own in members], place, members)
        graph = attribute(ReplacementModel.load(url), PROMPT)
        (place / "graph.json").write_text(json.dumps(circuit_graph(graph, "graph")))
        size = sum(file.stat().st_size for file in (place / "features").iterdir())
        found: dict[str, Any] = ask(cmd="check", graph=str(place / "graph.json"), features=str(place / "features"))
    return found | {"layers": len(members), "bytes": size}


# Models --------------------------------------------------------------------------------------------------------------


def tiny_model(case: Case, directory: Path) -> ReplacementModel:
    """Four layers; an epsilon as in our transcoders' norm."""
    shape = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 64, "vocab_size": 259, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    if case.architecture == "gemma2":
        shape |= {"query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": case.softcap}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.architecture, **shape), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = 0.2 * torch.randn(parameter.shape)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    made.save_pretrained(directory)
    load_tokenizer(ModelConfig(name=f"random:{case.architecture}", layer=0)).save_pretrained(directory)
    config = ModelConfig(name=str(directory), dtype="float32", layer=0)
    about = {"group_sizes": (16, 32), "k": 8, "skip": case.skip, "input_norm": case.input_norm}
    return with_random_transcoders(config, about, threshold=0.2)


def smollm2() -> tuple[ReplacementModel, list[Subject]]:
    config = load_preset("smollm2-135m").model.model_copy(update={"dtype": "float32"})
    about = {"group_sizes": (1024,), "k": 16, "skip": True, "input_norm": "rms"}
    # About 16 features at a token: of 1,024 Gaussian pre-activations as many are above 2.15.
    model = with_random_transcoders(config, about, threshold=2.15)
    return model, subjects_of(model, "rms")


def with_random_transcoders(config: ModelConfig, about: dict[str, Any], threshold: float) -> ReplacementModel:
    """Rows of W_enc give pre-activations of variance about 1 where the source is divided by its root mean square."""
    language_model = LanguageModel(config, full=True)
    width, transcoders = language_model.d_model, {}
    for layer in range(language_model.model.config.num_hidden_layers):
        transcoder = MatryoshkaTranscoder(TranscoderShape(d_source=width, d_target=width, **about), seed=layer)
        generator = torch.Generator().manual_seed(layer)
        with torch.no_grad():
            for name, value in transcoder.named_parameters():
                scale = width**-0.5 if name in ("W_enc", "W_dec", "W_skip") else 0.1
                value.copy_(scale * torch.randn(value.shape, generator=generator))
            transcoder.threshold.fill_(threshold)
            transcoder.target_scale.fill_(2.0)
            transcoder.input_scale.fill_(0.5 if about["input_norm"] == "scalar" else 1.0)
        transcoders[layer] = transcoder
    return ReplacementModel(language_model, transcoders, load_tokenizer(config))


def subjects_of(model: ReplacementModel, input_norm: str) -> list[Subject]:
    """What the export of a run with these transcoders begins with."""
    found = []
    for layer, transcoder in sorted(model.transcoders.items()):
        sections = {
            "model": {"name": model.model.config.name, "layer": layer},
            "transcoder": {"input_norm": input_norm},
        }
        config = load_preset("tiny", sections)
        kind = model.model.model.config.model_type
        found.append(Subject("random", config, transcoder, kind, transcoder.num_features))
    return found


def from_run(url: str) -> tuple[ReplacementModel, list[Subject]]:
    run = open_run(url)
    return ReplacementModel.load(run), [load_subject(own) for own in run.members().values()]


# The peer ------------------------------------------------------------------------------------------------------------


@contextmanager
def peer() -> Iterator[Any]:
    """A function that gives orders to circuit-tracer's process, as keywords, and returns its answer."""
    if not PEER_PYTHON.exists():
        raise SystemExit("circuit-tracer's environment is missing: make circuits-peer")
    process = subprocess.Popen(
        [str(PEER_PYTHON), "benchmarks/circuit_tracer_worker.py"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout

    def ask(**order: Any) -> dict[str, Any]:
        print(json.dumps(order), file=process.stdin, flush=True)
        if not (line := process.stdout.readline()):
            raise RuntimeError("circuit-tracer's process ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def hand_over(
    ask: Any, model: ReplacementModel, subjects: list[Subject], ids: list[int], place: Path
) -> dict[str, str]:
    """Make circuit-tracer's model of the same weights; the versions of what it runs on."""
    (place / "transcoders").mkdir()
    write_circuit_tracer(subjects, place / "transcoders")
    frozen = model.model.freeze(model.window(ids))
    save_file({"logits": model.model.read_out().logits(frozen.real.final[-1]).detach()}, place / "logits.safetensors")
    versions: dict[str, str] = ask(
        cmd="make",
        model=prepare_model(model.model.config),
        transcoders=str(place / "transcoders"),
        ids=ids,
        logits=str(place / "logits.safetensors"),
    )["versions"]
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the last line")
    parser.add_argument("--save", nargs="?", const=str(ROOT / "docs/benchmarks"), metavar="DIR")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="of each, for the time")
    parser.add_argument("--run", help="a run with a transcoder on every layer, for time and files")
    arguments = parser.parse_args()
    results, sys.stdout = sys.stdout, sys.stderr if arguments.json else sys.stdout
    found: dict[str, Any] = {}
    parts = arguments.parts.split(",")
    if "agreement" in parts:
        found["agreement"] = measure_agreement()
    if "time" in parts:
        found["time"] = measure_time(arguments.rounds, arguments.run)
    if "files" in parts and arguments.run:
        found["files"] = check_files(arguments.run)
    if arguments.save:
        target = Path(arguments.save) / "circuits-circuit-tracer.json"
        saved = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps(saved | found, indent=1) + "\n")
    print(json.dumps(found), file=results)


if __name__ == "__main__":
    main()
