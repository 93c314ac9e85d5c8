"""Only a GPU can show these: graphs, synchronisation, rounding, several devices, large tensors.

Contract: step() never waits for the device, storage in low precision is rounded to nearest, and a
step can be captured in a CUDA graph where nothing is monitored. The other files of the Triton tests
run the kernels themselves on a GPU too. `make gpu` runs all of them.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_runs as tr
from harness import PAIRS, SHAPES, TIMINGS, fading_gradient, parameters, values
from torch import nn

from grades_kernels import GradESAdamW

pytestmark = pytest.mark.gpu


# CUDA graphs ----------------------------------------------------------------------------------


def test_a_step_with_tau_cannot_be_captured():
    """A RuntimeError names the way out; nothing has changed then, and eager steps go on."""
    run, other = (tr.start(capturable=True).steps(3) for _ in range(2))
    message = "cannot be captured in a CUDA graph"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.opt.step()  # the device may not have finished the step before
    tr.assert_same_bits(run.steps(5), other.steps(5))
    assert len(run.events) == 2


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}], ids=str)
def test_a_captured_step_without_tau_equals_adamw(options):
    """capturable=True: torch's own operations, with lr as a tensor that changes between replays."""
    runs = []
    for make in (GradESAdamW, torch.optim.AdamW):
        params = parameters(*SHAPES, device="cuda")
        for p in params:
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(0.03, device="cuda")
        runs.append(
            (params, lr, make(params, **{**tr.HYPER, "lr": lr}, capturable=True, **options))
        )
    graphs = []
    for t in range(1, 9):
        for k, (params, lr, opt) in enumerate(runs):
            lr.fill_(0.03 * 0.9**t)
            for i, p in enumerate(params):
                p.grad.copy_(fading_gradient(t, i, p))
            if t <= 3:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    opt.step()
                torch.cuda.current_stream().wait_stream(stream)
                continue
            if len(graphs) <= k:
                graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graphs[k]):
                    opt.step()
            graphs[k].replay()
    tr.assert_same_bits(*(values(params) for params, _, _ in runs))


# Synchronisation ------------------------------------------------------------------------------


