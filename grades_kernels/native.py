"""The door to the C++ op for CPU tensors (csrc/), which is loaded when it is first asked for.

The op does the arithmetic of a step in one pass over all tensors. Its formulas and their order are
the reference's, each operation rounded by itself in fp32 (fp64 where a tensor is fp64); narrower
dtypes are rounded once, when they are stored. What a measurement leads to is decided by the code
that the reference uses.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .freezing import NEVER, STATISTICS, FreezeTable
from .reference import Sums, judge, note_kept

if TYPE_CHECKING:
    from .functional import StepGroup

# What csrc/grades_adamw.cpp is to do with a tensor: one statistic plus any of the tasks.
_STATISTIC = {name: code for code, name in enumerate(STATISTICS, 1)}
_STATISTICS = 7  # the bits of the statistic
_UPDATE, _KEEP, _UNSCALE, _AMSGRAD = 8, 16, 32, 64

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def why_not_loaded() -> str | None:
    """Load the op; what kept it from being loaded, or None."""
    spec = importlib.util.find_spec("grades_kernels._native")
    if spec is None or spec.origin is None:
        return (
            "the native op is not built (it needs torch 2.10, a C++ compiler and "
            "`pip install --no-build-isolation`)"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the native op cannot be loaded ({str(error).splitlines()[0]})"
    torch.library.register_fake("grades_kernels::adamw_", lambda *args: None)
    return None


def why_not_native(params: list[Tensor]) -> str | None:
    """What keeps the native op from serving these parameters; None: nothing does."""
    if not params:
        return "there are no parameters"
    devices = {p.device.type for p in params}
    if devices != {"cpu"}:
        return f"the native op runs on 'cpu' alone, not on {sorted(devices)}"
    dtypes = {p.dtype for p in params} - set(DTYPES)
    if dtypes:
        return f"the native op has no {', '.join(sorted(map(str, dtypes)))}"
    if not all(map(_is_plain, params)):
        return "a parameter is a DTensor, another subclass, or an expanded view"
    return why_not_loaded()


def clone() -> str:
    """The instruction set that the op runs with: "avx512", "avx2" or "portable"."""
    return torch.ops.grades_kernels.clone()


def _is_plain(p: Tensor) -> bool:
    if type(p) not in (Tensor, torch.nn.Parameter) or p.layout != torch.strided:
        return False
    return p.is_contiguous() or all(map(bool, p.stride()))


def _fused_native_grades_adamw(
    groups: list[StepGroup],
    table: FreezeTable,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """As the reference, in one pass over memory, or two where a check comes before the update.

    Args:
        grad_scale: Gradients are divided by it first, in place, those of frozen tensors excepted.
        found_inf: Not zero: nothing happens, and the step does not count.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    t = table.begin_step()
    check, late = table.rule.checks(t), table.rule.freeze_timing == "next_step"
    scale = 1.0 if grad_scale is None else float(grad_scale)
    unscale = 0 if grad_scale is None else _UNSCALE

    measuring = _measuring(groups, t) if check else []
    if check and not late:
        tasks = [task and task | unscale for task in measuring]
        rows = [k for k, group in enumerate(groups) for _ in group.units]
        hypers = [x for group in groups for x in _hyper(group, 1.0)]
        judge(table, _sums(groups, table, tasks, _run(groups, tasks, rows, hypers, scale)))

    tasks, rows, hypers = _updating(groups, table)
    if check and late:
        tasks = [a | b for a, b in zip(tasks, measuring, strict=True)]
    if table.rule.checks(t + 1):
        tasks = [a | b for a, b in zip(tasks, _keeping(groups), strict=True)]
    if unscale:
        done = [0] * len(tasks) if late or not check else measuring
        tasks = [a and a | (0 if b else unscale) for a, b in zip(tasks, done, strict=True)]
    values = _run(groups, tasks, rows, hypers, scale)

    if check and late:
        judge(table, _sums(groups, table, measuring, values))
    if table.rule.checks(t + 1):
        note_kept(groups, t)


def _measuring(groups: list[StepGroup], t: int) -> list[int]:
    """Per tensor the number of the statistic to be measured, or 0."""
    return [
        _STATISTIC[unit.criterion]
        if unit is not None
        and unit.decided_at == NEVER
        and (unit.criterion != "change" or (prev is not None and unit.prev_step == t - 1))
        else 0
        for group in groups
        for unit, prev in zip(group.units, group.prev_grads, strict=True)
    ]


