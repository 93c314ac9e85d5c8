"""GradESAdamW has every property of torch.optim.AdamW that the code around it relies on.

Schedulers, GradScaler, checkpoint tools, the compiler and distributed wrappers rely on far more of
an optimizer than its arithmetic. Each test here checks one such property and names the torch source
that gives it or relies on it. Where torch ships test inputs of its own
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
import types
import warnings
from unittest.mock import Mock

import pytest
import torch
from harness import (
    assert_same,
    error_of,
    feed,
    noise,
    parameters,
    set_gradients,
    set_noise,
    snapshot,
    tensors_of,
    train,
    values,
)
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_inputs import ADAMW, common_optimizers, needs_torch_inputs

from grades_kernels import GradESAdamW, grades_adamw
from grades_kernels.backends import native, select, step_tensors
from grades_kernels.backends import reference as reference_backend

OWN_OPTIONS = {
    "tau": None,
    "alpha": 0.5,
    "total_steps": None,
    "grace_steps": None,
    "statistic": "change",
    "tau_per": "unit",
    "check_every": 1,
    "patience": 1,
    "freeze_timing": "same_step",
    "cooldown": 0,
    "max_frozen": 1.0,
    "stop_grad": "auto",
}

FREEZES_AT_3 = {"tau": 1e9, "grace_steps": 2}
OBSERVES = {"tau": 0.0, "grace_steps": 0}
MONITORING = {"unmonitored": {}, "observing": OBSERVES, "freezing": FREEZES_AT_3}
monitored_or_not = pytest.mark.parametrize("own", MONITORING.values(), ids=MONITORING)

reference = functools.partial(GradESAdamW, fused=False)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


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


CPU_ERRORS = ADAMW.optim_error_inputs_func(device="cpu", dtype=torch.float32) if ADAMW else ()
ERROR_INPUTS = {f"{i}-{case.optimizer_error_input.desc}": case for i, case in enumerate(CPU_ERRORS)}


def check_error_input(case, device: str) -> None:
    sample = copy.deepcopy(case.optimizer_error_input)
    params = sample.params if sample.params is not None else parameters(device=device)
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            GradESAdamW(params, **sample.kwargs)
        return
    construction = case.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
    optimizer = None if construction else GradESAdamW(params, **sample.kwargs)
    with pytest.raises(case.error_type, match=case.error_regex):
        GradESAdamW(params, **sample.kwargs) if construction else train(optimizer)


@needs_torch_inputs
@pytest.mark.parametrize("case", ERROR_INPUTS.values(), ids=ERROR_INPUTS)
def test_torch_error_inputs(case):
    """common_optimizers.py: AdamW's errors have the same type and message here."""
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
        assert_same(values(train(ours, 4)), values(train(theirs, 4)))


BAD_VALUES = {
    "lr": {"lr": -1.0},
    "lr-nan": {"lr": math.nan},
    "eps": {"eps": -1e-8},
    "eps-nan": {"eps": math.nan},
    "beta1": {"betas": (-0.1, 0.9)},
    "beta2": {"betas": (0.9, 1.0)},
    "weight_decay": {"weight_decay": -0.1},
    "weight_decay-nan": {"weight_decay": math.nan},
    "lr-tensor-size": {"lr": torch.ones(2)},
    "beta-tensor-size": {"betas": (torch.full((2,), 0.9), torch.tensor(0.9))},
    "fused-differentiable": {"fused": True, "differentiable": True},
    "fused-foreach": {"fused": True, "foreach": True},
}


@pytest.mark.parametrize("kwargs", BAD_VALUES.values(), ids=BAD_VALUES)
def test_value_errors(kwargs):
    """adam.py: values out of range and flags that exclude each other are refused as by AdamW."""
    theirs, ours = (error_of(cls, parameters(), **kwargs) for cls in (AdamW, GradESAdamW))
    assert ours == theirs
    assert issubclass(ours[0], (ValueError, RuntimeError))


NEEDS_FUSED = ({}, AssertionError, "grad_scale and found_inf")
NO_CAPTURE = (AssertionError, "If capturable=True, params and state_steps must be")
REFUSED_STEPS = {
    "tensor-lr-with-foreach": (
        {"lr": torch.tensor(0.1), "foreach": True},
        RuntimeError,
        "lr as a Tensor is not supported",
    ),
    **{f"capturable-{m}": ({"capturable": True, **o}, *NO_CAPTURE) for m, o in MONITORING.items()},
    "grad_scale": NEEDS_FUSED,
    "found_inf": NEEDS_FUSED,
}


@pytest.mark.parametrize("name", REFUSED_STEPS)
def test_a_refused_step_changes_nothing(name):
    """adam.py: AdamW's errors in step(); only the fused path reads grad_scale, found_inf."""
    given, error, message = REFUSED_STEPS[name]
    group = {k: v for k, v in given.items() if k in ("lr", "foreach")}
    own = {k: v for k, v in given.items() if k not in group} if given else OBSERVES
    optimizer = reference([{"params": parameters(), **group}], **own)
    if not given:
        setattr(train(optimizer, 2), name, torch.ones(()))
    before = values(optimizer)
    with pytest.raises(error, match=message):
        train(optimizer)
    assert_same(values(optimizer), before)


