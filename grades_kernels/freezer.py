"""The freezing of one optimizer: its parts, and the order of the actions of a step.

A `Freezer` joins the freeze table, the units, the other ranks, the engines and the release of
frozen tensors. Two of them know whether they are still valid: the unit map for the parameter
groups, an engine for the devices, dtypes, addresses and flags of its tensors. Each is made anew
when it is not, and the units are exchanged anew for another job; nothing else is cached.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint
from .backends.host_step import Engine, HostEngine, no_threads_after_fork, read_back, step_engines
from .backends.select import assign, run_tasks_of, unscales
from .backends.step_tensors import Layout, fit_state, prepare_state, prev_grads_are_due
from .distributed import Ranks, in_a_job, is_initialized, refuse_flat
from .freezing.config import check_group, unused_options
from .freezing.table import NEVER, FreezeConfig, FreezeEvent, FreezeTable, Unit
from .freezing.unit_map import (
    UnitMap,
    former_units,
    make_unit_map,
    nothing_is_monitored,
    thresholds,
)
from .rank_errors import naming_absent_ranks
from .release import NOTHING_LEFT, Release
from .state_tensors import local


class Freezer:
    """Freezes the units of one optimizer, which every method takes as its first argument.

    Attributes:
        table: The freeze table.
        unit_map: Which tensors belong to which unit.
        ranks: The other processes, once they have joined; None on a single one.
        engines: They take the steps; empty when they have to be made anew.
        release: Releases the frozen tensors.
        group_gave_tau: Whether a parameter group came with a tau of its own, be it None.
    """

    unit_map: UnitMap

    def __init__(self, config: FreezeConfig) -> None:
        self.table = FreezeTable(config)
        self.ranks: Ranks | None = None
        self.engines: list[Engine] = []
        self.release = Release(config.stop_grad)
        self.group_gave_tau = False
        self.lock = threading.RLock()  # another thread may read
        self._job: Any = None  # the units have been exchanged for this one
        self._known_t = 0  # every rank knows the decisions of the steps up to this one
        self._t_is_exact = True  # else the steps of plain AdamW, a lower bound
        self._warned: set[str] = set()

    # Readings, none of which makes anything anew

    @property
    def is_mapped(self) -> bool:
        """Whether the units have been made."""
        return "unit_map" in self.__dict__

    @property
    def all_frozen(self) -> bool:
        """Whether every unit is frozen, as far as the host knows."""
        # Whether a step that a device is still taking has happened is unknown (GradScaler).
        ahead = any(engine.pending is not None for engine in self.engines)
        return self.table.all_frozen(self.table.t - ahead)

    @property
    def all_frozen_everywhere(self) -> bool:
        """The same as far as all ranks know, whatever one of them has read meanwhile."""
        return self.table.all_frozen(self._known_t) if self.ranks else self.all_frozen

    @property
    def n_elements(self) -> int:
        """Elements of the optimizer's tensors, on all ranks together."""
        if self.ranks is not None:
            return self.ranks.n_elements
        return sum(p.numel() for p in self.unit_map.params)

    def backends(self, optimizer: Any, *, allow_meta: bool = False) -> list[str]:
        """The backend of every parameter group.

        `allow_meta` leaves out tensors of the meta device (deferred initialisation), whose device
        is known at the first step. For errors see `select.assign`.
        """
        groups: Sequence[dict[str, Any]] = optimizer.param_groups
        if allow_meta:
            groups = [
                {**g, "params": [p for p in g["params"] if p.device.type != "meta"]} for g in groups
            ]
        return assign(
            groups,
            self.unit_map.group_units,
            self.unit_map.members,
            triton_in_job=self.ranks is None or self.ranks.on_device,
        )

    def backend_of_units(self, optimizer: Any) -> str:
        """The backend that serves the monitored units, or without units the first group."""
        names, unit_map = self.backends(optimizer, allow_meta=True), self.unit_map
        groups = list(zip(names, unit_map.group_units, unit_map.settings, strict=False))
        monitored = [name for name, units, _ in groups if units]
        with_tensors = [name for name, _, (n, *_) in groups if n]
        return next(iter([*monitored, *with_tensors, "reference"]))

    def sync(self, optimizer: Any) -> list[FreezeEvent]:
        """Read back the decisions of a device; returns the freezes not returned before."""
        read_back(self.engines, self.table, self.ranks)
        if self.unit_map.is_current(optimizer.param_groups):
            self._follow_taus(optimizer)
        return self._publish(optimizer)

    # A step

    @no_threads_after_fork()
    def begin_step(self, optimizer: Any) -> list[FreezeEvent]:
        """Act on changes of the groups; returns the freezes not returned before."""
        _refuse_capture(optimizer.param_groups)  # a graph could not be read back from
        read_back(self.engines, self.table, self.ranks)
        self._known_t = self.table.t
        self._adopt_state(optimizer)
        groups, ranks = optimizer.param_groups, self.ranks
        if not self.unit_map.is_current(groups):
            # Where ranks have units of their own, the others do not see that `requires_grad` has
            # changed: they read it at the next check, and until then units stay as they were.
            may_join = ranks is None or ranks.everywhere or ranks.must_join
            if may_join or not self.unit_map.has_tensors_of(groups):
                self.write_state(optimizer)
                self.map_units(optimizer)
            elif ranks is not None:
                ranks.asks_to_join = True
        elif ranks is not None and ranks.must_join:
            self._job = None
        self._follow_taus(optimizer)
        job = (is_initialized(), optimizer.process_group)
        if self._job != job:
            self._join_ranks(optimizer)
            self._job = job
        return self._publish(optimizer)

    @no_threads_after_fork()
    def take_step(self, optimizer: Any) -> list[FreezeEvent]:
        """Count a step and take it; returns its freezes, as far as they are known already."""
        table, groups, state = self.table, optimizer.param_groups, optimizer.state
        if not table.units and any([group["tau"] is not None for group in groups]):
            self.warn_once(nothing_is_monitored(groups, self.unit_map))
        tau_is_unsaid = table.t == 0 and not self.group_gave_tau
        if tau_is_unsaid and (unused := unused_options(table.config, groups)):
            self.warn_once(unused)
        self.release.begin_run(self.unit_map, optimizer.process_group, self.ranks)
        total_steps = table.config.total_steps
        if total_steps is not None and table.t >= total_steps:
            self.warn_once(
                f"total_steps={total_steps} is exceeded: the optimizer continues, but the grace "
                "period was planned for fewer steps."
            )
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        # Where every tensor is frozen and no other rank takes part, a step only counts.
        at_rest = self.ranks is None and table.all_frozen() and None not in self.unit_map.units
        if found_inf is None and at_rest:
            table.count_step()
            return []
        if not self.engines or not all(
            [engine.is_valid(groups, state, table) for engine in self.engines]
        ):
            self.unit_map.count_elements()
            names, ranks = self.backends(optimizer), self.ranks
            on_device = ranks.on_device if ranks else self._decides_on_device(names)
            self.engines = _make_engines(optimizer, names, self.unit_map, table, on_device)
        exchange: Any = contextlib.nullcontext()
        if self.ranks is not None:
            exchange = naming_absent_ranks(optimizer.process_group, table.t + 1)
        with exchange:
            if self.ranks is not None and found_inf is not None:
                # All skip the step where any has found one.
                found_inf = self.ranks.largest(torch.as_tensor(found_inf, dtype=torch.float32))
            step_engines(self.engines, table, self.ranks, grad_scale, found_inf)
        if any(engine.pending is not None for engine in self.engines):
            return []
        self._known_t = table.t
        return self._publish(optimizer)

    def _decides_on_device(self, names: Sequence[str]) -> bool:
        """Whether the Triton kernels serve every group that has units, and at least one group."""
        groups = zip(names, self.unit_map.group_units, strict=True)
        return "triton" in names and all(name == "triton" for name, units in groups if units)

    def _publish(self, optimizer: Any) -> list[FreezeEvent]:
        """Write new decisions into the state; returns the freezes not returned before."""
        if not self.table.has_changes:
            return []
        new = [unit for unit in self.table.units if unit.is_decided and not unit.is_published]
        self._write_units(optimizer, new)
        return self.table.unpublished_events()

    def release_batch(self, optimizer: Any) -> None:
        """Release the frozen units that may be released now, where that is safe.

        Called at the start of the step after a decision: a fixed lag, the same on every device and
        after a resume.
        """
        self.release.stop_again()
        if self.table.has_changes:
            if idle := _idle_units(self.table, self.unit_map):
                self.warn_once(idle)
            self._release_where_safe(optimizer, self.table.release_batch())
            self.table.has_changes = False

    def _release_where_safe(self, optimizer: Any, units: list[Unit]) -> None:
        if not units or self.release.stop_grad is False:
            return
        reason = self._why_not_release(optimizer, automatic=self.release.stop_grad == "auto")
        self.release.raise_if_required(reason)
        if reason is None:
            ddp = self.release.ddp
            chosen = {p for unit in units for p in self.unit_map.members[unit]}
            if ddp is None or any(p.requires_grad and p not in chosen for p in ddp.parameters()):
                self._release_units(optimizer, units)
                self.release.rewrap(ddp)
            if not any(p.requires_grad for p in self.unit_map.params):
                self.warn_once(NOTHING_LEFT)
        else:
            self.warn_once(f"frozen matrices go on receiving gradients: {reason}")

    def _release_units(self, optimizer: Any, units: list[Unit]) -> None:
        self.release.release(units, self.unit_map, optimizer.state, self.table.t)
        self._write_units(optimizer, units)

    def release_all(self, optimizer: Any, ddp: DistributedDataParallel | None) -> None:
        """Release all frozen units now, or raise if that is not safe; `ddp` is their wrapper."""
        reason = self._why_not_release(optimizer, ddp=ddp)
        if reason:
            raise RuntimeError(f"apply_freezes(model): {reason}")
        self._release_units(optimizer, self.table.unreleased)

    def _why_not_release(self, optimizer: Any, **circumstances: Any) -> str | None:
        """The reason why nothing can be released safely, or None; see `Release.why_not`."""
        group = optimizer.process_group
        return self.release.why_not(self.unit_map, group, self.ranks, **circumstances)

    def thaw(self, optimizer: Any, units: Iterable[Unit]) -> None:
        """Let these units train again."""
        self.engines = []
        for unit in units:
            members = self.unit_map.members[unit]
            if unit.is_frozen:
                for p in members:
                    checkpoint.forget_moments(p, optimizer.state)
                self.release.take_back(members)
            if unit.is_decided:
                unit.thaw()
                self._write_units(optimizer, [unit])
        self.release.rewrap(self.release.ddp)
        if self.release.changed_since_rewrap and self._why_not_release(optimizer):
            self.warn_once(
                "DistributedDataParallel does not know of the tensors that thaw() let train again "
                "and would not average their gradients: continue with "
                "ddp_model = optimizer.apply_freezes(ddp_model)."
            )

    # Units, and the other ranks

    def map_units(self, optimizer: Any, attached: list[list[str]] | None = None) -> None:
        """Make the units from the groups as they are now, and their rows from the state.

        `attached` has names of the tensors of each group; None: those attached before.
        """
        groups, state, old = optimizer.param_groups, optimizer.state, self.table.units
        for group in groups:
            check_group(self.table.config, group)
        refuse_flat(groups)
        before = self.unit_map if self.is_mapped else None
        unit_map = make_unit_map(
            groups,
            lambda p: checkpoint.is_frozen(state.get(p)),
            attached=attached,
            before=before,
            prefix=self.ranks.prefix if self.ranks is not None else "",
        )
        members = before.members if before else {}
        checkpoint.read_units(unit_map, state, before.params if before else None)
        former = former_units(unit_map, {unit: members.get(unit, ()) for unit in old})
        for unit, was in former.items():
            unit.is_published = was.is_published and unit.is_frozen
        if self.ranks is not None:
            # Units of other ranks stay in the table until the ranks join again.
            elsewhere = [unit for unit in old if not members.get(unit)]
            unit_map = replace(
                unit_map, members={**unit_map.members, **dict.fromkeys(elsewhere, ())}
            )
        self.table = self.table.successor(list(unit_map.members), former)
        self.unit_map, self.engines, self._job = unit_map, [], None
        self.release.released.intersection_update(unit_map.params)
        if self.table.t > 0:  # loaded, copied, or with other tensors than in the first step
            self.release.observe(unit_map)

    def _follow_taus(self, optimizer: Any) -> None:
        """Read the thresholds, as lr is read, once all decisions with the former ones are known."""
        groups = optimizer.param_groups
        if thresholds(groups) != self.unit_map.taus:
            for group in groups:
                check_group(self.table.config, group)
            self.unit_map = self.unit_map.with_taus(groups)

    def _join_ranks(self, optimizer: Any) -> None:
        """Exchange units with the other ranks of the job, after every change of the units."""
        unit_map, group = self.unit_map, optimizer.process_group
        monitors = any(g["tau"] is not None for g in optimizer.param_groups)
        in_job = (monitors or self.ranks is not None) and in_a_job(group, unit_map.params)
        if self.ranks is not None and not in_job:  # the job has ended
            self.ranks = None
            self.map_units(optimizer)
        elif monitors and in_job:
            self.ranks = None
            on_device = len({p.device for p in unit_map.params}) == 1 and self._decides_on_device(
                self.backends(optimizer)
            )
            with naming_absent_ranks(group, self.table.t + 1, "exchange of units"):
                self.ranks, units = Ranks.join(
                    self.table,
                    unit_map.members,
                    unit_map.params,
                    group,
                    on_device=on_device,
                    t_is_exact=self._t_is_exact,
                )
            self._t_is_exact = True
            self.table, self._known_t = self.table.successor(units), self.table.t
            members = {unit: unit_map.members.get(unit, ()) for unit in units}
            self.unit_map, self.engines = replace(unit_map, members=members), []

    # State and checkpoints

    def _write_units(self, optimizer: Any, units: Sequence[Unit]) -> None:
        checkpoint.write_units(
            units, self.unit_map, optimizer.state, optimizer.param_groups, self.table.t
        )

    def write_state(self, optimizer: Any) -> None:
        """Copy the whole table into the state."""
        self._adopt_state(optimizer)
        groups = optimizer.param_groups
        checkpoint.init_one_state(self.unit_map, optimizer.state, groups, self.table.t)
        self._write_units(optimizer, list(self.unit_map.members))

    def _adopt_state(self, optimizer: Any) -> None:
        """Read the table from a state that was put in place without `load_state_dict`.

        ZeroRedundancyOptimizer loads a checkpoint that way, be it of plain AdamW.
        """
        if self.table.t == 0 and checkpoint.loaded_t(self.unit_map.params, optimizer.state):
            own = {n: optimizer.state.get(p, {}) for n, p in enumerate(self.unit_map.params)}
            prev_grads = {n: x["prev_grad"] for n, x in own.items() if "prev_grad" in x}
            self._t_is_exact = any("grades_t" in x for x in own.values())
            # Before the ranks have joined, not all would initialise a DDP wrapper anew.
            may_release = not in_a_job(optimizer.process_group, self.unit_map.params)
            self._read_state(optimizer, prev_grads, may_release=may_release)

    def restore(self, optimizer: Any, prev_grads: dict[int, Tensor]) -> None:
        """Rebuild the table from the state that a checkpoint has just replaced."""
        self.release.take_all_back(self.unit_map.params)
        self._read_state(optimizer, prev_grads)

    def _read_state(
        self, optimizer: Any, prev_grads: dict[int, Tensor], *, may_release: bool = True
    ) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        params = [p for group in groups for p in group["params"]]
        checkpoint.complete_loaded_state(params, state, groups, prev_grads)
        self.table = FreezeTable(self.table.config, t=checkpoint.loaded_t(params, state))
        self._known_t = self.table.t
        self.map_units(optimizer)
        for unit in self.table.units:
            unit.is_published = unit.is_frozen  # before the checkpoint was written
        released = [unit for unit in self.table.units if unit.is_released]
        if may_release:
            self._release_where_safe(optimizer, released)
            self.release.rewrap(self.release.ddp)  # for tensors that the checkpoint trains again
        for unit in released:
            if not self.release.released.issuperset(self.unit_map.members[unit]):
                unit.released_at = NEVER  # it is not safe in this run
        self.write_state(optimizer)

    @contextlib.contextmanager
    def unchanged_on_error(self, optimizer: Any) -> Iterator[None]:
        """Undo every change of this object, state, groups and flags where the body raises."""
        kept, state, groups = dict(self.__dict__), optimizer.state, optimizer.param_groups
        released = set(self.release.released)
        flags = [(p, p.requires_grad) for p in self.unit_map.params]
        try:
            yield
        except BaseException:
            self.__dict__.update(kept)
            optimizer.state, optimizer.param_groups = state, groups
            self.release.released = released
            for p, flag in flags:
                p.requires_grad_(flag)
            raise

    def pickled(self) -> dict[str, Any]:
        """The contents of a pickle or copy; the rest follows from the optimizer's state."""
        names = self.unit_map.attached
        return {"table": self.table, "attached": names, "group_gave_tau": self.group_gave_tau}

    @classmethod
    def from_pickle(cls, optimizer: Any, saved: dict[str, Any]) -> Freezer:
        """The freezer of an unpickled or copied optimizer, from the result of `pickled`."""
        freezer = cls(saved["table"].config)
        freezer.table = saved["table"]
        freezer.group_gave_tau = saved.get("group_gave_tau", False)
        freezer.map_units(optimizer, saved["attached"])
        monitored = freezer.unit_map.monitored
        freezer.release.released = {p for p, unit in monitored if unit.is_released}
        return freezer

    def warn_once(self, message: str) -> None:
        """Warn of something once in a run, at the line that called the optimizer."""
        if message not in self._warned:
            self._warned.add(message)
            level, frame, own = 1, sys._getframe(), ("grades_kernels", "torch", "contextlib")
            while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in own:
                level, frame = level + 1, frame.f_back
            warnings.warn(message, stacklevel=level)


