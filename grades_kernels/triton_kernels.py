"""The fused implementation: one Triton launch a step for all tensors, decisions on the device.

The only module that imports Triton. Three parts: the kernels; `Plan`, which lays the tensors of
an optimizer out in device tables once and then costs one upload per step; and the door,
`_fused_triton_grades_adamw`.

How a decision is made without the host: every block of a monitored tensor adds its share of the
statistic to a buffer and takes a ticket of its unit; the block with the last ticket sums the shares
in a fixed order, compares with tau and writes the unit's row. Nothing that a block reads of a row
in the same launch can tell whether that has happened yet: a row written at step t acts from t + 1
on ("next_step"), or in a second launch ("same_step"). So a step's result never depends on the order
in which blocks run. In a job of several processes that block leaves the sum to an all-reduce, which
the devices of all ranks carry out, and a launch of its own compares the largest with tau.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from .freezing import NEVER, FreezeTable, Unit
from .functional import StepGroup, gradient_dtype, same_memory_order

# Tables are int64 words, so that one table holds addresses, counts and (as bits) numbers.

# A row per tensor, written once.
_PARAM = tl.constexpr(0)  # addresses
_EXP_AVG = tl.constexpr(1)
_EXP_AVG_SQ = tl.constexpr(2)
_MAX_EXP_AVG_SQ = tl.constexpr(3)
_PREV_GRAD = tl.constexpr(4)
_STEP = tl.constexpr(5)
_NUMEL = tl.constexpr(6)
_UNIT = tl.constexpr(7)  # -1: not monitored
_FIRST_BLOCK = tl.constexpr(8)
_N_BLOCKS = tl.constexpr(9)
_SPAN = tl.constexpr(10)  # elements per block of the launch
_GROUP = tl.constexpr(11)
_TENSOR_WORDS = tl.constexpr(12)

# A row per unit; row 0 speaks for all units together, and so for tensors that are not monitored.
_DECIDED_AT = tl.constexpr(0)  # row 0: the step at which the last unit was decided
_HITS = tl.constexpr(1)
_PREV_STEP = tl.constexpr(2)
_MEASURED_AT = tl.constexpr(3)
_STATISTIC = tl.constexpr(4)  # fp64
_TAU_AT = tl.constexpr(5)  # which word of the inputs holds tau
_DIVISOR = tl.constexpr(6)  # fp64: the number of elements with tau_per="element", or 1
_FIRST_TENSOR = tl.constexpr(7)
_N_TENSORS = tl.constexpr(8)
_N_UNIT_BLOCKS = tl.constexpr(9)
_NEVER_COMPLETE = tl.constexpr(1 << 62)  # blocks of a unit with a tensor that had no gradient yet
_UNIT_WORDS = tl.constexpr(12)
# Row 0 alone:
_CLOCK = tl.constexpr(1)  # steps that really happened; kept up where the device counts
_FORCED_AT = tl.constexpr(2)  # the step at which max_frozen decides all others
_N_DECIDED = tl.constexpr(3)
_N_UNITS = tl.constexpr(4)
_ENOUGH = tl.constexpr(5)  # decided units from which on max_frozen decides the others
_PATIENCE = tl.constexpr(6)
_COOLDOWN = tl.constexpr(7)
_LATE = tl.constexpr(8)  # 1 where the update of the decisive step is still applied
_GRACE = tl.constexpr(9)
_CHECK_EVERY = tl.constexpr(10)
_DIFFER = tl.constexpr(11)  # 1 once the ranks of a job were found to disagree

# The inputs of one step: a head, a row per tensor, then tau (fp64) of every unit.
_T = tl.constexpr(0)
_IS_CHECK = tl.constexpr(1)
_IS_KEEP = tl.constexpr(2)
_FOUND_INF = tl.constexpr(3)  # addresses of GradScaler's fp32 scalars, or 0
_GRAD_SCALE = tl.constexpr(4)
_CHECKSUM = tl.constexpr(6)  # fp64 and its negative: what all ranks of a job must have in common
_HEAD_WORDS = tl.constexpr(8)
_GRAD = tl.constexpr(0)  # address, 0: no gradient in this step
_COEFFICIENTS = tl.constexpr(1)  # ten fp32
_INPUT_WORDS = tl.constexpr(6)

_STEP_SIZE = tl.constexpr(0)  # lr / (1 - beta1^step)
_SQRT_BIAS_CORRECTION2 = tl.constexpr(1)
_DECAY = tl.constexpr(2)  # lr * weight_decay
_ONE_MINUS_BETA1 = tl.constexpr(3)
_BETA2 = tl.constexpr(4)
_ONE_MINUS_BETA2 = tl.constexpr(5)
_EPS = tl.constexpr(6)
_SIGN = tl.constexpr(7)  # -1 with maximize
_PAST_CORRECTION1 = tl.constexpr(8)  # 1 - beta1^k, k steps before this one: 0 without a moment
_PAST_ROOT_CORRECTION2 = tl.constexpr(9)  # sqrt(1 - beta2^k)

# Hyper-parameters of a parameter group in fp64, where the device computes the coefficients.
_LR = tl.constexpr(0)
_BETA1_64 = tl.constexpr(1)
_BETA2_64 = tl.constexpr(2)
_EPS_64 = tl.constexpr(3)
_WEIGHT_DECAY_64 = tl.constexpr(4)
_SIGN_64 = tl.constexpr(5)
_HYPER_WORDS = tl.constexpr(6)

# What a program leaves for the judge of its unit, fp32: its share of the statistic, of |g|, and of
# the denominator where the statistic is a ratio.
_PARTIAL_WORDS = tl.constexpr(3)

_JUDGE_TILE = tl.constexpr(512)


@triton.jit
def _f64(ptr):
    return ptr.to(tl.pointer_type(tl.float64))


@triton.jit
def _f32(ptr):
    return ptr.to(tl.pointer_type(tl.float32))


@triton.jit
def _found_inf(inputs_ptr):
    """Whether GradScaler found an infinity: then nothing may be written."""
    found = 0.0
    address = tl.load(inputs_ptr + _FOUND_INF)
    if address != 0:
        found = tl.load(_f32(address))
    return found != 0.0


@triton.jit
def _at(address, first, dtype: tl.constexpr, FULL: tl.constexpr):
    """A typed pointer to element `first`; the hint makes 16-byte accesses, after the cast only."""
    ptr = address.to(tl.pointer_type(dtype)) + first
    if FULL:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _load(address, first, n_left, dtype: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if FULL:
        x = tl.load(_at(address, first, dtype, FULL) + lanes)
    else:
        x = tl.load(_at(address, first, dtype, FULL) + lanes, mask=lanes < n_left, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(address, first, n_left, x, dtype: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if FULL:
        tl.store(_at(address, first, dtype, FULL) + lanes, x.to(dtype))
    else:
        tl.store(_at(address, first, dtype, FULL) + lanes, x.to(dtype), mask=lanes < n_left)


@triton.jit
def _do_block(
    tensor_row,
    grad_address,
    coefficients,
    grad_scale,
    factor,
    measuring,
    keeping,
    first,
    n_left,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    STATISTIC: tl.constexpr,
    MEASURE: tl.constexpr,
    UPDATE: tl.constexpr,
    KEEP: tl.constexpr,
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
    difference = tl.zeros_like(g)
    signed = g * tl.load(coefficients + _SIGN)

    if UPDATE:
        exp_avg_address = tl.load(tensor_row + _EXP_AVG)
        exp_avg_sq_address = tl.load(tensor_row + _EXP_AVG_SQ)
        param_address = tl.load(tensor_row + _PARAM)
        m = _load(exp_avg_address, first, n_left, MOMENT, FULL, BLOCK)
        v = _load(exp_avg_sq_address, first, n_left, MOMENT, FULL, BLOCK)
        p = _load(param_address, first, n_left, PARAM, FULL, BLOCK)
    else:
        if STATISTIC == "momentum" or STATISTIC == "signal":
            m = _load(tl.load(tensor_row + _EXP_AVG), first, n_left, MOMENT, FULL, BLOCK)
        if STATISTIC == "signal":
            v = _load(tl.load(tensor_row + _EXP_AVG_SQ), first, n_left, MOMENT, FULL, BLOCK)

    root_before = tl.zeros_like(g)
    if MEASURE:
        if STATISTIC == "change":
            if measuring:
                prev_address = tl.load(tensor_row + _PREV_GRAD)
                difference = g - _load(prev_address, first, n_left, GRAD, FULL, BLOCK)
        elif STATISTIC == "momentum":
            difference = signed - m
        elif STATISTIC == "signal":
            difference = m
            root_before = tl.sqrt_rn(v)
        elif STATISTIC == "norm":
            difference = g

    if KEEP and STATISTIC == "change":
        if keeping:
            _store(tl.load(tensor_row + _PREV_GRAD), first, n_left, g, GRAD, FULL, BLOCK)

    if UPDATE:
        weight = tl.load(coefficients + _ONE_MINUS_BETA1)
        # As torch's lerp: the form that is exact at the nearer end.
        m = tl.where(
            weight < 0.5, m + weight * (signed - m), signed - (signed - m) * (1.0 - weight)
        )
        beta2 = tl.load(coefficients + _BETA2)
        v = v * beta2 + (tl.load(coefficients + _ONE_MINUS_BETA2) * signed) * signed
        _store(exp_avg_address, first, n_left, m, MOMENT, FULL, BLOCK)
        _store(exp_avg_sq_address, first, n_left, v, MOMENT, FULL, BLOCK)
        if AMSGRAD:
            max_address = tl.load(tensor_row + _MAX_EXP_AVG_SQ)
            v_max = _load(max_address, first, n_left, MOMENT, FULL, BLOCK)
            v = tl.maximum(v, v_max, propagate_nan=tl.PropagateNan.ALL)
            _store(max_address, first, n_left, v, MOMENT, FULL, BLOCK)
        correction = tl.load(coefficients + _SQRT_BIAS_CORRECTION2)
        root = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + correction)
        step_size = tl.load(coefficients + _STEP_SIZE) * factor
        before = p
        p = p - p * (tl.load(coefficients + _DECAY) * factor)
        p = p - tl.div_rn(step_size * m, root + tl.load(coefficients + _EPS))
        _store(param_address, first, n_left, p, PARAM, FULL, BLOCK)
        if MEASURE and STATISTIC == "weight_change":
            difference = p.to(PARAM).to(tl.float32) - before

    difference = tl.abs(difference)
    magnitude = tl.abs(g)
    return difference, root_before, magnitude


@triton.jit
def _complete(unit_row, inputs_ptr):
    """Whether every tensor of the unit has a gradient in this step."""
    first = tl.load(unit_row + _FIRST_TENSOR)
    complete = tl.load(unit_row + _N_UNIT_BLOCKS) != _NEVER_COMPLETE
    for tensor in range(first, first + tl.load(unit_row + _N_TENSORS)):
        grad = tl.load(inputs_ptr + _HEAD_WORDS + tensor * _INPUT_WORDS + _GRAD)
        complete = complete & (grad != 0)
    return complete


@triton.jit
def _sum_shares(shares, n_blocks, TILE: tl.constexpr):
    """The fp64 sum of one word of every program of a tensor, in a fixed order."""
    total = tl.zeros((TILE,), tl.float64)
    for start in range(0, n_blocks, TILE):
        block = start + tl.arange(0, TILE)
        # Past the first-level cache: other multiprocessors wrote them in this launch.
        total += tl.load(
            shares + block * _PARTIAL_WORDS,
            mask=block < n_blocks,
            other=0.0,
            cache_modifier=".cg",
        ).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _statistic_of(
    unit_row,
    tensors_ptr,
    inputs_ptr,
    partials_ptr,
    t,
    STATISTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum a unit's shares in a fixed order; infinity where there is no evidence."""
    first = tl.load(unit_row + _FIRST_TENSOR)
    statistic = tl.full((), 0.0, tl.float64)
    denominator = tl.full((), 0.0, tl.float64)
    evidence = True
    for tensor in range(first, first + tl.load(unit_row + _N_TENSORS)):
        row = tensors_ptr + tensor * _TENSOR_WORDS
        first_block = tl.load(row + _FIRST_BLOCK)
        n_blocks = tl.load(row + _N_BLOCKS)
        shares = partials_ptr + first_block * _PARTIAL_WORDS
        difference = _sum_shares(shares, n_blocks, TILE)
        magnitude = _sum_shares(shares + 1, n_blocks, TILE)
        evidence = evidence & (magnitude > 0) & (magnitude < float("inf"))
        if STATISTIC == "momentum" or STATISTIC == "signal":
            past = _f32(inputs_ptr + _HEAD_WORDS + tensor * _INPUT_WORDS + _COEFFICIENTS)
            correction1 = tl.load(past + _PAST_CORRECTION1).to(tl.float64)
            evidence = evidence & (correction1 > 0)
            if STATISTIC == "signal":
                difference = difference / tl.where(correction1 > 0, correction1, 1.0)
                root_correction2 = tl.load(past + _PAST_ROOT_CORRECTION2).to(tl.float64)
                root = _sum_shares(shares + 2, n_blocks, TILE)
                denominator += root / tl.where(correction1 > 0, root_correction2, 1.0)
        statistic += difference
    if STATISTIC == "signal":
        evidence = evidence & (denominator > 0)
        statistic = statistic / tl.where(denominator > 0, denominator, 1.0)
    evidence = evidence & (statistic < float("inf"))  # False for NaN too
    if STATISTIC == "change":
        evidence = evidence & (tl.load(unit_row + _PREV_STEP) == t - 1)
    if STATISTIC == "weight_change":
        evidence = evidence & (statistic > 0)
    return tl.where(evidence, statistic, float("inf"))


