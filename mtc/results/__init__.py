"""What a run leaves to read: every record that is written and read back. Without torch."""

from mtc.results.analysis import FORMAT_VERSION, Analysis, Finding, Summary
from mtc.results.comparison import SHOWN, Comparison, Match, Matching, Side
from mtc.results.evaluation import Evaluation, LossRecovered, Slice
from mtc.results.features import (
    Distribution,
    Example,
    Feature,
    Group,
    Histogram,
    LogitEffect,
    Parent,
    ShownFeature,
    TopFeature,
    Weights,
)
from mtc.results.files import OVERVIEW, PLOTS, plot_path, report_files, report_names
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
from mtc.results.run import PARTS, RUN_FILES, File, RunFacts, StreamTiming, Training, Trend

__all__ = [
    "FORMAT_VERSION", "MIN_ACCURACY", "MIN_DOCUMENTS", "NOT_MEASURED", "OVERVIEW", "PARTS", "PLOTS", "RUN_FILES",
    "SHOWN", "AbsorbedFeature", "Analysis", "Child", "Comparison", "Distribution", "Evaluation", "Example",
    "Family", "Feature", "File", "Finding", "Group", "Histogram", "Interval", "Intervals", "LetterAbsorption",
    "LogitEffect", "LossRecovered", "Match", "Matching", "Parent", "Pooling", "PrefixAbsorption", "PrefixStep",
    "ProbeResult", "ProbeTask", "Probing", "RunFacts", "ShownFeature", "Side", "Slice", "Spelling", "SplitFeature",
    "StreamTiming", "Summary", "TaskResult", "TokenGain", "TopFeature", "Training", "Tree", "Trend", "Weights",
    "interval", "number", "percent", "percent_interval", "plot_path", "report_files", "report_names", "whole_range",
]  # fmt: skip
