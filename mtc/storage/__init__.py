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
from mtc.storage.files import LFS_POINTER, StorageError, absolute, filesystem, patiently, write_atomic
from mtc.storage.hub import is_hub_url, unreachable
from mtc.storage.index import INDEX, IndexedModel, IndexedRun, weights_digest
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
from mtc.storage.retention import check_removable, remove_run, remove_waste, repair_index
from mtc.storage.run_list import RunRow, finished_runs, list_runs, names_of_runs, stored_files, token_stores
from mtc.storage.runs import (
    NOTES_FILE,
    Manifest,
    RunDirectory,
    RunError,
    is_latest,
    json_lines,
    load_analysis,
    named_run,
    note_token_store,
    open_layer_run,
    open_run,
    parse_analysis,
    publish_whole,
    require_one_layer,
)
from mtc.storage.status import describe, run_status
from mtc.storage.waste import Found, Waste, find_waste
from mtc.storage.wheels import wheel_files

__all__ = [
    "CONTEXTS",
    "EMBEDDINGS",
    "INDEX",
    "JOB_COPY",
    "LABELS",
    "LFS_POINTER",
    "LISTING_SECONDS",
    "NOTES_FILE",
    "Checkpoint",
    "CheckpointWriter",
    "Checkpoints",
    "Embeddings",
    "Found",
    "IndexedModel",
    "IndexedRun",
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
    "RunRow",
    "StorageError",
    "Together",
    "Waste",
    "absolute",
    "cache_directory",
    "check_removable",
    "check_writable",
    "describe",
    "embeddings_to_bytes",
    "filesystem",
    "find_waste",
    "finished_runs",
    "is_hub_id",
    "is_hub_url",
    "is_latest",
    "json_lines",
    "label_digest",
    "labels_to_parquet",
    "list_runs",
    "load_analysis",
    "locked",
    "merge_progress",
    "missing",
    "named_run",
    "names_of_runs",
    "note_token_store",
    "notes_to_json",
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
    "remove_run",
    "remove_waste",
    "repair_index",
    "require_on_hub",
    "require_one_layer",
    "rows_left",
    "run_status",
    "stored_files",
    "token_stores",
    "unreachable",
    "weights_digest",
    "wheel_files",
    "with_absolute_paths",
    "with_labels",
    "write_atomic",
]  # fmt: skip
