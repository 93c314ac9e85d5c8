"""What a run froze and when: a record to print, save, load again and plot.

A :class:`FreezeReport` is plain data: numbers, strings and tuples, no tensor and no reference to an
optimizer, so it can be kept, compared and sent anywhere. Importing this module costs the standard
library alone; ``rich`` and ``matplotlib`` are needed only by what draws with them.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import textwrap
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.text import Text

__all__ = ["FreezeEvent", "FreezeReport", "UnitReport"]

TEXT_WIDTH = 100  # columns of the printed report
LAST_EVENTS = 10  # events in the printed report
LABELLED_ROWS = 36  # up to here the timeline labels every unit, above it every kind
SINGLE_CURVES = 36  # up to here every unit has its own curve, above it a kind has a median and band
LEGEND_KINDS = 24  # more kinds than these are only counted in the legend
LABELLED_TAUS = 8  # up to here every threshold has its number at the margin

# Paul Tol's "muted" qualitative scheme: nine hues that stay apart in all common colour blindnesses.
KIND_COLOURS = (
    "#CC6677",
    "#332288",
    "#DDCC77",
    "#117733",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
)


class FreezeEvent(NamedTuple):
    """One unit has been frozen.

    Attributes:
        step: First optimizer step in which the unit is frozen, counted from 1.
        unit: Name of the unit.
        statistic: Value that was below ``tau``; NaN when ``max_frozen`` decided without one.
        tau: Threshold at the decision.
        n_elements: Elements of all tensors of the unit.
        decided_at: Step of the decision; earlier than ``step`` by the cooldown.
    """

    step: int
    unit: str
    statistic: float
    tau: float
    n_elements: int
    decided_at: int


class Memory(NamedTuple):
    """Bytes that an optimizer causes on one process.

    Attributes:
        moments: ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq`` held now.
        prev_grads: Previous gradients held now.
        grads: Gradients held now.
        released: What frozen tensors held of all three, and hold no more.
    """

    moments: int = 0
    prev_grads: int = 0
    grads: int = 0
    released: int = 0


NOTHING_HELD = Memory()


@dataclass(frozen=True)
class UnitReport:
    """Where one unit stands.

    Attributes:
        name: Name of the unit.
        layer: Number of the repeated block it belongs to, None outside of any.
        kind: What sort of matrix it is, "q_proj" for example; colours and tables group by it.
        n_elements: Elements of all its tensors.
        criterion: Statistic it is judged by, e.g. "change"; see `GradESAdamW`.
        tau: Threshold; 0 observes without ever freezing.
        statistic: Last measured value, NaN before the first.
        hits: Consecutive checks below ``tau`` so far.
        decided_at: Step of the decision to freeze it, -1 while there is none.
        frozen_at: First step in which it is frozen, -1 while it is not (cooling down included).
    """

    name: str
    layer: int | None
    kind: str
    n_elements: int
    criterion: str
    tau: float
    statistic: float
    hits: int
    decided_at: int
    frozen_at: int

    @property
    def state(self) -> str:
        """One of "active", "cooling" (decided, not yet frozen) and "frozen"."""
        if self.frozen_at >= 0:
            return "frozen"
        return "cooling" if self.decided_at >= 0 else "active"


_MARKS = {"frozen": "#", "cooling": "~", "active": ".", "none": " "}


class _Freeze(NamedTuple):
    """One stretch in which a unit was frozen: steps `frozen_at` to `thawed_at` (excluded, or None).

    `decided_at` is the step of the decision, earlier than `frozen_at` by the cooldown.
    """

    decided_at: int
    frozen_at: int
    thawed_at: int | None


class _Table(NamedTuple):
    """A table ready to print: cells as text, the columns in `left` flush left, the others right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str]


