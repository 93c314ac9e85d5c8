"""The picture of a report, drawn with matplotlib but without pyplot."""

from __future__ import annotations

import math
import os
import textwrap
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .record import UnitReport, frozen_over_time, units_by_kind
from .tables import number_range, percent, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to here the timeline labels every unit, and every unit has its own curve; above it the timeline
# labels every kind, and a kind has a median and a band.
LABELLED_ROWS = 36
LEGEND_KINDS = 24  # more kinds than these are not in the legend

# Paul Tol's "muted" qualitative scheme: nine hues that can be distinguished with all common colour
# vision deficiencies.
KIND_COLOURS = (
    *("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499"),
)

_OPACITY = {"active": 0.28, "cooling": 0.6, "frozen": 1.0}


def picture_path(path: str | os.PathLike[str], caller: str) -> Path:
    """`path` with a suffix, ".png" when it has none; its folder is made.

    Raises:
        ImportError: matplotlib is missing; the message names `caller`.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        extra = "pip install 'grades-kernels[demo]'"
        raise ImportError(f"{caller} needs matplotlib: {extra}") from error
    path = Path(path)
    path = path if path.suffix else path.with_name(path.name + ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def set_share_axis(axis: Axes) -> None:
    """Give the y axis the range from 0 to 100 %."""
    from matplotlib.ticker import PercentFormatter

    axis.set_ylim(-0.02, 1.04)
    axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


class Picture:
    """The four panels of `FreezeReport.plot`; every kind has one colour in all of them.

    The method of each panel returns the remark below its title.
    """

    def __init__(self, report: Any) -> None:
        from matplotlib import rcParams

        self.report, self.step, self.units = report, report.step, report.units
        self.kinds = units_by_kind(self.units)
        # With more kinds than hues, the hues are used again with another line style.
        styles = cycle(product(("solid", "dashdot", "dotted"), KIND_COLOURS))
        self.styles: dict[str, Any] = {
            kind: {"color": colour, "linestyle": line}
            for kind, (line, colour) in zip(self.kinds, styles, strict=False)
        }
        # The planned rest is shown unless it is longer than the run.
        total = report.total_steps or 0
        self.end = max(1, total if total <= 2 * self.step else 0, self.step)
        self.foreground: str = rcParams["text.color"]  # the user's style may be a dark one

    def draw(self) -> Figure:
        # pyplot would change the user's backend and keep the figure open.
        from matplotlib.figure import Figure

        height = min(max(0.17 * len(self.units), 2.4), 6)  # of the upper panels, in inches
        figure = Figure((14, height + 4.6), layout="constrained")
        axes = figure.subplots(2, 2, height_ratios=[height, 2.4])
        panels = {
            "When the units froze": self.draw_timeline,
            "What the checks measured": self.draw_curves,
            "Share of the units that is frozen": self.draw_share,
            "Elements that are still trained": self.draw_elements,
        }
        for axis, (title, panel) in zip(axes.flat, panels.items(), strict=True):
            remark = textwrap.fill(panel(axis), 84)
            pad = 8 + 12 * (remark.count("\n") + 1)
            axis.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
            above = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (0, 6)}
            axis.annotate(remark, (0, 1), **above, fontsize=8.5, alpha=0.7, parse_math=False)
            self.draw_steps(axis)
        total = self.report.total_steps
        planned = "" if total is None else f" of {total:,} planned"
        _, n_frozen, elements = frozen_over_time(self.units, self.step)[-1]
        figure.suptitle(
            f"{n_frozen:,} of {len(self.units):,} units frozen after {self.step:,}{planned} steps: "
            f"{percent(elements, self.report.n_trainable)} of all elements are no longer trained",
            fontsize=13,
            fontweight="bold",
        )
        self.draw_legends(figure)
        return figure

    def draw_steps(self, axis: Axes) -> None:
        """Draw the parts of every panel: axis of steps, grace step, end of the run."""
        axis.set_xlim(0, self.end)
        axis.locator_params(axis="x", integer=True)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5, which="both")
        grace = self.report.grace_steps
        if grace is not None and grace <= self.end:
            style: Any = {"color": self.foreground, "linestyle": "dotted"}
            axis.axvline(grace, label="grace period ends", **style)
        if self.step < self.end:
            style = {"color": "0.5", "alpha": 0.13, "linewidth": 0}
            axis.axvspan(self.step, self.end, label="planned, not run", **style)

    def draw_timeline(self, axis: Axes) -> str:
        rows = [unit for units in self.kinds.values() for unit in units]
        if not rows:
            axis.set_yticks([])
            return "no unit is monitored"
        few = len(rows) <= LABELLED_ROWS
        bars: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        for row, unit in enumerate(rows):
            for state, start, end in spans(unit, self.step):
                bars.setdefault((unit.kind, state), []).append((row, end - start, start))
        for (kind, state), own in bars.items():
            row_numbers, lengths, starts = zip(*own, strict=True)
            style = {"color": self.styles[kind]["color"], "alpha": _OPACITY[state], "linewidth": 0}
            label = "cooling down" if state == "cooling" else state
            height = 0.75 if few else 1
            axis.barh(row_numbers, lengths, height, starts, label=label, **style)
        margin = max(0.6, 2.5 - len(rows) / 2)  # a single bar must not fill the panel
        axis.set_ylim(len(rows) - 1 + margin, -margin)
        axis.tick_params(axis="y", length=0)
        if few:
            # Kind and layer where these are unique, else the names.
            names = [x.kind if x.layer is None else f"{x.kind} {x.layer}" for x in rows]
            if len(set(names)) < len(names):
                names = [unit.name.removesuffix(".weight") for unit in rows]
            names = [shorten(name, 28) for name in names]
            axis.set_yticks(range(len(rows)), names, parse_math=False)
            return "one row per unit"
        labels: dict[float, str] = {}
        first = 0
        for kind, units in self.kinds.items():
            middle = first + (len(units) - 1) / 2
            # Labels of kinds with few units would overlap.
            if not labels or middle - max(labels) >= len(rows) / 40:
                labels[middle] = shorten(kind, 24)
            first += len(units)
        axis.set_yticks(list(labels), list(labels.values()), parse_math=False)
        return "one row per unit, within a kind from the first layer (top) to the last"

    def draw_curves(self, axis: Axes) -> str:
        import numpy

        values: Any = numpy.ma.masked_invalid([row for _, row in self.report.history])
        if not values.count():
            axis.set_yticks([])
            return "no statistic was measured"
        log, has_zeros = bool(values.max() > 0), values.min() <= 0
        if log:
            values = numpy.ma.masked_less_equal(values, 0)
        steps = [step for step, _ in self.report.history]
        columns = {unit.name: k for k, unit in enumerate(self.units)}
        single = len(self.units) <= LABELLED_ROWS
        for kind, members in self.kinds.items():
            # The markers show a value whose neighbours are missing.
            style = {"marker": ".", "markersize": 4, "linewidth": 1, **self.styles[kind]}
            curves = values[:, [columns[unit.name] for unit in members]]
            if single:
                axis.plot(steps, curves, **style)
            else:
                axis.plot(steps, numpy.ma.median(curves, axis=1), **style)
                band, colour = (curves.min(axis=1), curves.max(axis=1)), style["color"]
                axis.fill_between(steps, *band, color=colour, alpha=0.09, linewidth=0)
        drawn = [values.min(), values.max()]
        taus = {unit.tau for unit in self.units}
        for tau in taus - {0, math.inf}:
            style = {"color": self.foreground, "linestyle": "dashed", "linewidth": 1.1}
            axis.axhline(tau, label="threshold tau", **style)
            drawn.append(tau)
        low, high = min(drawn), max(drawn)
        if log:
            axis.set_yscale("log")
            margin = 1.1 * high**0.06 / low**0.06  # high / low may overflow
            axis.set_ylim(low / margin, high * margin)
        else:
            axis.set_ylim(0, 1.08 * high or 1)
        criteria = " and ".join(dict.fromkeys(f'"{unit.criterion}"' for unit in self.units))
        remarks = {
            f"statistic {criteria}" + ", log scale" * log: True,
            "median and range per kind": not single,
            "tau is 0: observing only": taus == {0},
            "a tau of 0 observes": taus > {0},
            "tau inf freezes at once": math.inf in taus,
            "zeros are left out": log and has_zeros,
        }
        return "; ".join(remark for remark, applies in remarks.items() if applies)

    def draw_share(self, axis: Axes) -> str:
        all_units = {"linewidth": 2.4, "color": self.foreground}
        kinds = [(units, {"linewidth": 1.2, **self.styles[k]}) for k, units in self.kinds.items()]
        for units, style in [*kinds, (self.units, all_units)]:
            steps, frozen, _ = zip(*frozen_over_time(units, self.step), strict=True)
            shares = [n / max(1, len(units)) for n in frozen]
            axis.step(steps, shares, where="post", **style)
        set_share_axis(axis)
        return "by number of units; thick: all, colours: by kind"

    def draw_elements(self, axis: Axes) -> str:
        from matplotlib.ticker import EngFormatter

        steps, trained = zip(*self.report.trainable_elements(), strict=True)
        axis.fill_between(steps, trained, step="post", color="0.6", alpha=0.7, linewidth=0)
        axis.step(steps, trained, where="post", linewidth=1.5, color=self.foreground)
        axis.set_ylim(0, 1.05 * max(1, self.report.n_trainable))
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        return "of all tensors in the optimizer"

    def draw_legends(self, figure: Figure) -> None:
        """Draw the legend of the marks below the panels and that of the kinds beside them."""
        from matplotlib.lines import Line2D

        marks: dict[str, Any] = {}
        for axis in figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            marks = dict(zip(labels, handles, strict=True)) | marks
        kinds: list[Any] = []
        for kind, units in [*self.kinds.items()][:LEGEND_KINDS]:
            tau = number_range([unit.tau for unit in units])
            label = f"{len(units)} \N{MULTIPLICATION SIGN} {shorten(kind, 20)}, tau {tau}"
            kinds.append(Line2D([], [], linewidth=4, label=label, **self.styles[kind]))
        style: dict[str, Any] = {"fontsize": 9, "frameon": False}
        if marks:
            style |= {"loc": "outside lower center", "ncols": len(marks)}
            legend = figure.legend(marks.values(), marks, **style)
            handle: Any
            for handle in legend.legend_handles:  # a mark means the same for every kind
                handle.set_color(self.foreground)
        if kinds:
            style |= {"loc": "outside right center", "ncols": 1}
            legend = figure.legend(handles=kinds, **style)
            for text in legend.get_texts():
                text.set_parse_math(False)


def spans(unit: UnitReport, last_step: int) -> list[tuple[str, int, int]]:
    """`(state, first step, last step)` of one unit, in order."""
    decided_at = last_step if unit.decided_at < 0 else unit.decided_at
    frozen_at = last_step if unit.frozen_at < 0 else unit.frozen_at
    found = [("active", 0, decided_at), ("cooling", decided_at, frozen_at)]
    found += [("frozen", frozen_at, last_step)]
    return [(state, start, end) for state, start, end in found if start < end]
