"""What a run leaves to read: every record that is written and read back. Without torch."""

from mtc.results.analysis import FORMAT_VERSION, Analysis, Finding, Headline, Summary
from mtc.results.circuits import (
    GRAPH_VERSION,
    MOST_VALUE,
    Ablated,
    Continuation,
    Explained,
    Faithfulness,
    Folded,
    Graph,
    GraphNode,
    Intervention,
    NextToken,
    PrefixScores,
    Steered,
)
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
from mtc.results.files import (
    LABEL_PLOT,
    LABEL_PLOTS,
    LAYERS_REPORT,
    OVERVIEW,
    PLOTS,
    plot_path,
    report_files,
    report_names,
)
from mtc.results.gates import Check, Figures, Gate, Limits, figures_of, hold
from mtc.results.intervals import MIN_DOCUMENTS, Interval, Intervals
from mtc.results.labels import (
    Difference,
    FeatureLabel,
    LabelKind,
    Labelling,
    LabelScore,
    LabelTest,
    ScoreSummary,
    YesShare,
)
from mtc.results.layers import GraphScores, LayerFigures, LayersReport, ReplacedLayers, ScoredPrompt
from mtc.results.nesting import AbsorbedFeature, Child, Family, PrefixStep, SplitFeature, TokenGain, Tree
from mtc.results.notes import MOST_CHARACTERS, FeatureNote
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
    "FORMAT_VERSION", "GRAPH_VERSION", "LABEL_PLOT", "LABEL_PLOTS", "LAYERS_REPORT", "MIN_ACCURACY",
    "MIN_DOCUMENTS", "MOST_CHARACTERS", "MOST_VALUE", "NOT_MEASURED", "OVERVIEW", "PARTS", "PLOTS", "RUN_FILES",
    "SHOWN", "Ablated", "AbsorbedFeature", "AllTokens", "Analysis", "Check", "Child", "Comparison", "Continuation",
    "CopiedFeature", "Copies", "Difference", "Distribution", "Evaluation", "Example", "Explained", "Faithfulness",
    "Family", "Feature", "FeatureLabel", "FeatureNote", "Figures", "File", "Finding", "Folded", "Gate", "Graph",
    "GraphNode", "GraphScores", "Group", "Headline", "Histogram", "Interval", "Intervals", "Intervention",
    "LabelKind", "LabelScore", "LabelTest", "Labelling", "LayerFigures", "LayersReport", "LetterAbsorption",
    "Limits", "LogitEffect", "LossRecovered", "Massive", "Match", "Matching", "NextToken", "Parent", "Pooling",
    "PrefixAbsorption", "PrefixScores", "PrefixStep", "ProbeResult", "ProbeTask", "Probing", "ReplacedLayers",
    "RunFacts", "ScoreSummary", "ScoredPrompt", "ShownFeature", "Side", "Slice", "Spelling", "SplitFeature",
    "Steered", "StraightLine", "StreamTiming", "Summary", "TaskResult", "TokenCount", "TokenGain", "TopFeature",
    "Training", "TrainingFit", "Tree", "Trend", "Weights", "YesShare", "figures_of", "hold", "interval", "number",
    "percent", "percent_interval", "plot_path", "report_files", "report_names", "whole_range",
]  # fmt: skip
