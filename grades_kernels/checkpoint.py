"""The freeze table in an optimizer's state, and how it travels through checkpoints.

The table is stored as Python numbers in the state of every monitored parameter, next to AdamW's own
tensors, because nothing else survives every way of saving: `load_state_dict` casts each state
tensor but `step` to the parameter's dtype (torch/optim/optimizer.py), which turns 1001 into 1000
in bf16, and `torch.distributed.checkpoint` drops keys beside "state" and "param_groups". The
numbers are written when a unit is decided, and for every checkpoint, pickle and copy. None is ever
NaN: an unknown number is -1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .freezing.naming import canonical_name
from .freezing.table import NEVER, FreezeConfig, Unit
from .freezing.unit_map import UnitMap
from .state_tensors import MOMENTS, add_missing_moments, full_shape, placeholder

State = dict[Tensor, dict[str, Any]]
Groups = Sequence[dict[str, Any]]

STATE_KEYS = {
    "grades_hits": "hits",
    "grades_decided_at": "decided_at",
    "grades_frozen_at": "frozen_at",
    "grades_stopped_at": "released_at",  # its name in the first version
    "grades_prev_step": "prev_step",
    "grades_statistic": "value",
    "grades_tau": "decided_tau",
    "grades_decided_statistic": "decided_value",
}
"""State key -> attribute of `Unit`."""

OWN_KEYS = ("prev_grad", "grades_t", *STATE_KEYS)
OWN_GROUP_KEYS = ("tau", "statistic")


def unit_numbers(unit: Unit) -> dict[str, int | float]:
    """The row of a unit as the state has it."""
    numbers = {key: getattr(unit, name) for key, name in STATE_KEYS.items()}
    return {key: -1.0 if math.isnan(x) else x for key, x in numbers.items()}


DEFAULT_STATE: dict[str, int | float] = {
    "grades_t": 0,
    **unit_numbers(Unit("", "change", 0.0, 0)),
}
"""The numbers of a monitored tensor that has measured nothing yet."""


def is_frozen(state: Mapping[str, Any] | None) -> bool:
    """Whether the state of a tensor says that it is frozen."""
    return (state or {}).get("grades_frozen_at", NEVER) != NEVER


def init_one_state(unit_map: UnitMap, state: State, groups: Groups, t: int) -> None:
    """Make the state of one monitored tensor after `t` steps, where none has a state yet.

    The number of steps is saved in it. Without gradients no tensor has one.
    """
    params = [p for p, _ in unit_map.monitored]
    if t > 0 and params and not any(state.get(p) for p in params):
        _init_states(params[:1], state, groups)


def write_units(
    units: Sequence[Unit], unit_map: UnitMap, state: State, groups: Groups, t: int
) -> None:
    """Copy rows of the table into the state of the units' tensors."""
    decided = [p for unit in units if unit.is_decided for p in unit_map.members[unit]]
    _init_states([p for p in decided if not state.get(p)], state, groups)
    for unit in units:
        for p in unit_map.members[unit]:
            own = state.get(p)
            if not own:
                continue
            own.update(unit_numbers(unit), grades_t=t)
            if unit.uses_prev_grad and unit.is_decided:
                own["prev_grad"] = placeholder(p)  # it is measured no more


def read_units(unit_map: UnitMap, state: State, known: Iterable[Tensor] | None) -> None:
    """Fill the rows of a new map from the state: the least on which all tensors of a unit agree.

    `known` are the tensors of the map before; None: there was none. State that a caller has moved
    to another tensor has the numbers of the last checkpoint, where only decisions are up to date.

    Tensors that are not monitored have AdamW's keys and no other, those excepted that need no
    gradient now: they keep their row until they do again, without the previous gradient.
    """
    known = set(unit_map.params if known is None else known)
    for unit, members in unit_map.members.items():
        states = [state.get(p) or DEFAULT_STATE for p in members]
        if len(set(map(is_frozen, states))) > 1:
            raise ValueError(
                f"unit {unit.name!r} would have tensors that are frozen and others that are not: "
                "call thaw() before tensors join a frozen unit (requires_grad, attach, names)."
            )
        for key, name in STATE_KEYS.items():
            values = [own.get(key, DEFAULT_STATE[key]) for own in states]
            if name in ("value", "decided_tau", "decided_value"):
                setattr(unit, name, values[0] if values[0] >= 0 else math.nan)
            else:
                setattr(unit, name, min(values))
        if not known.issuperset(members):
            unit.hits, unit.prev_step = 0, NEVER
    untrained = set(unit_map.untrained)
    for p, unit_of_p in zip(unit_map.params, unit_map.units, strict=True):
        own = state.get(p)
        if own is None:
            continue
        if unit_of_p is None and p not in untrained:
            for key in OWN_KEYS:
                own.pop(key, None)
        elif unit_of_p is None or not unit_of_p.uses_prev_grad:
            own.pop("prev_grad", None)


def forget_moments(p: Tensor, state: State) -> None:
    """Set moments and step count to zero, also where the moments had been released."""
    own = state.get(p, {})
    for key in MOMENTS:
        if key in own:
            own[key] = full_shape(own[key], p)
    for key in ("step", *MOMENTS):
        if key in own:
            own[key].zero_()