@monitored_or_not
def test_defaults_have_adamws_keys(own):
    """adam.py: `defaults` has AdamW's keys and values, and only tau and statistic of ours."""
    ours, theirs = reference(parameters(), **own).defaults, AdamW(parameters(), fused=False)
    assert {k: v for k, v in ours.items() if k not in ("tau", "statistic")} == theirs.defaults
    assert ours.keys() - theirs.defaults.keys() == {"tau", "statistic"}
    assert ours["tau"] == own.get("tau")
    assert ours["statistic"] == "change"


def test_groups_have_no_more_than_defaults():
    """A wrapper that copies group keys one by one finds no key that `defaults` lacks."""
    optimizer = train(reference(parameters(), **FREEZES_AT_3), 4)
    assert optimizer.param_groups[0].keys() == {"params", *optimizer.defaults}


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


def test_amp_scaling_flag_is_set_by_fused(fused_device):
    """adam.py: `_step_supports_amp_scaling` is an attribute of a copy too."""
    optimizer = GradESAdamW(parameters(device=fused_device), fused=True)
    assert all(x._step_supports_amp_scaling is True for x in (optimizer, copy.deepcopy(optimizer)))


@pytest.mark.parametrize(("fused", "of_group"), [(None, None), (False, False), (None, True),
                                                 (True, False)])  # fmt: skip
def test_no_amp_scaling_flag_unless_every_group_is_fused(fused, of_group, fused_device):
    """grad_scaler.py: without the flag GradScaler unscales and skips outside of the optimizer."""
    groups = [{"params": parameters(device=fused_device)}]
    groups.append({"params": parameters(device=fused_device), "fused": of_group})
    optimizer = GradESAdamW(groups, fused=fused)
    for one in (optimizer, copy.deepcopy(optimizer)):
        assert not getattr(one, "_step_supports_amp_scaling", False)


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
    "empty-list": (list, ValueError),
    "empty-tuple": (tuple, ValueError),
    "empty-iterator": (lambda: iter(()), ValueError),
}


@pytest.mark.parametrize("make, error", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_params_that_adamw_refuses(make, error):
    """optimizer.py: all but an ordered collection of leaf tensors is refused as by AdamW."""
    theirs, ours = (error_of(cls, make()) for cls in (AdamW, GradESAdamW))
    assert ours == theirs
    assert ours[0] is error


BOTH = {"tau": 0.1, "differentiable": True}


@pytest.mark.parametrize(
    "build",
    [
        lambda: GradESAdamW(parameters(), differentiable=True, **FREEZES_AT_3),
        lambda: GradESAdamW(parameters(), differentiable=True, **OBSERVES),
        lambda: GradESAdamW([{"params": parameters(), **BOTH}], grace_steps=1),
        lambda: GradESAdamW([{"params": parameters(), "differentiable": True}], **FREEZES_AT_3),
        lambda: GradESAdamW(parameters((2, 2)), grace_steps=1).add_param_group(
            {"params": parameters((3, 3)), **BOTH}
        ),
    ],
    ids=["both", "observing", "in-a-group", "differentiable-in-group", "group-added-later"],
)
def test_differentiable_cannot_be_monitored(build):
    """A freeze has no derivative: differentiable=True with tau is an error at construction."""
    with pytest.raises(ValueError, match=r"differentiable.*tau"):
        build()


def test_differentiable_and_monitored_groups_side_by_side():
    """Differentiable training needs no more than tau=None in its own groups."""
    groups = [{"params": parameters((2, 2))}, {"params": parameters((3, 3)), "tau": None}]
    GradESAdamW(groups, differentiable=True, grace_steps=1)


def test_named_parameters():
    """optimizer.py: (name, tensor) pairs are taken and kept as `param_names`, as given."""
    net = model()
    pairs = list(net.named_parameters())
    for params in (net.named_parameters(), pairs, [{"params": net.named_parameters()}]):
        optimizer = GradESAdamW(params)
        (group,) = optimizer.param_groups
        assert group["param_names"] == [name for name, _ in pairs]
        assert all(p is q for p, q in zip(group["params"], net.parameters(), strict=True))
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == group["param_names"]
    assert len(tensors_of(GradESAdamW(net.parameters()))) == 4, "a generator of tensors"


def test_named_and_unnamed_groups_do_not_mix():
    """optimizer.py: a nameless group cannot join named ones, and nothing is added then."""
    optimizer = reference(model().named_parameters(), **FREEZES_AT_3)
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1
    train(optimizer, 4)


def test_added_group_gets_the_defaults():
    """optimizer.py: add_param_group works at any time and fills in missing options."""
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


ASKED = {f"reference-native-{mode}": ((False, None), own) for mode, own in MONITORING.items()}
ASKED |= {"triton-reference": ((True, False), {}), "triton-native": ((True, None), {})}
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("asked", "own"), ASKED.values(), ids=ASKED)
def test_each_group_is_served_as_its_fused_asks(asked, own):
    # new behaviour: `fused` may differ between groups
    """adam.py: groups that differ in `fused` each have the result that they would have alone."""
    if True in asked:
        pytest.importorskip("triton")  # which serves fused=True on the CPU too (conftest.py)

    def made():
        return parameters(device=TRITON_DEVICE if True in asked else "cpu")

    optimizer = GradESAdamW([{"params": made(), "fused": fused} for fused in asked], **own)
    for seed in range(4):
        feed(optimizer, *noise(made(), seed) * 2)
    for group in optimizer.param_groups:
        alone = train(GradESAdamW(made(), fused=group["fused"], **own), 4)
        assert_same(values(group["params"]), values(alone))
    assert len(optimizer.freeze_events) == 2 * (own is FREEZES_AT_3)


