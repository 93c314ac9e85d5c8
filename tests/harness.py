"""Shared by the tests: parameters, gradients, runs that step them, and exact comparisons.

Everything works on each implementation (`fused` False, None or True), dtype and device.
"""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grades_kernels import GradESAdamW
from grades_kernels.freezing.config import TIMINGS
from grades_kernels.freezing.table import STATISTICS

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [
    (statistic, timing)
    for statistic in STATISTICS
    for timing in TIMINGS
    if (statistic, timing) != ("weight_change", "same_step")
]
"""Every statistic with every timing that it allows."""

HYPER = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
# Under `fading_gradient` the small matrix freezes first, the large one steps later.
FREEZING = {"tau": 50.0, "grace_steps": 2}
SHAPES = ((17, 23), (3, 5), (7,))


def tensors_of(side):
    """The tensors of an optimizer, a module or a list, in order."""
    if isinstance(side, torch.optim.Optimizer):
        return [p for group in side.param_groups for p in group["params"]]
    return list(side.parameters()) if isinstance(side, nn.Module) else list(side)


def values(side):
    """Copies of the tensors, without their gradients."""
    return [p.detach().clone() for p in tensors_of(side)]


def parameters(*shapes, dtype=torch.float32, device="cpu"):
    """Normally distributed parameters, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes or ((4, 3), (5,))
    ]


def noise(params, seed, scale=1.0):
    """Normally distributed gradients in the dtypes of their parameters, the same for a seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    kinds = [torch.complex128 if p.is_complex() else torch.float64 for p in params]
    drawn = [
        torch.randn(p.shape, generator=generator, dtype=kind) * scale
        for p, kind in zip(params, kinds, strict=True)
    ]
    return [g.to(p) for g, p in zip(drawn, params, strict=True)]


def fading_gradient(t, i, p):
    """The gradient of tensor `i` at step `t`: noise that falls by a third a step.

    Both ends are large, so that a block or an element that is left out shows in every sum. It lies
    in memory as its parameter does.
    """
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + i))
    if p.numel() > 1:
        g.view(-1)[0], g.view(-1)[-1] = 5.0 + i, -7.0 - t
    g = (g * 0.65**t).to(p.device, getattr(p, "grad_dtype", None) or p.dtype)
    return torch.empty_like(p, dtype=g.dtype).copy_(g)


def set_gradients(side, grads):
    """Sets gradients: each is a number (which fills the tensor), a tensor or None."""
    for p, g in zip(tensors_of(side), grads, strict=True):
        p.grad = torch.full_like(p, g) if isinstance(g, int | float) else g


def feed(optimizer, *grads):
    """One step with these gradients (see `set_gradients`)."""
    set_gradients(optimizer, grads)
    optimizer.step()


def set_noise(side, seed=0, scale=1.0):
    """Sets normally distributed gradients (see `noise`)."""
    set_gradients(side, noise(tensors_of(side), seed, scale))


def train(optimizer, steps=1, first=0, scale=1.0):
    """Steps with noise, whose seeds count from `first`."""
    for seed in range(first, first + steps):
        set_noise(optimizer, seed, scale)
        optimizer.step()
    return optimizer