@triton.jit
def _judge(units_ptr, unit_row, inputs_ptr, statistic, t, keeping):
    """Compare a unit's statistic with tau, write its row."""
    tau = tl.load(_f64(inputs_ptr) + tl.load(unit_row + _TAU_AT))
    hits = tl.load(unit_row + _HITS)
    # Every thread has loaded words of the row that one of them stores below.
    tl.debug_barrier()
    evidence = statistic < float("inf")
    statistic = statistic / tl.load(_f64(unit_row) + _DIVISOR)
    if evidence:
        hits = tl.where(statistic < tau, hits + 1, 0)
        tl.store(unit_row + _HITS, hits)
        tl.store(unit_row + _MEASURED_AT, t)
        tl.store(_f64(unit_row) + _STATISTIC, statistic)
    decides = evidence & (hits >= tl.load(units_ptr + _PATIENCE))
    if decides:
        tl.store(unit_row + _DECIDED_AT, t)
        n_decided = tl.atomic_add(units_ptr + _N_DECIDED, 1) + 1
        if n_decided == tl.load(units_ptr + _N_UNITS):
            tl.store(units_ptr + _DECIDED_AT, t)
        elif n_decided >= tl.load(units_ptr + _ENOUGH):
            tl.store(units_ptr + _FORCED_AT, t + 1)
    elif keeping:
        if _complete(unit_row, inputs_ptr):
            tl.store(unit_row + _PREV_STEP, t)


