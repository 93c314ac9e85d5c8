"""choose_cut: measure what a step with every cut would gain and cost, before the first step.

A first part of the batches gives the direction of AdamW's step, with the weights left as they are.
A trial step along it is then taken above every cut, and its gain is the decrease of the loss of
the other batches, which the direction does not know. G(k) is the gain above a cut of k blocks as a
share of the gain without a cut, c(k) the cost of a training step with that cut; the cut with the
largest G / c gains most per compute.

From the gradients alone the gain would follow to first order, which misleads: the low blocks gain
most per learning rate and are the first to overshoot.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import is_initialized
from ..freezing.config import check_choice, check_integer, check_number
from ..release import ReentrantDetector
from ..report.tables import standard_error
from ..state_tensors import local
from .blocks import Stack, below_the_blocks, find_stack, trainable
from .costs import between, spread, step_costs
from .cut import NO_REENTRANT, Candidate, Cut
from .generators import random_states

Loss = Callable[[nn.Module, Any], Tensor]

MEASURED_GAINS = 8
"""Cuts above which a trial step is taken; in between its gain is interpolated."""


def choose_cut(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    n_batches: int = 12,
    blocks: str | None = None,
    tied: str = "train",
    cost: str = "count",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Cut:
    """Choose how many of the lowest blocks not to train, by gain per compute of trial steps.

    For pre-trained weights: the rule looks one step ahead, and in a model with random weights the
    upper blocks gain most at first.

    Weights, gradients, buffers, flags, and the states of random generators are afterwards as
    before. It takes about 2.5 times the time of `n_batches` steps, and for that time the memory of
    AdamW's state. In a job of several processes all of them call it together, each with its own
    batches, and get the same cut; the model may be wrapped by DDP or FSDP2.

    Args:
        model: The model, in the mode in which it will be trained.
        loss: `loss(model, batch)` returns the loss that is trained, a scalar; with autocast, if
            that is used. It is called under `torch.no_grad` too.
        batches: Batches of the training, each of other examples; a DataLoader for example.
        n_batches: Batches to read, at least 4. The last third measures the gain of trial steps.
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
            few batches, or one that cannot be copied; a loss that is no finite scalar or does not
            depend on the blocks; a gradient that is not finite; reentrant activation checkpointing.
    """
    check_choice("tied", tied, ("train", "freeze"))
    check_choice("cost", cost, ("count", "time"))
    check_integer("n_batches", n_batches, 4)
    for beta in betas:
        check_number("betas", beta, "[0, 1)", lambda x: 0 <= x < 1)
    check_number("eps", eps, "[0, inf)", lambda x: 0 <= x < math.inf)
    if not model.training:
        warnings.warn(
            "choose_cut: the model is in evaluation mode, as from_pretrained leaves it, so that "
            "gains are measured without dropout. Call model.train() before, as for the training.",
            stacklevel=2,
        )
    inner = _unwrapped(model)
    stack = find_stack(inner, blocks)
    with torch.inference_mode(False), _unchanged(inner) as repeat_random_numbers:
        first, used, fresh, steps = _direction(model, loss, batches, n_batches, stack, betas, eps)

        def backward() -> None:
            inner.zero_grad()
            repeat_random_numbers()  # the same dropout in every call
            _loss_of(loss, inner, _copy_of(first, 1), "the first batch").backward()

        order, *found = below_the_blocks(inner, stack, backward, used)
        below, shared = _of_rank_0(found)
        if len(order) == len(stack.blocks):  # layerdrop leaves out blocks at random
            stack = Stack(stack.name, tuple(order))
        names = trainable(inner)
        if tied == "freeze":
            below += shared
        segments = _segments(stack, below, names)
        cuts = _cuts(segments, used)

        def losses() -> Tensor:
            repeat_random_numbers()
            found = [
                _scalar(loss(inner, _copy_of(batch, n)), f"batch {n}") for n, batch in fresh.items()
            ]
            return torch.stack([x.detach().float().reshape(()) for x in found])

        gains = _gains(inner, losses, steps, segments, cuts)
        costs = _of_rank_0(step_costs(inner, stack, backward, segments, cuts, cost))
    candidates = tuple(_candidate(gains, k, costs[k]) for k in [None, *cuts])
    k, reason = _choice(candidates, gains[None])
    return Cut(
        k=k,
        stack=stack.name,
        candidates=candidates,
        segments=segments,
        gains=_by_segment(gains, segments),
        shapes=tuple((name, tuple(p.shape)) for name, p in names.items()),
        reason=reason,
        tied=tuple(shared) if tied == "train" else (),
    )


# Gains


def _direction(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    n_batches: int,
    stack: Stack,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Any, set[str], dict[int, Any], dict[str, Tensor]]:
    """The first batch and the names it gives gradients; those left for the trials; AdamW's step.

    The step is per learning rate.
    """
    named = trainable(_unwrapped(model))
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    n_grads: Counter[str] = Counter()
    detector = ReentrantDetector(stack.params)
    used: set[str] = set()
    first, fresh, n = None, {}, 0
    try:
        for n, batch in zip(range(1, n_batches + 1), batches, strict=False):
            if n > n_batches - max(2, n_batches // 3):
                fresh[n] = batch
                continue
            first = _copy_of(batch, n) if n == 1 else first
            model.zero_grad()
            _loss_of(loss, model, _copy_of(batch, n), f"batch {n}").backward()
            grads = {name: _real(p.grad) for name, p in named.items() if p.grad is not None}
            _check_gradients(grads, stack, n, detector)
            used = used or set(grads)
            if not isinstance(model, DistributedDataParallel):
                _average(grads.values())
            for name, grad in grads.items():
                if name not in moments:
                    moments[name] = torch.zeros_like(grad), torch.zeros_like(grad)
                exp_avg, exp_avg_sq = moments[name]
                exp_avg.lerp_(grad, 1 - betas[0])
                exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
                n_grads[name] += 1
    finally:
        detector.stop()
    if n < n_batches:
        raise ValueError(
            f"batches: {n} instead of n_batches={n_batches}. Pass more batches, each of other "
            "examples, or a smaller n_batches."
        )
    steps = {}
    for name, t in n_grads.items():
        exp_avg, exp_avg_sq = moments.pop(name)
        denominator = (exp_avg_sq.float() / (1 - betas[1] ** t)).sqrt_().add_(eps)
        steps[name] = (exp_avg / (1 - betas[0] ** t) / denominator).to(exp_avg.dtype)
    return first, used, fresh, steps


def _gains(
    model: nn.Module,
    losses: Callable[[], Tensor],
    steps: dict[str, Tensor],
    segments: Sequence[Sequence[str]],
    cuts: Sequence[int],
) -> dict[int | None, list[float]]:
    """The decrease of the loss of each fresh batch by a trial step with every cut, or None.

    It is the same on all ranks. All have one learning rate: it is doubled as long as that makes
    the gain without a cut half as large again, which ends at 0.4 to 0.8 of the best one where the
    loss is a parabola. `losses` returns those of the fresh batches, the same for the same weights;
    `steps` has the step of every tensor that has one, per learning rate.
    """
    _reshard(model)
    params = {name: _real(p.detach()) for name, p in trainable(model).items()}
    before = {name: p.clone() for name, p in params.items()}
    segment_of = {name: k for k, segment in enumerate(segments) for name in segment}

    def write(lr: float, k: int | None) -> None:
        for name, p in params.items():
            p.copy_(before[name])
            if lr and name in steps and (k is None or segment_of.get(name, math.inf) > k):
                p.sub_(steps[name], alpha=lr)
        _reshard(model)
        torch.clear_autocast_cache()  # autocast around the call would keep the former weights

    @torch.no_grad()
    def losses_after(lr: float, k: int | None = None) -> Tensor:
        write(lr, k)
        found = losses()
        _average([found])
        return found

    @cache
    def gain(exponent: int, k: int | None = None) -> list[float]:
        return (base - losses_after(2.0**exponent, k)).tolist()

    def doubling_pays(exponent: int) -> bool:
        once, twice = fmean(gain(exponent)), fmean(gain(exponent + 1))
        return once > 0 and twice >= 1.5 * once

    try:
        base = losses_after(0.0)
        if not base.isfinite().all():
            raise ValueError(
                f"loss(model, batch) is {base.tolist()} of the last batches: the probe has stopped."
            )
        exponent = -10
        while exponent < 6 and doubling_pays(exponent):
            exponent += 1
        while exponent > -16 and not doubling_pays(exponent - 1):
            exponent -= 1
        measured = {k: gain(exponent, k) for k in spread(cuts, MEASURED_GAINS)}
        gains: dict[int | None, list[float]] = {None: gain(exponent)}
    finally:
        with torch.no_grad():
            write(0.0, None)
    rows = [dict(zip(measured, row, strict=True)) for row in zip(*measured.values(), strict=True)]
    for k in cuts:
        gains[k] = [between(row, range(len(segments)), k) for row in rows]
    return gains


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 gather the weights anew: after a pass without gradients it keeps those it has."""
    for module in model.modules():
        if hasattr(type(module), "reshard"):
            module.reshard()  # type: ignore[operator]


