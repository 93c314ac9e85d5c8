"""The arguments that decide about freezing, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from .table import STATISTICS, FreezeConfig

TIMINGS = ("same_step", "next_step")
_LEAST = {"total_steps": 1, "grace_steps": 0, "check_every": 1, "patience": 1, "cooldown": 0}


def exact_grace_steps(alpha: float, total_steps: int) -> int:
    """`ceil(alpha * total_steps)` for the decimal number that was written, e.g. 7 for 0.28 * 25.

    The floating-point product is 7.000000000000001 there, whose ceiling is one step late.
    """
    return math.ceil(Fraction(str(alpha)) * total_steps)


def make_config(*, alpha: float, **arguments: Any) -> FreezeConfig:
    """The configuration for the arguments of `GradESAdamW`, checked."""
    check_number("alpha", alpha, "[0, 1)", lambda x: 0 <= x < 1)
    check_number("max_frozen", arguments["max_frozen"], "(0, 1]", lambda x: 0 < x <= 1)
    for name, least in _LEAST.items():
        optional = name in ("total_steps", "grace_steps")
        if not (optional and arguments[name] is None):
            check_integer(name, arguments[name], least)
            arguments[name] = int(arguments[name])  # NumPy's cannot be loaded by `torch.load`
    check_choice("tau_per", arguments["tau_per"], ("unit", "element"))
    check_choice("freeze_timing", arguments["freeze_timing"], TIMINGS)
    stop_grad = arguments["stop_grad"]
    if not (isinstance(stop_grad, bool) or stop_grad == "auto"):
        raise ValueError(f"Invalid stop_grad: {stop_grad!r} (choose 'auto', True or False)")
    if arguments["grace_steps"] is None and arguments["total_steps"] is not None:
        arguments["grace_steps"] = exact_grace_steps(alpha, arguments["total_steps"])
    return FreezeConfig(alpha=float(alpha), **arguments)


def check_group(config: FreezeConfig, group: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of a parameter group that cannot work."""
    tau, statistic = group["tau"], group["statistic"]
    if not group.get("decoupled_weight_decay", True):
        raise ValueError(
            "decoupled_weight_decay=False is Adam's weight decay, not AdamW's: leave it out."
        )
    check_choice("statistic", statistic, tuple(STATISTICS))
    if tau is None:
        return
    if tau == "auto":
        if statistic != "signal":
            raise ValueError(
                f"tau='auto' needs statistic='signal', not {statistic!r}: no other statistic "
                "has a scale that is known beforehand. Observe it with tau=0.0, then choose."
            )
    else:
        check_number("tau", tau, "[0, inf], 'auto', or None: not monitored", lambda x: x >= 0)
    if STATISTICS[statistic].of_update and config.freeze_timing != "next_step":
        raise ValueError(
            f"statistic={statistic!r} needs freeze_timing='next_step': how far a weight moves "
            "is known after the update, too late to leave it out."
        )
    if config.grace_steps is None:
        raise ValueError(
            f"tau={tau} needs total_steps or grace_steps: the grace period (alpha * "
            "total_steps, or grace_steps) keeps the small gradients of warm-up from freezing "
            "everything. Both are options of the whole optimizer, which groups do not carry."
        )
    if group.get("differentiable", False):
        raise ValueError(
            f"differentiable=True cannot be combined with tau={tau}: freezing is a decision, "
            "which has no derivative. Use tau=None."
        )


def check_new_group(config: FreezeConfig, group: Mapping[str, Any]) -> None:
    """As `check_group`, and for an option of the whole optimizer that a new group has otherwise."""
    # ZeroRedundancyOptimizer copies them into groups, which go into checkpoints for other runs.
    # Without tau a group may have keys of these names that belong to somebody else.
    for name, value in vars(config).items():
        if group["tau"] is not None and group.get(name) not in (None, value):
            raise ValueError(
                f"a parameter group has {name}={group[name]!r}, the optimizer {value!r}: it is the "
                "same for all groups. A group may have a tau and a statistic of its own."
            )
    check_group(config, group)


def unused_options(config: FreezeConfig, groups: Sequence[Mapping[str, Any]]) -> str:
    """A sentence about options of freezing that are set though no group has a tau, or ""."""
    if any(group["tau"] is not None for group in groups):
        return ""
    default = vars(FreezeConfig())
    changed = [f"{name}={x!r}" for name, x in vars(config).items() if x != default[name]]
    changed += dict.fromkeys(
        f"statistic={g['statistic']!r}" for g in groups if g["statistic"] != "change"
    )
    if not changed:
        return ""
    return (
        "tau is None in every group, so that nothing is measured or frozen. Without effect: "
        f"{', '.join(changed)}. Set tau; tau=0.0 observes."
    )


# These raise ValueError with the argument, the value and the valid ones.


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"Invalid {name}: {value!r} (choose one of {', '.join(map(repr, choices))})"
        )


def check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"Invalid {name}: {value!r} (must be an integer of at least {least})")


def check_number(name: str, value: Any, wanted: str, is_valid: Callable[[Any], bool]) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not is_valid(value):
        raise ValueError(f"Invalid {name}: {value!r} (must be a number in {wanted})")
