"""GradESAdamW keeps every promise that torch.optim.AdamW makes to the code around it.

Schedulers, GradScaler, checkpoint tools, the compiler and distributed wrappers rely on far more of
an optimizer than its arithmetic. Each test here checks one such promise and names the torch source
that makes it or relies on it. Where torch ships test inputs of its own
(torch/testing/_internal/common_optimizers.py), these drive the tests, so that a new torch version
adds cases. The bits of the result are in test_adamw_parity.py.
"""

import copy
import functools
import gc
import inspect
import io
import math
import pickle
import sys
import types
import warnings

import pytest
import torch
from test_public_api import OWN_OPTIONS
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_inputs import ADAMW, common_optimizers, needs_torch_inputs

from grades_kernels import GradESAdamW

FREEZES_AT_3 = {"tau": 1e9, "grace_steps": 2}
WATCHES = {"tau": 0.0, "grace_steps": 0}
MONITORING = {"unmonitored": {}, "watched": WATCHES, "freezing": FREEZES_AT_3}
monitored_or_not = pytest.mark.parametrize("own", MONITORING.values(), ids=MONITORING)

reference = functools.partial(GradESAdamW, fused=False)


def parameters(*shapes, dtype=torch.float32, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes or ((4, 3), (5,))
    ]


def set_gradients(params: list[Tensor], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def train(optimizer: Optimizer, steps: int = 1, first: int = 0) -> Optimizer:
    for seed in range(first, first + steps):
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()
    return optimizer


def values(optimizer: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


# Constructor -----------------------------------------------------------------------------------


def test_signature_begins_as_adamw():
    """adamw.py: AdamW's arguments come first: same names, order, kinds and defaults."""
    expected = list(inspect.signature(AdamW).parameters.values())
    actual = list(inspect.signature(GradESAdamW).parameters.values())[: len(expected)]
    assert [(p.name, p.kind, p.default) for p in actual] == [
        (p.name, p.kind, p.default) for p in expected
    ]


def test_own_arguments_are_keyword_only():
    """Own arguments follow AdamW's and are keyword-only, so that none can shadow a later one."""
    mine = list(inspect.signature(GradESAdamW).parameters.values())
    mine = mine[len(inspect.signature(AdamW).parameters) :]
    assert {p.name: p.default for p in mine} == OWN_OPTIONS
    assert {p.kind for p in mine} == {inspect.Parameter.KEYWORD_ONLY}


def test_positional_arguments():
    """adamw.py: lr, betas, eps, weight_decay and amsgrad may be positional, in this order."""
    positional = (0.1, (0.5, 0.6), 1e-3, 0.2, True)
    ours, theirs = GradESAdamW(parameters(), *positional), AdamW(parameters(), *positional)
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert ours.defaults[key] == theirs.defaults[key]


def test_is_an_adamw():
    """isinstance checks (frameworks, LR finders) see an AdamW."""
    assert isinstance(GradESAdamW(parameters()), AdamW)


ERROR_INPUTS = {}
if ADAMW is not None:
    ERROR_INPUTS = {
        f"{i}-{case.optimizer_error_input.desc}": case
        for i, case in enumerate(ADAMW.optim_error_inputs_func(device="cpu", dtype=torch.float32))
    }


def check_error_input(case, device: str) -> None:
    sample = copy.deepcopy(case.optimizer_error_input)
    params = sample.params if sample.params is not None else parameters(device=device)
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            GradESAdamW(params, **sample.kwargs)
    elif case.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(case.error_type, match=case.error_regex):
            GradESAdamW(params, **sample.kwargs)
    else:
        optimizer = GradESAdamW(params, **sample.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            train(optimizer)


@needs_torch_inputs
@pytest.mark.parametrize("case", ERROR_INPUTS.values(), ids=ERROR_INPUTS)
def test_torch_error_inputs(case):
    """common_optimizers.py: what AdamW refuses is refused with the same type and message."""
    check_error_input(case, "cpu")


@needs_torch_inputs
@pytest.mark.gpu
def test_torch_error_inputs_on_cuda():
    """common_optimizers.py: the error inputs that need a CUDA device."""
    cases = ADAMW.optim_error_inputs_func(device="cuda", dtype=torch.float32)
    assert cases
    for case in cases:
        check_error_input(case, "cuda")


@needs_torch_inputs
@pytest.mark.gpu
def test_torch_sample_inputs_on_cuda():
    """common_optimizers.py: the configurations for CUDA (capturable) train as AdamW does."""
    for sample in ADAMW.optim_inputs_func(device="cuda", dtype=torch.float32):
        ours = reference(parameters(device="cuda"), **copy.deepcopy(sample.kwargs))
        theirs = AdamW(parameters(device="cuda"), foreach=False, **copy.deepcopy(sample.kwargs))
        assert_equal(values(train(ours, 4)), values(train(theirs, 4)))


BAD_VALUES = {
    "lr": ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    "lr-nan": ({"lr": math.nan}, "Invalid learning rate: nan"),
    "eps": ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    "beta1": ({"betas": (-0.1, 0.9)}, "Invalid beta parameter at index 0: -0.1"),
    "beta2": ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    "weight_decay": ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    "lr-tensor-size": ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    "beta-tensor-size": (
        {"betas": (torch.full((2,), 0.9), torch.tensor(0.9))},
        None,  # torch compares before it counts, so the message is Python's own
    ),
}


@pytest.mark.parametrize("kwargs, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_value_errors(kwargs, message):
    """adam.py: values out of range are refused with torch's own words."""
    errors = []
    for cls in (AdamW, GradESAdamW):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            cls(parameters(), **kwargs)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert message is None or errors[1][1] == message


def test_tensor_lr_and_betas_are_taken():
    """adam.py: lr and betas may be one-element tensors; betas are squeezed, lr is kept."""
    lr, beta1, beta2 = torch.tensor([0.01]), torch.full((1, 1), 0.8), torch.full((1,), 0.9)
    optimizer = GradESAdamW(parameters(), lr=lr, betas=(beta1, beta2))
    assert optimizer.param_groups[0]["lr"] is lr
    assert [beta.shape for beta in optimizer.param_groups[0]["betas"]] == [(), ()]
    train(optimizer)


def test_tensor_lr_with_foreach_in_a_group_is_refused():
    """adam.py: a group that combines a tensor lr with foreach raises in step()."""
    params = parameters()
    groups = [{"params": params, "lr": torch.tensor(0.1), "foreach": True}]
    optimizer = reference(groups)
    before = values(optimizer)
    with pytest.raises(RuntimeError, match="lr as a Tensor is not supported"):
        train(optimizer)
    assert_equal(values(optimizer), before)


@monitored_or_not
def test_defaults_hold_adamws_keys(own):
    """adam.py: `defaults` has AdamW's keys and values, and only tau and statistic of ours."""
    ours, theirs = reference(parameters(), **own).defaults, AdamW(parameters(), fused=False)
    assert {k: v for k, v in ours.items() if k not in ("tau", "statistic")} == theirs.defaults
    assert ours.keys() - theirs.defaults.keys() == {"tau", "statistic"}
    assert ours["tau"] == own.get("tau")
    assert ours["statistic"] == "change"


def test_groups_hold_no_more_than_defaults():
    """A wrapper that copies group keys one by one meets no key that `defaults` lacks."""
    optimizer = train(reference(parameters(), **FREEZES_AT_3), 4)
    assert optimizer.param_groups[0].keys() == {"params", *optimizer.defaults}


@pytest.mark.parametrize("flag", ["differentiable", "foreach"])
def test_fused_excludes_differentiable_and_foreach(flag):
    """adam.py: fused=True with differentiable or foreach is torch's RuntimeError."""
    messages = []
    for cls in (AdamW, GradESAdamW):
        with pytest.raises(RuntimeError) as caught:
            cls(parameters(), fused=True, **{flag: True})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def fused_device(request):
    """Devices on which this machine has a fused implementation."""
    try:
        GradESAdamW(parameters(device=request.param), fused=True)
    except RuntimeError as error:
        if request.param == "cuda":
            raise
        pytest.skip(str(error))
    return request.param


def test_fused_where_there_is_none_is_refused():
    """fused=True is a fused implementation or an error that names the argument and a way out."""
    try:
        optimizer = GradESAdamW(parameters(), fused=True)
    except RuntimeError as error:
        assert "fused=True" in str(error)
        assert "fused=None" in str(error) or "fused=False" in str(error)
    else:
        assert optimizer.backend in ("triton", "native")


def test_amp_scaling_flag_follows_fused(fused_device):
    """adam.py: `_step_supports_amp_scaling` is set by fused=True, never otherwise."""
    fused = GradESAdamW(parameters(device=fused_device), fused=True)
    assert fused._step_supports_amp_scaling is True
    assert copy.deepcopy(fused)._step_supports_amp_scaling is True


@pytest.mark.parametrize("fused", [None, False])
def test_no_amp_scaling_flag_without_fused(fused):
    """grad_scaler.py: without the flag GradScaler unscales and skips outside of the optimizer."""
    optimizer = GradESAdamW(parameters(), fused=fused)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    assert not getattr(copy.deepcopy(optimizer), "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("params", [[], (), iter(())], ids=["list", "tuple", "iterator"])
def test_empty_list_is_refused(params):
    """optimizer.py: an empty parameter list is a ValueError."""
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        GradESAdamW(params)


@monitored_or_not
def test_empty_group_is_allowed(own):
    """optimizer.py: an empty group is fine; ZeroRedundancyOptimizer builds such groups."""
    groups = [{"params": []}, {"params": parameters()}]
    assert train(reference(groups, **own), 4).param_groups[0]["params"] == []


def test_only_an_empty_group_is_allowed():
    """zero_redundancy_optimizer.py: a rank may own nothing at all."""
    optimizer = train(GradESAdamW([{"params": []}]), 2)
    assert optimizer.state_dict()["state"] == {}


def test_step_over_no_groups():
    """adam.py: step walks over `param_groups`; with none left it does nothing."""
    optimizer = reference(parameters())
    optimizer.param_groups.clear()
    assert optimizer.step() is None
    optimizer.add_param_group({"params": parameters()})
    train(optimizer)


BAD_PARAMS = {
    "bare-tensor": (lambda: torch.zeros(2, requires_grad=True), TypeError),
    "set": (lambda: [{"params": set(parameters())}], TypeError),
    "not-a-tensor": (lambda: [1.0], TypeError),
    "group-dict-alone": (lambda: {"params": parameters()}, TypeError),
    "non-leaf": (lambda: [parameters()[0] * 2], ValueError),
    "overlap": (lambda: [{"params": p} for p in parameters()[:1] * 2], ValueError),
}


@pytest.mark.parametrize("make, error", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_params_that_adamw_refuses(make, error):
    """optimizer.py: what is no ordered collection of leaf tensors is refused as by AdamW."""
    messages = []
    for cls in (AdamW, GradESAdamW):
        with pytest.raises(error) as caught:
            cls(make())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# What AdamW offers and freezing cannot be combined with ------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: GradESAdamW(parameters(), differentiable=True, **FREEZES_AT_3),
        lambda: GradESAdamW(parameters(), differentiable=True, **WATCHES),
        lambda: GradESAdamW(
            [{"params": parameters(), "tau": 0.1}], differentiable=True, grace_steps=1
        ),
        lambda: GradESAdamW([{"params": parameters(), "differentiable": True}], **FREEZES_AT_3),
        lambda: GradESAdamW(parameters((2, 2)), grace_steps=1).add_param_group(
            {"params": parameters((3, 3)), "tau": 0.1, "differentiable": True}
        ),
    ],
    ids=["both", "observing", "tau-in-group", "differentiable-in-group", "group-added-later"],
)
def test_differentiable_cannot_be_monitored(build):
    """A freeze has no derivative: differentiable=True with tau is an error at construction."""
    with pytest.raises(ValueError, match=r"differentiable.*tau"):
        build()


def test_differentiable_and_monitored_groups_side_by_side():
    """Differentiable training needs no more than tau=None in its own groups."""
    GradESAdamW(
        [{"params": parameters((2, 2))}, {"params": parameters((3, 3)), "tau": None}],
        differentiable=True,
        grace_steps=1,
    )


# Groups and names --------------------------------------------------------------------------------


def test_named_parameters():
    """optimizer.py: (name, tensor) pairs are taken and kept as `param_names`, as given."""
    net = model()
    for params in (
        net.named_parameters(),
        list(net.named_parameters()),
        [{"params": net.named_parameters()}],
    ):
        optimizer = GradESAdamW(params)
        (group,) = optimizer.param_groups
        assert group["param_names"] == [name for name, _ in net.named_parameters()]
        assert all(p is q for p, q in zip(group["params"], net.parameters(), strict=True))
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == group["param_names"]


def test_generator_of_tensors():
    """optimizer.py: any iterable of tensors will do."""
    net = model()
    assert len(GradESAdamW(net.parameters()).param_groups[0]["params"]) == 4


def test_named_and_unnamed_groups_do_not_mix():
    """optimizer.py: a nameless group cannot join named ones, and nothing is added then."""
    optimizer = reference(model().named_parameters(), **FREEZES_AT_3)
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1
    train(optimizer, 4)


def test_added_group_gets_the_defaults():
    """optimizer.py: add_param_group works at any time and fills in what is missing."""
    optimizer = train(reference(parameters(), lr=0.3, weight_decay=0.2, **FREEZES_AT_3), 2)
    optimizer.add_param_group({"params": parameters((3, 3))[0], "lr": 0.1})
    group = optimizer.param_groups[1]
    assert group.keys() == optimizer.param_groups[0].keys()
    assert (group["lr"], group["weight_decay"], group["tau"]) == (0.1, 0.2, 1e9)
    assert optimizer.monitored_units == ["group0.param0", "group1.param0"]
    train(optimizer, 1, first=2)
    assert optimizer.frozen_units == ["group0.param0"]


@pytest.mark.parametrize(
    "group, error",
    [(["not a dict"], TypeError), ({"params": [1.0]}, TypeError), ({}, KeyError)],
    ids=["no-dict", "no-tensor", "no-params"],
)
def test_bad_group_is_refused_as_by_adamw(group, error):
    """optimizer.py: add_param_group refuses with torch's error, and nothing is added."""
    for cls in (AdamW, GradESAdamW):
        optimizer = cls(parameters())
        with pytest.raises(error):
            optimizer.add_param_group(copy.deepcopy(group))
        assert len(optimizer.param_groups) == 1


def test_group_with_another_fused_is_refused_at_once():
    """One implementation serves all groups; what differs is refused before anything is added."""
    optimizer = reference(parameters())
    with pytest.raises(ValueError, match="fused"):
        reference([{"params": parameters(), "fused": None}, {"params": parameters()}])
    with pytest.raises(ValueError, match="fused"):
        optimizer.add_param_group({"params": parameters(), "fused": None})
    assert len(optimizer.param_groups) == 1
    train(optimizer)


def test_repr_shows_every_group_value():
    """optimizer.py: repr names the class and the values of every group."""
    text = repr(GradESAdamW(parameters(), lr=0.125, **WATCHES))
    assert text.startswith("GradESAdamW (")
    assert "lr: 0.125" in text
    assert "tau: 0.0" in text


# step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
@monitored_or_not
def test_grad_mode_is_restored(own, enabled):
    """optimizer.py: step runs without recording and puts the caller's grad mode back."""
    optimizer = reference(parameters(), **own)
    with torch.set_grad_enabled(enabled):
        train(optimizer, 4)
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert torch.is_grad_enabled() is enabled
    for p in optimizer.param_groups[0]["params"]:
        assert p.is_leaf
        assert not any(
            value.requires_grad for value in optimizer.state[p].values() if torch.is_tensor(value)
        )


def test_graph_capture_is_checked_first(monkeypatch):
    """adam.py: the graph-capture health check precedes everything, the closure included."""
    name = next(
        name
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
        if hasattr(Optimizer, name)
    )
    calls = []
    monkeypatch.setattr(Optimizer, name, lambda self: calls.append("check"))
    optimizer = GradESAdamW(parameters())
    set_gradients(optimizer.param_groups[0]["params"])
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["check", "closure"]


def test_step_warns_of_nothing():
    """The health check is called by its present name: the older one warns since torch 2.12."""
    optimizer = reference(parameters(), **FREEZES_AT_3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 4)


@monitored_or_not
def test_closure(own):
    """adam.py: a closure runs once per step with grad enabled; step returns what it returns."""
    net = model()
    optimizer = reference(net.parameters(), **own)
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().sum()
        loss.backward()
        closure.loss = loss
        return loss

    with torch.no_grad():
        for _ in range(3):
            assert optimizer.step(closure) is closure.loss
    assert modes == [True] * 3
    assert optimizer.step() is None
    assert optimizer.step(closure=closure) is closure.loss


@monitored_or_not
def test_each_hook_runs_once(own):
    """optimizer.py: instance and global hooks run once per step, in torch's order."""
    optimizer = reference(parameters(), **own)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
    ]
    try:
        train(optimizer, 4)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global before", "before", "after", "global after"] * 4
    train(optimizer, 1, first=4)
    assert len(calls) == 16


def test_hooks_see_the_gradients_of_the_step():
    """A post hook that logs gradients finds them, also those of a unit that has just frozen."""
    optimizer = reference(parameters(), **FREEZES_AT_3)
    missing = []
    optimizer.register_step_post_hook(
        lambda opt, *_: missing.append(sum(p.grad is None for p in opt.param_groups[0]["params"]))
    )
    train(optimizer, 3)
    assert optimizer.frozen_units == ["group0.param0"]
    assert missing == [0, 0, 0]


def test_pre_hook_may_replace_the_arguments():
    """optimizer.py: a pre-hook may return new (args, kwargs)."""
    optimizer = GradESAdamW(parameters())
    set_gradients(optimizer.param_groups[0]["params"])
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: "replaced"), {}))
    assert optimizer.step(lambda: "given") == "replaced"


