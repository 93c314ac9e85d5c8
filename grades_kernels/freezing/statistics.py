"""The statistics that can be measured, and the threshold of a parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATISTICS = ("change", "norm", "momentum", "signal", "weight_change", "gain")
AUTO_TAU = 1.2
"""The threshold tau="auto": a fifth above 1, which "signal" is for gradients of pure noise."""


def threshold(group: Mapping[str, Any]) -> float | None:
    """The tau of a parameter group as a number."""
    return AUTO_TAU if group["tau"] == "auto" else group["tau"]
