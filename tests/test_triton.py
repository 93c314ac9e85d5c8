"""The Triton kernels against the reference implementation.

Contract: whatever the options, shapes, dtypes and layouts, the same units freeze at the same steps,
statistics agree, frozen tensors keep every bit, and the others take the same update within a bound
that follows from the arithmetic. On a CUDA machine these tests run the compiled kernels (and carry
the mark `gpu`); elsewhere Triton's interpreter runs them on the CPU (see conftest.py).
"""

import copy
import gc
import importlib.util
import io
import math
import pickle
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import ranks
import test_oracle
import torch
from torch import nn

import grades_kernels
from grades_kernels import GradESAdamW, functional, gathering, grades_adamw, triton_kernels
from grades_kernels.freezing import STATISTICS, FreezeRule, FreezeTable, Unit
from grades_kernels.native import why_not_loaded

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []

TIMINGS = ("same_step", "next_step")
PAIRS = [
    (statistic, timing)
    for statistic in STATISTICS
    for timing in TIMINGS
    if (statistic, timing) != ("weight_change", "same_step")
]
SHAPES = ((17, 23), (3, 5), (7,))  # two units that freeze at different steps, and a bias
HYPER = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
# Statistics fall by a third a step: the small matrix freezes first, the large one steps later.
FREEZING = {"tau": 50.0, "grace_steps": 2}
# What is no sum over gradients has a scale of its own, for which the same holds.
TAUS = {"signal": 0.7, "weight_change": 3.3}
EPS = torch.finfo(torch.float32).eps


def gradient(t, i, p, dtype=None):
    """The gradient of tensor `i` at step `t`: noise that dies away, with weight on both ends."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + i))
    if p.numel() > 1:  # so that a block or an element left out shows in every sum
        g.view(-1)[0], g.view(-1)[-1] = 5.0 + i, -7.0 - t
    g = (g * 0.65**t).to(DEVICE, dtype or getattr(p, "grad_dtype", None) or p.dtype)
    return torch.empty_like(p, dtype=g.dtype).copy_(g)  # lies in memory like its parameter


class Run:
    """An optimizer with its parameters, and its own count of steps."""

    def __init__(self, fused, shapes=SHAPES, dtype=torch.float32, groups=None, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
            for shape in shapes
        ]
        self.finish(fused, groups, options)

    def finish(self, fused, groups=None, options=None):
        self.start = [p.detach().clone() for p in self.params]
        groups = groups(self.params) if groups else self.params
        self.opt = GradESAdamW(groups, fused=fused, **{**HYPER, **FREEZING, **(options or {})})
        self.t = 0

    def step(self, grads=None, closure=None):
        self.t += 1
        for i, p in enumerate(self.params):
            p.grad = gradient(self.t, i, p) if grads is None else grads[i]
        self.opt.step(closure)
        return self

    def steps(self, n):
        for _ in range(n):
            self.step()
        return self

    @property
    def events(self):
        return [(e.step, e.unit, e.decided_at, e.n_elements) for e in self.opt.freeze_events]


def part_of(run):
    """All that the kernels of a run on one device know."""
    (part,) = run.opt._plan.parts
    return part


def pair(*args, **kwargs):
    return Run(True, *args, **kwargs), Run(False, *args, **kwargs)


def close(got, want, room, what):
    got, want = got.detach().double(), want.detach().double()
    room = torch.as_tensor(room, dtype=torch.float64, device=got.device)
    wrong = ~((got - want).abs() <= room) & (got != want) & ~(got.isnan() & want.isnan())
    if wrong.any():
        room = room.expand_as(want)[wrong][:4]
        raise AssertionError(f"{what}: {got[wrong][:4]} instead of {want[wrong][:4]}, room {room}")


def assert_same_decisions(got, want, rel=1e-5):
    assert got.opt.backend == "triton" and want.opt.backend == "reference"
    assert got.events == want.events
    assert got.opt.all_frozen == want.opt.all_frozen
    assert got.opt.report().step == want.opt.report().step
    for ours, theirs in zip(got.opt.freeze_events, want.opt.freeze_events, strict=True):
        assert ours.tau == theirs.tau
        assert ours.statistic == pytest.approx(theirs.statistic, rel=rel, nan_ok=True)
    assert got.opt.statistics() == pytest.approx(want.opt.statistics(), rel=rel, nan_ok=True)
    mine, theirs = (dict(run.opt.report().history) for run in (got, want))
    # Checkpoints carry no history: compared from where both have one.
    since = max(min(mine, default=math.inf), min(theirs, default=math.inf))
    assert [t for t in mine if t >= since] == [t for t in theirs if t >= since]
    for t in mine.keys() & theirs.keys():
        assert mine[t] == pytest.approx(theirs[t], rel=rel, nan_ok=True), f"statistics of step {t}"


def assert_same(got, want):
    """Same decisions, bits of prev_grad and counters; fp32 values within a few ulp per step.

    A parameter is rounded twice a step, and an update of at most a few lr carries the rounding of
    about ten operations; moments carry that of two, relative to the largest value that they see.
    """
    assert_same_decisions(got, want)
    ours, theirs = got.opt.state_dict()["state"], want.opt.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    n = want.t
    for i, (p, q) in enumerate(zip(got.params, want.params, strict=True)):
        lr = float(want.opt.param_groups[0]["lr"])
        close(p, q, n * EPS * (2 * q.detach().double().abs() + 32 * lr), f"parameter {i}")
        assert p.requires_grad == q.requires_grad
        if i not in theirs:
            continue
        assert ours[i].keys() == theirs[i].keys()
        for key, value in theirs[i].items():
            mine = ours[i][key]
            if key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                room = 8 * EPS * max(1e-30, 4 * float(value.nan_to_num(0, 0, 0).abs().sum()))
                close(mine, value, room, f"{key} of {i}")
                assert mine.dtype == value.dtype and mine.stride() == value.stride()
            elif isinstance(value, torch.Tensor):  # step, prev_grad
                assert torch.equal(mine.cpu(), value.cpu()), f"{key} of {i}"
            elif key != "grades_prev_step" or theirs[i]["grades_decided_at"] < 0:
                assert mine == pytest.approx(value, rel=1e-5, nan_ok=True), f"{key} of {i}"


def bits(run):
    """A copy of all that a step may change, for comparisons bit by bit."""
    state = run.opt.state_dict()["state"]
    return copy.deepcopy(([p.detach() for p in run.params], state, run.events))


def assert_bits(got, want, where=""):
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, where
        same = (got == want) | (got.isnan() & want.isnan())
        assert bool(same.all()), f"{where}: {got[~same][:4]} instead of {want[~same][:4]}"
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key in want:
            assert_bits(got[key], want[key], f"{where}[{key!r}]")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), where
        for n, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_bits(a, b, f"{where}[{n}]")
    else:
        assert got == want or (got != got and want != want), f"{where}: {got} != {want}"


# Every variant --------------------------------------------------------------------------------


def run_variant(n=8, watch=False, **options):
    ours, theirs = pair(**options)
    for _ in range(n):
        ours.step()
        theirs.step()
        if watch:  # reading brings the host up to date; without it the mirror's lag is in play
            assert_same(ours, theirs)
    assert_same(ours, theirs)
    return ours


@pytest.mark.parametrize(
    ("amsgrad", "maximize"),
    [(False, False), (True, False), (False, True)],
    ids=["plain", "amsgrad", "maximize"],
)
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_variants(statistic, timing, amsgrad, maximize):
    """Each compile-time variant equals the reference, across freezes that really happen."""
    run = run_variant(
        statistic=statistic,
        tau=TAUS.get(statistic, 50.0),
        freeze_timing=timing,
        amsgrad=amsgrad,
        maximize=maximize,
        weight_decay=0.0 if amsgrad == maximize else 0.1,
    )
    steps = [step for step, *_ in run.events]
    assert len(steps) == 2 and steps[0] < steps[1], "both units freeze, one after the other"


NEXT_STEP = {"freeze_timing": "next_step"}
WEIGHT_CHANGE = {"statistic": "weight_change", "tau": 3.3, **NEXT_STEP}
OPTIONS = {
    "observe only": {"tau": 0.0},
    "nothing monitored": {"tau": None},
    "per element": {"tau_per": "element", "tau": 0.3},
    "every third step": {"check_every": 3, "grace_steps": 1},
    "patience": {"patience": 3},
    "patience, every second step": {"patience": 2, "check_every": 2},
    "cooldown": {"cooldown": 3},
    "cooldown, decided late": {"cooldown": 2, "freeze_timing": "next_step"},
    "max_frozen": {"max_frozen": 0.5},
    "max_frozen, decided late": {"max_frozen": 0.5, "freeze_timing": "next_step"},
    "max_frozen with cooldown": {"max_frozen": 0.5, "cooldown": 2},
    "no grace": {"grace_steps": 0},
    "beta1 zero": {"betas": (0.0, 0.9)},
    "beta1 below a half": {"betas": (0.3, 0.9999)},
    "eps large, lr small": {"eps": 1e-2, "lr": 1e-5},
    "lr zero": {"lr": 0.0},
    "gradients not stopped": {"stop_grad": False},
    "infinite tau": {"tau": math.inf},
    "momentum, no grace": {"statistic": "momentum", "grace_steps": 0},
    "signal, no grace": {"statistic": "signal", "grace_steps": 0, "tau": 0.7},
    "signal, per element": {"statistic": "signal", "tau_per": "element", "tau": 0.7},
    "signal, auto": {"statistic": "signal", "tau": "auto", "betas": (0.6, 0.97), "cooldown": 1},
    "signal, beta1 zero": {"statistic": "signal", "tau": 0.7, "betas": (0.0, 0.9)},
    "weight change, per element": {**WEIGHT_CHANGE, "tau": 0.009, "tau_per": "element"},
    "weight change, lr zero": {**WEIGHT_CHANGE, "lr": 0.0},
    "weight change, cooldown": {**WEIGHT_CHANGE, "cooldown": 2, "patience": 2},
}


@pytest.mark.parametrize("watch", [True, False], ids=["read after each step", "read at the end"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, watch):
    """Every rule that the device evaluates, with and without readings in between."""
    run_variant(watch=watch, n=7, **OPTIONS[name])


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    "shape",
    [(0, 3), (1, 1), (2, 1), (1, 1000), (17, 23), (3, 5, 7), (2, 1, 3, 4)]
    + [(1, n + k) for n in (512, 2048) for k in (-1, 0, 1)]
    + [(2, 2049)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_shapes(shape, timing):
    """Around blocks (512 elements of fp32) and spans (2048) nothing is left out or done twice."""
    options = {"shapes": (shape, (3, 5)), "freeze_timing": timing, "tau": 1e-3, "grace_steps": 1}
    ours, theirs = pair(**options)
    assert triton_kernels.block_size(4) == 512
    for _ in range(3):
        assert_same(ours.step(), theirs.step())


def test_the_oracles_problems():
    """The numpy oracle's random problems: all options mixed, gradients missing, zero and broken."""
    with torch.device(DEVICE):
        for seed in range(1016, 1016 + N_ORACLE_PROBLEMS):  # the first eight have all statistics
            test_oracle.check(seed, backend="triton", dtype=torch.float32)