def test_subclass_of_ours_is_hooked_once():
    """optimizer.py: torch patches the class that defines step; a subclass adds no second call."""

    class Mine(GradESAdamW):
        pass

    calls = []
    optimizer = Mine(parameters(), fused=False)
    optimizer.register_step_post_hook(lambda *_: calls.append(None))
    train(optimizer, 2)
    assert len(calls) == 2
    assert GradESAdamW.step.hooked is True
    assert "step" not in vars(optimizer)


def test_profiler_names_the_step():
    """optimizer.py: profiles show Optimizer.step#GradESAdamW.step and its zero_grad, once each."""
    optimizer = train(GradESAdamW(parameters()))
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#GradESAdamW.step") == 1
    assert names.count("Optimizer.zero_grad#GradESAdamW.zero_grad") == 1
    assert not any("#AdamW" in name for name in names)


@monitored_or_not
def test_tensor_without_gradient_is_skipped(own):
    """adam.py: no gradient means no decay, no state and no step counted."""
    params = parameters((4, 3), (5,), (2, 2))
    optimizer = reference(params, weight_decay=0.5, **own)
    before = params[0].detach().clone()
    for seed in range(4):
        set_gradients(params, seed)
        params[0].grad = None
        if seed == 2:
            params[1].grad = None
        optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    assert optimizer.state[params[1]]["step"] == 3


