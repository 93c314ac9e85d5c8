"""The native CPU op against the reference implementation.

Contract: whatever the options, shapes, dtypes and layouts, the same units freeze at the same steps,
statistics agree, frozen tensors keep every bit, nothing outside a tensor is written, and the others
take the same update up to rounding. Its results have the same bits for every number of
threads and every instruction set. test_semantics.py and test_oracle.py run on it as well.
"""

import copy
import functools
import importlib.metadata
import itertools
import math
import os
import shutil

import harness
import pytest
import torch
from harness import FREEZING, HYPER, PAIRS, SHAPES, assert_same
from harness import fading_gradient as gradient
from torch import nn
from torch.optim.adamw import adamw
from torch.testing._internal.two_tensor import TwoTensor

from grades_kernels import GradESAdamW, grades_adamw
from grades_kernels.backends import native, select
from grades_kernels.backends.tasks import KEEP, STATISTIC_BITS, UPDATE
from grades_kernels.freezing.config import TIMINGS
from grades_kernels.freezing.table import FreezeConfig, FreezeTable, Unit

if native.why_not_loaded():  # excused by these reasons alone: elsewhere it must be there
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler", allow_module_level=True)
    try:
        importlib.metadata.distribution("grades-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, so nothing built it", allow_module_level=True)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK, BLOCK = 768, 32768  # where the op begins a new loop and a new sum
