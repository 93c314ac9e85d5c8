"""The same decision on every rank of a job of several processes.

Each rank measures its own tensors. At a check the sums of sharded tensors are added up over the
ranks that have the shards, one small all-reduce for all units together; then one all-reduce takes
the largest statistic of every unit over all ranks, where "no evidence" is infinity. So every rank
compares the same numbers with tau, and stores the same hits, events and history: a unit freezes
where all ranks would freeze it. The same all-reduce compares the thresholds and a checksum of the
freeze table: a table that has come to differ is an error at the next check. Where every tensor is
sharded over all ranks, the first all-reduce compares the tables too, and there is no second:
torch's all-reduce has the same bits on all ranks. After the update ("next_step") it runs on while
the next forward pass computes, and the next step waits for it.

Every rank takes part in every check, whatever tensors and gradients it has. Ranks that do not call
`step()` equally often wait for each other until torch's timeout, as in any other collective; the
error then names the ranks that did not take part.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from .freezing.table import NEVER, FreezeTable, Unit
from .rank_errors import DIFFERENT_MODELS, check_same, raise_if_absent, reports
from .state_tensors import local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Members = Mapping[Unit, Sequence[Tensor]]
ShardRows = tuple[Any, Sequence[int], Tensor]
"""A mesh, its dimensions to sum over, and the rows of the tensors that are sharded over them."""

_NAMELESS = re.compile(r"group\d+\.param\d+")
_STATE = ("hits", "decided_at", "frozen_at")


def is_initialized() -> bool:
    """Whether this process belongs to a job, perhaps of one process."""
    return dist.is_available() and dist.is_initialized()


def in_a_job(group: ProcessGroup | None, tensors: Iterable[Tensor]) -> bool:
    """Whether there are other ranks to agree with; ValueError if this process is not in `group`."""
    if not is_initialized():
        return False
    size = dist.get_world_size(group)
    if size < 0:
        raise ValueError(
            "process_group: this process is not one of its ranks. Set it to the group of those "
            "that step this optimizer, on each of them."
        )
    return size > 1 or any(_sharding(p) is not None for p in tensors)


def all_sharded(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> bool:
    """Whether every tensor is a DTensor over all ranks of `group` (None: of the job).

    Then only the tensor's own mesh waits for its gradient. One on a smaller mesh may be averaged
    by DistributedDataParallel besides, which waits for all that it has seen.
    """
    if not is_initialized():
        return False
    tensors, size = list(tensors), dist.get_world_size(group)
    sharded = (hasattr(p, "device_mesh") and p.device_mesh.size() == size for p in tensors)
    return bool(tensors) and all(sharded)


def refuse_flat(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for the flat tensors that wrappers put in place of matrices.

    A wrapper that partitions them may leave the groups that have a tau without any.
    """
    with_tau = [group for group in groups if group["tau"] is not None]
    tensors: list[Tensor] = [p for group in with_tau for p in group["params"]]
    if with_tau and not tensors:
        tensors = [p for group in groups for p in group["params"]]
    if any(getattr(p, "_fsdp_flattened", False) for p in tensors):
        wrapper, others = "FullyShardedDataParallel (FSDP1)", ""
    elif any(hasattr(p, "ds_id") for p in tensors) or (
        "deepspeed" in sys.modules and tensors and all(p.dim() == 1 for p in tensors)
    ):
        wrapper, others = "DeepSpeed ZeRO", " or torch.distributed.optim.ZeroRedundancyOptimizer"
    else:
        return
    raise ValueError(
        f"{wrapper} hands the optimizer flat pieces of the parameters, in which no matrix can be "
        f"measured or frozen. Use torch.distributed.fsdp.fully_shard (FSDP2){others} to "
        "keep every matrix; or tau=None."
    )


class _Share(NamedTuple):
    """A unit as a rank describes it to the others."""

    unit: Unit
    shapes: list[tuple[int, ...]]
    checksum: int


