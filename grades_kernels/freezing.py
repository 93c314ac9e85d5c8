"""The freeze table: what every unit has measured, when it was decided, since when it is frozen.

A *unit* is a set of tensors that freeze together: one weight matrix, or the A/B pair of a LoRA
adapter. The table is plain Python and holds no tensor, so it can be read, pickled and rebuilt at
any time. The reference implementation decides in it; an implementation that decides on a device
keeps a device copy and brings this one up to date.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .report import FreezeEvent

if TYPE_CHECKING:
    from .distributed import Ranks

STATISTICS = ("change", "norm", "momentum", "signal", "weight_change")
TIMINGS = ("same_step", "next_step")
NEVER = -1
"""Value of `decided_at`, `frozen_at` and `prev_step` before there is such a step."""

MAX_HISTORY_ROWS = 512
MAX_WAVES = 6
"""Into how many waves the frozen units of a run are gathered: torch.compile recompiles a model at
most 8 times before it gives up."""


def exact_grace_steps(alpha: float, total_steps: int) -> int:
    """`ceil(alpha * total_steps)` for the decimal number that was written, e.g. 7 for 0.28 * 25.

    The floating-point product is 7.000000000000001 there, whose ceiling is one step late.
    """
    return math.ceil(Fraction(repr(float(alpha))) * total_steps)


def noise_floor(beta1: float) -> float:
    """The "signal" of a gradient that is pure noise: about 0.18 for beta1 = 0.9.

    exp_avg is then a sum of independent terms with weights (1 - beta1) * beta1^k and so normal with
    standard deviation sqrt((1 - beta1) / (1 + beta1)) times that of the gradient, which
    sqrt(exp_avg_sq) estimates; the mean absolute value of a normal variable is sqrt(2 / pi) of its
    standard deviation.
    """
    return math.sqrt(2 / math.pi * (1 - beta1) / (1 + beta1))


@dataclass(frozen=True)
class FreezeRule:
    """When a check takes place and what it leads to; the same for all units of an optimizer.

    Args:
        grace_steps: Steps before the first check, `t_grace` in the paper's Algorithm 1. None where
            nothing is monitored.
        check_every: Steps from one check to the next.
        patience: Consecutive checks below tau that decide a unit.
        freeze_timing: "same_step" decides before the update (Algorithm 1), "next_step" after it.
        cooldown: Steps over which a decided unit's learning rate falls to zero before it freezes.
        max_frozen: Share of decided units from which on all others are decided too.
        tau_per: "unit" compares the sum with tau, "element" the sum over the number of elements.
            "signal" is a ratio, which neither divides.
    """

    grace_steps: int | None = None
    check_every: int = 1
    patience: int = 1
    freeze_timing: str = "same_step"
    cooldown: int = 0
    max_frozen: float = 1.0
    tau_per: str = "unit"

    def checks(self, t: int) -> bool:
        """Whether step `t` (counted from 1) is a check."""
        grace = self.grace_steps
        return grace is not None and t > grace and (t - grace - 1) % self.check_every == 0

    def divisor(self, unit: Unit) -> int:
        """What the statistic of a unit is divided by before it is compared with tau."""
        return unit.n_elements if self.tau_per == "element" and unit.criterion != "signal" else 1

    def ramp(self, t: int, decided_at: int) -> float:
        """Learning-rate factor at step `t` of what was decided at step `decided_at`."""
        if decided_at == NEVER or self.cooldown == 0:
            return 1.0
        return max(0.0, 1.0 - (t - decided_at) / self.cooldown)


@dataclass(eq=False)
class Unit:
    """One row of the freeze table.

    Attributes:
        name: The parameter's name, or `group{i}.param{j}` for nameless parameters.
        criterion: Which statistic is measured, one of `STATISTICS`.
        tau: The threshold now; it follows the parameter group.
        n_elements: Elements of all tensors of the unit.
        n_tensors: Tensors of the unit; a check with fewer gradients is void.
        hits: Consecutive checks below tau so far.
        decided_at: Step of the decisive check, or -1.
        frozen_at: First step since which the unit is frozen, or -1.
        stopped_at: Steps that had happened when its tensors stopped to need gradients, or -1.
        prev_step: Step whose gradients the unit's `prev_grad` tensors hold, or -1.
        statistic: Last measured statistic as it is compared with tau, NaN before the first.
        decided_tau: The threshold at the decision, NaN before it.
        decided_statistic: The statistic at the decision; NaN before it, and when `max_frozen`
            decided.
        checked_at: Step of the last measurement, or -1.
        announced: Whether the freeze hooks have been told.
    """

    name: str
    criterion: str
    tau: float
    n_elements: int
    n_tensors: int = 1
    hits: int = 0
    decided_at: int = NEVER
    frozen_at: int = NEVER
    stopped_at: int = NEVER
    prev_step: int = NEVER
    statistic: float = math.nan
    decided_tau: float = math.nan
    decided_statistic: float = math.nan
    checked_at: int = NEVER
    announced: bool = False

    def decide(self, t: int, statistic: float) -> None:
        self.decided_at = t
        self.decided_statistic = statistic
        self.decided_tau = self.tau

    def thaw(self) -> None:
        """Back to an undecided unit that has measured nothing yet."""
        self.hits = 0
        self.decided_at = self.frozen_at = self.stopped_at = self.prev_step = NEVER
        self.decided_tau = self.decided_statistic = math.nan
        self.announced = False

    def event(self) -> FreezeEvent:
        return FreezeEvent(
            step=self.frozen_at,
            unit=self.name,
            statistic=self.decided_statistic,
            tau=self.decided_tau,
            n_elements=self.n_elements,
            decided_at=self.decided_at,
        )


@dataclass(eq=False)
class FreezeTable:
    """All units of an optimizer and the count of its steps.

    Args:
        rule: When checks take place and what they lead to.
        units: The monitored units.
        t: Optimizer steps that really happened so far.
    """

    rule: FreezeRule
    units: list[Unit] = field(default_factory=list)
    t: int = 0
    history: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    news: bool = True
    """Whether units were decided or frozen that the optimizer has not acted on yet."""
    ranks: Ranks | None = None
    """The processes that decide together with this one; None: it decides alone."""

    _history_stride: int = 1
    _rows_seen: int = 0

    def successor(self, units: list[Unit]) -> FreezeTable:
        """A table of other units that goes on with the count and the history of this one."""
        column = {unit.name: k for k, unit in enumerate(self.units)}
        chosen = [column.get(unit.name) for unit in units]
        history = [
            (t, tuple(math.nan if k is None else row[k] for k in chosen)) for t, row in self.history
        ]
        return replace(self, units=units, history=history)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ranks": None}  # process groups belong to their process

    @property
    def all_decided_at(self) -> int:
        """Step at which the last unit was decided, or -1 while one is undecided."""
        decided = [unit.decided_at for unit in self.units]
        return NEVER if not decided or NEVER in decided else max(decided)

    @property
    def all_frozen(self) -> bool:
        return bool(self.units) and all(unit.frozen_at != NEVER for unit in self.units)

    def settle(self) -> None:
        """Freeze the decided units whose cooldown is over at step `t`."""
        for unit in self.units:
            if unit.decided_at != NEVER and unit.frozen_at == NEVER:
                over_at = unit.decided_at + self.rule.cooldown
                if self.t >= over_at:
                    unit.frozen_at = over_at
                self.news = True

    def begin_step(self) -> int:
        """Count a step and settle what earlier decisions bring about; returns the step `t`."""
        self.t += 1
        n, n_decided = len(self.units), sum(unit.decided_at != NEVER for unit in self.units)
        if n_decided < n and n_decided / n >= self.rule.max_frozen:
            for unit in self.units:
                if unit.decided_at == NEVER:
                    unit.decide(self.t, math.nan)
        self.settle()
        return self.t

    def judge(self, unit: Unit, statistic: float) -> None:
        """Compare a measured (not void) statistic with tau, strictly, and decide the unit."""
        statistic /= self.rule.divisor(unit)
        unit.statistic, unit.checked_at = statistic, self.t
        unit.hits = unit.hits + 1 if statistic < unit.tau else 0
        if unit.hits >= self.rule.patience:
            unit.decide(self.t, unit.statistic)
            self.settle()

    @property
    def waiting(self) -> list[Unit]:
        """The frozen units whose gradients have not stopped."""
        return [u for u in self.units if u.frozen_at != NEVER and u.stopped_at == NEVER]

    def wave(self) -> list[Unit]:
        """The frozen units whose gradients may stop now, or none while they are too few.

        A sixth of all units makes a wave; the last one comes when every unit is frozen. It depends
        on the table alone, never on when a host learned of a decision: what hangs on the set of
        gradients, such as clipping by their global norm, is the same in every run.
        """
        waiting = self.waiting
        enough = math.ceil(len(self.units) / MAX_WAVES)
        return waiting if len(waiting) >= enough or self.all_frozen else []

    def lr_factor(self, unit: Unit | None) -> float:
        """Learning-rate factor of a tensor at this step: 1, the cooldown ramp, 0 where frozen.

        A tensor that is not monitored (`unit` None) follows the ramp of the unit decided last,
        once all are decided.
        """
        if unit is None:
            return self.rule.ramp(self.t, self.all_decided_at)
        return 0.0 if unit.frozen_at != NEVER else self.rule.ramp(self.t, unit.decided_at)

    @property
    def events(self) -> list[FreezeEvent]:
        """One event per frozen unit, by step, then in the order of the units."""
        frozen = [unit for unit in self.units if unit.frozen_at != NEVER]
        return [unit.event() for unit in sorted(frozen, key=lambda unit: unit.frozen_at)]

    def announce(self) -> list[FreezeEvent]:
        """The events that have not been told yet; each is returned once."""
        new = [unit for unit in self.units if unit.frozen_at != NEVER and not unit.announced]
        for unit in new:
            unit.announced = True
        return [unit.event() for unit in sorted(new, key=lambda unit: unit.frozen_at)]

    def record(self, row: tuple[float, ...]) -> None:
        """Keep a row of the history, thinned to every 2nd, 4th, ... row once it is long.

        Args:
            row: The statistic of every unit at this step, NaN where none was measured.
        """
        if self._rows_seen % self._history_stride == 0:
            self.history.append((self.t, row))
            if len(self.history) > MAX_HISTORY_ROWS:
                del self.history[1::2]
                self._history_stride *= 2
        self._rows_seen += 1
