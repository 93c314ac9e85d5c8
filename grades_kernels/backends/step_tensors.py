"""The tensors of a step: where they are found, and the tasks of each.

Finding 300 small tensors takes a third of the time that updating them takes on a CPU, and nearly
every step finds them at the same positions. So a layout stores the positions, and a step asks only
whether they are still right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..freezing.table import NEVER, STATISTICS, FreezeTable, Unit
from ..state_tensors import MOMENTS, gradient_dtype, local, placeholder, same_memory_order
from .tasks import KEEP, UPDATE, GroupOptions, StepTensors

Groups = Sequence[dict[str, Any]]
State = Mapping[Tensor, dict[str, Any]]
Units = Sequence[Unit | None]


class Outcome(NamedTuple):
    """The results of a step that the host did not wait for, read back.

    Attributes:
        values: The measured statistics, without the void ones.
        kept: The units of which all gradients were stored.
        decided: The units that the device decided; None where the host alone decides.
        happened: False where GradScaler had found an infinity, and nothing was written.
        ranks_agree: Whether all ranks took this step with the same freeze table.
        must_join: Whether some rank needs another exchange of units.
    """

    values: dict[Unit, float]
    kept: list[Unit]
    decided: set[Unit] | None = None
    happened: bool = True
    ranks_agree: bool = True
    must_join: bool = False


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that compares its arguments, other tensors, with these in one call.

    It returns True where types, dtypes, devices, shapes, strides and signs are the same, and False
    where something differs or this torch has no such guards. torch.compile compares the same before
    it uses compiled code again; comparing 300 tensors in Python takes four to five times as long.
    """
    # They are no public interface: another torch may lack them. A sparse tensor has no strides.
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):
        guards: Any = torch._C._dynamo.guards
        return guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(x.shape) for x in tensors],
            dynamic_dims_strides=[list(x.stride()) for x in tensors],
        ).check
    return _not_compared


def _not_compared(*tensors: Tensor) -> bool:
    return False


