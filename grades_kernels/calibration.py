"""Choosing tau: thresholds at which a wanted share of the matrices would have frozen.

A unit freezes by step T if `patience` checks in a row lie below tau, so what tau has to exceed can
be read off its statistics: the least, over all windows of `patience` checks, of the largest value
in the window. A quantile of these critical values over the units is the threshold for a share of
them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .report import (
    KIND_COLOURS,
    FreezeReport,
    UnitReport,
    _layout,
    _picture_path,
    _range,
    _shorten,
    _Table,
)

__all__ = ["Calibration", "calibrate"]

SCOPES = ("kind", "unit", "all")
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # columns of the printed curve
PLOTTED_KINDS = 18  # more curves than that are drawn without a legend


@dataclass(frozen=True)
class Calibration:
    """Thresholds that `calibrate` proposes, and what they are read from.

    `str()` gives the curve of share against tau as a table.

    Attributes:
        taus: `{regex: tau}` for `grades_param_groups(model, tau=0.0, taus=...)`; a regex matches
            the units of one scope and no others.
        share: Wanted share of the units.
        by_step: Step by which it would have frozen.
        per: "kind", "unit" or "all".
        patience: Checks in a row that freeze a unit.
        criterion: The statistic, "/" between several.
        curves: Per scope the critical values of its units, in increasing order: the threshold has
            to lie above so many of them as units are to freeze. With `per="unit"` there is one
            curve, of critical values relative to the unit's own median.
        marks: Per curve the proposed threshold, on the curve's scale.
        unit_taus: Per unit its proposed threshold.
        forecast: `(step, share)`: what these thresholds would have frozen by every check.
        kinds: Per kind of matrix its units.
    """

    taus: dict[str, float]
    share: float
    by_step: int
    per: str
    patience: int
    criterion: str
    curves: dict[str, tuple[float, ...]]
    marks: dict[str, float]
    unit_taus: dict[str, float]
    forecast: tuple[tuple[int, float], ...]
    kinds: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        header = [self.per, "units", *(f"{share:.0%}" for share in SHARES), "tau"]
        rows = []
        for name, curve in self.curves.items():
            row = [_shorten(name, 28), str(len(curve))]
            row += [_number(_threshold(curve, share)) for share in SHARES]
            rows.append([*row, _number(self.marks[name])])
        scale = ", relative to a unit's median \"" if self.per == "unit" else ' of "'
        title = f'tau{scale}{self.criterion}" that freezes a share of the units'
        text = [self._headline(), _layout(_Table(title, header, rows, left=[self.per]))]
        if self.per == "unit":
            rows = [
                [_shorten(kind, 28), str(len(units)), _range([self.unit_taus[u] for u in units])]
                for kind, units in self.kinds.items()
            ]
            table = _Table("Thresholds by kind", ["kind", "units", "tau"], rows, left=["kind"])
            text.append(_layout(table))
        return "\n\n".join(text)

    def _headline(self) -> str:
        scope = {"kind": "of every kind of matrix", "unit": "of all units", "all": "of all units"}
        steps = []
        for share in (0.25, 0.5, 0.75, 1.0):
            reached = [step for step, frozen in self.forecast if frozen >= share]
            if reached:
                steps.append(f"{share:.0%} by step {reached[0]:,}")
        return (
            f"To freeze {self.share:.0%} {scope[self.per]} by step {self.by_step:,} (patience "
            f"{self.patience})\nThis would have frozen {self.forecast[-1][1]:.0%} of all units"
            + (f": {', '.join(steps)}" if steps else "")
        )

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the share of frozen units against tau, and against the step with these thresholds.

        Args:
            path: Picture to write; the suffix chooses the format, ".png" when there is none.

        Returns:
            The path that was written.

        Raises:
            ImportError: matplotlib is missing; the message says how to install it.
        """
        path = _picture_path(path, "Calibration.plot()")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (name, curve) in enumerate(self.curves.items()):
            finite = [value for value in curve if 0 < value < math.inf]
            shares = [100 * (1 + k) / len(curve) for k, x in enumerate(curve) if x in finite]
            colour = KIND_COLOURS[number % len(KIND_COLOURS)]
            dashes = "-" if number < len(KIND_COLOURS) else "--"
            left.step(finite, shares, where="post", color=colour, linestyle=dashes, label=name)
            mark = self.marks[name]
            frozen = 100 * sum(value < mark for value in curve) / len(curve)
            left.plot([mark], [frozen], marker="o", color=colour)
        left.axhline(100 * self.share, color="0.5", linestyle=":", linewidth=1)
        left.set_xscale("log")
        left.set_xlabel(f'tau of "{self.criterion}"' + " / own median" * (self.per == "unit"))
        left.set_title(f"Frozen by step {self.by_step:,}; dots: proposed", loc="left", fontsize=11)
        if 1 < len(self.curves) <= PLOTTED_KINDS:
            left.legend(fontsize=8, frameon=False)
        steps, frozen_shares = zip(*self.forecast, strict=True)
        right.step(steps, [100 * x for x in frozen_shares], where="post", color="0.2")
        right.set_xlabel("optimizer step")
        right.set_title("Frozen under the proposed thresholds", loc="left", fontsize=11)
        for axis in (left, right):
            axis.set_ylim(-2, 104)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
            axis.grid(alpha=0.25)
        figure.savefig(path, dpi=150)
        return path


