"""ActivationCache: the outputs of a frozen prefix, stored for the next epochs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import blocks_of, tensors_of
from .cut import Cut
from .generators import random_states


class ActivationCache:
    """Keeps the output of the highest frozen block, one row per example.

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
    the same padded length. Weights that are written through `.data` make another cache necessary:
    that leaves no trace.

    Args:
        model: The model, after `cut.apply(model, eval_frozen=True)`, and after `fully_shard`.
        cut: The cut; at least one block is frozen.
        max_bytes: Size up to which rows are stored, in the memory of the CPU.
        dtype: The dtype of stored rows; None: as they are computed.

    Attributes:
        n_bytes: Bytes that are stored.
        n_skipped: Forward passes in which the frozen blocks did not run.

    Raises:
        ValueError: If no block is frozen, or tensors below the cut still train.
    """

    def __init__(
        self, model: nn.Module, cut: Cut, *, max_bytes: float, dtype: torch.dtype | None = None
    ) -> None:
        if not cut.k:
            raise _error(f"the cut freezes {cut.k or 0} of {cut.n_blocks} blocks.")
        params = tensors_of(model)
        if any(name not in params or params[name].requires_grad for name in cut.frozen):
            raise _error(
                "tensors below the cut still train. Call cut.apply(model, eval_frozen=True) first."
            )
        self._model, self._cut, self._k = model, cut, cut.k
        self._blocks = blocks_of(model, cut.stack)
        self._below = self._tensors_below()
        self._versions = self._current_versions()
        self._frozen: list[nn.Module] = []  # lowest first, as they ran
        self._rows: dict[Hashable, Tensor] = {}
        self._wrapped: dict[nn.Module, bool] = {}  # whether a block returns a tuple
        self.max_bytes, self.dtype = max_bytes, dtype
        self.n_bytes = self.n_skipped = 0

    @contextmanager
    def rows(self, ids: Sequence[Hashable] | Tensor) -> Iterator[None]:
        """Within the context, one forward pass of the model for the examples `ids`.

        Args:
            ids: Identifies each row of the batch, in its order; of tensors, their numbers.

        Raises:
            ValueError: If the outputs of the frozen blocks are not the same in every epoch, since
                random numbers or a tensor that trains act on it, weights have changed, or a block
                is in training mode; if more is read from them than one tensor with a row per
                example; if they run more than once or not as modules; if an example comes with
                another length.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        keys = [key.item() if isinstance(key, Tensor) else key for key in ids]
        if self._is_outdated():
            raise _error("weights below the cut have changed or train again. Make a new cache.")
        ran: list[nn.Module] = []
        with ExitStack() as stack:
            skips = bool(keys) and all(key in self._rows for key in keys)
            (self._skip if skips else self._store)(stack, keys, ran)
            yield
        if skips and self._frozen[-1] not in ran:
            raise _error("the highest frozen block did not run, for which rows are stored.")
        if not skips and len(ran) < self._k:
            raise _error(
                f"{len(ran)} of {self._k} frozen blocks were called as modules. Code that "
                "torch.compile made before may not call them: make the cache before the first "
                "compiled step."
            )

    def _tensors_below(self) -> dict[str, Tensor]:
        """The tensors below the cut by name, the base weights of adapters too."""
        blocks, frozen = blocks_of(self._model, self._cut.stack), set(self._cut.frozen)
        inside = {p for block in blocks[: self._k] for p in block.parameters()}
        tensors = tensors_of(self._model).items()
        return {name: p for name, p in tensors if name in frozen or p in inside}

    def _current_versions(self) -> list[tuple[Any, ...]]:
        return [(p._version, p.requires_grad, p.dtype) for p in self._below.values()]

    def _is_outdated(self) -> bool:
        """Whether tensors below the cut were written, cast, replaced or added."""
        now = self._tensors_below()
        return (
            self._current_versions() != self._versions
            or now.keys() != self._below.keys()
            or any(_is_replaced(p, now[name]) for name, p in self._below.items())
        )

    def _store(self, stack: ExitStack, keys: list[Hashable], ran: list[nn.Module]) -> None:
        device = next(iter(self._below.values())).device
        states_before = _random_states(device)

        def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if block in ran[: self._k]:
                raise _error("a frozen block runs twice. Use one context for each forward pass.")
            ran.append(block)
            if len(ran) > self._k:
                return
            names = (name for name, p in block.named_parameters() if p.requires_grad)
            if name := next(names, None):
                raise _error(f"{name!r} of a frozen block trains: a higher block has it too.")
            if block.training:
                raise _error(
                    "a frozen block is in training mode, so that dropout would differ in every "
                    "epoch. Use cut.apply(model, eval_frozen=True)."
                )
            _check_hooks(block)
            alone = isinstance(output, tuple) and len(output) == 1
            hidden = output[0] if alone else output
            if not isinstance(hidden, Tensor):
                raise _error("a frozen block returns more than its hidden states.")
            if hidden.shape != _hidden(args, kwargs).shape:
                raise _error("a frozen block returns hidden states of another shape than it gets.")
            self._wrapped[block] = alone
            if len(ran) == self._k:
                self._frozen = ran[:]
                keep(hidden)

        def keep(hidden: Tensor) -> None:
            if hidden.requires_grad:
                raise _error(
                    "a tensor that trains acts on the frozen blocks, such as an embedding that is "
                    "also the head. Choose the cut with tied='freeze'."
                )
            if states_before != _random_states(device):
                raise _error(
                    "random numbers were drawn below the cut. Set the dropout between embeddings "
                    "and blocks to zero, and draw others before the context."
                )
            if hidden.shape[0] != len(keys):
                raise _error(f"{len(keys)} ids for {hidden.shape[0]} rows of a batch.")
            if len(keys) in hidden.shape[1:2] and not self._batch_comes_first():
                raise _error(
                    "a module below the cut has batch_first=False, and a batch has as many rows as "
                    "tokens: rows of the hidden states may be no examples. Use batch_first=True."
                )
            for key, row in zip(keys, hidden.detach(), strict=True):
                size = row.numel() * (self.dtype or row.dtype).itemsize
                if key not in self._rows and self.n_bytes + size <= self.max_bytes:
                    self._rows[key] = row.to("cpu", self.dtype, copy=True)
                    self.n_bytes += size
            self._computed = hidden.dtype

        for block in self._blocks:
            # Before the block's own hooks, which are called with the stored rows, too.
            hook = block.register_forward_hook(note, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)

    def _batch_comes_first(self) -> bool:
        modules = (module for block in self._frozen for module in block.modules())
        return all(getattr(module, "batch_first", True) for module in modules)

    def _skip(self, stack: ExitStack, keys: list[Hashable], ran: list[nn.Module]) -> None:
        for block in self._frozen:
            _check_hooks(block)

        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if block in ran:
                raise _error("a frozen block runs twice. Use one context for each forward pass.")
            ran.append(block)
            # A skip connection that reads a lower block gets NaN: its output is not stored.
            hidden = _hidden(args, kwargs)
            if block is not self._frozen[-1]:
                hidden = torch.full_like(hidden, math.nan)
            else:
                rows = [self._rows[key] for key in keys]
                if any(row.shape != hidden.shape[1:] for row in rows) or len(rows) != len(hidden):
                    raise _error(
                        f"{len(keys)} ids for rows of shape {tuple(hidden.shape)}, stored with "
                        "another length or number. Pad every example to one length."
                    )
                hidden = torch.stack(rows).to(hidden.device, self._computed)
            return (hidden,) if self._wrapped[block] else hidden

        for block in self._frozen:
            # Libraries that cast or move weights give an instance a forward of its own.
            own = {name: value for name, value in vars(block).items() if name == "forward"}
            stack.callback(vars(block).update, own)
            stack.callback(vars(block).pop, "forward")
            vars(block)["forward"] = partial(forward, block)
        self.n_skipped += 1


def _is_replaced(p: Tensor, now: Tensor) -> bool:
    """Whether it is another tensor, and not the same one gathered by FSDP2 or offloaded."""
    is_same_kind = hasattr(p, "_spec") == hasattr(now, "_spec")
    return now is not p and is_same_kind and not now.is_meta


def _error(text: str) -> ValueError:
    return ValueError(f"ActivationCache: {text}")


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise _error("the inputs of a block do not begin with a tensor.")
    return hidden


def _check_hooks(block: nn.Module) -> None:
    if any(inner._forward_hooks for inner in block.modules() if inner is not block):
        raise _error(
            f"hooks inside of {type(block).__name__} would not be called. Remove them; "
            "transformers sets them for output_router_logits and output_attentions."
        )


def _random_states(device: torch.device) -> list[Any]:
    """The states of all generators, in a form that can be compared."""
    states = random_states([device])
    return [x.tolist() if isinstance(x, Tensor) else repr(x) for x, _ in states]