@dataclass(frozen=True, eq=False, repr=False)
class FreezeReport:
    """What a run froze, as it stands after ``step`` optimizer steps.

    ``str()`` gives tables in plain ASCII without colour codes, fit for logs and files;
    ``rich.print(report)`` shows the same tables in colour.

    Every statistic here is on the scale of its ``tau``: what the two are compared by.

    Attributes:
        step: Optimizer steps that really happened.
        total_steps: Planned steps, None when unknown.
        grace_steps: Steps before the first check, None when nothing is monitored.
        units: Every monitored unit, in model order.
        events: Every freeze, oldest first; a unit that was thawed may be there more than once.
        history: ``(step, statistics)`` of recorded steps, oldest first; one statistic per unit in
            the order of ``units``, NaN where nothing was measured.
        n_trainable: Elements of all tensors in the optimizer, monitored or not.
        backend: Implementation in use: "reference", "native" or "triton".
        memory: Bytes held and released on this process.
        frozen_blocks: How many of the lowest blocks have no matrix left to train.
        trained_below: Names of tensors in or below these blocks that still train, so that backward
            has to pass through the blocks; with none, it stops above them.

    Raises:
        ValueError: A row of ``history`` has not one statistic per unit.
    """

    step: int
    total_steps: int | None
    grace_steps: int | None
    units: tuple[UnitReport, ...]
    events: tuple[FreezeEvent, ...]
    history: tuple[tuple[int, tuple[float, ...]], ...]
    n_trainable: int
    backend: str
    memory: Memory = NOTHING_HELD
    frozen_blocks: int = 0
    trained_below: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for step, row in self.history:
            if len(row) != len(self.units):
                raise ValueError(
                    f"history of step {step} has {len(row)} statistics for {len(self.units)} "
                    "units; give one per unit, NaN where nothing was measured"
                )

    def __eq__(self, other: object) -> bool:
        # By content, so that a missing measurement (NaN) equals itself after save() and load().
        if not isinstance(other, FreezeReport):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return (
            f"FreezeReport(step={self.step}, units={len(self.units)}, frozen={self._n_frozen()}, "
            f"events={len(self.events)}, history={len(self.history)} rows)"
        )

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(self._headline()), *map(_layout, self._tables())])

    def __rich__(self) -> Text:
        from rich.text import Text

        text = Text(str(self))
        text.highlight_words(self._headline()[:1], style="bold")
        text.highlight_words([table.title for table in self._tables()], style="bold cyan")
        return text

    def trainable_elements(self) -> list[tuple[int, int]]:
        """Elements that still move, over time.

        The step of a thaw is not recorded. It is taken to be the first later measurement of the
        unit, or else the decision that freezes it again, or else the last step.

        Returns:
            ``(step, elements)`` at step 0, at every change and at the last step; each number holds
            from its step on.
        """
        frozen = self._frozen_over_time(self.units, lambda unit: unit.n_elements)
        return [(step, self.n_trainable - elements) for step, elements in frozen]

    def frozen_share(self) -> list[tuple[int, float]]:
        """Share of the monitored units that is frozen, by count and over time.

        Returns:
            ``(step, share)`` with shares in [0, 1], at the steps of :meth:`trainable_elements`.
        """
        frozen = self._frozen_over_time(self.units, lambda unit: 1)
        return [(step, count / max(1, len(self.units))) for step, count in frozen]

    def to_dict(self) -> dict[str, Any]:
        """The report in the types of strict JSON: NaN becomes None, an infinity "inf" or "-inf"."""
        return {each.name: _to_json(getattr(self, each.name)) for each in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all; missing folders are created.

        Args:
            path: File to write or replace.

        Returns:
            The path that was written.
        """
        path = Path(path)
        text = json.dumps(self.to_dict(), allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezeReport:
        """Read what :meth:`save` wrote; the result equals the saved report.

        Args:
            path: File to read.

        Raises:
            ValueError: The file holds something else; the message names it and what is wrong.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
            data["units"] = tuple(UnitReport(**_floats(unit)) for unit in data["units"])
            data["events"] = tuple(FreezeEvent(**_floats(event)) for event in data["events"])
            data["history"] = tuple(
                (step, tuple(map(_float, row))) for step, row in data["history"]
            )
            data["memory"] = Memory(**data["memory"])
            data["trained_below"] = tuple(data["trained_below"])
            return cls(**data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a freeze report ({type(error).__name__}: {error}); "
                "give a file that FreezeReport.save() wrote"
            ) from error

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw four panels: timeline of the units, statistics, frozen share, trained elements.

        Args:
            path: Picture to write; the suffix chooses the format, ".png" when there is none.
                Missing folders are created.

        Returns:
            The path that was written.

        Raises:
            ImportError: matplotlib is missing; the message says how to install it.
        """
        path = _picture_path(path, "FreezeReport.plot()")
        _Picture(self).draw().savefig(path, dpi=150)
        return path

    def _n_frozen(self) -> int:
        return sum(unit.state == "frozen" for unit in self.units)

    def _kinds(self) -> dict[str, list[UnitReport]]:
        """The units of every kind: kinds in model order, the units of each by layer."""
        kinds: dict[str, list[UnitReport]] = {}
        for unit in self.units:
            kinds.setdefault(unit.kind, []).append(unit)
        for units in kinds.values():
            units.sort(key=lambda unit: math.inf if unit.layer is None else unit.layer)
        return kinds

    @cached_property
    def _freezes(self) -> dict[str, list[_Freeze]]:
        """Every stretch in which a unit was frozen, oldest first, by the unit's name."""
        decisions: dict[str, dict[int, int]] = {unit.name: {} for unit in self.units}
        for event in self.events:
            if event.unit in decisions:
                decisions[event.unit][event.step] = event.decided_at
        freezes: dict[str, list[_Freeze]] = {}
        for column, unit in enumerate(self.units):
            decided = decisions[unit.name]
            if unit.state == "frozen":
                decided[unit.frozen_at] = unit.decided_at
            backwards = []
            # What ended a freeze at the latest: the next decision, or else the end of the run.
            latest = unit.decided_at if unit.state == "cooling" else self.step
            for frozen_at in sorted(decided, reverse=True):
                thawed_at = None
                if frozen_at != unit.frozen_at:
                    thawed_at = self._thawed_at(column, frozen_at, max(frozen_at, latest))
                latest = decided[frozen_at]
                backwards.append(_Freeze(latest, frozen_at, thawed_at))
            freezes[unit.name] = backwards[::-1]
        return freezes

    def _thawed_at(self, column: int, frozen_at: int, latest: int) -> int:
        measured = (
            step
            for step, row in self.history
            if frozen_at < step < latest and math.isfinite(row[column])
        )
        return next(measured, latest)

    def _frozen_over_time(
        self, units: Iterable[UnitReport], weight: Callable[[UnitReport], int]
    ) -> list[tuple[int, int]]:
        """`(step, sum of the weights of the frozen units)` at step 0, every change and the end."""
        changes = Counter({0: 0, self.step: 0})
        for unit in units:
            for freeze in self._freezes[unit.name]:
                changes[freeze.frozen_at] += weight(unit)
                if freeze.thawed_at is not None:
                    changes[freeze.thawed_at] -= weight(unit)
        total = 0
        series = []
        for step in sorted(changes):
            total += changes[step]
            series.append((step, total))
        return series

    def _headline(self) -> list[str]:
        planned = "" if self.total_steps is None else f" of {self.total_steps:,} planned"
        lines = [f"Freeze report after {self.step:,}{planned} steps ({self.backend} backend)"]
        if not self.units:
            return [*lines, "No unit is monitored: nothing can freeze."]
        decided = sum(unit.decided_at >= 0 for unit in self.units)
        frozen = sum(unit.n_elements for unit in self.units if unit.state == "frozen")
        monitored = sum(unit.n_elements for unit in self.units)
        grace = "" if self.grace_steps is None else f"; grace period {self.grace_steps:,} steps"
        lines += [
            f"Monitored units: {len(self.units):,}; decided {decided:,}, "
            f"of which frozen {self._n_frozen():,}{grace}",
            f"Frozen elements: {frozen:,} = {_percent(frozen, monitored)} of the monitored, "
            f"{_percent(frozen, self.n_trainable)} of all {self.n_trainable:,}",
        ]
        held = ("moments", "prev_grads", "grads")
        parts = [f"{name} {_megabytes(getattr(self.memory, name))}" for name in held]
        lines.append(
            f"Memory: {', '.join(parts)}; released so far {_megabytes(self.memory.released)}"
        )
        if self.frozen_blocks:
            lines.append(self._prefix_line())
        if all(unit.tau == 0 for unit in self.units):
            lines.append("Observing only: tau is 0, so statistics are measured, nothing freezes.")
        return lines

    def _prefix_line(self) -> str:
        line = f"Lowest blocks with no matrix left to train: {self.frozen_blocks:,}; "
        if not self.trained_below:
            return line + "backward stops above them"
        names = _shorten(self.trained_below[0], 46)
        more = f" and {len(self.trained_below) - 1:,} more" if len(self.trained_below) > 1 else ""
        return line + f"backward still passes through for {names}{more}"

    def _tables(self) -> list[_Table]:
        tables = [self._kind_table(), self._event_table(), self._layer_table()]
        return [table for table in tables if table.rows]

    def _kind_table(self) -> _Table:
        criteria = "/".join(dict.fromkeys(unit.criterion for unit in self.units))
        header = ["kind", "units", "elements", "frozen", "first", "last"]
        header += ["min", "median", "max", "tau"]
        rows = []
        for kind, units in self._kinds().items():
            frozen = [unit.frozen_at for unit in units if unit.state == "frozen"]
            values = _finite(unit.statistic for unit in units)
            taus = [unit.tau for unit in units]
            rows.append(
                [
                    _shorten(kind, 20),
                    f"{len(units):,}",
                    f"{sum(unit.n_elements for unit in units):,}",
                    f"{len(frozen):,}",
                    f"{min(frozen):,}" if frozen else "-",
                    f"{max(frozen):,}" if frozen else "-",
                    *(f"{of(values):.4g}" if values else "-" for of in (min, median, max)),
                    _range(taus),
                ]
            )
        title = f'By kind (first, last: steps of freezing; min to max: last "{criteria}" statistic)'
        return _Table(title, header, rows, left=["kind"])

    def _event_table(self) -> _Table:
        header = ["step", "decided", "statistic", "tau", "elements", "unit"]
        rows = [
            [
                f"{event.step:,}",
                f"{event.decided_at:,}",
                "max_frozen" if math.isnan(event.statistic) else f"{event.statistic:.4g}",
                f"{event.tau:.4g}",
                f"{event.n_elements:,}",
                _shorten(event.unit, 46),
            ]
            for event in self.events[-LAST_EVENTS:]
        ]
        return _Table(
            f"Last {len(rows)} of {len(self.events)} freezes", header, rows, left=["unit"]
        )

    def _layer_table(self) -> _Table:
        """One character per kind and layer; no rows when that says nothing or is too wide."""
        layers = sorted({unit.layer for unit in self.units if unit.layer is not None})
        rows = []
        for kind, units in self._kinds().items():
            marks = ""
            for layer in layers:
                states = {unit.state for unit in units if unit.layer == layer}
                marks += "+" if len(states) > 1 else _MARKS[states.pop() if states else "none"]
            if marks.strip():
                rows.append([_shorten(kind, 20), marks])
        width = max((len(kind) for kind, _ in rows), default=0)
        if len(layers) < 2 or width + 2 + len(layers) > TEXT_WIDTH:
            rows = []
        title = "By kind and layer: # frozen, ~ cooling down, . active, + several states"
        return _Table(title, ["layer", _ruler(layers)], rows, left=["layer", _ruler(layers)])


def _picture_path(path: str | os.PathLike[str], caller: str) -> Path:
    """Where a picture goes: with a suffix, in a folder that is there, once matplotlib is found."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib: pip install 'grades-kernels[demo]'"
        ) from error
    path = Path(path)
    if not path.suffix:
        path = path.with_name(path.name + ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _to_json(value: Any) -> Any:
    if isinstance(value, UnitReport):
        return {name: _to_json(item) for name, item in vars(value).items()}
    if isinstance(value, (FreezeEvent, Memory)):
        return {name: _to_json(item) for name, item in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _float(value: float | str | None) -> float:
    """The inverse of `_to_json` for one number."""
    return math.nan if value is None else float(value)


def _floats(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "tau": _float(record["tau"]), "statistic": _float(record["statistic"])}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}..{high}"


def _shorten(text: str, width: int) -> str:
    """At most `width` characters; what goes is the middle, for names differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return text[: width - 3 - tail] + "..." + text[-tail:]


def _ruler(layers: Sequence[int]) -> str:
    """Numbers of the layers above their columns, as many as fit: "0    5    10"."""
    ruler = ""
    for column, layer in enumerate(layers):
        if column % 5 == 0 and (not ruler or len(ruler) < column):
            ruler = ruler.ljust(column) + str(layer)
    return ruler


def _layout(table: _Table) -> str:
    lines = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [table.title]
    for cells in lines:
        aligned = [
            cell.ljust(width) if name in table.left else cell.rjust(width)
            for cell, width, name in zip(cells, widths, table.header, strict=True)
        ]
        text.append("  ".join(aligned).rstrip())
    text.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(text)


# How strongly the colour of a kind is drawn.
_TINTS = {"active": 0.28, "cooling": 0.6, "frozen": 1.0, "trained": 0.7}
_NOT_RUN: dict[str, Any] = {"color": "0.5", "alpha": 0.13, "linewidth": 0}


class _Picture:
    """The drawing behind `FreezeReport.plot`; every kind has one colour in all panels."""

    def __init__(self, report: FreezeReport) -> None:
        from matplotlib import rcParams

        self.report = report
        self.kinds = report._kinds()
        self.freezes = report._freezes
        self.columns = {unit.name: column for column, unit in enumerate(report.units)}
        self.colours = {
            kind: KIND_COLOURS[number % len(KIND_COLOURS)] for number, kind in enumerate(self.kinds)
        }
        # More kinds than hues: the second round of hues is drawn with dashes.
        self.dashes: dict[str, Any] = {
            kind: ("solid", "dashdot", "dotted")[number // len(KIND_COLOURS) % 3]
            for number, kind in enumerate(self.kinds)
        }
        # The planned rest is shown unless it would squeeze the run into a corner.
        total = report.total_steps or 0
        self.end = max(1, total if total <= 2 * report.step else 0, report.step)
        grace = report.grace_steps
        self.grace = grace if grace is not None and grace <= self.end else None
        self.draws_tau = False
        self.height = min(max(0.17 * len(report.units), 2.4), 6)  # of the upper panels, in inches
        # The user's style may be a dark one.
        ink = rcParams["text.color"]
        self.ink: dict[str, Any] = {"color": ink}
        self.grace_line = {**self.ink, "linewidth": 1.2, "linestyle": "dotted", "alpha": 0.8}
        self.tau_line = {**self.ink, "linewidth": 1.3, "linestyle": "dashed", "alpha": 0.9}

    def draw(self) -> Figure:
        # Without pyplot: that would touch the user's backend and keep the figure open.
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure((14, self.height + 4.6), layout=layout)
        axes = figure.subplots(2, 2, height_ratios=[self.height, 2.4])
        self.draw_timeline(axes[0, 0])
        self.draw_curves(axes[0, 1])
        self.draw_share(axes[1, 0])
        self.draw_elements(axes[1, 1])
        for axis in axes.flat:
            self.finish(axis)
        figure.suptitle(self.summary(), fontsize=13, fontweight="bold")
        self.draw_legends(figure)
        return figure

    def summary(self) -> str:
        report = self.report
        steps = f"{report.step:,}"
        if report.total_steps is not None:
            steps += f" of {report.total_steps:,} planned"
        if not report.units:
            return f"No unit is monitored: nothing can freeze ({steps} steps)"
        summary = (
            f"{report._n_frozen():,} of {len(report.units):,} units frozen after {steps} steps"
        )
        frozen = report.n_trainable - report.trainable_elements()[-1][1]
        if frozen:
            share = _percent(frozen, report.n_trainable)
            summary += f": {share} of all elements are no longer trained"
        return summary

    def finish(self, axis: Axes) -> None:
        """What all panels share: steps to the right, the grace step, the end of the run."""
        from matplotlib.ticker import MaxNLocator

        axis.set_xlim(0, self.end)
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
        if self.grace is not None:
            axis.axvline(self.grace, **self.grace_line)
        if self.report.step < self.end:
            axis.axvspan(self.report.step, self.end, **_NOT_RUN)

    def tint(self, axis: Axes, colour: str, strength: float) -> tuple[float, float, float]:
        """`colour` mixed with the background; 1 is the pure colour."""
        from matplotlib.colors import to_rgb

        full, paper = to_rgb(colour), to_rgb(axis.get_facecolor())
        red, green, blue = (
            strength * f + (1 - strength) * p for f, p in zip(full, paper, strict=True)
        )
        return red, green, blue

    def draw_timeline(self, axis: Axes) -> None:
        rows = [unit for units in self.kinds.values() for unit in units]
        few = len(rows) <= LABELLED_ROWS
        detail = "one row per unit"
        if not few:
            detail += ", within a kind from the first layer (top) to the last"
        if not rows:
            _title(axis, "When the units froze", "")
            _nothing(axis, "no unit is monitored")
            return
        _title(axis, "When the units froze", detail)
        bars: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        for row, unit in enumerate(rows):
            for state, start, end in self.spans(unit):
                bars.setdefault((unit.kind, state), []).append((row, start, end - start))
        for (kind, state), spans in bars.items():
            row_numbers, starts, lengths = zip(*spans, strict=True)
            axis.barh(
                row_numbers,
                lengths,
                left=starts,
                height=0.75 if few else 1,
                color=self.tint(axis, self.colours[kind], _TINTS[state]),
                hatch="////" if state == "cooling" and few else None,
                edgecolor=axis.get_facecolor(),
                linewidth=0,
            )
        room = max(0.6, 2.5 - len(rows) / 2)  # a single bar must not fill the panel
        axis.set_ylim(len(rows) - 1 + room, -room)
        axis.tick_params(axis="y", length=0)
        if few:
            axis.set_yticks(range(len(rows)), _row_labels(rows), parse_math=False)
            return
        ticks: list[float] = []
        labels = []
        first = 0
        for kind, units in self.kinds.items():
            middle = first + (len(units) - 1) / 2
            # Kinds of few units lie too close for a label each.
            if not ticks or middle - ticks[-1] >= len(rows) / 40:
                ticks.append(middle)
                labels.append(_shorten(kind, 24))
            if first:
                axis.axhline(first - 0.5, color=axis.get_facecolor(), linewidth=1.5)
            first += len(units)
        axis.set_yticks(ticks, labels, parse_math=False)

    def spans(self, unit: UnitReport) -> list[tuple[str, int, int]]:
        """`(state, first step, last step)` of one unit, in order."""
        spans = []
        now, last = 0, self.report.step
        for decided_at, frozen_at, thawed_at in self.freezes[unit.name]:
            end = last if thawed_at is None else thawed_at
            spans += [("active", now, decided_at), ("cooling", decided_at, frozen_at)]
            spans += [("frozen", frozen_at, end)]
            now = end
        if unit.state == "cooling":
            spans += [("active", now, unit.decided_at), ("cooling", unit.decided_at, last)]
        elif unit.state == "active":
            spans += [("active", now, last)]
        return [(state, start, end) for state, start, end in spans if start < end]

    def draw_curves(self, axis: Axes) -> None:
        title = "What the checks measured"
        report = self.report
        history = report.history
        values = _finite(value for _, row in history for value in row)
        if not values:
            _title(axis, title, "")
            _nothing(axis, "no statistic was measured")
            return
        log = max(values) > 0

        def clean(value: float) -> float:
            return value if math.isfinite(value) and (value > 0 or not log) else math.nan

        steps = [step for step, _ in history]
        single = len(report.units) <= SINGLE_CURVES
        bands = len(self.kinds) <= len(KIND_COLOURS)  # more of them only hide each other
        for kind, units in self.kinds.items():
            look = {"color": self.colours[kind], "linestyle": self.dashes[kind]}
            columns = [self.columns[unit.name] for unit in units]
            if single:
                for column in columns:
                    curve = [clean(row[column]) for _, row in history]
                    _curve(axis, steps, curve, linewidth=1, alpha=0.9, **look)
            else:
                rows = [_finite(clean(row[column]) for column in columns) for _, row in history]
                middle = [median(row) if row else math.nan for row in rows]
                low = [min(row, default=math.nan) for row in rows]
                high = [max(row, default=math.nan) for row in rows]
                _curve(axis, steps, middle, linewidth=1.6, **look)
                if bands:
                    axis.fill_between(steps, low, high, color=look["color"], alpha=0.09, lw=0)
            names = {unit.name for unit in units}
            decisions = [
                (event.decided_at, clean(event.statistic))
                for event in report.events
                if event.unit in names
            ]
            if decisions:
                axis.plot(
                    *zip(*decisions, strict=True),
                    linestyle="",
                    marker="o",
                    markersize=5 if single else 3,
                    color=look["color"],
                    markeredgecolor=axis.get_facecolor(),
                    markeredgewidth=0.5,
                    zorder=3,
                )
        if log:
            self.log_scale(axis)
        drawn = _finite(map(clean, [*values, *(event.statistic for event in report.events)]))
        remarks = self.draw_taus(axis, drawn, log)
        if not single:
            remarks.insert(0, "median and range per kind" if bands else "median per kind")
        if log and min(values) <= 0:
            remarks.append("zeros are left out")
        criteria = " and ".join(dict.fromkeys(f'"{unit.criterion}"' for unit in report.units))
        scale = ", log scale" if log else ""
        _title(axis, title, "; ".join([f"statistic {criteria}{scale}", *remarks]))

    def log_scale(self, axis: Axes) -> None:
        from matplotlib.ticker import LogFormatter

        class PlainNumbers(LogFormatter):
            def __call__(self, x: float, pos: int | None = None) -> str:
                return f"{x:g}" if super().__call__(x, pos) else ""

        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(PlainNumbers())
        # Between the powers of ten only where there are few of these.
        axis.yaxis.set_minor_formatter(PlainNumbers(minor_thresholds=(1, 0.4)))
        axis.tick_params(axis="y", which="minor", labelsize=8)

    def draw_taus(self, axis: Axes, values: Sequence[float], log: bool) -> list[str]:
        """Draw the thresholds and fit the scale to them and to `values`; returns remarks."""
        kinds: dict[float, set[str]] = {}
        for unit in self.report.units:
            kinds.setdefault(unit.tau, set()).add(unit.kind)
        taus = sorted(tau for tau in kinds if math.isfinite(tau) and tau > 0)
        self.draws_tau = bool(taus)
        labelled = len(taus) <= LABELLED_TAUS
        looks = {tau: dict(self.tau_line) for tau in taus}
        for tau, look in looks.items():
            if len(taus) > 1 and len(kinds[tau]) == 1:
                look["color"] = self.colours[min(kinds[tau])]
            if not labelled:
                look["linewidth"] = 0.6
            axis.axhline(tau, zorder=1, **look)
        low, high = min([*values, *taus]), max([*values, *taus])
        if log:
            room = 1.1 * high**0.06 / low**0.06  # high / low may overflow
            axis.set_ylim(low / room, high * room)
        else:
            axis.set_ylim(0, 1.08 * high or 1)
        remarks = []
        if labelled:
            to_height = axis.transScale + axis.transLimits
            heights = [float(to_height.transform((1, tau))[1]) for tau in taus]
            places = _spread(zip(heights, taus, strict=True), gap=0.15 / self.height)
            for height, tau in places:
                axis.text(
                    1.01,
                    height,
                    f"tau {tau:.3g}",
                    transform=axis.transAxes,
                    color=looks[tau]["color"],
                    fontsize=8.5,
                    verticalalignment="center",
                )
        else:
            remarks.append(f"{len(taus)} thresholds from {taus[0]:.3g} to {taus[-1]:.3g}")
        if 0 in kinds:
            remarks.append("tau is 0: observing only" if len(kinds) == 1 else "a tau of 0 observes")
        if math.inf in kinds:
            remarks.append("tau inf freezes at once")
        return remarks

    def staircase(self, axis: Axes, series: Sequence[tuple[int, float]], **look: Any) -> None:
        steps, values = zip(*series, strict=True)
        axis.step(steps, values, where="post", **look)

    def draw_share(self, axis: Axes) -> None:
        title = "Share of the units that is frozen"
        if not self.report.units:
            _title(axis, title, "")
            _nothing(axis, "no unit is monitored")
            return
        detail = "by number of units"
        if 1 < len(self.kinds) <= len(KIND_COLOURS):
            detail += "; thick: all, colours: by kind"
            for kind, units in self.kinds.items():
                frozen = self.report._frozen_over_time(units, lambda unit: 1)
                shares = [(step, count / len(units)) for step, count in frozen]
                self.staircase(axis, shares, color=self.colours[kind], linewidth=1.2)
        self.staircase(axis, self.report.frozen_share(), linewidth=2.4, **self.ink)
        axis.set_ylim(-0.02, 1.04)
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        _title(axis, title, detail)

    def draw_elements(self, axis: Axes) -> None:
        from matplotlib.ticker import EngFormatter

        report = self.report
        _title(axis, "Elements that are still trained", "stacked by kind; grey: not monitored")
        monitored = sum(unit.n_elements for unit in report.units)
        steps = [step for step, _ in report.trainable_elements()]
        floor = [max(0, report.n_trainable - monitored)] * len(steps)
        axis.fill_between(
            steps, 0, floor, step="post", color=self.tint(axis, "0.5", 0.5), linewidth=0
        )
        # The kind drawn first in the timeline lies on top here too.
        for kind, units in reversed(self.kinds.items()):
            frozen = report._frozen_over_time(units, lambda unit: unit.n_elements)
            whole = sum(unit.n_elements for unit in units)
            top = [
                base + whole - _at(frozen, step) for base, step in zip(floor, steps, strict=True)
            ]
            colour = self.tint(axis, self.colours[kind], _TINTS["trained"])
            axis.fill_between(steps, floor, top, step="post", color=colour, linewidth=0)
            floor = top
        self.staircase(axis, report.trainable_elements(), linewidth=1.5, **self.ink)
        axis.set_ylim(0, 1.05 * max(1, report.n_trainable))
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))

    def draw_legends(self, figure: Figure) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        axis = figure.axes[0]
        report = self.report
        few = len(report.units) <= LABELLED_ROWS
        grey = {
            state: self.tint(axis, self.ink["color"], 0.8 * strength)
            for state, strength in _TINTS.items()
        }
        paper = axis.get_facecolor()
        states = {state for unit in report.units for state, _, _ in self.spans(unit)}
        look: dict[str, Any]
        signs: list[Any] = []
        if "active" in states:
            signs.append(Patch(color=grey["active"], label="active"))
        if "cooling" in states:
            look = {"hatch": "////", "edgecolor": paper} if few else {}
            signs.append(
                Patch(facecolor=grey["cooling"], linewidth=0, label="cooling down", **look)
            )
        if "frozen" in states:
            signs.append(Patch(color=grey["frozen"], label="frozen"))
        if self.grace is not None:
            signs.append(Line2D([], [], label="grace period ends", **self.grace_line))
        if self.draws_tau:
            signs.append(Line2D([], [], label="threshold tau", **self.tau_line))
        if any(math.isfinite(event.statistic) for event in report.events):
            signs.append(
                Line2D([], [], linestyle="", marker="o", label="decision to freeze", **self.ink)
            )
        if report.step < self.end:
            signs.append(Patch(label="planned, not run", **_NOT_RUN))
        kinds: list[Any] = [
            Line2D(
                [],
                [],
                color=self.colours[kind],
                linestyle=self.dashes[kind],
                linewidth=4,
                label=f"{len(units)} \N{MULTIPLICATION SIGN} {_shorten(kind, 20)}",
            )
            for kind, units in self.kinds.items()
        ]
        more = len(kinds) - LEGEND_KINDS
        if more > 0:
            kinds[LEGEND_KINDS:] = [Patch(alpha=0, label=f"and {more} more kinds")]
        look = {"fontsize": 9, "frameon": False}
        if signs:
            figure.legend(handles=signs, loc="outside lower center", ncols=len(signs), **look)
        if kinds:
            legend = figure.legend(handles=kinds, loc="outside right center", **look)
            for text in legend.get_texts():
                text.set_parse_math(False)


