"""With nothing to freeze, GradESAdamW is torch.optim.AdamW, bit for bit.

The numerical contract of this file: the same tensors, stepped with the same gradients by
`GradESAdamW(fused=False)` and by `torch.optim.AdamW(foreach=False)`, have the same bits in every
parameter and every AdamW state tensor after every step. That is so in two situations: when nothing
is monitored (tau=None), and when matrices are monitored but never frozen (tau=0.0, or a grace
period that does not end). Every scenario runs in all of them (`MODES`); the parameters are stepped
twice, never copied from one side to the other.

Sample configurations come from torch's own table of optimizer inputs too, so that a new torch
version adds cases. The last tests are negative controls: AdamW variants with one deliberate fault,
all of which the comparison must catch.
"""

import copy
import functools
import itertools
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
from harness import exact, feed, noise, parameters, set_gradients, tensors_of, train, values
from hypothesis import given, settings
from tiny import tiny_network
from torch import nn
from torch.optim import AdamW
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch_inputs import ADAMW, common_optimizers, needs_torch_inputs

from grades_kernels import GradESAdamW

STATISTICS = ("change", "norm", "momentum")
TIMINGS = ("same_step", "next_step")
PLAIN = {}
MODES = {"unmonitored": PLAIN, "in-grace": {"tau": 1e9, "grace_steps": 10**6}}
for statistic, timing in itertools.product(STATISTICS, TIMINGS):
    own = {"tau": 0.0, "grace_steps": 0, "statistic": statistic, "freeze_timing": timing}
    MODES[f"observe-{statistic}-{timing}"] = own
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
amsgrad_or_not = pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
maximize_or_not = pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])


def hyper_for(dtype):
    """`HYPER`, with an eps that is not rounded to zero in half precision."""
    return HYPER | {"eps": 1e-3} if dtype == torch.float16 else HYPER


def small_parameters(dtype=torch.float32):
    """Two matrices, a vector, a 3-D tensor, a scalar and an empty tensor, always the same ones."""
    return parameters((5, 3), (7,), (2, 3, 4), (), (0, 4), (17, 23), dtype=dtype)


def model_loss(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(16, n, generator=generator) for n in (8, 2))
    return (model(inputs) - targets).square().mean()


def assert_same_bits(actual, expected, what):
    """Same dtype, device, shape, strides and bits: a NaN equals itself, 0.0 is not -0.0."""
    for fact in ("dtype", "device", "shape"):
        assert getattr(actual, fact) == getattr(expected, fact), f"{what}: {fact} differs"
    assert actual.stride() == expected.stride(), f"{what}: strides differ"
    assert exact(actual) == exact(expected), f"{what}: values differ\n{actual}\n{expected}"


def assert_same_training(ours, theirs):
    """Parameters, AdamW's state and AdamW's group values agree bit for bit.

    A monitored tensor may have numbers of ours and one more tensor, the previous gradient. All
    others have AdamW's keys, and a parameter that AdamW has no state for has none here either.
    """
    groups = zip(ours.param_groups, theirs.param_groups, strict=True)
    for g, (group, expected_group) in enumerate(groups):
        for key in expected_group.keys() - {"params", "foreach", "fused"}:
            assert group[key] == expected_group[key], f"group {g}: {key} differs"
        for i, (p, q) in enumerate(zip(group["params"], expected_group["params"], strict=True)):
            what = f"group {g}, parameter {i}"
            assert_same_bits(p, q, what)
            state, expected_state = ours.state.get(p, {}), theirs.state.get(q, {})
            assert bool(state) == bool(expected_state), f"{what}: state on one side only"
            for key, value in expected_state.items():
                assert_same_bits(state[key], value, f"{what}, {key}")
            extra = state.keys() - expected_state.keys()
            # new behaviour: only monitored tensors carry keys of ours
            if group.get("tau") is not None and p.ndim > 1 and not p.is_complex():
                extra = {k for k in extra if not k.startswith("grades_")} - {"prev_grad"}
            assert not extra, f"{what}: unexpected state {extra}"


