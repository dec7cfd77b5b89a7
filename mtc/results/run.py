"""What happened in a run: facts, training history and where the time went."""

from __future__ import annotations

from typing import Any

from mtc.record import Record

RUN_FILES = {
    "config.yaml": "the configuration that reproduces the run",
    "transcoder.safetensors": "weights, scales and the inference threshold",
    "metrics.jsonl": "training history, one line per logged step",
    "features.parquet": "every figure of every feature, one row each",
    "examples.parquet": "activating examples of every feature, ordered by feature",
    "analysis.json": "every figure of this report",
    "manifest.json": "sizes and sha256 of all files",
}
PARTS = ("waiting", "transport", "step", "all_reduce", "checkpoint", "other")
"""Of a trainer's wall time: waiting for activations; copying them into the shuffle buffer and batches out of it;
training, without what ranks waited for each other; that; writing checkpoints; the rest (logging)."""


class RunFacts(Record):
    """What happened in the run that neither the configuration nor the weights tell."""

    run_id: str
    """Name of the run."""
    steps: int
    """Training steps done."""
    trained_tokens: int
    """Tokens trained on, repeats included."""
    dropped_tokens: int = 0
    """Tokens whose activations were not finite, never trained on."""
    calibration_tokens: int = 0
    """Fresh tokens that the threshold was calibrated on."""
    precision: str = "float32"
    """Arithmetic of the transcoder's products; weights, loss and optimizer are float32. With the sparse backend, of the
    search for active features only."""
    compute: str = ""
    """How the training loss was computed, and how long the alternatives took."""
    token_store: str = ""
    """URL of the tokenised text."""
    data_name: str
    """The text, as it was found."""
    documents: dict[str, int] = {}
    """Documents per split."""
    windows: dict[str, int] = {}
    """Windows per split."""
    skipped_documents: dict[str, int] = {}
    """Documents that could not be used, by reason."""
    skipped_examples: tuple[str, ...] = ()
    """The first few of them: reason and name."""
    language_model_dtype: str
    """Arithmetic of the language model."""
    language_model_compute: tuple[str, ...] = ()
    """How its passes ran, in the processes of the analysis: compiled, or eager and why."""
    devices: tuple[str, ...]
    """Kinds of device that were used."""
    num_trainers: int
    """Data-parallel trainer processes."""
    num_model_actors: int
    """Processes that held the language model."""
    seconds: dict[str, float] = {}
    """Wall time per stage (tokenise, train, analyse), seconds."""
    timing: StreamTiming | None = None
    """What waited on what during training, since the run's last start; None if it was not measured."""
    other_layers: tuple[int, ...] = ()
    """Layers whose transcoders were trained from the same forward passes."""
    events: tuple[dict[str, Any], ...] = ()
    """What happened, in order: at least `time` (ISO 8601), `kind` and `message`, and `step` where there is one."""
    versions: dict[str, str] = {}
    """Versions of the packages that matter."""
    data_fingerprint: str = ""
    """Of the token store: text, tokenizer and window settings."""
    git_revision: str | None = None
    """Commit of the code that wrote the report, with `-dirty` behind it if files differed; None if it is not known."""
    hardware: tuple[str, ...] = ()
    """Kinds of nodes: processor, CPUs, memory, GPUs."""
    analysed: str = ""
    """When the analysis was made, ISO 8601, UTC."""
    files: tuple[str, ...] = tuple(RUN_FILES)
    """Files of the run, the report's own left out."""


class Training(Record):
    """What the configuration leaves open or derives."""

    d_source: int
    """Width of the source site."""
    d_target: int
    """Width of the target site."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries."""
    input_norm: str
    """How sources are scaled."""
    input_scale: float
    """Factor on sources; 1 unless input_norm is `scalar`."""
    target_scale: float
    """Factor on targets."""
    threshold: float
    """Pre-activation above which a feature is active at inference; the mean if each feature has its own."""
    planned_steps: int
    """Steps that the configuration asks for."""
    fingerprint: str
    """Changes with every setting that changes the run's numbers."""


class Trend(Record):
    """A line fitted to the full dictionary's batch FVU over the last fifth of the logged steps."""

    rows: int
    """Logged steps that were fitted."""
    fall: float
    """How far the line falls from the first to the last of them, as a share of its mean; negative if it rises."""
    standard_error: float
    """Standard error of `fall`, from the residuals."""


class File(Record):
    """A file of the run."""

    name: str
    """Path inside the run directory, or inside its report directory."""
    description: str
    """What it holds."""


class StreamTiming(Record):
    """Wall time from the first activations to the last batch, since the run's last start."""

    tokens: int
    """Tokens that left the shuffle buffers: trained on, and used for calibration."""
    wall_seconds: float
    """From the first activations to the last batch."""
    startup_seconds: float
    """Before that: the model actors load the language model and run their first unit."""
    trainers: int
    """Data-parallel trainers."""
    trainer_seconds: dict[str, float]
    """Seconds of `wall_seconds` by part of PARTS, mean over trainers; they add up to it."""
    actor_seconds: float
    """Wall time of the model actors, summed, over the units that trainers received after their first."""
    forward_seconds: float
    """Of these, in forward passes; on a GPU sending goes on meanwhile."""
    sending_seconds: float
    """Of these, putting activations into shared memory, or held back there."""
    idle_seconds: float
    """Of these, without a work unit: waiting for the trainers or for the scheduler."""
    captured_tokens: int
    """Token positions that ran through the language model, special tokens included."""
    forward_flops: float
    """Floating-point operations of these passes' matrix products."""
    device_flops: float
    """Rate that a model actor measured at its start with a large matrix product in the model's dtype, per second."""

    tokens_per_second: float
    """`tokens` / `wall_seconds`."""
    forward_mfu: float | None
    """Share of the measured rate that forward passes reached while they ran; None if no unit followed the first."""
    mfu: float | None
    """The same over all of `actor_seconds`: what the run made of the model actors' devices."""

    @property
    def waiting_share(self) -> float:
        """Share of the trainers' time that they waited for activations."""
        return self.trainer_seconds["waiting"] / self.wall_seconds

    @property
    def forward_share(self) -> float | None:
        """Share of the model actors' time that their forward passes took; None if no unit followed the first."""
        return self.forward_seconds / self.actor_seconds if self.actor_seconds else None
