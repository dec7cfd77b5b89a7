"""What a run leaves to read: every record that is written and read back. Without torch."""

from mtc.results.analysis import FORMAT_VERSION, Analysis, Finding, Summary
from mtc.results.comparison import SHOWN, Comparison, Match, Matching, Side
from mtc.results.copies import CopiedFeature, Copies
from mtc.results.evaluation import AllTokens, Evaluation, LossRecovered, Massive, Slice, StraightLine
from mtc.results.features import (
    Distribution,
    Example,
    Feature,
    Group,
    Histogram,
    LogitEffect,
    Parent,
    ShownFeature,
    TokenCount,
    TopFeature,
    Weights,
)
from mtc.results.files import LAYERS_REPORT, OVERVIEW, PLOTS, plot_path, report_files, report_names
from mtc.results.intervals import MIN_DOCUMENTS, Interval, Intervals
from mtc.results.nesting import AbsorbedFeature, Child, Family, PrefixStep, SplitFeature, TokenGain, Tree
from mtc.results.numbers import NOT_MEASURED, interval, number, percent, percent_interval, whole_range
from mtc.results.probing import (
    MIN_ACCURACY,
    LetterAbsorption,
    Pooling,
    PrefixAbsorption,
    ProbeResult,
    ProbeTask,
    Probing,
    Spelling,
    TaskResult,
)
from mtc.results.run import PARTS, RUN_FILES, File, RunFacts, StreamTiming, Training, TrainingFit, Trend

__all__ = [
    "FORMAT_VERSION", "LAYERS_REPORT", "MIN_ACCURACY", "MIN_DOCUMENTS", "NOT_MEASURED", "OVERVIEW", "PARTS", "PLOTS",
    "RUN_FILES", "SHOWN", "AbsorbedFeature", "AllTokens", "Analysis", "Child", "Comparison", "CopiedFeature", "Copies",
    "Distribution", "Evaluation", "Example", "Family", "Feature", "File", "Finding", "Group", "Histogram",
    "Interval", "Intervals", "LetterAbsorption", "LogitEffect", "LossRecovered", "Massive", "Match", "Matching",
    "Parent", "Pooling", "PrefixAbsorption", "PrefixStep", "ProbeResult", "ProbeTask", "Probing", "RunFacts",
    "ShownFeature", "Side", "Slice", "Spelling", "SplitFeature", "StraightLine", "StreamTiming", "Summary",
    "TaskResult", "TokenCount", "TokenGain", "TopFeature", "Training", "TrainingFit", "Tree", "Trend", "Weights",
    "interval", "number", "percent", "percent_interval", "plot_path", "report_files", "report_names", "whole_range",
]  # fmt: skip
