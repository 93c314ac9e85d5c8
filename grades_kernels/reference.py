"""One step of AdamW that freezes converged units, in plain PyTorch: fallback and oracle.

Every other implementation is right when it agrees with this one. The arithmetic of the update is
torch's own `torch.optim.adamw.adamw`, called on the tensors that are not frozen.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

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
    check, late = table.rule.checks(t), table.rule.freeze_timing == "next_step"
    sums = _measure(groups, table, t) if check else {}
    if check and not late:
        judge(table, sums)
    frozen_before_update = {unit for unit in table.units if unit.frozen_at != NEVER}
    weights = _weights(groups, table) if check and late else []

    for group in groups:
        _update(group, table, frozen_before_update)

    if check and late:
        _add_weight_changes(sums, weights)
        judge(table, sums)
    if table.rule.checks(t + 1):
        _keep(groups, t)


Sums = dict[Unit, list[tuple[Any, Any, Any]]]
"""Per undecided unit, for each of its tensors that has evidence, three numbers (fp64 tensors or
floats): the numerator of the statistic, its denominator (0 unless a ratio), the sum of |g|."""


def judge(table: FreezeTable, sums: Sums) -> None:
    """Turn the sums of every tensor into the statistic of every unit, and judge those not void.

    In a job of several processes all of them must call this together; see `distributed.Ranks`.
    """
    if table.ranks is None:
        statistics = _statistics(sums)
    else:
        statistics = table.ranks.agree(table, _statistics(table.ranks.sum_shards(sums)))
    for unit, statistic in statistics.items():
        table.judge(unit, statistic)
    if statistics:
        table.record(tuple(u.statistic if u in statistics else math.nan for u in table.units))


def _statistics(sums: Sums) -> dict[Unit, float]:
    """The statistic of every unit that has evidence.

    A synchronisation: the sums are read back from the device, all in one transfer.
    """
    complete = [unit for unit, rows in sums.items() if len(rows) == unit.n_tensors]
    numbers = iter(_read_back([x for unit in complete for row in sums[unit] for x in row]))
    rows = zip(numbers, numbers, numbers, strict=True)
    statistics = {}
    for unit in complete:
        numerators, denominators, magnitudes = zip(*islice(rows, unit.n_tensors), strict=True)
        statistic = sum(numerators)
        if unit.criterion == "signal":
            statistic = statistic / sum(denominators) if sum(denominators) else math.nan
        # A NaN makes each of these false.
        evidence = statistic < math.inf and sum(magnitudes) < math.inf and min(magnitudes) > 0
        if evidence and (unit.criterion != "weight_change" or statistic > 0):
            statistics[unit] = statistic
    return statistics


def _measure(groups: list[StepGroup], table: FreezeTable, t: int) -> Sums:
    """The sums of all statistics that are known before the update."""
    sums: Sums = {u: [] for u in table.units if u.decided_at == NEVER}
    for group in groups:
        for i, unit in enumerate(group.units):
            if unit not in sums or unit.criterion == "weight_change":
                continue
            # Half precision is widened before the difference, and every sum runs in float64:
            # over 1e8 elements a float32 sum would depend on how it is split.
            p = group.params[i]
            grad = _widened(_local(group.grads[i], p))
            magnitude = _abs_sum(grad)
            zero = torch.zeros_like(magnitude)
            if unit.criterion == "norm":
                row = magnitude, zero, magnitude
            elif unit.criterion == "change":
                prev_grad = group.prev_grads[i]
                if prev_grad is None or unit.prev_step != t - 1:
                    continue
                row = _abs_sum(grad - _widened(_local(prev_grad, p))), zero, magnitude
            else:
                step = group.state_steps[i].item()
                if step == 0:
                    continue
                m = _widened(_local(group.exp_avgs[i], p))
                if unit.criterion == "momentum":
                    row = _abs_sum((-grad if group.maximize else grad) - m), zero, magnitude
                else:  # "signal"
                    root = _abs_sum(_widened(_local(group.exp_avg_sqs[i], p)).sqrt())
                    bias_correction1 = 1 - float(group.beta1) ** step
                    bias_correction2 = 1 - float(group.beta2) ** step
                    row = (
                        _abs_sum(m) / bias_correction1,
                        root / math.sqrt(bias_correction2),
                        magnitude,
                    )
            sums[unit].append(row)
    return sums


def _weights(
    groups: list[StepGroup], table: FreezeTable
) -> list[tuple[Unit, Tensor, Tensor, Tensor]]:
    """Of every tensor measured by "weight_change": unit, weight, a copy of it, gradient."""
    return [
        (unit, p, p.detach().clone(), grad)
        for group in groups
        for unit, p, grad in zip(group.units, group.params, group.grads, strict=True)
        if unit is not None and unit.criterion == "weight_change" and unit.decided_at == NEVER
    ]


def _add_weight_changes(sums: Sums, weights: list[tuple[Unit, Tensor, Tensor, Tensor]]) -> None:
    for unit, p, before, grad in weights:
        change = _abs_sum(_widened(_local(p.detach(), p)) - _widened(_local(before, p)))
        magnitude = _abs_sum(_widened(_local(grad, p)))
        sums[unit].append((change, torch.zeros_like(change), magnitude))


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
    for group in groups:
        for unit, prev_grad, grad in zip(group.units, group.prev_grads, group.grads, strict=True):
            if unit is not None and prev_grad is not None and unit.decided_at == NEVER:
                prev_grad.copy_(grad)
    note_kept(groups, t)


def note_kept(groups: list[StepGroup], t: int) -> None:
    """Write down of which undecided units all gradients of step t have been stored."""
    kept: dict[Unit, int] = {}
    for group in groups:
        for unit, prev_grad in zip(group.units, group.prev_grads, strict=True):
            if unit is not None and prev_grad is not None and unit.decided_at == NEVER:
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


def _local(x: Any, p: Any) -> Tensor:
    """Of a DTensor the part that lies on this rank, cut as the parameter is; others as they are."""
    if not hasattr(x, "to_local"):
        return x
    if x.placements != p.placements:
        x = x.redistribute(placements=p.placements)
    return x.to_local()


def _abs_sum(x: Tensor) -> Tensor:
    return x.abs().sum(dtype=torch.float64)


def _together(scalars: list[Tensor]) -> Tensor:
    return torch.stack([x.to(scalars[0].device) for x in scalars])


def _read_back(scalars: list[Any]) -> list[float]:
    if scalars and isinstance(scalars[0], Tensor):
        return _together(scalars).tolist()
    return scalars
