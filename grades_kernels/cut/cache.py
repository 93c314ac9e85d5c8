"""ActivationCache: what a frozen prefix computes, kept for the next epochs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import find_stack, tensors_of
from .cut import Cut


class ActivationCache:
    """Keeps the inputs of the lowest block that trains, one row per example.

    In a later epoch over the same data the frozen blocks do not run at all: a step that costs
    3 - 2k forward passes with a share k of the blocks frozen costs 3 - 3k. The result is the same
    bit for bit while `dtype` is that of the computation. A batch is taken from the cache if all its
    examples are there, else computed.

        cache = ActivationCache(model, cut, max_bytes=8e9)
        for ids, batch in batches:
            with cache.rows(ids):
                loss = model(**batch).loss
            loss.backward()

    Not for data that is augmented anew in every epoch, and only where every batch of an example has
    the same padded length.

    Args:
        model: The model, after `cut.apply(model, eval_frozen=True)`.
        cut: The cut; at least one block is frozen and one trains.
        max_bytes: Size up to which rows are stored, in the memory of the CPU.
        dtype: What rows are stored in; None: as they are computed.

    Attributes:
        n_bytes: Bytes that are stored.
        n_skipped: Forward passes in which the frozen blocks did not run.

    Raises:
        ValueError: If no block is frozen or none trains, or tensors below the cut still train.
    """

    def __init__(
        self, model: nn.Module, cut: Cut, *, max_bytes: float, dtype: torch.dtype | None = None
    ) -> None:
        if cut.k is None or not 0 < cut.k < cut.n_blocks:
            raise ValueError(f"ActivationCache: the cut freezes {cut.k} of {cut.n_blocks} blocks.")
        params = tensors_of(model)
        below = {params.get(name) for name in cut.frozen}
        if not all(p is not None and not p.requires_grad for p in below):
            raise ValueError(
                "ActivationCache: tensors below the cut still train. Call "
                "cut.apply(model, eval_frozen=True) first."
            )
        blocks = [
            next(b for b in find_stack(model, cut.stack).blocks if params[segment[0]] in _params(b))
            for segment in cut.segments[1 : cut.k + 2]
        ]
        *self._skipped, self._first = blocks
        self._rows: dict[Hashable, Tensor] = {}
        self._wrapped: dict[nn.Module, bool] = {}  # whether a block returns a tuple
        self.max_bytes, self.dtype = max_bytes, dtype
        self.n_bytes = self.n_skipped = 0

    @contextmanager
    def rows(self, ids: Sequence[Hashable] | Tensor) -> Iterator[None]:
        """Within the context, one forward pass of the model for the examples `ids`.

        Args:
            ids: What identifies each row of the batch, in its order; of a tensor, its numbers.

        Raises:
            ValueError: If the inputs of the block have not one row per example, if a frozen block
                is in training mode or returns more than one tensor, or if an example comes with
                another length.
        """
        keys = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        with ExitStack() as stack:
            if keys and all(key in self._rows for key in keys):
                self._skip(stack, keys)
            else:
                self._store(stack, keys)
            yield

    def _store(self, stack: ExitStack, keys: list[Hashable]) -> None:
        def note(block: nn.Module, args: Any, output: Any) -> None:
            if block.training:
                raise ValueError(
                    "ActivationCache: a frozen block is in training mode, so that dropout would "
                    "differ in every epoch. Use cut.apply(model, eval_frozen=True)."
                )
            alone = isinstance(output, tuple) and len(output) == 1
            if not alone and not isinstance(output, Tensor):
                raise ValueError(
                    "ActivationCache: a frozen block returns more than its hidden states."
                )
            self._wrapped[block] = alone

        def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = _hidden(args, kwargs)
            if hidden.shape[0] != len(keys):
                raise ValueError(
                    f"ActivationCache: {len(keys)} ids for {hidden.shape[0]} rows of a batch."
                )
            for key, row in zip(keys, hidden.detach(), strict=True):
                size = row.numel() * (self.dtype or row.dtype).itemsize
                if key not in self._rows and self.n_bytes + size <= self.max_bytes:
                    self._rows[key] = row.to("cpu", self.dtype, copy=True)
                    self.n_bytes += size

        for block in self._skipped:
            stack.callback(block.register_forward_hook(note).remove)
        first = self._first.register_forward_pre_hook(keep, with_kwargs=True)
        stack.callback(first.remove)

    def _skip(self, stack: ExitStack, keys: list[Hashable]) -> None:
        def replace(block: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            rows = [self._rows[key] for key in keys]
            if any(row.shape != hidden.shape[1:] for row in rows) or len(rows) != len(hidden):
                raise ValueError(
                    f"ActivationCache: {len(keys)} ids for rows of shape {tuple(hidden.shape)}, "
                    "stored with another length or number. Pad every example to one length."
                )
            cached = torch.stack(rows).to(hidden.device, hidden.dtype)
            if args:
                return (cached, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": cached}

        for block in self._skipped:
            block.forward = _returning(self._wrapped[block])
            stack.callback(delattr, block, "forward")
        first = self._first.register_forward_pre_hook(replace, with_kwargs=True)
        stack.callback(first.remove)
        self.n_skipped += 1


def _params(block: nn.Module) -> set[Tensor]:
    return set(block.parameters())


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ValueError("ActivationCache: the inputs of a block do not begin with a tensor.")
    return hidden


def _returning(wrapped: bool) -> Any:
    """A forward method that returns its first input, in a tuple where the block does."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden,) if wrapped else hidden

    return forward