def _updating(
    groups: list[StepGroup], table: FreezeTable
) -> tuple[list[int], list[int], list[float]]:
    """Per tensor its task and the number of its hyper-parameters, and all of these one by one."""
    tasks: list[int] = []
    rows: list[int] = []
    hypers: list[list[float]] = []
    unmonitored = table.lr_factor(None)
    for group in groups:
        task = _UPDATE | _AMSGRAD if group.amsgrad else _UPDATE
        if not any(group.units):  # what plain AdamW does in every step: no loop in Python
            tasks += [task] * len(group.units)
            rows += [len(hypers)] * len(group.units)
            hypers.append(_hyper(group, unmonitored))
            continue
        row_of: dict[float, int] = {}
        for unit in group.units:
            factor = unmonitored if unit is None else table.lr_factor(unit)
            if factor not in row_of:
                row_of[factor] = len(hypers)
                hypers.append(_hyper(group, factor))
            rows.append(row_of[factor])
            tasks.append(0 if unit is not None and unit.frozen_at != NEVER else task)
    return tasks, rows, [x for hyper in hypers for x in hyper]


def _keeping(groups: list[StepGroup]) -> list[int]:
    return [
        _KEEP if unit is not None and prev is not None and unit.decided_at == NEVER else 0
        for group in groups
        for unit, prev in zip(group.units, group.prev_grads, strict=True)
    ]


def _hyper(group: StepGroup, factor: float) -> list[float]:
    """In the op's order; as Python floats, since fp32 would change 1 - beta2."""
    numbers = (group.lr, group.beta1, group.beta2, group.eps, group.weight_decay)
    lr, *others = map(float, numbers)
    return [lr * factor, *others, -1.0 if group.maximize else 1.0]


def _run(
    groups: list[StepGroup],
    tasks: list[int],
    rows: list[int],
    hypers: list[float],
    grad_scale: float,
) -> list[list[float] | None]:
    """One call of the op on all tensors with a task; returns the three sums of each of these."""
    if not any(tasks):
        return [None] * len(tasks)

    everything, kinds = all(tasks), set(tasks)

    def column(name: str) -> list[Tensor]:
        whole = chain.from_iterable(getattr(group, name) for group in groups)
        return list(whole if everything else compress(whole, tasks))

    max_exp_avg_sqs: list[Tensor] = []
    if any(kind & _AMSGRAD for kind in kinds):
        maxima: list[Tensor | None] = []
        for group in groups:
            maxima += group.max_exp_avg_sqs if group.amsgrad else [None] * len(group.params)
        max_exp_avg_sqs = _used(maxima, [task & _AMSGRAD for task in tasks])
    prev_grads: list[Tensor] = []
    if any(map(_uses_prev_grad, kinds)):
        buffers = [x for group in groups for x in group.prev_grads]
        prev_grads = _used(buffers, [_uses_prev_grad(task) for task in tasks])
    params, exp_avgs, exp_avg_sqs = column("params"), column("exp_avgs"), column("exp_avg_sqs")
    grads = positive = column("grads")
    # The op reads memory, which a lazily negated tensor (such as the imaginary part of a conjugate)
    # holds with the other sign.
    if any(map(Tensor.is_neg, grads)):
        positive = [g.resolve_neg() for g in grads]
    chosen = tasks if everything else [task for task in tasks if task]
    sums = torch.empty((len(chosen), 3), dtype=torch.float64, device="cpu")
    torch.ops.grades_kernels.adamw_.default(
        params,
        positive,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        prev_grads,
        column("state_steps"),
        sums,
        chosen,
        rows if everything else list(compress(rows, tasks)),
        hypers,
        grad_scale,
    )
    if positive is not grads:
        for grad, read, task in zip(grads, positive, chosen, strict=True):
            if read is not grad and task & _UNSCALE:
                grad.copy_(read)
    # Autograd compares versions to notice that what it saved has been overwritten.
    updated = [task & _UPDATE for task in chosen]
    for written in (params, exp_avgs, exp_avg_sqs):
        torch.autograd.graph.increment_version(
            written if all(updated) else list(compress(written, updated))
        )
    if not any(kind & _STATISTICS for kind in kinds):
        return [None] * len(tasks)
    rows_of_sums = iter(sums.tolist())
    return [next(rows_of_sums) if task else None for task in tasks]


def _used(tensors: list[Tensor | None], uses: Sequence[int]) -> list[Tensor]:
    return [x for x, used in zip(tensors, uses, strict=True) if x is not None and used]


def _uses_prev_grad(task: int) -> bool:
    return bool(task & _KEEP) or task & _STATISTICS == _STATISTIC["change"]


def _sums(
    groups: list[StepGroup],
    table: FreezeTable,
    measuring: list[int],
    values: list[list[float] | None],
) -> Sums:
    sums: Sums = {unit: [] for unit in table.units if unit.decided_at == NEVER}
    units = (unit for group in groups for unit in group.units)
    for unit, task, row in zip(units, measuring, values, strict=True):
        if task and unit is not None and row is not None:
            sums[unit].append((row[0], row[1], row[2]))
    return sums
