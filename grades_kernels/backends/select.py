"""Which backend serves which parameter group, or why none can."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..freezing.table import Unit
from ..state_tensors import is_plain, local
from . import native, reference
from .native import why_not_native
from .tasks import GroupOptions, RunTasks, StepTensors

HOST_BACKENDS: dict[str, RunTasks] = {"native": native.run_tasks, "reference": reference.run_tasks}
"""The backends that the host drives."""


def choose(
    params: Sequence[Tensor],
    fused: bool | None,
    options: GroupOptions | None = None,
    *,
    units: Iterable[Sequence[Tensor]] = (),
    shares_memory: bool = False,
) -> str:
    """The backend that serves these parameters: "triton", "native" or "reference".

    Args:
        params: The parameters of a group.
        fused: As in `GradESAdamW`.
        options: Those of the group; None: the defaults. `capturable` without units is served by
            torch's own operations, which a CUDA graph can capture.
        units: The tensors of each unit.
        shares_memory: Whether some tensors of the optimizer lie in the same memory. Fused backends
            update all at the same time, and would lose updates there.

    Raises:
        RuntimeError: If `fused` is True and no fused backend can serve them.
    """
    units = list(units)
    if fused is False or not params:
        return "reference"
    if options and (
        options.differentiable or options.foreach or (options.capturable and not units)
    ):
        return "reference"
    shared = "two parameters share memory" if shares_memory else None
    not_triton = why_not_triton(params, interpret=bool(fused), units=units) or shared
    if not_triton is None:
        return "triton"
    not_native = why_not_native(params) or shared
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


def assign(
    groups: Sequence[dict[str, Any]],
    group_units: Sequence[Sequence[Unit]],
    members: dict[Unit, tuple[Tensor, ...]],
    *,
    triton_in_job: bool = True,
) -> list[str]:
    """The backend of every parameter group.

    The units of one freeze table are decided either on a device or by the host. Where the monitored
    groups would need both, those that asked for nothing (`fused=None`) use a backend that the host
    drives. `members` has the tensors of each unit; `triton_in_job` is whether the Triton kernels
    can serve every rank of the job.

    Raises:
        RuntimeError: If `fused=True` is not possible.
        ValueError: If the monitored groups ask for Triton and for a backend that the host drives.
    """
    shares_memory = share_memory([p for group in groups for p in group["params"]])
    names = []
    for group, units in zip(groups, group_units, strict=True):
        name = choose(
            group["params"],
            group["fused"],
            GroupOptions.of(group),
            units=[members[unit] for unit in units],
            shares_memory=shares_memory,
        )
        if name == "triton" and units and not triton_in_job:
            if group["fused"]:
                raise RuntimeError(
                    "fused=True is not possible: in a job of several processes the Triton kernels "
                    "must serve every rank, and the tensors of each must be on one device. Use "
                    "fused=None."
                )
            name = "reference"
        names.append(name)
    monitored = [i for i, units in enumerate(group_units) if units]
    on_device = [i for i in monitored if names[i] == "triton"]
    if 0 < len(on_device) < len(monitored):
        asked = [i for i in on_device if groups[i]["fused"]]
        if asked:
            others = [i for i in monitored if i not in on_device]
            raise ValueError(
                f"fused differs between monitored parameter groups: groups {asked} ask for "
                f"fused=True, which is Triton, and groups {others} are served by "
                f"{sorted({names[i] for i in others})}. The units of one optimizer are decided "
                "either on the device or by the host: give these groups the same fused."
            )
        for i in on_device:
            names[i] = "reference"
    return names


def unscales(names: Sequence[str], groups: Sequence[dict[str, Any]]) -> bool:
    """Whether the backends of all groups divide gradients by GradScaler's scale.

    The reference does where torch's own fused kernels serve it, with `capturable=True`.
    """
    return all(
        name != "reference" or not group["params"] or (group["capturable"] and group["fused"])
        for name, group in zip(names, groups, strict=True)
    )


def run_tasks_of(names: Sequence[str]) -> RunTasks:
    """The function that takes the tasks of groups served by these backends, one name per group."""
    own = set(names) - {"triton"}
    if len(own) <= 1:
        return HOST_BACKENDS[own.pop() if own else "reference"]

    def run_tasks(tensors: StepTensors, tasks: list[int], *rest: Any) -> Tensor | None:
        sizes = [n for _, n in tensors.groups]
        backend_of = [name for name, n in zip(names, sizes, strict=True) for _ in range(n)]
        sums = None
        for name in sorted(own):
            chosen = [t if b == name else 0 for t, b in zip(tasks, backend_of, strict=True)]
            part = HOST_BACKENDS[name](tensors, chosen, *rest)
            sums = part if sums is None else sums if part is None else sums + part
        return sums

    return run_tasks


def why_not_triton(
    params: Sequence[Tensor], *, interpret: bool = False, units: Iterable[Sequence[Tensor]] = ()
) -> str | None:
    """The reason why the Triton kernels cannot serve these parameters, or None.

    `interpret` is whether CPU tensors may go through Triton's interpreter (TRITON_INTERPRET=1),
    `units` are the tensors of each unit.
    """
    devices = {p.device for p in params}
    if len({device.type for device in devices}) > 1:
        return f"the parameters are on devices of several kinds, {sorted(map(str, devices))}"
    if any(len({p.device for p in unit}) > 1 for unit in units):
        return "the tensors of one unit are on several devices"
    dtypes = {p.dtype for p in params} - {torch.float32, torch.bfloat16, torch.float16}
    if dtypes:
        return f"the Triton kernels have no {', '.join(sorted(map(str, dtypes)))}"
    if not all(map(is_dense, map(local, params))):
        return "a parameter is a tensor subclass with operations of its own, or a view with gaps"
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
                return f"{torch.cuda.get_device_name(device)} is older than Triton supports"
    for package in ("triton", "numpy"):  # torch needs neither
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def share_memory(params: Iterable[Tensor]) -> bool:
    """Whether two plain tensors lie in the same stretch of memory, as those tied by `.data` do."""
    spans = []
    for x in map(local, params):
        if is_plain(x) and x.numel() and x.layout == torch.strided and x.device.type != "meta":
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            start = x.data_ptr()
            spans.append((str(x.device), start, start + (last + 1) * x.element_size()))
    spans.sort()
    return any(a[0] == b[0] and b[1] < a[2] for a, b in pairwise(spans))


def is_dense(p: Tensor) -> bool:
    """Whether a plain tensor fills its stretch of memory without gaps or overlaps."""
    return is_plain(p) and (not p.numel() or torch.ops.aten.is_non_overlapping_and_dense(p))