class Twins:
    """One training, twice: `left` under GradESAdamW (`ours`), `right` under AdamW (`theirs`).

    Args:
        make: builds the tensors (a list or a module); called once per side.
        mode: own arguments of GradESAdamW, one of `MODES`.
        cls: the optimizer in the place of GradESAdamW (negative controls).
        groups: turns the tensors of one side into the optimizer's first argument.
        foreach: AdamW's implementation to compare with, given to both sides when it is True.
        hyper: AdamW's arguments, copied for each side, because schedulers write into tensors.
    """

    def __init__(
        self, make, mode=PLAIN, *, cls=GradESAdamW, groups=tensors_of, foreach=False, **hyper
    ):
        self.left, self.right = make(), make()
        own = mode | ({"foreach": True} if foreach else {}) | copy.deepcopy(hyper)
        self.ours = cls(groups(self.left), fused=False, **own)
        own = copy.deepcopy(hyper) | {"foreach": foreach}
        self.theirs = AdamW(groups(self.right), fused=False, **own)

    def sides(self):
        return (self.left, self.ours), (self.right, self.theirs)

    def step(self, grads):
        """Both sides step with these gradients; ours must leave them as they were."""
        for side, optimizer in self.sides():
            set_gradients(side, copy.deepcopy(grads))
            optimizer.step()
        for p, g in zip(tensors_of(self.left), grads, strict=True):
            if g is not None:
                assert_same_bits(p.grad, g, "a gradient after the step")
        self.check()

    def train(self, steps, first=0, scale=1.0):
        for seed in range(first, first + steps):
            self.step(noise(tensors_of(self.right), seed, scale))
        return self

    def steps(self, set_to_none=True):
        """Yields each side, zeroes its gradients before and steps it after the loop's body."""
        for side, optimizer in self.sides():
            optimizer.zero_grad(set_to_none)
            yield side, optimizer
            optimizer.step()
        self.check()

    def check(self):
        assert_same_training(self.ours, self.theirs)


betas = st.floats(0.0, 0.9999)


@every_mode
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    hyper=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 1e-5, 1e-3, 0.1]) | st.floats(0.0, 2.0),
            "betas": st.tuples(betas, betas),
            "eps": st.sampled_from([0.0, 1e-12, 1e-8, 1e-3]) | st.floats(0.0, 1.0),
            "weight_decay": st.just(0.0) | st.floats(0.0, 1.0),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    tensor_lr=st.booleans(),
    tensor_betas=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e-4, 1e3]),
    seed=st.integers(0, 10**6),
)
def test_random_hyper_parameters(mode, hyper, tensor_lr, tensor_betas, dtype, scale, seed):
    """Any hyper-parameters that AdamW takes, floats or tensors, give AdamW's bits."""
    if tensor_lr:
        hyper = hyper | {"lr": torch.tensor(hyper["lr"])}
    if tensor_betas:
        hyper = hyper | {"betas": tuple(map(torch.tensor, hyper["betas"]))}
    Twins(lambda: small_parameters(dtype), mode, **hyper).train(3, first=seed, scale=scale)


@every_mode
@maximize_or_not
@amsgrad_or_not
@every_dtype
def test_dtypes(mode, dtype, amsgrad, maximize):
    flags = {"amsgrad": amsgrad, "maximize": maximize}
    twins = Twins(lambda: small_parameters(dtype), mode, **flags, **hyper_for(dtype)).train(6)
    if mode.get("tau") == 0.0:
        assert twins.ours.freeze_events == []
        measured = [value for value in twins.ours.statistics().values() if value == value]
        assert measured, "a mode that observes must have measured something"


@every_mode
def test_mixed_dtypes_in_one_group(mode):
    make = lambda: [p for dtype in DTYPES for p in small_parameters(dtype)]  # noqa: E731
    Twins(make, mode, **hyper_for(torch.float16)).train(4)


@every_mode
@amsgrad_or_not
@maximize_or_not
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_complex_parameters(mode, foreach, dtype, amsgrad, maximize):
    """A complex tensor is updated as two real ones, its state stays complex, and no unit has it."""
    flags = {"amsgrad": amsgrad, "maximize": maximize, "foreach": foreach}
    Twins(lambda: small_parameters(dtype) + small_parameters(), mode, **flags, **HYPER).train(4)


@every_mode
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@amsgrad_or_not
def test_tensor_hyper_parameters(mode, amsgrad, shape):
    """lr and betas as one-element tensors of any rank; the caller's lr tensor is never written."""
    lr = torch.full(shape, 0.02)
    both_betas = (torch.full(shape, 0.85), torch.full(shape, 0.97))
    twins = Twins(small_parameters, mode, lr=lr, betas=both_betas, amsgrad=amsgrad)
    twins.train(4)
    assert_same_bits(twins.ours.param_groups[0]["lr"], lr, "lr")


