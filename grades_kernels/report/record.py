"""The data of a report: units, memory, and the course of a run, without any tensor."""

from __future__ import annotations

import math
from collections import Counter
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

    def spans(self, unit: UnitReport) -> list[tuple[str, int, int]]:
        """`(state, first step, last step)` of one unit, in order."""
        last = self.step
        decided_at = last if unit.decided_at < 0 else unit.decided_at
        frozen_at = last if unit.frozen_at < 0 else unit.frozen_at
        spans = [("active", 0, decided_at), ("cooling", decided_at, frozen_at)]
        spans += [("frozen", frozen_at, last)]
        return [(state, start, end) for state, start, end in spans if start < end]

    def trainable_elements(self) -> list[tuple[int, int]]:
        """`(step, elements)` that are still trained; see `FreezeReport.trainable_elements`."""
        frozen = self._frozen([(unit, unit.n_elements) for unit in self.units])
        return [(step, self.n_elements - n) for step, n in frozen]

    def frozen_share(self, units: Sequence[UnitReport]) -> list[tuple[int, float]]:
        """`(step, share of these units that is frozen)` at step 0, every change and the end."""
        counts = self._frozen([(unit, 1) for unit in units])
        return [(step, count / max(1, len(units))) for step, count in counts]

    def _frozen(self, weights: Iterable[tuple[UnitReport, int]]) -> list[tuple[int, int]]:
        changes = Counter({0: 0, self.step: 0})
        for unit, weight in weights:
            if unit.state == "frozen":
                changes[unit.frozen_at] += weight
        steps = sorted(changes)
        return list(zip(steps, accumulate(changes[step] for step in steps), strict=True))