def calibrate(
    report: FreezeReport,
    share: float = 0.5,
    by_step: int | None = None,
    *,
    per: str = "kind",
    patience: int = 1,
    grace_steps: int | None = None,
) -> Calibration:
    """Propose thresholds under which a share of the units would have frozen in an observed run.

    Observe with `tau=0.0` and a short grace period, under the `check_every` of the run to come:
    the recorded checks are taken as they are, void ones left out. In a long history only every 2nd,
    4th, ... check is kept, and `patience` counts the kept ones. What the freezing of one matrix
    does to the statistics of the others is not known and not accounted for.

    Args:
        report: Of an observing run: `optimizer.report()`, or `FreezeReport.load(path)`.
        share: Wanted share of the units, in (0, 1]. Default 0.5.
        by_step: Step by which they would have frozen. Default: the last that was recorded.
        per: "kind" (default): one tau for each kind of matrix ("q_proj", ...), the share counted
            within the kind. "unit": one tau for each unit, the same fraction of its own median
            everywhere, the share counted over all. "all": one tau, as in the paper.
        patience: Of the run to come. Default 1.
        grace_steps: Of the run to come: earlier checks do not count. Default: all do.

    Returns:
        The thresholds, with the curve of share against tau as `str()` and as `.plot(path)`.

    Raises:
        ValueError: For an argument out of range, a report without measurements in the range, one
            tau for different statistics, or units measured too seldom to reach the share.

    Example:
        >>> calibration = calibrate(optimizer.report(), share=0.5, by_step=300, patience=3)
        >>> groups = grades_param_groups(model, tau=0.0, taus=calibration.taus)
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"Invalid share: {share!r} (must be a number in (0, 1])")
    if per not in SCOPES:
        raise ValueError(f"Invalid per: {per!r} (choose one of {', '.join(map(repr, SCOPES))})")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ValueError(f"Invalid patience: {patience!r} (must be an integer of at least 1)")
    if not report.units:
        raise ValueError("the report has no monitored unit: observe with tau=0.0 first")
    last = max((step for step, _ in report.history), default=0)
    by_step = last if by_step is None else by_step
    if by_step > last:
        raise ValueError(
            f"Invalid by_step: {by_step!r} (the report's last measurement is of step {last}: "
            "observe longer, or choose an earlier step)"
        )
    grace_steps = 0 if grace_steps is None else grace_steps
    history = [(step, row) for step, row in report.history if grace_steps < step <= by_step]
    if not history:
        raise ValueError(
            f"the report holds no measurement in steps {grace_steps + 1} to {by_step}: observe "
            "with tau=0.0, and grace_steps smaller than by_step"
        )

    series = {
        unit.name: [(step, row[k]) for step, row in history if math.isfinite(row[k])]
        for k, unit in enumerate(report.units)
    }
    critical = {
        name: min(
            (
                max(x for _, x in points[i : i + patience])
                for i in range(len(points) - patience + 1)
            ),
            default=math.inf,
        )
        for name, points in series.items()
    }
    kinds: dict[str, list[UnitReport]] = {}
    for unit in report.units:
        kinds.setdefault(unit.kind, []).append(unit)
    scale = dict.fromkeys(series, 1.0)
    scopes = {"all": list(report.units)} if per != "kind" else kinds
    if per == "unit":
        # A constant statistic of 0 needs no scale of its own.
        scale = {
            name: median(x for _, x in points) or 1.0 if points else 1.0
            for name, points in series.items()
        }

    taus: dict[str, float] = {}
    curves: dict[str, tuple[float, ...]] = {}
    marks: dict[str, float] = {}
    unit_taus: dict[str, float] = {}
    for scope, units in scopes.items():
        criteria = {unit.criterion for unit in units}
        if len(criteria) > 1 and per != "unit":
            raise ValueError(
                f"{scope!r} has units of different statistics, {sorted(criteria)}, which share no "
                "scale: use per='unit', or one statistic"
            )
        curve = tuple(sorted(critical[unit.name] / scale[unit.name] for unit in units))
        mark = _threshold(curve, share)
        if mark == math.inf:
            enough = sum(value < math.inf for value in curve)
            raise ValueError(
                f"share={share} cannot be reached: only {enough} of {len(curve)} units of "
                f"{scope!r} have {patience} measurements in steps {grace_steps + 1} to {by_step}. "
                "Observe longer, or lower share or patience"
            )
        curves[scope], marks[scope] = curve, mark
        for unit in units:
            unit_taus[unit.name] = mark * scale[unit.name]
        if per == "kind":
            taus[_pattern(scope, [unit.name for unit in units], series)] = mark
    if per == "unit":
        taus = {f"^{re.escape(name)}$": tau for name, tau in unit_taus.items()}
    elif per == "all":
        taus = {".": marks["all"]}

    frozen_at = [_frozen_at(series[name], tau, patience) for name, tau in unit_taus.items()]
    forecast = tuple(
        (step, sum(at <= step for at in frozen_at) / len(frozen_at)) for step, _ in history
    )
    return Calibration(
        taus=taus,
        share=share,
        by_step=by_step,
        per=per,
        patience=patience,
        criterion="/".join(dict.fromkeys(unit.criterion for unit in report.units)),
        curves=curves,
        marks=marks,
        unit_taus=unit_taus,
        forecast=forecast,
        kinds={kind: tuple(unit.name for unit in units) for kind, units in kinds.items()},
    )


def _threshold(curve: Sequence[float], share: float) -> float:
    """A tau above so many critical values, in increasing order, as make up the share.

    In the middle between the last unit that freezes and the first that does not; 1 % above the last
    where all freeze.
    """
    n = math.ceil(share * len(curve) - 1e-9)  # 0.1 * 30 is 3.0000000000000004
    highest = curve[n - 1]
    above = curve[n] if n < len(curve) else math.inf
    tau = math.sqrt(highest * above) if above < math.inf else 1.01 * highest
    return max(tau, math.nextafter(highest, math.inf))


def _frozen_at(points: Iterable[tuple[int, float]], tau: float, patience: int) -> float:
    """Step of the check at which a unit would have frozen; infinite where it would not have."""
    hits = 0
    for step, statistic in points:
        hits = hits + 1 if statistic < tau else 0
        if hits >= patience:
            return step
    return math.inf


def _pattern(kind: str, names: Sequence[str], all_names: Iterable[str]) -> str:
    """A regex that finds these units among all: the kind as a word where that does, else names."""
    word = rf"\b{re.escape(kind)}\b"
    if {name for name in all_names if re.search(word, name)} == set(names):
        return word
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def _number(value: float) -> str:
    return "-" if value == math.inf else f"{value:.4g}"
