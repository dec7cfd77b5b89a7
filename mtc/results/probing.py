"""What sparse probes, first-letter absorption and spelling found; docs/probing.md says how it is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtc.record import Record
from mtc.results.intervals import Interval

Pooling = Literal["mean", "max", "last"]
MIN_ACCURACY = 0.5
"""Share of right first letters from which on the model can spell."""


class LetterAbsorption(Record):
    """One letter, in one nested dictionary, on test words."""

    letter: str
    """The first letter."""
    words: int
    """Words with it that the probe of the target finds: those that absorption is measured on."""
    main_features: tuple[int, ...]
    """Features that stand for the letter."""
    main_precision: float
    """Share of the test words that a probe of these features picks which have the letter; from MIN_PRECISION on, the
    dictionary has a feature for the letter."""
    main_f1: float
    """F1 score of that probe."""
    fully_absorbed: int
    """Words on which all of them are silent and one other feature takes their place."""
    full_rate: Interval
    """Share of such words, with Wilson's interval."""
    fraction: Interval
    """Mean absorption fraction, with the interval of bootstrap resamples of words."""


class PrefixAbsorption(Record):
    """One nested dictionary."""

    prefix: int
    """Number of its features."""
    letters: tuple[LetterAbsorption, ...]
    """Letters that could be measured."""
    with_feature: int
    """Letters among them that the dictionary has a feature for."""
    full_rate: Interval | None
    """Mean over these letters of the share of fully absorbed words, with the interval of bootstrap resamples of words;
    None if they are fewer than MIN_LETTERS."""
    fraction: Interval | None
    """The same for the absorption fraction."""


class ProbeTask(Record):
    """Two classes of text. A row of the source is one text, or names a file with it."""

    name: str
    """What the report calls it."""
    source: str
    """`pip:DISTRIBUTION/PATH` of a file in an installed wheel, or a path or URL: .csv, .tsv, .jsonl or .parquet, CSV
    also compressed as .csv.zst or .csv.gz."""
    text_field: str = "text"
    """Column of the text."""
    text_file: str | None = None
    """Where text_field holds names of text files: their path from the source's directory, `{}` being the name."""
    label_field: str = "label"
    """Column of the label."""
    positive: tuple[str, ...] = ()
    """Labels of the positive class, as text; by default the second of the only two labels in alphabetical order."""
    negative: tuple[str, ...] = ()
    """Labels of the negative class; by default all others. Rows with neither are left out."""
    at_least: float | None = None
    """Instead of the two above: labels are numbers, and from this one on they are positive."""
    group_field: str | None = None
    """Texts with the same value here lie on one side of the split; by default each text is alone."""
    windows_per_text: int = Field(default=1, ge=1)
    """Examples cut out of a text, evenly spread; if one, its end."""


class ProbeResult(Record):
    """One probe, judged on the test part."""

    prefix: int | None
    """The dictionary it reads: the first so many features. None: the source activations."""
    k: int | None
    """Dimensions it reads. None: all."""
    dimensions: tuple[int, ...]
    """Which ones, the strongest first: features, or dimensions of the source. Empty: all."""
    auc: Interval
    """Area under the ROC curve, with the percentiles of bootstrap resamples of whole test groups."""
    accuracy: float
    """Share of examples on the right side of probability one half."""
    beyond_dense: Interval
    """AUC less that of the probe of all source activations, on the same resamples."""
    strength: float
    """Inverse strength C of the L2 penalty, chosen by cross-validation."""


class TaskResult(Record):
    """All probes of one task."""

    task: ProbeTask
    """Which text, and which classes."""
    texts: int
    """Texts of the source in either class."""
    dropped: int
    """Rows left out because they repeat a text, or because it stands in both classes."""
    trained_texts: int
    """Texts left out because the transcoder was trained on them."""
    used_texts: int
    """Texts that were probed."""
    train_examples: int = 0
    """Windows that probes were fitted to."""
    test_examples: int = 0
    """Windows that they were judged on."""
    test_groups: int = 0
    """Groups that these come from; a text without a group is one of its own."""
    majority_accuracy: float | None = None
    """Accuracy on the test part of always naming the class that is more frequent in the training part."""
    dense: ProbeResult | None = None
    """The probe of all source activations."""
    dense_sparse: tuple[ProbeResult, ...] = ()
    """Probes of the best k source dimensions."""
    sparse: tuple[ProbeResult, ...] = ()
    """Probes of the best k features of each nested dictionary."""
    not_measured: str | None = None
    """Why there are no probes, or None."""


class Probing(Record):
    """Sparse probing of one transcoder."""

    layer: int
    """Layer of the language model."""
    source: str
    """Site of the source activations."""
    pooling: Pooling
    """How the tokens of a window become one example, special tokens left out: their mean, maximum or the last one."""
    context_length: int
    """Most tokens in a window."""
    ks: tuple[int, ...]
    """Sizes of the sparse probes."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries."""
    tasks: tuple[TaskResult, ...]
    """Results, one for each task."""


class Spelling(Record):
    """First-letter spelling of a language model, and absorption in a transcoder."""

    layer: int
    """Layer whose MLP the transcoder imitates."""
    words: int
    """Words: single tokens of lower-case letters a to z, at least three, with a space in front."""
    asked: int
    """Test words that the language model was asked for."""
    accuracy: Interval | None = None
    """Share of these for which the likeliest next token is the right letter, with Wilson's interval."""
    chance: float | None = None
    """Share of them with the most frequent letter."""
    min_accuracy: float = MIN_ACCURACY
    """Accuracy from which on the model can spell."""
    probe_auc: dict[str, float] = {}
    """Area under the ROC curve of each letter's probe of the target, on test words; letters below MIN_AUC are not
    measured."""
    prefixes: tuple[PrefixAbsorption, ...] = ()
    """Absorption in each nested dictionary."""
    not_measured: str | None = None
    """Why there is no mean absorption, or None."""
