"""GradESAdamW: the optimizer class. It validates, gathers and remembers; it computes nothing."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Real
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.utils.hooks import RemovableHandle

from .checkpoint import FRESH
from .distributed import Ranks, all_sharded, in_a_job, is_initialized, refuse_flat
from .freezing import (
    NEVER,
    STATISTICS,
    TIMINGS,
    FreezeRule,
    FreezeTable,
    Unit,
    exact_grace_steps,
    noise_floor,
)
from .functional import choose
from .gathering import GatheringAdamW, Layout
from .reference import _single_tensor_grades_adamw
from .report import FreezeEvent, FreezeReport, UnitReport
from .savings import (
    COMPILE_SEES_WAVES,
    MOMENTS,
    ReentrantWatch,
    anything_compiled,
    frozen_prefix,
    memory_of,
    nothing_held,
    recompilations_left,
    wrapped_anew,
)
from .units import canonical_name, place_of, unit_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .triton_kernels import Plan


class GradESAdamW(GatheringAdamW):
    r"""AdamW that freezes each weight matrix when its gradient has stopped changing.

    A drop-in for `torch.optim.AdamW`: the same arguments in the same order, the same state and
    checkpoints, and the same result while `tau` is None. With `tau`, every monitored matrix is
    measured once the grace period is over and is left untouched, bit for bit, from the step in
    which its statistic falls below `tau` (GradES, arXiv 2509.01842, Algorithm 1).

    Args:
        params: Tensors, parameter groups or `(name, tensor)` pairs, as AdamW takes them. With
            names, units carry them; embeddings, output heads, norms and biases are not monitored,
            and LoRA pairs freeze together. Without names every floating tensor of two or more
            dimensions in a group with `tau` is a unit of its own, `group{i}.param{j}`.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable:
            As in `torch.optim.AdamW`. `differentiable` excludes `tau`.
        fused: None chooses a fused implementation where there is one, else the reference; False is
            the reference; True is a fused implementation or a RuntimeError that says why not.
        tau: Threshold of the statistic; may differ per parameter group and be changed between
            steps. None (default): not monitored. 0.0 measures and never freezes. "auto", for the
            statistic "signal" alone: 1.1 times its noise floor.
        alpha: Share of `total_steps` that is the grace period, in [0, 1). Default 0.5.
        total_steps: Planned optimizer steps, at least 1.
        grace_steps: Steps before the first check; in place of `alpha * total_steps`.
        statistic: What is compared with tau, summed over all elements of a unit. "change"
            (default, Eq. 1): :math:`|g_t - g_{t-1}|`. "norm" (Eq. 3): :math:`|g_t|`. "momentum":
            :math:`|g_t - m_{t-1}|` with AdamW's first moment, which needs no memory. "signal":
            :math:`\sum |\hat m_{t-1}| / \sum \sqrt{\hat v_{t-1}}`, which has the same scale for
            every matrix and model: 1 for a constant gradient, 0.18 for noise (beta1 = 0.9).
            "weight_change": :math:`|w_t - w_{t-1}|`, what the paper's own code measures; only
            with `freeze_timing="next_step"`. May differ per parameter group.
        tau_per: "unit" (default, the paper) compares the sum, "element" the sum divided by the
            number of elements; "signal" is a ratio and never divided.
        check_every: Steps from one check to the next. Default 1.
        patience: Consecutive checks below tau that freeze a unit. Default 1 (the paper).
        freeze_timing: "same_step" (default, Algorithm 1) decides before the update, so that a unit
            is not updated in its decisive step; "next_step" applies that update still.
        cooldown: Steps over which the learning rate of a decided unit falls linearly to zero
            before it freezes. Default 0 (the paper): it freezes at once.
        max_frozen: Share of the monitored units, in (0, 1]. Once as many are decided, all others
            are decided with them. Default 1.0: each decides for itself.
        stop_grad: Whether frozen tensors get `requires_grad=False`, so that backward skips their
            gradient, and give up their moments: at the start of the step after, in at most six
            waves a run. "auto" (default): where that is safe, which is on one process and with
            DTensors. True: always, or a RuntimeError. False: never; the update alone is masked
            (`apply_freezes` does the rest when it is called).

    Attributes:
        process_group: The processes that step this optimizer and decide together. None (default):
            all of the job. Set it before the first step where some ranks train another model, or
            none. Every process of it must call `step()` equally often.

    Raises:
        ValueError: For a value out of range, naming the argument, the value and the range.
        RuntimeError: For `fused=True` where no fused implementation can serve the parameters.

    Example:
        >>> optimizer = GradESAdamW(model.named_parameters(), lr=2e-5, tau=1.8, total_steps=1000)
    """

    process_group: ProcessGroup | None = None  # of this process, so it does not go into a pickle

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        tau: float | str | None = None,
        alpha: float = 0.5,
        total_steps: int | None = None,
        grace_steps: int | None = None,
        statistic: str = "change",
        tau_per: str = "unit",
        check_every: int = 1,
        patience: int = 1,
        freeze_timing: str = "same_step",
        cooldown: int = 0,
        max_frozen: float = 1.0,
        stop_grad: bool | str = "auto",
    ) -> None:
        _check_number("alpha", alpha, "[0, 1)", lambda x: 0 <= x < 1)
        _check_integer("total_steps", total_steps, 1, optional=True)
        _check_integer("grace_steps", grace_steps, 0, optional=True)
        _check_integer("check_every", check_every, 1)
        _check_integer("patience", patience, 1)
        _check_integer("cooldown", cooldown, 0)
        _check_number("max_frozen", max_frozen, "(0, 1]", lambda x: 0 < x <= 1)
        _check_choice("tau_per", tau_per, ("unit", "element"))
        _check_choice("freeze_timing", freeze_timing, TIMINGS)
        if not (isinstance(stop_grad, bool) or stop_grad == "auto"):
            raise ValueError(f"Invalid stop_grad: {stop_grad!r} (choose 'auto', True or False)")
        if grace_steps is None and total_steps is not None:
            grace_steps = exact_grace_steps(alpha, total_steps)
        self._rule = FreezeRule(
            grace_steps, check_every, patience, freeze_timing, cooldown, max_frozen, tau_per
        )
        self._total_steps = total_steps
        self._stop_grad = stop_grad
        self._own_defaults = {"tau": tau, "statistic": statistic}
        self._check_own_settings(differentiable=differentiable, **self._own_defaults)
        self._reset_freezing()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults.update(self._own_defaults)
        self._build()
        _ = self.backend  # raises where fused=True is not possible

    def _reset_freezing(self) -> None:
        self._table = FreezeTable(self._rule)
        self._rows: list[list[Unit | None]] = []
        self._members: dict[Unit, list[Tensor]] = {}
        self._built_for: tuple[list[Tensor], list[tuple[bool, str]]] | None = None
        self._taus: list[float | None] = []
        self._met_for: tuple[Any, ...] = (self, False, None)
        self._attached: list[list[str]] | None = None
        self._stopped: set[Tensor] = set()
        self._learning: list[bool] = []
        self._watch: ReentrantWatch | None = None
        self._waves = 0
        self._ddp_is_outdated = False
        self._chosen: tuple[Any, ...] = (self, "")
        self._plan: Plan | None = None
        self._layout: Layout | None = None
        self._planned: list[int] = []
        self._outdated_plans: list[Plan] = []
        self._warned: set[str] = set()
        self._freeze_hooks: OrderedDict[int, Callable] = OrderedDict()

    # What the caller reads

    @property
    def backend(self) -> str:
        """The implementation that the next step uses: "triton", "native" or "reference"."""
        self._current_table()
        return self._implementation()

    @property
    def monitored_units(self) -> list[str]:
        """Names of all units, frozen or not."""
        return [unit.name for unit in self._current_table().units]

    @property
    def frozen_units(self) -> list[str]:
        """Names of the units that are frozen now, in the order in which they froze."""
        return [event.unit for event in self.freeze_events]

    @property
    def freeze_events(self) -> list[FreezeEvent]:
        """One event for every unit that is frozen now, by step."""
        return self._exact_table().events

    @property
    def all_frozen(self) -> bool:
        """Whether there is a monitored unit and every one is frozen: the signal to stop.

        Never waits for the device, and so is at most one step late where that decides.
        """
        if self._plan is not None and self._plan.captured:
            self._plan.peek()
        return self._current_table().all_frozen

    def statistics(self) -> dict[str, float]:
        """The last statistic of every unit as it is compared with tau; NaN before the first."""
        return {unit.name: unit.statistic for unit in self._exact_table().units}

    def report(self) -> FreezeReport:
        """What froze when, with the history of every statistic."""
        table = self._exact_table()
        units = []
        for unit in table.units:
            layer, kind = place_of(unit.name)
            units.append(
                UnitReport(
                    name=unit.name,
                    layer=layer,
                    kind=kind,
                    n_elements=unit.n_elements,
                    criterion=unit.criterion,
                    tau=unit.tau,
                    statistic=unit.statistic,
                    hits=unit.hits,
                    decided_at=unit.decided_at,
                    frozen_at=unit.frozen_at,
                )
            )
        named = [
            (canonical_name(name), p, row)
            for i, group in enumerate(self.param_groups)
            for name, p, row in zip(
                self._names(i) or (), group["params"], self._rows[i], strict=False
            )
        ]
        frozen_blocks, trained_below = frozen_prefix(table.units, named)
        return FreezeReport(
            step=table.t,
            total_steps=self._total_steps,
            grace_steps=self._rule.grace_steps,
            units=tuple(units),
            events=tuple(table.events),
            history=tuple(table.history),
            n_trainable=(
                sum(p.numel() for p in self._all_params())
                if table.ranks is None
                else table.ranks.n_trainable
            ),
            backend=self.backend,
            memory=memory_of(self._all_params(), self.state, self._members, self._stopped),
            frozen_blocks=frozen_blocks,
            trained_below=trained_below,
        )

    def register_freeze_hook(
        self, hook: Callable[[GradESAdamW, list[FreezeEvent]], None]
    ) -> RemovableHandle:
        """Call `hook(optimizer, events)` after a step that froze units.

        Where the device decides, the host learns of it, and calls, at the start of the next step,
        or earlier when something exact is read.

        Returns:
            A handle whose `remove()` takes the hook away.
        """
        handle = RemovableHandle(self._freeze_hooks)
        self._freeze_hooks[handle.id] = hook
        return handle

    # What the caller does

    def attach(self, model: torch.nn.Module) -> None:
        """Give units the names of `model`'s parameters, where groups were built without names.

        Raises:
            ValueError: If a tensor of the optimizer is no parameter of the model.
        """
        names: dict[Tensor, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            # A tied tensor keeps the name that leaves it unmonitored, if it has one.
            if p not in names or unit_of(name, p.shape, p.dtype) is None:
                names[p] = name
        for i, group in enumerate(self.param_groups):
            missing = [j for j, p in enumerate(group["params"]) if p not in names]
            if missing:
                raise ValueError(
                    f"attach(model): parameters {missing} of group {i} are not parameters of "
                    f"{type(model).__name__}. Pass the model that the optimizer was built for."
                )
        self._write_state()
        self._attached = [[names[p] for p in group["params"]] for group in self.param_groups]
        self._build()

    def thaw(self, units: str | Iterable[str] | None = None) -> None:
        """Let frozen units train again; None: all of them.

        A frozen unit comes back with `requires_grad=True`, zero moments and a bias correction that
        starts anew; the decision about a unit that is cooling down is taken back, its moments stay.

        Raises:
            ValueError: For a name that is no monitored unit.
        """
        table = self._exact_table()
        self._leave_device()
        if units is None:
            units = self.monitored_units
        names = [units] if isinstance(units, str) else list(units)
        by_name = {unit.name: unit for unit in table.units}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise ValueError(
                f"thaw(units): {unknown} are not monitored units. monitored_units lists all names."
            )
        for unit in map(by_name.__getitem__, names):
            if unit.frozen_at != NEVER:
                for p in self._members[unit]:
                    self._forget_moments(p)
                    p.requires_grad_(True)
                    if p in self._stopped:
                        self._stopped.discard(p)
                        self._ddp_is_outdated = True
            if unit.decided_at != NEVER:
                unit.thaw()
                self._write_unit(unit)
        if self._ddp_is_outdated and self._why_not_stop():
            self._warn_once(
                "DistributedDataParallel does not know of the tensors that thaw() let train again "
                "and would not average their gradients: go on with "
                "ddp_model = optimizer.apply_freezes(ddp_model)."
            )

    def apply_freezes(self, model: torch.nn.Module | None = None) -> torch.nn.Module | None:
        """Turn everything frozen into savings now: no gradients, no moments, no launch.

        `stop_grad` does this by itself, in waves, where that is safe. Under
        `DistributedDataParallel` it is not, since that waits for the gradient of every tensor which
        needed one when it was built; there, call this on every rank between two steps, now and
        then, and go on with what it returns: `ddp_model = optimizer.apply_freezes(ddp_model)`.

        Args:
            model: A `DistributedDataParallel` model. Not needed otherwise.

        Returns:
            `model`, or a new wrapper around the same module where DDP has to be built anew: where
            `find_unused_parameters` is off, and after a thaw. The bare module if nothing is left to
            train.

        Raises:
            RuntimeError: In a job of several processes without their DDP model, and where reentrant
                activation checkpointing is in use. Nothing has changed then.
        """
        table = self._exact_table()
        ddp = model if isinstance(model, DistributedDataParallel) else None
        reason = self._why_not_stop(within_ddp=ddp is not None)
        if reason:
            raise RuntimeError(f"apply_freezes(model): {reason}")
        waiting = table.waiting
        self._release(waiting)
        if ddp is None or not (
            self._ddp_is_outdated or (waiting and not ddp.find_unused_parameters)
        ):
            return model
        self._ddp_is_outdated = False
        return wrapped_anew(ddp)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may bring its own `tau` and `statistic`."""
        if isinstance(param_group, dict):
            for key, value in self._own_defaults.items():
                param_group.setdefault(key, value)
            self._check_own_settings(
                param_group["tau"],
                param_group["statistic"],
                differentiable=param_group.get("differentiable", False),
            )
        super().add_param_group(param_group)
        if self._built_for is not None:  # in the constructor all groups are there before the units
            try:
                self._fused()
                self._current_table()
            except ValueError:
                self.param_groups.pop()
                raise

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: A closure that reevaluates the model and returns the loss.

        Raises:
            ValueError: If tau is set and no tensor of any group can be monitored, or a gradient
                does not fit its parameter. Nothing has changed then.
            RuntimeError: For a sparse gradient. Nothing has changed then.
        """
        self._graph_capture_health_check()
        self._begin_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo
    def _begin_step(self) -> None:
        """Act on what the step before decided."""
        self._current_table()
        if self._monitors() and self._learning != [self._learns(p) for p in self._all_params()]:
            self._write_state()
            self._build()
        if self._plan is not None and not self._capturing():
            self._plan.absorb()
        self._follow_taus()
        self._meet_ranks()
        table = self._table
        if table.news:
            self._publish()
            self._stop(table.wave())
            table.news = False

    def _meet_ranks(self) -> None:
        """Learn what the other ranks of the job hold, again after every change of the units."""
        known, *job = self._met_for
        if known is self._built_for and job == [is_initialized(), self.process_group]:
            return
        if self._monitors() and in_a_job(self.process_group, self._all_params()):
            self._leave_device()
            tensors = self._all_params()
            on_device = self._choice() == "triton" and len({p.device for p in tensors}) == 1
            ranks, units = Ranks.meet(
                self._table, self._members, tensors, self.process_group, on_device=on_device
            )
            self._members = {unit: self._members.get(unit, []) for unit in units}
            self._table = self._table.successor(units)
            self._table.ranks = ranks
        self._met_for = (self._built_for, is_initialized(), self.process_group)

    @torch._disable_dynamo
    def _step(self) -> None:
        table = self._table
        self._check_monitored(table)
        if self._watch is None:
            self._before_first_step()
        if self._total_steps is not None and table.t >= self._total_steps:
            self._warn_once(
                f"total_steps={self._total_steps} is exceeded: the optimizer goes on, but the "
                "grace period was planned for fewer steps."
            )
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        if table.ranks is not None and scaling["found_inf"] is not None:
            scaling["found_inf"] = table.ranks.found_anywhere(scaling["found_inf"])
        backend = self._implementation()
        grads = self._planned_gradients() if backend == "triton" else None
        if backend == "triton" and grads is None:
            self._chosen = (self, "")  # a parameter may have become a view with gaps
            backend = self._implementation()
        if backend == "triton":
            self._step_on_device(grads, **scaling)
            return
        if self._plan is not None:
            self._leave_device()
        if self._is_at_rest() and scaling["found_inf"] is None:
            table.begin_step()
            return
        groups = self._groups()
        if backend == "native":
            from .native import _fused_native_grades_adamw

            _fused_native_grades_adamw(groups, table, **scaling)
        else:
            _single_tensor_grades_adamw(groups, table, **scaling)
        self._publish()

    def _is_at_rest(self) -> bool:
        """Whether all that a step can do is count: every tensor is frozen, and no rank listens."""
        table = self._table
        return table.ranks is None and table.all_frozen and not any(None in r for r in self._rows)

    def _before_first_step(self) -> None:
        reason = self._why_not_stop() if self._table.units else None
        self._insist(reason)
        may_stop = self._stop_grad is not False and reason is None
        self._watch = ReentrantWatch(
            chain.from_iterable(self._members.values()) if may_stop else ()
        )

    def _publish(self) -> None:
        """Bring the state up to date with what a step decided, then tell the hooks."""
        table = self._table
        for unit in table.units:
            if unit.decided_at != NEVER and not unit.announced:
                self._write_unit(unit)
        events = table.announce()
        if events:
            for hook in tuple(self._freeze_hooks.values()):
                hook(self, events)

    def _step_on_device(
        self,
        grads: list[Tensor | None] | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        from .triton_kernels import Hyper, Plan, take_part

        plan = self._plan
        if plan is None or grads is None:
            self._check_gradients()
            if self._capturing():
                raise RuntimeError(
                    "step() cannot be captured in a CUDA graph before it has run with the same "
                    "tensors: take a few steps on a side stream first, as torch.cuda.graph asks."
                )
            self._leave_device()
            groups = [self._gather_all(i) for i in range(len(self.param_groups))]
            if not any(group.params for group in groups):
                take_part(self._table, self._all_params()[0].device)
                self._table.begin_step()
                return
            plan = self._plan = Plan(groups, self._table)
            self._layout = self._laid_out(groups)
            self._planned = [_place(x) for x in self._held()]
            grads = [p.grad for p in plan.flat_params]
        hypers = [
            Hyper(g["lr"], g["betas"][0], g["betas"][1], g["eps"], g["weight_decay"], g["maximize"])
            for g in self.param_groups
        ]
        if self._capturing():
            # What a replay writes to must outlive whatever becomes of the state.
            plan.kept.append([dict(state) for state in self.state.values()])
        plan.step(grads, hypers, grad_scale, found_inf)

    def _planned_gradients(self) -> list[Tensor | None] | None:
        """The gradients for the plan laid out earlier; None where it no longer fits."""
        plan, layout = self._plan, self._layout
        if plan is None or layout is None:
            return None
        grads = [p.grad for p in plan.flat_params]
        fits = (
            self._holds(layout)
            and (layout.holds_prev_grads or not self._uses_prev())
            and plan.fits(grads)
            and self._state_stands()
        )
        return grads if fits else None

    def _state_stands(self) -> bool:
        """Whether the state lies where it lay when the plan was laid out, which knows addresses.

        `state[p]["exp_avg"] = ...` and `x.data = ...` give it another place; the old memory may be
        somebody else's by now.
        """
        held = self._held()
        places = [_place(x) for x in held]
        if places == self._planned:
            return True
        # An empty tensor stands for what a decision or a freeze has given up: the kernels do not
        # touch it any more.
        moved = (x for x, at, was in zip(held, places, self._planned, strict=False) if at != was)
        if len(places) != len(self._planned) or any(x is None or x.numel() for x in moved):
            return False
        self._planned = places
        return True

    def _held(self) -> list[Tensor | None]:
        keys = ("step", *MOMENTS, "prev_grad")
        return [state.get(key) for state in self.state.values() for key in keys]

    def _leave_device(self) -> None:
        """Bring the table up to date, let go of the device's copy and of the tensors found."""
        if self._plan is not None:
            self._plan.sync()
            if self._plan.captured:
                warnings.warn(
                    "the tensors of this optimizer have changed since step() was captured in a "
                    "CUDA graph: capture it again, the old graph does not know of the change.",
                    stacklevel=5,
                )
                self._outdated_plans.append(self._plan)  # a replay must not write into freed memory
            self._plan = None
        self._layout = None

    def _capturing(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def _stop(self, units: list[Unit]) -> None:
        """Spare backward the gradients of a wave of frozen units, where that is safe.

        Called at the start of the step after: a fixed lag, the same on every device and after a
        resume.
        """
        if not units or self._stop_grad is False:
            return
        reason = self._why_not_stop()
        self._insist(reason)
        if reason is None:
            self._release(units)
        else:
            self._warn_once(f"frozen matrices go on receiving gradients: {reason}")

    def _insist(self, reason: str | None) -> None:
        """Raise if gradients must stop (`stop_grad=True`) and there is a reason against it."""
        if reason is not None and self._stop_grad is True:
            raise RuntimeError(f"stop_grad=True: {reason} Or use stop_grad='auto' or False.")

    def _release(self, units: list[Unit]) -> None:
        """Let go of gradients and moments of frozen units, one unit after the other."""
        if not units:
            return
        for unit in units:
            members = self._members[unit]
            released = [
                {
                    key: nothing_held(p, x.dtype)
                    for key, x in self.state[p].items()
                    if key in MOMENTS
                }
                for p in members
            ]
            for p, placeholders in zip(members, released, strict=True):
                p.requires_grad_(False)
                p.grad = None
                self.state[p].update(placeholders)
            self._stopped.update(members)
            if unit.stopped_at == NEVER:  # else a checkpoint says when it was
                unit.stopped_at = self._table.t
            self._write_unit(unit)
        self._count_wave()

    def _count_wave(self) -> None:
        self._waves += 1
        if not COMPILE_SEES_WAVES:
            if anything_compiled():
                self._warn_once(
                    "torch.compile before torch 2.12 does not notice that frozen weights need no "
                    "gradients and goes on computing them. Call torch.compiler.reset() after a "
                    "freeze (in a freeze hook, say) to have the model compiled without them."
                )
            return
        left = recompilations_left(self._waves)
        told = any(message.startswith("torch.compile") for message in self._warned)
        if left is not None and left <= 1 and not self._table.all_frozen and not told:
            self._warn_once(
                f"torch.compile is near its limit: {self._waves} times the tensors that need "
                f"gradients have changed, and after {max(left, 0)} more recompilations the model "
                "runs eagerly. Raise torch._dynamo.config.recompile_limit, or use stop_grad=False."
            )

    def _why_not_stop(self, *, within_ddp: bool = False) -> str | None:
        """What keeps gradients from being stopped safely; None: nothing does."""
        if self._watch is not None and self._watch.seen:
            return (
                "with reentrant activation checkpointing, a block none of whose inputs needs a "
                "gradient silently stops learning. Use checkpoint(..., use_reentrant=False)."
            )
        members = list(chain.from_iterable(self._members.values()))
        if not in_a_job(self.process_group, members):
            return None
        if within_ddp:
            ranks = self._table.ranks
            if ranks is None or ranks.everywhere:
                return None
            return (
                "each rank holds other tensors (ZeroRedundancyOptimizer), while the wrapper needs "
                "the same ones to stop on all. For the saving, use fully_shard (FSDP2)."
            )
        if all_sharded(members, self.process_group):  # reduced tensor by tensor
            return None
        # After a change it trains one unsynchronised step, then raises.
        return (
            "DistributedDataParallel would wait for them. For the saving, call "
            "ddp_model = optimizer.apply_freezes(ddp_model) now and then."
        )

    # Units

    def _monitors(self) -> bool:
        return any(group["tau"] is not None for group in self.param_groups)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _fused(self) -> bool | None:
        asked = {group["fused"] for group in self.param_groups}
        if len(asked) > 1:
            raise ValueError(
                f"fused differs between parameter groups: {asked}. One implementation serves all "
                "groups; give every group the same value."
            )
        return next(iter(asked), None)

    def _implementation(self) -> str:
        """As `backend`: what serves this rank, and in a job the other ranks too."""
        name, ranks = self._choice(), self._table.ranks
        if name != "triton" or ranks is None or ranks.on_device:
            return name
        if self._fused():
            raise RuntimeError(
                "fused=True is not possible: in a job of several processes the Triton kernels need "
                "the same tensors on every rank, and each rank's on one device. Use fused=None."
            )
        return "reference"

    def _choice(self) -> str:
        """What can serve this rank; asked for in every step, so kept until something changes.

        `model.to(...)` moves and casts the very tensors that the optimizer holds.
        """
        asked, params = self._fused(), self._all_params()
        flags = {(group["differentiable"], group["foreach"]) for group in self.param_groups}
        kinds = [p.device for p in params], [p.dtype for p in params]
        if self._chosen[0] is not self._built_for or self._chosen[1:-1] != (asked, flags, kinds):
            name = choose(
                params,
                asked,
                differentiable=any(differentiable for differentiable, _ in flags),
                foreach=any(foreach for _, foreach in flags),
                units=self._members.values(),
            )
            self._chosen = (self._built_for, asked, flags, kinds, name)
            self._layout = None
        return self._chosen[-1]

    def _current_table(self) -> FreezeTable:
        """The freeze table, rebuilt if tensors, statistics or what is monitored have changed."""
        self._adopt_state()
        params, settings = self._all_params(), _settings(self.param_groups)
        if self._built_for is not None:
            same = len(params) == len(self._built_for[0])
            if (
                same
                and all(map(is_, params, self._built_for[0]))
                and settings == self._built_for[1]
            ):
                return self._table
        self._write_state()
        self._build()
        return self._table

    def _exact_table(self) -> FreezeTable:
        """The freeze table with all that the device has decided; may wait for the device."""
        table = self._current_table()
        if self._plan is not None:
            self._plan.sync()
            if table.news:
                self._publish()
        self._follow_taus()
        return table

    def _follow_taus(self) -> None:
        """Give every unit the threshold that its group has now.

        Called once all decisions made with the former one are known: an event tells its own tau.
        """
        taus = [_tau_of(group) for group in self.param_groups]
        if taus == self._taus:
            return
        new: dict[Unit, float] = {}
        for group, row, tau in zip(self.param_groups, self._rows, taus, strict=True):
            self._check_own_settings(
                group["tau"], group["statistic"], differentiable=group["differentiable"]
            )
            for unit in row:
                if unit is not None and tau is not None:
                    alike = new.setdefault(unit, tau), unit.criterion
                    _check_alike(unit.name, alike, (tau, unit.criterion))
        for unit, tau in new.items():
            unit.tau = tau
        self._taus = taus
        if self._table.ranks is not None and not self._table.ranks.everywhere:
            # Other ranks hold units whose thresholds they have to tell.
            self._leave_device()
            self._met_for = (self, False, None)
        elif self._plan is not None:
            self._plan.retune()

    def _build(self) -> None:
        """Make the units from the groups as they are now, and their rows from the state."""
        self._leave_device()
        units: dict[str, Unit] = {}
        members: dict[Unit, list[Tensor]] = {}
        rows: list[list[Unit | None]] = []
        seen: set[str] = set()
        prefix = self._table.ranks.prefix if self._table.ranks is not None else ""
        refuse_flat([p for g in self.param_groups if g["tau"] is not None for p in g["params"]])
        for i, group in enumerate(self.param_groups):
            tau, criterion = group["tau"], group["statistic"]
            self._check_own_settings(tau, criterion, differentiable=group["differentiable"])
            tau = _tau_of(group)
            names = self._names(i)
            rows.append([])
            for j, p in enumerate(group["params"]):
                watched = tau is not None and self._learns(p)
                name = self._unit_name(p, names, f"{prefix}group{i}", j) if watched else None
                if tau is None or name is None:
                    rows[i].append(None)
                    if self.state.get(p, FRESH).get("grades_frozen_at", NEVER) != NEVER:
                        raise ValueError(
                            f"parameter {j} of group {i} is frozen but belongs to no monitored "
                            f"unit (tau={tau}). Set its group's tau back, call thaw(), then take "
                            "the tau away."
                        )
                    continue
                full_name = canonical_name(names[j]) if names else name
                if full_name in seen:
                    raise ValueError(
                        f"two parameters are called {full_name!r}: units need names of their own."
                    )
                seen.add(full_name)
                unit = units.setdefault(name, Unit(name, criterion, tau, 0, 0))
                _check_alike(name, (unit.tau, unit.criterion), (tau, criterion))
                unit.n_elements += p.numel()
                unit.n_tensors += 1
                members.setdefault(unit, []).append(p)
                rows[i].append(unit)

        told = {unit.name for unit in self._table.units if unit.announced}
        # What other ranks hold stays in the table until they tell it anew.
        elsewhere = [unit for unit in self._table.units if self._members.get(unit) == []]
        self._table = self._table.successor([*units.values(), *elsewhere])
        members.update((unit, []) for unit in elsewhere)
        self._rows, self._members = rows, members
        for p, row in zip(self._all_params(), chain.from_iterable(rows), strict=True):
            if row is None or row.criterion != "change":
                self.state.get(p, {}).pop("prev_grad", None)
        for unit in units.values():
            self._read_unit(unit)
            # Another tensor may bear the name of one that had been frozen.
            unit.announced = unit.name in told and unit.frozen_at != NEVER
        self._built_for = self._all_params(), _settings(self.param_groups)
        self._learning = [self._learns(p) for p in self._all_params()]
        self._taus = [_tau_of(group) for group in self.param_groups]

    def _learns(self, p: Tensor) -> bool:
        """Whether a tensor is to be watched: it needs a gradient, or it is frozen by us.

        The base of a LoRA model and the adapters that are not active never give evidence; as units
        they would keep `all_frozen` from ever coming true.
        """
        return p.requires_grad or self.state.get(p, FRESH).get("grades_frozen_at", NEVER) != NEVER

    def _names(self, i: int) -> list[str] | None:
        names: list[str] | None = self.param_groups[i].get("param_names")
        if self._attached is not None and i < len(self._attached):
            names = self._attached[i]
        return names if names and len(names) == len(self.param_groups[i]["params"]) else None

    @staticmethod
    def _unit_name(p: Tensor, names: list[str] | None, group: str, j: int) -> str | None:
        if names is not None:
            return unit_of(names[j], p.shape, p.dtype)
        can_be_monitored = p.is_floating_point() and p.dim() >= 2 and p.numel() > 0
        return f"{group}.param{j}" if can_be_monitored else None

    # Checks: each raises before anything has changed

    def _check_own_settings(self, tau: Any, statistic: Any, *, differentiable: bool) -> None:
        _check_choice("statistic", statistic, STATISTICS)
        if tau is None:
            return
        if tau == "auto":
            if statistic != "signal":
                raise ValueError(
                    f"tau='auto' needs statistic='signal', not {statistic!r}: no other statistic "
                    "has a scale that is known beforehand. Observe it with tau=0.0, then choose."
                )
        else:
            _check_number("tau", tau, "[0, inf], 'auto', or None: not monitored", lambda x: x >= 0)
        if statistic == "weight_change" and self._rule.freeze_timing != "next_step":
            raise ValueError(
                "statistic='weight_change' needs freeze_timing='next_step': how far a weight moves "
                "is known after the update, too late to leave it out."
            )
        if self._rule.grace_steps is None:
            raise ValueError(
                f"tau={tau} needs total_steps or grace_steps: the grace period (alpha * "
                "total_steps, or grace_steps) keeps the small gradients of warm-up from freezing "
                "everything."
            )
        if differentiable:
            raise ValueError(
                f"differentiable=True cannot be combined with tau={tau}: freezing is a decision, "
                "which has no derivative. Use tau=None."
            )

    def _check_monitored(self, table: FreezeTable) -> None:
        if table.units or not self._monitors():
            return
        seen = [
            f"group {i} (tau={group['tau']}): "
            + (
                ", ".join(map(_describe, group["params"][:4], self._names(i) or []))
                or ", ".join(f"{tuple(p.shape)}" for p in group["params"][:4])
                or "empty"
            )
            for i, group in enumerate(self.param_groups)
        ]
        raise ValueError(
            "tau is set but not one tensor can be monitored: units are floating tensors of two or "
            "more dimensions, by name neither embedding, output head, norm nor bias. Seen: "
            f"{'; '.join(seen)}. Pass the weight matrices, or tau=None."
        )

    def _graph_capture_health_check(self) -> None:
        # Where torch has both names, the older one is an alias that warns.
        if hasattr(self, "_accelerator_graph_capture_health_check"):
            self._accelerator_graph_capture_health_check()
        else:
            self._cuda_graph_capture_health_check()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)


def _tau_of(group: dict[str, Any]) -> float | None:
    """The threshold of a parameter group as a number; "auto" is a tenth above the noise floor."""
    if group["tau"] == "auto":
        return 1.1 * noise_floor(float(group["betas"][0]))
    return group["tau"]


def _settings(groups: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """Of every group, what decides about its units: whether there are any, and what they measure.

    The threshold is no part of it: it may change in every step.
    """
    return [(group["tau"] is not None, group["statistic"]) for group in groups]


def _place(x: Tensor | None) -> int:
    return -1 if x is None else x.data_ptr()


def _describe(p: Tensor, name: str) -> str:
    return f"{name} {tuple(p.shape)}"


def _check_alike(name: str, one: tuple[Any, str], other: tuple[Any, str]) -> None:
    if one != other:
        raise ValueError(
            f"the tensors of unit {name!r} lie in groups with different tau or statistic: "
            f"{one} and {other}."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"Invalid {name}: {value!r} (choose one of {', '.join(map(repr, choices))})"
        )


def _check_integer(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Invalid {name}: {value!r} (must be an integer of at least {least})")


def _check_number(name: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not holds(value):
        raise ValueError(f"Invalid {name}: {value!r} (must be a number in {wanted})")