class Layout:
    """The positions of a step's tensors. It refers to parameters alone, to no gradient or state.

    A caller that moves moments to another device between two steps, or drops them, gets their
    memory back; so does a release.

    Args:
        groups, state: The optimizer's; tensors with state are part of the step.
        chosen: The parameters that this layout is for, with their units, per group.
    """

    def __init__(
        self, groups: Groups, state: State, chosen: Sequence[Sequence[tuple[Tensor, Unit | None]]]
    ) -> None:
        self.flags = _flags(groups)
        self.keys = list(state)
        position = {p: k for k, p in enumerate(self.keys)}
        self.params: list[Tensor] = []
        self.units: list[Unit | None] = []
        self.sizes: list[int] = []  # tensors per group
        self.without_state: list[Tensor] = []
        self.dtensors: list[int] = []
        for group, pairs in zip(groups, chosen, strict=True):
            n_before = len(self.params)
            for p, unit in pairs:
                released = unit is not None and unit.released_at != NEVER
                if not released and "exp_avg" in state.get(p, ()):
                    # A parameter that autograd differentiates stays a DTensor, as in torch's AdamW.
                    if hasattr(p, "_spec") and not group["differentiable"]:
                        self.dtensors.append(len(self.params))
                    self.params.append(p)
                    self.units.append(unit)
                elif not released:
                    self.without_state.append(p)
            self.sizes.append(len(self.params) - n_before)
        self.positions = [position[p] for p in self.params]
        self.has_all = self.positions == list(range(len(self.keys)))
        self.gradients = [(p.shape, gradient_dtype(p.grad, p), torch.strided) for p in self.params]
        self.with_prev_grad = [u if u and u.uses_prev_grad else None for u in self.units]
        self.has_prev_grads = any(unit is not None for unit in self.with_prev_grad)
        self.kinds = list(map(_kind, self.params))
        self.like_params = self.like_grads = _not_compared  # the first step looks
        self.unordered: list[int] | None = []
        self.is_cacheable = not any(group["differentiable"] for group in groups)

    def is_valid(self, groups: Groups, state: State) -> bool:
        """Whether a search would find the same parameters and their state at the same positions.

        `model.to(...)` moves and casts the very tensors that the optimizer refers to.
        """
        return (
            self.is_cacheable
            and self.flags == _flags(groups)
            and self._has_same_params()
            and len(state) == len(self.keys)
            and all(map(is_, state, self.keys))
            and all([p.grad is None for p in self.without_state])
        )

    def _has_same_params(self) -> bool:
        if not self.like_params(*self.params):
            if self.kinds != list(map(_kind, self.params)):
                return False
            self.like_params = alike(self.params)
        return True

    def _has_gradients_like(self, like: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
        """Whether the gradients have the expected form, which the tensors `like` them show too."""
        if not self.like_grads(*like):
            if not all(
                [
                    g is None or (g.shape, g.dtype, g.layout) == form
                    for g, form in zip(grads, self.gradients, strict=True)
                ]
            ):
                return False
            self.like_grads = alike(like)
            self.unordered = None if self.dtensors else _unordered(like, self.params)
        return True

    def collect(self, groups: Groups, state: State, *, prev_grads: bool) -> StepTensors | None:
        """The tensors of the next step; None where one is missing or does not fit.

        `prev_grads` is whether the step reads or writes previous gradients.
        """
        states = list(state.values())
        own = states if self.has_all else [states[k] for k in self.positions]
        none: list[Any] = [None] * len(own)
        maxima = previous = none
        try:
            exp_avgs = [s["exp_avg"] for s in own]
            grads = [p.grad for p in self.params]
            # The moment of a tensor without a gradient is like one.
            like: Sequence[Any] = grads
            if any([g is None for g in grads]):
                like = [m if g is None else g for g, m in zip(grads, exp_avgs, strict=True)]
            if not self._has_gradients_like(like, grads):
                return None
            if any(group["amsgrad"] for group in groups):
                amsgrads = [
                    g["amsgrad"] for g, n in zip(groups, self.sizes, strict=True) for _ in range(n)
                ]
                maxima = [
                    s["max_exp_avg_sq"] if amsgrad else None
                    for s, amsgrad in zip(own, amsgrads, strict=True)
                ]
            if self.has_prev_grads:
                previous = [
                    s["prev_grad"] if unit is not None and unit.decided_at == NEVER else None
                    for s, unit in zip(own, self.with_prev_grad, strict=True)
                ]
            tensors = StepTensors(
                list(self.params),
                grads,
                exp_avgs,
                [s["exp_avg_sq"] for s in own],
                maxima,
                previous,
                [s["step"] for s in own],
                [(GroupOptions.of(group), n) for group, n in zip(groups, self.sizes, strict=True)],
                unordered=self.unordered,
            )
        except KeyError:
            return None
        if prev_grads and self.has_prev_grads:
            buffers = [g if x is None else x for x, g in zip(previous, like, strict=True)]
            if not self.like_grads(*buffers) and not all(map(_fits, previous, grads)):
                return None
        return with_local_shards(tensors, self.dtensors) if self.dtensors else tensors


def with_local_shards(tensors: StepTensors, positions: Sequence[int]) -> StepTensors | None:
    """The same with local shards in place of the DTensors at these positions, gradients excepted.

    None where a gradient is no DTensor, or state is not placed as its parameter is.
    """
    dtensors: list[tuple[int, Any]] = [(i, tensors.params[i]) for i in positions]
    if any([type(tensors.grads[i]) is Tensor for i in positions]):
        return None
    names = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "prev_grads")
    columns: dict[str, Any] = {name: list(getattr(tensors, name)) for name in names}
    for column in columns.values():
        for i, p in dtensors:
            x = column[i]
            if x is None:
                continue
            if type(x) is Tensor:
                if x.numel() and x.shape == p.shape:
                    return None
                continue  # a placeholder
            if x._spec.placements != p._spec.placements:
                return None
            shard = x._local_tensor  # in place of a call of `local` for each
            column[i] = shard if type(shard) is Tensor else local(x)
    return tensors._replace(**columns, dtensors=dtensors)


def with_local_gradients(tensors: StepTensors) -> StepTensors:
    """The tensors of a step that is taken, with the local shards of all gradients, and their order.

    A gradient that is placed otherwise than its parameter is redistributed, which all ranks of its
    mesh do together: once a step, whatever else a rank has to look up.
    """
    if tensors.unordered is not None:
        return tensors
    grads: list[Any] = list(tensors.grads)
    for i, p in tensors.dtensors:
        g = grads[i]
        if g is None:
            continue
        if g._spec.placements != p._spec.placements:
            g = g.redistribute(p.device_mesh, p.placements)
        shard = g._local_tensor
        grads[i] = shard if type(shard) is Tensor else local(g)
    return tensors._replace(grads=grads, unordered=_unordered(grads, tensors.params))