def test_sparse_gradient_is_refused():
    """adam.py: a sparse gradient is torch's RuntimeError; nothing has changed then."""
    params = parameters()
    optimizer = reference(params, **WATCHES)
    train(optimizer, 2)
    before, state = values(optimizer), copy.deepcopy(optimizer.state_dict())
    set_gradients(params)
    params[1].grad = torch.sparse_coo_tensor([[1]], [1.0], (5,), check_invariants=True)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients, please cons"):
        optimizer.step()
    assert_equal(values(optimizer), before)
    assert repr(optimizer.state_dict()) == repr(state)


def test_state_is_made_on_the_first_step():
    """adam.py: state is lazy; `step` is a 0-dim float32 tensor on the CPU."""
    params = parameters()
    optimizer = GradESAdamW(params, fused=False)
    assert len(optimizer.state) == 0
    train(optimizer)
    step = optimizer.state[params[0]]["step"]
    assert (step.dtype, step.device.type, step.dim(), step.item()) == (torch.float32, "cpu", 0, 1)


def test_step_count_under_float64_default():
    """optimizer.py: under a float64 default dtype the step count is float64."""
    torch.set_default_dtype(torch.float64)
    try:
        params = parameters()
        train(reference(params))
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = reference(params)
    train(optimizer)
    assert optimizer.state[params[0]]["step"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moments_take_dtype_and_layout_of_the_parameter(dtype):
    """adam.py: moments are zeros_like(preserve_format): the parameter's dtype and strides."""
    params = [
        parameters((2, 3, 4, 5), dtype=dtype)[0]
        .detach()
        .to(memory_format=torch.channels_last)
        .requires_grad_(),
        parameters((6, 4), dtype=dtype)[0].detach().t().requires_grad_(),
    ]
    optimizer = train(reference(params, amsgrad=True, **WATCHES), 2)
    for p in params:
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            moment = optimizer.state[p][key]
            assert (moment.dtype, moment.stride()) == (dtype, p.stride())


HAND_COMPUTED = {
    # p = 1, lr = 0.1, weight_decay = 0.1, betas = (0.9, 0.99), eps = 0; gradients 0.5, then -1.
    # Step 1: 1 * 0.99 - 0.1 * (0.05 / 0.1) / sqrt(0.0025 / 0.01)             = 0.89
    # Step 2: 0.89 * 0.99 + 0.1 * (0.055 / 0.19) / sqrt(0.012475 / 0.0199)    = 0.917661
    "adamw": ({}, (0.5, -1.0), (0.89, 0.917661)),
    # The gradient's sign is turned: 0.99 + 0.1, then 1.09 * 0.99 - 0.036561.
    "maximize": ({"maximize": True}, (0.5, -1.0), (1.09, 1.042539)),
    # With g = 0 in step 2: v = 0.002475, its maximum stays 0.0025 before the bias correction:
    # 0.8811 - 0.1 * (0.045 / 0.19) / sqrt(0.0025 / 0.0199)                   = 0.814279
    "amsgrad": ({"amsgrad": True}, (0.5, 0.0), (0.89, 0.814279)),
}


@pytest.mark.parametrize("kwargs, grads, expected", HAND_COMPUTED.values(), ids=HAND_COMPUTED)
def test_order_of_the_arithmetic(kwargs, grads, expected):
    """adam.py: count, decay, moments, bias correction, update; computed by hand for one number."""
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = GradESAdamW(
        [p], lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1, fused=False, **kwargs
    )
    for gradient, value in zip(grads, expected, strict=True):
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert p.item() == pytest.approx(value, abs=5e-7)


def test_complex_state_stays_complex():
    """adam.py: complex tensors are updated as pairs of reals, their state stays complex."""
    params = [torch.randn(3, 2, dtype=torch.complex64, requires_grad=True), *parameters()]
    optimizer = train(reference(params, amsgrad=True, **WATCHES), 3)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert optimizer.state[params[0]][key].dtype == torch.complex64
    assert optimizer.monitored_units == ["group0.param1"]


def test_a_cast_model_finds_the_implementation_that_serves_it():
    """model.to(...) swaps the storage of the very tensors that the optimizer holds."""
    optimizer = GradESAdamW(parameters())
    before = optimizer.backend
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data.to(torch.complex64)
    assert optimizer.backend == "reference"
    set_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = None
        p.data = p.data.real.contiguous()
    assert optimizer.backend == before


@monitored_or_not
def test_one_group_of_many_dtypes(own):
    """adam.py: a group may mix dtypes; every tensor trains in its own."""
    params = [
        parameters(dtype=d)[0] for d in (torch.float64, torch.float32, torch.bfloat16, torch.half)
    ]
    optimizer = train(reference(params, eps=1e-3, **own), 4)
    for p in params:
        assert torch.isfinite(p).all()
        assert optimizer.state[p]["exp_avg"].dtype == p.dtype


@pytest.mark.gpu
@monitored_or_not
def test_one_group_on_many_devices(own):
    """adam.py: a group may mix devices; tensor lr and betas are moved to each."""
    shapes = ((4, 3), (5,), (6, 2))
    mixed = [p.detach().clone().requires_grad_() for p in parameters(*shapes)]
    mixed[2] = mixed[2].detach().cuda().requires_grad_()
    optimizer = train(reference(mixed, lr=torch.tensor(0.1), **own), 5)
    alone = train(reference(parameters(*shapes), lr=torch.tensor(0.1), **own), 5)
    for p, q in zip(values(optimizer), values(alone), strict=True):
        torch.testing.assert_close(p.cpu(), q)
    assert bool(optimizer.freeze_events) is (own is FREEZES_AT_3)


@monitored_or_not
def test_capturable_needs_a_supported_device(own):
    """adam.py: capturable=True on CPU tensors is torch's AssertionError; nothing has changed."""
    optimizer = reference(parameters(), capturable=True, **own)
    before = values(optimizer)
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be"):
        train(optimizer)
    assert_equal(values(optimizer), before)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [{}, WATCHES], ids=["unmonitored", "watched"])
