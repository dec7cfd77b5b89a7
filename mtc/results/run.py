"""What happened in a run: its facts, what training derived, its trend, its files, and where the time went."""

from __future__ import annotations

from typing import Any

from mtc.record import Record

RUN_FILES = {
    "config.yaml": "the configuration that reproduces the run",
    "transcoder.safetensors": "weights, scales and the inference threshold",
    "metrics.jsonl": "training history, one line per logged step",
    "features.parquet": "every figure of every feature, one row each",
    "examples.parquet": "activating examples of every feature, ordered by feature",
    "contexts.parquet": "random contexts with all features that fire in them",
    "analysis.json": "every figure of this report",
    "manifest.json": "sizes and sha256 of all files",
}
PARTS = ("waiting", "transport", "step", "all_reduce", "checkpoint", "other")
"""Parts of a trainer's wall time. `waiting`: for activations. `transport`: copying them into the shuffle buffer and
batches out of it. `step`: training, without what ranks waited for each other, which is `all_reduce`. `checkpoint`:
writing checkpoints. `other`: the rest, such as logging."""


class RunFacts(Record):
    """What happened in the run that neither the configuration nor the weights tell."""

    run_id: str
    """Name of the run."""
    steps: int
    """Training steps done."""
    trained_tokens: int
    """Tokens trained on, repeats included."""
    captured_tokens: int | None = None
    """Tokens of the training text that ran through the language model, each of which was trained `data.replays` times;
    None in a run of before that could be asked for."""
    dropped_tokens: int = 0
    """Tokens whose activations were not finite, never trained on."""
    calibration_tokens: int = 0
    """Fresh tokens that the threshold was calibrated on."""
    precision: str = "float32"
    """Arithmetic of the transcoder's products, with the sparse backend of the search for active features only; weights,
    loss and optimizer are float32."""
    compute: str = ""
    """How the training loss was computed, and how long the alternatives took."""
    token_store: str = ""
    """URL of the tokenised text."""
    data_name: str
    """Name of the text, as it was found."""
    documents: dict[str, int] = {}
    """Documents of the token store by split."""
    windows: dict[str, int] = {}
    """Windows of the token store by split."""
    skipped_documents: dict[str, int] = {}
    """Documents that could not be used, by reason."""
    skipped_examples: tuple[str, ...] = ()
    """First few documents that could not be used, each as `reason: name`."""
    unread_files: dict[str, int] = {}
    """Files and other entries of `data.name` that are no text that is read, by reason."""
    unread_examples: tuple[str, ...] = ()
    """First few of them, each as `reason: name`."""
    language_model_dtype: str
    """Arithmetic of the language model's passes."""
    language_model_compute: tuple[str, ...] = ()
    """How the language model's passes ran in the processes of the analysis: compiled, or eager and why."""
    devices: tuple[str, ...]
    """Kinds of device that trainers and model actors computed on."""
    num_trainers: int
    """Data-parallel trainer processes."""
    num_model_actors: int
    """Processes that held the language model."""
    seconds: dict[str, float] = {}
    """Wall time by stage (tokenise, train, analyse), seconds."""
    timing: StreamTiming | None = None
    """What waited on what during training, since the run's last start; None if it was not measured."""
    other_layers: tuple[int, ...] = ()
    """Layers whose transcoders were trained from the same forward passes."""
    other_members: tuple[str, ...] = ()
    """Names of the transcoders that were trained beside this one, on the same activations or those of other layers."""
    events: tuple[dict[str, Any], ...] = ()
    """Events of the run, in order: at least `time` (ISO 8601), `kind` and `message`, and `step` where there is one."""
    versions: dict[str, str] = {}
    """Versions by name of the packages that figures depend on, and of Python."""
    data_fingerprint: str = ""
    """Fingerprint of the token store, which changes with text, tokenizer and window settings."""
    git_revision: str | None = None
    """Commit of the code that wrote the report, with `-dirty` behind it if files differed; None if it is not known."""
    hardware: tuple[str, ...] = ()
    """Kinds of nodes that the run was on: processor, CPUs, memory, GPUs."""
    analysed: str = ""
    """When the analysis was made, ISO 8601, UTC."""
    files: tuple[str, ...] = tuple(RUN_FILES)
    """Names of the run's files, the report's own left out."""


