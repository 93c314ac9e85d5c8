"""The native CPU op against the reference implementation.

Contract: whatever the options, shapes, dtypes and layouts, the same units freeze at the same steps,
statistics agree, frozen tensors keep every bit, nothing outside a tensor is written, and the others
take the same update up to rounding. What the op computes has the same bits for every number of
threads and every instruction set. test_semantics.py and test_oracle.py run on it as well.
"""

import copy
import importlib.metadata
import itertools
import math
import os
import shutil

import pytest
import torch
from torch import nn
from torch.optim.adamw import adamw

from grades_kernels import GradESAdamW, grades_adamw, native
from grades_kernels.freezing import STATISTICS, FreezeRule, FreezeTable, Unit

if native.why_not_loaded():  # excused by these reasons alone: elsewhere it must be there
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler", allow_module_level=True)
    try:
        importlib.metadata.distribution("grades-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, so nothing built it", allow_module_level=True)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TIMINGS = ("same_step", "next_step")
PAIRS = [
    (statistic, timing)
    for statistic in STATISTICS
    for timing in TIMINGS
    if (statistic, timing) != ("weight_change", "same_step")
]
SHAPES = ((17, 23), (3, 5), (7,))
CHUNK, BLOCK = 768, 32768  # where the op begins a new loop and a new sum
SIZES = (1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
HYPER = {"lr": 0.03, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
# Statistics fall by a third a step: the small matrix freezes first, the large one steps later.
FREEZING = {"tau": 50.0, "grace_steps": 2}
TAUS = {"signal": 0.7, "weight_change": 3.3}


def gradient(t, i, p):
    """The gradient of tensor `i` at step `t`: noise that dies away, with weight on both ends."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + i))
    if p.numel() > 1:
        g.view(-1)[0], g.view(-1)[-1] = 5.0 + i, -7.0 - t
    return (g * 0.65**t).to(p.dtype)


class Run:
    """An optimizer with its parameters, and its own count of steps."""

    def __init__(self, fused, shapes=SHAPES, dtype=torch.float32, params=None, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = params or [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
        ]
        self.opt = GradESAdamW(self.params, fused=fused, **{**HYPER, **FREEZING, **options})
        self.t = 0

    def steps(self, n, grads=gradient):
        for _ in range(n):
            self.t += 1
            for i, p in enumerate(self.params):
                p.grad = grads(self.t, i, p)
            self.opt.step()
        return self

    @property
    def events(self):
        return [(e.step, e.unit, e.decided_at, e.n_elements) for e in self.opt.freeze_events]

    def tensors(self):
        """All that a step may change, by name."""
        tensors = {f"parameter {i}": p.detach() for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            for key, value in self.opt.state[p].items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{key} of {i}"] = value
        return tensors


def pair(*args, **options):
    return Run(None, *args, **options), Run(False, *args, **options)


def assert_same_decisions(got, want, rel=1e-6):
    assert (got.opt.backend, want.opt.backend) == ("native", "reference")
    assert got.events == want.events
    assert got.opt.report().step == want.opt.report().step
    assert got.opt.statistics() == pytest.approx(want.opt.statistics(), rel=rel, nan_ok=True)
    mine, theirs = got.opt.report().history, want.opt.report().history
    assert [t for t, _ in mine] == [t for t, _ in theirs]
    for (t, a), (_, b) in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=rel, nan_ok=True), f"statistics of step {t}"


def assert_close(got, want, ulps=64):
    """Values within `ulps` of the largest one that a tensor holds: what cancels loses digits."""
    mine, theirs = got.tensors(), want.tensors()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        room = ulps * torch.finfo(value.dtype).eps
        atol = room * float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            mine[name], value, rtol=room, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_bits(got, want):
    mine, theirs = got.tensors(), want.tensors()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert same_bits(mine[name], value), name
    assert str(got.opt.statistics()) == str(want.opt.statistics())


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


# It is built, and runs what this machine can run


def test_it_is_built_where_there_is_a_compiler():
    assert native.why_not_loaded() is None
    assert Run(None).opt.backend == "native"


@pytest.fixture(params=["avx512", "avx2", "portable"])
def clone(request, monkeypatch):
    monkeypatch.setenv("GRADES_KERNELS_CLONE", request.param)
    try:
        assert native.clone() == request.param
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def test_the_best_clone_that_this_machine_has_runs(monkeypatch):
    monkeypatch.delenv("GRADES_KERNELS_CLONE", raising=False)
    if not os.path.exists("/proc/cpuinfo"):
        pytest.skip("there is no /proc/cpuinfo")
    with open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags:
        assert native.clone() == "avx512"
    else:
        assert native.clone() == ("avx2" if {"avx2", "f16c"} <= flags else "portable")


def test_an_unknown_clone_is_refused(monkeypatch):
    monkeypatch.setenv("GRADES_KERNELS_CLONE", "sse9")
    with pytest.raises(
        RuntimeError, match=r"GRADES_KERNELS_CLONE=sse9 cannot run here; .*portable"
    ):
        native.clone()
    run = Run(None)
    with pytest.raises(RuntimeError, match="sse9"):
        run.steps(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_clone_gives_the_same_bits(clone, dtype, monkeypatch):
    options = {"shapes": ((3, BLOCK), (70, 9)), "dtype": dtype, "amsgrad": True}
    for (statistic, timing), betas in zip(PAIRS, itertools.cycle([(0.8, 0.97), (0.3, 0.5)])):
        kind = {"statistic": statistic, "freeze_timing": timing, "betas": betas, "tau": 0.0}
        here = Run(None, **options, **kind).steps(5)
        with monkeypatch.context() as patch:
            patch.setenv("GRADES_KERNELS_CLONE", "portable")
            portable = Run(None, **options, **kind).steps(5)
        assert_same_bits(here, portable)


# Against the reference


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
@pytest.mark.parametrize(
    "flags",
    [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.3, 0.9), "patience": 2}],
    ids=["plain", "amsgrad", "maximize", "patience"],
)
def test_a_run_equals_the_reference(statistic, timing, flags, dtype):
    tau = TAUS.get(statistic, FREEZING["tau"])
    options = {"statistic": statistic, "freeze_timing": timing, "dtype": dtype, "tau": tau, **flags}
    ours, theirs = pair(**options)
    for _ in range(14):
        ours.steps(1)
        theirs.steps(1)
        assert_same_decisions(ours, theirs, rel=1e-5)
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
def test_half_precision_is_computed_in_fp32_and_rounded_once(statistic, timing, dtype):
    """One step from the same state: the reference in fp32, then rounded to nearest even."""
    options = {"statistic": statistic, "freeze_timing": timing, "tau": 0.0, "amsgrad": True}
    ours = Run(None, shapes=((70, 30), (5,)), dtype=dtype, **options)
    wide = Run(False, shapes=((70, 30), (5,)), dtype=torch.float32, **options)
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
    """Every tensor lies in the middle of a buffer whose ends must keep what they hold."""

    def inside(value):
        buffer = torch.full((value.numel() + 40 + offset,), 77.0, dtype=value.dtype)
        view = buffer[20 + offset : 20 + offset + value.numel()].view(value.shape)
        view.copy_(value)
        buffers.append((buffer, value.numel()))
        return view

    buffers = []
    start = torch.randn(1, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    run = Run(None, params=[nn.Parameter(inside(start))], amsgrad=True, tau=0.0)
    plain = Run(None, params=[nn.Parameter(start.clone())], amsgrad=True, tau=0.0)
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
    Run(None, params=[nn.Parameter(buffer[2:8].view(2, 3))]).steps(1)
    assert buffer[:2].eq(77.0).all() and not buffer[2:8].eq(77.0).any()


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "with gaps": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "every other row": lambda x: torch.stack([x, x], dim=1).view(-1, x.shape[1])[::2],
    "contiguous": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_does_not_matter(of_param, of_grad, dtype):
    start = torch.randn(300, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"tau": 0.0, "amsgrad": True}
    run = Run(None, params=[nn.Parameter(LAYOUTS[of_param](start))], **options)
    plain = Run(None, params=[nn.Parameter(start)], **options)
    run.steps(5, lambda t, i, p: LAYOUTS[of_grad](gradient(t, i, p)))
    plain.steps(5)
    for name, value in plain.tensors().items():
        assert same_bits(run.tensors()[name], value), name
    # In another order, sums differ in their last digits.
    assert run.opt.statistics() == pytest.approx(plain.opt.statistics(), rel=1e-12)


def test_expanded_and_negated_gradients():
    """A stride of zero, and a tensor that torch negates lazily, mean what they say."""
    expanded = lambda t, i, p: torch.tensor(0.5 * t, dtype=p.dtype).expand_as(p)  # noqa: E731
    numbers = torch.randn(17, 23, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    negated = lambda t, i, p: (numbers * t).conj().imag  # noqa: E731
    assert negated(1, 0, None).is_neg()
    for grads, shapes in ((expanded, SHAPES), (negated, SHAPES[:1])):
        ours, theirs = pair(shapes, tau=0.0)
        ours.steps(4, grads)
        theirs.steps(4, grads)
        assert_same_decisions(ours, theirs)
        assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 0, 4), (2, 3, 4, 5)], ids=str)
def test_unusual_shapes(shape):
    ours, theirs = pair([(3, 5), shape, (4, 4)], tau=0.0)
    for run in (ours, theirs):
        run.steps(4)
    assert_same_decisions(ours, theirs)
    assert_close(ours, theirs)
    assert [int(ours.opt.state[p]["step"]) for p in ours.params] == [4, 4, 4]


@pytest.mark.parametrize("of_grad", [torch.channels_last, torch.contiguous_format], ids=str)
def test_channels_last(of_grad):
    start = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    last = nn.Parameter(start.to(memory_format=torch.channels_last))
    run, plain = Run(None, params=[last], tau=0.0), Run(None, params=[nn.Parameter(start)], tau=0.0)
    run.steps(4, lambda t, i, p: gradient(t, i, p).contiguous(memory_format=of_grad))
    plain.steps(4)
    for name, value in plain.tensors().items():
        assert same_bits(run.tensors()[name], value), name


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
    table = FreezeTable(FreezeRule(0, freeze_timing=timing), [unit], t=6)
    q, wide_m, wide_v = (x.to(wide, copy=True) for x in (p, m, v))
    change = (g.double() - prev.double()).abs().sum().item()
    hyper = {"beta1": 0.9, "beta2": 0.99, "lr": 0.1, "weight_decay": 0.1, "eps": 1e-8}
    hyper |= {"amsgrad": False, "maximize": False}
    adamw([q], [g.to(wide)], [wide_m], [wide_v], [], [torch.tensor(3.0)], foreach=False, **hyper)
    grades_adamw(
        [p], [g], [m], [v], [], [step], prev_grads=[prev], units=[unit], table=table, **hyper
    )
    assert unit.statistic == pytest.approx(change, rel=1e-6 if wide is torch.float32 else 1e-12)
    assert same_bits(prev, g) and step == 4
    torch.testing.assert_close(p, q.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(m, wide_m.float())
    torch.testing.assert_close(v, wide_v.float())


def convert(values, dtype):
    """What the op makes of numbers that it keeps in another dtype."""
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
    new_p = (old_p - old_p * number(lr * decay)) - moved

    hypers = [lr, beta1, beta2, eps, decay, sign]
    maxs, steps = [largest] if flags else [], [torch.tensor(step - 1.0)]
    call([p], [g], [m], [v], tasks=[8 | flags], max_exp_avg_sqs=maxs, steps=steps, hypers=hypers)
    wanted = {"p": new_p, "m": new_m, "v": new_v, "largest": new_largest if flags else largest}
    for (name, value), got in zip(wanted.items(), (p, m, v, largest), strict=True):
        assert same_bits(got, value.to(dtype)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_may_lie_as_their_parameter_does(layout, dtype):
    """Also where that leaves gaps, which optimizers' own moments do not have."""
    generator = torch.Generator().manual_seed(8)
    plain = [torch.rand(30, 8, generator=generator).to(dtype) for _ in range(4)]
    alike = [LAYOUTS[layout](x.clone()) for x in plain]
    for tensors in (plain, alike):
        call(*([x] for x in tensors))
    assert all(map(same_bits, alike, plain))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_every_half_precision_number_is_read_right(clone, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for wide in (torch.float32, torch.float64):
        got = convert(every, wide)
        assert got.isnan().equal(every.isnan())
        assert got.nan_to_num(1.0).equal(every.to(wide).nan_to_num(1.0))


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_rounding_is_to_nearest_even(clone, dtype):
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
    run = Run(None, [(40, 30), (33, 9), (8, 8)], dtype=dtype, stop_grad=False, tau=80.0)
    run.steps(6)
    frozen = {e.unit for e in run.opt.freeze_events}
    assert frozen and len(frozen) < 3, "some are frozen and some are not"
    places = [i for i in range(3) if f"group0.param{i}" in frozen]
    before = copy.deepcopy(run.tensors())
    run.steps(1, lambda t, i, p: torch.full_like(p, poison if i in places else 1.0))
    for name, value in run.tensors().items():
        if int(name[-1]) in places:
            assert same_bits(value, before[name]), name
        elif name.startswith("parameter"):
            assert not value.equal(before[name]), "the others go on"


@pytest.mark.parametrize(("statistic", "timing"), PAIRS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, None], ids=str)
def test_void_checks(statistic, timing, bad):
    """What is no evidence on the reference is none here, and leaves the same trail."""

    def grads(t, i, p):
        if t == 4 and i == 0:
            return None if bad is None else torch.full_like(p, bad)
        return gradient(t, i, p)

    options = {"statistic": statistic, "freeze_timing": timing, "patience": 2}
    ours, theirs = pair(tau=TAUS.get(statistic, 50.0), **options)
    ours.steps(9, grads)
    theirs.steps(9, grads)
    assert_same_decisions(ours, theirs, rel=1e-5)
    for p, q in zip(ours.params, theirs.params, strict=True):
        mine, wanted = ours.opt.state[p], theirs.opt.state[q]
        assert {k: v for k, v in mine.items() if k == "grades_hits"} == {
            k: v for k, v in wanted.items() if k == "grades_hits"
        }
        assert p.isfinite().equal(q.isfinite())


@pytest.mark.parametrize("statistic", ["momentum", "signal"])
def test_the_first_check_with_a_moment_is_the_first_that_counts(statistic):
    ours, theirs = pair(statistic=statistic, grace_steps=0, tau=1e9)
    for _ in range(3):
        ours.steps(1)
        theirs.steps(1)
        assert_same_decisions(ours, theirs, rel=1e-5)
    assert [decided_at for _, _, decided_at, _ in ours.events] == [2, 2]


def test_amsgrad_keeps_nan():
    ours, theirs = pair(amsgrad=True, tau=None)
    for run in (ours, theirs):
        run.steps(2)
        run.steps(1, lambda t, i, p: torch.full_like(p, math.nan))
        run.steps(2)
        assert all(s["max_exp_avg_sq"].isnan().all() for s in run.opt.state.values())


def test_amsgrad_keeps_a_nan_where_the_second_moment_is_finite():
    ours, theirs = pair(amsgrad=True, tau=None)
    for run in (ours, theirs):
        run.steps(2)
        for state in run.opt.state.values():
            state["max_exp_avg_sq"].view(-1)[::2] = math.nan
        run.steps(2)
        for state in run.opt.state.values():
            is_nan = state["max_exp_avg_sq"].view(-1).isnan()
            assert is_nan[::2].all() and not is_nan[1::2].any()
            assert state["exp_avg_sq"].isfinite().all()


def test_where_all_is_frozen_the_op_is_not_called(monkeypatch):
    run = Run(None, [(3, 5), (4, 4)], tau=math.inf, stop_grad=False).steps(5)
    assert run.opt.all_frozen
    monkeypatch.setattr(torch, "empty", None)  # the sums are made just before the call
    run.steps(1, lambda t, i, p: p.detach())


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
            runs.append(Run(None, shapes, **options).steps(5))
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
    whole = Run(order[0], **options).steps(12)
    first = Run(order[0], **options).steps(5)
    resumed = Run(order[1], **options)
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
    ours = Run(True, tau=0.0, grace_steps=0, **own)
    assert ours.opt.backend == "native" and ours.opt._step_supports_amp_scaling
    plain = Run(None, tau=0.0, grace_steps=0, **own)
    for t, found in enumerate([0.0, 0.0, 1.0, 0.0], start=1):
        scale = torch.tensor(2.0**t)
        grads = [gradient(t, i, p) for i, p in enumerate(ours.params)]
        for p, g in zip(ours.params, grads, strict=True):
            p.grad = g * scale
        ours.opt.grad_scale, ours.opt.found_inf = scale, torch.tensor([found])
        before = copy.deepcopy(ours.tensors())
        ours.opt.step()
        if found:
            assert all(same_bits(value, before[name]) for name, value in ours.tensors().items())
            assert all(p.grad.equal(g * scale) for p, g in zip(ours.params, grads, strict=True))
            continue
        assert all(p.grad.equal(g) for p, g in zip(ours.params, grads, strict=True))
        plain.steps(1, lambda t, i, p, grads=grads: grads[i].clone())
        assert_same_bits(ours, plain)
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
    assert all(map(same_bits, *results))


def test_grad_scaler_as_with_torchs_fused_adamw(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    results = []
    for make in (
        lambda p: GradESAdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ):
        w = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        opt, scaler = make([w]), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for t in range(6):
            opt.zero_grad()
            loss = (w * (math.inf if t == 2 else t + 1.0)).square().sum()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        results.append((w.detach(), scaler.get_scale(), float(opt.state[w]["step"])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert results[0][2] == 5


def test_autograd_notices_the_update():
    """What backward saved has been overwritten: torch's error, and no wrong gradient."""
    w = nn.Parameter(torch.ones(3, 4))
    loss = (w * w).sum()
    w.grad = torch.ones_like(w)
    opt = GradESAdamW([w])
    assert opt.backend == "native"
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensor_hyper_parameters():
    lr, betas = torch.tensor(0.03), (torch.tensor(0.8), torch.tensor(0.97))
    ours = Run(None, lr=lr, betas=betas).steps(5)
    plain = Run(None, lr=float(lr), betas=tuple(map(float, betas))).steps(5)
    assert_same_bits(ours, plain)


def test_steps_in_fp64():
    ours, theirs = pair()
    for run in (ours, theirs):
        run.steps(1)
        for state in run.opt.state.values():
            state["step"] = state["step"].double()
        run.steps(3)
        assert {state["step"].dtype for state in run.opt.state.values()} == {torch.float64}
    assert_close(ours, theirs)


def test_groups_and_cooldown():
    """Each group its own numbers; the ramp reaches unmonitored tensors once all are decided."""

    def make(fused):
        run = Run(fused)
        groups = [
            {"params": run.params[:1], "lr": 0.5, "amsgrad": True, "maximize": True},
            {"params": run.params[1:2], "weight_decay": 0.7, "betas": (0.2, 0.5)},
            {"params": run.params[2:], "eps": 1e-2},
        ]
        run.opt = GradESAdamW(groups, fused=fused, cooldown=3, **HYPER, **FREEZING)
        return run

    ours, theirs = make(None), make(False)
    for _ in range(16):
        ours.steps(1)
        theirs.steps(1)
        assert_same_decisions(ours, theirs)
        assert_close(ours, theirs)
    assert ours.opt.all_frozen


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ([torch.ones(2, 2, dtype=torch.complex64)], "no torch.complex64"),
        ([torch.ones(2, 2, device="meta")], "'cpu' alone"),
        ([torch.ones(2, 2), torch.ones(2, 2, device="meta")], "'cpu' alone"),
        ([torch.ones(1, 2).expand(2, 2)], "expanded view"),
        ([type("Mine", (torch.Tensor,), {})([1.0])], "subclass"),
        ([], "no parameters"),
    ],
)
def test_what_it_does_not_serve(params, reason):
    assert reason in native.why_not_native(params)


def test_fused_true_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(native, "why_not_loaded", lambda: "the native op is not built")
    with pytest.raises(RuntimeError, match="fused=True is not possible: the native op is not"):
        Run(True)
    assert Run(None).opt.backend == "reference"


# The op itself


def arguments(amsgrad=True):
    make = lambda: [torch.rand(70, 9), torch.rand(5)]  # noqa: E731
    torch.manual_seed(0)
    return {
        "params": make(),
        "grads": make(),
        "exp_avgs": make(),
        "exp_avg_sqs": make(),
        "max_exp_avg_sqs": make() if amsgrad else [],
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


def test_a_wrong_schema_would_be_noticed():
    """Negative control: the same function under a schema without mutations."""
    library = torch.library.Library("grades_kernels_test", "DEF")
    schema = str(torch.ops.grades_kernels.adamw_.default._schema)
    silent = schema.replace("grades_kernels::adamw_", "silent")
    for letter in "abcdefgh":
        silent = silent.replace(f"({letter}!)", "")
    library.define(silent)
    library.impl("silent", torch.ops.grades_kernels.adamw_.default, "CPU")
    with pytest.raises(Exception, match="mutated"):
        torch.library.opcheck(
            torch.ops.grades_kernels_test.silent.default, (), arguments(), test_utils="test_schema"
        )


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
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(change, message):
    given = {**arguments(), **change}
    before = copy.deepcopy(given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.grades_kernels.adamw_(**given)
    for key, value in given.items():
        for a, b in zip(
            *(x if isinstance(x, list) else [x] for x in (value, before[key])), strict=True
        ):
            assert a.equal(b) if isinstance(a, torch.Tensor) else a == b, key


def test_a_skipped_step_counts_for_nothing_when_all_is_frozen():
    """GradScaler's found_inf, where there is nothing to do but to count."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = GradESAdamW([p], tau=math.inf, grace_steps=0, statistic="norm", stop_grad=False)
    for found_inf, steps in [(0.0, 1), (0.0, 2), (1.0, 2), (0.0, 3)]:
        p.grad, opt.found_inf = torch.ones_like(p), torch.tensor(found_inf)
        opt.step()
        assert opt.all_frozen and opt.report().step == steps


# Negative controls: the comparisons above notice a fault in what is handed to the op


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("_hyper", lambda real: lambda group, factor: [*real(group, factor)[:-2], 0.0, 1.0]),
        ("_keeping", lambda real: lambda groups: [0 for group in groups for _ in group.params]),
        ("_measuring", lambda real: lambda groups, t: [code and 2 for code in real(groups, t)]),
        ("_updating", lambda real: lambda *a: ([8] * len(real(*a)[0]), *real(*a)[1:])),
    ],
    ids=["no weight decay", "keeps nothing", "measures the norm", "updates what is frozen"],
)
def test_a_fault_is_noticed(name, fault, monkeypatch):
    monkeypatch.setattr(native, name, fault(getattr(native, name)))
    # A frozen tensor has given its moments back: the op refuses to update it.
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_run_equals_the_reference("change", "next_step", {}, torch.float32)
