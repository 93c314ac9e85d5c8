"""The Triton kernels and memory: storage dtypes, the memory that they write, and no other."""

import math

import pytest
import torch
import triton_runs as tr
from harness import TIMINGS, exact, parameters, snapshot, values

from grades_kernels.functional import grades_adamw

pytestmark = [pytest.mark.gpu] if tr.CUDA else []
IDS = {"ids": lambda dtype: str(dtype).removeprefix("torch.")}


# Storage dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "signal"])
@pytest.mark.parametrize("wide_grads", [False, True], ids=["", "fp32-grads"])
@pytest.mark.parametrize("dtype", tr.LOW, **IDS)
def test_low_precision(dtype, wide_grads, statistic):
    """Three-way bound: at most twice as far from an fp32 run as torch in the same dtype.

    The kernels compute in fp32 and round when they store, so they should be closer. Triton's
    interpreter truncates to bf16 instead of rounding, which costs up to one ulp of every store.
    """
    grad_dtype = torch.float32 if wide_grads else dtype
    ours, theirs, wide = tr.low_precision_runs(dtype, grad_dtype, statistic=statistic, eps=1e-4)
    before = parameters((17, 23), (1, 1025), device=tr.DEVICE)
    truncated = 0 if tr.CUDA else wide.t * torch.finfo(dtype).eps
    tr.assert_same_decisions(ours, theirs, rel=1e-5 if statistic in ("change", "norm") else 2e-2)
    for i, (p, q, x) in enumerate(zip(ours.params, theirs.params, wide.params, strict=True)):
        assert p.dtype == dtype
        states = [run.opt.state[y] for run, y in ((ours, p), (theirs, q), (wide, x))]
        for key in tr.MOMENTS:
            assert states[0][key].dtype == dtype
        if statistic == "change":
            assert states[0]["prev_grad"].dtype == grad_dtype
            assert torch.equal(states[0]["prev_grad"], states[1]["prev_grad"])
        triples = {"parameter": [y.detach().float() for y in (p, q, x)]}
        triples |= {key: [s[key].float() for s in states] for key in tr.MOMENTS}
        for what, (mine, torchs, true) in triples.items():
            bound = 2 * (torchs - true).abs().max() + truncated * true.abs().max()
            assert (mine - true).abs().max() <= bound, f"{what} {i}"
        moved = (x.detach() - before[i]).abs().max().item()
        assert moved > 10 * torch.finfo(dtype).eps, "updates are larger than the rounding"


@pytest.mark.parametrize("dtype", [torch.float32, *tr.LOW], **IDS)
def test_weight_change_is_measured_after_rounding(dtype):
    """The weights as they are rounded into memory: a move too small to be stored is none."""
    options = {**tr.WEIGHT_CHANGE, "tau": 0.0, "lr": 3e-3, "eps": 1e-4}
    run = tr.start(dtype=dtype, **options).steps(2)
    for _ in range(3):
        before = [p.double() for p in values(run.params)]
        run.steps(1)
        pairs = zip(values(run.params[:2]), before, strict=False)
        moved = [(p.double() - q).abs().sum().item() for p, q in pairs]
        assert list(run.opt.statistics().values()) == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("dtype", tr.LOW, **IDS)
@pytest.mark.parametrize("n", [1023, 1024, 1025, 4097])
def test_low_precision_blocks(n, dtype):
    """2-byte tensors have blocks of 1024: the last elements are updated and measured too."""
    assert tr.module("triton_kernels").block_size(2) == 1024
    runs = tr.both(((1, n),), dtype=dtype, tau=0.0, grace_steps=1, eps=1e-3)
    (before,) = values(runs[0].params)
    for run in runs:
        run.steps(2)
    tr.assert_same_decisions(*runs)
    (p,), (q,) = runs[0].params, runs[1].params
    assert (p - q).abs().max() <= 4 * torch.finfo(dtype).eps * q.abs().max()
    assert (p != before).float().mean() > 0.9


# Buffers of our own, through the functional form ----------------------------------------------

SENTINEL = 12345.0