@pytest.mark.parametrize("capturable", [True, False])
def test_step_count_lives_on_the_device_iff_capturable(own, capturable):
    """adam.py: `step` is on the parameter's device with capturable, else on the CPU."""
    params = parameters(device="cuda")
    optimizer = train(reference(params, capturable=capturable, **own), 2)
    assert optimizer.state[params[0]]["step"].is_cuda is capturable


@pytest.mark.gpu
def test_capture_without_capturable_is_refused():
    """optimizer.py: capturing step() in a CUDA graph without capturable=True raises."""
    optimizer = train(reference(parameters(device="cuda")), 2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.gpu
def test_captured_step_replays():
    """adam.py: with capturable=True a captured step replays as eager steps would run."""

    def run(optimizer, replay):
        params = optimizer.param_groups[0]["params"]
        set_gradients(params)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        if replay:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for _ in range(4):
            if replay:
                graph.replay()
            else:
                optimizer.step()
        torch.cuda.synchronize()
        return values(optimizer)

    captured = run(reference(parameters(device="cuda"), capturable=True), replay=True)
    eager = run(AdamW(parameters(device="cuda"), capturable=True, foreach=False), replay=False)
    torch.testing.assert_close(captured, eager)


@monitored_or_not
def test_tensor_lr_is_read_at_every_step(own):
    """lr_scheduler.py: schedulers write into a tensor lr; it is re-read and never replaced."""
    lr = torch.tensor(0.1)
    optimizer = reference(parameters(), lr=lr, weight_decay=0.0, **own)
    train(optimizer, 2)
    lr.fill_(0.0)
    before = values(optimizer)
    train(optimizer, 3, first=2)
    assert_equal(values(optimizer), before)
    assert optimizer.param_groups[0]["lr"] is lr


def test_tensor_lr_after_load():
    """optimizer.py: loading puts a new lr tensor in place of the old, and step follows it."""
    optimizer = train(reference(parameters(), lr=torch.tensor(0.1), weight_decay=0.0))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"].fill_(0.0)
    before = values(optimizer)
    train(optimizer, 1)
    assert_equal(values(optimizer), before)


SCHEDULERS = [
    lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=9, cycle_momentum=True),
    lambda opt: CosineAnnealingLR(opt, 9),
    *(ADAMW.scheduler_inputs[0] if ADAMW else ()),
]


