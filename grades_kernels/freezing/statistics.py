"""The statistics that can be measured, and the scale of the one that has a known one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

STATISTICS = ("change", "norm", "momentum", "signal", "weight_change")
AUTO_TAU = 1.1
"""The threshold tau="auto" as a multiple of the noise floor of "signal"."""


def noise_floor(beta1: float) -> float:
    """The "signal" of a gradient that is pure noise: about 0.18 for beta1 = 0.9.

    exp_avg is then a sum of independent terms with weights (1 - beta1) * beta1^k and so normal with
    standard deviation sqrt((1 - beta1) / (1 + beta1)) times that of the gradient, which
    sqrt(exp_avg_sq) estimates; the mean absolute value of a normal variable is sqrt(2 / pi) of its
    standard deviation.
    """
    return math.sqrt(2 / math.pi * (1 - beta1) / (1 + beta1))


def threshold(group: Mapping[str, Any]) -> float | None:
    """The tau of a parameter group as a number; "auto" is a tenth above the noise floor."""
    if group["tau"] == "auto":
        return AUTO_TAU * noise_floor(float(group["betas"][0]))
    return group["tau"]
