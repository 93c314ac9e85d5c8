"""The freeze table: the statistic of every unit, and the steps of its decision and its freezing.

A *unit* is a set of tensors that freeze together: one weight matrix, one stack of expert matrices
stored in a single parameter, or the factors of one LoRA update. The table is plain Python and
refers to no tensor, so it can be read, pickled and rebuilt at any time. Every decision is made
here; the Triton kernels make the same one on the device, and the host repeats it here.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple

NEVER = -1
"""Value of a step number before there is such a step."""

MAX_HISTORY_ROWS = 512
MAX_RELEASE_BATCHES = 6
"""The largest number of batches in which the frozen units of a run are released: torch.compile
recompiles a model at most 8 times before it falls back to eager mode."""


class Statistic(NamedTuple):
    """The needs of a statistic, and how it is compared with tau; its formula is in the backends.

    Attributes:
        code: Its number in a task (`backends.tasks`), which is also that of the C++ op.
        least_steps: Gradients that AdamW's moments must have seen before; void until then. After a
            single one "signal" is 1, whatever the gradient.
        is_ratio: Whether it is a quotient of two sums, which does not grow with the number of
            elements, rather than a sum.
        of_update: Whether it measures the update itself: known after it, void where nothing moved.
        uses_prev_grad: Whether it needs the gradient of the step before, in `prev_grad`.
    """

    code: int
    least_steps: int = 0
    is_ratio: bool = False
    of_update: bool = False
    uses_prev_grad: bool = False


STATISTICS = {
    "change": Statistic(1, uses_prev_grad=True),
    "norm": Statistic(2),
    "momentum": Statistic(3, least_steps=1),
    "signal": Statistic(4, least_steps=2, is_ratio=True),
    "weight_change": Statistic(5, of_update=True),
    "gain": Statistic(6, least_steps=1),
}


class FreezeEvent(NamedTuple):
    """One unit has been frozen.

    Attributes:
        step: First optimizer step in which the unit is frozen, counted from 1.
        unit: Name of the unit.
        statistic: Value that was below `tau`; NaN when `max_frozen` decided without one.
        tau: Threshold at the decision.
        n_elements: Elements of all tensors of the unit.
        decided_at: Step of the decision; earlier than `step` by the cooldown.
    """

    step: int
    unit: str
    statistic: float
    tau: float
    n_elements: int
    decided_at: int


@dataclass(frozen=True)
class FreezeConfig:
    """When a check takes place and its consequences; the same for all units of an optimizer.

    Args:
        grace_steps: Steps before the first check, `t_grace` in the paper's Algorithm 1. None where
            nothing is monitored.
        check_every: Steps from one check to the next, at least 1.
        patience: Consecutive checks below tau that decide a unit, at least 1.
        freeze_timing: "same_step" decides before the update (Algorithm 1), "next_step" after it.
        cooldown: Steps over which a decided unit's learning rate falls to zero before it freezes.
        max_frozen: Share of decided units, in (0, 1], from which on all others are decided too.
        tau_per: "unit" compares the sum with tau, "element" the sum over the number of elements.
            A ratio is never divided.
        total_steps: Planned optimizer steps, at least 1, or None.
        stop_grad: Whether frozen tensors are released: "auto", True or False.
        alpha: Share of `total_steps` from which `grace_steps` follows unless it was given.
    """

    grace_steps: int | None = None
    check_every: int = 1
    patience: int = 1
    freeze_timing: str = "same_step"
    cooldown: int = 0
    max_frozen: float = 1.0
    tau_per: str = "unit"
    total_steps: int | None = None
    stop_grad: bool | str = "auto"
    alpha: float = 0.5

    def is_check(self, t: int) -> bool:
        """Whether step `t` (counted from 1) is a check."""
        grace = self.grace_steps
        return grace is not None and t > grace and (t - grace - 1) % self.check_every == 0

    def cooldown_factor(self, t: int, decided_at: int) -> float:
        """Learning-rate factor at step `t` of a unit that was decided at step `decided_at`."""
        if decided_at == NEVER or self.cooldown == 0:
            return 1.0
        return max(0.0, 1.0 - (t - decided_at) / self.cooldown)


@dataclass(eq=False, slots=True)
class Unit:
    """One row of the freeze table.

    Attributes:
        name: The parameter's name, or `group{i}.param{j}` for nameless parameters.
        statistic: The measured quantity, one of `STATISTICS`.
        tau: The threshold now; it follows the parameter group.
        n_elements: Elements of all tensors of the unit.
        n_tensors: Tensors of the unit; a check with fewer gradients is void.
        hits: Consecutive checks below tau so far.
        decided_at: Step of the decisive check, or -1.
        frozen_at: First step since which the unit is frozen, or -1.
        released_at: Steps that had happened when its gradients and moments were released, or -1.
        prev_step: Step whose gradients the unit's `prev_grad` tensors contain, or -1.
        value: Last measured statistic as it is compared with tau, at least 0; NaN before the first.
        decided_tau: The threshold at the decision, NaN before it.
        decided_value: The statistic at the decision; NaN before it, and when `max_frozen` decided.
        is_published: Whether the freeze hooks have been called for it.
    """

    name: str
    statistic: str
    tau: float
    n_elements: int
    n_tensors: int = 1
    hits: int = 0
    decided_at: int = NEVER
    frozen_at: int = NEVER
    released_at: int = NEVER
    prev_step: int = NEVER
    value: float = math.nan
    decided_tau: float = math.nan
    decided_value: float = math.nan
    is_published: bool = False

    @property
    def is_decided(self) -> bool:
        return self.decided_at != NEVER

    @property
    def is_frozen(self) -> bool:
        return self.frozen_at != NEVER

    @property
    def is_released(self) -> bool:
        return self.released_at != NEVER

    @property
    def uses_prev_grad(self) -> bool:
        """Whether its statistic needs the gradient of the step before."""
        return STATISTICS[self.statistic].uses_prev_grad

    @property
    def needs_prev_grad(self) -> bool:
        """Whether the gradients of the unit have to be stored for the next step."""
        return self.uses_prev_grad and self.decided_at == NEVER

    def decide(self, t: int, value: float) -> None:
        self.decided_at, self.decided_value, self.decided_tau = t, value, self.tau

    def thaw(self) -> None:
        """Become an undecided unit without hits and previous gradients; `value` stays."""
        self.hits = 0
        self.decided_at = self.frozen_at = self.released_at = self.prev_step = NEVER
        self.decided_tau = self.decided_value = math.nan
        self.is_published = False

    def event(self) -> FreezeEvent:
        return FreezeEvent(
            step=self.frozen_at,
            unit=self.name,
            statistic=self.decided_value,
            tau=self.decided_tau,
            n_elements=self.n_elements,
            decided_at=self.decided_at,
        )


@dataclass(eq=False)
class FreezeTable:
    """All units of an optimizer and the count of its steps.

    Args:
        config: When checks take place, and their consequences.
        units: The monitored units.
        t: Optimizer steps that really happened so far.
        history: `(step, values)` of the checks, one value per unit, NaN where none was measured,
            and negative where "gain" was; thinned to every 2nd, 4th, ... check once it is long.
        has_changes: Whether units were decided or frozen and the optimizer has not acted on it yet.
    """

    config: FreezeConfig
    units: list[Unit] = field(default_factory=list)
    t: int = 0
    history: list[tuple[int, array[float]]] = field(default_factory=list)
    has_changes: bool = True

    _history_stride: int = 1
    _n_checks: int = 0

    def successor(
        self, units: Sequence[Unit], former: Mapping[Unit, Unit] | None = None
    ) -> FreezeTable:
        """A table of other units that continues the count and the history of this one.

        Args:
            units: Its units.
            former: Their former selves in this table; for others, that of the same name. What was
                measured of another statistic counts no more.
        """
        column = {unit.name: k for k, unit in enumerate(self.units)}
        chosen = []
        for unit in units:
            was = (former or {}).get(unit, unit)
            is_of_another = unit.statistic != was.statistic and not unit.is_decided
            if is_of_another:
                unit.hits, unit.value = 0, math.nan
            chosen.append(None if is_of_another else column.get(was.name))
        history = [
            (t, array("d", [math.nan if k is None else row[k] for k in chosen]))
            for t, row in self.history
        ]
        return replace(self, units=list(units), history=history, has_changes=True)

    def named(self, names: str | Iterable[str] | None) -> list[Unit]:
        """The units of these names; None: all.

        Raises:
            ValueError: For a name that is no monitored unit.
        """
        by_name = {unit.name: unit for unit in self.units}
        if names is None:
            return list(self.units)
        chosen = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in chosen if name not in by_name]
        if unknown:
            raise ValueError(
                f"thaw(units): {unknown} are not monitored units. monitored_units lists all names."
            )
        return [by_name[name] for name in chosen]

    @property
    def all_decided_at(self) -> int:
        """Step at which the last unit was decided, or -1 while one is undecided."""
        decided = [unit.decided_at for unit in self.units]
        return NEVER if not decided or NEVER in decided else max(decided)

    def all_frozen(self, t: int | None = None) -> bool:
        """Whether there is a unit and every one was frozen at step `t` (None: is frozen now)."""
        frozen_at = [unit.frozen_at for unit in self.units] or [NEVER]
        return min(frozen_at) > NEVER and max(frozen_at) <= (self.t if t is None else t)

    def count_step(self) -> int:
        """Count a step and apply the consequences of earlier decisions; returns the step `t`."""
        self.t += 1
        n = len(self.units)
        n_decided = n - [unit.decided_at for unit in self.units].count(NEVER)
        if n_decided < n and n_decided / n >= self.config.max_frozen:
            for unit in self.units:
                if not unit.is_decided:
                    unit.decide(self.t, math.nan)
        if n_decided:
            self._freeze_cooled()
        return self.t

    def uncount_step(self) -> None:
        """Take `count_step` back: the step turned out not to have happened (GradScaler)."""
        for unit in self.units:
            if unit.decided_at == self.t:
                unit.decided_at, unit.decided_tau = NEVER, math.nan
            if unit.frozen_at == self.t:
                unit.frozen_at = NEVER
        self.t -= 1

    def decide(self, values: Mapping[Unit, float]) -> None:
        """Compare measured statistics with tau, strictly, and decide; add a row to the history.

        Args:
            values: The sums of the undecided units whose check is not void.
        """
        if self.config.tau_per == "element":
            values = {
                unit: value if STATISTICS[unit.statistic].is_ratio else value / unit.n_elements
                for unit, value in values.items()
            }
        for unit, value in values.items():
            # "gain" may be negative; tau=0.0 freezes nothing, and -1 in the state is "unknown".
            unit.value = compared = value if value > 0.0 else 0.0
            if compared < unit.tau:
                unit.hits += 1
                if unit.hits >= self.config.patience:
                    unit.decide(self.t, compared)
            else:
                unit.hits = 0
        if values:
            self._freeze_cooled()
            self._record(values)

    def _freeze_cooled(self) -> None:
        """Freeze the decided units whose cooldown is over at step `t`."""
        for unit in [u for u in self.units if u.decided_at != NEVER and u.frozen_at == NEVER]:
            over_at = unit.decided_at + self.config.cooldown
            # Not in the steps in between, in which nothing is written or released.
            self.has_changes |= self.t >= over_at or self.t == unit.decided_at
            if self.t >= over_at:
                unit.frozen_at = over_at

    def checksum(self, *, taus: bool) -> int:
        """48 bits of all that determines the effect of a step on the units; exact as a float64.

        Numbers, unlike strings, have the same hash in every process.

        Args:
            taus: Whether the thresholds are part of it.
        """
        rows = tuple((u.tau if taus else 0, u.hits, u.decided_at, u.frozen_at) for u in self.units)
        return hash((self.t, rows)) & ((1 << 48) - 1)

    def lr_factor(self, unit: Unit | None) -> float:
        """Learning-rate factor of a tensor at this step: 1, the cooldown factor, 0 where frozen.

        A tensor that is not monitored (`unit` None) follows the cooldown of the unit decided last,
        once all are decided.
        """
        if unit is None:
            return self.config.cooldown_factor(self.t, self.all_decided_at)
        return 0.0 if unit.is_frozen else self.config.cooldown_factor(self.t, unit.decided_at)

    def never_measured(self) -> list[Unit]:
        """The undecided units, if some are decided and these have had no statistic so far."""
        left = [unit for unit in self.units if not unit.is_decided]
        idle = len(left) < len(self.units) and all(math.isnan(unit.value) for unit in left)
        return left if idle else []

    @property
    def unreleased(self) -> list[Unit]:
        """The frozen units whose gradients and moments have not been released."""
        return [unit for unit in self.units if unit.is_frozen and unit.released_at == NEVER]

    def release_batch(self) -> list[Unit]:
        """The frozen units that may be released now, or none while they are too few.

        A sixth of all units makes a batch; the last one comes when every unit is frozen. It depends
        on the table alone, never on when a host reads a decision back: clipping by the global norm,
        and all else that depends on the set of gradients, is the same in every run.
        """
        unreleased = self.unreleased
        enough = math.ceil(len(self.units) / MAX_RELEASE_BATCHES)
        return unreleased if len(unreleased) >= enough or self.all_frozen() else []

    @property
    def events(self) -> list[FreezeEvent]:
        """One event per frozen unit, by step, then in the order of the units."""
        frozen = [unit for unit in self.units if unit.is_frozen]
        return [unit.event() for unit in sorted(frozen, key=lambda unit: unit.frozen_at)]

    def unpublished_events(self) -> list[FreezeEvent]:
        """The events for which no hook has been called; each is returned once."""
        new = [unit for unit in self.units if unit.is_frozen and not unit.is_published]
        for unit in new:
            unit.is_published = True
        return [unit.event() for unit in sorted(new, key=lambda unit: unit.frozen_at)]

    def _record(self, measured: Mapping[Unit, float]) -> None:
        if self._n_checks % self._history_stride == 0:
            row = array("d", map(measured.get, self.units, repeat(math.nan)))
            self.history.append((self.t, row))
            if len(self.history) > MAX_HISTORY_ROWS:
                del self.history[1::2]
                self._history_stride *= 2
        self._n_checks += 1
