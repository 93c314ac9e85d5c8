"""Loops written by hand as the documentation shows them: plain PyTorch, and Accelerate."""

from types import SimpleNamespace

import pytest
import torch
from tiny import assert_same_run, assert_same_weights, regression_data, tiny_network
from torch import nn
from torch.utils.data import DataLoader

from grades_kernels import GradESAdamW
from grades_kernels.integrations import (
    is_finished,
    measurements,
    release_under_ddp,
    unwrap_optimizer,
)

STEPS, ACCUMULATE, CLIP = 12, 2, 0.3
# Chosen so that of the three matrices some freeze within the run, and some never.
OPTIONS = {"tau": 0.0085, "tau_per": "element", "alpha": 0.25}


def make_parts(**options):
    """The model, its optimizer, a schedule and the batches."""
    model = tiny_network()
    settings = {**OPTIONS, **options}
    optimizer = GradESAdamW(model.named_parameters(), lr=1e-2, total_steps=STEPS, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader = DataLoader(regression_data(STEPS * ACCUMULATE * 4), batch_size=4)
    return model, optimizer, schedule, loader


def plain(folder=None, *, save_at=None, resume_at=0, load=("model", "optimizer"), **options):
    """A loop with accumulation, clipping, a schedule and a checkpoint."""
    model, optimizer, schedule, loader = make_parts(**options)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if resume_at:
        states = torch.load(folder / "step.pt", weights_only=True)
        for name in (*load, "schedule"):
            parts[name].load_state_dict(states[name])
    for k, (x, y) in enumerate(loader, start=1):
        if k <= resume_at * ACCUMULATE:
            continue
        (nn.functional.mse_loss(model(x), y) / ACCUMULATE).backward()
        if k % ACCUMULATE:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if optimizer.all_frozen or k == ACCUMULATE * (save_at or 0):
            break
    if save_at:
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(states, folder / "step.pt")
    return model, optimizer


def accelerated(folder=None, *, save_at=None, resume_at=0, bf16=False, **options):
    """The same loop with Accelerate, which counts the accumulation and wraps the optimizer."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # one accelerator per run, in one process
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATE,
        mixed_precision="bf16" if bf16 else "no",
        step_scheduler_with_optimizer=False,
    )
    bare, optimizer, *others = make_parts(**options)
    model, wrapped, schedule, batches = accelerator.prepare(bare, optimizer, *others)
    assert unwrap_optimizer(wrapped) is optimizer and not hasattr(wrapped, "all_frozen")
    if resume_at:
        accelerator.load_state(folder)
        batches = accelerator.skip_first_batches(batches, resume_at * ACCUMULATE)
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            wrapped.step()
            if accelerator.sync_gradients:
                schedule.step()
            wrapped.zero_grad()
        if optimizer.all_frozen or optimizer.report().step == save_at:
            break
    if save_at:
        accelerator.save_state(folder)
    return bare, optimizer


both_loops = pytest.mark.parametrize("loop", [plain, accelerated])


@both_loops
def test_the_loop_stops_when_all_units_are_frozen(loop):
    _, optimizer = loop(max_frozen=0.3)
    assert optimizer.all_frozen and len(optimizer.frozen_units) == 3
    steps = [event.step for event in optimizer.freeze_events]
    assert 3 < min(steps) < optimizer.report().step == max(steps) < STEPS


@pytest.mark.parametrize("options", [{}, {"max_frozen": 0.3}], ids=["whole", "stopped"])
def test_accelerate_equals_a_plain_loop_bit_for_bit(options):
    expected = plain(**options)
    assert expected[1].freeze_events
    assert_same_run(accelerated(**options), expected)


def test_bf16_under_accelerate_freezes():
    _, optimizer = accelerated(bf16=True, tau=1e9)
    assert optimizer.report().step == 4 and optimizer.all_frozen


@both_loops
@pytest.mark.parametrize("cut", [2, 8], ids=["in-grace", "some-frozen"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, loop, cut):
    whole = loop()
    assert 0 < len(whole[1].frozen_units) < 3
    loop(tmp_path, save_at=cut)
    assert_same_run(loop(tmp_path, resume_at=cut), whole, history=False)


def test_a_resume_without_the_optimizer_differs(tmp_path):
    """Negative control of all comparisons by `assert_same_run`."""
    plain(tmp_path, save_at=8)
    with pytest.raises(AssertionError):
        assert_same_run(plain(tmp_path, resume_at=8, load=["model"]), plain(), history=False)


def test_unwrapping_another_optimizer_is_an_error_that_names_it():
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=r"no GradESAdamW but SGD.*Train with"):
        unwrap_optimizer(sgd)
    with pytest.raises(ValueError, match=r"optimizer=NoneType"):
        unwrap_optimizer(None)


def test_the_functions_for_loops_take_wrapped_optimizers():
    p = nn.Parameter(torch.ones(2, 2))
    own = GradESAdamW([p], tau=1e9, statistic="norm", grace_steps=0)
    wrapped = SimpleNamespace(optimizer=own)
    p.grad = torch.ones_like(p)
    assert not is_finished(wrapped)
    own.step()
    assert is_finished(wrapped)
    assert measurements(wrapped)["grades/frozen_share"] == 1.0
    release_under_ddp(wrapped, lambda: None)
    with pytest.raises(TypeError, match="lambda: model"):
        release_under_ddp(own, nn.Linear(2, 2))


# Other ways to step

OWN = {**OPTIONS, "lr": 1e-2, "total_steps": STEPS, "tau": 0.022}  # without clipping


def together(model):
    return [GradESAdamW(model.named_parameters(), **OWN)]


def by_part(model):
    """An optimizer for each part of a model, with names as the whole model gives them."""
    named = list(model.named_parameters())
    return [GradESAdamW(x, **OWN) for x in (named[:2], named[2:])]


def in_backward(model):
    """An optimizer for each parameter, which steps when the gradient arrives."""
    optimizers = {}
    for name, p in model.named_parameters():
        own = {"params": [(name, p)], "tau": OWN["tau"] if p.dim() > 1 else None}
        optimizers[p] = GradESAdamW([own], **{**OWN, "tau": None})

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    return list(optimizers.values())


def deferred(model):
    """Made on the meta device; `to_empty` gives the same parameters their memory afterwards."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    optimizers = together(model.to("meta"))
    model.to_empty(device="cpu").load_state_dict(weights)
    torch.__future__.set_swap_module_params_on_conversion(before)
    return optimizers


def stepped(make):
    """The model and the decisions of a run with the optimizers that `make(model)` returns."""
    model = tiny_network()
    optimizers = make(model)
    for x, y in DataLoader(regression_data(STEPS * 8), batch_size=8):
        nn.functional.mse_loss(model(x), y).backward()
        for optimizer in optimizers if make is not in_backward else []:
            optimizer.step()
            optimizer.zero_grad()
    return model, sorted(event for x in optimizers for event in x.freeze_events)


@pytest.mark.parametrize("make", [by_part, in_backward, deferred])
def test_other_ways_to_step_equal_one_optimizer(make):
    """Bit for bit; some matrices freeze in the run."""
    (model, events), (expected, others) = stepped(make), stepped(together)
    assert_same_weights(model, expected)
    assert events == others and 0 < len(events) < 3
