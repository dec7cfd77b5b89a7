"""What the features are and how good they are, on held-out text: sums, examples, nesting, findings."""

from mtc.analysis.analyse import Findings
from mtc.analysis.compare import compare_runs
from mtc.analysis.contexts import contexts_to_parquet
from mtc.analysis.copies import find_copies
from mtc.analysis.evaluation import loss_recovered
from mtc.analysis.feature_table import features_to_parquet, label_of, read_feature
from mtc.analysis.findings import findings
from mtc.analysis.held_out import HeldOutPass, count_tokens, number_documents
from mtc.analysis.in_memory import Analysed, analyse_in_memory
from mtc.analysis.intervals import MAX_BLOCKS, interval, resample, share
from mtc.analysis.logits import LogitEffects, logit_effects
from mtc.analysis.loss_sums import LossSums
from mtc.analysis.massive import recognise
from mtc.analysis.nesting import analyse_nesting

__all__ = [
    "MAX_BLOCKS", "Analysed", "Findings", "HeldOutPass", "LogitEffects", "LossSums", "analyse_in_memory",
    "analyse_nesting", "compare_runs", "contexts_to_parquet", "count_tokens", "features_to_parquet", "find_copies",
    "findings", "interval", "label_of", "logit_effects", "loss_recovered", "number_documents", "read_feature",
    "recognise", "resample", "share",
]  # fmt: skip
