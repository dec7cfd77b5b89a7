"""From activations to weights: shuffle buffer, trainer, calibration, and the ledger of what was trained."""

from mtc.training.calibration import CALIBRATION_ROWS, Calibrator
from mtc.training.clock import Clock
from mtc.training.health import Health
from mtc.training.in_memory import INITIAL_ROWS, train_in_memory
from mtc.training.shard_files import assemble, read_shards, shard_bytes
from mtc.training.shuffle_buffer import ShuffleBuffer, Taken, Unit
from mtc.training.side_by_side import SideBySide
from mtc.training.trainer import StepMetrics, StepResult, Trainer
from mtc.training.upload import Upload, on_device

__all__ = [
    "CALIBRATION_ROWS", "INITIAL_ROWS", "Calibrator", "Clock", "Health", "ShuffleBuffer", "SideBySide", "StepMetrics",
    "StepResult", "Taken", "Trainer", "Unit", "Upload", "assemble", "on_device", "read_shards", "shard_bytes",
    "train_in_memory",
]  # fmt: skip
