"""Thin callbacks for trainers, and what they share. Importing this package needs torch alone."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from ..distributed import is_initialized
from ..optimizer import GradESAdamW

__all__ = ["is_finished", "measurements", "save_report", "unwrap_optimizer"]


def unwrap_optimizer(optimizer: Any) -> GradESAdamW:
    """The GradESAdamW inside the wrappers of a trainer.

    Accelerate's wrapper, for one, does not pass on `all_frozen` and `report()`.

    Args:
        optimizer: An optimizer, or a wrapper that holds one as its attribute `optimizer`.

    Raises:
        ValueError: If there is no GradESAdamW inside.
    """
    inner = optimizer
    while not isinstance(inner, GradESAdamW):
        outer, inner = inner, getattr(inner, "optimizer", None)
        if inner is None or inner is outer:
            raise ValueError(
                f"optimizer={type(optimizer).__name__} holds no GradESAdamW but "
                f"{type(outer).__name__}. Train with grades_kernels.GradESAdamW, or leave the "
                "GradESCallback away."
            )
    return inner


def is_finished(optimizer: GradESAdamW) -> bool:
    """Whether everything is frozen, with the same answer on every rank of a job.

    Elsewhere `all_frozen` may lag a step behind the device. A rank that stopped a step before the
    others would leave them waiting for its gradients, so in a job the decision is read exactly.
    """
    if is_initialized() and dist.get_world_size() > 1:
        return bool(optimizer.frozen_units) and optimizer.all_frozen
    return optimizer.all_frozen


def measurements(optimizer: GradESAdamW) -> dict[str, float]:
    """Where a run stands, as numbers for a log.

    Returns:
        "grades/frozen_share": frozen share of the monitored units, by count.
        "grades/trainable_elements": elements that still move.
        "grades/STATISTIC/KIND": median over the units of a kind of matrix of the last statistic,
            for every kind that has been measured, e.g. "grades/change/q_proj".
    """
    report = optimizer.report()
    found = {
        "grades/frozen_share": report.frozen_share()[-1][1],
        "grades/trainable_elements": float(report.trainable_elements()[-1][1]),
    }
    statistics: dict[str, list[float]] = {}
    for unit in report.units:
        if math.isfinite(unit.statistic):
            name = f"grades/{unit.criterion}/{unit.kind}"
            statistics.setdefault(name, []).append(unit.statistic)
    return found | {name: median(values) for name, values in statistics.items()}


def save_report(optimizer: GradESAdamW, folder: str | os.PathLike[str]) -> None:
    """Write "grades_report.json" and, where matplotlib is installed, "grades_report.png"."""
    report = optimizer.report()
    report.save(Path(folder) / "grades_report.json")
    try:
        report.plot(Path(folder) / "grades_report.png")
    except ImportError as error:
        warnings.warn(f"no picture of the freeze report: {error}", stacklevel=2)
