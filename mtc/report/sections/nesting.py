"""Section 7: what each prefix of the nested dictionary adds, and the tree of its features."""

from __future__ import annotations

from mtc.report.blocks import (
    Block,
    Branch,
    Branches,
    FeatureLink,
    Heading,
    Items,
    Paragraph,
    Piece,
    Section,
    Table,
    Text,
    Token,
)
from mtc.report.sections.listing import listed, maybe_label
from mtc.results import NOT_MEASURED, Analysis, Family, PrefixStep, Tree, number, percent, whole_range


def nesting(analysis: Analysis) -> Section:
    """Section 7: prefix by prefix, then parents and children, splitting and absorption."""
    blocks: list[Block] = [Heading("What each prefix adds"), *_steps(analysis), Heading("Tree of features")]
    tree = analysis.tree
    if tree is None:
        blocks.append(
            Paragraph(
                f"The tree was {NOT_MEASURED}: it takes a dictionary of several groups and tokens on which features "
                "are seen to fire together."
            )
        )
    else:
        blocks += [
            *_tree(tree), Heading("Splitting candidates"), *_splits(tree), Heading("Absorption candidates"),
            *_absorptions(tree),
        ]  # fmt: skip
    return Section("Nested dictionary", tuple(blocks))


def _steps(analysis: Analysis) -> list[Block]:
    groups = analysis.weights.groups
    rows = tuple(
        (
            number(s.group), whole_range(groups[s.group].first, groups[s.group].end - 1), number(s.prefix),
            number(s.fvu_before), number(s.fvu_after), number(s.fvu_before - s.fvu_after),
            number((s.fvu_before - s.fvu_after) / (groups[s.group].end - groups[s.group].first) * 1000),
            percent(s.recovered_before) if s.group else "–", percent(s.recovered_after),
        )
        for s in analysis.prefix_steps
    )  # fmt: skip
    headers = ["Group", "Features", "Prefix", "FVU before", "FVU after", "Fall in FVU", "Fall per 1,000 features"]
    headers += ["Loss recovered before (zero ablation)", "Loss recovered after"]
    blocks: list[Block] = [Table("What each group adds to the groups before it", tuple(headers), rows)]
    for step in analysis.prefix_steps[1:]:
        blocks += _gains(step)
    return blocks


def _gains(step: PrefixStep) -> list[Block]:
    what = f"group {number(step.group)}"
    if not step.tokens:
        text = f"No token that occurs {number(step.min_count)} times or more is reconstructed better with {what}."
        return [Paragraph(text)]
    rows: tuple[tuple[Text, ...], ...] = tuple(
        (Token(t.token), number(t.count), number(t.before), number(t.after), number(t.before - t.after))
        for t in step.tokens
    )
    caption = (
        f"Tokens that gain most by {what}, of those that occur {number(step.min_count)} times or more "
        "(squared error over the mean squared deviation of all targets)"
    )
    return [Table(caption, ("Token", "Occurrences", "Error before", "Error after", "Fall"), rows)]


def _tree(tree: Tree) -> list[Block]:
    rows = tuple(
        (number(g), number(judged), number(have))
        for g, (judged, have) in enumerate(zip(tree.judged, tree.with_parent, strict=True))
    )
    limits = tuple((name, number(value)) for name, value in tree.limits.items())
    return [
        Paragraph(
            f"On {number(tree.tokens)} sampled held-out tokens. A feature's parent is the feature of an earlier group "
            "with the largest product of decoder cosine and excess co-activation, where the excess is 1 if the parent "
            "always fires with the feature and 0 if independently of it. All of this section are candidates to look "
            "at, not proofs."
        ),
        Table("Thresholds", ("Threshold", "Value"), limits),
        Table(
            "Features with a parent", ("Group", "Features that fired often enough to tell", "Features with a parent"),
            rows,
        ),
        Paragraph(
            "The parents with most children, and of each the children with the strongest bonds (decoder cosine times "
            "co-activation, the share of the child's tokens on which the parent fires too):"
            if tree.families
            else "No feature has a parent."
        ),
        *([Branches(tuple(_family(f) for f in tree.families))] if tree.families else []),
    ]  # fmt: skip


def _family(family: Family) -> Branch:
    more = family.num_children - len(family.children)
    twigs: list[Text] = [
        (
            FeatureLink(c.feature), f" (group {number(c.group)}) ", maybe_label(c.label),
            f": cosine {number(c.cosine)}, co-activation {percent(c.coactivation)}",
        )
        for c in family.children
    ]  # fmt: skip
    if more:
        twigs.append(f"and {number(more)} more")
    head: tuple[Piece, ...] = (FeatureLink(family.feature), f" (group {number(family.group)}) ")
    # Every child tells the same rate: it is the parent's.
    rate = family.children[0].base_rate if family.children else None
    tail = f"; fires on {percent(rate)} of the tokens; children: {number(family.num_children)}"
    return Branch((*head, maybe_label(family.label), tail), tuple(twigs))


def _shown(shown: int, total: int) -> str:
    return f"{number(shown)} of {number(total)}" if shown < total else f"all {number(total)}"


def _splits(tree: Tree) -> list[Block]:
    rule = Paragraph(
        "A parent is a splitting candidate if its children together fire on most of its tokens, hardly ever two at a "
        f"time (thresholds above). Found: {number(tree.num_splits)}."
    )
    if not tree.splits:
        return [rule]
    rows: tuple[tuple[Text, ...], ...] = tuple(
        (
            FeatureLink(s.feature), maybe_label(s.label),
            listed([
                (FeatureLink(c), " ", maybe_label(label)) for c, label in zip(s.children, s.child_labels, strict=True)
            ]),
            number(s.fired), percent(s.coverage), percent(s.overlap),
        )
        for s in tree.splits
    )  # fmt: skip
    caption = f"Splitting candidates, {_shown(len(tree.splits), tree.num_splits)}"
    headers = ("Feature", "Label", "Children", "Sampled tokens", "A child fires on", "Two or more on, of these")
    return [rule, Table(caption, headers, rows)]


def _absorptions(tree: Tree) -> list[Block]:
    share = percent(tree.num_absorptions / tree.tested_pairs) if tree.tested_pairs else NOT_MEASURED
    blocks: list[Block] = [
        Paragraph(
            "Where a later feature fires, an earlier one should fire too if the target reaches as far along its "
            "decoder row as in the median over the tokens where it does fire. It is absorbed if it is silent all the "
            "same and the later feature makes up much of that reach; the pair is a candidate if that is so on a large "
            "share of these tokens (thresholds above). Found: "
            f"{number(tree.num_absorptions)} of {number(tree.tested_pairs)} pairs "
            f"that could be tested ({share})."
        ),
        Items((
            "The earlier feature's own direction stands for what it means; a probe for a known property would tell "
            "more.",
            "A threshold that lets only the strongest activations through looks like absorption too.",
        )),
    ]  # fmt: skip
    if tree.absorptions:
        rows: tuple[tuple[Text, ...], ...] = tuple(
            (
                FeatureLink(a.parent), maybe_label(a.parent_label), FeatureLink(a.child), maybe_label(a.child_label),
                number(a.cosine), number(a.expected), number(a.absorbed), percent(a.absorbed / a.expected),
            )
            for a in tree.absorptions
        )  # fmt: skip
        headers = ["Earlier feature", "Its label", "Later feature", "Its label", "Decoder cosine"]
        headers += ["Tokens where both should fire", "Absorbed", "Share"]
        caption = f"Absorption candidates, {_shown(len(tree.absorptions), tree.num_absorptions)}"
        blocks.append(Table(caption, tuple(headers), rows))
    return blocks