def saved(state_dict: dict[str, Any], groups: Groups, *, compact: bool) -> dict[str, Any]:
    """torch's state dict with full shapes and AdamW's devices; see `GradESAdamW.state_dict`."""
    entries = state_dict.get("state", {})
    # Of the groups as they are now: a tensor may have been replaced since the last step.
    pairs = [(p, group) for group in groups for p in group["params"]]
    for k, (p, group) in enumerate(pairs):
        entry = dict(entries.get(k) or {})
        if not entry:
            continue
        if isinstance(entry.get("step"), Tensor) and not (group["capturable"] or group["fused"]):
            entry["step"] = entry["step"].cpu()  # where AdamW would store it
        if "prev_grad" in entry:
            # The widest dtype that a gradient may have (`grad_dtype` None allows any).
            entry["prev_grad"] = entry["prev_grad"].to(
                getattr(p, "grad_dtype", p.dtype) or torch.float32
            )
        for key in ("prev_grad", *MOMENTS):
            if key in entry and compact and entry[key].shape != p.shape:
                del entry[key]
            elif key in entry:
                entry[key] = full_shape(entry[key], p)
        entries[k] = entry
    for group in state_dict["param_groups"]:
        if not isinstance(group.get("tau"), (str, type(None))):
            # `torch.load` would refuse NumPy's numbers, of which quantiles are one.
            group["tau"] = float(group["tau"])
    return state_dict


def plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the keys that plain AdamW does not know."""
    state = {}
    for k, entry in state_dict["state"].items():
        state[k] = {key: x for key, x in entry.items() if key not in OWN_KEYS}
        if entry.get("grades_stopped_at", NEVER) != NEVER:  # zero moments start anew
            state[k]["step"] = torch.zeros_like(entry["step"])
    groups = [
        {key: value for key, value in group.items() if key not in OWN_GROUP_KEYS}
        for group in state_dict["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def prepared(
    incoming: dict[str, Any],
    prev_grads: dict[int, Tensor],
    groups: Groups,
    names: list[list[str] | None],
    state: State,
    config: FreezeConfig,
) -> dict[str, Any]:
    """A checked copy of an incoming state dict, without `prev_grad`, which torch would cast.

    Args:
        prev_grads: Receives them, by the position of their parameter among all.
        groups, state, config: Those of the optimizer.
        names: Per group the names of its tensors, or None.
    """
    sizes, live_sizes = (
        [len(group["params"]) for group in both] for both in (incoming["param_groups"], groups)
    )
    if sizes != live_sizes:
        what = (
            "has a different number of parameter groups"
            if len(sizes) != len(live_sizes)
            else "contains a parameter group that doesn't match the size of optimizer's group"
        )
        raise ValueError(
            f"loaded state dict {what}: it has groups of {sizes} tensors, the optimizer "
            f"of {live_sizes}. State is matched by position: make the groups as they were made for "
            "the checkpoint: apply its cut before (Cut.load), and call model.requires_grad_(True) "
            "where an earlier run on this model has frozen tensors."
        )
    keys = [k for group in incoming["param_groups"] for k in group["params"]]
    position = {k: n for n, k in enumerate(keys)}
    states = {}
    for k, entry in incoming["state"].items():
        if isinstance(entry, dict) and k in position:
            entry = dict(entry)
            prev_grad = entry.pop("prev_grad", None)
            if isinstance(prev_grad, Tensor):
                prev_grads[position[k]] = prev_grad
            for key in DEFAULT_STATE:
                # A flat distributed checkpoint fills in {} for a missing key; 0.1.0 wrote NaN.
                number = entry.get(key, 0)
                if not isinstance(number, (int, float)):
                    del entry[key]
                elif math.isnan(number):
                    entry[key] = -1.0
        states[k] = entry
    new_groups = [dict(group) for group in incoming["param_groups"]]
    for i, (group, live) in enumerate(zip(new_groups, groups, strict=True)):
        for key in (*OWN_GROUP_KEYS, "monitor_all"):
            if key in live:
                group.setdefault(key, live[key])
        # Which backend serves a group is this optimizer's choice, not the checkpoint's.
        group["fused"] = live["fused"]
        if group["tau"] is not None and config.grace_steps is None:
            raise ValueError(
                f"the checkpoint brings tau={group['tau']!r}, which needs a grace period: make the "
                "optimizer with total_steps or grace_steps."
            )
        _check_same_parameters(i, group, live, names[i], states, state)
    return {**incoming, "state": states, "param_groups": new_groups}


def replaced_settings(before: Groups, after: Groups) -> str:
    """A sentence about the thresholds and statistics that a checkpoint has replaced, or ""."""
    changes: dict[str, list[int]] = {}
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        for key in OWN_GROUP_KEYS:
            if old["tau"] is not None and old[key] != new[key]:
                changes.setdefault(f"{key}={new[key]!r} in place of {old[key]!r}", []).append(i)
    lines = [f"{what} (group {', '.join(map(str, numbers))})" for what, numbers in changes.items()]
    if not lines:
        return ""
    return (
        f"the checkpoint brings {'; '.join(lines)}, as it brings lr. To go on with others, set "
        "them in param_groups after loading."
    )


def loaded_t(params: Iterable[Tensor], state: State) -> int:
    """The count of steps that a loaded state stands for."""
    counts = [0]
    for p in params:
        own = state.get(p)
        if own:
            counts += [int(own.get("step", 0)), own.get("grades_t", 0)]
    return max(counts)


def complete_loaded_state(
    params: Iterable[Tensor], state: State, groups: Groups, prev_grads: Mapping[int, Tensor]
) -> None:
    """Complete the state that torch has cast, before the units are read.

    `state` and `groups` are the loaded ones, `prev_grads` as `prepared` took them out.
    """
    amsgrad = {p: group["amsgrad"] for group in groups for p in group["params"]}
    for n, p in enumerate(params):
        own = state.get(p)
        if not own:
            continue
        is_stored = n in prev_grads and prev_grads[n].shape == p.shape
        if not is_stored and "grades_prev_step" in own:
            own["grades_prev_step"] = NEVER
        if n in prev_grads:
            is_used = (
                own.get("grades_prev_step", NEVER) != NEVER
                and own.get("grades_decided_at", NEVER) == NEVER
            )
            # A copy, since the caller's tensor is not to be written to.
            own["prev_grad"] = prev_grads[n].to(p.device, copy=True) if is_used else placeholder(p)
        if not (step := torch.as_tensor(own.get("step", 0.0))).is_floating_point():
            own["step"] = step.to(_get_scalar_dtype())  # as converters write it
        # A compact checkpoint leaves out released moments.
        add_missing_moments(own, p, amsgrad=amsgrad[p])


def _init_states(params: Sequence[Tensor], state: State, groups: Groups) -> None:
    """Make the state of tensors that are decided before they ever had a gradient.

    It is as `Adam._init_group` makes it on the first gradient; plain AdamW reads `step` of every
    entry of a checkpoint. A tensor that was taken out of its group meanwhile gets none.
    """
    if not params:
        return
    group_of = {p: group for group in groups for p in group["params"]}
    for p in params:
        if (group := group_of.get(p)) is not None:
            device = p.device if group["capturable"] or group["fused"] else "cpu"
            state[p]["step"] = torch.tensor(0.0, dtype=_get_scalar_dtype(), device=device)
            add_missing_moments(state[p], p, amsgrad=group["amsgrad"])


def _are_same(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether these are the same names, up to the module from which they are counted."""
    if len(names) != len(others):
        return False
    one, other = ([f".{canonical_name(name)}" for name in both] for both in (names, others))
    outer, inner = (one, other) if len(one[0]) >= len(other[0]) else (other, one)
    pairs = zip(outer, inner, strict=True)
    outside = {a.removesuffix(b) if a.endswith(b) else None for a, b in pairs}
    return len(outside) == 1 and None not in outside


