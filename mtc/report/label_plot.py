"""How often a judge that knows a label calls contexts active, by how active the feature is in them."""

from __future__ import annotations

from matplotlib.axes import Axes

from mtc.report.drawing import COLOURS, GREY, MARKERS, say
from mtc.results import Labelling

PARTS = {
    "random": "random", "near miss": "near\nmiss", "1": "weakest\nfifth", "2": "2nd", "3": "3rd", "4": "4th",
    "5": "strongest\nfifth",
}  # fmt: skip


def draw_label_scores(axes: Axes, labelling: Labelling | None) -> None:
    """A line for each kind of label: low on silent contexts and high on active ones if they say what the feature does;
    flat if they say nothing."""
    axes.set_title("How often the judge called contexts active")
    axes.set_ylabel("called active (share)")
    if labelling is None or not labelling.yes:
        return say(axes, "no labels were scored")
    parts = [part for part in PARTS if any(y.part == part for y in labelling.yes)]
    names = {"model": labelling.model if len(labelling.model) <= 32 else "the language model", "machine": "rules"}
    for i, (kind, name) in enumerate(names.items()):
        found = {y.part: y.share for y in labelling.yes if y.labels == kind}
        at = [j for j, part in enumerate(parts) if part in found]
        shares = [found[parts[j]] for j in at]
        spread = [[s.value - s.low for s in shares], [s.high - s.value for s in shares]]
        shift = [j + 0.08 * (2 * i - 1) for j in at]
        axes.errorbar(
            shift, [s.value for s in shares], yerr=spread, color=COLOURS[i], marker=MARKERS[i], capsize=3,
            linewidth=1.2, label=f"labels of {name}",
        )  # fmt: skip
    axes.axvline(sum(not part.isdigit() for part in parts) - 0.5, color=GREY, linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(parts)), [PARTS[part] for part in parts])
    axes.set_xlabel("contexts: silent ones, then active ones by activation; whiskers: 95 % interval")
    axes.set_ylim(-0.03, 1.18)  # room for the legend
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y")
    legend = axes.legend(fontsize=9, loc="upper left", ncols=2)
    for text in legend.get_texts():  # a model's name is no formula
        text.set_parse_math(False)