def test_monitored_groups_that_need_triton_and_the_host_are_refused():
    # new behaviour: `fused` may differ between groups
    """One table of units is served by Triton or by the host: the error names both groups."""
    pytest.importorskip("triton")
    groups = [{"params": parameters(device=TRITON_DEVICE), "fused": f} for f in (True, False)]
    triton, host = groups
    both = r"(?s)(?=.*fused)(?=.*\b0\b)(?=.*\b1\b)"
    with pytest.raises(ValueError, match=both):
        GradESAdamW(groups, **OBSERVES)
    optimizer = GradESAdamW([triton], **OBSERVES)
    with pytest.raises(ValueError, match=both):
        optimizer.add_param_group(dict(host))
    assert len(optimizer.param_groups) == 1
    GradESAdamW([triton, host | {"tau": None}], **OBSERVES)


def test_monitored_groups_that_ask_for_nothing_are_all_served_by_the_host(monkeypatch):
    """Where Triton could serve only some of them, as on a GPU with a float64 matrix."""

    def why_not_triton(params, **rest):
        return None if params[0].dtype == torch.float32 else "the Triton kernels have no float64"

    monkeypatch.setattr(select, "why_not_triton", why_not_triton)
    dtypes = (torch.float32, torch.float64)
    groups = [{"params": parameters(dtype=dtype)} for dtype in dtypes]
    assert GradESAdamW(groups[:1], **OBSERVES).backend == "triton"
    optimizer = GradESAdamW(groups, **OBSERVES)
    assert optimizer.backend == "reference"
    train(optimizer, 2)


@monitored_or_not
def test_fused_accepts_parameters_on_the_meta_device(own):
    # new behaviour: deferred initialisation
    """adam.py: fused=True is accepted before the parameters have memory; step() needs it."""
    optimizer = GradESAdamW(parameters(device="meta"), fused=True, **own)
    with pytest.raises(RuntimeError, match="meta"):
        feed(optimizer, 0.0, 0.0)


class Weight(nn.Parameter):
    """A class for attributes, as frameworks have them."""


class Labelled(torch.Tensor):
    """The same, and the results of torch's operations are of this class too."""


