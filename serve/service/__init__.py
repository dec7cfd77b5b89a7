"""What the service does, without HTTP and without Ray: runs, tokens, features, batches, graphs, interventions."""

from typing import TYPE_CHECKING, Any

from serve.service.batching import QueueFullError, TokenBatcher
from serve.service.catalogue import UNUSABLE, Catalogue, Entry, Listed
from serve.service.circuits import Circuits
from serve.service.feature_table import DENSE, SINGLE_TOKEN, FeatureTable, Filters
from serve.service.models import Models
from serve.service.served_run import ServedLayer, ServedRun, identities_of
from serve.service.service import Control, Interventions, Service
from serve.service.storage_reads import OPEN_S, STORAGE_S, StorageReads, storage_fails
from serve.service.tokenising import Tokeniser

if TYPE_CHECKING:
    from serve.service.run_encoder import RunEncoder

__all__ = [
    "DENSE",
    "OPEN_S",
    "SINGLE_TOKEN",
    "STORAGE_S",
    "UNUSABLE",
    "Catalogue",
    "Circuits",
    "Control",
    "Entry",
    "FeatureTable",
    "Filters",
    "Interventions",
    "Listed",
    "Models",
    "QueueFullError",
    "RunEncoder",
    "ServedLayer",
    "ServedRun",
    "Service",
    "StorageReads",
    "TokenBatcher",
    "Tokeniser",
    "identities_of",
    "storage_fails",
]


def __getattr__(name: str) -> Any:
    if name == "RunEncoder":
        # Only where models run: PyTorch comes along, 2 s and 220 MB.
        from serve.service.run_encoder import RunEncoder

        return RunEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