def prepare_state(
    groups: Groups,
    state: State,
    chosen: Sequence[Sequence[tuple[Tensor, Unit | None]]],
    init_group: Callable[..., Any],
    *,
    prev_grads: bool,
    default_state: Mapping[str, Any],
) -> None:
    """Check all gradients, and make the state that the tensors of `chosen` (per group) lack.

    `init_group` is `Adam._init_group` of the optimizer, `default_state` the first state of a
    monitored tensor beside AdamW's. `prev_grads` as in `Layout.collect`.
    """
    check_gradients(groups)
    for group, pairs in zip(groups, chosen, strict=True):
        init_group({**group, "params": [p for p, _ in pairs]}, [], [], [], [], [], [])
        for p, unit in pairs:
            own = state.get(p)
            if own and hasattr(p, "_spec"):
                _place_as_parameter(own, p)
            if unit is None or not own or unit.released_at != NEVER:
                continue
            for key, value in default_state.items():
                own.setdefault(key, value)
            if not unit.needs_prev_grad:
                continue
            previous, grad = own.setdefault("prev_grad", placeholder(p)), p.grad
            if prev_grads and previous.shape != p.shape:
                like = p if grad is None or hasattr(p, "_spec") else grad
                own["prev_grad"] = torch.zeros_like(like, dtype=gradient_dtype(grad, p))
                unit.prev_step = NEVER  # a caller that clears the state removes the evidence too
            elif prev_grads and grad is not None and previous.dtype != grad.dtype:
                wide = torch.promote_types(previous.dtype, grad.dtype)
                own["prev_grad"] = previous.to(wide)


def _place_as_parameter(own: dict[str, Any], p: Any) -> None:
    """Bring the state of a DTensor to the ranks that have the parameter's elements."""
    for key in (*MOMENTS, "prev_grad"):
        x = own.get(key)
        if x is None or x.numel() == 0 or x.shape != p.shape:  # a placeholder
            continue
        if not hasattr(x, "_spec"):
            raise RuntimeError(
                f"{key} is a torch.Tensor, its parameter a DTensor: load checkpoints with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
            )
        if x.placements != p.placements:
            own[key] = x.redistribute(p.device_mesh, p.placements)


def fit_state(state: State, chosen: Sequence[Sequence[tuple[Tensor, Unit | None]]]) -> None:
    """Bring the state of tensors into the form that the Triton kernels read.

    Steps become fp32 on the parameter's device, moments and previous gradients get its strides,
    previous gradients the dtype of the gradient. `chosen` are parameters and units, per group.
    """
    for p, unit in (pair for pairs in chosen for pair in pairs):
        own = state.get(p)
        if not own or (unit is not None and unit.released_at != NEVER):
            continue
        own["step"] = own["step"].to(p.device, torch.float32)
        for key in MOMENTS:
            if key in own and not same_memory_order(local(own[key]), local(p)):
                own[key] = torch.empty_like(p, dtype=own[key].dtype).copy_(own[key])
        if unit is None or not unit.needs_prev_grad:
            continue
        previous, dtype = own["prev_grad"], gradient_dtype(p.grad, p)
        if previous.shape == p.shape and (
            previous.dtype != dtype
            or previous.device != p.device
            or not same_memory_order(local(previous), local(p))
        ):
            own["prev_grad"] = torch.empty_like(p, dtype=dtype).copy_(previous)


def check_readable(tensors: StepTensors, dtypes: Collection[torch.dtype]) -> None:
    """Raise a ValueError where the Triton kernels could not read a tensor; they know `dtypes`."""
    columns = ("state_steps", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "prev_grads")
    for n, (p, grad, m) in enumerate(zip(*tensors[:3], strict=True)):
        if grad is not None and not hasattr(grad, "_spec") and grad.shape != p.shape:
            raise ValueError(
                f"the gradient of tensor {n} has shape {tuple(grad.shape)}, the parameter "
                f"{tuple(p.shape)}."
            )
        grad_dtype = gradient_dtype(grad, p)
        for what, dtype in (("gradient", grad_dtype), ("exp_avg", m.dtype)):
            if dtype not in dtypes:
                raise ValueError(
                    f"the {what} of tensor {n} is {dtype}: the Triton kernels read "
                    f"{', '.join(map(str, dtypes))}. Use fused=False."
                )
        expected = {"state_steps": torch.float32, "prev_grads": grad_dtype}
        for name in columns:
            x = getattr(tensors, name)[n]
            if x is None or (name == "prev_grads" and not x.numel()):  # a placeholder
                continue
            dtype = expected.get(name, m.dtype)  # a launch knows one dtype of all moments
            in_order = x.shape == p.shape and same_memory_order(x, p)
            if x.device != p.device or x.dtype != dtype or not (in_order or name == "state_steps"):
                raise ValueError(
                    f"{name}[{n}] is {x.dtype} on {x.device} with shape {tuple(x.shape)} and "
                    f"strides {x.stride()}: the Triton kernels read {dtype} on {p.device}, and "
                    "moments and previous gradients in the parameter's shape and order, "
                    f"{tuple(p.shape)} and {p.stride()}. After moving the model, move the "
                    "optimizer's state as well: load_state_dict(state_dict())."
                )