class Framed:
    """One tensor of every kind in the middle of a filled buffer, at an odd offset.

    Args:
        offset: Elements before the tensor; with 1, 3 or 5 it is not aligned to 16 bytes.
        poison: Whether the previous gradient is NaN.
    """

    def __init__(self, n, offset, dtype=torch.float32, moment_dtype=None, poison=False):
        self.buffers, self.inner, self.n, self.offset = {}, {}, n, offset
        generator = torch.Generator().manual_seed(n)
        for key in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "prev_grad"):
            kind = (moment_dtype or dtype) if "avg" in key else dtype
            self.buffers[key] = torch.full((n + 4096,), SENTINEL, device=tr.DEVICE, dtype=kind)
            self.inner[key] = self.buffers[key][offset : offset + n].view(1, n)
            self.inner[key].copy_(torch.rand(1, n, generator=generator))
        if poison:
            self.inner["prev_grad"].fill_(math.nan)
        self.step = torch.full((), 2.0, device=tr.DEVICE)  # as many as any statistic needs
        self.before = {key: x.clone() for key, x in self.inner.items()}

    def run(self, table, unit, fused=True, **options):
        inner = self.inner
        options = {
            **{"beta1": 0.8, "beta2": 0.97, "lr": 0.03, "weight_decay": 0.1, "eps": 1e-6},
            **{"amsgrad": False, "maximize": False},
            **options,
        }
        columns = [[inner[key]] for key in ("param", "grad", "exp_avg", "exp_avg_sq")]
        columns += [[inner["max_exp_avg_sq"]] if options["amsgrad"] else [], [self.step]]
        options |= {"fused": fused, "prev_grads": [inner["prev_grad"]]}
        grades_adamw(*columns, units=[unit], table=table, **options)
        return self

    def assert_surroundings_untouched(self):
        for key, buffer in self.buffers.items():
            assert (buffer[: self.offset] == SENTINEL).all(), f"written before {key}"
            assert (buffer[self.offset + self.n :] == SENTINEL).all(), f"written after {key}"

    def changed(self):
        return {key for key, x in self.inner.items() if exact(x) != exact(self.before[key])}


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("offset", [0, 1, 3, 5, 16])
@pytest.mark.parametrize("n", [1, 513, 2050])
def test_nothing_around_a_tensor_is_written(n, offset, timing, amsgrad):
    """Views at any offset, aligned or not: each is updated as a tensor of its own would be."""
    twins = Framed(n, offset), Framed(n, offset)
    if offset % 4:
        assert all(x.data_ptr() % 16 for x in twins[0].inner.values())
    for fused, framed in zip((True, False), twins, strict=True):
        table, unit = tr.table_at(4, n_elements=n, freeze_timing=timing)
        framed.run(table, unit, fused, amsgrad=amsgrad)
        framed.assert_surroundings_untouched()
        expected = {"param", "prev_grad", *tr.MOMENTS} | ({"max_exp_avg_sq"} if amsgrad else set())
        assert expected - {"max_exp_avg_sq"} <= framed.changed() <= expected
        assert table.t == unit.prev_step == 4
    ours, theirs = (framed.inner for framed in twins)
    assert torch.equal(ours["prev_grad"], ours["grad"])
    for key in ours:
        tr.assert_close(ours[key], theirs[key], 8 * tr.EPS, key)


@pytest.mark.parametrize("n", [1, 513, 2050])
def test_a_stored_gradient_is_written_whole(n):
    """prev_grad is poisoned with NaN: the step before a check overwrites every element of it."""
    table, unit = tr.table_at(2, n_elements=n)
    framed = Framed(n, 3, poison=True).run(table, unit)
    assert torch.equal(framed.inner["prev_grad"], framed.inner["grad"])
    framed.assert_surroundings_untouched()


