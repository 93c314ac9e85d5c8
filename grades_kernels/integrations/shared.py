"""Functions that the callbacks of all trainers use."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from ..cut.choose import choose_cut
from ..cut.cut import Cut
from ..freezing.naming import layer_and_kind
from ..optimizer import GradESAdamW


def unwrap_optimizer(optimizer: Any) -> GradESAdamW:
    """Return the GradESAdamW inside the wrappers of a trainer, such as Accelerate's.

    Args:
        optimizer: An optimizer, or a wrapper whose attribute `optimizer` is one.

    Raises:
        ValueError: If there is no GradESAdamW inside.
    """
    inner = optimizer
    while not isinstance(inner, GradESAdamW):
        outer, inner = inner, getattr(inner, "optimizer", None)
        if inner is None or inner is outer:
            raise ValueError(
                f"optimizer={type(optimizer).__name__} contains no GradESAdamW but "
                f"{type(outer).__name__}. Train with grades_kernels.GradESAdamW (in the Trainer of "
                "Transformers: call add_grades before train(), or make it in create_optimizer "
                "where that is overridden), or remove the GradESCallback."
            )
    return inner


def release_under_ddp(optimizer: GradESAdamW, find_wrapper: Callable[[], Any]) -> None:
    """Release frozen tensors in batches under DDP too, as on one process.

    The wrapper is initialised anew, as the same object, at the start of a step that releases. This
    is not part of a pickle or copy of the optimizer.

    Args:
        optimizer: The only optimizer of the model.
        find_wrapper: Returns the model as the loop calls it; nothing happens where that is no
            DistributedDataParallel.

    Raises:
        TypeError: If `find_wrapper` is the model itself.
    """
    if isinstance(find_wrapper, nn.Module):
        raise TypeError("find_wrapper must return the model: pass `lambda: model`")
    unwrap_optimizer(optimizer)._freezer.release.find_wrapper = find_wrapper


def is_finished(optimizer: GradESAdamW) -> bool:
    """Return whether all units are frozen, with the same answer on every rank of a job.

    A rank that stopped one step before the others would leave them waiting for its gradients. Never
    waits for the device or other ranks, and so is at most one step late where they decide.
    """
    return unwrap_optimizer(optimizer)._freezer.all_frozen_everywhere


def measurements(optimizer: GradESAdamW) -> dict[str, float]:
    """Return the state of a run as numbers for a log.

    Returns:
        "grades/frozen_share" (of the monitored units), "grades/trainable_elements" (a number), and
        "grades/STATISTIC/KIND", e.g. "grades/change/q_proj": the median of the last statistic over
        the units of one kind of matrix, for every kind that has been measured.
    """
    freezer = unwrap_optimizer(optimizer)._exact()
    units = freezer.table.units
    frozen = [unit.n_elements for unit in units if unit.is_frozen]
    numbers = {
        "grades/frozen_share": len(frozen) / max(1, len(units)),
        "grades/trainable_elements": float(freezer.n_elements - sum(frozen)),
    }
    statistics: dict[str, list[float]] = {}
    for unit in units:
        if math.isfinite(unit.value):
            _, kind = layer_and_kind(unit.name)
            statistics.setdefault(f"grades/{unit.statistic}/{kind}", []).append(unit.value)
    return numbers | {name: median(values) for name, values in statistics.items()}


def within_an_epoch(options: Mapping[str, Any], *loaders: Any) -> dict[str, Any]:
    """The options with which `choose_cut` reads no more batches than the shortest loader has.

    In a second epoch the gain would be measured on examples that the direction knows.
    """
    n_batches = (choose_cut.__kwdefaults__ or {})["n_batches"]
    for loader in loaders:
        with suppress(TypeError):  # it may have no length
            n_batches = min(n_batches, len(loader))
    if n_batches < 4:
        raise ValueError(
            f"cut='auto' needs four batches of different examples, an epoch has {n_batches}: use "
            "smaller batches, or pass a Cut."
        )
    return {"n_batches": n_batches, **options}


@contextmanager
def silent(logger: Any, *methods: str) -> Iterator[None]:
    """Let these methods of an object do nothing: a probe is no step of the run."""
    own = {name: x for name, x in vars(logger).items() if name in methods}
    vars(logger).update(dict.fromkeys(methods, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name in methods:
            del vars(logger)[name]
        vars(logger).update(own)


def choice_options(cut: Any) -> dict[str, Any] | None:
    """The options with which `choose_cut` has still to choose a cut; None where it need not."""
    if cut is None or isinstance(cut, Cut):
        return None
    options = set(choose_cut.__kwdefaults__ or ())
    if cut == "auto":
        return {}
    if isinstance(cut, Mapping) and options.issuperset(cut):
        return dict(cut)
    raise ValueError(
        f"Invalid cut: {cut!r} (choose 'auto', a Cut, None, or a dict with options of choose_cut: "
        f"{', '.join(sorted(options))})"
    )


def save_report(
    optimizer: GradESAdamW, folder: str | os.PathLike[str], cut: Cut | None = None
) -> None:
    """Write "grades_report.json" and, where matplotlib is installed, "grades_report.png"."""
    report = optimizer.report(cut)
    report.save(Path(folder) / "grades_report.json")
    try:
        report.plot(Path(folder) / "grades_report.png")
    except ImportError as error:
        warnings.warn(f"The freeze report was saved without a plot: {error}", stacklevel=2)
