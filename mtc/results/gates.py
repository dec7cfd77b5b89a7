"""What a run must reach before it is promoted: limits on a few held-out figures, layer by layer.

A limit is absolute, or it counts from the figure of what is promoted now, in the figure's own unit: with
`fvu: {max_increase: 0.01}` a run of FVU 0.31 may take the place of one of 0.30.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from mtc.record import Record
from mtc.results.analysis import Summary
from mtc.results.numbers import NOT_MEASURED


class Limits(Record):
    """What one figure is held to; nothing by default."""

    model_config = ConfigDict(allow_inf_nan=False)

    max: float | None = None
    """Largest value."""
    min: float | None = None
    """Smallest value."""
    max_increase: float | None = Field(default=None, ge=0)
    """How much larger than that of what is promoted now the figure may be."""
    max_decrease: float | None = Field(default=None, ge=0)
    """How much smaller than that of what is promoted now the figure may be."""

    @property
    def relative(self) -> bool:
        """Whether what is promoted now is asked for."""
        return self.max_increase is not None or self.max_decrease is not None


class Gate(Record):
    """The limits of each figure, every layer of a run being held to all of them."""

    fvu: Limits = Limits()
    """Held-out FVU of the whole dictionary, without massive tokens."""
    loss_recovered: Limits = Limits()
    """Share of the loss of zero ablation that the whole dictionary recovers, from 0 to 1."""
    dead: Limits = Limits()
    """Share of the features that are dead by the training counter, from 0 to 1."""
    l0_error: Limits = Limits()
    """How far L0 is from the k that was asked for: |mean L0 - k| / k."""

    @model_validator(mode="after")
    def _can_hold(self) -> Self:
        for name, limits in self.limits.items():
            if limits.min is not None and limits.max is not None and limits.min > limits.max:
                raise ValueError(f"{name}: min {limits.min:g} is more than max {limits.max:g}, nothing is within")
        if all(limits == Limits() for limits in self.limits.values()):
            raise ValueError(
                "a gate needs one limit at least, such as `fvu: {max: 0.3}`; figures are "
                f"{', '.join(Gate.model_fields)}, limits {', '.join(Limits.model_fields)}"
            )
        return self

    @property
    def limits(self) -> dict[str, Limits]:
        """The limits by the figure's name."""
        return {name: getattr(self, name) for name in Gate.model_fields}


class Figures(Record):
    """What a gate looks at of one transcoder; None for what was not measured."""

    fvu: float | None
    """Held-out FVU of the whole dictionary, without massive tokens."""
    loss_recovered: float | None
    """Share of the loss of zero ablation that the whole dictionary recovers."""
    dead: float | None
    """Share of the features that are dead by the training counter."""
    l0_error: float | None
    """|mean L0 - k| / k."""


class Check(NamedTuple):
    """One figure of one layer, held to one limit."""

    layer: str
    """Name of the transcoder in its run, such as `layer9`."""
    figure: str
    value: float | None
    limit: str
    """In words."""
    now: float | None
    """That of what is promoted now; None where there is none, or it is not known."""
    problem: str | None
    """Why the figure is not within the limit; None if it is."""


def figures_of(summary: Summary) -> Figures:
    """The figures of one transcoder's analysis."""
    recovered = summary.loss.share_of_zero(-1) if summary.loss else None
    return Figures(
        fvu=_finite(summary.fvu[-1]),
        loss_recovered=_finite(recovered),
        dead=_finite(summary.dead_fraction),
        l0_error=_finite(abs(summary.l0 - summary.k) / summary.k),
    )


def hold(gate: Gate, run: Mapping[str, Figures], now: Mapping[str, Figures | None] | None) -> list[Check]:
    """Every limit of the gate on every layer of a run, by name, beside what is promoted now; None if nothing is.

    Of what is promoted a layer whose figures are not known is None. Nothing is better or worse than nothing: where
    nothing is promoted, relative limits hold.
    """
    checks = []
    for layer in [*run, *(layer for layer in now or {} if layer not in run)]:
        for name, limits in gate.limits.items():
            if layer not in run:  # what is promoted has it: only a comparison asks for it
                if limits.relative:
                    before = getattr((now or {})[layer], name, None)
                    checks.append(Check(layer, name, None, "relative", before, "the run has no such layer"))
                continue
            value, before = getattr(run[layer], name), getattr((now or {}).get(layer), name, None)
            checks += _held(layer, name, limits, value, before, now is not None)
    return checks


def _held(
    layer: str, figure: str, limits: Limits, value: float | None, now: float | None, promoted: bool
) -> list[Check]:
    words = {
        "max": "at most {:g}", "min": "at least {:g}", "max_increase": "at most {:g} more than now",
        "max_decrease": "at most {:g} less than now",
    }  # fmt: skip
    checks = []
    for kind, text in words.items():
        limit = getattr(limits, kind)
        if limit is None:
            continue
        relative = kind.startswith("max_")
        problem: str | None = None
        if value is None:
            problem = NOT_MEASURED
        elif relative and now is None:
            problem = "nothing to compare with: not known of what is promoted now" if promoted else None
        else:
            assert now is not None or not relative
            off = {"max": value - limit, "min": limit - value}
            if relative:
                off = {"max_increase": value - now - limit, "max_decrease": now - value - limit}  # type: ignore[operator]
            problem = "beyond the limit" if off[kind] > 1e-9 else None
        checks.append(Check(layer, figure, value, text.format(limit), now, problem))
    return checks


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
