"""The tasks of a step in plain PyTorch: the fallback, and the oracle of every other backend.

The arithmetic of the update is torch's own `torch.optim.adamw.adamw`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..freezing.table import STATISTICS
from .tasks import KEEP, STATISTIC_BITS, UPDATE, GroupOptions, StepTensors

_LEAST_STEPS = {statistic.code: statistic.least_steps for statistic in STATISTICS.values()}
_CHANGE, _NORM, _MOMENTUM, _SIGNAL, _WEIGHT_CHANGE, _GAIN = (
    STATISTICS[name].code
    for name in ("change", "norm", "momentum", "signal", "weight_change", "gain")
)


def run_tasks(
    tensors: StepTensors, tasks: list[int], lr_factors: list[float], grad_scale: Tensor | None
) -> Tensor | None:
    """As `tasks` describes. Reads the sums back from the device, which is a synchronisation."""
    sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    weights: dict[int, Tensor] = {}
    first = 0
    for options, n in tensors.groups:
        for i in range(first, first + n):
            statistic = tasks[i] & STATISTIC_BITS
            if statistic == _WEIGHT_CHANGE:
                weights[i] = tensors.params[i].detach().clone()
            elif statistic:
                sums[i] = _measure(tensors, i, statistic, options)
        chosen = [i for i in range(first, first + n) if tasks[i] & UPDATE]
        if chosen:
            _update(tensors, options, chosen, lr_factors, grad_scale)
        first += n
    for i, before in weights.items():
        p, grad = tensors.params[i].detach(), tensors.grads[i]
        change = _abs_sum(_widened(p) - _widened(before))
        sums[i] = change, torch.zeros_like(change), _abs_sum(_widened(grad))
    for task, prev_grad, grad in zip(tasks, tensors.prev_grads, tensors.grads, strict=True):
        if task & KEEP and prev_grad is not None and grad is not None:
            prev_grad.copy_(grad)
    if not sums:
        return None
    device = next(iter(sums.values()))[0].device
    measured = torch.stack([x.to(device) for row in sums.values() for x in row]).cpu().view(-1, 3)
    result = torch.zeros((len(tasks), 3), dtype=torch.float64, device="cpu")
    result[list(sums)] = measured.double()
    return result


def _measure(
    tensors: StepTensors, i: int, statistic: int, options: GroupOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator, denominator and sum of |g| of a statistic that is known before the update."""
    # Half precision is widened before the difference, and every sum runs in float64: over 1e8
    # elements a float32 sum would depend on how it is split.
    grad = _widened(tensors.grads[i])
    magnitude = _abs_sum(grad)
    zero = torch.zeros_like(magnitude)
    if statistic == _NORM:
        return magnitude, zero, magnitude
    if statistic == _CHANGE:
        return _abs_sum(grad - _widened(tensors.prev_grads[i])), zero, magnitude
    step = tensors.state_steps[i].item()
    if step < _LEAST_STEPS[statistic]:
        return torch.full_like(zero, math.nan), zero, magnitude
    m = _widened(tensors.exp_avgs[i])
    signed = -grad if options.maximize else grad
    if statistic == _MOMENTUM:
        return _abs_sum(signed - m), zero, magnitude
    v = _widened(tensors.exp_avg_sqs[i])
    beta1 = float(options.beta1)
    bias_correction2 = 1 - float(options.beta2) ** step
    if statistic == _GAIN:
        denominator = v.sqrt() / math.sqrt(bias_correction2) + options.eps
        gain = _sum(signed * m / denominator)
        return gain / (1 - beta1**step), zero, magnitude
    # The share of the gradient's variance that is left in exp_avg when gradients are pure noise.
    noise = (1 - beta1) / (1 + beta1) * (1 - beta1 ** (2 * step))
    return _sum(m.square()) / noise, _sum(v) / bias_correction2, magnitude


def _update(
    tensors: StepTensors,
    options: GroupOptions,
    chosen: list[int],
    lr_factors: list[float],
    grad_scale: Tensor | None,
) -> None:
    """AdamW on the chosen tensors of a group, those of one learning-rate factor together."""
    grads: list[Any] = tensors.grads  # a tensor without a gradient gets no task
    by_factor: dict[float, list[int]] = {}
    for i in chosen:
        by_factor.setdefault(lr_factors[i], []).append(i)
    for factor, alike in by_factor.items():
        lr = options.lr if factor == 1.0 else options.lr * factor
        mixed = {i for i in alike if grads[i].dtype != tensors.params[i].dtype}
        plain = [i for i in alike if i not in mixed] if mixed else alike
        if plain:
            _adamw(options, lr, grad_scale, *_columns(tensors, options, plain))
        for i in sorted(mixed):
            _adamw_mixed(tensors, options, lr, i)


def _adamw_mixed(tensors: StepTensors, options: GroupOptions, lr: float | Tensor, i: int) -> None:
    """AdamW in the wider dtype for a gradient whose dtype is not its parameter's.

    torch's own AdamW raises a dtype mismatch here (an fp32 gradient on a bf16 parameter).
    """
    columns = _columns(tensors, options, [i])
    dtype = torch.promote_types(tensors.params[i].dtype, columns[1][0].dtype)
    wide = [[x.to(dtype) for x in column] for column in columns[:-1]]
    _adamw(options, lr, None, *wide, columns[-1])
    for column, wide_column in zip(columns, wide, strict=False):
        for x, wide_x in zip(column, wide_column, strict=True):
            if x is not tensors.grads[i]:
                x.copy_(wide_x)


def _adamw(
    options: GroupOptions, lr: float | Tensor, grad_scale: Tensor | None, *columns: Any
) -> None:
    """torch's AdamW on the lists of tensors that `_columns` returns."""
    # In a CUDA graph many small kernels would be replayed: there torch chooses, as its AdamW does.
    foreach = options.foreach if options.capturable else bool(options.foreach)
    fused = options.fused if options.capturable else False
    own: dict[str, Any] = options._replace(lr=lr, foreach=foreach, fused=fused)._asdict()
    own |= {"grad_scale": grad_scale, "has_complex": any(map(torch.is_complex, columns[0]))}
    adamw(*columns, **own)


def _columns(tensors: StepTensors, options: GroupOptions, chosen: list[int]) -> list[list[Any]]:
    """The tensor lists that AdamW takes, for the chosen positions."""
    maxima = tensors.max_exp_avg_sqs if options.amsgrad else []
    columns: list[list[Any]] = [*tensors[:4], maxima, tensors.state_steps]
    return [[column[i] for i in chosen] if column else [] for column in columns]


def _widened(x: Any) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _abs_sum(x: Tensor) -> Tensor:
    return _sum(x.abs())


def _sum(x: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return x.sum(dtype=torch.float32 if x.device.type == "mps" else torch.float64)
