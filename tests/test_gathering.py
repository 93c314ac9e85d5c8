"""Tensors are found once and used again, and nobody can tell.

Whatever a user does between two steps to groups, state or gradients, the step after does what an
optimizer does that searches anew in every step; and what was found keeps no memory alive that the
user or a freeze has given up.
"""

import gc
import math
import weakref

import pytest
import torch
from conftest import FUSED
from torch import nn

from grades_kernels import GradESAdamW
from grades_kernels.gathering import GatheringAdamW, Layout

MONITORED = {
    "nothing monitored": {},
    "change": {"tau": 0.0, "grace_steps": 2, "check_every": 2},
    "freezing": {"tau": 16.0, "grace_steps": 3, "stop_grad": False},
}


def replaced_moment(opt, params):
    state = opt.state[params[1]]
    state["exp_avg"] = state["exp_avg"] * 2


def replaced_step(opt, params):
    opt.state[params[1]]["step"] = torch.tensor(7.0)


def cleared_state(opt, params):
    opt.state[params[1]].clear()


def forgotten_tensor(opt, params):
    del opt.state[params[1]]


def other_storage(opt, params):
    params[1].data = params[1].data.clone().mul_(2)


def other_hypers(opt, params):
    opt.param_groups[0].update(lr=0.5, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3, maximize=True)


def tensor_lr(opt, params):
    opt.param_groups[0]["lr"] = torch.tensor(0.25)


def one_without_gradient(opt, params):
    params[1].grad = None


def all_without_gradient(opt, params):
    for p in params:
        p.grad = None


def strided_gradient(opt, params):
    params[1].grad = params[1].grad.t().contiguous().t()


def added_group(opt, params):
    params.append(nn.Parameter(torch.ones(4, 4)))
    opt.add_param_group({"params": params[-1:], "lr": 0.01})


def reloaded(opt, params):
    opt.load_state_dict(opt.state_dict())


def swapped_parameters(opt, params):
    group = opt.param_groups[0]["params"]
    group[0], group[1] = group[1], group[0]


DISTURBANCES = [
    replaced_moment,
    replaced_step,
    cleared_state,
    forgotten_tensor,
    other_storage,
    other_hypers,
    tensor_lr,
    one_without_gradient,
    all_without_gradient,
    strided_gradient,
    added_group,
    reloaded,
    swapped_parameters,
]


class Run:
    """Three 4x4 matrices and a vector; the last one's first gradient comes at step 3."""

    def __init__(self, backend, **options):
        torch.manual_seed(0)
        shapes = [(4, 4), (4, 4), (4, 4), (4,)]
        self.params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.opt = GradESAdamW(self.params, lr=0.1, fused=FUSED[backend], **options)
        self.t = 0

    def backward(self):
        self.t += 1
        torch.manual_seed(self.t)
        for k, p in enumerate(self.params):
            p.grad = torch.randn_like(p) if k != 3 or self.t >= 3 else None

    def steps(self, n):
        for _ in range(n):
            self.backward()
            self.opt.step()

    def result(self):
        tensors = [p.detach().clone() for p in self.params]
        for p in self.params:
            state = self.opt.state.get(p, {})
            tensors += [state[k].clone() for k in sorted(state) if torch.is_tensor(state[k])]
        return tensors, self.opt.freeze_events, list(self.opt._table.history)


def searched_anew(monkeypatch):
    monkeypatch.setattr(GatheringAdamW, "_holds", lambda self, layout: False)


def disturbed(backend, disturb, options):
    run = Run(backend, **options)
    run.steps(4)
    run.backward()
    disturb(run.opt, run.params)
    run.opt.step()
    run.steps(2)
    return run.result()


def assert_same(one, other):
    assert len(one[0]) == len(other[0])
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(one[0], other[0], strict=True))
    assert repr(one[1:]) == repr(other[1:])  # NaN equals NaN


@pytest.mark.parametrize("options", MONITORED.values(), ids=MONITORED)
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_nobody_can_tell(backend, disturb, options, monkeypatch):
    found_once = disturbed(backend, disturb, options)
    searched_anew(monkeypatch)
    assert_same(found_once, disturbed(backend, disturb, options))