N_ORACLE_PROBLEMS = 200 if CUDA else 8


# Storage dtypes -------------------------------------------------------------------------------

LOW = (torch.bfloat16, torch.float16)


def low_precision_runs(dtype, grad_dtype, n=4, **options):
    """The kernels and the reference in `dtype`, and the reference in fp32 on the same numbers."""
    options = {"shapes": ((17, 23), (1, 1025)), "tau": 0.0, "grace_steps": 1, **options}
    runs = Run(True, dtype=dtype, **options), Run(False, dtype=dtype, **options)
    exact = Run(False, **options)
    for p, q in zip(exact.params, runs[0].params, strict=True):
        p.data.copy_(q)
    for run in runs:
        for p in run.params if grad_dtype != dtype else ():
            p.grad_dtype = grad_dtype
    for t in range(1, n + 1):
        grads = [gradient(t, i, p, grad_dtype) for i, p in enumerate(exact.params)]
        for run in runs:
            run.step([g.clone() for g in grads])
        exact.step([g.float() for g in grads])
    return *runs, exact


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "signal"])
@pytest.mark.parametrize("wide_grads", [False, True], ids=["", "fp32-grads"])
@pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))
def test_low_precision(dtype, wide_grads, statistic):
    """Three-way bound: no further from an fp32 run than twice what torch in the same dtype is.

    The kernels compute in fp32 and round when they store, so they should be closer. Triton's
    interpreter truncates to bf16 instead of rounding, which costs up to one ulp of every store.
    """
    grad_dtype = torch.float32 if wide_grads else dtype
    ours, theirs, exact = low_precision_runs(dtype, grad_dtype, statistic=statistic, eps=1e-4)
    room = 0 if CUDA else exact.t * torch.finfo(dtype).eps
    assert_same_decisions(ours, theirs, rel=1e-5 if statistic in ("change", "norm") else 2e-2)
    for i, (p, q, x) in enumerate(zip(ours.params, theirs.params, exact.params, strict=True)):
        assert p.dtype == dtype
        states = [run.opt.state[y] for run, y in ((ours, p), (theirs, q), (exact, x))]
        for key in ("exp_avg", "exp_avg_sq"):
            assert states[0][key].dtype == dtype
        if statistic == "change":
            assert states[0]["prev_grad"].dtype == grad_dtype
            assert torch.equal(states[0]["prev_grad"], states[1]["prev_grad"])
        triples = {"parameter": [y.detach().float() for y in (p, q, x)]}
        triples |= {key: [s[key].float() for s in states] for key in ("exp_avg", "exp_avg_sq")}
        for what, (mine, torchs, true) in triples.items():
            bound = 2 * (torchs - true).abs().max() + room * true.abs().max()
            assert (mine - true).abs().max() <= bound, f"{what} {i}"
        moved = (x.detach() - exact.start[i]).abs().max().item()
        assert moved > 10 * torch.finfo(dtype).eps, "the updates are large enough to be judged"


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_weight_change_is_what_was_stored(dtype):
    """The weights as they are rounded into memory: a move too small to be stored is none."""
    run = Run(True, dtype=dtype, **{**WEIGHT_CHANGE, "tau": 0.0, "lr": 3e-3}, eps=1e-4).steps(2)
    for _ in range(3):
        before = [p.detach().double() for p in run.params]
        run.step()
        moved = [
            (p.detach().double() - q).abs().sum().item()
            for p, q in zip(run.params[:2], before, strict=False)
        ]
        assert list(run.opt.statistics().values()) == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("n", [1023, 1024, 1025, 4097])
def test_low_precision_blocks(n, dtype):
    """2-byte tensors have blocks of 1024: the last elements are updated and measured too."""
    assert triton_kernels.block_size(2) == 1024
    options = {"shapes": ((1, n),), "tau": 0.0, "grace_steps": 1, "eps": 1e-3}
    runs = pair(dtype=dtype, **options)
    for run in runs:
        run.steps(2)
    assert_same_decisions(*runs)
    (p,), (q,) = runs[0].params, runs[1].params
    assert (p - q).abs().max() <= 4 * torch.finfo(dtype).eps * q.abs().max()
    assert (p != runs[0].start[0]).float().mean() > 0.9


# Owned buffers, through the functional form ---------------------------------------------------

SENTINEL = 12345.0


class Framed:
    """One tensor of every kind in the middle of a filled buffer, at an odd offset.

    Args:
        offset: Elements before the tensor; with 1, 3 or 5 it is not aligned to 16 bytes.
    """

    def __init__(self, n, offset, dtype=torch.float32, moment_dtype=None, poison=False):
        self.buffers, self.inner, self.n, self.offset = {}, {}, n, offset
        generator = torch.Generator().manual_seed(n)
        for key in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "prev_grad"):
            kind = (moment_dtype or dtype) if "avg" in key else dtype
            self.buffers[key] = torch.full((n + 4096,), SENTINEL, device=DEVICE, dtype=kind)
            self.inner[key] = self.buffers[key][offset : offset + n].view(1, n)
            self.inner[key].copy_(torch.rand(1, n, generator=generator))
        if poison:
            self.inner["prev_grad"].fill_(math.nan)
        self.step = torch.ones((), device=DEVICE)
        self.before = {key: x.clone() for key, x in self.inner.items()}

    def run(self, table, unit, fused=True, **options):
        inner = self.inner
        options = {
            **{"beta1": 0.8, "beta2": 0.97, "lr": 0.03, "weight_decay": 0.1, "eps": 1e-6},
            **{"amsgrad": False, "maximize": False},
            **options,
        }
        grades_adamw(
            [inner["param"]],
            [inner["grad"]],
            [inner["exp_avg"]],
            [inner["exp_avg_sq"]],
            [inner["max_exp_avg_sq"]] if options["amsgrad"] else [],
            [self.step],
            fused=fused,
            prev_grads=[inner["prev_grad"]],
            units=[unit],
            table=table,
            **options,
        )

    def assert_surroundings_untouched(self):
        for key, buffer in self.buffers.items():
            assert (buffer[: self.offset] == SENTINEL).all(), f"written before {key}"
            assert (buffer[self.offset + self.n :] == SENTINEL).all(), f"written after {key}"

    def changed(self):
        return {key for key, x in self.inner.items() if not torch.equal(x, self.before[key])}


def table_at(t, statistic="change", tau=0.0, numel=1, **rule):
    """A table of one unit whose next step is `t`, with evidence from the step before."""
    unit = Unit("w", statistic, tau, numel, prev_step=t - 1)
    return FreezeTable(FreezeRule(grace_steps=2, **rule), [unit], t=t - 1), unit