SIZES = (1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
TAUS = {"signal": 1.55, "weight_change": 3.3, "gain": 2.5}


def make_run(fused, shapes=SHAPES, dtype=torch.float32, params=None, **options):
    options = {**HYPER, **FREEZING, **options}
    return harness.Run(fused, shapes, dtype=dtype, params=params, **options)


def pair(*args, **options):
    return make_run(None, *args, **options), make_run(False, *args, **options)


def assert_close(got, want, ulps=64):
    """Values within `ulps` of the largest one in a tensor: differences lose digits."""
    mine, theirs = got.tensors(), want.tensors()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        limit = ulps * torch.finfo(value.dtype).eps
        atol = limit * float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            mine[name], value, rtol=limit, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal_runs(ours, theirs, n, grads=None, rel=1e-6):
    """`n` steps of a native run and a run of the reference, which agree after each of them."""
    assert (ours.opt.backend, theirs.opt.backend) == ("native", "reference")
    for _ in range(n):
        ours.steps(1, grads)
        theirs.steps(1, grads)
        harness.assert_same_decisions(ours, theirs, rel)
        assert_close(ours, theirs)


def assert_same_bits(got, want):
    assert_same(got.tensors(), want.tensors())
    assert_same(got.opt.statistics(), want.opt.statistics())


# It is built, and runs the code of this machine


def test_it_is_built_where_there_is_a_compiler():
    assert native.why_not_loaded() is None
    assert make_run(None).opt.backend == "native"


CAPABILITIES = ("portable", "avx2", "avx512")


@pytest.fixture(params=CAPABILITIES)
def capability(request, monkeypatch):
    monkeypatch.setenv("GRADES_KERNELS_CPU_CAPABILITY", request.param)
    if not can_run(request.param):
        pytest.skip(f"this machine has no {request.param}")


def can_run(capability):
    """Whether the machine has the capability that the environment names."""
    try:
        assert native.cpu_capability() == capability
    except RuntimeError:
        return False
    return True


def test_the_best_cpu_capability_of_this_machine_is_used(monkeypatch):
    monkeypatch.delenv("GRADES_KERNELS_CPU_CAPABILITY", raising=False)
    if not os.path.exists("/proc/cpuinfo"):
        pytest.skip("there is no /proc/cpuinfo")
    with open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags:
        assert native.cpu_capability() == "avx512"
    else:
        assert native.cpu_capability() == ("avx2" if {"avx2", "f16c"} <= flags else "portable")


def test_an_unknown_cpu_capability_is_refused(monkeypatch):
    monkeypatch.setenv("GRADES_KERNELS_CPU_CAPABILITY", "sse9")
    with pytest.raises(
        RuntimeError, match=r"GRADES_KERNELS_CPU_CAPABILITY=sse9 cannot run here; .*portable"
    ):
        native.cpu_capability()
    run = make_run(None)
    with pytest.raises(RuntimeError, match="sse9"):
        run.steps(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cpu_capability_gives_the_same_bits(dtype, monkeypatch):
    options = {"shapes": ((3, BLOCK), (70, 9)), "dtype": dtype, "amsgrad": True}
    for (statistic, timing), betas in zip(PAIRS, itertools.cycle([(0.8, 0.97), (0.3, 0.5)])):
        kind = {"statistic": statistic, "freeze_timing": timing, "betas": betas, "tau": 0.0}
        runs = []
        for capability in CAPABILITIES:
            monkeypatch.setenv("GRADES_KERNELS_CPU_CAPABILITY", capability)
            if can_run(capability):
                runs.append(make_run(None, **options, **kind).steps(5))
        for run in runs[1:]:
            assert_same_bits(run, runs[0])


# Against the reference


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
@pytest.mark.parametrize(
    "flags",
    [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.3, 0.9), "patience": 2}],
    ids=["plain", "amsgrad", "maximize", "patience"],
)
def test_a_run_equals_the_reference(statistic, timing, flags, dtype):
    options = {"statistic": statistic, "freeze_timing": timing, "dtype": dtype, **flags}
    options["tau"] = TAUS.get(statistic, FREEZING["tau"])
    assert_equal_runs(*pair(**options), 14, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_half_precision_is_computed_in_fp32_and_rounded_once(statistic, timing, dtype):
    """One step from the same state: the reference in fp32, then rounded to nearest even."""
    options = {"statistic": statistic, "freeze_timing": timing, "tau": 0.0, "amsgrad": True}
    ours = make_run(None, shapes=((70, 30), (5,)), dtype=dtype, **options)
    wide = make_run(False, shapes=((70, 30), (5,)), dtype=torch.float32, **options)
    for _ in range(6):
        for p, q in zip(ours.params, wide.params, strict=True):
            q.data.copy_(p.data)
            for key, value in ours.opt.state[p].items():
                if isinstance(value, torch.Tensor) and key != "step":
                    wide.opt.state[q][key].copy_(value)
        ours.steps(1)
        wide.steps(1, lambda t, i, p: gradient(t, i, p).to(dtype).float())
        for name, value in wide.tensors().items():
            rounded = value.to(ours.tensors()[name].dtype)
            off = (ours.tensors()[name] != rounded).sum()
            # fp32 values that differ in their last place round alike, but for rare ties.
            assert off <= 0.002 * value.numel(), name
            torch.testing.assert_close(
                ours.tensors()[name], rounded, rtol=torch.finfo(dtype).eps, atol=1e-7
            )
        if statistic != "weight_change":  # that is a difference of rounded weights
            mine, theirs = ours.opt.statistics(), wide.opt.statistics()
            assert mine == pytest.approx(theirs, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_a_tensor_is_written(size, offset, dtype):
    """Every tensor lies in the middle of a buffer whose ends must keep their values."""

    def inside(value):
        buffer = torch.full((value.numel() + 40 + offset,), 77.0, dtype=value.dtype)
        buffers.append((buffer, value.numel()))
        view = buffer[20 + offset : 20 + offset + value.numel()].view(value.shape)
        return view.copy_(value)

    buffers = []
    start = torch.randn(1, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    run = make_run(None, params=[nn.Parameter(inside(start))], amsgrad=True, tau=0.0)
    plain = make_run(None, params=[nn.Parameter(start.clone())], amsgrad=True, tau=0.0)
    for t in range(1, 6):
        run.steps(1, lambda t, i, p: inside(gradient(t, i, p)))
        plain.steps(1)
        state = run.opt.state[run.params[0]]
        if t in (1, 3):
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "prev_grad"):
                if state[key].numel():
                    state[key] = inside(state[key])
    assert_same_bits(run, plain)
    for buffer, n in buffers:
        assert buffer[: 20 + offset].eq(77.0).all() and buffer[20 + offset + n :].eq(77.0).all()


def test_a_write_outside_would_be_noticed():
    buffer = torch.full((10,), 77.0)
    make_run(None, params=[nn.Parameter(buffer[2:8].view(2, 3))]).steps(1)
    assert buffer[:2].eq(77.0).all() and not buffer[2:8].eq(77.0).any()


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "with gaps": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "every other row": lambda x: torch.stack([x, x], dim=1).view(-1, x.shape[1])[::2],
    "contiguous": lambda x: x.contiguous(),
}


def assert_same_in_a_layout(start, of_param, of_grad):
    """Tensors and gradients in another layout give the bits of contiguous ones."""
    options = {"tau": 0.0, "amsgrad": True}
    run = make_run(None, params=[nn.Parameter(of_param(start))], **options)
    plain = make_run(None, params=[nn.Parameter(start)], **options).steps(5)
    run.steps(5, lambda t, i, p: of_grad(gradient(t, i, p)))
    assert_same(run.tensors(), plain.tensors())
    # In another order, sums differ in their last digits.
    assert run.opt.statistics() == pytest.approx(plain.opt.statistics(), rel=1e-12)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_does_not_matter(of_param, of_grad, dtype):
    start = torch.randn(300, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_same_in_a_layout(start, LAYOUTS[of_param], LAYOUTS[of_grad])


def test_expanded_and_negated_gradients():
    """A stride of zero, and a tensor that torch negates lazily, are read as they are."""
    expanded = lambda t, i, p: torch.tensor(0.5 * t, dtype=p.dtype).expand_as(p)  # noqa: E731
    numbers = torch.randn(17, 23, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    negated = lambda t, i, p: (numbers * t).conj().imag  # noqa: E731
    assert negated(1, 0, None).is_neg()
    for grads, shapes in ((expanded, SHAPES), (negated, SHAPES[:1])):
        assert_equal_runs(*pair(shapes, tau=0.0), 4, grads)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 0, 4), (2, 3, 4, 5)], ids=str)
