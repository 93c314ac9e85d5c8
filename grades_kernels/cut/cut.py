"""Cut: which tensors of a model are left as they are from the first step on, and why."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..report.plot import picture_path
from ..report.record import load_json, save_json, to_json
from ..report.tables import Table, layout, shorten
from .blocks import blocks_of, tensors_of

NO_REENTRANT = (
    "with reentrant activation checkpointing the blocks above a frozen prefix get no gradients at "
    "all. Use checkpoint(..., use_reentrant=False), in transformers "
    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
)


class Candidate(NamedTuple):
    """One place for a cut.

    Attributes:
        k: Frozen blocks, counted from the lowest; 0: only tensors below the blocks; None: no cut.
        gain: Gain of a step with the cut, the decrease of the loss, as a share of that without.
        cost: Forward and backward pass of a step as a share of that without a cut.
        ratio: `gain / cost`: gain per compute, relative to no cut.
        error: Standard error of `ratio` over the batches that measured it.
    """

    k: int | None
    gain: float
    cost: float
    ratio: float
    error: float


@dataclass(frozen=True)
class Cut:
    """A choice of the lowest blocks that are not trained, with the candidates.

    `choose_cut` makes it. It refers to no tensor and can be pickled.

    Attributes:
        k: Blocks that are not trained, counted from the lowest, with everything below them; 0: only
            the tensors below the blocks; None: no cut is worth it.
        stack: Where the blocks are, "encoder.layer" for example.
        candidates: All places that were compared.
        segments: Names of the tensors below the blocks, then those of every block, lowest first.
        gains: The decrease of the loss by a trial step, less that without the tensors below the
            blocks, then without every block too; last that of the tensors above alone.
        shapes: Every trained tensor of the model with its shape.
        reason: Why this one was chosen, in one sentence.
        tied: Names of embeddings that are the head as well and go on training above the cut, so
            that the backward pass has to reach the lowest block.
    """

    k: int | None
    stack: str
    candidates: tuple[Candidate, ...]
    segments: tuple[tuple[str, ...], ...]
    gains: tuple[float, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    reason: str
    tied: tuple[str, ...] = ()

    @property
    def n_blocks(self) -> int:
        return len(self.segments) - 1

    @property
    def leaves_blocks(self) -> bool:
        """Whether a block is left to train, in which matrices can freeze later."""
        return self.k is None or self.k < self.n_blocks

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the tensors that the cut freezes, without the prefixes of wrappers."""
        segments = () if self.k is None else self.segments[: self.k + 1]
        return tuple(name for segment in segments for name in segment)

    def at(self, k: int | None) -> Cut:
        """The cut at another place.

        Raises:
            ValueError: If `k` is not one of the candidates.
        """
        places = [candidate.k for candidate in self.candidates]
        if k not in places:
            raise ValueError(f"k={k!r} is no candidate of this cut: choose one of {places}")
        return replace(self, k=k, reason=f"k={k} was set by hand")

    def apply(self, model: nn.Module, *, eval_frozen: bool = False) -> list[str]:
        """Freeze everything below the cut; make the optimizer afterwards.

        The tensors get `requires_grad=False` and lose their gradients. Where transformers or PEFT
        keep the backward pass alive below the cut (`enable_input_require_grads`), that is undone.
        LoRA adapters below the cut that have not changed anything yet (B = 0) are no longer active,
        which spares their forward pass.

        Args:
            model: The model that the cut was chosen for, or a copy of it.
            eval_frozen: Whether modules below the cut stay in evaluation mode: no dropout, and no
                update of running statistics.

        Returns:
            The names of the frozen tensors, without the prefixes of wrappers such as PEFT's; none
            without a cut.

        Raises:
            ValueError: If the model has other tensors than the one that the cut was chosen for, is
                wrapped by DDP, or uses reentrant activation checkpointing. Nothing has changed
                then.
        """
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "Cut.apply: this DistributedDataParallel would wait for the gradients of frozen "
                "tensors. Apply the cut to model.module, and wrap that anew."
            )
        params = tensors_of(model)
        for name, shape in self.shapes:
            if name not in params or tuple(params[name].shape) != shape:
                found = tuple(params[name].shape) if name in params else "nothing"
                raise ValueError(
                    f"this cut was chosen for another model: {name!r} has shape {shape} there, in "
                    f"{type(model).__name__} it is {found}. Call choose_cut for this model."
                )
        blocks = blocks_of(model, self.stack)
        if len(blocks) != self.n_blocks:
            raise ValueError(
                f"this cut was chosen for another model, with {self.n_blocks} blocks in "
                f"{self.stack!r}; {type(model).__name__} has {len(blocks)}. Call choose_cut for it."
            )
        if self.k is None:
            return []
        if any(_is_reentrant(module) for module in model.modules()):
            raise ValueError(f"Cut.apply: {NO_REENTRANT}")
        frozen = [params[name] for name in self.frozen]
        for p in frozen:
            p.requires_grad_(False)
            p.grad = None
        disable_input_grads(model)
        for module in list(_maximal(model, set(frozen), blocks[: self.k])):
            inner: Any
            for inner in module.modules():  # a ModuleList itself is never called
                if eval_frozen:
                    inner.register_forward_pre_hook(_stay_in_eval)
                if _has_adapters(inner) and not has_trained_adapters(inner):
                    inner.set_adapter([])  # which lasts, unlike `enable_adapters(False)`
        return list(self.frozen)

    def summary(self) -> str:
        """The frozen tensors, in one line."""
        if self.k is None:
            return "no cut: everything trains"
        sizes = {name: math.prod(shape) for name, shape in self.shapes}
        elements = sum(sizes[name] for name in self.frozen)
        return (
            f"{self.k} of {self.n_blocks} blocks of {shorten(self.stack, 60)} and everything below "
            f"them are frozen: {elements:,} of {sum(sizes.values()):,} elements"
        )

    def __str__(self) -> str:
        lines = [f"Cut of {shorten(self.stack, 60)}: {self.reason}", self.summary()]
        lines += [
            f"{shorten(name, 50)} is used above the blocks too and goes on training, so the "
            "backward pass reaches the lowest block. tied='freeze' freezes it."
            for name in self.tied
        ]
        rows = []
        for k, *numbers in self.candidates:
            cells = ["no cut" if k is None else f"{k}", *(f"{x:.3f}" for x in numbers)]
            rows.append([*cells, "<- chosen" if k == self.k else ""])
        header = ["frozen blocks", "gain left", "cost", "gain/cost", "standard error", ""]
        places = Table("Places for a cut, relative to no cut", header, rows, left=[""])
        names = ["below the blocks", *map(str, range(self.n_blocks)), "above the blocks"]
        total = sum(self.gains)
        rows = [
            [name, f"{gain:.4g}", f"{100 * gain / total:.1f} %" if total > 0 else "-"]
            for name, gain in zip(names, self.gains, strict=True)
        ]
        title = "Decrease of the loss by a trial step, by block"
        shares = Table(title, ["block", "gain", "share"], rows, left=["block"])
        return "\n\n".join(["\n".join(lines), layout(places), layout(shares)])

    def to_dict(self) -> dict[str, Any]:
        """The cut in the types of JSON."""
        return to_json(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the cut to a JSON file, from which a run can be resumed, and return its path."""
        return save_json(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cut:
        """Read a file that `save` wrote.

        Raises:
            ValueError: If it is not such a file; the message names it and the reason.
        """
        return load_json(cls, path, "a cut")

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw gain by block, gain and cost left by cut, and their ratio with its standard error.

        The suffix of `path` chooses the format, ".png" when there is none. Returns the path.

        Raises:
            ImportError: matplotlib is missing; the message says how to install it.
        """
        path = picture_path(path, "Cut.plot()")
        from matplotlib.figure import Figure

        figure = Figure((13, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        total = sum(self.gains) or 1.0
        names = ["below", *map(str, range(self.n_blocks)), "above"]
        left.bar(range(len(names)), [gain / total for gain in self.gains], color="#117733")
        left.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 0)
        left.set_title("Share of the gain, by block", loc="left")
        cuts, gains, costs, ratios, errors = zip(*self.candidates, strict=True)
        x, places = range(len(cuts)), ["none" if k is None else str(k) for k in cuts]
        middle.plot(x, gains, "o-", color="#117733", label="gain left")
        middle.plot(x, costs, "s--", color="#882255", label="cost")
        middle.set_title("Gain and cost above the cut", loc="left")
        middle.set_ylim(bottom=0)
        middle.legend(frameon=False)
        right.errorbar(x, ratios, errors, fmt="o-", color="#332288", capsize=3)
        right.axhline(1.0, color="0.5", linestyle="dotted")
        chosen = cuts.index(self.k)
        right.plot([chosen], [ratios[chosen]], "o", color="#CC6677", markersize=11, zorder=3)
        right.set_title("Gain per cost (chosen: large dot)", loc="left")
        for axis in (middle, right):
            axis.set_xticks(x, places, rotation=90 if len(cuts) > 12 else 0)
            axis.set_xlabel("frozen blocks")
        for axis in (left, middle, right):
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        return path


def disable_input_grads(model: nn.Module) -> Callable[[], None]:
    """Undo `enable_input_require_grads` of transformers and PEFT; the result is called to redo it.

    Both may have done it, each with a hook of its own of which the model remembers the last.
    """
    removed = []
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                removed.append((module, number, hook))
                del module._forward_hooks[number]

    def redo() -> None:
        for module, number, hook in removed:
            module._forward_hooks[number] = hook

    return redo


def _maximal(
    module: nn.Module, frozen: set[Tensor], blocks: Sequence[nn.Module]
) -> Iterator[nn.Module]:
    """The largest modules that train nothing: those with tensors of `frozen`, and blocks."""
    params = list(module.parameters())
    if module in blocks or any(p in frozen for p in params):
        if not any(p.requires_grad for p in params):
            yield module
        else:
            for child in module.children():
                yield from _maximal(child, frozen, blocks)


def _is_reentrant(module: Any) -> bool:
    """Whether a module of transformers runs under reentrant activation checkpointing."""
    run = getattr(module, "_gradient_checkpointing_func", None)
    is_on = getattr(module, "gradient_checkpointing", False)
    return bool(is_on and run and getattr(run, "keywords", {}).get("use_reentrant"))


def _stay_in_eval(module: nn.Module, args: Sequence[Any]) -> None:
    """A hook, since `model.train()` reaches every module."""
    if module.training:
        module.eval()


def _has_adapters(module: Any) -> bool:
    """Whether a module is a layer of PEFT with LoRA adapters."""
    factors = getattr(module, "lora_B", None)
    return (
        isinstance(factors, nn.ModuleDict) and len(factors) > 0 and hasattr(module, "set_adapter")
    )


def has_trained_adapters(module: Any) -> bool:
    """Whether LoRA adapters of this very module change its output."""
    return _has_adapters(module) and any(p.count_nonzero() for p in module.lora_B.parameters())
