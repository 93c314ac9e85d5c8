"""The cost of a training step with every cut: multiply-adds or time.

It is measured with the lowest cut and the two highest, and interpolated in between by the sizes of
the blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .blocks import Stack, trainable
from .cut import disable_input_grads


def step_costs(
    model: nn.Module,
    stack: Stack,
    backward: Callable[[], None],
    segments: Sequence[Sequence[str]],
    cuts: Sequence[int],
    kind: str,
) -> dict[int | None, float]:
    """The cost of forward and backward pass with every cut, relative to none.

    `backward` is as in `below_the_blocks`, `segments` as in `Cut`, `kind` as `cost` of
    `choose_cut`. The `requires_grad` flags of the model are not restored.
    """
    params = trainable(model)
    measure = _multiply_adds if kind == "count" else _seconds
    whole, sizes = measure(backward, stack.blocks)
    if not whole:
        raise ValueError(
            "cost='count': no multiply-adds were seen; code that torch.compile has compiled hides "
            "them. Use cost='time'."
        )
    measured: dict[int, float] = {}
    redo = disable_input_grads(model)
    try:
        # The last step differs: the lowest block that trains needs no gradient of its inputs, and
        # with the last cut there is none.
        for k in sorted({*cuts[:1], *cuts[-2:]}):
            for segment in segments[: k + 1]:
                for name in segment:
                    params[name].requires_grad_(False)
            measured[k] = measure(backward, ())[0] / whole
    finally:
        redo()
    size = list(accumulate(sizes, initial=0.0))  # of the blocks below a cut
    return {None: 1.0, **{k: between(measured, size, k) for k in cuts}}


def _multiply_adds(
    backward: Callable[[], None], blocks: Sequence[nn.Module]
) -> tuple[float, list[float]]:
    """Those of all, and of the forward pass of every block."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    begun, sizes = [0] * len(blocks), [1.0] * len(blocks)  # 1: no block has the size zero

    def begin(k: int, *_: Any) -> None:
        begun[k] = counter.get_total_flops()

    def end(k: int, *_: Any) -> None:
        sizes[k] = 1.0 + counter.get_total_flops() - begun[k]

    with FlopCounterMode(display=False) as counter, ExitStack() as hooks:
        for k, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(partial(begin, k)).remove)
            hooks.callback(block.register_forward_hook(partial(end, k)).remove)
        backward()
    return float(counter.get_total_flops()), sizes


def _seconds(
    backward: Callable[[], None], blocks: Sequence[nn.Module]
) -> tuple[float, list[float]]:
    """The smaller of two times; blocks count as equal, since hooks would disturb the time."""

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def once() -> float:
        start = now()
        backward()
        return now() - start

    return min(once(), once()), [1.0] * len(blocks)


def spread(cuts: Sequence[int], most: int) -> list[int]:
    """At most so many of the cuts, the first and the last among them."""
    n = min(len(cuts), most)
    return sorted({cuts[round(i * (len(cuts) - 1) / max(1, n - 1))] for i in range(n)})


def between(measured: dict[int, float], position: Sequence[float], k: int) -> float:
    """The value at cut `k`, on the line between its measured neighbours by their positions."""
    low, high = max(x for x in measured if x <= k), min(x for x in measured if x >= k)
    whole = position[high] - position[low]
    part = (position[k] - position[low]) / whole if whole else 0.0
    return measured[low] + part * (measured[high] - measured[low])
