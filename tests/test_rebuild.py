"""What holds when units and plans are laid out anew in the middle of a run.

A changed statistic, a loaded checkpoint, a copy or an added group makes the optimizer build its
table anew. Contract: nothing that was decided, announced or switched off before may be forgotten by
it, and what follows one step later still follows one step later, on every implementation.
"""

import copy

import pytest
import torch
from torch import nn

from grades_kernels import GradESAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.parametrize("fused", [False, True], ids=["reference", "triton"]),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


class Run:
    """Two 4x4 matrices whose gradients are `scale` everywhere, alternating in sign."""

    def __init__(self, fused, n=2, **options):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(4, 4, device=DEVICE)) for _ in range(n)]
        options = {"tau": 1.0, "grace_steps": 0, "statistic": "norm", **options}
        self.opt = GradESAdamW(self.params, lr=0.1, fused=fused, **options)
        self.told = []
        self.opt.register_freeze_hook(lambda _, events: self.told.extend(e.unit for e in events))

    def step(self, *scales):
        for p, scale in zip(self.params, scales, strict=True):
            p.grad = torch.full_like(p, scale)
        self.opt.step()

    @property
    def trainable(self):
        return [p.requires_grad for p in self.params]


def lay_out_anew(run):
    run.opt._built_for = None  # as if a group had been added, though all is as before


def test_max_frozen_keeps_its_lag(fused):
    """Decided with the others at step 2, without a gradient from the start of step 3."""
    run = Run(fused, max_frozen=0.5, check_every=5)
    run.step(0.01, 1.0)
    lay_out_anew(run)
    run.step(0.01, 1.0)
    assert run.trainable == [False, True]
    run.step(0.01, 1.0)
    assert run.trainable == [False, False]
    assert run.opt.all_frozen
    assert [event.step for event in run.opt.freeze_events] == [1, 2]


@pytest.mark.parametrize("through", ["rebuild", "copy", "attach"])
def test_going_back_before_a_freeze_gives_the_gradient_back(fused, through):
    """A checkpoint from before the freeze makes the matrix trainable, whatever came in between."""
    run = Run(fused)
    run.step(1.0, 1.0)
    before = copy.deepcopy(run.opt.state_dict())
    run.step(0.01, 1.0)
    run.step(0.01, 1.0)
    assert run.trainable == [False, True]
    opt, params = run.opt, run.params
    if through == "rebuild":
        lay_out_anew(run)
    elif through == "copy":
        opt = copy.deepcopy(run.opt)
        params = opt.param_groups[0]["params"]
    else:
        model = nn.ParameterDict({"a": params[0], "b": params[1]})
        opt.attach(model)
    opt.load_state_dict(before)
    assert [p.requires_grad for p in params] == [True, True]
    assert opt.frozen_units == []


def test_hooks_hear_of_every_freeze_once(fused):
    """Also of one that the host learns of only while the table is laid out anew."""
    run = Run(fused)
    run.step(0.01, 1.0)
    lay_out_anew(run)
    run.step(0.01, 1.0)
    run.step(0.01, 0.01)
    assert run.opt.all_frozen or run.opt.frozen_units  # an exact reading tells the rest
    assert run.told == ["group0.param0", "group0.param1"]


def test_a_loaded_freeze_is_no_news(fused):
    """Hooks tell what happens in this run, not what a checkpoint holds."""
    run, resumed = Run(fused), Run(fused)
    run.step(0.01, 1.0)
    run.step(0.01, 1.0)
    resumed.opt.load_state_dict(run.opt.state_dict())
    resumed.step(0.01, 1.0)
    assert resumed.opt.frozen_units == ["group0.param0"]
    assert resumed.told == []


def test_skipped_steps_count_for_nothing_when_all_is_frozen(fused):
    """GradScaler's found_inf: neither t nor anything else moves, though there is nothing to do."""
    if not fused:
        pytest.skip("the in-kernel protocol belongs to fused implementations")
    run = Run(True, stop_grad=False)
    run.step(0.01, 0.01)
    run.step(0.01, 0.01)
    assert run.opt.all_frozen
    run.opt.found_inf = torch.ones((), device=DEVICE)
    run.step(0.01, 0.01)
    run.opt.found_inf = torch.zeros((), device=DEVICE)
    run.step(0.01, 0.01)
    assert run.opt.report().step == 3
