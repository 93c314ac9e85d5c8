"""What only a GPU can show: graphs, synchronisation, rounding, several devices, large tensors.

Contract: step() never waits for the device, a captured step decides inside its replays as an eager
one does, and storage in low precision is rounded to nearest. tests/test_triton.py runs the kernels
themselves on a GPU too. `make gpu` runs both.
"""

import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_triton import (
    HYPER,
    NEXT_STEP,
    PAIRS,
    SHAPES,
    TAUS,
    TIMINGS,
    WEIGHT_CHANGE,
    Run,
    assert_bits,
    assert_same,
    bits,
    gradient,
    low_precision_runs,
)
from torch import nn

from grades_kernels import GradESAdamW

pytestmark = pytest.mark.gpu


# Captured steps -------------------------------------------------------------------------------


class Captured:
    """A run whose step is captured after `warm_up` eager ones and replayed from then on."""

    def __init__(self, warm_up=3, **options):
        self.lr = torch.tensor(HYPER["lr"], device="cuda")
        self.run = Run(True, capturable=True, stop_grad=False, lr=self.lr, **options)
        self.grads = [torch.zeros_like(p) for p in self.run.params]
        self.warm_up, self.graph = warm_up, None

    def step(self, lr):
        run = self.run
        run.t += 1
        self.lr.fill_(lr)
        for i, (p, g) in enumerate(zip(run.params, self.grads, strict=True)):
            g.copy_(gradient(run.t, i, p))
            p.grad = g
        if run.t <= self.warm_up:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run.opt.step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    run.opt.step()
            self.graph.replay()


def warmed_lr(t):
    return 0.03 * 0.9**t


CAPTURES = {
    "captured in the grace period": {"grace_steps": 5},
    "captured during the checks": {"grace_steps": 1},
    "every second step": {"check_every": 2, "patience": 2, "grace_steps": 4},
    "cooldown": {"cooldown": 3, "grace_steps": 4},
    "max_frozen": {"max_frozen": 0.5, "grace_steps": 4},
    "momentum": {"statistic": "momentum"},
    "norm, per element": {"statistic": "norm", "tau_per": "element", "tau": 0.2},
    "amsgrad, maximize": {"amsgrad": True, "maximize": True},
    "observe only": {"tau": 0.0},
    "signal": {"statistic": "signal", "tau": 0.7},
    "signal, auto": {"statistic": "signal", "tau": "auto", "betas": (0.6, 0.97)},
}


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("name", CAPTURES)
def test_freezes_happen_inside_replays(name, timing):
    """A captured step, with lr as a tensor, equals the eager run: same events at the same steps."""
    compare_replays({**CAPTURES[name], "freeze_timing": timing})


def test_replays_measure_how_far_weights_move():
    """ "weight_change", in the one timing that it has."""
    compare_replays(WEIGHT_CHANGE)


def compare_replays(options):
    captured, eager = Captured(**options), Run(True, stop_grad=False, **options)
    for t in range(1, 15):
        captured.step(warmed_lr(t))
        eager.opt.param_groups[0]["lr"] = warmed_lr(t)
        eager.step()
    assert captured.run.events == eager.events
    assert captured.run.opt.report().step == eager.opt.report().step == 14
    if options.get("tau") != 0.0:
        assert max(step for step, *_ in eager.events) > 3, "a unit freezes in a replay"
        assert captured.run.opt.all_frozen == eager.opt.all_frozen
    for p, q in zip(captured.run.params, eager.params, strict=True):
        assert (p - q).abs().max() <= 1e-6 * (1 + q.abs().max())
    got, want = (run.opt.state_dict()["state"] for run in (captured.run, eager))
    for i in want:
        for key in ("step", "grades_frozen_at", "grades_decided_at", "grades_hits"):
            assert got[i][key] == want[i][key], f"{key} of {i}"


def test_replays_compare_with_a_tau_that_is_lowered():
    """A new tau reaches the graph with the next reading of the optimizer; nothing is laid out."""
    captured = Captured(tau=0.0, grace_steps=4)
    for t in range(1, 8):
        captured.step(warmed_lr(t))
    run = captured.run
    plan = run.opt._plan
    run.opt.param_groups[0]["tau"] = math.inf
    assert run.opt.report().units[0].tau == math.inf
    captured.step(warmed_lr(8))
    assert [(event.step, event.tau) for event in run.opt.freeze_events] == [(8, math.inf)] * 2
    assert run.opt._plan is plan


