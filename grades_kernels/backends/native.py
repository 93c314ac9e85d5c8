"""The tasks of a step by the C++ op for CPU tensors (csrc/), which is loaded on its first use.

The op does the arithmetic of a step in one pass over all tensors. Its formulas and their order are
the reference's, each operation rounded by itself in fp32 (fp64 where a tensor is fp64); narrower
dtypes are rounded once, when they are stored.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..freezing.table import STATISTICS
from ..state_tensors import is_plain, local
from .tasks import KEEP, STATISTIC_BITS, UNSCALE, UPDATE, StepTensors

_USE_PREV_GRAD = {x.code for x in STATISTICS.values() if x.uses_prev_grad}
_AMSGRAD = 64  # a flag of the op alone: the groups' options have it

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def why_not_loaded() -> str | None:
    """Load the op; the reason why it cannot be loaded, or None."""
    spec = importlib.util.find_spec("grades_kernels._native")
    if spec is None or spec.origin is None:
        return (
            f"the native op is not built in {Path(__file__).parent.parent} (it needs torch 2.10, a "
            "C++ compiler and `pip install --no-build-isolation`; in a checkout, with `-e`)"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the native op cannot be loaded ({str(error).splitlines()[0]})"
    torch.library.register_fake("grades_kernels::adamw_", lambda *args: None)
    return None


def why_not_native(params: Sequence[Tensor]) -> str | None:
    """The reason why the native op cannot serve these parameters, or None."""
    devices = {p.device.type for p in params}
    if devices != {"cpu"}:
        return f"the native op runs on 'cpu' alone, not on {sorted(devices)}"
    dtypes = {p.dtype for p in params} - set(DTYPES)
    if dtypes:
        return f"the native op has no {', '.join(sorted(map(str, dtypes)))}"
    if not all(map(_is_readable, map(local, params))):
        return "a parameter is a tensor subclass with operations of its own, or an expanded view"
    return why_not_loaded()


def cpu_capability() -> str:
    """The instruction set that the op runs with: "avx512", "avx2" or "portable"."""
    return torch.ops.grades_kernels.cpu_capability()


def _is_readable(p: Tensor) -> bool:
    if not is_plain(p) or p.layout != torch.strided:
        return False
    return p.is_contiguous() or all(map(bool, p.stride()))


def run_tasks(
    tensors: StepTensors, tasks: list[int], lr_factors: list[float], grad_scale: Tensor | None
) -> Tensor | None:
    """As `tasks` describes: one call of the op on all tensors with a task."""
    if not any(tasks):
        return None
    chosen, rows, hypers = _chosen(tensors, tasks, lr_factors)
    everything, kinds = all(chosen), set(chosen)

    def column(whole: list[Any], flags: Sequence[int] = chosen) -> list[Tensor]:
        return whole if everything and flags is chosen else list(compress(whole, flags))

    max_exp_avg_sqs: list[Tensor] = []
    if any(kind & _AMSGRAD for kind in kinds):
        max_exp_avg_sqs = column(tensors.max_exp_avg_sqs, [task & _AMSGRAD for task in chosen])
    prev_grads: list[Tensor] = []
    uses_prev_grad = {x: x & KEEP or x & STATISTIC_BITS in _USE_PREV_GRAD for x in kinds}
    if any(uses_prev_grad.values()):
        prev_grads = column(tensors.prev_grads, [uses_prev_grad[task] for task in chosen])
    params, grads = column(tensors.params), column(tensors.grads)
    exp_avgs, exp_avg_sqs = column(tensors.exp_avgs), column(tensors.exp_avg_sqs)
    positive = grads
    # The op reads memory, in which a lazily negated tensor (such as the imaginary part of a
    # conjugate) has the other sign.
    if tensors.unordered != [] and any(map(Tensor.is_neg, grads)):
        positive = [g.resolve_neg() for g in grads]
    own_tasks = chosen if everything else [task for task in chosen if task]
    sums = torch.empty((len(own_tasks), 3), dtype=torch.float64, device="cpu")
    torch.ops.grades_kernels.adamw_.default(
        params,
        positive,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        prev_grads,
        column(tensors.state_steps),
        sums,
        own_tasks,
        rows if everything else list(compress(rows, chosen)),
        hypers,
        1.0 if grad_scale is None else float(grad_scale),
    )
    if positive is not grads:
        for grad, read, task in zip(grads, positive, own_tasks, strict=True):
            if read is not grad and task & UNSCALE:
                grad.copy_(read)
    # Autograd compares versions to notice that a tensor which it saved has been overwritten.
    updated = [task & UPDATE for task in own_tasks]
    for written in (params, exp_avgs, exp_avg_sqs):
        torch.autograd.graph.increment_version(
            written if all(updated) else list(compress(written, updated))
        )
    if not any(kind & STATISTIC_BITS for kind in kinds):
        return None
    if everything:
        return sums
    all_sums = torch.zeros((len(tasks), 3), dtype=torch.float64, device="cpu")
    all_sums[[i for i, task in enumerate(chosen) if task]] = sums
    return all_sums


def _chosen(
    tensors: StepTensors, tasks: list[int], lr_factors: list[float]
) -> tuple[list[int], list[int], list[float]]:
    """Per tensor its task for the op and the row of its hyper-parameters, and all rows in one list.

    Groups of one factor, as in nearly every step, take no loop over their tensors in Python.
    """
    chosen: list[int] = []
    rows: list[int] = []
    hypers: list[float] = []
    n_rows = first = 0
    for options, n in tensors.groups:
        own, factors = tasks[first : first + n], lr_factors[first : first + n]
        first += n
        chosen += [task and task | _AMSGRAD for task in own] if options.amsgrad else own
        kinds = {factor: n_rows + k for k, factor in enumerate(dict.fromkeys(factors))}
        rows += [n_rows] * n if len(kinds) == 1 else [kinds[factor] for factor in factors]
        n_rows += len(kinds)
        # In the op's order; as Python floats, since fp32 would change 1 - beta2.
        lr, *others = map(float, options[:5])
        for factor in kinds:
            hypers += [lr * factor, *others, -1.0 if options.maximize else 1.0]
    return chosen, rows, hypers
