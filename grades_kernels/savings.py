"""What freezing gives back: when backward may skip a gradient, and what memory that returns.

The freeze table masks updates and nothing else. Here stands what turns a masked tensor into saved
work: whether its gradient may be stopped, how a released moment is held, how a DDP model is wrapped
anew, and how many bytes all of it comes to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle, unserializable_hook

from .freezing import NEVER, Unit
from .functional import gradient_dtype
from .report import Memory
from .units import is_embedding, place_of

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def n_bytes(x: Tensor | None) -> int:
    """Bytes of a tensor on this process; of a DTensor, those of its local shard."""
    if x is None:
        return 0
    x = x.to_local() if hasattr(x, "to_local") else x
    return x.numel() * x.element_size()


def nothing_held(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for a released moment or previous gradient: its key without its memory.

    The key stays, since a flat distributed checkpoint loads just the keys that the receiving
    optimizer has.
    """
    return torch.empty(0, dtype=dtype or p.dtype, device=p.device)


class ReentrantWatch:
    """Learns from one backward pass which tensors lie in a reentrant activation checkpoint.

    Reentrant checkpointing (`use_reentrant=True`) runs a block without gradients if no input of the
    block needs one. Stopping a gradient below can bring that about, and then every tensor of the
    block silently stops learning. Nothing in a model tells which kind of checkpointing it uses, but
    a reentrant backward pass runs inside another: its frame is on the stack when a gradient
    arrives.

    Args:
        tensors: Tensors to watch, each until its first gradient.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.seen = False
        self._handles: dict[Tensor, RemovableHandle] = {}
        for p in tensors:
            if p.requires_grad:
                self._handles[p] = p.register_hook(self._hook_of(p))

    def _hook_of(self, p: Tensor) -> Callable[[Tensor], None]:
        # A copy or pickle of the tensor does without it, and need not say so.
        return unserializable_hook(lambda grad: self._look(p))

    def _look(self, p: Tensor) -> None:
        self._handles.pop(p).remove()
        frame: FrameType | None = sys._getframe()
        while frame is not None and not self.seen:
            self.seen = frame.f_code is CheckpointFunction.backward.__code__
            frame = frame.f_back


def wrapped_anew(ddp: DistributedDataParallel) -> nn.Module:
    """A DDP model with the settings of `ddp` that knows which tensors still need gradients.

    Afterwards `ddp` itself must not be used: it has let go of the tensors. Where nothing is left to
    train, which DDP refuses to wrap, the bare module.
    """
    hooks, module = list(getattr(ddp, "_comm_hooks", ())), ddp.module
    settings: dict[str, Any] = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "broadcast_buffers": ddp.broadcast_buffers,
        "init_sync": False,  # the ranks have been in step all along
        "process_group": ddp.process_group,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        "mixed_precision": ddp.mixed_precision,
    }
    # Who goes on with the old wrapper gets an error, not ranks that drift apart.
    del ddp.reducer, ddp.logger
    if not any(p.requires_grad for p in module.parameters()):
        return module
    new = DistributedDataParallel(module, **settings)
    for hook, state in hooks:
        new.register_comm_hook(state, hook)
    return new


# Before 2.12 torch.compile has no guard on whether a parameter needs a gradient: the model is not
# compiled anew, and its backward pass goes on computing gradients that nobody keeps.
COMPILE_SEES_WAVES = torch.__version__ >= "2.12"


def anything_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters["stats"].get("unique_graphs"))


def recompilations_left(waves: int) -> int | None:
    """How often a compiled model can still be recompiled for a new wave; None: none is compiled.

    Every wave changes which tensors need gradients, which torch.compile guards on. Past
    `torch._dynamo.config.recompile_limit` it runs the model eagerly for the rest of the run.
    """
    return torch._dynamo.config.recompile_limit - 1 - waves if anything_compiled() else None


def memory_of(
    params: Iterable[Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    members: Mapping[Unit, Sequence[Tensor]],
    stopped: Collection[Tensor],
) -> Memory:
    """Bytes that an optimizer's tensors hold on this process, and those given back.

    Args:
        params: All tensors of the optimizer.
        state: Its state.
        members: The tensors of each unit.
        stopped: The tensors that have given up gradient and moments.
    """
    params = list(params)
    states = [state[p] for p in params if state.get(p)]
    released = 0
    for unit, tensors in members.items():
        for p in tensors:
            grad_bytes = n_bytes(p) // p.element_size() * gradient_dtype(p.grad, p).itemsize
            if unit.decided_at != NEVER and unit.criterion == "change":
                released += grad_bytes
            if p in stopped:
                amsgrad = "max_exp_avg_sq" in state[p]
                released += grad_bytes + (3 if amsgrad else 2) * n_bytes(p)
    return Memory(
        moments=sum(n_bytes(s.get(key)) for s in states for key in MOMENTS),
        prev_grads=sum(n_bytes(s.get("prev_grad")) for s in states),
        grads=sum(n_bytes(p.grad) for p in params),
        released=released,
    )


def frozen_prefix(
    units: Iterable[Unit], named: Iterable[tuple[str, Tensor, Unit | None]]
) -> tuple[int, tuple[str, ...]]:
    """How many of the lowest blocks are frozen, and the names of what still trains in or below.

    Only a prefix without anything that trains lets a backward pass end early.

    Args:
        named: Name, tensor and unit of all parameters that have a name.
    """
    frozen: dict[int, bool] = {}
    for unit in units:
        layer, _ = place_of(unit.name)
        if layer is not None:
            frozen[layer] = frozen.get(layer, True) and unit.frozen_at != NEVER
    prefix = list(takewhile(frozen.__getitem__, sorted(frozen)))
    below = []
    for name, p, row in named if prefix else ():
        layer, _ = place_of(name)
        is_below = is_embedding(name, p) if layer is None else layer <= prefix[-1]
        if is_below and p.requires_grad and (row is None or row.frozen_at == NEVER):
            below.append(name)
    return len(prefix), tuple(below)
