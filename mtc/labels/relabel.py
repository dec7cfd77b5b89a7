"""The report's figures with the labels that features have now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from mtc.record import Record
from mtc.results import Analysis, FeatureLabel, File, Labelling, report_files
from mtc.storage import LABELS, RunDirectory, read_labels

R = TypeVar("R", bound=Record)


def relabel(analysis: Analysis, names: Mapping[int, str | None], labelling: Labelling) -> Analysis:
    """The analysis with these labels, by feature, wherever a feature is named, and with the labelling itself."""
    layer, listed = analysis.config.model.layer, {file.name for file in analysis.files}
    new = report_files(layer, labelled=True) | {LABELS: "labels by a language model, with their scores"}
    more = [File(name=name, description=text) for name, text in new.items() if name not in listed]
    return _renamed(analysis, names).model_copy(update={"labelling": labelling, "files": (*analysis.files, *more)})


def keep_labels(run: RunDirectory, analysis: Analysis) -> Analysis:
    """A new analysis of a run with the labels that the run has already, whose scores stay those on earlier examples."""
    if not (run.exists(LABELS) and run.exists("analysis.json")):
        return analysis
    labelling = json.loads(run.read("analysis.json")).get("labelling")
    if labelling is None:
        return analysis
    names = {row.feature: row.label for row in read_labels(run) if row.label is not None}
    return relabel(analysis, names, Labelling.model_validate(labelling))


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