def test_other_steps_do_not_touch_the_previous_gradient():
    """Neither before the step before a check, nor between checks."""
    for t, config in ((1, {}), (3, {"check_every": 5})):
        table, unit = tr.table_at(t, n_elements=600, **config)
        unit.prev_step = -1
        framed = Framed(600, 3, poison=True).run(table, unit)
        assert framed.inner["prev_grad"].isnan().all()
        assert math.isnan(unit.value), "a check without evidence is void"


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("timing", TIMINGS)
def test_a_decision_takes_effect_in_its_own_step(timing, cooldown):
    """Before the update it spares the frozen tensor, and previous gradients in any case."""
    changed = []
    for fused in (True, False):
        table, unit = tr.table_at(4, tau=math.inf, freeze_timing=timing, cooldown=cooldown)
        changed.append(Framed(600, 0).run(table, unit, fused).changed())
        assert unit.decided_at == 4 and unit.prev_step == 3
    updated = {"param", *tr.MOMENTS}
    spared = timing == "same_step"
    want = (updated if cooldown or not spared else set()) | (set() if spared else {"prev_grad"})
    assert changed == [want, want]


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum", "signal"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_fp32_moments_of_bf16_parameters(timing, statistic):
    """Moments wider than the parameter: as exact as the fp32 reference, the parameter rounded."""
    n = 1100
    ours, wide = Framed(n, 8, torch.bfloat16, torch.float32), Framed(n, 8)
    for key, x in wide.inner.items():
        x.copy_(ours.inner[key])
    units = []
    for framed, fused in ((ours, True), (wide, False)):
        table, unit = tr.table_at(4, statistic, n_elements=n, freeze_timing=timing)
        framed.run(table, unit, fused)
        units.append(unit)
    ours.assert_surroundings_untouched()
    assert units[0].value == pytest.approx(units[1].value, rel=1e-5)
    for key in tr.MOMENTS:
        assert ours.inner[key].dtype == torch.float32
        tr.assert_close(ours.inner[key], wide.inner[key], 8 * tr.EPS, key)
    got, want = ours.inner["param"].float(), wide.inner["param"]
    ulp = torch.finfo(torch.bfloat16).eps * want.abs()
    assert ((got - want).abs() <= (0.501 if tr.CUDA else 1.001) * ulp).all()


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("prev_grad", lambda x: x.double(), r"prev_grads\[0\] is torch.float64"),
        ("prev_grad", lambda x: x.t().contiguous().t(), r"prev_grads\[0\] is .* and strides"),
        ("exp_avg", lambda x: x.t().contiguous().t(), r"exp_avgs\[0\] is .* and strides"),
        ("exp_avg_sq", lambda x: x.to("meta"), r"exp_avg_sqs\[0\] is torch.float32 on meta"),
    ],
    ids=["dtype", "strides", "moment's strides", "moment's device"],
)
def test_buffers_that_the_kernels_would_misread_are_an_error(key, wrong, message):
    """The kernels walk through memory by address, so any other layout gives wrong numbers."""
    framed = Framed(12, 0)
    table, unit = tr.table_at(4, n_elements=12)
    framed.inner = {name: x.view(3, 4) for name, x in framed.inner.items()}
    framed.inner[key] = wrong(framed.inner[key])
    with pytest.raises(ValueError, match=message):
        framed.run(table, unit)


def test_a_tensor_is_divided_among_programs(monkeypatch):
    """The largest first. Only one whose parts are added up has a limit on its programs."""
    monkeypatch.setattr(tr.module("triton_tables"), "_MAX_PROGRAMS_PER_TENSOR", 2)
    params = [torch.rand(n, device=tr.DEVICE) for n in (8192, 32768, 32769)]
    params = [params[0].view(2, -1), params[1].view(8, -1), params[2][1:]]
    run = tr.start(params=[torch.nn.Parameter(p) for p in params], tau=0.0).steps(1)
    tables = tr.engine_of(run).tables
    assert tables.rows["n_programs"].tolist() == [2, 2, 8]
    assert tables.program_table[:, 0].tolist() == [1, 1, 0, 0, *[2] * 8]
    assert (tables.rows["address_bits"] & 15 != 0).tolist() == [False, False, True]


# Frozen means untouched -----------------------------------------------------------------------

ARRIVING = {"usual": 0.5, "huge": 1e30, "nan": math.nan, "inf": math.inf, "zero": 0.0}


@pytest.mark.parametrize("dropped", [True, False], ids=["dropped", "launched"])
@pytest.mark.parametrize("arriving", ARRIVING)
def test_frozen_tensors_keep_every_bit(arriving, dropped, monkeypatch):
    """Parameter, moments and step count, whatever gradient arrives; others move on.

    A frozen tensor's programs return at once while they are launched; the host drops them from the
    launches when there are enough of them.
    """
    if not dropped:
        monkeypatch.setattr(
            tr.module("triton_tables").DeviceTables, "drop_frozen", lambda self: None
        )
    run = tr.start(stop_grad=False, amsgrad=True).steps(3)
    assert run.opt.frozen_units == ["group0.param1"]
    before = snapshot(run.opt)
    for _ in range(2):
        grads = tr.usual(run)
        grads[1].fill_(ARRIVING[arriving])
        run.step(*grads)
    after = snapshot(run.opt)
    for side in (before, after):
        del side["state"][1]["grades_t"]
    tr.assert_same_bits(
        (after["params"][1], after["state"][1]), (before["params"][1], before["state"][1])
    )
    for moving in (0, 2):
        assert not torch.equal(after["params"][moving], before["params"][moving])
        assert after["state"][moving]["step"] == before["state"][moving]["step"] + 2
    assert run.events == [(3, "group0.param1", 3, 15)]
    n_programs = sum(n for _, _, n in tr.engine_of(run).tables.programs.values())
    assert n_programs == (2 if dropped else 3)
