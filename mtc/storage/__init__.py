"""Where a run lives: its directory on any file system, checkpoints, the writer's lease, its status."""

from mtc.storage.checkpoints import LISTING_SECONDS, Checkpoint, Checkpoints, CheckpointWriter, NotVisibleError
from mtc.storage.contexts import CONTEXTS, RandomContexts, Together, own_tokens, relatives
from mtc.storage.embeddings import (
    EMBEDDINGS,
    Embeddings,
    embeddings_to_bytes,
    label_digest,
    parse_embeddings,
)
from mtc.storage.ending import noting_the_end
from mtc.storage.files import LFS_POINTER, StorageError, absolute, filesystem, patiently, write_atomic
from mtc.storage.hub import is_hub_url, unreachable
from mtc.storage.labels import (
    LABELS,
    LabelTable,
    labels_to_parquet,
    parse_labels,
    read_features,
    read_labels,
    with_labels,
)
from mtc.storage.lease import Lease
from mtc.storage.ledger import Ledger, Progress, merge_progress, progress_from_parquet, progress_to_parquet, rows_left
from mtc.storage.locks import LockError, locked
from mtc.storage.names import JOB_COPY, is_hub_id, missing, output_path, require_on_hub, with_absolute_paths
from mtc.storage.notes import Notes, NotesReadOnly, notes_to_json, read_notes
from mtc.storage.places import cache_directory, check_writable, prepare_environment
from mtc.storage.runs import (
    NOTES_FILE,
    Manifest,
    RunDirectory,
    RunError,
    is_latest,
    json_lines,
    load_analysis,
    named_run,
    open_layer_run,
    open_run,
    parse_analysis,
    publish_whole,
    require_one_layer,
)
from mtc.storage.status import describe, run_status
from mtc.storage.wheels import wheel_files

__all__ = [
    "CONTEXTS",
    "EMBEDDINGS",
    "JOB_COPY",
    "LABELS",
    "LFS_POINTER",
    "LISTING_SECONDS",
    "NOTES_FILE",
    "Checkpoint",
    "CheckpointWriter",
    "Checkpoints",
    "Embeddings",
    "LabelTable",
    "Lease",
    "Ledger",
    "LockError",
    "Manifest",
    "NotVisibleError",
    "Notes",
    "NotesReadOnly",
    "Progress",
    "RandomContexts",
    "RunDirectory",
    "RunError",
    "StorageError",
    "Together",
    "absolute",
    "cache_directory",
    "check_writable",
    "describe",
    "embeddings_to_bytes",
    "filesystem",
    "is_hub_id",
    "is_hub_url",
    "is_latest",
    "json_lines",
    "label_digest",
    "labels_to_parquet",
    "load_analysis",
    "locked",
    "merge_progress",
    "missing",
    "named_run",
    "notes_to_json",
    "noting_the_end",
    "open_layer_run",
    "open_run",
    "output_path",
    "own_tokens",
    "parse_analysis",
    "parse_embeddings",
    "parse_labels",
    "patiently",
    "prepare_environment",
    "progress_from_parquet",
    "progress_to_parquet",
    "publish_whole",
    "read_features",
    "read_labels",
    "read_notes",
    "relatives",
    "require_on_hub",
    "require_one_layer",
    "rows_left",
    "run_status",
    "unreachable",
    "wheel_files",
    "with_absolute_paths",
    "with_labels",
    "write_atomic",
]  # fmt: skip