def _by_segment(
    gains: dict[int | None, list[float]], segments: Sequence[Sequence[str]]
) -> tuple[float, ...]:
    """The mean gain of the tensors below the blocks, of every block, and above."""
    result = [0.0] * (len(segments) + 1)
    left = fmean(gains[None])
    for k, row in gains.items():
        if k is not None:
            result[k] = left - fmean(row)
            left = fmean(row)
    highest = max(k for k, segment in enumerate(segments) if segment)
    result[-1 if highest in gains else highest] = left  # with no cut there, nothing trains above
    return tuple(result)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x  # as torch's AdamW does


def _copy_of(batch: Any, n: int) -> Any:
    """A copy for one call of the loss, which may take its labels out of a batch."""
    try:
        return deepcopy(batch)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"batches: batch {n} cannot be copied ({error}). Tensors that depend on others with "
            "gradients need detach()."
        ) from error


def _scalar(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss(model, batch) must return a scalar tensor; {where} gave {found}. Return the "
            "loss alone, such as model(**batch).loss."
        )
    return value


def _loss_of(loss: Loss, model: nn.Module, batch: Any, where: str) -> Tensor:
    value = _scalar(loss(model, batch), where)
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
    """Average as DDP does, for a model that is not wrapped yet; DTensors average their own."""
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


