"""Takes steps with the Triton kernels: launches, and the results that the host reads back.

A step costs one pass over the gradients on the host, one asynchronous copy of its inputs, one
launch per dtype combination (two for a check before the update) and one small launch that decides.
The host computes the task of each tensor from the freeze table, which knows all earlier
decisions by then: those of the step before are read back when the next one begins, a fixed lag in
every run.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version

from ..distributed import Ranks, ShardRows
from ..freezing.table import STATISTICS, FreezeTable, Unit
from ..state_tensors import is_plain, same_memory_order
from .step_tensors import (
    Groups,
    Layout,
    Outcome,
    State,
    check_readable,
    keep_tasks,
    measure_tasks,
    prev_grads_are_due,
    update_tasks,
    with_local_gradients,
)
from .tasks import UPDATE, StepTensors
from .triton_kernels import DTYPES, decide_kernel, launch_options, step_kernel
from .triton_tables import DEPENDS, FIELDS, FREEZES, DeviceTables

_logger = logging.getLogger(__name__)


class Tasks(NamedTuple):
    """The tasks of a step; the same in the next one unless a unit is decided or a gradient missing.

    Attributes:
        inputs: All that they depend on.
        of_tensors, lr_factors: One number per tensor.
        is_measured: Per unit whether all its tensors are measured.
        kept: The units all of whose gradients are stored.
        updates: Per tensor UPDATE or 0.
        measure, keep: Whether any tensor is measured, and whether any gradient is stored.
    """

    inputs: Any
    of_tensors: np.ndarray
    lr_factors: np.ndarray
    is_measured: np.ndarray
    kept: list[Unit]
    updates: list[int]
    measure: bool
    keep: bool


class TritonEngine:
    """Takes the steps of the tensors of one device.

    It is made when tensors, state or units change. `step` launches one step and returns before the
    device has taken it.

    Args:
        tensors, units, layout: As in `HostEngine`; tensors may lack a gradient.
        own_units: The units to decide, in the same order on all ranks of a job, also those of other
            ranks, and those of which no tensor has state yet; None: those of the tensors.

    Raises:
        ValueError: If the kernels cannot read a tensor; `fit_state` makes state so that they can.
    """

    runs_ahead = unscales = True

    def __init__(
        self,
        tensors: StepTensors,
        units: Sequence[Unit | None],
        device: torch.device,
        layout: Layout | None = None,
        own_units: Sequence[Unit] | None = None,
    ) -> None:
        self.tensors: StepTensors | None = tensors
        self.layout, self.device, self.cuda = layout, device, device.type == "cuda"
        check_readable(tensors, DTYPES)
        self.tables = DeviceTables(tensors, units, device, own_units)
        columns = tensors.max_exp_avg_sqs, tensors.prev_grads
        self.has_optional = [any(x is not None for x in column) for column in columns]
        self.addresses, self.lacks_prev_grads = self._addresses(tensors), _lacks_prev_grads(tensors)
        self.tasks: dict[tuple[bool, bool], Tasks] = {}  # of steps that measure, that keep
        self.options = launch_options("cpu")
        if self.cuda:
            warp_size = torch.cuda.get_device_properties(device).warp_size
            self.options = launch_options("hip" if torch.version.hip else "cuda", warp_size)
        # The host counts the steps of a tensor too; a step that somebody else writes to shows in
        # its version.
        self.step_versions = _versions(tensors.state_steps)
        self.steps = np.zeros(0, dtype=np.int64)
        if tensors.params:
            self.steps = torch.stack(tensors.state_steps).cpu().numpy().astype(np.int64)
        self.zero = torch.zeros((), dtype=torch.float32, device=device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
        # Values and the numbers that ranks agree on, which go through one all-reduce; decisions;
        # found_inf.
        n, n_agreed = len(self.tables.own_units), len(self.tables.agreed)
        sizes = [n, n_agreed, n, 1]
        size = sum(sizes)
        self.results = torch.zeros(size, dtype=torch.float64, device=device)
        self.values, self.agreed, self.decided, self.found = self.results.split(sizes)
        self.mirror = torch.zeros(size, dtype=torch.float64, device="cpu", pin_memory=self.cuda)
        self.mirrors = [x.numpy() for x in self.mirror.split(sizes)]  # in the same order
        self.mirrored = torch.cuda.Event() if self.cuda else None
        # Sums of every tensor that ranks add up; a last row for tensors that this rank lacks.
        self.sums = torch.zeros(len(units) + 1, 3, dtype=torch.float64, device=device)
        self.position = {p: n for n, p in tensors.dtensors}
        self.shards: list[ShardRows] | None = None  # of `Ranks.shard_rows`
        # Of a step under way: its tasks; whether it decides, all ranks take part, the device may
        # skip it.
        self.pending: tuple[Tasks, bool, bool, bool] | None = None
        self.is_compiled, self.only_compiles = layout is None, False
        self.in_step = False  # also after an exception, when the state of the device is unknown
        self.stream = torch.cuda.current_stream(device) if self.cuda else None

    def is_valid(self, groups: Groups, state: State, table: FreezeTable) -> bool:
        self.tensors = None
        assert self.layout is not None
        if self.in_step or not self.layout.is_valid(groups, state):
            return False
        # Whether previous gradients fit shows in their addresses and in the gradients' dtypes.
        tensors = self.layout.collect(groups, state, prev_grads=False)
        if tensors is None or not self._has_addresses_of(tensors):
            return False
        if self.lacks_prev_grads and prev_grads_are_due(table):
            return False
        self.tensors = tensors
        return True

    def _has_addresses_of(self, tensors: StepTensors) -> bool:
        """Whether these tensors are where the kernels' tables say, and their steps as counted.

        `state[p]["exp_avg"] = ...` and `x.data = ...` give a tensor another address; the old memory
        may belong to somebody else by now.
        """
        if self.step_versions != _versions(tensors.state_steps):
            return False
        addresses = self._addresses(tensors)
        if addresses != self.addresses:
            # Address 0 is the placeholder of a tensor that a decision or a release freed: no task
            # touches it any more.
            if any(now for now, was in zip(addresses, self.addresses, strict=True) if now != was):
                return False
            self.addresses, self.lacks_prev_grads = addresses, _lacks_prev_grads(tensors)
        return True

    def step(
        self,
        table: FreezeTable,
        ranks: Ranks | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        tensors, self.tensors = self.tensors, None
        assert tensors is not None
        self.in_step = True
        tensors = with_local_gradients(tensors)
        if ranks is not None and self.shards is None:
            self.tables.leave_to_others(ranks.members)
            self.shards = ranks.shard_rows(self.tables.own_units, self.position, self.sums)
        is_check = bool(self.tables.own_units) and table.config.is_check(table.t)
        tasks = self._tasks(tensors, table, is_check)
        decides = is_check and (ranks is not None or tasks.measure)
        found, scale = self._scalar(found_inf), self._scalar(grad_scale)
        scaled = found is not None or scale is not None
        grads, copies = _readable(tensors, unscales=scale is not None)
        staging = self.tables.next_staging()
        staging.inputs["grad"] = _data_ptrs(grads)
        staging.inputs["task"] = tasks.of_tensors
        self.tables.fill_coefficients(staging, tensors, tasks.lr_factors, self.steps)
        if decides:
            self.tables.fill_units(staging, table, tasks.is_measured)
            if ranks is not None:
                self.tables.fill_agreed(staging, table, asks_to_join=ranks.asks_to_join)

        elsewhere = self.cuda and torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if elsewhere else contextlib.nullcontext():
            if self.cuda:
                self._use_on(torch.cuda.current_stream())
            scalars = (self.zero if found is None else found, self.one if scale is None else scale)
            if not self.is_compiled:
                self.is_compiled = True
                self._compile(table, ranks, scalars, scaled=scaled)
            self.tables.step_inputs.copy_(staging.buffer, non_blocking=True)
            if staging.was_read is not None:
                staging.was_read.record()
            same_step = table.config.freeze_timing == "same_step"
            if decides and same_step:
                self._launch(scalars, measure=True, scaled=scaled)
                self._decide(ranks)
            measure = decides and not same_step
            self._launch(scalars, measure=measure, update=True, keep=tasks.keep, scaled=scaled)
            if measure:
                self._decide(ranks)
            if decides or found is not None:
                self.found.copy_(scalars[0])
                self.mirror.copy_(self.results, non_blocking=True)
                if self.mirrored is not None:
                    self.mirrored.record()
        for g, copy in copies if scaled else ():
            g.copy_(copy)
        # Autograd compares versions to notice that a tensor which it saved has been overwritten.
        increment_version(list(compress(tensors.params, tasks.updates)))
        increment_version([p for n, p in tensors.dtensors if tasks.updates[n]])
        self.pending = tasks, decides, decides and ranks is not None, found is not None
        self.in_step = False

    def sync(self) -> Outcome | None:
        if self.pending is None:
            return None
        tasks, decides, agreed, scaled = self.pending
        values: dict[Unit, float] = {}
        decided: set[Unit] = set()
        own_units = self.tables.own_units
        happened, ranks_agree, must_join = True, True, False
        if decides or scaled:
            if self.mirrored is not None:
                self.mirrored.synchronize()
            measured, of_ranks, is_decided, found = self.mirrors
            happened = not (scaled and found[0] != 0)
            if decides:
                values = dict(zip(own_units, measured.tolist(), strict=True))
                if not measured.max() < math.inf:  # a unit without evidence
                    values = {unit: value for unit, value in values.items() if value < math.inf}
                decided = {own_units[k] for k in np.flatnonzero(is_decided)}
            if agreed:
                ranks_agree = self.tables.adopt_agreed(of_ranks)
                must_join = bool(of_ranks[-1])
        if happened:
            self.steps += (tasks.of_tensors & UPDATE) // UPDATE
        self.pending = None
        return Outcome(values, tasks.kept, decided, happened, ranks_agree, must_join)

    def _tasks(self, tensors: StepTensors, table: FreezeTable, is_check: bool) -> Tasks:
        """The tasks of the step, those of an earlier one where nothing has changed."""
        tables, config, before = self.tables, table.config, table.t - 1
        keeps = bool(tables.own_units) and config.is_check(table.t + 1)
        inputs = (
            [unit.decided_at for unit in table.units],
            table.t if config.cooldown else 0,
            [g is None for g in tensors.grads],
            [unit.prev_step == before for unit in tables.own_units] if is_check else (),
            (self.steps < tables.least_steps).tobytes() if is_check else b"",
        )
        known = self.tasks.get((is_check, keeps))
        if known is not None and known.inputs == inputs:
            return known
        updates, lr_factors = update_tasks(tensors, tables.units, table)
        tasks = np.array(updates, dtype=np.int64)
        if not tasks.all():  # a tensor is frozen, or has no gradient
            tables.drop_frozen()
        measured, kept = np.zeros_like(tasks), np.zeros_like(tasks)
        if is_check:
            measured[:] = measure_tasks(tensors, tables.units, table)
            measured[self.steps < tables.least_steps] = 0
            depends = 0
            if config.freeze_timing == "same_step":
                depends = DEPENDS if config.cooldown else DEPENDS | FREEZES
            tasks |= np.where(measured != 0, measured | depends, 0)
        if keeps:
            kept[:] = keep_tasks(tensors, tables.units)
        self.tasks[is_check, keeps] = known = Tasks(
            inputs,
            tasks | kept,
            np.array(lr_factors),
            tables.is_complete(measured != 0),
            tables.complete_units(kept != 0),
            updates,
            bool(measured.any()),
            bool(kept.any()),
        )
        return known

    def _addresses(self, tensors: StepTensors) -> list[int]:
        always = tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.state_steps
        addresses = list(map(Tensor.data_ptr, chain(*always)))
        optional = tensors.max_exp_avg_sqs, tensors.prev_grads
        for column, has_any in zip(optional, self.has_optional, strict=True):
            if has_any:
                addresses += _data_ptrs(column)
        return addresses

    def _scalar(self, value: Any) -> Tensor | None:
        """GradScaler's scalars as this device's; it passes the number 0 for "nothing found"."""
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float32, non_blocking=True)
        return torch.full((), value, dtype=torch.float32, device=self.device) if value else None

    def _use_on(self, stream: Any) -> None:
        """Reuse no memory of this engine that is replaced before `stream` has read it."""
        if stream != self.stream:
            self.stream = stream
            rows = (own for *_, own in self.shards or ())
            for x in (*vars(self).values(), *vars(self.tables).values(), *rows):
                if isinstance(x, Tensor) and x is not self.mirror:
                    x.record_stream(stream)

    def _compile(
        self, table: FreezeTable, ranks: Ranks | None, scalars: Any, *, scaled: bool
    ) -> None:
        """Compile all that the steps of this engine may launch, so that none waits for it later."""
        _logger.info(
            "compiling the Triton kernels for %d tensors on %s: up to a second for each variant "
            "that Triton's cache does not have",
            len(self.tables.units),
            self.device,
        )
        config, first = table.config, max(1, table.config.grace_steps or 0)
        variants = {(False, False)}
        for t in range(first, first + config.check_every + 1):
            variants |= {(m, config.is_check(t + 1)) for m in (False, config.is_check(t))}
        same_step = config.freeze_timing == "same_step"
        self.only_compiles = True
        for measure, keep in sorted(variants):
            if measure and same_step:
                self._launch(scalars, measure=True, scaled=scaled)
            measure = measure and not same_step
            self._launch(scalars, measure=measure, update=True, keep=keep, scaled=scaled)
        if self.tables.own_units:
            if ranks is None:
                self._launch_decide("SUM", "COMPARE")
            else:
                for flags in (("SUM", "STORE"), ("SUM", "LOAD")) if self.shards else (("SUM",),):
                    self._launch_decide(*flags)
                self._launch_decide("COMPARE")
        self.only_compiles = False

    def _run(self, kernel: Any, n_programs: int, *args: Any, **options: Any) -> None:
        if self.only_compiles:
            kernel.warmup(*args, grid=(n_programs,), **options)
        else:
            kernel[(n_programs,)](*args, **options)

    def _launch(
        self,
        scalars: tuple[Tensor, Tensor],
        *,
        measure: bool,
        update: bool = False,
        keep: bool = False,
        scaled: bool,
    ) -> None:
        tables = self.tables
        for launch, (first, n_monitored, n_programs) in tables.programs.items():
            n = n_programs if update else n_monitored
            if n == 0:
                continue
            measures = measure and n_monitored > 0
            keeps = keep and n_monitored > 0 and STATISTICS[launch.statistic].uses_prev_grad
            self._run(
                step_kernel,
                n,
                tables.program_table,
                tables.tensor_table,
                tables.inputs,
                tables.coefficients,
                self.decided,
                tables.partials,
                *scalars,
                first,
                FIELDS=FIELDS,
                PARAM=DTYPES[launch.param],
                GRAD=DTYPES[launch.grad],
                MOMENT=DTYPES[launch.moment],
                STATISTIC=launch.statistic if measures or keeps else "norm",
                MEASURE=measures,
                UPDATE=update,
                KEEP=keeps,
                AMSGRAD=launch.amsgrad,
                SCALED=scaled,
                BLOCK=launch.block,
                **self.options,
            )

    def _decide(self, ranks: Ranks | None) -> None:
        """Add up, compare over all ranks, decide; the device waits for the ranks, not the host."""
        if ranks is None:
            self._launch_decide("SUM", "COMPARE")
            return
        if self.shards:
            self.sums.fill_(math.inf)  # of tensors without evidence
            self._launch_decide("SUM", "STORE")
            ranks.add_shards(self.sums, self.shards)
            self._launch_decide("SUM", "LOAD")
        else:
            self._launch_decide("SUM")
        self.agreed.copy_(self.tables.agreed)
        both = self.results[: len(self.values) + len(self.agreed)]
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=ranks.group)
        self._launch_decide("COMPARE")

    def _launch_decide(self, *flags: str) -> None:
        tables = self.tables
        self._run(
            decide_kernel,
            len(tables.own_units),
            tables.unit_table,
            tables.members,
            tables.tensor_table,
            tables.past,
            tables.partials,
            self.sums,
            self.results,
            self.decided,
            FIELDS=FIELDS,
            **{flag: flag in flags for flag in ("SUM", "COMPARE", "STORE", "LOAD")},
            **self.options,
        )


def _readable(
    tensors: StepTensors, *, unscales: bool
) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """The gradients, copies of those that the kernels would misread; these pairs.

    They walk through memory, in which a gradient may have other strides than its parameter, the
    other sign (a lazily negated tensor, as the imaginary part of a conjugate), or no elements at
    all (a result of a collective that is under way).
    """
    grads, copies = list(tensors.grads), []
    for n in tensors.unordered or ():
        g, p = grads[n], tensors.params[n]
        if g is not None and (not is_plain(g) or g.is_neg() or not same_memory_order(g, p)):
            sides = zip(g.shape, g.stride(), strict=True)
            if unscales and any(size > 1 and stride == 0 for size, stride in sides):
                raise RuntimeError(
                    "a gradient whose elements share memory cannot be unscaled in place"
                )
            grads[n] = copy = torch.empty_like(p, dtype=g.dtype).copy_(g)
            copies.append((g, copy))
    return grads, copies


def _data_ptrs(tensors: Sequence[Tensor | None]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # some are None
        return [0 if x is None else x.data_ptr() for x in tensors]


def _versions(steps: Sequence[Tensor]) -> list[int]:
    try:
        return [step._version for step in steps]
    except RuntimeError:  # some were made under torch.inference_mode and count none
        return [-1 if step.is_inference() else step._version for step in steps]


def _lacks_prev_grads(tensors: StepTensors) -> bool:
    """Whether a placeholder stands where a previous gradient will be needed."""
    return any(
        x is not None and x.numel() < p.numel()
        for x, p in zip(tensors.prev_grads, tensors.params, strict=True)
    )