def test_frozen_tensors_keep_every_bit_in_replays():
    """The graph still launches their programs, whatever the gradient buffers hold."""
    captured = Captured(grace_steps=4)
    for t in range(1, 13):
        captured.step(warmed_lr(t))
    run = captured.run
    assert "group0.param1" in run.opt.frozen_units
    before = copy.deepcopy((run.params[1].detach(), run.opt.state[run.params[1]]["exp_avg"]))
    for value in (math.nan, math.inf, 1.0):
        captured.grads[1].fill_(value)
        captured.graph.replay()
    after = (run.params[1].detach(), run.opt.state[run.params[1]]["exp_avg"])
    assert_bits(after, before)


def test_all_frozen_shows_during_replays_without_waiting():
    """It reads the pinned mirror, which replays copy to; exact once the device has caught up."""
    captured = Captured(tau=math.inf, grace_steps=5)
    for t in range(1, 9):
        captured.step(warmed_lr(t))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert captured.run.opt.all_frozen
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_without_warm_up_is_refused():
    """State made during capture would be lost: an error says to take a few steps first."""
    captured = Captured(warm_up=0)
    with pytest.raises(RuntimeError, match="captured"):
        captured.step(0.1)


# Synchronisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_step_never_waits_for_the_device(statistic, timing, lr):
    """torch's sync debug mode is silent over checks, freezes, drops, moved gradients and a tau that
    changes in every step.

    That mode sees calls of torch, not event waits; the lagged read of the mirror is meant.
    """
    options = {"lr": torch.tensor(0.03, device="cuda")} if lr == "tensor" else {}
    tau = TAUS.get(statistic, 50.0)
    run = Run(True, statistic=statistic, freeze_timing=timing, tau=tau, **options).steps(3)
    grads = [
        [gradient(t, i, p) for i, p in enumerate(run.params)] for t in range(4, 10)
    ]  # each step has gradients at new addresses
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in grads:
            run.opt.param_groups[0]["tau"] = tau = tau * 1.001
            run.step(row)
            assert run.opt.all_frozen in (True, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.events) == 2


def test_the_host_runs_ahead():
    """step() returns while the device is still busy with what came before."""
    run = Run(True, tau=0.0).steps(4)
    grads = [
        gradient(5, i, p) for i, p in enumerate(run.params)
    ]  # copied to the device: that waits
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second of cycles
    run.step(grads)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_gradients_stop_one_step_after_the_freeze():
    """A fixed lag: requires_grad is off from the start of the step after the decisive one."""
    run = Run(True).steps(3)
    assert [p.requires_grad for p in run.params] == [True, True, True]
    run.step()
    assert [p.requires_grad for p in run.params] == [True, False, True]
    assert run.opt.frozen_units == ["group0.param1"]


@pytest.mark.parametrize("timing", TIMINGS)
def test_all_frozen_is_at_most_one_step_late(timing):
    """It never waits, is True after the next step at the latest, and exact after other readings."""
    late, exact = (Run(True, tau=math.inf, freeze_timing=timing).steps(3) for _ in range(2))
    assert exact.opt.freeze_events and exact.opt.all_frozen
    late.step()
    torch.cuda.synchronize()
    assert late.opt.all_frozen


def test_memory_of_previous_gradients_comes_with_the_checks():
    """No prev_grad is allocated in the grace period; those of frozen units are given back."""
    run = Run(True, ((1024, 1024), (1024, 1024)), tau=1e-9, grace_steps=4, stop_grad=False)

    def used(n):
        run.steps(n)
        for p in run.params:
            p.grad = None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**20

    first, before, with_checks = used(1), used(2), used(1)
    assert before - first < 1
    assert 7.9 < with_checks - before < 9, "two gradients of 4 MiB"
    run.opt.param_groups[0]["tau"] = math.inf
    assert used(3) <= before + 1
    assert run.opt.all_frozen


# Rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_is_rounded_to_nearest(dtype):
    """The first step from given numbers: fp32 results rounded once, so the bits of the reference
    in fp32 after rounding, save where those lie within fp32's own error of a tie."""
    shapes = ((257, 1031),)
    ours, _, exact = low_precision_runs(dtype, dtype, n=1, shapes=shapes, eps=1e-4)
    pairs = [(ours.params[0], exact.params[0])]
    states = ours.opt.state[ours.params[0]], exact.opt.state[exact.params[0]]
    pairs += [(states[0][key], states[1][key]) for key in ("exp_avg", "exp_avg_sq")]
    for got, want in pairs:
        rounded = want.detach().to(dtype)
        wrong = (got != rounded).float().mean().item()
        assert wrong < 2e-3, f"{wrong:.2%} of the elements differ"
        ulp = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
        assert ((got.float() - want).abs() <= 0.51 * ulp).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_close_to_torchs_fused_adamw(dtype):
    """20 steps with nothing monitored: as near to the fp32 run as torch's fused AdamW is."""
    ours, _, exact = low_precision_runs(dtype, dtype, n=20, tau=None, eps=1e-4, statistic="norm")
    theirs = [nn.Parameter(p.detach().to(dtype)) for p in exact.start]
    opt = torch.optim.AdamW(theirs, fused=True, **{**HYPER, "eps": 1e-4})
    for t in range(1, 21):
        for i, (p, x) in enumerate(zip(theirs, exact.params, strict=True)):
            p.grad = gradient(t, i, x, dtype)
        opt.step()
    for p, q, x in zip(ours.params, theirs, exact.params, strict=True):
        error, bound = (p.float() - x).abs().mean(), (q.float() - x).abs().mean()
        assert error <= 1.2 * bound + torch.finfo(torch.float32).eps


# Devices, sizes, compiled models --------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current():
    """Each launch goes to the device of its tensors."""
    runs = []
    for fused in (True, False):
        run = Run(fused)
        run.params = [nn.Parameter(p.detach().to("cuda:1")) for p in run.params]
        run.finish(fused)
        for t in range(1, 9):
            run.step([gradient(t, i, p).to("cuda:1") for i, p in enumerate(run.params)])
        runs.append(run)
    assert_same(*runs)


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@TWO
@pytest.mark.parametrize("options", [{}, NEXT_STEP, {"max_frozen": 0.5}, {"cooldown": 2}], ids=str)
def test_tensors_on_two_devices(options):
    """One optimizer over both: events, statistics and parameters of the reference."""
    runs = []
    for fused in (True, False):
        run = Run(fused)
        run.params = [
            nn.Parameter(p.detach().to(f"cuda:{i % 2}")) for i, p in enumerate(run.params)
        ]
        run.finish(fused, options=options)
        for t in range(1, 11):
            run.step([gradient(t, i, p).to(p.device) for i, p in enumerate(run.params)])
        runs.append(run)
    assert_same(*runs)
    assert len(runs[0].opt._plan.parts) == 2


@TWO
def test_two_devices_never_wait_for_each_other():
    """The host tells each what the other has decided without a synchronisation."""
    run = Run(True)
    run.params = [nn.Parameter(p.detach().to(f"cuda:{i % 2}")) for i, p in enumerate(run.params)]
    run.finish(True, options={"max_frozen": 0.5})
    grads = [
        [gradient(t, i, p).to(p.device) for i, p in enumerate(run.params)] for t in range(1, 9)
    ]
    for row in grads[:3]:
        run.step(row)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in grads[3:]:
            run.step(row)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.events) == 2


SANITIZED = """
import torch
from grades_kernels import GradESAdamW
for statistic in ("change", "signal", "weight_change"):
    params = [torch.nn.Parameter(torch.randn(n, 513, device="cuda")) for n in (3, 9)]
    opt = GradESAdamW(params, tau=0.0, grace_steps=1, statistic=statistic,
                      freeze_timing="next_step", fused=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    print(opt.statistics())
"""


