"""A step finds its tensors where the step before found them, with the same result as a new search.

Whatever a user does between two steps to groups, state or gradients, the step after has the result
of an optimizer that searches in every step; and an engine keeps no memory alive that the user or a
release has given up.
"""

import copy
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import FUSED
from harness import Run, assert_same, noise
from torch import nn

from grades_kernels import GradESAdamW, freezer
from grades_kernels.backends import step_tensors
from grades_kernels.backends.step_tensors import Layout

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


def other_order(opt, params):
    params[1].data = params[1].data.t()  # at the same address


def negated_gradient(opt, params):
    params[1].grad = torch._neg_view(params[1].grad)


def gradient_after_none_like_its_strided_moment(opt, params):
    """Without a gradient, a moment in the transposed order stands for it; then a gradient like it.

    The order in which gradients lie is noted in the first step, and must be right in the second.
    """
    grad, state = params[1].grad, opt.state[params[1]]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    params[1].grad = None
    opt.step()
    params[1].grad = grad.t().contiguous().t()


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
    other_order,
    negated_gradient,
    gradient_after_none_like_its_strided_moment,
    added_group,
    reloaded,
    swapped_parameters,
]


def make_run(backend, **options):
    """Three 4x4 matrices and a vector; the vector's first gradient comes at step 3."""

    def gradient(t, i, p):
        return noise([p], 10 * t + i)[0] if i != 3 or t >= 3 else None

    shapes = [(4, 4), (4, 4), (4, 4), (4,)]
    return Run(FUSED[backend], shapes, gradient=gradient, lr=0.1, **options)


def result(run):
    tensors = {name: x.clone() for name, x in run.tensors().items()}
    return tensors, run.opt.freeze_events, run.opt.report().history


def searched_anew(monkeypatch):
    monkeypatch.setattr(Layout, "is_valid", lambda layout, groups, state: False)


def disturbed(backend, disturb, options):
    run = make_run(backend, **options).steps(4)
    step, run.opt.step = run.opt.step, lambda: None
    run.steps(1)  # sets the gradients of a step that has not been taken
    run.opt.step = step
    disturb(run.opt, run.params)
    run.opt.step()
    return result(run.steps(2))


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_a_disturbed_run_equals_one_that_searches_in_every_step(
    backend, disturb, name, monkeypatch
):
    """And one under a torch without guards."""
    found_once = disturbed(backend, disturb, MONITORED[name])
    if name == "freezing":
        with monkeypatch.context() as patch:
            patch.delattr(torch._C._dynamo.guards, "TensorGuards")
            assert_same(found_once, disturbed(backend, disturb, MONITORED[name]))
    searched_anew(monkeypatch)
    assert_same(found_once, disturbed(backend, disturb, MONITORED[name]))


@pytest.mark.parametrize(
    "disturb", [strided_gradient, other_order, gradient_after_none_like_its_strided_moment]
)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_guards_that_never_look_are_noticed(backend, disturb, monkeypatch):
    """Negative control: the Triton kernels walk through memory in the order of the parameter."""
    right = disturbed(backend, disturb, {})
    monkeypatch.setattr(step_tensors, "alike", lambda tensors: lambda *others: True)
    with pytest.raises(AssertionError):
        assert_same(right, disturbed(backend, disturb, {}))


