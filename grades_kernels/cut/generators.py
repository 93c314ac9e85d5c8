"""The generators of random numbers that a forward pass may use."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch


def random_states(devices: Iterable[torch.device]) -> list[tuple[Any, Callable[[Any], Any]]]:
    """State and setter of each generator: Python's, NumPy's, the CPU's, the devices'."""
    found: list[tuple[Any, Callable[[Any], Any]]] = [
        (random.getstate(), random.setstate),
        (torch.get_rng_state(), torch.set_rng_state),
    ]
    numpy_random: Any = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random is not None:
        found.append((numpy_random.get_state(), numpy_random.set_state))
    for device in devices:
        if device.type not in ("cpu", "meta"):
            own = torch.get_device_module(device)
            found.append((own.get_rng_state(device), partial(own.set_rng_state, device=device)))
    return found