def check_gradients(groups: Groups) -> None:
    """Raise for a gradient that AdamW cannot take, before anything has changed."""
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    "Adam does not support sparse gradients, please consider SparseAdam instead"
                )
            named = f"the gradient of parameter {j} of group {i}"
            if grad.shape != p.shape:
                raise ValueError(
                    f"{named} has shape {tuple(grad.shape)}, the parameter {tuple(p.shape)}."
                )
            if grad.device != p.device:
                raise ValueError(
                    f"{named} is on {grad.device}, the parameter on {p.device}: it was moved after "
                    "backward()."
                )
            if hasattr(p, "_spec") != hasattr(grad, "_spec"):
                raise ValueError(
                    f"{named} is a {type(grad).__name__}, the parameter a {type(p).__name__}."
                )
            if group["capturable"]:
                check_capturable(p)


def check_capturable(p: Tensor) -> None:
    from torch.optim.optimizer import _get_capturable_supported_devices

    supported = _get_capturable_supported_devices()
    if p.device.type not in supported:
        raise AssertionError(
            f"If capturable=True, params and state_steps must be on supported devices: {supported}."
        )


def prev_grads_are_due(table: FreezeTable) -> bool:
    """Whether the next step compares with previous gradients, or stores its own for later."""
    return table.config.is_check(table.t + 1) or table.config.is_check(table.t + 2)


def measure_tasks(tensors: StepTensors, units: Units, table: FreezeTable) -> list[int]:
    """Per tensor the code of the statistic to measure, or 0."""
    before = table.t - 1
    return [
        0
        if unit is None
        or grad is None
        or unit.decided_at != NEVER
        or (unit.prev_step != before and unit.uses_prev_grad)
        else STATISTICS[unit.statistic].code
        for unit, grad in zip(units, tensors.grads, strict=True)
    ]


def update_tasks(
    tensors: StepTensors, units: Units, table: FreezeTable
) -> tuple[list[int], list[float]]:
    """Per tensor UPDATE or 0, and the factor of its learning rate.

    A step in which nothing has been decided takes no loop in Python.
    """
    n = len(tensors.params)
    unmonitored = table.lr_factor(None)
    tasks, lr_factors = [UPDATE] * n, [unmonitored] * n
    if any([unit.decided_at != NEVER for unit in table.units]):
        for i, unit in enumerate(units):
            if unit is not None:
                tasks[i] = 0 if unit.is_frozen else UPDATE
                lr_factors[i] = table.lr_factor(unit)
    if any([g is None for g in tensors.grads]):
        tasks = [0 if g is None else task for g, task in zip(tensors.grads, tasks, strict=True)]
    return tasks, lr_factors


def keep_tasks(tensors: StepTensors, units: Units) -> list[int]:
    """Per tensor KEEP where its gradient is needed at the next step, or 0."""
    return [
        KEEP
        if unit is not None and prev is not None and grad is not None and unit.decided_at == NEVER
        else 0
        for unit, prev, grad in zip(units, tensors.prev_grads, tensors.grads, strict=True)
    ]


def _flags(groups: Groups) -> list[Any]:
    """Of every group, the settings on which the state of a step and its backend depend."""
    return [
        (g["amsgrad"], g["capturable"], g["foreach"], g["fused"], isinstance(g["lr"], Tensor))
        for g in groups
    ]


def _kind(p: Tensor) -> tuple[Any, ...]:
    return p.shape, p.dtype, p.device, p.stride() if p.layout == torch.strided else None


def _unordered(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[int]:
    """The positions of gradients that may have to be copied before a kernel can read their memory.

    They are of a class of their own, negated, or their elements may lie in another order.
    """
    pairs = enumerate(zip(grads, params, strict=True))
    return [
        n
        for n, (g, p) in pairs
        if g is not None and (type(g) is not Tensor or g.is_neg() or g.stride() != p.stride())
    ]


def _fits(previous: Tensor | None, grad: Tensor | None) -> bool:
    """Whether the buffer for previous gradients, if there is one, can take this gradient."""
    if previous is None or grad is None:
        return True
    if previous.dtype != grad.dtype:
        return torch.promote_types(previous.dtype, grad.dtype) == previous.dtype
    return previous.shape == grad.shape
