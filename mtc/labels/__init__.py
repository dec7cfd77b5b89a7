"""Labels of features by a language model, and what they are worth. Without Ray; docs/labels.md."""

from mtc.labels.budget import Budget
from mtc.labels.endpoint import Endpoint, EndpointDown, EndpointError
from mtc.labels.estimate import Cost, estimate
from mtc.labels.evidence import RunEvidence
from mtc.labels.journal import Journal
from mtc.labels.labelling import Labeller, Labels, Progress, Settings
from mtc.labels.summary import labels_to_parquet, summarise

__all__ = [
    "Budget", "Cost", "Endpoint", "EndpointDown", "EndpointError", "Journal", "Labeller", "Labels", "Progress",
    "RunEvidence", "Settings", "estimate", "labels_to_parquet", "summarise",
]  # fmt: skip