class Logged(torch.Tensor):
    """A class that sees every operation."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), options=None):
        return super().__torch_function__(function, kinds, args, options or {})


def equal_runs(kind, theirs, ours, own):
    """Parameters of a class take the same steps as plain ones; returns their backends."""
    plain = GradESAdamW(parameters(), fused=theirs, **own)
    make = kind if kind is Weight else lambda x: nn.Parameter(x.as_subclass(kind))
    optimizer = GradESAdamW([make(p.detach()) for p in parameters()], fused=ours, **own)
    for one in (plain, optimizer):
        train(one, 5)
    assert {type(p) for p in tensors_of(optimizer)} == {kind}
    assert_same([x.as_subclass(torch.Tensor) for x in values(optimizer)], values(plain))
    assert str(optimizer.statistics()) == str(plain.statistics())
    assert optimizer.freeze_events == plain.freeze_events
    return plain.backend, optimizer.backend


@pytest.mark.parametrize("fused", [None, True], ids=["native", "triton"])
@pytest.mark.parametrize("kind", [Weight, Labelled])
@monitored_or_not
def test_fused_backends_take_parameters_of_a_class_without_operations(own, kind, fused):
    """adam.py: `fused` asks a parameter for its device and dtype, not for its class."""
    backend = "triton" if fused else "native"
    if fused:
        pytest.importorskip("triton")
    assert equal_runs(kind, fused, fused, own) == (backend, backend)


@monitored_or_not
def test_the_reference_takes_parameters_of_a_class_that_sees_every_operation(own):
    assert equal_runs(Logged, False, None, own) == ("reference", "reference")
    with pytest.raises(RuntimeError, match="a tensor subclass"):
        GradESAdamW([nn.Parameter(torch.ones(2, 2).as_subclass(Logged))], fused=True, **own)


def functional_step(*params, **flags):
    columns = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    steps = [torch.zeros(()) for _ in params]
    hyper = {"beta1": 0.9, "beta2": 0.999, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8}
    flags = {"fused": True, "amsgrad": False, "maximize": False, **flags}
    grades_adamw(list(params), *columns, [], steps, **hyper, **flags)


def test_an_unknown_backend_is_not_the_reference():
    with pytest.raises(KeyError, match="mine"):
        select.run_tasks_of(["mine"])


@pytest.mark.parametrize(("capturable", "chosen"), [(True, None), (False, False)])
def test_torch_chooses_the_implementation_of_a_captured_step(capturable, chosen, monkeypatch):
    """adam.py: with foreach and fused at None, else one tensor after the other."""
    monkeypatch.setattr(step_tensors, "check_capturable", lambda p: None)  # on the CPU too
    called = Mock()
    monkeypatch.setattr(reference_backend, "adamw", called)
    params = parameters()
    train(GradESAdamW(params, capturable=capturable, fused=None if capturable else False), 1)
    assert [called.call_args.kwargs[name] for name in ("foreach", "fused")] == [chosen, chosen]


def test_functional_form_refuses_capturable_on_the_cpu_as_the_class_does():
    # new behaviour: the functional form chooses its implementation as the class does
    """adam.py: capturable=True on CPU tensors is an AssertionError; here with fused=True too."""
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be"):
        functional_step(torch.zeros(2, 2), capturable=True)


def test_functional_form_refuses_fused_on_several_devices(monkeypatch):
    """It never falls back to the reference silently; meta stands for a second device here."""
    monkeypatch.setattr("grades_kernels.functional.choose", lambda *a, **k: "triton")
    with pytest.raises(RuntimeError, match=r"fused=True.*several devices.*meta"):
        functional_step(torch.ones(2), torch.ones(2, device="meta"))


def test_repr_shows_every_group_value():
    """optimizer.py: repr names the class and the values of every group."""
    text = repr(GradESAdamW(parameters(), lr=0.125, **OBSERVES))
    assert text.startswith("GradESAdamW (")
    assert "lr: 0.125" in text and "tau: 0.0" in text


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
    for p in tensors_of(optimizer):
        assert p.is_leaf
        assert not any(getattr(x, "requires_grad", False) for x in optimizer.state[p].values())


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
    set_noise(optimizer)
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["check", "closure"]


@monitored_or_not
def test_step_warns_of_nothing(own):
    """The health check is called by its present name: the older one warns since torch 2.12."""
    optimizer = reference(parameters(), **own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 4)


@monitored_or_not
def test_closure(own):
    """adam.py: a closure runs once per step with grad enabled; step returns its result."""
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


@monitored_or_not
def test_pre_hook_may_replace_the_arguments(own):
    """optimizer.py: a pre-hook may return new (args, kwargs)."""
    optimizer = GradESAdamW(parameters(), **own)
    set_noise(optimizer)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: "replaced"), {}))
    assert optimizer.step(lambda: "given") == "replaced"


@monitored_or_not
def test_subclass_of_ours_is_hooked_once(own):
    """optimizer.py: torch patches the class that defines step; a subclass adds no second call."""
    Mine = type("Mine", (GradESAdamW,), {})
    calls = []
    optimizer = Mine(parameters(), fused=False, **own)
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
def test_state_is_made_on_the_first_step(own):
    """adam.py: state is lazy; `step` is a 0-dim float32 tensor on the CPU."""
    optimizer = reference(parameters(), **own)
    assert len(optimizer.state) == 0
    step = train(optimizer).state[tensors_of(optimizer)[0]]["step"]
    assert (step.dtype, step.device.type, step.dim(), step.item()) == (torch.float32, "cpu", 0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moments_take_dtype_and_layout_of_the_parameter(dtype):
    """adam.py: moments are zeros_like(preserve_format): the parameter's dtype and strides."""
    image, matrix = values(parameters((2, 3, 4, 5), (6, 4), dtype=dtype))
    image = image.to(memory_format=torch.channels_last)
    params = [image.requires_grad_(), matrix.t().requires_grad_()]
    optimizer = train(reference(params, amsgrad=True, **OBSERVES), 2)
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
    hyper = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.1}
    optimizer = GradESAdamW([p], fused=False, **hyper, **kwargs)
    for gradient, value in zip(grads, expected, strict=True):
        feed(optimizer, gradient)
        assert p.item() == pytest.approx(value, abs=5e-7)


def test_a_cast_model_is_served_by_the_implementation_that_can():
    # new behaviour: `backend` shows it after the next step
    """model.to(...) swaps the storage of the very tensors that the optimizer has."""
    optimizer = GradESAdamW(parameters())
    before = train(optimizer).backend
    for cast, backend in ((torch.complex64, "reference"), (torch.float32, before)):
        for p in tensors_of(optimizer):
            p.grad, p.data = None, (p.data.real if p.is_complex() else p.data).to(cast)
        optimizer.state.clear()
        assert train(optimizer).backend == backend


@pytest.mark.gpu
@monitored_or_not
def test_one_group_on_many_devices(own):
    """adam.py: a group may mix devices; tensor lr and betas are moved to each."""
    shapes = ((4, 3), (5,), (6, 2))
    mixed = parameters(*shapes)
    mixed[2] = mixed[2].detach().cuda().requires_grad_()
    optimizer, alone = (
        train(reference(params, lr=torch.tensor(0.1), **own), 5)
        for params in (mixed, parameters(*shapes))
    )
    for p, q in zip(values(optimizer), values(alone), strict=True):
        torch.testing.assert_close(p.cpu(), q)
    assert bool(optimizer.freeze_events) is (own is FREEZES_AT_3)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [{}, OBSERVES], ids=["unmonitored", "observing"])