# The choice


def _segments(
    stack: Stack, below: Sequence[str], names: dict[str, Tensor]
) -> tuple[tuple[str, ...], ...]:
    """Names of the tensors below the blocks and of every block, a shared one with the highest."""
    highest: dict[Tensor, int] = {
        p: k for k, block in enumerate(stack.blocks) for p in block.parameters()
    }
    blocks = range(len(stack.blocks))
    return (
        tuple(below),
        *(tuple(n for n, p in names.items() if highest.get(p) == k) for k in blocks),
    )


def _cuts(segments: Sequence[Sequence[str]], used: set[str]) -> list[int]:
    """The cuts that freeze something and leave something that gets a gradient."""
    left, cuts = set(used), []
    for k, segment in enumerate(segments):
        left.difference_update(segment)
        if segment and left:
            cuts.append(k)
    return cuts


def _candidate(gains: dict[int | None, list[float]], k: int | None, cost: float) -> Candidate:
    whole, left = gains[None], gains[k]

    def share(without: int | None = None) -> float:
        kept = [i for i in range(len(whole)) if i != without]
        total = math.fsum(whole[i] for i in kept)
        return math.fsum(left[i] for i in kept) / total if total else math.nan

    # The jackknife, since the share is a quotient of two means.
    n = len(whole)
    parts = [share(i) for i in range(n)]
    variance = (n - 1) / n * math.fsum((x - fmean(parts)) ** 2 for x in parts)
    ratio = share() / cost
    return Candidate(k, share(), cost, ratio, math.sqrt(variance) / cost)


def _choice(candidates: Sequence[Candidate], gains: Sequence[float]) -> tuple[int | None, str]:
    """The best cut and the reason; `gains` are those of the step without a cut, by batch."""
    if not all(map(math.isfinite, gains)):
        return None, "the loss after a trial step is not finite; weights may be too narrow for it"
    if not fmean(gains) > standard_error(gains):
        return None, "the trial step gained nothing beyond its noise; more batches may show more"
    if len(candidates) == 1:
        return None, "nothing that trains lies below another part that does"
    best = max(candidates, key=lambda x: x.ratio)
    if best.k is None:
        return None, "every cut loses more of the gain than of the cost"
    if not best.ratio - 1 > best.error:  # nor if the error is NaN
        return None, (
            f"k={best.k} is better than no cut by {best.ratio - 1:.3f}, which is within the "
            f"standard error of {best.error:.3f}; more batches would make it smaller"
        )
    return best.k, (
        f"k={best.k} keeps {best.gain:.0%} of the gain for {best.cost:.0%} of the cost, "
        f"{best.ratio:.2f} times the gain per compute"
    )


# The model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP, torch.compile and Fabric's wrapper."""
    wrapper: Any = model
    if isinstance(model, DistributedDataParallel):
        inner = wrapper.module
    else:
        inner = getattr(wrapper, "_orig_mod", getattr(wrapper, "_forward_module", None))
    return model if inner is None else _unwrapped(inner)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore gradients, flags, buffers and the states of random generators.

    Yields a function that sets the random generators back within the context.
    """
    params = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    states = random_states({p.device for p, *_ in params})

    def set_back() -> None:
        for state, put in states:
            put(state)

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
