"""The Triton kernels against the reference implementation.

Contract: whatever the options, shapes, dtypes and layouts, the same units freeze at the same steps,
statistics agree, and the update is the same within a bound that follows from the arithmetic.
"""

import math

import pytest
import test_oracle
import torch
import triton_runs as tr
from harness import PAIRS, TIMINGS, fading_gradient, parameters, set_gradients
from torch import nn

pytestmark = [pytest.mark.gpu] if tr.CUDA else []


@pytest.mark.parametrize(("amsgrad", "maximize"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_every_variant_equals_the_reference(statistic, timing, amsgrad, maximize):
    """Across freezes that really happen."""
    options = {"statistic": statistic, "freeze_timing": timing, **tr.SCALES.get(statistic, {})}
    decay = 0.0 if amsgrad == maximize else 0.1
    run = tr.compare(amsgrad=amsgrad, maximize=maximize, weight_decay=decay, **options)
    steps = [step for step, *_ in run.events]
    assert len(steps) == 2 and steps[0] < steps[1], "both units freeze, one after the other"


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
    "norm, gradients not stopped": {"statistic": "norm", "stop_grad": False},
    "infinite tau": {"tau": math.inf},
    "momentum, no grace": {"statistic": "momentum", "grace_steps": 0},
    "signal, no grace": {"statistic": "signal", "grace_steps": 0, **tr.SCALES["signal"]},
    "signal, per element": {"statistic": "signal", "tau_per": "element", **tr.SCALES["signal"]},
    "signal, auto": {"statistic": "signal", "tau": "auto", "betas": (0.6, 0.97), "cooldown": 1},
    "signal, beta1 zero": {"statistic": "signal", "tau": 0.7, "betas": (0.0, 0.9)},
    "gain, no grace": {"statistic": "gain", "grace_steps": 0, "tau": 2.5},
    "gain, observe only": {"statistic": "gain", "tau": 0.0, "betas": (0.0, 0.9)},
    "gain, per element": {"statistic": "gain", "tau_per": "element", "tau": 0.01},
    "gain, eps large": {"statistic": "gain", "eps": 0.3, "tau": 2.5, "maximize": True},
    "gain, eps zero": {"statistic": "gain", "eps": 0.0, "tau": 2.5},
    "weight change, per element": {**tr.WEIGHT_CHANGE, "tau": 0.009, "tau_per": "element"},
    "weight change, lr zero": {**tr.WEIGHT_CHANGE, "lr": 0.0},
    "weight change, eps zero": {**tr.WEIGHT_CHANGE, "eps": 0.0},
    "weight change, cooldown": {**tr.WEIGHT_CHANGE, "cooldown": 2, "patience": 2},
}


@pytest.mark.parametrize("watch", [True, False], ids=["read after each step", "read at the end"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_reference(name, watch):
    tr.compare(watch=watch, n=7, **OPTIONS[name])


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    "shape",
    [(0, 3), (1, 1), (2, 1), (1, 1000), (17, 23), (3, 5, 7), (2, 1, 3, 4)]
    + [(1, n + k) for n in (512, 4096) for k in (-1, 0, 1)]
    + [(2, 4097)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_shapes(shape, timing):
    """Around blocks (512 elements of fp32) and spans (4096) nothing is left out or done twice."""
    assert tr.module("triton_kernels").block_size(4) == 512
    options = {"freeze_timing": timing, "tau": 1e-3, "grace_steps": 1}
    tr.compare(3, True, (shape, (3, 5)), **options)


N_ORACLE_PROBLEMS = 200 if tr.CUDA else 8


@pytest.mark.parametrize("part", range(8))
def test_the_oracles_problems(part):
    """The numpy oracle's random problems: all options mixed, gradients missing, zero and broken."""
    with torch.device(tr.DEVICE):
        # The first eight have all statistics.
        for seed in range(1016 + part, 1016 + N_ORACLE_PROBLEMS, 8):
            test_oracle.check(seed, backend="triton", dtype=torch.float32)


@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_tau_is_compared_strictly(statistic, timing):
    """tau = statistic leaves a unit alone, the next larger number freezes it."""
    shapes, check = ((3, 5), (17, 23), (4, 4)), 4

    def run(taus):
        def groups(params):
            return [{"params": [p], "tau": tau} for p, tau in zip(params, taus, strict=True)]

        options = {"statistic": statistic, "freeze_timing": timing, "grace_steps": check - 1}
        return tr.start(True, shapes, groups=groups, **options).steps(check)

    measured = list(run([0.0] * 3).opt.statistics().values())
    assert all(value > 0 for value in measured)
    for raised in ((0, 2), (1,)):
        taus = [math.nextafter(x, math.inf) if k in raised else x for k, x in enumerate(measured)]
        events = [(step, unit) for step, unit, *_ in run(taus).events]
        assert events == [(check, f"group{k}.param0") for k in raised]


@pytest.mark.parametrize(("statistic", "timing"), PAIRS if tr.CUDA else PAIRS[::4])
def test_two_runs_have_the_same_bits(statistic, timing):
    """Freezing is for good, so even the statistic must not depend on the order of blocks.

    Which is always the same in the interpreter.
    """
    shapes = ((2048, 1111), (1000, 999), (7,)) if tr.CUDA else ((3, 1500), (3, 5), (7,))
    options = {"statistic": statistic, "freeze_timing": timing, "tau": 0.0}
    runs = [tr.start(True, shapes, **options).steps(5) for _ in range(2)]
    tr.assert_same_bits(*runs)


@pytest.mark.parametrize("timing", TIMINGS)
def test_frozen_cooling_and_active_units_together(timing):
    """Matrices of five sizes in all phases at once, the bias following the last of them."""
    shapes = ((2, 2), (3, 5), (6, 7), (12, 12), (30, 30), (4,))
    ours, theirs = tr.both(shapes, cooldown=2, freeze_timing=timing, tau=15.0)
    phases = set()
    for _ in range(14):
        tr.assert_same(ours.steps(1), theirs.steps(1))
        decided = [unit.is_decided for unit in theirs.opt._freezer.table.units]
        n_frozen = len(theirs.opt.frozen_units)
        phases.add((n_frozen > 0, sum(decided) > n_frozen, not all(decided)))
    assert (True, True, True) in phases and theirs.opt.all_frozen


# Groups, dtypes, units of several tensors --------------------------------------------------------


def mixed_groups(params):
    return [
        {"params": [params[0]], "statistic": "norm", "tau": 100.0, "amsgrad": True},
        {"params": [params[1]], "statistic": "momentum", "lr": 0.1, "maximize": True},
        {"params": [params[2]], "tau": None, "weight_decay": 0.0},
        {"params": [params[3]], "statistic": "change", "betas": (0.5, 0.5), "eps": 1e-3},
    ]


@pytest.mark.parametrize("timing", TIMINGS)
def test_groups_with_options_of_their_own(timing):
    shapes = ((17, 23), (3, 5), (7,), (6, 6))
    run = tr.compare(7, True, shapes, groups=mixed_groups, freeze_timing=timing)
    assert len(run.events) == 3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_infinite_weights_stay_as_they_are(weight_decay):
    run = tr.start(tau=None, grace_steps=None, weight_decay=weight_decay)
    ends = torch.tensor([math.inf, -math.inf], device=tr.DEVICE)
    run.params[0].data[0, :2] = ends
    for _ in range(3):
        grads = tr.usual(run)
        grads[0][0, :2] = 0.0
        run.step(*grads)
    assert run.params[0][0, :2].equal(ends) and run.params[0][1:].isfinite().all()


def test_several_dtypes_in_one_optimizer():
    """Parameters of fp32, bf16 and fp16 side by side: each in launches of its own."""
    dtypes = torch.float32, *tr.LOW, torch.float32
    params = parameters((17, 23), (5, 5), (9, 4), (3, 3), device=tr.DEVICE)
    runs = [
        tr.start(fused, params=tr.mixed_dtypes(params, dtypes), eps=1e-3) for fused in (True, False)
    ]
    for run in runs:
        run.steps(7)
    tr.assert_same_decisions(*runs)
    assert len(runs[0].events) == 4
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        assert (p - q).abs().max() <= 12 * torch.finfo(p.dtype).eps * q.abs().max()


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("missing", [None, 0, 1])
def test_units_of_two_tensors(missing, timing):
    """A LoRA pair is measured and frozen as one; without one of its gradients there is no check."""
    names = [*tr.LORA, "layers.0.norm.weight", "layers.0.mlp.up_proj.weight"]

    def groups(params):
        return zip(names, params, strict=True)

    def act(run):
        return [None if run.t == 3 and i == missing else g for i, g in enumerate(tr.usual(run))]

    shapes = ((3, 40), (50, 3), (7,), (4, 4))
    run = tr.compare(7, True, shapes, act=act, groups=groups, freeze_timing=timing)
    assert len(run.events) == 2


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

    Autograd and compiled models do produce gradients with other strides than their parameter's; a
    kernel that walks memory would pair the wrong elements.
    """
    runs = []
    for fused in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(LAYOUTS[layout]().to(tr.DEVICE))
        run, strides = tr.start(fused, params=[p], tau=20.0), p.stride()
        for t in range(1, 5):
            g = fading_gradient(t, 0, torch.empty(p.shape, device=tr.DEVICE))
            run.step(GRAD_LAYOUTS[grad_layout](g, p))
        assert p.stride() == strides
        runs.append(run)
    tr.assert_same(*runs)


# torch.compile --------------------------------------------------------------------------------


def test_a_compiled_step_has_the_same_bits():
    """torch.compile(opt.step) computes the same as the plain step, across freezes, in one frame."""
    compiled, plain = tr.start(), tr.start()
    torch._dynamo.reset()
    step = torch.compile(compiled.opt.step, backend="eager")
    for t in range(1, 8):
        set_gradients(compiled.params, tr.usual(compiled))
        step()
        compiled.t = t
    tr.assert_same_bits(compiled, plain.steps(7))
    assert len(plain.events) == 2
