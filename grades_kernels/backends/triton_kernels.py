"""The Triton kernels: measure, update and keep in one pass over all tensors, and decide.

The only module that imports Triton. How a decision is made without the host: every program of
`step_kernel` stores its part of the statistic; `decide_kernel`, launched behind it with one program
per unit, adds the parts up in a fixed order, compares the sum with tau and stores whether the unit
is decided. For a check before the update, a launch of `step_kernel` that updates comes after it and
reads that. So no result depends on the order in which programs run. In a job of several processes
an all-reduce of the sums of sharded tensors, and one of the statistics, stand between adding
up and comparing.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

PARTIALS = 3
"""What a program stores of its tensor, fp32: its part of the statistic, of the sum of |g|, and of
the denominator where the statistic is a ratio."""
_PARTIALS = tl.constexpr(PARTIALS)
_TILE = tl.constexpr(512)

THREADS = 128  # per program
# Without a ceiling ptxas spills a register here and there to fit one more program on a
# multiprocessor; with one it does not try. No variant needs more.
MAX_REGISTERS = 168


def launch_options(backend: str, warp_size: int = 32) -> dict[str, Any]:
    """Compile options of both kernels.

    Args:
        backend: "cuda", "hip" or "cpu" (the interpreter).
        warp_size: Threads of a warp on the device.
    """
    # Every operation rounds, as in the reference and alike in all variants.
    options: dict[str, Any] = {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}
    if backend == "cuda":
        options["maxnreg"] = MAX_REGISTERS
    return options


def block_size(itemsize: int) -> int:
    """Elements per inner iteration: 16 bytes per thread of the narrowest tensor."""
    return THREADS * 16 // itemsize


@triton.jit
def _pointer(address, first, dtype: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Typed pointers to `BLOCK` elements; the hint makes 16-byte accesses, after the cast only."""
    ptr = address.to(tl.pointer_type(dtype)) + first
    if FULL:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + tl.arange(0, BLOCK)


