"""choose_cut: measure what every block would gain and cost, before the first step.

P of a tensor is the mean over a few batches of

    sum g_t * m_hat_{t-1} / (sqrt(v_hat_{t-1}) + eps)

with the weights left as they are: the loss that AdamW's step would gain per learning rate, to first
order. The moments do not know the batch of g_t, so noise has a mean of zero. G(k) is the share of P
above cut k, c(k) the cost of a step with that cut; the cut with the largest G / c gains most per
compute.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from functools import partial
from itertools import accumulate
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import is_initialized
from ..freezing.table import MAX_HISTORY_ROWS
from ..optimizer import GradESAdamW
from ..release import ReentrantDetector
from ..report.tables import standard_error
from ..state_tensors import local
from .blocks import Stack, below_the_blocks, find_stack, trainable
from .cut import NO_REENTRANT, Candidate, Cut, disable_input_grads

Loss = Callable[[nn.Module, Any], Tensor]

MEASURED_PLACES = 3
"""Cuts whose cost is measured; in between it is interpolated by the sizes of the blocks."""


def choose_cut(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    n_batches: int = 16,
    blocks: str | None = None,
    tied: str = "train",
    cost: str = "count",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Cut:
    """Choose how many of the lowest blocks not to train, by predicted gain per compute.

    Weights, gradients, buffers, flags, and the states of random generators are afterwards what they
    were. It takes `n_batches` steps and some five more to find costs, and for that time two moments
    and a copy of the trained weights. In a job of several processes all of them call it together,
    each with its own batches, and get the same cut; the model may be wrapped by DDP or FSDP2.

    Args:
        model: The model, in the mode in which it will be trained.
        loss: `loss(model, batch)` returns the loss that is trained, a scalar; with autocast, if
            that is used.
        batches: Batches of the training, a fresh one for every probe step; a DataLoader for
            example.
        n_batches: Batches to probe, from 4 to 512.
        blocks: Path of the blocks to cut, where a model has several stacks of them.
        tied: "train" (default) keeps an embedding that is also the head in training, although the
            backward pass then has to reach the lowest block for its other half, which the cost
            includes; "freeze" freezes it with the cut, and with it the head.
        cost: "count" counts multiply-adds (torch.utils.flop_counter), "time" takes the time of
            forward and backward pass, the smaller of two.
        betas, eps: Those of AdamW.

    Returns:
        The cut, with a table (`print`) and a picture (`plot`). `k` is None unless a cut is better
        than none by more than its standard error.

    Raises:
        ValueError: For a model without repeated blocks, or with several stacks and no `blocks`; too
            few batches; a loss that is no finite scalar or does not depend on the blocks; a
            gradient that is not finite; reentrant activation checkpointing.
    """
    if tied not in ("train", "freeze"):
        raise ValueError(f"Invalid tied: {tied!r} (choose 'train' or 'freeze')")
    if cost not in ("count", "time"):
        raise ValueError(f"Invalid cost: {cost!r} (choose 'count' or 'time')")
    if not isinstance(n_batches, int) or not 4 <= n_batches <= MAX_HISTORY_ROWS:
        raise ValueError(
            f"Invalid n_batches: {n_batches!r} (must be an integer from 4 to {MAX_HISTORY_ROWS})"
        )
    inner = _unwrapped(model)
    stack = find_stack(inner, blocks)
    with _unchanged(inner) as repeat_random_numbers:
        first, steps = _probe(model, loss, batches, n_batches, stack, betas, eps)

        def backward() -> None:
            inner.zero_grad()
            repeat_random_numbers()  # the same dropout in every call
            # A copy, as a loss may take its labels out of a batch.
            _loss_of(loss, inner, deepcopy(first), "the first batch").backward()

        order, *found = below_the_blocks(inner, stack, backward)
        below, shared = _of_rank_0(found)
        if len(order) == len(stack.blocks):  # layerdrop leaves out blocks at random
            stack = Stack(stack.name, tuple(order))
        names = trainable(inner)
        if tied == "freeze":
            below += shared
        # A tensor of several blocks trains as long as one of them does.
        highest: dict[Tensor, int] = {
            p: k for k, block in enumerate(stack.blocks) for p in block.parameters()
        }
        segments: tuple[tuple[str, ...], ...] = (
            tuple(below),
            *(
                tuple(name for name, p in names.items() if highest.get(p) == k)
                for k in range(len(stack.blocks))
            ),
        )
        places = _places(segments, len(names))
        costs = _costs(inner, stack, backward, segments, places, cost)
    gains = _by_segment(steps, segments)
    candidates = tuple(_candidate(gains, k, costs[k]) for k in places)
    k, reason = _choice(candidates, gains)
    return Cut(
        k=k,
        stack=stack.name,
        candidates=candidates,
        segments=segments,
        gains=tuple(fmean(column) for column in zip(*gains, strict=True)),
        shapes=tuple((name, tuple(p.shape)) for name, p in names.items()),
        reason=reason,
        tied=tuple(shared) if tied == "train" else (),
    )


# Gains


def _probe(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    n_batches: int,
    stack: Stack,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Any, list[dict[str, float]]]:
    """The first batch, and the gain of every tensor in each probe step but the first.

    The optimizer steps copies of the weights, so that those of the model are never written.
    """
    named = trainable(_unwrapped(model))
    copies = {name: _real(p.detach()).clone() for name, p in named.items()}
    for copy in copies.values():
        copy.requires_grad_(True)
    # By their own names the factors of a LoRA update would be one unit, which is void while B = 0.
    numbered = [(f"tensor{i}", copy) for i, copy in enumerate(copies.values())]
    group = {"params": numbered, "tau": 0.0, "statistic": "gain", "monitor_all": True}
    optimizer = GradESAdamW([group], lr=0.0, betas=betas, eps=eps, grace_steps=0)
    detector = ReentrantDetector(stack.params)
    first, n = None, 0
    try:
        for n, batch in zip(range(1, n_batches + 1), batches, strict=False):
            first = deepcopy(batch) if n == 1 else first
            model.zero_grad()
            _loss_of(loss, model, batch, f"batch {n}").backward()
            grads = {name: _real(p.grad) for name, p in named.items() if p.grad is not None}
            _check_gradients(grads, stack, n, detector)
            if not isinstance(model, DistributedDataParallel):
                _average(grads.values())
            for name, copy in copies.items():
                copy.grad = grads.get(name)
            optimizer.step()
    finally:
        detector.stop()
    if n < n_batches:
        raise ValueError(
            f"batches: {n} instead of n_batches={n_batches}. Pass more batches, each of other "
            "examples, or a smaller n_batches."
        )
    # A step without evidence for a tensor, its gradient being zero, gains nothing there.
    rows, names = dict(optimizer.report().history), list(copies)
    measured = [names[int(unit.removeprefix("tensor"))] for unit in optimizer.monitored_units]
    steps = [rows.get(t, [math.nan] * len(measured)) for t in range(2, n + 1)]
    return first, [
        {name: 0.0 if math.isnan(x) else x for name, x in zip(measured, step, strict=True)}
        for step in steps
    ]


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x  # as torch's AdamW does


def _loss_of(loss: Loss, model: nn.Module, batch: Any, where: str) -> Tensor:
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss(model, batch) must return a scalar tensor; {where} gave {found}. Return the "
            "loss alone, such as model(**batch).loss."
        )
    if not value.requires_grad:
        raise ValueError(f"loss(model, batch) of {where} depends on no tensor that trains.")
    if not math.isfinite(value.item()):
        raise ValueError(f"loss(model, batch) of {where} is {value.item()}: the probe has stopped.")
    return value


def _check_gradients(
    grads: dict[str, Tensor], stack: Stack, n: int, detector: ReentrantDetector
) -> None:
    if detector.found:
        raise ValueError(f"choose_cut: {NO_REENTRANT}")
    if all(p.grad is None for p in stack.params):
        raise ValueError(f"loss(model, batch) does not depend on the blocks of {stack.name!r}.")
    # In a tenth of the time of `isfinite`; the norm of finite numbers may overflow.
    shards = list(map(local, grads.values()))
    norms = torch._foreach_norm(shards)
    found = torch.stack([x.to(norms[0].device, torch.float64) for x in norms]).tolist()
    for name, shard, norm in zip(grads, shards, found, strict=True):
        if not math.isfinite(norm) and not shard.isfinite().all():
            raise ValueError(
                f"the gradient of {name!r} is not finite in batch {n}: the probe has stopped."
            )


def _average(grads: Iterable[Tensor]) -> None:
    """What DDP does, for a model that is not wrapped yet; DTensors average their own."""
    if not is_initialized() or dist.get_world_size() == 1:
        return
    for grad in grads:
        if not hasattr(grad, "to_local"):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()


def _of_rank_0(value: Any) -> Any:
    """The value of the first rank of a job, so that all ranks choose alike."""
    if not is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# Costs


def _places(segments: Sequence[Sequence[str]], n_tensors: int) -> list[int | None]:
    """The cuts that freeze something and leave something to train, and None."""
    places: list[int | None] = [None]
    n_frozen = 0
    for k, segment in enumerate(segments):
        n_frozen += len(segment)
        if segment and n_frozen < n_tensors:
            places.append(k)
    return places


def _costs(
    model: nn.Module,
    stack: Stack,
    backward: Callable[[], None],
    segments: Sequence[Sequence[str]],
    places: Sequence[int | None],
    kind: str,
) -> dict[int | None, float]:
    """The cost of forward and backward pass with every cut, relative to none; same on all ranks."""
    cuts = [k for k in places if k is not None]
    n = min(len(cuts), MEASURED_PLACES)
    chosen = {cuts[round(i * (len(cuts) - 1) / max(1, n - 1))] for i in range(n)}
    params = trainable(model)
    measure = _multiply_adds if kind == "count" else _seconds
    whole, sizes = measure(backward, stack.blocks)
    if not whole:
        raise ValueError(
            "cost='count': no multiply-adds were seen; code that torch.compile has compiled hides "
            "them. Use cost='time'."
        )
    measured: dict[int, float] = {}
    having = disable_input_grads(model)
    try:
        for k in sorted(chosen):
            for segment in segments[: k + 1]:
                for name in segment:
                    params[name].requires_grad_(False)
            measured[k] = measure(backward, ())[0] / whole
    finally:
        for module in having:
            module.enable_input_require_grads()  # type: ignore[operator]
    costs: dict[int | None, float] = {None: 1.0}
    size = list(accumulate(sizes, initial=0.0))  # of the blocks below a cut
    for k in cuts:
        low, high = max(x for x in measured if x <= k), min(x for x in measured if x >= k)
        part = (size[k] - size[low]) / (size[high] - size[low]) if high > low else 0.0
        costs[k] = measured[low] + part * (measured[high] - measured[low])
    return _of_rank_0(costs)


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


# The choice


def _by_segment(
    steps: Sequence[dict[str, float]], segments: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Per probe step the gain below the blocks, of every block, and above."""
    rows = []
    for step in steps:
        own = [math.fsum(step[name] for name in segment) for segment in segments]
        rows.append([*own, math.fsum(step.values()) - math.fsum(own)])
    return rows


