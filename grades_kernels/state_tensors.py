"""The tensors of an optimizer's state: released and restored ones, dtypes, order in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def is_plain(x: Tensor) -> bool:
    """Whether all of a tensor is in its memory: its class leaves every operation to torch.

    A class of its own, such as `class Weight(torch.nn.Parameter)`, may add attributes and methods.
    """
    kind: Any = type(x)
    if kind in (Tensor, torch.nn.Parameter):
        return True
    of_class, of_tensor, of_parameter = (
        getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
        for cls in (kind, Tensor, torch.nn.Parameter)
    )
    is_own = of_class not in (of_tensor, of_parameter)
    return not is_own and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def placeholder(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor for a released moment or previous gradient: its key without its memory.

    The key stays, since a flat distributed checkpoint loads just the keys that the receiving
    optimizer has.
    """
    return torch.empty(0, dtype=dtype or p.dtype, device=p.device)


def local(x: Any) -> Tensor:
    """The part of a DTensor that this rank has, without a copy; other tensors as they are."""
    if not hasattr(x, "_local_tensor"):
        return x
    shard = x._local_tensor
    # A result that is still under way between ranks is a subclass, for which `to_local` waits.
    return shard if type(shard) is Tensor else x.to_local()


def full_shape(x: Tensor, p: Tensor) -> Tensor:
    """A moment or previous gradient of `p`: itself, or zeros in place of a placeholder."""
    return x if x.numel() or not p.numel() else torch.zeros_like(p, dtype=x.dtype)


def add_missing_moments(state: dict[str, Any], p: Tensor, *, amsgrad: bool) -> None:
    """Add moments of zero for the keys that the state of `p` lacks."""
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state:
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)


def gradient_dtype(grad: Tensor | None, p: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient, or that which the next one is expected to have."""
    return grad.dtype if grad is not None else getattr(p, "grad_dtype", None) or p.dtype


def same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape have the same strides; dimensions of size 1 do not matter."""
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(i == j for i, j, size in strides if size > 1)
