"""The run's configuration: one frozen pydantic model and YAML presets. `jobs.command_line` adds options.

Precedence, weakest first: the fields' defaults, `--preset NAME` or `--config FILE`, dotted overrides
(`--transcoder.k 64`). Unknown fields are refused; an error names the field, the limit and the value.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from mtc.config.faults import describe_faults
from mtc.config.learning import OptimizerConfig, TranscoderConfig
from mtc.config.part import MOST, MOST_FEATURES, YEAR, Name, Part
from mtc.config.reading import ALL, DataConfig, ModelConfig
from mtc.config.sweep import MOST_MEMBERS, Entry, entry_names, overridden, read_sweep
from mtc.errors import MtcError
from mtc.record import Record

LR_AT_1152 = 6e-3
"""Default learning rate of 1,152 features and batches of 1,024 tokens; see docs/quality.md."""


class ConfigError(MtcError, ValueError):
    """The configuration cannot be used; the message names the fields, the limits and the values."""


class AnalysisConfig(Part):
    """The pass over held-out tokens after training."""

    num_tokens: int = Field(default=1_000_000, ge=1, le=MOST)
    """Held-out tokens for metrics and examples; fewer are used, and reported, if the held-out text is shorter."""
    loss_tokens: int = Field(default=65_536, ge=0, le=MOST)
    """Held-out tokens on which the whole language model runs with the transcoder spliced in; 0 skips that."""
    graph_prompts: int = Field(default=4, ge=0, le=1000)
    """Held-out prompts whose attribution graphs are scored, of a run of several layers; 0, and 0 `loss_tokens`, skip
    that."""
    max_per_feature: int = Field(default=100, ge=1, le=100_000)
    """Most top examples kept for a feature, at most one per window."""
    samples_per_feature: int = Field(default=20, ge=0, le=100_000)
    """Activations per feature drawn uniformly from those of at least min_activation."""
    context_tokens: int = Field(default=20, ge=2, le=131_072)
    """Tokens shown around an example's peak, half of them on each side."""
    random_contexts: int = Field(default=2048, ge=0, le=1_000_000)
    """Contexts of as many tokens, drawn at random and at most one per window, of which all features are kept: where a
    feature is silent can only be told from these, and labels are scored on them."""
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
    """Trainer processes; by default as many as the cluster's resources suggest."""
    split: Literal["tokens", "transcoders"] | None = None
    """What several trainers divide among them: the tokens of every batch, of which each trains all transcoders on its
    share and exchanges gradients, or the transcoders, of which each trains its own on whole batches, whose rows the
    others send it. By default transcoders if there are as many as trainers. The results are the same up to rounding."""
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
    keep_checkpoints_after_finish: bool = False
    """Keep the checkpoints of a run that is finished, about half of its bytes, which nothing reads any more. By default
    they are removed when it is published."""
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

    def of_layers(self, count: int) -> RunConfig:
        """The same of a model that is known to have so many layers: `model.layers: all` as their numbers. Raises
        ConfigError where these make too many transcoders."""
        model = self.model.of_layers(count)
        if model is self.model:
            return self
        try:
            return type(self).model_validate(self.model_dump() | {"model": model.model_dump()})
        except ValidationError as error:
            raise ConfigError(describe_faults(error, type(self))) from None

    def fingerprint(self) -> str:
        """16 hex digits of everything but `output` and `cluster`. Raises ValueError where the layers are not known yet:
        `all` and the same numbers are the same run."""
        _ = self.model.sites
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
        self._check_split()
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

    def _check_split(self) -> None:
        if self.cluster.split != "transcoders" or self.model.layers == ALL:  # how many these are is not known yet
            return
        trainers, count = self.cluster.num_trainers or 1, len(self.model.sites) * len(self.sweep or ({},))
        if trainers > count:
            raise ValueError(
                f"cluster.split=transcoders with cluster.num_trainers={trainers}: the run has {count} "
                f"transcoder{'s' * (count > 1)}, and each trainer needs one; lower cluster.num_trainers, or set "
                "cluster.split=tokens"
            )

    def _check_members(self) -> None:
        one = self.model_copy(update={"model": self.model.of_layers(1)})  # of all layers the limits are the same
        sites = one.model.sites
        if (count := len(sites) * len(self.sweep or ())) > MOST_MEMBERS:
            raise ValueError(
                f"model.layers={len(sites)} layers and sweep={len(self.sweep or ())} entries make {count} "
                f"transcoders; at most {MOST_MEMBERS} are wanted"
            )
        for member in one.members():
            try:
                member.config._check_limits()
            except ValueError as error:
                raise ValueError(f"sweep, {member.name}: {error}") from None