def _candidate(gains: Sequence[Sequence[float]], k: int | None, cost: float) -> Candidate:
    first = 0 if k is None else k + 1
    whole = [math.fsum(row) for row in gains]
    left = [math.fsum(row[first:]) for row in gains]

    def share(without: int | None = None) -> float:
        kept = [i for i in range(len(gains)) if i != without]
        total = math.fsum(whole[i] for i in kept)
        return math.fsum(left[i] for i in kept) / total if total else math.nan

    # The jackknife, since the share is a quotient of two means.
    n = len(gains)
    parts = [share(i) for i in range(n)]
    variance = (n - 1) / n * math.fsum((x - fmean(parts)) ** 2 for x in parts)
    ratio = share() / cost
    return Candidate(k, share(), cost, ratio, math.sqrt(variance) / cost)


def _choice(
    candidates: Sequence[Candidate], gains: Sequence[Sequence[float]]
) -> tuple[int | None, str]:
    totals = [math.fsum(row) for row in gains]
    if not fmean(totals) > standard_error(totals):
        return None, "the probe saw no gain beyond its noise; more batches may show one"
    best = max(candidates, key=lambda x: x.ratio)
    if best.k is None:
        return None, "every cut loses more of the gain than of the cost"
    if best.ratio - 1 <= best.error:
        return None, (
            f"k={best.k} is better than no cut by {best.ratio - 1:.3f}, which is within the "
            f"standard error of {best.error:.3f}"
        )
    return best.k, (
        f"k={best.k} keeps {best.gain:.0%} of the gain for {best.cost:.0%} of the cost, "
        f"{best.ratio:.2f} times the gain per compute"
    )