MOMENTS = {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("offset", [0, 1, 3, 5, 16])
@pytest.mark.parametrize("n", [1, 513, 2050])
def test_nothing_around_a_tensor_is_written(n, offset, timing, amsgrad):
    """Views at any offset, aligned or not: each is updated as a tensor of its own would be."""
    twins = Framed(n, offset), Framed(n, offset)
    if offset % 4:
        assert all(x.data_ptr() % 16 for x in twins[0].inner.values())
    for fused, framed in zip((True, False), twins, strict=True):
        table, unit = table_at(4, numel=n, freeze_timing=timing)
        framed.run(table, unit, fused, amsgrad=amsgrad)
        framed.assert_surroundings_untouched()
        expected = {"param", "prev_grad", *MOMENTS} | ({"max_exp_avg_sq"} if amsgrad else set())
        assert framed.changed() <= expected
        assert framed.changed() >= expected - {"max_exp_avg_sq"}
        assert table.t == unit.prev_step == 4
    ours, theirs = (framed.inner for framed in twins)
    assert torch.equal(ours["prev_grad"], ours["grad"])
    for key in ours:
        close(ours[key], theirs[key], 8 * EPS, key)


@pytest.mark.parametrize("n", [1, 513, 2050])
def test_a_kept_gradient_is_written_whole(n):
    """prev_grad is poisoned with NaN: the step before a check overwrites every element of it."""
    framed = Framed(n, 3, poison=True)
    table, unit = table_at(2, numel=n)
    framed.run(table, unit)
    assert torch.equal(framed.inner["prev_grad"], framed.inner["grad"])
    framed.assert_surroundings_untouched()


def test_other_steps_do_not_touch_the_kept_gradient():
    """Neither before the step before a check, nor between checks."""
    for t, rule in ((1, {}), (3, {"check_every": 5})):
        framed = Framed(600, 3, poison=True)
        table, unit = table_at(t, numel=600, **rule)
        unit.prev_step = -1
        framed.run(table, unit)
        assert framed.inner["prev_grad"].isnan().all()
        assert math.isnan(unit.statistic), "a check without evidence is void"


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "signal"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_fp32_moments_of_bf16_parameters(timing, statistic):
    """Moments wider than the parameter: as exact as the fp32 reference, the parameter rounded."""
    n = 1100
    ours = Framed(n, 8, torch.bfloat16, torch.float32)
    table, unit = table_at(4, statistic, numel=n, freeze_timing=timing)
    exact = Framed(n, 8)
    for key, x in exact.inner.items():
        x.copy_(ours.inner[key])
    other_table, other_unit = table_at(4, statistic, numel=n, freeze_timing=timing)
    ours.run(table, unit)
    exact.run(other_table, other_unit, fused=False)
    ours.assert_surroundings_untouched()
    assert unit.statistic == pytest.approx(other_unit.statistic, rel=1e-5)
    for key in MOMENTS:
        assert ours.inner[key].dtype == torch.float32
        close(ours.inner[key], exact.inner[key], 8 * EPS, key)
    got, want = ours.inner["param"].float(), exact.inner["param"]
    ulp = torch.finfo(torch.bfloat16).eps * want.abs()
    assert ((got - want).abs() <= (0.501 if CUDA else 1.001) * ulp).all()


# Frozen means untouched -----------------------------------------------------------------------

ARRIVING = {"usual": 0.5, "huge": 1e30, "nan": math.nan, "inf": math.inf, "zero": 0.0}


@pytest.mark.parametrize("where", ["in the table", "dropped"])
@pytest.mark.parametrize("arriving", ARRIVING)
def test_frozen_tensors_keep_every_bit(arriving, where, monkeypatch):
    """Parameter, moments and step count, whatever gradient arrives; others move on.

    A frozen tensor's programs return at once while they are launched, in a captured graph for
    good; otherwise the host drops them from the launches as soon as it knows.
    """
    if where == "in the table":
        monkeypatch.setattr(triton_kernels._Part, "drop_frozen", lambda self: None)
    run = Run(True, stop_grad=False, amsgrad=True).steps(3)
    assert run.opt.frozen_units == ["group0.param1"]
    before = bits(run)
    for _ in range(2):
        arrived = torch.full_like(run.start[1], ARRIVING[arriving])
        run.step([run.start[0] + run.t, arrived, run.start[2]])
    after = bits(run)
    assert_bits(after[0][1], before[0][1])
    entry = {k: v for k, v in after[1][1].items() if k != "grades_t"}
    assert_bits(entry, {k: v for k, v in before[1][1].items() if k != "grades_t"})
    for moving in (0, 2):
        assert not torch.equal(after[0][moving], before[0][moving])
        assert after[1][moving]["step"] == before[1][moving]["step"] + 2
    assert run.events == [(3, "group0.param1", 3, 15)]
    programs = sum(n for _, _, n in part_of(run).programs.values())
    assert programs == (2 if where == "dropped" else 3)


@pytest.mark.parametrize("timing", TIMINGS)
def test_frozen_cooling_and_active_together(timing):
    """Matrices of five sizes in all phases at once, the bias following the last of them."""
    shapes = ((2, 2), (3, 5), (6, 7), (12, 12), (30, 30), (4,))
    ours, theirs = pair(shapes=shapes, cooldown=2, freeze_timing=timing, tau=15.0)
    phases = set()
    for _ in range(14):
        assert_same(ours.step(), theirs.step())
        state = [s["grades_decided_at"] for s in theirs.opt.state.values()][:-1]
        frozen = len(theirs.opt.frozen_units)
        phases.add((frozen > 0, sum(s >= 0 for s in state) > frozen, min(state) < 0))
    assert (True, True, True) in phases and theirs.opt.all_frozen


@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_tau_just_above_and_just_below(statistic, timing):
    """Strictly below: tau = statistic leaves a unit alone, the next larger number freezes it."""
    shapes, check = ((3, 5), (17, 23), (4, 4)), 3

    def run(taus):
        def groups(params):
            return [{"params": [p], "tau": tau} for p, tau in zip(params, taus, strict=True)]

        options = {"statistic": statistic, "freeze_timing": timing}
        return Run(True, shapes=shapes, groups=groups, **options).steps(check)

    measured = list(run([0.0] * 3).opt.statistics().values())
    assert all(value > 0 for value in measured)
    assert run(measured).events == []
    for k in range(3):
        taus = list(measured)
        taus[k] = math.nextafter(measured[k], math.inf)
        assert [(step, unit) for step, unit, *_ in run(taus).events] == [(3, f"group{k}.param0")]


@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_two_runs_have_the_same_bits(statistic, timing):
    """Freezing is for good, so even the statistic must not depend on the order of blocks."""
    shapes = ((2048, 1111), (1000, 999), (7,)) if CUDA else ((3, 1500), (3, 5), (7,))
    runs = [
        Run(True, shapes, statistic=statistic, freeze_timing=timing, tau=0.0).steps(5)
        for _ in range(2)
    ]
    assert_bits(bits(runs[0]), bits(runs[1]))
    assert_bits(runs[0].opt.statistics(), runs[1].opt.statistics())


# What changes during a run --------------------------------------------------------------------


def usual(run):
    return [gradient(run.t + 1, i, p) for i, p in enumerate(run.params)]


def without(*missing, at):
    """A step in which some tensors have no gradient."""

    def act(run):
        if run.t + 1 in at:
            return [None if i in missing else g for i, g in enumerate(usual(run))]

    return act


def filled(value, *chosen, at):
    def act(run):
        if run.t + 1 in at:
            return [
                torch.full_like(g, value) if i in chosen else g for i, g in enumerate(usual(run))
            ]

    return act


def once(at, action):
    """`action(run)` before step `at`."""

    def act(run):
        if run.t + 1 == at:
            action(run)

    return act


def set_group(**values):
    return lambda run: run.opt.param_groups[0].update(values)


def add_group(run):
    run.params.append(nn.Parameter(torch.full((4, 6), 0.5, device=DEVICE)))
    run.opt.add_param_group({"params": [run.params[-1]], "lr": 0.01, "statistic": "norm"})


def replace_data(run):
    for p in run.params:
        p.data = p.detach().clone()


def replace_state(run):
    for state in run.opt.state.values():
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)})


def replace_prev_grads(run):
    for state in run.opt.state.values():
        # Kept alive: a plan that goes on must differ, not write into freed memory.
        run.kept = state.get("prev_grad"), getattr(run, "kept", None)
        if "prev_grad" in state:
            state["prev_grad"] = state["prev_grad"] * 2


def move_state(key):
    """As `x.data = x.data.to(device)` does: the same tensors, at other addresses."""

    def act(run):
        for state in run.opt.state.values():
            if key in state:
                run.kept = state[key].data, getattr(run, "kept", None)
                state[key].data = state[key].data * 2

    return act


def clear_state(run):
    run.opt.state.clear()


def scale_state(run):
    """In place, as an optimizer surgery would."""
    for state in run.opt.state.values():
        state["exp_avg"].mul_(0.5)
        state["step"].add_(3)


def load_other_moments(run):
    state_dict = copy.deepcopy(run.opt.state_dict())
    for entry in state_dict["state"].values():
        entry["exp_avg"].mul_(0.5)
    run.opt.load_state_dict(state_dict)


def every_step(action):
    def act(run):
        action(run)

    return act


def scheduled(run):
    if run.t == 0:
        run.scheduler = torch.optim.lr_scheduler.OneCycleLR(run.opt, max_lr=0.1, total_steps=20)
    else:
        run.scheduler.step()


def in_place_lr(run):
    run.opt.param_groups[0]["lr"].mul_(0.9)


def lower_tau(run):
    run.opt.param_groups[0]["tau"] = 80.0 * 0.9**run.t


def swap_gradients(run):
    """Gradients in a buffer of the user's, at the same address every step."""
    grads = usual(run)
    run.buffer = getattr(run, "buffer", [torch.empty_like(g) for g in grads])
    for kept, g in zip(run.buffer, grads, strict=True):
        kept.copy_(g)
    return run.buffer


def tensor(x):
    return torch.tensor(x, dtype=torch.float32)


