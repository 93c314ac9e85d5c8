"""Shared by the tests of the Triton backend: a run on Triton beside one on the reference.

On a CUDA machine the kernels are compiled (and the tests have the mark `gpu`); elsewhere Triton's
interpreter runs them on the CPU (see conftest.py).
"""

import copy
import importlib
import importlib.util
import sys
from pathlib import Path

import harness
import pytest
import torch
from harness import FREEZING, HYPER, SHAPES, Run, fading_gradient, snapshot

from grades_kernels.freezing.table import FreezeConfig, FreezeTable, Unit

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = torch.finfo(torch.float32).eps
LOW = (torch.bfloat16, torch.float16)
MOMENTS = {"exp_avg", "exp_avg_sq"}
# The statistics that are no sum over gradients have scales of their own, with the same outcome.
SCALES = {
    "signal": {"tau": 1.55, "betas": (0.6, 0.97)},
    "weight_change": {"tau": 3.3},
    "gain": {"tau": 2.5},
}
NEXT_STEP = {"freeze_timing": "next_step"}
WEIGHT_CHANGE = {"statistic": "weight_change", "tau": 3.3, **NEXT_STEP}
MODULES = ("triton_kernels", "triton_tables", "triton_engine")  # in the order of their imports
LORA = [f"layers.0.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"]


def start(fused=True, shapes=SHAPES, **options):
    """A run with the hyper-parameters above; `params` replaces the tensors of these `shapes`."""
    return Run(fused, shapes, device=DEVICE, **{**HYPER, **FREEZING, **options})


def both(*args, **kwargs):
    """The same run on Triton and on the reference."""
    return start(True, *args, **kwargs), start(False, *args, **kwargs)


def usual(run):
    """The gradients of the next step."""
    return [fading_gradient(run.t + 1, i, p) for i, p in enumerate(run.params)]


def engine_of(run):
    (engine,) = run.opt._freezer.engines
    return engine


def module(name):
    """The backend's module as it is now: the negative controls replace it."""
    return importlib.import_module(f"grades_kernels.backends.{name}")


def use_edited_modules(monkeypatch, folder, edits):
    """Put copies of the backend's modules in use, with these edits: module -> (old, new) text."""
    names = [f"grades_kernels.backends.{name}" for name in MODULES]
    # All before the first copy, or they would import it, and go on using it afterwards.
    originals = [importlib.import_module(name) for name in names]
    for name, full, original in zip(MODULES, names, originals, strict=True):
        source = Path(original.__file__).read_text()
        old, new = edits.get(name, ("", ""))
        assert old in source, "the edit no longer fits the source"
        path = folder / f"{name}.py"  # a file: Triton reads the source of its kernels
        path.write_text(source.replace(old, new) if old else source)
        spec = importlib.util.spec_from_file_location(full, path)
        copied = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, copied)
        spec.loader.exec_module(copied)


def table_at(t, statistic="change", tau=0.0, n_elements=1, **config):
    """A table of one unit whose next step is `t`, with evidence from the step before."""
    unit = Unit("w", statistic, tau, n_elements, prev_step=t - 1)
    return FreezeTable(FreezeConfig(grace_steps=2, **config), [unit], t=t - 1), unit


def assert_close(got, want, tolerance, what):
    got, want = got.detach().double(), want.detach().double()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64, device=got.device)
    wrong = ~((got - want).abs() <= tolerance) & (got != want) & ~(got.isnan() & want.isnan())
    assert not wrong.any(), f"{what}: {got[wrong][:4]} instead of {want[wrong][:4]}"


def assert_same_decisions(got, want, rel=1e-5):
    assert got.opt.backend == "triton" and want.opt.backend == "reference"
    harness.assert_same_decisions(got, want, rel)