@dataclass(eq=False)
class Ranks:
    """The ranks that decide together.

    Args:
        group: Their process group; None: all of the job.
        members: The tensors of every unit of this rank.
        prefix: Distinguishes nameless units of this rank from those of others, e.g. "rank1.".
        everywhere: Whether all ranks have the same units.
        n_elements: Elements of the optimizer's tensors on all ranks together.
        on_device: Whether the Triton kernels serve the units of all ranks.
        one_mesh: Whether every tensor of every unit is sharded over all ranks. Then its sums are
            the same on all of them, bit for bit, and there is no largest one to be found.
        token: The same on all ranks, and never used before.
        asks_to_join: Whether this rank needs another exchange of units, which all begin together.
        must_join: Whether some rank does, as the last check has shown.
    """

    group: ProcessGroup | None
    members: Members
    prefix: str = ""
    everywhere: bool = True
    n_elements: int = 0
    on_device: bool = False
    one_mesh: bool = False
    token: str = ""
    asks_to_join: bool = False
    must_join: bool = False
    _sharded: dict[Any, list[tuple[Unit, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit, tensors in self.members.items():
            for k, p in enumerate(tensors):
                if shards := _sharding(p):
                    self._sharded.setdefault(shards, []).append((unit, k))

    @classmethod
    def join(
        cls,
        table: FreezeTable,
        members: Members,
        tensors: Sequence[Tensor],
        group: ProcessGroup | None,
        *,
        on_device: bool = False,
        t_is_exact: bool = True,
    ) -> tuple[Ranks, list[Unit]]:
        """Exchange the units of all ranks; every rank of `group` must call this together.

        `tensors` are all tensors of the optimizer, and `on_device` is whether the Triton kernels
        serve the units of this rank. The result is the ranks, and the units of all of them: the
        same list everywhere, by rank, with this rank's own objects where it has tensors of the
        unit. `table` gets the number of steps of the others where this rank cannot know it: where
        nothing trains, and unless `t_is_exact`.

        Raises:
            ValueError: If the ranks disagree about the configuration, about a unit that several
                have, or about the decisions so far.
        """
        members = {unit: own for unit, own in members.items() if own}
        ranks = cls(group, members)
        own_ranks = set(dist.get_process_group_ranks(group or dist.group.WORLD))
        for mesh, _ in ranks._sharded:
            others = set(mesh.mesh.flatten().tolist()) - own_ranks
            if others:
                raise ValueError(
                    f"process_group has ranks {sorted(own_ranks)}, but a parameter is sharded over "
                    f"{sorted(others)} too. Pass a group of all ranks that step this optimizer."
                )
        checksums = ranks._checksums()
        mine = [
            _Share(unit, [tuple(p.shape) for p in own], checksums[unit])
            for unit, own in members.items()
        ]
        n_elements = sum(p.numel() for p in tensors)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        t_is_exact &= table.t > 0 or any(p.requires_grad for p in tensors)
        t = table.t, t_is_exact
        message = (table.config, t, mine, n_elements, on_device, uuid4().hex)
        dist.all_gather_object(gathered, message, group=group)
        configs, steps, from_ranks, sizes, are_on_device, tokens = zip(*gathered, strict=True)
        for name in vars(table.config):
            check_same(f"the argument {name}", [getattr(config, name) for config in configs])
        exact = {rank: t for rank, (t, is_exact) in enumerate(steps) if is_exact}
        check_same("the number of steps taken", list(exact.values()), ranks=list(exact))
        table.t = max(t for t, _ in steps)
        shares = list(from_ranks)
        shares[dist.get_rank(group)] = mine
        identities = [[(x.unit.name, x.shapes, x.checksum) for x in own] for own in shares]
        first = [identities.index(identity) for identity in identities]
        ranks.everywhere = len(set(first)) == 1
        ranks.n_elements = sum(sizes[rank] for rank in set(first))
        ranks.on_device = all(are_on_device)
        ranks.token = tokens[0]
        n_tensors = sum(map(len, members.values()))
        ranks.one_mesh = ranks.everywhere and [
            (len(dims), mesh.size(dims[0]), len(parts))
            for (mesh, dims), parts in ranks._sharded.items()
        ] == [(1, len(own_ranks), n_tensors)]
        if not ranks.everywhere:
            ranks._name_nameless(shares, first)
        by_name: dict[str, list[tuple[int, _Share]]] = {}
        for rank, on_rank in enumerate(shares):
            for share in on_rank:
                by_name.setdefault(share.unit.name, []).append((rank, share))
        for name, of_unit in by_name.items():
            _check_shares(name, of_unit)
        units = {name: of_unit[0][1].unit for name, of_unit in by_name.items()}
        units.update((unit.name, unit) for unit in members)
        return ranks, list(units.values())

    def _name_nameless(self, shares: list[list[_Share]], first: list[int]) -> None:
        """Put the rank before the generated names of units, which are different matrices."""
        nameless = any(_NAMELESS.fullmatch(unit.name) for unit in self.members)
        described = [[(x.unit.name, x.shapes) for x in own] for own in shares]
        if nameless and all(own == described[0] for own in described):
            warnings.warn(
                "the ranks have different tensors of the same shapes under generated names: each "
                "becomes a unit of its own. Under ZeroRedundancyOptimizer zero.optim.attach(model) "
                f"gives them names; {DIFFERENT_MODELS}",
                stacklevel=3,
            )
        self.prefix = f"rank{first[dist.get_rank(self.group)]}."
        for rank, own in zip(first, shares, strict=True):
            for share in own:
                if _NAMELESS.fullmatch(share.unit.name):
                    share.unit.name = f"rank{rank}.{share.unit.name}"

    def shard_rows(
        self, units: Iterable[Unit], position: Mapping[Tensor, int], sums: Tensor
    ) -> list[ShardRows]:
        """The rows of sharded tensors in `sums`, which has three sums per tensor.

        The same number of rows on every rank: a tensor without a `position` has the last one.
        """
        chosen = set(units)
        found = []
        for (mesh, dims), parts in self._sharded.items():
            own = [self.members[unit][k] for unit, k in parts if unit in chosen]
            rows = [position.get(p, len(sums) - 1) for p in own]
            indices = torch.tensor(rows, dtype=torch.int64, device=sums.device)
            found.append((mesh, dims, indices))
        return found

    def add_shards(self, sums: Tensor, shards: Iterable[ShardRows]) -> None:
        """Add up these rows over the ranks that have the shards.

        One all-reduce for each dimension of a mesh over which tensors are sharded, of the same size
        at every check: a tensor without evidence on this rank takes part with infinity. Dimensions
        over which a tensor is replicated are not summed.
        """
        for mesh, dims, own in shards:
            total = _sum(sums.index_select(0, own), mesh, dims)
            sums.index_copy_(0, own, total.to(sums.device))

    def start_sum(
        self, table: FreezeTable, sums: Tensor, shards: Sequence[ShardRows]
    ) -> Callable[[], Tensor]:
        """As `add_shards`, where `one_mesh`; the function it returns waits for the sum.

        Raises:
            RuntimeError: When waiting; on every rank, if the freeze tables of the ranks differ, and
                naming the ranks that do not take part.
        """
        [(mesh, dims, own)] = shards
        # Three pieces of 16 bits, whose squares have exact sums too.
        checksum = table.checksum(taus=True)
        pieces = sums.new_tensor([checksum >> 16 * i & 0xFFFF for i in range(3)])
        mine = torch.cat([sums[own], torch.stack([pieces, pieces.square()])])
        group, t = mesh.get_group(dims[0]), table.t
        total = mine.to(_device(group, sums.device))
        work = dist.all_reduce(total, group=group, async_op=True)
        # A process that ends takes part until the others have the sum.
        at_exit = Finalize(None, _wait, (work, total), exitpriority=0)

        def finish() -> Tensor:
            at_exit.cancel()
            try:
                work.wait()
            except RuntimeError as error:
                raise_if_absent(error, self.group, t)
                raise
            pieces, squares = total[-2:].tolist()
            # n sum(x^2) = sum(x)^2 where all n are equal, and nowhere else (Cauchy-Schwarz).
            n = mesh.size(dims[0])
            if any(n * int(b) != int(a) ** 2 for a, b in zip(pieces, squares, strict=True)):
                self.raise_difference(table)
            return sums.index_copy_(0, own, total[:-2].to(sums.device))

        return finish

    def largest_values(self, table: FreezeTable, values: dict[Unit, float]) -> dict[Unit, float]:
        """The statistic that all ranks compare with tau: the largest over all ranks.

        `values` has the units with evidence on this rank; the result has those with evidence on
        every rank that has tensors of them. The thresholds of units that this rank has no tensors
        of are taken over from the others.

        Raises:
            RuntimeError: On every rank, if the freeze tables of the ranks differ.
        """
        rows: list[list[float]] = []
        for unit in table.units:
            here = [values.get(unit, math.inf), unit.tau, -unit.tau]
            rows.append(here if unit in self.members else [-math.inf] * 3)
        checksum = table.checksum(taus=False)
        rows.append([float(self.asks_to_join), checksum, -checksum])
        largest = self.largest(torch.tensor(rows, dtype=torch.float64, device="cpu")).tolist()
        if any(high != -negative for _, high, negative in largest):
            self.raise_difference(table)
        self.must_join = largest[-1][0] > 0
        decisive = {}
        for unit, (value, tau, _) in zip(table.units, largest, strict=False):
            unit.tau = tau
            if unit.decided_at == NEVER and -math.inf < value < math.inf:
                decisive[unit] = value
        return decisive

    def largest(self, x: Tensor) -> Tensor:
        """Of every element the largest over all ranks, on the device of `x`."""
        largest = x.to(_device(self.group, x.device), copy=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.to(x.device)

    def _checksums(self) -> dict[Unit, int]:
        """A number per unit that depends on the bits of its tensors and not on their sharding."""
        members = self.members.items()
        sums = {(unit, k): _bit_sum(p) for unit, own in members for k, p in enumerate(own)}
        for (mesh, dims), parts in self._sharded.items():
            total = _sum(torch.stack([sums[part] for part in parts]), mesh, dims)
            sums.update(zip(parts, total, strict=True))
        numbers = torch.stack([x.cpu() for x in sums.values()]).tolist() if sums else []
        whole: dict[Unit, int] = dict.fromkeys(self.members, 0)
        for (unit, k), number in zip(sums, numbers, strict=True):
            whole[unit] += (k + 1) * number
        return whole

    def raise_difference(self, table: FreezeTable) -> None:
        """Raise RuntimeError that names the difference; each rank calls this when it finds one."""
        rows = {
            x.name: (x.tau if x in self.members else None, *(getattr(x, key) for key in _STATE))
            for x in table.units
        }
        found = reports(self.group, f"{self.token}/{table.t}", json.dumps((table.t, rows)))
        tables = {rank: json.loads(x) for rank, x in found.items() if x is not None}
        ranks = list(tables)
        steps = [t for t, _ in tables.values()]
        check_same("the number of steps taken", steps, RuntimeError, ranks=ranks)
        for name in dict.fromkeys(name for _, rows in tables.values() for name in rows):
            having = [rank for rank in ranks if name in tables[rank][1]]
            values = [tables[rank][1][name] for rank in having]
            tau = next((tau for tau, *_ in values if tau is not None), None)
            values = [(tau if own is None else own, *state) for own, *state in values]
            what = f"unit {name!r}, as (tau, {', '.join(_STATE)})"
            check_same(what, values, RuntimeError, ranks=having)
        silent = [rank for rank in found if rank not in tables]
        raise RuntimeError(
            f"the freeze table of rank {dist.get_rank()} differs from that of rank "
            f"{', '.join(map(str, silent))}, which has not reported its own."
            if silent
            else "the freeze tables of the ranks list different units, or the same in another "
            "order."
        )


def _wait(work: Any, total: Tensor) -> None:
    with contextlib.suppress(RuntimeError):  # another rank has failed
        work.wait()
        total.cpu()  # with NCCL the host has waited for nothing so far


def _sharding(p: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a DTensor and its dimensions over which it is sharded; None: it is whole."""
    if not hasattr(p, "device_mesh"):
        return None
    whole = [x.is_replicate() or x.is_partial() for x in p.placements]
    dims = tuple(i for i, x in enumerate(whole) if not x and p.device_mesh.size(i) > 1)
    return (p.device_mesh, dims) if dims else None


def _bit_sum(p: Tensor) -> Tensor:
    """The bits of this rank's part of a tensor, summed as integers: exact in any order."""
    p = local(p.detach())
    if p.is_complex():
        p = torch.view_as_real(p)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = p.view(integers[p.element_size()]).sum(dtype=torch.int64)
    # Some subclasses wrap every result, and cannot be read in a list.
    return total if type(total) is Tensor else torch.tensor(total.item(), device=total.device)


def _sum(x: Tensor, mesh: Any, dims: Sequence[int]) -> Tensor:
    """`x` added up over the ranks along these dimensions of a mesh."""
    total = x.to(_device(mesh.get_group(dims[0]), x.device))
    for dim in dims:
        dist.all_reduce(total, group=mesh.get_group(dim))
    return total


def _device(group: ProcessGroup | None, wanted: torch.device) -> torch.device:
    """The device on which a tensor goes through `group`: the wanted one where that is possible."""
    kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if wanted.type in kinds:
        return wanted
    if kinds[0] == "cpu":
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _check_shares(name: str, shares: list[tuple[int, _Share]]) -> None:
    """Compare how several ranks describe one unit."""
    ranks = [rank for rank, _ in shares]
    check_same(
        f"unit {name!r}, as (statistic, tau, shapes)",
        [(unit.statistic, unit.tau, shapes) for _, (unit, shapes, _) in shares],
        ranks=ranks,
        way_out="If a LoRA pair was split between ranks, train it without ZeroRedundancyOptimizer; "
        + DIFFERENT_MODELS,
    )
    states = [tuple(getattr(share.unit, key) for key in _STATE) for _, share in shares]
    check_same(f"unit {name!r}, as ({', '.join(_STATE)})", states, ranks=ranks)
    if len({share.checksum for _, share in shares}) > 1:
        warnings.warn(
            f"{name!r} has other values on rank {ranks[0]} than on other ranks, and is frozen only "
            f"when it has converged on all of them; {DIFFERENT_MODELS}",
            stacklevel=2,
        )