def _check_same_parameters(
    i: int,
    group: dict[str, Any],
    live_group: dict[str, Any],
    live_names: list[str] | None,
    states: dict[Any, Any],
    live_state: State,
) -> None:
    """Compare names and shapes of a saved group with the live ones; names follow the live."""
    live, keys = live_group["params"], group["params"]
    by_name = bool(keys) and isinstance(keys[0], str)
    # torch.distributed.checkpoint matches by name: its keys are names in the live order, while
    # `param_names` is a plain value that comes in the saved order.
    saved_names = keys if by_name else group.get("param_names")
    if by_name and "param_names" in group:
        group["param_names"] = live_group.get("param_names", list(keys))
    if not saved_names or len(saved_names) != len(live):
        saved_names = None
    # A checkpoint has the names that the groups were made with, or those in the model.
    both = (live_group.get("param_names"), live_names)
    if saved_names and any(names and _are_same(saved_names, names) for names in both):
        live_names = saved_names
    for j, (p, key) in enumerate(zip(live, keys, strict=True)):
        nameless = f"parameter {j} of group {i}"
        saved_name = saved_names[j] if saved_names else nameless
        live_name = live_names[j] if live_names else nameless
        if saved_names and live_names and canonical_name(saved_name) != canonical_name(live_name):
            raise ValueError(
                f"the checkpoint has {saved_name!r} where this optimizer has {live_name!r} "
                f"({nameless}). State is matched by position: build the optimizer in the saved "
                "order, or rename in a load_state_dict pre-hook."
            )
        moment = states.get(key, {}).get("exp_avg")
        if isinstance(moment, Tensor) and moment.shape != p.shape:
            raise ValueError(
                f"{saved_name!r} has shape {tuple(moment.shape)} in the checkpoint, "
                f"{live_name!r} has {tuple(p.shape)} in this optimizer."
            )
        if by_name and states and key not in states and not p.requires_grad and live_state.get(p):
            raise ValueError(
                f"the state of {live_name!r} is missing: torch.distributed.checkpoint leaves out "
                "parameters that do not require a gradient. Call thaw() before loading."
            )