@pytest.mark.parametrize("disturb", [replaced_moment, replaced_step, cleared_state])
def test_a_layout_that_never_looks_again_is_noticed(backend, disturb, monkeypatch):
    """Negative control: using the tensors of the first step forever gives other numbers."""
    original, found = Layout.collect, []

    def careless(layout, groups, state, **options):
        if not found:
            found.append(original(layout, groups, state, **options))
        return found[0]._replace(grads=[p.grad for p in found[0].params])

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "collect", careless)
        patch.setattr(Layout, "is_valid", lambda layout, groups, state: True)
        wrong = disturbed(backend, disturb, {})
    searched_anew(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(wrong, disturbed(backend, disturb, {}))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 2),  # at the first step, and when the vector's first gradient comes
        ({"tau": 0.0, "grace_steps": 6}, 3),  # and when prev_grad is first needed
        ({"tau": 0.0, "grace_steps": 6, "statistic": "norm"}, 2),
        ({"tau": 0.0, "grace_steps": 0, "check_every": 3}, 2),
    ],
)
def test_tensors_are_searched_when_something_is_new(backend, options, expected, monkeypatch):
    searches, original = [], freezer.prepare_state
    monkeypatch.setattr(
        freezer, "prepare_state", lambda *a, **k: searches.append(a) or original(*a, **k)
    )
    make_run(backend, **options).steps(10)
    assert len(searches) == expected


def alive(tensors):
    gc.collect()
    return [tensor() is not None for tensor in tensors]


def test_gradients_give_their_memory_back(backend):
    """After `zero_grad()` no engine refers to them."""
    run = make_run(backend).steps(4)
    grads = [weakref.ref(p.grad) for p in run.params]
    run.opt.zero_grad()
    assert alive(grads) == [False] * 4


@pytest.mark.parametrize("how", ["moved", "cleared"])
def test_state_that_is_moved_away_gives_its_memory_back(backend, how):
    """Frameworks put the optimizer's state elsewhere between two steps, to use the memory."""
    run = make_run(backend).steps(4)
    states = list(run.opt.state.values())
    moments = [weakref.ref(state[key]) for state in states for key in ("exp_avg", "exp_avg_sq")]
    for state in states:
        if how == "moved":
            state.update((key, x.clone()) for key, x in state.items() if torch.is_tensor(x))
    if how == "cleared":
        run.opt.state.clear()
    del states, state
    assert alive(moments) == [False] * 8


def test_a_decision_and_a_release_give_their_memory_back(backend):
    """prev_grad with the decision, moments when the gradients stop."""
    run = make_run(backend, tau=math.inf, grace_steps=4).steps(4)
    state = run.opt.state[run.params[0]]
    kept = [weakref.ref(state["prev_grad"]), weakref.ref(state["exp_avg"])]
    assert state["prev_grad"].shape == (4, 4)
    run.steps(1)
    assert len(run.opt.frozen_units) == 3
    assert alive(kept) == [False, True]
    run.opt.apply_freezes()
    assert alive(kept) == [False, False]


def test_a_matrix_that_replaces_a_frozen_one_is_measured_from_the_start(backend):
    """The old tensor's state is removed with it; the new one freezes, and its hook is called."""
    run = make_run(backend, tau=math.inf, grace_steps=1, stop_grad=False)
    run.steps(2)
    assert len(run.reported) == 3
    del run.opt.state[run.params[1]], run.reported[:]
    run.params[1] = run.opt.param_groups[0]["params"][1] = nn.Parameter(torch.ones(4, 4))
    run.steps(2)
    assert run.reported == ["group0.param1"]
    assert run.opt.state[run.params[1]]["prev_grad"].numel() == 0


@pytest.mark.parametrize("is_saved", [False, True])
def test_hits_do_not_move_to_another_tensor_with_the_state(backend, is_saved):
    """Whether a checkpoint was written meanwhile, which copies them into the state, or not."""
    run = Run(FUSED[backend], [(4, 4)] * 3, tau=3.0, patience=2, statistic="norm", grace_steps=0)
    run.step(0.1, 9.0, 9.0)
    if is_saved:
        run.opt.state_dict()
    run.step(9.0, 9.0, 9.0).step(9.0, 9.0, 9.0)
    old = run.params[0]
    run.params[0] = run.opt.param_groups[0]["params"][0] = nn.Parameter(old.detach().clone())
    run.opt.state[run.params[0]] = run.opt.state.pop(old)
    run.step(0.1, 9.0, 9.0)
    assert run.opt.frozen_units == []
    run.step(0.1, 9.0, 9.0)
    assert run.opt.frozen_units == ["group0.param0"]


