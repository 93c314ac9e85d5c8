"""One door to a step: the implementation is chosen here, for every call anew."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .freezing import FreezeRule, FreezeTable, Unit
from .native import _fused_native_grades_adamw, why_not_native
from .reference import _single_tensor_grades_adamw


class StepGroup(NamedTuple):
    """Tensors with a gradient and hyper-parameters of one parameter group, for one step.

    `prev_grads[i]` and `units[i]` are None for a tensor that needs no previous gradient and for
    one that is not monitored; the lists are as long as `params`, except `max_exp_avg_sqs`, which
    is empty without amsgrad.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    state_steps: list[Tensor]
    prev_grads: list[Tensor | None]
    units: list[Unit | None]
    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool


def grades_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_complex: bool = False,
    *,
    prev_grads: list[Tensor | None] | None = None,
    units: list[Unit | None] | None = None,
    table: FreezeTable | None = None,
    amsgrad: bool,
    beta1: float | Tensor,
    beta2: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """Functional form of `GradESAdamW`, as `torch.optim.adamw.adamw` is of `AdamW`.

    Takes what `torch.optim.adamw.adamw` takes, in its order, and does the same when `table` is
    None. Parameters, moments and steps are updated in place, the freeze table as well.

    Args:
        prev_grads: Per tensor a buffer of the gradient's shape for the statistic "change", else
            None. Written at the step before a check.
        units: Per tensor the row of `table` that it belongs to, or None: not monitored.
        table: The freeze table; one call is one step of it.

    Raises:
        ValueError: If a unit that measures "change" comes without a `prev_grads` buffer, one that
            measures "weight_change" with another timing than "next_step", and for DTensors with a
            table that knows no ranks.
    """
    prev_grads = prev_grads if prev_grads is not None else [None] * len(params)
    units = units if units is not None else [None] * len(params)
    for unit, prev_grad in zip(units, prev_grads, strict=True):
        if unit is not None and unit.criterion == "change" and prev_grad is None:
            raise ValueError(
                f"unit {unit.name!r} measures 'change' but has no prev_grads buffer: pass a tensor "
                "of the gradient's shape and dtype, or use 'norm' or 'momentum'."
            )
        if (
            unit is not None
            and unit.criterion == "weight_change"
            and table is not None
            and table.rule.freeze_timing != "next_step"
        ):
            raise ValueError(
                f"unit {unit.name!r} measures 'weight_change', which needs a table whose rule has "
                "freeze_timing='next_step'."
            )
    if table is not None and table.ranks is None and any(hasattr(p, "device_mesh") for p in params):
        raise ValueError(
            "params holds DTensors, whose statistics need all ranks: use GradESAdamW or table=None."
        )
    group = StepGroup(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        prev_grads,
        units,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        amsgrad,
        maximize,
        foreach,
        capturable,
        differentiable,
    )
    table = table if table is not None else FreezeTable(FreezeRule())
    members: dict[Unit, list[Tensor]] = {}
    for unit, p in zip(units, params, strict=True):
        if unit is not None:
            members.setdefault(unit, []).append(p)
    backend = choose(
        params, fused, differentiable=differentiable, foreach=foreach, units=members.values()
    )
    if backend == "triton":
        from .triton_kernels import _fused_triton_grades_adamw

        _fused_triton_grades_adamw([group], table, grad_scale=grad_scale, found_inf=found_inf)
    elif backend == "native" and not capturable:
        _fused_native_grades_adamw([group], table, grad_scale=grad_scale, found_inf=found_inf)
    else:
        _single_tensor_grades_adamw([group], table, grad_scale=grad_scale, found_inf=found_inf)


def choose(
    params: list[Tensor],
    fused: bool | None,
    *,
    differentiable: bool = False,
    foreach: bool | None = None,
    units: Iterable[Sequence[Tensor]] = (),
) -> str:
    """The implementation that serves these parameters: "triton", "native" or "reference".

    Args:
        fused: As in `GradESAdamW`.
        units: The tensors of each unit.

    Raises:
        RuntimeError: If `fused` is True and no fused implementation can serve them.
    """
    if fused is False or differentiable or foreach or not params:  # a ZeRO rank may hold none
        return "reference"
    not_triton = why_not_triton(params, interpret=bool(fused), units=units)
    if not_triton is None:
        return "triton"
    not_native = why_not_native(params)
    if not_native is None:
        return "native"
    if fused:
        on_cpu = all(p.device.type == "cpu" for p in params)
        reason = not_native if on_cpu else not_triton
        raise RuntimeError(
            f"fused=True is not possible: {reason}. Use fused=None to fall back to the reference "
            "implementation where there is no fused one, or fused=False to ask for it."
        )
    return "reference"


def why_not_triton(
    params: list[Tensor], *, interpret: bool = False, units: Iterable[Sequence[Tensor]] = ()
) -> str | None:
    """What keeps the Triton kernels from serving these parameters; None: nothing does.

    Args:
        interpret: Whether CPU tensors may go through Triton's interpreter (TRITON_INTERPRET=1).
        units: The tensors of each unit.
    """
    devices = {p.device for p in params}
    if len({device.type for device in devices}) > 1:
        return f"the parameters lie on devices of several kinds, {sorted(map(str, devices))}"
    if any(len({p.device for p in unit}) > 1 for unit in units):
        return "the tensors of one unit lie on several devices"
    dtypes = {p.dtype for p in params} - {torch.float32, torch.bfloat16, torch.float16}
    if dtypes:
        return f"the Triton kernels have no {', '.join(sorted(map(str, dtypes)))}"
    if not all(map(is_dense, params)):
        return "a parameter is a DTensor or a view with gaps"
    device = next(iter(devices))
    if device.type == "cpu":
        if not interpret or os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "the parameters are on the CPU, where the Triton kernels run only in the "
                "interpreter (TRITON_INTERPRET=1 and fused=True)"
            )
    elif device.type != "cuda":
        return f"the Triton kernels do not run on {device.type!r}"
    elif torch.version.cuda:
        for device in devices:
            if torch.cuda.get_device_capability(device) < (7, 0):
                return f"{torch.cuda.get_device_name(device)} is older than what Triton supports"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def is_dense(p: Tensor) -> bool:
    """Whether a plain tensor fills its stretch of memory without gaps or overlaps."""
    if not isinstance(p, Tensor) or type(p) not in (Tensor, torch.nn.Parameter):
        return False
    expected = 1
    if p.numel() == 0:
        return True
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape lie in memory alike; dimensions of size 1 do not matter."""
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(i == j for i, j, size in strides if size > 1)


def gradient_dtype(grad: Tensor | None, p: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient, or that which the next one is expected to have."""
    return grad.dtype if grad is not None else getattr(p, "grad_dtype", None) or p.dtype