class Training(Record):
    """What training derived from the configuration and from the first activations."""

    d_source: int
    """Width of the source site, in dimensions."""
    d_target: int
    """Width of the target site, in dimensions."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries in features, ascending."""
    input_norm: str
    """How sources are scaled: `rms`, `scalar` or `none`."""
    input_scale: float
    """Factor that sources are multiplied by; 1 unless input_norm is `scalar`."""
    target_scale: float
    """Factor that targets are multiplied by."""
    threshold: float
    """Pre-activation above which a feature is active at inference; the median if each feature has its own."""
    planned_steps: int
    """Steps that the configuration asks for."""
    fingerprint: str
    """Fingerprint of the configuration, which changes with every setting that changes the run's numbers."""


class Trend(Record):
    """A line fitted to the full dictionary's batch FVU over the last fifth of the logged steps."""

    rows: int
    """Logged steps that the line was fitted to."""
    fall: float
    """How far the line falls from the first to the last fitted step, as a share of its mean; negative if it rises."""
    standard_error: float
    """Standard error of `fall`, from the residuals."""


class TrainingFit(Record):
    """The fit to the tokens that were trained on, beside which held-out figures stand."""

    rows: int
    """Logged steps that the training FVU is the mean of: the last fifth."""
    fvu: float
    """Mean batch FVU of the full dictionary, without massive tokens."""
    excess: float
    """How far the held-out FVU lies above the training FVU, as a share of it; negative if below."""


class File(Record):
    """A file of the run or of its report."""

    name: str
    """Path of the file inside the run directory, or inside its report directory."""
    description: str
    """What the file holds."""


class StreamTiming(Record):
    """Where the time of training went, from the first activations to the last batch, since the run's last start."""

    tokens: int
    """Tokens that left the shuffle buffers: trained on, repeats included, and used for calibration."""
    wall_seconds: float
    """Wall time from the first activations to the last batch, seconds."""
    startup_seconds: float
    """Wall time before the first activations, seconds: the model actors load the language model and run their first
    unit."""
    trainers: int
    """Data-parallel trainer processes."""
    trainer_seconds: dict[str, float]
    """Seconds of `wall_seconds` by part (waiting, transport, step, all_reduce, checkpoint, other), mean over trainers;
    they add up to it."""
    actor_seconds: float
    """Wall time of the model actors, summed, over the units that trainers received after their first, seconds."""
    forward_seconds: float
    """Seconds of `actor_seconds` in forward passes; on a GPU sending goes on meanwhile."""
    sending_seconds: float
    """Seconds of `actor_seconds` putting activations into shared memory, or held back there."""
    idle_seconds: float
    """Seconds of `actor_seconds` without a work unit: waiting for the trainers or for the scheduler."""
    captured_tokens: int
    """Token positions that ran through the language model, special tokens included."""
    forward_flops: float
    """Floating-point operations of the matrix products in the language model's forward passes."""
    device_flops: float
    """Floating-point operations per second that a model actor measured at its start with a large matrix product in the
    model's dtype."""

    tokens_per_second: float
    """Tokens that left the shuffle buffers per second of wall time: `tokens` / `wall_seconds`."""
    forward_mfu: float | None
    """Share of `device_flops` that forward passes reached while they ran, from 0 to 1; None if no unit followed the
    first."""
    mfu: float | None
    """Share of `device_flops` that the model actors reached over all of `actor_seconds`, from 0 to 1; None if no unit
    followed the first."""

    @property
    def waiting_share(self) -> float:
        """Share of the trainers' time that they waited for activations."""
        return self.trainer_seconds["waiting"] / self.wall_seconds

    @property
    def forward_share(self) -> float | None:
        """Share of the model actors' time that their forward passes took; None if no unit followed the first."""
        return self.forward_seconds / self.actor_seconds if self.actor_seconds else None