@monitored_or_not
@pytest.mark.parametrize("make_scheduler", SCHEDULERS)
def test_step_is_a_bound_method(own, make_scheduler):
    """lr_scheduler.py: schedulers take `step.__func__` and warn if step was not called first."""
    optimizer = reference(parameters(), lr=0.05, **own)
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__func__ is GradESAdamW.step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make_scheduler(optimizer)
        metrics = (1.0,) if isinstance(scheduler, ReduceLROnPlateau) else ()
        for seed in range(5):
            train(optimizer, 1, first=seed)
            scheduler.step(*metrics)
    assert getattr(optimizer, "_opt_called", True) is True


def test_step_may_be_rebound_on_the_instance():
    """Trainers put a wrapper in place of `optimizer.step`; schedulers still work on top."""
    optimizer = reference(parameters())
    calls, original = [], optimizer.step

    def patched(self, *args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    optimizer.step = types.MethodType(patched, optimizer)
    schedule = StepLR(optimizer, 1)
    train(optimizer, 2)
    schedule.step()
    assert len(calls) == 2


# AMP ---------------------------------------------------------------------------------------------


def test_step_has_no_grad_scaler_parameter():
    """grad_scaler.py: a `grad_scaler` parameter would ask for the deprecated protocol."""
    assert list(inspect.signature(GradESAdamW(parameters()).step).parameters) == ["closure"]


@monitored_or_not
def test_skipped_step_leaves_everything(own):
    """grad_scaler.py: on an overflow step() is not called: nothing moves, nothing is counted."""
    params = parameters()
    optimizer = reference(params, **own)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(optimizer, 2)
    before, state = values(optimizer), copy.deepcopy(optimizer.state_dict())
    scaler.scale(torch.ones(()))
    set_gradients(params, 2)
    params[0].grad[0, 0] = math.inf
    assert scaler.step(optimizer) is None
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_equal(values(optimizer), before)
    assert repr(optimizer.state_dict()) == repr(state)
    train(optimizer, 1, first=2)
    assert bool(optimizer.freeze_events) is (own is FREEZES_AT_3)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_reference_refuses_in_kernel_scaling(name):
    """adam.py: only the fused path reads grad_scale and found_inf; others assert."""
    optimizer = train(reference(parameters(), **WATCHES), 2)
    before = values(optimizer)
    setattr(optimizer, name, torch.ones(()))
    with pytest.raises(AssertionError, match="grad_scale and found_inf"):
        train(optimizer)
    assert_equal(values(optimizer), before)


def scaled_run(cls, device, *, user_unscales, **own):
    """Five steps under GradScaler, the third with an overflow; what is left at the end."""
    params = parameters(device=device)
    optimizer = cls(params, lr=0.1, fused=True, **own)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    kept = []
    for seed in range(5):
        scaler.scale(torch.ones((), device=device))
        set_gradients(params, seed)
        with torch.no_grad():
            for p in params:
                p.grad *= scaler.get_scale()
        if seed == 2:
            params[0].grad[0, 0] = math.inf
        if user_unscales:
            scaler.unscale_(optimizer)
        before = copy.deepcopy([(p, p.grad, optimizer.state[p]) for p in params])
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        if seed == 2:
            after = [(p, p.grad, optimizer.state[p]) for p in params]
            for (p, grad, state), (q, old_grad, old_state) in zip(after, before, strict=True):
                assert_equal([p, grad], [q, old_grad])
                assert_equal(
                    *([s[k] for k in old_state if k in ADAM_STATE] for s in (state, old_state))
                )
        scaler.update()
        kept.append([p.grad.clone() for p in params])
    return values(optimizer), [optimizer.state[p]["step"].item() for p in params], kept


ADAM_STATE = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.mark.parametrize("user_unscales", [False, True], ids=["in-kernel", "after-unscale_"])
@pytest.mark.parametrize("own", [{}, WATCHES], ids=["unmonitored", "watched"])
def test_fused_in_kernel_scaling(fused_device, user_unscales, own):
    """grad_scaler.py, adam.py: the fused path unscales and skips by itself, as AdamW's does.

    After `unscale_` there is no grad_scale but found_inf still counts; an overflow leaves
    parameters, gradients, moments and steps as they were; the unscaled gradient is written back.
    """
    ours = scaled_run(GradESAdamW, fused_device, user_unscales=user_unscales, **own)
    theirs = scaled_run(AdamW, fused_device, user_unscales=user_unscales)
    torch.testing.assert_close(ours, theirs)


def test_fused_found_inf_may_be_a_number(fused_device):
    """grad_scaler.py: with no gradient at all, found_inf is the sum of nothing: the integer 0."""
    optimizer = GradESAdamW(parameters(device=fused_device), fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, 0
    before = values(optimizer)
    optimizer.step()
    assert_equal(values(optimizer), before)


# state_dict and pickling -------------------------------------------------------------------------


def test_state_dict_of_a_fresh_optimizer():
    """Wrappers round-trip the state before the first step: it is empty, and loads."""
    optimizer = reference(model().named_parameters(), **FREEZES_AT_3)
    state_dict = optimizer.state_dict()
    assert state_dict["state"] == {}
    assert state_dict.keys() == {"state", "param_groups"}
    optimizer.load_state_dict(state_dict)
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, 4)
    assert [event.step for event in optimizer.freeze_events] == [3, 3]


@monitored_or_not
def test_state_dict_form(own):
    """optimizer.py: state by position, tensors aliased and not copied, groups with positions."""
    params = parameters()
    optimizer = train(reference(params, amsgrad=True, stop_grad=False, **own), 4)
    state_dict = optimizer.state_dict()
    assert list(state_dict["state"]) == [0, 1]
    assert state_dict["param_groups"][0]["params"] == [0, 1]
    for i, p in enumerate(params):
        for key in ADAM_STATE:
            assert state_dict["state"][i][key] is optimizer.state[p][key]
        for key, value in state_dict["state"][i].items():
            if key not in (*ADAM_STATE, "prev_grad"):
                assert key.startswith("grades_")
                assert isinstance(value, (int, float)), "tensors would be cast on loading"


@monitored_or_not
def test_state_may_be_cleared(own):
    """adam.py: state is lazy, so a warm restart may clear it; what follows starts at step one.

    With the state goes the previous gradient: the next check has nothing to compare with.
    """
    own = own | {"grace_steps": 3} if own else own
    optimizer = train(reference(parameters(), **own), 3)
    fresh = AdamW([p.requires_grad_() for p in values(optimizer)], foreach=False)
    optimizer.state.clear()
    train(optimizer, 1, first=3)
    assert_equal(values(optimizer), values(train(fresh, 1, first=3)))
    assert optimizer.freeze_events == []
    assert all(math.isnan(value) for value in optimizer.statistics().values())


def test_state_of_a_departed_parameter():
    """optimizer.py: state of a tensor that is in no group any more is a KeyError, as in AdamW."""
    for optimizer in (AdamW(parameters()), reference(parameters(), **WATCHES)):
        train(optimizer, 2)
        optimizer.param_groups[0]["params"].pop()
        with pytest.raises(KeyError):
            optimizer.state_dict()


def test_state_dict_hooks():
    """optimizer.py: hooks before and after saving and loading run, and may replace the dict."""
    optimizer = train(reference(parameters(), **FREEZES_AT_3), 4)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("before save"))

    def add_note(opt, state_dict):
        calls.append("after save")
        return {**state_dict, "note": 1}

    optimizer.register_state_dict_post_hook(add_note)
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == 1

    def double_lr(opt, incoming):
        calls.append("before load")
        groups = [{**group, "lr": 2 * group["lr"]} for group in incoming["param_groups"]]
        return {**incoming, "param_groups": groups}

    fresh = reference(parameters(), **FREEZES_AT_3)
    fresh.register_load_state_dict_pre_hook(double_lr)
    frozen_in_post_hook = []
    fresh.register_load_state_dict_post_hook(
        lambda opt: frozen_in_post_hook.extend(opt.frozen_units)
    )
    fresh.load_state_dict(state_dict)
    assert calls == ["before save", "after save", "before load"]
    assert fresh.param_groups[0]["lr"] == 2e-3
    assert frozen_in_post_hook == ["group0.param0"], "a post hook sees the loaded freezes"
    fresh.load_state_dict(state_dict)
    assert calls.count("before load") == 2, "loading leaves no hook behind and removes none"


