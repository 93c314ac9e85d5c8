"""The functional form of the optimizer, as `torch.optim.adamw.adamw` is of `torch.optim.AdamW`."""

from __future__ import annotations

from torch import Tensor

from .backends.host_step import Engine, HostEngine, no_threads_after_fork, read_back, step_engines
from .backends.select import choose, run_tasks_of, share_memory
from .backends.step_tensors import check_capturable, with_local_shards
from .backends.tasks import GroupOptions, StepTensors
from .freezing.table import STATISTICS, FreezeConfig, FreezeTable, Unit


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

    Takes the arguments of `torch.optim.adamw.adamw`, in its order, and does the same when `table`
    is None. Parameters, moments and steps are updated in place, the freeze table as well.

    Args:
        prev_grads: Per tensor a buffer of the gradient's shape for the statistic "change", else
            None. Written at the step before a check.
        units: Per tensor the row of `table` that it belongs to, or None: not monitored.
        table: The freeze table (`grades_kernels.freezing.table`); one call is one step of it.

    Raises:
        AssertionError: For `capturable=True` on a device that does not support it.
        RuntimeError: If `fused` is True and no fused backend can serve the tensors.
        ValueError: If a unit is no row of the table, one that measures "change" comes without a
            `prev_grads` buffer, or one that measures "weight_change" with another timing than
            "next_step", and for DTensors with a table.
    """
    prev_grads = prev_grads if prev_grads is not None else [None] * len(params)
    units = units if units is not None else [None] * len(params)
    if table is not None and any(hasattr(p, "device_mesh") for p in params):
        raise ValueError(
            "params has DTensors, whose statistics need all ranks: use GradESAdamW or table=None."
        )
    table = table if table is not None else FreezeTable(FreezeConfig())
    rows = set(table.units)
    members: dict[Unit, list[Tensor]] = {}
    for unit, p, prev_grad in zip(units, params, prev_grads, strict=True):
        if unit is not None:
            if unit not in rows:
                raise ValueError(
                    f"unit {unit.name!r} is no row of the table: pass a FreezeTable with every "
                    "unit in it, or None in place of the unit."
                )
            if unit.uses_prev_grad and prev_grad is None:
                raise ValueError(
                    f"unit {unit.name!r} measures {unit.statistic!r} but has no prev_grads buffer: "
                    "pass a tensor of the gradient's shape and dtype, or use 'norm' or 'momentum'."
                )
            if STATISTICS[unit.statistic].of_update and table.config.freeze_timing != "next_step":
                raise ValueError(
                    f"unit {unit.name!r} measures {unit.statistic!r}, which needs a table whose "
                    "config has freeze_timing='next_step'."
                )
            members.setdefault(unit, []).append(p)
    if capturable:
        for p in params:
            check_capturable(p)
    flags = amsgrad, maximize, foreach, capturable, differentiable, fused
    options = GroupOptions(lr, beta1, beta2, eps, weight_decay, *flags)
    shared = share_memory(params)
    backend = choose(params, fused, options, units=members.values(), shares_memory=shared)
    devices = {p.device for p in params}
    if backend == "triton" and len(devices) > 1:
        if fused:
            raise RuntimeError(
                "fused=True is not possible: the parameters are on several devices, "
                f"{sorted(map(str, devices))}. Use GradESAdamW, which has an engine for each, or "
                "fused=None."
            )
        backend = "reference"
    tensors = StepTensors(
        params,
        list(grads),
        exp_avgs,
        exp_avg_sqs,
        list(max_exp_avg_sqs) if amsgrad else [None] * len(params),
        [
            prev_grad if unit is not None and unit.needs_prev_grad else None
            for unit, prev_grad in zip(units, prev_grads, strict=True)
        ],
        state_steps,
        [(options, len(params))],
    )
    dtensors = [i for i, p in enumerate(params) if hasattr(p, "_spec") and not differentiable]
    if dtensors:
        placed = with_local_shards(tensors, dtensors)
        if placed is None:
            raise ValueError(
                "a gradient or a moment of a DTensor is none, or a moment is placed otherwise."
            )
        tensors = placed
    engine: Engine
    if backend == "triton":
        from .backends.triton_engine import TritonEngine

        engine = TritonEngine(tensors, units, devices.pop())
    else:
        unscales = backend == "native" or bool(capturable and fused)
        engine = HostEngine(run_tasks_of([backend]), tensors, units, unscales=unscales)
    with no_threads_after_fork():
        step_engines([engine], table, None, grad_scale, found_inf)
        read_back([engine], table, None)
