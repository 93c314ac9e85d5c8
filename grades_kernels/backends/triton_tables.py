"""The tables that the Triton kernels read: those of an engine, and those of a step."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..freezing.table import NEVER, STATISTICS, FreezeTable, Unit
from ..state_tensors import gradient_dtype
from .tasks import KEEP, STATISTIC_BITS, StepTensors
from .triton_kernels import PARTIALS, block_size

DEPENDS, FREEZES = 64, 128
"""Flags of a task beside those of `tasks`: the decision of this very step has to be read, and a
unit that it decides is frozen at once."""

# The tables that the kernels read: one row per tensor or unit.


def _row(names: str, dtype: type) -> np.dtype:
    return np.dtype([(name, dtype) for name in names.split()])


TENSOR = _row(  # addresses (0: none), their bitwise or, numbers; written when an engine is made
    "param exp_avg exp_avg_sq max_exp_avg_sq prev_grad step "
    "address_bits n_elements span unit first_program n_programs",
    np.int64,
)
INPUT = _row("grad task", np.int64)  # address of the gradient, 0: none
COEFFICIENT = _row(
    "step_size root_correction2 decay_factor one_minus_beta1 beta2 one_minus_beta2 eps sign "
    "past_root_factor",
    np.float32,
)
PAST = _row("numerator_divisor denominator_divisor", np.float64)
UNIT = _row(
    "tau divisor hits_missing is_measured first_member n_members is_ratio must_be_positive "
    "without_evidence",
    np.float64,
)
TABLES = {"tensor": TENSOR, "input": INPUT, "coefficient": COEFFICIENT, "past": PAST, "unit": UNIT}

_positions = {
    name: offset // field.itemsize
    for table in TABLES.values()
    for name, (field, offset, *_) in table.fields.items()  # type: ignore[union-attr]
}
_constants = _positions | {
    **{f"{name}_row": len(table.names or ()) for name, table in TABLES.items()},
    "statistic_bits": STATISTIC_BITS,
    "keep_flag": KEEP,
    "depends_flag": DEPENDS,
    "freezes_flag": FREEZES,
}
FIELDS: Any = namedtuple("Fields", _constants)(**_constants)
"""Position of every field in its row, length of every row, and flags of a task."""


_BLOCKS_PER_PROGRAM = 8  # benchmarks/README.md has the calculation
_MAX_PROGRAMS_PER_TENSOR = 4096  # of a unit: the program that decides it adds up their sums
_N_STAGING = 4
_VIEWS = (torch.int64, torch.float64, torch.float64, torch.float64, torch.float32)
"""dtype of the tables of a `Staging` on the device, in their order."""


class Launch(NamedTuple):
    """The tensors that one launch serves: one combination of dtypes and flags."""

    param: torch.dtype
    grad: torch.dtype
    moment: torch.dtype
    amsgrad: bool
    statistic: str

    @property
    def block(self) -> int:
        """Elements per inner iteration of the kernel."""
        return block_size(min(self.param.itemsize, self.grad.itemsize, self.moment.itemsize))


class Staging:
    """A pinned buffer with the inputs of one step, and when the device has read it."""

    def __init__(self, n_tensors: int, n_units: int, cuda: bool) -> None:
        agreed = (np.dtype(np.float64), 2 * n_units + 3)
        tables = (  # 8-byte numbers first, so that all are aligned
            (INPUT, n_tensors), (PAST, n_tensors), (UNIT, n_units), agreed,
            (COEFFICIENT, n_tensors),
        )  # fmt: skip
        n_bytes = sum(table.itemsize * n for table, n in tables)
        # The device is given because torch.set_default_device may say otherwise.
        self.buffer = torch.zeros(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=cuda)
        self.slices: list[slice] = []
        views = []
        start = 0
        for table, n in tables:
            self.slices.append(slice(start, start + table.itemsize * n))
            views.append(self.buffer.numpy()[self.slices[-1]].view(table))
            start = self.slices[-1].stop
        self.inputs, self.past, self.units, self.agreed, self.coefficients = views
        self.past[:] = 1
        self.was_read = torch.cuda.Event() if cuda else None


class DeviceTables:
    """The tensors of one device, laid out for the kernels.

    Args:
        tensors, units, device, own_units: As in `TritonEngine`. `own_units` is the order of rows.

    Attributes:
        programs: Per launch the first of its programs, and how many it has with and without tensors
            that are not monitored: those that may measure come first.
    """

    def __init__(
        self,
        tensors: StepTensors,
        units: Sequence[Unit | None],
        device: torch.device,
        own_units: Sequence[Unit] | None = None,
    ) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.units = list(units)
        present = dict.fromkeys(unit for unit in units if unit is not None)
        self.own_units = list(present if own_units is None else own_units)
        self.group_of = np.repeat(np.arange(len(tensors.groups)), [n for _, n in tensors.groups])
        self._lay_out_tensors(tensors)
        self._lay_out_units()
        n, m = len(units), len(self.own_units)
        self.ring = [Staging(n, m, self.cuda) for _ in range(_N_STAGING)]
        self.turn = 0
        self.step_inputs = torch.zeros_like(self.ring[0].buffer, device=device)
        self.inputs, self.past, self.unit_table, self.agreed, self.coefficients = (
            self.step_inputs[part].view(dtype)
            for part, dtype in zip(self.ring[0].slices, _VIEWS, strict=True)
        )

    def _lay_out_tensors(self, tensors: StepTensors) -> None:
        rows = np.zeros(len(tensors.params), dtype=TENSOR)
        number = {unit: m for m, unit in enumerate(self.own_units)}
        for name, column in (
            ("param", tensors.params),
            ("exp_avg", tensors.exp_avgs),
            ("exp_avg_sq", tensors.exp_avg_sqs),
            ("max_exp_avg_sq", tensors.max_exp_avg_sqs),
            ("prev_grad", tensors.prev_grads),
        ):
            rows[name] = [0 if x is None else x.data_ptr() for x in column]
            rows["address_bits"] |= rows[name]
        rows["step"] = [step.data_ptr() for step in tensors.state_steps]
        rows["n_elements"] = [p.numel() for p in tensors.params]
        rows["unit"] = [-1 if unit is None else number[unit] for unit in self.units]
        amsgrad = [options.amsgrad for options, n in tensors.groups for _ in range(n)]
        columns = (*tensors[:3], amsgrad, self.units)
        of_tensor = [
            Launch(p.dtype, gradient_dtype(g, p), m.dtype, a, unit.statistic if unit else "")
            for p, g, m, a, unit in zip(*columns, strict=True)
        ]
        # Whole blocks, so that none reaches into the next program's span.
        blocks = np.array([launch.block for launch in of_tensor], dtype=np.int64)
        is_summed = rows["unit"] >= 0
        least = np.where(is_summed, -(-rows["n_elements"] // _MAX_PROGRAMS_PER_TENSOR), 0)
        rows["span"] = blocks * np.maximum(_BLOCKS_PER_PROGRAM, -(-least // blocks))
        rows["n_programs"] = np.maximum(1, -(-rows["n_elements"] // rows["span"]))
        summed = rows["n_programs"] * is_summed
        rows["first_program"] = np.cumsum(summed) - summed
        # The largest tensors first: they have the programs that take longest.
        launches: dict[Launch, list[int]] = {}
        for n in np.argsort(-rows["n_elements"], kind="stable").tolist():
            launches.setdefault(of_tensor[n], []).append(n)
        # Unmonitored tensors join a launch of the same dtypes.
        for launch in [x for x in launches if not x.statistic]:
            partner = next((x for x in launches if x.statistic and x[:4] == launch[:4]), None)
            if partner is not None:
                launches[partner] += launches.pop(launch)
        self.rows, self.launches = rows, launches
        self.tensor_table = self._upload(rows.view(np.int64))
        n_partials = int(summed.sum()) * PARTIALS
        self.partials = torch.zeros(n_partials, dtype=torch.float32, device=self.device)
        self._lay_out_programs(np.ones(len(rows), dtype=bool))

    def _lay_out_units(self) -> None:
        """The fields of a unit that never change; `fill_units` adds the others."""
        self.unit_rows = np.zeros(len(self.own_units), dtype=UNIT)
        by_unit = np.argsort(self.rows["unit"], kind="stable")
        members = by_unit[self.rows["unit"][by_unit] >= 0]
        sizes = np.bincount(self.rows["unit"][members], minlength=len(self.own_units))
        self.unit_rows["first_member"] = np.cumsum(sizes) - sizes
        self.unit_rows["n_members"] = sizes
        self.n_tensors = np.array([unit.n_tensors for unit in self.own_units], dtype=np.int64)
        statistics = [STATISTICS[unit.statistic] for unit in self.own_units]
        self.unit_rows["is_ratio"] = [statistic.is_ratio for statistic in statistics]
        self.unit_rows["must_be_positive"] = [statistic.of_update for statistic in statistics]
        self.unit_rows["without_evidence"] = np.inf
        self.taus: list[float] = []  # in the rows
        self.members = self._upload(np.append(members, 0).astype(np.int32))
        self.statistics = np.array([u.statistic if u else "" for u in self.units], dtype=str)
        least = [STATISTICS[unit.statistic].least_steps if unit else 0 for unit in self.units]
        self.least_steps = np.array(least, dtype=np.int64)
        self.corrects = bool(np.isin(self.statistics, ("signal", "gain")).any())

    def leave_to_others(self, own: Container[Unit]) -> None:
        """Have other ranks measure the units that are not among those of this rank."""
        elsewhere = [unit not in own for unit in self.own_units]
        self.unit_rows["without_evidence"] = np.where(elsewhere, -np.inf, np.inf)

    def _lay_out_programs(self, is_launched: np.ndarray) -> None:
        """The programs of every launch, for the tensors that are: first those that may measure."""
        parts: list[np.ndarray] = []
        self.programs: dict[Launch, tuple[int, int, int]] = {}
        first = 0
        for launch, members in self.launches.items():
            chosen = np.array([n for n in members if is_launched[n]], dtype=np.int64)
            if len(chosen) == 0:
                continue
            counts = self.rows["n_programs"][chosen]
            tensor = np.repeat(chosen, counts)
            index = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
            parts.append(np.stack([tensor, index], axis=1))
            n_monitored = int(counts[self.rows["unit"][chosen] >= 0].sum())
            self.programs[launch] = (first, n_monitored, len(tensor))
            first += len(tensor)
        programs = np.concatenate(parts) if parts else np.zeros((0, 2))
        self.program_table = self._upload(programs.astype(np.int32))

    def _upload(self, array: np.ndarray) -> Tensor:
        """A copy on the device, without waiting for it."""
        if not self.cuda:
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def drop_frozen(self) -> None:
        """Take frozen units out of the launches, where their programs only return.

        An eighth of the programs at a time: laying them out takes the host tens of milliseconds for
        billions of parameters, a program that only returns takes the device less than a
        microsecond.
        """
        trains = [unit.frozen_at == NEVER for unit in self.own_units]
        is_launched = np.array([*trains, True])[self.rows["unit"]]  # the last: of no unit, row -1
        if self.rows["n_programs"][is_launched].sum() * 8 <= len(self.program_table) * 7:
            self._lay_out_programs(is_launched)

    def next_staging(self) -> Staging:
        self.turn = (self.turn + 1) % len(self.ring)
        staging = self.ring[self.turn]
        if staging.was_read is not None:
            staging.was_read.synchronize()  # it was used four steps ago
        return staging

    def fill_coefficients(
        self,
        staging: Staging,
        tensors: StepTensors,
        lr_factors: np.ndarray,
        steps_taken: np.ndarray,
    ) -> None:
        """In fp64: a Python float reaches a kernel as fp32, and 1 - 0.999 would be 1e-5 off."""
        columns = np.array(
            [
                [*map(float, options[:5]), -1.0 if options.maximize else 1.0]
                for options, _ in tensors.groups
            ]
        )[self.group_of]
        lr, beta1, beta2, eps, weight_decay, sign = columns.T
        lr = lr * lr_factors
        steps = steps_taken + 1
        out = staging.coefficients
        out["step_size"] = lr / (1 - beta1**steps)
        out["root_correction2"] = np.sqrt(1 - beta2**steps)
        out["decay_factor"] = 1 - lr * weight_decay
        out["one_minus_beta1"] = 1 - beta1
        out["beta2"] = beta2
        out["one_minus_beta2"] = 1 - beta2
        out["eps"] = eps
        out["sign"] = sign
        if not self.corrects:
            return
        # Without a step there is no evidence, whatever is divided by.
        past = np.maximum(steps_taken, 1)
        correction2 = 1 - beta2**past
        out["past_root_factor"] = 1 / np.sqrt(correction2)  # a division less per element
        for statistic, numerator, denominator in (
            ("signal", (1 - beta1) / (1 + beta1) * (1 - beta1 ** (2 * past)), correction2),
            ("gain", 1 - beta1**past, np.ones_like(beta1)),
        ):
            chosen = self.statistics == statistic
            staging.past["numerator_divisor"][chosen] = numerator[chosen]
            staging.past["denominator_divisor"][chosen] = denominator[chosen]

    def fill_units(self, staging: Staging, table: FreezeTable, is_measured: np.ndarray) -> None:
        rows, units = staging.units, self.own_units
        taus = [unit.tau for unit in units]
        if taus != self.taus:
            self.unit_rows["tau"] = self.taus = taus
        rows[:] = self.unit_rows
        rows["divisor"] = 1
        if table.config.tau_per == "element":
            sizes = [unit.n_elements for unit in units]
            rows["divisor"] = np.where(rows["is_ratio"] != 0, 1, sizes)
        rows["hits_missing"] = 1
        if table.config.patience > 1:
            rows["hits_missing"] = [table.config.patience - unit.hits for unit in units]
        rows["is_measured"] = is_measured

    def fill_agreed(self, staging: Staging, table: FreezeTable, *, asks_to_join: bool) -> None:
        """Write the numbers that must be equal on all ranks.

        They are the thresholds, their negatives, a checksum and its negative; a last number is
        whether a rank needs another exchange of units. The ranks look for the largest of each;
        minus infinity leaves it to the others.
        """
        taus, checksum = staging.units["tau"], table.checksum(taus=False)
        elsewhere = self.unit_rows["without_evidence"] < 0
        both = [np.where(elsewhere, -np.inf, x) for x in (taus, -taus)]
        staging.agreed[:] = np.concatenate([*both, [checksum, -checksum, asks_to_join]])

    def adopt_agreed(self, largest: np.ndarray) -> bool:
        """Whether all ranks had the same; then every unit has the threshold of its ranks."""
        n = len(self.own_units)
        taus, negatives, (checksum, negative, _) = np.split(largest, [n, 2 * n])
        if checksum != -negative or not np.array_equal(taus, -negatives):
            return False
        for unit, tau in zip(self.own_units, taus.tolist(), strict=True):
            unit.tau = tau
        return True

    def complete_units(self, chosen: np.ndarray) -> list[Unit]:
        """The units all of whose tensors are chosen."""
        return [self.own_units[m] for m in np.flatnonzero(self.is_complete(chosen)).tolist()]

    def is_complete(self, chosen: np.ndarray) -> np.ndarray:
        """Per unit whether all its tensors are chosen."""
        n_chosen = np.bincount(self.rows["unit"][chosen], minlength=len(self.own_units))
        return n_chosen == self.n_tensors
