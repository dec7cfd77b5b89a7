"""Sections 5 and 6: the strongest features, and some features in full."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mtc.report.blocks import (
    Bars,
    Block,
    Card,
    Contexts,
    FeatureLink,
    Heading,
    Items,
    Label,
    Paragraph,
    Piece,
    Plots,
    Section,
    Table,
    Text,
    Token,
)
from mtc.report.format import short_label
from mtc.report.sections.copies import copies
from mtc.report.sections.labels import describe_label
from mtc.report.sections.listing import listed, maybe_label
from mtc.results import (
    NOT_MEASURED,
    Analysis,
    Example,
    Feature,
    FeatureLabel,
    LogitEffect,
    Parent,
    ShownFeature,
    TopFeature,
    number,
    percent,
)


def top_features(analysis: Analysis) -> Section:
    """Section 5: the strongest features that fired, those of massive tokens apart, and copies."""
    density = {f.figures.feature: f.figures.density for f in analysis.features}
    any_massive = bool(analysis.summary.massive.tokens)
    rows: tuple[tuple[Text, ...], ...] = tuple(
        (
            *_row(f)[:4], *([percent(f.massive_activation)] if any_massive else []), number(density.get(f.feature)),
            *_row(f)[4:],
        )
        for f in analysis.top_features
    )  # fmt: skip
    headers = (
        "Rank", "Feature", "Group", "Max activation", *(["Activation on massive tokens"] if any_massive else []),
        "Density", "Samples", "Label",
    )  # fmt: skip
    caption = "The strongest features (activations in scaled units)"
    fired = rows or analysis.massive_features
    body: Block = Table(caption, headers, rows, searchable=True) if fired else _none_fired(analysis)
    plots = (
        ("max_activation", "Histogram of features by strongest activation, per group."),
        ("samples", "Histogram of features by number of stored top examples, per group."),
        ("activation_vs_samples", "Strongest activation against number of samples, a dot per feature that fired."),
    )
    blocks = (body, *_massive(analysis), Plots(plots), Heading("Copies"), *copies(analysis))
    return Section("Top features by activation", blocks)


def _row(f: TopFeature) -> tuple[Text, ...]:
    return (
        number(f.rank), FeatureLink(f.feature), number(f.group), number(f.max_activation), number(f.samples),
        maybe_label(f.label),
    )  # fmt: skip


def _massive(analysis: Analysis) -> list[Block]:
    """The strongest of the features of massive tokens, in short; nothing where there are none."""
    count = analysis.summary.massive_features
    if not count:
        return []
    text = (
        "More than half of the summed activation of some features falls on massive tokens (section 3). They bear a "
        f"badge, and are left out of the list above and of the plots below: {number(count)}."
    )
    headers = ("Rank", "Feature", "Group", "Max activation", "Samples", "Label")
    rows = tuple(_row(f) for f in analysis.massive_features)
    return [Paragraph(text), Table("The strongest features of massive tokens", headers, rows)]


def feature_cards(analysis: Analysis) -> Section:
    """Section 6: features in full, the strongest, then those drawn from each group."""
    blocks: list[Block] = [
        Paragraph(
            "The features of section 5, and some drawn at random from each group's features that fired; "
            "features.parquet has all. Density is the share of the analysed held-out tokens on which a feature fires; "
            "activations are in scaled units. Tokens are counted over the peaks of its samples; ␣ is a space, ⏎ a line "
            "break. Logit effects are what one unit of activation adds to a token's logit on the direct way out, less "
            "the mean over the vocabulary. Of the contexts, the strongest come first, then some of each fifth of the "
            "uniformly drawn activations; the quantile is the share of those that are weaker."
        )
    ]
    strongest = [f for f in analysis.features if f.reason == "strongest"]
    parts = [("Strongest features", strongest)]
    parts += [
        (
            f"Drawn from group {group.group}",
            [f for f in analysis.features if f.reason == "drawn" and f.figures.group == group.group],
        )
        for group in analysis.weights.groups
    ]
    for title, shown in parts:
        if shown:
            blocks += [Heading(title), *(_card(f, analysis) for f in shown)]
    if not analysis.features:
        blocks.append(_none_fired(analysis))
    return Section("Feature analysis", tuple(blocks))


def feature_blocks(
    f: Feature, examples: tuple[Example, ...], edges: tuple[float, ...], with_tree: bool,
    names: Mapping[int, str] = MappingProxyType({}), labels: FeatureLabel | None = None,
    effects: bool = True,
) -> tuple[Block, ...]:  # fmt: skip
    """All about one feature.

    Args:
        edges: the histogram's borders.
        with_tree: whether parents were looked for.
        names: labels of other features, to stand beside their indices in short.
        labels: what a language model made of the feature, if it was asked.
        effects: whether logit effects are told in words.
    """

    def named(feature: int) -> tuple[Piece, ...]:
        return (
            (FeatureLink(feature), " ", Label(short_label(names[feature])))
            if feature in names
            else (FeatureLink(feature),)
        )

    figures = Table(
        f"Figures of feature {f.feature}",
        (
            "Max activation", "Mean activation", "Count", "Density", "Samples", "Training tokens since it fired",
            "Decoder norm", "Alignment",
        ),
        (
            (
                number(f.max_activation), number(f.mean_activation), number(f.count), number(f.density),
                number(f.samples), number(f.tokens_since_fired), number(f.decoder_norm), number(f.alignment),
            ),
        ),
    )  # fmt: skip
    tokens = listed([(Token(t.token), f" ×{number(t.count)}") for t in f.top_tokens]) or ("no samples",)
    near = listed([(*named(n.feature), f" ({number(n.cosine)})") for n in f.neighbours]) or ("none",)
    no_parent = "none" if with_tree else NOT_MEASURED
    blocks: list[Block] = [
        figures,
        Items(
            (
                *(describe_label(labels) if labels else [("Label: ", maybe_label(f.label))]),
                ("Top tokens: ", *tokens),
                *(_logits(f) if effects else []),
                ("Nearest features (decoder cosine): ", *near),
                ("Parent: ", *(_parent(named(f.parent.feature), f.parent) if f.parent else (no_parent,))),
                ("Children: ", *(listed([named(c) for c in f.children]) or ("none",))),
                *_particulars(f),
            )
        ),
        Bars("Activations by size (scaled units)", edges, f.histogram),
    ]
    if examples:
        blocks.append(Contexts(examples, f.max_activation))
    return tuple(blocks)


def _card(shown: ShownFeature, analysis: Analysis) -> Card:
    f = shown.figures
    known = {row.feature: row for row in analysis.labelling.shown} if analysis.labelling else {}
    own = known.get(f.feature)
    blocks = feature_blocks(f, shown.examples, analysis.activation_edges, analysis.tree is not None, labels=own)
    summary = (maybe_label(f.label), f", max activation {number(f.max_activation)}, density {number(f.density)}")
    kind = ", of massive tokens" if f.massive else ""
    return Card(f.feature, f"Feature {f.feature} (group {f.group}){kind}", summary, blocks)


def _particulars(f: Feature) -> list[Text]:
    """What a feature has to do with massive tokens, and whether it is a copy; nothing of most."""
    found: list[Text] = []
    if f.massive_firings:
        about = "a feature of massive tokens" if f.massive else "not a feature of massive tokens"
        shares = f"{percent(f.massive_activation)} of its activation and {percent(f.massive_firings)} of its firings"
        found.append(f"Massive tokens: {about}; {shares} fall on them")
    if f.copy_of is not None:
        found.append(("Copy of: ", FeatureLink(f.copy_of)))
    return found


def _logits(f: Feature) -> list[Text]:
    return [
        ("Raises the logits of: ", *_effects(f.positive_logits)),
        ("Lowers the logits of: ", *_effects(f.negative_logits)),
    ]


def _effects(effects: tuple[LogitEffect, ...] | None) -> tuple[Piece, ...]:
    if effects is None:
        return (NOT_MEASURED,)
    return listed([(Token(e.token), f" {number(e.value)}") for e in effects])


def _parent(name: tuple[Piece, ...], p: Parent) -> tuple[Piece, ...]:
    return (
        *name,
        f" (decoder cosine {number(p.cosine)}; fires on {percent(p.coactivation)} of this feature's tokens, on "
        f"{percent(p.base_rate)} of all)",
    )


def _none_fired(analysis: Analysis) -> Paragraph:
    s = analysis.summary
    return Paragraph(
        f"None of the {number(s.total_features)} features fired on {number(s.analysed_tokens)} held-out tokens."
    )
