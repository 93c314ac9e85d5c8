"""Random problems for the comparison: parameters, groups, options and gradients of short runs."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..freezing.table import STATISTICS

SHAPES = ((1, 1), (3, 5), (17, 23), (31, 33), (2, 3, 7), (1, 1023), (1025, 1), (64, 65))


@dataclass
class Problem:
    """One training run; all tensors are fp64."""

    names: list[str] | None
    starts: list[Tensor]
    transposed: list[bool]  # whether a parameter is a transposed view
    groups: list[dict[str, Any]]  # "params" are positions in `starts`
    options: dict[str, Any]
    lr_factors: list[list[float]]  # for every step and group
    grads: list[list[Tensor | None]]  # for every step and parameter
    wide_grads: bool  # whether 16-bit parameters have fp32 gradients
    thawed_after: int | None  # step after which all units are thawed
    watched: bool  # whether decisions are compared after every step, or after the last one only

    def __str__(self) -> str:
        return (
            f"{self.options}; groups {self.groups}; shapes {[tuple(x.shape) for x in self.starts]}"
        )

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.wide_grads and dtype.itemsize == 2 else dtype

    def rounded_to(self, dtype: torch.dtype) -> Problem:
        """The problem with the nearest values that parameters and gradients can have."""
        grad_dtype = self.grad_dtype(dtype)
        starts = [x.to(dtype).double() for x in self.starts]
        grads = [[g if g is None else g.to(grad_dtype).double() for g in row] for row in self.grads]
        return replace(self, starts=starts, grads=grads)


def draw_problem(seed: int) -> Problem:
    """A problem whose thresholds are all 0: it measures and freezes nothing."""
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64, device="cpu")

    blocks = [_draw_block(rng, f"layers.{k}") for k in range(rng.randint(2, 4))]
    shapes = [shape for block in blocks for shape in block.values()]
    steps = rng.randint(12, 24)
    statistic = list(STATISTICS)[seed % len(STATISTICS)]  # each in six seeds in a row
    late = rng.random() < 0.5 or STATISTICS[statistic].of_update
    statistics = [name for name, x in STATISTICS.items() if late or not x.of_update]

    groups: list[dict[str, Any]] = []
    cut = sum(map(len, blocks[: rng.randint(1, len(blocks))]))
    for positions in filter(None, (range(cut), range(cut, len(shapes)))):
        groups.append(
            {
                "params": list(positions),
                "lr": 10 ** rng.uniform(-2.5, -1),
                "betas": (rng.choice([0.5, 0.9, 0.95]), rng.choice([0.9, 0.99, 0.999])),
                "eps": rng.choice([1e-8, 1e-3]),
                "weight_decay": rng.choice([0.0, 0.1]),
                "amsgrad": rng.random() < 0.3,
                "maximize": rng.random() < 0.3,
                "tau": None if groups and rng.random() < 0.15 else 0.0,
                "statistic": rng.choice(statistics) if groups else statistic,
            }
        )
    named = rng.random() < 0.6
    return Problem(
        names=[name for block in blocks for name in block] if named else None,
        starts=[0.2 * normal(shape) for shape in shapes],
        transposed=[len(shape) == 2 and rng.random() < 0.25 for shape in shapes],
        groups=groups,
        options={
            "grace_steps": rng.randint(0, 4),
            "tau_per": rng.choice(["unit", "element"]),
            "check_every": rng.choice([1, 1, 2, 3]),
            "patience": rng.choice([1, 1, 2, 3]),
            "freeze_timing": "next_step" if late else "same_step",
            "cooldown": rng.choice([0, 0, rng.randint(1, 6)]),
            "max_frozen": rng.choice([1.0, 1.0, 0.5]),
            "stop_grad": rng.choice(["auto", False]),
        },
        lr_factors=[
            [0.0 if rng.random() < 0.03 else 0.9**t * rng.uniform(0.8, 1) for _ in groups]
            for t in range(steps)
        ],
        grads=_draw_grads(rng, normal, shapes, steps),
        wide_grads=rng.random() < 0.3,
        thawed_after=rng.randint(steps // 2, steps - 2) if rng.random() < 0.25 else None,
        watched=rng.random() < 0.5,
    )


def _draw_block(rng: random.Random, layer: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors that must be in one group."""
    if rng.choice(["matrix", "matrix", "pair"]) == "pair":
        out, rank, inner = (rng.choice([1, 4, 9, 33]) for _ in range(3))
        name = f"base_model.model.{layer}.mlp.up_proj.lora_{{}}.default.weight"
        return {name.format("A"): (rank, inner), name.format("B"): (out, rank)}
    block: dict[str, tuple[int, ...]] = {f"{layer}.self_attn.q_proj.weight": rng.choice(SHAPES)}
    if rng.random() < 0.5:
        block[f"{layer}.self_attn.q_proj.bias"] = (rng.choice([1, 5, 257]),)
    return block


def _draw_grads(
    rng: random.Random, normal: Any, shapes: list[tuple[int, ...]], steps: int
) -> list[list[Tensor | None]]:
    """Drift plus decaying noise, so that statistics fall; some are missing, zero or NaN."""
    scales = [10 ** rng.uniform(-1.5, 0.5) for _ in shapes]
    drifts = [rng.choice([0.0, 0.05, 0.3]) * normal(shape) for shape in shapes]
    decays = [rng.uniform(0.75, 0.95) for _ in shapes]
    missing, zero, broken = (rng.choice([0.0, 0.0, p]) for p in (0.1, 0.1, 0.02))
    grads: list[list[Tensor | None]] = []
    for t in range(steps):
        row: list[Tensor | None] = []
        for shape, scale, drift, decay in zip(shapes, scales, drifts, decays, strict=True):
            grad = scale * (drift + decay**t * normal(shape))
            fault = rng.random()
            if fault < zero:
                grad.zero_()
            elif fault < zero + broken:
                grad.view(-1)[rng.randrange(grad.numel())] = math.nan
            row.append(None if zero + broken <= fault < zero + broken + missing else grad)
        grads.append([None] * len(row) if rng.random() < missing / 4 else row)
    return grads