# What is cached by torch belongs to no tensor and yet may be touched, as far as the tool can see.
UNCACHED = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Neither an access out of bounds nor a race in shared memory, over a small run."""
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable]
    run = subprocess.run(
        [*command, "-c", SANITIZED],
        cwd=Path(__file__).parents[1],
        env=UNCACHED,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if "Device not supported" in run.stdout:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets are 64-bit: both ends of a tensor of 2^31 + 2049 elements get AdamW's update."""
    n = 2**31 + 2049
    if torch.cuda.mem_get_info()[0] < 8 * n + 12 * 2**30:
        pytest.skip("needs about 30 GB of free memory")
    p = nn.Parameter(torch.ones(1, n, device="cuda", dtype=torch.bfloat16))
    opt = GradESAdamW([p], fused=True, lr=0.1, tau=0.0, grace_steps=0, statistic="norm")
    p.grad = torch.full_like(p, 0.5)
    opt.step()
    small = nn.Parameter(torch.ones(1, 1, device="cuda", dtype=torch.bfloat16))
    torch_opt = torch.optim.AdamW([small], lr=0.1, fused=True)
    small.grad = torch.full_like(small, 0.5)
    torch_opt.step()
    for part in (p[0, :2048], p[0, 2**31 - 1024 : 2**31 + 1024], p[0, -2049:]):
        assert (part == small[0, 0]).all()
    assert opt.statistics()["group0.param0"] == pytest.approx(n / 2, rel=1e-6)


def test_a_model_may_move_after_the_optimizer_was_made():
    """model.cuda() swaps the storage of the very tensors that the optimizer holds."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    opt = GradESAdamW(model.named_parameters(), tau=0.0, grace_steps=0, statistic="norm")
    assert opt.backend != "triton"
    model.cuda()
    assert opt.backend == "triton"
    model(torch.randn(4, 8, device="cuda")).sum().backward()
    opt.step()
    assert opt.statistics()["weight"] > 0
    model.cpu()
    assert opt.backend != "triton"
    model.cuda()


def test_a_model_that_moves_away_from_its_state_is_an_error():
    """As with torch's AdamW; nothing has changed then, and moving the state along is enough."""
    model = nn.Linear(8, 8)
    opt = GradESAdamW(model.parameters(), fused=False)
    model(torch.randn(4, 8)).sum().backward()
    opt.step()
    model.cuda()
    before = [p.detach().clone() for p in model.parameters()]
    opt.param_groups[0]["fused"] = None
    with pytest.raises(ValueError, match="a moment of parameter 0 is on cpu"):
        opt.step()
    assert all(map(torch.equal, before, model.parameters()))
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_compiled_model_freezes_without_recompiling_the_step():
    """torch.compile(model) trains to the events of the plain model."""

    def train(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
        opt = GradESAdamW(
            model.named_parameters(), lr=0.01, tau=math.inf, grace_steps=3, stop_grad=False
        )
        forward = torch.compile(model) if compiled else model
        x = torch.randn(32, 64, device="cuda")
        for _ in range(6):
            opt.zero_grad()
            forward(x).square().mean().backward()
            opt.step()
        return opt, [p.detach().clone() for p in model.parameters()]

    torch._dynamo.reset()
    (compiled, mine), (plain, theirs) = train(True), train(False)
    assert [e.unit for e in compiled.freeze_events] == [e.unit for e in plain.freeze_events]
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("growth", [1, 100])
def test_a_grad_scaler_in_half_precision_training(growth):
    """autocast and GradScaler with scales that really overflow: parameters stay finite, skipped
    steps are not counted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
    opt = GradESAdamW(model.parameters(), lr=0.01, tau=1e-6, grace_steps=2, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=growth)
    x = torch.randn(32, 64, device="cuda")
    happened = 0
    for _ in range(40):
        opt.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        before = scaler.get_scale()
        scaler.update()
        happened += scaler.get_scale() >= before
    assert 5 < happened < 40
    assert opt.report().step == happened
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_larger_than_the_device_twice():
    """Many programs in flight, units of many sizes: two runs have the same bits, and the events
    of the reference."""
    shapes = (*((64 * k, 512) for k in range(1, 40)), *SHAPES)
    runs = [Run(fused, shapes, tau=20000.0) for fused in (True, True, False)]
    for t in range(1, 9):
        grads = [gradient(t, i, p) for i, p in enumerate(runs[0].params)]
        for run in runs:
            run.step(grads)
    assert_bits(bits(runs[0]), bits(runs[1]))
    assert_same(runs[0], runs[2])
    assert len(runs[2].events) > 5
