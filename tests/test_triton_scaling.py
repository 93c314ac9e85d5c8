"""The Triton backend with GradScaler's protocol for optimizers that unscale themselves."""

import math

import pytest
import torch
import triton_runs as tr
from harness import TIMINGS, snapshot, values
from torch import nn

pytestmark = [pytest.mark.gpu] if tr.CUDA else []


def test_scaled_gradients_equal_unscaled_ones():
    """grad_scale divides in the kernel; for a power of two the run keeps every bit.

    The gradients handed back are the unscaled ones, as torch's fused AdamW does.
    """
    scaled, plain = tr.start(), tr.start()
    for _ in range(7):
        tr.scaled_step(scaled)
        plain.steps(1)
        for i, p in enumerate(scaled.params):
            if f"group0.param{i}" not in plain.opt.frozen_units:
                assert torch.equal(p.grad, plain.params[i].grad)
    tr.assert_same_bits(scaled, plain)
    assert len(plain.events) == 2


def test_unscaling_rounds_as_torch_does():
    """For any scale the gradient handed back has the bits of torch's fused AdamW."""
    ours = tr.start(True, ((17, 23),), tau=None)
    p = nn.Parameter(ours.params[0].detach().clone())
    theirs = torch.optim.AdamW([p], fused=True, **tr.HYPER)
    (g,) = tr.usual(ours)
    p.grad, theirs.grad_scale = g * 1000.0, torch.full((), 1000.0, device=tr.DEVICE)
    theirs.found_inf = torch.zeros((), device=tr.DEVICE)
    theirs.step()
    tr.scaled_step(ours, 1000.0)
    tr.assert_close(ours.params[0].grad, p.grad, tr.EPS * p.grad.abs(), "gradient")
    # By a tensor: CUDA divides by a Python number as it multiplies with its reciprocal.
    assert torch.equal(ours.params[0].grad, (g * 1000.0) / torch.full_like(g, 1000.0))
    tr.assert_close(ours.params[0], p, 2 * tr.EPS * (p.abs() + 1), "parameter")


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_small_gradient_that_does_not_change_has_no_change(timing):
    """Unscaling rounds it to a subnormal number of fp16, as the previous one was when stored."""
    run = tr.start(True, ((17, 23),), dtype=torch.float16, tau=0.0, freeze_timing=timing)
    g = (1e-6 * tr.usual(run)[0].float() * 65536).half()
    for _ in range(5):
        run.params[0].grad = g.clone()
        run.opt.grad_scale = torch.full((), 65536.0, device=tr.DEVICE)
        run.opt.found_inf = torch.zeros((), device=tr.DEVICE)
        run.opt.step()
    assert [*run.opt.statistics().values()] == [0.0]


