"""What sparse probes, first-letter absorption and spelling found; docs/probing.md says how it is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtc.record import Record
from mtc.results.intervals import Interval

Pooling = Literal["mean", "max", "last"]
MIN_ACCURACY = 0.5
"""Share of right first letters, from 0 to 1, from which on the language model is said to spell."""


class LetterAbsorption(Record):
    """Absorption of one first letter in one nested dictionary, on test words."""

    letter: str
    """First letter of the words."""
    words: int
    """Test words with the letter that the probe of the target finds: those that absorption is measured on."""
    main_features: tuple[int, ...]
    """Indices of the features that stand for the letter."""
    main_precision: float
    """Share of the test words picked by a probe of the main features that have the letter, from 0 to 1; from
    MIN_PRECISION on, the dictionary has a feature for the letter."""
    main_f1: float
    """F1 score of the probe of the main features on test words, from 0 to 1."""
    fully_absorbed: int
    """Words on which all main features are silent and one other feature takes their place."""
    full_rate: Interval
    """Share of the words that are fully absorbed, from 0 to 1, with Wilson's interval."""
    fraction: Interval
    """Mean absorption fraction of the words, from 0 to 1, with the interval of bootstrap resamples of words."""


class PrefixAbsorption(Record):
    """First-letter absorption in one nested dictionary."""

    prefix: int
    """Size of the nested dictionary in features."""
    letters: tuple[LetterAbsorption, ...]
    """Absorption of each letter that could be measured."""
    with_feature: int
    """Measured letters that the dictionary has a feature for."""
    full_rate: Interval | None
    """Mean over the letters with a feature of the share of fully absorbed words, from 0 to 1, with the interval of
    bootstrap resamples of words; None for fewer than MIN_LETTERS letters."""
    fraction: Interval | None
    """Mean over the letters with a feature of the absorption fraction, from 0 to 1, with the interval of bootstrap
    resamples of words; None for fewer than MIN_LETTERS letters."""


class ProbeTask(Record):
    """A labelled data set that probes tell two classes of text in. A row of the source is one text, or names a file
    with it."""

    name: str
    """Name of the task in the report."""
    source: str
    """`pip:DISTRIBUTION/PATH` of a file in an installed wheel, or a path or URL: .csv, .tsv, .jsonl or .parquet, CSV
    also compressed as .csv.zst or .csv.gz."""
    text_field: str = "text"
    """Column that holds the text."""
    text_file: str | None = None
    """Path of the text files from the source's directory, `{}` being the name that text_field holds; None where it
    holds the text itself."""
    label_field: str = "label"
    """Column that holds the label."""
    positive: tuple[str, ...] = ()
    """Labels of the positive class, as text; by default the second of the only two labels in alphabetical order."""
    negative: tuple[str, ...] = ()
    """Labels of the negative class, as text; by default all that are not positive. Rows with a label of neither class
    are left out."""
    at_least: float | None = None
    """Number from which on a label is positive, instead of `positive` and `negative`; None for labels that are no
    numbers."""
    group_field: str | None = None
    """Column whose equal values keep texts on one side of the split; None if each text is alone."""
    windows_per_text: int = Field(default=1, ge=1)
    """Windows of a text that become examples, evenly spread; if one, the end of the text."""


class ProbeResult(Record):
    """One probe of one task, judged on the test part."""

    prefix: int | None
    """Size of the nested dictionary that the probe reads, in features; None for a probe of the source activations."""
    k: int | None
    """Number of dimensions that the probe reads; None for all."""
    dimensions: tuple[int, ...]
    """Indices of the features, or of the source's dimensions, that the probe reads, the strongest first; empty for
    all."""
    auc: Interval
    """Area under the probe's ROC curve, with the percentiles of bootstrap resamples of whole test groups."""
    accuracy: float
    """Share of the test examples on the right side of probability one half, from 0 to 1."""
    beyond_dense: Interval
    """Area under the ROC curve less that of the probe of all source activations, on the same resamples."""
    strength: float
    """Inverse strength C of the L2 penalty, chosen by cross-validation."""


class TaskResult(Record):
    """All probes of one labelled data set."""

    task: ProbeTask
    """Labelled data set: which text, and which classes."""
    texts: int
    """Texts of the source that are in either class."""
    dropped: int
    """Rows of the source left out because they repeat a text, or because it stands in both classes."""
    trained_texts: int
    """Texts left out because the transcoder was trained on them."""
    used_texts: int
    """Texts that were probed."""
    train_examples: int = 0
    """Windows that probes were fitted to."""
    test_examples: int = 0
    """Windows that probes were judged on."""
    test_groups: int = 0
    """Groups that the test examples come from; a text without a group is one of its own."""
    majority_accuracy: float | None = None
    """Accuracy on the test part of always naming the class that is more frequent in the training part."""
    dense: ProbeResult | None = None
    """Probe of all source activations; None if nothing was measured."""
    dense_sparse: tuple[ProbeResult, ...] = ()
    """Probes of the k source dimensions with the largest difference of class means, for each k."""
    sparse: tuple[ProbeResult, ...] = ()
    """Probes of the k features with the largest difference of class means, for each nested dictionary and k."""
    not_measured: str | None = None
    """Why the task has no probes; None if it has."""


class Probing(Record):
    """Sparse probing of one transcoder on several tasks."""

    layer: int
    """Layer whose MLP the transcoder imitates, from 0."""
    source: str
    """Site of the source activations that the transcoder reads."""
    pooling: Pooling
    """How the tokens of a window become one example, special tokens left out: their mean, maximum or the last one."""
    context_length: int
    """Most tokens in a window that is probed."""
    ks: tuple[int, ...]
    """Numbers of dimensions that the sparse probes read."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries in features, ascending."""
    tasks: tuple[TaskResult, ...]
    """Results of each task."""


class Spelling(Record):
    """First-letter spelling of a language model, and absorption in a transcoder."""

    layer: int
    """Layer whose MLP the transcoder imitates, from 0."""
    words: int
    """Words that were used: single tokens of at least three lower-case letters a to z with a space in front."""
    asked: int
    """Test words whose first letter the language model was asked for."""
    accuracy: Interval | None = None
    """Share of the asked words for which the likeliest next token is the right letter, from 0 to 1, with Wilson's
    interval; None if none was asked."""
    chance: float | None = None
    """Share of the asked words that begin with the most frequent letter, from 0 to 1; None if none was asked."""
    min_accuracy: float = MIN_ACCURACY
    """Share of right first letters, from 0 to 1, from which on the language model is said to spell."""
    probe_auc: dict[str, float] = {}
    """Area under the ROC curve of each letter's probe of the target, on test words; letters below MIN_AUC are not
    measured."""
    prefixes: tuple[PrefixAbsorption, ...] = ()
    """Absorption in each nested dictionary."""
    not_measured: str | None = None
    """Why there is no mean absorption; None if there is."""
