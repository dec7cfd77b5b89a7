"""Whether features know what a labelled text is about, and whether letters are absorbed: sparse probes, spelling."""

from mtc.probing.absorption import main_features
from mtc.probing.linear_probes import auc
from mtc.probing.sparse_probing import probe, trained_documents
from mtc.probing.spelling import measure_spelling
from mtc.probing.tasks import available_tasks, load_task, task_named

__all__ = [
    "auc", "available_tasks", "load_task", "main_features", "measure_spelling", "probe", "task_named",
    "trained_documents",
]  # fmt: skip