SIGNAL = {"statistic": "signal", "tau": 0.5}
SLOW = {"tau": 20.0}  # a later freeze, so that the change falls into the active phase
SCENARIOS = {
    "a matrix without gradient": (SLOW, without(0, at=(3, 4))),
    "no gradient on the last step before a check": (SLOW, without(0, 1, at=(2,))),
    "no gradient anywhere": (SLOW, without(0, 1, 2, at=(4,))),
    "no gradient in the first step": (SLOW, without(0, 1, 2, at=(1,))),
    "a first gradient after the first check": (SLOW, without(1, at=range(1, 5))),
    "a bias with a late first gradient": (SLOW, without(2, at=range(1, 5))),
    "zero gradients": (SLOW, filled(0.0, 0, 1, at=(4, 5))),
    "gradients that are not finite": (SLOW, filled(math.inf, 0, at=(4,))),
    "gradients that are not numbers": ({**SLOW, "amsgrad": True}, filled(math.nan, 0, at=(4,))),
    "gradients at one address": (SLOW, swap_gradients),
    "gradients that are not finite, signal": (SIGNAL, filled(math.inf, 0, at=(4,))),
    "zero gradients, signal": (SIGNAL, filled(0.0, 0, 1, at=(4, 5))),
    "a first gradient after the first check, signal": (SIGNAL, without(1, at=range(1, 5))),
    "tau lower": ({}, once(3, set_group(tau=5.0))),
    "tau higher": (SLOW, once(4, set_group(tau=500.0))),
    "a tau for every step": ({}, every_step(lower_tau)),
    "a tau for every step, max_frozen": ({"max_frozen": 0.5}, every_step(lower_tau)),
    "tau taken away": ({"tau": 1.0}, once(4, set_group(tau=None))),
    "tau comes late": ({"tau": None}, once(4, set_group(tau=50.0))),
    "another statistic": (SLOW, once(4, set_group(statistic="momentum"))),
    "change after norm": ({**SLOW, "statistic": "norm"}, once(4, set_group(statistic="change"))),
    "lr, betas and decay": (SLOW, once(3, set_group(lr=0.1, betas=(0.1, 0.7), weight_decay=0.5))),
    "maximize": (SLOW, once(3, set_group(maximize=True))),
    "another group": (SLOW, once(4, add_group)),
    "thaw of everything": ({}, once(6, lambda run: run.opt.thaw())),
    "thaw of one": ({}, once(5, lambda run: run.opt.thaw("group0.param1"))),
    "thaw while cooling": ({"cooldown": 3}, once(5, lambda run: run.opt.thaw())),
    "a checkpoint of its own": (SLOW, once(4, lambda r: r.opt.load_state_dict(r.opt.state_dict()))),
    "a checkpoint with other moments": (SLOW, once(4, load_other_moments)),
    "parameters with other storage": (SLOW, once(4, replace_data)),
    "state with other storage": (SLOW, once(4, replace_state)),
    "previous gradients with other storage": (SLOW, once(4, replace_prev_grads)),
    "steps at other addresses": (SLOW, once(4, move_state("step"))),
    "moments at other addresses": (SLOW, once(4, move_state("exp_avg_sq"))),
    "previous gradients at other addresses": (SLOW, once(4, move_state("prev_grad"))),
    "state cleared": (SLOW, once(4, clear_state)),
    "state changed in place": (SLOW, once(4, scale_state)),
    "a scheduler": ({}, every_step(scheduled)),
    "lr as a tensor": ({"lr": tensor(0.03), "foreach": False}, every_step(in_place_lr)),
    "lr as a tensor of one dimension": ({"lr": tensor([0.03])}, every_step(in_place_lr)),
    "betas as tensors": ({"betas": (tensor(0.8), tensor(0.97))}, every_step(lambda run: None)),
    "total_steps exceeded": ({"total_steps": 4, "grace_steps": None}, every_step(lambda run: None)),
}


@pytest.mark.filterwarnings("ignore:total_steps=4 is exceeded")
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_changes_during_a_run(name, timing):
    """Whatever the user changes between steps is honoured in the very next one."""
    options, act = SCENARIOS[name]
    ours, theirs = (
        Run(fused, freeze_timing=timing, **copy.deepcopy(options)) for fused in (True, False)
    )
    for _ in range(8):
        for run in (ours, theirs):
            run.step(act(run))
    assert_same(ours, theirs)


@pytest.mark.skipif(CUDA, reason="another implementation takes over on the CPU alone")
def test_a_parameter_that_becomes_a_view_with_gaps_is_left_alone():
    """The kernels walk through memory, gaps included: the choice is made anew."""
    ours, theirs = pair(**SLOW)
    for run in (ours, theirs):
        run.steps(3)
        p = run.params[0]
        run.around = torch.full((*p.shape, 2), 7.0)
        run.around[..., 0] = p.detach()
        p.data = run.around[..., 0]
    if why_not_loaded() is not None:
        with pytest.raises(RuntimeError, match="native op is not built"):
            ours.step()
    else:
        ours.steps(2), theirs.steps(2)
        assert ours.opt.backend == "native"
        for p, q in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q)
    assert ours.around[..., 1].eq(7.0).all()


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "reference"])
def test_a_changed_tau_lays_nothing_out_anew(fused, monkeypatch):
    """Not even where it changes in every step: neither units nor plan are rebuilt, and nobody waits
    for the device."""
    run = Run(fused, tau=1.0).steps(3)
    table, plan, rebuilt = run.opt._table, run.opt._plan, []
    monkeypatch.setattr(GradESAdamW, "_build", lambda self: rebuilt.append("units"))
    monkeypatch.setattr(triton_kernels.Plan, "sync", lambda self: rebuilt.append("synced"))
    for tau in (2.0, 30.0, 60.0):
        run.opt.param_groups[0]["tau"] = tau
        run.step()
        assert {unit.tau for unit in run.opt._table.units} == {tau}
    assert run.opt._table is table and run.opt._plan is plan and rebuilt == []
    monkeypatch.undo()
    taus = [(event.step, event.tau) for event in run.opt.freeze_events]
    assert taus == [(5, 30.0), (6, 60.0)]


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "reference"])
def test_a_changed_tau_is_checked(fused):
    """As in the constructor, before anything has changed."""
    run = Run(
        fused,
        ((3, 4), (5, 3)),
        groups=lambda params: [
            {"params": [(name, p)]} for name, p in zip(LORA, params, strict=True)
        ],
    ).steps(3)
    before = bits(run)
    for value, message in ((-1.0, "Invalid tau: -1.0"), (9.0, "different tau"), ("auto", "signal")):
        run.opt.param_groups[1]["tau"] = value
        with pytest.raises(ValueError, match=message):
            run.opt.step()
    run.opt.param_groups[1]["tau"] = FREEZING["tau"]
    assert_bits(bits(run), before)


def test_a_closure_is_called_once_with_gradients_enabled():
    """As in AdamW.step: the loss comes back, and gradients made in the closure are used."""
    ours, theirs = pair(tau=0.0)
    for run in (ours, theirs):
        calls = []

        def closure(run=run, calls=calls):
            calls.append(torch.is_grad_enabled())
            loss = sum((p * 2 ** -len(calls)).sum() for p in run.params)
            run.opt.zero_grad()
            loss.backward()
            return loss

        for t in range(4):
            loss = run.opt.step(closure)
            run.t = t + 1
            assert loss.requires_grad and calls == [True] * (t + 1)
    assert_same(ours, theirs)


def mixed_groups(params):
    return [
        {"params": [params[0]], "statistic": "norm", "tau": 100.0, "amsgrad": True},
        {"params": [params[1]], "statistic": "momentum", "lr": 0.1, "maximize": True},
        {"params": [params[2]], "tau": None, "weight_decay": 0.0},
        {"params": [params[3]], "statistic": "change", "betas": (0.5, 0.5), "eps": 1e-3},
    ]


@pytest.mark.parametrize("timing", TIMINGS)
def test_groups_of_their_own_kind(timing):
    """Groups with statistics, flags and hyper-parameters of their own, in one optimizer."""
    shapes = ((17, 23), (3, 5), (7,), (6, 6))
    ours, theirs = pair(shapes, groups=mixed_groups, freeze_timing=timing)
    for _ in range(7):
        assert_same(ours.step(), theirs.step())
    assert len(theirs.events) == 3


def test_several_dtypes_in_one_optimizer():
    """Parameters of fp32, bf16 and fp16 side by side: each in launches of its own."""
    runs = []
    for fused in (True, False):
        run = Run(fused, ((17, 23), (5, 5), (9, 4), (3, 3)))
        for p, dtype in zip(run.params, (torch.float32, *LOW, torch.float32), strict=True):
            p.data = p.data.to(dtype)
        run.finish(fused, options={"eps": 1e-3})
        runs.append(run.steps(7))
    assert_same_decisions(*runs)
    assert len(runs[0].events) == 4
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        assert (p - q).abs().max() <= 12 * torch.finfo(p.dtype).eps * q.abs().max()


LORA = [f"layers.0.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"]


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("missing", [None, 0, 1])
def test_units_of_two_tensors(missing, timing):
    """A LoRA pair is measured and frozen as one; without one of its gradients there is no check."""

    def groups(params):
        return zip([*LORA, "layers.0.norm.weight", "layers.0.mlp.up_proj.weight"], params)  # noqa: B905

    ours, theirs = pair(((3, 40), (50, 3), (7,), (4, 4)), groups=groups, freeze_timing=timing)
    for t in range(1, 8):
        for run in (ours, theirs):
            run.step([None if t == 4 and i == missing else g for i, g in enumerate(usual(run))])
        assert_same(ours, theirs)
    assert len(theirs.events) == 2


# Layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda: torch.rand(23, 17).t(),
    "permuted": lambda: torch.rand(3, 4, 5).permute(2, 0, 1),
    "channels-last": lambda: torch.rand(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "a row of one": lambda: torch.rand(40, 1).t(),
    "plain": lambda: torch.rand(17, 23),
}
GRAD_LAYOUTS = {
    "same": lambda g, p: torch.empty_like(p).copy_(g),
    "contiguous": lambda g, p: g.contiguous(),
    "reversed": lambda g, p: (
        g.permute(*reversed(range(g.dim()))).contiguous().permute(*reversed(range(g.dim())))
    ),
    "every second": lambda g, p: torch.stack([g, -g], dim=-1).flatten(-2)[..., ::2],
    "expanded": lambda g, p: g.flatten()[:1].reshape([1] * g.dim()).expand_as(g),
    "slice": lambda g, p: torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, grad_layout):
    """Dense parameters in any order of dimensions, gradients with any strides.

    Autograd and compiled models do produce gradients that lie in memory unlike their parameter; a
    kernel that walks memory would pair the wrong elements.
    """
    runs = []
    for fused in (True, False):
        torch.manual_seed(0)
        run = Run.__new__(Run)
        run.params = [nn.Parameter(LAYOUTS[layout]().to(DEVICE))]
        run.finish(fused, options={"tau": 20.0})
        (p,) = run.params
        strides = p.stride()
        for t in range(1, 5):
            g = gradient(t, 0, torch.empty(p.shape))
            run.step([GRAD_LAYOUTS[grad_layout](g, p)])
        assert p.stride() == strides
        runs.append(run)
    assert_same(*runs)


def test_gaps_between_elements_are_served_by_the_reference():
    """A parameter with gaps cannot be walked through."""
    p = nn.Parameter(torch.rand(4, 6, device=DEVICE)[:, ::2])
    assert "view with gaps" in functional.why_not_triton([p], interpret=True)
    assert GradESAdamW([p]).backend != "triton"


# AMP: what torch.amp.GradScaler hands over ----------------------------------------------------


def scaled_step(run, scale=1024.0, found=0.0, grads=None, with_scale=True):
    """One step as GradScaler takes it with an optimizer that unscales by itself."""
    grads = usual(run) if grads is None else grads
    for p, g in zip(run.params, grads, strict=True):
        p.grad = None if g is None else g * scale
    if with_scale:
        run.opt.grad_scale = torch.full((), scale, device=DEVICE)
    whole = isinstance(found, int)
    run.opt.found_inf = found if whole else torch.full((), found, device=DEVICE)
    run.t += 1
    run.opt.step()
    run.opt.grad_scale = run.opt.found_inf = None
    if found:
        run.t -= 1


def test_scaled_gradients_equal_unscaled_ones():
    """grad_scale divides in the kernel; for a power of two the run keeps every bit.

    The gradients handed back are the unscaled ones, as torch's fused AdamW does.
    """
    scaled, plain = Run(True), Run(True)
    for _ in range(7):
        scaled_step(scaled)
        plain.step()
        for i, p in enumerate(scaled.params):
            if f"group0.param{i}" not in plain.opt.frozen_units:
                assert torch.equal(p.grad, plain.params[i].grad)
    assert_bits(bits(scaled), bits(plain))
    assert len(plain.events) == 2


def test_unscaling_rounds_as_torch_does():
    """For any scale the gradient handed back has the bits of torch's fused AdamW."""
    ours = Run(True, ((17, 23),), tau=None)
    p = nn.Parameter(ours.params[0].detach().clone())
    theirs = torch.optim.AdamW([p], fused=True, **HYPER)
    g = gradient(1, 0, p)
    p.grad, theirs.grad_scale = g * 1000.0, torch.full((), 1000.0, device=DEVICE)
    theirs.found_inf = torch.zeros((), device=DEVICE)
    theirs.step()
    scaled_step(ours, 1000.0)
    close(ours.params[0].grad, p.grad, EPS * p.grad.abs(), "gradient")
    # By a tensor: CUDA divides by a Python number as it multiplies with its reciprocal.
    assert torch.equal(ours.params[0].grad, (g * 1000.0) / torch.full_like(g, 1000.0))
    close(ours.params[0], p, 2 * EPS * (p.abs() + 1), "parameter")


