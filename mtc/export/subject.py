"""What every export begins with: a run's transcoder, one of its prefixes, and its weights without our scales.

Our transcoders scale their inputs and targets themselves. Other libraries' do not, so scalars are folded into the
weights; the per-token `rms` norm cannot be, and such a transcoder is exported for a hook point where the language model
has divided by the root mean square already, or for a library that divides itself.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtc.config import RunConfig
from mtc.errors import MtcError
from mtc.language_model import MODULES, ModelError, check_model
from mtc.results import Analysis
from mtc.storage import RunDirectory, absolute, load_analysis, require_one_layer
from mtc.transcoder import RMS_EPS, MatryoshkaTranscoder, load_transcoder


class ExportError(MtcError):
    """The run cannot be written in this format, or not there; the message says why and what can be done."""


class Subject(NamedTuple):
    """What an export writes: one transcoder, one of its prefixes, and what is known of them."""

    run_id: str
    """Name of the run."""
    config: RunConfig
    """Configuration that the transcoder was trained with, of one layer."""
    transcoder: MatryoshkaTranscoder
    """Trained transcoder with all of its features, exported or not."""
    model_type: str
    """Architecture of the language model, a key of `mtc.language_model.architectures.MODULES`."""
    prefix: int
    """Number of features that are exported: one of the nested dictionaries."""
    analysis: Analysis | None = None
    """Analysis of the run on held-out text; None if the run was never analysed."""
    license: str | None = None
    """Licence identifier for the model card."""
    imported: bool = False
    """The weights were trained elsewhere, on a text that the configuration does not name."""
    contact: str | None = None
    """Whom to ask, for the model card."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Numbers of features of the groups inside the exported prefix."""
        sizes = self.transcoder.shape.group_sizes
        return sizes[: self.transcoder.prefixes.index(self.prefix) + 1]

    @property
    def layer(self) -> int:
        return self.config.model.layer

    @property
    def input_norm(self) -> str:
        return self.transcoder.shape.input_norm


class PlainWeights(NamedTuple):
    """Weights for y = JumpReLU(x W_enc^T + b_enc) W_dec + b_dec (+ x W_skip^T), float32, contiguous.

    x and y are raw activations, except that for `input_norm: rms` x has a root mean square of 1.
    """

    W_enc: Tensor
    """[features, d_source] float32, encoder rows."""
    b_enc: Tensor
    """[features] float32, encoder biases."""
    W_dec: Tensor
    """[features, d_target] float32, decoder rows."""
    b_dec: Tensor
    """[d_target] float32, decoder bias."""
    threshold: Tensor
    """[features] float32, at least 0: a feature is active where its pre-activation is larger."""
    W_skip: Tensor | None
    """[d_target, d_source] float32, skip connection; None without one."""


class Hooks(NamedTuple):
    """Where the exported transcoder reads and writes, in TransformerLens's names and in those of transformers."""

    source: str
    """TransformerLens's hook inside the block where the transcoder reads, such as `hook_resid_mid`."""
    target: str
    """TransformerLens's hook inside the block where the transcoder writes, `hook_mlp_out`."""
    source_module: str | None
    """Module of transformers whose input or output the transcoder reads, such as
    `model.layers.9.post_attention_layernorm.input`; None if no module reads or returns exactly that."""
    target_module: str
    """Module of transformers whose output the transcoder replaces, such as `model.layers.9.mlp.output`."""

    def full(self, layer: int) -> tuple[str, str]:
        """TransformerLens's hooks of source and target with the block's name: `blocks.9.hook_resid_mid`."""
        return f"blocks.{layer}.{self.source}", f"blocks.{layer}.{self.target}"


def load_subject(
    run: RunDirectory,
    prefix: int | None = None,
    model_type: str | None = None,
    license: str | None = None,
    contact: str | None = None,
) -> Subject:
    """The transcoder of a finished run, or one of its several.

    `model_type` is found from the model's configuration where it is None, which needs the model or a hub. Raises
    ExportError for an unknown prefix, a threshold that was never set or a model that is needed and can't be had,
    RunError for a run of several transcoders or an analysis of another version.
    """
    require_one_layer(run)
    config, transcoder = run.config(), load_transcoder(run)
    if bool(transcoder.threshold.isnan().any()):
        raise ExportError(f"{run.url}: the transcoder's threshold was never calibrated")
    if prefix is not None and prefix not in transcoder.prefixes:
        raise ExportError(f"--prefix {prefix} is not one of the nested dictionaries {list(transcoder.prefixes)}")
    if model_type is not None and model_type not in MODULES:
        raise ExportError(f"--model-type {model_type} is unknown; known: {', '.join(sorted(MODULES))}")
    try:
        model_type = model_type or check_model(config.model).model_type
    except ModelError as error:
        raise ExportError(f"{error}\nor name the model's architecture with --model-type") from None
    analysis = load_analysis(run) if run.exists("analysis.json") else None
    return Subject(
        run_id=run.run_id,
        config=config,
        transcoder=transcoder,
        model_type=model_type,
        prefix=prefix or transcoder.num_features,
        analysis=analysis,
        license=license,
        imported=run.exists("import.json"),
        contact=contact,
    )


