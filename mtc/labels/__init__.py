"""Labels of features by a language model, and what they are worth. Without Ray; docs/labels.md."""

from mtc.labels.budget import Budget
from mtc.labels.endpoint import Endpoint, EndpointDown, EndpointError
from mtc.labels.estimate import Cost, estimate
from mtc.labels.evidence import RunEvidence
from mtc.labels.journal import Journal
from mtc.labels.labelling import Asked, Labeller, Labels, Progress, Settings
from mtc.labels.relabel import keep_labels, relabel
from mtc.labels.summary import summarise

__all__ = [
    "Asked", "Budget", "Cost", "Endpoint", "EndpointDown", "EndpointError", "Journal", "Labeller", "Labels",
    "Progress", "RunEvidence", "Settings", "estimate", "keep_labels", "relabel", "summarise",
]  # fmt: skip