@triton.jit(do_not_specialize=["first_program"])
def _step_kernel(
    blocks_ptr,  # int32 pairs: the tensor of each program, and which part of it
    tensors_ptr,
    inputs_ptr,
    units_ptr,
    partials_ptr,  # fp32 triples per program
    tickets_ptr,  # int32 per unit
    agreed_ptr,  # fp64 per unit: where the ranks of a job compare statistics
    first_program,  # of this launch in blocks_ptr
    PARAM: tl.constexpr,  # dtypes
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    STATISTIC: tl.constexpr,  # one of `STATISTICS`
    MEASURE: tl.constexpr,  # accumulate the statistic
    UPDATE: tl.constexpr,  # AdamW
    KEEP: tl.constexpr,  # store the gradient for the next step's check
    AMSGRAD: tl.constexpr,
    SCALED: tl.constexpr,  # GradScaler's in-kernel protocol
    AGREE: tl.constexpr,  # leave statistics to be agreed on with other ranks, and judged then
    BLOCK: tl.constexpr,
):
    """Statistic, decision and AdamW of all tensors of one dtype combination.

    Reads g, and where it updates p, exp_avg, exp_avg_sq; writes the latter three. A tensor of a
    frozen unit costs a few scalar loads and writes nothing.
    """
    place = blocks_ptr + (first_program + tl.program_id(0)) * 2
    tensor = tl.load(place).to(tl.int64)
    index = tl.load(place + 1)
    tensor_row = tensors_ptr + tensor * _TENSOR_WORDS
    input_row = inputs_ptr + _HEAD_WORDS + tensor * _INPUT_WORDS
    t = tl.load(inputs_ptr + _T)
    if SCALED:
        if _found_inf(inputs_ptr):
            return
    if UPDATE:
        if (first_program == 0) & (tl.program_id(0) == 0):
            tl.store(units_ptr + _CLOCK, t)
    unit = tl.load(tensor_row + _UNIT)
    unit_row = units_ptr + (unit + 1) * _UNIT_WORDS
    monitored = unit >= 0

    decided_at = tl.load(unit_row + _DECIDED_AT)
    forced_at = tl.load(units_ptr + _FORCED_AT)
    forced = (decided_at < 0) & (forced_at >= 0) & (forced_at <= t)
    decided_at = tl.where(forced, forced_at, decided_at)
    decided = decided_at >= 0
    cooldown = tl.load(units_ptr + _COOLDOWN)
    late = tl.where(forced, 0, tl.load(units_ptr + _LATE))
    frozen = monitored & decided & (t >= decided_at + cooldown + late)
    measuring = MEASURE and (monitored & (decided_at < 0) & (tl.load(inputs_ptr + _IS_CHECK) != 0))
    keeping = KEEP and (monitored & (decided_at < 0) & (tl.load(inputs_ptr + _IS_KEEP) != 0))
    if frozen:
        return
    if not UPDATE:
        if not measuring:
            return

    factor = 1.0
    if decided & (cooldown > 0):
        ramp = 1.0 - (t - decided_at).to(tl.float64) / cooldown.to(tl.float64)
        factor = tl.maximum(ramp, 0.0).to(tl.float32)

    grad_address = tl.load(input_row + _GRAD)
    coefficients = _f32(input_row + _COEFFICIENTS)
    grad_scale = 1.0
    if SCALED:
        scale_address = tl.load(inputs_ptr + _GRAD_SCALE)
        if scale_address != 0:
            grad_scale = tl.load(_f32(scale_address))
    n_elements = tl.load(tensor_row + _NUMEL)
    n_elements = tl.where(grad_address != 0, n_elements, 0)
    span = tl.load(tensor_row + _SPAN)
    start = index * span
    stop = tl.minimum(start + span, n_elements)

    addresses = grad_address
    if UPDATE:
        addresses |= tl.load(tensor_row + _PARAM)
        addresses |= tl.load(tensor_row + _EXP_AVG) | tl.load(tensor_row + _EXP_AVG_SQ)
        if AMSGRAD:
            addresses |= tl.load(tensor_row + _MAX_EXP_AVG_SQ)
    else:
        if STATISTIC == "momentum" or STATISTIC == "signal":
            addresses |= tl.load(tensor_row + _EXP_AVG)
        if STATISTIC == "signal":
            addresses |= tl.load(tensor_row + _EXP_AVG_SQ)
    if STATISTIC == "change":
        if MEASURE or KEEP:
            addresses |= tl.load(tensor_row + _PREV_GRAD)
    aligned = (addresses & 15) == 0

    differences = tl.zeros((BLOCK,), tl.float32)
    roots = tl.zeros((BLOCK,), tl.float32)
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        n_left = tl.minimum(n_elements - first, BLOCK).to(tl.int32)
        if aligned & (first + BLOCK <= n_elements):
            difference, root, magnitude = _do_block(
                tensor_row, grad_address, coefficients, grad_scale, factor, measuring, keeping,
                first, n_left, PARAM, GRAD, MOMENT, STATISTIC, MEASURE, UPDATE, KEEP,
                AMSGRAD, SCALED, BLOCK, FULL=True,
            )  # fmt: skip
        else:
            difference, root, magnitude = _do_block(
                tensor_row, grad_address, coefficients, grad_scale, factor, measuring, keeping,
                first, n_left, PARAM, GRAD, MOMENT, STATISTIC, MEASURE, UPDATE, KEEP,
                AMSGRAD, SCALED, BLOCK, FULL=False,
            )  # fmt: skip
        if MEASURE:
            differences += difference
            roots += root
            magnitudes += magnitude

    if UPDATE:
        if (index == 0) & (grad_address != 0):
            step_ptr = _f32(tl.load(tensor_row + _STEP))
            tl.store(step_ptr, tl.load(step_ptr) + 1.0)

    if KEEP and STATISTIC == "change":
        # Where this launch measures too, the judge writes prev_step, after it has read it.
        if keeping & (not measuring) & (index == 0) & (tl.load(unit_row + _FIRST_TENSOR) == tensor):
            if _complete(unit_row, inputs_ptr):
                tl.store(unit_row + _PREV_STEP, t)

    if MEASURE:
        if measuring:
            block = tl.load(tensor_row + _FIRST_BLOCK) + index
            share = partials_ptr + block * _PARTIAL_WORDS
            tl.store(share, tl.sum(differences))
            tl.store(share + 1, tl.sum(magnitudes))
            if STATISTIC == "signal":
                tl.store(share + 2, tl.sum(roots))
            tl.debug_barrier()
            ticket = tl.atomic_add(tickets_ptr + unit, 1, sem="acq_rel")
            if ticket == tl.load(unit_row + _N_UNIT_BLOCKS) - 1:
                tl.store(tickets_ptr + unit, 0)
                statistic = _statistic_of(
                    unit_row, tensors_ptr, inputs_ptr, partials_ptr, t, STATISTIC, TILE=_JUDGE_TILE
                )
                if AGREE:
                    tl.store(agreed_ptr + unit, statistic)
                    tl.debug_barrier()  # every thread has read prev_step
                    if keeping:
                        if _complete(unit_row, inputs_ptr):
                            tl.store(unit_row + _PREV_STEP, t)
                else:
                    _judge(units_ptr, unit_row, inputs_ptr, statistic, t, keeping)


