"""The repeated blocks of a model, and which of its tensors lie below a block."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..freezing.naming import canonical_name


@dataclass(frozen=True, eq=False)
class Stack:
    """The repeated blocks of a model, lowest first.

    Attributes:
        name: Where they are, "encoder.layer" for example.
        blocks: The modules.
    """

    name: str
    blocks: tuple[nn.Module, ...]

    @property
    def is_composed(self) -> bool:
        """Whether modules inside of the blocks have parameters of their own."""
        inside = (module for block in self.blocks for module in block.children())
        return any(next(module.parameters(), None) is not None for module in inside)

    @property
    def params(self) -> set[Tensor]:
        """The tensors of all blocks."""
        return {p for block in self.blocks for p in block.parameters()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by canonical name; a tied one under its first name."""
    return {canonical_name(name): p for name, p in model.named_parameters()}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Those that need a gradient."""
    return {name: p for name, p in tensors_of(model).items() if p.requires_grad}


def blocks_of(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """The blocks of the stack of this name, whether they train or not."""
    return next(
        (tuple(x.children()) for path, x in model.named_modules() if canonical_name(path) == name),
        (),
    )


def find_stack(model: nn.Module, name: str | None = None) -> Stack:
    """The stack of blocks in which something trains.

    A stack is a list of two or more modules of one class, outside of any other stack; a ModuleList
    may have a few classes, as in models that alternate attention with something else.

    `name` is the path of the stack, where a model has several; None: there is one, beside which
    lists of single layers (norms, the linear layers of a head) do not count.
    """
    stacks = {stack.name: stack for stack in _stacks(model)}
    if name is None:
        stacks = {path: x for path, x in stacks.items() if x.is_composed} or stacks
        if len(stacks) == 1:
            return next(iter(stacks.values()))
    if name is not None and canonical_name(name) in stacks:
        return stacks[canonical_name(name)]
    found = ", ".join(f"{x.name!r} ({len(x.blocks)} blocks)" for x in stacks.values())
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks in which something trains: a cut lies "
            "between two modules of a ModuleList, or of one class in a Sequential or ModuleDict."
        )
    if name is None:
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks: {found}. Choose one with "
            "blocks=...; everything that only it depends on is below its cut, all else is above."
        )
    raise ValueError(f"blocks={name!r} is no stack of blocks of {type(model).__name__}: {found}.")


def _stacks(model: nn.Module) -> Iterator[Stack]:
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        blocks = tuple(module.children())
        trains = any(p.requires_grad for p in module.parameters())
        n_classes = len({_class_of(block) for block in blocks})
        most = len(blocks) // 2 if isinstance(module, nn.ModuleList) else 1
        if len(blocks) > 1 and trains and n_classes <= most:
            inside.append(path)
            yield Stack(canonical_name(path), blocks)


def _class_of(block: nn.Module) -> type[nn.Module]:
    # torch.compile and checkpoint wrappers of a block
    while inner := getattr(block, "_orig_mod", getattr(block, "_checkpoint_wrapped_module", None)):
        block = inner
    return type(block)


def below_the_blocks(
    model: nn.Module, stack: Stack, backward: Callable[[], Any], used: Container[str]
) -> tuple[list[nn.Module], list[str], list[str]]:
    """The blocks as they run, and tensors outside of them that act on the loss through them.

    The first names are those of tensors that act in no other way than through the inputs of the
    lowest block, which may also go around it (`h = h + block(h)`): token and position embeddings,
    the norm above these, a tower whose output enters the blocks. They get no gradient, or one of
    zeros, once none flows down from there. The second names are those of embeddings that are also
    used elsewhere, as a tied head: their gradient changes then.

    Args:
        backward: Computes the loss and all gradients anew, the same in every call.
        used: Names of the tensors that get a gradient from it. Others may act on the loss of other
            batches, as the head of a second task.
    """
    # Hooks that are set after `model.compile()` may not be seen by code that was compiled before.
    with _stopped_inputs(stack.blocks) as order, torch.compiler.set_stance("force_eager"):
        backward()
    if not order:
        raise ValueError(
            f"the blocks of {stack.name!r} are not called as modules, so that no cut can be found "
            "between them. Name another stack with blocks=..."
        )
    named, inside = trainable(model), stack.params
    outside = {name: p for name, p in named.items() if p not in inside}
    stopped = {name: p.grad for name, p in outside.items() if p.grad is not None}
    norms = {name: _norm(grad) for name, grad in stopped.items()}
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    if any(not norms[name] or named[name] in tables for name in stopped):
        backward()
    below, tied = [], []
    for name, p in outside.items():
        whole: Any = p.grad
        if name not in stopped:
            below += [name] if name in used else []
        elif not norms[name]:  # a gradient may also be zero by itself, as with LoRA's B = 0
            below += [name] if _norm(whole) else []
        # More than the rounding of another order of sums.
        elif p in tables and _norm(stopped[name] - whole) > 1e-3 * _norm(whole):
            tied.append(name)
    return order, below, tied


def _norm(x: Any) -> float:
    norm = x.abs().float().norm()
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


@contextmanager
def _stopped_inputs(blocks: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Let no gradient flow down from the inputs of the block that runs first.

    Nor from where they go around it. Inputs of later blocks too, such as the output of an encoder,
    lose only the gradient from that block. Yields the blocks as they run.
    """
    order: list[nn.Module] = []
    inputs: dict[int, Tensor] = {}  # by id, which no other tensor gets meanwhile
    of_later: set[int] = set()

    def stop(x: Tensor) -> Tensor:
        if x.requires_grad and id(x) not in inputs:
            number = id(x)
            inputs[number] = x
            hook = x.register_hook(lambda g: None if number in of_later else torch.zeros_like(g))
            hooks.callback(hook.remove)  # it may be a parameter
        return x.detach()

    def begin(block: nn.Module, args: Any, kwargs: Any) -> Any:
        if block not in order:
            order.append(block)
        if block is order[0]:
            return tree_map_only(Tensor, stop, (args, kwargs))
        tree_map_only(Tensor, lambda x: of_later.add(id(x)), (args, kwargs))
        return None

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        yield order