def plain_weights(subject: Subject) -> PlainWeights:
    """The prefix's weights with `input_scale` and `target_scale` folded in; computed in float64, stored in float32.

    Raises ExportError for an activation function without thresholds, which no format of weights here has for
    transcoders.
    """
    t, m = subject.transcoder, subject.prefix
    if t.activation.thresholds == "none":
        raise ExportError(
            f"transcoder.activation={t.shape.activation}: features have no thresholds but compete for the k places of "
            "a token, and no transcoder of SAELens, circuit-tracer or Gemma Scope does that; use neuronpedia"
        )
    into = t.input_scale.double() if t.shape.input_norm == "scalar" else torch.ones((), dtype=torch.float64)
    out = 1 / t.target_scale.double()

    def stored(tensor: Tensor) -> Tensor:
        return tensor.detach().float().contiguous().clone()

    return PlainWeights(
        W_enc=stored(t.W_enc[:m].double() * into),
        b_enc=stored(t.b_enc[:m]),
        W_dec=stored(t.W_dec[:m].double() * out),
        b_dec=stored(t.b_dec.double() * out),
        # Ours are ReLUs with a threshold, so one below 0 acts like 0; others' without the ReLU need the 0.
        threshold=stored(t.threshold.expand(t.num_features)[:m].clamp(min=0)),
        W_skip=None if t.W_skip is None else stored(t.W_skip.double() * into * out),
    )


def find_hooks(subject: Subject, normalised: bool) -> Hooks:
    """Hook points of the source and the target; `normalised` for the source divided by its root mean square.

    Raises ExportError where the architecture has no such point.
    """
    kind, site, modules = subject.model_type, subject.config.model.source, MODULES[subject.model_type]
    base = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(kind, "model.")
    block = f"{base}{modules.layers}.{subject.layer}"
    target_module = f"{block}.{modules.mlp_out}.output"
    if site == "resid_mid" and kind == "gpt_neox":
        raise ExportError(
            f"model.source=resid_mid of a {kind} model: its blocks run attention and MLP in parallel, and no other "
            "library has a hook for the sum that we call resid_mid"
        )
    if normalised:
        if site != "resid_mid" or kind == "gpt2":
            raise ExportError(
                f"transcoder.input_norm=rms with model.source={site} of a {kind} model: nowhere in it is exactly "
                "this divided by its root mean square, and this format cannot divide itself"
            )
        return Hooks("ln2.hook_normalized", "hook_mlp_out", None, target_module)
    if site == "resid_mid":
        return Hooks("hook_resid_mid", "hook_mlp_out", f"{block}.{modules.norm}.input", target_module)
    return Hooks("mlp.hook_in", "hook_mlp_out", f"{block}.{modules.norm}.output", target_module)


def describe_norm(subject: Subject, normalised: bool, divides_itself: bool = False) -> str:
    """One paragraph for a model card: what is fed, and where it differs from the run's own transcoder."""
    site = subject.config.model.source
    if subject.input_norm != "rms":
        return (
            f"It reads raw `{site}` and returns raw `mlp_out`: the run's scale factors are folded into the weights, "
            "exactly up to float32 rounding."
        )
    if divides_itself:
        return (
            f"It reads raw `{site}`; the library divides every token by its root mean square, as the run's "
            f"transcoder does. That one adds {RMS_EPS:g} to the mean square first and the library adds nothing, so "
            f"inputs differ by {RMS_EPS / 2:g} / (mean square) of themselves."
        )
    if not normalised:
        raise ValueError("a transcoder that normalises reads what is not normalised: who divides?")
    return (
        f"It reads `{site}` divided by its root mean square, before the norm's gain, not raw `{site}`: the hook point "
        f"`ln2.hook_normalized`. The run's transcoder adds {RMS_EPS:g} to the mean square before it divides, the "
        "language model its own epsilon (1e-6 in Gemma, 1e-5 in most others), so inputs differ by "
        "(difference of the two) / 2 / (mean square) of themselves."
    )


@contextmanager
def new_directory(path: str) -> Iterator[Path]:
    """A directory that appears under its name only when it is complete. Raises ExportError if the name is taken."""
    if "://" in path:
        raise ExportError(f"--output {path}: exports are written to local directories; copy them from there")
    final = Path(absolute(path))
    if final.exists():
        raise ExportError(f"--output {path} exists already; give another directory, or remove it")
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"--output {path} can't be made: {error}") from None
    try:
        yield temporary
        if final.exists():  # made by somebody else meanwhile: a rename would replace it if it is empty
            raise ExportError(f"--output {path} exists already; give another directory, or remove it")
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