class Run:
    """Parameters, an optimizer over them, and the reports of its freeze hook.

    Args:
        fused: The optimizer's `fused`.
        shapes: Shapes of the parameters that are made, unless `params` are given.
        groups: Turns the parameters into the optimizer's first argument.
        gradient: `gradient(t, i, p)` gives the gradient of tensor `i` at step `t` to `steps`.
        options: Further arguments of GradESAdamW.
    """

    def __init__(
        self,
        fused=False,
        shapes=SHAPES,
        *,
        params=None,
        groups=None,
        dtype=torch.float32,
        device="cpu",
        gradient=fading_gradient,
        **options,
    ):
        self.params = params or parameters(*shapes, dtype=dtype, device=device)
        self.gradient, self.t, self.reported = gradient, 0, []
        given = groups(self.params) if groups else self.params
        self.opt = GradESAdamW(given, fused=fused, **options)
        reported = self.reported  # the hook must not keep the run alive
        self.opt.register_freeze_hook(lambda _, events: reported.extend(e.unit for e in events))

    def step(self, *grads):
        """One step with these gradients (see `set_gradients`)."""
        self.t += 1
        set_gradients(self.params, grads)
        self.opt.step()
        return self

    def steps(self, n, gradient=None):
        """`n` steps with the gradients of `gradient`, by default the run's own."""
        gradient = gradient or self.gradient
        for t in range(self.t + 1, self.t + n + 1):
            self.step(*(gradient(t, i, p) for i, p in enumerate(self.params)))
        return self

    @property
    def events(self):
        return [(e.step, e.unit, e.decided_at, e.n_elements) for e in self.opt.freeze_events]

    @property
    def trainable(self):
        return [p.requires_grad for p in self.params]

    def tensors(self):
        """All tensors that a step may change, by name."""
        found = {f"parameter {i}": p.detach() for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            for key, value in self.opt.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    found[f"{key} of {i}"] = value
        return found


def snapshot(opt):
    """A copy of all that a step may change; `assert_same` compares two of them."""
    saved = opt.state_dict()
    return copy.deepcopy(
        {
            "params": values(opt),
            "state": saved["state"],
            "events": opt.freeze_events,
            "statistics": opt.statistics(),
            "frozen": opt.frozen_units,
            "t": opt.report().step,
        }
    )


def exact(value):
    """Nested values as text and bytes: NaN equals NaN, 0.0 is not -0.0, 1 is not 1.0."""
    if isinstance(value, Tensor):
        value = value.detach().resolve_conj()
        flat = torch.view_as_real(value) if value.is_complex() else value
        raw = flat.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()
        return ("tensor", str(value.dtype), tuple(value.shape), raw)
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, list | tuple):
        return [exact(v) for v in value]
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    return (type(value).__name__, value)


def differences(a, b, path=""):
    """Paths at which two results of `exact` differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        paths = [f"{path}/{k} (one side only)" for k in sorted(a.keys() ^ b.keys(), key=str)]
        for key in a.keys() & b.keys():
            paths += differences(a[key], b[key], f"{path}/{key}")
        return paths
    return [] if a == b else [f"{path}: {str(a)[:150]} != {str(b)[:150]}"]


def assert_same(got, want):
    """Asserts that nested containers of tensors and numbers agree bit for bit."""
    found = differences(exact(got), exact(want))
    assert not found, "\n".join(found)


def assert_same_decisions(got, want, rel=1e-6):
    """Asserts that two runs froze the same units at the same steps and measured the same."""
    assert got.events == want.events
    assert got.opt.all_frozen == want.opt.all_frozen
    assert got.opt.report().step == want.opt.report().step
    close = {"rel": rel, "nan_ok": True}
    for ours, theirs in zip(got.opt.freeze_events, want.opt.freeze_events, strict=True):
        assert ours.tau == theirs.tau
        assert ours.statistic == pytest.approx(theirs.statistic, **close)
    assert got.opt.statistics() == pytest.approx(want.opt.statistics(), **close)
    mine, theirs = dict(got.opt.report().history), dict(want.opt.report().history)
    # Checkpoints carry no history, so it is compared from the first step that both sides have.
    since = max(min(mine, default=math.inf), min(theirs, default=math.inf))
    assert [t for t in mine if t >= since] == [t for t in theirs if t >= since]
    for t in mine.keys() & theirs.keys():
        assert mine[t] == pytest.approx(theirs[t], **close), f"statistics of step {t}"


def error_of(make, *args, **kwargs):
    """The type and message of the error that a call raises."""
    with pytest.raises(Exception) as caught:
        make(*args, **kwargs)
    return caught.type, str(caught.value)


def run_python(*arguments, cwd=None, **environment):
    """The finished process of this interpreter with these arguments, which imports this tree.

    Args:
        environment: Variables that differ from those of this process; None removes one.
    """
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, cwd=cwd, env=environment, **options)