@pytest.mark.parametrize("layout", ["same", "transposed"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_the_unscaled_gradient_is_written_back(timing, layout):
    """Also into gradients that lie in memory unlike their parameter."""
    run = Run(True, ((17, 23),), tau=0.0, freeze_timing=timing)
    for t in range(1, 5):
        g = gradient(t, 0, run.params[0])
        if layout == "transposed":
            g = g.t().contiguous().t()
        scaled_step(run, grads=[g])
        assert torch.equal(run.params[0].grad, g)
    assert_same(run, Run(False, ((17, 23),), tau=0.0, freeze_timing=timing).steps(4))


@pytest.mark.parametrize("with_scale", [True, False], ids=["scaled", "unscaled by the user"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_overflow_writes_nothing(at, timing, with_scale):
    """found_inf: parameters, moments, steps, prev_grad, hits, the count of steps keep their bits.

    Before the grace period ends, on the step that keeps, on the first check and on a later one.
    """
    options = {"tau": 1e-3, "patience": 2, "freeze_timing": timing}
    run = Run(True, **options)
    for _ in range(at - 1):
        run.step()
    before = bits(run) if at > 1 else None
    start = copy.deepcopy(run.start)
    grads = [torch.full_like(p, math.inf) for p in run.params]
    scaled_step(run, found=1.0, grads=grads, with_scale=with_scale)
    assert all(torch.equal(p.grad, g) for p, g in zip(run.params, grads, strict=True))
    if at > 1:
        assert_bits(bits(run), before)
    else:
        assert_bits([p.detach() for p in run.params], start)
    assert run.opt.report().step == at - 1
    for state in run.opt.state.values():
        assert state["step"] == at - 1


@pytest.mark.parametrize("watch", [True, False], ids=["read after each step", "read at the end"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("overflows", [(3,), (1, 2), (4, 5), (3, 6)], ids=str)
def test_a_run_with_overflows_equals_one_without(overflows, timing, watch):
    """A skipped step counts for nothing, wherever it falls, and with half-counted patience."""
    options = {"patience": 2, "freeze_timing": timing, "cooldown": 1}
    skipping, plain = Run(True, **options), Run(True, **options)
    for n in range(1, 11):
        if n in overflows:
            grads = [torch.full_like(p, math.nan) for p in skipping.params]
            scaled_step(skipping, found=1.0, grads=grads)
        else:
            scaled_step(skipping)
            plain.step()
        if watch:
            assert skipping.events == plain.events
            assert skipping.opt.report().step == plain.opt.report().step
    assert len(plain.events) == 2
    assert_bits(bits(skipping), bits(plain))


def test_found_inf_may_be_the_number_zero():
    """GradScaler hands over 0 where no gradient was there to be looked at."""
    run, plain = Run(True), Run(True)
    for t in range(1, 6):
        missing = t == 3
        grads = [None] * 3 if missing else usual(run)
        scaled_step(run, found=0, grads=grads, with_scale=False) if missing else run.step()
        plain.step([None] * 3 if missing else None)
    assert_bits(bits(run), bits(plain))


def test_a_real_grad_scaler():
    """torch.amp.GradScaler: an overflow in the middle is skipped, the scale falls, events agree."""
    run, plain = Run(True), Run(False)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=100)
    for n in range(1, 8):
        loss = sum((gradient(run.t + 1, i, p) * p).sum() for i, p in enumerate(run.params))
        if n == 4:
            loss = loss * math.inf
        run.opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(run.opt)
        scaler.update()
        if n != 4:
            run.t += 1
            plain.step()
    assert scaler.get_scale() == 2.0**9
    assert_same(run, plain)
    assert len(plain.events) == 2
    assert not hasattr(run.opt, "found_inf") or run.opt.found_inf is None


# Launches -------------------------------------------------------------------------------------


class Counted:
    """Stands for a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((grid[0], options))
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def counted(monkeypatch):
    kernel = Counted(triton_kernels._step_kernel)
    monkeypatch.setattr(triton_kernels, "_step_kernel", kernel)
    return kernel


@pytest.mark.parametrize("n_matrices", [1, 7])
@pytest.mark.parametrize(
    ("timing", "launches"), [("same_step", [1, 1, 2, 2]), ("next_step", [1, 1, 1, 1])]
)
def test_launches_do_not_depend_on_the_number_of_matrices(timing, launches, n_matrices, counted):
    """One launch a step; a second one only for a check before the update."""
    run = Run(True, ((3, 3),) * n_matrices + ((4,),), tau=0.0, freeze_timing=timing)
    seen = []
    for _ in launches:
        counted.launches.clear()
        run.step()
        seen.append(len(counted.launches))
    assert seen == launches


def test_launches_per_combination_of_dtypes(counted):
    """bf16 beside fp32 costs one launch more; a bias in fp32 rides along."""
    run = Run(True, ((3, 3), (4, 4), (5,)), tau=0.0)
    run.params[1].data = run.params[1].data.bfloat16()
    run.finish(True, options={"tau": 0.0, "freeze_timing": "next_step"})
    for _ in range(4):
        counted.launches.clear()
        run.step()
        assert len(counted.launches) == 2


def test_dropped_tensors_are_not_launched(counted):
    """From the step after its decision on, a frozen matrix has no program in any launch."""
    run = Run(True, ((4, 2048), (3, 5), (7,)), tau=1e9, grace_steps=1).steps(2)
    assert counted.launches[-1][0] == 4 + 1 + 1
    run.step()
    assert run.opt.all_frozen
    assert counted.launches[-1][0] == 1


def test_addresses_are_laid_out_once(monkeypatch):
    """A usual run builds its tables at the first step and once more before the first check."""
    built = []
    plan = triton_kernels.Plan
    monkeypatch.setattr(triton_kernels, "Plan", lambda *args: built.append(1) or plan(*args))
    run = Run(True, stop_grad=False, tau=0.0, grace_steps=3).steps(8)
    assert len(built) <= 2
    assert run.opt.backend == "triton"


def test_frozen_tensors_give_their_memory_back():
    """Moments and previous gradients: a plan holds addresses, and nobody holds the tensors."""
    run = Run(True, stop_grad=True).steps(2)
    state = run.opt.state[run.params[1]]
    held = [weakref.ref(state[key]) for key in ("exp_avg", "exp_avg_sq", "prev_grad")]
    plan = run.steps(1).opt._plan
    run.steps(2)
    assert run.opt._plan is plan and run.opt.frozen_units == ["group0.param1"]
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 3


def test_the_default_device_of_torch_does_not_matter():
    """torch.set_default_device, while a plan is laid out and steps are taken."""
    ours, theirs = pair()
    grads = [[gradient(t, i, p) for i, p in enumerate(ours.params)] for t in range(1, 7)]
    for run in (ours, theirs):
        run.step(grads[0])
        with torch.device("meta"):
            for row in grads[1:]:
                run.step(row)
    assert_same(ours, theirs)


# Checkpoints and copies in the middle of a run -------------------------------------------------


def handed_over(source, fused, options):
    """A new run that goes on from `source` by way of a saved checkpoint."""
    file = io.BytesIO()
    torch.save(source.opt.state_dict(), file)
    file.seek(0)
    run = Run(fused, **options)
    for p, q in zip(run.params, source.params, strict=True):
        p.data.copy_(q)
    run.opt.load_state_dict(torch.load(file, weights_only=True))
    run.t = source.t
    return run


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", [{"patience": 2}, {"cooldown": 3}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["from triton", "to triton"])
def test_checkpoints_cross_implementations(first, options, at):
    """The other implementation goes on from a checkpoint, with hits half counted, as if it had
    run from the start."""
    source = Run(first, **options).steps(at)
    if at == 3 and "patience" in options:
        source.opt.state_dict()
        assert [source.opt.state[p]["grades_hits"] for p in source.params[:2]] == [0, 1]
    run = handed_over(source, not first, options).steps(9 - at)
    ours, theirs = (source.steps(9 - at), run) if first else (run, source.steps(9 - at))
    assert_same(ours, theirs)
    assert len(theirs.events) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [2, 3, 5])
def test_copies_in_the_middle_of_a_run(at, how):
    """A copy has its own tables: both go on to the same bits, and neither touches the other."""
    run = Run(True, patience=2).steps(at)
    pickled = how == "pickle"
    twin = pickle.loads(pickle.dumps(run)) if pickled else copy.deepcopy(run)
    assert twin.opt.param_groups[0]["params"][0] is twin.params[0] is not run.params[0]
    before = bits(run)
    twin.steps(9 - at)
    assert_bits(bits(run), before)
    run.steps(9 - at)
    assert_bits(bits(twin), bits(run))
    assert len(run.events) == 2


# Counting on the device: capturable -----------------------------------------------------------


@pytest.fixture
def capturable_everywhere(monkeypatch):
    """torch allows capturable=True on accelerators only; the kernels do not mind a CPU."""
    monkeypatch.setattr(gathering, "_capturable_devices", lambda: ["cpu", "cuda"])


CAPTURABLE = {
    "plain": {},
    "decided late": {"freeze_timing": "next_step"},
    "cooldown": {"cooldown": 2, "patience": 2},
    "every third step": {"check_every": 3, "grace_steps": 1},
    "every second step": {"check_every": 2, "statistic": "momentum"},
    "signal": {"statistic": "signal", "tau": 0.7, "grace_steps": 0},
    "weight change": WEIGHT_CHANGE,
    "no grace": {"grace_steps": 0, "statistic": "norm"},
    "max_frozen": {"max_frozen": 0.5},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "beta1 zero": {"betas": (0.0, 0.999)},
    "slow betas": {"betas": (0.9, 0.9999), "lr": 1e-3},
    "nothing monitored": {"tau": None},
}


@pytest.mark.parametrize("name", CAPTURABLE)
def test_the_device_counts_as_the_host_does(name, capturable_everywhere):
    """Steps, grace, checks and coefficients computed on the device lead to the same run."""
    options = CAPTURABLE[name]
    ours, theirs = Run(True, capturable=True, **options), Run(False, **options)
    for t in range(1, 9):
        for run in (ours, theirs):
            run.step([None if t == 3 and i == 1 else g for i, g in enumerate(usual(run))])
        if t == 5:
            assert ours.opt.report().step == 5
    for run in (ours, theirs):  # the one difference that is meant
        run.opt.param_groups[0]["capturable"] = False
    assert_same(ours, theirs)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.99999)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 9, 1000, 100_000])
def test_coefficients_of_the_device(steps, betas, capturable_everywhere):
    """Within one ulp of those that the host computes in fp64, also where 1 - beta^step cancels."""
    run = Run(True, capturable=True, betas=betas, tau=None).step()
    for state in run.opt.state.values():
        state["step"].fill_(steps)
    run.step()
    part = part_of(run)
    head, words = triton_kernels._HEAD_WORDS.value, triton_kernels._INPUT_WORDS.value
    rows = part.inputs.cpu()[head : head + 3 * words].view(3, words)
    got = rows[:, triton_kernels._COEFFICIENTS.value :].contiguous().numpy().view(np.float32)
    beta1, beta2 = betas
    step = steps + 1
    want = [0.03 / (1 - beta1**step), math.sqrt(1 - beta2**step), 0.03 * 0.1]
    want += [1 - beta1, beta2, 1 - beta2, 1e-6, 1.0]
    want += [1 - beta1**steps, math.sqrt(1 - beta2**steps)]
    np.testing.assert_allclose(got, np.tile(np.float32(want), (3, 1)), rtol=1.2e-7)


def test_a_capturable_plan_can_keep_gradients_from_the_start(capturable_everywhere):
    """A graph that is captured in the grace period reaches the checks in its replays, so its plan
    has a place for every previous gradient."""
    run = Run(True, capturable=True, grace_steps=10).steps(2)
    address = part_of(run).rows[:2, triton_kernels._PREV_GRAD.value]
    assert run.opt._layout.holds_prev_grads and (address != 0).all()


def test_replays_follow_a_changed_tau(capturable_everywhere):
    """Each replay of a captured graph reads its staging buffer again, where a new tau appears."""
    run = Run(True, capturable=True).steps(2)
    plan = run.opt._plan
    plan.captured.append((part_of(run).for_capture[0], None))
    run.opt.param_groups[0]["tau"] = 7.0
    assert run.opt.report().units[0].tau == 7.0
    assert run.opt._plan is plan and (plan.captured[0][0].taus == 7.0).all()
    plan.captured.clear()


def test_capturable_on_the_cpu_is_refused_as_torch_refuses_it():
    """An AssertionError that names the devices, before anything has changed."""
    if CUDA:
        pytest.skip("CUDA tensors may be captured")
    run = Run(True, capturable=True)
    with pytest.raises(AssertionError, match="capturable=True"):
        run.step()
    assert_bits([p.detach() for p in run.params], run.start)


# Several devices ------------------------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch):
    """Two devices that are one: the large matrix and the bias on the first, the rest on the other.

    `place` maps tensors to devices, by their shape where it does not say.
    """
    place = {}

    def device_of(p):
        return place.get(p, "second" if p.dim() == 2 and len(p) < 10 else "first")

    monkeypatch.setattr(triton_kernels, "_device_of", device_of)
    return place


ACROSS = {
    **{statistic: {"statistic": statistic, **NEXT_STEP} for statistic in STATISTICS},
    "signal, auto": OPTIONS["signal, auto"],
    **{name: options for name, options in OPTIONS.items() if "max_frozen" in name},
    **{name: options for name, options in OPTIONS.items() if name.startswith("cooldown")},
    "patience": {"patience": 3},
    "max_frozen, every third step": {"max_frozen": 0.5, "check_every": 3},
    "infinite tau": {"tau": math.inf},
    "nothing monitored": {"tau": None},
}


@pytest.mark.parametrize(
    ("name", "watch"), [*((name, False) for name in ACROSS), ("max_frozen", True)]
)
def test_units_on_two_devices(name, watch, two_devices):
    """Each device decides about its own; max_frozen and the ramp of the bias follow them all."""
    run = run_variant(watch=watch, n=10, **ACROSS[name])
    assert [len(part.flat_params) for part in run.opt._plan.parts] == [2, 1]
    assert len(run.events) == (0 if ACROSS[name].get("tau", 1) is None else 2)


@pytest.mark.parametrize(
    "name",
    [
        "a matrix without gradient",
        "no gradient anywhere",
        "a first gradient after the first check",
        "a tau for every step, max_frozen",
        "thaw while cooling",
        "a checkpoint of its own",
        "lr as a tensor",
        "another group",
    ],
)
def test_changes_during_a_run_on_two_devices(name, two_devices):
    test_changes_during_a_run(name, "same_step")


@pytest.mark.parametrize("timing", TIMINGS)
def test_overflows_on_two_devices(timing, two_devices):
    """A skipped step is skipped on both."""
    test_a_run_with_overflows_equals_one_without((3, 6), timing, False)


@pytest.mark.parametrize("options", [{"max_frozen": 0.5}, {"cooldown": 2}], ids=str)
def test_the_device_counts_on_two_devices(options, two_devices, capturable_everywhere):
    """With lr as a device tensor or capturable the devices count, and the host learns of it."""
    ours, theirs = Run(True, capturable=True, **options), Run(False, **options)
    for _ in range(8):
        ours.step()
        theirs.step()
    for run in (ours, theirs):
        run.opt.param_groups[0]["capturable"] = False
    assert_same(ours, theirs)


def test_the_oracles_problems_on_two_devices(two_devices, monkeypatch):
    """Every other unit on the second device, all options mixed."""
    build = test_oracle.build

    def build_on_two(problem, *args):
        opt, params = build(problem, *args)
        for u, members in enumerate(problem.units):
            two_devices.update((params[i], u % 2) for i in members)
        return opt, params

    monkeypatch.setattr(test_oracle, "build", build_on_two)
    with torch.device(DEVICE):
        for seed in range(1018, 1018 + N_ORACLE_PROBLEMS // 2):
            test_oracle.check(seed, backend="triton", dtype=torch.float32)


def test_a_unit_on_two_devices_is_refused():
    """Its sum would need both: another implementation serves."""
    pair_of_devices = [[p_of(2, 3), p_of(3, 2, device="meta")]]
    reason = functional.why_not_triton([p_of(2, 2)], interpret=True, units=pair_of_devices)
    assert reason == "the tensors of one unit lie on several devices"


# Several processes ----------------------------------------------------------------------------


def in_a_job(options, missing=(), capturable=False):
    """A run of the kernels and one of the reference, on one of the ranks of a job.

    Each rank has gradients of its own, so that it matters whose statistic is compared. At the
    (rank, step) pairs in `missing` the first matrix has none.
    """
    if capturable:
        gathering._capturable_devices = lambda: ["cpu", "cuda"]
    rank = torch.distributed.get_rank()
    runs = Run(True, capturable=capturable, **options), Run(False, **options)
    for t in range(1, 11):
        for run in runs:
            grads = [g * (1 + 0.5 * rank) for g in usual(run)]
            if (rank, t) in missing:
                grads[0] = None
            run.step(grads)
    for run in runs:
        run.opt.param_groups[0]["capturable"] = False
    assert_same(*runs)
    return runs[0].events


def late_in_a_job():
    """Rank 0 has no gradient at all in the first two steps, which are checks already."""
    rank = torch.distributed.get_rank()
    run = Run(True, statistic="norm", grace_steps=0)
    for t in range(1, 9):
        run.step([None] * 3 if rank == 0 and t < 3 else usual(run))
    return run.events


def overflow_in_a_job():
    """At step 4 rank 1 alone finds an infinity."""
    rank = torch.distributed.get_rank()
    runs = Run(True), Run(False)
    for t in range(1, 10):
        scaled_step(runs[0], found=float(t == 4 and rank == 1))
        if t != 4:
            runs[1].step()
        runs[0].t = runs[1].t
    assert_same(*runs)
    return runs[0].events


def other_tau(opt, rank):
    opt.param_groups[0]["tau"] = 1.0 + rank


def thaw(opt, rank):
    assert opt.frozen_units == opt.monitored_units
    if rank == 1:
        opt.thaw()


def differing_in_a_job(fused, act, tau):
    """Rank 1 does something else after step 5; the step at which each rank hears of it."""
    run = Run(fused, tau=tau).steps(5)
    act(run.opt, torch.distributed.get_rank())
    for _ in range(3):
        try:
            run.step()
        except RuntimeError as error:
            return run.t, "the ranks" in str(error) and "differ" in str(error)
    return None


JOBS = {
    **{statistic: {"statistic": statistic, **NEXT_STEP} for statistic in STATISTICS},
    "same step": {},
    "signal, same step": {"statistic": "signal", "tau": 0.7},
    "max_frozen": {"max_frozen": 0.5},
    "cooldown, patience": {"cooldown": 2, "patience": 2},
    "every third step": {"check_every": 3, "grace_steps": 1},
}


@pytest.mark.skipif(CUDA, reason="two processes would share one device")
@pytest.mark.parametrize("name", JOBS)
def test_ranks_decide_together(name):
    """Every rank compares the largest statistic, as on the reference: the same events on all."""
    options = {"tau": TAUS.get(JOBS[name].get("statistic"), 50.0), **JOBS[name]}
    events, others = ranks.run(2, in_a_job, options)
    assert events == others and len(events) == 2


@pytest.mark.skipif(CUDA, reason="two processes would share one device")
def test_a_rank_without_evidence_holds_all_back():
    """A gradient that is missing on one rank makes the check void on every rank."""
    missing = {(1, t) for t in range(3, 7)}
    events, others = ranks.run(2, in_a_job, {"statistic": "norm", "tau": 500.0}, missing)
    assert events == others
    assert [(step, unit) for step, unit, *_ in events] == [
        (3, "group0.param1"),
        (7, "group0.param0"),
    ]


@pytest.mark.skipif(CUDA, reason="two processes would share one device")
def test_jobs_that_go_unusual_ways():
    """Counting on the device, a rank that begins late, an overflow on one rank."""
    alone = Run(False).steps(8).events
    assert in_order(*ranks.run(2, overflow_in_a_job)) == alone
    assert len(in_order(*ranks.run(2, in_a_job, {}, (), True))) == 2
    assert len(in_order(*ranks.run(2, late_in_a_job))) == 2


def in_order(events, others):
    assert others == events
    return events


@pytest.mark.skipif(CUDA, reason="two processes would share one device")
@pytest.mark.parametrize(("act", "tau"), [(other_tau, 1.0), (thaw, math.inf)])
def test_ranks_that_differ_are_an_error_on_all(act, tau):
    """At the next check, which a device tells its host one step later."""
    assert ranks.run(2, differing_in_a_job, False, act, tau) == [(6, True)] * 2
    assert ranks.run(2, differing_in_a_job, True, act, tau) == [(7, True)] * 2


# torch.compile --------------------------------------------------------------------------------


def test_a_compiled_step_has_the_same_bits():
    """torch.compile(opt.step) computes what the plain step does, across freezes, in one frame."""
    compiled, plain = Run(True), Run(True)
    torch._dynamo.reset()
    step = torch.compile(compiled.opt.step, backend="eager")
    for t in range(1, 8):
        for i, p in enumerate(compiled.params):
            p.grad = gradient(t, i, p)
        step()
        compiled.t = t
        plain.step()
    assert_bits(bits(compiled), bits(plain))
    assert len(plain.events) == 2


# Which implementation serves ------------------------------------------------------------------


def p_of(*shape, **options):
    return nn.Parameter(torch.zeros(*shape, **{"device": DEVICE, **options}))


REFUSED = {
    "float64": (lambda: [p_of(2, 2, dtype=torch.float64)], "no torch.float64"),
    "complex": (lambda: [p_of(2, 2, dtype=torch.complex64)], "no torch.complex64"),
    "mixed with float64": (lambda: [p_of(2, 2), p_of(2, 2, dtype=torch.float64)], "torch.float64"),
    "view with gaps": (lambda: [nn.Parameter(torch.zeros(4, 4, device=DEVICE)[:, ::2])], "gaps"),
    "overlapping view": (
        lambda: [nn.Parameter(torch.zeros(4, device=DEVICE).expand(3, 4))],
        "gaps",
    ),
    "devices of several kinds": (
        lambda: [p_of(2, 2), p_of(2, 2, device="meta")],
        "devices of several kinds",
    ),
    "no kernels for the device": (lambda: [p_of(2, 2, device="meta")], "'meta'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_in_the_way_of_triton_is_named(name):
    """One reason, in words."""
    make, reason = REFUSED[name]
    assert reason in functional.why_not_triton(make(), interpret=True)


@pytest.mark.parametrize("name", ["devices of several kinds", "no kernels for the device"])
def test_fused_true_is_refused_with_a_way_out(name):
    """An error that says what is in the way, fused=None and fused=False; those two work."""
    make, reason = REFUSED[name]
    with pytest.raises(RuntimeError, match=r"fused=True is not possible") as raised:
        GradESAdamW(make(), fused=True)
    assert reason in str(raised.value)
    assert "fused=None" in str(raised.value) and "fused=False" in str(raised.value)
    assert GradESAdamW(make(), fused=None).backend == "reference"
    assert GradESAdamW(make(), fused=False).backend == "reference"


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    """The message names the variable that would make it possible."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    params = [nn.Parameter(torch.zeros(2, 2))]
    assert "TRITON_INTERPRET=1" in functional.why_not_triton(params, interpret=True)
    assert GradESAdamW(params).backend != "triton"


def test_without_triton_it_is_refused(monkeypatch):
    """torch without Triton: another implementation serves."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find_spec(name)
    )
    assert functional.why_not_triton([p_of(2, 2)], interpret=True) == "triton is not installed"
    assert GradESAdamW([p_of(2, 2)]).backend != "triton"


def test_backend_names_what_runs():
    """fused=None is Triton on a CUDA device and never the interpreter."""
    params = [p_of(2, 2)]
    assert GradESAdamW(params, fused=True).backend == "triton"
    assert (GradESAdamW(params).backend == "triton") == CUDA
    assert GradESAdamW(params, foreach=True).backend == "reference"
    assert GradESAdamW(params, differentiable=True).backend == "reference"
    optimizer = GradESAdamW(params, fused=True, tau=1.0, grace_steps=0)
    optimizer.param_groups[0]["fused"] = False
    assert optimizer.backend == "reference" == optimizer.report().backend


def test_changing_the_implementation_between_steps():
    """fused may be switched in the group: the run goes on as if nothing had happened."""
    run, plain = Run(True, patience=2), Run(False, patience=2)
    for t in range(1, 9):
        run.opt.param_groups[0]["fused"] = t % 3 != 0
        run.step()
        plain.step()
    run.opt.param_groups[0]["fused"] = True
    assert_same(run, plain)


def test_the_functional_form_chooses_too():
    """grades_adamw(fused=True) equals fused=False, and refuses a unit without its buffer."""
    framed = Framed(10, 0)
    table, unit = table_at(4, numel=10)
    framed.inner["prev_grad"] = None
    with pytest.raises(ValueError, match="prev_grads"):
        framed.run(table, unit)


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("prev_grad", lambda x: x.double(), r"prev_grads\[0\] is torch.float64"),
        ("prev_grad", lambda x: x.t().contiguous().t(), r"prev_grads\[0\] is .* with strides"),
        ("exp_avg", lambda x: x.t().contiguous().t(), r"a moment of parameter 0 has strides"),
        ("exp_avg_sq", lambda x: x.to("meta"), r"a moment of parameter 0 is on meta"),
    ],
    ids=["dtype", "strides", "moment's strides", "moment's device"],
)
def test_the_functional_form_refuses_buffers_it_would_misread(key, wrong, message):
    """The kernels walk through memory by address: what lies otherwise is an error, not garbage."""
    framed = Framed(12, 0)
    table, unit = table_at(4, numel=12)
    framed.inner = {name: x.view(3, 4) for name, x in framed.inner.items()}
    framed.inner[key] = wrong(framed.inner[key])
    with pytest.raises(ValueError, match=message):
        framed.run(table, unit)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_that_do_not_fit_are_refused(fused):
    """Sparse ones as torch refuses them; nothing has changed then."""
    run = Run(fused).steps(2)
    before = bits(run)
    run.params[0].grad = torch.sparse_coo_tensor(size=(17, 23), device=DEVICE)
    with pytest.raises(RuntimeError, match="sparse"):
        run.opt.step()
    run.params[0].grad = None
    assert_bits(bits(run), before)


# Negative controls: kernels that are wrong on purpose ------------------------------------------


def step_three_times_with_overflow():
    test_an_overflow_writes_nothing(3, "same_step", True)


def a_variant():
    test_variants("change", "same_step", False, True)


FAULTS = {
    "the masked tail is left out": (
        "for first in range(start, stop, BLOCK):",
        "for first in range(start, stop - BLOCK + 1, BLOCK):",
        lambda: test_shapes((1, 513), "next_step"),
    ),
    "the last element is left out": (
        "n_left = tl.minimum(n_elements - first, BLOCK).to(tl.int32)",
        "n_left = tl.minimum(n_elements - first, BLOCK).to(tl.int32) - 1",
        lambda: test_shapes((1, 511), "next_step"),
    ),
    "one element too many": (
        "n_left = tl.minimum(n_elements - first, BLOCK).to(tl.int32)",
        "n_left = tl.minimum(n_elements - first, BLOCK).to(tl.int32) + 1",
        lambda: test_nothing_around_a_tensor_is_written(513, 3, "next_step", False),
    ),
    "the last block is taken for full": (
        "if aligned & (first + BLOCK <= n_elements):",
        "if aligned:",
        lambda: test_nothing_around_a_tensor_is_written(513, 0, "next_step", False),
    ),
    "frozen tensors are updated": (
        "    if frozen:\n        return\n",
        "",
        lambda: with_patch(test_frozen_tensors_keep_every_bit, "usual", "in the table"),
    ),
    "at tau is below tau": (
        "statistic < tau",
        "statistic <= tau",
        lambda: test_tau_just_above_and_just_below("change", "same_step"),
    ),
    "an old gradient is evidence": (
        "evidence & (tl.load(unit_row + _PREV_STEP) == t - 1)",
        "evidence & (tl.load(unit_row + _PREV_STEP) >= 0)",
        lambda: test_changes_during_a_run("a matrix without gradient", "same_step"),
    ),
    "a zero gradient is evidence": (
        "evidence & (magnitude > 0) & ",
        "evidence & (magnitude >= 0) & ",
        lambda: test_changes_during_a_run("zero gradients", "next_step"),
    ),
    "infinity is evidence": (
        '    evidence = statistic < float("inf")',
        "    evidence = statistic == statistic",
        lambda: test_changes_during_a_run("gradients that are not finite", "same_step"),
    ),
    "an infinite gradient is evidence": (
        ' & (magnitude < float("inf"))',
        "",
        lambda: test_changes_during_a_run("gradients that are not finite, signal", "same_step"),
    ),
    "no moment is evidence": (
        "evidence = evidence & (correction1 > 0)",
        "evidence = evidence & (correction1 >= 0)",
        lambda: test_options("momentum, no grace", False),
    ),
    "corrected as after the step": (
        "1 - beta1**self.steps",
        "1 - beta1 ** (self.steps + 1)",
        lambda: test_variants("signal", "same_step", False, False),
    ),
    "the second moment is not corrected": (
        "np.sqrt(1 - beta2**self.steps)",
        "1",
        lambda: test_variants("signal", "next_step", False, False),
    ),
    "the signal is divided": (
        "= rule.divisor(unit)",
        '= unit.n_elements if rule.tau_per == "element" else 1',
        lambda: test_options("signal, per element", False),
    ),
    "the new moment's signal": (
        "            difference = m\n",
        "            difference = m + (signed - m) * tl.load(coefficients + _ONE_MINUS_BETA1)\n",
        lambda: test_variants("signal", "next_step", False, False),
    ),
    "the weight before it is rounded": (
        "p.to(PARAM).to(tl.float32) - before",
        "p - before",
        lambda: test_weight_change_is_what_was_stored(torch.bfloat16),
    ),
    "no movement is evidence": (
        "evidence = evidence & (statistic > 0)",
        "evidence = evidence & (statistic >= 0)",
        lambda: test_options("weight change, lr zero", False),
    ),
    "the first tau stays": (
        "staging.taus[:] = self.taus\n        staging.head",
        "staging.taus[:] = [u.decided_tau for u in self.own_units]\n        staging.head",
        lambda: with_patch(test_a_changed_tau_lays_nothing_out_anew, True),
    ),
    "the devices are not told": (
        "        if news != self.told:",
        "        if False:",
        lambda: with_two_devices(test_units_on_two_devices, "max_frozen", False),
    ),
    "hits are not reset": (
        "hits + 1, 0)",
        "hits + 1, hits)",
        lambda: test_tau_goes_up_and_down(),
    ),
    "found_inf is ignored": (
        "    return found != 0.0",
        "    return found > 1e30",
        step_three_times_with_overflow,
    ),
    "the scaled gradient stays": (
        "            _store(grad_address, first, n_left, g, GRAD, FULL, BLOCK)",
        "            pass",
        lambda: test_the_unscaled_gradient_is_written_back("same_step", "same"),
    ),
    "strides are ignored": (
        "if g is not None and not same_memory_order(g, p):",
        "if g is None and not same_memory_order(g, p):",
        lambda: test_layouts("transposed", "contiguous"),
    ),
    "complements in fp32": (
        "out[:, _ONE_MINUS_BETA2.value] = 1 - beta2",
        "out[:, _ONE_MINUS_BETA2.value] = 1 - beta2.astype(np.float32)",
        lambda: test_options("beta1 below a half", False),
    ),
    "bias correction one step late": (
        "steps = self.steps + 1",
        "steps = self.steps + 2",
        a_variant,
    ),
    "no decay": ("out[:, _DECAY.value] = lr * weight_decay", "out[:, _DECAY.value] = 0", a_variant),
    "the sign of maximize is lost": (
        "signed = g * tl.load(coefficients + _SIGN)",
        "signed = g * 1.0",
        lambda: test_variants("momentum", "same_step", True, True),
    ),
    "amsgrad keeps the last": (
        "v = tl.maximum(v, v_max, propagate_nan=tl.PropagateNan.ALL)",
        "v = v",
        lambda: test_variants("norm", "next_step", True, False),
    ),
    "the ramp is not applied": (
        "factor = tl.maximum(ramp, 0.0).to(tl.float32)",
        "factor = tl.maximum(ramp, 1.0).to(tl.float32)",
        lambda: test_options("cooldown", False),
    ),
    "the gradient is kept at every step": (
        "rule.checks(t + 1)",
        "True",
        lambda: test_other_steps_do_not_touch_the_kept_gradient(),
    ),
    "a partial sum of the last run": (
        "tl.store(share, tl.sum(differences))",
        "tl.store(share, tl.load(share) + tl.sum(differences))",
        a_variant,
    ),
}


def test_tau_goes_up_and_down():
    """A check at or above tau resets the count of hits: here every second one is a hit."""
    options = {"statistic": "norm", "tau": 1.0, "patience": 2, "grace_steps": 0}
    ours, theirs = pair(((1, 1),), **options)
    for t in range(6):
        for run in (ours, theirs):
            run.step([torch.full_like(run.params[0], 0.5 if t % 2 else 2.0)])
    assert theirs.events == []
    assert_same(ours, theirs)


def with_patch(test, *args):
    with pytest.MonkeyPatch.context() as monkeypatch:
        test(*args, monkeypatch)


def with_two_devices(test, *args):
    with pytest.MonkeyPatch.context() as monkeypatch:
        two_devices.__wrapped__(monkeypatch)
        test(*args, None)


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_kernels_are_noticed(name, monkeypatch, tmp_path):
    """Negative control: each fault, put into a copy of the module, turns its test red."""
    old, new, check = FAULTS[name]
    source = Path(triton_kernels.__file__).read_text()
    assert source.count(old) >= 1, "the fault no longer fits the source"
    file = tmp_path / "triton_kernels.py"  # a file: Triton reads the source of its kernels
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("grades_kernels.triton_kernels", file)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setitem(sys.modules, "grades_kernels.triton_kernels", broken)
    monkeypatch.setattr(grades_kernels, "triton_kernels", broken)
    monkeypatch.setattr(sys.modules[__name__], "triton_kernels", broken)
    with pytest.raises(AssertionError):
        check()
