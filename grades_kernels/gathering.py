"""The tensors of a step: found in parameter groups and state, used again while they stay the same.

Finding 300 small tensors takes a third of the time that updating them takes on a CPU, and nearly
every step finds them at the same places. So the places are kept, and a step asks only whether they
still hold.
"""

from __future__ import annotations

from operator import is_
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .checkpoint import FRESH, CheckpointedAdamW
from .freezing import NEVER, Unit
from .functional import StepGroup, gradient_dtype, same_memory_order
from .savings import MOMENTS, nothing_held

_TAKEN_AS_THEY_ARE = (
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
)


class Layout:
    """Where a step found its tensors. It holds parameters alone, no gradient and no state.

    Whoever moves moments to another device between two steps, or lets go of them, gets their memory
    back; so does a freeze.

    Args:
        groups: Per parameter group, the tensors found.
        flags: As `GatheringAdamW._flags` gave them.
        params: All tensors of the optimizer.
        state: Its state.
    """

    def __init__(
        self,
        groups: list[StepGroup],
        flags: list[Any],
        params: list[Tensor],
        state: dict[Tensor, dict[str, Any]],
    ) -> None:
        self.flags = flags
        self.keys = list(state)
        self.found = [(group.params, group.units) for group in groups]
        position = {p: k for k, p in enumerate(self.keys)}
        self.places = [[position[p] for p in group.params] for group in groups]
        found = {p for group in groups for p in group.params}
        self.idle = [p for p in params if p not in found]
        pairs = [pair for g in groups for pair in zip(g.params, g.prev_grads, strict=True)]
        self.holds_prev_grads = all(prev is None or prev.shape == p.shape for p, prev in pairs)

    def groups(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        *,
        uses_prev: bool,
    ) -> list[StepGroup] | None:
        """The tensors of the next step; None where one is missing or does not fit.

        Args:
            uses_prev: Whether the step reads or writes previous gradients.
        """
        states = list(state.values())
        groups = []
        for group, (params, units), places in zip(
            param_groups, self.found, self.places, strict=True
        ):
            own = [states[k] for k in places]
            grads = _fitting_gradients(params)
            try:
                held = _held(own, units, amsgrad=group["amsgrad"])
            except KeyError:
                return None
            prev_grads = held["prev_grads"]
            if grads is None or (uses_prev and not all(map(_can_hold, prev_grads, grads))):
                return None
            groups.append(StepGroup(params, grads, units=units, **held, **_hypers(group)))
        return groups


