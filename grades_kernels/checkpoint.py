"""What GradESAdamW remembers, and how that travels through checkpoints, pickles and copies.

The freeze table is kept as Python numbers in the state of every parameter, next to AdamW's own
tensors, because nothing else survives every way of saving: `load_state_dict` casts each state
tensor but `step` to the parameter's dtype (torch/optim/optimizer.py), which turns 1001 into 1000
in bf16, and `torch.distributed.checkpoint` drops keys beside "state" and "param_groups". They are
written when a unit is decided, and whenever somebody asks for a checkpoint, a pickle or a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from .freezing import NEVER, FreezeRule, FreezeTable, Unit
from .savings import MOMENTS, nothing_held
from .units import canonical_name

if TYPE_CHECKING:
    from .triton_kernels import Plan

SAVED = {
    "grades_hits": "hits",
    "grades_decided_at": "decided_at",
    "grades_frozen_at": "frozen_at",
    "grades_stopped_at": "stopped_at",
    "grades_prev_step": "prev_step",
    "grades_statistic": "statistic",
    "grades_tau": "decided_tau",
    "grades_decided_statistic": "decided_statistic",
}
"""State key -> attribute of `Unit`."""

FRESH = {key: getattr(Unit("", "change", 0.0, 0), name) for key, name in SAVED.items()}
"""What these keys hold for a tensor that is not monitored, or not yet."""

REPLACED_BY_LOAD = (
    "state",
    "param_groups",
    "_table",
    "_rows",
    "_members",
    "_built_for",
    "_stopped",
)


class CheckpointedAdamW(AdamW):
    """The part of GradESAdamW that writes the freeze table into the state and reads it back."""

    _own_defaults: dict[str, Any]
    _rule: FreezeRule
    _table: FreezeTable
    _members: dict[Unit, list[Tensor]]
    _plan: Plan | None
    _stopped: set[Tensor]

    if TYPE_CHECKING:  # what GradESAdamW brings

        def _all_params(self) -> list[Tensor]: ...
        def _names(self, i: int) -> list[str] | None: ...
        def _fused(self) -> bool | None: ...
        def _reset_freezing(self) -> None: ...
        def _build(self) -> None: ...
        def _stop(self, units: list[Unit]) -> None: ...
        def _warn_once(self, message: str) -> None: ...

    def _init_state(self, p: Tensor) -> None:
        """State of a tensor that is decided before it ever had a gradient.

        Like `Adam._init_group` makes it on the first gradient; plain AdamW reads `step` of every
        entry of a checkpoint.
        """
        group = next((g for g in self.param_groups if any(q is p for q in g["params"])), None)
        if group is None:  # taken out of its group since the units were made
            return
        on_device = group["capturable"] or group["fused"]
        state = self.state[p]
        state["step"] = torch.tensor(0.0, device=p.device if on_device else "cpu")
        _add_missing_moments(state, p, group)

    def _forget_moments(self, p: Tensor) -> None:
        """Moments of zero and a step count of zero, also where they had been released."""
        state = self.state.get(p, {})
        for key in MOMENTS:
            if key in state:
                state[key] = _full(state[key], p)
        for key in ("step", *MOMENTS):
            if key in state:
                state[key].zero_()

    def _write_unit(self, unit: Unit) -> None:
        """Copy a row of the table into the state of the unit's tensors."""
        for p in self._members[unit]:
            if unit.decided_at != NEVER and not self.state.get(p):
                self._init_state(p)
            if not self.state.get(p):
                continue
            state = self.state[p]
            state["grades_t"] = self._table.t
            for key, name in SAVED.items():
                state[key] = getattr(unit, name)
            if unit.criterion == "change" and unit.decided_at != NEVER:
                state["prev_grad"] = nothing_held(p)  # measured no more

    def _adopt_state(self) -> None:
        """Read the table from a state that was put in place without `load_state_dict`.

        ZeroRedundancyOptimizer loads a checkpoint that way.
        """
        # With a plan the device counts, and the host's t may be a step behind.
        counts = self._plan is not None or self._table.t > 0
        if not counts and any(state.get("grades_t") for state in self.state.values()):
            held = {n: self.state.get(p, {}) for n, p in enumerate(self._all_params())}
            self._restore({n: s["prev_grad"] for n, s in held.items() if "prev_grad" in s})

    def _write_state(self) -> None:
        """Copy the whole table into the per-parameter state."""
        self._adopt_state()
        if self._plan is not None:
            self._plan.sync()
        for state in self.state.values():
            if state:
                state["grades_t"] = self._table.t
        for unit in self._table.units:
            self._write_unit(unit)

    def _read_unit(self, unit: Unit) -> None:
        """Fill a row of the table from the state: the least that all its tensors agree on."""
        states = [self.state.get(p) or FRESH for p in self._members[unit]]
        for key, name in SAVED.items():
            values = [state.get(key, FRESH[key]) for state in states]
            whole = all(isinstance(value, int) for value in values)
            setattr(unit, name, min(values) if whole else values[0])

    @torch._disable_dynamo
    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """As `torch.optim.AdamW.state_dict`, with the freeze table as numbers in the state.

        A tensor monitored by "change" always has a `prev_grad` of its own shape here, zeros while
        none is held, and of a dtype that does not depend on the gradients seen: loading in place
        (`torch.distributed.checkpoint`) takes keys, shapes and dtypes from the receiving side. So
        do the released moments of a frozen tensor, which are zeros here, as `thaw` would make them.

        Args:
            compact: Leave out what is not held instead of writing zeros. Such a checkpoint loads
                into GradESAdamW by `load_state_dict`, but neither into plain AdamW nor in place.
        """
        self._write_state()
        state_dict = super().state_dict()
        states = state_dict.get("state", {})
        steps_on_host = self._steps_on_host()
        for k, p in enumerate(self._all_params()):
            entry = states.get(k)
            if not entry:
                continue
            changed = {}
            if p in steps_on_host:
                changed["step"] = steps_on_host[p]
            if "prev_grad" in entry:
                changed["prev_grad"] = entry["prev_grad"].to(_saved_prev_grad_dtype(p))
            entry = {**entry, **changed}
            for key in ("prev_grad", *MOMENTS):
                if key in entry and compact and entry[key].shape != p.shape:
                    del entry[key]
                elif key in entry:
                    entry[key] = _full(entry[key], p)
            states[k] = entry
        return state_dict

    def _steps_on_host(self) -> dict[Tensor, Tensor]:
        """Copies of the steps that live on a device though AdamW would hold them on the CPU."""
        params = [
            p
            for group in self.param_groups
            if not (group["capturable"] or group["fused"])
            for p in group["params"]
            if self.state.get(p) and self.state[p]["step"].device.type != "cpu"
        ]
        if not params:
            return {}
        steps = torch.stack([self.state[p]["step"] for p in params]).cpu()
        return dict(zip(params, (step.clone() for step in steps), strict=True))

    def adamw_state_dict(self) -> dict[str, Any]:
        """A state dict for plain `torch.optim.AdamW`, without the keys that are ours.

        Warns once if a unit is frozen: plain AdamW will move it again.
        """
        state_dict = self.state_dict()
        n_frozen = len(self._table.events)
        if n_frozen:
            self._warn_once(
                f"{n_frozen} frozen units will move again under torch.optim.AdamW, which knows no "
                "frozen parameters."
            )
        state = {}
        for k, entry in state_dict["state"].items():
            ours = ("prev_grad", "grades_t", *SAVED)
            state[k] = {key: x for key, x in entry.items() if key not in ours}
            if entry.get("grades_stopped_at", NEVER) != NEVER:  # zero moments start anew
                state[k]["step"] = torch.zeros_like(entry["step"])
        groups = [
            {key: value for key, value in group.items() if key not in self._own_defaults}
            for group in state_dict["param_groups"]
        ]
        return {"state": state, "param_groups": groups}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of GradESAdamW or of plain AdamW.

        A plain one brings no freeze table: nothing is frozen, the count of steps goes on from the
        largest `step`, and `tau` and `statistic` stay as they are. For how prev_grad and the
        counters travel, see `state_dict`.

        Raises:
            ValueError: If parameters were renamed, reordered or reshaped since; with both names.
                Nothing has changed then.
        """
        prev_grads: dict[int, Tensor] = {}

        def prepare(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            return self._prepared(incoming, prev_grads)

        def restore(_: Any) -> None:
            for p in self._stopped:
                p.requires_grad_(True)
            self._stopped = set()
            self._restore(prev_grads)

        # As hooks they run after the user's pre-hooks, which may rename, and before the post-hooks.
        before = self.register_load_state_dict_pre_hook(prepare)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        kept = {name: getattr(self, name) for name in REPLACED_BY_LOAD}
        flags = [p.requires_grad for p in self._all_params()]
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.__dict__.update(kept)
            for p, flag in zip(self._all_params(), flags, strict=True):
                p.requires_grad_(flag)
            raise
        finally:
            before.remove()
            after.remove()

    def _prepared(self, incoming: dict[str, Any], prev_grads: dict[int, Tensor]) -> dict[str, Any]:
        """A checked copy of an incoming state dict; takes `prev_grad` out before torch casts it.

        `prev_grads` gets them by the position of their parameter among all.
        """
        keys = [k for group in incoming["param_groups"] for k in group["params"]]
        position = {k: n for n, k in enumerate(keys)}
        states = {}
        for k, entry in incoming["state"].items():
            if isinstance(entry, dict) and k in position:
                entry = dict(entry)
                prev_grad = entry.pop("prev_grad", None)
                if isinstance(prev_grad, Tensor):
                    prev_grads[position[k]] = prev_grad
                for key in (*SAVED, "grades_t"):
                    # A flat distributed checkpoint fills in {} for what it lacks.
                    if not isinstance(entry.get(key, 0), (int, float)):
                        del entry[key]
            states[k] = entry
        groups = [dict(group) for group in incoming["param_groups"]]
        if len(groups) == len(self.param_groups):
            for i, (group, live) in enumerate(zip(groups, self.param_groups, strict=True)):
                for key in self._own_defaults:
                    group.setdefault(key, live[key])
                # Which implementation runs is this optimizer's choice, not the checkpoint's.
                group["fused"] = live["fused"]
                if len(group["params"]) == len(live["params"]):
                    self._check_same_parameters(i, group, states)
        return {**incoming, "state": states, "param_groups": groups}

    def _check_same_parameters(self, i: int, group: dict[str, Any], states: dict[Any, Any]) -> None:
        """Compare names and shapes of a saved group with the live ones; names follow the live."""
        live, live_names, keys = self.param_groups[i]["params"], self._names(i), group["params"]
        by_name = bool(keys) and isinstance(keys[0], str)
        # torch.distributed.checkpoint matches by name: its keys are names in the live order, while
        # `param_names` is a plain value that comes in the saved order.
        saved_names = keys if by_name else group.get("param_names")
        if by_name and "param_names" in group:
            group["param_names"] = self.param_groups[i].get("param_names", list(keys))
        if not saved_names or len(saved_names) != len(live):
            saved_names = None
        for j, (p, key) in enumerate(zip(live, keys, strict=True)):
            saved_name = saved_names[j] if saved_names else f"parameter {j} of group {i}"
            live_name = live_names[j] if live_names else f"parameter {j} of group {i}"
            if (
                saved_names
                and live_names
                and canonical_name(saved_name) != canonical_name(live_name)
            ):
                raise ValueError(
                    f"the checkpoint holds {saved_name!r} where this optimizer has {live_name!r} "
                    f"(parameter {j} of group {i}). State is matched by position: build the "
                    "optimizer in the saved order, or rename in a load_state_dict pre-hook."
                )
            moment = states.get(key, {}).get("exp_avg")
            if isinstance(moment, Tensor) and moment.shape != p.shape:
                raise ValueError(
                    f"{saved_name!r} has shape {tuple(moment.shape)} in the checkpoint, "
                    f"{live_name!r} has {tuple(p.shape)} in this optimizer."
                )
            if (
                by_name
                and states
                and key not in states
                and not p.requires_grad
                and self.state.get(p)
            ):
                raise ValueError(
                    f"the state of {live_name!r} is missing: torch.distributed.checkpoint leaves "
                    "out parameters that do not require a gradient. Call thaw() before loading."
                )

    def _restore(self, prev_grads: dict[int, Tensor]) -> None:
        """Rebuild the table from loaded state, and finish what torch's casting left undone."""
        steps = [0]
        for n, p in enumerate(self._all_params()):
            state = self.state.get(p)
            if not state:
                continue
            steps += [int(state["step"]), state.get("grades_t", 0)]
            for key, value in FRESH.items():
                state.setdefault(key, value)
            if n not in prev_grads or prev_grads[n].shape != p.shape:
                state["grades_prev_step"] = NEVER
            if n in prev_grads:
                held = state["grades_prev_step"] != NEVER and state["grades_decided_at"] == NEVER
                # A copy, since the caller's tensor is not ours to write into.
                state["prev_grad"] = (
                    prev_grads[n].to(p.device, copy=True) if held else nothing_held(p)
                )
        self._table = FreezeTable(self._rule, t=max(steps))
        self._build()
        for unit in self._table.units:
            unit.announced = unit.frozen_at != NEVER  # before the checkpoint was written
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):  # a compact checkpoint leaves out what is not held
                    _add_missing_moments(self.state[p], p, group)
        stopped = [unit for unit in self._table.units if unit.stopped_at != NEVER]
        self._stop(stopped)
        for unit in stopped:
            if not self._stopped.issuperset(self._members[unit]):  # not allowed here
                unit.stopped_at = NEVER
        self._write_state()

    def __getstate__(self) -> dict[str, Any]:
        self._write_state()
        kept = ("_rule", "_total_steps", "_stop_grad", "_own_defaults", "_table", "_attached")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self._own_defaults.items():
                group.setdefault(key, value)
        if "_table" in state:  # unpickled or deep-copied, rather than loaded
            self._reset_freezing()
            self._table, self._attached = state["_table"], state["_attached"]
            self._build()
            frozen = (unit for unit in self._table.units if unit.frozen_at != NEVER)
            members = (p for unit in frozen for p in self._members[unit])
            self._stopped = {p for p in members if not p.requires_grad}
            self._step_supports_amp_scaling = bool(self._fused())


def _add_missing_moments(state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    for key in MOMENTS[: 3 if group["amsgrad"] else 2]:
        if key not in state:
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _full(x: Tensor, p: Tensor) -> Tensor:
    """A moment or previous gradient of `p` in full shape: itself, or zeros where none is held."""
    return x if x.shape == p.shape else torch.zeros_like(p, dtype=x.dtype)


def _saved_prev_grad_dtype(p: Tensor) -> torch.dtype:
    """The widest dtype that a gradient of `p` may have (`grad_dtype` None allows any)."""
    return getattr(p, "grad_dtype", p.dtype) or torch.float32
