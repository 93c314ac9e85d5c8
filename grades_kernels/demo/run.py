"""The record of one training, its validation, and the rule of classic early stopping."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
from torch import nn

from .model import Plan, Text, loss_of, windows_at


@dataclass
class Run:
    """The record of one training."""

    name: str
    planned: int  # steps of the schedule
    end: str = "schedule complete"  # why the training ended
    n_units: int = 0  # monitored units, 0 for plain AdamW
    losses: list[float] = field(default_factory=list)  # of every step
    step_seconds: list[float] = field(default_factory=list)  # wall time without validation
    frozen: list[int] = field(default_factory=list)  # number of frozen units after every step
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    """`(step, training seconds so far, loss)` of every validation."""
    validation_seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.step_seconds)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.validations[-1][2]

    def unfrozen_ms(self) -> float:
        """Median time of a step before any freeze, without the first three steps."""
        timed = zip(self.step_seconds[3:], self.frozen[2:], strict=False)
        return 1e3 * median(seconds for seconds, n in timed if n == 0)

    def frozen_ms(self) -> float | None:
        """Median time of a step with half or more of the units frozen.

        The count is that of two steps before: the optimizer releases frozen units at the start of
        the next `step()`, so that only the backward pass after it is cheaper.
        """
        timed = zip(self.step_seconds[2:], self.frozen, strict=False)
        late = [1e3 * seconds for seconds, n in timed if n and 2 * n >= self.n_units]
        return median(late) if late else None


@torch.no_grad()
def validate(run: Run, model: nn.Module, text: Text, plan: Plan) -> None:
    """Append the loss on windows spread evenly over the held-out files to `run.validations`."""
    began = time.perf_counter()
    last_start = len(text.held_out) - plan.length - 1
    starts = torch.linspace(0, last_start, plan.windows, dtype=torch.float64).long()
    batches = windows_at(text.held_out, starts, plan).split(16)
    loss = fmean(loss_of(model, batch).item() for batch in batches)
    run.validation_seconds += time.perf_counter() - began
    run.validations.append((run.steps, run.seconds, loss))


def stop_early(run: Run, patience: int = 3, delta: float = 0.0005) -> str | None:
    """The reason to stop: `patience` validations in a row did not gain `delta` on the best."""
    best, without_gain = math.inf, 0
    for _, _, loss in run.validations[1:]:  # the first one precedes the training
        gain = loss < best - delta
        best, without_gain = (loss, 0) if gain else (best, without_gain + 1)
    return "stopped early" if without_gain >= patience else None
