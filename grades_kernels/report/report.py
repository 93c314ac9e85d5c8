"""FreezeReport: the freezes of a run as plain data to print, save, load and plot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..freezing.naming import layer_and_kind
from ..freezing.table import FreezeEvent, FreezeTable
from .plot import Picture, picture_path
from .record import (
    NO_MEMORY,
    Memory,
    UnitReport,
    frozen_over_time,
    load_json,
    save_json,
    to_json,
)
from .tables import layout, percent, report_tables, shorten

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, eq=False, repr=False)
class FreezeReport:
    """The freezes of a run and the state of its units after ``step`` optimizer steps.

    The report references no tensor and no optimizer. ``str()`` gives tables in plain ASCII without
    colour codes, fit for logs and files; ``rich.print(report)`` shows the same tables in colour.

    All statistics are on the scale of ``tau``.

    Attributes:
        step: Optimizer steps that really happened.
        total_steps: Planned steps, None when unknown.
        grace_steps: Steps before the first check, None when nothing is monitored.
        units: Every monitored unit, in model order.
        events: One event for every unit that is frozen, oldest first.
        history: ``(step, statistics)`` of recorded steps, oldest first; one statistic per unit in
            the order of ``units``, NaN where nothing was measured.
        n_trainable: Elements of all tensors in the optimizer, monitored or not, frozen or not.
        backend: Implementation in use: "reference", "native" or "triton".
        memory: Bytes in use and released on this process.
        frozen_blocks: How many of the lowest monitored blocks have no matrix left to train.
        trained_below: Names of tensors in or below these blocks that still train, so that backward
            has to pass through the blocks; without any, it stops above them.
        cut: The tensors frozen before the first step, in one line; see `Cut.summary`.

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
    memory: Memory = NO_MEMORY
    frozen_blocks: int = 0
    trained_below: tuple[str, ...] = ()
    cut: str = ""

    def __post_init__(self) -> None:
        for step, row in self.history:
            if len(row) != len(self.units):
                raise ValueError(
                    f"history of step {step} has {len(row)} statistics for {len(self.units)} "
                    "units; give one per unit, NaN where nothing was measured"
                )

    @classmethod
    def from_table(cls, table: FreezeTable, **others: Any) -> FreezeReport:
        """The report on a freeze table; ``others`` are the attributes that it does not know."""
        units = []
        for unit in table.units:
            what = (unit.name, *layer_and_kind(unit.name), unit.n_elements, unit.statistic)
            state = (unit.tau, unit.value, unit.hits, unit.decided_at, unit.frozen_at)
            units.append(UnitReport(*what, *state))
        return cls(
            step=table.t,
            total_steps=table.config.total_steps,
            grace_steps=table.config.grace_steps,
            units=tuple(units),
            events=tuple(table.events),
            history=tuple((step, tuple(row)) for step, row in table.history),
            **others,
        )

    def __eq__(self, other: object) -> bool:
        # By content, so that a missing measurement (NaN) equals itself after save() and load().
        if not isinstance(other, FreezeReport):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        frozen = sum(unit.state == "frozen" for unit in self.units)
        counts = f"units={len(self.units)}, frozen={frozen}"
        counts += f", events={len(self.events)}, history={len(self.history)} rows"
        return f"FreezeReport(step={self.step}, {counts})"

    def __str__(self) -> str:
        planned = "" if self.total_steps is None else f" of {self.total_steps:,} planned"
        lines = [f"Freeze report after {self.step:,}{planned} steps ({self.backend} backend)"]
        lines += self._counts() if self.units else ["No unit is monitored: nothing can freeze."]
        if self.cut:
            lines.append(f"Before the first step: {self.cut}")
        tables = map(layout, report_tables(self.units, self.events, self.history))
        return "\n\n".join(["\n".join(lines), *tables])

    def _counts(self) -> list[str]:
        units, grace = self.units, self.grace_steps
        decided = sum(unit.decided_at >= 0 for unit in units)
        sizes = [unit.n_elements for unit in units if unit.state == "frozen"]
        frozen, monitored = sum(sizes), sum(unit.n_elements for unit in units)
        lines = [
            f"Monitored units: {len(units):,}; decided {decided:,}, of which frozen {len(sizes):,}"
            + ("" if grace is None else f"; grace period {grace:,} steps"),
            f"Frozen elements: {frozen:,} = {percent(frozen, monitored)} of the monitored, "
            f"{percent(frozen, self.n_trainable)} of all {self.n_trainable:,}",
            "Memory: moments {:,.1f} MB, prev_grads {:,.1f} MB, grads {:,.1f} MB; released so far "
            "{:,.1f} MB".format(*(n_bytes / 1e6 for n_bytes in self.memory)),
        ]
        if self.frozen_blocks:
            backward, below = "backward stops above them", self.trained_below
            if below:
                backward = f"backward still passes through for {shorten(below[0], 46)}"
            if len(below) > 1:
                backward += f" and {len(below) - 1:,} more"
            what = "Lowest monitored blocks with no matrix left to train"
            lines.append(f"{what}: {self.frozen_blocks:,}; {backward}")
        if grace is not None and self.step <= grace:
            lines.append(f"No check yet: the grace period ends with step {grace:,}.")
        if all(unit.tau == 0 for unit in units):
            lines.append("Observing only: tau is 0, so statistics are measured, nothing freezes.")
        return lines

    def __rich__(self) -> Text:
        from rich.text import Text

        text = Text(str(self))
        text.highlight_words([str(self).partition("\n")[0]], style="bold")
        tables = report_tables(self.units, self.events, self.history)
        text.highlight_words([table.title for table in tables], style="bold cyan")
        return text

    def trainable_elements(self) -> list[tuple[int, int]]:
        """`(step, elements)` that are still trained, at step 0, every change and the last step.

        A unit that was thawed counts as trained from the beginning.
        """
        frozen = frozen_over_time(self.units, self.step)
        return [(step, self.n_trainable - n) for step, _, n in frozen]

    def frozen_share(self) -> list[tuple[int, float]]:
        """`(step, share)` of the monitored units, by count, at the same steps; in [0, 1]."""
        frozen = frozen_over_time(self.units, self.step)
        return [(step, n / max(1, len(self.units))) for step, n, _ in frozen]

    def to_dict(self) -> dict[str, Any]:
        """The report in the types of strict JSON: NaN becomes None, an infinity "inf" or "-inf"."""
        return to_json(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to a JSON file and return its path.

        The file is replaced as a whole: after an error it is as before. Missing folders are made.
        """
        return save_json(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezeReport:
        """Read a file that :meth:`save` wrote; the result equals the saved report.

        Raises:
            ValueError: The file is not a report; the message names it and the reason.
        """
        return load_json(cls, path, "a freeze report")

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw four panels: timeline of the units, statistics, frozen share, trained elements.

        The suffix of `path` chooses the format, ".png" when there is none. Missing folders are
        made. Returns the path that was written.

        Raises:
            ImportError: matplotlib is missing; the message says how to install it.
        """
        path = picture_path(path, "FreezeReport.plot()")
        Picture(self).draw().savefig(path, dpi=150)
        return path
