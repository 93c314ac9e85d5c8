"""The printed report: headline and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

from ..freezing.table import FreezeEvent
from .record import Memory, Timeline, finite
from .text import Table, number_range, percent, shorten

TEXT_WIDTH = 100  # columns of the printed report
LAST_EVENTS = 10  # events in the printed report

_MARKS = {"frozen": "#", "cooling": "~", "active": "."}


def headline(
    timeline: Timeline, backend: str, memory: Memory, n_blocks: int, trained_below: Sequence[str]
) -> list[str]:
    """The lines above the tables; `n_blocks` is `FreezeReport.frozen_blocks`."""
    units = timeline.units
    planned = "" if timeline.total_steps is None else f" of {timeline.total_steps:,} planned"
    lines = [f"Freeze report after {timeline.step:,}{planned} steps ({backend} backend)"]
    if not units:
        return [*lines, "No unit is monitored: nothing can freeze."]
    decided = sum(unit.decided_at >= 0 for unit in units)
    frozen = sum(unit.n_elements for unit in units if unit.state == "frozen")
    monitored = sum(unit.n_elements for unit in units)
    grace = timeline.grace_steps
    lines += [
        f"Monitored units: {len(units):,}; decided {decided:,}, of which frozen "
        f"{timeline.n_frozen:,}" + ("" if grace is None else f"; grace period {grace:,} steps"),
        f"Frozen elements: {frozen:,} = {percent(frozen, monitored)} of the monitored, "
        f"{percent(frozen, timeline.n_elements)} of all {timeline.n_elements:,}",
        "Memory: moments {:,.1f} MB, prev_grads {:,.1f} MB, grads {:,.1f} MB; released so far "
        "{:,.1f} MB".format(*(n_bytes / 1e6 for n_bytes in memory)),
    ]
    if n_blocks:
        backward = "backward stops above them"
        if trained_below:
            backward = f"backward still passes through for {shorten(trained_below[0], 46)}"
        if len(trained_below) > 1:
            backward += f" and {len(trained_below) - 1:,} more"
        what = "Lowest monitored blocks with no matrix left to train"
        lines.append(f"{what}: {n_blocks:,}; {backward}")
    if grace is not None and timeline.step <= grace:
        lines.append(f"No check yet: the grace period ends with step {grace:,}.")
    if all(unit.tau == 0 for unit in units):
        lines.append("Observing only: tau is 0, so statistics are measured, nothing freezes.")
    return lines


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values, at least two."""
    return stdev(values) / math.sqrt(len(values))


def report_tables(timeline: Timeline) -> list[Table]:
    """The tables of kinds, of the last events and of layers, without those that have no rows."""
    tables = [
        _kind_table(timeline),
        _gain_table(timeline),
        _event_table(timeline.events),
        _layer_table(timeline),
    ]
    return [table for table in tables if table.rows]


def _kind_table(timeline: Timeline) -> Table:
    criteria = "/".join(dict.fromkeys(unit.criterion for unit in timeline.units))
    header = ["kind", "units", "elements", "frozen", "first", "last", "min", "median", "max", "tau"]
    rows = []
    for kind, units in timeline.kinds.items():
        frozen = [unit.frozen_at for unit in units if unit.state == "frozen"]
        values = finite(unit.statistic for unit in units)
        row = [shorten(kind, 20)]
        row += [f"{n:,}" for n in (len(units), sum(x.n_elements for x in units), len(frozen))]
        row += [f"{of(frozen):,}" if frozen else "-" for of in (min, max)]
        row += [f"{of(values):.4g}" if values else "-" for of in (min, median, max)]
        rows.append([*row, number_range([unit.tau for unit in units])])
    title = f'By kind (first, last: steps of freezing; min to max: last "{criteria}" statistic)'
    return Table(title, header, rows, left=["kind"])


def _gain_table(timeline: Timeline) -> Table:
    """Per kind the "gain" of its units together: mean over the steps and its standard error.

    Over the checks that measured all of them: a frozen unit is measured no more.
    """
    rows, means = [], []
    for kind, units in timeline.kinds.items():
        columns = [timeline.units.index(unit) for unit in units if unit.criterion == "gain"]
        values = [[row[k] for k in columns] for _, row in timeline.history]
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


def _layer_table(timeline: Timeline) -> Table:
    """One character per kind and layer; no rows for a single layer or more than fit the width."""
    layers = sorted({unit.layer for unit in timeline.units if unit.layer is not None})
    rows = []
    for kind, units in timeline.kinds.items():
        marks = ""
        for layer in layers:
            states = {unit.state for unit in units if unit.layer == layer}
            marks += "+" if len(states) > 1 else "".join(_MARKS[state] for state in states) or " "
        if marks.strip():
            rows.append([shorten(kind, 20), marks])
    width = max((len(kind) for kind, _ in rows), default=0)
    if len(layers) < 2 or width + 2 + len(layers) > TEXT_WIDTH:
        rows = []
    ruler = ""  # numbers of the layers above their columns, as many as fit: "0    5    10"
    for column in range(0, len(layers), 5):
        if not ruler or len(ruler) < column:
            ruler = ruler.ljust(column) + str(layers[column])
    title = "By kind and layer: # frozen, ~ cooling down, . active, + several states"
    return Table(title, ["layer", ruler], rows, left=["layer", ruler])