@every_mode
def test_default_dtype_float64(mode):
    """Under a float64 default dtype the step count is float64, as AdamW's is."""
    torch.set_default_dtype(torch.float64)
    try:
        twins = Twins(small_parameters, mode, **HYPER).train(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert twins.ours.state[twins.left[0]]["step"].dtype == torch.float64


TORCH_INPUTS = {
    f"{str(dtype).removeprefix('torch.')}-{sample.desc}": (dtype, sample.kwargs)
    for dtype in DTYPES
    for sample in (ADAMW.optim_inputs_func(device="cpu", dtype=dtype) if ADAMW else ())
}


@needs_torch_inputs
@every_mode
@pytest.mark.parametrize("dtype, kwargs", TORCH_INPUTS.values(), ids=TORCH_INPUTS)
def test_torch_sample_inputs(mode, dtype, kwargs):
    """Every configuration that torch tests its AdamW with."""
    Twins(lambda: small_parameters(dtype), mode, **kwargs).train(5)


TORCH_FLAG_INPUTS = (
    {
        sample.desc: sample.kwargs
        for sample in common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float32, ADAMW, skip=("fused", "differentiable")
        )
    }
    if ADAMW
    else {}
)


@needs_torch_inputs
@pytest.mark.parametrize("kwargs", TORCH_FLAG_INPUTS.values(), ids=TORCH_FLAG_INPUTS)
def test_torch_sample_inputs_with_implementation_flags(kwargs):
    """torch's configurations with foreach on and off equal AdamW with the same flag."""
    kept = {k: v for k, v in kwargs.items() if k not in ("fused", "differentiable")}
    Twins(small_parameters, **{"foreach": False, **kept}).train(5)


def strided_parameters():
    """Transposed, sliced (not dense), channels_last, a bucket view, 0-dim, one-element, empty."""
    shapes = (6, 4), (6, 8), (2, 3, 4, 5), (50,), (), (1,), (1, 1), (0,), (3, 0)
    transposed, sliced, image, bucket, *others = values(parameters(*shapes))
    image = image.to(memory_format=torch.channels_last)
    views = [transposed.t(), sliced[:, ::2], image, bucket[1:31].view(5, 6), *others]
    return [view.requires_grad_() for view in views]


@every_mode
@amsgrad_or_not
def test_layouts(mode, amsgrad):
    """Tensors of any layout and size, with gradients laid out otherwise, keep AdamW's strides."""
    twins = Twins(strided_parameters, mode, amsgrad=amsgrad, **HYPER).train(2)
    for seed in range(2, 5):
        grads = noise(twins.right, seed)
        grads[0] = grads[0].t().contiguous().t()
        grads[1] = torch.stack([grads[1], grads[1]], dim=-1)[..., 0]
        grads[3] = torch.tensor(0.25 * seed).expand(5, 6)  # as autograd gives for a sum
        twins.step(grads)


@every_mode
def test_missing_gradients(mode):
    """A tensor without a gradient is left alone: no decay, no step counted, no state."""
    twins = Twins(small_parameters, mode, **HYPER)
    for seed in range(6):
        _, sometimes, *always = noise(twins.right, seed)
        twins.step([None, None if seed % 2 else sometimes, *always])
    assert twins.left[0] not in twins.ours.state
    assert twins.ours.state[twins.left[1]]["step"] == 3
    twins.step([None] * len(twins.left))


@every_mode
def test_unusual_gradients(mode):
    """Zero, infinite and NaN gradients affect a monitored tensor as they do under AdamW."""
    twins = Twins(small_parameters, mode, **HYPER).train(1)
    for poison in (0.0, float("inf"), float("nan")):
        grads = noise(twins.right, seed=7)
        grads[0] = torch.full_like(grads[0], poison)
        grads[5].view(-1)[3] = poison
        twins.step(grads)
        twins.train(1, first=20)


def test_duplicate_parameter_is_stepped_twice():
    """torch warns about a tensor listed twice in a group, then steps it twice; so do we."""
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twins = Twins(lambda: small_parameters()[:1], groups=lambda params: params * 2, **HYPER)
    twins.train(3)
    assert twins.ours.state[twins.left[0]]["step"] == 6