def test_a_tensor_that_is_pruned_in_place_counts_the_elements_that_are_left(backend):
    run = Run(
        FUSED[backend], [(4, 4)] * 3, tau=0.3, tau_per="element", statistic="norm", grace_steps=2
    )
    run.step(0.5, 0.5, 0.5).step(0.5, 0.5, 0.5)
    p = run.params[0]
    p.grad, p.data = None, p.data[:2].clone()
    own = run.opt.state[p]
    own.update({key: own[key][:2].clone() for key in ("exp_avg", "exp_avg_sq")})
    run.step(0.5, 0.5, 0.5)
    assert set(run.opt.statistics().values()) == {0.5}
    assert [unit.n_elements for unit in run.opt.report().units] == [p.numel(), 16, 16]


def test_entries_of_a_user_wait_for_the_first_gradient(backend):
    """As in AdamW: state is no sign of moments, and without these there is no step."""
    run = Run(FUSED[backend], [(4, 4)] * 3, tau=None)
    run.step(1.0, None, 1.0)
    run.opt.state[run.params[1]]["slow"] = torch.zeros(3)
    before = run.params[0].detach().clone()
    run.step(1.0, None, 1.0)
    assert not run.params[0].equal(before)
    assert list(run.opt.state[run.params[1]]) == ["slow"]
    with pytest.raises(KeyError, match="exp_avg"):
        run.step(1.0, 1.0, 1.0)


def test_the_state_is_written_when_a_unit_is_decided_and_frozen_and_not_in_between(
    backend, monkeypatch
):
    written = []
    run = Run(FUSED[backend], [(4, 4)] * 3, tau=3.0, statistic="norm", grace_steps=0, cooldown=4)
    real = freezer.checkpoint.write_units
    monkeypatch.setattr(
        freezer.checkpoint, "write_units", lambda *args: (written.append(run.t), real(*args))
    )
    for _ in range(7):
        run.step(0.1, 9.0, 9.0)
    assert run.events == [(5, "group0.param0", 1, 16)]
    assert set(written) <= {1, 2, 5, 6} and {1, 5} <= set(written)


# A list of tensors that changes without its names ---------------------------------------------


def named_run(attached=False, **options):
    """An optimizer with three named tensors, one of them an embedding, after two steps."""
    model = nn.Module()
    model.embed = nn.Embedding(4, 3)
    model.blocks = nn.ModuleList(nn.Linear(3, n, bias=False) for n in (3, 2))
    params = model.parameters() if attached else model.named_parameters()
    opt = GradESAdamW(params, **{"tau": 0.0, "grace_steps": 0, **options})
    if attached:
        opt.attach(model)
    for _ in range(2):
        step_on_noise(opt)
    return opt, opt.param_groups[0]["params"]


def step_on_noise(opt):
    for group in opt.param_groups:
        for p, grad in zip(group["params"], noise(group["params"], opt.report().step), strict=True):
            p.grad = grad
    opt.step()


def tensor_of(opt, unit):
    (members,) = [own for u, own in opt._freezer.unit_map.members.items() if u.name == unit]
    return members


