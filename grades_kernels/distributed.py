"""One decision on every rank of a job of several processes.

Each rank measures what it holds. At a check the sums of sharded tensors are added up over the ranks
that hold the shards, one small all-reduce for all units together; then one all-reduce takes the
largest statistic of every unit over all ranks, where "no evidence" is infinity. So every rank
compares the same numbers with tau, and keeps the same hits, events and history: a unit freezes
where all ranks would freeze it. The same all-reduce carries a checksum of the freeze table: a table
that has come to differ is an error at the next check and never a silent divergence.

Every rank takes part in every check, whatever it holds and whichever gradients it has. Ranks that
do not call `step()` equally often wait for each other until torch's timeout, as they do in any
other collective.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .freezing import NEVER, FreezeTable, Unit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .reference import Sums

_NAMELESS = re.compile(r"group\d+\.param\d+")
_STATE = ("hits", "decided_at", "frozen_at")


def is_initialized() -> bool:
    """Whether this process belongs to a job, perhaps of one process."""
    return dist.is_available() and dist.is_initialized()


def in_a_job(group: ProcessGroup | None, tensors: Iterable[Tensor]) -> bool:
    """Whether there are other ranks to agree with.

    Raises:
        ValueError: If this process is not one of `group`.
    """
    if not is_initialized():
        return False
    size = dist.get_world_size(group)
    if size < 0:
        raise ValueError(
            "process_group: this process is not one of its ranks. Set it to the group of those "
            "that step this optimizer, on each of them."
        )
    return size > 1 or any(_shards(p) is not None for p in tensors)


def all_sharded(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> bool:
    """Whether every tensor is a DTensor over all ranks of `group` (None: of the job).

    Then nobody but the tensor's own mesh waits for its gradient. One on a smaller mesh may be
    averaged by DistributedDataParallel besides, which waits for all that it has seen.
    """
    if not is_initialized():
        return False
    tensors, size = list(tensors), dist.get_world_size(group)
    sharded = (hasattr(p, "device_mesh") and p.device_mesh.size() == size for p in tensors)
    return bool(tensors) and all(sharded)


def refuse_flat(tensors: Sequence[Tensor]) -> None:
    """Raise for what wrappers put in place of matrices.

    Raises:
        ValueError: For tensors of FullyShardedDataParallel ("FSDP1") or DeepSpeed ZeRO.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in tensors):
        wrapper, way_out = (
            "FullyShardedDataParallel (FSDP1)",
            "Use torch.distributed.fsdp.fully_shard (FSDP2), which keeps every matrix as a DTensor",
        )
    elif any(hasattr(p, "ds_id") for p in tensors) or (
        "deepspeed" in sys.modules and tensors and all(p.dim() == 1 for p in tensors)
    ):
        wrapper, way_out = (
            "DeepSpeed ZeRO",
            "Use torch.distributed.fsdp.fully_shard (FSDP2) or "
            "torch.distributed.optim.ZeroRedundancyOptimizer, which keep every matrix",
        )
    else:
        return
    raise ValueError(
        f"{wrapper} hands the optimizer flat pieces of the parameters, in which no matrix can be "
        f"measured or frozen. {way_out}; or tau=None."
    )


@dataclass(eq=False)
class _Held:
    """What a rank tells the others of a unit that it holds."""

    unit: Unit
    shapes: list[tuple[int, ...]]
    checksum: int

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.unit.name, self.shapes, self.checksum