@triton.jit
def _load(address, first, n_left, dtype: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    ptr = _pointer(address, first, dtype, FULL, BLOCK)
    if FULL:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=tl.arange(0, BLOCK) < n_left, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(address, first, n_left, x, dtype: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    ptr = _pointer(address, first, dtype, FULL, BLOCK)
    if FULL:
        tl.store(ptr, x.to(dtype))
    else:
        tl.store(ptr, x.to(dtype), mask=tl.arange(0, BLOCK) < n_left)


@triton.jit
def _do_block(
    row,
    grad_address,
    coefficients,
    grad_scale,
    measuring,
    keeping,
    first,
    n_left,
    FIELDS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    STATISTIC: tl.constexpr,
    MEASURE: tl.constexpr,
    UPDATE: tl.constexpr,
    STORE_GRAD: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """One block of one tensor: returns numerator, denominator ("signal") and |g| per element, fp32.

    All arithmetic is fp32 and rounded operation by operation; only the storage dtypes are narrow.
    FULL blocks lie wholly inside an aligned tensor and need no mask: a mask alone, even one that is
    always true, breaks 16-byte accesses into single ones.
    """
    g = _load(grad_address, first, n_left, GRAD, FULL, BLOCK)
    if SCALED:
        g = tl.div_rn(g, tl.full(g.shape, 0.0, tl.float32) + grad_scale)
        if UPDATE:
            _store(grad_address, first, n_left, g, GRAD, FULL, BLOCK)
    numerator = tl.zeros_like(g)
    signed = g * tl.load(coefficients + FIELDS.sign)

    if UPDATE:
        exp_avg_address = tl.load(row + FIELDS.exp_avg)
        exp_avg_sq_address = tl.load(row + FIELDS.exp_avg_sq)
        param_address = tl.load(row + FIELDS.param)
        m = _load(exp_avg_address, first, n_left, MOMENT, FULL, BLOCK)
        v = _load(exp_avg_sq_address, first, n_left, MOMENT, FULL, BLOCK)
        p = _load(param_address, first, n_left, PARAM, FULL, BLOCK)
    else:
        if STATISTIC == "momentum" or STATISTIC == "signal" or STATISTIC == "gain":
            m = _load(tl.load(row + FIELDS.exp_avg), first, n_left, MOMENT, FULL, BLOCK)
        if STATISTIC == "signal" or STATISTIC == "gain":
            v = _load(tl.load(row + FIELDS.exp_avg_sq), first, n_left, MOMENT, FULL, BLOCK)

    denominator = tl.zeros_like(g)
    if MEASURE:
        if STATISTIC == "change":
            if measuring:
                prev_address = tl.load(row + FIELDS.prev_grad)
                numerator = tl.abs(g - _load(prev_address, first, n_left, GRAD, FULL, BLOCK))
        elif STATISTIC == "momentum":
            numerator = tl.abs(signed - m)
        elif STATISTIC == "signal":
            numerator = m * m
            denominator = v
        elif STATISTIC == "gain":
            past_correction = tl.load(coefficients + FIELDS.past_root_correction2)
            past_root = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + past_correction)
            numerator = tl.div_rn(signed * m, past_root + tl.load(coefficients + FIELDS.eps))
        elif STATISTIC == "norm":
            numerator = tl.abs(g)

    if STORE_GRAD:
        if keeping:
            _store(tl.load(row + FIELDS.prev_grad), first, n_left, g, GRAD, FULL, BLOCK)

    if UPDATE:
        weight = tl.load(coefficients + FIELDS.one_minus_beta1)
        # As torch's lerp: the form that is exact at the nearer end.
        m = tl.where(
            weight < 0.5, m + weight * (signed - m), signed - (signed - m) * (1.0 - weight)
        )
        beta2 = tl.load(coefficients + FIELDS.beta2)
        v = v * beta2 + (tl.load(coefficients + FIELDS.one_minus_beta2) * signed) * signed
        _store(exp_avg_address, first, n_left, m, MOMENT, FULL, BLOCK)
        _store(exp_avg_sq_address, first, n_left, v, MOMENT, FULL, BLOCK)
        if AMSGRAD:
            max_address = tl.load(row + FIELDS.max_exp_avg_sq)
            v_max = _load(max_address, first, n_left, MOMENT, FULL, BLOCK)
            v = tl.maximum(v, v_max, propagate_nan=tl.PropagateNan.ALL)
            _store(max_address, first, n_left, v, MOMENT, FULL, BLOCK)
        correction = tl.load(coefficients + FIELDS.root_correction2)
        root = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + correction)
        before = p
        p = p - p * tl.load(coefficients + FIELDS.decay)
        step_size = tl.load(coefficients + FIELDS.step_size)
        p = p - tl.div_rn(step_size * m, root + tl.load(coefficients + FIELDS.eps))
        _store(param_address, first, n_left, p, PARAM, FULL, BLOCK)
        if MEASURE and STATISTIC == "weight_change":
            numerator = tl.abs(p.to(PARAM).to(tl.float32) - before)

    return numerator, denominator, tl.abs(g)


@triton.jit(do_not_specialize=["first_program"])
def step_kernel(
    programs_ptr,  # int32 pairs: the tensor of each program, and which part of it
    tensors_ptr,  # rows TENSOR
    inputs_ptr,  # rows INPUT
    coefficients_ptr,  # rows COEFFICIENT
    decided_ptr,  # fp64 per unit: 1 where `decide_kernel` has decided it
    partials_ptr,  # fp32, PARTIALS per program
    found_inf_ptr,  # GradScaler's fp32 scalars, read where SCALED
    grad_scale_ptr,
    first_program,  # of this launch in programs_ptr
    FIELDS: tl.constexpr,
    PARAM: tl.constexpr,  # dtypes
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    STATISTIC: tl.constexpr,  # one of `STATISTICS`
    MEASURE: tl.constexpr,  # accumulate the statistic
    UPDATE: tl.constexpr,  # AdamW
    STORE_GRAD: tl.constexpr,  # store the gradient for the next step's check
    AMSGRAD: tl.constexpr,
    SCALED: tl.constexpr,  # GradScaler's in-kernel protocol
    BLOCK: tl.constexpr,
):
    """Statistic and AdamW of all tensors of one dtype combination.

    Reads g, and where it updates p, exp_avg, exp_avg_sq; writes the latter three. A tensor without
    a task costs a few scalar loads and writes nothing.
    """
    program = programs_ptr + (first_program + tl.program_id(0)) * 2
    tensor = tl.load(program).to(tl.int64)
    index = tl.load(program + 1)
    row = tensors_ptr + tensor * FIELDS.tensor_row
    input_row = inputs_ptr + tensor * FIELDS.input_row
    task = tl.load(input_row + FIELDS.task)
    if SCALED:
        if tl.load(found_inf_ptr) != 0.0:
            return
    measuring = MEASURE and ((task & FIELDS.statistic_bits) != 0)
    keeping = STORE_GRAD and ((task & FIELDS.keep_flag) != 0)
    if UPDATE:
        if task == 0:
            return
        if (task & FIELDS.depends_flag) != 0:
            if tl.load(decided_ptr + tl.load(row + FIELDS.unit)) != 0.0:
                keeping = False
                if (task & FIELDS.freezes_flag) != 0:
                    return
    else:
        if not measuring:
            return

    grad_address = tl.load(input_row + FIELDS.grad)
    coefficients = coefficients_ptr + tensor * FIELDS.coefficient_row
    grad_scale = 1.0
    if SCALED:
        grad_scale = tl.load(grad_scale_ptr)
    n_elements = tl.load(row + FIELDS.n_elements)
    span = tl.load(row + FIELDS.span)
    start = index * span
    stop = tl.minimum(start + span, n_elements)

    addresses = grad_address
    if UPDATE:
        addresses |= tl.load(row + FIELDS.param)
        addresses |= tl.load(row + FIELDS.exp_avg) | tl.load(row + FIELDS.exp_avg_sq)
        if AMSGRAD:
            addresses |= tl.load(row + FIELDS.max_exp_avg_sq)
    else:
        if STATISTIC == "momentum" or STATISTIC == "signal" or STATISTIC == "gain":
            addresses |= tl.load(row + FIELDS.exp_avg)
        if STATISTIC == "signal" or STATISTIC == "gain":
            addresses |= tl.load(row + FIELDS.exp_avg_sq)
    if STATISTIC == "change":
        if MEASURE or STORE_GRAD:
            addresses |= tl.load(row + FIELDS.prev_grad)
    aligned = (addresses & 15) == 0

    numerators = tl.zeros((BLOCK,), tl.float32)
    denominators = tl.zeros((BLOCK,), tl.float32)
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        n_left = tl.minimum(n_elements - first, BLOCK).to(tl.int32)
        if aligned & (first + BLOCK <= n_elements):
            numerator, denominator, magnitude = _do_block(
                row, grad_address, coefficients, grad_scale, measuring, keeping, first, n_left,
                FIELDS, PARAM, GRAD, MOMENT, STATISTIC, MEASURE, UPDATE, STORE_GRAD, AMSGRAD,
                SCALED, BLOCK, FULL=True,
            )  # fmt: skip
        else:
            numerator, denominator, magnitude = _do_block(
                row, grad_address, coefficients, grad_scale, measuring, keeping, first, n_left,
                FIELDS, PARAM, GRAD, MOMENT, STATISTIC, MEASURE, UPDATE, STORE_GRAD, AMSGRAD,
                SCALED, BLOCK, FULL=False,
            )  # fmt: skip
        if MEASURE:
            numerators += numerator
            denominators += denominator
            magnitudes += magnitude

    if UPDATE:
        if index == 0:
            step_ptr = tl.load(row + FIELDS.step).to(tl.pointer_type(tl.float32))
            tl.store(step_ptr, tl.load(step_ptr) + 1.0)

    if MEASURE:
        if measuring:
            partial = partials_ptr + (tl.load(row + FIELDS.first_program) + index) * _PARTIALS
            tl.store(partial, tl.sum(numerators))
            tl.store(partial + 1, tl.sum(magnitudes))
            if STATISTIC == "signal":
                tl.store(partial + 2, tl.sum(denominators))


@triton.jit
def _sum_partials(partials, n_programs, TILE: tl.constexpr):
    """The fp64 sum of one partial of every program of a tensor, in a fixed order."""
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, n_programs, TILE):
        program = start + tl.arange(0, TILE)
        mask = program < n_programs
        total += tl.load(partials + program * _PARTIALS, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _sums_of(
    tensor,
    is_ratio,
    tensors_ptr,
    past_ptr,
    partials_ptr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Numerator, denominator (0 unless the statistic is a ratio) and sum of |g| of a tensor."""
    row = tensors_ptr + tensor * FIELDS.tensor_row
    past = past_ptr + tensor * FIELDS.past_row
    partials = partials_ptr + tl.load(row + FIELDS.first_program) * _PARTIALS
    n_programs = tl.load(row + FIELDS.n_programs)
    magnitude = _sum_partials(partials + 1, n_programs, TILE)
    numerator = _sum_partials(partials, n_programs, TILE)
    numerator = numerator / tl.load(past + FIELDS.numerator_divisor)
    denominator = tl.full((), 0.0, tl.float64)
    if is_ratio:
        part = _sum_partials(partials + 2, n_programs, TILE)
        denominator = part / tl.load(past + FIELDS.denominator_divisor)
    return numerator, denominator, magnitude


@triton.jit
def _value_of(
    unit_row,
    members_ptr,
    tensors_ptr,
    past_ptr,
    partials_ptr,
    sums_ptr,
    FIELDS: tl.constexpr,
    STORE: tl.constexpr,
    LOAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """The statistic of a unit; infinity where there is no evidence.

    STORE keeps the sums of its tensors, and LOAD takes them from there, added up over the ranks.
    """
    is_ratio = tl.load(unit_row + FIELDS.is_ratio) != 0.0
    first = tl.load(unit_row + FIELDS.first_member).to(tl.int32)
    last = first + tl.load(unit_row + FIELDS.n_members).to(tl.int32)
    evidence = tl.load(unit_row + FIELDS.is_measured) != 0.0
    last = tl.where(evidence, last, first)  # there are no partials to add up
    value = tl.full((), 0.0, tl.float64)
    denominator = tl.full((), 0.0, tl.float64)
    for member in range(first, last):
        tensor = tl.load(members_ptr + member).to(tl.int64)
        sums = sums_ptr + tensor * 3
        if LOAD:
            numerator = tl.load(sums)
            part = tl.load(sums + 1)
            magnitude = tl.load(sums + 2)
        else:
            numerator, part, magnitude = _sums_of(
                tensor, is_ratio, tensors_ptr, past_ptr, partials_ptr, FIELDS, TILE
            )
        if STORE:
            tl.store(sums, numerator)
            tl.store(sums + 1, part)
            tl.store(sums + 2, magnitude)
        evidence = evidence & (magnitude > 0) & (magnitude < float("inf"))
        value += numerator
        denominator += part
    if is_ratio:
        evidence = evidence & (denominator > 0)
        value = value / tl.where(denominator > 0, denominator, 1.0)
    evidence = evidence & (tl.abs(value) < float("inf"))  # False for NaN too
    evidence = evidence & ((value > 0) | (tl.load(unit_row + FIELDS.must_be_positive) == 0.0))
    return tl.where(evidence, value, float("inf"))


@triton.jit
def decide_kernel(
    units_ptr,  # rows UNIT
    members_ptr,  # int32: the tensors of one unit after the other
    tensors_ptr,  # rows TENSOR
    past_ptr,  # rows PAST
    partials_ptr,
    sums_ptr,  # fp64, three per tensor: what STORE and LOAD exchange with other ranks
    values_ptr,  # fp64 per unit: the statistic, infinity where there is no evidence
    decided_ptr,  # fp64 per unit: 1 where the unit is decided in this step, else 0
    FIELDS: tl.constexpr,
    SUM: tl.constexpr,  # add up the partials, and store the value
    COMPARE: tl.constexpr,  # compare the value with tau, and store the decision
    STORE: tl.constexpr,  # SUM stores the sums of every tensor
    LOAD: tl.constexpr,  # SUM finds them there
):
    """Decide; a program per unit.

    Ranks add up the sums of sharded tensors between two launches, and compare their values.
    """
    unit = tl.program_id(0).to(tl.int64)
    unit_row = units_ptr + unit * FIELDS.unit_row
    if SUM:
        value = _value_of(
            unit_row, members_ptr, tensors_ptr, past_ptr, partials_ptr, sums_ptr, FIELDS,
            STORE, LOAD, TILE=_TILE,
        )  # fmt: skip
        tl.store(values_ptr + unit, value)
    else:
        value = tl.load(values_ptr + unit)
    if COMPARE:
        # "gain" may be negative, and tau=0.0 freezes nothing.
        compared = tl.maximum(value / tl.load(unit_row + FIELDS.divisor), 0.0)
        is_hit = compared < tl.load(unit_row + FIELDS.tau)
        enough = tl.load(unit_row + FIELDS.hits_missing) <= 1.0
        decided = (value < float("inf")) & is_hit & enough
        tl.store(decided_ptr + unit, decided.to(tl.float64))