@pytest.mark.parametrize("capturable", [True, False])
def test_step_count_lives_on_the_device_iff_capturable(own, capturable):
    """adam.py: `step` is on the parameter's device with capturable, else on the CPU."""
    params = parameters(device="cuda")
    optimizer = train(reference(params, capturable=capturable, **own), 2)
    assert optimizer.state[params[0]]["step"].is_cuda is capturable


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "capturable is False")]
    + [({"capturable": True, "fused": f, **OBSERVES}, "tau") for f in (False, True)],
    ids=["not-capturable", "tau", "tau-fused"],
)
def test_capture_is_refused(options, message):
    # new behaviour: freezing is not captured
    """optimizer.py: without capturable=True; with tau it would save nothing, as a captured
    backward cannot skip anything."""
    optimizer = train(GradESAdamW(parameters(device="cuda"), **{"fused": False, **options}), 2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.gpu
def test_captured_step_replays():
    """adam.py: with capturable=True a captured step replays as eager steps would run."""

    def run(optimizer, replay):
        set_noise(optimizer)
        step, stream = optimizer.step, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if replay:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        return values(optimizer)

    captured = run(reference(parameters(device="cuda"), capturable=True), replay=True)
    eager = run(AdamW(parameters(device="cuda"), capturable=True, foreach=False), replay=False)
    torch.testing.assert_close(captured, eager)


def test_tensor_lr_after_load():
    """optimizer.py: loading puts a new lr tensor in place of the old, and step follows it."""
    optimizer = train(reference(parameters(), lr=torch.tensor(0.1), weight_decay=0.0))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"].fill_(0.0)
    before = values(optimizer)
    train(optimizer, 1)
    assert_same(values(optimizer), before)


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


@monitored_or_not
def test_step_may_be_rebound_on_the_instance(own):
    """Trainers put a wrapper in place of `optimizer.step`; schedulers still work on top."""
    optimizer = reference(parameters(), **own)
    calls, original = [], optimizer.step

    def patched(self, *args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    optimizer.step = types.MethodType(patched, optimizer)
    schedule = StepLR(optimizer, 1)
    train(optimizer, 2)
    schedule.step()
    assert len(calls) == 2


def test_step_has_no_grad_scaler_parameter():
    """grad_scaler.py: a `grad_scaler` parameter would ask for the deprecated protocol."""
    assert list(inspect.signature(GradESAdamW(parameters()).step).parameters) == ["closure"]


def scaled_run(cls, device, *, user_unscales, **own):
    """Five steps under GradScaler, the third with an overflow; the state at the end."""
    optimizer = cls(parameters(device=device), lr=0.1, fused=True, **own)
    params = tensors_of(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)

    def everything():
        adam = [{k: optimizer.state[p].get(k) for k in ADAM_STATE} for p in params]
        return copy.deepcopy((values(params), [p.grad for p in params], adam))

    kept = []
    for seed in range(5):
        scaler.scale(torch.ones((), device=device))
        set_noise(params, seed, scaler.get_scale())
        if seed == 2:
            params[0].grad[0, 0] = math.inf
        if user_unscales:
            scaler.unscale_(optimizer)
        before = everything()
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        if seed == 2:
            assert_same(everything(), before)
        scaler.update()
        kept.append([p.grad.clone() for p in params])
    return values(optimizer), [optimizer.state[p]["step"].item() for p in params], kept


ADAM_STATE = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.mark.parametrize("user_unscales", [False, True], ids=["in-kernel", "after-unscale_"])
@pytest.mark.parametrize("own", [{}, OBSERVES], ids=["unmonitored", "observing"])
def test_fused_in_kernel_scaling(fused_device, user_unscales, own):
    """grad_scaler.py, adam.py: the fused path unscales and skips by itself, as AdamW's does.

    After `unscale_` there is no grad_scale but found_inf still counts; an overflow leaves
    parameters, gradients, moments and steps as they were; the unscaled gradient is written back.
    """
    ours = scaled_run(GradESAdamW, fused_device, user_unscales=user_unscales, **own)
    theirs = scaled_run(AdamW, fused_device, user_unscales=user_unscales)
    torch.testing.assert_close(ours, theirs)


def test_a_grad_scaler_unscales_before_the_step_once_a_group_is_not_fused(fused_device):
    """grad_scaler.py: it leaves that to `step()` only where every group unscales by itself."""
    ours, theirs = (GradESAdamW(parameters(device=fused_device), fused=x) for x in (True, False))
    others = [parameters((3, 3), device=fused_device) for _ in range(2)]
    for optimizer, params in zip((ours, theirs), others, strict=True):
        optimizer.add_param_group({"params": params, "fused": False})
        scaler = torch.amp.GradScaler(fused_device, init_scale=8.0)
        scaler.scale(torch.ones((), device=fused_device))
        set_noise(tensors_of(optimizer), 0, scaler.get_scale())
        scaler.step(optimizer)
    torch.testing.assert_close(values(ours), values(theirs))


def test_fused_found_inf_may_be_a_number(fused_device):
    """grad_scaler.py: with no gradient at all, found_inf is the sum of nothing: the integer 0."""
    optimizer = GradESAdamW(parameters(device=fused_device), fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, 0
    before = values(optimizer)
    optimizer.step()
    assert_same(values(optimizer), before)


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
        for key in state_dict["state"][i].keys() - {*ADAM_STATE, "prev_grad"}:
            assert key.startswith("grades_")
            number = state_dict["state"][i][key]
            assert isinstance(number, int | float), "tensors would be cast on loading"


@monitored_or_not
def test_state_of_unmonitored_tensors_has_adamws_keys(own):
    # new behaviour: only monitored tensors carry keys of ours, from their first step on
    """adam.py: code that counts or sums the state finds AdamW's keys and no NaN."""
    theirs = train(AdamW(parameters(), amsgrad=True)).state_dict()["state"]
    optimizer = reference(parameters(), amsgrad=True, **own)
    for seed in range(4):
        train(optimizer, 1, first=seed)
        live = {i: optimizer.state[p] for i, p in enumerate(tensors_of(optimizer))}
        for state in (live, optimizer.state_dict()["state"]):
            matrix, vector = state[0], state[1]
            assert vector.keys() == theirs[1].keys()
            assert matrix.keys() - theirs[0].keys() == {k for k in matrix if "grad" in k}
            assert ("grades_frozen_at" in matrix) is ("tau" in own)
            numbers = [x for s in state.values() for x in s.values()]
            assert not any(torch.as_tensor(x).isnan().any() for x in numbers)


@monitored_or_not
def test_state_may_be_cleared(own):
    """adam.py: state is lazy, so a warm restart may clear it; then step one follows.

    With the state goes the previous gradient: the next check has nothing to compare with.
    """
    own = own | {"grace_steps": 3} if own else own
    optimizer = train(reference(parameters(), **own), 3)
    fresh = AdamW([p.requires_grad_() for p in values(optimizer)], foreach=False)
    optimizer.state.clear()
    train(optimizer, 1, first=3)
    assert_same(values(optimizer), values(train(fresh, 1, first=3)))
    assert optimizer.freeze_events == []
    assert all(math.isnan(value) for value in optimizer.statistics().values())


def test_state_of_a_removed_parameter_is_an_error():
    """optimizer.py: state of a tensor that is in no group any more is a KeyError, as in AdamW."""
    for optimizer in (AdamW(parameters()), reference(parameters(), **OBSERVES)):
        train(optimizer, 2)
        optimizer.param_groups[0]["params"].pop()
        with pytest.raises(KeyError):
            optimizer.state_dict()


def test_state_dict_hooks():
    """optimizer.py: hooks before and after saving and loading run, and may replace the dict."""
    optimizer = train(reference(parameters(), **FREEZES_AT_3), 4)
    calls, seen_after = [], []

    def add_note(opt, state_dict):
        calls.append("after save")
        return {**state_dict, "note": 1}

    def double_lr(opt, incoming):
        calls.append("before load")
        groups = [{**group, "lr": 2 * group["lr"]} for group in incoming["param_groups"]]
        return {**incoming, "param_groups": groups}

    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("before save"))
    optimizer.register_state_dict_post_hook(add_note)
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == 1
    fresh = reference(parameters(), **FREEZES_AT_3)
    fresh.register_load_state_dict_pre_hook(double_lr)
    fresh.register_load_state_dict_post_hook(lambda opt: seen_after.extend(opt.frozen_units))
    fresh.load_state_dict(state_dict)
    assert calls == ["before save", "after save", "before load"]
    assert fresh.param_groups[0]["lr"] == 2e-3
    assert seen_after == ["group0.param0"], "a post hook sees the loaded freezes"
    fresh.load_state_dict(state_dict)
    assert calls.count("before load") == 2, "loading leaves no hook behind and removes none"


def test_loading_overrides_group_values():
    """optimizer.py: group values come from the checkpoint, the missing ones from our defaults."""
    saved = train(AdamW(parameters(), lr=0.5, weight_decay=0.25, eps=1e-3)).state_dict()
    optimizer = reference(parameters(), **OBSERVES)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.25, 1e-3)
    assert (group["tau"], group["statistic"]) == (0.0, "change")
    assert group["decoupled_weight_decay"] is True


def test_loading_matches_by_position_and_checks_names():
    """optimizer.py loads by position; where both sides have names, they must agree."""
    net = model()
    names = [name for name, _ in net.named_parameters()]
    saved = train(reference(net.named_parameters())).state_dict()
    reference([(f"module.{name}", p) for name, p in net.named_parameters()]).load_state_dict(saved)
    nameless = reference(net.parameters())
    nameless.load_state_dict(saved)
    named = reference(net.named_parameters())
    named.load_state_dict(train(reference(model().parameters())).state_dict())
    assert [one.param_groups[0]["param_names"] for one in (nameless, named)] == [names] * 2
    swapped = reference(list(net.named_parameters())[::-1])
    with pytest.raises(ValueError, match=r"0\.weight.*2\.bias|2\.bias.*0\.weight"):
        swapped.load_state_dict(saved)


def test_loading_casts_as_torch_does():
    """optimizer.py: moments are cast to the parameter's dtype, `step` and our numbers are not.

    bf16 would turn 1001 into 1000 and 257 into 256.
    """
    saved = copy.deepcopy(train(reference(parameters(), **FREEZES_AT_3), 4).state_dict())
    for state in saved["state"].values():
        state["step"].fill_(1001)
    saved["state"][0].update(grades_t=1001, grades_hits=257)
    params = parameters(dtype=torch.bfloat16)
    optimizer = reference(params, **FREEZES_AT_3)
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert (state["step"].dtype, state["step"].item()) == (torch.float32, 1001)
    assert state["exp_avg"].dtype == torch.bfloat16
    again = optimizer.state_dict()["state"][0]
    numbers = [again[f"grades_{key}"] for key in ("frozen_at", "t", "hits")]
    assert_same([state["grades_frozen_at"], *numbers], [3, 3, 1001, 257])


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [True, False])
def test_loaded_step_count_follows_the_saved_flag(capturable):
    """optimizer.py: the step count is moved to the device iff the saved group is capturable."""
    saved = train(reference(parameters(device="cuda"), capturable=capturable)).state_dict()
    optimizer = reference(parameters(device="cuda"))
    optimizer.load_state_dict(saved)
    step = optimizer.state[tensors_of(optimizer)[0]]["step"]
    assert step.is_cuda is capturable
    assert train(optimizer).state[tensors_of(optimizer)[0]]["step"] == 2