def test_loading_overrides_group_values():
    """optimizer.py: group values come from the checkpoint, the missing ones from our defaults."""
    saved = train(AdamW(parameters(), lr=0.5, weight_decay=0.25, eps=1e-3)).state_dict()
    optimizer = reference(parameters(), **WATCHES)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.25, 1e-3)
    assert (group["tau"], group["statistic"]) == (0.0, "change")
    assert group["decoupled_weight_decay"] is True


def test_loading_matches_by_position_and_checks_names():
    """optimizer.py loads by position; where both sides have names, they must agree."""
    net = model()
    saved = train(reference(net.named_parameters())).state_dict()
    renamed = [(f"module.{name}", p) for name, p in net.named_parameters()]
    reference(renamed).load_state_dict(saved)
    nameless = reference(net.parameters())
    nameless.load_state_dict(saved)
    assert nameless.param_groups[0]["param_names"] == saved["param_groups"][0]["param_names"]
    named = reference(net.named_parameters())
    named.load_state_dict(train(reference(model().parameters())).state_dict())
    assert named.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    swapped = reference(list(net.named_parameters())[::-1])
    with pytest.raises(ValueError, match=r"0\.weight.*2\.bias|2\.bias.*0\.weight"):
        swapped.load_state_dict(saved)


@pytest.mark.parametrize(
    "groups, message",
    [
        (lambda ps: [{"params": ps[:1]}, {"params": ps[1:]}], "different number of parameter gr"),
        (lambda ps: ps[:1], "doesn't match the size of optimizer's group"),
    ],
    ids=["groups", "size"],
)
def test_checkpoint_of_another_structure_is_refused(groups, message):
    """optimizer.py: another number of groups or tensors is torch's ValueError."""
    saved = train(reference(parameters(), **WATCHES)).state_dict()
    optimizer = reference(groups(parameters()), **WATCHES)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"] == {}


def test_loading_casts_as_torch_does():
    """optimizer.py: moments are cast to the parameter's dtype, `step` and our numbers are not."""
    saved = copy.deepcopy(train(reference(parameters(), **FREEZES_AT_3), 4).state_dict())
    for state in saved["state"].values():
        state["step"].fill_(1001)
        state["grades_t"] = 1001
    params = parameters(dtype=torch.bfloat16)
    optimizer = reference(params, **FREEZES_AT_3)
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert (state["step"].dtype, state["step"].item()) == (torch.float32, 1001)
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["grades_frozen_at"] == 3
    assert type(state["grades_frozen_at"]) is int
    assert optimizer.state_dict()["state"][0]["grades_t"] == 1001


@pytest.mark.gpu
def test_loaded_step_count_follows_the_saved_flag():
    """optimizer.py: the step count is moved to the device iff the saved group is capturable."""
    for capturable in (True, False):
        saved = train(reference(parameters(device="cuda"), capturable=capturable)).state_dict()
        params = parameters(device="cuda")
        optimizer = reference(params)
        optimizer.load_state_dict(saved)
        assert optimizer.state[params[0]]["step"].is_cuda is capturable
        train(optimizer)
        assert optimizer.state[params[0]]["step"] == 2


LATER_KEYS = (
    *("maximize", "foreach", "capturable", "differentiable", "fused"),
    *("decoupled_weight_decay", "amsgrad"),
)