@triton.jit
def _judge_kernel(agreed_ptr, inputs_ptr, units_ptr):
    """Judge by the statistics that all ranks have agreed on; a program per unit.

    Behind them stand the largest checksum of all ranks and the negative of the smallest.
    """
    checksum_ptr = agreed_ptr + tl.num_programs(0)
    if tl.load(checksum_ptr) + tl.load(checksum_ptr + 1) != 0:
        tl.store(units_ptr + _DIFFER, 1)
        return
    unit = tl.program_id(0).to(tl.int64)
    statistic = tl.load(agreed_ptr + unit)
    unit_row = units_ptr + (unit + 1) * _UNIT_WORDS
    _judge(units_ptr, unit_row, inputs_ptr, statistic, tl.load(inputs_ptr + _T), False)


@triton.jit(do_not_specialize=["n_tensors"])
def _begin_kernel(inputs_ptr, units_ptr, tensors_ptr, hyper_ptr, n_tensors, TILE: tl.constexpr):
    """Count a step and compute its inputs, where the host cannot: in a captured CUDA graph.

    One program. Reads the clock, every tensor's step and its group's hyper-parameters (fp64);
    writes the clock, the head of the inputs and the coefficients of every tensor.
    """
    if _found_inf(inputs_ptr):
        return
    t = tl.load(units_ptr + _CLOCK) + 1
    since = t - tl.load(units_ptr + _GRACE) - 1
    every = tl.load(units_ptr + _CHECK_EVERY)
    is_check = (since >= 0) & (since % every == 0)
    is_keep = (since + 1 >= 0) & ((since + 1) % every == 0)
    tl.store(units_ptr + _CLOCK, t)
    tl.store(inputs_ptr + _T, t)
    tl.store(inputs_ptr + _IS_CHECK, is_check.to(tl.int64))
    tl.store(inputs_ptr + _IS_KEEP, is_keep.to(tl.int64))
    for start in range(0, n_tensors, TILE):
        tensor = (start + tl.arange(0, TILE)).to(tl.int64)
        mask = tensor < n_tensors
        row = tensors_ptr + tensor * _TENSOR_WORDS
        hyper = _f64(hyper_ptr + tl.load(row + _GROUP, mask=mask, other=0) * _HYPER_WORDS)
        lr = tl.load(hyper + _LR, mask=mask, other=0.0)
        beta1 = tl.load(hyper + _BETA1_64, mask=mask, other=0.0)
        beta2 = tl.load(hyper + _BETA2_64, mask=mask, other=0.0)
        step_address = tl.load(row + _STEP, mask=mask, other=0)
        past = tl.load(_f32(step_address), mask=mask, other=0.0).to(tl.float64)
        steps = past + 1.0
        bias_correction1 = 1.0 - tl.exp(steps * tl.log(beta1))
        bias_correction2 = 1.0 - tl.exp(steps * tl.log(beta2))
        # 0 * log(0) is not a number.
        past1 = tl.where(past > 0, 1.0 - tl.exp(past * tl.log(beta1)), 0.0)
        past2 = tl.where(past > 0, 1.0 - tl.exp(past * tl.log(beta2)), 0.0)
        decay = lr * tl.load(hyper + _WEIGHT_DECAY_64, mask=mask, other=0.0)
        eps = tl.load(hyper + _EPS_64, mask=mask, other=0.0)
        sign = tl.load(hyper + _SIGN_64, mask=mask, other=1.0)
        out = _f32(inputs_ptr + _HEAD_WORDS + tensor * _INPUT_WORDS + _COEFFICIENTS)
        tl.store(out + _STEP_SIZE, (lr / bias_correction1).to(tl.float32), mask=mask)
        root = tl.sqrt(bias_correction2).to(tl.float32)
        tl.store(out + _SQRT_BIAS_CORRECTION2, root, mask=mask)
        tl.store(out + _DECAY, decay.to(tl.float32), mask=mask)
        tl.store(out + _ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32), mask=mask)
        tl.store(out + _BETA2, beta2.to(tl.float32), mask=mask)
        tl.store(out + _ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32), mask=mask)
        tl.store(out + _EPS, eps.to(tl.float32), mask=mask)
        tl.store(out + _SIGN, sign.to(tl.float32), mask=mask)
        tl.store(out + _PAST_CORRECTION1, past1.to(tl.float32), mask=mask)
        tl.store(out + _PAST_ROOT_CORRECTION2, tl.sqrt(past2).to(tl.float32), mask=mask)


THREADS = 128  # per program
# Left alone, ptxas spills a register here and there to fit one more program on a multiprocessor;
# with a ceiling it does not try. No variant needs more.
MAX_REGISTERS = 168
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_MIN_SPAN = 2048
_MAX_PROGRAMS_PER_TENSOR = 4096  # what the judge of a unit has to sum


class Hyper(NamedTuple):
    """Hyper-parameters of a parameter group in one step."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    maximize: bool


class _Launch(NamedTuple):
    """The tensors that one launch serves: one combination of dtypes and flags."""

    param: torch.dtype
    grad: torch.dtype
    moment: torch.dtype
    amsgrad: bool
    criterion: str


class _Staging:
    """A pinned buffer for one step's inputs, and when the device has read it."""

    def __init__(self, n_tensors: int, n_units: int, n_groups: int, cuda: bool) -> None:
        end_of_rows = _HEAD_WORDS.value + n_tensors * _INPUT_WORDS.value
        end_of_taus = end_of_rows + n_units
        n_words = end_of_taus + n_groups * _HYPER_WORDS.value
        # Said because torch.set_default_device may say otherwise.
        self.words = torch.zeros(n_words, dtype=torch.int64, device="cpu", pin_memory=cuda)
        array = self.words.numpy()
        self.head = array[: _HEAD_WORDS.value]
        self.checksum = self.head[_CHECKSUM.value :].view(np.float64)
        rows = array[_HEAD_WORDS.value : end_of_rows].reshape(n_tensors, _INPUT_WORDS.value)
        self.grads = rows[:, _GRAD.value]
        self.coefficients = rows[:, _COEFFICIENTS.value :].view(np.float32)
        numbers = array.view(np.float64)
        self.taus = numbers[end_of_rows:end_of_taus]
        self.hyper = numbers[end_of_taus:].reshape(n_groups, _HYPER_WORDS.value)
        self.read = torch.cuda.Event() if cuda else None