def _title(axis: Axes, title: str, detail: str) -> None:
    detail = textwrap.fill(detail, 84)
    lines = detail.count("\n") + 1
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8 + 12 * lines)
    axis.annotate(
        detail,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        fontsize=8.5,
        alpha=0.7,
        parse_math=False,
    )


def _nothing(axis: Axes, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", alpha=0.7)
    axis.set_yticks([])


def _row_labels(units: Sequence[UnitReport]) -> list[str]:
    """Kind and layer where that tells all units apart, else their names from where they differ."""
    labels = [unit.kind if unit.layer is None else f"{unit.kind} {unit.layer}" for unit in units]
    if len(set(labels)) < len(labels):
        paths = [unit.name.removesuffix(".weight").split(".") for unit in units]
        folders = zip(*(path[:-1] for path in paths), strict=False)
        same = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
        labels = [".".join(path[same:]) for path in paths]
    return [_shorten(label, 28) for label in labels]


def _curve(axis: Axes, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A line broken at NaN; a value between two gaps, which no line reaches, is a dot."""
    axis.plot(steps, values, **style)
    padded = [math.nan, *values, math.nan]
    alone = [
        (step, value)
        for step, before, value, after in zip(steps, padded[:-2], values, padded[2:], strict=True)
        if math.isnan(before) and math.isnan(after) and not math.isnan(value)
    ]
    if alone:
        axis.plot(*zip(*alone, strict=True), linestyle="", marker=".", color=style["color"])


def _spread(items: Iterable[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Move heights up, and back down from 1, until neighbours are at least `gap` apart."""
    spread: list[tuple[float, float]] = []
    for height, item in sorted(items):
        spread.append((max(height, spread[-1][0] + gap) if spread else height, item))
    ceiling = math.inf
    for number, (height, item) in reversed(list(enumerate(spread))):
        ceiling = min(height, ceiling - gap, 1.0)
        spread[number] = (ceiling, item)
    return spread


def _at(series: Sequence[tuple[int, int]], step: int) -> int:
    """Value at `step` of a series whose values hold from their step on."""
    return series[bisect.bisect_right(series, step, key=lambda point: point[0]) - 1][1]