@pytest.mark.parametrize("through", ["a step", "deepcopy", "a checkpoint"])
def test_tensors_keep_their_names_where_one_leaves_the_group(through):
    """As Composer's LayerFreezing takes it out: nothing else becomes a unit of another name."""
    opt, params = named_run()
    del opt.state[params.pop(1)]
    embedding, block = params
    step_on_noise(opt)
    if through == "deepcopy":
        opt, embedding, block = copy.deepcopy((opt, embedding, block))
    if through == "a checkpoint":
        opt.load_state_dict(opt.state_dict())
    step_on_noise(opt)
    assert opt.monitored_units == ["blocks.1.weight"]
    assert tensor_of(opt, "blocks.1.weight") == (block,)
    assert opt.param_groups[0]["param_names"] == ["embed.weight", "blocks.1.weight"]
    assert opt.state[block]["step"] == 4


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("tau", [0.0, None])
def test_a_tensor_that_joins_a_named_group_needs_a_name(tau, attached):
    """As Composer's module surgery appends it behind the others, whose names it would shift."""
    opt, params = named_run(attached, tau=tau)
    del params[1]
    params.append(new := nn.Parameter(torch.ones(3, 3)))
    if tau is None:  # not before the group is monitored
        for _ in range(2):
            step_on_noise(opt)
            params.reverse()
        opt.param_groups[0]["tau"] = 0.0
    way_out = r"attach\(model\)\." if attached else r"attach\(model\), or give .* param_names"
    with pytest.raises(ValueError, match=rf"parameters \[2\] have no name.*{way_out}"):
        step_on_noise(opt)
    names = ["embed.weight", "layers.1.weight", "blocks.0.new.weight"]
    if attached:
        named = zip(names, params, strict=True)
        opt.attach(SimpleNamespace(named_parameters=lambda **_: named))
    else:
        opt.param_groups[0]["param_names"] = names
    step_on_noise(opt)
    assert opt.monitored_units == ["layers.1.weight", "blocks.0.new.weight"]
    assert tensor_of(opt, "blocks.0.new.weight") == (new,)


def test_names_that_are_removed_with_their_tensor_stay_right():
    """Also by changing the very list."""
    opt, params = named_run()
    del opt.state[params.pop(0)], opt.param_groups[0]["param_names"][0]
    step_on_noise(opt)
    assert opt.monitored_units == ["blocks.0.weight", "blocks.1.weight"]
    assert tensor_of(opt, "blocks.1.weight") == (params[1],)


def test_a_tensor_in_the_place_of_another_has_its_name():
    opt, params = named_run()
    params[1] = nn.Parameter(torch.ones(3, 3))
    step_on_noise(opt)
    assert tensor_of(opt, "blocks.0.weight") == (params[1],)


def test_a_checkpoint_is_compared_with_the_names_that_tensors_have_now():
    (saved, _), (opt, params) = named_run(), named_run()
    for own in (saved.param_groups[0]["params"], params):
        own[1], own[2] = own[2], own[1]
    step_on_noise(saved)
    opt.load_state_dict(saved.state_dict())
    step_on_noise(opt)
    assert opt.monitored_units == ["blocks.1.weight", "blocks.0.weight"]
    assert tensor_of(opt, "blocks.1.weight") == (params[1],)


def test_names_of_other_tensors_that_came_with_a_group_are_not_used():
    """ZeroRedundancyOptimizer copies the keys of a group to ranks with a part of its tensors."""
    names = ["embed.weight", "blocks.0.weight"]
    group = {"params": [nn.Parameter(torch.ones(3, 3))], "param_names": names}
    opt = GradESAdamW([group], tau=0.0, grace_steps=0)
    assert opt.monitored_units == ["group0.param0"]


def test_names_that_attach_gave_follow_their_tensors_too():
    opt, params = named_run(attached=True)
    assert opt.monitored_units == ["blocks.0.weight", "blocks.1.weight"]
    params[1], params[2] = params[2], params[1]
    block = params[1]
    step_on_noise(opt)
    opt, block = copy.deepcopy((opt, block))
    assert tensor_of(opt, "blocks.1.weight") == (block,)


@pytest.mark.parametrize("attached", [False, True])
def test_tensors_exchanged_between_groups_keep_their_names(attached):
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("embed", "a", "b", "c")})
    named = list(model.named_parameters())
    pairs = [p for _, p in named] if attached else named
    opt = GradESAdamW(
        [{"params": pairs[:2]}, {"params": pairs[2:]}], tau=1e9, grace_steps=0, statistic="norm"
    )
    if attached:
        opt.attach(model)
    one, other = (group["params"] for group in opt.param_groups)
    one[0], other[0] = other[0], one[0]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert sorted(opt.frozen_units) == ["a.weight", "b.weight", "c.weight"]
    assert opt.state[model["embed"].weight]["exp_avg"].ne(0).all()
