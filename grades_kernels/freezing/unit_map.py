"""Which tensors of an optimizer belong to which unit.

A `UnitMap` is made for the parameter groups as they are: their tensors, names and statistics,
whether they are monitored, and which tensors need a gradient. It never changes; when one of these
does, a new map is made, and in a job of several processes the ranks exchange their units.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .naming import canonical_name, unit_of
from .table import NEVER, Unit

Groups = Sequence[dict[str, Any]]

AUTO_TAU = 1.2
"""The threshold tau="auto": a fifth above 1, which "signal" is for gradients of pure noise."""


@dataclass(frozen=True, eq=False)
class UnitMap:
    """The units of one state of the parameter groups.

    Attributes:
        params: All tensors of the optimizer, group by group.
        units: The unit of each of them, None where it is not monitored.
        members: Unit -> its tensors on this rank, none for a unit of another rank.
        group_units: Per group its units.
        settings: Per group its number of tensors, whether it is monitored, its statistic, and
            whether embeddings, heads, norms and biases are monitored too (`monitor_all`).
        taus: Per group the `tau` that its units have.
        untrained: Tensors that would be monitored but need no gradient, and so belong to no unit.
        name_of: The names of the tensors that have one, as they were given.
        attached: The names that `attach(model)` gave, or None.
    """

    params: tuple[Tensor, ...]
    units: tuple[Unit | None, ...]
    members: dict[Unit, tuple[Tensor, ...]]
    group_units: tuple[tuple[Unit, ...], ...]
    settings: list[tuple[int, bool, str, bool]]
    taus: list[Any]
    untrained: tuple[Tensor, ...]
    name_of: dict[Tensor, str]
    attached: list[list[str]] | None = None

    def is_current(self, groups: Groups) -> bool:
        """Whether a map made now would be the same."""
        return (
            self.has_tensors_of(groups)
            and not any([p.requires_grad for p in self.untrained])
            and all([p.requires_grad or unit.frozen_at != NEVER for p, unit in self.monitored])
        )

    @cached_property
    def monitored(self) -> list[tuple[Tensor, Unit]]:
        """The tensors of this rank that belong to a unit, with their unit."""
        pairs = zip(self.params, self.units, strict=True)
        return [(p, unit) for p, unit in pairs if unit is not None]

    def has_tensors_of(self, groups: Groups) -> bool:
        """Whether the groups have the tensors and settings that the map was made for."""
        params = chain.from_iterable([group["params"] for group in groups])
        return _settings(groups) == self.settings and all(map(is_, params, self.params))

    def by_group(self) -> Iterator[tuple[int, list[tuple[Tensor, Unit | None]]]]:
        """The number of each group, with its tensors and their units."""
        pairs = list(zip(self.params, self.units, strict=True))
        first = 0
        for i, (n, *_) in enumerate(self.settings):
            yield i, pairs[first : first + n]
            first += n

    def named(self) -> Iterator[tuple[str, Tensor, Unit | None]]:
        """Canonical name, tensor and unit of all tensors that have a name."""
        for p, unit in zip(self.params, self.units, strict=True):
            if p in self.name_of:
                yield canonical_name(self.name_of[p]), p, unit

    def count_elements(self) -> None:
        """Let every unit of this rank have the number of elements that its tensors have now.

        `p.data = ...` may give a tensor another one, as pruning does.
        """
        for unit, tensors in self.members.items():
            if tensors:
                unit.n_elements = sum([p.numel() for p in tensors])

    def with_taus(self, groups: Groups) -> UnitMap:
        """The same map, once every unit of this rank has the threshold of its parameter group.

        Raises:
            ValueError: If the tensors of a unit lie in groups with different ones. No threshold has
                changed then.
        """
        new: dict[Unit, float] = {}
        for group, units in zip(groups, self.group_units, strict=True):
            tau = _threshold(group)
            for unit in units:
                assert tau is not None
                other = new.setdefault(unit, tau)
                _check_alike(unit, (other, unit.statistic), (tau, unit.statistic))
        for unit, tau in new.items():
            unit.tau = tau
        return replace(self, taus=thresholds(groups))


def thresholds(groups: Groups) -> list[Any]:
    """The `tau` of every parameter group as it was given."""
    return [group["tau"] for group in groups]


def make_unit_map(
    groups: Groups,
    is_frozen: Callable[[Tensor], bool],
    *,
    attached: list[list[str]] | None = None,
    before: UnitMap | None = None,
    prefix: str = "",
) -> UnitMap:
    """The units of the parameter groups as they are now.

    Monitored is a tensor that needs a gradient, or that this optimizer has frozen: the base weights
    of a LoRA model and inactive adapters never give evidence, and as units they would keep
    `all_frozen` from becoming true.

    Args:
        groups: The parameter groups.
        is_frozen: Whether a tensor is frozen by this optimizer.
        attached: Names of the tensors of each group, in place of the groups' own; None: those that
            `before` was given.
        before: The map that this one replaces, if there is one.
        prefix: Put before the names of nameless units, e.g. "rank1.".
    """
    params: list[Tensor] = []
    units: list[Unit | None] = []
    members: dict[Unit, list[Tensor]] = {}
    by_name: dict[str, Unit] = {}
    untrained: list[Tensor] = []
    name_of: Mapping[Tensor, str] = {}
    if before is not None and attached is None:
        attached, name_of = before.attached, before.name_of
    all_names = names_of(groups, attached, name_of)
    # A group without tau may lack names for now; the tensors that have one keep it for a later tau.
    names_now = {p: name_of[p] for group in groups for p in group["params"] if p in name_of}
    for group, names in zip(groups, all_names, strict=True):
        names_now.update(zip(group["params"], names or (), strict=False))
    group_units: list[tuple[Unit, ...]] = []
    seen: set[str] = set()
    for i, group in enumerate(groups):
        tau, names = _threshold(group), all_names[i]
        for j, p in enumerate(group["params"]):
            if is_lazy(p) and tau is not None:
                raise ValueError(
                    f"parameter {j} of group {i} has no shape yet: take one forward pass of the "
                    "lazy module before the optimizer is made."
                )
            params.append(p)
            frozen, name, unit = is_frozen(p), None, None
            full_name = canonical_name(names[j]) if names else f"{prefix}group{i}.param{j}"
            if tau is not None:
                if names:
                    name = unit_of(full_name, p.shape, p.dtype)
                by_shape = group.get("monitor_all") or (not names and p.dim() >= 2)
                if name is None and by_shape and p.is_floating_point() and p.numel() > 0:
                    name = full_name
            if name is not None and not (p.requires_grad or frozen):
                untrained.append(p)
            elif tau is not None and name is not None:
                if full_name in seen:
                    raise ValueError(
                        f"two parameters are called {full_name!r}: units need names of their own."
                    )
                seen.add(full_name)
                unit = by_name.setdefault(name, Unit(name, group["statistic"], tau, 0, 0))
                _check_alike(unit, (unit.tau, unit.statistic), (tau, group["statistic"]))
                unit.n_tensors += 1
                members.setdefault(unit, []).append(p)
            elif frozen:
                way_out = "Set its group's tau back, call thaw(), then take the tau away."
                if tau is not None:
                    way_out = f"As {full_name!r} it is no matrix to monitor: call thaw() first."
                raise ValueError(
                    f"parameter {j} of group {i} is frozen but belongs to no monitored unit "
                    f"(tau={tau}). {way_out}"
                )
            units.append(unit)
        own = units[len(units) - len(group["params"]) :]
        group_units.append(tuple(dict.fromkeys(unit for unit in own if unit is not None)))
    unit_map = UnitMap(
        params=tuple(params),
        units=tuple(units),
        members={unit: tuple(own) for unit, own in members.items()},
        group_units=tuple(group_units),
        settings=_settings(groups),
        taus=thresholds(groups),
        untrained=tuple(untrained),
        name_of=names_now,
        attached=attached and [own or old for own, old in zip(all_names, attached, strict=False)],
    )
    unit_map.count_elements()
    return unit_map


def names_of(
    groups: Groups, attached: list[list[str]] | None, name_of: Mapping[Tensor, str]
) -> list[list[str] | None]:
    """Per group the names of its tensors, or None.

    `attached` are those of `attach(model)`, `name_of` those of the map before: a tensor keeps its
    name where others leave its group or join it, and `param_names` follow.

    Raises:
        ValueError: If tensors have joined whose names nobody knows.
    """
    names: list[list[str] | None] = [group.get("param_names") for group in groups]
    if attached is not None:
        sizes = [len(group["params"]) for group in groups[: len(attached)]]
        if sizes != list(map(len, attached)):
            raise ValueError(
                f"attach(model) named groups of {list(map(len, attached))} tensors, which have "
                f"{sizes} now. Call attach(model) again after removing or inserting tensors."
            )
        names[: len(attached)] = attached
    known = {name for own in names for name in own or ()}
    return [
        _names_in_group(i, own, group, name_of, known)
        for i, (own, group) in enumerate(zip(names, groups, strict=True))
    ]


def _names_in_group(
    i: int,
    names: list[str] | None,
    group: dict[str, Any],
    name_of: Mapping[Tensor, str],
    others: Container[str],  # the names of all groups
) -> list[str] | None:
    if not names:
        return None
    params = group["params"]
    before = [name_of.get(p) for p in params]
    if len(names) == len(params):
        # A name that no group has any more has been replaced by the caller.
        pairs = zip(before, names, strict=True)
        if all(was is None or was == name or was not in others for was, name in pairs):
            return names
    known = [name for name in before if name is not None]
    if len(known) < len(params):
        if not known or group["tau"] is None:
            return None
        unknown = [j for j, name in enumerate(before) if name is None]
        way_out = ", or give all names in param_names" if group.get("param_names") is names else ""
        raise ValueError(
            f"tensors have left group {i} or joined it, and its names are those of before: "
            f"parameters {unknown} have no name. Call attach(model){way_out}."
        )
    if group.get("param_names") is names:
        group["param_names"] = known
    return known


def names_from_model(groups: Groups, model: Any) -> list[list[str]]:
    """The names that the tensors of each group have in a model.

    A tied tensor gets the name that leaves it unmonitored, if it has one.
    """
    names: dict[Tensor, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p not in names or unit_of(name, p.shape, p.dtype) is None:
            names[p] = name
    for i, group in enumerate(groups):
        missing = [j for j, p in enumerate(group["params"]) if p not in names]
        if missing:
            raise ValueError(
                f"attach(model): parameters {missing} of group {i} are not parameters of "
                f"{type(model).__name__}. Pass the model that the optimizer was built for."
            )
    return [[names[p] for p in group["params"]] for group in groups]


def former_units(unit_map: UnitMap, members: dict[Unit, tuple[Tensor, ...]]) -> dict[Unit, Unit]:
    """The former self of each unit of a new map, among those with these `members`.

    A new unit has none. It shows in their tensors, since names may change: `attach` gives others,
    and once a group is removed, nameless units have the names of others. A new tensor has the unit
    of its name.
    """
    by_name = {unit.name: unit for unit in members}
    by_tensor = {p: unit for unit, tensors in members.items() for p in tensors}
    former = {}
    for unit, tensors in unit_map.members.items():
        was = next((by_tensor[p] for p in tensors if p in by_tensor), by_name.get(unit.name))
        if was is not None:
            former[unit] = was
    return former


def nothing_is_monitored(groups: Groups, unit_map: UnitMap) -> str:
    """A sentence for groups with a threshold and no tensor now to compare with it.

    Raises:
        ValueError: If there can be none, whatever needs a gradient.
    """
    if unit_map.untrained:
        return (
            "tau is set, but every tensor that could be monitored has requires_grad=False: nothing "
            "is measured or frozen until one needs a gradient."
        )
    seen = []
    for (i, pairs), group in zip(unit_map.by_group(), groups, strict=True):
        shapes = [f"{unit_map.name_of.get(p, '')} {tuple(p.shape)}".strip() for p, _ in pairs[:4]]
        seen.append(f"group {i} (tau={group['tau']}): {', '.join(shapes) or 'empty'}")
    raise ValueError(
        "tau is set but not one tensor can be monitored: units are floating tensors of two or more "
        "dimensions that need a gradient, by name neither embedding, output head, norm nor bias. "
        f"Seen: {'; '.join(seen)}. Pass the weight matrices, or tau=None; where groups with "
        'matrices are added later, this group alone takes "tau": None.'
    )


def _threshold(group: dict[str, Any]) -> float | None:
    tau = AUTO_TAU if group["tau"] == "auto" else group["tau"]
    return None if tau is None else float(tau)


def _settings(groups: Groups) -> list[tuple[int, bool, str, bool]]:
    # The threshold is no part of it: it may change in every step.
    return [
        (
            len(group["params"]),
            group["tau"] is not None,
            group["statistic"],
            bool(group.get("monitor_all")),
        )
        for group in groups
    ]


def _check_alike(unit: Unit, one: tuple[float, str], other: tuple[float, str]) -> None:
    if one != other:
        raise ValueError(
            f"the tensors of unit {unit.name!r} lie in groups with different tau or statistic: "
            f"{one} and {other}."
        )