@pytest.mark.parametrize("disturb", [replaced_moment, replaced_step, cleared_state])
def test_who_does_not_ask_is_caught(backend, disturb, monkeypatch):
    """Negative control: a layout that holds on to the tensors it found gives other numbers."""
    original, found = Layout.groups, []

    def careless(layout, param_groups, state, **options):
        if not found:
            found.extend(original(layout, param_groups, state, **options))
        return [g._replace(grads=[p.grad for p in g.params]) for g in found]

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "groups", careless)
        wrong = disturbed(backend, disturb, {})
    searched_anew(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(wrong, disturbed(backend, disturb, {}))


def count_searches(monkeypatch):
    searches = []
    original = GatheringAdamW._gather
    monkeypatch.setattr(
        GatheringAdamW, "_gather", lambda self, i: searches.append(i) or original(self, i)
    )
    return searches


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 2),  # at the first step, and when the vector's first gradient comes
        ({"tau": 0.0, "grace_steps": 6}, 3),  # and when prev_grad is first needed
        ({"tau": 0.0, "grace_steps": 6, "statistic": "norm"}, 2),
        ({"tau": 0.0, "grace_steps": 0, "check_every": 3}, 2),
    ],
)
def test_a_search_when_something_is_new(backend, options, expected, monkeypatch):
    searches = count_searches(monkeypatch)
    Run(backend, **options).steps(10)
    assert len(searches) == expected


def test_a_wrong_gradient_is_an_error_in_any_step(backend):
    run = Run(backend)
    run.steps(4)
    before = run.result()
    wrong = torch.ones(2, 8)
    for grad, error in [(wrong, ValueError), (wrong.view(4, 4).to_sparse(), RuntimeError)]:
        run.backward()
        p = run.params[1]
        p.grad = None
        p.data = p.data.view(grad.shape)  # torch checks the shape on assignment
        p.grad = grad
        p.data = p.data.view(4, 4)
        with pytest.raises(error, match="gradient"):
            run.opt.step()
        assert_same(before, run.result())


def alive(tensors):
    gc.collect()
    return [tensor() is not None for tensor in tensors]


def test_gradients_are_not_kept(backend):
    """`zero_grad()` gives their memory back."""
    run = Run(backend)
    run.steps(4)
    grads = [weakref.ref(p.grad) for p in run.params]
    run.opt.zero_grad()
    assert alive(grads) == [False] * 4


@pytest.mark.parametrize("how", ["moved", "cleared"])
def test_state_that_is_moved_away_is_not_kept(backend, how):
    """Frameworks put the optimizer's state elsewhere between two steps, to use the memory."""
    run = Run(backend)
    run.steps(4)
    states = list(run.opt.state.values())
    moments = [weakref.ref(state[key]) for state in states for key in ("exp_avg", "exp_avg_sq")]
    for state in states:
        if how == "moved":
            state.update((key, x.clone()) for key, x in state.items() if torch.is_tensor(x))
    if how == "cleared":
        run.opt.state.clear()
    del states, state
    assert alive(moments) == [False] * 8


def test_what_a_decision_gives_up_is_not_kept(backend):
    """prev_grad with the decision, moments when the gradients stop."""
    run = Run(backend, tau=math.inf, grace_steps=4)
    run.steps(4)
    state = run.opt.state[run.params[0]]
    kept = [weakref.ref(state["prev_grad"]), weakref.ref(state["exp_avg"])]
    assert state["prev_grad"].shape == (4, 4)
    run.steps(1)
    assert len(run.opt.frozen_units) == 3
    assert alive(kept) == [False, True]
    run.opt.apply_freezes()
    assert alive(kept) == [False, False]


def test_a_thawed_matrix_is_measured_again(backend):
    run = Run(backend, tau=math.inf, grace_steps=1, stop_grad=False)
    run.steps(5)
    assert len(run.opt.frozen_units) == 3
    run.opt.thaw()
    run.steps(2)
    assert len(run.opt.frozen_units) == 3


def test_another_matrix_in_place_of_a_frozen_one(backend):
    """Who replaces tensors takes the old one's state away; the new one freezes and is told anew."""
    run = Run(backend, tau=math.inf, grace_steps=1, stop_grad=False)
    told = []
    run.opt.register_freeze_hook(lambda opt, events: told.extend(event.unit for event in events))
    run.steps(2)
    assert len(told) == 3
    del run.opt.state[run.params[1]], told[:]
    run.params[1] = run.opt.param_groups[0]["params"][1] = nn.Parameter(torch.ones(4, 4))
    run.steps(2)
    assert told == ["group0.param1"]
    assert run.opt.state[run.params[1]]["prev_grad"].numel() == 0
