"""GradESAdamW: the arguments, `step()`, and the methods of a caller."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.optimizer import _use_grad_for_differentiable
from torch.utils.hooks import RemovableHandle

from . import checkpoint
from .freezer import Freezer
from .freezing.config import check_group, check_new_group, make_config
from .freezing.table import FreezeEvent
from .freezing.unit_map import names_from_model, names_of
from .release import ddp_of, frozen_prefix, memory_of
from .report.report import FreezeReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .cut.cut import Cut


class GradESAdamW(AdamW):
    r"""AdamW that freezes each weight matrix when its gradient has stopped changing.

    A drop-in for `torch.optim.AdamW`: the same arguments in the same order, the same state and
    checkpoints, and the same result while `tau` is None. With `tau`, every monitored matrix is
    measured once the grace period is over and is left untouched, bit for bit, from the step in
    which its statistic falls below `tau` (GradES, arXiv 2509.01842, Algorithm 1).

    Args:
        params: Tensors, parameter groups or `(name, tensor)` pairs, as AdamW takes them. With
            names, units carry them; embeddings, output heads, norms and biases are not monitored,
            and LoRA pairs freeze together. Without names every floating tensor of two dimensions or
            more in a group with `tau` is a unit, `group{i}.param{j}`.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable:
            As in `torch.optim.AdamW`. `differentiable` excludes `tau`; with `tau`, `step()` cannot
            be captured in a CUDA graph.
        fused: None chooses a fused backend where there is one, else the reference; False is the
            reference; True is a fused backend or a RuntimeError. May differ per group.
        tau: Threshold of the statistic; may differ per parameter group and be changed between
            steps. None (default): not monitored. 0.0 measures and never freezes, except with the
            others by `max_frozen`. "auto", for "signal" alone: 1.2.
        alpha: Share of `total_steps` that is the grace period, in [0, 1). Default 0.5.
        total_steps: Planned optimizer steps, at least 1.
        grace_steps: Steps before the first check; in place of `alpha * total_steps`.
        statistic: The quantity that is compared with tau, summed over all elements of a unit; may
            differ per parameter group. "change" (default, Eq. 1): :math:`|g_t - g_{t-1}|`.
            "norm" (Eq. 3): :math:`|g_t|`. "momentum": :math:`|g_t - m_{t-1}|` with AdamW's first
            moment, which needs no memory. "signal": :math:`\sum \hat m_{t-1}^2 / (\rho_{t-1} \sum
            \hat v_{t-1})`, where rho makes it 1 for noise, whatever the betas and the model.
            "gain": :math:`\sum g_t \hat m_{t-1} / (\sqrt{\hat v_{t-1}} + \epsilon)`, the loss that
            a step would gain per learning rate; 0 where it is negative. "weight_change":
            :math:`|w_t - w_{t-1}|`, which the paper's own code measures; only with
            `freeze_timing="next_step"`.
        tau_per: "unit" (default, the paper) compares the sum, "element" the sum divided by the
            number of elements ("signal" excepted).
        check_every: Steps from one check to the next. Default 1.
        patience: Consecutive checks below tau that freeze a unit. Default 1 (the paper).
        freeze_timing: "same_step" (default, Algorithm 1) decides before the update, so that a unit
            is not updated in its decisive step; "next_step" applies that update still.
        cooldown: Steps over which the learning rate of a decided unit falls linearly to zero
            before it freezes. Default 0 (the paper): it freezes at once.
        max_frozen: Share of the monitored units, in (0, 1], that decides all others. Default 1.0.
        stop_grad: Whether frozen tensors are released: they get `requires_grad=False`, so that
            backward skips their gradient, and give up their moments, at the start of the step
            after, in at most six batches a run. "auto" (default): where that is safe, which is on
            one process, with DTensors, and under DDP with
            `grades_kernels.integrations.release_under_ddp`. True: always, or a RuntimeError. False:
            never; the update alone is masked, until `apply_freezes` is called, also after loading.

    Attributes:
        process_group: The processes that step this optimizer and decide together. None (default):
            all of the job. Set it before the first step where some ranks train another model, or
            none. Every process of it must call `step()` equally often.

    Raises:
        ValueError: For a value out of range, naming the argument, the value and the range.
        RuntimeError: For `fused=True` where no fused backend can serve the parameters.

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
        config = make_config(
            alpha=alpha,
            total_steps=total_steps,
            grace_steps=grace_steps,
            check_every=check_every,
            patience=patience,
            freeze_timing=freeze_timing,
            cooldown=cooldown,
            max_frozen=max_frozen,
            tau_per=tau_per,
            stop_grad=stop_grad,
        )
        self._own_defaults = {"tau": tau, "statistic": statistic}
        check_group(config, {**self._own_defaults, "differentiable": differentiable})
        self._freezer = Freezer(config)
        self._freeze_hooks: OrderedDict[int, Callable] = OrderedDict()
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
        self._freezer.map_units(self)
        self._freezer.backends(self, allow_meta=True)  # raises where fused=True is not possible
        self._step_supports_amp_scaling = _are_fused(self.param_groups)

    # Readings

    @property
    def backend(self) -> str:
        """The backend that serves the monitored units: "triton", "native" or "reference".

        Without units it is that of the first parameter group.
        """
        return self._freezer.backend_of_units(self)

    @property
    def monitored_units(self) -> list[str]:
        """Names of all units, frozen or not."""
        return [unit.name for unit in self._freezer.table.units]

    @property
    def frozen_units(self) -> list[str]:
        """Names of the units that are frozen now, in the order in which they froze."""
        return [event.unit for event in self.freeze_events]

    @property
    def freeze_events(self) -> list[FreezeEvent]:
        """One event for every unit that is frozen now, by step."""
        return self._exact().table.events

    @property
    def all_frozen(self) -> bool:
        """Whether there is a monitored unit and every one is frozen: the signal to stop.

        Never waits for the device or other ranks, and so is at most one step late where they
        decide, unless something exact has been read: in a job of several processes, stop by
        `grades_kernels.integrations.is_finished`, which is the same on every rank.
        """
        return self._freezer.all_frozen

    def statistics(self) -> dict[str, float]:
        """The last statistic of every unit as it is compared with tau; NaN before the first."""
        return {unit.name: unit.value for unit in self._exact().table.units}

    def report(self, cut: Cut | None = None) -> FreezeReport:
        """The statistics of every unit, when it froze, and which tensors the `cut` had frozen."""
        freezer = self._exact()
        frozen_blocks, trained_below = frozen_prefix(freezer.table.units, freezer.unit_map)
        return FreezeReport.from_table(
            freezer.table,
            n_trainable=freezer.n_elements,
            backend=self.backend,
            memory=memory_of(freezer.unit_map, self.state, freezer.release.released),
            frozen_blocks=frozen_blocks,
            trained_below=trained_below,
            cut="" if cut is None else cut.summary(),
        )

    def register_freeze_hook(
        self, hook: Callable[[GradESAdamW, list[FreezeEvent]], None]
    ) -> RemovableHandle:
        """Call `hook(optimizer, events)` after a step that froze units.

        Where a device decides, or FSDP2's ranks with "next_step", it is called at the start of the
        next step, or with an exact reading before. An exception leaves that step untaken, and hooks
        that were registered later are not called for these events.

        Returns:
            A handle; its `remove()` removes the hook.
        """
        handle = RemovableHandle(self._freeze_hooks)
        self._freeze_hooks[handle.id] = hook
        return handle

    # Actions

    def attach(self, model: torch.nn.Module) -> None:
        """Give units the names of `model`'s parameters, where groups were built without names.

        Raises:
            ValueError: If a tensor of the optimizer is no parameter of the model.
        """
        names = names_from_model(self.param_groups, model)
        self._exact().write_state(self)
        self._freezer.map_units(self, names)

    @torch.inference_mode(False)  # moments that are made in it could not be updated
    def thaw(self, units: str | Iterable[str] | None = None) -> None:
        """Let frozen units train again; None: all of them.

        A frozen unit comes back with `requires_grad=True`, zero moments and a new bias correction;
        the decision about a unit that is cooling down is taken back, its moments stay. It freezes
        again unless `tau` is lowered, and at once beyond the share `max_frozen`.

        Raises:
            ValueError: For a name that is no monitored unit.
        """
        freezer = self._exact()
        freezer.thaw(self, freezer.table.named(units))

    def apply_freezes(self, model: torch.nn.Module | None = None) -> torch.nn.Module | None:
        """Turn everything frozen into savings now: no gradients, no moments, no launch.

        `stop_grad` does this by itself, in batches, where that is safe. DistributedDataParallel
        waits for every gradient that was needed when it was initialised: there, use
        `grades_kernels.integrations.release_under_ddp`, or call this on every rank between two
        steps, now and then: `ddp_model = optimizer.apply_freezes(ddp_model)`.

        Args:
            model: A `DistributedDataParallel` model, also in Fabric's wrapper. Not needed
                otherwise.

        Returns:
            `model`, which is initialised anew where tensors were released or thawed. The bare
            module if nothing is left to train.

        Raises:
            RuntimeError: In a job of several processes without their DDP model, and where reentrant
                activation checkpointing is in use. Nothing has changed then.
        """
        freezer = self._exact()
        ddp = ddp_of(model) or freezer.release.ddp
        freezer.release_all(self, ddp)
        fitting = freezer.release.rewrap(ddp)
        return fitting if model is ddp else model

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may bring its own `tau`, `statistic` and `fused`."""
        if isinstance(param_group, dict):
            self._freezer.group_gave_tau |= "tau" in param_group
            for key, value in self._own_defaults.items():
                param_group.setdefault(key, value)
            check_new_group(self._freezer.table.config, param_group)
        super().add_param_group(param_group)
        if not self._freezer.is_mapped:  # in the constructor all groups come before the units
            return
        self._exact().write_state(self)
        try:
            self._freezer.map_units(self)
            self._freezer.backends(self, allow_meta=True)
        except (RuntimeError, ValueError):
            self.param_groups.pop()
            self._freezer.map_units(self)
            raise
        self._step_supports_amp_scaling = _are_fused(self.param_groups)

    # A step

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: A closure that reevaluates the model and returns the loss.

        Raises:
            ValueError: If tau is set and no tensor of any group can be monitored, or a gradient
                does not fit its parameter. Nothing has changed then.
            RuntimeError: For a sparse gradient, and with tau for a step that is captured in a CUDA
                graph. Nothing has changed then.
        """
        # Where torch has both names, the older one is an alias that warns.
        new = getattr(self, "_accelerator_graph_capture_health_check", None)
        (new or self._cuda_graph_capture_health_check)()
        self._begin_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._begin_step()  # it may have changed the groups
        self._take_step()
        return loss

    @torch._disable_dynamo
    def _begin_step(self) -> None:
        self._call_hooks_after(self._freezer.begin_step)
        self._freezer.release_batch(self)  # after the hooks, which may thaw

    @torch._disable_dynamo
    def _take_step(self) -> None:
        self._call_hooks_after(self._freezer.take_step)

    def _exact(self) -> Freezer:
        """The freezer with all that a device has decided; may wait for the device."""
        self._call_hooks_after(self._freezer.sync)
        return self._freezer

    def _call_hooks_after(self, action: Callable[[GradESAdamW], list[FreezeEvent]]) -> None:
        with self._freezer.lock:  # a reading of another thread reads back the same steps
            events = action(self)
        for hook in tuple(self._freeze_hooks.values()) if events else ():
            hook(self, events)

    # State and checkpoints

    @torch._disable_dynamo
    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """As `torch.optim.AdamW.state_dict`, with the freeze table as numbers in the state.

        A tensor monitored by "change" always has a `prev_grad` of its own shape here, zeros while
        none is stored, and of a dtype that does not depend on the gradients seen: loading in place
        (`torch.distributed.checkpoint`) takes keys, shapes and dtypes from the receiving side. The
        released moments of a frozen tensor are zeros here too, as `thaw` makes them.

        Args:
            compact: Leave out released tensors instead of writing zeros. Such a checkpoint loads
                into GradESAdamW by `load_state_dict`, but neither into plain AdamW nor in place.
        """
        freezer = self._exact()
        freezer.write_state(self)

        def complete(_: Any, new: dict[str, Any]) -> dict[str, Any]:  # before the user's hooks
            return checkpoint.saved(new, self.param_groups, compact=compact)

        with self.register_state_dict_post_hook(complete, prepend=True):
            return super().state_dict()

    def adamw_state_dict(self) -> dict[str, Any]:
        """A state dict for plain `torch.optim.AdamW`, without the keys that are ours.

        Warns once if a unit is frozen: plain AdamW will move it again.
        """
        state_dict = self.state_dict()
        n_frozen = len(self.freeze_events)
        if n_frozen:
            self._freezer.warn_once(
                f"{n_frozen} frozen units will move again under torch.optim.AdamW, which knows no "
                "frozen parameters."
            )
        return checkpoint.plain(state_dict)

    @torch._disable_dynamo
    @torch.inference_mode(False)  # as `thaw`
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of GradESAdamW or of plain AdamW.

        A plain one brings no freeze table: nothing is frozen, the count of steps continues from the
        largest `step`, and `tau` and `statistic` stay as they are. Another one brings its own, with
        a warning where they differ. For prev_grad and the counters, see `state_dict`.

        Raises:
            ValueError: If parameters were renamed, reordered or reshaped since; with both names.
                Nothing has changed then.
        """
        prev_grads: dict[int, Tensor] = {}
        groups = self.param_groups
        unit_map = self._freezer.unit_map
        names = names_of(groups, unit_map.attached, unit_map.name_of)
        own = groups, names, self.state, self._freezer.table.config

        def prepare(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            return checkpoint.prepared(incoming, prev_grads, *own)

        restore = functools.partial(self._freezer.restore, prev_grads=prev_grads)
        # As hooks they run after the user's pre-hooks, which may rename, and before the post-hooks.
        with (
            self.register_load_state_dict_pre_hook(prepare),
            self.register_load_state_dict_post_hook(restore, prepend=True),
            self._freezer.unchanged_on_error(self),
        ):
            super().load_state_dict(state_dict)
        if changes := checkpoint.replaced_settings(groups, self.param_groups):
            self._freezer.warn_once(changes)

    def __getstate__(self) -> dict[str, Any]:
        freezer = self._exact()
        freezer.write_state(self)
        own = {"_own_defaults": self._own_defaults, "_freezer": freezer.pickled()}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        freezer = state.pop("_freezer", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self._own_defaults.items():
                group.setdefault(key, value)
        if freezer is not None:  # unpickled or deep-copied, rather than loaded
            self._freeze_hooks = OrderedDict()
            self._freezer = Freezer.from_pickle(self, freezer)
            self._step_supports_amp_scaling = _are_fused(self.param_groups)


def _are_fused(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether GradScaler may leave it to `step()` to unscale; torch's AdamW asks no group."""
    return all(group["fused"] for group in groups)