def assert_same(got, want):
    """Same decisions, bits of prev_grad and counters; fp32 values within a few ulp per step.

    A parameter is rounded twice a step, and an update of at most a few lr carries the rounding of
    about ten operations; moments carry that of two, relative to the largest value that they see.
    """
    assert_same_decisions(got, want)
    ours, theirs = got.opt.state_dict()["state"], want.opt.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    lr = float(want.opt.param_groups[0]["lr"])
    for i, (p, q) in enumerate(zip(got.params, want.params, strict=True)):
        tolerance = want.t * EPS * (2 * q.detach().double().abs() + 32 * lr)
        assert_close(p, q, tolerance, f"parameter {i}")
        assert p.requires_grad == q.requires_grad
        if i not in theirs:
            continue
        assert ours[i].keys() == theirs[i].keys()
        for key, value in theirs[i].items():
            mine = ours[i][key]
            if key in MOMENTS or key == "max_exp_avg_sq":
                tolerance = 8 * EPS * max(1e-30, 4 * float(value.nan_to_num(0, 0, 0).abs().sum()))
                assert_close(mine, value, tolerance, f"{key} of {i}")
                assert mine.dtype == value.dtype and mine.stride() == value.stride()
            elif isinstance(value, torch.Tensor):  # step, prev_grad
                assert torch.equal(mine.cpu(), value.cpu()), f"{key} of {i}"
            elif key != "grades_prev_step" or theirs[i]["grades_decided_at"] < 0:
                assert mine == pytest.approx(value, rel=1e-5, nan_ok=True), f"{key} of {i}"


def assert_same_bits(got, want):
    """Two runs, or the snapshots of runs, agree in every bit."""
    got, want = (snapshot(x.opt) if isinstance(x, Run) else x for x in (got, want))
    harness.assert_same(got, want)


def compare(n=8, watch=False, shapes=SHAPES, act=None, **options):
    """Both runs over `n` steps; with `watch` they are compared, and so read back, after each.

    `act(run)` gives the gradients of the next step, or None for the usual ones.
    """
    ours, theirs = (start(fused, shapes, **copy.deepcopy(options)) for fused in (True, False))
    for _ in range(n):
        for run in (ours, theirs):
            grads = act(run) if act else None
            run.step(*(usual(run) if grads is None else grads))
        if watch:
            assert_same(ours, theirs)
    assert_same(ours, theirs)
    return ours


def mixed_dtypes(params, dtypes):
    return [torch.nn.Parameter(p.detach().to(d)) for p, d in zip(params, dtypes, strict=True)]


def scaled_step(run, scale=1024.0, found=0.0, grads=None, with_scale=True):
    """One step as GradScaler takes it with an optimizer that unscales by itself."""
    grads = usual(run) if grads is None else grads
    if with_scale:
        run.opt.grad_scale = torch.full((), scale, device=DEVICE)
    is_number = isinstance(found, int)  # as GradScaler passes it where no tensor has a gradient
    run.opt.found_inf = found if is_number else torch.full((), found, device=DEVICE)
    run.step(*(None if g is None else g * scale for g in grads))
    run.opt.grad_scale = run.opt.found_inf = None
    if found:
        run.t -= 1


def low_precision_runs(dtype, grad_dtype, n=4, **options):
    """Triton and the reference in `dtype`, and the reference in fp32 on the same numbers."""
    options = {"shapes": ((17, 23), (1, 1025)), "tau": 0.0, "grace_steps": 1, **options}
    runs = start(True, dtype=dtype, **options), start(False, dtype=dtype, **options)
    exact = start(False, **options)
    for p, q in zip(exact.params, runs[0].params, strict=True):
        p.data.copy_(q)
    for run in runs:
        for p in run.params if grad_dtype != dtype else ():
            p.grad_dtype = grad_dtype
    for _ in range(n):
        grads = [g.to(grad_dtype) for g in usual(exact)]
        for run in runs:
            run.step(*(g.clone() for g in grads))
        exact.step(*(g.float() for g in grads))
    return *runs, exact