def three_groups(params):
    return [
        {"params": params[:2], "lr": 0.1, "weight_decay": 0.0},
        {"params": params[2:3], "betas": (0.5, 0.6), "amsgrad": True},
        {"params": []},
        {"params": params[3:], "maximize": True, "eps": 1e-3},
    ]


@every_mode
def test_several_groups(mode):
    """Groups keep their own values, an empty group included."""
    Twins(small_parameters, mode, groups=three_groups, **HYPER).train(5)


@every_mode
def test_group_values_changed_by_hand(mode):
    """Group values are read at every step, as AdamW reads them."""
    twins = Twins(small_parameters, mode, groups=three_groups, **HYPER).train(2)
    changes = {"lr": 0.5, "weight_decay": 0.3, "betas": (0.1, 0.2), "eps": 0.01, "maximize": True}
    for seed, (key, value) in enumerate(changes.items()):
        for _, optimizer in twins.sides():
            for group in optimizer.param_groups:
                group[key] = value
        twins.train(1, first=10 + seed)


@every_mode
def test_group_added_between_steps(mode):
    """A group that joins late starts at step one, with the constructor's defaults."""
    twins = Twins(small_parameters, mode, groups=lambda params: params[:3], **HYPER)
    for side, optimizer in twins.sides():
        feed(optimizer, *noise(side, 0)[:3])
        optimizer.add_param_group({"params": side[3:], "lr": 0.2})
    twins.check()
    twins.train(4, first=1)


@every_mode
def test_tensors_replaced_inside_groups(mode):
    """Some wrappers swap the tensors in `param_groups` after construction; nothing is cached."""
    # Matrices, since a run with tau needs something to monitor at the first step.
    twins = Twins(lambda: parameters(*[(1, 1)] * 6), mode, **HYPER)
    for _, optimizer in twins.sides():
        optimizer.param_groups[0]["params"] = small_parameters()
    twins.left, twins.right = tensors_of(twins.ours), tensors_of(twins.theirs)
    twins.train(4)


SCHEDULERS = {
    "one-cycle": lambda opt: lrs.OneCycleLR(opt, max_lr=0.1, total_steps=10, cycle_momentum=True),
    "cosine": lambda opt: lrs.CosineAnnealingLR(opt, T_max=10),
    "lambda": lambda opt: lrs.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "warm-up-then-cosine": lambda opt: lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, 0.1, total_iters=3), lrs.CosineAnnealingLR(opt, 7)], milestones=[3]
    ),
    "plateau": lambda opt: lrs.ReduceLROnPlateau(opt, patience=1),
}


@every_mode
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(mode, make_scheduler, tensor_lr):
    """Schedulers move lr (and OneCycleLR beta1); a tensor lr is changed in place and re-read."""
    hyper = HYPER | {"lr": torch.tensor(0.03)} if tensor_lr else HYPER
    twins = Twins(small_parameters, mode, **hyper)
    schedulers = [make_scheduler(optimizer) for _, optimizer in twins.sides()]
    lr_object = twins.ours.param_groups[0]["lr"]
    for seed in range(8):
        twins.train(1, first=seed)
        for scheduler in schedulers:
            scheduler.step(*[1.0] * isinstance(scheduler, lrs.ReduceLROnPlateau))
    if tensor_lr:
        assert twins.ours.param_groups[0]["lr"] is lr_object


@every_mode
def test_closure(mode):
    """step(closure) evaluates the closure once and returns its loss."""
    twins = Twins(tiny_network, mode, **HYPER)
    for seed in range(4):
        losses, calls = [], []
        for model, optimizer in twins.sides():

            def closure(model=model, optimizer=optimizer, calls=calls, seed=seed):
                calls.append(optimizer)
                optimizer.zero_grad()
                loss = model_loss(model, seed)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        assert calls == [twins.ours, twins.theirs]
        assert_same_bits(*losses, "the loss")
        twins.check()


