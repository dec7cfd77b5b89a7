"""The Matryoshka transcoder: weights, activation functions, the nested loss dense and sparse."""

from mtc.transcoder.distributed import (
    Averaging,
    agree,
    all_gather,
    all_reduce,
    alone,
    backend,
    broadcast,
    copy_from_first,
    gather,
    waits,
    world_size,
)
from mtc.transcoder.massive import MASSIVE_RATIO, above, massive_norm
from mtc.transcoder.objective import Objective
from mtc.transcoder.products import Workspace, entry_dots
from mtc.transcoder.saved import load_transcoder
from mtc.transcoder.selection import kth_largest
from mtc.transcoder.shape import TranscoderShape, transcoder_shape
from mtc.transcoder.shard import BY_FEATURE, Shard
from mtc.transcoder.transcoder import RMS_EPS, Codes, Compute, MatryoshkaTranscoder, TrainOutput, file_metadata

__all__ = [
    "BY_FEATURE", "MASSIVE_RATIO", "RMS_EPS", "Averaging", "Codes", "Compute", "MatryoshkaTranscoder", "Objective",
    "Shard", "TrainOutput", "TranscoderShape", "Workspace", "above", "agree", "all_gather", "all_reduce", "alone",
    "backend", "broadcast", "copy_from_first", "entry_dots", "file_metadata", "gather", "kth_largest",
    "load_transcoder", "massive_norm", "transcoder_shape", "waits", "world_size",
]  # fmt: skip
