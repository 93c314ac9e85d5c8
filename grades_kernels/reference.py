"""One step of AdamW that freezes converged units, in plain PyTorch: fallback and oracle.

Every other implementation is right when it agrees with this one. The arithmetic of the update is
torch's own `torch.optim.adamw.adamw`, called on the tensors that are not frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .freezing import NEVER, FreezeTable, Unit

if TYPE_CHECKING:
    from .functional import StepGroup


def _single_tensor_grades_adamw(
    groups: list[StepGroup],
    table: FreezeTable,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Measure, decide, update, keep: Algorithm 1 of the paper for all parameter groups at once.

    Reads the statistics back from the device: a synchronisation per step with a check.
    """
    if grad_scale is not None or found_inf is not None:
        raise AssertionError("Expected grad_scale and found_inf to be None")

    t = table.begin_step()
    measured = _measure(groups, table, t) if table.rule.checks(t) else {}

    if table.rule.freeze_timing == "same_step":
        for unit, statistic in measured.items():
            table.judge(unit, statistic)
    frozen_before_update = {unit for unit in table.units if unit.frozen_at != NEVER}

    for group in groups:
        _update(group, table, frozen_before_update)

    if table.rule.freeze_timing == "next_step":
        for unit, statistic in measured.items():
            table.judge(unit, statistic)

    if table.rule.checks(t + 1):
        _keep(groups, t)
    if measured:
        nan = float("nan")
        table.record(tuple(u.statistic if u in measured else nan for u in table.units))


def _measure(groups: list[StepGroup], table: FreezeTable, t: int) -> dict[Unit, float]:
    """The statistic of every undecided unit, in order; void checks are left out."""
    sums: dict[Unit, list[Tensor]] = {u: [] for u in table.units if u.decided_at == NEVER}
    magnitudes: dict[Unit, list[Tensor]] = {unit: [] for unit in sums}
    for group in groups:
        for i, unit in enumerate(group.units):
            if unit not in sums:
                continue
            # Half precision is widened before the difference, and every sum runs in float64:
            # over 1e8 elements a float32 sum would depend on how it is split.
            grad = _widened(group.grads[i])
            if unit.criterion == "change":
                prev_grad = group.prev_grads[i]
                if prev_grad is None or unit.prev_step != t - 1:
                    continue
                difference = grad - _widened(prev_grad)
            elif unit.criterion == "momentum":
                if group.state_steps[i].item() == 0:
                    continue
                difference = (-grad if group.maximize else grad) - _widened(group.exp_avgs[i])
            else:
                difference = grad
            sums[unit].append(_abs_sum(difference))
            magnitudes[unit].append(_abs_sum(grad))

    complete = [unit for unit in sums if len(sums[unit]) == unit.n_tensors]
    statistics = _read_back([_together(sums[unit]).sum() for unit in complete])
    evidence = _read_back([_together(magnitudes[unit]).min() for unit in complete])
    return {
        unit: statistic
        for unit, statistic, magnitude in zip(complete, statistics, evidence, strict=True)
        if magnitude > 0 and statistic < torch.inf  # neither holds for NaN
    }


def _update(group: StepGroup, table: FreezeTable, frozen: set[Unit]) -> None:
    """AdamW on the tensors that are not frozen, those of one learning-rate factor together."""
    by_factor: dict[float, list[int]] = {}
    for i, unit in enumerate(group.units):
        if unit in frozen:
            continue
        by_factor.setdefault(table.lr_factor(unit), []).append(i)

    for factor, chosen in by_factor.items():
        lr = group.lr if factor == 1.0 else group.lr * factor
        mixed = [i for i in chosen if group.grads[i].dtype != group.params[i].dtype]
        plain = [i for i in chosen if i not in mixed] if mixed else chosen
        if plain:
            _adamw(group, lr, *_columns(group, plain))
        for i in mixed:
            _adamw_mixed(group, lr, i)


def _adamw_mixed(group: StepGroup, lr: float | Tensor, i: int) -> None:
    """AdamW in the wider dtype for a gradient whose dtype is not its parameter's.

    torch's own AdamW raises a dtype mismatch here (an fp32 gradient on a bf16 parameter).
    """
    columns = _columns(group, [i])
    dtype = torch.promote_types(group.params[i].dtype, group.grads[i].dtype)
    *wide, steps = [[x.to(dtype) for x in column] for column in columns[:-1]] + [columns[-1]]
    _adamw(group, lr, *wide, steps)
    for column, wide_column in zip(columns, wide, strict=False):
        for x, wide_x in zip(column, wide_column, strict=True):
            if x is not group.grads[i]:
                x.copy_(wide_x)


def _adamw(group: StepGroup, lr: float | Tensor, *columns: list[Tensor]) -> None:
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps = columns
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        foreach=bool(group.foreach),
        capturable=group.capturable,
        differentiable=group.differentiable,
        fused=False,
        has_complex=any(map(torch.is_complex, params)),
        amsgrad=group.amsgrad,
        beta1=group.beta1,
        beta2=group.beta2,
        lr=lr,
        weight_decay=group.weight_decay,
        eps=group.eps,
        maximize=group.maximize,
    )


def _keep(groups: list[StepGroup], t: int) -> None:
    """Store the gradients that the check of step t + 1 compares with."""
    kept: dict[Unit, int] = {}
    for group in groups:
        for i, unit in enumerate(group.units):
            prev_grad = group.prev_grads[i]
            if unit is None or prev_grad is None or unit.decided_at != NEVER:
                continue
            prev_grad.copy_(group.grads[i])
            kept[unit] = kept.get(unit, 0) + 1
    for unit, n in kept.items():
        if n == unit.n_tensors:
            unit.prev_step = t


def _columns(group: StepGroup, chosen: list[int]) -> list[list[Tensor]]:
    """The tensor lists that AdamW takes, for the chosen positions."""
    columns = (
        group.params,
        group.grads,
        group.exp_avgs,
        group.exp_avg_sqs,
        group.max_exp_avg_sqs,
        group.state_steps,
    )
    if len(chosen) == len(group.params):
        return [list(column) for column in columns]
    return [[column[i] for i in chosen] if column else [] for column in columns]


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _abs_sum(x: Tensor) -> Tensor:
    """Sum of the absolute values in float64; of a DTensor, over all its shards."""
    total = x.abs().sum(dtype=torch.float64)
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def _together(scalars: list[Tensor]) -> Tensor:
    return torch.stack([x.to(scalars[0].device) for x in scalars])


def _read_back(scalars: list[Tensor]) -> list[float]:
    return _together(scalars).tolist() if scalars else []
