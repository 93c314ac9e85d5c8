"""The interface of a backend: the tensors of a step, and the tasks for each of them.

A backend that the host drives is one function,

    run_tasks(tensors, tasks, lr_factors, grad_scale) -> sums

with `tasks` one number per tensor: the code of a statistic to measure, plus any of the flags
UPDATE (AdamW), KEEP (store the gradient in `prev_grad`) and UNSCALE (divide the gradient by
`grad_scale`, in place); 0 leaves the tensor alone. `lr_factors` has one factor of the learning rate
per tensor. `sums` is None where nothing was measured, else a float64 CPU tensor of shape [n, 3]:
the numerator of the statistic, its denominator (0 unless it is a ratio), and the sum of |g|; three
zeros for a tensor that was not measured. The numerator is NaN where the moments have not seen as
many gradients as the statistic needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

STATISTIC_BITS = 7
"""The bits of a task that are the code of a statistic, see `freezing.table.STATISTICS`."""
UPDATE, KEEP, UNSCALE = 8, 16, 32


class GroupOptions(NamedTuple):
    """The hyper-parameters and flags of a parameter group, as in `torch.optim.adamw.adamw`."""

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
    fused: bool | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> GroupOptions:
        beta1, beta2 = group["betas"]
        return cls(group["lr"], beta1, beta2, *[group[name] for name in cls._fields[3:]])


class StepTensors(NamedTuple):
    """The tensors of one step, in lists of one length, group by group.

    `grads[i]` is None for a tensor without a gradient, `prev_grads[i]` for one that needs no
    previous gradient, `max_exp_avg_sqs[i]` without amsgrad. `groups` has the options of each group
    and the number of its tensors. All are plain tensors: in place of a DTensor stands its local
    shard, and `dtensors` has the positions and the DTensors of such parameters.

    `unordered` has the positions of the gradients that are lazily negated or may lie in another
    order than their parameters; None: nobody has looked yet.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor | None]
    prev_grads: list[Tensor | None]
    state_steps: list[Tensor]
    groups: list[tuple[GroupOptions, int]]
    dtensors: Sequence[tuple[int, Any]] = ()
    unordered: list[int] | None = None


RunTasks = Callable[[StepTensors, list[int], list[float], Tensor | None], Tensor | None]