@monitored_or_not
def test_old_checkpoints(own):
    """adam.py: checkpoints without the later keys, with step counts as numbers, still load."""
    expected = train(AdamW(parameters(), foreach=False), 5)
    saved = copy.deepcopy(train(AdamW(parameters(), foreach=False), 2).state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        for key in LATER_KEYS:
            group.pop(key, None)
    params = values(train(AdamW(parameters(), foreach=False), 2))
    optimizer = reference([p.requires_grad_() for p in params], **own | {"grace_steps": 100})
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert torch.is_tensor(optimizer.state[params[0]]["step"])
    assert_equal(values(train(optimizer, 3, first=2)), values(expected))


def test_setstate_fills_in_every_own_key():
    """adam.py: __setstate__ gives groups of an older pickle the keys that they lack."""
    optimizer = train(reference(parameters(), **WATCHES), 2)
    groups = [
        {k: v for k, v in group.items() if k not in ("tau", "statistic", *LATER_KEYS)}
        for group in optimizer.param_groups
    ]
    optimizer.__setstate__({"state": optimizer.state, "param_groups": groups})
    assert optimizer.param_groups[0].keys() == {"params", *optimizer.defaults}
    assert optimizer.param_groups[0]["tau"] == 0.0
    train(optimizer, 1)


def saved_whole(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": saved_whole,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_whole(duplicate):
    """optimizer.py: `__getstate__` drops what it does not know; ours keeps the freezing."""
    optimizer = reference(
        parameters((4, 3), (2, 2), (5,)), total_steps=8, alpha=0.25, tau=5.0, patience=2, cooldown=1
    )
    optimizer.register_freeze_hook(lambda *_: None)  # hooks do not travel: torch's do not either
    train(optimizer, 4)
    twin = duplicate(optimizer)
    assert type(twin) is GradESAdamW
    assert twin.defaults == optimizer.defaults
    for seed in range(4, 8):
        train(optimizer, 1, first=seed)
        train(twin, 1, first=seed)
        assert_equal(values(twin), values(optimizer))
        assert twin.freeze_events == optimizer.freeze_events
        assert repr(twin.statistics()) == repr(optimizer.statistics())
    assert optimizer.freeze_events, "the example must freeze something"
    twin.thaw()
    assert optimizer.freeze_events
    assert not twin.freeze_events
    twin.zero_grad()


@monitored_or_not
def test_checkpoint_loads_with_weights_only(own):
    """torch.load(weights_only=True), the default of torch and trainers, accepts the state."""
    net = model()
    optimizer = train(reference(net.named_parameters(), amsgrad=True, **own), 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = reference(net.named_parameters(), amsgrad=True, **own)
    fresh.load_state_dict(saved)
    assert fresh.freeze_events == optimizer.freeze_events
    assert repr(fresh.state_dict()) == repr(optimizer.state_dict())


# zero_grad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"foreach": True}], ids=["loop", "foreach"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, kwargs):
    """optimizer.py: zero_grad(set_to_none=True) is inspected by trainers; zeroing is in place."""
    parameter = inspect.signature(GradESAdamW.zero_grad).parameters["set_to_none"]
    assert parameter.default is True
    params = parameters()
    optimizer = train(reference(params, **kwargs))
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    for p, grad in zip(params, grads, strict=True):
        assert (p.grad is None) if set_to_none else (p.grad is grad and not grad.any())


def test_frozen_tensor_is_safe_from_stale_gradients():
    """zero_grad(set_to_none=False) leaves zeros: these must not decay what is frozen."""
    params = parameters()
    optimizer = train(reference(params, weight_decay=0.5, stop_grad=False, **FREEZES_AT_3), 3)
    frozen, others = params
    before = frozen.detach().clone(), others.detach().clone()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert torch.equal(frozen, before[0])
    assert not torch.equal(others, before[1])


# Compiler and distributed wrappers ---------------------------------------------------------------


def test_init_group_keeps_torchs_signature():
    """_dynamo/variables/optimizer.py calls `_init_group` by itself, with torch's arguments."""
    assert inspect.signature(GradESAdamW._init_group) == inspect.signature(AdamW._init_group)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


@monitored_or_not
def test_compiled_step(own, fresh_dynamo):
    """torch.compile(optimizer.step) gives the same numbers and the same freezes as eager steps."""
    eager = train(reference(parameters(), lr=0.1, **own), 5)
    optimizer = reference(parameters(), lr=0.1, **own)
    params = optimizer.param_groups[0]["params"]
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(5):
        set_gradients(params, seed)
        step()
    torch.testing.assert_close(values(optimizer), values(eager), rtol=1e-6, atol=1e-7)
    assert [e.step for e in optimizer.freeze_events] == [e.step for e in eager.freeze_events]
    assert optimizer.state[params[1]]["step"] == 5


@pytest.mark.gpu
def test_compiled_step_on_cuda(fresh_dynamo):
    """_dynamo/variables/optimizer.py turns fresh CUDA groups capturable; that must be survived."""
    optimizer = reference(parameters(device="cuda"), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(4):
        set_gradients(optimizer.param_groups[0]["params"], seed)
        step()
    eager = train(AdamW(parameters(device="cuda"), lr=0.1, foreach=False), 4)
    torch.testing.assert_close(values(optimizer), values(eager))


def test_compiled_train_function(fresh_dynamo):
    """A compiled function that calls step() inside works, with a tensor lr that changes."""
    losses = []
    for compiled in (False, True):
        net = model()
        optimizer = reference(net.parameters(), lr=torch.tensor(0.1))

        def update(optimizer=optimizer):
            optimizer.step()

        run = torch.compile(update, backend="eager") if compiled else update
        for epoch in range(4):
            optimizer.zero_grad()
            loss = net(torch.ones(3, 4)).square().sum()
            loss.backward()
            optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + epoch))
            run()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_checkpoint_tools_probe_with_a_dummy_step(flatten):
    """checkpoint/state_dict.py fills empty state by a step with lr 0 and zero gradients.

    That step decides nothing and leaves no trace once the real state is loaded.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, own = model(), {"tau": 1e9, "grace_steps": 4, "patience": 2}
    optimizer = train(reference(net.named_parameters(), lr=0.1, **own), 4)
    optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))

    other = copy.deepcopy(net)
    fresh = reference(other.named_parameters(), lr=0.1, **own)
    before = values(fresh)
    get_optimizer_state_dict(other, fresh, options=options)
    assert_equal(values(fresh), before)
    assert fresh.freeze_events == []
    assert all(math.isnan(value) for value in fresh.statistics().values())
    assert fresh.param_groups[0]["lr"] == 0.1

    set_optimizer_state_dict(other, fresh, saved, options=options)
    train(optimizer, 4, first=4)
    train(fresh, 4, first=4)
    assert_equal(values(fresh), values(optimizer))
    assert fresh.freeze_events == optimizer.freeze_events
    assert [event.step for event in fresh.freeze_events] == [6, 6]


def test_named_optimizer_probe():
    """named_optimizer.py initialises state by a step with zero gradients at the real lr."""
    params = parameters()
    optimizer = reference(params, lr=0.1, weight_decay=0.0, **FREEZES_AT_3 | {"grace_steps": 0})
    before = values(optimizer)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    assert_equal(values(optimizer), before)
    assert optimizer.freeze_events == []


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """A gloo process group with one member, on loopback."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@monitored_or_not
def test_zero_redundancy_optimizer(own, one_process):
    """zero_redundancy_optimizer.py builds us from groups and syncs group values at every step.

    It sorts the tensors of a shard by size, so nameless units are told apart by size here.
    """

    def frozen_sizes(optimizer):
        return sorted((event.step, event.n_elements) for event in optimizer.freeze_events)

    from torch.distributed.optim import ZeroRedundancyOptimizer

    alone = reference(model().parameters(), lr=0.1, **own)
    sharded = ZeroRedundancyOptimizer(
        model().parameters(), optimizer_class=GradESAdamW, lr=0.1, fused=False, **own
    )
    for seed in range(6):
        for optimizer in (alone, sharded):
            train(optimizer, 1, first=seed)
            optimizer.param_groups[0]["lr"] *= 0.9
        assert_equal(values(sharded), values(alone))
    assert isinstance(sharded.optim, GradESAdamW)
    assert frozen_sizes(sharded.optim) == frozen_sizes(alone)
    assert bool(alone.freeze_events) is (own is FREEZES_AT_3)
    sharded.consolidate_state_dict()
    fresh = reference(model().parameters(), lr=0.1, **own)
    fresh.load_state_dict(sharded.state_dict())
    assert fresh.freeze_events == alone.freeze_events


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"amsgrad": True},
        {**FREEZES_AT_3},
        {**FREEZES_AT_3, "statistic": "momentum", "freeze_timing": "next_step"},
    ],
    ids=["adam", "amsgrad", "freezes", "freezes-momentum"],
)
def test_fully_sharded_model(own, one_process):
    """adam.py: state of a DTensor is a DTensor; a sharded model trains as the plain one does.

    Its statistics are those of whole matrices, so it freezes with the plain one too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    alone, sharded = model(), model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    optimizers = [reference(net.named_parameters(), lr=0.1, **own) for net in (alone, sharded)]
    for step in range(4):
        for net, optimizer in zip((alone, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.full((3, 4), 1.0 + step)).square().sum().backward()
            optimizer.step()
    assert_equal([p.full_tensor().detach() for p in sharded.parameters()], values(optimizers[0]))
    states = optimizers[1].state_dict()["state"].values()
    assert all(isinstance(state["exp_avg"], DTensor) for state in states)
    assert optimizers[1].freeze_events == optimizers[0].freeze_events
    assert bool(optimizers[0].freeze_events) is ("tau" in own)


def test_accelerate_wrapper():
    """accelerate round-trips the state when it wraps, and forwards step and zero_grad."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = model()
    optimizer = reference(net.named_parameters(), lr=0.1, **FREEZES_AT_3)
    wrapped_net, wrapped = accelerator.prepare(net, optimizer)
    for seed in range(4):
        wrapped.zero_grad()
        accelerator.backward(wrapped_net(torch.full((3, 4), 1.0 + seed)).square().sum())
        wrapped.step()
    assert [event.step for event in optimizer.freeze_events] == [3, 3]


