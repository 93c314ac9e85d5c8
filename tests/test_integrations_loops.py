"""Loops written by hand as the documentation shows them: Accelerate alone, and plain PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grades_kernels import GradESAdamW
from grades_kernels.integrations import unwrap_optimizer

STEPS, ACCUMULATE, CLIP = 12, 2, 0.3
# Chosen so that of the three matrices some freeze within the run, and some never.
OPTIONS = {"tau": 0.0085, "tau_per": "element", "alpha": 0.25}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
    )


def make_loader() -> DataLoader:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * ACCUMULATE * 4, 8, generator=g)
    return DataLoader(TensorDataset(x, torch.randn(len(x), 2, generator=g)), batch_size=4)


def make_optimizer(model: nn.Module, **options) -> GradESAdamW:
    settings = {**OPTIONS, **options}
    return GradESAdamW(model.named_parameters(), lr=1e-2, total_steps=STEPS, **settings)


def recipe(
    *, stop_after: int | None = None, checkpoint: dict | None = None, **options
) -> tuple[nn.Module, GradESAdamW, dict]:
    """A loop as recipes have it: accumulation, clipping, a schedule, a log, a checkpoint."""
    model = make_model()
    optimizer = make_optimizer(model, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    start = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        start = checkpoint["step"]

    log = []
    for k, (x, y) in enumerate(make_loader()):
        if k < start * ACCUMULATE:
            continue
        (nn.functional.mse_loss(model(x), y) / ACCUMULATE).backward()
        if (k + 1) % ACCUMULATE:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append(len(optimizer.frozen_units))
        step = (k + 1) // ACCUMULATE
        if optimizer.all_frozen or step == stop_after:
            break
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "step": step,
        "log": log,
    }
    return model, optimizer, state


def assert_same(a: tuple, b: tuple) -> None:
    assert a[1].freeze_events == b[1].freeze_events
    assert a[1].statistics() == b[1].statistics()
    theirs = dict(b[0].named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in a[0].named_parameters())


def test_recipe_stops_when_all_is_frozen():
    _, optimizer, state = recipe(max_frozen=0.3)
    assert optimizer.all_frozen
    assert state["step"] == max(event.step for event in optimizer.freeze_events) < STEPS
    assert state["log"][-1] == 3 and state["log"][:3] == [0, 0, 0]


@pytest.mark.parametrize("cut", [2, 8], ids=["in-grace", "some-frozen"])
def test_recipe_resumes_bit_identically(tmp_path, cut):
    whole = recipe()
    assert 0 < len(whole[1].frozen_units) < 3
    torch.save(recipe(stop_after=cut)[2], tmp_path / "step.pt")
    assert_same(recipe(checkpoint=torch.load(tmp_path / "step.pt", weights_only=True)), whole)


def test_a_resume_without_the_optimizer_is_noticed(tmp_path):
    """Negative control of the comparison above."""
    whole = recipe()
    state = recipe(stop_after=8)[2]
    fresh = make_model()
    with torch.no_grad():
        state["optimizer"] = make_optimizer(fresh).state_dict()
    with pytest.raises(AssertionError):
        assert_same(recipe(checkpoint=state), whole)


def accelerated(folder=None, *, save_at=None, resume=False, bf16=False, **options):
    """The same loop under Accelerate, which counts the accumulation and wraps the optimizer."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # one accelerator per run, in one process
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATE,
        mixed_precision="bf16" if bf16 else "no",
        step_scheduler_with_optimizer=False,
    )
    bare = make_model()
    optimizer = make_optimizer(bare, **options)  # keep it: the wrapper hides `all_frozen`
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, wrapped, batches, schedule = accelerator.prepare(
        bare, optimizer, make_loader(), schedule
    )
    assert unwrap_optimizer(wrapped) is optimizer and not hasattr(wrapped, "all_frozen")
    if resume:
        accelerator.load_state(folder)
        batches = accelerator.skip_first_batches(batches, save_at * ACCUMULATE)
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            wrapped.step()
            if accelerator.sync_gradients:
                schedule.step()
            wrapped.zero_grad()
        steps = optimizer.report().step
        if optimizer.all_frozen or (steps == save_at and not resume):
            break
    if save_at is not None and not resume:
        accelerator.save_state(folder)
    return bare, optimizer


def test_accelerate_freezes_what_a_plain_loop_freezes():
    pytest.importorskip("accelerate")
    plain = recipe()
    assert plain[1].freeze_events
    assert_same(accelerated(), plain)


def test_accelerate_stops_when_all_is_frozen():
    pytest.importorskip("accelerate")
    assert_same(accelerated(max_frozen=0.3), recipe(max_frozen=0.3))


def test_accelerate_in_bf16_freezes():
    pytest.importorskip("accelerate")
    _, optimizer = accelerated(bf16=True, tau=1e9)
    assert optimizer.report().step == 4 and optimizer.all_frozen


@pytest.mark.parametrize("cut", [2, 8], ids=["in-grace", "some-frozen"])
def test_accelerate_resumes_bit_identically(tmp_path, cut):
    pytest.importorskip("accelerate")
    whole = accelerated()
    accelerated(tmp_path, save_at=cut)
    assert_same(accelerated(tmp_path, save_at=cut, resume=True), whole)


def test_unwrapping_says_what_it_found():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(ValueError, match=r"no GradESAdamW but SGD.*Train with"):
        unwrap_optimizer(torch.optim.SGD(parameters))
    with pytest.raises(ValueError, match=r"optimizer=NoneType"):
        unwrap_optimizer(None)


def test_importing_the_package_needs_torch_alone():
    wanted = "{'transformers', 'accelerate', 'peft', 'lightning', 'matplotlib', 'rich'}"
    code = f"import sys, grades_kernels.integrations; print(sorted({wanted} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