def gradients(run, steps):
    """The gradients of these steps, each at an address of its own; copying them waits."""
    grads = [[fading_gradient(t, i, p) for i, p in enumerate(run.params)] for t in steps]
    for n in range(torch.cuda.device_count()):
        torch.cuda.synchronize(n)
    return grads


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_step_never_waits_for_the_device(statistic, timing, lr):
    """torch's sync debug mode is silent over checks, freezes, drops, moved gradients and a tau that
    changes in every step; with lr as a tensor on the host.

    That mode sees calls of torch, not event waits: reading back the step before is one.
    """
    options = {"lr": torch.tensor(0.03)} if lr == "tensor" else {}
    options |= {"tau": 50.0, **tr.SCALES.get(statistic, {})}
    run = tr.start(statistic=statistic, freeze_timing=timing, **options).steps(3)
    tau = run.opt.param_groups[0]["tau"]
    grads = gradients(run, range(4, 10))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in grads:
            run.opt.param_groups[0]["tau"] = tau = tau * 1.001
            run.step(*row)
            assert run.opt.all_frozen in (True, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(run.events) == 2


def test_the_host_runs_ahead():
    """step() returns while the device is still busy with earlier work."""
    run = tr.start(tau=0.0).steps(4)
    run.opt.report()  # the step before has been read back
    (grads,) = gradients(run, [5])
    torch.cuda._sleep(1_000_000_000)  # about half a second of cycles
    run.step(*grads)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_gradients_stop_one_step_after_the_freeze():
    """A fixed lag: requires_grad is off from the start of the step after the decisive one."""
    run = tr.start().steps(3)
    assert [p.requires_grad for p in run.params] == [True, True, True]
    run.steps(1)
    assert [p.requires_grad for p in run.params] == [True, False, True]
    assert run.opt.frozen_units == ["group0.param1"]


@pytest.mark.parametrize("timing", TIMINGS)
def test_all_frozen_is_at_most_one_step_late(timing):
    """It never waits, is True after the next step at the latest, and exact after other readings."""
    late, exact = (tr.start(tau=math.inf, freeze_timing=timing).steps(3) for _ in range(2))
    assert exact.opt.freeze_events and exact.opt.all_frozen
    late.steps(1)
    torch.cuda.synchronize()
    assert late.opt.all_frozen


def test_memory_of_previous_gradients_comes_with_the_checks():
    """No prev_grad is allocated in the grace period; those of frozen units are given back."""
    run = tr.start(True, ((1024, 1024), (1024, 1024)), tau=1e-9, grace_steps=4, stop_grad=False)

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
    ours, _, exact = tr.low_precision_runs(dtype, dtype, n=1, shapes=shapes, eps=1e-4)
    pairs = [(ours.params[0], exact.params[0])]
    states = ours.opt.state[ours.params[0]], exact.opt.state[exact.params[0]]
    pairs += [(states[0][key], states[1][key]) for key in tr.MOMENTS]
    for got, want in pairs:
        rounded = want.detach().to(dtype)
        wrong = (got != rounded).float().mean().item()
        assert wrong < 2e-3, f"{wrong:.2%} of the elements differ"
        ulp = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
        assert ((got.float() - want).abs() <= 0.51 * ulp).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_close_to_torchs_fused_adamw(dtype):
    """20 steps with nothing monitored: as near to the fp32 run as torch's fused AdamW is."""
    shapes, options = ((17, 23), (1, 1025)), {"tau": None, "eps": 1e-4, "statistic": "norm"}
    ours, _, exact = tr.low_precision_runs(dtype, dtype, n=20, shapes=shapes, **options)
    theirs = [nn.Parameter(p.to(dtype)) for p in parameters(*shapes, device="cuda")]
    opt = torch.optim.AdamW(theirs, fused=True, **{**tr.HYPER, "eps": 1e-4})
    for t in range(1, 21):
        for i, (p, x) in enumerate(zip(theirs, exact.params, strict=True)):
            p.grad = fading_gradient(t, i, x).to(dtype)
        opt.step()
    for p, q, x in zip(ours.params, theirs, exact.params, strict=True):
        error, bound = (p.float() - x).abs().mean(), (q.float() - x).abs().mean()
        assert error <= 1.2 * bound + torch.finfo(torch.float32).eps


# Devices, sizes, compiled models --------------------------------------------------------------


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def spread(fused, devices, **options):
    """A run whose tensors are on these devices in turn."""
    made = parameters(*SHAPES, device="cuda")
    params = [nn.Parameter(p.detach().to(devices[i % len(devices)])) for i, p in enumerate(made)]
    return tr.start(fused, params=params, **options)


@two_devices
@pytest.mark.parametrize("devices", [("cuda:1",), ("cuda:0", "cuda:1")], ids=str)
@pytest.mark.parametrize(
    "options", [{}, tr.NEXT_STEP, {"max_frozen": 0.5}, {"cooldown": 2}], ids=str
)
def test_other_devices(options, devices):
    """Each launch goes to the device of its tensors: the run is that of the reference."""
    runs = [spread(fused, devices, **options).steps(10) for fused in (True, False)]
    tr.assert_same(*runs)
    assert len(runs[0].opt._freezer.engines) == len(devices)


@two_devices
def test_steps_on_two_devices_are_saved_on_the_cpu():
    saved = spread(None, ("cuda:0", "cuda:1")).steps(2).opt.state_dict()
    assert all(own["step"].device.type == "cpu" for own in saved["state"].values())


@two_devices
def test_two_devices_never_wait_for_each_other():
    run = spread(True, ("cuda:0", "cuda:1"), max_frozen=0.5).steps(3)
    grads = gradients(run, range(4, 9))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in grads:
            run.step(*row)
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


# With torch's cache the tool cannot see accesses to memory that is cached but belongs to no tensor.
UNCACHED = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Neither an access out of bounds nor a race in shared memory, over a small run.

    Judged by the lines that name a kernel of ours: racecheck reports hazards in torch's own too.
    """
    command = [SANITIZER, "--tool", tool, sys.executable]
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
    assert run.returncode == 0 and "SUMMARY" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    reported = [line for line in run.stdout.splitlines() if line.startswith("=========")]
    assert not [x for x in reported if "step_kernel" in x or "decide_kernel" in x], run.stdout


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
    """model.cuda() replaces the storage of the very tensors that the optimizer refers to."""
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
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is torch.float32 on cpu"):
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
    runs = [tr.start(fused, shapes, tau=20000.0) for fused in (True, True, False)]
    for _ in range(8):
        grads = tr.usual(runs[0])
        for run in runs:
            run.step(*grads)
    tr.assert_same_bits(runs[0], runs[1])
    tr.assert_same(runs[0], runs[2])
    assert len(runs[2].events) > 5
