"""With nothing to freeze, GradESAdamW is torch.optim.AdamW, bit for bit.

The numerical contract of this file: the same tensors, stepped with the same gradients by
`GradESAdamW(fused=False)` and by `torch.optim.AdamW(foreach=False)`, have the same bits in every
parameter and every AdamW state tensor after every step. It is owed in two situations: when nothing
is monitored (tau=None), and when matrices are watched but never frozen (tau=0.0, or a grace period
that does not end). Every scenario runs in all of them (`MODES`); the parameters are stepped twice,
never copied from one side to the other.

Sample configurations come from torch's own table of optimizer inputs too, so that a new torch
version adds cases. The last tests are negative controls: AdamW variants with one deliberate fault,
all of which the comparison must catch.
"""

import copy
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch_inputs import ADAMW, common_optimizers, needs_torch_inputs

from grades_kernels import GradESAdamW

STATISTICS = ("change", "norm", "momentum")
TIMINGS = ("same_step", "next_step")
PLAIN: dict = {}
MODES = {
    "unmonitored": PLAIN,
    "in-grace": {"tau": 1e9, "grace_steps": 10**6},
    **{
        f"observe-{statistic}-{timing}": {
            "tau": 0.0,
            "grace_steps": 0,
            "statistic": statistic,
            "freeze_timing": timing,
        }
        for statistic in STATISTICS
        for timing in TIMINGS
    },
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hyper_for(dtype: torch.dtype) -> dict:
    """`HYPER`, with an eps that is not rounded to zero in half precision."""
    return HYPER | {"eps": 1e-3} if dtype == torch.float16 else HYPER


# Tensors and gradients -------------------------------------------------------------------------


def tensors_of(side: list[Tensor] | nn.Module) -> list[Tensor]:
    return list(side.parameters()) if isinstance(side, nn.Module) else side


def small_parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two matrices, a vector, a 3-D tensor, a scalar and an empty tensor, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (7,), (2, 3, 4), (), (0, 4), (17, 23)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def random_gradients(params: list[Tensor], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [
        (
            torch.randn(
                p.shape,
                generator=generator,
                dtype=torch.complex128 if p.is_complex() else torch.float64,
            )
            * scale
        ).to(p.dtype)
        for p in params
    ]


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))


def model_loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 6, generator=generator)
    targets = torch.randn(16, 4, generator=generator)
    return (model(inputs) - targets).square().mean()


# The comparison --------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same dtype, device, shape, strides and bits: a NaN equals itself, 0.0 is not -0.0."""
    for fact in ("dtype", "device", "shape"):
        assert getattr(actual, fact) == getattr(expected, fact), f"{what}: {fact} differs"
    assert actual.stride() == expected.stride(), f"{what}: strides differ"
    same = torch.equal(bits(actual), bits(expected))
    assert same, f"{what}: values differ\n{actual}\n{expected}"