LATER_KEYS = ("maximize", "foreach", "capturable", "differentiable", "fused", "amsgrad")
LATER_KEYS += ("decoupled_weight_decay",)


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
    assert_same(values(train(optimizer, 3, first=2)), values(expected))


def test_setstate_fills_in_every_own_key():
    """adam.py: __setstate__ gives groups of an older pickle the keys that they lack."""
    optimizer = train(reference(parameters(), **OBSERVES), 2)
    lacking = ("tau", "statistic", *LATER_KEYS)
    groups = [{k: v for k, v in g.items() if k not in lacking} for g in optimizer.param_groups]
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
def test_copies_go_on_alike_and_apart(duplicate):
    """optimizer.py: `__getstate__` drops the keys of others; ours keeps the freezing."""
    own = {"total_steps": 8, "alpha": 0.25, "tau": 5.0, "patience": 2, "cooldown": 1}
    optimizer = reference(parameters((4, 3), (2, 2), (5,)), **own)
    optimizer.register_freeze_hook(lambda *_: None)  # hooks are not copied: torch's are not either
    train(optimizer, 4)
    twin = duplicate(optimizer)
    assert type(twin) is GradESAdamW
    assert twin.defaults == optimizer.defaults
    for seed in range(4, 8):
        assert_same(*(snapshot(train(one, 1, first=seed)) for one in (optimizer, twin)))
    assert optimizer.freeze_events, "the example must freeze something"
    twin.thaw()
    assert optimizer.freeze_events and not twin.freeze_events
    twin.zero_grad()


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


