"""The data of a report: units, memory, and the course of a run, without any tensor."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from ..freezing.table import FreezeEvent


class Memory(NamedTuple):
    """Memory of an optimizer on one process, in bytes.

    Attributes:
        moments: Current size of ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.
        prev_grads: Current size of the previous gradients.
        grads: Current size of the gradients.
        released: Former size of all three for the frozen tensors that no longer have them.
    """

    moments: int = 0
    prev_grads: int = 0
    grads: int = 0
    released: int = 0


NO_MEMORY = Memory()


@dataclass(frozen=True)
class UnitReport:
    """State of one unit.

    Attributes:
        name: Name of the unit.
        layer: Number of the repeated block it belongs to, None outside of any.
        kind: Sort of matrix, "q_proj" for example; colours and tables group units by it.
        n_elements: Elements of all its tensors.
        criterion: Name of its statistic, e.g. "change"; see `GradESAdamW`.
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


def units_by_kind(units: Iterable[UnitReport]) -> dict[str, list[UnitReport]]:
    """The units of every kind, in their order."""
    kinds: dict[str, list[UnitReport]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    return kinds


def finite(values: Iterable[float]) -> list[float]:
    """The values without NaN and infinities."""
    return [value for value in values if math.isfinite(value)]


class Freeze(NamedTuple):
    """Period in which a unit was frozen; `thawed_at` is excluded, and None at the end."""

    decided_at: int
    frozen_at: int
    thawed_at: int | None


@dataclass(frozen=True, eq=False)
class Timeline:
    """The course of a run; `n_elements` is `FreezeReport.n_trainable`."""

    step: int
    total_steps: int | None
    grace_steps: int | None
    units: Sequence[UnitReport]
    events: Sequence[FreezeEvent]
    history: Sequence[tuple[int, Sequence[float]]]
    n_elements: int

    @property
    def n_frozen(self) -> int:
        """Number of units that are frozen at the end."""
        return sum(unit.state == "frozen" for unit in self.units)

    @cached_property
    def kinds(self) -> dict[str, list[UnitReport]]:
        """The units of every kind: kinds in model order, the units of each by layer."""
        by_layer = sorted(self.units, key=lambda u: math.inf if u.layer is None else u.layer)
        kinds = units_by_kind(by_layer)
        return {kind: kinds[kind] for kind in units_by_kind(self.units)}

    @cached_property
    def freezes(self) -> dict[str, list[Freeze]]:
        """Every period in which a unit was frozen, oldest first, by the unit's name.

        A thaw is not recorded: it is taken to be the first later measurement.
        """
        decisions: dict[str, dict[int, int]] = defaultdict(dict)
        for event in self.events:
            decisions[event.unit][event.step] = event.decided_at
        freezes: dict[str, list[Freeze]] = {}
        for column, unit in enumerate(self.units):
            decided = decisions[unit.name]
            if unit.state == "frozen":
                decided[unit.frozen_at] = unit.decided_at
            measured = [step for step, row in self.history if math.isfinite(row[column])]
            backwards = []
            latest = unit.decided_at if unit.state == "cooling" else self.step
            for frozen_at in sorted(decided, reverse=True):
                thawed_at = None
                if frozen_at != unit.frozen_at:
                    latest = max(frozen_at, latest)
                    thawed_at = next((t for t in measured if frozen_at < t < latest), latest)
                latest = decided[frozen_at]
                backwards.append(Freeze(latest, frozen_at, thawed_at))
            freezes[unit.name] = backwards[::-1]
        return freezes

    def spans(self, unit: UnitReport) -> list[tuple[str, int, int]]:
        """`(state, first step, last step)` of one unit, in order."""
        spans = []
        now, last = 0, self.step
        for decided_at, frozen_at, thawed_at in self.freezes[unit.name]:
            end = last if thawed_at is None else thawed_at
            spans += [("active", now, decided_at), ("cooling", decided_at, frozen_at)]
            spans += [("frozen", frozen_at, end)]
            now = end
        if unit.state != "frozen":
            decided_at = unit.decided_at if unit.state == "cooling" else last
            spans += [("active", now, decided_at), ("cooling", decided_at, last)]
        return [(state, start, end) for state, start, end in spans if start < end]

    def trainable_elements(self) -> list[tuple[int, int]]:
        """`(step, elements)` that are still trained; see `FreezeReport.trainable_elements`."""
        frozen = self._frozen({unit.name: unit.n_elements for unit in self.units})
        return [(step, self.n_elements - n) for step, n in frozen]

    def frozen_share(self, units: Sequence[UnitReport]) -> list[tuple[int, float]]:
        """`(step, share of these units that is frozen)` at step 0, every change and the end."""
        counts = self._frozen({unit.name: 1 for unit in units})
        return [(step, count / max(1, len(units))) for step, count in counts]

    def _frozen(self, weights: dict[str, int]) -> list[tuple[int, int]]:
        changes = Counter({0: 0, self.step: 0})
        for name, freezes in self.freezes.items():
            for _, frozen_at, thawed_at in freezes:
                changes[frozen_at] += weights.get(name, 0)
                if thawed_at is not None:
                    changes[thawed_at] -= weights.get(name, 0)
        steps = sorted(changes)
        return list(zip(steps, accumulate(changes[step] for step in steps), strict=True))
