"""Choosing tau: thresholds at which a wanted share of the matrices would have frozen.

A unit freezes by step T if `patience` checks in a row are below tau. Its critical value, which tau
has to exceed, is therefore the minimum, over all windows of `patience` checks, of the largest value
in the window. The threshold for a share of the units is a quantile of their critical values.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from statistics import median

from ..freezing.config import check_choice, check_integer, check_number
from .plot import KIND_COLOURS, picture_path, set_share_axis
from .record import units_by_kind
from .report import FreezeReport
from .tables import Table, layout, number_range, shorten

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # columns of the printed curve
PLOTTED_KINDS = 18  # more curves than that are drawn without a legend


@dataclass(frozen=True)
class Calibration:
    """Thresholds that `calibrate` proposes; `str()` is the curve of share against tau as a table.

    Attributes:
        taus: `{regex: tau}` for `grades_param_groups(model, tau=0.0, taus=...)`.
        share, by_step, per, patience: The arguments of `calibrate`.
        criterion: The statistic, "/" between several.
        curves: Critical values of the units of each scope, in increasing order; with `per="unit"`
            one curve, of critical values relative to the unit's own median.
        marks: Proposed threshold of each curve, on the curve's scale.
        unit_taus: Proposed threshold of each unit.
        forecast: `(step, share)`: share of all units that would have frozen by every check.
        kinds: Names of the units of each kind of matrix.
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
        scope = "every kind of matrix" if self.per == "kind" else "all units"
        text = (
            f"To freeze {self.share:.0%} of {scope} by step {self.by_step:,} (patience "
            f"{self.patience})\nThis would have frozen {self.forecast[-1][1]:.0%} of all units"
        )
        steps = []
        for share in (0.25, 0.5, 0.75, 1.0):
            reached = [step for step, frozen in self.forecast if frozen >= share]
            steps += [f"{share:.0%} by step {step:,}" for step in reached[:1]]
        text += (": " if steps else "") + ", ".join(steps)
        header = [self.per, "units", *(f"{share:.0%}" for share in SHARES), "tau"]
        rows = []
        for name, curve in self.curves.items():
            taus = [*(_threshold(curve, share) for share in SHARES), self.marks[name]]
            numbers = ("-" if tau == math.inf else f"{tau:.4g}" for tau in taus)
            rows.append([shorten(name, 28), str(len(curve)), *numbers])
        scale = ", relative to a unit's median \"" if self.per == "unit" else ' of "'
        title = f'tau{scale}{self.criterion}" that freezes a share of the units'
        text += "\n\n" + layout(Table(title, header, rows, left=[self.per]))
        if self.per == "unit":
            rows = []
            for kind, units in self.kinds.items():
                taus = [self.unit_taus[unit] for unit in units]
                rows.append([shorten(kind, 28), str(len(units)), number_range(taus)])
            header = ["kind", "units", "tau"]
            text += "\n\n" + layout(Table("Thresholds by kind", header, rows, left=["kind"]))
        return text

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the share of frozen units against tau, and against the step with these thresholds.

        `path`, the result and the errors are those of `FreezeReport.plot`.
        """
        path = picture_path(path, "Calibration.plot()")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        styles = cycle(product(("-", "--"), KIND_COLOURS))
        for (name, curve), (line, colour) in zip(self.curves.items(), styles, strict=False):
            points = [(x, (k + 1) / len(curve)) for k, x in enumerate(curve) if 0 < x < math.inf]
            taus, shares = zip(*points, strict=True) if points else ((), ())
            # matplotlib leaves out labels that begin with an underscore.
            label = f" {name}" if name.startswith("_") else name
            left.step(taus, shares, where="post", label=label, color=colour, linestyle=line)
            mark = self.marks[name]
            left.plot(mark, sum(x < mark for x in curve) / len(curve), marker="o", color=colour)
        left.axhline(self.share, color="0.5", linestyle=":", linewidth=1)
        left.set_xscale("log")
        left.set_xlabel(f'tau of "{self.criterion}"' + " / own median" * (self.per == "unit"))
        if 1 < len(self.curves) <= PLOTTED_KINDS:
            left.legend(fontsize=8, frameon=False)
        right.step(*zip(*self.forecast, strict=True), where="post", color="0.2")
        right.set_xlabel("optimizer step")
        left.set_title(f"Frozen by step {self.by_step:,}; dots: proposed", loc="left")
        right.set_title("Frozen under the proposed thresholds", loc="left")
        for axis in (left, right):
            set_share_axis(axis)
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

    Observe with `tau=0.0`, a short grace period and the `check_every` of the later run: the
    recorded checks are used as they are, without the void ones. A long history contains only every
    2nd, 4th, ... check, and `patience` counts these. The effect that freezing one matrix has on the
    statistics of the others is unknown and not accounted for.

    Args:
        report: Of an observing run: `optimizer.report()`, or `FreezeReport.load(path)`.
        share: Wanted share of the units, in (0, 1]. Default 0.5.
        by_step: Step by which they would have frozen. Default: the last that was recorded.
        per: "kind" (default): one tau for each kind of matrix ("q_proj", ...), the share counted
            within the kind. "unit": one tau for each unit, the same fraction of its own median
            everywhere, the share counted over all. "all": one tau, as in the paper.
        patience: `patience` of the later run. Default 1.
        grace_steps: `grace_steps` of the later run: earlier checks do not count. Default: half of
            `by_step`, as the later run has with `alpha=0.5`.

    Returns:
        The thresholds; `str()` and `.plot(path)` show the curve of share against tau.

    Raises:
        TypeError: `report` is no FreezeReport.
        ValueError: An argument is out of range, the report has no measurement in the range, units
            of different statistics would share one tau, or too few measurements reach the share.
    """
    if not isinstance(report, FreezeReport):
        raise TypeError(f"report={report!r} must be a FreezeReport: pass optimizer.report()")
    check_number("share", share, "(0, 1]", lambda x: 0 < x <= 1)
    check_choice("per", per, ("kind", "unit", "all"))
    check_integer("patience", patience, 1)
    if not report.units:
        raise ValueError("the report has no monitored unit: observe with tau=0.0 first")
    if not report.history:
        raise ValueError("the report has no measurement: observe with tau=0.0 beyond grace_steps")
    last = report.history[-1][0]
    by_step = last if by_step is None else by_step
    check_integer("by_step", by_step, 0)
    grace_steps = by_step // 2 if grace_steps is None else grace_steps
    check_integer("grace_steps", grace_steps, 0)
    if by_step > last:
        raise ValueError(
            f"Invalid by_step: {by_step!r} (the report's last measurement is of step {last}: "
            "observe longer, or choose an earlier step)"
        )
    history = [(step, row) for step, row in report.history if grace_steps < step <= by_step]
    if not history:
        raise ValueError(
            f"the report has no measurement in steps {grace_steps + 1} to {by_step}: observe "
            "with tau=0.0, and grace_steps smaller than by_step"
        )

    series = {
        # A negative "gain" is compared with tau as 0.
        unit.name: [(step, max(row[k], 0.0)) for step, row in history if math.isfinite(row[k])]
        for k, unit in enumerate(report.units)
    }
    windows = {name: _windows(points, patience) for name, points in series.items()}
    kinds = units_by_kind(report.units)
    scale = dict.fromkeys(series, 1.0)
    if per == "unit":  # the scale of a unit whose median is 0 stays 1
        scale = {n: median([x for _, x in points] or [1]) or 1.0 for n, points in series.items()}

    taus: dict[str, float] = {}
    curves: dict[str, tuple[float, ...]] = {}
    marks: dict[str, float] = {}
    unit_taus: dict[str, float] = {}
    for scope, units in (kinds if per == "kind" else {"all": list(report.units)}).items():
        criteria = {unit.criterion for unit in units}
        if len(criteria) > 1 and per != "unit":
            raise ValueError(
                f"{scope!r} has units of different statistics, {sorted(criteria)}, which share no "
                "scale: use per='unit', or one statistic"
            )
        names = [unit.name for unit in units]
        critical = (min((x for _, x in windows[n]), default=math.inf) / scale[n] for n in names)
        curve = tuple(sorted(critical))
        mark = _threshold(curve, share)
        if mark == math.inf:
            enough = sum(value < math.inf for value in curve)
            raise ValueError(
                f"share={share} cannot be reached: only {enough} of {len(curve)} units of "
                f"{scope!r} have {patience} measurements in steps {grace_steps + 1} to {by_step}. "
                "Observe longer, or lower share or patience"
            )
        curves[scope], marks[scope] = curve, mark
        unit_taus |= {name: mark * scale[name] for name in names}
        if per != "unit":
            taus["." if per == "all" else _pattern(scope, names, series)] = mark
    if per == "unit":
        taus = {f"^{re.escape(name)}$": tau for name, tau in unit_taus.items()}

    frozen_at = [
        min((step for step, x in windows[name] if x < tau), default=math.inf)
        for name, tau in unit_taus.items()
    ]
    frozen = [(step, sum(at <= step for at in frozen_at)) for step, _ in history]
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
        forecast=tuple((step, n / len(frozen_at)) for step, n in frozen),
        kinds={kind: tuple(unit.name for unit in units) for kind, units in kinds.items()},
    )


def _windows(points: Sequence[tuple[int, float]], patience: int) -> list[tuple[int, float]]:
    """For every `patience` checks in a row the step of the last one and the greatest value."""
    ends = range(patience, len(points) + 1)
    windows = (points[end - patience : end] for end in ends)
    return [(window[-1][0], max(x for _, x in window)) for window in windows]


def _threshold(curve: Sequence[float], share: float) -> float:
    """The geometric mean of the greatest value that tau has to exceed and the next one.

    It is 1 % above the greatest value where tau has to exceed all.
    """
    n = math.ceil(share * len(curve) - 1e-9)  # 0.1 * 30 is 3.0000000000000004
    highest, above = curve[n - 1], (*curve, math.inf)[n]
    tau = math.sqrt(highest * above) if above < math.inf else 1.01 * highest
    return max(tau, math.nextafter(highest, math.inf))


def _pattern(kind: str, names: Sequence[str], all_names: Iterable[str]) -> str:
    """A regex that matches these units only: the kind as a word if possible, else their names."""
    word = rf"\b{re.escape(kind)}\b"
    if {name for name in all_names if re.search(word, name)} == set(names):
        return word
    return f"^(?:{'|'.join(map(re.escape, names))})$"