@every_mode
def test_step_hooks(mode):
    """Hooks that rescale gradients before the step and change lr after it act as under AdamW."""

    def halve_gradients(optimizer, args, kwargs):
        for p in tensors_of(optimizer):
            p.grad = p.grad / 2

    def decay_lr(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    twins = Twins(tiny_network, mode, **HYPER)
    for _, optimizer in twins.sides():
        optimizer.register_step_pre_hook(halve_gradients)
        optimizer.register_step_post_hook(decay_lr)
    for seed in range(4):
        for model, _ in twins.steps():
            model_loss(model, seed).backward()


@every_mode
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_training_loop_with_accumulation_and_clipping(mode, set_to_none):
    """A named model, two micro-batches per step, clipped gradients, either kind of zero_grad."""
    twins = Twins(tiny_network, mode, groups=lambda model: model.named_parameters(), **HYPER)
    for seed in range(5):
        for model, _ in twins.steps(set_to_none):
            for micro_batch in range(2):
                model_loss(model, 10 * seed + micro_batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@every_mode
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler-unscales", "user-unscales"])
def test_grad_scaler_with_overflows(mode, unscale):
    """GradScaler skips the steps with infinite gradients; the others equal AdamW's."""
    twins = Twins(tiny_network, mode, **HYPER)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2) for _ in range(2)]
    for seed in range(8):
        for (model, optimizer), scaler in zip(twins.sides(), scalers, strict=True):
            optimizer.zero_grad()
            loss = scaler.scale(model_loss(model, seed))
            (loss * float("inf") if seed in (0, 3, 4) else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "grad_scale")
            assert not hasattr(optimizer, "found_inf")
        twins.check()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert twins.ours.state[twins.left[0].weight]["step"] == 5


@every_mode
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_between_steps(mode, how):
    """A copy of tensors and optimizer together trains on; the original is not disturbed."""
    twins = Twins(small_parameters, mode, **HYPER).train(3)
    original, kept = twins.left, values(twins.left)
    pair = (twins.left, twins.ours)
    copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    twins.left, twins.ours = copied
    twins.train(4, first=3)
    assert exact(original) == exact(kept)


@every_mode
@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
def test_averaged_model(mode, ema):
    """SWA and EMA weights, with SWA's scheduler, equal those of a run with AdamW."""
    twins = Twins(tiny_network, mode, **HYPER)
    average = get_ema_multi_avg_fn(0.9) if ema else None
    averages = [AveragedModel(model, multi_avg_fn=average) for model, _ in twins.sides()]
    schedulers = [SWALR(opt, swa_lr=0.01, anneal_epochs=3) for _, opt in twins.sides()]
    for seed in range(6):
        for model, _ in twins.steps():
            model_loss(model, seed).backward()
        for averaged, scheduler, model in zip(
            averages, schedulers, (twins.left, twins.right), strict=True
        ):
            averaged.update_parameters(model)
            scheduler.step()
    ours, theirs = (list(averaged.parameters()) for averaged in averages)
    assert exact(ours) == exact(theirs)


def loaded(optimizer, state_dict):
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    return optimizer


@every_mode
@amsgrad_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adamw_checkpoint_continues_here(mode, dtype, amsgrad):
    """A run started with AdamW continues under GradESAdamW as it would have under AdamW."""
    twins = Twins(lambda: small_parameters(dtype), mode, amsgrad=amsgrad, **HYPER).train(3)
    twins.ours = loaded(GradESAdamW(twins.left, fused=False, **mode), twins.theirs.state_dict())
    twins.train(4, first=3)