# The model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP and torch.compile."""
    inner: Any = model
    while isinstance(inner, DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
    return inner


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore gradients, flags, buffers and the states of random generators.

    Yields what sets the random generators back within the context.
    """
    params = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    set_back = _random_states({p.device for p, *_ in params})
    try:
        yield set_back
    finally:
        for p, grad, flag in params:
            p.requires_grad_(flag)
            p.grad = grad
        for module, own in buffers:  # a forward pass may assign new ones
            module._buffers.update(own)
        for buffer, before in values:
            # Nothing can have been written where this cannot: an expanded tensor.
            with torch.no_grad(), suppress(RuntimeError):
                buffer.copy_(before)
        set_back()


def _random_states(devices: Iterable[torch.device]) -> Callable[[], None]:
    """What brings the generators of Python, NumPy, the CPU and these devices to where they are."""
    numpy_random: Any = getattr(sys.modules.get("numpy"), "random", None)
    python_state, numpy_state = random.getstate(), numpy_random and numpy_random.get_state()
    cpu_state = torch.get_rng_state()
    modules = {x: torch.get_device_module(x) for x in devices if x.type not in ("cpu", "meta")}
    states = {x: module.get_rng_state(x) for x, module in modules.items()}

    def set_back() -> None:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        for device, state in states.items():
            modules[device].set_rng_state(state, device)

    return set_back