class GatheringAdamW(CheckpointedAdamW):
    """The part of GradESAdamW that finds the tensors of a step and checks their gradients."""

    _rows: list[list[Unit | None]]
    _layout: Layout | None

    def _groups(self) -> list[StepGroup]:
        """Per parameter group, the tensors that have a gradient, for one step.

        Raises:
            ValueError: For a gradient that does not fit its parameter.
            RuntimeError: For a sparse gradient.
        """
        layout = self._layout
        if layout is not None and self._holds(layout):
            groups = layout.groups(self.param_groups, self.state, uses_prev=self._uses_prev())
            if groups is not None:
                return groups
        self._layout = None
        self._check_gradients()
        groups = [self._gather(i) for i in range(len(self.param_groups))]
        if not any(group.differentiable for group in groups):
            self._layout = self._laid_out(groups)
        return groups

    def _laid_out(self, groups: list[StepGroup]) -> Layout:
        return Layout(groups, self._flags(), self._all_params(), self.state)

    def _holds(self, layout: Layout) -> bool:
        """Whether a search would find tensors and state at the same places."""
        return (
            layout.flags == self._flags()
            and all(p.grad is None or p in self._stopped for p in layout.idle)
            and len(self.state) == len(layout.keys)
            and all(map(is_, self.state, layout.keys))
        )

    def _uses_prev(self) -> bool:
        """Whether this step compares with previous gradients, or keeps its own for the next."""
        t = self._table.t + 1
        return self._rule.checks(t) or self._rule.checks(t + 1)

    def _flags(self) -> list[Any]:
        """Of every group, what decides about the tensors that a step needs and may have."""
        return [
            (g["amsgrad"], g["capturable"], g["foreach"], isinstance(g["lr"], Tensor))
            for g in self.param_groups
        ]

    def _check_gradients(self) -> None:
        capturable_devices = None
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(
                        "Adam does not support sparse gradients, please consider SparseAdam instead"
                    )
                if grad.shape != p.shape:
                    raise ValueError(
                        f"the gradient of parameter {j} of group {i} has shape "
                        f"{tuple(grad.shape)}, the parameter {tuple(p.shape)}."
                    )
                if grad.device != p.device:
                    raise ValueError(
                        f"the gradient of parameter {j} of group {i} is on {grad.device}, the "
                        f"parameter on {p.device}: it was moved after backward()."
                    )
                if group["capturable"]:
                    capturable_devices = capturable_devices or _capturable_devices()
                    if p.device.type not in capturable_devices:
                        raise AssertionError(
                            "If capturable=True, params and state_steps must be on supported "
                            f"devices: {capturable_devices}."
                        )

    def _gather(self, i: int) -> StepGroup:
        """The tensors of group `i` that have a gradient, their state made on first use."""
        group = self.param_groups[i]
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        uses_prev = self._uses_prev()
        units: list[Unit | None] = []
        prev_grads: list[Tensor | None] = []
        for p, unit in zip(group["params"], self._rows[i], strict=True):
            if p.grad is None:
                continue
            state = self.state[p]
            if "grades_t" not in state:
                state.update(FRESH, grades_t=self._table.t + 1)
            prev_grad = None
            if _keeps_prev_grad(unit):
                prev_grad = state.setdefault("prev_grad", nothing_held(p))
                if uses_prev and prev_grad.shape != p.shape:
                    prev_grad = state["prev_grad"] = torch.zeros_like(p.grad)
                    unit.prev_step = NEVER  # who cleared the state has taken the evidence with it
                elif uses_prev and prev_grad.dtype != p.grad.dtype:
                    wide = torch.promote_types(prev_grad.dtype, p.grad.dtype)
                    prev_grad = state["prev_grad"] = prev_grad.to(wide)
            units.append(unit)
            prev_grads.append(prev_grad)
        return StepGroup(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            prev_grads,
            units,
            **_hypers(group),
        )

    def _gather_all(self, i: int) -> StepGroup:
        """All tensors of group `i` that have state, laid out as the kernels want them."""
        group = self.param_groups[i]
        gathered = self._gather(i)
        members = [
            (p, unit)
            for p, unit in zip(group["params"], self._rows[i], strict=True)
            if self.state.get(p) and p not in self._stopped
        ]
        uses_prev = group["capturable"] or self._uses_prev()
        for p, unit in members:
            state = self.state[p]
            state["step"] = state["step"].to(p.device, torch.float32)
            for key in MOMENTS:
                if key in state and not same_memory_order(state[key], p):
                    state[key] = torch.empty_like(p, dtype=state[key].dtype).copy_(state[key])
            if not _keeps_prev_grad(unit):
                continue
            held = state.setdefault("prev_grad", nothing_held(p))
            dtype = gradient_dtype(p.grad, p)
            if held.shape != p.shape:
                if uses_prev:
                    state["prev_grad"] = torch.zeros_like(p, dtype=dtype)
                    unit.prev_step = NEVER
            elif held.dtype != dtype or held.device != p.device or not same_memory_order(held, p):
                state["prev_grad"] = torch.empty_like(p, dtype=dtype).copy_(held)
        units = [unit for _, unit in members]
        return gathered._replace(
            params=[p for p, _ in members],
            grads=[p.grad for p, _ in members],
            units=units,
            **_held([self.state[p] for p, _ in members], units, amsgrad=group["amsgrad"]),
        )


def _hypers(group: dict[str, Any]) -> dict[str, Any]:
    """Of a parameter group, the hyper-parameters of a `StepGroup`."""
    beta1, beta2 = group["betas"]
    taken = {name: group[name] for name in _TAKEN_AS_THEY_ARE}
    return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, **taken}


def _held(
    states: list[dict[str, Any]], units: list[Unit | None], *, amsgrad: bool
) -> dict[str, Any]:
    """What a `StepGroup` takes from the state of its tensors.

    Raises:
        KeyError: A state lacks some of it.
    """
    prev_grads: list[Tensor | None] = [None] * len(states)
    if any(units):
        prev_grads = [
            s["prev_grad"] if _keeps_prev_grad(unit) else None
            for s, unit in zip(states, units, strict=True)
        ]
    return {
        "exp_avgs": [s["exp_avg"] for s in states],
        "exp_avg_sqs": [s["exp_avg_sq"] for s in states],
        "max_exp_avg_sqs": [s["max_exp_avg_sq"] for s in states] if amsgrad else [],
        "state_steps": [s["step"] for s in states],
        "prev_grads": prev_grads,
    }


def _keeps_prev_grad(unit: Unit | None) -> TypeGuard[Unit]:
    return unit is not None and unit.criterion == "change" and unit.decided_at == NEVER


def _fitting_gradients(params: list[Tensor]) -> list[Tensor] | None:
    """The gradients of these tensors; None where one is missing or does not fit."""
    grads = []
    for p in params:
        g = p.grad
        if g is None or g.layout is not torch.strided or g.shape != p.shape:
            return None
        grads.append(g)
    return grads


def _can_hold(prev_grad: Tensor | None, grad: Tensor) -> bool:
    """Whether a buffer, if there is to be one, can take this gradient."""
    return prev_grad is None or (prev_grad.shape == grad.shape and prev_grad.dtype == grad.dtype)


def _capturable_devices() -> list[str]:
    from torch.optim.optimizer import _get_capturable_supported_devices

    return _get_capturable_supported_devices()