@every_mode
@pytest.mark.parametrize("plain", [False, True], ids=["state_dict", "adamw_state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_checkpoint_continues_under_adamw(mode, dtype, plain):
    """A run started here continues under AdamW, from either kind of state dict."""
    twins = Twins(lambda: small_parameters(dtype), mode, **HYPER).train(3)
    ours = twins.ours.adamw_state_dict() if plain else twins.ours.state_dict()
    if plain:
        expected = twins.theirs.state_dict()
        assert [g.keys() for g in ours["param_groups"]] == [
            g.keys() for g in expected["param_groups"]
        ]
        assert exact(ours["state"]) == exact(expected["state"])
    twins.ours = loaded(AdamW(twins.left, foreach=False), ours)
    for seed in range(3, 7):
        for side, optimizer in twins.sides():
            feed(optimizer, *noise(side, seed))
        assert exact(twins.left) == exact(twins.right)


@every_mode
@amsgrad_or_not
@every_dtype
def test_foreach(mode, dtype, amsgrad):
    hyper = hyper_for(dtype) | {"amsgrad": amsgrad}
    Twins(lambda: small_parameters(dtype), mode, foreach=True, **hyper).train(5)


@amsgrad_or_not
@maximize_or_not
def test_differentiable(amsgrad, maximize):
    """With differentiable=True the step is part of the graph, with AdamW's derivatives.

    One step with amsgrad: torch itself cannot differentiate through a second one.
    """
    derivatives = []
    flags = {"differentiable": True, "amsgrad": amsgrad, "maximize": maximize}
    for cls, own in ((GradESAdamW, {"fused": False}), (AdamW, {"foreach": False})):
        start, slope = parameters((4, 3), (4, 3), dtype=torch.float64)
        p = start.clone()
        optimizer = cls([p], **flags, **HYPER, **own)
        for factor in (1.0,) if amsgrad else (1.0, -2.0):
            feed(optimizer, slope * factor + start.sin())
        assert p.requires_grad
        p.square().sum().backward()
        derivatives.append((p, start.grad, slope.grad))
    assert all(expected.abs().max() > 0 for expected in derivatives[1])
    assert exact(derivatives[0]) == exact(derivatives[1])


def test_native_choice_stays_close():
    """fused=None may take a faster implementation; it stays within a few ulp of AdamW."""
    optimizer = train(GradESAdamW(small_parameters(), **HYPER), 5)
    expected = train(AdamW(small_parameters(), foreach=False, **HYPER), 5)
    if optimizer.backend == "reference":
        assert exact(values(optimizer)) == exact(values(expected))
    torch.testing.assert_close(values(optimizer), values(expected), rtol=2e-6, atol=2e-6)


class Faulty(AdamW):
    """AdamW that takes our arguments and does one thing wrong after each step (see `FAULTS`)."""

    def __init__(self, params, *args, fault=None, tau=None, grace_steps=None, **kwargs):
        super().__init__(params, *args, foreach=False, **kwargs)
        self.fault = fault

    @torch.no_grad()
    def step(self, closure=None):
        before = values(self)
        super().step(closure)
        if self.fault is not None:
            has_gradient, act = self.fault
            for p, old in zip(tensors_of(self), before, strict=True):
                if (p.grad is not None) is has_gradient:
                    act(p, old, self.state)


def without_bias_correction(p, old, state):
    p.copy_(old * KEPT)
    denominator = state[p]["exp_avg_sq"].sqrt() + HYPER["eps"]
    p.addcdiv_(state[p]["exp_avg"], denominator, value=-HYPER["lr"])


KEPT = 1 - HYPER["lr"] * HYPER["weight_decay"]  # the part of a weight that decay leaves
NINE = torch.tensor(9.0)
FAULTS = {  # whether it concerns tensors with a gradient, and the fault after a step
    "DecayAfterUpdate": (True, lambda p, old, state: p.add_(old * (1 - KEPT)).mul_(KEPT)),
    "NoBiasCorrection": (True, without_bias_correction),
    "DecaysWithoutGradient": (False, lambda p, old, state: p.mul_(KEPT)),
    "OneUlpOff": (True, lambda p, old, state: p.copy_(torch.nextafter(p, NINE))),
    "CountsTwice": (True, lambda p, old, state: state[p]["step"].add_(1)),
    "KeepsSpareTensor": (True, lambda p, old, state: state[p].update(spare=torch.zeros(()))),
    "WritesIntoGradient": (True, lambda p, old, state: p.grad.mul_(0.5)),
    "StateForMissingGradient": (False, lambda p, old, state: state[p].update(grades_hits=0)),
}


def three_steps_with_a_gap(fault):
    twins = Twins(small_parameters, cls=functools.partial(Faulty, fault=fault), **HYPER)
    for seed in range(3):
        first, _, *others = noise(twins.right, seed)
        twins.step([first, None, *others])


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_comparison_catches(fault):
    """A deliberately wrong AdamW fails the comparison that all tests above rely on."""
    with pytest.raises(AssertionError):
        three_steps_with_a_gap(fault)


def test_comparison_accepts_adamw_itself():
    """The stand-in without a fault passes, so it is the fault that the comparison catches."""
    three_steps_with_a_gap(None)


def test_comparison_sees_signed_zero_and_strides():
    """Bits and strides are compared, not values."""
    zero = torch.zeros(2, 2)
    with pytest.raises(AssertionError, match="values differ"):
        assert_same_bits(zero, -zero, "zero")
    with pytest.raises(AssertionError, match="strides differ"):
        assert_same_bits(torch.ones(2, 3), torch.ones(3, 2).t(), "ones")
    nan = torch.full((2,), float("nan"))
    assert_same_bits(nan, nan.clone(), "nan")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """No scenario may warn where AdamW does not; `pytest.warns` still works inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