def test_unusual_shapes(shape):
    ours, theirs = pair([(3, 5), shape, (4, 4)], tau=0.0)
    assert_equal_runs(ours, theirs, 4)
    assert [int(ours.opt.state[p]["step"]) for p in ours.params] == [4, 4, 4]


@pytest.mark.parametrize("of_grad", [torch.channels_last, torch.contiguous_format], ids=str)
def test_channels_last(of_grad):
    start = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    last, other = (
        functools.partial(torch.clone, memory_format=x) for x in (torch.channels_last, of_grad)
    )
    assert_same_in_a_layout(start, last, other)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_mixture_of_dtypes(dtype, grad_dtype, timing):
    """The functional form, with fp32 moments; in the widest dtype, each tensor rounded to its own.

    The expected values are those of torch's AdamW on copies in that dtype.
    """
    wide = torch.promote_types(torch.promote_types(dtype, grad_dtype), torch.float32)
    generator = torch.Generator().manual_seed(4)
    draw = lambda: torch.randn(70, 9, dtype=torch.float64, generator=generator)  # noqa: E731
    p, g, prev = draw().to(dtype), draw().to(grad_dtype), draw().to(grad_dtype)
    m, v, step = torch.full((70, 9), 0.1), torch.full((70, 9), 0.2), torch.tensor(3.0)
    unit = Unit("w", "change", 0.0, p.numel(), prev_step=6)
    table = FreezeTable(FreezeConfig(0, freeze_timing=timing), [unit], t=6)
    q, wide_m, wide_v = (x.to(wide, copy=True) for x in (p, m, v))
    change = (g.double() - prev.double()).abs().sum().item()
    hyper = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.1, "eps": 1e-8}
    hyper |= {"amsgrad": False, "maximize": False}
    adamw([q], [g.to(wide)], [wide_m], [wide_v], [], [torch.tensor(3.0)], foreach=False, **hyper)
    grades_adamw(
        [p], [g], [m], [v], [], [step], prev_grads=[prev], units=[unit], table=table, **hyper
    )
    assert unit.value == pytest.approx(change, rel=1e-6 if wide is torch.float32 else 1e-12)
    assert_same([prev, step], [g, torch.tensor(4.0)])
    torch.testing.assert_close(p, q.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(m, wide_m.float())
    torch.testing.assert_close(v, wide_v.float())


def convert(values, dtype):
    """The numbers of a tensor that the op stores in another dtype."""
    kept = torch.empty_like(values, dtype=dtype)
    zeros = torch.zeros_like(values, dtype=torch.float32)
    call([zeros.clone()], [values], [zeros], [zeros.clone()], prev_grads=[kept], tasks=[16])
    return kept


def call(params, grads, exp_avgs, exp_avg_sqs, prev_grads=(), tasks=(8,), **changes):
    arguments = {
        "max_exp_avg_sqs": [],
        "prev_grads": list(prev_grads),
        "steps": [torch.tensor(0.0) for _ in params],
        "sums": torch.empty(len(params), 3, dtype=torch.float64),
        "tasks": list(tasks),
        "rows": [0] * len(params),
        "hypers": [1e-3, 0.9, 0.999, 1e-8, 1e-2, 1.0],
        "grad_scale": 1.0,
        **changes,
    }
    torch.ops.grades_kernels.adamw_(params, grads, exp_avgs, exp_avg_sqs, **arguments)
    return arguments["sums"]


@pytest.mark.parametrize("flags", [0, 64], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["minimize", "maximize"])
@pytest.mark.parametrize("beta1", [0.9, 0.5, 0.3, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operation_rounds_as_in_torchs_reference(dtype, beta1, sign, flags):
    """The bits of AdamW written out, one torch operation after the other; 16 bits round at the end.

    As torch's lerp does, the first moment starts from the nearer of its two ends.
    """
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(6)
    p, g, m = (torch.randn(70, 9, generator=generator).to(dtype) for _ in range(3))
    v, largest = (torch.rand(70, 9, generator=generator).to(dtype) for _ in range(2))
    lr, beta2, eps, decay, step = 0.03, 0.97, 1e-6, 0.1, 4
    old_p, end, old_m, old_v, old_largest = (x.to(wide) for x in (p, g * sign, m, v, largest))
    number = lambda x: torch.full_like(end, x)  # noqa: E731
    weight = 1 - beta1
    if weight < 0.5:
        new_m = old_m + number(weight) * (end - old_m)
    else:
        new_m = end + (number(weight) - 1) * (end - old_m)
    new_v = old_v * number(beta2) + (number(1 - beta2) * end) * end
    new_largest = torch.maximum(old_largest, new_v)
    # torch's own sqrt of fp32 is off by one unit in the last place here and there.
    root = (new_largest if flags else new_v).to(torch.float64, copy=True).apply_(math.sqrt).to(wide)
    denominator = root / number(math.sqrt(1 - beta2**step)) + number(eps)
    moved = number(lr / (1 - beta1**step)) * new_m / denominator
    new_p = old_p * number(1 - lr * decay) - moved

    hypers = [lr, beta1, beta2, eps, decay, sign]
    maxs, steps = [largest] if flags else [], [torch.tensor(step - 1.0)]
    call([p], [g], [m], [v], tasks=[8 | flags], max_exp_avg_sqs=maxs, steps=steps, hypers=hypers)
    wanted = [new_p, new_m, new_v, new_largest if flags else largest]
    assert_same([p, m, v, largest], [value.to(dtype) for value in wanted])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_weights_stay_as_they_are(dtype, weight_decay):
    """Forbidden entries of a matrix in log space, whose gradient is zero."""
    p = torch.full((70, 9), -math.inf, dtype=dtype, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = GradESAdamW([p], weight_decay=weight_decay)
    for _ in range(3):
        optimizer.step()
    assert optimizer.backend == "native" and (p == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_every_half_precision_number_is_read_right(capability, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for wide in (torch.float32, torch.float64):
        got = convert(every, wide)
        assert got.isnan().equal(every.isnan())
        assert got.nan_to_num(1.0).equal(every.to(wide).nan_to_num(1.0))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_rounding_is_to_nearest_even(capability, dtype):
    """Every representable number, its neighbours in fp32, and the ties between two of them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    bits = every.view(torch.int32)
    half = 1 << (15 if dtype is torch.bfloat16 else 12)
    steps = (-1, 0, 1, half - 1, half, half + 1)
    values = torch.cat([(bits + step).view(torch.float32) for step in steps])
    got, want = convert(values, dtype), values.to(dtype)
    assert got.isnan().equal(want.isnan())
    assert got.nan_to_num(1.0).view(torch.int16).equal(want.nan_to_num(1.0).view(torch.int16))


# Frozen, void, poisoned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0], ids=str)
def test_frozen_tensors_keep_every_bit(poison, dtype):
    run = make_run(None, [(40, 30), (33, 9), (8, 8)], dtype=dtype, stop_grad=False, tau=80.0)
    run.steps(6)
    frozen = [i for i in range(3) if f"group0.param{i}" in run.opt.frozen_units]
    assert 0 < len(frozen) < 3, "some are frozen and some are not"
    before = copy.deepcopy(run.tensors())
    run.steps(1, lambda t, i, p: torch.full_like(p, poison if i in frozen else 1.0))
    for name, value in run.tensors().items():
        if int(name[-1]) in frozen:
            assert_same(value, before[name])
        elif name.startswith("parameter"):
            assert not value.equal(before[name]), "the others go on"


def test_amsgrad_keeps_nan():
    """One that a gradient brings, and one where the second moment is finite."""
    for run in pair(amsgrad=True, tau=None):
        run.steps(2)
        for state in run.opt.state.values():
            state["max_exp_avg_sq"].view(-1)[::2] = math.nan
        run.steps(2)
        for state in run.opt.state.values():
            is_nan = state["max_exp_avg_sq"].view(-1).isnan()
            assert is_nan[::2].all() and not is_nan[1::2].any()
            assert state["exp_avg_sq"].isfinite().all()
        run.steps(1, lambda t, i, p: torch.full_like(p, math.nan)).steps(2)
        assert all(s["max_exp_avg_sq"].isnan().all() for s in run.opt.state.values())


# Threads


@pytest.mark.parametrize(
    "shapes",
    [[(5, BLOCK), (70, 9), (BLOCK + 3,)], [(4, BLOCK)]],
    ids=["a thread ends inside a block", "a thread ends with a block"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_any_number_of_threads_gives_the_same_bits(statistic, timing, dtype, shapes):
    options = {"statistic": statistic, "freeze_timing": timing, "tau": 0.0, "dtype": dtype}
    before, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            runs.append(make_run(None, shapes, **options).steps(5))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


def test_sums_run_in_fp64():
    """A sum in fp32 of as many ones would stop at 2^24."""
    n = 2**24 + 3 * BLOCK + 1
    ones = torch.ones(n, dtype=torch.bfloat16)
    sums = call([ones.clone()], [ones], [ones], [ones], tasks=[2])
    assert sums.tolist() == [[n, 0.0, n]]


# The surroundings: checkpoints, AMP, autograd, the functional form


@pytest.mark.parametrize("order", [(False, None), (None, False)], ids=["to native", "from native"])
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_a_checkpoint_goes_on_with_the_other_implementation(statistic, timing, order):
    """Saved with half-counted patience and a stored previous gradient."""
    options = {"statistic": statistic, "freeze_timing": timing, "patience": 3, "amsgrad": True}
    options["tau"] = TAUS.get(statistic, 50.0)
    whole = make_run(order[0], **options).steps(12)
    first = make_run(order[0], **options).steps(5)
    resumed = make_run(order[1], **options)
    for p, q in zip(resumed.params, first.params, strict=True):
        p.data.copy_(q.data)
    resumed.opt.load_state_dict(copy.deepcopy(first.opt.state_dict()))
    resumed.t = first.t
    resumed.steps(7)
    assert resumed.events == whole.events
    assert_close(resumed, whole)


@pytest.mark.parametrize("own", [{}, {"statistic": "change"}, {"freeze_timing": "next_step"}])
def test_amp_scaling_inside_the_step(own, monkeypatch):
    """fused=True unscales in place, and does nothing at all where infinities were found."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ours = make_run(True, tau=0.0, grace_steps=0, **own)
    assert ours.opt.backend == "native" and ours.opt._step_supports_amp_scaling
    plain = make_run(None, tau=0.0, grace_steps=0, **own)
    for t, found in enumerate([0.0, 0.0, 1.0, 0.0], start=1):
        scale = torch.tensor(2.0**t)
        grads = [gradient(t, i, p) for i, p in enumerate(ours.params)]
        scaled = [g * scale for g in grads]
        ours.opt.grad_scale, ours.opt.found_inf = scale, torch.tensor([found])
        before = copy.deepcopy(ours.tensors())
        ours.step(*copy.deepcopy(scaled))
        assert_same([p.grad for p in ours.params], scaled if found else grads)
        if found:
            assert_same(ours.tensors(), before)
        else:
            assert_same_bits(ours, plain.step(*grads))
    assert ours.opt.report().step == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_measured_kept_and_used_is_the_unscaled_gradient_as_stored(dtype):
    """A scale that is no power of two rounds 16 bit: as if it had been unscaled beforehand."""
    generator = torch.Generator().manual_seed(7)
    scaled = torch.randn(70, 9, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    unscaled = (scaled.to(wide) / 3.1).to(dtype)
    results = []
    for grad, unscale in ((scaled, 32), (unscaled, 0)):
        p, m, v, prev = (torch.ones(70, 9, dtype=wide) for _ in range(4))
        tasks = [1 | 8 | 16 | unscale]
        sums = call([p], [grad], [m], [v], prev_grads=[prev], tasks=tasks, grad_scale=3.1)
        results.append([sums, grad, p, m, v, prev])
    assert_same(*results)


def test_tensor_hyper_parameters():
    lr, betas = torch.tensor(0.03), (torch.tensor(0.8), torch.tensor(0.97))
    plain = make_run(None, lr=float(lr), betas=tuple(map(float, betas))).steps(5)
    assert_same_bits(make_run(None, lr=lr, betas=betas).steps(5), plain)


def test_steps_in_fp64():
    ours, theirs = pair()
    for run in (ours, theirs):
        run.steps(1)
        for state in run.opt.state.values():
            state["step"] = state["step"].double()
    assert_equal_runs(ours, theirs, 3)
    for run in (ours, theirs):
        assert {state["step"].dtype for state in run.opt.state.values()} == {torch.float64}


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ([torch.ones(2, 2, dtype=torch.complex64)], "no torch.complex64"),
        ([torch.ones(2, 2, device="meta")], "'cpu' alone"),
        ([torch.ones(2, 2), torch.ones(2, 2, device="meta")], "'cpu' alone"),
        ([torch.ones(1, 2).expand(2, 2)], "expanded view"),
        ([TwoTensor(torch.ones(2), torch.ones(2))], "subclass"),
    ],
)
def test_what_it_does_not_serve(params, reason):
    assert reason in native.why_not_native(params)


def test_fused_true_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(native, "why_not_loaded", lambda: "the native op is not built")
    with pytest.raises(RuntimeError, match="fused=True is not possible: the native op is not"):
        make_run(True)
    assert make_run(None).opt.backend == "reference"


# The op itself


def arguments():
    make = lambda: [torch.rand(70, 9), torch.rand(5)]  # noqa: E731
    torch.manual_seed(0)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    return {name: make() for name in names} | {
        "prev_grads": make()[:1],
        "steps": [torch.tensor(3.0), torch.tensor(7.0)],
        "sums": torch.zeros(2, 3, dtype=torch.float64),
        "tasks": [1 | 8 | 16 | 32 | 64, 4 | 8 | 64],
        "rows": [0, 1],
        "hypers": [1e-3, 0.9, 0.999, 1e-8, 1e-2, 1.0, 1e-2, 0.8, 0.99, 1e-8, 0.0, -1.0],
        "grad_scale": 2.0,
    }


def test_opcheck():
    torch.library.opcheck(torch.ops.grades_kernels.adamw_.default, (), arguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.rand(70, 9)]}, "as many as params"),
        ({"grads": [torch.rand(70, 9), torch.rand(6)]}, "6 elements, its parameter 5"),
        ({"exp_avgs": [torch.rand(70, 9), torch.ones(5, dtype=torch.int64)]}, "must be fp32, fp64"),
        ({"max_exp_avg_sqs": []}, "max_exp_avg_sqs are too few"),
        ({"prev_grads": []}, "prev_grads are too few"),
        ({"steps": [torch.tensor(1.0), torch.tensor(1)]}, "a step must be fp32 or fp64"),
        ({"sums": torch.zeros(2, 3)}, "three contiguous fp64 numbers"),
        ({"tasks": [7, 8]}, "no such task"),
        ({"rows": [0, 2]}, "no such row"),
        ({"grads": [torch.rand(9).expand(70, 9), torch.rand(5)]}, "share memory"),
        ({"params": [torch.rand(9).expand(70, 9), torch.rand(5)]}, "parameter .* share memory"),
        ({"params": [(x := torch.rand(632))[:630].view(70, 9), x[627:]]}, "come to share memory"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(change, message):
    given = {**arguments(), **change}
    before = copy.deepcopy(given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.grades_kernels.adamw_(**given)
    assert_same(given, before)


def test_parameters_that_are_tied_in_the_middle_of_a_run_are_an_error():
    """Threads would race on them; tied before the first step, the reference serves them."""
    run = make_run(None, ((300, 200), (300, 200)), tau=None).steps(1)
    run.params[1].data = run.params[0].data
    before = copy.deepcopy(run.tensors())
    with pytest.raises(RuntimeError, match="two parameters have come to share memory"):
        run.steps(1)
    assert_same(run.tensors(), before)


# Negative controls: the comparisons above notice a fault in the arguments of the op


@pytest.mark.parametrize(
    "change",
    [
        lambda t, g: t & ~KEEP,
        lambda t, g: t & ~STATISTIC_BITS | (t & STATISTIC_BITS and 2),
        lambda t, g: t if g is None else t | UPDATE,
    ],
    ids=["keeps nothing", "measures the norm", "updates a frozen tensor"],
)
def test_a_fault_is_noticed(change, monkeypatch):
    real = select.HOST_BACKENDS["native"]

    def faulty(tensors, tasks, *rest):
        changed = [change(t, g) for t, g in zip(tasks, tensors.grads, strict=True)]
        return real(tensors, changed, *rest)

    monkeypatch.setitem(select.HOST_BACKENDS, "native", faulty)
    # A frozen tensor has given its moments back: the op refuses to update it.
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_run_equals_the_reference("change", "next_step", {}, torch.float32)
