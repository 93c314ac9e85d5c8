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

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The dtypes that the kernels read and write, and their names in Triton."""
PARTIALS = 3
"""Numbers that a program stores of its tensor, fp32: its part of the statistic, of the denominator
(0 if it is no ratio), and of the sum of |g|."""
_PARTIALS = tl.constexpr(PARTIALS)
_TILE = tl.constexpr(512)
_GRAIN = tl.constexpr(16)  # elements, a multiple of 16 bytes in every dtype

THREADS = 128  # per program
# Without a ceiling ptxas spills a register here and there to fit one more program on a
# multiprocessor; with one it does not try. No variant needs more.
MAX_REGISTERS = 168


def launch_options(backend: str, warp_size: int = 32) -> dict[str, Any]:
    """Compile options of both kernels for "cuda", "hip" or "cpu" (the interpreter)."""
    # Every operation rounds, as in the reference and alike in all variants.
    options: dict[str, Any] = {"num_warps": THREADS // warp_size, "enable_fp_fusion": False}
    if backend == "cuda":
        options["maxnreg"] = MAX_REGISTERS
    return options


def block_size(itemsize: int) -> int:
    """Elements per inner iteration: 16 bytes per thread of the narrowest tensor."""
    return THREADS * 16 // itemsize


@triton.jit
def _tensor(field, dtype: tl.constexpr):
    """The tensor whose address is in a field of a table."""
    return tl.load(field).to(tl.pointer_type(dtype))


@triton.jit
def _load(tensor, offsets, mask, NARROW: tl.constexpr):
    ptr = tl.multiple_of(tensor + offsets, 1 if NARROW else 16)
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _store(tensor, offsets, mask, x, NARROW: tl.constexpr):
    ptr = tl.multiple_of(tensor + offsets, 1 if NARROW else 16)
    tl.store(ptr, x.to(tensor.dtype.element_ty), mask=mask)


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
    KEEP: tl.constexpr,  # store the gradient for the next step's check
    AMSGRAD: tl.constexpr,
    SCALED: tl.constexpr,  # GradScaler's in-kernel protocol
    BLOCK: tl.constexpr,
):
    """Statistic and AdamW of all tensors of one dtype combination.

    Reads g, and where it updates p, exp_avg, exp_avg_sq; writes the latter three. A tensor without
    a task costs a few scalar loads and writes nothing. All arithmetic is fp32 and rounded operation
    by operation; only the storage dtypes are narrow.
    """
    READS_V: tl.constexpr = UPDATE or STATISTIC == "signal" or STATISTIC == "gain"
    READS_M: tl.constexpr = READS_V or STATISTIC == "momentum"
    READS_PREV: tl.constexpr = MEASURE and STATISTIC == "change"

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
    keeping = KEEP and ((task & FIELDS.keep_flag) != 0)
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

    # All scalars are loaded before the loops: behind a store, which may alias them, they would have
    # to be loaded again.
    span = tl.load(row + FIELDS.span)
    origin = index * span
    n_elements = tl.minimum(tl.load(row + FIELDS.n_elements) - origin, span).to(tl.int32)
    grad_ptr = _tensor(input_row + FIELDS.grad, GRAD) + origin
    if READS_PREV or KEEP:
        prev_grad_ptr = _tensor(row + FIELDS.prev_grad, GRAD) + origin
    if READS_M:
        exp_avg_ptr = _tensor(row + FIELDS.exp_avg, MOMENT) + origin
    if READS_V:
        exp_avg_sq_ptr = _tensor(row + FIELDS.exp_avg_sq, MOMENT) + origin
    if AMSGRAD:
        max_ptr = _tensor(row + FIELDS.max_exp_avg_sq, MOMENT) + origin
    coefficients = coefficients_ptr + tensor * FIELDS.coefficient_row
    sign = tl.load(coefficients + FIELDS.sign)
    eps = tl.load(coefficients + FIELDS.eps)
    if SCALED:
        grad_scale = tl.load(grad_scale_ptr)
    if UPDATE:
        param_ptr = _tensor(row + FIELDS.param, PARAM) + origin
        weight = tl.load(coefficients + FIELDS.one_minus_beta1)
        beta2 = tl.load(coefficients + FIELDS.beta2)
        one_minus_beta2 = tl.load(coefficients + FIELDS.one_minus_beta2)
        root_correction = tl.load(coefficients + FIELDS.root_correction2)
        decay_factor = tl.load(coefficients + FIELDS.decay_factor)
        step_size = tl.load(coefficients + FIELDS.step_size)
    if MEASURE:
        partial = partials_ptr + (tl.load(row + FIELDS.first_program) + index) * _PARTIALS
    if MEASURE and STATISTIC == "gain":
        past_root_factor = tl.load(coefficients + FIELDS.past_root_factor)

    # Aligned tensors are read and written 16 bytes at a time. Masks must be the same for that many
    # neighbours, so the last elements take narrow accesses, as tensors that are not aligned do.
    n_wide = 0
    if ((grad_ptr.to(tl.int64) | tl.load(row + FIELDS.address_bits)) & 15) == 0:
        n_wide = n_elements // _GRAIN * _GRAIN
    if UPDATE:
        if index == 0:
            step_ptr = _tensor(row + FIELDS.step, tl.float32)
            tl.store(step_ptr, tl.load(step_ptr) + 1.0)

    numerator = 0.0
    denominator = 0.0
    magnitude = 0.0
    for NARROW in tl.static_range(2):
        # Few elements at a time, so that single accesses do not take more registers than wide ones.
        zeros = tl.zeros((BLOCK // 4 if NARROW else BLOCK,), tl.float32)
        numerators = zeros
        denominators = zeros
        magnitudes = zeros
        end = n_elements if NARROW else n_wide
        for first in range(n_wide if NARROW else 0, end, zeros.shape[0]):
            offsets = first + tl.arange(0, zeros.shape[0])
            mask = tl.max_constancy(offsets < end, 1 if NARROW else _GRAIN)
            # All loads come first, so that they are under way at the same time.
            grad = _load(grad_ptr, offsets, mask, NARROW)
            if READS_PREV:
                prev_grad = _load(prev_grad_ptr, offsets, tl.where(mask, measuring, False), NARROW)
            if READS_M:
                m = _load(exp_avg_ptr, offsets, mask, NARROW)
            if READS_V:
                v = _load(exp_avg_sq_ptr, offsets, mask, NARROW)
            if UPDATE:
                p = _load(param_ptr, offsets, mask, NARROW)
            if AMSGRAD:
                v_max = _load(max_ptr, offsets, mask, NARROW)

            g = grad.to(tl.float32)
            if SCALED:
                g = tl.div_rn(g, zeros + grad_scale)
                if UPDATE:
                    _store(grad_ptr, offsets, mask, g, NARROW)
            signed = g * sign
            if READS_M:
                m = m.to(tl.float32)
            if READS_V:
                v = v.to(tl.float32)
            if MEASURE:
                magnitudes += tl.abs(g)
                if STATISTIC == "change":
                    # As it is stored for the next step: unscaling leaves more than 16 bits.
                    now = g.to(GRAD).to(tl.float32) if SCALED else g
                    numerators += tl.abs(now - prev_grad.to(tl.float32))
                elif STATISTIC == "momentum":
                    numerators += tl.abs(signed - m)
                elif STATISTIC == "signal":
                    numerators += m * m
                    denominators += v
                elif STATISTIC == "gain":
                    past_root = tl.sqrt_rn(v) * past_root_factor
                    # Beyond the end of a tensor this is 0 / 0 where eps is 0.
                    numerators += tl.where(mask, tl.div_rn(signed * m, past_root + eps), 0.0)
                elif STATISTIC == "norm":
                    numerators += tl.abs(g)
            if KEEP:
                _store(prev_grad_ptr, offsets, tl.where(mask, keeping, False), g, NARROW)

            if UPDATE:
                # As torch's lerp: the form that is exact at the nearer end.
                m = tl.where(
                    weight < 0.5, m + weight * (signed - m), signed - (signed - m) * (1.0 - weight)
                )
                v = v * beta2 + (one_minus_beta2 * signed) * signed
                _store(exp_avg_ptr, offsets, mask, m, NARROW)
                _store(exp_avg_sq_ptr, offsets, mask, v, NARROW)
                if AMSGRAD:
                    v = tl.maximum(v, v_max.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
                    _store(max_ptr, offsets, mask, v, NARROW)
                root = tl.div_rn(tl.sqrt_rn(v), zeros + root_correction)
                before = p.to(tl.float32)
                p = before * decay_factor - tl.div_rn(step_size * m, root + eps)
                _store(param_ptr, offsets, mask, p, NARROW)
                if MEASURE and STATISTIC == "weight_change":
                    change = tl.abs(p.to(PARAM).to(tl.float32) - before)
                    numerators += tl.where(mask, change, 0.0)
        if MEASURE:
            numerator += tl.sum(numerators)
            if STATISTIC == "signal":
                denominator += tl.sum(denominators)
            magnitude += tl.sum(magnitudes)

    if MEASURE:
        if measuring:
            tl.store(partial, numerator)
            tl.store(partial + 1, denominator)
            tl.store(partial + 2, magnitude)


@triton.jit
def decide_kernel(
    units_ptr,  # rows UNIT
    members_ptr,  # int32: the tensors of one unit after the other
    tensors_ptr,  # rows TENSOR
    past_ptr,  # rows PAST
    partials_ptr,
    sums_ptr,  # fp64, three per tensor: STORE and LOAD exchange them with other ranks
    values_ptr,  # fp64 per unit: the statistic, infinity where there is no evidence, minus infinity
    # where this rank has none of its tensors; then the thresholds that all ranks agree on
    decided_ptr,  # fp64 per unit: 1 where the unit is decided in this step, else 0
    FIELDS: tl.constexpr,
    SUM: tl.constexpr,  # add up the partials, and store the value
    COMPARE: tl.constexpr,  # compare the value with tau, and store the decision
    STORE: tl.constexpr,  # SUM stores the sums of every tensor
    LOAD: tl.constexpr,  # SUM finds them there, added up over the ranks
):
    """Decide; a program per unit.

    Ranks add up the sums of sharded tensors between two launches, and compare their values.
    """
    unit = tl.program_id(0).to(tl.int64)
    unit_row = units_ptr + unit * FIELDS.unit_row
    if SUM:
        evidence = tl.load(unit_row + FIELDS.is_measured) != 0.0
        first = tl.load(unit_row + FIELDS.first_member).to(tl.int32)
        last = first + tl.load(unit_row + FIELDS.n_members).to(tl.int32)
        last = tl.where(evidence, last, first)  # there are no partials to add up
        value = tl.full((), 0.0, tl.float64)
        divisor = tl.full((), 0.0, tl.float64)
        for member in range(first, last):
            tensor = tl.load(members_ptr + member).to(tl.int64)
            sums = sums_ptr + tensor * 3
            if LOAD:
                numerator = tl.load(sums)
                denominator = tl.load(sums + 1)
                magnitude = tl.load(sums + 2)
            else:
                numerators = tl.zeros((_TILE,), tl.float64)
                denominators = numerators
                magnitudes = numerators
                row = tensors_ptr + tensor * FIELDS.tensor_row
                partials = partials_ptr + tl.load(row + FIELDS.first_program) * _PARTIALS
                n_programs = tl.load(row + FIELDS.n_programs)
                for start in range(0, n_programs, _TILE):
                    program = start + tl.arange(0, _TILE)
                    own, mask = partials + program * _PARTIALS, program < n_programs
                    numerators += tl.load(own, mask=mask, other=0.0).to(tl.float64)
                    denominators += tl.load(own + 1, mask=mask, other=0.0).to(tl.float64)
                    magnitudes += tl.load(own + 2, mask=mask, other=0.0).to(tl.float64)
                past = past_ptr + tensor * FIELDS.past_row
                numerator = tl.sum(numerators) / tl.load(past + FIELDS.numerator_divisor)
                denominator = tl.sum(denominators) / tl.load(past + FIELDS.denominator_divisor)
                magnitude = tl.sum(magnitudes)
            if STORE:
                tl.store(sums, numerator)
                tl.store(sums + 1, denominator)
                tl.store(sums + 2, magnitude)
            evidence = evidence & (magnitude > 0) & (magnitude < float("inf"))
            value += numerator
            divisor += denominator
        if tl.load(unit_row + FIELDS.is_ratio) != 0.0:
            evidence = evidence & (divisor > 0)
            value = value / tl.where(divisor > 0, divisor, 1.0)
        evidence = evidence & (tl.abs(value) < float("inf"))  # False for NaN too
        evidence = evidence & ((value > 0) | (tl.load(unit_row + FIELDS.must_be_positive) == 0.0))
        tau = tl.load(unit_row + FIELDS.tau)
        value = tl.where(evidence, value, tl.load(unit_row + FIELDS.without_evidence))
        tl.store(values_ptr + unit, value)
    else:
        value = tl.load(values_ptr + unit)
        tau = tl.load(values_ptr + tl.num_programs(0) + unit)
    if COMPARE:
        # "gain" may be negative, and tau=0.0 freezes nothing.
        compared = tl.maximum(value / tl.load(unit_row + FIELDS.divisor), 0.0)
        enough = tl.load(unit_row + FIELDS.hits_missing) <= 1.0
        decided = (value < float("inf")) & (compared < tau) & enough
        tl.store(decided_ptr + unit, decided.to(tl.float64))
