"""The step of the backends that the host drives: measure, decide, update, keep.

Every rule of a step is written here once, as tasks for a backend's `run_tasks`; the Triton engine
takes the same tasks. The freeze table decides from the measured sums.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..distributed import Ranks, ShardRows
from ..freezing.table import NEVER, STATISTICS, FreezeTable, Unit
from .step_tensors import (
    Groups,
    Layout,
    Outcome,
    State,
    Units,
    keep_tasks,
    measure_tasks,
    prev_grads_are_due,
    update_tasks,
    with_local_gradients,
)
from .tasks import UNSCALE, UPDATE, RunTasks, StepTensors

_PROCESS = os.getpid()  # that imported the package, perhaps the parent of this one


class Engine(Protocol):
    """Takes the steps of the tensors of one backend (and, on Triton, of one device).

    Attributes:
        runs_ahead: Whether a step returns before the host knows if it happened (GradScaler).
        unscales: Whether it takes part in GradScaler's protocol for fused optimizers.
        pending: The step that `sync` would read back; None where there is none.
    """

    runs_ahead: bool
    unscales: bool
    pending: Any

    def is_valid(self, groups: Groups, state: State, table: FreezeTable) -> bool:
        """Whether devices, dtypes, flags and addresses are those that the engine was made for."""

    def step(self, table: FreezeTable, ranks: Ranks | None, grad_scale: Tensor | None,
             found_inf: Tensor | None) -> None:  # fmt: skip
        """Take the step that `table` has begun, with the tensors that `is_valid` found."""

    def sync(self) -> Outcome | None:
        """Wait for the step under way; None where nothing is to be read back."""


class HostEngine:
    """An engine for the backends that the host drives.

    Args:
        run_tasks, tensors: The backend, and the tensors of the first step.
        units: The unit of each of them, None where it is not monitored.
        layout: The positions of the tensors; None where a single step is taken.
        decides: Whether the units of the freeze table are measured here.
        unscales: Whether the backend divides gradients by `grad_scale`.
    """

    runs_ahead = False

    def __init__(
        self,
        run_tasks: RunTasks,
        tensors: StepTensors,
        units: Units,
        layout: Layout | None = None,
        *,
        decides: bool = True,
        unscales: bool = False,
    ) -> None:
        self.run_tasks, self.units, self.layout = run_tasks, units, layout
        self.decides, self.unscales = decides, unscales
        self.unit_statistics = UnitStatistics(units)
        self.position = {p: n for n, p in tensors.dtensors}
        self.shards: list[ShardRows] | None = None  # of `Ranks.shard_rows`
        self.tensors: StepTensors | None = tensors
        self.pending: Callable[[], Outcome] | None = None

    def is_valid(self, groups: Groups, state: State, table: FreezeTable) -> bool:
        self.tensors = None
        assert self.layout is not None
        if self.layout.is_valid(groups, state):
            self.tensors = self.layout.collect(groups, state, prev_grads=prev_grads_are_due(table))
        return self.tensors is not None

    def step(
        self,
        table: FreezeTable,
        ranks: Ranks | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Algorithm 1 of the paper: measure, decide, update, keep.

        Gradients are divided by `grad_scale` first, in place, those of frozen tensors excepted.
        """
        tensors, self.tensors = self.tensors, None
        assert tensors is not None
        config, t = table.config, table.t
        tensors, units, run_tasks = with_local_gradients(tensors), self.units, self.run_tasks
        check = self.decides and config.is_check(t)
        same_step = config.freeze_timing == "same_step"
        unscale = 0 if grad_scale is None else UNSCALE
        measured = measure_tasks(tensors, units, table) if check else []
        is_kept = config.is_check(t + 1)
        first = [0] * len(units)
        if check and same_step:
            first = [a and (a | unscale) for a in measured]
            if is_kept and self.layout is not None:
                # A previous gradient that is read is stored at once: the update need not touch it.
                # The optimizer drops that of a unit which is decided here, a caller's own is left.
                keeps = keep_tasks(tensors, units)
                first = [a and (a | b) for a, b in zip(first, keeps, strict=True)]
            sums = run_tasks(tensors, first, [1.0] * len(first), grad_scale)
            table.decide(self._values(table, ranks, measured, sums)())

        tasks, lr_factors = update_tasks(tensors, units, table)
        if check and not same_step:
            tasks = [a | b for a, b in zip(tasks, measured, strict=True)]
        kept: list[Unit] = []
        if is_kept:
            keeps = keep_tasks(tensors, units)
            kept = self.unit_statistics.complete_units(keeps)
            tasks = [a | (b & ~c) for a, b, c in zip(tasks, keeps, first, strict=True)]
        if unscale:
            tasks = [a and (a | (unscale & ~c)) for a, c in zip(tasks, first, strict=True)]
        sums = run_tasks(tensors, tasks, lr_factors, grad_scale)
        # Autograd saves the DTensor, whose version shows that its shard has been overwritten.
        increment_version([p for i, p in tensors.dtensors if tasks[i] & UPDATE])

        if check and not same_step:
            values = self._values(table, ranks, measured, sums)
            if ranks is not None and ranks.one_mesh:
                self.pending = lambda: Outcome(values(), kept)
                return
            table.decide(values())
        _set_kept(table, kept)

    def _values(
        self,
        table: FreezeTable,
        ranks: Ranks | None,
        tasks: Sequence[int],
        sums: Tensor | None,
    ) -> Callable[[], dict[Unit, float]]:
        """A function that returns the statistic of every unit whose check is not void.

        All ranks of a job call this together and get the same. Where a single exchange is enough
        it has begun, and the result waits for it.
        """
        statistics = self.unit_statistics
        if ranks is None:
            values = {} if sums is None else statistics.of(sums)
            return lambda: values
        # Infinity is no evidence, whatever other ranks add to it. The last row is for the tensors
        # that this rank lacks.
        n = len(tasks)
        rows = torch.full((n + 1, 3), math.inf, dtype=torch.float64, device="cpu")
        if sums is not None:
            complete = statistics.complete_units(tasks)
            chosen = [i for unit in complete for i in statistics.positions[unit]]
            rows[chosen] = sums[chosen]
        if self.shards is None:
            self.shards = ranks.shard_rows(table.units, self.position, rows)
        if ranks.one_mesh:
            finish = ranks.start_sum(table, rows, self.shards)
            return lambda: statistics.of(finish()[:n])
        ranks.add_shards(rows, self.shards)
        values = ranks.largest_values(table, statistics.of(rows[:n]))
        return lambda: values

    def sync(self) -> Outcome | None:
        pending, self.pending = self.pending, None
        return pending() if pending else None