class Plan:
    """The tensors of an optimizer, laid out for the kernels: a part per device.

    Built when tensors, state or units change; `step` then costs one pass over the gradients and, on
    each device, one asynchronous copy and one launch (two for a check before the update) per dtype
    combination.

    A device decides about its own units alone. What concerns the units of all devices, `max_frozen`
    and the ramp of tensors that are not monitored, depends on decisions of earlier steps: a device
    counts those of its own, and where there are several, the host, which knows all decisions when
    the next step begins, tells each of the others'.

    Args:
        groups: Per parameter group, its tensors that have state; gradients may be None.
        table: The freeze table; the devices' rows start from it.
    """

    def __init__(self, groups: Sequence[StepGroup], table: FreezeTable) -> None:
        self.table = table
        places: dict[Any, list[tuple[int, int]]] = {}
        for k, group in enumerate(groups):
            for i, p in enumerate(group.params):
                places.setdefault(_device_of(p), []).append((k, i))
        n, share = len(table.units), table.rule.max_frozen
        self.enough = next((k for k in range(1, n + 1) if k / n >= share), 0)
        self.n_decided = sum(unit.decided_at != NEVER for unit in table.units)
        self.all_decided_at = table.all_decided_at
        # The step at which max_frozen decides all others, once known.
        self.forced_at = table.t + 1 if n and self.enough <= self.n_decided < n else NEVER
        self.alone = len(places) == 1
        self.parts = [_Part(self, groups, chosen) for chosen in places.values()]
        self.places = [place for part in self.parts for place in part.places]
        self.flat_params = [p for part in self.parts for p in part.flat_params]
        self.kept: list[Any] = []  # what replays of a captured graph touch
        self.unsettled = True
        self.undecided = self.n_decided < n
        self.stepped = False  # since the last sync
        self.counts_alone = False  # whether the device knows better than the host what t is
        self.recorded_at = table.t
        self.told = self.forced_at, self.all_decided_at  # what each of several devices knows
        self.checksum = _checksum(table)

    @property
    def captured(self) -> list[tuple[_Staging, Tensor]]:
        """What replays of a graph read; a graph lies on one device."""
        return self.parts[0].captured

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether parameters, steps and gradients are still as the plan was laid out for."""
        return all(part.fits(chosen) for part, chosen in self._by_part(grads))

    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Sequence[Hyper],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Launch one step; returns before the device has done it.

        Args:
            grads: In the order of `flat_params`; None where there is none.
            hypers: Per parameter group.
            grad_scale: What gradients were multiplied with, as GradScaler hands it over.
            found_inf: Not zero: nothing may be written.

        Raises:
            RuntimeError: If a step over several devices is captured in a CUDA graph.
        """
        if not self.alone and _capturing():
            raise RuntimeError(
                "a step over several devices cannot be captured in one CUDA graph: the host takes "
                "part in it. Give each device an optimizer of its own."
            )
        counting = [
            part.step(chosen, hypers, grad_scale, found_inf)
            for part, chosen in self._by_part(grads)
        ]
        self.counts_alone = any(counting)
        if not self.counts_alone:
            self.table.t += 1
        self.stepped = True

    def _by_part(
        self, grads: Sequence[Tensor | None]
    ) -> Iterator[tuple[_Part, list[Tensor | None]]]:
        first = 0
        for part in self.parts:
            yield part, list(grads[first : first + len(part.places)])
            first += len(part.places)

    def retune(self) -> None:
        """Take over the thresholds of the units; also for replays of a captured graph to come."""
        for part in self.parts:
            part.retune()
        self.checksum = _checksum(self.table)

    # What the host learns

    def absorb(self) -> None:
        """Take over what the step before decided: the fixed lag of one step.

        Waits for that step's copy of the table, which was queued before the forward and backward
        pass that the device works on now.
        """
        if any(part.pending is not None for part in self.parts):
            self._read([part.wait() for part in self.parts])
        self._settle()

    def sync(self) -> None:
        """Bring the whole table up to date; waits for the device."""
        if not (self.stepped or self.captured):
            return
        self.stepped = False
        all_words = [part.units.cpu().numpy() for part in self.parts]
        self._read(all_words)
        for part, words in zip(self.parts, all_words, strict=True):
            numbers = words.view(np.float64)
            for n, unit in enumerate(part.own_units, start=1):
                unit.hits = int(words[n, _HITS.value])
                unit.prev_step = int(words[n, _PREV_STEP.value])
                unit.statistic = float(numbers[n, _STATISTIC.value])
        self._settle()

    def peek(self) -> None:
        """Take over what replays of a captured graph have copied out so far; never waits."""
        mirror = self.parts[0].mirror.numpy()
        words = mirror.copy()
        if np.array_equal(words, mirror):  # else a copy is landing just now
            self._read([words])
            self._settle()

    def _read(self, all_words: list[np.ndarray]) -> None:
        """Take over tables of all parts, copied out after the same step."""
        table = self.table
        if any(words[0, _DIFFER.value] == 1 for words in all_words):
            raise RuntimeError(
                "the ranks of the job differ in a threshold, a decision or the number of steps "
                "taken. Every rank must do the same to its optimizer, and load the same "
                "checkpoint; if the ranks train different models, set optimizer.process_group."
            )
        if self.counts_alone:
            # The copy of a part without programs may be an older one.
            happened = max(int(words[0, _CLOCK.value]) for words in all_words) - table.t
            table.t += happened
            for part in self.parts:
                if part.pending is not None:
                    part.steps += part.pending * happened
        if self.alone:
            self.forced_at = int(all_words[0][0, _FORCED_AT.value])
        measured: dict[Unit, float] = {}
        for part, words in zip(self.parts, all_words, strict=True):
            part.pending = None
            numbers = words.view(np.float64)
            for n in 1 + np.flatnonzero(words[1:, _MEASURED_AT.value] == table.t):
                measured[part.own_units[n - 1]] = float(numbers[n, _STATISTIC.value])
            known = np.array([unit.decided_at for unit in part.own_units], dtype=np.int64)
            for n in 1 + np.flatnonzero(known != words[1:, _DECIDED_AT.value]):
                unit = part.own_units[n - 1]
                if unit.decided_at == NEVER:  # else by max_frozen, which the row does not say
                    unit.statistic = float(numbers[n, _STATISTIC.value])
                    unit.hits = int(words[n, _HITS.value])
                    unit.decide(int(words[n, _DECIDED_AT.value]), unit.statistic)
                    self.unsettled = True
        if measured and table.t > self.recorded_at:
            self.recorded_at = table.t
            table.record(tuple(measured.get(unit, math.nan) for unit in table.units))

    def _settle(self) -> None:
        """What follows from known decisions as steps go by: max_frozen, the end of cooldowns."""
        table = self.table
        if NEVER < self.forced_at <= table.t:
            for unit in table.units:
                if unit.decided_at == NEVER:
                    unit.decide(self.forced_at, math.nan)
            self.forced_at, self.unsettled = NEVER, True
        if self.unsettled:
            table.settle()
            decided = [unit for unit in table.units if unit.decided_at != NEVER]
            self.n_decided, self.all_decided_at = len(decided), table.all_decided_at
            self.undecided = len(decided) < len(table.units)
            self.unsettled = any(unit.frozen_at == NEVER for unit in decided)
            self.checksum = _checksum(table)
            if not self.alone:
                self._tell_the_devices()
            for part in self.parts:
                part.drop_frozen()

    def _tell_the_devices(self) -> None:
        if self.forced_at == NEVER and self.undecided and self.n_decided >= self.enough:
            self.forced_at = self.table.t + 1
        # Once decided, others stay so: the devices need not hear that there are none left to force.
        news = max(self.forced_at, self.told[0]), self.all_decided_at
        if news != self.told:
            self.told = news
            for part in self.parts:
                part.units[0, _FORCED_AT.value].fill_(news[0])
                part.units[0, _DECIDED_AT.value].fill_(news[1])


