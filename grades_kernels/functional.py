"""One door to a step: the implementation is chosen here, for every call anew."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .freezing import FreezeRule, FreezeTable, Unit
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
        ValueError: If a unit that measures "change" comes without a `prev_grads` buffer.
    """
    prev_grads = prev_grads if prev_grads is not None else [None] * len(params)
    units = units if units is not None else [None] * len(params)
    for unit, prev_grad in zip(units, prev_grads, strict=True):
        if unit is not None and unit.criterion == "change" and prev_grad is None:
            raise ValueError(
                f"unit {unit.name!r} measures 'change' but has no prev_grads buffer: pass a tensor "
                "of the gradient's shape and dtype, or use 'norm' or 'momentum'."
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
    step([group], table, fused=fused, grad_scale=grad_scale, found_inf=found_inf)


def step(
    groups: list[StepGroup],
    table: FreezeTable,
    *,
    fused: bool | None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Unit]:
    """One step over all parameter groups; returns the units whose statistic was measured."""
    return _single_tensor_grades_adamw(groups, table, grad_scale=grad_scale, found_inf=found_inf)


def choose(params: list[Tensor], fused: bool | None) -> str:
    """The implementation that serves these parameters: "triton", "native" or "reference".

    Raises:
        RuntimeError: If `fused` is True and no fused implementation can serve them.
    """
    if fused:
        raise RuntimeError(
            "fused=True is not possible: no fused implementation. Use fused=None to fall back to "
            "the reference implementation, or fused=False to ask for it."
        )
    return "reference"
