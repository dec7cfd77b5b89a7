"""Labels of features by a language model, what they are worth, and their vectors. Without Ray; docs/labels.md."""

from mtc.labels.budget import Budget
from mtc.labels.embeddings import (
    Embedded,
    Embedder,
    VectorCost,
    embed,
    known_vectors,
    labels_to_embed,
    vector_cost,
)
from mtc.labels.endpoint import Endpoint
from mtc.labels.estimate import Cost, estimate
from mtc.labels.evidence import RunEvidence
from mtc.labels.journal import Journal
from mtc.labels.labelling import Asked, Labeller, Labels, Progress, Settings
from mtc.labels.relabel import keep_labels, relabel
from mtc.labels.summary import summarise
from mtc.labels.transport import EndpointDown, EndpointError

__all__ = [
    "Asked", "Budget", "Cost", "Embedded", "Embedder", "Endpoint", "EndpointDown", "EndpointError", "Journal",
    "Labeller", "Labels", "Progress", "RunEvidence", "Settings", "VectorCost", "embed", "estimate", "keep_labels",
    "known_vectors", "labels_to_embed", "relabel", "summarise", "vector_cost",
]  # fmt: skip