class _Part:
    """The tensors of a plan that lie on one device, and the tables that its kernels read.

    Args:
        plan: What the part belongs to.
        groups: As `Plan` takes them.
        places: Group and position of each of the part's tensors.
    """

    def __init__(
        self, plan: Plan, groups: Sequence[StepGroup], places: list[tuple[int, int]]
    ) -> None:
        self.plan, self.table = plan, plan.table
        self.capturable = any(group.capturable for group in groups)
        self.n_groups = len(groups)
        here = {groups[k].units[i] for k, i in places}
        self.own_units = [unit for unit in self.table.units if plan.alone or unit in here]
        number = {unit: n for n, unit in enumerate(self.own_units)}
        tensors = [(groups[k].units[i], k, i) for k, i in places]
        # A unit's tensors stand next to each other, behind them those that are not monitored.
        tensors.sort(key=lambda x: number[x[0]] if x[0] is not None else len(number))
        self.places = [(k, i) for _, k, i in tensors]
        self.flat_params = [groups[k].params[i] for k, i in self.places]
        self.device = self.flat_params[0].device
        self.cuda = self.device.type == "cuda"
        self.group_of = np.array([k for k, _ in self.places])
        self.addresses = [p.data_ptr() for p in self.flat_params]
        self.shapes = [p.shape for p in self.flat_params]
        self.grad_dtypes = [
            gradient_dtype(groups[k].grads[i], p)
            for (k, i), p in zip(self.places, self.flat_params, strict=True)
        ]
        self.options = launch_options("cpu")
        if self.cuda:
            warp_size = torch.cuda.get_device_properties(self.device).warp_size
            self.options = launch_options("hip" if torch.version.hip else "cuda", warp_size)
        self.strided = [n for n, p in enumerate(self.flat_params) if not p.is_contiguous()]
        self._lay_out(groups, [unit for unit, _, _ in tensors], number)
        self.state_steps = [groups[k].state_steps[i] for k, i in self.places]
        # The host counts along; a step that somebody else writes to shows in its version.
        self.steps = torch.stack(self.state_steps).cpu().numpy().astype(np.int64)
        self.step_versions = [step._version for step in self.state_steps]
        self.ring = [self._staging() for _ in range(4)]
        # Nothing can be allocated while a graph is captured.
        self.for_capture = [self._staging()] if self.capturable else []
        self.inputs = torch.zeros_like(self.ring[0].words, device=self.device)
        self.hyper = self.inputs[-len(groups) * _HYPER_WORDS.value :]
        self.agreed = torch.zeros(len(self.own_units) + 2, dtype=torch.float64, device=self.device)
        self.turn = 0
        self.captured: list[tuple[_Staging, Tensor]] = []
        self.retune()
        self.pending: np.ndarray | None = None  # the tensors that the step under way updates

    def _staging(self) -> _Staging:
        return _Staging(len(self.places), len(self.own_units), self.n_groups, self.cuda)

    def _lay_out(
        self, groups: Sequence[StepGroup], unit_of: list[Unit | None], number: dict[Unit, int]
    ) -> None:
        rows = np.zeros((len(self.places), _TENSOR_WORDS.value), dtype=np.int64)
        launches: dict[_Launch, list[int]] = {}
        first_program = 0
        for n, ((k, i), unit) in enumerate(zip(self.places, unit_of, strict=True)):
            group, row, p = groups[k], rows[n], groups[k].params[i]
            step = group.state_steps[i]
            if step.device != p.device or step.dtype != torch.float32:
                raise ValueError(
                    f"state_steps[{i}] is {step.dtype} on {step.device}: the Triton kernels count "
                    f"in float32 on the parameter's device, {p.device}."
                )
            for x in (group.exp_avgs[i], group.exp_avg_sqs[i], *group.max_exp_avg_sqs[i : i + 1]):
                if x.device != p.device:
                    raise ValueError(
                        f"a moment of parameter {i} is on {x.device}, the parameter on {p.device}: "
                        "move the optimizer's state where the model has been moved."
                    )
                if not same_memory_order(x, p):
                    raise ValueError(
                        f"a moment of parameter {i} has strides {x.stride()}, the parameter "
                        f"{p.stride()}: the Triton kernels walk through memory."
                    )
            row[_PARAM.value] = p.data_ptr()
            row[_EXP_AVG.value] = group.exp_avgs[i].data_ptr()
            row[_EXP_AVG_SQ.value] = group.exp_avg_sqs[i].data_ptr()
            if group.amsgrad:
                row[_MAX_EXP_AVG_SQ.value] = group.max_exp_avg_sqs[i].data_ptr()
            prev_grad = group.prev_grads[i]
            if prev_grad is not None and prev_grad.shape == p.shape:
                if prev_grad.dtype != self.grad_dtypes[n] or not same_memory_order(prev_grad, p):
                    raise ValueError(
                        f"prev_grads[{i}] is {prev_grad.dtype} with strides {prev_grad.stride()}: "
                        f"the Triton kernels read it as {self.grad_dtypes[n]} with the "
                        f"parameter's, {p.stride()}."
                    )
                row[_PREV_GRAD.value] = prev_grad.data_ptr()
            row[_STEP.value] = step.data_ptr()
            row[_NUMEL.value] = p.numel()
            row[_UNIT.value] = -1 if unit is None else number[unit]
            span = max(_MIN_SPAN, -(-p.numel() // _MAX_PROGRAMS_PER_TENSOR))
            # Whole blocks, so that none reaches into the next program's span: of these dtypes,
            # 2-byte tensors have the largest.
            span = -(-span // block_size(2)) * block_size(2)
            programs = max(1, -(-p.numel() // span))
            row[_FIRST_BLOCK.value], row[_N_BLOCKS.value] = first_program, programs
            row[_SPAN.value], row[_GROUP.value] = span, k
            first_program += programs
            launch = _Launch(
                p.dtype,
                self.grad_dtypes[n],
                group.exp_avgs[i].dtype,
                group.amsgrad,
                unit.criterion if unit is not None else "",
            )
            launches.setdefault(launch, []).append(n)
        self.rows = rows
        self.tensors = self._upload(rows)
        self.partials = torch.zeros(first_program * _PARTIAL_WORDS.value, device=self.device)
        self.tickets = torch.zeros(max(1, len(number)), dtype=torch.int32, device=self.device)
        self._lay_out_units(rows, unit_of, number)

        # What is not monitored rides along with a launch of its dtypes.
        for launch in [x for x in launches if not x.criterion]:
            partner = next((x for x in launches if x.criterion and x[:4] == launch[:4]), None)
            if partner is not None:
                launches[partner] += launches.pop(launch)
        self.launches = launches
        self.dropped = np.array([u is not None and u.frozen_at != NEVER for u in unit_of])
        self._lay_out_blocks()

    def _lay_out_units(
        self, rows: np.ndarray, unit_of: list[Unit | None], number: dict[Unit, int]
    ) -> None:
        plan, table, rule = self.plan, self.table, self.table.rule
        words = np.full((1 + len(number), _UNIT_WORDS.value), NEVER, dtype=np.int64)
        numbers = words.view(np.float64)
        head = words[0]
        head[_DECIDED_AT.value] = plan.all_decided_at
        head[_CLOCK.value] = table.t
        head[_FORCED_AT.value] = plan.forced_at
        head[_N_DECIDED.value] = plan.n_decided
        head[_N_UNITS.value], head[_ENOUGH.value] = len(table.units), plan.enough
        head[_PATIENCE.value], head[_COOLDOWN.value] = rule.patience, rule.cooldown
        head[_LATE.value] = rule.freeze_timing == "next_step" and rule.cooldown == 0
        head[_GRACE.value] = rule.grace_steps if rule.grace_steps is not None else 1 << 62
        head[_CHECK_EVERY.value] = rule.check_every
        members_of: dict[Unit, list[int]] = {unit: [] for unit in number}
        for m, unit in enumerate(unit_of):
            if unit is not None:
                members_of[unit].append(m)
        for unit, members in members_of.items():
            n = number[unit]
            row = words[1 + n]
            row[_DECIDED_AT.value] = unit.decided_at
            row[_HITS.value], row[_PREV_STEP.value] = unit.hits, unit.prev_step
            numbers[1 + n, _STATISTIC.value] = unit.statistic
            row[_TAU_AT.value] = _HEAD_WORDS.value + len(rows) * _INPUT_WORDS.value + n
            numbers[1 + n, _DIVISOR.value] = rule.divisor(unit)
            row[_FIRST_TENSOR.value] = members[0] if members else 0
            # A unit with a tensor that never had a gradient has no evidence: no ticket is the last.
            complete = len(members) == unit.n_tensors
            row[_N_TENSORS.value] = len(members)
            row[_N_UNIT_BLOCKS.value] = (
                sum(rows[m, _N_BLOCKS.value] for m in members)
                if complete
                else _NEVER_COMPLETE.value
            )
        self.units = self._upload(words)
        self.mirror = torch.from_numpy(words.copy())
        if self.cuda:
            self.mirror = self.mirror.pin_memory()
        self.mirrored = torch.cuda.Event() if self.cuda else None

    def _lay_out_blocks(self) -> None:
        """The programs of every launch: first those that may measure; no dropped tensors."""
        parts: list[np.ndarray] = []
        self.programs: dict[_Launch, tuple[int, int, int]] = {}
        first = 0
        for launch, members in self.launches.items():
            chosen = np.array([n for n in members if not self.dropped[n]], dtype=np.int64)
            if len(chosen) == 0:
                continue
            counts = self.rows[chosen, _N_BLOCKS.value]
            tensor = np.repeat(chosen, counts)
            index = np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)
            parts.append(np.stack([tensor, index], axis=1))
            monitored = int(counts[self.rows[chosen, _UNIT.value] >= 0].sum())
            self.programs[launch] = (first, monitored, len(tensor))
            first += len(tensor)
        blocks = np.concatenate(parts) if parts else np.zeros((0, 2))
        self.blocks = self._upload(blocks.astype(np.int32))

    def _upload(self, array: np.ndarray) -> Tensor:
        """A copy on the device that does not hold the host up."""
        if not self.cuda:
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def fits(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether parameters, steps and gradients are still as the plan was laid out for."""
        return (
            [p.data_ptr() for p in self.flat_params] == self.addresses
            and [step._version for step in self.state_steps] == self.step_versions
            and all(
                g is None or (g.shape == shape and g.dtype == dtype and g.layout == torch.strided)
                for g, shape, dtype in zip(grads, self.shapes, self.grad_dtypes, strict=True)
            )
        )

    def step(
        self,
        grads: list[Tensor | None],
        hypers: Sequence[Hyper],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """As `Plan.step`; returns whether the device alone knows if the step has happened."""
        rule, t = self.table.rule, self.table.t + 1
        grad_scale, found_inf = self._scalar(grad_scale), self._scalar(found_inf)
        capturing = self.cuda and _capturing()
        scaled = grad_scale is not None or found_inf is not None
        counts = self.capturable or any(_is_on_device(x) for h in hypers for x in h[:3])
        # Without programs there is none that could tell whether a scaled step has happened.
        on_device = counts or (scaled and not self.programs)
        # Also when all is decided: another rank may have taken a decision back.
        agree = self.table.ranks is not None and (counts or rule.checks(t))
        if not (self.programs or on_device):  # all is frozen
            self.units[0, _CLOCK.value].fill_(t)
            if not agree:
                return False
        restrided = self._restride(grads)
        staging = self._next_staging(capturing)
        staging.grads[:] = [0 if g is None else g.data_ptr() or 16 for g in grads]
        has_grad = staging.grads != 0
        staging.taus[:] = self.taus
        staging.head[:5] = (
            t,
            rule.checks(t),
            rule.checks(t + 1),
            0 if found_inf is None else found_inf.data_ptr(),
            0 if grad_scale is None else grad_scale.data_ptr(),
        )
        checksum = self.plan.checksum + self.table.t
        staging.checksum[:] = checksum, -checksum
        if on_device:
            for row, h in zip(staging.hyper, hypers, strict=True):
                numbers = [0.0 if _is_on_device(x) else float(x) for x in h[:5]]
                row[:] = (*numbers, -1.0 if h.maximize else 1.0)
        else:
            self._compute_coefficients(staging.coefficients, hypers)

        elsewhere = self.cuda and torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if elsewhere else contextlib.nullcontext():
            self.inputs.copy_(staging.words, non_blocking=True)
            if staging.read is not None and not capturing:
                staging.read.record()
            if on_device:
                self._begin(hypers)
            check = counts or (self.plan.undecided and rule.checks(t))
            keep = counts or (self.plan.undecided and rule.checks(t + 1))
            late = rule.freeze_timing == "next_step"
            if agree:
                self.agreed.fill_(math.inf)
                checksums = self.inputs[_CHECKSUM.value : _HEAD_WORDS.value]
                self.agreed[-2:].copy_(checksums.view(torch.float64))
            if check and not late:
                self._launch(measure=True, update=False, keep=False, scaled=scaled)
            if agree and not late:
                self._agree()
            self._launch(measure=check and late, update=True, keep=keep, scaled=scaled)
            if agree and late:
                self._agree()
            if check or agree or scaled:
                self.mirror.copy_(self.units, non_blocking=True)
                if not capturing:
                    self.pending = has_grad
                    if self.mirrored is not None:
                        self.mirrored.record()
        for g, copy in restrided if scaled else ():
            g.copy_(copy)
        if not (on_device or scaled):
            self.steps += has_grad
        return on_device or scaled

    def retune(self) -> None:
        self.taus = np.array([unit.tau for unit in self.own_units])
        for staging, _ in self.captured:
            staging.taus[:] = self.taus

    def _scalar(self, value: Tensor | float | None) -> Tensor | None:
        """GradScaler's scalars as this device's; it hands over the number 0 for "nothing found"."""
        if not isinstance(value, Tensor):
            return None
        return value.to(self.device, torch.float32, non_blocking=True)

    def _restride(self, grads: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Replace gradients that do not lie in memory like their parameter by copies that do."""
        odd: Sequence[int] = self.strided
        if not all([g is None or g.is_contiguous() for g in grads]):
            odd = range(len(grads))
        copies = []
        for n in odd:
            g, p = grads[n], self.flat_params[n]
            if g is not None and not same_memory_order(g, p):
                grads[n] = copy = torch.empty_like(p, dtype=g.dtype).copy_(g)
                copies.append((g, copy))
        return copies

    def _next_staging(self, capturing: bool) -> _Staging:
        if capturing:
            # A replay reads this buffer again, so it belongs to the graph.
            staging = self.for_capture.pop() if self.for_capture else self._staging()
            self.captured.append((staging, self.blocks))
            return staging
        if self.capturable and not self.for_capture:
            self.for_capture.append(self._staging())
        self.turn = (self.turn + 1) % len(self.ring)
        staging = self.ring[self.turn]
        if staging.read is not None:
            staging.read.synchronize()  # four steps back
        return staging

    def _compute_coefficients(self, out: np.ndarray, hypers: Sequence[Hyper]) -> None:
        """In fp64: a Python float reaches a kernel as fp32, and 1 - 0.999 would be 1e-5 off."""
        columns = np.array(
            [[float(h.lr), float(h.beta1), float(h.beta2), h.eps, h.weight_decay] for h in hypers]
        )[self.group_of]
        lr, beta1, beta2, eps, weight_decay = columns.T
        steps = self.steps + 1
        out[:, _STEP_SIZE.value] = lr / (1 - beta1**steps)
        out[:, _SQRT_BIAS_CORRECTION2.value] = np.sqrt(1 - beta2**steps)
        out[:, _DECAY.value] = lr * weight_decay
        out[:, _ONE_MINUS_BETA1.value] = 1 - beta1
        out[:, _BETA2.value] = beta2
        out[:, _ONE_MINUS_BETA2.value] = 1 - beta2
        out[:, _EPS.value] = eps
        out[:, _SIGN.value] = np.array([-1.0 if h.maximize else 1.0 for h in hypers])[self.group_of]
        out[:, _PAST_CORRECTION1.value] = 1 - beta1**self.steps
        out[:, _PAST_ROOT_CORRECTION2.value] = np.sqrt(1 - beta2**self.steps)

    def _begin(self, hypers: Sequence[Hyper]) -> None:
        """Let the device count the step and compute its coefficients."""
        words = self.hyper.view(torch.float64).view(len(hypers), -1)
        for row, h in zip(words, hypers, strict=True):
            for word, value in zip(row, h[:3], strict=False):
                if isinstance(value, Tensor) and _is_on_device(value):
                    word.copy_(value.squeeze(), non_blocking=True)
        _begin_kernel[(1,)](
            self.inputs,
            self.units,
            self.tensors,
            self.hyper,
            len(self.places),
            TILE=128,
            enable_fp_fusion=False,
        )

    def _agree(self) -> None:
        """Compare the largest statistic over all ranks; the device waits for them, not the host."""
        ranks = self.table.ranks
        assert ranks is not None
        dist.all_reduce(self.agreed, op=dist.ReduceOp.MAX, group=ranks.group)
        n_units = len(self.own_units)
        _judge_kernel[(n_units,)](self.agreed, self.inputs, self.units, enable_fp_fusion=False)

    def _launch(self, *, measure: bool, update: bool, keep: bool, scaled: bool) -> None:
        for launch, (first, n_monitored, n_programs) in self.programs.items():
            n = n_programs if update else n_monitored
            if n == 0:
                continue
            measures = measure and n_monitored > 0
            keeps = keep and n_monitored > 0 and launch.criterion == "change"
            narrow = min(launch.param.itemsize, launch.grad.itemsize, launch.moment.itemsize)
            _step_kernel[(n,)](
                self.blocks,
                self.tensors,
                self.inputs,
                self.units,
                self.partials,
                self.tickets,
                self.agreed,
                first,
                PARAM=_DTYPES[launch.param],
                GRAD=_DTYPES[launch.grad],
                MOMENT=_DTYPES[launch.moment],
                STATISTIC=launch.criterion if measures or keeps else "norm",
                MEASURE=measures,
                UPDATE=update,
                KEEP=keeps,
                AMSGRAD=launch.amsgrad,
                SCALED=scaled,
                AGREE=measures and self.table.ranks is not None,
                BLOCK=block_size(narrow),
                **self.options,
            )

    def wait(self) -> np.ndarray:
        """The table as the last copy holds it, once that has arrived."""
        if self.pending is not None and self.mirrored is not None:
            self.mirrored.synchronize()
        return self.mirror.numpy()

    def drop_frozen(self) -> None:
        """Take frozen units out of the launches, where their programs only return.

        In waves of an eighth of what is left: laying the programs out takes the host tens of
        milliseconds for billions of parameters, a program that only returns takes the device less
        than a microsecond.
        """
        frozen = [n for n, unit in enumerate(self.own_units) if unit.frozen_at != NEVER]
        dropped = np.isin(self.rows[:, _UNIT.value], frozen)
        waiting = self.rows[dropped & ~self.dropped, _N_BLOCKS.value].sum()
        left = self.rows[~self.dropped, _N_BLOCKS.value].sum()
        if waiting and (waiting * 8 >= left or len(frozen) == len(self.own_units)):
            self.dropped = dropped
            self._lay_out_blocks()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _device_of(p: Tensor) -> Any:
    return p.device


def _is_on_device(x: float | Tensor) -> bool:
    return isinstance(x, Tensor) and x.device.type != "cpu"


def _checksum(table: FreezeTable) -> int:
    """48 bits that depend on what the host knows of a freeze table, alike on all ranks."""
    if table.ranks is None:
        return 0
    known = [(unit.name, unit.tau, unit.decided_at) for unit in table.units]
    return int.from_bytes(hashlib.blake2b(repr(known).encode(), digest_size=6).digest(), "big")


def take_part(table: FreezeTable, device: torch.device) -> None:
    """Answer the other ranks at a check for which this one has no tensors yet."""
    if table.ranks is not None and table.rule.checks(table.t + 1):
        checksum = _checksum(table) + table.t
        numbers = [*[math.inf] * len(table.units), checksum, -checksum]
        answer = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=table.ranks.group)


def launch_options(backend: str, warp_size: int = 32) -> dict[str, Any]:
    """Compile options of `_step_kernel`.

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


def _fused_triton_grades_adamw(
    groups: list[StepGroup],
    table: FreezeTable,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step from scratch: lays out a plan, takes the step and waits for its decisions.

    The optimizer class keeps its plan from step to step instead.
    """
    plan = Plan(groups, table)
    grads: list[Tensor | None] = [groups[k].grads[i] for k, i in plan.places]
    hypers = [Hyper(g.lr, g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize) for g in groups]
    plan.step(grads, hypers, grad_scale, found_inf)
    plan.sync()