class UnitStatistics:
    """The statistics of units, from the sums of their tensors.

    In Python: behind a step over all tensors every call of torch is slow, some 20 microseconds, and
    most models have a few hundred units.

    Attributes:
        positions: The tensors of every unit that has all of them here.
    """

    def __init__(self, units: Units) -> None:
        found: dict[Unit, list[int]] = {}
        for n, unit in enumerate(units):
            if unit is not None:
                found.setdefault(unit, []).append(n)
        self.positions = {unit: own for unit, own in found.items() if len(own) == unit.n_tensors}

    def of(self, sums: Tensor) -> dict[Unit, float]:
        """The statistic of every unit whose check is not void.

        `sums` are those of `run_tasks`, of shape [tensors, 3].
        """
        rows, found = sums.tolist(), {}
        for unit, positions in self.positions.items():
            value = divisor = 0.0
            for n in positions:
                numerator, denominator, magnitude = rows[n]
                if not 0 < magnitude < math.inf:  # NaN too
                    break
                value += numerator
                divisor += denominator
            else:
                rule = STATISTICS[unit.statistic]
                if rule.is_ratio:
                    value = value / divisor if divisor else math.nan
                if math.isfinite(value) and (value > 0 or not rule.of_update):
                    found[unit] = value
        return found

    def complete_units(self, tasks: Sequence[int]) -> list[Unit]:
        """The units every tensor of which has a task."""
        return [unit for unit, own in self.positions.items() if all([tasks[n] for n in own])]


@contextlib.contextmanager
def no_threads_after_fork() -> Iterator[None]:
    """Let torch work on one thread in a process that was forked from the one of the import.

    OpenMP's threads do not survive a fork, and with GCC's library a child that asks for some waits
    for those of its parent for ever: torch's own AdamW does with a tensor of 20,000 elements.
    """
    if os.getpid() == _PROCESS:
        yield
        return
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def step_engines(
    engines: Sequence[Engine],
    table: FreezeTable,
    ranks: Ranks | None,
    grad_scale: Tensor | None,
    found_inf: Any,
) -> None:
    """Count a step and take it with every engine; nothing happens where `found_inf` is not zero.

    An engine that runs ahead finds that out on its device, and `read_back` brings it to the host.

    Raises:
        AssertionError: If gradients are scaled and a backend does not unscale them, as torch's
            AdamW without `fused`.
    """
    scaled = grad_scale is not None or found_inf is not None
    if scaled and not all(engine.unscales for engine in engines):
        raise AssertionError("Expected grad_scale and found_inf to be None")
    runs_ahead = bool(engines) and all(engine.runs_ahead for engine in engines)
    if found_inf is not None and not runs_ahead and float(found_inf) != 0:
        return
    table.count_step()
    for engine in engines:
        engine.step(table, ranks, grad_scale, found_inf)


def read_back(engines: Sequence[Engine], table: FreezeTable, ranks: Ranks | None) -> None:
    """Bring the table up to date with the step that the engines have under way.

    Raises:
        RuntimeError: If the ranks took that step with different tables, or if a device decided
            otherwise than the table does with the same statistics.
    """
    outcomes = [outcome for engine in engines if (outcome := engine.sync()) is not None]
    if not outcomes:
        return
    if ranks is not None:
        if not all(outcome.ranks_agree for outcome in outcomes):
            ranks.raise_difference(table)
        ranks.must_join |= any(outcome.must_join for outcome in outcomes)
    if not all(outcome.happened for outcome in outcomes):
        table.uncount_step()
        return
    values: dict[Unit, float] = {}
    for outcome in outcomes:
        values.update(outcome.values)
    table.decide(values)
    for outcome in outcomes:
        decided = {unit for unit in outcome.values if unit.decided_at != NEVER}
        for unit in decided ^ (decided if outcome.decided is None else outcome.decided):
            raise RuntimeError(
                f"step {table.t}: the device and the host decided differently about unit "
                f"{unit.name!r} with statistic {unit.value} and tau {unit.tau}. Please report "
                "this, with the output of `grades-kernels info`."
            )
        _set_kept(table, outcome.kept)


def _set_kept(table: FreezeTable, units: Sequence[Unit]) -> None:
    """Note of these units that their gradients of this step have been stored."""
    for unit in units:
        if unit.decided_at == NEVER:
            unit.prev_step = table.t