def assert_same_training(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Parameters, AdamW's state and AdamW's group values agree bit for bit.

    Ours may hold numbers of its own per parameter, and one more tensor, the previous gradient,
    where a tensor is monitored; a parameter that AdamW has no state for has none here either.
    """
    for g, (group, expected_group) in enumerate(
        zip(ours.param_groups, theirs.param_groups, strict=True)
    ):
        for key in expected_group.keys() - {"params", "foreach", "fused"}:
            assert group[key] == expected_group[key], f"group {g}: {key} differs"
        allowed = set() if group.get("tau") is None else {"prev_grad"}
        for i, (p, q) in enumerate(zip(group["params"], expected_group["params"], strict=True)):
            what = f"group {g}, parameter {i}"
            assert_same_bits(p, q, what)
            state, expected_state = ours.state.get(p, {}), theirs.state.get(q, {})
            assert bool(state) == bool(expected_state), f"{what}: state on one side only"
            for key, value in expected_state.items():
                assert_same_bits(state[key], value, f"{what}, {key}")
            extra = {k for k, v in state.items() if isinstance(v, Tensor)} - expected_state.keys()
            assert extra <= allowed, f"{what}: unexpected state tensors {extra - allowed}"


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
        own = mode | ({"foreach": True} if foreach else {})
        self.ours = cls(groups(self.left), fused=False, **copy.deepcopy(hyper), **own)
        self.theirs = AdamW(
            groups(self.right), foreach=foreach, fused=False, **copy.deepcopy(hyper)
        )

    def sides(self):
        return (self.left, self.ours), (self.right, self.theirs)

    def step(self, grads: list[Tensor | None]) -> None:
        """Both sides step with these gradients; ours must leave them as they were."""
        for side, optimizer in self.sides():
            for p, g in zip(tensors_of(side), grads, strict=True):
                p.grad = None if g is None else copy.deepcopy(g)
            optimizer.step()
        for p, g in zip(tensors_of(self.left), grads, strict=True):
            if g is not None:
                assert_same_bits(p.grad, g, "a gradient after the step")
        self.check()

    def train(self, steps: int, first: int = 0, scale: float = 1.0) -> "Twins":
        for seed in range(first, first + steps):
            self.step(random_gradients(tensors_of(self.right), seed, scale))
        return self

    def check(self) -> None:
        assert_same_training(self.ours, self.theirs)


# Hyper-parameters and dtypes -------------------------------------------------------------------

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
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(mode, dtype, amsgrad, maximize):
    """Every floating dtype, with and without amsgrad and maximize."""
    twins = Twins(
        lambda: small_parameters(dtype),
        mode,
        amsgrad=amsgrad,
        maximize=maximize,
        **hyper_for(dtype),
    )
    twins.train(6)
    if mode.get("tau") == 0.0:
        assert twins.ours.freeze_events == []
        measured = [value for value in twins.ours.statistics().values() if value == value]
        assert measured, "a mode that watches must have measured something"


@every_mode
def test_mixed_dtypes_in_one_group(mode):
    """A group may mix dtypes."""
    twins = Twins(
        lambda: [p for dtype in DTYPES for p in small_parameters(dtype)],
        mode,
        **hyper_for(torch.float16),
    )
    twins.train(4)


@every_mode
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(mode, dtype, amsgrad, maximize):
    """A complex tensor is updated as two real ones, and its state stays complex."""
    twins = Twins(
        lambda: [*small_parameters(dtype), *small_parameters()],
        mode,
        amsgrad=amsgrad,
        maximize=maximize,
        **HYPER,
    )
    twins.train(4)
    state = twins.ours.state[twins.left[0]]
    assert state["exp_avg"].dtype == dtype
    assert "prev_grad" not in state, "a complex tensor is never monitored"


@every_mode
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
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


TORCH_INPUTS, TORCH_FLAG_INPUTS = {}, {}
if ADAMW is not None:
    TORCH_INPUTS = {
        f"{str(dtype).removeprefix('torch.')}-{sample.desc}": (dtype, sample.kwargs)
        for dtype in DTYPES
        for sample in ADAMW.optim_inputs_func(device="cpu", dtype=dtype)
    }
    TORCH_FLAG_INPUTS = {
        sample.desc: sample.kwargs
        for sample in common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float32, ADAMW, skip=("fused", "differentiable")
        )
    }


@needs_torch_inputs
@every_mode
@pytest.mark.parametrize("dtype, kwargs", TORCH_INPUTS.values(), ids=TORCH_INPUTS)
def test_torch_sample_inputs(mode, dtype, kwargs):
    """Every configuration that torch tests its AdamW with."""
    Twins(lambda: small_parameters(dtype), mode, **kwargs).train(5)


@needs_torch_inputs
@pytest.mark.parametrize("kwargs", TORCH_FLAG_INPUTS.values(), ids=TORCH_FLAG_INPUTS)
def test_torch_sample_inputs_with_implementation_flags(kwargs):
    """torch's configurations with foreach on and off equal AdamW with the same flag."""
    kwargs = {key: value for key, value in kwargs.items() if key not in ("foreach", "fused")} | {
        "foreach": kwargs.get("foreach", False)
    }
    kwargs.pop("differentiable", None)
    Twins(small_parameters, **kwargs).train(5)


# Shapes, layouts and gradients -----------------------------------------------------------------


def strided_parameters() -> list[Tensor]:
    """Transposed, sliced (not dense), channels_last, a bucket view, 0-dim, one-element, empty."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return [
        p.requires_grad_()
        for p in (
            normal(6, 4).t(),
            normal(6, 8)[:, ::2],
            normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
            normal(50)[1:31].view(5, 6),
            normal(),
            normal(1),
            normal(1, 1),
            normal(0),
            normal(3, 0),
        )
    ]


@every_mode
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
def test_layouts(mode, amsgrad):
    """Tensors of any layout and size, with gradients laid out otherwise, keep AdamW's strides."""
    twins = Twins(strided_parameters, mode, amsgrad=amsgrad, **HYPER).train(2)
    for seed in range(2, 5):
        grads = random_gradients(twins.right, seed)
        grads[0] = grads[0].t().contiguous().t()
        grads[1] = torch.stack([grads[1], grads[1]], dim=-1)[..., 0]
        grads[3] = torch.tensor(0.25 * seed).expand(5, 6)  # what autograd gives for a sum
        twins.step(grads)


@every_mode
def test_missing_gradients(mode):
    """A tensor without a gradient is left alone: no decay, no step counted, no state."""
    twins = Twins(small_parameters, mode, **HYPER)
    never, sometimes = 0, 1
    for seed in range(6):
        grads = random_gradients(twins.right, seed)
        grads[never] = None
        if seed % 2:
            grads[sometimes] = None
        twins.step(grads)
    assert twins.left[never] not in twins.ours.state
    assert twins.ours.state[twins.left[sometimes]]["step"] == 3
    twins.step([None] * len(twins.left))


@every_mode
def test_unusual_gradients(mode):
    """Zero, infinite and NaN gradients do to a watched tensor what they do under AdamW."""
    twins = Twins(small_parameters, mode, **HYPER).train(1)
    for poison in (0.0, float("inf"), float("nan")):
        grads = random_gradients(twins.right, seed=7)
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


# Groups ----------------------------------------------------------------------------------------


def three_groups(params: list[Tensor]) -> list[dict]:
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
        for p, g in zip(side, random_gradients(side, 0), strict=True):
            p.grad = g
        optimizer.step()
        optimizer.add_param_group({"params": side[3:], "lr": 0.2})
    twins.check()
    twins.train(4, first=1)


@every_mode
def test_tensors_replaced_inside_groups(mode):
    """Some wrappers swap the tensors in `param_groups` after construction; nothing is cached."""
    twins = Twins(
        lambda: [torch.empty(1, requires_grad=True) for _ in small_parameters()],
        PLAIN,
        **HYPER,
    )
    if mode:
        twins.ours = GradESAdamW(twins.left, fused=False, **HYPER, **mode)
    for _, optimizer in twins.sides():
        optimizer.param_groups[0]["params"] = small_parameters()
    twins.left = twins.ours.param_groups[0]["params"]
    twins.right = twins.theirs.param_groups[0]["params"]
    twins.train(4)


# What surrounds an optimizer -------------------------------------------------------------------

SCHEDULERS = {
    "one-cycle-with-momentum": lambda opt: OneCycleLR(
        opt, max_lr=0.1, total_steps=10, cycle_momentum=True
    ),
    "cosine": lambda opt: CosineAnnealingLR(opt, T_max=10),
    "lambda": lambda opt: LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "warm-up-then-cosine": lambda opt: SequentialLR(
        opt,
        [LinearLR(opt, 0.1, total_iters=3), CosineAnnealingLR(opt, T_max=7)],
        milestones=[3],
    ),
    "plateau": lambda opt: ReduceLROnPlateau(opt, patience=1),
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
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
    if tensor_lr:
        assert twins.ours.param_groups[0]["lr"] is lr_object


@every_mode
def test_closure(mode):
    """step(closure) evaluates the closure once and returns its loss."""
    twins = Twins(small_model, mode, **HYPER)
    for seed in range(4):
        losses = []
        for model, optimizer in twins.sides():
            calls = []

            def closure(model=model, optimizer=optimizer, calls=calls, seed=seed):
                calls.append(None)
                optimizer.zero_grad()
                loss = model_loss(model, seed)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
            assert len(calls) == 1
        assert_same_bits(*losses, "the loss")
        twins.check()


@every_mode
def test_step_hooks(mode):
    """Hooks that rescale gradients before the step and change lr after it act as under AdamW."""

    def halve_gradients(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.grad / 2

    def decay_lr(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    twins = Twins(small_model, mode, **HYPER)
    for _, optimizer in twins.sides():
        optimizer.register_step_pre_hook(halve_gradients)
        optimizer.register_step_post_hook(decay_lr)
    for seed in range(4):
        for model, optimizer in twins.sides():
            optimizer.zero_grad()
            model_loss(model, seed).backward()
            optimizer.step()
        twins.check()


@every_mode
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_training_loop_with_accumulation_and_clipping(mode, set_to_none):
    """A named model, two micro-batches per step, clipped gradients, either kind of zero_grad."""
    twins = Twins(small_model, mode, groups=lambda model: model.named_parameters(), **HYPER)
    for seed in range(5):
        for model, optimizer in twins.sides():
            optimizer.zero_grad(set_to_none=set_to_none)
            for micro_batch in range(2):
                model_loss(model, 10 * seed + micro_batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        twins.check()


@every_mode
@pytest.mark.parametrize("unscale", [False, True], ids=["scaler-unscales", "user-unscales"])
def test_grad_scaler_with_overflows(mode, unscale):
    """GradScaler skips the steps with infinite gradients; the others equal AdamW's."""
    twins = Twins(small_model, mode, **HYPER)
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


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@every_mode
@pytest.mark.parametrize("copy_pair", COPIES.values(), ids=COPIES)
def test_copied_between_steps(mode, copy_pair):
    """A copy of tensors and optimizer together trains on; the original is not disturbed."""
    twins = Twins(small_parameters, mode, **HYPER).train(3)
    original, kept = twins.left, [p.detach().clone() for p in twins.left]
    twins.left, twins.ours = copy_pair((twins.left, twins.ours))
    twins.train(4, first=3)
    for p, before in zip(original, kept, strict=True):
        assert_same_bits(p.detach(), before, "the original")


@every_mode
@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
def test_averaged_model(mode, ema):
    """SWA and EMA weights, with SWA's scheduler, equal those of a run with AdamW."""
    twins = Twins(small_model, mode, **HYPER)
    average = get_ema_multi_avg_fn(0.9) if ema else None
    averages = [AveragedModel(model, multi_avg_fn=average) for model, _ in twins.sides()]
    schedulers = [SWALR(opt, swa_lr=0.01, anneal_epochs=3) for _, opt in twins.sides()]
    for seed in range(6):
        for (model, optimizer), averaged, scheduler in zip(
            twins.sides(), averages, schedulers, strict=True
        ):
            optimizer.zero_grad()
            model_loss(model, seed).backward()
            optimizer.step()
            averaged.update_parameters(model)
            scheduler.step()
        twins.check()
    for p, q in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert_same_bits(p, q, "an averaged parameter")


# Checkpoints -----------------------------------------------------------------------------------


def loaded(optimizer: torch.optim.Optimizer, state_dict: dict) -> torch.optim.Optimizer:
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    return optimizer


@every_mode
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adamw_checkpoint_continues_here(mode, dtype, amsgrad):
    """A run started with AdamW continues under GradESAdamW as it would have under AdamW."""
    hyper = HYPER | {"amsgrad": amsgrad}
    twins = Twins(lambda: small_parameters(dtype), mode, **hyper).train(3)
    started = twins.theirs.state_dict()
    twins.ours = loaded(GradESAdamW(twins.left, fused=False, **mode), started)
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
        assert ours.keys() == expected.keys()
        assert {i: s.keys() for i, s in ours["state"].items()} == {
            i: s.keys() for i, s in expected["state"].items()
        }
        assert [g.keys() for g in ours["param_groups"]] == [
            g.keys() for g in expected["param_groups"]
        ]
    twins.ours = loaded(AdamW(twins.left, foreach=False), ours)
    for seed in range(3, 7):
        for side, optimizer in twins.sides():
            for p, g in zip(side, random_gradients(side, seed), strict=True):
                p.grad = g
            optimizer.step()
        for p, q in zip(twins.left, twins.right, strict=True):
            assert_same_bits(p, q, "a parameter")


# Other implementations of the same step --------------------------------------------------------


@every_mode
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_foreach(mode, dtype, amsgrad):
    """foreach=True equals AdamW(foreach=True)."""
    twins = Twins(
        lambda: small_parameters(dtype), mode, foreach=True, amsgrad=amsgrad, **hyper_for(dtype)
    )
    twins.train(5)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_differentiable(amsgrad, maximize):
    """With differentiable=True the step is part of the graph, with AdamW's derivatives.

    One step with amsgrad: torch itself cannot differentiate through a second one.
    """
    derivatives = []
    for cls, own in ((GradESAdamW, {"fused": False}), (AdamW, {"foreach": False})):
        generator = torch.Generator().manual_seed(5)
        start = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        slope = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = cls(
            [p], differentiable=True, amsgrad=amsgrad, maximize=maximize, **HYPER, **own
        )
        for factor in (1.0,) if amsgrad else (1.0, -2.0):
            p.grad = slope * factor + start.sin()
            optimizer.step()
        assert p.requires_grad
        p.square().sum().backward()
        derivatives.append((p, start.grad, slope.grad))
    for actual, expected in zip(*derivatives, strict=True):
        assert expected.abs().max() > 0
        assert_same_bits(actual, expected, "a result or a derivative")


def test_native_choice_stays_close():
    """fused=None may take a faster implementation; it stays within a few ulp of AdamW."""
    params, expected = small_parameters(), small_parameters()
    optimizer, reference = GradESAdamW(params, **HYPER), AdamW(expected, foreach=False, **HYPER)
    for seed in range(5):
        for side, opt in ((params, optimizer), (expected, reference)):
            for p, g in zip(side, random_gradients(side, seed), strict=True):
                p.grad = g
            opt.step()
    for p, q in zip(params, expected, strict=True):
        if optimizer.backend == "reference":
            assert_same_bits(p, q, "a parameter")
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


# Negative controls: one fault each, and the comparison must see it ------------------------------


class Faulty(AdamW):
    """AdamW that takes our arguments; its subclasses each do one thing wrong."""

    def __init__(self, params, *args, tau=None, grace_steps=None, **kwargs):
        super().__init__(params, *args, foreach=False, **kwargs)

    def tensors(self):
        return [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]


class DecayAfterUpdate(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for group, p in self.tensors():
            p.mul_(1 - group["lr"] * group["weight_decay"])


class NoBiasCorrection(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self.tensors():
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            state["step"] += 1
            p.mul_(1 - group["lr"] * group["weight_decay"])
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
            p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"])


class DecaysWithoutGradient(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])


class OneUlpOff(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        p = self.param_groups[0]["params"][0]
        p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(9.0, dtype=p.dtype))


class CountsTwice(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for _, p in self.tensors():
            self.state[p]["step"] += 1


class KeepsSpareTensor(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for _, p in self.tensors():
            self.state[p]["spare"] = torch.zeros(())


class ScribblesOnGradient(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for _, p in self.tensors():
            p.grad.mul_(0.5)


class EmptyStateForMissingGradient(Faulty):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("grades_hits", 0)


FAULTS = [
    DecayAfterUpdate,
    NoBiasCorrection,
    DecaysWithoutGradient,
    OneUlpOff,
    CountsTwice,
    KeepsSpareTensor,
    ScribblesOnGradient,
    EmptyStateForMissingGradient,
]


def three_steps_with_a_gap(cls) -> None:
    twins = Twins(small_parameters, cls=cls, **HYPER)
    for seed in range(3):
        grads = random_gradients(twins.right, seed)
        grads[1] = None
        twins.step(grads)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
def test_comparison_catches(fault):
    """A deliberately wrong AdamW fails the comparison that all tests above rely on."""
    with pytest.raises(AssertionError):
        three_steps_with_a_gap(fault)


def test_comparison_accepts_adamw_itself():
    """The stand-in without a fault passes, so it is the fault that the comparison catches."""
    three_steps_with_a_gap(Faulty)


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
