"""The report's figures with the labels that features have now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mtc.record import Record
from mtc.results import Analysis, FeatureLabel, Labelling

R = TypeVar("R", bound=Record)


def relabel(analysis: Analysis, rows: Sequence[FeatureLabel], labelling: Labelling) -> Analysis:
    """The analysis with the language model's label wherever a feature is named, or with that of rules where there is
    none; and with the labelling itself."""
    names = {row.feature: row.label or row.machine_label for row in rows}
    return _renamed(analysis, names).model_copy(update={"labelling": labelling})


def _renamed(record: R, names: Mapping[int, str | None]) -> R:
    changed = {name: _inside(getattr(record, name), names) for name in type(record).model_fields}
    for who, label in (("feature", "label"), ("parent", "parent_label"), ("child", "child_label")):
        if {who, label} <= changed.keys() and not isinstance(record, FeatureLabel):
            changed[label] = names.get(changed[who], changed[label])
    if "child_labels" in changed:
        old = zip(changed["children"], changed["child_labels"], strict=True)
        changed["child_labels"] = tuple(names.get(child, label) for child, label in old)
    return record.model_copy(update=changed)


def _inside(value: Any, names: Mapping[int, str | None]) -> Any:
    if isinstance(value, Record):
        return _renamed(value, names)
    return tuple(_inside(each, names) for each in value) if isinstance(value, tuple) else value