def _refuse_capture(groups: Iterable[dict[str, Any]]) -> None:
    if (
        torch.cuda.is_available()
        and torch.cuda.is_current_stream_capturing()
        and any([group["tau"] is not None for group in groups])
    ):
        raise RuntimeError(
            "step() with tau set cannot be captured in a CUDA graph: a captured backward pass "
            "computes every gradient, so freezing would save nothing. Capture with tau=None, or "
            "run the steps outside of the graph."
        )


def _idle_units(table: FreezeTable, unit_map: UnitMap) -> str:
    """A sentence about the units that get no gradient where no others are undecided, or ""."""
    idle = table.never_measured()
    grads = [p.grad for unit in idle for p in unit_map.members[unit]]
    if not idle or any(g is not None and local(g).norm() != 0 for g in grads):
        return ""
    return (
        f"{len(idle)} of {len(table.units)} units, such as {idle[0].name!r}, have no gradient "
        "other than zero and no statistic so far, while all others are decided: all_frozen stays "
        "False. max_frozen below 1 freezes such units with the others, requires_grad=False leaves "
        "them out."
    )


def _make_engines(
    optimizer: Any,
    names: Sequence[str],
    unit_map: UnitMap,
    table: FreezeTable,
    on_device: bool,  # whether devices decide; else one engine of the host, even without tensors
) -> list[Engine]:
    """Engines for the tensors as they are now: one for the host, one for each Triton device."""
    groups, state = optimizer.param_groups, optimizer.state
    empty: dict[Any, list[list[tuple[Tensor, Unit | None]]]] = {"host": [[] for _ in names]}
    parts = {} if on_device else empty
    for i, pairs in unit_map.by_group():
        for p, unit in pairs:
            key = p.device if names[i] == "triton" else "host"
            if key not in parts:  # a list per group is not made for every tensor
                parts[key] = [[] for _ in names]
            parts[key][i].append((p, unit))
    prev_grads = prev_grads_are_due(table)
    engines: list[Engine] = []
    for key, chosen in parts.items():  # before any layout, which stores positions in the state
        prepare_state(
            groups,
            state,
            chosen,
            optimizer._init_group,
            prev_grads=prev_grads,
            default_state=checkpoint.DEFAULT_STATE,
        )
        if key != "host":
            fit_state(state, chosen)
    for key, chosen in parts.items():
        layout = Layout(groups, state, chosen)
        tensors = layout.collect(groups, state, prev_grads=prev_grads)
        assert tensors is not None, "amsgrad was set after the state of a tensor had been made"
        if key != "host":
            from .backends.triton_engine import TritonEngine

            # Units without members here are those of other ranks, which decide together.
            present = {unit for pairs in chosen for _, unit in pairs}
            found = [u for u in table.units if u in present or not unit_map.members[u]]
            own_units = found if on_device else []
            engines.append(TritonEngine(tensors, layout.units, key, layout, own_units))
        else:
            engine = HostEngine(
                run_tasks_of(names),
                tensors,
                layout.units,
                layout,
                decides=not on_device,
                unscales=unscales(names, groups),
            )
            engines.append(engine)
    return engines