# Gradients wider than the parameter: refused by AdamW, served here -------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@monitored_or_not
def test_wide_gradients_on_half_precision(own, dtype):
    """AdamW raises on a float32 gradient of a half-precision tensor; here it trains, in float32."""

    def narrow():
        params = parameters(dtype=dtype)
        for p in params:
            p.grad_dtype = None
        return params

    def step_with_float32_gradients(optimizer, params, seed):
        set_gradients(params, seed)
        for p in params:
            p.grad = p.grad.float()
        optimizer.step()

    theirs = narrow()
    with pytest.raises(RuntimeError):
        step_with_float32_gradients(AdamW(theirs), theirs, 0)
    params, wide = narrow(), [p.detach().float().requires_grad_() for p in parameters(dtype=dtype)]
    hyper = {"lr": 0.1, "eps": 1e-3}
    optimizer, expected = reference(params, **hyper, **own), AdamW(wide, foreach=False, **hyper)
    for seed in range(3):
        step_with_float32_gradients(optimizer, params, seed)
        step_with_float32_gradients(expected, wide, seed)
        if not optimizer.freeze_events:
            for p, q in zip(params, wide, strict=True):
                torch.testing.assert_close(p.float(), q, rtol=3e-2, atol=3e-2)
    state = optimizer.state[params[0]]
    assert state["exp_avg"].dtype == dtype
    assert bool(optimizer.freeze_events) is (own is FREEZES_AT_3)


# Negative controls -------------------------------------------------------------------------------


def test_hook_test_sees_a_step_that_calls_its_parent():
    """A step that calls super().step() runs every hook twice; the hook tests would see it."""

    class CallsParent(GradESAdamW):
        def step(self, closure=None):
            return super().step(closure)

    calls = []
    optimizer = CallsParent(parameters(), fused=False)
    optimizer.register_step_post_hook(lambda *_: calls.append(None))
    train(optimizer, 1)
    assert len(calls) == 2


def test_error_input_check_sees_a_silent_optimizer(monkeypatch):
    """If the constructor accepted everything, every error input of torch would fail its test."""

    class Silent:
        def __init__(self, params, **kwargs):
            pass

    monkeypatch.setitem(globals(), "GradESAdamW", Silent)
    for case in ERROR_INPUTS.values():
        with pytest.raises(pytest.fail.Exception):
            check_error_input(case, "cpu")


def test_signature_test_sees_a_moved_argument(monkeypatch):
    """Other defaults or another order are seen."""

    class Moved(AdamW):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2, eps=1e-8):
            pass

    monkeypatch.setitem(globals(), "GradESAdamW", Moved)
    with pytest.raises(AssertionError):
        test_signature_begins_as_adamw()


def test_hand_computed_numbers_see_plain_adam(monkeypatch):
    """Adam with coupled decay does not reproduce the numbers."""

    def coupled(params, *, fused, **kwargs):
        return torch.optim.Adam(params, **kwargs)

    monkeypatch.setitem(globals(), "GradESAdamW", coupled)
    with pytest.raises(AssertionError):
        test_order_of_the_arithmetic(*HAND_COMPUTED["adamw"])