@pytest.mark.parametrize("layout", ["same", "transposed"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_the_unscaled_gradient_is_written_back(timing, layout):
    """Also into gradients with other strides than their parameter's."""
    runs = [tr.start(fused, ((17, 23),), tau=0.0, freeze_timing=timing) for fused in (True, False)]
    for _ in range(4):
        (g,) = tr.usual(runs[0])
        if layout == "transposed":
            g = g.t().contiguous().t()
        tr.scaled_step(runs[0], grads=[g])
        assert torch.equal(runs[0].params[0].grad, g)
        runs[1].steps(1)
    tr.assert_same(*runs)


def test_a_dimension_of_size_1_shares_no_memory():
    """Whatever its stride: the gradient is unscaled, here with the others in another order."""
    run, other = (tr.start(True, ((17, 1, 23),), tau=None) for _ in range(2))
    (g,) = tr.usual(run)
    g = (g * 4.0).transpose(0, 2).contiguous()
    run.params[0].grad = g.as_strided((17, 1, 23), (1, 0, 17))
    run.opt.grad_scale = torch.full((), 4.0, device=tr.DEVICE)
    run.opt.found_inf = torch.zeros((), device=tr.DEVICE)
    run.opt.step()
    tr.scaled_step(other, 4.0)
    assert torch.equal(run.params[0], other.params[0])
    assert torch.equal(run.params[0].grad, other.params[0].grad)


@pytest.mark.parametrize("timing", TIMINGS)
def test_an_expanded_gradient_cannot_be_unscaled(timing):
    """An error before any tensor has changed, as of the C++ op; the next step is right."""
    run, other = (tr.start(True, ((17, 23),), tau=0.0, freeze_timing=timing) for _ in range(2))
    before = run.params[0].detach().clone()
    run.params[0].grad = torch.ones(17, 1, device=tr.DEVICE).expand(17, 23)
    run.opt.grad_scale = torch.full((), 4.0, device=tr.DEVICE)
    run.opt.found_inf = torch.zeros((), device=tr.DEVICE)
    with pytest.raises(RuntimeError, match="share memory cannot be unscaled"):
        run.opt.step()
    assert torch.equal(run.params[0], before)
    for each in (run, other):
        tr.scaled_step(each)
    assert torch.equal(run.params[0], other.params[0])


@pytest.mark.parametrize("with_scale", [True, False], ids=["scaled", "unscaled by the user"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_overflow_writes_nothing(at, timing, with_scale):
    """found_inf: parameters, moments, steps, prev_grad, hits, the count of steps keep their bits.

    Before the grace period ends, on the step that stores gradients, on the first check and later.
    """
    run = tr.start(tau=1e-3, patience=2, freeze_timing=timing).steps(at - 1)
    before = snapshot(run.opt) if at > 1 else values(run.params)
    grads = [torch.full_like(p, math.inf) for p in run.params]
    tr.scaled_step(run, found=1.0, grads=grads, with_scale=with_scale)
    assert all(torch.equal(p.grad, g) for p, g in zip(run.params, grads, strict=True))
    tr.assert_same_bits(snapshot(run.opt) if at > 1 else values(run.params), before)
    assert run.opt.report().step == at - 1
    for state in run.opt.state.values():
        assert state["step"] == at - 1


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("overflows", "watch"),
    [((3,), True), ((1, 2), True), ((4, 5), True), ((5,), True), ((3, 6), False)],
    ids=str,
)
def test_a_run_with_overflows_equals_one_without(overflows, watch, timing):
    """A skipped step counts for nothing: with half-counted patience, and where a cooldown ends.

    Whether the host reads back after each step (`watch`) or at the end.
    """
    options = {"patience": 2, "freeze_timing": timing, "cooldown": 1}
    skipping, plain = tr.start(**options), tr.start(**options)
    for n in range(1, 11):
        if n in overflows:
            grads = [torch.full_like(p, math.nan) for p in skipping.params]
            tr.scaled_step(skipping, found=1.0, grads=grads)
        else:
            tr.scaled_step(skipping)
            plain.steps(1)
        if watch:
            assert skipping.events == plain.events
            assert skipping.opt.report().step == plain.opt.report().step
    assert len(plain.events) == 2
    tr.assert_same_bits(skipping, plain)


def test_grad_scale_and_found_inf_may_be_numbers():
    ours, theirs = tr.start(tau=None), tr.start(tau=None)
    for run, number in ((ours, float), (theirs, lambda x: torch.full((), x, device=tr.DEVICE))):
        run.opt.grad_scale, run.opt.found_inf = number(2.0), number(0.0)
        run.steps(2)
        run.opt.found_inf = number(1.0)
        run.steps(1)
    tr.assert_same_bits(ours, theirs)
    assert {own["step"].item() for own in ours.opt.state.values()} == {2.0}


def test_found_inf_may_be_the_number_zero():
    """GradScaler passes 0 where no tensor has a gradient."""
    run, plain = tr.start().steps(2), tr.start().steps(2)
    tr.scaled_step(run, found=0, grads=[None] * 3, with_scale=False)
    plain.step(None, None, None)
    tr.assert_same_bits(run.steps(2), plain.steps(2))


def test_a_real_grad_scaler():
    """torch.amp.GradScaler: an overflow in the middle is skipped, the scale falls, events agree."""
    run, plain = tr.start(), tr.start(False)
    scaler = torch.amp.GradScaler(tr.DEVICE, init_scale=2.0**10, growth_interval=100)
    for n in range(1, 8):
        loss = sum((g * p).sum() for g, p in zip(tr.usual(run), run.params, strict=True))
        if n == 4:
            loss = loss * math.inf
        run.opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(run.opt)
        scaler.update()
        if n != 4:
            run.t += 1
            plain.steps(1)
    assert scaler.get_scale() == 2.0**9
    tr.assert_same(run, plain)
    assert len(plain.events) == 2
    assert getattr(run.opt, "found_inf", None) is None