@dataclass(eq=False)
class Ranks:
    """The ranks that decide together.

    Args:
        group: Their process group; None: all of the job.
        members: The tensors of every unit that this rank holds.
        prefix: What tells nameless units of this rank from those of others, e.g. "rank1.".
        everywhere: Whether all ranks hold the same units.
        n_trainable: Elements of the optimizer's tensors on all ranks together.
        on_device: Whether an implementation that decides on a device serves all ranks.
    """

    group: ProcessGroup | None
    members: dict[Unit, list[Tensor]]
    prefix: str = ""
    everywhere: bool = True
    n_trainable: int = 0
    on_device: bool = False
    _places: dict[Any, list[tuple[Unit, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit, tensors in self.members.items():
            for k, p in enumerate(tensors):
                shards = _shards(p)
                if shards is not None:
                    self._places.setdefault(shards, []).append((unit, k))

    @classmethod
    def meet(
        cls,
        table: FreezeTable,
        members: dict[Unit, list[Tensor]],
        tensors: Sequence[Tensor],
        group: ProcessGroup | None,
        *,
        on_device: bool = False,
    ) -> tuple[Ranks, list[Unit]]:
        """Learn which rank holds which unit; every rank of `group` must call this together.

        Args:
            table: The freeze table; its units without `members` are told anew by their holders.
            members: The tensors of every unit of this rank.
            tensors: All tensors of the optimizer.
            group: See `Ranks`.
            on_device: Whether this rank's implementation decides on a device.

        Returns:
            The ranks, and the units of all of them: the same list everywhere, by rank, with this
            rank's own objects where it holds the unit.

        Raises:
            ValueError: If the ranks disagree about the rule, about a unit that several hold, or
                about what has been decided so far.
        """
        members = {unit: held for unit, held in members.items() if held}
        before = table.ranks
        if before is not None and before.everywhere and before._holds_same(members):
            # Only thresholds have changed; should they differ, the checksum will tell.
            ranks = cls(group, members, n_trainable=before.n_trainable, on_device=before.on_device)
            return ranks, list(table.units)

        ranks = cls(group, members)
        ranks._check_meshes()
        checksums = ranks._checksums()
        mine = [
            _Held(unit, [tuple(p.shape) for p in held], checksums[unit])
            for unit, held in members.items()
        ]
        n_trainable = sum(p.numel() for p in tensors)
        told = ranks._tell((table.rule, table.t, mine, n_trainable, on_device))
        _check_same("the arguments of the optimizer", [rule for rule, *_ in told])
        _check_same("the number of steps taken", [t for _, t, *_ in told])
        held_by = [held for _, _, held, *_ in told]
        held_by[dist.get_rank(group)] = mine
        identities = [[held.identity for held in on_rank] for on_rank in held_by]
        first = [identities.index(identity) for identity in identities]
        ranks.everywhere = len(set(first)) == 1
        ranks.n_trainable = sum(told[rank][3] for rank in set(first))
        ranks.on_device = ranks.everywhere and all(on_device for *_, on_device in told)
        if not ranks.everywhere:
            nameless = any(_NAMELESS.fullmatch(unit.name) for unit in members)
            if nameless and all(
                [x[:2] for x in identity] == [x[:2] for x in identities[0]]
                for identity in identities
            ):
                warnings.warn(
                    "the ranks hold different tensors of the same shapes under generated names: "
                    "each is taken for a unit of its own. That is right under "
                    "ZeroRedundancyOptimizer, where zero.optim.attach(model) gives them names; if "
                    "the ranks train different models, set optimizer.process_group.",
                    stacklevel=2,
                )
            prefixes = [f"rank{rank}." for rank in first]
            ranks.prefix = prefixes[dist.get_rank(group)]
            for prefix, on_rank in zip(prefixes, held_by, strict=True):
                for held in on_rank:
                    if _NAMELESS.fullmatch(held.unit.name):
                        held.unit.name = prefix + held.unit.name
        holders: dict[str, list[tuple[int, _Held]]] = {}
        for rank, on_rank in enumerate(held_by):
            for held in on_rank:
                holders.setdefault(held.unit.name, []).append((rank, held))
        for name, of_unit in holders.items():
            _check_holders(name, of_unit)
        units = {name: of_unit[0][1].unit for name, of_unit in holders.items()}
        units.update((unit.name, unit) for unit in members)
        return ranks, list(units.values())

    def sum_shards(self, sums: Sums) -> Sums:
        """`sums` with those of sharded tensors added up over the ranks that hold the shards.

        One all-reduce for all units of a mesh, of the same size at every check: a unit without
        evidence on this rank takes part with infinity. Dimensions over which a tensor is
        replicated are not summed.
        """
        summed = dict(sums)
        for (mesh, dims), places in self._places.items():
            rows: list[Sequence[Tensor]] = []
            for unit, k in places:
                complete = len(sums.get(unit, ())) == unit.n_tensors
                rows.append(sums[unit][k] if complete else ())
            group = mesh.get_group(dims[0])
            unit, k = places[0]
            near = self.members[unit][k].device
            total = torch.full((len(places), 3), math.inf, dtype=torch.float64, device=near)
            known = [n for n, row in enumerate(rows) if row]
            if known:
                values = torch.stack([x.to(near) for n in known for x in rows[n]])
                total[torch.tensor(known, device=near)] = values.view(-1, 3)
            total = total.to(_device(group, near))
            for dim in dims:
                dist.all_reduce(total, group=mesh.get_group(dim))
            for (unit, k), row in zip(places, total, strict=True):
                if unit in summed:
                    if summed[unit] is sums[unit]:
                        summed[unit] = list(sums[unit])
                    if len(summed[unit]) == unit.n_tensors:
                        summed[unit][k] = (row[0], row[1], row[2])
        return summed

    def agree(self, table: FreezeTable, statistics: dict[Unit, float]) -> dict[Unit, float]:
        """The statistic that all ranks compare with tau: the largest over all ranks.

        Args:
            table: The freeze table of this rank.
            statistics: Of the units that have evidence on this rank.

        Returns:
            Of the units that have evidence on every rank that holds them.

        Raises:
            RuntimeError: On every rank, if the freeze tables of the ranks differ.
        """
        column = [
            statistics.get(unit, math.inf if unit in self.members else -math.inf)
            for unit in table.units
        ]
        checksum = _fingerprint(table)
        mine = torch.tensor([*column, checksum, -checksum], dtype=torch.float64)
        *column, high, low = self.largest(mine).tolist()
        if high != -low:
            self.raise_difference(table)
        return {
            unit: statistic
            for unit, statistic in zip(table.units, column, strict=True)
            if unit.decided_at == NEVER and -math.inf < statistic < math.inf
        }

    def found_anywhere(self, found_inf: Tensor | float) -> Tensor:
        """GradScaler's `found_inf`, not zero where any rank has found one: all skip the step."""
        return self.largest(torch.as_tensor(found_inf, dtype=torch.float32))

    def largest(self, x: Tensor) -> Tensor:
        """Of every element the largest over all ranks; waits for no device that `group` serves."""
        largest = x.to(_device(self.group, x.device), copy=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.to(x.device)

    def _holds_same(self, members: dict[Unit, list[Tensor]]) -> bool:
        return len(members) == len(self.members) and all(
            new.name == old.name and len(a) == len(b) and all(map(lambda x, y: x is y, a, b))
            for (new, a), (old, b) in zip(members.items(), self.members.items(), strict=True)
        )

    def _check_meshes(self) -> None:
        ranks = set(dist.get_process_group_ranks(self.group or dist.group.WORLD))
        for mesh, _ in self._places:
            others = set(mesh.mesh.flatten().tolist()) - ranks
            if others:
                raise ValueError(
                    f"process_group has ranks {sorted(ranks)}, but a parameter is sharded over "
                    f"{sorted(others)} too. Pass a group of all ranks that step this optimizer."
                )

    def _checksums(self) -> dict[Unit, int]:
        """A number per unit that depends on the bits of its tensors and not on their sharding."""
        whole: dict[Unit, int] = dict.fromkeys(self.members, 0)
        parts = {
            (unit, k): _bit_sum(p)
            for unit, tensors in self.members.items()
            for k, p in enumerate(tensors)
        }
        for (mesh, dims), places in self._places.items():
            group = mesh.get_group(dims[0])
            total = torch.stack([parts[place] for place in places])
            total = total.to(_device(group, total.device))
            for dim in dims:
                dist.all_reduce(total, group=mesh.get_group(dim))
            parts.update(zip(places, total, strict=True))
        numbers = torch.stack([x.cpu() for x in parts.values()]).tolist() if parts else []
        for (unit, k), number in zip(parts, numbers, strict=True):
            whole[unit] += (k + 1) * number
        return whole

    def _tell(self, message: Any) -> list[Any]:
        """What every rank has to say, by rank."""
        told: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(told, message, group=self.group)
        return told

    def raise_difference(self, table: FreezeTable) -> None:
        """Tell what differs; every rank must call this together.

        Raises:
            RuntimeError: Always.
        """
        rows = {u.name: (u.tau, *(getattr(u, key) for key in _STATE)) for u in table.units}
        told = self._tell((table.t, rows))
        _check_same("the number of steps taken", [t for t, _ in told], RuntimeError)
        names = dict.fromkeys(name for _, rows in told for name in rows)
        for name in names:
            _check_same(
                f"unit {name!r}, as (tau, {', '.join(_STATE)}),",
                [rows.get(name) for _, rows in told],
                RuntimeError,
            )
        raise RuntimeError("the freeze tables of the ranks list their units in another order.")


def _shards(p: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a DTensor and its dimensions over which it is sharded; None: it is whole."""
    if not hasattr(p, "device_mesh"):
        return None
    dims = tuple(i for i, x in enumerate(p.placements) if not (x.is_replicate() or x.is_partial()))
    dims = tuple(i for i in dims if p.device_mesh.size(i) > 1)
    return (p.device_mesh, dims) if dims else None


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bit_sum(p: Tensor) -> Tensor:
    """The bits of this rank's part of a tensor, summed as integers: exact in any order."""
    p = p.detach()
    p = p.to_local() if hasattr(p, "to_local") else p
    if p.is_complex():
        p = torch.view_as_real(p)
    return p.view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64)


def _device(group: ProcessGroup | None, wanted: torch.device) -> torch.device:
    """Where a tensor must lie to go through `group`: on the wanted device if it can."""
    kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if wanted.type in kinds:
        return wanted
    if kinds[0] == "cpu":
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _fingerprint(table: FreezeTable) -> int:
    """48 bits of all that decides what a step does to the units; exact as a float64.

    Numbers, unlike strings, have the same hash in every process.
    """
    rows = tuple((u.tau, u.hits, u.decided_at, u.frozen_at) for u in table.units)
    return hash((table.t, rows)) & (1 << 48) - 1


def _check_holders(name: str, holders: list[tuple[int, _Held]]) -> None:
    """Compare what several ranks tell of one unit."""
    ranks = [rank for rank, _ in holders]
    units = [held.unit for _, held in holders]
    _check_same(
        f"unit {name!r}, as (statistic, tau, shapes),",
        [(held.unit.criterion, held.unit.tau, held.shapes) for _, held in holders],
        ranks=ranks,
        way_out="If a LoRA pair was split between ranks, train it without ZeroRedundancyOptimizer; "
        "if the ranks train different models, set optimizer.process_group.",
    )
    _check_same(
        f"unit {name!r}, as ({', '.join(_STATE)}),",
        [tuple(getattr(unit, key) for key in _STATE) for unit in units],
        ranks=ranks,
        way_out="Load the same checkpoint on every rank.",
    )
    if len({held.checksum for _, held in holders}) > 1:
        warnings.warn(
            f"{name!r} has other values on rank {ranks[0]} than on other ranks, and is frozen only "
            "when it has converged on all of them. If the ranks train different models, set "
            "optimizer.process_group.",
            stacklevel=2,
        )


def _check_same(
    what: str,
    values: Sequence[Any],
    error: type[Exception] = ValueError,
    *,
    ranks: Sequence[int] | None = None,
    way_out: str = "Every rank must do the same to its optimizer, and load the same checkpoint; if "
    "the ranks train different models, set optimizer.process_group.",
) -> None:
    ranks = range(len(values)) if ranks is None else ranks
    odd = next((n for n, value in enumerate(values) if value != values[0]), None)
    if odd is not None:
        raise error(
            f"the ranks differ in {what} rank {ranks[0]}: {values[0]}, rank {ranks[odd]}: "
            f"{values[odd]}. {way_out}"
        )
