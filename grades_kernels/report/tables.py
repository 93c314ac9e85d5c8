"""Tables and numbers as plain ASCII text, and the tables of the printed report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

from ..freezing.table import FreezeEvent
from .record import UnitReport, units_by_kind

TEXT_WIDTH = 100  # columns of the printed report
LAST_EVENTS = 10  # events in the printed report

_MARKS = {"frozen": "#", "cooling": "~", "active": "."}


class Table(NamedTuple):
    """A table of strings; the columns named in `left` are aligned left, the others right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str]


def layout(table: Table) -> str:
    """The lines of a table: title, header, rule, rows."""
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


def shorten(text: str, width: int) -> str:
    """At most `width` characters; the middle is left out, because names differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return text[: width - 3 - tail] + "..." + text[-tail:]


def number_range(values: Sequence[float]) -> str:
    """The least and the greatest value, "0.5..2", or the one value when both print alike."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}..{high}"


def percent(part: int, whole: int) -> str:
    """`part` as a percentage of `whole`, with one decimal."""
    return f"{100 * part / max(1, whole):.1f} %"


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values, at least two."""
    return stdev(values) / math.sqrt(len(values))


def report_tables(
    units: Sequence[UnitReport],
    events: Sequence[FreezeEvent],
    history: Sequence[tuple[int, Sequence[float]]],
) -> list[Table]:
    """The tables of kinds, of the last events and of layers, without those that have no rows."""
    tables = [_kind_table(units), _gain_table(units, history), _event_table(events)]
    return [table for table in (*tables, _layer_table(units)) if table.rows]


def _kind_table(units: Sequence[UnitReport]) -> Table:
    criteria = "/".join(dict.fromkeys(unit.criterion for unit in units))
    header = ["kind", "units", "elements", "frozen", "first", "last", "min", "median", "max", "tau"]
    rows = []
    for kind, members in units_by_kind(units).items():
        frozen = [unit.frozen_at for unit in members if unit.state == "frozen"]
        values = [x.statistic for x in members if math.isfinite(x.statistic)]
        row = [shorten(kind, 20)]
        row += [f"{n:,}" for n in (len(members), sum(x.n_elements for x in members), len(frozen))]
        row += [f"{of(frozen):,}" if frozen else "-" for of in (min, max)]
        row += [f"{of(values):.4g}" if values else "-" for of in (min, median, max)]
        rows.append([*row, number_range([unit.tau for unit in members])])
    title = f'By kind (first, last: steps of freezing; min to max: last "{criteria}" statistic)'
    return Table(title, header, rows, left=["kind"])


def _gain_table(
    units: Sequence[UnitReport], history: Sequence[tuple[int, Sequence[float]]]
) -> Table:
    """Per kind the "gain" of its units together: mean over the steps and its standard error.

    Over the checks that measured all of them: a frozen unit is measured no more.
    """
    rows, means = [], []
    position = {unit.name: k for k, unit in enumerate(units)}
    for kind, members in units_by_kind(units).items():
        columns = [position[unit.name] for unit in members if unit.criterion == "gain"]
        values = [[row[k] for k in columns] for _, row in history]
        sums = [sum(row) for row in values if all(map(math.isfinite, row))]
        if columns and len(sums) > 1:
            means.append(fmean(sums))
            rows.append([shorten(kind, 20), f"{means[-1]:.4g}", f"{standard_error(sums):.2g}"])
    total = sum(means)
    for row, mean in zip(rows, means, strict=True):
        row.append(f"{100 * mean / total:.1f} %" if total > 0 else "-")
    title = 'Mean "gain" over the recorded steps: loss that a step would gain per learning rate'
    return Table(title, ["kind", "gain", "standard error", "share"], rows, left=["kind"])


def _event_table(events: Sequence[FreezeEvent]) -> Table:
    header = ["step", "decided", "statistic", "tau", "elements", "unit"]
    rows = []
    for event in events[-LAST_EVENTS:]:
        value = "max_frozen" if math.isnan(event.statistic) else f"{event.statistic:.4g}"
        cells = [f"{event.step:,}", f"{event.decided_at:,}", value, f"{event.tau:.4g}"]
        rows.append([*cells, f"{event.n_elements:,}", shorten(event.unit, 46)])
    return Table(f"Last {len(rows)} of {len(events)} freezes", header, rows, left=["unit"])


def _layer_table(units: Sequence[UnitReport]) -> Table:
    """One character per kind and layer; no rows for a single layer or more than fit the width."""
    layers = sorted({unit.layer for unit in units if unit.layer is not None})
    rows = []
    kinds = units_by_kind(units) if 1 < len(layers) < TEXT_WIDTH else {}
    for kind, members in kinds.items():
        marks = ""
        for layer in layers:
            states = {unit.state for unit in members if unit.layer == layer}
            marks += "+" if len(states) > 1 else "".join(_MARKS[state] for state in states) or " "
        if marks.strip():
            rows.append([shorten(kind, 20), marks])
    width = max((len(kind) for kind, _ in rows), default=0)
    if width + 2 + len(layers) > TEXT_WIDTH:
        rows = []
    ruler = ""  # numbers of the layers above their columns, as many as fit: "0    5    10"
    for column in range(0, len(layers), 5):
        if not ruler or len(ruler) < column:
            ruler = ruler.ljust(column) + str(layers[column])
    title = "By kind and layer: # frozen, ~ cooling down, . active, + several states"
    return Table(title, ["layer", ruler], rows, left=["layer", ruler])