def test_init_group_keeps_torchs_signature():
    """_dynamo/variables/optimizer.py calls `_init_group` by itself, with torch's arguments."""
    assert inspect.signature(GradESAdamW._init_group) == inspect.signature(AdamW._init_group)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


ON_CUDA = pytest.param({}, "cuda", marks=pytest.mark.gpu, id="cuda")


@pytest.mark.parametrize(
    ("own", "device"), [*(pytest.param(o, "cpu", id=m) for m, o in MONITORING.items()), ON_CUDA]
)
def test_compiled_step(own, device, fresh_dynamo):
    """torch.compile(optimizer.step) gives the same numbers and the same freezes as eager steps.

    _dynamo/variables/optimizer.py turns fresh CUDA groups capturable; that must be survived.
    """
    cls = functools.partial(AdamW, foreach=False) if device == "cuda" else reference
    eager = train(cls(parameters(device=device), lr=0.1, **own), 5)
    optimizer = reference(parameters(device=device), lr=0.1, **own)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(5):
        set_noise(optimizer, seed)
        step()
    tolerance = {} if device == "cuda" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(values(optimizer), values(eager), **tolerance)
    events = [] if device == "cuda" else eager.freeze_events
    assert [e.step for e in optimizer.freeze_events] == [e.step for e in events]
    assert optimizer.state[tensors_of(optimizer)[1]]["step"] == 5


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
    assert_same(values(fresh), before)
    assert fresh.freeze_events == []
    assert all(math.isnan(value) for value in fresh.statistics().values())
    assert fresh.param_groups[0]["lr"] == 0.1

    set_optimizer_state_dict(other, fresh, saved, options=options)
    train(optimizer, 4, first=4)
    train(fresh, 4, first=4)
    assert_same(values(fresh), values(optimizer))
    assert fresh.freeze_events == optimizer.freeze_events
    assert [event.step for event in fresh.freeze_events] == [6, 6]


def test_named_optimizer_probe():
    """named_optimizer.py initialises state by a step with zero gradients at the real lr."""
    own = {"tau": 1e9, "grace_steps": 0}
    optimizer = reference(parameters(), lr=0.1, weight_decay=0.0, **own)
    before = values(optimizer)
    set_gradients(optimizer, [0.0, 0.0])
    optimizer.step(closure=None)
    assert_same(values(optimizer), before)
    assert optimizer.freeze_events == []


@monitored_or_not
def test_zero_redundancy_optimizer(own, one_process):
    """zero_redundancy_optimizer.py builds us from groups and syncs group values at every step.

    It sorts the tensors of a shard by size, so nameless units are distinguished by size here.
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
        assert_same(values(sharded), values(alone))
    assert isinstance(sharded.optim, GradESAdamW)
    assert frozen_sizes(sharded.optim) == frozen_sizes(alone)
    assert bool(alone.freeze_events) is (own is FREEZES_AT_3)
    sharded.consolidate_state_dict()
    fresh = reference(model().parameters(), lr=0.1, **own)
    fresh.load_state_dict(sharded.state_dict())
    assert fresh.freeze_events == alone.freeze_events


NEXT_STEP = {**FREEZES_AT_3, "statistic": "momentum", "freeze_timing": "next_step"}


@pytest.mark.parametrize(
    "own",
    [{}, {"amsgrad": True}, FREEZES_AT_3, NEXT_STEP],
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
    assert_same([p.full_tensor().detach() for p in sharded.parameters()], values(optimizers[0]))
    states = optimizers[1].state_dict()["state"].values()
    assert all(isinstance(state["exp_avg"], DTensor) for state in states)
    assert optimizers[1].freeze_events == optimizers[0].freeze_events
    assert bool(optimizers[0].freeze_events) is ("tau" in own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@monitored_or_not
def test_wide_gradients_on_half_precision(own, dtype):
    """AdamW raises on a float32 gradient of a half-precision tensor; here it trains, in float32."""

    def narrow():
        params = parameters(dtype=dtype)
        for p in params:
            p.grad_dtype = None
        return params

    def feed_float32(optimizer, seed):
        feed(optimizer, *(g.float() for g in noise(parameters(dtype=dtype), seed)))

    with pytest.raises(RuntimeError):
        feed_float32(AdamW(narrow()), 0)
    hyper, wide = {"lr": 0.1, "eps": 1e-3}, [p.float() for p in values(narrow())]
    optimizer = reference(narrow(), **hyper, **own)
    expected = AdamW([p.requires_grad_() for p in wide], foreach=False, **hyper)
    for seed in range(3):
        feed_float32(optimizer, seed)
        feed_float32(expected, seed)
        if not optimizer.freeze_events:
            mine = [p.float() for p in values(optimizer)]
            torch.testing.assert_close(mine, values(expected), rtol=3e-2, atol=3e-2)
    assert optimizer.state[tensors_of(optimizer)[0]]["exp_avg"].dtype == dtype
    assert bool(optimizer.freeze_events) is (own is FREEZES_AT_3)


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


def test_error_input_check_notices_a_silent_optimizer(monkeypatch):
    """If the constructor accepted everything, every error input of torch would fail its test."""
    monkeypatch.setitem(globals(), "GradESAdamW", lambda params, **kwargs: None)
    for case in ERROR_INPUTS.values():
        with pytest.raises(pytest.fail.Exception):
            check_error_input(case, "cpu")


class Moved(AdamW):
    """Other defaults and another order of its arguments."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-2, eps=1e-8):
        pass


def plain_adam(params, *, fused, **kwargs):
    """Adam with coupled decay."""
    return torch.optim.Adam(params, **kwargs)


@pytest.mark.parametrize(
    ("wrong", "test", "args"),
    [
        (Moved, test_signature_begins_as_adamw, ()),
        (plain_adam, test_order_of_the_arithmetic, HAND_COMPUTED["adamw"]),
    ],
)
def test_another_signature_and_another_arithmetic_are_noticed(wrong, test, args, monkeypatch):
    monkeypatch.setitem(globals(), "GradESAdamW", wrong)
    with pytest.raises(AssertionError):
        test(*args)


def test_options_of_freezing_without_a_tau_are_reported():
    """Forgotten, the run would be plain AdamW to its end; with the defaults nothing is said."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = GradESAdamW([p], statistic="signal", total_steps=10)
    with pytest.warns(UserWarning, match=r"tau is None.*total_steps=10.*statistic='signal'"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        GradESAdamW([p]).step()
        GradESAdamW([{"params": [p], "tau": 0.0}], total_steps=10).step()


@pytest.mark.parametrize("tau", [None, 0.0])
def test_a_closure_may_change_the_groups(tau):
    def run(cls, **options):
        a, b = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        opt = cls([{"params": [a]}, {"params": [b]}], lr=0.1, **options)

        def replace():
            opt.param_groups[1]["params"] = [nn.Parameter(torch.full((4, 4), 2.0))]
            for group in opt.param_groups:
                group["params"][0].grad = torch.ones(4, 4)

        for closure in (replace, lambda: opt.param_groups.pop(0), lambda: None):
            opt.step(closure)
        return values(opt)

    ours = run(GradESAdamW, tau=tau, grace_steps=None if tau is None else 0, fused=False)
    assert_same(ours, run(AdamW, foreach=False))


needs_native = pytest.mark.skipif(
    native.why_not_loaded() is not None, reason="the native op is not built"
)


@pytest.mark.parametrize("fused", [None, pytest.param(True, marks=needs_native)])
def test_parameters_in_the_same_memory_are_updated_one_after_the_other(fused):
    """Tied through `.data` they stay two parameters, which a fused backend would race on."""

    def tied(cls, **options):
        a, b = parameters((64, 64), (64, 64))
        b.data = a.data
        return train(cls([{"params": [a]}, {"params": [b]}], **options), 3)

    if fused:
        with pytest.raises(RuntimeError, match="two parameters share memory"):
            tied(GradESAdamW, fused=True)
        return
    ours = tied(GradESAdamW)
    assert ours.backend == "reference"
    assert_same(values(ours), values(tied(AdamW, foreach=False)))
    of_class = [Weight(torch.ones(2, 2)) for _ in range(2)]
    of_class[1].data = of_class[0].data
    assert GradESAdamW(of_class).backend == "reference"
    flat = torch.randn(8, 4)
    views = [torch.nn.Parameter(x) for x in flat.split(2)]
    assert GradESAdamW(views).backend == GradESAdamW([flat.clone().requires_grad_()]).backend


def test_the_weight_decay_of_adam_is_refused():
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        GradESAdamW([{"params": [p], "decoupled_weight_decay": False}])


def test_lazy_parameters_are_refused_with_tau_alone():
    model = torch.nn.LazyLinear(3)
    GradESAdamW(model.parameters())
    with pytest.raises(ValueError, match="parameter 0 of group 0 has no shape yet"):
        GradESAdamW(model.parameters(), tau=0.0, grace_steps=0)
